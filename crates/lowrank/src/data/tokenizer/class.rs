//! The class of `transformers` that reads a folder.
//!
//! Most folders are read by `TokenizersBackend`, which takes tokenizer.json as it is. Some classes take only the
//! vocabulary, the merges and the post-processor from the file and build the rest (normalizer, splitting, decoder)
//! themselves, so that ids can differ from those of the file. Which class it is depends on `tokenizer_class` and on the
//! `model_type` of config.json. Read in models/auto/tokenization_auto.py and the models' own files of transformers 5.24.

use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};
use tokenizers::models::ModelWrapper;
use tokenizers::{
    AddedVocabulary, DecoderWrapper, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper,
};

use super::encoders::Encoder;

/// How Qwen 2 splits a text into words.
const QWEN2_WORDS: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Classes that rebuild, too, but are not built here: those of transformers 5.24 with a pipeline of their own.
const OTHERS: [&str; 47] = [
    "AlbertTokenizer",
    "BarthezTokenizer",
    "BartTokenizer",
    "BigBirdTokenizer",
    "BlenderbotTokenizer",
    "CLIPTokenizer",
    "CamembertTokenizer",
    "CodeGenTokenizer",
    "CodeLlamaTokenizer",
    "CohereTokenizer",
    "ConvBertTokenizer",
    "DebertaTokenizer",
    "EsmcTokenizer",
    "FNetTokenizer",
    "FunnelTokenizer",
    "GPTNeoXTokenizer",
    "GemmaTokenizer",
    "HerbertTokenizer",
    "LasrTokenizer",
    "LayoutLMv2Tokenizer",
    "LayoutLMv3Tokenizer",
    "LayoutXLMTokenizer",
    "LukeTokenizer",
    "MBart50Tokenizer",
    "MBartTokenizer",
    "MLukeTokenizer",
    "MPNetTokenizer",
    "MarkupLMTokenizer",
    "MobileBertTokenizer",
    "NllbTokenizer",
    "NougatTokenizer",
    "OpenAIGPTTokenizer",
    "PegasusTokenizer",
    "Qwen3_5Tokenizer",
    "ReformerTokenizer",
    "RemBertTokenizer",
    "SeamlessM4TTokenizer",
    "Siglip2Tokenizer",
    "SplinterTokenizer",
    "SqueezeBertTokenizer",
    "T5Tokenizer",
    "Tipsv2Tokenizer",
    "UdopTokenizer",
    "VideoPrismTokenizer",
    "WhisperTokenizer",
    "XGLMTokenizer",
    "XLNetTokenizer",
];

/// Types of models whose tokenizer.json is taken as it is, whatever class their folders name.
const AS_IT_IS: [&str; 6] = ["glm4", "granite", "modernbert", "olmo2", "olmo3", "phi3"];

/// Where a class of SentencePiece puts the space that it begins a text with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Prefix {
    /// Before each piece of text between added tokens.
    Always,
    /// Before the text alone.
    First,
    Never,
}

/// Who reads tokenizer.json.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Class {
    /// `TokenizersBackend`: the file as it is.
    #[default]
    Backend,
    /// `LlamaTokenizer`.
    Llama { prefix: Prefix },
    /// `GPT2Tokenizer`.
    Gpt2 { prefix: bool },
    /// `Qwen2Tokenizer`.
    Qwen2 { prefix: bool },
    /// The class of an encoder, which builds what stands around a text, too.
    Encoder(Encoder),
}

impl Class {
    /// The class that `AutoTokenizer` takes for a folder's tokenizer_config.json, config.json and tokenizer.json.
    pub(super) fn of(
        config: &Map<String, Value>,
        model: &Map<String, Value>,
        tokenizer_json: &[u8],
    ) -> Self {
        let text = |map: &Map<String, Value>, key: &str| {
            let value = map.get(key).and_then(Value::as_str);
            value.filter(|text| !text.is_empty()).map(str::to_owned)
        };
        let declared = text(config, "tokenizer_class").or_else(|| text(model, "tokenizer_class"));
        let declared = declared
            .as_deref()
            .map(|name| name.strip_suffix("Fast").unwrap_or(name));
        let model_type = text(model, "model_type").unwrap_or_default();
        // The class that a model has by itself.
        let own = match model_type.as_str() {
            "gpt2" => Some("GPT2Tokenizer"),
            "qwen2" | "qwen3" => Some("Qwen2Tokenizer"),
            "bert" | "distilbert" => Some("BertTokenizer"),
            "roberta" => Some("RobertaTokenizer"),
            "xlm-roberta" => Some("XLMRobertaTokenizer"),
            "deberta-v2" => Some("DebertaV2Tokenizer"),
            _ => None,
        };
        let bytes =
            || std::str::from_utf8(tokenizer_json).is_ok_and(|text| text.contains("\"ByteLevel\""));
        let name = match (declared, own) {
            // Folders of Llama 3 that still name the class of Llama 2.
            (Some("LlamaTokenizer"), _) if model_type != "qwen2" && bytes() => None,
            (Some("LlamaTokenizer"), _) if model_type == "mistral" => None,
            _ if AS_IT_IS.contains(&model_type.as_str()) => None,
            // Qwen 2's own class goes before what its folders name.
            (Some(_), Some(own)) if model_type == "qwen2" => Some(own),
            (Some(declared), _) => Some(declared),
            (None, own) => own,
        };
        Self::named(name.unwrap_or_default(), config)
    }

    fn named(name: &str, config: &Map<String, Value>) -> Self {
        let flag = |key: &str| config.get(key).and_then(Value::as_bool);
        let prefix = flag("add_prefix_space");
        match name {
            "LlamaTokenizer" => Self::Llama {
                prefix: match (prefix, flag("legacy")) {
                    (Some(false), _) => Prefix::Never,
                    (_, Some(true)) => Prefix::Always,
                    _ => Prefix::First,
                },
            },
            "GPT2Tokenizer" => Self::Gpt2 {
                prefix: prefix.unwrap_or(false),
            },
            "Qwen2Tokenizer" => Self::Qwen2 {
                prefix: prefix.unwrap_or(false),
            },
            _ => {
                if let Some(encoder) = Encoder::named(name, config) {
                    return Self::Encoder(encoder);
                }
                if OTHERS.contains(&name) {
                    tracing::warn!(
                        "transformers reads this tokenizer with the class {name}, which splits texts by its own rules; \
                         here tokenizer.json is used as it is, so ids may differ: compare some with transformers"
                    );
                }
                Self::Backend
            }
        }
    }

    /// The special tokens that a class names where no file does.
    pub(super) fn names(self) -> &'static [(&'static str, &'static str)] {
        match self {
            Self::Backend => &[],
            Self::Encoder(encoder) => encoder.names(),
            Self::Llama { .. } => &[
                ("bos_token", "<s>"),
                ("eos_token", "</s>"),
                ("unk_token", "<unk>"),
            ],
            Self::Gpt2 { .. } => &[
                ("bos_token", "<|endoftext|>"),
                ("eos_token", "<|endoftext|>"),
                ("unk_token", "<|endoftext|>"),
            ],
            Self::Qwen2 { .. } => &[
                ("eos_token", "<|endoftext|>"),
                ("unk_token", "<|endoftext|>"),
                ("pad_token", "<|endoftext|>"),
            ],
        }
    }

    /// Builds what the class builds itself; its added tokens have to be given again afterwards. Says whether it did.
    /// `unknown` is the unknown token that the folder names.
    ///
    /// # Errors
    /// If the vocabulary is of another kind than the class's.
    pub(super) fn rebuild(
        self,
        inner: &mut tokenizers::Tokenizer,
        unknown: Option<&str>,
    ) -> Result<bool, String> {
        if self == Self::Backend {
            return Ok(false);
        }
        let model = self.model(inner.get_model(), unknown)?;
        let Some(model) = model else {
            return Err(format!(
                "transformers reads this folder with the class {}, which needs a {} vocabulary, and this one is of another \
                 kind; set \"tokenizer_class\" in tokenizer_config.json to \"PreTrainedTokenizerFast\"",
                self.name(),
                match self {
                    Self::Encoder(encoder) => encoder.vocabulary(),
                    _ => "BPE",
                }
            ));
        };
        let normalizer = match self {
            Self::Qwen2 { .. } => json!({"type": "NFC"}),
            Self::Encoder(encoder) => {
                let given = serde_json::to_value(inner.get_normalizer());
                encoder.normalizer(&given.map_err(|error| error.to_string())?)
            }
            _ => Value::Null,
        };
        inner.with_model(model);
        inner
            .with_normalizer(part::<Option<NormalizerWrapper>>(normalizer)?)
            .map_err(|error| error.to_string())?;
        inner.with_pre_tokenizer(Some(part::<PreTokenizerWrapper>(self.splitting())?));
        inner.with_decoder(Some(part::<DecoderWrapper>(self.decoder())?));
        inner.with_added_vocabulary(AddedVocabulary::new());
        Ok(true)
    }

    /// The vocabulary as the class takes it; none where it is of another kind.
    fn model(
        self,
        model: &ModelWrapper,
        unknown: Option<&str>,
    ) -> Result<Option<ModelWrapper>, String> {
        if let Self::Encoder(encoder) = self {
            return encoder.model(model, unknown.unwrap_or("[UNK]"));
        }
        let ModelWrapper::BPE(mut model) = model.clone() else {
            return Ok(None);
        };
        let is_llama = matches!(self, Self::Llama { .. });
        model.dropout = None;
        model.unk_token = None;
        model.ignore_merges = false;
        model.continuing_subword_prefix = None;
        model.end_of_word_suffix = None;
        model.fuse_unk = is_llama;
        model.byte_fallback = is_llama;
        Ok(Some(model.into()))
    }

    /// What a class puts around a text in place of the file's post-processor; none where it takes the file's. `special`
    /// gives text and id of a special token by its name.
    pub(super) fn around(
        self,
        special: impl Fn(&str) -> Result<(String, u32), String>,
    ) -> Result<Option<PostProcessorWrapper>, String> {
        match self {
            Self::Encoder(encoder) => Ok(Some(part(encoder.around(special)?)?)),
            _ => Ok(None),
        }
    }

    /// The pre-tokenizer, as tokenizer.json writes it.
    fn splitting(self) -> Value {
        let byte_level = |prefix: bool, regex: bool| json!({"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": true, "use_regex": regex});
        match self {
            Self::Backend => Value::Null,
            Self::Encoder(encoder) => encoder.splitting(),
            Self::Llama { prefix } => {
                let scheme = match prefix {
                    Prefix::Always => "always",
                    Prefix::First => "first",
                    Prefix::Never => "never",
                };
                json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": false})
            }
            Self::Gpt2 { prefix } => byte_level(prefix, true),
            Self::Qwen2 { prefix } => json!({"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": QWEN2_WORDS}, "behavior": "Isolated", "invert": false},
                byte_level(prefix, false),
            ]}),
        }
    }

    fn decoder(self) -> Value {
        if let Self::Encoder(encoder) = self {
            return encoder.decoder();
        }
        let Self::Llama { prefix } = self else {
            return json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true});
        };
        let mut parts = vec![
            json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
            json!({"type": "ByteFallback"}),
            json!({"type": "Fuse"}),
        ];
        if prefix != Prefix::Never {
            parts.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
        }
        json!({"type": "Sequence", "decoders": parts})
    }

    fn name(self) -> &'static str {
        match self {
            Self::Backend => "TokenizersBackend",
            Self::Llama { .. } => "LlamaTokenizer",
            Self::Gpt2 { .. } => "GPT2Tokenizer",
            Self::Qwen2 { .. } => "Qwen2Tokenizer",
            Self::Encoder(encoder) => encoder.name(),
        }
    }
}

/// A part of a tokenizer from the form that it has in tokenizer.json.
fn part<T: DeserializeOwned>(json: Value) -> Result<T, String> {
    serde_json::from_value(json).map_err(|error| error.to_string())
}
