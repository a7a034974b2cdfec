//! A tokenizer.json out of the files that older tokenizers are kept in: vocab.txt, vocab.json and merges.txt, or a model of
//! SentencePiece.
//!
//! They hold the vocabulary alone. All else is what the folder's class builds itself, so a folder whose class is not known
//! cannot be read from them.

use std::fs;
use std::path::{Path, PathBuf};

use lowrank_formats::FormatError;
use lowrank_formats::sentencepiece::{PieceKind, read_sentence_pieces};
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
    if let Class::Encoder(encoder) = files.class
        && let Some(name) = encoder.sentence_pieces()
        && folder.join(name).is_file()
    {
        let path = folder.join(name);
        return Ok(Some((sentence_pieces(&path, encoder, files)?, path)));
    }
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
    Ok(Some((whole(&model, &Value::Null, &[]), path)))
}

/// A tokenizer.json of these parts; the class builds the others.
fn whole(model: &Value, normalizer: &Value, added: &[Value]) -> Vec<u8> {
    let whole = json!({"version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": normalizer,
        "pre_tokenizer": null, "post_processor": null, "decoder": null, "model": model});
    whole.to_string().into_bytes()
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

/// A model of SentencePiece: its pieces, as the class orders them, and its table of characters.
fn sentence_pieces(path: &Path, encoder: Encoder, files: &Files) -> Result<Vec<u8>, DataError> {
    let bytes = fs::read(path).map_err(|error| DataError::io(path, error))?;
    let read = read_sentence_pieces(path, &bytes);
    let read = read.map_err(|error| match error {
        FormatError::Malformed { problem, .. } => wrong(path, problem),
        other => wrong(path, other.to_string()),
    })?;
    if !read.is_unigram {
        return Err(wrong(
            path,
            "is not a Unigram model, which the folder's class needs; save the tokenizer with transformers' AutoTokenizer to \
             get tokenizer.json",
        ));
    }
    let name = |name: &str| files.named.get(name).map(|token| token.content.clone());
    let mut pieces: Vec<(String, f64)> = Vec::with_capacity(read.pieces.len() + 2);
    let mut added = Vec::new();
    let own = if let Encoder::XlmRoberta { .. } = encoder {
        // fairseq's order: its special tokens stand in place of the first three pieces, and there is one more of them.
        for special in ["bos_token", "pad_token", "eos_token", "unk_token"] {
            pieces.push((name(special).unwrap_or_default(), 0.0));
        }
        read.pieces.get(3..).unwrap_or_default()
    } else {
        &read.pieces
    };
    for piece in own {
        let is_control = piece.kind == PieceKind::Control;
        if is_control || piece.kind == PieceKind::UserDefined {
            added.push(json!({"id": pieces.len(), "content": piece.text, "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": is_control}));
        }
        pieces.push((piece.text.clone(), f64::from(piece.score)));
    }
    if let Encoder::XlmRoberta { .. } = encoder {
        pieces.push((name("mask_token").unwrap_or_default(), 0.0));
    }
    let normalizer = if read.charsmap.is_empty() {
        Value::Null
    } else {
        json!({"type": "Precompiled", "precompiled_charsmap": base64(&read.charsmap)})
    };
    let model = json!({"type": "Unigram", "unk_id": 0, "vocab": pieces, "byte_fallback": false});
    Ok(whole(&model, &normalizer, &added))
}

/// Bytes as tokenizer.json writes them.
fn base64(bytes: &[u8]) -> String {
    const SIGNS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for three in bytes.chunks(3) {
        let byte = |at: usize| u32::from(three.get(at).copied().unwrap_or(0));
        let bits = byte(0) << 16 | byte(1) << 8 | byte(2);
        for at in 0..4 {
            let sign = SIGNS[(bits >> (18 - 6 * at) & 63) as usize];
            text.push(if at <= three.len() {
                char::from(sign)
            } else {
                '='
            });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_written_in_base64() {
        for (bytes, expected) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foobar\u{ff}", "Zm9vYmFyw78="),
        ] {
            assert_eq!(base64(bytes.as_bytes()), expected);
        }
    }
}
