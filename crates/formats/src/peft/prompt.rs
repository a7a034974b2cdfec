//! PEFT's `PREFIX_TUNING` and `PROMPT_TUNING`: `adapter_config.json`, and how keys and values lie in the one tensor.
//!
//! Both save one tensor, [`PROMPT_EMBEDDINGS`]. Prompt tuning's is [n, C]: embeddings before every sequence. Prefix
//! tuning's is [n, 2·L·KV·D]: row i holds token i's key of block 0, its value of block 0, its key of block 1, and so on, all
//! heads of each one after the other. The text's positions begin at n in both.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::{PEFT_VERSION, is_inactive, write_adapter_config};
use crate::FormatError;
use crate::hf_config::HfConfig;

/// The name of the tensor that PEFT's prompt learning methods save.
pub const PROMPT_EMBEDDINGS: &str = "prompt_embeddings";

/// Above any useful number of virtual tokens and any context.
const MOST_TOKENS: usize = 1 << 20;

/// What stands before every sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PromptKind {
    /// Keys and values in every block: `PREFIX_TUNING`.
    Prefix,
    /// Embeddings: `PROMPT_TUNING`.
    Prompt,
}

impl PromptKind {
    /// `peft_type`.
    pub fn peft_type(self) -> &'static str {
        match self {
            Self::Prefix => "PREFIX_TUNING",
            Self::Prompt => "PROMPT_TUNING",
        }
    }

    /// The kind of a `peft_type`, if it is one of these.
    pub fn from_peft_type(name: &str) -> Option<Self> {
        [Self::Prefix, Self::Prompt]
            .into_iter()
            .find(|kind| kind.peft_type() == name)
    }
}

/// PEFT's `PrefixTuningConfig` or `PromptTuningConfig`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PromptConfig {
    /// Which of the two.
    pub kind: PromptKind,
    /// n, at least one.
    pub num_virtual_tokens: usize,
    /// Prefix tuning: KV·D; prompt tuning: C.
    pub token_dim: Option<usize>,
    /// Prefix tuning: the number of key/value heads; prompt tuning: that of query heads.
    pub num_attention_heads: Option<usize>,
    /// L.
    pub num_layers: Option<usize>,
    /// The model that it was trained on.
    pub base_model_name_or_path: Option<String>,
    /// `CAUSAL_LM`, `SEQ_CLS`, `TOKEN_CLS`.
    pub task_type: Option<String>,
    /// Modules that are trained and saved as a whole.
    pub modules_to_save: Vec<String>,
}

/// What a model that it is for may do.
const TASKS: [&str; 3] = ["CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS"];

/// Keys that say nothing about the saved values, or are read into fields.
const KNOWN: [&str; 21] = [
    "auto_mapping",
    "base_model_name_or_path",
    "encoder_hidden_size",
    "inference_mode",
    "init_weights",
    "modules_to_save",
    "num_attention_heads",
    "num_layers",
    "num_transformer_submodules",
    "num_virtual_tokens",
    "peft_type",
    "peft_version",
    "prefix_projection",
    "prompt_tuning_init",
    "prompt_tuning_init_text",
    "revision",
    "runtime_config",
    "task_type",
    "token_dim",
    "tokenizer_kwargs",
    "tokenizer_name_or_path",
];

impl PromptConfig {
    /// Checks an `adapter_config.json`.
    ///
    /// # Errors
    /// Another `peft_type`; a field that is missing, out of range, or asks for something that is not done here.
    pub fn from_config(raw: &HfConfig) -> Result<Self, FormatError> {
        let kind = PromptKind::from_peft_type(raw.str("peft_type")?).ok_or_else(|| {
            raw.unsupported("peft_type", "\"PREFIX_TUNING\" or \"PROMPT_TUNING\"")
        })?;
        if raw.opt_bool("prefix_projection")? == Some(true) {
            return Err(raw.unsupported(
                "prefix_projection",
                "false: the network that makes the prefix is not saved and cannot be trained here; the file holds the \
                 finished keys and values, so set it to false to use them as they are",
            ));
        }
        if raw
            .opt_usize("num_transformer_submodules")?
            .is_some_and(|n| n != 1)
        {
            return Err(raw.unsupported(
                "num_transformer_submodules",
                "1: a decoder alone, not an encoder with a decoder",
            ));
        }
        if raw
            .opt_str("task_type")?
            .is_some_and(|task| !TASKS.contains(&task))
        {
            let accepted = format!("one of {}, or null", TASKS.join(", "));
            return Err(raw.unsupported("task_type", accepted));
        }
        if let Some((key, _)) = raw
            .map()
            .iter()
            .find(|(key, value)| !KNOWN.contains(&key.as_str()) && !is_inactive(value))
        {
            return Err(raw.unsupported(
                key,
                "null: what it switches on is not supported and would be lost",
            ));
        }
        let num_virtual_tokens = raw.usize("num_virtual_tokens")?;
        if !(1..=MOST_TOKENS).contains(&num_virtual_tokens) {
            return Err(raw.unsupported(
                "num_virtual_tokens",
                format!("a number from 1 to {MOST_TOKENS}"),
            ));
        }
        Ok(Self {
            kind,
            num_virtual_tokens,
            token_dim: raw.opt_usize("token_dim")?,
            num_attention_heads: raw.opt_usize("num_attention_heads")?,
            num_layers: raw.opt_usize("num_layers")?,
            base_model_name_or_path: raw.opt_str("base_model_name_or_path")?.map(str::to_owned),
            task_type: raw.opt_str("task_type")?.map(str::to_owned),
            modules_to_save: {
                let names = raw.opt_strs("modules_to_save")?.unwrap_or_default();
                names.into_iter().map(str::to_owned).collect()
            },
        })
    }

    /// The JSON object that PEFT would write, its keys sorted.
    pub fn to_json(&self) -> Map<String, Value> {
        let mut map = BTreeMap::from([
            ("auto_mapping", Value::Null),
            (
                "base_model_name_or_path",
                json!(self.base_model_name_or_path),
            ),
            ("inference_mode", json!(true)),
            (
                "modules_to_save",
                match self.modules_to_save.as_slice() {
                    [] => Value::Null,
                    names => json!(names),
                },
            ),
            ("num_attention_heads", json!(self.num_attention_heads)),
            ("num_layers", json!(self.num_layers)),
            ("num_transformer_submodules", json!(1)),
            ("num_virtual_tokens", json!(self.num_virtual_tokens)),
            ("peft_type", json!(self.kind.peft_type())),
            ("peft_version", json!(PEFT_VERSION)),
            ("revision", Value::Null),
            ("task_type", json!(self.task_type)),
            ("token_dim", json!(self.token_dim)),
        ]);
        map.extend(match self.kind {
            PromptKind::Prefix => vec![
                ("encoder_hidden_size", json!(self.token_dim)),
                ("init_weights", Value::Null),
                ("prefix_projection", json!(false)),
            ],
            // How it began is not recorded: PEFT would ask for a tokenizer to read `TEXT`.
            PromptKind::Prompt => vec![
                ("prompt_tuning_init", json!("RANDOM")),
                ("prompt_tuning_init_text", Value::Null),
                ("tokenizer_kwargs", Value::Null),
                ("tokenizer_name_or_path", Value::Null),
            ],
        });
        map.into_iter()
            .map(|(key, value)| (key.to_owned(), value))
            .collect()
    }

    /// Writes `adapter_config.json` into `folder`, atomically.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(&self, folder: &Path) -> Result<(), FormatError> {
        write_adapter_config(folder, &self.to_json())
    }
}

/// [`PROMPT_EMBEDDINGS`] [n, parts·width] from the parts [n, width] in the order key of block 0, value of block 0, and so
/// on.
///
/// # Panics
/// If a part is not of n rows.
pub fn join_prefix(parts: &[Vec<f32>], n: usize) -> Vec<f32> {
    (0..n)
        .flat_map(|row| {
            parts.iter().flat_map(move |part| {
                let width = part.len() / n;
                part[row * width..][..width].iter().copied()
            })
        })
        .collect()
}

/// The parts [n, width] of [`PROMPT_EMBEDDINGS`] [n, parts·width].
///
/// # Panics
/// If the parts do not divide the values.
pub fn split_prefix(values: &[f32], n: usize, parts: usize) -> Vec<Vec<f32>> {
    assert_eq!(values.len() % (n * parts), 0, "the parts fill every row");
    let width = values.len() / (n * parts);
    (0..parts)
        .map(|part| {
            values
                .chunks_exact(parts * width)
                .flat_map(|row| row[part * width..][..width].iter().copied())
                .collect()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str) -> Result<PromptConfig, String> {
        let map = serde_json::from_str(json).unwrap();
        let raw = HfConfig::from_map(Path::new("a/adapter_config.json"), map);
        PromptConfig::from_config(&raw).map_err(|error| error.to_string())
    }

    #[test]
    fn written_and_read_again() {
        for kind in [PromptKind::Prefix, PromptKind::Prompt] {
            let config = PromptConfig {
                kind,
                num_virtual_tokens: 5,
                token_dim: Some(16),
                num_attention_heads: Some(2),
                num_layers: Some(2),
                base_model_name_or_path: Some("x".to_owned()),
                task_type: Some("SEQ_CLS".to_owned()),
                modules_to_save: vec!["score".to_owned()],
            };
            let json = serde_json::to_string(&config.to_json()).unwrap();
            assert_eq!(read(&json), Ok(config));
        }
    }

    #[test]
    fn what_is_not_done_here_is_named() {
        let with = |more: &str| {
            read(&format!(
                r#"{{"peft_type":"PREFIX_TUNING","num_virtual_tokens":3{more}}}"#
            ))
        };
        assert!(with("").is_ok());
        assert!(with(r#","modules_to_save":[],"encoder_hidden_size":8"#).is_ok());
        for (more, words) in [
            (
                r#","prefix_projection":true"#,
                "`prefix_projection` is true",
            ),
            (r#","prefix_projection":1"#, "`prefix_projection` is 1"),
            (
                r#","num_transformer_submodules":2"#,
                "`num_transformer_submodules` is 2",
            ),
            (r#","task_type":"SEQ_2_SEQ_LM""#, "`task_type` is"),
            (r#","modules_to_save":"x""#, "`modules_to_save` is"),
            (r#","new_feature":3"#, "`new_feature` is 3"),
            (r#","token_dim":-1"#, "`token_dim` is -1"),
        ] {
            let error = with(more).unwrap_err();
            assert!(
                error.starts_with("a/adapter_config.json: ") && error.contains(words),
                "{error}"
            );
        }
        let error = read(r#"{"peft_type":"PROMPT_TUNING"}"#).unwrap_err();
        assert!(error.contains("`num_virtual_tokens` is missing"), "{error}");
        for n in ["0", "1048577", "1e30", "\"5\""] {
            let text = format!(r#"{{"peft_type":"PROMPT_TUNING","num_virtual_tokens":{n}}}"#);
            let error = read(&text).unwrap_err();
            assert!(error.contains("`num_virtual_tokens` is"), "{error}");
        }
    }

    #[test]
    fn keys_and_values_lie_side_by_side_in_a_row() {
        let parts = [vec![1.0, 2.0, 3.0, 4.0], vec![5.0, 6.0, 7.0, 8.0]];
        let joined = join_prefix(&parts, 2);
        assert_eq!(joined, [1.0, 2.0, 5.0, 6.0, 3.0, 4.0, 7.0, 8.0]);
        assert_eq!(split_prefix(&joined, 2, 2), parts);
    }
}
