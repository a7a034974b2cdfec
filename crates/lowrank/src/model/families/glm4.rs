//! GLM-4: norms before and behind the sublayers, rotary positions of neighbours in the first half of a head, and one linear for the two
//! inputs of the MLP.

use lowrank_formats::FormatError;
use lowrank_formats::hf_config::HfConfig;
use lowrank_kernels::RopeOrder;

use super::super::config::{Biases, BlockNorm, Family, MlpKind, ModelConfig, NormPlacement};
use super::llama::{Absent, attention_biases, shapes};
use super::rope::Rules;
use super::{Names, llama};

pub(super) fn config(raw: &HfConfig) -> Result<ModelConfig, FormatError> {
    let absent = Absent {
        kv_heads: Some(2),
        head_size: Some(128),
        positions: 131_072,
        eps: 1.5625e-7,
        tied: false,
    };
    let base = shapes(raw, Family::Glm4, &absent)?;
    let rules = Rules {
        partial: Some(0.5),
        order: RopeOrder::Neighbours,
        ..Rules::new(10_000.0, base.max_position_embeddings, base.head_size)
    };
    Ok(ModelConfig {
        norm_placement: NormPlacement::InputAndOutput,
        position: rules.read(raw)?,
        layers: super::same_layers(base.num_hidden_layers, None),
        mlp: MlpKind::GatedFused,
        biases: Biases {
            o: false,
            ..attention_biases(raw, true)?
        },
        ..base
    })
}

pub(super) const NAMES: Names = Names {
    norm,
    ..llama::NAMES
};

fn norm(norm: BlockNorm) -> &'static str {
    match norm {
        BlockNorm::Attention => "input_layernorm",
        BlockNorm::AttentionOutput => "post_self_attn_layernorm",
        BlockNorm::Mlp => "post_attention_layernorm",
        BlockNorm::MlpOutput => "post_mlp_layernorm",
        BlockNorm::Q | BlockNorm::K => "",
    }
}
