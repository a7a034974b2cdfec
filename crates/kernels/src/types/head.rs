//! What a head multiplies with, what losses come to, and what becomes of logits before.

use std::ops::Range;

use crate::types::linear::Weight;
use crate::view::View;

/// A sum of losses and how many targets had the largest logit.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CrossEntropy {
    /// Σ over rows of the loss.
    pub loss_sum: f64,
    /// Rows whose target has the largest logit.
    pub correct: usize,
}

/// What becomes of logits before they are scored: l / divisor, then c · tanh(l / c) where there is a cap c.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LogitScaling {
    /// `logits_scaling`
    pub divisor: f32,
    /// `final_logit_softcapping`
    pub softcap: Option<f32>,
}

impl LogitScaling {
    /// Logits as they are.
    pub const NONE: Self = Self {
        divisor: 1.0,
        softcap: None,
    };
}

/// The weight of a head, of which some rows may be others for some of the hidden rows.
#[derive(Clone, Copy, Debug)]
pub struct HeadWeight<'a> {
    /// The weight [V, C].
    pub weight: Weight<'a>,
    /// Rows that stand in for its own.
    pub own: &'a [OwnRows<'a>],
}

impl<'a> From<Weight<'a>> for HeadWeight<'a> {
    fn from(weight: Weight<'a>) -> Self {
        Self { weight, own: &[] }
    }
}

/// Rows that stand in for some of a head's, where it multiplies a range of the hidden rows.
#[derive(Clone, Debug)]
pub struct OwnRows<'a> {
    /// The hidden rows.
    pub rows: Range<usize>,
    /// The tokens whose rows these are, each once.
    pub ids: &'a [u32],
    /// The rows [n, C], in the order of `ids`.
    pub values: View<'a>,
}
