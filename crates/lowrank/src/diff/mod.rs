//! How two LoRA adapters of one model differ: the subspaces that they act in, and how much they change the weights.
//!
//! The measures are those of section 7 of Hu et al. (2021): the overlap φ(i, j) of the spans of the first i and j singular
//! vectors, and the amplification ‖ΔW‖/‖UᵀWV‖, where U and V are the singular vectors of ΔW. All comes from A and B and
//! their r×r cores; a matrix as large as W is only ever W itself.

mod subspace;

use std::path::Path;

use lowrank_kernels::{Layout, Tensor};
use nalgebra::DMatrix;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::Error;
use crate::base::Network;
use crate::model::{Decoder, LinearId, Part, WeightId, families};
use crate::svd::{Decomposition, Matrix, decompose_product};
use crate::tuning::lora::{Branch, Branches, branches};
use subspace::{effective_rank, left_vectors, similarity};

/// Whose singular vectors are compared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum))]
pub enum Of {
    /// A: directions of the input.
    ///
    /// Its right singular vectors.
    #[default]
    A,
    /// B: directions of the output.
    ///
    /// Its left singular vectors.
    B,
    /// ΔW: directions of the input, in the order of what they come to.
    ///
    /// The right singular vectors of scale·B·A.
    Delta,
}

/// Two adapters side by side.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct DiffReport {
    /// The first adapter's folder.
    pub first: String,
    /// The second adapter's folder.
    pub second: String,
    /// Whose singular vectors `similarity` compares.
    pub of: Of,
    /// The model whose weights they were held against.
    pub model: Option<String>,
    /// Whether both were trained on the same base; `None` where one does not say.
    pub same_base: Option<bool>,
    /// The modules that both adapt, in the order of their layers.
    pub modules: Vec<ModuleDiff>,
    /// Modules that only the first adapts.
    pub only_first: Vec<String>,
    /// Modules that only the second adapts.
    pub only_second: Vec<String>,
}

/// One module in both adapters.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ModuleDiff {
    /// Its name, with `.q`, `.k` or `.v` behind it for a part of a fused one.
    pub module: String,
    /// Outputs and inputs.
    pub shape: (usize, usize),
    /// φ(i, j) at `[i - 1][j - 1]`; empty where one of the two has no direction, as an untrained B.
    pub similarity: Vec<Vec<f64>>,
    /// What φ is on average between random subspaces of all i and all j dimensions: max(i, j)/d.
    pub random_similarity: f64,
    /// ⟨ΔW₁, ΔW₂⟩ / (‖ΔW₁‖·‖ΔW₂‖); `None` where one of them is nought.
    pub cosine: Option<f64>,
    /// The first adapter's change.
    pub first: Change,
    /// The second adapter's change.
    pub second: Change,
}

impl ModuleDiff {
    /// φ(1, 1): the overlap of the two strongest directions.
    pub fn strongest(&self) -> Option<f64> {
        self.similarity.first()?.first().copied()
    }

    /// φ over all directions of both.
    pub fn whole(&self) -> Option<f64> {
        self.similarity.last()?.last().copied()
    }
}

/// What one adapter does to a module.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Change {
    /// r
    pub r: usize,
    /// ‖ΔW‖_F
    pub norm: f64,
    /// The singular values of ΔW that are not nought, largest first.
    pub singular_values: Vec<f64>,
    /// exp of the entropy of the singular values' shares.
    pub effective_rank: f64,
    /// Beside the model's weight; `None` without a model, or where ΔW is nought.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weight: Option<AgainstWeight>,
}

/// ΔW beside W: the figures of the paper's table 7.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct AgainstWeight {
    /// ‖W‖_F
    pub norm: f64,
    /// ‖UᵀWV‖_F with the singular vectors of ΔW.
    pub projected: f64,
    /// The same with as many of W's own: the most that there can be.
    pub projected_on_own: f64,
    /// The same with random subspaces of as many dimensions: the root of the mean square, ‖W‖·k/√(out·in).
    pub projected_on_random: f64,
    /// ‖ΔW‖ / ‖UᵀWV‖: how many times over ΔW holds what W has in ΔW's directions; `None` where W has nothing there.
    pub amplification: Option<f64>,
}

/// Compares two LoRA folders, and with `base` also what they add with what is there.
///
/// # Errors
/// Folders that are not LoRA adapters or are damaged, adapters that share no module or whose modules have different shapes, and
/// a base that lacks one of their modules.
pub fn diff(
    first: &Path,
    second: &Path,
    of: Of,
    base: Option<&Network>,
) -> Result<DiffReport, Error> {
    let (one, other) = (branches(first)?, branches(second)?);
    let shared = pairs(first, second, &one, &other)?;
    let modules = shared
        .par_iter()
        .map(|(one, other)| compare(one, other, of, base.map(|base| &*base.decoder)))
        .collect::<Result<_, _>>()?;
    let without = |all: &Branches, others: &Branches| {
        let has = |name: &str| others.branches.iter().any(|branch| branch.name == name);
        let names = all.branches.iter().map(|branch| branch.name.clone());
        names.filter(|name| !has(name)).collect()
    };
    let bases = one
        .base_fingerprint
        .as_ref()
        .zip(other.base_fingerprint.as_ref());
    Ok(DiffReport {
        first: first.display().to_string(),
        second: second.display().to_string(),
        of,
        model: base.map(|base| base.source.to_string()),
        same_base: bases.map(|(one, other)| one == other),
        modules,
        only_first: without(&one, &other),
        only_second: without(&other, &one),
    })
}

/// The branches of the modules that both have.
fn pairs<'a>(
    first: &Path,
    second: &Path,
    one: &'a Branches,
    other: &'a Branches,
) -> Result<Vec<(&'a Branch, &'a Branch)>, Error> {
    let shared: Vec<_> = one
        .branches
        .iter()
        .filter_map(|branch| {
            let same = other.branches.iter().find(|b| b.name == branch.name)?;
            Some((branch, same))
        })
        .collect();
    let problems: Vec<String> = if shared.is_empty() {
        let example = |all: &Branches| {
            let first = all.branches.first();
            first.map_or("nothing", |b| b.name.as_str()).to_owned()
        };
        vec![format!(
            "they share no module: this one adapts {} and others, the other one {} and others",
            example(other),
            example(one)
        )]
    } else {
        let shape = |b: &Branch| format!("[{}, {}]", b.outputs.len(), b.inputs);
        shared
            .iter()
            .filter(|(one, other)| (&one.outputs, one.inputs) != (&other.outputs, other.inputs))
            .map(|(one, other)| {
                format!(
                    "{}: {} here and {} there",
                    one.name,
                    shape(other),
                    shape(one)
                )
            })
            .collect()
    };
    if problems.is_empty() {
        return Ok(shared);
    }
    Err(Error::Settings(format!(
        "{} cannot be compared with {}:\n  {}\nare they adapters of different models?",
        second.display(),
        first.display(),
        problems.join("\n  ")
    )))
}

fn compare(
    one: &Branch,
    other: &Branch,
    of: Of,
    model: Option<&Decoder>,
) -> Result<ModuleDiff, Error> {
    let weight = model.map(|model| weight(model, one)).transpose()?;
    let (first, second) = (Factors::of(one), Factors::of(other));
    let (u, v) = (first.vectors(of), second.vectors(of));
    let similarity = if u.ncols() == 0 || v.ncols() == 0 {
        Vec::new()
    } else {
        similarity(&u, &v)
    };
    // tr((B₁A₁)ᵀ B₂A₂) = Σ (B₁ᵀB₂) ∘ (A₁A₂ᵀ)
    let inner = (first.b.tr_mul(&second.b)).dot(&(&first.a * second.a.transpose()));
    let (first, second) = (
        first.change(one, weight.as_ref()),
        second.change(other, weight.as_ref()),
    );
    let norms = first.norm * second.norm;
    Ok(ModuleDiff {
        module: one.name.clone(),
        shape: (one.outputs.len(), one.inputs),
        random_similarity: u.ncols().max(v.ncols()) as f64 / u.nrows() as f64,
        similarity,
        cosine: (norms > 0.0).then(|| (one.scale * other.scale * inner / norms).clamp(-1.0, 1.0)),
        first,
        second,
    })
}

/// A branch as matrices.
struct Factors {
    /// [r, in]
    a: Matrix,
    /// [out, r]
    b: Matrix,
    delta: Decomposition,
}

impl Factors {
    fn of(branch: &Branch) -> Self {
        let matrix = |rows, cols, values: &[f32]| {
            Matrix::from_row_iterator(rows, cols, values.iter().map(|v| f64::from(*v)))
        };
        let a = matrix(branch.rank, branch.inputs, &branch.a);
        let b = matrix(branch.outputs.len(), branch.rank, &branch.b);
        let delta = decompose_product(&b, &a, branch.scale);
        Self { a, b, delta }
    }

    fn vectors(&self, of: Of) -> Matrix {
        match of {
            Of::A => left_vectors(&self.a.transpose()),
            Of::B => left_vectors(&self.b),
            Of::Delta => self.delta.right.clone(),
        }
    }

    fn change(self, branch: &Branch, weight: Option<&DMatrix<f32>>) -> Change {
        let Self { delta, .. } = self;
        let norm = delta.values.iter().map(|v| v * v).sum::<f64>().sqrt();
        let against = |w: &DMatrix<f32>| {
            let (rows, cols) = w.shape();
            let rank = delta.values.len();
            let whole = f64::from(w.norm());
            let projected = subspace::projected_norm(w, &delta.left, &delta.right);
            AgainstWeight {
                norm: whole,
                projected,
                projected_on_own: subspace::norm_of_largest(w, rank),
                projected_on_random: whole * rank as f64 / ((rows * cols) as f64).sqrt(),
                amplification: (projected > 0.0).then(|| norm / projected),
            }
        };
        Change {
            r: branch.rank,
            norm,
            effective_rank: effective_rank(&delta.values),
            weight: weight.filter(|_| norm > 0.0).map(against),
            singular_values: delta.values,
        }
    }
}

/// The model's weight beside a branch, [out, in].
fn weight(model: &Decoder, branch: &Branch) -> Result<DMatrix<f32>, Error> {
    let config = model.config();
    let fits = |id: &LinearId| {
        let (input, output) = config.linear_shape(id.kind);
        families::linear_module(config, *id) == branch.module
            && input == branch.inputs
            && output >= branch.outputs.end
            && (branch.name != branch.module || output == branch.outputs.len())
    };
    let Some(id) = config.linears().find(fits) else {
        return Err(Error::Settings(format!(
            "the model has no linear {} of {} inputs and {} outputs; give the model that the adapters were trained on",
            branch.module, branch.inputs, branch.outputs.end
        )));
    };
    let stored = model.weights().view(WeightId::Linear(id, Part::Weight));
    let mut copy = Tensor::zeros(stored.rows(), stored.cols());
    copy.view_mut().copy_from(stored);
    // nalgebra's matrices lie column by column.
    let columns = DMatrix::from_vec(copy.cols(), copy.rows(), copy.view().to_vec());
    let whole = match config.layout {
        Layout::OutIn => columns.transpose(),
        Layout::InOut => columns,
    };
    if branch.outputs.len() == whole.nrows() {
        return Ok(whole);
    }
    Ok(whole
        .rows(branch.outputs.start, branch.outputs.len())
        .into_owned())
}
