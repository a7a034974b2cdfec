//! What losses come to.

/// A sum of losses and how many targets had the largest logit.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CrossEntropy {
    /// Σ over rows of the loss.
    pub loss_sum: f64,
    /// Rows whose target has the largest logit.
    pub correct: usize,
}
