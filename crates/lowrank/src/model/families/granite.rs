//! Granite: Llama's shape with factors of the embeddings, the scores, what is added to the residual stream, and the logits.

use lowrank_formats::FormatError;
use lowrank_formats::hf_config::HfConfig;
use lowrank_kernels::LogitScaling;

use super::super::config::{Biases, EmbeddingScale, Family, ModelConfig};
use super::llama::{Absent, attention_biases, shapes};
use super::rope::Rules;

pub(super) fn config(raw: &HfConfig) -> Result<ModelConfig, FormatError> {
    let absent = Absent {
        kv_heads: None,
        head_size: None,
        positions: 2048,
        eps: 1e-6,
        tied: false,
    };
    let base = shapes(raw, Family::Granite, &absent)?;
    let factor = |field: &str| {
        let factor = raw.opt_f64(field)?.unwrap_or(1.0) as f32;
        if factor == 0.0 {
            return Err(raw.unsupported(field, "a number above 0"));
        }
        Ok(factor)
    };
    let embedding = factor("embedding_multiplier")?;
    let rules = Rules::new(10_000.0, base.max_position_embeddings, base.head_size);
    Ok(ModelConfig {
        position: rules.read(raw)?,
        layers: super::same_layers(base.num_hidden_layers, None),
        embedding_scale: (embedding != 1.0).then_some(EmbeddingScale::All(embedding)),
        attention_scale: Some(factor("attention_multiplier")?),
        residual_scale: factor("residual_multiplier")?,
        logit_scaling: LogitScaling {
            divisor: factor("logits_scaling")?,
            softcap: None,
        },
        biases: Biases {
            mlp: raw.opt_bool("mlp_bias")?.unwrap_or(false),
            ..attention_biases(raw, false)?
        },
        ..base
    })
}
