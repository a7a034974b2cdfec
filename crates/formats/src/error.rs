//! The one error type of this crate.
//!
//! Every message names the file, then the field or tensor, then what is wrong and, where there is one, the mend.

use std::fmt::Write as _;
use std::io;
use std::path::{Path, PathBuf};

/// What can go wrong between bytes on a disk and checked values.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FormatError {
    /// The operating system refused an operation.
    #[error("{}: cannot {action}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What was being done, as the rest of "cannot …".
        action: &'static str,
        /// The operating system's reason.
        source: io::Error,
    },
    /// A file or folder that has to exist does not.
    #[error("{}: {problem}", path.display())]
    Missing {
        /// Where it was looked for.
        path: PathBuf,
        /// What was expected there and how to mend it.
        problem: String,
    },
    /// The file's bytes are not what its format demands: truncated, overlapping, overflowing, hostile.
    #[error("{}: {problem}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong, and where in the file.
        problem: String,
    },
    /// A tensor is missing, doubled, of the wrong size or of a type that cannot be read.
    #[error("{}: tensor `{tensor}`: {problem}", path.display())]
    Tensor {
        /// The file.
        path: PathBuf,
        /// The tensor's name in the file.
        tensor: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A field of a JSON file or of GGUF metadata is missing, of the wrong type or out of range.
    #[error("{}: `{field}` {found}; accepted: {accepted}", path.display())]
    Field {
        /// The file.
        path: PathBuf,
        /// The key.
        field: String,
        /// What was found there: "is missing" or "is VALUE".
        found: String,
        /// What would have been accepted.
        accepted: String,
    },
    /// Several things are wrong with one file; all of them are listed.
    #[error("{}: {}", path.display(), list(problems))]
    Problems {
        /// The file.
        path: PathBuf,
        /// One line each.
        problems: Vec<String>,
    },
}

impl FormatError {
    /// An operating system's error about `path`; `action` completes "cannot …".
    pub fn io(path: &Path, action: &'static str, source: io::Error) -> FormatError {
        FormatError::Io {
            path: path.to_path_buf(),
            action,
            source,
        }
    }

    pub(crate) fn malformed(path: &Path, problem: impl Into<String>) -> FormatError {
        FormatError::Malformed {
            path: path.to_path_buf(),
            problem: problem.into(),
        }
    }

    /// One tensor of a file cannot be used.
    pub fn tensor(
        path: &Path,
        tensor: impl Into<String>,
        problem: impl Into<String>,
    ) -> FormatError {
        FormatError::Tensor {
            path: path.to_path_buf(),
            tensor: tensor.into(),
            problem: problem.into(),
        }
    }

    /// The file that the error is about.
    pub fn path(&self) -> &Path {
        match self {
            FormatError::Io { path, .. }
            | FormatError::Missing { path, .. }
            | FormatError::Malformed { path, .. }
            | FormatError::Tensor { path, .. }
            | FormatError::Field { path, .. }
            | FormatError::Problems { path, .. } => path,
        }
    }
}

fn list(problems: &[String]) -> String {
    if let [only] = problems {
        return only.clone();
    }
    let mut text = format!("{} problems:", problems.len());
    for problem in problems {
        // Writing to a String does not fail.
        let _ = write!(text, "\n  - {problem}");
    }
    text
}
