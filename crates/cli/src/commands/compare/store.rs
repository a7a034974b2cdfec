//! The folder of a comparison: what is finished, and who works on what.
//!
//! `runs/METHOD/seed-1.json` and its like each hold one finished piece with the settings that it was made with. A piece
//! that is there is not made again; one that was made with other settings is an error, not a wrong figure. A lock file
//! beside it keeps two processes from making the same piece, so several may work in one folder.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use lowrank::compare::{Cost, SeedResult};
use lowrank::lock::{Attempt, Lock};
use lowrank::write_text;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// A finished piece of work.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Finished<T> {
    /// What decided the result.
    pub settings: Map<String, Value>,
    /// The result.
    pub result: T,
}

/// A learning rate that was tried.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Tried {
    /// The rate.
    pub learning_rate: f64,
    /// Loss on the validation rows; `None` where training failed, as it does when the rate is too high.
    pub loss: Option<f64>,
}

/// A training with one seed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Trained {
    /// The learning rate.
    pub learning_rate: f64,
    /// Bytes of what was saved.
    pub checkpoint_bytes: u64,
    /// Rows that the loss was measured on, in words.
    pub held_out: String,
    /// Loss, scores and curves.
    pub run: SeedResult,
}

/// The base as it is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Untrained {
    /// Loss on the held-out rows.
    pub loss: f64,
    /// Scores by name.
    pub metrics: indexmap::IndexMap<String, f64>,
}

/// What a method costs, and where that was measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Measured {
    /// The machine, in words.
    pub machine: String,
    /// Bytes of what was saved.
    pub checkpoint_bytes: u64,
    /// The figures.
    pub cost: Cost,
}

/// The folder.
#[derive(Debug, Clone)]
pub(super) struct Store {
    root: PathBuf,
}

impl Store {
    /// The folder at `root`, which need not exist.
    pub(super) fn new(root: &Path) -> Self {
        Self {
            root: root.to_path_buf(),
        }
    }

    /// A path without its ending for a piece: `runs/METHOD/PIECE`.
    pub(super) fn place(&self, method: &str, piece: &str) -> PathBuf {
        self.root.join("runs").join(method).join(piece)
    }

    /// A finished piece, if it is there.
    ///
    /// # Errors
    /// When the file is damaged, or was made with other settings.
    pub(super) fn find<T: DeserializeOwned>(
        place: &Path,
        settings: &Map<String, Value>,
    ) -> anyhow::Result<Option<T>> {
        let path = with_ending(place, "json");
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => {
                return Err(error).with_context(|| format!("cannot read {}", path.display()));
            }
        };
        let shown = path.display();
        let finished: Finished<T> = serde_json::from_str(&text).with_context(|| {
            format!("{shown} is damaged or of another version; delete it, and it is made again")
        })?;
        let mut before = finished.settings;
        if settings.contains_key(BOUNDARY) {
            // Pieces older than the setting.
            before.entry(BOUNDARY).or_insert_with(|| "apart".into());
        }
        let changes = changes(&before, settings);
        if !changes.is_empty() {
            bail!(
                "{shown} was made with other settings:\n  {}\ngive another --output, or delete the file to have it made again",
                changes.join("\n  ")
            );
        }
        Ok(Some(finished.result))
    }

    /// Keeps a finished piece.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(super) fn keep<T: Serialize>(
        place: &Path,
        settings: &Map<String, Value>,
        result: T,
    ) -> anyhow::Result<()> {
        let finished = Finished {
            settings: settings.clone(),
            result,
        };
        let text = serde_json::to_string_pretty(&finished)?;
        Ok(write_text(&with_ending(place, "json"), &text)?)
    }

    /// The right to make a piece, until it is dropped; `None` while another process has it.
    ///
    /// # Errors
    /// When the folder cannot be written or the file system has no locks.
    pub(super) fn claim(place: &Path) -> anyhow::Result<Option<Lock>> {
        let path = with_ending(place, "lock");
        let shown = path.display();
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder)
                .with_context(|| format!("cannot make the folder {}", folder.display()))?;
        }
        match Lock::attempt(&path).with_context(|| format!("cannot write {shown}"))? {
            Attempt::Taken(lock) => Ok(Some(lock)),
            Attempt::Busy(_) => Ok(None),
            Attempt::Unsupported(error) => {
                Err(error).with_context(|| format!("cannot lock {shown}"))
            }
        }
    }
}

/// A setting that came later than the first comparisons.
const BOUNDARY: &str = "completion_boundary";

/// `place.ending`; a place may hold dots, as in `rate-0.001`.
pub(super) fn with_ending(place: &Path, ending: &str) -> PathBuf {
    let mut name = place.as_os_str().to_owned();
    name.push(".");
    name.push(ending);
    PathBuf::from(name)
}

/// Keys whose values differ, in words.
fn changes(before: &Map<String, Value>, now: &Map<String, Value>) -> Vec<String> {
    let mut keys: Vec<&String> = before.keys().chain(now.keys()).collect();
    keys.sort_unstable();
    keys.dedup();
    let show = |value: Option<&Value>| value.map_or("nothing".to_owned(), ToString::to_string);
    keys.into_iter()
        .filter(|key| before.get(*key) != now.get(*key))
        .map(|key| {
            format!(
                "{key}: {} before, {} now",
                show(before.get(key)),
                show(now.get(key))
            )
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(json: &Value) -> Map<String, Value> {
        json.as_object().cloned().unwrap()
    }

    #[test]
    fn a_piece_is_found_again_and_only_with_its_settings() {
        let folder = tempfile::tempdir().unwrap();
        let place = Store::new(folder.path()).place("lora", "rate-0.001");
        let made_with = settings(&serde_json::json!({"r": 4, "seed": 1}));
        assert_eq!(Store::find::<Tried>(&place, &made_with).unwrap(), None);
        let tried = Tried {
            learning_rate: 0.001,
            loss: Some(2.5),
        };
        fs::create_dir_all(place.parent().unwrap()).unwrap();
        Store::keep(&place, &made_with, &tried).unwrap();
        assert!(place.with_file_name("rate-0.001.json").is_file());
        assert_eq!(Store::find(&place, &made_with).unwrap(), Some(tried));
        let others = settings(&serde_json::json!({"r": 8, "seed": 1}));
        let error = Store::find::<Tried>(&place, &others)
            .unwrap_err()
            .to_string();
        assert!(error.contains("r: 4 before, 8 now"), "{error}");
        fs::write(place.with_file_name("rate-0.001.json"), "{").unwrap();
        assert!(Store::find::<Tried>(&place, &made_with).is_err());
    }

    #[test]
    fn a_piece_has_one_maker() {
        let folder = tempfile::tempdir().unwrap();
        let place = Store::new(folder.path()).place("lora", "seed-1");
        let claim = Store::claim(&place).unwrap().unwrap();
        assert!(Store::claim(&place).unwrap().is_none());
        drop(claim);
        assert!(!with_ending(&place, "lock").exists());
        assert!(Store::claim(&place).unwrap().is_some());
    }
}
