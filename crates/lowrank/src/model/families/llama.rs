//! Llama 2 and 3, SmolLM, Mistral: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

use lowrank_formats::FormatError;
use lowrank_formats::hf_config::HfConfig;

use super::super::config::{Biases, BlockNorm, Family, LinearKind, ModelConfig};
use super::Names;
use super::rope::Rules;

pub(super) fn config(raw: &HfConfig, family: Family) -> Result<ModelConfig, FormatError> {
    let hidden_size = raw.usize("hidden_size")?;
    let heads = raw.usize("num_attention_heads")?;
    let layers = raw.usize("num_hidden_layers")?;
    let sliding_window = match family {
        Family::Mistral => window(raw, layers)?,
        _ => None,
    };
    let (kv_default, positions) = match family {
        Family::Mistral => (8, 131_072),
        _ => (heads, 2048),
    };
    let positions = raw
        .opt_usize("max_position_embeddings")?
        .unwrap_or(positions);
    let attention_bias = raw.opt_bool("attention_bias")?.unwrap_or(false);
    let mlp_bias = raw.opt_bool("mlp_bias")?.unwrap_or(false);
    if family == Family::Mistral && (attention_bias || mlp_bias) {
        let field = if attention_bias {
            "attention_bias"
        } else {
            "mlp_bias"
        };
        return Err(raw.unsupported(field, "false: transformers' Mistral has no biases"));
    }
    let head_size = super::head_size(raw, hidden_size, heads, raw.opt_usize("head_dim")?)?;
    Ok(ModelConfig {
        vocab_size: raw.usize("vocab_size")?,
        hidden_size,
        intermediate_size: raw.usize("intermediate_size")?,
        num_hidden_layers: layers,
        num_attention_heads: heads,
        num_key_value_heads: super::key_value_heads(raw, heads, kv_default)?,
        head_size,
        max_position_embeddings: positions,
        norm_eps: raw.opt_f64("rms_norm_eps")?.unwrap_or(1e-6) as f32,
        position: Rules::new(10_000.0, positions, head_size).read(raw)?,
        activation: super::activation(raw, "hidden_act", "silu")?,
        biases: Biases {
            qkv: attention_bias,
            o: attention_bias,
            mlp: mlp_bias,
        },
        tie_word_embeddings: raw.opt_bool("tie_word_embeddings")?.unwrap_or(false),
        layers: super::same_layers(layers, sliding_window),
        ..super::decoder(raw, family)?
    })
}

/// What a family that resembles Llama has where its file says nothing.
pub(super) struct Absent {
    /// `num_key_value_heads`; `None`: as many as heads.
    pub(super) kv_heads: Option<usize>,
    /// `head_dim`; `None`: hidden_size / num_attention_heads.
    pub(super) head_size: Option<usize>,
    /// `max_position_embeddings`
    pub(super) positions: usize,
    /// `rms_norm_eps`
    pub(super) eps: f64,
    /// `tie_word_embeddings`
    pub(super) tied: bool,
}

/// The shapes of a family that resembles Llama; positions and layers are its own.
pub(super) fn shapes(
    raw: &HfConfig,
    family: Family,
    absent: &Absent,
) -> Result<ModelConfig, FormatError> {
    let hidden_size = raw.usize("hidden_size")?;
    let heads = raw.usize("num_attention_heads")?;
    let head_size = raw.opt_usize("head_dim")?.or(absent.head_size);
    let positions = raw.opt_usize("max_position_embeddings")?;
    let tied = raw.opt_bool("tie_word_embeddings")?;
    Ok(ModelConfig {
        vocab_size: raw.usize("vocab_size")?,
        hidden_size,
        intermediate_size: raw.usize("intermediate_size")?,
        num_hidden_layers: raw.usize("num_hidden_layers")?,
        num_attention_heads: heads,
        num_key_value_heads: super::key_value_heads(raw, heads, absent.kv_heads.unwrap_or(heads))?,
        head_size: super::head_size(raw, hidden_size, heads, head_size)?,
        max_position_embeddings: positions.unwrap_or(absent.positions),
        norm_eps: raw.opt_f64("rms_norm_eps")?.unwrap_or(absent.eps) as f32,
        activation: super::activation(raw, "hidden_act", "silu")?,
        tie_word_embeddings: tied.unwrap_or(absent.tied),
        ..super::decoder(raw, family)?
    })
}

/// `attention_bias`: of all linears of attention.
pub(super) fn attention_biases(raw: &HfConfig, absent: bool) -> Result<Biases, FormatError> {
    let bias = raw.opt_bool("attention_bias")?.unwrap_or(absent);
    Ok(Biases {
        qkv: bias,
        o: bias,
        mlp: false,
    })
}

/// Mistral's window, the same on every layer. `layer_types` can say that no layer has one.
fn window(raw: &HfConfig, layers: usize) -> Result<Option<usize>, FormatError> {
    // MistralConfig's own default is a window of 4096; null switches it off.
    let size = super::sliding_window(raw, Some(4096))?;
    let Some(kinds) = super::layer_types(raw, layers)? else {
        return Ok(size);
    };
    let all = |wanted: &str| kinds.iter().all(|kind| *kind == wanted);
    if all("full_attention") {
        Ok(None)
    } else if all("sliding_attention") {
        Ok(size)
    } else {
        Err(raw.unsupported(
            "layer_types",
            "the same kind on every layer, full_attention or sliding_attention",
        ))
    }
}

pub(super) const NAMES: Names = Names {
    prefix: "model.",
    blocks: "layers",
    embedding: "embed_tokens",
    final_norm: "norm",
    linear,
    norm,
    ..Names::NONE
};

fn linear(kind: LinearKind) -> &'static str {
    match kind {
        LinearKind::Q => "self_attn.q_proj",
        LinearKind::K => "self_attn.k_proj",
        LinearKind::V => "self_attn.v_proj",
        LinearKind::Qkv => "self_attn.qkv_proj",
        LinearKind::O => "self_attn.o_proj",
        LinearKind::Gate => "mlp.gate_proj",
        LinearKind::Up => "mlp.up_proj",
        LinearKind::Down => "mlp.down_proj",
        LinearKind::GateUp => "mlp.gate_up_proj",
        LinearKind::Dense | LinearKind::Out => "",
    }
}

fn norm(norm: BlockNorm) -> &'static str {
    match norm {
        BlockNorm::Attention => "input_layernorm",
        BlockNorm::Mlp => "post_attention_layernorm",
        BlockNorm::AttentionOutput | BlockNorm::MlpOutput => "",
        BlockNorm::Q => "self_attn.q_norm",
        BlockNorm::K => "self_attn.k_norm",
    }
}
