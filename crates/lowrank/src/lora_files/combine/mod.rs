//! Several LoRA adapters as one, in the ways of PEFT's `add_weighted_adapter` (`peft/tuners/lora/model.py`).
//!
//! With ΔWᵢ = sᵢ·Bᵢ·Aᵢ, where sᵢ is lora_alpha/r or lora_alpha/√r as each adapter says, and weights wᵢ:
//!
//! | Combination | ΔW |
//! | --- | --- |
//! | `cat` | Σ wᵢ·ΔWᵢ to the bit of rounding; the rank is the sum of the ranks |
//! | `svd` | the best approximation of Σ wᵢ·ΔWᵢ of a given rank |
//! | `linear` | (Σ √\|wᵢsᵢ\|·Bᵢ)·(Σ ±√\|wᵢsᵢ\|·Aᵢ): one rank, and products of one adapter's B with another one's A |
//! | `ties`, `dare_linear`, `dare_ties`, `magnitude_prune` | as `linear`, A's and B's combined by [`arithmetic`] |
//! | the same with `_svd` | the ΔWᵢ combined by [`arithmetic`], then the best approximation of a given rank |
//!
//! The result has the scale 1 in every module (lora_alpha = r, without rsLoRA). PEFT keeps `use_rslora` of the first
//! adapter beside lora_alpha = r, so that its result is √r times too large there; here it is not.

mod agree;
mod arithmetic;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use lowrank_formats::checkpoint::StoredDType;
use lowrank_kernels::{Layout, Tensor, all_finite, frobenius_norm, low_rank_delta};
use rayon::prelude::*;
use serde::Serialize;

use super::folder::{self, rounded};
use super::{FileDtype, LoraFile, LoraModule, order};
use crate::Error;
use crate::names::{named, valued};
use crate::svd::{Decomposition, Matrix, decompose_product, largest, matrix, product_norm};
use agree::Named;
pub use arithmetic::MajoritySign;
use arithmetic::{Arithmetic, Sparsity};

/// How adapters are combined; the names are those of PEFT's `combination_type`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum))]
#[cfg_attr(feature = "clap", value(rename_all = "snake_case"))]
pub enum Combination {
    /// A's below each other and B's side by side: the exact sum, of the sum of the ranks.
    #[default]
    Cat,
    /// The exact sum, cut to a rank by SVD.
    Svd,
    /// Sums of A's and of B's: quick, of one rank, and not the sum of the changes.
    Linear,
    /// As linear, of the largest numbers that have the elected sign (TIES).
    Ties,
    /// TIES of the whole changes, cut to a rank.
    TiesSvd,
    /// As linear, of random numbers (DARE).
    DareLinear,
    /// As ties, of random numbers (DARE).
    DareTies,
    /// DARE of the whole changes, cut to a rank.
    DareLinearSvd,
    /// DARE with elected signs of the whole changes, cut to a rank.
    DareTiesSvd,
    /// As linear, of the largest numbers.
    MagnitudePrune,
    /// The largest numbers of the whole changes, cut to a rank.
    MagnitudePruneSvd,
}

/// What the numbers of are combined.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    /// A's and B's in one.
    Cat,
    /// ΔW in its factors.
    Svd,
    /// A's with A's and B's with B's.
    Factors,
    /// ΔW as a whole.
    Whole,
}

impl Combination {
    /// PEFT's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cat => "cat",
            Self::Svd => "svd",
            Self::Linear => "linear",
            Self::Ties => "ties",
            Self::TiesSvd => "ties_svd",
            Self::DareLinear => "dare_linear",
            Self::DareTies => "dare_ties",
            Self::DareLinearSvd => "dare_linear_svd",
            Self::DareTiesSvd => "dare_ties_svd",
            Self::MagnitudePrune => "magnitude_prune",
            Self::MagnitudePruneSvd => "magnitude_prune_svd",
        }
    }

    fn form(self) -> Form {
        match self {
            Self::Cat => Form::Cat,
            Self::Svd => Form::Svd,
            Self::Linear
            | Self::Ties
            | Self::DareLinear
            | Self::DareTies
            | Self::MagnitudePrune => Form::Factors,
            Self::TiesSvd | Self::DareLinearSvd | Self::DareTiesSvd | Self::MagnitudePruneSvd => {
                Form::Whole
            }
        }
    }

    fn sparsity(self) -> Sparsity {
        match self {
            Self::Cat | Self::Svd | Self::Linear => Sparsity::All,
            Self::Ties | Self::TiesSvd | Self::MagnitudePrune | Self::MagnitudePruneSvd => {
                Sparsity::Largest
            }
            Self::DareLinear | Self::DareTies | Self::DareLinearSvd | Self::DareTiesSvd => {
                Sparsity::Random
            }
        }
    }

    fn elects(self) -> bool {
        matches!(
            self,
            Self::Ties | Self::TiesSvd | Self::DareTies | Self::DareTiesSvd
        )
    }

    fn has_svd(self) -> bool {
        matches!(self.form(), Form::Svd | Form::Whole)
    }
}

/// What is combined, how, and where to. An option that a combination does not have must be `None`.
#[derive(Clone, Debug)]
pub struct CombineOptions<'a> {
    /// The adapters' folders.
    pub adapters: &'a [PathBuf],
    /// A weight for each, negative to subtract one; empty: all 1.
    pub weights: &'a [f64],
    /// How.
    pub combination: Combination,
    /// The share of the numbers that stays, in (0, 1]; of TIES, DARE and `magnitude_prune`, which need it.
    pub density: Option<f64>,
    /// How signs are elected, of TIES and `dare_ties`; `None`: [`MajoritySign::Total`].
    pub majority_sign: Option<MajoritySign>,
    /// The rank of `svd` and the others with SVD; `None`: the largest rank of the adapters, module by module.
    pub svd_rank: Option<usize>,
    /// PEFT's `svd_clamp`: limits the numbers of A and B to this quantile of them, in (0.5, 1].
    ///
    /// PEFT takes the quantile of the numbers as they are, though the sign of every pair of vectors is arbitrary; here each
    /// number counts with both signs.
    pub clamp: Option<f64>,
    /// Which random numbers DARE drops; `None`: 0. They are not those of PyTorch.
    pub seed: Option<u64>,
    /// The folder of the new adapter.
    pub output: &'a Path,
    /// How its A and B are stored.
    pub dtype: FileDtype,
    /// Whether an adapter in the folder is replaced.
    pub overwrite: bool,
    /// Whether adapters of different bases or for different tasks are combined.
    pub force: bool,
}

impl<'a> CombineOptions<'a> {
    /// The sum of adapters in a new folder.
    pub fn new(adapters: &'a [PathBuf], output: &'a Path) -> Self {
        Self {
            adapters,
            weights: &[],
            combination: Combination::default(),
            density: None,
            majority_sign: None,
            svd_rank: None,
            clamp: None,
            seed: None,
            output,
            dtype: FileDtype::default(),
            overwrite: false,
            force: false,
        }
    }
}

/// What a combination came to.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CombineReport {
    /// How it was made.
    pub combination: Combination,
    /// Of what.
    pub adapters: Vec<AdapterShare>,
    /// The adapted linears, in the order of their layers.
    pub modules: Vec<CombinedModule>,
    /// Tensors that are one adapter's own, or the same in all that have them: rows of tokens, and modules that are saved as a whole.
    pub taken_over: Vec<String>,
    /// Numbers in the A's and B's.
    pub parameters: u64,
    /// ‖ΔW‖_F over all modules.
    pub norm: f64,
    /// [`CombinedModule::relative_error`] over all modules.
    pub relative_error: Option<f64>,
}

/// One of the adapters.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct AdapterShare {
    /// Its folder.
    pub adapter: String,
    /// Its weight.
    pub weight: f64,
    /// Linears that it adapts.
    pub modules: usize,
}

/// One linear of the result.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CombinedModule {
    /// Its name.
    pub module: String,
    /// The rank in each adapter; `None` where one does not adapt it.
    pub ranks: Vec<Option<usize>>,
    /// The rank in the result.
    pub rank: usize,
    /// ‖ΔW‖_F of what was written.
    pub norm: f64,
    /// How far what was written is from what it stands for, relative to that. `cat`, `svd` and `linear` stand for Σ wᵢ·ΔWᵢ, and the others with SVD
    /// for the ΔW before it is cut. `None`: for the others, and where there is nothing to be far from.
    pub relative_error: Option<f64>,
}

/// Combines adapters and writes the result as a PEFT folder.
///
/// # Errors
/// Options that the combination does not have or that are out of range; adapters that are damaged or do not belong together;
/// ranks that differ, where the combination needs one; tensors that are not LoRA's and differ; an output that exists (without
/// `overwrite`) or must not be replaced; a result that is not finite.
pub fn combine(options: &CombineOptions) -> Result<CombineReport, Error> {
    let weights = check(options)?;
    let folders: Vec<&Path> = options.adapters.iter().map(PathBuf::as_path).collect();
    folder::check_output(options.output, options.overwrite, &folders)?;
    let dtype = options.dtype.into();
    folder::write(options.output, options.overwrite, dtype, || {
        let files = folders
            .iter()
            .map(|folder| LoraFile::read(folder))
            .collect::<Result<Vec<_>, _>>()?;
        let adapters: Vec<Named> = folders.iter().copied().zip(&files).collect();
        let (file, report) = combined(&adapters, &weights, options)?;
        Ok((file, folder::tokenizer_files(&adapters)?, report))
    })
}

/// Checks the options; returns a weight for each adapter.
fn check(options: &CombineOptions) -> Result<Vec<f64>, Error> {
    let (combination, name) = (options.combination, options.combination.name());
    let mut problems = Vec::new();
    let count = options.adapters.len();
    if count == 0 {
        problems.push("there is no adapter to combine".to_owned());
    }
    let weights = match options.weights {
        [] => vec![1.0; count],
        weights => weights.to_vec(),
    };
    if weights.len() != count {
        problems.push(format!(
            "{} says {} numbers for {count} adapters; give one for each, in their order",
            named("weights"),
            weights.len()
        ));
    }
    let sparse = combination.sparsity() != Sparsity::All;
    let mut has = |given: bool, wanted: bool, key: &str| {
        if given && !wanted {
            problems.push(format!(
                "{} does nothing with `{name}`; leave it out",
                named(key)
            ));
        }
    };
    has(options.density.is_some(), sparse, "density");
    has(
        options.majority_sign.is_some(),
        combination.elects(),
        "majority_sign",
    );
    has(
        options.svd_rank.is_some(),
        combination.has_svd(),
        "svd_rank",
    );
    has(options.clamp.is_some(), combination.has_svd(), "clamp");
    has(
        options.seed.is_some(),
        combination.sparsity() == Sparsity::Random,
        "seed",
    );
    if sparse && options.density.is_none() {
        problems.push(format!(
            "`{name}` needs the share of the numbers that stays; give {}",
            valued("density", "0.5")
        ));
    }
    if let Some(density) = options.density.filter(|d| !(*d > 0.0 && *d <= 1.0)) {
        problems.push(format!(
            "{} is {density}; it must be greater than 0 and at most 1",
            named("density")
        ));
    }
    if options.svd_rank == Some(0) {
        problems.push(format!(
            "{} is 0; it must be 1 or greater",
            named("svd_rank")
        ));
    }
    if let Some(clamp) = options.clamp.filter(|c| !(*c > 0.5 && *c <= 1.0)) {
        problems.push(format!(
            "{} is {clamp}; it must be greater than 0.5 and at most 1",
            named("clamp")
        ));
    }
    if let Some(weight) = weights.iter().find(|weight| !weight.is_finite()) {
        problems.push(format!(
            "{} has {weight}, which is not finite",
            named("weights")
        ));
    }
    if problems.is_empty() {
        return Ok(weights);
    }
    Err(Error::Settings(problems.join("\n")))
}

/// A module in one of the adapters.
struct Member<'a> {
    module: &'a LoraModule,
    weight: f64,
}

impl Member<'_> {
    fn factor(&self) -> f64 {
        self.weight * self.module.scale
    }
}

/// All that adapts one linear.
struct Group<'a> {
    name: &'a str,
    /// For each adapter.
    members: Vec<Option<Member<'a>>>,
}

impl<'a> Group<'a> {
    fn present(&self) -> impl Iterator<Item = &Member<'a>> {
        self.members.iter().flatten()
    }
}

fn combined(
    adapters: &[Named],
    weights: &[f64],
    options: &CombineOptions,
) -> Result<(LoraFile, CombineReport), Error> {
    let agreed = agree::agree(adapters, options.force)?;
    let groups = groups(adapters, weights);
    if options.combination.form() == Form::Factors {
        check_ranks(adapters, &groups, options.combination)?;
    }
    let make = |group: &Group| combine_module(group, options);
    let made: Vec<Made> = match options.combination.form() {
        // Matrices as large as a weight: one module at a time, whose products have all threads.
        Form::Whole => groups.iter().map(make).collect::<Result<_, _>>()?,
        _ => groups.par_iter().map(make).collect::<Result<_, _>>()?,
    };
    let squares = made.iter().map(|made| made.squares);
    let relative_error = total(squares);
    let (modules, reports): (Vec<LoraModule>, Vec<CombinedModule>) = made
        .into_iter()
        .map(|made| (made.module, made.report))
        .unzip();
    let report = CombineReport {
        combination: options.combination,
        adapters: adapters
            .iter()
            .zip(weights)
            .map(|((folder, file), weight)| AdapterShare {
                adapter: folder.display().to_string(),
                weight: *weight,
                modules: file.modules.len(),
            })
            .collect(),
        taken_over: agreed
            .others
            .iter()
            .map(|entry| entry.name.clone())
            .collect(),
        parameters: modules.iter().map(LoraModule::parameters).sum(),
        norm: reports.iter().map(|m| m.norm.powi(2)).sum::<f64>().sqrt(),
        relative_error,
        modules: reports,
    };
    let file = LoraFile {
        config: agreed.config,
        modules,
        others: agreed.others,
        metadata: agreed.metadata,
    };
    Ok((file, report))
}

/// √(Σ error² / Σ size²), where all modules have both.
pub(super) fn total(squares: impl Iterator<Item = Option<[f64; 2]>>) -> Option<f64> {
    let (mut error, mut size) = (0.0, 0.0);
    for pair in squares {
        let [e, s] = pair?;
        error += e;
        size += s;
    }
    (size > 0.0).then(|| (error / size).sqrt())
}

/// The modules of all, sorted by layer and name.
fn groups<'a>(adapters: &[Named<'a>], weights: &[f64]) -> Vec<Group<'a>> {
    let mut groups: BTreeMap<Vec<(u64, String)>, Group> = BTreeMap::new();
    for (index, ((_, file), weight)) in adapters.iter().zip(weights).enumerate() {
        for module in &file.modules {
            let group = groups.entry(order(&module.name)).or_insert_with(|| Group {
                name: &module.name,
                members: adapters.iter().map(|_| None).collect(),
            });
            group.members[index] = Some(Member {
                module,
                weight: *weight,
            });
        }
    }
    groups.into_values().collect()
}

/// # Errors
/// Modules whose ranks differ, all of which are named.
fn check_ranks(
    adapters: &[Named],
    groups: &[Group],
    combination: Combination,
) -> Result<(), Error> {
    const SHOWN: usize = 3;
    let differ = |group: &&Group| {
        let mut ranks = group.present().map(|member| member.module.rank());
        let first = ranks.next();
        ranks.any(|rank| Some(rank) != first)
    };
    let lines: Vec<String> = groups
        .iter()
        .filter(differ)
        .map(|group| {
            let each = group
                .members
                .iter()
                .zip(adapters)
                .filter_map(|(member, (folder, _))| {
                    Some(format!(
                        "{} in {}",
                        member.as_ref()?.module.rank(),
                        folder.display()
                    ))
                });
            format!(
                "{}: rank {}",
                group.name,
                each.collect::<Vec<_>>().join(", ")
            )
        })
        .collect();
    if lines.is_empty() {
        return Ok(());
    }
    let mut shown = lines[..lines.len().min(SHOWN)].join("\n  ");
    if lines.len() > SHOWN {
        shown.push_str(&format!("\n  and {} more", lines.len() - SHOWN));
    }
    let name = combination.name();
    let whole = match combination {
        Combination::Linear => String::new(),
        _ => format!(", or `{name}_svd`"),
    };
    Err(Error::Settings(format!(
        "`{name}` adds numbers of A's and of B's, which then must have one rank, and these have not:\n  {shown}\n\
         use `cat` or `svd`{whole} ({})",
        named("combine")
    )))
}

/// A module of the result.
struct Made {
    module: LoraModule,
    report: CombinedModule,
    /// The squares of its distance from what it stands for, and of the norm of that.
    squares: Option<[f64; 2]>,
}

fn combine_module(group: &Group, options: &CombineOptions) -> Result<Made, Error> {
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
    let stored = |[a, b]: [Tensor; 2]| [rounded(a, dtype), rounded(b, dtype)];
    let ([a, b], squares) = match options.combination.form() {
        Form::Whole => {
            let whole = whole(&members, &arithmetic, group.name);
            let found = largest(&whole, wanted);
            let shape = [whole.rows(), whole.cols()];
            let made = stored(cut(
                found,
                wanted.min(shape[0]).min(shape[1]),
                shape,
                options.clamp,
            ));
            let error = distance(whole, &made);
            (made, Some(error))
        }
        form => {
            let sum = Sum::of(&members);
            let made = stored(match form {
                Form::Cat => sum.stacked(&members),
                Form::Svd => {
                    let shape = [sum.b.nrows(), sum.a.ncols()];
                    let most = wanted.min(sum.a.nrows()).min(shape[0]).min(shape[1]);
                    cut(
                        decompose_product(&sum.b, &sum.a, 1.0),
                        most,
                        shape,
                        options.clamp,
                    )
                }
                _ => factors(&members, &arithmetic, group.name),
            });
            let means_the_sum = matches!(
                options.combination,
                Combination::Cat | Combination::Svd | Combination::Linear
            );
            let squares = means_the_sum.then(|| sum.distance(&made));
            (made, squares)
        }
    };
    if !all_finite(a.view()) || !all_finite(b.view()) {
        return Err(Error::Settings(format!(
            "{}: the combined numbers are too large for {}; give smaller {}, or store f32",
            group.name,
            StoredDType::from(options.dtype).name(),
            named("weights")
        )));
    }
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

/// ‖B₁·A₁ − B₂·A₂‖_F.
pub(super) fn difference_norm(one: (&Matrix, &Matrix), other: (&Matrix, &Matrix)) -> f64 {
    let ((b, a), (other_b, other_a)) = (one, other);
    let (r, more) = (a.nrows(), other_a.nrows());
    let mut left = b.clone().resize_horizontally(r + more, 0.0);
    left.columns_mut(r, more).copy_from(&-other_b);
    let mut right = a.clone().resize_vertically(r + more, 0.0);
    right.rows_mut(r, more).copy_from(other_a);
    product_norm(&left, &right)
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
    found: Decomposition,
    rank: usize,
    [outputs, inputs]: [usize; 2],
    clamp: Option<f64>,
) -> [Tensor; 2] {
    let (mut a, mut b) = split(&found, rank.max(1), [outputs, inputs]);
    if let Some(quantile) = clamp {
        let limit = both_signs_quantile(a.iter().chain(b.iter()), quantile);
        for value in a.iter_mut().chain(b.iter_mut()) {
            *value = value.clamp(-limit, limit);
        }
    }
    [tensor(&a), tensor(&b)]
}

/// The first `rank` directions as A [rank, in] and B [out, rank] with B·A their part of ΔW.
pub(super) fn split(
    found: &Decomposition,
    rank: usize,
    [outputs, inputs]: [usize; 2],
) -> (Matrix, Matrix) {
    let (mut a, mut b) = (Matrix::zeros(rank, inputs), Matrix::zeros(outputs, rank));
    for (k, value) in found.values.iter().enumerate().take(rank) {
        a.row_mut(k).tr_copy_from(&found.right.column(k));
        b.column_mut(k).copy_from(&(found.left.column(k) * *value));
    }
    (a, b)
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

/// A matrix as a tensor of f32.
pub(super) fn tensor(matrix: &Matrix) -> Tensor {
    // nalgebra's matrices lie column by column.
    let turned = matrix.transpose();
    let values = turned.iter().map(|value| *value as f32).collect();
    Tensor::from_f32(matrix.nrows(), matrix.ncols(), values)
}
