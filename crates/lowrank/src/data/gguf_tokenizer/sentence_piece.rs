//! SentencePiece's two kinds: BPE with bytes as a last resort (`llama`), whose scores say which pieces are merged first, and unigrams
//! (`t5`), whose scores are logarithms of probabilities.
//!
//! What stands in a tokenizer.json is what transformers' converters write for them: `Prepend` and `Replace` as for Llama 2, Mistral and
//! Phi-3, which is what SentencePiece itself does; `Replace` alone where no space is put in front, as for Gemma.

use std::collections::HashMap;

use serde_json::{Value, json};
use tokenizers::normalizers::{NormalizerWrapper, Precompiled};

use super::super::error::DataError;
use super::{BYTE, GgufTokenizerParts, NORMAL, Pipeline, UNKNOWN, USER_DEFINED};

impl GgufTokenizerParts {
    /// The same with its tokens as tokenizer.json spells them.
    pub(super) fn respelled(&self) -> Self {
        let mut parts = self.clone();
        for id in 0..parts.tokens.len() {
            let token = &parts.tokens[id];
            // Runs of spaces, which SentencePiece spells ▁▁, llama.cpp's converter writes with real spaces.
            if parts.kind(id) == USER_DEFINED && token.chars().all(|char| char == ' ') {
                parts.tokens[id] = "▁".repeat(token.len());
            }
        }
        // Gemma merges tabs, but has the tab itself only as a byte.
        let tab = |parts: &Self, name: &str| parts.tokens.iter().position(|token| token == name);
        if parts.is_gemma()
            && let (None, Some(id)) = (tab(&parts, "\t"), tab(&parts, "<0x09>"))
            && let Some(kind) = parts.token_types.get_mut(id)
        {
            *kind = NORMAL;
            parts.tokens[id] = "\t".into();
        }
        parts
    }

    fn is_gemma(&self) -> bool {
        self.architecture.starts_with("gemma")
    }

    /// SentencePiece's BPE.
    pub(super) fn sentence_piece(
        &self,
        vocabulary: &HashMap<&str, usize>,
    ) -> Result<Pipeline, DataError> {
        let merges = if self.merges.is_empty() {
            self.merges_of_scores(vocabulary)?
        } else {
            self.merges(vocabulary)?
        };
        let space = self.add_space_prefix.unwrap_or(true);
        let vocab = self.numbered_tokens();
        let unknown = self.unknown()?.map(|id| &self.tokens[id]);
        Ok(Pipeline {
            normalizer: json!({"type": "Sequence", "normalizers": spaces(space)}),
            pre_tokenizer: Value::Null,
            decoder: decoder(space),
            model: json!({
                "type": "BPE",
                "dropout": null,
                "unk_token": unknown,
                "continuing_subword_prefix": null,
                "end_of_word_suffix": null,
                "fuse_unk": true,
                "byte_fallback": self.has_bytes(),
                "ignore_merges": false,
                "vocab": vocab,
                "merges": merges,
            }),
            around: (
                self.add_bos.unwrap_or(self.bos_id.is_some()),
                self.add_eos == Some(true),
            ),
            strips_right: if self.architecture == "phi3" {
                // The file does not say so: it is known of Phi-3.
                |token| !matches!(token, "<unk>" | "<s>" | "<|endoftext|>")
            } else {
                |_| false
            },
        })
    }

    /// SentencePiece's unigrams.
    pub(super) fn unigrams(&self) -> Result<Pipeline, DataError> {
        let scores = self.checked_scores()?;
        let Some(unknown) = self.unknown()? else {
            return Err(DataError::Gguf(
                "it has no token for what is unknown (tokenizer.ggml.unknown_token_id)".into(),
            ));
        };
        let mut normalizers = Vec::new();
        if !self.charsmap.is_empty() {
            let table = Precompiled::from(&self.charsmap).map_err(|error| {
                DataError::Gguf(format!(
                    "its table of characters (tokenizer.ggml.precompiled_charsmap) is damaged: {error}"
                ))
            })?;
            normalizers.push(json!(NormalizerWrapper::from(table)));
        }
        if self.remove_extra_whitespaces == Some(true) {
            normalizers.push(replace_all(r"\A +| +\z", ""));
            normalizers.push(replace_all(" {2,}", " "));
        }
        let space = self.add_space_prefix.unwrap_or(false);
        normalizers.extend(spaces(space));
        let pieces: Vec<Value> = self
            .tokens
            .iter()
            .zip(scores)
            .map(|(token, score)| json!([token, score]))
            .collect();
        Ok(Pipeline {
            normalizer: json!({"type": "Sequence", "normalizers": normalizers}),
            pre_tokenizer: Value::Null,
            decoder: decoder(space),
            model: json!({
                "type": "Unigram",
                "unk_id": unknown,
                "vocab": pieces,
                "byte_fallback": self.has_bytes(),
            }),
            around: (
                self.add_bos == Some(true),
                self.add_eos.unwrap_or(self.eos_id.is_some()),
            ),
            strips_right: |_| false,
        })
    }

    /// Two pieces for every piece that is made of two, the best first.
    ///
    /// The score says which piece is best. Among the ways to make pieces of the same score there are two orders: in Llama 2's file and in
    /// those made after it, by the ids of piece, left and right part; in Gemma's, by the longest left part, then by the longest right one.
    fn merges_of_scores(&self, vocabulary: &HashMap<&str, usize>) -> Result<Vec<Value>, DataError> {
        let scores = self.checked_scores()?;
        let is_piece = |id: usize| matches!(self.kind(id), NORMAL | USER_DEFINED);
        // The converter writes -1000 over the scores of all tokens that tokenizer_config.json lists. What SentencePiece has for
        // user-defined pieces is 0, and Gemma's other pieces stand in the order of theirs.
        let first = (0..self.tokens.len()).find(|&id| self.kind(id) == NORMAL);
        let score = |id: usize| match self.kind(id) {
            USER_DEFINED => 0.0,
            _ if self.is_gemma() => first.unwrap_or_default() as f64 - id as f64,
            _ => scores[id],
        };
        let mut pieces: Vec<usize> = (0..self.tokens.len()).filter(|&id| is_piece(id)).collect();
        pieces.sort_by(|&a, &b| score(b).total_cmp(&score(a)));
        let id = |part: &str| vocabulary.get(part).copied().filter(|&id| is_piece(id));
        // Score, left and right part, and how many characters these have.
        let mut merges: Vec<(f64, [usize; 2], [usize; 2])> = Vec::new();
        for piece in pieces {
            let text = self.tokens[piece].as_str();
            let count = text.chars().count();
            let mut ways: Vec<_> = text
                .char_indices()
                .enumerate()
                .skip(1)
                .filter_map(|(left, (at, _))| {
                    let parts = [id(&text[..at])?, id(&text[at..])?];
                    Some((parts, [left, count - left]))
                })
                .collect();
            ways.sort_unstable();
            let ways = ways
                .into_iter()
                .map(|(parts, lengths)| (score(piece), parts, lengths));
            merges.extend(ways);
        }
        if self.is_gemma() {
            merges.sort_by(|(a, _, shorter), (b, _, longer)| {
                b.total_cmp(a).then_with(|| longer.cmp(shorter))
            });
        }
        Ok(merges
            .into_iter()
            .map(|(_, [left, right], _)| json!([self.tokens[left], self.tokens[right]]))
            .collect())
    }

    fn checked_scores(&self) -> Result<&[f64], DataError> {
        if self.scores.len() != self.tokens.len() {
            return Err(DataError::Gguf(format!(
                "it has {} tokens, but {} scores (tokenizer.ggml.scores)",
                self.tokens.len(),
                self.scores.len()
            )));
        }
        if let Some(id) = self.scores.iter().position(|score| !score.is_finite()) {
            return Err(DataError::Gguf(format!(
                "token {id}, {:?}, has the score {} (tokenizer.ggml.scores)",
                self.tokens[id], self.scores[id]
            )));
        }
        Ok(&self.scores)
    }

    /// What stands for characters that no piece has.
    fn unknown(&self) -> Result<Option<usize>, DataError> {
        let Some(id) = self.unk_id else {
            return Ok((0..self.tokens.len()).find(|&id| self.kind(id) == UNKNOWN));
        };
        // The id itself is checked with the other special tokens'.
        self.special_tokens()?;
        Ok(Some(id as usize))
    }

    fn has_bytes(&self) -> bool {
        (0..self.tokens.len()).any(|id| self.kind(id) == BYTE)
    }
}

/// Spaces as SentencePiece spells them, one of them in front of a text if `prefix`.
fn spaces(prefix: bool) -> Vec<Value> {
    let front = json!({"type": "Prepend", "prepend": "▁"});
    let all = prefix.then_some(front).into_iter();
    all.chain([replace(" ", "▁")]).collect()
}

fn replace(what: &str, by: &str) -> Value {
    json!({"type": "Replace", "pattern": {"String": what}, "content": by})
}

fn replace_all(what: &str, by: &str) -> Value {
    json!({"type": "Replace", "pattern": {"Regex": what}, "content": by})
}

fn decoder(space: bool) -> Value {
    let mut decoders = vec![
        replace("▁", " "),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if space {
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    json!({"type": "Sequence", "decoders": decoders})
}
