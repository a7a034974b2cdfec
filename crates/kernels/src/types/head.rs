//! What losses come to, and what becomes of logits before.

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
