//! GPT-2: LayerNorm, a learned position table, GELU, and Conv1D linears ([in, out]) with q, k and v fused in `c_attn`.

use lowrank_formats::FormatError;
use lowrank_formats::hf_config::HfConfig;

use super::super::config::{
    Biases, BlockNorm, Family, LinearKind, MlpKind, ModelConfig, NormKind, Position,
};
use super::Names;

pub(super) fn config(raw: &HfConfig) -> Result<ModelConfig, FormatError> {
    let hidden_size = raw.usize(named(raw, "hidden_size", "n_embd"))?;
    let heads = raw.usize(named(raw, "num_attention_heads", "n_head"))?;
    let positions = named(raw, "max_position_embeddings", "n_positions");
    for (field, accepted) in [
        ("scale_attn_weights", true),
        ("scale_attn_by_inverse_layer_idx", false),
        ("reorder_and_upcast_attn", false),
        ("add_cross_attention", false),
    ] {
        if raw.opt_bool(field)?.is_some_and(|value| value != accepted) {
            return Err(raw.unsupported(field, if accepted { "true" } else { "false" }));
        }
    }
    let layers = raw.usize(named(raw, "num_hidden_layers", "n_layer"))?;
    Ok(ModelConfig {
        vocab_size: raw.usize("vocab_size")?,
        hidden_size,
        intermediate_size: raw.opt_usize("n_inner")?.unwrap_or(4 * hidden_size),
        num_hidden_layers: layers,
        num_attention_heads: heads,
        num_key_value_heads: heads,
        head_size: super::head_size(raw, hidden_size, heads, None)?,
        max_position_embeddings: raw.opt_usize(positions)?.unwrap_or(1024),
        norm: NormKind::Layer,
        norm_eps: raw.opt_f64("layer_norm_epsilon")?.unwrap_or(1e-5) as f32,
        position: Position::Learned { first: 0 },
        mlp: MlpKind::Plain,
        activation: super::activation(raw, "activation_function", "gelu_new")?,
        biases: Biases {
            qkv: true,
            o: true,
            mlp: true,
        },
        tie_word_embeddings: raw.opt_bool("tie_word_embeddings")?.unwrap_or(true),
        fused_qkv: true,
        layers: super::same_layers(layers, None),
        ..super::decoder(raw, Family::Gpt2)?
    })
}

/// The name that a value has in this file. transformers knows GPT-2's by the common names too, and reads those last.
fn named<'a>(raw: &HfConfig, common: &'a str, own: &'a str) -> &'a str {
    if raw.get(common).is_some() {
        common
    } else {
        own
    }
}

pub(super) const NAMES: Names = Names {
    prefix: "transformer.",
    blocks: "h",
    embedding: "wte",
    positions: "wpe",
    final_norm: "ln_f",
    linear,
    norm,
    ..Names::NONE
};

fn linear(kind: LinearKind) -> &'static str {
    match kind {
        LinearKind::O => "attn.c_proj",
        LinearKind::Gate | LinearKind::Up => "mlp.c_fc",
        LinearKind::Down => "mlp.c_proj",
        _ => "attn.c_attn",
    }
}

fn norm(norm: BlockNorm) -> &'static str {
    match norm {
        BlockNorm::Mlp => "ln_2",
        _ => "ln_1",
    }
}
