//! The tokenizer inside a GGUF file, written as the files that `transformers` and this program read.
//!
//! A GGUF file keeps a byte-level BPE as its tokens, their types and its merges, and names the way text is cut into
//! words before merging (`tokenizer.ggml.pre`). The cuts themselves are not in the file, so they are here, for the
//! names that are known; guessing one would change the ids of some texts without a word, so any other name is an error.

use std::collections::HashMap;

use serde_json::{Map, Value, json};

use super::error::DataError;

/// What a GGUF file says under `tokenizer.ggml.*` and `tokenizer.chat_template`.
#[derive(Debug, Clone, Default)]
pub struct GgufTokenizerParts {
    /// `model`: `gpt2` is byte-level BPE.
    pub model: String,
    /// `pre`: how text is cut into words; none in old files.
    pub pre: Option<String>,
    /// `tokens`, by id, in GPT-2's printable bytes.
    pub tokens: Vec<String>,
    /// `token_type`, by id: 1 normal, 2 unknown, 3 control, 4 user defined, 5 unused, 6 byte. Empty: all are normal.
    pub token_types: Vec<i32>,
    /// `merges`, first to last, each two tokens with a space between.
    pub merges: Vec<String>,
    /// `bos_token_id`.
    pub bos_id: Option<u32>,
    /// `eos_token_id`.
    pub eos_id: Option<u32>,
    /// `unknown_token_id`.
    pub unk_id: Option<u32>,
    /// `padding_token_id`.
    pub pad_id: Option<u32>,
    /// `add_bos_token`; none: what is usual for `pre`.
    pub add_bos: Option<bool>,
    /// `add_eos_token`; none: no.
    pub add_eos: Option<bool>,
    /// `add_space_prefix`; none: no.
    pub add_space_prefix: Option<bool>,
    /// `tokenizer.chat_template`.
    pub chat_template: Option<String>,
}

/// The contents of a model folder's tokenizer files.
#[derive(Debug, Clone, PartialEq)]
pub struct GgufTokenizerFiles {
    /// tokenizer.json.
    pub tokenizer_json: Value,
    /// tokenizer_config.json.
    pub tokenizer_config: Value,
    /// chat_template.jinja, if the model has one.
    pub chat_template: Option<String>,
}

/// The ways to cut text into words that are known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cut {
    /// GPT-2's pattern.
    Gpt2,
    /// Every digit alone, then GPT-2's pattern.
    SmolLm,
    /// Llama 3's pattern: digits by threes, newlines by themselves; a word that is a token is not merged up to.
    Llama3,
    /// Qwen 2's pattern: digits alone; text is composed (NFC) first.
    Qwen2,
}

/// Llama 3's and Qwen 2's patterns, but for how digits are taken.
fn word_pattern(digits: &str) -> String {
    [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        digits,
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
    .join("|")
}

impl Cut {
    fn named(pre: Option<&str>) -> Result<Self, DataError> {
        match pre {
            // llama.cpp's own default also cuts around punctuation; the models whose files say "default" or nothing were
            // trained with GPT-2's pattern.
            None | Some("" | "default" | "gpt-2" | "gpt2") => Ok(Self::Gpt2),
            Some("smollm") => Ok(Self::SmolLm),
            Some("llama-bpe" | "llama3" | "llama-v3") => Ok(Self::Llama3),
            Some("qwen2") => Ok(Self::Qwen2),
            Some(other) => Err(DataError::Gguf(format!(
                "its pre-tokenizer is {other:?}, and how that cuts text is not known here (known are default, gpt-2, smollm, \
                 llama-bpe and qwen2); copy tokenizer.json from the model's original repository into the folder"
            ))),
        }
    }

    fn pre_tokenizer(self, space: bool) -> Value {
        let bytes = |regex: bool| json!({"type": "ByteLevel", "add_prefix_space": space, "trim_offsets": true, "use_regex": regex});
        let split = |digits: &str| {
            json!({
                "type": "Split",
                "pattern": {"Regex": word_pattern(digits)},
                "behavior": "Isolated",
                "invert": false,
            })
        };
        let sequence =
            |first: Value, then: Value| json!({"type": "Sequence", "pretokenizers": [first, then]});
        match self {
            Self::Gpt2 => bytes(true),
            Self::SmolLm => sequence(
                json!({"type": "Digits", "individual_digits": true}),
                bytes(true),
            ),
            Self::Llama3 => sequence(split(r"\p{N}{1,3}"), bytes(false)),
            Self::Qwen2 => sequence(split(r"\p{N}"), bytes(false)),
        }
    }
}

const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;

impl GgufTokenizerParts {
    /// The files that give the same ids.
    ///
    /// # Errors
    /// If the model is no byte-level BPE, its way to cut text is not known, or its parts contradict each other.
    pub fn to_files(&self) -> Result<GgufTokenizerFiles, DataError> {
        if self.model != "gpt2" {
            let kind = match self.model.as_str() {
                "llama" => "SentencePiece (\"llama\")".to_owned(),
                "bert" => "WordPiece (\"bert\")".to_owned(),
                "t5" => "unigram SentencePiece (\"t5\")".to_owned(),
                other => format!("{other:?}"),
            };
            return Err(DataError::Gguf(format!(
                "it is of the kind {kind}, and only byte-level BPE (\"gpt2\") can be rewritten; copy tokenizer.json from \
                 the model's original repository into the folder"
            )));
        }
        let cut = Cut::named(self.pre.as_deref())?;
        let vocabulary = self.vocabulary()?;
        let merges = self.merges(&vocabulary)?;
        let special = self.special_tokens()?;
        let add_bos = self
            .add_bos
            .unwrap_or(cut == Cut::Llama3 && self.bos_id.is_some());
        let decoder = json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true});
        let tokenizer_json = json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": self.added_tokens(),
            "normalizer": (cut == Cut::Qwen2).then(|| json!({"type": "NFC"})),
            "pre_tokenizer": cut.pre_tokenizer(self.add_space_prefix == Some(true)),
            "post_processor": self.post_processor(add_bos, self.add_eos == Some(true), &special)?,
            "decoder": decoder,
            "model": {
                "type": "BPE",
                "dropout": null,
                "unk_token": null,
                "continuing_subword_prefix": null,
                "end_of_word_suffix": null,
                "fuse_unk": false,
                "byte_fallback": false,
                "ignore_merges": cut == Cut::Llama3,
                "vocab": self.tokens.iter().enumerate().map(|(id, token)| (token.clone(), json!(id))).collect::<Map<_, _>>(),
                "merges": merges,
            },
        });
        let mut config: Map<String, Value> = special
            .iter()
            .map(|(name, token)| ((*name).to_owned(), json!(token)))
            .collect();
        config.insert("clean_up_tokenization_spaces".into(), json!(false));
        config.insert("tokenizer_class".into(), json!("PreTrainedTokenizerFast"));
        Ok(GgufTokenizerFiles {
            tokenizer_json,
            tokenizer_config: Value::Object(config),
            chat_template: self.chat_template.clone(),
        })
    }

    fn vocabulary(&self) -> Result<HashMap<&str, usize>, DataError> {
        if self.tokens.is_empty() {
            return Err(DataError::Gguf(
                "it has no tokens (tokenizer.ggml.tokens)".into(),
            ));
        }
        if !self.token_types.is_empty() && self.token_types.len() != self.tokens.len() {
            return Err(DataError::Gguf(format!(
                "it has {} tokens, but {} token types",
                self.tokens.len(),
                self.token_types.len()
            )));
        }
        let mut vocabulary = HashMap::with_capacity(self.tokens.len());
        for (id, token) in self.tokens.iter().enumerate() {
            if let Some(before) = vocabulary.insert(token.as_str(), id) {
                return Err(DataError::Gguf(format!(
                    "tokens {before} and {id} are both {token:?}"
                )));
            }
        }
        Ok(vocabulary)
    }

    fn merges(&self, vocabulary: &HashMap<&str, usize>) -> Result<Vec<Value>, DataError> {
        if self.merges.is_empty() {
            return Err(DataError::Gguf(
                "it has no merges (tokenizer.ggml.merges)".into(),
            ));
        }
        let pair = |(at, merge): (usize, &String)| {
            let Some((left, right)) = merge.split_once(' ') else {
                return Err(DataError::Gguf(format!(
                    "merge {at}, {merge:?}, is not two tokens with a space between"
                )));
            };
            for token in [left.to_owned(), right.to_owned(), format!("{left}{right}")] {
                if !vocabulary.contains_key(token.as_str()) {
                    return Err(DataError::Gguf(format!(
                        "merge {at}, {merge:?}, needs the token {token:?}, which is missing"
                    )));
                }
            }
            Ok(json!([left, right]))
        };
        self.merges.iter().enumerate().map(pair).collect()
    }

    /// The special tokens that have a name, by it.
    fn special_tokens(&self) -> Result<Vec<(&'static str, &str)>, DataError> {
        let named = [
            ("bos_token", self.bos_id),
            ("eos_token", self.eos_id),
            ("unk_token", self.unk_id),
            ("pad_token", self.pad_id),
        ];
        let mut special = Vec::new();
        for (name, id) in named {
            let Some(id) = id else { continue };
            let Some(token) = self.tokens.get(id as usize) else {
                let count = self.tokens.len();
                return Err(DataError::Gguf(format!(
                    "{name} has the id {id}, but there are only {count} tokens"
                )));
            };
            special.push((name, token.as_str()));
        }
        Ok(special)
    }

    /// Tokens that are found in a text as they stand, before it is cut.
    fn added_tokens(&self) -> Vec<Value> {
        let named = [self.bos_id, self.eos_id, self.unk_id, self.pad_id];
        let added = self.tokens.iter().enumerate().filter_map(|(id, token)| {
            let kind = self.token_types.get(id).copied().unwrap_or(1);
            let special =
                kind == CONTROL || kind == UNKNOWN || named.contains(&u32::try_from(id).ok());
            (special || kind == USER_DEFINED).then(|| {
                json!({
                    "id": id,
                    "content": token,
                    "single_word": false,
                    "lstrip": false,
                    "rstrip": false,
                    "normalized": false,
                    "special": special,
                })
            })
        });
        added.collect()
    }

    fn post_processor(
        &self,
        bos: bool,
        eos: bool,
        special: &[(&'static str, &str)],
    ) -> Result<Value, DataError> {
        let token = |name: &str, flag: &str| {
            special
                .iter()
                .find(|(known, _)| *known == name)
                .map(|(_, token)| *token)
                .ok_or_else(|| DataError::Gguf(format!("{flag} is set, but there is no {name}_id")))
        };
        let begin = bos
            .then(|| token("bos_token", "add_bos_token"))
            .transpose()?;
        let end = eos
            .then(|| token("eos_token", "add_eos_token"))
            .transpose()?;
        if begin.is_none() && end.is_none() {
            return Ok(Value::Null);
        }
        let piece =
            |token: &str, part: usize| json!({"SpecialToken": {"id": token, "type_id": part}});
        let around = |name: &str, part: usize| {
            let text = json!({"Sequence": {"id": name, "type_id": part}});
            begin
                .iter()
                .map(|token| piece(token, part))
                .chain([text])
                .chain(end.iter().map(|token| piece(token, part)))
                .collect::<Vec<Value>>()
        };
        let single = around("A", 0);
        let pair: Vec<Value> = single.iter().cloned().chain(around("B", 1)).collect();
        let ids: Map<String, Value> = [(begin, self.bos_id), (end, self.eos_id)]
            .into_iter()
            .filter_map(|(token, id)| {
                let token = token?;
                Some((
                    token.to_owned(),
                    json!({"id": token, "ids": [id?], "tokens": [token]}),
                ))
            })
            .collect();
        Ok(
            json!({"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": ids}),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{Tokenizer, fixture};

    fn with_pre(pre: &str) -> Tokenizer {
        fixture::build(&GgufTokenizerParts {
            pre: Some(pre.into()),
            ..fixture::parts()
        })
    }

    fn pieces(tokenizer: &Tokenizer, text: &str) -> Vec<String> {
        tokenizer
            .encode(text, false)
            .unwrap()
            .iter()
            .map(|id| tokenizer.token_text(*id))
            .collect()
    }

    #[test]
    fn text_is_cut_as_the_name_says() {
        // Two spaces before a word: the second belongs to the word. Before a digit only smollm keeps them together.
        assert_eq!(
            pieces(&with_pre("gpt-2"), "  hello  1"),
            [" ", " hello", " ", " ", "1"]
        );
        assert_eq!(
            pieces(&with_pre("smollm"), "  hello  1"),
            [" ", " hello", "  ", "1"]
        );
        assert_eq!(
            pieces(&with_pre("llama-bpe"), "  hello"),
            ["<s>", " ", " hello"][1..]
        );
        // Composed first: e with a combining accent is the two bytes of é.
        assert_eq!(pieces(&with_pre("qwen2"), "e\u{301}"), ["\\xC3", "\\xA9"]);
        assert_eq!(
            pieces(&with_pre("gpt-2"), "e\u{301}"),
            ["e", "\\xCC", "\\x81"]
        );
    }

    #[test]
    fn llama_adds_its_beginning_unless_told_otherwise() {
        assert!(with_pre("llama-bpe").adds_bos());
        assert!(!with_pre("qwen2").adds_bos());
        let parts = GgufTokenizerParts {
            pre: Some("llama-bpe".into()),
            add_bos: Some(false),
            ..fixture::parts()
        };
        assert!(!fixture::build(&parts).adds_bos());
        let parts = GgufTokenizerParts {
            add_bos: Some(true),
            add_eos: Some(true),
            ..fixture::parts()
        };
        let tokenizer = fixture::build(&parts);
        assert_eq!(
            tokenizer
                .decode(&tokenizer.encode("a", true).unwrap(), false)
                .unwrap(),
            "<s>a<|im_end|>"
        );
    }

    #[test]
    fn user_defined_tokens_are_found_but_not_special() {
        let mut parts = fixture::parts();
        parts.tokens.push("<tool>".into());
        parts.token_types.push(USER_DEFINED);
        let tokenizer = fixture::build(&parts);
        let id = tokenizer.token_id("<tool>").unwrap();
        assert_eq!(tokenizer.encode("<tool>", false).unwrap(), [id]);
        assert!(!tokenizer.is_special(id));
        assert!(tokenizer.is_special(1));
        assert_eq!(tokenizer.decode(&[1, id], true).unwrap(), "<tool>");
    }

    #[test]
    fn what_is_not_known_or_does_not_fit_is_an_error() {
        let parts = fixture::parts;
        for (wrong, expected) in [
            (
                GgufTokenizerParts {
                    model: "llama".into(),
                    ..parts()
                },
                "SentencePiece (\"llama\")",
            ),
            (
                GgufTokenizerParts {
                    model: "rwkv".into(),
                    ..parts()
                },
                "of the kind \"rwkv\"",
            ),
            (
                GgufTokenizerParts {
                    pre: Some("tekken".into()),
                    ..parts()
                },
                "its pre-tokenizer is \"tekken\"",
            ),
            (
                GgufTokenizerParts {
                    tokens: vec![],
                    ..parts()
                },
                "it has no tokens",
            ),
            (
                GgufTokenizerParts {
                    merges: vec![],
                    ..parts()
                },
                "it has no merges",
            ),
            (
                GgufTokenizerParts {
                    token_types: vec![1],
                    ..parts()
                },
                "it has 266 tokens, but 1 token types",
            ),
            (
                GgufTokenizerParts {
                    merges: vec!["he".into()],
                    ..parts()
                },
                "merge 0, \"he\", is not two tokens",
            ),
            (
                GgufTokenizerParts {
                    merges: vec!["x y".into()],
                    ..parts()
                },
                "needs the token \"xy\", which is missing",
            ),
            (
                GgufTokenizerParts {
                    eos_id: Some(999),
                    ..parts()
                },
                "eos_token has the id 999, but there are only 266 tokens",
            ),
            (
                GgufTokenizerParts {
                    bos_id: None,
                    add_bos: Some(true),
                    ..parts()
                },
                "add_bos_token is set, but there is no bos_token_id",
            ),
        ] {
            let error = wrong.to_files().unwrap_err().to_string();
            assert!(
                error.starts_with("the tokenizer of the GGUF file: ") && error.contains(expected),
                "{error}"
            );
        }
        let mut twice = parts();
        twice.tokens[9] = twice.tokens[8].clone();
        assert!(
            twice
                .to_files()
                .unwrap_err()
                .to_string()
                .contains("tokens 8 and 9 are both")
        );
    }

    #[test]
    fn the_files_say_what_the_parts_say() {
        let files = fixture::parts().to_files().unwrap();
        assert_eq!(
            files.tokenizer_config,
            json!({"bos_token": "<s>", "eos_token": "<|im_end|>", "clean_up_tokenization_spaces": false,
                   "tokenizer_class": "PreTrainedTokenizerFast"})
        );
        assert_eq!(files.chat_template.as_deref(), Some(fixture::CHATML));
        assert_eq!(
            files.tokenizer_json["added_tokens"]
                .as_array()
                .unwrap()
                .len(),
            4
        );
        assert_eq!(files.tokenizer_json["model"]["vocab"]["hello"], json!(263));
    }
}
