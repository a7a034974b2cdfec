//! One file a family: how its `config.json` and its tensor names read. Nothing else differs.

mod gpt2;
mod llama;
mod qwen;

use std::path::Path;

use lowrank_formats::FormatError;
use lowrank_formats::hf_config::HfConfig;
use lowrank_kernels::Activation;

use super::config::{
    Family, LinearId, LinearKind, ModelConfig, Part, Position, Rope, RopeScaling, Sublayer,
    WeightId,
};
use crate::Error;

/// Translates a `config.json`.
///
/// # Errors
/// An architecture or a value that is not supported, by name; a field that is missing or impossible.
pub fn read_config(raw: &HfConfig) -> Result<ModelConfig, FormatError> {
    if raw.get("model_type").is_none() && raw.get("_class_name").is_some() {
        let accepted =
            "none: this is a part of a pipeline of Diffusers, and a language model is needed";
        return Err(raw.unsupported("_class_name", accepted));
    }
    let config = match raw.str("model_type")? {
        "llama" => llama::config(raw, Family::Llama),
        "mistral" => llama::config(raw, Family::Mistral),
        "qwen2" => qwen::config(raw, Family::Qwen2),
        "qwen3" => qwen::config(raw, Family::Qwen3),
        "gpt2" => gpt2::config(raw),
        _ => Err(raw.unsupported("model_type", "llama, mistral, qwen2, qwen3, gpt2")),
    }?;
    check(raw, &config)?;
    Ok(config)
}

/// Reads a `config.json` by its path.
///
/// # Errors
/// A file that is missing or damaged, and what [`read_config`] refuses.
pub fn read_config_file(path: &Path) -> Result<ModelConfig, Error> {
    Ok(read_config(&HfConfig::read(path)?)?)
}

/// The module that holds a linear, as `named_modules()` of the transformers model names it; PEFT's keys and target
/// matching are built on it.
pub fn linear_module(config: &ModelConfig, id: LinearId) -> String {
    let name = match config.family {
        Family::Gpt2 => gpt2::linear(id.kind),
        _ => llama::linear(id.kind),
    };
    format!("{}.{}.{name}", blocks(config.family), id.layer)
}

/// The name of an adapter layer, as if it were a module of its block.
pub(crate) fn bottleneck_module(config: &ModelConfig, layer: usize, place: Sublayer) -> String {
    let blocks = blocks(config.family);
    let place = match place {
        Sublayer::Attention => "attention",
        Sublayer::Mlp => "mlp",
    };
    format!("{blocks}.{layer}.{place}_adapter")
}

/// The list that holds the blocks.
pub(crate) fn blocks(family: Family) -> &'static str {
    match family {
        Family::Gpt2 => "transformer.h",
        _ => "model.layers",
    }
}

/// The name of a tensor in `model.safetensors`.
pub fn tensor_name(config: &ModelConfig, id: WeightId) -> String {
    let part = |p: Part| if p == Part::Weight { "weight" } else { "bias" };
    match id {
        WeightId::Linear(linear, p) => format!("{}.{}", linear_module(config, linear), part(p)),
        WeightId::Norm(layer, norm, p) => match config.family {
            Family::Gpt2 => format!("transformer.h.{layer}.{}.{}", gpt2::norm(norm), part(p)),
            _ => format!("model.layers.{layer}.{}.{}", llama::norm(norm), part(p)),
        },
        WeightId::Embedding if config.family == Family::Gpt2 => "transformer.wte.weight".into(),
        WeightId::Embedding => "model.embed_tokens.weight".into(),
        WeightId::Positions => "transformer.wpe.weight".into(),
        WeightId::FinalNorm(p) if config.family == Family::Gpt2 => {
            format!("transformer.ln_f.{}", part(p))
        }
        WeightId::FinalNorm(p) => format!("model.norm.{}", part(p)),
        WeightId::Head => "lm_head.weight".into(),
    }
}

/// The prefix that some checkpoints of a family leave off every name (a bare `GPT2Model`, `LlamaModel`).
pub fn optional_prefix(family: Family) -> &'static str {
    if family == Family::Gpt2 {
        "transformer."
    } else {
        "model."
    }
}

/// Tensors that checkpoints carry and no computation reads: attention masks and derived tables.
pub fn is_derived(name: &str) -> bool {
    name.ends_with(".attn.bias")
        || name.ends_with(".attn.masked_bias")
        || name.ends_with("rotary_emb.inv_freq")
}

/// Keys of `config.json` that give every linear of the blocks a bias; `None` where transformers has no such model.
pub(crate) fn bias_switches(family: Family) -> Option<&'static [&'static str]> {
    (family == Family::Llama).then_some(&["attention_bias", "mlp_bias"])
}

/// PEFT's default `target_modules` of a family.
pub fn default_targets(family: Family) -> &'static [&'static str] {
    if family == Family::Gpt2 {
        &["c_attn"]
    } else {
        &["q_proj", "v_proj"]
    }
}

/// The suffix that names a part of a fused linear (`c_attn.q`).
pub fn fused_part(kind: LinearKind) -> Option<&'static str> {
    match kind {
        LinearKind::Q => Some("q"),
        LinearKind::K => Some("k"),
        LinearKind::V => Some("v"),
        _ => None,
    }
}

fn activation(raw: &HfConfig, field: &str, default: &str) -> Result<Activation, FormatError> {
    Ok(match raw.opt_str(field)?.unwrap_or(default) {
        "silu" | "swish" => Activation::Silu,
        "gelu" => Activation::Gelu,
        "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" => Activation::GeluTanh,
        "relu" => Activation::Relu,
        _ => return Err(raw.unsupported(field, "silu, gelu, gelu_new, gelu_pytorch_tanh, relu")),
    })
}

/// Reads `rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling` (transformers 4). Where a file has both objects,
/// the older one is read and the other is not, as in transformers.
fn rope(
    raw: &HfConfig,
    default_theta: f64,
    max_position_embeddings: usize,
) -> Result<Position, FormatError> {
    const ORIGINAL: &str = "original_max_position_embeddings";
    let scaling = raw.opt_object("rope_scaling")?;
    let nested = match scaling.filter(|scaling| !scaling.map().is_empty()) {
        Some(scaling) => Some(scaling),
        None => raw.opt_object("rope_parameters")?,
    };
    let theta = match nested
        .as_ref()
        .map(|n| n.opt_f64("rope_theta"))
        .transpose()?
        .flatten()
    {
        Some(theta) => theta,
        None => raw.opt_f64("rope_theta")?.unwrap_or(default_theta),
    };
    if let Some(partial) = raw.opt_f64("partial_rotary_factor")?
        && partial != 1.0
    {
        return Err(raw.unsupported("partial_rotary_factor", "1.0"));
    }
    let Some(nested) = nested else {
        return Ok(Position::Rope(Rope {
            theta,
            scaling: RopeScaling::None,
        }));
    };
    if let Some((layers, _)) = nested.map().iter().find(|(_, value)| value.is_object()) {
        return Err(nested.unsupported(
            layers,
            "the same rotary positions on every layer, without objects in rope_parameters",
        ));
    }
    let kind_field = if nested.get("rope_type").is_some() {
        "rope_type"
    } else {
        "type"
    };
    let scaling = match nested.opt_str(kind_field)?.unwrap_or("default") {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear {
            factor: nested.f64("factor")?,
        },
        "llama3" => RopeScaling::Llama3 {
            factor: nested.f64("factor")?,
            low_freq_factor: nested.f64("low_freq_factor")?,
            high_freq_factor: nested.f64("high_freq_factor")?,
            original_max_position_embeddings: match raw.opt_f64(ORIGINAL)? {
                Some(beside) => beside,
                None => nested
                    .opt_f64(ORIGINAL)?
                    .unwrap_or(max_position_embeddings as f64),
            },
        },
        _ => return Err(nested.unsupported(kind_field, "default, linear, llama3")),
    };
    if let Some(partial) = nested.opt_f64("partial_rotary_factor")?
        && partial != 1.0
    {
        return Err(nested.unsupported("partial_rotary_factor", "1.0"));
    }
    Ok(Position::Rope(Rope { theta, scaling }))
}

/// Keys that say that the model is another than its other keys describe, and shapes that the engine's arithmetic relies on.
fn check(raw: &HfConfig, config: &ModelConfig) -> Result<(), FormatError> {
    const PLAIN: &str = "so take the model as it was before; where its weights are plain all the same, remove the key";
    for (field, why) in [
        (
            "quantization_config",
            format!("quantized weights are not read, {PLAIN}"),
        ),
        (
            "quantization",
            format!("MLX's quantized weights are not read, {PLAIN}"),
        ),
        (
            "text_config",
            "a model of text inside another one is not read".to_owned(),
        ),
    ] {
        if raw.get(field).is_some() {
            return Err(raw.unsupported(field, format!("none: {why}")));
        }
    }
    for (field, value) in [
        ("vocab_size", config.vocab_size),
        ("hidden_size", config.hidden_size),
        ("intermediate_size", config.intermediate_size),
        ("num_hidden_layers", config.num_hidden_layers),
        ("num_attention_heads", config.num_attention_heads),
        ("num_key_value_heads", config.num_key_value_heads),
        ("head_dim", config.head_size),
        ("max_position_embeddings", config.max_position_embeddings),
    ] {
        if value == 0 {
            return Err(raw.unsupported(field, "a whole number of at least 1"));
        }
    }
    if !config
        .num_attention_heads
        .is_multiple_of(config.num_key_value_heads)
    {
        return Err(raw.unsupported("num_key_value_heads", "a divisor of num_attention_heads"));
    }
    if matches!(config.position, Position::Rope(_)) && !config.head_size.is_multiple_of(2) {
        return Err(raw.unsupported(
            "head_dim",
            "an even number (rotary embedding pairs its columns)",
        ));
    }
    Ok(())
}

/// What kind of attention each layer has, where the file says so.
fn layer_types(raw: &HfConfig, layers: usize) -> Result<Option<Vec<&str>>, FormatError> {
    let kinds = raw.opt_strs("layer_types")?;
    if kinds.as_ref().is_some_and(|kinds| kinds.len() != layers) {
        let accepted = format!("a list of num_hidden_layers, which is {layers}");
        return Err(raw.unsupported("layer_types", accepted));
    }
    Ok(kinds)
}

/// Refuses a sliding window on any layer. `layer_types` says which layers have one; without it `use_sliding_window` does, for
/// those from `max_window_layers` on.
fn all_full_attention(raw: &HfConfig, layers: usize) -> Result<(), FormatError> {
    let Some(kinds) = layer_types(raw, layers)? else {
        let used = raw.opt_bool("use_sliding_window")?.unwrap_or(false);
        // Absent means 4096, and null that there is none.
        let window =
            !raw.map().contains_key("sliding_window") || raw.get("sliding_window").is_some();
        let from = raw.opt_usize("max_window_layers")?.unwrap_or(28);
        if used && window && from < layers {
            let accepted = format!("false, or a max_window_layers of {layers} or more");
            return Err(raw.unsupported("use_sliding_window", accepted));
        }
        return Ok(());
    };
    if kinds.iter().all(|kind| *kind == "full_attention") {
        Ok(())
    } else {
        Err(raw.unsupported("layer_types", "full_attention on every layer"))
    }
}

/// `num_key_value_heads`: null means as many as there are heads. `absent` is the family's own default.
fn key_value_heads(raw: &HfConfig, heads: usize, absent: usize) -> Result<usize, FormatError> {
    const FIELD: &str = "num_key_value_heads";
    if raw.map().contains_key(FIELD) {
        Ok(raw.opt_usize(FIELD)?.unwrap_or(heads))
    } else {
        Ok(absent)
    }
}

fn head_size(
    raw: &HfConfig,
    hidden_size: usize,
    heads: usize,
    said: Option<usize>,
) -> Result<usize, FormatError> {
    if let Some(size) = said {
        return Ok(size);
    }
    if heads == 0 || !hidden_size.is_multiple_of(heads) {
        return Err(raw.unsupported("num_attention_heads", "a divisor of hidden_size"));
    }
    Ok(hidden_size / heads)
}
