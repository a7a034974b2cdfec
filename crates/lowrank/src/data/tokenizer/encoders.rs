//! What the classes of encoders build themselves: BERT's, RoBERTa's, XLM-RoBERTa's and DeBERTa's.
//!
//! Unlike the classes of decoders they take nothing but the vocabulary from tokenizer.json: what stands around a text, or a
//! pair of texts, is the class's own as well. Read in the models' tokenization files of transformers 5.24.

use serde_json::{Map, Value, json};
use tokenizers::models::ModelWrapper;
use tokenizers::models::unigram::Unigram;

/// A class and the values of tokenizer_config.json that it reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Encoder {
    /// `BertTokenizer`, which DistilBERT and MiniLM use too.
    Bert {
        lower: bool,
        /// Without it accents go where letters are made small.
        strip_accents: Option<bool>,
        chinese: bool,
    },
    /// `RobertaTokenizer`.
    Roberta { prefix: bool },
    /// `XLMRobertaTokenizer`.
    XlmRoberta { prefix: bool },
    /// `DebertaV2Tokenizer`, which DeBERTa v3 uses too.
    DebertaV2 {
        lower: bool,
        split_punctuation: bool,
        prefix: bool,
    },
}

impl Encoder {
    /// The class of this name.
    pub(super) fn named(name: &str, config: &Map<String, Value>) -> Option<Self> {
        let flag = |key: &str| config.get(key).and_then(Value::as_bool);
        let or = |key: &str, default: bool| flag(key).unwrap_or(default);
        Some(match name {
            "BertTokenizer" | "DistilBertTokenizer" => Self::Bert {
                lower: or("do_lower_case", true),
                strip_accents: flag("strip_accents"),
                chinese: or("tokenize_chinese_chars", true),
            },
            "RobertaTokenizer" => Self::Roberta {
                prefix: or("add_prefix_space", false),
            },
            "XLMRobertaTokenizer" => Self::XlmRoberta {
                prefix: or("add_prefix_space", true),
            },
            "DebertaV2Tokenizer" => Self::DebertaV2 {
                lower: or("do_lower_case", false),
                split_punctuation: or("split_by_punct", false),
                prefix: or("add_prefix_space", true),
            },
            _ => return None,
        })
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Bert { .. } => "BertTokenizer",
            Self::Roberta { .. } => "RobertaTokenizer",
            Self::XlmRoberta { .. } => "XLMRobertaTokenizer",
            Self::DebertaV2 { .. } => "DebertaV2Tokenizer",
        }
    }

    /// The special tokens that the class names where no file does.
    pub(super) fn names(self) -> &'static [(&'static str, &'static str)] {
        match self {
            Self::Bert { .. } => &[
                ("unk_token", "[UNK]"),
                ("sep_token", "[SEP]"),
                ("pad_token", "[PAD]"),
                ("cls_token", "[CLS]"),
                ("mask_token", "[MASK]"),
            ],
            Self::Roberta { .. } | Self::XlmRoberta { .. } => &[
                ("bos_token", "<s>"),
                ("eos_token", "</s>"),
                ("unk_token", "<unk>"),
                ("sep_token", "</s>"),
                ("pad_token", "<pad>"),
                ("cls_token", "<s>"),
                ("mask_token", "<mask>"),
            ],
            Self::DebertaV2 { .. } => &[
                ("bos_token", "[CLS]"),
                ("eos_token", "[SEP]"),
                ("unk_token", "[UNK]"),
                ("sep_token", "[SEP]"),
                ("pad_token", "[PAD]"),
                ("cls_token", "[CLS]"),
                ("mask_token", "[MASK]"),
            ],
        }
    }

    /// The model of SentencePiece that the class reads where there is no tokenizer.json.
    pub(super) fn sentence_pieces(self) -> Option<&'static str> {
        match self {
            Self::Bert { .. } | Self::Roberta { .. } => None,
            Self::XlmRoberta { .. } => Some("sentencepiece.bpe.model"),
            Self::DebertaV2 { .. } => Some("spm.model"),
        }
    }

    /// The kind of vocabulary that the class needs, as tokenizer.json calls it.
    pub(super) fn vocabulary(self) -> &'static str {
        match self {
            Self::Bert { .. } => "WordPiece",
            Self::Roberta { .. } => "BPE",
            Self::XlmRoberta { .. } | Self::DebertaV2 { .. } => "Unigram",
        }
    }

    /// The vocabulary as the class takes it; none where it is of another kind. `unknown` is the unknown token.
    ///
    /// # Errors
    /// If the vocabulary is too small to have the class's unknown token.
    pub(super) fn model(
        self,
        model: &ModelWrapper,
        unknown: &str,
    ) -> Result<Option<ModelWrapper>, String> {
        Ok(Some(match (self, model) {
            (Self::Bert { .. }, ModelWrapper::WordPiece(model)) => {
                let mut model = model.clone();
                unknown.clone_into(&mut model.unk_token);
                "##".clone_into(&mut model.continuing_subword_prefix);
                model.max_input_chars_per_word = 100;
                model.into()
            }
            (Self::Roberta { .. }, ModelWrapper::BPE(model)) => {
                let mut model = model.clone();
                model.dropout = None;
                model.unk_token = None;
                model.ignore_merges = false;
                model.continuing_subword_prefix = None;
                model.end_of_word_suffix = None;
                model.fuse_unk = false;
                model.byte_fallback = false;
                model.into()
            }
            (Self::XlmRoberta { .. } | Self::DebertaV2 { .. }, ModelWrapper::Unigram(model)) => {
                let pieces: Vec<(String, f64)> = model.iter().cloned().collect();
                let unknown_id = match self {
                    Self::XlmRoberta { .. } => 3,
                    _ => pieces
                        .iter()
                        .position(|(text, score)| text == unknown && *score == 0.0)
                        .unwrap_or(1),
                };
                Unigram::from(pieces, Some(unknown_id), false)
                    .map_err(|error| error.to_string())?
                    .into()
            }
            _ => return Ok(None),
        }))
    }

    /// The normalizer, as tokenizer.json writes it. `given` is the file's own, whose table of characters XLM-RoBERTa keeps.
    pub(super) fn normalizer(self, given: &Value) -> Value {
        match self {
            Self::Bert {
                lower,
                strip_accents,
                chinese,
            } => {
                json!({"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": chinese,
                "strip_accents": strip_accents, "lowercase": lower})
            }
            Self::Roberta { .. } => Value::Null,
            Self::XlmRoberta { .. } => {
                let one = std::slice::from_ref(given);
                let parts = given["normalizers"].as_array().map_or(one, Vec::as_slice);
                let table = parts.iter().find(|part| part["type"] == "Precompiled");
                table.cloned().unwrap_or_default()
            }
            Self::DebertaV2 { lower, .. } => {
                let mut parts = vec![
                    json!({"type": "Replace", "pattern": {"Regex": r"\s{2,}|[\n\r\t]"}, "content": " "}),
                    json!({"type": "NFC"}),
                    json!({"type": "Strip", "strip_left": false, "strip_right": true}),
                ];
                if lower {
                    parts.insert(0, json!({"type": "Lowercase"}));
                }
                json!({"type": "Sequence", "normalizers": parts})
            }
        }
    }

    /// The pre-tokenizer, as tokenizer.json writes it.
    pub(super) fn splitting(self) -> Value {
        match self {
            Self::Bert { .. } => json!({"type": "BertPreTokenizer"}),
            Self::Roberta { prefix } => {
                json!({"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": true, "use_regex": true})
            }
            Self::XlmRoberta { .. } => {
                json!({"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, self.metaspace()]})
            }
            Self::DebertaV2 {
                split_punctuation, ..
            } => {
                let mut parts = vec![self.metaspace()];
                if split_punctuation {
                    parts.insert(0, json!({"type": "Punctuation", "behavior": "Isolated"}));
                }
                json!({"type": "Sequence", "pretokenizers": parts})
            }
        }
    }

    pub(super) fn decoder(self) -> Value {
        match self {
            Self::Bert { .. } => json!({"type": "WordPiece", "prefix": "##", "cleanup": true}),
            Self::Roberta { .. } => {
                json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true})
            }
            Self::XlmRoberta { .. } | Self::DebertaV2 { .. } => self.metaspace(),
        }
    }

    /// `▁` for spaces, and whether one is put before a text.
    fn metaspace(self) -> Value {
        let scheme = match self {
            Self::XlmRoberta { prefix: true } | Self::DebertaV2 { prefix: true, .. } => "always",
            Self::DebertaV2 { .. } => "first",
            _ => "never",
        };
        json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": true})
    }

    /// What stands around a text or a pair, as tokenizer.json writes it. `special` gives text and id of a special token by
    /// its name.
    pub(super) fn around(
        self,
        special: impl Fn(&str) -> Result<(String, u32), String>,
    ) -> Result<Value, String> {
        let (begin, end) = match self {
            Self::XlmRoberta { .. } => ("bos_token", "eos_token"),
            _ => ("cls_token", "sep_token"),
        };
        let (begin, end) = (special(begin)?, special(end)?);
        if let Self::Roberta { prefix } = self {
            return Ok(
                json!({"type": "RobertaProcessing", "sep": end, "cls": begin, "trim_offsets": true,
                "add_prefix_space": prefix}),
            );
        }
        let text = |name: &str, kind: u8| json!({"Sequence": {"id": name, "type_id": kind}});
        let token = |(text, _): &(String, u32), kind: u8| json!({"SpecialToken": {"id": text, "type_id": kind}});
        let single = vec![token(&begin, 0), text("A", 0), token(&end, 0)];
        let mut pair = single.clone();
        match self {
            Self::XlmRoberta { .. } => {
                pair.extend([token(&end, 0), text("B", 0), token(&end, 0)]);
            }
            _ => pair.extend([text("B", 1), token(&end, 1)]),
        }
        let tokens: Map<String, Value> = [&begin, &end]
            .into_iter()
            .map(|(text, id)| {
                (
                    text.clone(),
                    json!({"id": text, "ids": [id], "tokens": [text]}),
                )
            })
            .collect();
        Ok(
            json!({"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": tokens}),
        )
    }
}
