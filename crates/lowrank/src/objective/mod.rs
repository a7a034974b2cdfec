//! What a pass is scored by: from hidden rows to losses, and to the gradient of the hidden rows.
//!
//! The decoder knows no loss. [`loss`] and [`loss_and_gradients`] put a forward, an [`Objective`] and a backward together, on one path.

mod classes;
mod next_token;

use lowrank_kernels::in_pool;
pub use lowrank_kernels::{Arena, Pauses, Tensor, View, ViewMut, Workspace};

pub use classes::{ClassTargets, Classes};
pub use next_token::NextToken;

use crate::model::{AdapterSet, Batch, Decoder, ForeignAdapter, Forward, PassOptions, Top};

/// Sums over the labels of a batch.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LossSum {
    /// Σ of the labels' losses: nats, or squares where the outputs are numbers.
    pub loss: f64,
    /// Labels that are the most likely prediction.
    pub correct: usize,
    /// Number of labels: supervised tokens of a language model.
    pub tokens: usize,
    /// What the sum is divided by for the mean: the number of labels, or the sum of their weights.
    pub weight: f64,
}

impl LossSum {
    /// Mean loss of a label.
    pub fn mean(&self) -> f64 {
        self.loss / self.weight
    }

    /// Adds another batch's sums.
    pub fn add(&mut self, other: Self) {
        self.loss += other.loss;
        self.correct += other.correct;
        self.tokens += other.tokens;
        self.weight += other.weight;
    }
}

/// Where the gradients of a score go.
pub struct Gradients<'a> {
    /// Of the hidden rows [n, C], overwritten; `None` where nothing below them is trained.
    pub dh: Option<ViewMut<'a>>,
    /// Of what is trained, added to; laid out as the trained adapter's `params`.
    pub trained: &'a mut Arena,
}

/// Scores the rows that a batch names as supervised. One value holds the labels of one batch.
///
/// The losses are SUMS over the labels, and so are the gradients: they are divided once a step, by its labels.
pub trait Objective: Sync {
    /// The losses of hidden rows [n, C], in the order of the batch's supervised rows, and their gradients if asked for.
    fn score(
        &self,
        top: &Top<'_>,
        hidden: View<'_>,
        gradients: Option<Gradients<'_>>,
        ws: &Workspace,
    ) -> LossSum;
}

/// The losses of a batch.
///
/// # Panics
/// If the batch has not the virtual tokens of its rows' adapters.
pub fn loss(
    model: &Decoder,
    batch: &Batch,
    adapters: AdapterSet,
    objective: &dyn Objective,
    ws: &Workspace,
) -> LossSum {
    loss_with(model, batch, adapters, objective, Pauses::NONE, ws)
}

/// The same with pauses between the parts of the pass.
///
/// # Panics
/// As [`loss`].
pub fn loss_with(
    model: &Decoder,
    batch: &Batch,
    adapters: AdapterSet,
    objective: &dyn Objective,
    pauses: Pauses<'_>,
    ws: &Workspace,
) -> LossSum {
    in_pool(|| {
        let forward = model.forward_with(batch, adapters, pauses, ws);
        score(forward, objective, None, ws).0
    })
}

/// The losses of a batch and the gradient of their SUM, added to `grads` (laid out as the first adapter's `params`).
///
/// # Errors
/// If a row uses another adapter of the set than the first, which is the one that is trained.
///
/// # Panics
/// As [`loss`].
pub fn loss_and_gradients(
    model: &Decoder,
    batch: &Batch,
    adapters: AdapterSet,
    objective: &dyn Objective,
    grads: &mut Arena,
    options: &PassOptions,
    ws: &Workspace,
) -> Result<LossSum, ForeignAdapter> {
    in_pool(|| {
        let forward = model.forward_keeping(batch, adapters, options, ws)?;
        let (sums, dx) = score(forward, objective, Some(grads), ws);
        // The model is whole: no stage goes on with the gradient of its input.
        if let Some(dx) = dx {
            ws.give(dx);
        }
        Ok(sums)
    })
}

/// Scores a forward, and goes back through it where there are gradients to add to. The second value is the gradient of the rows of the
/// stage below, where there is one.
pub(crate) fn score(
    forward: Forward<'_>,
    objective: &dyn Objective,
    mut grads: Option<&mut Arena>,
    ws: &Workspace,
) -> (LossSum, Option<Tensor>) {
    let hidden = forward.hidden();
    let needed = grads.is_some() && forward.needs_gradient();
    let mut dh = needed.then(|| ws.take(hidden.rows(), hidden.cols()));
    let gradients = grads.as_deref_mut().map(|trained| Gradients {
        dh: dh.as_mut().map(Tensor::view_mut),
        trained,
    });
    let sums = objective.score(&forward.top(), hidden, gradients, ws);
    let below = if let (Some(dh), Some(grads)) = (dh, grads) {
        forward.backward(dh, grads)
    } else {
        forward.finish();
        None
    };
    (sums, below)
}
