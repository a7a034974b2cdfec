//! The other way: from the files of a folder to what a GGUF file keeps of a tokenizer.

use lowrank_formats::gguf::KeyValue;
use serde_json::Value;

use super::byte_level::Cut;
use super::{BYTE, CONTROL, GgufTokenizerParts, NORMAL, UNKNOWN, UNUSED, USER_DEFINED};
use crate::data::Tokenizer;
use crate::data::error::DataError;

/// llama.cpp's names of how text is cut, each kind once.
const CUTS: [&str; 8] = [
    "gpt-2",
    "smollm",
    "llama-bpe",
    "smaug-bpe",
    "dbrx",
    "gpt-4o",
    "tekken",
    "qwen2",
];

impl GgufTokenizerParts {
    /// What a GGUF file would keep of a tokenizer whose tokenizer.json is `json`, beside an embedding of `rows` rows. Tokens that those have and the tokenizer
    /// lacks become unused ones.
    ///
    /// # Errors
    /// A tokenizer of a kind, or with a way of cutting texts, that has no name in llama.cpp here.
    pub(crate) fn of_json(
        architecture: &str,
        json: &Value,
        tokenizer: &Tokenizer,
        rows: usize,
    ) -> Result<Self, DataError> {
        let model = &json["model"];
        let named = |name: &str| {
            model[name]
                .as_str()
                .and_then(|token| tokenizer.token_id(token))
        };
        let mut parts = Self {
            architecture: architecture.to_owned(),
            bos_id: tokenizer.bos_id(),
            eos_id: Some(tokenizer.eos_id()),
            unk_id: named("unk_token"),
            add_bos: Some(tokenizer.adds_bos()),
            add_eos: Some(false),
            chat_template: tokenizer.chat_template().map(str::to_owned),
            ..Self::default()
        };
        let kind = model["type"].as_str().unwrap_or("BPE");
        if kind != "BPE" {
            return Err(DataError::GgufExport(format!(
                "it is of the kind {kind}, and byte-level BPE and SentencePiece's BPE can be written"
            )));
        }
        parts.fill(json, rows);
        parts.merges = merges(model);
        if model["byte_fallback"] == Value::Bool(true) {
            parts.as_sentence_piece(json);
        } else {
            parts.model = String::from("gpt2");
            parts.pre = Some(name_of_cut(json, tokenizer.adds_bos())?.to_owned());
        }
        Ok(parts)
    }

    /// Tokens and what they are for.
    fn fill(&mut self, json: &Value, rows: usize) {
        let vocabulary = json["model"]["vocab"].as_object();
        let plain = vocabulary.into_iter().flatten().filter_map(|(token, id)| {
            let id = usize::try_from(id.as_u64()?).ok()?;
            Some((id, token.clone(), NORMAL))
        });
        let unknown = self.unk_id.and_then(|id| usize::try_from(id).ok());
        let added = json["added_tokens"].as_array();
        let added = added.into_iter().flatten().filter_map(|token| {
            let id = usize::try_from(token["id"].as_u64()?).ok()?;
            let kind = match token["special"].as_bool() {
                _ if Some(id) == unknown => UNKNOWN,
                Some(true) => CONTROL,
                _ => USER_DEFINED,
            };
            Some((id, token["content"].as_str()?.to_owned(), kind))
        });
        let found: Vec<(usize, String, i32)> = plain.chain(added).collect();
        // An id far beyond the model's rows is a damaged file, whose tokens no row stands for.
        let found: Vec<_> = found.into_iter().filter(|(id, ..)| *id < rows).collect();
        self.tokens = (0..rows).map(|id| format!("[PAD{id}]")).collect();
        self.token_types = vec![UNUSED; rows];
        for (id, token, kind) in found {
            (self.tokens[id], self.token_types[id]) = (token, kind);
        }
    }

    /// SentencePiece's BPE, which llama.cpp runs from scores: the merge that comes first makes the piece of the highest score.
    fn as_sentence_piece(&mut self, json: &Value) {
        self.model = String::from("llama");
        self.pre = Some("default".to_owned());
        self.add_space_prefix = Some(json["normalizer"].to_string().contains("Prepend"));
        let merges = std::mem::take(&mut self.merges);
        let ranks: std::collections::HashMap<String, usize> = merges
            .iter()
            .enumerate()
            .rev()
            .map(|(rank, merge)| (merge.replacen(' ', "", 1), rank))
            .collect();
        for id in 0..self.tokens.len() {
            let token = &self.tokens[id];
            let is_byte = token.len() == 6 && token.starts_with("<0x") && token.ends_with('>');
            if is_byte && self.token_types[id] == NORMAL {
                self.token_types[id] = BYTE;
            }
            let score = match (self.token_types[id], ranks.get(token)) {
                (NORMAL, Some(rank)) => -(*rank as f64),
                (NORMAL, None) => -((merges.len() + id) as f64),
                (USER_DEFINED | UNUSED, _) => -1000.0,
                _ => 0.0,
            };
            self.scores.push(score);
            // As its converter spells runs of spaces.
            if self.token_types[id] == USER_DEFINED && token.chars().all(|char| char == '▁') {
                self.tokens[id] = " ".repeat(token.chars().count());
            }
        }
    }

    /// The keys of a GGUF file. `ends` are the tokens that end an answer.
    pub(crate) fn keys(&self, ends: &[u32]) -> Vec<(String, KeyValue)> {
        let mut keys = vec![
            ("model", KeyValue::String(self.model.clone())),
            ("tokens", KeyValue::Strings(self.tokens.clone())),
            ("token_type", KeyValue::I32s(self.token_types.clone())),
        ];
        if let Some(pre) = &self.pre {
            keys.push(("pre", KeyValue::String(pre.clone())));
        }
        if !self.scores.is_empty() {
            let scores = self.scores.iter().map(|score| *score as f32).collect();
            keys.push(("scores", KeyValue::F32s(scores)));
        }
        if !self.merges.is_empty() {
            keys.push(("merges", KeyValue::Strings(self.merges.clone())));
        }
        let others: Vec<u32> = (ends.iter().copied())
            .filter(|id| Some(*id) != self.eos_id)
            .collect();
        for (key, id) in [
            ("bos_token_id", self.bos_id),
            ("eos_token_id", self.eos_id),
            ("unknown_token_id", self.unk_id),
            ("padding_token_id", self.pad_id),
            ("eot_token_id", others.first().copied()),
            ("eom_token_id", others.get(1).copied()),
        ] {
            keys.extend(id.map(|id| (key, KeyValue::U32(id))));
        }
        for (key, on) in [
            ("add_bos_token", self.add_bos),
            ("add_eos_token", self.add_eos),
            ("add_space_prefix", self.add_space_prefix),
        ] {
            keys.extend(on.map(|on| (key, KeyValue::Bool(on))));
        }
        let mut keys: Vec<(String, KeyValue)> = keys
            .into_iter()
            .map(|(key, value)| (format!("tokenizer.ggml.{key}"), value))
            .collect();
        if let Some(template) = &self.chat_template {
            let template = KeyValue::String(template.clone());
            keys.push(("tokenizer.chat_template".to_owned(), template));
        }
        keys
    }
}

/// Merges as pairs with a space between.
fn merges(model: &Value) -> Vec<String> {
    let merges = model["merges"].as_array();
    let text = |merge: &Value| match merge {
        Value::String(text) => Some(text.clone()),
        Value::Array(pair) => match pair.as_slice() {
            [Value::String(left), Value::String(right)] => Some(format!("{left} {right}")),
            _ => None,
        },
        _ => None,
    };
    merges.into_iter().flatten().filter_map(text).collect()
}

/// llama.cpp's name of how a byte-level tokenizer cuts texts.
fn name_of_cut(json: &Value, adds_bos: bool) -> Result<&'static str, DataError> {
    let is_composed = json["normalizer"].to_string().contains("\"NFC\"");
    let whole_words = json["model"]["ignore_merges"] == Value::Bool(true);
    let pre_tokenizer = bare(&json["pre_tokenizer"]);
    for name in CUTS {
        let cut = Cut::named(Some(name))?;
        // Two names differ in nothing else.
        let begins_alike = !whole_words || name == "tekken" || cut.begins() == adds_bos;
        if bare(&cut.pre_tokenizer(false)) == pre_tokenizer
            && cut.composes() == is_composed
            && cut.takes_whole_words() == whole_words
            && begins_alike
        {
            return Ok(name);
        }
    }
    Err(DataError::GgufExport(
        "how it cuts texts has no name in llama.cpp that is known here; begin with a GGUF file of the model, which has it".to_owned(),
    ))
}

/// A pre-tokenizer without what changes no token.
fn bare(pre_tokenizer: &Value) -> Value {
    match pre_tokenizer {
        Value::Object(map) => {
            let kept = map.iter().filter(|(key, _)| *key != "trim_offsets");
            Value::Object(
                kept.map(|(key, value)| (key.clone(), bare(value)))
                    .collect(),
            )
        }
        Value::Array(list) => Value::Array(list.iter().map(bare).collect()),
        other => other.clone(),
    }
}
