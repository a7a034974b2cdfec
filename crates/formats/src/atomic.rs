//! Files and folders that appear whole or not at all.
//!
//! A file is written aside in the same folder under a name such as `.model.safetensors.k3Xp9q.tmp`, flushed, synced
//! and renamed over its final name; then the folder is synced, so the name survives a power cut. A full disk, an error
//! or a crash leaves the earlier file as it was; a crash may also leave the temporary file, whose name says what it is.
//! A program that a signal ends in order calls [`discard_unfinished`] first.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use tempfile::{Builder, NamedTempFile, TempDir};

use crate::FormatError;

const BUFFER: usize = 1 << 20;

/// Files and folders of this process that are not finished.
static UNFINISHED: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// A file or a folder that [`discard_unfinished`] deletes. Dropping it says that it is finished, or gone.
#[derive(Debug)]
pub struct Unfinished(PathBuf);

impl Unfinished {
    /// From now on `path` is unfinished.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        let path = path.into();
        // The working folder may be another by then.
        let path = std::path::absolute(&path).unwrap_or(path);
        if let Ok(mut all) = UNFINISHED.lock() {
            all.push(path.clone());
        }
        Self(path)
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if let Ok(mut all) = UNFINISHED.lock()
            && let Some(place) = all.iter().position(|path| *path == self.0)
        {
            all.swap_remove(place);
        }
    }
}

/// Deletes every file and folder that this process has begun and not finished. For a process that is about to end while
/// other threads may still be writing.
pub fn discard_unfinished() {
    discard(|_| true);
}

fn discard(which: impl Fn(&Path) -> bool) {
    // Another thread may make a file in a folder while it is being deleted.
    const TRIES: usize = 8;
    let Ok(all) = UNFINISHED.lock() else {
        return;
    };
    for path in all.iter().rev().filter(|path| which(path)) {
        for _ in 0..TRIES {
            let deleted = if path.is_dir() {
                fs::remove_dir_all(path)
            } else {
                fs::remove_file(path)
            };
            match deleted {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {}
                _ => break,
            }
        }
    }
}

/// Writes `path` through `fill`, atomically. What `fill` writes is buffered.
///
/// An earlier file is replaced and its permissions are kept; if `path` is a symbolic link, the link itself is replaced
/// and what it pointed to is left alone.
///
/// # Errors
/// The file cannot be created, written, synced or renamed, or `fill` returned an error. The earlier file is intact.
pub fn write_file(
    path: &Path,
    fill: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> Result<(), FormatError> {
    let folder = parent(path);
    let file = temporary_file(path, folder)
        .map_err(|e| FormatError::io(path, "create a temporary file beside", e))?;
    let _unfinished = Unfinished::new(file.path());
    let mut writer = BufWriter::with_capacity(BUFFER, file);
    fill(&mut writer).map_err(|e| FormatError::io(path, "write", e))?;
    let file = writer
        .into_inner()
        .map_err(|e| FormatError::io(path, "write", e.into_error()))?;
    keep_permissions(path, file.as_file());
    file.as_file()
        .sync_all()
        .map_err(|e| FormatError::io(path, "sync", e))?;
    file.persist(path)
        .map_err(|e| FormatError::io(path, "move the finished file there", e.error))?;
    sync_folder(folder)
}

/// Fills a temporary folder beside `path` through `fill`, then moves it to `path`.
///
/// An existing folder is an error unless it is empty or `overwrite` is true; then it is moved aside, the new one takes
/// its place, and only then the old one is deleted. If the move fails, the old one is moved back. Files in the folder
/// are expected to be written with [`write_file`], which syncs them.
///
/// # Errors
/// `path` exists and may not be replaced or is not a folder, or a file operation failed, or `fill` returned an error. What was at `path` is
/// then still there.
pub fn write_folder<T, E: From<FormatError>>(
    path: &Path,
    overwrite: bool,
    fill: impl FnOnce(&Path) -> Result<T, E>,
) -> Result<T, E> {
    let replaced = check_target(path, overwrite)?;
    let folder = parent(path);
    fs::create_dir_all(folder).map_err(|e| FormatError::io(folder, "make the folder", e))?;
    let temporary = Builder::new()
        .prefix(&prefix(path))
        .suffix(".tmp")
        .tempdir_in(folder)
        .map_err(|e| FormatError::io(path, "create a temporary folder beside", e))?;
    let _unfinished = Unfinished::new(temporary.path());
    let value = fill(temporary.path())?;
    sync_folder(temporary.path())?;
    move_folder(temporary, path, replaced)?;
    sync_folder(folder)?;
    Ok(value)
}

/// Whether something at `path` has to be moved aside.
fn check_target(path: &Path, overwrite: bool) -> Result<bool, FormatError> {
    let metadata = match fs::metadata(path) {
        Ok(metadata) => metadata,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(e) => return Err(FormatError::io(path, "inspect", e)),
    };
    if !metadata.is_dir() {
        return Err(FormatError::Missing {
            path: path.to_path_buf(),
            problem: "exists and is not a folder; choose another output folder".into(),
        });
    }
    let mut entries = fs::read_dir(path).map_err(|e| FormatError::io(path, "list", e))?;
    if entries.next().is_some() && !overwrite {
        return Err(FormatError::Missing {
            path: path.to_path_buf(),
            problem: "already exists and is not empty; choose another output folder, or replace it with --overwrite"
                .into(),
        });
    }
    Ok(true)
}

fn move_folder(temporary: TempDir, path: &Path, replaced: bool) -> Result<(), FormatError> {
    if !replaced {
        fs::rename(temporary.path(), path).map_err(|e| match e.kind() {
            io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::NotADirectory | io::ErrorKind::AlreadyExists => {
                FormatError::Missing {
                    path: path.to_path_buf(),
                    problem: "something was put there while this was being written; choose another output folder"
                        .into(),
                }
            }
            _ => FormatError::io(path, "move the finished folder there", e),
        })?;
        // The folder now has its final name: nothing is left to clean up.
        let _ = temporary.keep();
        return Ok(());
    }
    let aside = Builder::new()
        .prefix(&prefix(path))
        .suffix(".old.tmp")
        .tempdir_in(parent(path))
        .map_err(|e| FormatError::io(path, "create a temporary folder beside", e))?;
    let old = aside.path().join("old");
    fs::rename(path, &old).map_err(|e| FormatError::io(path, "move aside", e))?;
    if let Err(e) = fs::rename(temporary.path(), path) {
        if let Err(back) = fs::rename(&old, path) {
            // Deleting `aside` now would delete the only copy.
            let kept = aside.keep();
            return Err(FormatError::io(
                &kept,
                "move the earlier folder back from",
                back,
            ));
        }
        return Err(FormatError::io(path, "move the finished folder there", e));
    }
    let _ = temporary.keep();
    aside
        .close()
        .map_err(|e| FormatError::io(path, "delete the earlier version of", e))
}

fn temporary_file(path: &Path, folder: &Path) -> io::Result<NamedTempFile> {
    let prefix = prefix(path);
    let mut builder = Builder::new();
    builder.prefix(&prefix).suffix(".tmp");
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        // Temporary files are private by default; a model is an ordinary file. The umask still applies.
        builder.permissions(fs::Permissions::from_mode(0o666));
    }
    builder.tempfile_in(folder)
}

/// Best effort: on file systems without permissions the new file keeps its own.
fn keep_permissions(path: &Path, file: &File) {
    if let Ok(earlier) = fs::symlink_metadata(path)
        && earlier.is_file()
    {
        let _ = file.set_permissions(earlier.permissions());
    }
}

fn prefix(path: &Path) -> OsString {
    let mut prefix = OsString::from(".");
    prefix.push(path.file_name().unwrap_or("output".as_ref()));
    prefix.push(".");
    prefix
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

/// Makes a rename inside `folder` durable. Windows offers no such call and needs none.
fn sync_folder(folder: &Path) -> Result<(), FormatError> {
    #[cfg(unix)]
    {
        let file = File::open(folder).map_err(|e| FormatError::io(folder, "open", e))?;
        match file.sync_all() {
            // Some network and FUSE file systems cannot sync a folder; the file itself has been synced.
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported
                ) => {}
            other => other.map_err(|e| FormatError::io(folder, "sync", e))?,
        }
    }
    #[cfg(not(unix))]
    let _ = folder;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn a_file_is_replaced_whole_or_not_at_all() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model");
        write_file(&path, |out| out.write_all(b"first")).unwrap();
        // As when the disk is full after some bytes.
        let error = write_file(&path, |out| {
            out.write_all(&vec![0; 3 * BUFFER])?;
            Err(io::ErrorKind::StorageFull.into())
        });
        let message = error.unwrap_err().to_string();
        assert!(message.contains("model: cannot write"), "{message}");
        assert_eq!(fs::read(&path).unwrap(), b"first");
        write_file(&path, |out| out.write_all(b"second")).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"second");
        assert_eq!(
            names(folder.path()),
            ["model"],
            "no temporary file may stay"
        );
    }

    #[test]
    fn what_is_unfinished_can_be_discarded() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run");
        // Other tests of this process have unfinished files, too.
        let own = |path: &Path| path.starts_with(folder.path());
        let failed: Result<(), FormatError> = write_folder(&path, false, |inside| {
            write_file(&inside.join("done"), |out| out.write_all(b"x"))?;
            write_file(&inside.join("half"), |_| {
                discard(own);
                Ok(())
            })
        });
        failed.unwrap_err();
        assert!(names(folder.path()).is_empty());
        // What is finished stays.
        write_folder(&path, false, |inside| {
            write_file(&inside.join("done"), |out| out.write_all(b"x"))
        })
        .unwrap();
        discard(own);
        assert_eq!(names(&path), ["done"]);
    }

    #[test]
    fn a_folder_that_came_meanwhile_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run");
        let failed: Result<(), FormatError> = write_folder(&path, false, |_| {
            fs::create_dir(&path).unwrap();
            write_file(&path.join("theirs"), |out| out.write_all(b"x"))
        });
        let text = failed.unwrap_err().to_string();
        assert!(text.contains("was put there while"), "{text}");
        assert_eq!(names(folder.path()), ["run"]);
    }

    #[test]
    fn a_temporary_file_is_obviously_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model");
        write_file(&path, |_| {
            let [name] = names(folder.path()).try_into().unwrap();
            let inner = name
                .strip_prefix(".model.")
                .and_then(|rest| rest.strip_suffix(".tmp"));
            assert!(inner.is_some(), "{name}");
            Ok(())
        })
        .unwrap();
    }

    #[test]
    fn a_missing_folder_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let error = write_file(&folder.path().join("nowhere/model"), |_| Ok(())).unwrap_err();
        assert!(error.to_string().contains("nowhere/model"), "{error}");
    }

    #[cfg(unix)]
    #[test]
    fn a_new_file_is_as_readable_as_any_and_an_old_one_as_before() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        let plain = folder.path().join("plain");
        File::create(&plain).unwrap();
        let path = folder.path().join("model");
        write_file(&path, |_| Ok(())).unwrap();
        assert_eq!(mode(&path), mode(&plain));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        write_file(&path, |_| Ok(())).unwrap();
        assert_eq!(mode(&path), 0o640);
    }

    #[cfg(unix)]
    #[test]
    fn a_link_is_replaced_and_its_target_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let (blob, link) = (folder.path().join("blob"), folder.path().join("model"));
        fs::write(&blob, "cache").unwrap();
        std::os::unix::fs::symlink(&blob, &link).unwrap();
        write_file(&link, |out| out.write_all(b"mine")).unwrap();
        assert_eq!(fs::read(&blob).unwrap(), b"cache");
        assert_eq!(fs::read(&link).unwrap(), b"mine");
    }

    #[test]
    fn a_folder_appears_whole_and_replaces_only_when_told() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run");
        let fill = |text: &'static str| {
            move |inside: &Path| write_file(&inside.join(text), |out| out.write_all(b"x"))
        };
        write_folder(&path, false, fill("first")).unwrap();
        let error = write_folder(&path, false, fill("second")).unwrap_err();
        assert!(error.to_string().contains("already exists"), "{error}");
        assert_eq!(names(&path), ["first"]);

        let failed: Result<(), FormatError> = write_folder(&path, true, |inside| {
            fill("half")(inside)?;
            Err(FormatError::malformed(inside, "no"))
        });
        failed.unwrap_err();
        assert_eq!(names(&path), ["first"]);

        write_folder(&path, true, fill("second")).unwrap();
        assert_eq!(names(&path), ["second"]);
        assert_eq!(names(folder.path()), ["run"], "nothing temporary may stay");

        fs::create_dir(folder.path().join("empty")).unwrap();
        write_folder(&folder.path().join("empty"), false, fill("first")).unwrap();
        let file = path.join("second");
        let error = write_folder(&file, true, fill("first")).unwrap_err();
        assert!(error.to_string().contains("not a folder"), "{error}");
    }
}
