//! One linear of a combination: the sum as a product, A's with A's and B's with B's, or ΔW as a whole.

use lowrank_formats::checkpoint::StoredDType;
use lowrank_kernels::{Layout, Tensor, all_finite, frobenius_norm, low_rank_delta};

use super::super::LoraModule;
use super::super::folder::rounded;
use super::super::products::{difference_norm, fits, split, tensor, total};
use super::arithmetic::Arithmetic;
use super::{Combination, CombineOptions, CombinedModule, Form};
use crate::Error;
use crate::names::named;
use crate::svd::{Decomposition, Matrix, decompose_product, largest, matrix, product_norm};

/// A module in one of the adapters.
pub(super) struct Member<'a> {
    pub(super) module: &'a LoraModule,
    pub(super) weight: f64,
}

impl Member<'_> {
    fn factor(&self) -> f64 {
        self.weight * self.module.scale
    }
}

/// All that adapts one linear.
pub(super) struct Group<'a> {
    pub(super) name: &'a str,
    /// For each adapter.
    pub(super) members: Vec<Option<Member<'a>>>,
}

impl<'a> Group<'a> {
    pub(super) fn present(&self) -> impl Iterator<Item = &Member<'a>> {
        self.members.iter().flatten()
    }
}

/// A module of the result.
pub(super) struct Made {
    pub(super) module: LoraModule,
    pub(super) report: CombinedModule,
    /// The squares of its distance from what it stands for, and of the norm of that.
    pub(super) squares: Option<[f64; 2]>,
}

/// # Errors
/// Numbers that are too large for the file's type.
pub(super) fn combine_module(group: &Group, options: &CombineOptions) -> Result<Made, Error> {
    let members: Vec<&Member> = group.present().collect();
    let most = members.iter().map(|member| member.module.rank()).max();
    let wanted = options.svd_rank.or(most).unwrap_or(1);
    let arithmetic = Arithmetic {
        sparsity: options.combination.sparsity(),
        density: options.density.unwrap_or(1.0),
        elect: options
            .combination
            .elects()
            .then(|| options.majority_sign.unwrap_or_default()),
        seed: options.seed.unwrap_or(0),
    };
    let dtype = options.dtype.into();
    // Nothing infinite gets into an SVD, which would not end.
    let finite = |is_finite: bool| {
        is_finite.then_some(()).ok_or_else(|| {
            Error::Settings(format!(
                "{}: the combined numbers are too large for {}; give smaller {}, or store f32",
                group.name,
                StoredDType::from(options.dtype).name(),
                named("weights")
            ))
        })
    };
    let stored = |[a, b]: [Tensor; 2]| {
        let made = [rounded(a, dtype), rounded(b, dtype)];
        finite(made.iter().all(|tensor| all_finite(tensor.view())))?;
        Ok::<_, Error>(made)
    };
    let ([a, b], squares) = match options.combination.form() {
        Form::Whole => {
            let whole = whole(&members, &arithmetic, group.name);
            finite(all_finite(whole.view()))?;
            let shape = [whole.rows(), whole.cols()];
            let rank = wanted.min(shape[0]).min(shape[1]);
            let made = stored(cut(&largest(&whole, rank), rank, shape, options.clamp))?;
            let error = distance(whole, &made);
            (made, Some(error))
        }
        form => {
            let sum = Sum::of(&members);
            finite(fits(&sum.a) && fits(&sum.b))?;
            let made = stored(match form {
                Form::Cat => sum.stacked(&members),
                Form::Svd => {
                    let shape = [sum.b.nrows(), sum.a.ncols()];
                    let rank = wanted.min(sum.a.nrows()).min(shape[0]).min(shape[1]);
                    let found = decompose_product(&sum.b, &sum.a, 1.0);
                    cut(&found, rank, shape, options.clamp)
                }
                _ => factors(&members, &arithmetic, group.name),
            })?;
            let means_the_sum = matches!(
                options.combination,
                Combination::Cat | Combination::Svd | Combination::Linear
            );
            let squares = means_the_sum.then(|| sum.distance(&made));
            (made, squares)
        }
    };
    let report = CombinedModule {
        module: group.name.to_owned(),
        ranks: group
            .members
            .iter()
            .map(|member| member.as_ref().map(|member| member.module.rank()))
            .collect(),
        rank: a.rows(),
        norm: product_norm(&matrix(&b), &matrix(&a)),
        relative_error: total([squares].into_iter()),
    };
    let module = LoraModule {
        name: group.name.to_owned(),
        a,
        b,
        scale: 1.0,
        magnitude: None,
    };
    Ok(Made {
        module,
        report,
        squares,
    })
}

/// Σ wᵢ·ΔWᵢ as one product: A's below each other, and B's with their factors side by side.
struct Sum {
    /// [Σ r, in]
    a: Matrix,
    /// [out, Σ r]
    b: Matrix,
}

impl Sum {
    fn of(members: &[&Member]) -> Self {
        let ranks = || members.iter().map(|member| member.module.rank());
        let (outputs, inputs) = members
            .first()
            .map_or((0, 0), |m| (m.module.b.rows(), m.module.a.cols()));
        let mut a = Matrix::zeros(ranks().sum(), inputs);
        let mut b = Matrix::zeros(outputs, ranks().sum());
        let mut first = 0;
        for member in members {
            let r = member.module.rank();
            a.rows_mut(first, r).copy_from(&matrix(&member.module.a));
            let scaled = matrix(&member.module.b) * member.factor();
            b.columns_mut(first, r).copy_from(&scaled);
            first += r;
        }
        Self { a, b }
    }

    /// As PEFT stacks them: the factors are A's.
    fn stacked(&self, members: &[&Member]) -> [Tensor; 2] {
        let (mut a, mut b) = (self.a.clone(), self.b.clone());
        let mut first = 0;
        for member in members {
            let r = member.module.rank();
            let mut rows = a.rows_mut(first, r);
            rows *= member.factor();
            b.columns_mut(first, r).copy_from(&matrix(&member.module.b));
            first += r;
        }
        [tensor(&a), tensor(&b)]
    }

    /// The squares of ‖Σ wᵢΔWᵢ − B·A‖ and of ‖Σ wᵢΔWᵢ‖.
    fn distance(&self, [a, b]: &[Tensor; 2]) -> [f64; 2] {
        let size = product_norm(&self.b, &self.a);
        let made = (&matrix(b), &matrix(a));
        [
            difference_norm((&self.b, &self.a), made).powi(2),
            size.powi(2),
        ]
    }
}

/// A's with A's and B's with B's, each times the root of the factor; the sign is A's.
fn factors(members: &[&Member], arithmetic: &Arithmetic, name: &str) -> [Tensor; 2] {
    let root = |member: &&Member| member.factor().abs().sqrt();
    let signed = |member: &&Member| root(member).copysign(member.factor());
    let of_a: Vec<f64> = members.iter().map(signed).collect();
    let of_b: Vec<f64> = members.iter().map(root).collect();
    let apply = |tensors: Vec<&Tensor>, weights: &[f64], part: &str| {
        let shape = tensors.first().map_or((0, 0), |t| (t.rows(), t.cols()));
        let values = tensors.into_iter().map(Tensor::to_vec).collect();
        let made = arithmetic.apply(values, weights, &format!("{name}.{part}"));
        Tensor::from_f32(shape.0, shape.1, made)
    };
    [
        apply(
            members.iter().map(|m| &m.module.a).collect(),
            &of_a,
            "lora_A",
        ),
        apply(
            members.iter().map(|m| &m.module.b).collect(),
            &of_b,
            "lora_B",
        ),
    ]
}

/// The ΔWᵢ combined, [out, in].
fn whole(members: &[&Member], arithmetic: &Arithmetic, name: &str) -> Tensor {
    let mut shape = (0, 0);
    let changes = members.iter().map(|Member { module, .. }| {
        shape = (module.b.rows(), module.a.cols());
        let mut change = Tensor::zeros(shape.0, shape.1);
        let (a, b, scale) = (module.a.view(), module.b.view(), module.scale as f32);
        low_rank_delta(change.view_mut(), a, b, scale, Layout::OutIn, 0);
        change.to_vec()
    });
    let changes = changes.collect();
    let weights: Vec<f64> = members.iter().map(|member| member.weight).collect();
    Tensor::from_f32(shape.0, shape.1, arithmetic.apply(changes, &weights, name))
}

/// The squares of ‖whole − B·A‖ and of ‖whole‖.
fn distance(mut whole: Tensor, [a, b]: &[Tensor; 2]) -> [f64; 2] {
    let size = frobenius_norm(whole.view());
    low_rank_delta(whole.view_mut(), a.view(), b.view(), -1.0, Layout::OutIn, 0);
    [frobenius_norm(whole.view()).powi(2), size.powi(2)]
}

/// A [rank, in] and B [out, rank] of a decomposition, as PEFT splits it: the singular values are B's. Where it has fewer values than
/// `rank`, the rest is nought.
fn cut(
    found: &Decomposition,
    rank: usize,
    [outputs, inputs]: [usize; 2],
    clamp: Option<f64>,
) -> [Tensor; 2] {
    let (mut a, mut b) = split(found, rank.max(1), [outputs, inputs]);
    if let Some(quantile) = clamp {
        let limit = both_signs_quantile(a.iter().chain(b.iter()), quantile);
        for value in a.iter_mut().chain(b.iter_mut()) {
            *value = value.clamp(-limit, limit);
        }
    }
    [tensor(&a), tensor(&b)]
}

/// The quantile of numbers and their negatives together, interpolated as `torch.quantile` does; it is not negative from 0.5 on.
fn both_signs_quantile<'a>(values: impl Iterator<Item = &'a f64>, quantile: f64) -> f64 {
    let mut all: Vec<f64> = values.flat_map(|value| [*value, -value]).collect();
    let place = quantile * all.len().saturating_sub(1) as f64;
    let (below, share) = (place.floor() as usize, place.fract());
    let (_, low, above) = all.select_nth_unstable_by(below, f64::total_cmp);
    let next = above.iter().copied().min_by(f64::total_cmp).unwrap_or(*low);
    *low + (next - *low) * share
}
