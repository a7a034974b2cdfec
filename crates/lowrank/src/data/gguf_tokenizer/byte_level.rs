//! Byte-level BPE: text is cut into words by a pattern, and each word is merged from its bytes.

use std::collections::HashMap;

use serde_json::{Value, json};

use super::super::error::DataError;
use super::{GgufTokenizerParts, Pipeline};

/// The ways to cut text into words that are known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cut {
    /// GPT-2's pattern.
    Gpt2,
    /// Every digit alone, then GPT-2's pattern.
    Digits,
    /// Llama 3's pattern: digits by threes, newlines by themselves; a word that is a token is not merged up to.
    Llama3,
    /// Llama 3's pattern and its tokens, in a model that puts nothing before a text.
    Llama3Plain,
    /// The pattern of OpenAI's cl100k, which is Llama 3's; every word is merged up to.
    Cl100k,
    /// The pattern of OpenAI's o200k: words end where capitals begin.
    O200k,
    /// Mistral's: as o200k, but digits alone; a word that is a token is not merged up to.
    Tekken,
    /// Qwen 2's pattern: digits alone; text is composed (NFC) first.
    Qwen2,
}

/// Words as of Llama 3 and Qwen 2.
const WORDS: [&str; 2] = [r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"[^\r\n\p{L}\p{N}]?\p{L}+"];
/// Words that end where capitals begin, as of o200k, before what may end them.
const CASED: [&str; 2] = [
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
];
const CONTRACTIONS: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?";
const BLANKS: &str = r"\s*[\r\n]+|\s+(?!\S)|\s+";

/// Words, digits, other characters, blanks.
fn pattern(words: &[&str], ending: &str, digits: &str, others: &str) -> String {
    let words: Vec<String> = words.iter().map(|word| format!("{word}{ending}")).collect();
    [&words.join("|"), digits, others, BLANKS].join("|")
}

impl Cut {
    pub(super) fn named(pre: Option<&str>) -> Result<Self, DataError> {
        match pre {
            // llama.cpp's own default also cuts around punctuation; the models whose files say "default" or nothing were
            // trained with GPT-2's pattern.
            None | Some("" | "default" | "gpt-2" | "gpt2") => Ok(Self::Gpt2),
            // Granite 3 has "refact".
            Some("smollm" | "refact" | "starcoder") => Ok(Self::Digits),
            Some("llama-bpe" | "llama3" | "llama-v3") => Ok(Self::Llama3),
            // SmolLM3 has "smaug-bpe".
            Some("smaug-bpe") => Ok(Self::Llama3Plain),
            // Phi-4, OLMo 2 and Granite 4 have "dbrx".
            Some("dbrx" | "glm4" | "chatglm-bpe") => Ok(Self::Cl100k),
            // Phi-4-mini.
            Some("gpt-4o") => Ok(Self::O200k),
            Some("tekken") => Ok(Self::Tekken),
            Some("qwen2" | "deepseek-r1-qwen") => Ok(Self::Qwen2),
            Some(other) => Err(DataError::Gguf(format!(
                "its pre-tokenizer is {other:?}, and how that cuts text is not known here (known are default, gpt-2, smollm, refact, \
                 starcoder, llama-bpe, smaug-bpe, dbrx, glm4, chatglm-bpe, gpt-4o, tekken, qwen2 and deepseek-r1-qwen); copy \
                 tokenizer.json from the model's original repository into the folder"
            ))),
        }
    }

    pub(super) fn pre_tokenizer(self, space: bool) -> Value {
        let bytes = |regex: bool| json!({"type": "ByteLevel", "add_prefix_space": space, "trim_offsets": true, "use_regex": regex});
        let sequence =
            |first: Value, then: Value| json!({"type": "Sequence", "pretokenizers": [first, then]});
        let Some(pattern) = self.pattern() else {
            if self == Self::Digits {
                let digits = json!({"type": "Digits", "individual_digits": true});
                return sequence(digits, bytes(true));
            }
            return bytes(true);
        };
        let split = json!({
            "type": "Split",
            "pattern": {"Regex": pattern},
            "behavior": "Isolated",
            "invert": false,
        });
        sequence(split, bytes(false))
    }

    /// The pattern, where it is not the one that `ByteLevel` has.
    fn pattern(self) -> Option<String> {
        const OTHERS: &str = r" ?[^\s\p{L}\p{N}]+[\r\n]*";
        const OTHERS_CASED: &str = r" ?[^\s\p{L}\p{N}]+[\r\n/]*";
        const THREES: &str = r"\p{N}{1,3}";
        const ONES: &str = r"\p{N}";
        Some(match self {
            Self::Gpt2 | Self::Digits => return None,
            Self::Llama3 | Self::Llama3Plain | Self::Cl100k => pattern(&WORDS, "", THREES, OTHERS),
            Self::Qwen2 => pattern(&WORDS, "", ONES, OTHERS),
            Self::O200k => pattern(&CASED, CONTRACTIONS, THREES, OTHERS_CASED),
            Self::Tekken => pattern(&CASED, "", ONES, OTHERS_CASED),
        })
    }

    /// Whether the files of these models need not say that a text begins with a token.
    pub(super) fn begins(self) -> bool {
        matches!(self, Self::Llama3 | Self::Tekken)
    }

    /// Whether letters and their accents are composed first.
    pub(super) fn composes(self) -> bool {
        self == Self::Qwen2
    }

    pub(super) fn takes_whole_words(self) -> bool {
        matches!(self, Self::Llama3 | Self::Llama3Plain | Self::Tekken)
    }
}

impl GgufTokenizerParts {
    pub(super) fn byte_level(
        &self,
        cut: Cut,
        vocabulary: &HashMap<&str, usize>,
    ) -> Result<Pipeline, DataError> {
        let begins = self
            .add_bos
            .unwrap_or(cut.begins() && self.bos_id.is_some());
        let vocab = self.numbered_tokens();
        Ok(Pipeline {
            normalizer: json!(cut.composes().then(|| json!({"type": "NFC"}))),
            pre_tokenizer: cut.pre_tokenizer(self.add_space_prefix == Some(true)),
            decoder: json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true}),
            model: json!({
                "type": "BPE",
                "dropout": null,
                "unk_token": null,
                "continuing_subword_prefix": null,
                "end_of_word_suffix": null,
                "fuse_unk": false,
                "byte_fallback": false,
                "ignore_merges": cut.takes_whole_words(),
                "vocab": vocab,
                "merges": self.merges(vocabulary)?,
            }),
            around: (begins, self.add_eos == Some(true)),
            strips_right: |_| false,
        })
    }
}
