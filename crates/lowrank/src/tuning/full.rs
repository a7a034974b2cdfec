//! Full fine-tuning: every weight of the base is trained; also the random start of a model that is pretrained.

use std::collections::HashMap;
use std::path::Path;

use lowrank_kernels::{DType, Tensor, fill_normal};

use crate::Error;
use crate::model::Adapter;
use crate::model::weights::write_model;
use crate::model::{ModelConfig, Part, WeightId, Weights};
use crate::random::mix;

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
            WeightId::Norm(_, _, Part::Weight) | WeightId::FinalNorm(Part::Weight) => {
                tensor.view_mut().fill(1.0);
                None
            }
            WeightId::Norm(..) | WeightId::FinalNorm(_) | WeightId::Linear(_, Part::Bias) => None,
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
    write_model(config, folder, dtype, |index, _, out| {
        out.write_all(&adapter.params.view(index).to_le_bytes(dtype))
    })
}
