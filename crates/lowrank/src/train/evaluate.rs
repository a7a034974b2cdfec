//! The loss on held-out rows.

use std::ops::ControlFlow;

use lowrank_kernels::Workspace;

use crate::data::Example;
use crate::model::{AdapterSet, Batch, Decoder};
use crate::objective::{self, LossSum, NextToken};

/// Tokens that one pass of an evaluation computes at most, unless a single row is longer.
const TOKENS_A_PASS: usize = 2048;

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
    mut done: impl FnMut(usize) -> ControlFlow<()>,
) -> LossSum {
    let mut sums = LossSum::default();
    let virtual_tokens = adapter
        .map(|index| adapters.get(index).virtual_tokens())
        .unwrap_or_default();
    let mut pending = Batch::with_virtual(virtual_tokens);
    let mut rows = 0;
    let mut run = |batch: Batch, rows: usize| {
        let batch = if let Some(index) = adapter {
            batch.with_adapter(index)
        } else {
            batch
        };
        sums.add(objective::loss(
            model,
            &batch,
            adapters,
            &NextToken::of(&batch),
            ws,
        ));
        done(rows)
    };
    for example in examples {
        if rows > 0 && pending.tokens() + example.ids.len() > TOKENS_A_PASS {
            let next = Batch::with_virtual(virtual_tokens);
            let whole = std::mem::replace(&mut pending, next);
            if run(whole, std::mem::take(&mut rows)).is_break() {
                return sums;
            }
        }
        let prompt = example.prompt().len();
        pending.push_with_prompt(prompt, &example.ids, &example.supervised);
        rows += 1;
    }
    if rows > 0 {
        let _ = run(pending, rows);
    }
    sums
}
