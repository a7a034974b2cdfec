//! Full fine-tuning: every weight of the base is trained; also the random start of a model that is pretrained.

use std::borrow::Cow;
use std::collections::HashMap;
use std::convert::Infallible;
use std::path::Path;

use lowrank_formats::hf_config::HfConfig;
use lowrank_kernels::{DType, Tensor, View, fill_normal};
use serde_json::Value;

use super::{BaseMark, Loaded, MethodConfig, MethodOptions, MethodSpec, Started, Starting};
use crate::Error;
use crate::fields::{Field, fields};
use crate::model::Adapter;
use crate::model::weights::write_model;
use crate::model::{ModelConfig, Part, WeightId, Weights};
use crate::random::mix;

fields! {
    /// It has no options: everything is trained.
    pub struct Settings {}
}

/// There are no adapter files.
pub type Config = Infallible;

/// Full fine-tuning in the table of methods.
pub(super) struct Spec;

impl MethodSpec for Spec {
    fn title(&self) -> &'static str {
        "full fine-tuning"
    }

    fn help(&self) -> &'static str {
        "Every weight of the model"
    }

    fn learning_rate(&self) -> f64 {
        2e-5
    }

    fn fields(&self) -> Vec<Field> {
        Vec::new()
    }

    fn label(&self, _: &MethodOptions) -> String {
        "full".to_owned()
    }

    fn writes_model(&self) -> bool {
        true
    }

    fn lay_out(&self, _: &MethodOptions, model: &ModelConfig) -> Result<Adapter, Error> {
        Ok(lay_out(model))
    }

    fn start(&self, _: &MethodOptions, with: &Starting) -> Result<Started, Error> {
        let weights = with.decoder.weights();
        let adapter = inject(weights);
        weights.release_pages();
        Ok(Started {
            adapter,
            coverage: None,
            config: None,
        })
    }

    fn peft_types(&self) -> &'static [&'static str] {
        &[]
    }

    fn load(&self, folder: &Path, _: &HfConfig, _: &ModelConfig) -> Result<Loaded, Error> {
        Err(Error::Settings(format!(
            "{} is no adapter: full fine-tuning writes a whole model",
            folder.display()
        )))
    }
}

impl MethodConfig for Config {
    fn save(&self, _: &Path, _: &ModelConfig, _: &Adapter, _: BaseMark) -> Result<(), Error> {
        match *self {}
    }

    fn options(&self) -> Vec<(&'static str, Value)> {
        match *self {}
    }
}

/// The base's values as the trainable set.
pub fn inject(weights: &Weights) -> Adapter {
    let mut adapter = lay_out(weights.config());
    adapter.copy_base(weights);
    adapter
}

pub(super) fn lay_out(config: &ModelConfig) -> Adapter {
    Adapter::replacing(config, &config.weights())
}

/// Number of trained values.
pub fn parameters(config: &ModelConfig) -> usize {
    config.parameters()
}

/// Random weights for pretraining: linears normal with 1/√(inputs), tables with `initializer_range`, norms at one, biases
/// at zero.
///
/// A fixed 0.02, as GPT-2 has it, would depend on the width: this start keeps the size of a row through a linear whatever
/// the width is.
///
/// # Errors
/// Never for shapes that come from a [`ModelConfig`].
pub fn random_weights(
    config: ModelConfig,
    initializer_range: f32,
    seed: u64,
) -> Result<Weights, Error> {
    let mut tensors = HashMap::new();
    for (index, (id, (rows, cols))) in config.weights().into_iter().enumerate() {
        let mut tensor = Tensor::zeros(rows, cols);
        let std = match id {
            WeightId::Norm(_, _, Part::Weight)
            | WeightId::EmbeddingNorm(Part::Weight)
            | WeightId::RelativeNorm(Part::Weight)
            | WeightId::ClassifierNorm(Part::Weight)
            | WeightId::FinalNorm(Part::Weight) => {
                tensor.view_mut().fill(1.0 - config.norm.weight_offset());
                None
            }
            id if id.is_vector() => None,
            WeightId::Linear(linear, Part::Weight) => {
                Some(1.0 / (config.linear_shape(linear.kind).0 as f32).sqrt())
            }
            _ => Some(initializer_range),
        };
        if let Some(std) = std {
            fill_normal(tensor.view_mut(), std, mix(seed, index as u64));
        }
        tensors.insert(id, tensor);
    }
    Weights::from_tensors(config, tensors, DType::F32)
}

/// Writes the trained weights as `model.safetensors` in `folder`, rounded once to `dtype`.
///
/// # Errors
/// The file can't be written.
pub fn save_weights(
    config: &ModelConfig,
    adapter: &Adapter,
    folder: &Path,
    dtype: DType,
) -> Result<(), Error> {
    let params = &adapter.params;
    save_values(config, folder, dtype, |slot| {
        Ok(Cow::Borrowed(&params.as_slice()[params.range(slot)]))
    })
}

/// The same where `values` gives those of each slot.
///
/// # Errors
/// The file can't be written; what `values` says.
pub(crate) fn save_values<'a>(
    config: &ModelConfig,
    folder: &Path,
    dtype: DType,
    values: impl Fn(usize) -> Result<Cow<'a, [f32]>, Error>,
) -> Result<(), Error> {
    write_model(config, folder, dtype, |slot, _, out| {
        let values = values(slot).map_err(std::io::Error::other)?;
        out.write_all(&View::of_row(&values).to_le_bytes(dtype))
    })
}
