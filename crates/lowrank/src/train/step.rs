//! One optimizer step: micro-batches summed piece by piece, divided once by the step's supervised tokens, clipped, applied.

use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use lowrank_kernels::{
    AdamW, Arena, ComputeDType, Pauses, Teams, View, Workspace, adamw_step, all_finite,
};

use super::batch::{Scoring, batch_for, shared_batch_of};
use super::exchange::{self, Reduced, Told};
use super::groups::Groups;
use super::pieces::{pieces, teams};
use super::pipeline;
use crate::Error;
use crate::data::Example;
use crate::model::{
    Adapter, AdapterSet, Batch, Decoder, ModelConfig, PassOptions, Saving, VirtualTokens,
};
use crate::names::named;
use crate::objective::{LossSum, loss_and_gradients};
use crate::random::mix;
use crate::ranks::tree::LeafSums;
use crate::ranks::{Ranks, Shares};

/// Gradients, f32, laid out as the adapter's parameters, and AdamW's state of the values that this rank takes the steps of.
pub struct OptimizerState {
    /// Gradients of the step: sums over its tokens, not divided or clipped.
    pub grads: Arena,
    /// First moments of this rank's [share](Shares), one behind the other.
    pub(super) m: Arena,
    /// Second moments.
    pub(super) v: Arena,
    /// Optimizer steps taken.
    pub step: u64,
    /// Which tensors have rates of their own.
    pub groups: Groups,
    pub(super) shares: Shares,
    sums: LeafSums,
    teams: Teams,
    /// How many teams there is memory for.
    pub(super) most_teams: usize,
    /// Gradients of this rank's share, where other replicas have parts of them.
    reduced: Reduced,
}

/// What a step needs beside the data.
#[derive(Clone, Debug)]
pub struct StepOptions<'a> {
    /// The rate of this step.
    pub learning_rate: f64,
    /// (beta1, beta2).
    pub betas: (f64, f64),
    /// AdamW's epsilon.
    pub epsilon: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// 0: no clipping.
    pub max_grad_norm: f64,
    /// How labels are scored.
    pub scoring: Scoring,
    /// Rows of a micro-batch.
    pub batch_size: usize,
    /// Whether a micro-batch computes a prompt that several of its rows have only once.
    pub share_prompts: bool,
    /// What the blocks keep for the backward.
    pub saving: Saving,
    /// How the factors of products are read.
    pub compute_dtype: ComputeDType,
    /// Seed of the dropout masks.
    pub seed: u64,
    /// What is done between the parts of a step.
    pub pauses: Pauses<'a>,
}

impl StepOptions<'_> {
    /// The rows of the pieces that micro-batches of these rows are computed in.
    pub fn pieces<'e>(
        &self,
        model: &ModelConfig,
        adapter: &Adapter,
        rows: &[&'e Example],
    ) -> Vec<Vec<&'e Example>> {
        let batches = rows.chunks(self.batch_size.max(1));
        batches
            .flat_map(|batch| pieces(model, adapter, batch, self.share_prompts))
            .collect()
    }

    /// The batch of a piece's rows.
    pub fn batch_of(
        &self,
        model: &ModelConfig,
        rows: &[&Example],
        virtual_tokens: VirtualTokens,
    ) -> Batch {
        if self.share_prompts {
            shared_batch_of(rows, virtual_tokens)
        } else {
            batch_for(model, rows.iter().copied(), virtual_tokens)
        }
    }
}

/// What a step did.
#[derive(Clone, Copy, Debug)]
pub struct StepOutcome {
    /// Mean loss a supervised token.
    pub loss: f64,
    /// Norm of the step's mean gradient, before clipping.
    pub grad_norm: f64,
    /// Tokens computed, prompt and completion; a shared prompt counts once.
    pub tokens: usize,
    /// Tokens that carried loss, of all rows.
    pub supervised_tokens: usize,
}

impl OptimizerState {
    /// Zeros for an adapter that one rank trains.
    pub fn new(adapter: &Adapter) -> Self {
        let stages = vec![vec![0]; adapter.params.slots()];
        Self::of(&Ranks::alone(), adapter, stages)
    }

    /// Zeros for a rank's part of an adapter, of whose slots `stages` says in which stages of the pipeline they act.
    pub(super) fn of(ranks: &Ranks<'_>, adapter: &Adapter, stages: Vec<Vec<usize>>) -> Self {
        let lengths: Vec<usize> = (0..adapter.params.slots())
            .map(|slot| adapter.params.shape(slot))
            .map(|(rows, cols)| rows * cols)
            .collect();
        let shares = Shares::new(ranks, &lengths, stages);
        let own = [(1, shares.len_of(ranks.rank()))];
        Self {
            grads: adapter.params.zeros_like(),
            m: Arena::new(&own),
            v: Arena::new(&own),
            step: 0,
            groups: Groups::default(),
            shares,
            sums: LeafSums::default(),
            teams: Teams::default(),
            most_teams: usize::MAX,
            reduced: Reduced::default(),
        }
    }
}

/// The pieces of a step's micro-batches, and which of them are computed here. Each is a leaf of the tree along which gradients are added.
pub(super) struct Leaves<'e> {
    pieces: Vec<Vec<&'e Example>>,
    /// Those that are computed here.
    pub(super) own: Range<usize>,
    /// Optimizer steps taken before.
    step: u64,
}

impl<'e> Leaves<'e> {
    fn new(
        ranks: &Ranks<'_>,
        model: &Decoder,
        adapter: &Adapter,
        rows: &[&'e Example],
        options: &StepOptions,
        step: u64,
    ) -> Self {
        let pieces = options.pieces(model.config(), adapter, rows);
        let own = ranks.own_share(pieces.len());
        Self { pieces, own, step }
    }

    /// How many there are, also of other replicas.
    pub(super) fn count(&self) -> usize {
        self.pieces.len()
    }

    /// The rows of one.
    pub(super) fn rows(&self, leaf: usize) -> &[&'e Example] {
        &self.pieces[leaf]
    }

    /// What its pass is to do.
    pub(super) fn pass<'o>(&self, leaf: usize, options: &StepOptions<'o>) -> PassOptions<'o> {
        PassOptions {
            dropout_key: Some(mix(mix(options.seed, self.step), leaf as u64)),
            saving: options.saving,
            compute_dtype: options.compute_dtype,
            pauses: options.pauses,
        }
    }
}

/// What came of one piece.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct LeafOutcome {
    pub(super) sums: LossSum,
    pub(super) tokens: usize,
}

/// Adds up the gradients of `rows`, a piece of a micro-batch at a time and along a [tree](crate::ranks), into `grads`; nothing is divided.
///
/// # Errors
/// As [`loss_and_gradients`].
pub fn accumulate(
    model: &Decoder,
    adapter: &Adapter,
    grads: &mut Arena,
    rows: &[&Example],
    step: u64,
    options: &StepOptions,
    ws: &Workspace,
) -> Result<(LossSum, usize), Error> {
    let leaves = Leaves::new(&Ranks::alone(), model, adapter, rows, options, step);
    let (mut sums, mut threads) = (LeafSums::default(), Teams::default());
    let (into, teams) = ((&mut sums, grads), (&mut threads, usize::MAX));
    let all = compute(model, adapter, into, teams, &leaves, options, ws)?;
    Ok(total(&all))
}

/// Computes a rank's pieces, whose gradients are then in `sums`; where that is one sum, it goes to `grads`. Teams of threads take a piece
/// each, unless something is done in pauses, which is for one thread.
fn compute(
    model: &Decoder,
    adapter: &Adapter,
    (sums, grads): (&mut LeafSums, &mut Arena),
    (threads, most_teams): (&mut Teams, usize),
    leaves: &Leaves<'_>,
    options: &StepOptions,
    ws: &Workspace,
) -> Result<Vec<LeafOutcome>, Error> {
    sums.begin(grads);
    let own = leaves.own.clone();
    let shared = Mutex::new(&mut *sums);
    let compute_piece = |task: usize, ws: &Workspace| {
        let leaf = own.start + task;
        let rows = leaves.rows(leaf);
        let batch = options.batch_of(model.config(), rows, adapter.virtual_tokens());
        let set = [adapter];
        let objective = options.scoring.objective(&batch, rows);
        let mut gradient = locked(&shared).leaf(&adapter.params);
        let found = loss_and_gradients(
            model,
            &batch,
            AdapterSet::new(&set),
            objective.as_ref(),
            &mut gradient,
            &leaves.pass(leaf, options),
            ws,
        )?;
        locked(&shared).push(gradient, leaves.count(), &leaves.own, leaf);
        Ok(LeafOutcome {
            sums: found,
            tokens: batch.real_tokens(),
        })
    };
    let teams = if options.pauses.are_used() {
        1
    } else {
        teams(model.config(), adapter, own.len()).min(most_teams)
    };
    let all: Result<Vec<LeafOutcome>, Error> = threads
        .map(teams, own.len(), ws, compute_piece)
        .into_iter()
        .collect();
    let all = all?;
    sums.end(grads);
    Ok(all)
}

/// What a mutex guards. Another thread's panic ends the step, whatever it left there.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Sums over pieces, in their order.
fn total(all: &[LeafOutcome]) -> (LossSum, usize) {
    let (mut sums, mut tokens) = (LossSum::default(), 0);
    for leaf in all {
        sums.add(leaf.sums);
        tokens += leaf.tokens;
    }
    (sums, tokens)
}

/// Takes one optimizer step on `rows`.
///
/// # Errors
/// A loss or gradient that is not finite; the parameters are then as before the step.
pub fn optimizer_step(
    model: &Decoder,
    adapter: &mut Adapter,
    state: &mut OptimizerState,
    rows: &[&Example],
    options: &StepOptions,
    ws: &Workspace,
) -> Result<StepOutcome, Error> {
    let ranks = Ranks::alone();
    let (done, _) = shared_step(&ranks, model, adapter, state, rows, options, ws, || false)?;
    Ok(done)
}

/// A rank's part of an optimizer step, after which all ranks have the same parameters. `stops` says that this rank is asked to stop; the
/// second value, that any of them is.
///
/// # Errors
/// As [`optimizer_step`], on all ranks alike; ranks that do not answer.
pub(super) fn shared_step(
    ranks: &Ranks<'_>,
    model: &Decoder,
    adapter: &mut Adapter,
    state: &mut OptimizerState,
    rows: &[&Example],
    options: &StepOptions,
    ws: &Workspace,
    stops: impl Fn() -> bool,
) -> Result<(StepOutcome, bool), Error> {
    let leaves = Leaves::new(ranks, model, adapter, rows, options, state.step);
    adapter.prepare_norms(model.weights());
    let into = (&mut state.sums, &mut state.grads);
    let own = if ranks.stages() == 1 {
        let teams = (&mut state.teams, state.most_teams);
        compute(model, adapter, into, teams, &leaves, options, ws)?
    } else {
        pipeline::compute(
            ranks,
            model,
            adapter,
            into,
            &state.shares,
            &leaves,
            options,
            ws,
        )?
    };
    options.pauses.pause();
    let count = leaves.count();
    let shares = &state.shares;
    exchange::reduce(
        ranks,
        shares,
        &state.sums,
        &state.grads,
        count,
        &mut state.reduced,
    )?;
    let ranges = shares.ranges_of(ranks.rank(), &state.grads);
    let own_grads = own_values(ranks, &ranges, &state.grads, &state.reduced.own);
    let told = exchange::tell(ranks, shares, &own, &own_grads, count, stops())?;
    let Told { leaves: all, .. } = &told;
    let (sums, tokens) = total(all);
    // The gradients are sums over labels; a mean's are smaller by this, which the optimizer multiplies them by.
    let mut grad_scale = 1.0 / sums.weight;
    let grad_norm = told.squares.sqrt() * grad_scale;
    let loss = sums.mean();
    if !loss.is_finite() || !grad_norm.is_finite() {
        let bad = told.first_bad.map(|slot| adapter.names[slot].as_str());
        let (step, rate) = (state.step, options.learning_rate);
        return Err(not_finite(adapter, step, (loss, grad_norm), bad, rate));
    }
    if options.max_grad_norm > 0.0 {
        // torch.nn.utils.clip_grad_norm_
        let factor = options.max_grad_norm / (grad_norm + 1e-6);
        grad_scale *= factor.min(1.0);
    }
    options.pauses.pause();
    state.step += 1;
    let adamw = AdamW {
        lr: options.learning_rate as f32,
        beta1: options.betas.0 as f32,
        beta2: options.betas.1 as f32,
        eps: options.epsilon as f32,
        weight_decay: options.weight_decay as f32,
        step: state.step,
        grad_scale: grad_scale as f32,
    };
    let mut at = 0;
    for (range, grads) in ranges.iter().zip(own_grads) {
        let column = grads.reshape(grads.len(), 1);
        // Each value's step is its own, so groups change no bit of the others.
        for (part, rate) in state.groups.parts(&adapter.params, range) {
            let within = part.start - range.start..part.end - range.start;
            let moments = at + within.start..at + within.end;
            let length = part.len();
            adamw_step(
                adapter.params.part_mut(part),
                column.slice_rows(within).reshape(1, length),
                state.m.part_mut(moments.clone()),
                state.v.part_mut(moments),
                &rate.of(&adamw, options),
            );
        }
        at += range.len();
    }
    exchange::share(ranks, &state.shares, &mut adapter.params)?;
    adapter.forget_norms();
    let done = StepOutcome {
        loss,
        grad_norm,
        tokens,
        supervised_tokens: sums.tokens,
    };
    Ok((done, told.stops))
}

/// The gradients of a rank's share, range by range.
fn own_values<'a>(
    ranks: &Ranks<'_>,
    ranges: &[Range<usize>],
    grads: &'a Arena,
    reduced: &'a [f32],
) -> Vec<View<'a>> {
    let mut at = 0;
    let of_range = |range: &Range<usize>| {
        if ranks.replicas() == 1 {
            return grads.part(range.clone());
        }
        let values = &reduced[at..at + range.len()];
        at += range.len();
        View::of_row(values)
    };
    ranges.iter().map(of_range).collect()
}

/// Why a loss is not finite after `done` steps.
pub(super) fn probable_cause(done: u64, learning_rate: f64) -> String {
    if done == 0 {
        return "nothing has been trained yet, so the base model, or the adapter that the run starts from, holds values that are extreme or not finite".to_owned();
    }
    format!(
        "the learning rate ({learning_rate:e}) is probably too high, or a row holds extreme values; lower {setting} or add {warmup_steps}",
        setting = named("learning_rate"),
        warmup_steps = named("warmup_steps")
    )
}

fn not_finite(
    adapter: &Adapter,
    done: u64,
    (loss, grad_norm): (f64, f64),
    bad: Option<&str>,
    learning_rate: f64,
) -> Error {
    let step = done + 1;
    let place = bad.map_or_else(String::new, |name| format!("; first bad gradient: {name}"));
    let cause = if done > 0 && !all_finite(adapter.params.flat()) {
        "a trained value is already not finite: the learning rate is far too high, or the checkpoint that the run started from is damaged".to_owned()
    } else {
        probable_cause(done, learning_rate)
    };
    Error::Diverged(format!(
        "step {step}: the loss is {loss} and the gradient norm {grad_norm}{place}: {cause}"
    ))
}
