//! Gemma 2 and 3: RMS norms of 1 + w before and behind the sublayers, embeddings times √C, layers that see a window between layers that
//! see everything. In Gemma 3 each kind has rotary positions of its own, and in Gemma 2 scores and logits are capped.

use lowrank_formats::FormatError;
use lowrank_formats::hf_config::HfConfig;
use lowrank_kernels::LogitScaling;
use serde_json::Value;

use super::super::config::{
    Biases, BlockNorm, EmbeddingScale, Family, LayerConfig, ModelConfig, NormKind, NormPlacement,
    Position, QkNorm,
};
use super::rope::Rules;
use super::{Names, llama};

pub(super) fn gemma2(raw: &HfConfig) -> Result<ModelConfig, FormatError> {
    // An absent cap is the family's own, and null is none.
    let cap = |field: &str, absent: f64| {
        let cap = if raw.map().contains_key(field) {
            raw.opt_f64(field)?
        } else {
            Some(absent)
        };
        if cap == Some(0.0) {
            return Err(raw.unsupported(field, "a number above 0, or null for none"));
        }
        Ok(cap.map(|cap| cap as f32))
    };
    let base = gemma(raw, Family::Gemma2, 256_000, 8192)?;
    let rules = Rules::new(10_000.0, base.max_position_embeddings, base.head_size);
    let window = super::sliding_window(raw, Some(4096))?;
    let layers = super::mixed_layers(raw, base.num_hidden_layers, window, |layer| {
        layer.is_multiple_of(2)
    })?;
    let rope = Some(0);
    Ok(ModelConfig {
        position: rules.read(raw)?,
        layers: layers
            .into_iter()
            .map(|layer| LayerConfig { rope, ..layer })
            .collect(),
        attention_softcap: cap("attn_logit_softcapping", 50.0)?,
        logit_scaling: LogitScaling {
            softcap: cap("final_logit_softcapping", 30.0)?,
            ..LogitScaling::NONE
        },
        ..base
    })
}

pub(super) fn gemma3(raw: &HfConfig) -> Result<ModelConfig, FormatError> {
    // transformers takes the first and does not apply it; no file is known that has either.
    for field in ["attn_logit_softcapping", "final_logit_softcapping"] {
        if raw.get(field).is_some() {
            return Err(raw.unsupported(field, "null"));
        }
    }
    let base = gemma(raw, Family::Gemma3, 262_208, 131_072)?;
    let theta = |field, absent| Ok::<_, FormatError>(raw.opt_f64(field)?.unwrap_or(absent));
    let rules = |theta| Rules::new(theta, base.max_position_embeddings, base.head_size);
    let full = rules(theta("rope_theta", 1_000_000.0)?).read_kind(raw, "full_attention")?;
    let sliding =
        rules(theta("rope_local_base_freq", 10_000.0)?).read_kind(raw, "sliding_attention")?;
    Ok(ModelConfig {
        position: Position::Rope(vec![full, sliding]),
        qk_norm: QkNorm::Heads,
        layers: layers(raw, base.num_hidden_layers, 6)?,
        ..base
    })
}

/// What they have in common.
fn gemma(
    raw: &HfConfig,
    family: Family,
    vocab_size: usize,
    positions: usize,
) -> Result<ModelConfig, FormatError> {
    if raw
        .opt_bool("use_bidirectional_attention")?
        .unwrap_or(false)
    {
        return Err(raw.unsupported("use_bidirectional_attention", "false"));
    }
    let usize_or =
        |field: &str, absent| Ok::<_, FormatError>(raw.opt_usize(field)?.unwrap_or(absent));
    let hidden_size = usize_or("hidden_size", 2304)?;
    let attention_bias = raw.opt_bool("attention_bias")?.unwrap_or(false);
    let scalar = raw.opt_f64("query_pre_attn_scalar")?.unwrap_or(256.0);
    if scalar == 0.0 {
        return Err(raw.unsupported("query_pre_attn_scalar", "a number above 0"));
    }
    Ok(ModelConfig {
        vocab_size: usize_or("vocab_size", vocab_size)?,
        hidden_size,
        intermediate_size: usize_or("intermediate_size", 9216)?,
        num_hidden_layers: usize_or("num_hidden_layers", 26)?,
        num_attention_heads: usize_or("num_attention_heads", 8)?,
        num_key_value_heads: usize_or("num_key_value_heads", 4)?,
        head_size: usize_or("head_dim", 256)?,
        max_position_embeddings: usize_or("max_position_embeddings", positions)?,
        norm: NormKind::RmsOnePlus,
        norm_placement: NormPlacement::InputAndOutput,
        norm_eps: raw.opt_f64("rms_norm_eps")?.unwrap_or(1e-6) as f32,
        embedding_scale: Some(EmbeddingScale::Table((hidden_size as f64).sqrt() as f32)),
        attention_scale: Some(scalar.powf(-0.5) as f32),
        activation: super::activation(raw, "hidden_activation", "gelu_pytorch_tanh")?,
        biases: Biases {
            qkv: attention_bias,
            o: attention_bias,
            mlp: false,
        },
        tie_word_embeddings: raw.opt_bool("tie_word_embeddings")?.unwrap_or(true),
        ..super::decoder(raw, family)?
    })
}

/// Layers of both kinds. Where `layer_types` does not say which are which, the last of every `pattern` sees everything.
fn layers(raw: &HfConfig, layers: usize, pattern: usize) -> Result<Vec<LayerConfig>, FormatError> {
    const PATTERN: &str = "sliding_window_pattern";
    let pattern = raw.opt_usize(PATTERN)?.unwrap_or(pattern);
    if pattern == 0 {
        return Err(raw.unsupported(PATTERN, "a whole number of at least 1"));
    }
    let window = super::sliding_window(raw, Some(4096))?;
    super::mixed_layers(raw, layers, window, |layer| {
        !(layer + 1).is_multiple_of(pattern)
    })
}

/// The config of the text half of a model that also reads pictures, as transformers writes that half by itself.
pub(super) fn text_half(raw: &HfConfig) -> Result<HfConfig, FormatError> {
    const HALF: &str = "text_config";
    let Some(half) = raw.opt_object(HALF)? else {
        return Err(raw.unsupported(HALF, "an object, the config of the text model"));
    };
    let mut map = half.map().clone();
    map.insert("model_type".to_owned(), Family::Gemma3.model_type().into());
    map.insert(
        "architectures".to_owned(),
        Value::Array(vec!["Gemma3ForCausalLM".into()]),
    );
    // What is said of the whole holds for the half too.
    let shared = [
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "tie_word_embeddings",
        "dtype",
        "torch_dtype",
        "transformers_version",
        "quantization_config",
        "quantization",
    ];
    for key in shared {
        if let Some(value) = raw.get(key).filter(|_| half.get(key).is_none()) {
            map.insert(key.to_owned(), value.clone());
        }
    }
    Ok(HfConfig::from_map(raw.path(), map))
}

/// The names that a tensor has in a checkpoint of the whole model, as transformers 5 and 4 write it.
pub(super) fn names_in_whole(name: &str) -> Vec<String> {
    let newer = name.strip_prefix(NAMES.prefix);
    let newer = newer.map(|short| format!("model.language_model.{short}"));
    newer
        .into_iter()
        .chain([format!("language_model.{name}")])
        .collect()
}

pub(super) const NAMES: Names = Names {
    norm,
    ..llama::NAMES
};

fn norm(norm: BlockNorm) -> &'static str {
    match norm {
        BlockNorm::Attention => "input_layernorm",
        BlockNorm::AttentionOutput => "post_attention_layernorm",
        BlockNorm::Mlp => "pre_feedforward_layernorm",
        BlockNorm::MlpOutput => "post_feedforward_layernorm",
        BlockNorm::Q => "self_attn.q_norm",
        BlockNorm::K => "self_attn.k_norm",
    }
}
