//! The library's error.

use std::path::PathBuf;

use lowrank_formats::FormatError;
use lowrank_kernels::TensorError;

use crate::data::DataError;

/// What can go wrong in the library; every message names what was found, where, and the mend.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file that is damaged, missing, or says something unsupported.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// A gradient that would have to be of two adapters at once.
    #[error(transparent)]
    ForeignAdapter(#[from] crate::model::ForeignAdapter),
    /// Training data, a tokenizer or a chat template.
    #[error(transparent)]
    Data(#[from] DataError),
    /// A tensor whose bytes do not fit its shape.
    #[error(transparent)]
    Tensor(#[from] TensorError),
    /// Tensors of a checkpoint that do not fit the model.
    #[error("{}: the tensors do not fit the model:\n  {}", path.display(), problems.join("\n  "))]
    Tensors {
        /// The folder or file.
        path: PathBuf,
        /// One line a tensor.
        problems: Vec<String>,
    },
    /// metrics.jsonl of a run.
    #[error(transparent)]
    Metrics(#[from] crate::report::MetricsError),
    /// Texts that cannot be scored.
    #[error(transparent)]
    Corpus(#[from] crate::metrics::CorpusError),
    /// Predictions that cannot be scored.
    #[error(transparent)]
    Classification(#[from] crate::metrics::classification::ClassificationError),
    /// Settings that contradict each other, the model or the data.
    #[error("{0}")]
    Settings(String),
    /// Training that cannot go on.
    #[error("{0}")]
    Training(String),
    /// A loss or gradient that is no longer finite.
    #[error("{0}")]
    Diverged(String),
    /// Ranks of a run that could not exchange something.
    #[error(transparent)]
    Communication(#[from] lowrank_comm::Error),
    /// What went wrong on all ranks of a run, which all of them know.
    #[error(transparent)]
    Agreed(Box<Self>),
    /// Another rank of the run failed, and rank 0 says why.
    #[error("another rank of the run has failed; rank 0 says why")]
    OtherRank {
        /// Whether the user asked for something that cannot be.
        is_misuse: bool,
    },
    /// Reading or writing a file.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
}

impl Error {
    pub(crate) fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }

    /// The same as an error that all ranks of the run know.
    pub(crate) fn agreed(self) -> Self {
        match self {
            Self::Agreed(_) | Self::OtherRank { .. } | Self::Diverged(_) => self,
            other => Self::Agreed(Box::new(other)),
        }
    }

    /// Whether all ranks of a run end with it. Of another one they know nothing, and wait.
    pub fn is_agreed(&self) -> bool {
        matches!(
            self,
            Self::Agreed(_) | Self::OtherRank { .. } | Self::Diverged(_)
        )
    }

    /// Whether the user asked for something that cannot be (exit code 2), rather than something failing (1).
    pub fn is_misuse(&self) -> bool {
        match self {
            Self::Agreed(error) => error.is_misuse(),
            Self::Settings(_) | Self::OtherRank { is_misuse: true } => true,
            _ => false,
        }
    }
}
