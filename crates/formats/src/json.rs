//! Reading JSON files of bounded size, and showing values in messages.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde_json::{Map, Value};

use crate::FormatError;

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
        Err(e) => Err(FormatError::malformed(path, format!("not valid JSON: {e}"))),
    }
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
