//! The files of the built-in model and its tasks, all but the weights.

use std::collections::BTreeSet;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};

use crate::corpus::{END_OF_TEXT, GRAMMAR, TURN_END};
use crate::tasks::{SPLITS, TASKS, rows};
use crate::tokenizer::{self, CONTEXT, PADDING, SPECIALS, VOCABULARY};

/// Where the files are, from the root of the repository.
pub const FOLDER: &str = "crates/lowrank/builtin";

/// Every file, by its path inside [`FOLDER`].
///
/// # Errors
/// Where the tokenizer cannot be trained; not expected.
pub fn files() -> Result<Vec<(PathBuf, String)>> {
    let tokenizer = tokenizer::train()?;
    let mut files = vec![
        ("config.json".into(), pretty(&config())?),
        (
            "generation_config.json".into(),
            pretty(&generation_config())?,
        ),
        ("tokenizer.json".into(), tokenizer::json(&tokenizer)?),
        (
            "tokenizer_config.json".into(),
            pretty(&tokenizer::config())?,
        ),
        (
            "chat_template.jinja".into(),
            tokenizer::CHAT_TEMPLATE.into(),
        ),
    ];
    for task in TASKS {
        for (rows, (split, _)) in rows(task).iter().zip(SPLITS) {
            let lines = rows
                .iter()
                .map(serde_json::to_string)
                .collect::<Result<Vec<_>, _>>()?;
            files.push((
                Path::new("tasks").join(task).join(format!("{split}.jsonl")),
                lines.join("\n") + "\n",
            ));
        }
    }
    files.push((Path::new("tasks").join("words.txt"), words()));
    Ok(files)
}

/// The names, animals, things and places of the corpus, one a line in alphabetical order.
fn words() -> String {
    let tables = ["child", "animal", "thing", "place"];
    let words: BTreeSet<_> = tables.iter().flat_map(|t| GRAMMAR.nouns(t)).collect();
    words.iter().flat_map(|word| [word, "\n"]).collect()
}

/// Writes the files below `root`, or with `check` only compares them.
///
/// # Errors
/// A file that cannot be read or written; with `check`, every file that differs.
pub fn update(root: &Path, check: bool) -> Result<()> {
    let mut stale = vec![];
    for (name, text) in files()? {
        let path = root.join(FOLDER).join(&name);
        // Line ends may have been changed by the checkout; nothing else may.
        let old = std::fs::read_to_string(&path)
            .ok()
            .map(|old| old.replace("\r\n", "\n"));
        if old.as_deref() == Some(text.as_str()) {
            continue;
        }
        if check {
            stale.push(format!("{FOLDER}/{}", name.display()));
        } else {
            write(&path, &text)?;
        }
    }
    if !stale.is_empty() {
        bail!(
            "these files are not what `cargo dev builtin-data` writes; run it:\n  {}",
            stale.join("\n  ")
        );
    }
    Ok(())
}

fn write(path: &Path, text: &str) -> Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    let attempt = || -> std::io::Result<()> {
        std::fs::create_dir_all(folder)?;
        let mut file = tempfile::NamedTempFile::new_in(folder)?;
        file.write_all(text.as_bytes())?;
        file.as_file().sync_all()?;
        file.persist(path)?;
        Ok(())
    };
    attempt().with_context(|| format!("cannot write {}", path.display()))
}

fn pretty(value: &Value) -> Result<String> {
    Ok(serde_json::to_string_pretty(value)? + "\n")
}

fn id(token: &str) -> Option<usize> {
    SPECIALS.iter().position(|special| *special == token)
}

/// `config.json`: a llama of 2.4 million parameters.
///
/// Five layers of width 192 rather than more and narrower ones, because narrow matrix products waste the processor;
/// two key and value heads for six query heads, so that the built-in model takes the path of grouped queries.
pub fn config() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": false,
        "attention_dropout": 0.0,
        "bos_token_id": null,
        "eos_token_id": id(END_OF_TEXT),
        "head_dim": 32,
        "hidden_act": "silu",
        "hidden_size": 192,
        "initializer_range": 0.02,
        "intermediate_size": 512,
        "max_position_embeddings": CONTEXT,
        "mlp_bias": false,
        "model_type": "llama",
        "num_attention_heads": 6,
        "num_hidden_layers": 5,
        "num_key_value_heads": 2,
        "pad_token_id": id(PADDING),
        "rms_norm_eps": 1e-5,
        "rope_scaling": null,
        "rope_theta": 10000.0,
        "tie_word_embeddings": true,
        "torch_dtype": "bfloat16",
        "use_cache": true,
        "vocab_size": VOCABULARY,
    })
}

/// `generation_config.json`: a text ends with its end token, an answer in a conversation with the end of its turn.
pub fn generation_config() -> Value {
    json!({
        "eos_token_id": [id(END_OF_TEXT), id(TURN_END)],
        "pad_token_id": id(PADDING),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_files_are_small_and_come_out_the_same_twice() -> Result<()> {
        let first = files()?;
        assert_eq!(first, files()?);
        let bytes: usize = first.iter().map(|(_, text)| text.len()).sum();
        assert!(bytes < 400_000, "{bytes} bytes");
        Ok(())
    }

    #[test]
    fn a_changed_file_is_named() -> Result<()> {
        let root = tempfile::tempdir()?;
        update(root.path(), false)?;
        update(root.path(), true)?;
        std::fs::write(root.path().join(FOLDER).join("config.json"), "{}")?;
        let message = format!(
            "{:#}",
            update(root.path(), true).expect_err("config.json differs")
        );
        assert!(
            message.contains("config.json") && !message.contains("tokenizer"),
            "{message}"
        );
        Ok(())
    }
}
