//! Files of predictions: a line of JSON for each meaning.

use std::path::Path;

use lowrank_formats::atomic::write_file;
use serde::{Deserialize, Serialize};

use crate::Error;
use crate::data::DataError;

/// What a model made of a prompt, and what it is compared with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Prediction {
    /// What the model was given.
    pub prompt: String,
    /// What it made of it.
    pub prediction: String,
    /// What people made of it, one or more.
    pub references: Vec<String>,
}

/// Writes predictions, whole or not at all.
///
/// # Errors
/// If the file cannot be written.
pub fn write_predictions(path: &Path, predictions: &[Prediction]) -> Result<(), Error> {
    write_file(path, |file| {
        for prediction in predictions {
            serde_json::to_writer(&mut *file, prediction)?;
            file.write_all(b"\n")?;
        }
        Ok(())
    })?;
    Ok(())
}

/// Reads predictions; blank lines do not count.
///
/// # Errors
/// If the file cannot be read or has no line, or for the first line that is no prediction or has no reference.
pub fn read_predictions(path: &Path) -> Result<Vec<Prediction>, Error> {
    let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
    let mut predictions = Vec::new();
    for (index, line) in text.lines().enumerate() {
        if line.trim().is_empty() {
            continue;
        }
        let bad = |reason: String| DataError::Row {
            path: path.to_owned(),
            line: index + 1,
            reason,
        };
        let prediction: Prediction = serde_json::from_str(line).map_err(|error| {
            bad(format!(
                "{error}; a line holds \"prompt\", \"prediction\" and \"references\", a list of texts"
            ))
        })?;
        if prediction.references.is_empty() {
            return Err(
                bad("\"references\" is empty, so there is nothing to compare with".into()).into(),
            );
        }
        predictions.push(prediction);
    }
    if predictions.is_empty() {
        return Err(DataError::Empty {
            path: path.to_owned(),
            reason: "is empty: it holds no predictions".into(),
        }
        .into());
    }
    Ok(predictions)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out.jsonl");
        let predictions: Vec<Prediction> = ["Café\n", ""]
            .map(|text| Prediction {
                prompt: "a".into(),
                prediction: text.into(),
                references: vec!["b".into(), "ü".into()],
            })
            .into();
        write_predictions(&path, &predictions).unwrap();
        assert_eq!(read_predictions(&path).unwrap(), predictions);
    }

    #[test]
    fn errors_name_the_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out.jsonl");
        let good = "{\"prompt\": \"\", \"prediction\": \"\", \"references\": [\"\"]}\n";
        for (text, expected) in [
            ("\n".to_owned(), "is empty"),
            (
                format!("{good}\n{{\"prompt\": \"\"}}\n"),
                "line 3: missing field",
            ),
            (
                good.replace("[\"\"]", "[]"),
                "line 1: \"references\" is empty",
            ),
            (good.replace("prompt", "prompts"), "line 1: unknown field"),
        ] {
            std::fs::write(&path, &text).unwrap();
            let error = read_predictions(&path).unwrap_err().to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
        let missing = read_predictions(&folder.path().join("none")).unwrap_err();
        assert!(missing.to_string().contains("none"));
    }
}
