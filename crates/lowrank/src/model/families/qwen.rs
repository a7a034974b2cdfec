//! Qwen2 (biases on q, k and v) and Qwen3 (RMS norms on the heads of q and k, a head size of its own). Names as Llama's.

use lowrank_formats::FormatError;
use lowrank_formats::hf_config::HfConfig;

use super::super::config::{Biases, Family, ModelConfig, QkNorm};
use super::rope::Rules;

pub(super) fn config(raw: &HfConfig, family: Family) -> Result<ModelConfig, FormatError> {
    let hidden_size = raw.usize("hidden_size")?;
    let heads = raw.usize("num_attention_heads")?;
    let qwen3 = family == Family::Qwen3;
    let layers = raw.usize("num_hidden_layers")?;
    super::all_full_attention(raw, layers)?;
    let positions = raw.opt_usize("max_position_embeddings")?.unwrap_or(32_768);
    let attention_bias = raw.opt_bool("attention_bias")?.unwrap_or(false);
    let said = raw.opt_usize("head_dim")?.or(qwen3.then_some(128));
    let head_size = super::head_size(raw, hidden_size, heads, said)?;
    Ok(ModelConfig {
        vocab_size: raw.usize("vocab_size")?,
        hidden_size,
        intermediate_size: raw.usize("intermediate_size")?,
        num_hidden_layers: layers,
        num_attention_heads: heads,
        num_key_value_heads: super::key_value_heads(raw, heads, 32)?,
        head_size,
        max_position_embeddings: positions,
        norm_eps: raw.opt_f64("rms_norm_eps")?.unwrap_or(1e-6) as f32,
        position: Rules::new(10_000.0, positions, head_size).read(raw)?,
        activation: super::activation(raw, "hidden_act", "silu")?,
        // Qwen2's biases are fixed in its code; Qwen3's follow `attention_bias`.
        biases: Biases {
            qkv: !qwen3 || attention_bias,
            o: qwen3 && attention_bias,
            mlp: false,
        },
        qk_norm: if qwen3 { QkNorm::Heads } else { QkNorm::None },
        tie_word_embeddings: raw.opt_bool("tie_word_embeddings")?.unwrap_or(false),
        layers: super::same_layers(layers, None),
        ..super::decoder(raw, family)?
    })
}
