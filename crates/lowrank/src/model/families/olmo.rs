//! OLMo 2 and 3: norms behind the sublayers alone, RMS norms on the whole of q and k. OLMo 3 has layers that see a window between layers
//! that see everything.

use lowrank_formats::FormatError;
use lowrank_formats::hf_config::HfConfig;

use super::super::config::{BlockNorm, Family, ModelConfig, NormPlacement, Position, QkNorm};
use super::llama::{Absent, attention_biases, shapes};
use super::rope::Rules;
use super::{Names, llama};

pub(super) fn olmo2(raw: &HfConfig) -> Result<ModelConfig, FormatError> {
    let base = olmo(raw, Family::Olmo2)?;
    let rules = Rules::new(10_000.0, base.max_position_embeddings, base.head_size);
    Ok(ModelConfig {
        position: rules.read(raw)?,
        layers: super::same_layers(base.num_hidden_layers, None),
        ..base
    })
}

pub(super) fn olmo3(raw: &HfConfig) -> Result<ModelConfig, FormatError> {
    const THETA: f64 = 500_000.0;
    let base = olmo(raw, Family::Olmo3)?;
    let rules = |theta| Rules::new(theta, base.max_position_embeddings, base.head_size);
    // transformers takes a `rope_theta` beside the objects for the layers that see everything alone.
    let theta = raw.opt_f64("rope_theta")?.unwrap_or(THETA);
    let full = rules(theta).read_kind(raw, "full_attention")?;
    let sliding = rules(THETA).read_kind(raw, "sliding_attention")?;
    let window = super::sliding_window(raw, Some(4096))?;
    Ok(ModelConfig {
        position: Position::Rope(vec![full, sliding]),
        layers: super::mixed_layers(raw, base.num_hidden_layers, window, |layer| {
            !(layer + 1).is_multiple_of(4)
        })?,
        ..base
    })
}

/// What they have in common.
fn olmo(raw: &HfConfig, family: Family) -> Result<ModelConfig, FormatError> {
    let absent = Absent {
        kv_heads: None,
        head_size: None,
        positions: 2048,
        eps: 1e-5,
        tied: false,
    };
    Ok(ModelConfig {
        norm_placement: NormPlacement::Output,
        qk_norm: QkNorm::Projections,
        biases: attention_biases(raw, false)?,
        ..shapes(raw, family, &absent)?
    })
}

pub(super) const NAMES: Names = Names {
    norm,
    ..llama::NAMES
};

fn norm(norm: BlockNorm) -> &'static str {
    match norm {
        BlockNorm::AttentionOutput => "post_attention_layernorm",
        BlockNorm::MlpOutput => "post_feedforward_layernorm",
        BlockNorm::Q => "self_attn.q_norm",
        BlockNorm::K => "self_attn.k_norm",
        BlockNorm::Attention | BlockNorm::Mlp => "",
    }
}
