//! The registry's file: a small one in the folder of adapters, written whole.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::ApiError;

const NAME: &str = ".lowrank-registry.json";

/// The version of its form.
const VERSION: u32 = 1;

/// Adapters by name.
pub(super) type Adapters = BTreeMap<String, SavedAdapter>;

/// What the file holds.
#[derive(Serialize, Deserialize)]
struct Saved {
    version: u32,
    adapters: Adapters,
}

/// What it holds of an adapter.
#[derive(Serialize, Deserialize)]
pub(super) struct SavedAdapter {
    pub(super) path: PathBuf,
    pub(super) generation: u64,
    #[serde(default)]
    pub(super) pinned: bool,
    #[serde(default)]
    pub(super) created: u64,
    /// What the generation's files held, so that the same files are the same generation after a restart.
    #[serde(default)]
    pub(super) content: Option<String>,
}

/// The adapters that the file of a folder has; none where there is no file.
///
/// # Errors
/// A file that cannot be read, or that is no registry of this version.
pub(super) fn read(folder: &Path) -> Result<Adapters, String> {
    let path = folder.join(NAME);
    let text = match std::fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Adapters::default()),
        Err(error) => return Err(format!("{}: {error}", path.display())),
    };
    let saved: Saved = serde_json::from_str(&text).map_err(|error| {
        format!(
            "{} is not a registry that this program wrote: {error}; move it away to begin anew",
            path.display()
        )
    })?;
    if saved.version != VERSION {
        return Err(format!(
            "{} has the version {}, and this program knows {VERSION}; use the program that wrote it, or move it away to begin anew",
            path.display(),
            saved.version
        ));
    }
    let mut adapters = saved.adapters;
    for adapter in adapters.values_mut() {
        adapter.path = folder.join(&adapter.path);
    }
    Ok(adapters)
}

/// Writes the file of a folder.
///
/// # Errors
/// A folder that cannot be written to. The log says why, since the answer is to have no path of the server.
pub(super) fn write(folder: &Path, adapters: Adapters) -> Result<(), ApiError> {
    let saved = Saved {
        version: VERSION,
        adapters,
    };
    let text = serde_json::to_string_pretty(&saved)
        .map_err(|error| ApiError::internal(error.to_string()))?;
    let what = "the registry of adapters cannot be written, so nothing was changed";
    lowrank::write_text(&folder.join(NAME), &(text + "\n"))
        .map_err(|error| ApiError::storage(what, error))
}
