//! What the blocks keep from the forward for the backward, and in which number format.

use std::borrow::Cow;
use std::fmt;

use lowrank_kernels::{DType, NumberFormat, Tensor, View, convert};
use serde::{Deserialize, Serialize};

use super::pass::Pass;

/// What a block computes again in the backward instead of keeping it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum))]
pub enum Recompute {
    /// Next to nothing: the fastest.
    ///
    /// Norms and the MLP's activation, that is.
    #[default]
    None,
    /// The MLP's first linears: less than half the memory.
    ///
    /// It takes a quarter more work.
    Selective,
    /// The whole block: the least memory.
    ///
    /// It is computed again from its input.
    Full,
}

impl fmt::Display for Recompute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "none",
            Self::Selective => "selective",
            Self::Full => "full",
        })
    }
}

/// How the blocks save.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Saving {
    /// What is computed again.
    pub recompute: Recompute,
    /// How most of the rest is kept: bf16 halves it, and rounds what gradients are computed from. What attention reads,
    /// and what is computed from again, stays f32.
    pub dtype: DType,
}

impl Default for Saving {
    fn default() -> Self {
        Self {
            recompute: Recompute::None,
            dtype: DType::F32,
        }
    }
}

impl Pass<'_> {
    /// A matrix as it is kept.
    pub(super) fn keep(&self, tensor: Tensor, dtype: DType) -> Tensor {
        if tensor.format() == dtype.into() {
            return tensor;
        }
        let mut kept = self.ws.take_as(tensor.rows(), tensor.cols(), dtype);
        convert(&mut kept, tensor.view());
        self.ws.give(tensor);
        kept
    }

    /// A kept matrix in f32.
    pub(super) fn widened<'t>(&self, kept: &'t Tensor) -> Cow<'t, Tensor> {
        if kept.format() == NumberFormat::F32 {
            return Cow::Borrowed(kept);
        }
        let mut wide = self.take(kept.rows(), kept.cols());
        convert(&mut wide, View::from(kept));
        Cow::Owned(wide)
    }

    /// Takes back what [`widened`](Self::widened) made.
    pub(super) fn give_widened(&self, tensor: Cow<Tensor>) {
        if let Cow::Owned(tensor) = tensor {
            self.ws.give(tensor);
        }
    }
}
