//! Files that appear whole, and rules for folders that are replaced: only what this program wrote, and never what it is reading.

use std::path::Path;

pub use lowrank_formats::atomic::{Unfinished, discard_unfinished};

use lowrank_formats::atomic;

use crate::Error;
use crate::lock::LOCK_FILE;
use crate::names::named;

/// Writes a text file aside, syncs it and moves it to its name; an earlier file is replaced.
///
/// # Errors
/// When that is not possible, as on a full disk; the earlier file is then as it was.
pub fn write_text(path: &Path, text: &str) -> Result<(), Error> {
    Ok(atomic::write_file(path, |file| {
        file.write_all(text.as_bytes())
    })?)
}

/// Whether something is at `folder` that writing there would replace. An empty folder is not, and neither is a lock.
///
/// # Errors
/// A file that stands in the folder's place, or a folder that can't be read.
pub(crate) fn is_taken(folder: &Path) -> Result<bool, Error> {
    if !folder.exists() {
        if folder.is_symlink() {
            return Err(Error::Settings(format!(
                "output {} is a link to something that is not there; make that folder, delete the link, or give another {output}",
                folder.display(),
                output = named("output")
            )));
        }
        return Ok(false);
    }
    if !folder.is_dir() {
        return Err(Error::Settings(format!(
            "output {} is a file, and a folder is written; give another {output}",
            folder.display(),
            output = named("output")
        )));
    }
    for entry in std::fs::read_dir(folder).map_err(Error::io(folder))? {
        if entry.map_err(Error::io(folder))?.file_name() != LOCK_FILE {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Refuses to replace what is not a model's folder, or the one that is read. Without `overwrite` nothing is replaced, which is left to the writer.
pub(crate) fn check_folder(
    folder: &Path,
    read: Option<&Path>,
    overwrite: bool,
    known: &[&[&str]],
) -> Result<(), Error> {
    if !overwrite || !is_taken(folder)? {
        return Ok(());
    }
    if let Some(read) = read {
        check_apart(folder, read)?;
    }
    check_replaceable(folder, known)
}

/// Refuses to replace a folder that holds anything but the `known` files: deleting it could delete a person's work.
pub(crate) fn check_replaceable(folder: &Path, known: &[&[&str]]) -> Result<(), Error> {
    for entry in std::fs::read_dir(folder).map_err(Error::io(folder))? {
        let name = entry.map_err(Error::io(folder))?.file_name();
        let name = name.to_string_lossy();
        let temporary = name.starts_with('.') && name.ends_with(".tmp");
        if !temporary && !known.iter().any(|list| list.contains(&&*name)) {
            return Err(Error::Settings(format!(
                "output {} holds {name}, which this program did not write, so {overwrite} does not replace the folder; move the file away or give another {output}",
                folder.display(),
                overwrite = named("overwrite"),
                output = named("output")
            )));
        }
    }
    Ok(())
}

/// Refuses to replace a folder that `input` lies in.
pub(crate) fn check_apart(folder: &Path, input: &Path) -> Result<(), Error> {
    match (folder.canonicalize(), input.canonicalize()) {
        (Ok(folder), Ok(found)) if found.starts_with(&folder) => Err(Error::Settings(format!(
            "output {} is to be replaced, and {} is read from it; give another {output}",
            folder.display(),
            input.display(),
            output = named("output")
        ))),
        _ => Ok(()),
    }
}
