//! What linears are given beside matrices.

use std::ops::Range;

use crate::types::low_rank::LowRank;
use crate::view::{View, ViewMut};

/// How a weight lies in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// [out, in], as in PyTorch's `nn.Linear`.
    OutIn,
    /// [in, out], as in GPT-2's `Conv1D`.
    InOut,
}

/// The weight of a linear layer.
#[derive(Clone, Copy, Debug)]
pub struct Weight<'a> {
    /// The matrix, [out, in] or [in, out] as `layout` says.
    pub view: View<'a>,
    /// Which of its sides is which.
    pub layout: Layout,
}

impl Weight<'_> {
    /// Number of inputs.
    pub fn inputs(&self) -> usize {
        match self.layout {
            Layout::OutIn => self.view.cols(),
            Layout::InOut => self.view.rows(),
        }
    }

    /// Number of outputs.
    pub fn outputs(&self) -> usize {
        match self.layout {
            Layout::OutIn => self.view.rows(),
            Layout::InOut => self.view.cols(),
        }
    }
}

/// One of several linears that read the same input.
pub struct LinearOutput<'a> {
    /// [T, out], overwritten.
    pub y: ViewMut<'a>,
    /// The weight.
    pub w: Weight<'a>,
    /// [1, out].
    pub bias: Option<View<'a>>,
    /// What is added beside it.
    pub branches: Vec<BranchOutput<'a>>,
}

/// A low-rank branch beside a linear.
pub struct BranchOutput<'a> {
    /// drop(x)·Aᵀ [rows, r], overwritten and saved for the backward.
    pub u: ViewMut<'a>,
    /// The rows of the input that it applies to.
    pub rows: Range<usize>,
    /// Its factors.
    pub branch: LowRank<'a>,
}

/// The gradient of a linear's output, on its way to the input.
pub struct LinearGradient<'a> {
    /// [T, out].
    pub dy: View<'a>,
    /// The weight.
    pub w: Weight<'a>,
    /// Of its branches that drop nothing.
    pub branches: Vec<BranchGradient<'a>>,
}

/// The gradient of a low-rank branch's inner rows.
pub struct BranchGradient<'a> {
    /// s·dy·B [rows, r], as [`low_rank_backward_hidden`](crate::low_rank_backward_hidden) gives it.
    pub du: View<'a>,
    /// The rows of the input that the branch applies to.
    pub rows: Range<usize>,
    /// A [r, in].
    pub a: View<'a>,
}
