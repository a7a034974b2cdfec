//! The loss on held-out rows.

use std::ops::ControlFlow;

use lowrank_kernels::{Pauses, Workspace};

use super::batch::{Scoring, batch_for};
use crate::data::Example;
use crate::model::{AdapterSet, Decoder, VirtualTokens};
use crate::objective::{self, LossSum};

/// Tokens that one pass of an evaluation computes at most, unless a single row is longer.
const TOKENS_A_PASS: usize = 2048;
/// The same where there are pauses between the parts of a pass.
const TOKENS_BETWEEN_PAUSES: usize = 256;

/// Sums of the losses of `examples`. `adapter` is the index in the set that every row uses; `None`: the base alone.
pub fn evaluate(
    model: &Decoder,
    adapters: AdapterSet,
    adapter: Option<usize>,
    examples: &[Example],
    ws: &Workspace,
) -> LossSum {
    evaluate_rows(model, adapters, adapter, examples, ws, |_| {
        ControlFlow::Continue(())
    })
}

/// As [`evaluate`]; `done` is told how many rows each pass finished, and may end it there, with the sums so far.
pub fn evaluate_rows(
    model: &Decoder,
    adapters: AdapterSet,
    adapter: Option<usize>,
    examples: &[Example],
    ws: &Workspace,
    done: impl FnMut(usize) -> ControlFlow<()>,
) -> LossSum {
    evaluate_with(model, adapters, adapter, examples, Pauses::NONE, ws, done)
}

/// The same with pauses between the parts of passes, which are smaller then; so sums of losses may be rounded otherwise.
pub(super) fn evaluate_with(
    model: &Decoder,
    adapters: AdapterSet,
    adapter: Option<usize>,
    examples: &[Example],
    pauses: Pauses<'_>,
    ws: &Workspace,
    mut done: impl FnMut(usize) -> ControlFlow<()>,
) -> LossSum {
    let mut sums = LossSum::default();
    let virtual_tokens = adapter
        .map(|index| adapters.get(index).virtual_tokens())
        .unwrap_or_default();
    let scoring = Scoring::default();
    let most = if pauses.are_used() {
        TOKENS_BETWEEN_PAUSES
    } else {
        TOKENS_A_PASS
    };
    for rows in passes_of(most, examples, virtual_tokens) {
        let batch = batch_for(model.config(), rows, virtual_tokens);
        let batch = match adapter {
            Some(index) => batch.with_adapter(index),
            None => batch.without_adapter(),
        };
        let rows: Vec<&Example> = rows.iter().collect();
        let objective = scoring.objective(&batch, &rows);
        sums.add(objective::loss_with(
            model,
            &batch,
            adapters,
            objective.as_ref(),
            pauses,
            ws,
        ));
        if done(rows.len()).is_break() {
            break;
        }
    }
    sums
}

/// Rows that go together, in their order.
pub(crate) fn passes(
    examples: &[Example],
    virtual_tokens: VirtualTokens,
) -> impl Iterator<Item = &[Example]> {
    passes_of(TOKENS_A_PASS, examples, virtual_tokens)
}

/// The same with so many tokens at most.
fn passes_of(
    most: usize,
    examples: &[Example],
    virtual_tokens: VirtualTokens,
) -> impl Iterator<Item = &[Example]> {
    let mut left = examples;
    std::iter::from_fn(move || {
        let mut tokens = virtual_tokens.prefix;
        let fit = left.iter().take_while(|example| {
            tokens += example.ids.len() + virtual_tokens.infix;
            tokens <= most
        });
        let rows = fit.count().max(1).min(left.len());
        let (pass, rest) = left.split_at(rows);
        left = rest;
        (!pass.is_empty()).then_some(pass)
    })
}
