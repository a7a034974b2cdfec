//! Reading JSON files of bounded size, and showing values in messages.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde_json::{Map, Value};

use crate::FormatError;
use crate::recognise::{Format, HEAD};

/// Reads a file of at most `cap` bytes; `what` names the format in the error.
pub(crate) fn read_capped(path: &Path, cap: u64, what: &str) -> Result<Vec<u8>, FormatError> {
    let file = File::open(path).map_err(|e| FormatError::io(path, "open", e))?;
    let mut bytes = Vec::new();
    // One byte over the cap is enough to know; a size from the metadata would not hold for a pipe or a growing file.
    file.take(cap + 1)
        .read_to_end(&mut bytes)
        .map_err(|e| FormatError::io(path, "read", e))?;
    if bytes.len() as u64 > cap {
        return Err(FormatError::malformed(
            path,
            format!("larger than {cap} bytes, the most that is read as {what}"),
        ));
    }
    Ok(bytes)
}

/// Reads a JSON object of at most `cap` bytes.
pub(crate) fn read_object(path: &Path, cap: u64) -> Result<Map<String, Value>, FormatError> {
    let bytes = read_capped(path, cap, "JSON")?;
    match serde_json::from_slice(&bytes) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(other) => Err(FormatError::malformed(
            path,
            format!("expected a JSON object, found {}", show(&other)),
        )),
        Err(error) => Err(FormatError::malformed(path, not_json(&bytes, &error))),
    }
}

/// Why bytes are no JSON: another format, Python's names for numbers that JSON does not have, or the parser's word.
fn not_json(bytes: &[u8], error: &serde_json::Error) -> String {
    if bytes.starts_with(b"\xEF\xBB\xBF") {
        return "begins with a byte order mark, which JSON may not have; save it as UTF-8 without one \
                (\"UTF-8\", not \"UTF-8 with BOM\"): sed -i '1s/^\\xEF\\xBB\\xBF//' FILE"
            .to_owned();
    }
    if let Some(format) = Format::of(&bytes[..bytes.len().min(HEAD)]) {
        let mend = format.fetch_again().unwrap_or("JSON is needed here");
        return format!("is {format}; {mend}");
    }
    match python_number(bytes) {
        Some((line, key, number)) => format!(
            "`{key}` is {number} on line {line}, which is not JSON, though Python writes it; give a finite number, or leave the key out"
        ),
        None => format!("not valid JSON: {error}"),
    }
}

/// The first number that only Python's json module writes: its line, the last text before it, which is its key, and itself.
fn python_number(bytes: &[u8]) -> Option<(usize, String, &'static str)> {
    let (mut line, mut key, mut at) = (1, "", 0);
    while let Some(&byte) = bytes.get(at) {
        match byte {
            b'\n' => line += 1,
            b'"' => {
                let start = at + 1;
                at = start;
                while *bytes.get(at)? != b'"' {
                    at += if bytes[at] == b'\\' { 2 } else { 1 };
                }
                key = std::str::from_utf8(&bytes[start..at]).ok()?;
            }
            _ => {
                let names = ["NaN", "Infinity", "-Infinity"];
                let starts = |name: &&&str| bytes[at..].starts_with(name.as_bytes());
                if let Some(name) = names.iter().find(starts) {
                    return Some((line, key.to_owned(), name));
                }
            }
        }
        at += 1;
    }
    None
}

/// A value as it stands in the file, cut after 80 characters.
pub(crate) fn show(value: &Value) -> String {
    const LONGEST: usize = 80;
    let text = value.to_string();
    if text.chars().count() <= LONGEST {
        return text;
    }
    text.chars().take(LONGEST).chain("…".chars()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_json_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.json");
        for (text, expected) in [
            (
                "{\n \"a\": \"NaN \\\"\",\n \"lora_alpha\": NaN}",
                "`lora_alpha` is NaN on line 3",
            ),
            (
                "{\"rope_theta\":Infinity}",
                "`rope_theta` is Infinity on line 1",
            ),
            ("{\"x\": [1, -Infinity]}", "`x` is -Infinity"),
            ("<!DOCTYPE html><html>", "is an HTML page"),
            (
                "version https://git-lfs.github.com/spec/v1\n",
                "`git lfs pull`",
            ),
            ("", "is empty; download or copy it again"),
            ("\u{feff}{\"a\": 1}", "begins with a byte order mark"),
            ("{\"a\":", "not valid JSON: EOF"),
            ("{\"a\": \"NaN", "not valid JSON: EOF"),
        ] {
            std::fs::write(&path, text).unwrap();
            let error = read_object(&path, 1000).unwrap_err().to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }
}
