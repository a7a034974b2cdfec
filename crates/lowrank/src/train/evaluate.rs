//! The loss on held-out rows.

use std::ops::ControlFlow;

use lowrank_kernels::{Pauses, Workspace, in_pool};

use super::batch::{Scoring, batch_for};
use super::checkpoint::{DataMark, ModelMark};
use super::exchange;
use super::step::LeafOutcome;
use crate::Error;
use crate::data::Example;
use crate::model::{AdapterSet, Batch, Decoder, VirtualTokens};
use crate::objective::{self, LossSum};
use crate::random::hash;
use crate::ranks::Ranks;

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
    let evaluation = Evaluation {
        model,
        adapters,
        adapter,
        pauses: Pauses::NONE,
        ws,
    };
    let virtual_tokens = evaluation.virtual_tokens();
    let passes = passes(examples, virtual_tokens);
    evaluation
        .all(passes, done)
        .into_iter()
        .fold(LossSum::default(), |mut sums, of_pass| {
            sums.add(of_pass);
            sums
        })
}

/// A rank's part of [`evaluate`]; all ranks get the sums, which have the bits of one rank.
///
/// # Errors
/// Ranks with another base, adapter or rows; ranks that do not answer.
pub fn evaluate_on(
    ranks: &Ranks<'_>,
    model: &Decoder,
    adapters: AdapterSet,
    adapter: Option<usize>,
    examples: &[Example],
    ws: &Workspace,
) -> Result<LossSum, Error> {
    let base = ModelMark::of(model);
    let values = adapter.map(|index| {
        let params = adapters.get(index).params.as_slice();
        format!("{:016x}", hash(bytemuck::cast_slice(params)))
    });
    let rows = DataMark::of(examples);
    let rows = format!(
        "({} rows, {} tokens, {})",
        rows.rows, rows.tokens, rows.hash
    );
    let marks = [
        ("version", base.version),
        ("config.json of the base", base.config),
        ("weights of the base", base.weights),
        ("adapter", values.unwrap_or_else(|| "none".to_owned())),
        ("held-out data", rows),
    ];
    ranks.same(&marks.map(|(what, mark)| (what.to_owned(), mark)))?;
    let evaluation = Evaluation {
        model,
        adapters,
        adapter,
        pauses: Pauses::NONE,
        ws,
    };
    Ok(evaluation
        .on(ranks, examples, || false)?
        .unwrap_or_default())
}

/// How rows are evaluated.
pub(super) struct Evaluation<'a> {
    pub(super) model: &'a Decoder,
    pub(super) adapters: AdapterSet<'a>,
    /// The index in the set that every row uses; `None`: the base alone.
    pub(super) adapter: Option<usize>,
    /// What is done between the parts of passes, which are smaller then; so sums of losses may be rounded otherwise.
    pub(super) pauses: Pauses<'a>,
    pub(super) ws: &'a Workspace,
}

impl Evaluation<'_> {
    /// Sums of the losses of `examples`, of which the ranks of a run compute a share each; `None` where `stops` says on any of them that the
    /// evaluation is to end.
    ///
    /// # Errors
    /// Ranks that do not answer.
    pub(super) fn on(
        &self,
        ranks: &Ranks<'_>,
        examples: &[Example],
        stops: impl Fn() -> bool,
    ) -> Result<Option<LossSum>, Error> {
        let most = if self.pauses.are_used() {
            TOKENS_BETWEEN_PAUSES
        } else {
            TOKENS_A_PASS
        };
        let passes: Vec<_> = passes_of(most, examples, self.virtual_tokens()).collect();
        let own = passes[ranks.own_share(passes.len())].iter().copied();
        let sums = if ranks.stages() == 1 {
            self.all(own, |_| {
                if stops() {
                    ControlFlow::Break(())
                } else {
                    ControlFlow::Continue(())
                }
            })
        } else {
            // Never ended early: the other stages would wait for the rest.
            own.map(|rows| self.through(ranks, rows))
                .collect::<Result<_, Error>>()?
        };
        let mut outcomes: Vec<_> = sums
            .into_iter()
            .map(|sums| LeafOutcome { sums, tokens: 0 })
            .collect();
        let own_count = ranks.own_share(passes.len()).len();
        outcomes.resize(own_count, LeafOutcome::default());
        let (all, stopped) = exchange::tell_outcomes(ranks, &outcomes, passes.len(), stops())?;
        if stopped {
            return Ok(None);
        }
        let mut sums = LossSum::default();
        for of_pass in all {
            sums.add(of_pass.sums);
        }
        Ok(Some(sums))
    }

    fn virtual_tokens(&self) -> VirtualTokens {
        let adapter = self.adapter;
        adapter
            .map(|index| self.adapters.get(index).virtual_tokens())
            .unwrap_or_default()
    }

    fn batch(&self, rows: &[Example]) -> Batch {
        let batch = batch_for(self.model.config(), rows, self.virtual_tokens());
        match self.adapter {
            Some(index) => batch.with_adapter(index),
            None => batch.without_adapter(),
        }
    }

    /// The losses of passes, until `done` says that it is enough.
    fn all<'e>(
        &self,
        passes: impl Iterator<Item = &'e [Example]>,
        mut done: impl FnMut(usize) -> ControlFlow<()>,
    ) -> Vec<LossSum> {
        let scoring = Scoring::default();
        let mut all = Vec::new();
        for rows in passes {
            let batch = self.batch(rows);
            let rows: Vec<&Example> = rows.iter().collect();
            let objective = scoring.objective(&batch, &rows);
            all.push(objective::loss_with(
                self.model,
                &batch,
                self.adapters,
                objective.as_ref(),
                self.pauses,
                self.ws,
            ));
            if done(rows.len()).is_break() {
                break;
            }
        }
        all
    }

    /// One pass through the stages of a pipeline; the last one has its losses.
    fn through(&self, ranks: &Ranks<'_>, rows: &[Example]) -> Result<LossSum, Error> {
        let batch = self.batch(rows);
        let (model, ws) = (self.model, self.ws);
        let stage = ranks.stage();
        let below = if stage > 0 {
            let columns = model.config().hidden_size;
            Some(ranks.rows_from(stage - 1, batch.tokens(), columns)?)
        } else {
            None
        };
        if !ranks.scores() {
            let x = in_pool(|| model.pass_on(&batch, self.adapters, below, ws));
            ranks.send_rows(stage + 1, x.view())?;
            ws.give(x);
            ranks.comm().flush()?;
            return Ok(LossSum::default());
        }
        let rows: Vec<&Example> = rows.iter().collect();
        let scoring = Scoring::default();
        let objective = scoring.objective(&batch, &rows);
        Ok(in_pool(|| {
            let forward = model.forward_from(&batch, self.adapters, below, ws);
            objective::score(forward, objective.as_ref(), None, ws).0
        }))
    }
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
