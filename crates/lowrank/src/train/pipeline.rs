//! The pieces of a step's micro-batches through the stages of a pipeline, one forward and one backward in turn (1F1B, as PipeDream-Flush).
//!
//! Each stage gets the rows of the one below, and gives back the gradient of these. It begins with as many forwards as there are stages above
//! it, so no more pieces are in flight than stages. A value that acts in several stages, such as a tied embedding, has its
//! gradient added to on the way down: a stage that has added its part sends it with the piece to the next one below where it acts. That
//! is the order in which one process adds, so the bits are the same.

use std::collections::VecDeque;

use bytemuck::{cast_slice, cast_slice_mut};
use lowrank_kernels::{Arena, Tensor, View, Workspace, in_pool};

use super::step::{LeafOutcome, Leaves, StepOptions};
use crate::Error;
use crate::model::{Adapter, AdapterSet, Batch, Decoder, StageForward};
use crate::objective::{LossSum, score};
use crate::ranks::tree::LeafSums;
use crate::ranks::{Ranks, Shares};

/// One rank's side of a step.
struct Pipeline<'a> {
    ranks: &'a Ranks<'a>,
    shares: &'a Shares,
    ws: &'a Workspace,
    hidden_size: usize,
    /// Whether the stage below goes on with a gradient.
    feeds_below: bool,
}

/// Computes the pieces of this rank's replica, as far as its stage goes. The gradients of the stage's values are then in `sums`.
pub(super) fn compute(
    ranks: &Ranks<'_>,
    model: &Decoder,
    adapter: &Adapter,
    (sums, grads): (&mut LeafSums, &mut Arena),
    shares: &Shares,
    leaves: &Leaves<'_>,
    options: &StepOptions,
    ws: &Workspace,
) -> Result<Vec<LeafOutcome>, Error> {
    sums.begin(grads);
    let stage = model.weights().stage();
    let lowest = adapter.lowest_layer();
    let lowest = lowest.unwrap_or(model.config().num_hidden_layers);
    let pipeline = Pipeline {
        ranks,
        shares,
        ws,
        hidden_size: model.config().hidden_size,
        feeds_below: lowest < stage.blocks.start,
    };
    let set = [adapter];
    let set = AdapterSet::new(&set);
    let batches: Vec<Batch> = leaves
        .own
        .clone()
        .map(|leaf| options.batch_of(model.config(), leaves.rows(leaf), adapter.virtual_tokens()))
        .collect();
    let goes_back = stage.is_last || lowest < stage.blocks.end;
    let ahead = if goes_back {
        ranks.stages() - 1 - ranks.stage()
    } else {
        batches.len()
    };
    let mut in_flight: VecDeque<(usize, StageForward<'_>)> = VecDeque::new();
    let mut all = Vec::new();
    let push = |gradient: Arena, sums: &mut LeafSums, leaf: usize| {
        sums.push(gradient, leaves.count(), &leaves.own, leaf);
    };
    for (leaf, batch) in leaves.own.clone().zip(&batches) {
        let below = pipeline.rows_from_below(batch)?;
        let pass = leaves.pass(leaf, options);
        let forward = in_pool(|| model.stage_keeping(batch, set, below, &pass, ws))?;
        let mut outcome = LeafOutcome {
            sums: LossSum::default(),
            tokens: batch.real_tokens(),
        };
        if stage.is_last {
            let objective = options.scoring.objective(batch, leaves.rows(leaf));
            let mut gradient = sums.leaf(&adapter.params);
            let (found, dx) = in_pool(|| {
                score(
                    forward.to_top(),
                    objective.as_ref(),
                    Some(&mut gradient),
                    ws,
                )
            });
            outcome.sums = found;
            pipeline.to_below(dx, &gradient)?;
            push(gradient, sums, leaf);
        } else {
            pipeline.to_above(forward.rows())?;
            if goes_back {
                in_flight.push_back((leaf, forward));
            } else {
                forward.finish();
                // Nothing holds this stage up, so it would run ahead of those above it with everything it sends.
                ranks.comm().flush()?;
            }
        }
        all.push(outcome);
        if in_flight.len() > ahead
            && let Some((leaf, forward)) = in_flight.pop_front()
        {
            let gradient = pipeline.back(forward, sums.leaf(&adapter.params))?;
            push(gradient, sums, leaf);
        }
    }
    while let Some((leaf, forward)) = in_flight.pop_front() {
        let gradient = pipeline.back(forward, sums.leaf(&adapter.params))?;
        push(gradient, sums, leaf);
    }
    ranks.comm().flush()?;
    sums.end(grads);
    Ok(all)
}

impl Pipeline<'_> {
    /// The rows of a piece behind the blocks of the stage below, where there is one.
    fn rows_from_below(&self, batch: &Batch) -> Result<Option<Tensor>, Error> {
        let stage = self.ranks.stage();
        if stage == 0 {
            return Ok(None);
        }
        let rows = self
            .ranks
            .rows_from(stage - 1, batch.tokens(), self.hidden_size)?;
        Ok(Some(rows))
    }

    fn to_above(&self, rows: View<'_>) -> Result<(), Error> {
        self.ranks.send_rows(self.ranks.stage() + 1, rows)
    }

    /// The backward of a stage that is not the last one.
    fn back(&self, forward: StageForward<'_>, mut gradient: Arena) -> Result<Arena, Error> {
        let rows = forward.rows();
        let (stage, replica) = (self.ranks.stage(), self.ranks.replica());
        let dx = self.ranks.rows_from(stage + 1, rows.rows(), rows.cols())?;
        for slot in self.shares.shared_slots() {
            let stages = self.shares.stages_of(slot);
            let above = stages.iter().find(|other| **other > stage);
            if let (true, Some(above)) = (stages.contains(&stage), above) {
                let range = gradient.range(slot);
                let into = cast_slice_mut(&mut gradient.as_mut_slice()[range]);
                self.ranks
                    .comm()
                    .receive(self.ranks.at(replica, *above), into)?;
            }
        }
        let dx = in_pool(|| forward.backward(dx, &mut gradient));
        self.to_below(dx, &gradient)?;
        Ok(gradient)
    }

    /// Sends the gradient of the rows of the stage below, and those of values that act further down as well.
    fn to_below(&self, dx: Option<Tensor>, gradient: &Arena) -> Result<(), Error> {
        let (stage, replica) = (self.ranks.stage(), self.ranks.replica());
        if let Some(dx) = dx {
            if self.feeds_below {
                self.ranks.send_rows(stage - 1, dx.view())?;
            }
            self.ws.give(dx);
        }
        for slot in self.shares.shared_slots() {
            let stages = self.shares.stages_of(slot);
            let below = stages.iter().rfind(|other| **other < stage);
            if let (true, Some(below)) = (stages.contains(&stage), below) {
                let values = cast_slice(&gradient.as_slice()[gradient.range(slot)]);
                let to = self.ranks.at(replica, *below);
                self.ranks.comm().send(to, values.to_vec())?;
            }
        }
        Ok(())
    }
}
