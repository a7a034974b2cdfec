//! What can be wrong with a tokenizer, a chat template or a data file.
//!
//! Every message names the file (and, for a row, the line), says what was found, and how to mend it.

use std::path::{Path, PathBuf};

/// An error of [`crate::data`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DataError {
    /// A file could not be opened or read.
    #[error("{}: cannot be read: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file or a folder is not there, or has not the form it needs.
    #[error("{}: {reason}", path.display())]
    Layout {
        /// The file or folder that was asked for.
        path: PathBuf,
        /// What is missing and how to mend it.
        reason: String,
    },
    /// A file of the tokenizer is there, but is not what it should be.
    #[error("{origin}: {reason}")]
    Tokenizer {
        /// The file, or the name of the built-in tokenizer.
        origin: String,
        /// What is wrong and how to mend it.
        reason: String,
    },
    /// The chat template does not compile, or refused to render.
    #[error("chat template: {0}")]
    Template(String),
    /// A conversation cannot be written as text.
    #[error("{0}")]
    Conversation(String),
    /// A text cannot be used.
    #[error("{0}")]
    Text(String),
    /// The tokenizer refused a text or an id.
    #[error("the tokenizer failed: {0}")]
    Encoding(String),
    /// A row cannot be used.
    #[error("{}, line {line}: {reason}", path.display())]
    Row {
        /// The data file.
        path: PathBuf,
        /// The row's line, counted from 1.
        line: usize,
        /// What is wrong with it.
        reason: String,
    },
    /// A row is of another kind than the first one.
    #[error(
        "{}, line {line}: this row is {found}, but the file began with {expected} on line {first_line}; \
         a file holds rows of one kind, so put the others in a file of their own",
        path.display()
    )]
    Mixed {
        /// The data file.
        path: PathBuf,
        /// The line of the row that differs, counted from 1.
        line: usize,
        /// The line of the first row.
        first_line: usize,
        /// The kind of the first row.
        expected: String,
        /// The kind of this row.
        found: String,
    },
    /// There is nothing to learn from in the file.
    #[error("{}: {reason}", path.display())]
    Empty {
        /// The data file.
        path: PathBuf,
        /// Whether it is empty, or every row was skipped and why.
        reason: String,
    },
    /// A GGUF tokenizer that cannot be rewritten as tokenizer.json.
    #[error("the tokenizer of the GGUF file: {0}")]
    Gguf(String),
    /// A tokenizer.json that cannot be written into a GGUF file.
    #[error("the tokenizer cannot be written into a GGUF file: {0}")]
    GgufExport(String),
}

impl DataError {
    pub(super) fn io(path: &Path, source: std::io::Error) -> Self {
        Self::Io {
            path: path.to_owned(),
            source,
        }
    }

    pub(super) fn layout(path: &Path, reason: impl Into<String>) -> Self {
        Self::Layout {
            path: path.to_owned(),
            reason: reason.into(),
        }
    }

    pub(super) fn tokenizer(origin: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Tokenizer {
            origin: origin.into(),
            reason: reason.into(),
        }
    }

    pub(super) fn row(path: &Path, line: usize, reason: impl Into<String>) -> Self {
        Self::Row {
            path: path.to_owned(),
            line,
            reason: reason.into(),
        }
    }
}
