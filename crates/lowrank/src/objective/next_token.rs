//! The loss of a language model: cross-entropy of the token that each supervised row must predict.

use lowrank_kernels::{View, Workspace, cross_entropy_forward_backward};

use super::{Gradients, LossSum, Objective};
use crate::model::{Batch, Top};

/// Cross-entropy with the next token, with label smoothing as transformers' `LabelSmoother`.
#[derive(Clone, Copy, Debug)]
pub struct NextToken<'a> {
    /// The token of each supervised row, `[n]`.
    pub targets: &'a [u32],
    /// Share of a target's probability that is spread over all tokens.
    pub label_smoothing: f32,
}

impl<'a> NextToken<'a> {
    /// The targets of a batch, not smoothed.
    pub fn of(batch: &'a Batch) -> Self {
        Self {
            targets: &batch.targets,
            label_smoothing: 0.0,
        }
    }
}

impl Objective for NextToken<'_> {
    fn score(
        &self,
        top: &Top<'_>,
        hidden: View<'_>,
        gradients: Option<Gradients<'_>>,
        ws: &Workspace,
    ) -> LossSum {
        let head = top.head();
        let (dh, dw) = match gradients {
            None => (None, None),
            Some(Gradients { dh, trained }) => (dh, head.slot.map(|slot| trained.view_mut(slot))),
        };
        let sums = cross_entropy_forward_backward(
            dh,
            dw,
            hidden,
            head.weight(),
            head.scaling,
            self.targets,
            self.label_smoothing,
            head.compute_dtype,
            head.pauses,
            ws,
        );
        LossSum {
            loss: sums.loss_sum,
            correct: sums.correct,
            tokens: self.targets.len(),
            weight: self.targets.len() as f64,
        }
    }
}
