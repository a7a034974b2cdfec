//! The tokenizer inside a GGUF file, written as the files that `transformers` and this program read.
//!
//! A GGUF file keeps the tokens, their types and scores, and of a byte-level BPE its merges. How a text is cut before that is a name
//! (`tokenizer.ggml.pre`) or a habit of the kind of tokenizer, so it is here, for those that are known; guessing one would change the ids
//! of some texts without a word, so any other is an error.

mod byte_level;
mod sentence_piece;
mod written;

use std::collections::HashMap;

use serde_json::{Map, Value, json};

use super::error::DataError;
use byte_level::Cut;

/// What a GGUF file says under `tokenizer.ggml.*` and `tokenizer.chat_template`.
#[derive(Debug, Clone, Default)]
pub struct GgufTokenizerParts {
    /// `general.architecture`: some models' tokenizers have habits that no key says.
    pub architecture: String,
    /// `model`: `gpt2` is byte-level BPE, `llama` SentencePiece's BPE, `t5` SentencePiece's unigrams.
    pub model: String,
    /// `pre`: how text is cut into words before byte-level BPE; none in old files.
    pub pre: Option<String>,
    /// `tokens`, by id: of `gpt2` in GPT-2's printable bytes, of the others with `▁` for a space.
    pub tokens: Vec<String>,
    /// `token_type`, by id: 1 normal, 2 unknown, 3 control, 4 user defined, 5 unused, 6 byte. Empty: all are normal.
    pub token_types: Vec<i32>,
    /// `scores`, by id, of `llama` and `t5`.
    pub scores: Vec<f64>,
    /// `merges`, first to last, each two tokens with a space between. Of `llama` they are optional: the scores say them too.
    pub merges: Vec<String>,
    /// `bos_token_id`.
    pub bos_id: Option<u32>,
    /// `eos_token_id`.
    pub eos_id: Option<u32>,
    /// `unknown_token_id`.
    pub unk_id: Option<u32>,
    /// `padding_token_id`.
    pub pad_id: Option<u32>,
    /// `add_bos_token`; none: what is usual for `model` and `pre`.
    pub add_bos: Option<bool>,
    /// `add_eos_token`; none: what is usual for `model`.
    pub add_eos: Option<bool>,
    /// `add_space_prefix`; none: what is usual for `model`.
    pub add_space_prefix: Option<bool>,
    /// `remove_extra_whitespaces` of `t5`; none: no.
    pub remove_extra_whitespaces: Option<bool>,
    /// `precompiled_charsmap` of `t5`: SentencePiece's table by which characters are replaced first; empty where there is none.
    pub charsmap: Vec<u8>,
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

const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
/// In tests: nothing else asks for it.
const UNUSED: i32 = 5;
const BYTE: i32 = 6;

/// The parts of a tokenizer.json that differ from kind to kind.
struct Pipeline {
    normalizer: Value,
    pre_tokenizer: Value,
    decoder: Value,
    model: Value,
    /// Whether a text begins with the token of beginnings, and ends with that of ends.
    around: (bool, bool),
    /// Whether blanks behind an added token go with it.
    strips_right: fn(&str) -> bool,
}

impl GgufTokenizerParts {
    /// The tokens with their ids, as tokenizer.json has them.
    fn numbered_tokens(&self) -> Map<String, Value> {
        let tokens = self.tokens.iter().enumerate();
        tokens
            .map(|(id, token)| (token.clone(), json!(id)))
            .collect()
    }

    /// The files that give the same ids.
    ///
    /// # Errors
    /// If the kind of tokenizer or its way to cut text is not known, or its parts contradict each other.
    pub fn to_files(&self) -> Result<GgufTokenizerFiles, DataError> {
        if matches!(self.model.as_str(), "llama" | "t5") {
            return self.respelled().files();
        }
        self.files()
    }

    fn files(&self) -> Result<GgufTokenizerFiles, DataError> {
        let vocabulary = self.vocabulary()?;
        let pipeline = match self.model.as_str() {
            "gpt2" => {
                let cut = Cut::named(self.pre.as_deref())?;
                self.byte_level(cut, &vocabulary)?
            }
            "llama" => self.sentence_piece(&vocabulary)?,
            "t5" => self.unigrams()?,
            other => {
                let kind = match other {
                    "bert" => "WordPiece (\"bert\")".to_owned(),
                    other => format!("{other:?}"),
                };
                return Err(DataError::Gguf(format!(
                    "it is of the kind {kind}, and only byte-level BPE (\"gpt2\") and SentencePiece (\"llama\", \"t5\") can be \
                     rewritten; copy tokenizer.json from the model's original repository into the folder"
                )));
            }
        };
        let special = self.special_tokens()?;
        let (begins, ends) = pipeline.around;
        let tokenizer_json = json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": self.added_tokens(pipeline.strips_right),
            "normalizer": pipeline.normalizer,
            "pre_tokenizer": pipeline.pre_tokenizer,
            "post_processor": self.post_processor(begins, ends, &special)?,
            "decoder": pipeline.decoder,
            "model": pipeline.model,
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

    fn kind(&self, id: usize) -> i32 {
        self.token_types.get(id).copied().unwrap_or(NORMAL)
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
    fn added_tokens(&self, strips_right: fn(&str) -> bool) -> Vec<Value> {
        let named = [self.bos_id, self.eos_id, self.unk_id, self.pad_id];
        let added = self.tokens.iter().enumerate().filter_map(|(id, token)| {
            let kind = self.kind(id);
            let special =
                kind == CONTROL || kind == UNKNOWN || named.contains(&u32::try_from(id).ok());
            (special || kind == USER_DEFINED).then(|| {
                json!({
                    "id": id,
                    "content": token,
                    "single_word": false,
                    "lstrip": false,
                    "rstrip": strips_right(token),
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
    fn scores_are_merges() {
        let piece = |text: &str, score: f64, kind: i32| (text.to_owned(), score, kind);
        let pieces = [
            piece("<unk>", 0.0, UNKNOWN),
            piece("<s>", 0.0, CONTROL),
            piece("</s>", 0.0, CONTROL),
            // As the converter writes a run of two spaces.
            piece("  ", -1000.0, USER_DEFINED),
            piece("ab", -1.0, NORMAL),
            piece("bc", 0.0, NORMAL),
            piece("abc", -2.0, NORMAL),
            piece("a", -3.0, NORMAL),
            piece("b", -4.0, NORMAL),
            piece("c", -5.0, NORMAL),
            piece("▁", -6.0, NORMAL),
            // Nothing is merged up to what no text is cut into.
            piece("ca", -1.0, UNUSED),
        ];
        let parts = |architecture: &str| GgufTokenizerParts {
            architecture: architecture.into(),
            model: "llama".into(),
            tokens: pieces.iter().map(|(text, ..)| text.clone()).collect(),
            scores: pieces.iter().map(|(_, score, _)| *score).collect(),
            token_types: pieces.iter().map(|(.., kind)| *kind).collect(),
            bos_id: Some(1),
            eos_id: Some(2),
            ..GgufTokenizerParts::default()
        };
        let merges = |architecture: &str| {
            let merges =
                parts(architecture).to_files().unwrap().tokenizer_json["model"]["merges"].clone();
            serde_json::from_value::<Vec<[String; 2]>>(merges).unwrap()
        };
        let expected = [["▁", "▁"], ["b", "c"], ["a", "b"], ["ab", "c"], ["a", "bc"]];
        assert_eq!(merges("llama"), expected);
        // Gemma's pieces come in their own order.
        let expected = [["▁", "▁"], ["a", "b"], ["b", "c"], ["ab", "c"], ["a", "bc"]];
        assert_eq!(merges("gemma2"), expected);
        // A space in front, a beginning, and the unknown where no byte stands in.
        let tokenizer = fixture::build(&parts("llama"));
        assert_eq!(
            tokenizer.encode("  abc é", true).unwrap(),
            [1, 3, 10, 6, 10, 0]
        );
        assert_eq!(tokenizer.decode(&[3, 10, 6], false).unwrap(), "  abc");
        let plain = GgufTokenizerParts {
            add_space_prefix: Some(false),
            add_bos: Some(false),
            ..parts("llama")
        };
        assert_eq!(
            fixture::build(&plain).encode("  abc", true).unwrap(),
            [3, 6]
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
                    model: "bert".into(),
                    ..parts()
                },
                "of the kind WordPiece (\"bert\")",
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
                    pre: Some("viking".into()),
                    ..parts()
                },
                "its pre-tokenizer is \"viking\"",
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
    fn what_sentence_piece_lacks_is_an_error() {
        let parts = fixture::parts;
        for (wrong, expected) in [
            (
                GgufTokenizerParts {
                    model: "llama".into(),
                    merges: vec![],
                    ..parts()
                },
                "it has 266 tokens, but 0 scores",
            ),
            (
                GgufTokenizerParts {
                    model: "t5".into(),
                    scores: vec![f64::NAN; 266],
                    ..parts()
                },
                "token 0, \"<|endoftext|>\", has the score NaN",
            ),
            (
                GgufTokenizerParts {
                    model: "t5".into(),
                    scores: vec![0.0; 266],
                    ..parts()
                },
                "no token for what is unknown",
            ),
            (
                GgufTokenizerParts {
                    model: "t5".into(),
                    scores: vec![0.0; 266],
                    unk_id: Some(0),
                    charsmap: vec![255; 5],
                    ..parts()
                },
                "table of characters (tokenizer.ggml.precompiled_charsmap) is damaged",
            ),
            (
                GgufTokenizerParts {
                    model: "llama".into(),
                    unk_id: Some(266),
                    ..parts()
                },
                "unk_token has the id 266, but there are only 266 tokens",
            ),
        ] {
            let error = wrong.to_files().unwrap_err().to_string();
            assert!(
                error.starts_with("the tokenizer of the GGUF file: ") && error.contains(expected),
                "{error}"
            );
        }
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
