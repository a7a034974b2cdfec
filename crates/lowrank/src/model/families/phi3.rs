//! Phi-3 and Phi-4: Llama's shape with q, k and v in one linear, as are the two inputs of the MLP. Long contexts have LongRoPE.

use lowrank_formats::FormatError;
use lowrank_formats::hf_config::HfConfig;

use super::super::config::{Family, MlpKind, ModelConfig, Position, RopeScaling};
use super::llama::{Absent, shapes};
use super::rope::Rules;

pub(super) fn config(raw: &HfConfig) -> Result<ModelConfig, FormatError> {
    let absent = Absent {
        kv_heads: None,
        head_size: None,
        positions: 4096,
        eps: 1e-5,
        tied: false,
    };
    let base = shapes(raw, Family::Phi3, &absent)?;
    let rules = Rules {
        partial: Some(1.0),
        original: Some(4096.0),
        is_longrope: true,
        ..Rules::new(10_000.0, base.max_position_embeddings, base.head_size)
    };
    let position = rules.read(raw)?;
    let is_long = |position: &Position| match position {
        Position::Rope(ropes) => ropes
            .iter()
            .any(|rope| matches!(rope.scaling, RopeScaling::LongRope { .. })),
        Position::Learned { .. } | Position::None => false,
    };
    // Beyond the context length of pretraining all frequencies of a sequence are others, those of its first tokens too, which a cache of
    // keys could not follow.
    let longest = if is_long(&position) {
        rules.original(raw, None)? as usize
    } else {
        usize::MAX
    };
    let window = super::sliding_window(raw, None)?;
    Ok(ModelConfig {
        max_position_embeddings: base.max_position_embeddings.min(longest),
        position,
        layers: super::same_layers(base.num_hidden_layers, window),
        fused_qkv: true,
        mlp: MlpKind::GatedFused,
        ..base
    })
}
