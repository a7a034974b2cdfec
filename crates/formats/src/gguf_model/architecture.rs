//! What llama.cpp's converter does to each architecture, and the keys that only some have.
//!
//! Source: llama.cpp's `conversion/` (`modify_tensors`, `set_gguf_parameters`), its `tensor_mapping.py`, and, where a key is absent or
//! a number is fixed in code, its loader (`src/models/`).

use serde_json::{Map, Value, json};

use super::gpt2;
use super::layers::{self, Pattern};
use super::rope::Rope;
use super::{Model, decimal};
use crate::FormatError;

/// One architecture of llama.cpp's.
#[derive(Debug)]
pub(super) struct Architecture {
    /// `general.architecture`, with which its keys begin.
    pub(super) name: &'static str,
    /// config.json's `model_type`.
    pub(super) model_type: &'static str,
    /// transformers' class.
    pub(super) class: &'static str,
    /// Whether the rows of q and k are interleaved.
    pub(super) interleaved: bool,
    /// Norms of a layer over hidden rows: transformers' name, llama.cpp's name.
    pub(super) norms: &'static [(&'static str, &'static str)],
    /// Whether norms multiply with 1 + w, of which llama.cpp keeps the sum.
    pub(super) norm_plus_one: bool,
    pub(super) head_norms: HeadNorms,
    pub(super) attention_bias: AttentionBias,
    /// Whether config.json has `mlp_bias`.
    pub(super) mlp_bias: bool,
    pub(super) fused: Fused,
    pub(super) rotary: Rotary,
    /// Key and value of the activation in config.json.
    pub(super) activation: (&'static str, &'static str),
    /// Keys that say nothing of the model that is imported; those that end with a dot stand for all that begin so.
    pub(super) idle_keys: &'static [&'static str],
    /// Keys that the others don't have.
    pub(super) own_keys: OwnKeys,
}

/// Reads an architecture's own metadata into config.json, where all that is common stands already.
type OwnKeys = fn(&Model<'_>, &Rope, &mut Map<String, Value>) -> Result<(), FormatError>;

/// Norms of q and k.
#[derive(Debug)]
pub(super) enum HeadNorms {
    None,
    /// Over each head.
    Each,
    /// Over all heads.
    Whole,
}

/// Linears that are one.
#[derive(Debug, PartialEq)]
pub(super) enum Fused {
    Nothing,
    /// The two inputs of the MLP.
    GateUp,
    /// Those, and q, k and v.
    QkvAndGateUp,
}

/// What rotary positions an architecture may have.
#[derive(Debug, PartialEq)]
pub(super) enum Rotary {
    /// On the whole of a head.
    Whole,
    /// On a part of it too.
    Part,
    /// That, and with one factor a frequency for short texts and one for long ones.
    PartAndLong,
}

/// Biases of attention's linears.
#[derive(Debug)]
pub(super) enum AttentionBias {
    Never,
    /// Always, on q, k and v.
    Qkv,
    /// As config.json's `attention_bias` says: on q, k, v, and `o` too.
    Switch {
        o: bool,
    },
}

const LLAMA: Architecture = Architecture {
    name: "llama",
    model_type: "llama",
    class: "LlamaForCausalLM",
    interleaved: true,
    norms: &[
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
    ],
    norm_plus_one: false,
    head_norms: HeadNorms::None,
    attention_bias: AttentionBias::Switch { o: true },
    mlp_bias: true,
    fused: Fused::Nothing,
    rotary: Rotary::Whole,
    activation: ("hidden_act", "silu"),
    idle_keys: &[],
    own_keys: |_, _, _| Ok(()),
};

const QWEN2: Architecture = Architecture {
    name: "qwen2",
    model_type: "qwen2",
    class: "Qwen2ForCausalLM",
    interleaved: false,
    attention_bias: AttentionBias::Qkv,
    mlp_bias: false,
    ..LLAMA
};

const GEMMA2: Architecture = Architecture {
    name: "gemma2",
    model_type: "gemma2",
    class: "Gemma2ForCausalLM",
    interleaved: false,
    norms: &[
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "post_attention_norm"),
        ("pre_feedforward_layernorm", "ffn_norm"),
        ("post_feedforward_layernorm", "post_ffw_norm"),
    ],
    norm_plus_one: true,
    mlp_bias: false,
    activation: ("hidden_activation", "gelu_pytorch_tanh"),
    own_keys: gemma2,
    ..LLAMA
};

static TABLE: [Architecture; 12] = [
    LLAMA,
    QWEN2,
    Architecture {
        name: "qwen3",
        model_type: "qwen3",
        class: "Qwen3ForCausalLM",
        head_norms: HeadNorms::Each,
        attention_bias: AttentionBias::Switch { o: true },
        ..QWEN2
    },
    GEMMA2,
    Architecture {
        name: "gemma3",
        model_type: "gemma3_text",
        class: "Gemma3ForCausalLM",
        head_norms: HeadNorms::Each,
        // Of what reads pictures; its tensors would be refused.
        idle_keys: &["mm.", "vision."],
        own_keys: gemma3,
        ..GEMMA2
    },
    Architecture {
        name: "phi3",
        model_type: "phi3",
        class: "Phi3ForCausalLM",
        interleaved: false,
        attention_bias: AttentionBias::Never,
        mlp_bias: false,
        fused: Fused::QkvAndGateUp,
        rotary: Rotary::PartAndLong,
        own_keys: phi3,
        ..LLAMA
    },
    Architecture {
        name: "granite",
        model_type: "granite",
        class: "GraniteForCausalLM",
        // Granite 4's dense models have keys of experts and of layers that they have no tensors of.
        idle_keys: &["ssm.", "expert_shared_feed_forward_length"],
        own_keys: granite,
        ..LLAMA
    },
    Architecture {
        name: "smollm3",
        model_type: "smollm3",
        class: "SmolLM3ForCausalLM",
        own_keys: smollm3,
        ..LLAMA
    },
    // OLMo 3 is under the same name.
    Architecture {
        name: "olmo2",
        model_type: "olmo2",
        class: "Olmo2ForCausalLM",
        interleaved: false,
        norms: &[
            ("post_attention_layernorm", "post_attention_norm"),
            ("post_feedforward_layernorm", "post_ffw_norm"),
        ],
        head_norms: HeadNorms::Whole,
        mlp_bias: false,
        own_keys: olmo2,
        ..LLAMA
    },
    Architecture {
        name: "glm4",
        model_type: "glm4",
        class: "Glm4ForCausalLM",
        interleaved: false,
        norms: &[
            ("input_layernorm", "attn_norm"),
            ("post_self_attn_layernorm", "post_attention_norm"),
            ("post_attention_layernorm", "ffn_norm"),
            ("post_mlp_layernorm", "post_ffw_norm"),
        ],
        attention_bias: AttentionBias::Switch { o: false },
        mlp_bias: false,
        fused: Fused::GateUp,
        rotary: Rotary::Part,
        ..LLAMA
    },
    // Mistral Small 3 and Ministral 3.
    Architecture {
        name: "mistral3",
        model_type: "mistral",
        class: "MistralForCausalLM",
        attention_bias: AttentionBias::Never,
        mlp_bias: false,
        own_keys: mistral3,
        ..LLAMA
    },
    // Its names and keys are in `gpt2`.
    Architecture {
        name: gpt2::NAME,
        model_type: "gpt2",
        class: "GPT2LMHeadModel",
        interleaved: false,
        norms: &[],
        activation: ("activation_function", "gelu_new"),
        ..LLAMA
    },
];

/// The architecture of a name.
pub(super) fn named(name: &str) -> Option<&'static Architecture> {
    TABLE.iter().find(|architecture| architecture.name == name)
}

/// The architecture that llama.cpp gives a model of a `model_type`.
pub(super) fn of_model_type(kind: &str) -> Option<&'static Architecture> {
    let other = OTHER_TYPES.iter().find(|(known, _)| *known == kind);
    match other {
        Some((_, name)) => named(name),
        None => TABLE
            .iter()
            .find(|architecture| architecture.model_type == kind),
    }
}

/// Model types that share another's architecture. An ordinary Mistral is a Llama to llama.cpp.
const OTHER_TYPES: [(&str, &str); 4] = [
    ("mistral", "llama"),
    ("ministral3", "mistral3"),
    ("gemma3", "gemma3"),
    ("olmo3", "olmo2"),
];

/// The model types of all of them, for messages.
pub(super) fn all_model_types() -> String {
    let own = TABLE.iter().map(|architecture| architecture.model_type);
    let other = OTHER_TYPES.iter().map(|(kind, _)| *kind);
    let mut kinds: Vec<String> = own.chain(other).map(|kind| format!("{kind:?}")).collect();
    kinds.sort();
    kinds.dedup();
    kinds.join(", ")
}

/// The names of all of them, for messages.
pub(super) fn all_names() -> String {
    let names: Vec<String> = TABLE
        .iter()
        .map(|architecture| format!("{:?}", architecture.name))
        .collect();
    names.join(", ")
}

fn gemma2(model: &Model<'_>, _: &Rope, config: &mut Map<String, Value>) -> Result<(), FormatError> {
    // The keys are younger than the first files; absent, the caps are those of all Gemma 2, as llama.cpp has it too.
    for (key, name, absent) in [
        ("attn_logit_softcapping", "attn_logit_softcapping", 50.0),
        ("final_logit_softcapping", "final_logit_softcapping", 30.0),
    ] {
        let cap = if model.has(name) {
            model.optional(name)?
        } else {
            Some(absent)
        };
        config.insert(key.into(), json!(cap));
    }
    // Every other layer slides, from the first on. 27B has 46 layers.
    gemma_scale(model, 46, config);
    layers::windows(model, &Pattern::LastOf(2), Some(4096), config)
}

fn gemma3(
    model: &Model<'_>,
    rope: &Rope,
    config: &mut Map<String, Value>,
) -> Result<(), FormatError> {
    gemma_scale(model, 62, config);
    layers::windows(model, &Pattern::LastOf(6), None, config)?;
    let local = model.optional("rope.freq_base_swa")?.unwrap_or(10000.0);
    config.insert("rope_local_base_freq".into(), json!(local));
    config.insert("rope_parameters".into(), kinds(rope, local));
    Ok(())
}

/// The scores' scale is not in the file. llama.cpp knows the largest model by its layers and takes hidden_size / heads for it, and the
/// heads' size for all others.
fn gemma_scale(model: &Model<'_>, largest: usize, config: &mut Map<String, Value>) {
    let scalar = if model.shapes.layers == largest {
        model.shapes.hidden as f64 / model.shapes.heads as f64
    } else {
        model.shapes.head_dim as f64
    };
    let scalar = if scalar.fract() == 0.0 {
        json!(scalar as u64)
    } else {
        json!(scalar)
    };
    config.insert("query_pre_attn_scalar".into(), scalar);
}

/// transformers 5's `rope_parameters` of a model whose layers that slide have a rotary embedding of their own.
fn kinds(rope: &Rope, sliding_theta: f64) -> Value {
    json!({
        "full_attention": rope.v5(),
        "sliding_attention": {"rope_type": "default", "rope_theta": sliding_theta},
    })
}

fn phi3(
    model: &Model<'_>,
    rope: &Rope,
    config: &mut Map<String, Value>,
) -> Result<(), FormatError> {
    // Zero stands for no window.
    let window = model
        .optional("attention.sliding_window")?
        .map(|window| window as u64);
    config.insert("sliding_window".into(), json!(window));
    config.insert(
        "original_max_position_embeddings".into(),
        json!(rope.original),
    );
    // Its heads are always hidden_size / num_attention_heads; transformers 4 has no such key for it.
    if model.shapes.head_dim * model.shapes.heads != model.shapes.hidden {
        return Err(model.refused(
            "attention.key_length",
            "embedding_length / attention.head_count",
        ));
    }
    config.remove("head_dim");
    config.entry("partial_rotary_factor").or_insert(json!(1.0));
    Ok(())
}

fn granite(
    model: &Model<'_>,
    _: &Rope,
    config: &mut Map<String, Value>,
) -> Result<(), FormatError> {
    let usual = 1.0 / (model.shapes.head_dim as f64).sqrt();
    for (key, name, absent) in [
        ("attention_multiplier", "attention.scale", decimal(usual)),
        ("embedding_multiplier", "embedding_scale", 1.0),
        ("residual_multiplier", "residual_scale", 1.0),
        ("logits_scaling", "logit_scale", 1.0),
    ] {
        let scale = model.optional(name)?.unwrap_or(absent);
        config.insert(key.into(), json!(scale));
    }
    Ok(())
}

#[expect(clippy::unnecessary_wraps, reason = "it is one of OwnKeys")]
fn smollm3(
    model: &Model<'_>,
    _: &Rope,
    config: &mut Map<String, Value>,
) -> Result<(), FormatError> {
    // Every fourth layer knows no positions; llama.cpp has no key for it.
    const STEP: usize = 4;
    let has_rope: Vec<u8> = (1..=model.shapes.layers)
        .map(|layer| u8::from(!layer.is_multiple_of(STEP)))
        .collect();
    config.insert(
        "layer_types".into(),
        json!(vec![layers::FULL; model.shapes.layers]),
    );
    config.insert("no_rope_layer_interval".into(), json!(STEP));
    config.insert("no_rope_layers".into(), json!(has_rope));
    config.insert("sliding_window".into(), Value::Null);
    config.insert("use_sliding_window".into(), json!(false));
    Ok(())
}

fn olmo2(
    model: &Model<'_>,
    rope: &Rope,
    config: &mut Map<String, Value>,
) -> Result<(), FormatError> {
    if model.optional("attention.sliding_window")?.is_none() {
        return Ok(());
    }
    config.insert("architectures".into(), json!(["Olmo3ForCausalLM"]));
    config.insert("model_type".into(), json!("olmo3"));
    layers::windows(model, &Pattern::LastOf(4), None, config)?;
    let local = model.optional("rope.freq_base_swa")?.unwrap_or(rope.theta);
    config.insert("rope_parameters".into(), kinds(rope, local));
    Ok(())
}

fn mistral3(
    model: &Model<'_>,
    rope: &Rope,
    config: &mut Map<String, Value>,
) -> Result<(), FormatError> {
    config.insert("sliding_window".into(), Value::Null);
    let Some(beta) = model.optional("attention.temperature_scale")? else {
        return Ok(());
    };
    config.insert("architectures".into(), json!(["Ministral3ForCausalLM"]));
    config.insert("model_type".into(), json!("ministral3"));
    let log_multiplier = model.optional("rope.scaling.yarn_log_multiplier")?;
    for (key, object) in [("rope_parameters", rope.v5()), ("rope_scaling", rope.v4())] {
        let Value::Object(mut object) = object else {
            return Err(model.refused("rope.scaling.type", "\"yarn\", as of every Ministral 3"));
        };
        object.insert("llama_4_scaling_beta".into(), json!(beta));
        if let Some(log_multiplier) = log_multiplier {
            // The other one is not in the file; llama.cpp takes it for 1.
            object.insert("mscale".into(), json!(1.0));
            object.insert("mscale_all_dim".into(), json!(log_multiplier));
        }
        config.insert(key.into(), Value::Object(object));
    }
    Ok(())
}
