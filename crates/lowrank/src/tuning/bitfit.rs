//! Biases alone (Ben Zaken, Ravfogel and Goldberg, 2022).
//!
//! A model that has biases trains its own, those of layer norms among them. One that has none, as Llama, gets a bias at
//! zero on every linear of its blocks.

use crate::model::Adapter;
use crate::model::{ModelConfig, Part, WeightId, Weights};

/// `peft_type` in adapter_config.json.
pub(super) const PEFT_TYPE: &str = "LOWRANK_BITFIT";

/// The base's biases, or zeros where it has none.
pub fn inject(weights: &Weights) -> Adapter {
    let mut adapter = lay_out(weights.config());
    adapter.copy_base(weights);
    adapter
}

/// Number of trained values.
pub fn parameters(config: &ModelConfig) -> usize {
    biases(config).iter().map(|(_, (_, cols))| cols).sum()
}

pub(super) fn lay_out(config: &ModelConfig) -> Adapter {
    Adapter::replacing(config, &biases(config))
}

/// What is trained, in words.
pub(crate) fn coverage(config: &ModelConfig) -> String {
    let biases = biases(config);
    let whose = if has_own(config) {
        "of the model's own"
    } else {
        "added"
    };
    format!(
        "{} biases {whose}, {} trainable parameters",
        biases.len(),
        parameters(config)
    )
}

fn is_bias(id: WeightId) -> bool {
    matches!(
        id,
        WeightId::Linear(_, Part::Bias)
            | WeightId::Norm(_, _, Part::Bias)
            | WeightId::FinalNorm(Part::Bias)
    )
}

/// Whether the model has biases of its own.
fn has_own(config: &ModelConfig) -> bool {
    config.weights().iter().any(|(id, _)| is_bias(*id))
}

fn biases(config: &ModelConfig) -> Vec<(WeightId, (usize, usize))> {
    if has_own(config) {
        let all = config.weights().into_iter();
        return all.filter(|(id, _)| is_bias(*id)).collect();
    }
    config
        .linears()
        .map(|id| {
            let (_, output) = config.linear_shape(id.kind);
            (WeightId::Linear(id, Part::Bias), (1, output))
        })
        .collect()
}
