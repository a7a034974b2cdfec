//! One writer a folder, so that two runs never mix their files.
//!
//! The lock is the operating system's own advisory lock on a small file, so it ends with the process however that ends:
//! a file that a killed run left behind locks nothing. The file holds the process's number for the message that another
//! run gets, and is deleted when the lock is given up.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use crate::Error;
use crate::names::named;

/// The file's name in a folder that a run writes.
pub(crate) const LOCK_FILE: &str = ".lock";

/// Tries to lock a file that another process keeps deleting before it gives up.
const TRIES: usize = 16;

/// A locked file. Dropping it deletes the file and gives the lock up.
#[derive(Debug)]
pub struct Lock {
    file: File,
    path: PathBuf,
}

/// What came of trying to lock a file.
#[derive(Debug)]
pub enum Attempt {
    /// It is locked until the lock is dropped.
    Taken(Lock),
    /// Another process has it; its number where the file says so.
    Busy(Option<u32>),
    /// The file system has no locks, as some network file systems.
    Unsupported(io::Error),
}

impl Lock {
    /// Makes the file if need be and tries to lock it, without waiting.
    ///
    /// # Errors
    /// When the file can't be made or opened.
    pub fn attempt(path: &Path) -> io::Result<Attempt> {
        for _ in 0..TRIES {
            let mut file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .open(path)?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => return Ok(Attempt::Busy(process(&mut file))),
                Err(TryLockError::Error(error)) => {
                    let _ = fs::remove_file(path);
                    return Ok(Attempt::Unsupported(error));
                }
            }
            // Whoever had the lock may have deleted the file between the two calls; a new one may be there by now.
            if !is_at(&file, path) {
                continue;
            }
            // The number is for a message alone.
            let _ = file.set_len(0);
            let _ = writeln!(file, "{}", std::process::id());
            let path = path.to_path_buf();
            return Ok(Attempt::Taken(Self { file, path }));
        }
        Ok(Attempt::Busy(None))
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Deleted first: whoever opened it meanwhile sees that it is gone and tries again. Another's in its place is not touched.
        if is_at(&self.file, &self.path) {
            let _ = fs::remove_file(&self.path);
        }
        let _ = self.file.unlock();
    }
}

/// The right to write a folder. Dropping it gives the right up, and deletes the folder if it was made for the lock and
/// nothing was written.
#[derive(Debug)]
pub struct FolderLock {
    lock: Option<Lock>,
    made: Vec<PathBuf>,
}

/// The folder locks of this process, for [`abandon`] and [`check_held`].
static HELD: Mutex<Vec<Held>> = Mutex::new(Vec::new());

struct Held {
    path: PathBuf,
    /// The locked file; `None` where there are no locks.
    file: Option<File>,
    /// The folders that were made for it.
    made: Vec<PathBuf>,
}

impl FolderLock {
    /// Locks a folder, which is made if it is not there. The text is a warning: the file system has no locks.
    ///
    /// # Errors
    /// Another process writes there; the folder can't be made or written.
    pub fn take(folder: &Path) -> Result<(Self, Option<String>), Error> {
        let path = folder.join(LOCK_FILE);
        let made = make_folders(folder)?;
        let mut taken = Self { lock: None, made };
        let mut attempt = Lock::attempt(&path);
        for _ in 0..TRIES {
            match &attempt {
                // A run that ended may just have deleted the folder that it had made.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                _ => break,
            }
            taken.made = make_folders(folder)?;
            attempt = Lock::attempt(&path);
        }
        if path.is_dir() {
            return Err(Error::Settings(format!(
                "{} is a folder, and a run locks a file of that name; delete it, or give another {output}",
                path.display(),
                output = named("output")
            )));
        }
        let attempt = attempt.map_err(Error::io(folder))?;
        let warning = match attempt {
            Attempt::Taken(lock) => {
                taken.lock = Some(lock);
                None
            }
            Attempt::Busy(process) => return Err(busy(folder, process)),
            Attempt::Unsupported(error) => Some(format!(
                "warning: {} cannot be locked ({error}); let no other run write there",
                folder.display()
            )),
        };
        if let Ok(mut held) = HELD.lock() {
            let file = taken
                .lock
                .as_ref()
                .and_then(|lock| lock.file.try_clone().ok());
            let made = taken.made.clone();
            held.push(Held { path, file, made });
        }
        Ok((taken, warning))
    }

    /// Refuses a folder that another process writes, before anything is looked at or touched.
    ///
    /// # Errors
    /// Another process has the lock.
    pub fn refuse_busy(folder: &Path) -> Result<(), Error> {
        let Ok(mut file) = File::open(folder.join(LOCK_FILE)) else {
            return Ok(());
        };
        match file.try_lock_shared() {
            Err(TryLockError::WouldBlock) => Err(busy(folder, process(&mut file))),
            _ => Ok(()),
        }
    }
}

impl Drop for FolderLock {
    fn drop(&mut self) {
        if let (Some(lock), Ok(mut held)) = (&self.lock, HELD.lock()) {
            held.retain(|held| held.path != lock.path);
        }
        self.lock = None;
        remove_empty(&self.made);
    }
}

/// Deletes what this process has not finished writing, and what its folder locks made, for a process that ends without dropping
/// them.
pub fn abandon() {
    lowrank_formats::atomic::discard_unfinished();
    if let Ok(held) = HELD.lock() {
        for Held { path, file, made } in held.iter() {
            if file.as_ref().is_none_or(|file| is_at(file, path)) {
                let _ = fs::remove_file(path);
            }
            remove_empty(made);
        }
    }
}

/// Whether a folder that this process has locked is still there, and its lock still this process's.
///
/// # Errors
/// The folder is gone, or the lock's file was deleted, so that another run may be writing there by now.
pub(crate) fn check_held(folder: &Path) -> Result<(), Error> {
    let path = folder.join(LOCK_FILE);
    let Ok(held) = HELD.lock() else {
        return Ok(());
    };
    let Some(held) = held.iter().find(|held| held.path == path) else {
        return Ok(());
    };
    if !folder.is_dir() {
        return Err(Error::Training(format!(
            "{} was deleted or moved away while the run was writing to it",
            folder.display()
        )));
    }
    match &held.file {
        Some(file) if !is_at(file, &path) => Err(Error::Training(format!(
            "{} was deleted or replaced, so another run may be writing to this folder; this one stops, and writes nothing more there",
            path.display()
        ))),
        _ => Ok(()),
    }
}

fn busy(folder: &Path, process: Option<u32>) -> Error {
    let who = process.map_or_else(String::new, |id| format!(" (process {id})"));
    Error::Settings(format!(
        "another run{who} is writing to {}; wait until it has ended, stop it, or give another {output}",
        folder.display(),
        output = named("output")
    ))
}

/// The process whose number the file holds.
fn process(file: &mut File) -> Option<u32> {
    let mut text = String::new();
    file.take(32).read_to_string(&mut text).ok()?;
    text.trim().parse().ok()
}

/// Whether the open file is still the one at `path`.
pub(crate) fn is_at(file: &File, path: &Path) -> bool {
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        match (file.metadata(), fs::metadata(path)) {
            (Ok(open), Ok(there)) => (open.dev(), open.ino()) == (there.dev(), there.ino()),
            _ => false,
        }
    }
    #[cfg(not(unix))]
    {
        // No name is free again here while somebody has its file open.
        let _ = file;
        path.exists()
    }
}

/// Makes a folder and those above it; returns the ones that were not there, the outermost first.
fn make_folders(folder: &Path) -> Result<Vec<PathBuf>, Error> {
    let missing = folder
        .ancestors()
        .take_while(|one| !one.as_os_str().is_empty() && !one.exists());
    let mut made: Vec<PathBuf> = missing.map(Path::to_path_buf).collect();
    made.reverse();
    fs::create_dir_all(folder).map_err(Error::io(folder))?;
    Ok(made)
}

/// Deletes these folders, the innermost first, as far as they are empty.
fn remove_empty(made: &[PathBuf]) {
    for folder in made.iter().rev() {
        if fs::remove_dir(folder).is_err() {
            break;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_has_one_writer() {
        let place = tempfile::tempdir().unwrap();
        let folder = place.path().join("a/b");
        let (lock, warning) = FolderLock::take(&folder).unwrap();
        assert_eq!(warning, None);
        let id = std::process::id();
        // The same folder under other names.
        let mut names = vec![folder.clone(), folder.join("../b")];
        #[cfg(unix)]
        {
            let link = place.path().join("link");
            std::os::unix::fs::symlink(&folder, &link).unwrap();
            names.push(link);
        }
        for name in &names {
            let text = FolderLock::take(name).unwrap_err().to_string();
            assert!(text.contains("another run"), "{text}");
            let text = FolderLock::refuse_busy(name).unwrap_err().to_string();
            if cfg!(unix) {
                assert!(text.contains(&format!("process {id}")), "{text}");
            }
        }
        drop(lock);
        assert!(!place.path().join("a").exists(), "nothing was written");
        FolderLock::refuse_busy(&folder).unwrap();
        FolderLock::take(&folder).unwrap();
    }

    #[test]
    fn a_file_that_was_left_behind_locks_nothing() {
        let place = tempfile::tempdir().unwrap();
        let file = place.path().join(LOCK_FILE);
        fs::write(&file, "1\n").unwrap();
        FolderLock::refuse_busy(place.path()).unwrap();
        let (lock, _) = FolderLock::take(place.path()).unwrap();
        let text = fs::read_to_string(&file).unwrap();
        assert_eq!(text, format!("{}\n", std::process::id()));
        drop(lock);
        assert!(!file.exists() && place.path().exists());
    }

    #[cfg(unix)]
    #[test]
    fn a_lock_whose_file_is_gone_is_lost() {
        let place = tempfile::tempdir().unwrap();
        let folder = place.path().join("run");
        fs::create_dir(&folder).unwrap();
        let (first, _) = FolderLock::take(&folder).unwrap();
        check_held(&folder).unwrap();
        fs::remove_file(folder.join(LOCK_FILE)).unwrap();
        let text = check_held(&folder).unwrap_err().to_string();
        assert!(text.contains("another run may be writing"), "{text}");
        let file = folder.join(LOCK_FILE);
        fs::write(&file, "another's").unwrap();
        check_held(&folder).unwrap_err();
        drop(first);
        assert!(file.exists(), "another's lock is not deleted");

        let (lock, _) = FolderLock::take(&folder).unwrap();
        fs::remove_dir_all(&folder).unwrap();
        let text = check_held(&folder).unwrap_err().to_string();
        assert!(text.contains("was deleted or moved away"), "{text}");
        drop(lock);
        check_held(&folder).unwrap();
    }

    #[test]
    fn a_folder_in_the_place_of_the_lock_is_named() {
        let place = tempfile::tempdir().unwrap();
        fs::create_dir(place.path().join(LOCK_FILE)).unwrap();
        let text = FolderLock::take(place.path()).unwrap_err().to_string();
        assert!(text.contains(".lock is a folder"), "{text}");
    }

    #[test]
    fn of_many_at_once_one_gets_it() {
        let place = tempfile::tempdir().unwrap();
        let folder = place.path().join("new");
        for _ in 0..20 {
            let start = std::sync::Barrier::new(4);
            let taken: Vec<_> = std::thread::scope(|scope| {
                let threads: Vec<_> = (0..4)
                    .map(|_| {
                        scope.spawn(|| {
                            start.wait();
                            FolderLock::take(&folder).ok()
                        })
                    })
                    .collect();
                threads
                    .into_iter()
                    .filter_map(|one| one.join().unwrap())
                    .collect()
            });
            assert_eq!(taken.len(), 1);
        }
    }
}
