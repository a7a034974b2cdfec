//! A tokenizer.json out of the files that older tokenizers are kept in: vocab.txt, or vocab.json and merges.txt.
//!
//! They hold the vocabulary alone. All else is what the folder's class builds itself, so a folder whose class is not known
//! cannot be read from them.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::DataError;
use super::class::Class;
use super::encoders::Encoder;
use super::folder::{Files, wrong};

/// The contents of a tokenizer.json for a folder that has none, and the file that the vocabulary is from; none where the
/// folder has no such file, or where its class takes another kind of vocabulary.
///
/// # Errors
/// If a file is there that cannot be read or is no vocabulary.
pub(super) fn tokenizer_json(
    folder: &Path,
    files: &Files,
) -> Result<Option<(Vec<u8>, PathBuf)>, DataError> {
    let (text, json) = (folder.join("vocab.txt"), folder.join("vocab.json"));
    let (model, path) = match files.class {
        Class::Encoder(Encoder::Bert { .. }) if text.is_file() => (word_pieces(&text)?, text),
        Class::Encoder(Encoder::Roberta { .. }) | Class::Gpt2 { .. } | Class::Qwen2 { .. }
            if json.is_file() =>
        {
            (pairs(folder, &json)?, json)
        }
        _ => return Ok(None),
    };
    if !matches!(files.class, Class::Encoder(_)) && files.flags.contains(&Some(true)) {
        return Err(wrong(
            &folder.join("tokenizer_config.json"),
            "add_bos_token or add_eos_token is true, which is not read without a tokenizer.json: save the tokenizer with \
             transformers' AutoTokenizer to get one",
        ));
    }
    let whole = json!({"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": null, "post_processor": null, "decoder": null, "model": model});
    Ok(Some((whole.to_string().into_bytes(), path)))
}

/// vocab.txt: a piece a line, whose number is its id.
fn word_pieces(path: &Path) -> Result<Value, DataError> {
    let text = fs::read_to_string(path).map_err(|error| DataError::io(path, error))?;
    let pieces = text.lines().enumerate();
    let vocabulary: Map<String, Value> = pieces
        .map(|(id, piece)| (piece.trim_end().to_owned(), id.into()))
        .collect();
    if vocabulary.is_empty() {
        return Err(wrong(path, "is empty; copy it from the model's repository"));
    }
    Ok(
        json!({"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 100, "vocab": vocabulary}),
    )
}

/// vocab.json: ids by token; and merges.txt: a pair a line, those that come first before the others.
fn pairs(folder: &Path, path: &Path) -> Result<Value, DataError> {
    let bytes = fs::read(path).map_err(|error| DataError::io(path, error))?;
    let vocabulary: Map<String, Value> = serde_json::from_slice(&bytes)
        .map_err(|error| wrong(path, format!("must be an object of ids by token: {error}")))?;
    let merges_path = folder.join("merges.txt");
    if !merges_path.is_file() {
        return Err(wrong(
            path,
            "is there without merges.txt; copy that from the model's repository too",
        ));
    }
    let text =
        fs::read_to_string(&merges_path).map_err(|error| DataError::io(&merges_path, error))?;
    let mut merges = Vec::new();
    for (at, line) in text.lines().enumerate() {
        if line.starts_with("#version") || line.is_empty() {
            continue;
        }
        let [left, right] = line.split(' ').collect::<Vec<_>>()[..] else {
            let reason = format!(
                "line {} must be two tokens with a space between, but is {line:?}",
                at + 1
            );
            return Err(wrong(&merges_path, reason));
        };
        merges.push(json!([left, right]));
    }
    Ok(
        json!({"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
        "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
        "vocab": vocabulary, "merges": merges}),
    )
}
