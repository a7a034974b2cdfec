//! What a model would learn of a file: its first rows as tokens, each with whether the loss falls on it.

use std::path::Path;

use lowrank::base::Source;
use lowrank::data::{DataOptions, Dataset, Example, OnBadRow, Split, Tokenizer};
use serde_json::{Value, json};

use super::without_paths;
use crate::error::ApiError;

/// Rows that were left out and are named.
const NAMED: usize = 20;

/// Reads a file and shows its first rows.
pub(super) fn preview(
    source: &Source,
    path: &Path,
    filename: &str,
    rows: usize,
) -> Result<Value, ApiError> {
    let tokenizer = source
        .tokenizer()
        .map_err(|error| ApiError::internal(error.to_string()))?;
    let options = DataOptions {
        on_bad_row: OnBadRow::Skip,
        ..DataOptions::default()
    };
    let loaded =
        Dataset::load(path, Split::File, &tokenizer, &options).map_err(|error| ApiError {
            code: "invalid_file",
            ..ApiError::invalid("file_id", without_paths(&error.to_string(), path, filename))
        })?;
    let report = &loaded.report;
    let skipped: Vec<Value> = report
        .skipped
        .iter()
        .take(NAMED)
        .map(|bad| json!({"line": bad.line, "reason": bad.reason}))
        .collect();
    let shown: Vec<Value> = loaded
        .examples
        .iter()
        .take(rows)
        .map(|example| row(example, &tokenizer))
        .collect();
    Ok(json!({
        "format": report.kind.to_string(),
        "report": {
            "rows": report.rows,
            "kept": report.kept,
            "skipped": report.skipped.len(),
            "truncated": report.truncated_rows,
            "skipped_rows": skipped,
            "notes": report.notes,
        },
        "rows": shown,
    }))
}

fn row(example: &Example, tokenizer: &Tokenizer) -> Value {
    let supervised = |at: usize| example.supervised.get(at).copied().unwrap_or(false);
    let tokens: Vec<Value> = example
        .ids
        .iter()
        .enumerate()
        .map(|(at, id)| {
            json!({
                "id": id,
                "text": tokenizer.token_text(*id),
                "supervised": supervised(at),
                "special": tokenizer.is_special(*id),
            })
        })
        .collect();
    json!({"line": example.line, "truncated": example.truncated, "tokens": tokens})
}
