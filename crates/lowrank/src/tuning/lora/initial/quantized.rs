//! What a quantized base has lost as the first values of A and B (Li et al., "`LoftQ`", 2023).
//!
//! W is the weight as it was, Q the quantized one: s·B·A is the part of rank r that is nearest to W − Q. That is one iteration of the paper,
//! and PEFT's `replace_lora_weights_loftq`: Q stays as it is. Where Q may change, as while a model is quantized, further iterations quantize
//! what B·A leaves of W (PEFT's `loftq_init`); [`loftq`] does both. PEFT does not divide by s = lora_alpha / r, so that its branches are
//! what is lost where lora_alpha is r; here they always are.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use lowrank_formats::checkpoint::Checkpoint;
use lowrank_formats::hf_config::HfConfig;
use lowrank_kernels::{DType, Tensor, add_assign, frobenius_norm, scale as scale_by};

use super::low_rank::{split, with_signs};
use super::{Beginning, dense, dense_of, weight_of};
use crate::Error;
use crate::model::stored::{StoredTensors, Unquantized};
use crate::model::weights::find;
use crate::model::{ModelConfig, Weights, families};
use crate::svd::{Matrix, strongest};
use crate::tuning::Starting;
use crate::tuning::lora::Candidate;

/// The weights before they were quantized.
pub(super) struct Source {
    folder: PathBuf,
    model: ModelConfig,
    stored: StoredTensors,
    /// Places whose weight is not quantized.
    exact: AtomicUsize,
    places: usize,
}

impl Source {
    /// Opens the folder of the model that the base was made of, by default the base as it was before it was quantized while it was loaded,
    /// and looks whether it has all that these places need.
    ///
    /// # Errors
    /// No place is quantized; no folder, or one that cannot be read; tensors that are missing or of another shape, all of them.
    pub(super) fn open(
        folder: Option<&Path>,
        with: &Starting,
        places: &[Candidate],
    ) -> Result<Self, Error> {
        let weights = with.decoder.weights();
        if !places.iter().any(|place| is_quantized(weights, place)) {
            return Err(Error::Settings(
                "init_lora_weights: loftq begins with what a quantized base has lost, and none of the adapted modules of this base is \
                 quantized; give a quantized model (a GGUF file, or load_in beside a plain one), or another init_lora_weights such as pissa"
                    .to_owned(),
            ));
        }
        let Some(Unquantized { model, stored }) = (match folder {
            Some(folder) => Some(plain(folder)?),
            None => (with.unquantized)()?,
        }) else {
            return Err(Error::Settings(
                "init_lora_weights: loftq needs the model as it was before it was quantized; give its folder as loftq_weights"
                    .to_owned(),
            ));
        };
        let folder = folder.unwrap_or(Path::new(with.base));
        let base = weights.config();
        let mut problems = Vec::new();
        for place in places {
            let id = weight_of(place);
            let (own, needed) = (
                model.linear_shape(place.id.kind),
                base.linear_shape(place.id.kind),
            );
            let is_there = model.weights().iter().any(|(known, _)| *known == id);
            match find(&model, &stored, id)?.filter(|_| is_there) {
                None => problems.push(format!(
                    "{}: missing, and the quantized model has it",
                    families::tensor_name(base, id)
                )),
                Some(_) if own != needed => problems.push(format!(
                    "{}: {} inputs and {} outputs, and the quantized model has {} and {}",
                    families::tensor_name(base, id),
                    own.0,
                    own.1,
                    needed.0,
                    needed.1
                )),
                Some(_) => {}
            }
        }
        if !problems.is_empty() {
            problems.push("is loftq_weights the model that was quantized?".to_owned());
            return Err(Error::Tensors {
                path: folder.to_path_buf(),
                problems,
            });
        }
        Ok(Self {
            folder: folder.to_path_buf(),
            model,
            stored,
            exact: AtomicUsize::new(0),
            places: places.len(),
        })
    }

    /// What a place begins with; `None` where its weight is not quantized, or another stage of a pipeline has it.
    ///
    /// # Errors
    /// A tensor that cannot be read, or is not the one that was quantized.
    pub(super) fn beginning(
        &self,
        weights: &Weights,
        place: &Candidate,
        r: usize,
        scale: f64,
    ) -> Result<Option<Beginning>, Error> {
        if !is_quantized(weights, place) {
            self.exact.fetch_add(1, Ordering::Relaxed);
            return Ok(None);
        }
        let Some(quantized) = dense(weights, place) else {
            return Ok(None);
        };
        let id = weight_of(place);
        let tensor = |problem: String| Error::Tensors {
            path: self.folder.clone(),
            problems: vec![format!(
                "{}: {problem}",
                families::tensor_name(&self.model, id)
            )],
        };
        let entry =
            find(&self.model, &self.stored, id)?.ok_or_else(|| tensor("missing".to_owned()))?;
        let (input, output) = self.model.linear_shape(place.id.kind);
        let shape = match self.model.linear_layout(place.id.kind) {
            lowrank_kernels::Layout::OutIn => (output, input),
            lowrank_kernels::Layout::InOut => (input, output),
        };
        if entry.shape() != [shape.0, shape.1] {
            return Err(tensor(format!(
                "shape {:?}, expected [{}, {}]",
                entry.shape(),
                shape.0,
                shape.1
            )));
        }
        let whole = entry.to_tensor(shape, DType::F32)?;
        let exact = dense_of(&self.model, place, whole.view());
        entry.bytes().release();
        let norm = frobenius_norm(exact.view());
        let lost = difference(exact, &quantized);
        // Two weights that have nothing to do with each other are further apart than either is from nought.
        if frobenius_norm(lost.view()) >= norm {
            return Err(tensor(
                "it is further from the quantized one than from nought; is loftq_weights the model that was quantized?"
                    .to_owned(),
            ));
        }
        Ok(Some(with_signs(split(&strongest(&lost, r), scale))))
    }

    /// What is to be said, behind what is adapted.
    pub(super) fn note(&self) -> String {
        match self.exact.load(Ordering::Relaxed) {
            0 => String::new(),
            exact => format!(
                "; {exact} of {} modules are not quantized and begin as with gaussian",
                self.places
            ),
        }
    }
}

/// The model in the folder that `loftq_weights` names.
fn plain(folder: &Path) -> Result<Unquantized, Error> {
    if !folder.is_dir() {
        return Err(Error::Settings(format!(
            "loftq_weights: {} is not a folder; give the folder with config.json and the safetensors of the model before it was \
             quantized",
            folder.display()
        )));
    }
    Ok(Unquantized {
        model: families::read_config(&HfConfig::read(folder)?)?,
        stored: Checkpoint::open(folder)?.into(),
    })
}

/// Whether a place's weight has lost something to be stored in blocks.
fn is_quantized(weights: &Weights, place: &Candidate) -> bool {
    let id = weight_of(place);
    let held = weights.get(id).map(|view| view.format());
    let stored = weights.config().formats.get(&id).copied();
    [held, stored]
        .into_iter()
        .flatten()
        .any(|format| format.block_len() > 1)
}

/// one − other
fn difference(mut one: Tensor, other: &Tensor) -> Tensor {
    let mut other = Tensor::from_f32(other.rows(), other.cols(), other.to_vec());
    scale_by(other.view_mut(), -1.0);
    add_assign(one.view_mut(), other.view());
    one
}

/// A weight that was quantized together with the branch beside it.
pub struct Loftq {
    /// A [r, in]
    pub a: Tensor,
    /// B [out, r]
    pub b: Tensor,
    /// The quantized weight, as `quantize` made it.
    pub quantized: Tensor,
}

/// Quantizes a weight [out, in] of f32 numbers so that it is near to Q + s·B·A: in turn, Q is made of W − s·B·A, and s·B·A of W − Q
/// (Li et al., 2023, algorithm 1).
///
/// # Errors
/// What `quantize` says.
pub fn loftq(
    weight: &Tensor,
    quantize: &dyn Fn(&Tensor) -> Result<Tensor, Error>,
    r: usize,
    scale: f64,
    iterations: usize,
) -> Result<Loftq, Error> {
    let copy = || Tensor::from_f32(weight.rows(), weight.cols(), weight.to_vec());
    let mut left = copy();
    let mut turn = 0;
    loop {
        let quantized = quantize(&left)?;
        let lost = difference(copy(), &quantized);
        let Beginning { b, a } = with_signs(split(&strongest(&lost, r), scale));
        turn += 1;
        if turn < iterations {
            left = difference(copy(), &tensor_of(&(&b * &a * scale)));
            continue;
        }
        return Ok(Loftq {
            a: tensor_of(&a),
            b: tensor_of(&b),
            quantized,
        });
    }
}

fn tensor_of(matrix: &Matrix) -> Tensor {
    // nalgebra's matrices lie column by column.
    let values = matrix
        .transpose()
        .iter()
        .map(|value| *value as f32)
        .collect();
    Tensor::from_f32(matrix.nrows(), matrix.ncols(), values)
}
