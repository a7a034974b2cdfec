//! One file a family: how its `config.json` and its tensor names read. Nothing else differs.

mod bert;
mod deberta;
mod gemma;
mod glm4;
mod gpt2;
mod granite;
mod llama;
mod ministral3;
mod modernbert;
mod olmo;
mod phi3;
mod qwen;
mod rope;
mod smollm3;

use std::collections::BTreeMap;
use std::path::Path;

use lowrank_formats::FormatError;
use lowrank_formats::hf_config::HfConfig;
use lowrank_formats::quantized::{QUANTIZATION_CONFIG, QuantMethod};
use lowrank_kernels::{Activation, Layout, LogitScaling};

use super::config::{
    Biases, BlockNorm, Classifier, Family, HeadKind, LayerConfig, LinearId, LinearKind, MlpKind,
    ModelConfig, NormKind, NormPlacement, Part, Pooling, Position, Purpose, QkNorm, Sublayer,
    WeightId,
};
use crate::Error;

/// Translates a `config.json` for what its architecture is made for: a decoder for a language model, an encoder for its hidden rows.
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
        "gemma2" => gemma::gemma2(raw),
        "smollm3" => smollm3::config(raw),
        "granite" => granite::config(raw),
        "olmo2" => olmo::olmo2(raw),
        "olmo3" => olmo::olmo3(raw),
        "phi3" => phi3::config(raw),
        "ministral3" => ministral3::config(raw),
        "glm4" => glm4::config(raw),
        "gemma3_text" => gemma::gemma3(raw),
        "gemma3" => return gemma::text_half(raw).and_then(|text| read_config(&text)),
        "gpt2" => gpt2::config(raw),
        "bert" => bert::config(raw, Family::Bert),
        "roberta" => bert::config(raw, Family::Roberta),
        "xlm-roberta" => bert::config(raw, Family::XlmRoberta),
        "distilbert" => bert::distilbert(raw),
        "modernbert" => modernbert::config(raw),
        "deberta-v2" => deberta::config(raw),
        _ => {
            let accepted = "llama, mistral, qwen2, qwen3, gemma2, gemma3_text, gemma3, smollm3, granite, olmo2, olmo3, phi3, ministral3, glm4, gpt2, bert, roberta, xlm-roberta, distilbert, modernbert, deberta-v2";
            Err(raw.unsupported("model_type", accepted))
        }
    }?;
    check(raw, &config)?;
    Ok(config)
}

/// Translates a `config.json` for a purpose.
///
/// # Errors
/// As [`read_config`]; an encoder as a language model.
pub fn read_config_for(raw: &HfConfig, purpose: Purpose) -> Result<ModelConfig, FormatError> {
    let config = read_config(raw)?;
    let head = head(raw, &config, purpose)?;
    Ok(ModelConfig { head, ..config })
}

/// Opens a `config.json` by its path.
///
/// # Errors
/// A file that is missing or no JSON.
pub fn read_raw(path: &Path) -> Result<HfConfig, Error> {
    Ok(HfConfig::read(path)?)
}

/// What most decoders share; sizes, positions and layers are the family's own.
fn decoder(raw: &HfConfig, family: Family) -> Result<ModelConfig, FormatError> {
    Ok(ModelConfig {
        family,
        vocab_size: 0,
        hidden_size: 0,
        intermediate_size: 0,
        num_hidden_layers: 0,
        num_attention_heads: 0,
        num_key_value_heads: 0,
        head_size: 0,
        max_position_embeddings: 0,
        norm: NormKind::Rms,
        norm_placement: NormPlacement::Input,
        first_norm: true,
        final_norm: true,
        norm_eps: 0.0,
        position: Position::Learned { first: 0 },
        relative: None,
        formats: BTreeMap::new(),
        load_in: None,
        token_types: 0,
        embedding_scale: None,
        embedding_norm: false,
        mlp: MlpKind::Gated,
        activation: Activation::Silu,
        biases: Biases::default(),
        qk_norm: QkNorm::None,
        attention_softcap: None,
        residual_scale: 1.0,
        logit_scaling: LogitScaling::NONE,
        attention_scale: None,
        tie_word_embeddings: false,
        fused_qkv: false,
        layout: layout(family),
        causal: true,
        layers: Vec::new(),
        head: HeadKind::LanguageModel,
        initializer_range: raw.opt_f64("initializer_range")?.unwrap_or(0.02) as f32,
    })
}

/// What encoders share.
fn encoder(raw: &HfConfig, family: Family) -> Result<ModelConfig, FormatError> {
    Ok(ModelConfig {
        causal: false,
        head: HeadKind::None,
        ..decoder(raw, family)?
    })
}

/// Layers that are all the same.
fn same_layers(layers: usize, window: Option<usize>) -> Vec<LayerConfig> {
    let rope = Some(0);
    vec![LayerConfig { window, rope }; layers]
}

/// The head that transformers' class of a family has for a purpose.
fn head(raw: &HfConfig, config: &ModelConfig, purpose: Purpose) -> Result<HeadKind, FormatError> {
    let family = config.family;
    let (labels, of_tokens) = match purpose {
        Purpose::LanguageModel if config.causal => return Ok(HeadKind::LanguageModel),
        Purpose::LanguageModel => {
            let accepted = "a decoder: an encoder does not write text, but classifies it (SEQ_CLS, TOKEN_CLS) or gives it a vector (FEATURE_EXTRACTION)";
            return Err(raw.unsupported("model_type", accepted));
        }
        Purpose::Features => return Ok(HeadKind::None),
        Purpose::SequenceClassifier { labels } => (labels, false),
        Purpose::TokenClassifier { labels } => (labels, true),
    };
    let pooling = match family {
        _ if of_tokens => Pooling::Each,
        _ if config.causal => Pooling::Last,
        Family::ModernBert => modernbert::pooling(raw)?,
        _ => Pooling::First,
    };
    let dense = match family {
        Family::ModernBert => Some(modernbert::dense(raw)?),
        _ if of_tokens || config.causal => None,
        Family::DebertaV2 => Some(deberta::dense(raw)?),
        _ => Some(bert::dense(family)),
    };
    Ok(HeadKind::Classifier(Classifier {
        labels,
        pooling,
        dense,
        bias: of_tokens || !config.causal,
    }))
}

/// How a family names its modules.
struct Names {
    /// Before the names of the bare model where a head stands on it.
    prefix: &'static str,
    /// The list that holds the blocks.
    blocks: &'static str,
    embedding: &'static str,
    positions: &'static str,
    token_types: &'static str,
    embedding_norm: &'static str,
    relative: &'static str,
    relative_norm: &'static str,
    final_norm: &'static str,
    /// Within a block.
    linear: fn(LinearKind) -> &'static str,
    norm: fn(BlockNorm) -> &'static str,
}

impl Names {
    /// Of a model that has nothing.
    const NONE: Self = Self {
        prefix: "",
        blocks: "",
        embedding: "",
        positions: "",
        token_types: "",
        embedding_norm: "",
        relative: "",
        relative_norm: "",
        final_norm: "",
        linear: |_| "",
        norm: |_| "",
    };
}

fn names(family: Family) -> &'static Names {
    match family {
        Family::Llama
        | Family::Mistral
        | Family::Qwen2
        | Family::Qwen3
        | Family::SmolLm3
        | Family::Granite
        | Family::Phi3
        | Family::Ministral3 => &llama::NAMES,
        Family::Gemma2 | Family::Gemma3 => &gemma::NAMES,
        Family::Olmo2 | Family::Olmo3 => &olmo::NAMES,
        Family::Glm4 => &glm4::NAMES,
        Family::Gpt2 => &gpt2::NAMES,
        Family::Bert => &bert::BERT,
        Family::Roberta | Family::XlmRoberta => &bert::ROBERTA,
        Family::DistilBert => &bert::DISTILBERT,
        Family::ModernBert => &modernbert::NAMES,
        Family::DebertaV2 => &deberta::NAMES,
    }
}

/// The prefix of the bare model's names: none where nothing stands on it (`AutoModel`).
fn prefix(config: &ModelConfig) -> &'static str {
    if config.head == HeadKind::None {
        ""
    } else {
        names(config.family).prefix
    }
}

/// The module that holds a linear, as `named_modules()` of the transformers model names it; PEFT's keys and target
/// matching are built on it.
pub fn linear_module(config: &ModelConfig, id: LinearId) -> String {
    match id.kind {
        LinearKind::Dense => classifier_dense(config).to_owned(),
        LinearKind::Out => classifier_out(config).to_owned(),
        kind => {
            let name = (names(config.family).linear)(kind);
            format!("{}.{}.{name}", blocks(config), id.layer)
        }
    }
}

/// Whether transformers has the class that [`architecture`] names. Where it has none, the head is that of its other decoders.
pub(crate) fn is_in_transformers(config: &ModelConfig) -> bool {
    let Some(classifier) = config.classifier() else {
        return true;
    };
    !matches!(
        (config.family, classifier.pooling),
        (Family::Granite, _)
            | (
                Family::Gemma3 | Family::Olmo2 | Family::Olmo3,
                Pooling::Each
            )
    )
}

/// transformers' class of a family for the head that a model has; `None` for the bare model.
pub(crate) fn architecture(config: &ModelConfig) -> Option<String> {
    let family = match config.family {
        Family::Llama => "Llama",
        Family::Mistral => "Mistral",
        Family::Qwen2 => "Qwen2",
        Family::Qwen3 => "Qwen3",
        Family::Gemma3 if config.head == HeadKind::LanguageModel => "Gemma3",
        Family::Gemma3 => "Gemma3Text",
        Family::Gemma2 => "Gemma2",
        Family::SmolLm3 => "SmolLM3",
        Family::Granite => "Granite",
        Family::Olmo2 => "Olmo2",
        Family::Olmo3 => "Olmo3",
        Family::Phi3 => "Phi3",
        Family::Ministral3 => "Ministral3",
        Family::Glm4 => "Glm4",
        Family::Gpt2 => "GPT2",
        Family::Bert => "Bert",
        Family::Roberta => "Roberta",
        Family::XlmRoberta => "XLMRoberta",
        Family::DistilBert => "DistilBert",
        Family::ModernBert => "ModernBert",
        Family::DebertaV2 => "DebertaV2",
    };
    let head = match &config.head {
        HeadKind::LanguageModel if config.family == Family::Gpt2 => "LMHeadModel",
        HeadKind::LanguageModel => "ForCausalLM",
        HeadKind::Classifier(head) if head.pooling == Pooling::Each => "ForTokenClassification",
        HeadKind::Classifier(_) => "ForSequenceClassification",
        HeadKind::None => return None,
    };
    Some(format!("{family}{head}"))
}

fn classifier_dense(config: &ModelConfig) -> &'static str {
    match config.family {
        Family::Bert => "bert.pooler.dense",
        Family::DistilBert => "pre_classifier",
        Family::ModernBert => "head.dense",
        Family::DebertaV2 => "pooler.dense",
        _ => "classifier.dense",
    }
}

fn classifier_out(config: &ModelConfig) -> &'static str {
    let of_tokens = config
        .classifier()
        .is_some_and(|classifier| classifier.pooling == Pooling::Each);
    match config.family {
        Family::Roberta | Family::XlmRoberta if !of_tokens => "classifier.out_proj",
        Family::Gpt2 if of_tokens => "classifier",
        _ if config.causal => "score",
        _ => "classifier",
    }
}

/// The name of an adapter layer, as if it were a module of its block.
pub(crate) fn bottleneck_module(config: &ModelConfig, layer: usize, place: Sublayer) -> String {
    let blocks = blocks(config);
    let place = match place {
        Sublayer::Attention => "attention",
        Sublayer::Mlp => "mlp",
    };
    format!("{blocks}.{layer}.{place}_adapter")
}

/// The list that holds the blocks.
pub(crate) fn blocks(config: &ModelConfig) -> String {
    format!("{}{}", prefix(config), names(config.family).blocks)
}

/// The name of a tensor in `model.safetensors`.
pub fn tensor_name(config: &ModelConfig, id: WeightId) -> String {
    let names = names(config.family);
    let (module, part) = match id {
        WeightId::Linear(linear, part) => (linear_module(config, linear), part),
        WeightId::Norm(layer, norm, part) => {
            let name = (names.norm)(norm);
            (format!("{}.{layer}.{name}", blocks(config)), part)
        }
        WeightId::Head => ("lm_head".to_owned(), Part::Weight),
        WeightId::ClassifierNorm(part) => ("head.norm".to_owned(), part),
        WeightId::Embedding => (bare(config, names.embedding), Part::Weight),
        WeightId::Positions => (bare(config, names.positions), Part::Weight),
        WeightId::TokenTypes => (bare(config, names.token_types), Part::Weight),
        WeightId::EmbeddingNorm(part) => (bare(config, names.embedding_norm), part),
        WeightId::Relative => (bare(config, names.relative), Part::Weight),
        WeightId::RelativeNorm(part) => (bare(config, names.relative_norm), part),
        WeightId::FinalNorm(part) => (bare(config, names.final_norm), part),
    };
    let part = match part {
        Part::Weight => "weight",
        Part::Bias => "bias",
    };
    format!("{module}.{part}")
}

/// A module of the bare model.
fn bare(config: &ModelConfig, module: &str) -> String {
    format!("{}{module}", prefix(config))
}

/// The names that a tensor may have in a checkpoint, the one that is written first: a bare model's have no prefix, and BERT's first
/// files call the parts of a norm `gamma` and `beta`.
pub(crate) fn stored_names(config: &ModelConfig, id: WeightId) -> Vec<String> {
    let name = tensor_name(config, id);
    let prefix = names(config.family).prefix;
    let other = match name.strip_prefix(prefix) {
        Some(short) => Some(short.to_owned()),
        None if config.head == HeadKind::None => Some(format!("{prefix}{name}")),
        None => None,
    };
    let mut all: Vec<String> = std::iter::once(name).chain(other).collect();
    if config.family == Family::Gemma3 {
        all.extend(gemma::names_in_whole(&all[0]));
    }
    if !config.causal && id.is_vector() && !matches!(id, WeightId::Linear(..)) {
        let older = |name: &String| {
            let (module, part) = name.rsplit_once('.')?;
            let part = if part == "weight" { "gamma" } else { "beta" };
            Some(format!("{module}.{part}"))
        };
        let older: Vec<String> = all.iter().filter_map(older).collect();
        all.extend(older);
    }
    all
}

/// The prefix that some checkpoints of a family leave off every name (a bare `GPT2Model`, `LlamaModel`).
pub fn optional_prefix(family: Family) -> &'static str {
    names(family).prefix
}

/// Tensors that checkpoints carry and no computation reads: attention masks and derived tables.
pub fn is_derived(name: &str) -> bool {
    name.ends_with(".attn.bias")
        || name.ends_with(".attn.masked_bias")
        || name.ends_with("rotary_emb.inv_freq")
        || name.ends_with("embeddings.position_ids")
}

/// Whether a tensor belongs to a head that a model of this config does not have: that of a language model on an encoder, or of another
/// task. transformers leaves it out too.
pub(crate) fn is_of_other_head(config: &ModelConfig, name: &str) -> bool {
    let heads: &[&str] = &[
        "lm_head.",
        "cls.",
        "vocab_transform.",
        "vocab_layer_norm.",
        "vocab_projector.",
        "qa_outputs.",
        "score.",
        "classifier.",
        "pre_classifier.",
        "head.",
        "decoder.",
        "pooler.",
        "lm_predictions.",
        "mask_predictions.",
    ];
    let short = name
        .strip_prefix(names(config.family).prefix)
        .unwrap_or(name);
    config.head != HeadKind::LanguageModel && heads.iter().any(|head| short.starts_with(head))
}

/// Whether a tensor is of a table that this model has no use for: DeBERTa's files have one of absolute positions, whatever
/// `position_biased_input` says, and transformers leaves it out too.
pub(crate) fn is_of_other_positions(config: &ModelConfig, name: &str) -> bool {
    let names = names(config.family);
    let short = name.strip_prefix(names.prefix).unwrap_or(name);
    config.position == Position::None && short == deberta::POSITIONS
}

/// Whether a tensor belongs to what reads pictures, beside the text half that is read.
pub(crate) fn is_of_pictures(config: &ModelConfig, name: &str) -> bool {
    let short = name.strip_prefix("model.").unwrap_or(name);
    config.family == Family::Gemma3
        && (short.starts_with("vision_tower.") || short.starts_with("multi_modal_projector."))
}

/// The config of the part of a model that is read, where config.json describes more: the text half of one that also reads pictures.
///
/// # Errors
/// A half that is no object.
pub(crate) fn read_part(raw: HfConfig) -> Result<HfConfig, FormatError> {
    match raw.opt_str("model_type")? {
        Some("gemma3") => gemma::text_half(&raw),
        _ => Ok(raw),
    }
}

/// The spread of a new tensor of a classifier.
pub(crate) fn classifier_spread(config: &ModelConfig, id: WeightId) -> f32 {
    let range = config.initializer_range;
    match (config.family, id) {
        (Family::ModernBert, WeightId::Linear(linear, _)) if linear.kind == LinearKind::Out => {
            1.0 / (config.hidden_size as f32).sqrt()
        }
        (Family::ModernBert, _) => range / (2.0 * config.num_hidden_layers as f32).sqrt(),
        _ => range,
    }
}

/// Keys of `config.json` that give every linear of the blocks a bias; `None` where transformers has no such model.
pub(crate) fn bias_switches(family: Family) -> Option<&'static [&'static str]> {
    let has = matches!(family, Family::Llama | Family::SmolLm3 | Family::Granite);
    has.then_some(&["attention_bias", "mlp_bias"])
}

/// PEFT's default `target_modules` of a family; empty where it has none.
pub fn default_targets(family: Family) -> &'static [&'static str] {
    match family {
        Family::Llama
        | Family::Mistral
        | Family::Qwen2
        | Family::Qwen3
        | Family::Gemma2
        | Family::Gemma3
        // PEFT has none for these.
        | Family::SmolLm3
        | Family::Granite
        | Family::Olmo2
        | Family::Olmo3
        | Family::Ministral3
        | Family::Glm4 => &["q_proj", "v_proj"],
        Family::Phi3 => &["qkv_proj"],
        Family::Gpt2 => &["c_attn"],
        Family::Bert | Family::Roberta | Family::XlmRoberta => &["query", "value"],
        Family::DistilBert => &["q_lin", "v_lin"],
        Family::ModernBert => &["Wqkv"],
        Family::DebertaV2 => &["query_proj", "value_proj"],
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

/// How folders of a family have the linears of blocks.
pub fn layout(family: Family) -> Layout {
    match family {
        Family::Gpt2 => Layout::InOut,
        _ => Layout::OutIn,
    }
}

/// Keys that say that the model is another than its other keys describe, and shapes that the engine's arithmetic relies on.
fn check(raw: &HfConfig, config: &ModelConfig) -> Result<(), FormatError> {
    const PLAIN: &str = "so take the model as it was before; where its weights are plain all the same, remove the key";
    if QuantMethod::read(raw)?.is_some() && config.layout == Layout::InOut {
        return Err(raw.unsupported(
            QUANTIZATION_CONFIG,
            format!("none: quantized weights of GPT-2 are not read, {PLAIN}"),
        ));
    }
    for (field, why) in [
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

/// `sliding_window`: null means none. `absent` is the family's own default.
fn sliding_window(raw: &HfConfig, absent: Option<usize>) -> Result<Option<usize>, FormatError> {
    const FIELD: &str = "sliding_window";
    let window = if raw.map().contains_key(FIELD) {
        raw.opt_usize(FIELD)?
    } else {
        absent
    };
    if window == Some(0) {
        return Err(raw.unsupported(FIELD, "a whole number of at least 1, or null for none"));
    }
    Ok(window)
}

/// Layers that see a window and layers that see everything, the first with the second rotary embedding, the others with the first.
/// Where `layer_types` does not say which are which, `slides` does.
fn mixed_layers(
    raw: &HfConfig,
    layers: usize,
    window: Option<usize>,
    slides: impl Fn(usize) -> bool,
) -> Result<Vec<LayerConfig>, FormatError> {
    let given = layer_types(raw, layers)?;
    (0..layers)
        .map(|layer| {
            let slides = match given.as_ref().map(|kinds| kinds[layer]) {
                None => slides(layer),
                Some("full_attention") => false,
                Some("sliding_attention") => true,
                Some(_) => {
                    let accepted = "full_attention and sliding_attention";
                    return Err(raw.unsupported("layer_types", accepted));
                }
            };
            Ok(LayerConfig {
                window: window.filter(|_| slides),
                rope: Some(usize::from(slides)),
            })
        })
        .collect()
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
