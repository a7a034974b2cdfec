//! SmolLM3: Llama's shape, but the queries and keys of some layers do not know their positions.

use lowrank_formats::FormatError;
use lowrank_formats::hf_config::HfConfig;

use super::super::config::{Biases, Family, LayerConfig, ModelConfig};
use super::llama::{Absent, attention_biases, shapes};
use super::rope::Rules;

pub(super) fn config(raw: &HfConfig) -> Result<ModelConfig, FormatError> {
    let absent = Absent {
        kv_heads: Some(4),
        head_size: None,
        positions: 32_768,
        eps: 1e-6,
        tied: true,
    };
    let base = shapes(raw, Family::SmolLm3, &absent)?;
    let rules = Rules::new(2_000_000.0, base.max_position_embeddings, base.head_size);
    Ok(ModelConfig {
        position: rules.read(raw)?,
        layers: layers(raw, base.num_hidden_layers)?,
        biases: Biases {
            mlp: raw.opt_bool("mlp_bias")?.unwrap_or(false),
            ..attention_biases(raw, false)?
        },
        ..base
    })
}

fn layers(raw: &HfConfig, layers: usize) -> Result<Vec<LayerConfig>, FormatError> {
    const ROPES: &str = "no_rope_layers";
    const INTERVAL: &str = "no_rope_layer_interval";
    const USED: &str = "use_sliding_window";
    let interval = raw.opt_usize(INTERVAL)?.unwrap_or(4);
    if interval == 0 {
        return Err(raw.unsupported(INTERVAL, "a whole number of at least 1"));
    }
    // In spite of its name 1 stands for a layer with rotary positions.
    let has_rope = match raw.opt_f64s(ROPES)? {
        Some(ropes) if ropes.len() != layers => {
            let accepted = format!("a list of num_hidden_layers, which is {layers}");
            return Err(raw.unsupported(ROPES, accepted));
        }
        Some(ropes) => ropes.into_iter().map(|rope| rope != 0.0).collect(),
        None => (1..=layers)
            .map(|layer| !layer.is_multiple_of(interval))
            .collect::<Vec<_>>(),
    };
    let used = raw.opt_bool(USED)?.unwrap_or(false);
    let window = super::sliding_window(raw, None)?;
    let slides = |layer: usize| used && window.is_some() && !has_rope[layer];
    let kinds = super::mixed_layers(raw, layers, window, slides)?;
    if !used && kinds.iter().any(|kind| kind.window.is_some()) {
        return Err(raw.unsupported(USED, "true, since layer_types names layers that slide"));
    }
    let kinds = kinds.into_iter().zip(has_rope);
    let layer = |(kind, has_rope): (LayerConfig, bool)| LayerConfig {
        rope: has_rope.then_some(0),
        ..kind
    };
    Ok(kinds.map(layer).collect())
}
