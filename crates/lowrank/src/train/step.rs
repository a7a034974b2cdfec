//! One optimizer step: micro-batches summed, divided once by the step's supervised tokens, clipped, applied.

use lowrank_kernels::{AdamW, Arena, Pauses, Workspace, adamw_step, all_finite, sum_squares};

use super::batch::{Scoring, batch_for, shared_batch_of};
use crate::Error;
use crate::data::Example;
use crate::model::{
    Adapter, AdapterSet, Batch, Decoder, ModelConfig, PassOptions, Saving, VirtualTokens,
};
use crate::names::named;
use crate::objective::{LossSum, loss_and_gradients};
use crate::random::mix;

/// Gradients and AdamW's state, f32, laid out as the adapter's parameters.
pub struct OptimizerState {
    /// Gradients of the step: sums over its tokens, not divided or clipped.
    pub grads: Arena,
    /// First moments.
    pub m: Arena,
    /// Second moments.
    pub v: Arena,
    /// Optimizer steps taken.
    pub step: u64,
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
    /// Seed of the dropout masks.
    pub seed: u64,
    /// What is done between the parts of a step.
    pub pauses: Pauses<'a>,
}

impl StepOptions<'_> {
    /// The batch of a micro-batch's rows.
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
    /// Zeros for an adapter.
    pub fn new(adapter: &Adapter) -> Self {
        let shapes: Vec<_> = (0..adapter.params.slots())
            .map(|slot| adapter.params.shape(slot))
            .collect();
        let zeros = || Arena::new(&shapes);
        Self {
            grads: zeros(),
            m: zeros(),
            v: zeros(),
            step: 0,
        }
    }
}

/// Adds up the gradients of `rows`, a micro-batch at a time, into `grads`, which is zeroed first; nothing is divided.
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
    grads.zero();
    let (mut sums, mut tokens) = (LossSum::default(), 0);
    for (micro, rows) in rows.chunks(options.batch_size).enumerate() {
        let batch = options.batch_of(model.config(), rows, adapter.virtual_tokens());
        tokens += batch.real_tokens();
        let key = mix(mix(options.seed, step), micro as u64);
        let set = [adapter];
        let objective = options.scoring.objective(&batch, rows);
        let pass = PassOptions {
            dropout_key: Some(key),
            saving: options.saving,
            pauses: options.pauses,
        };
        let set = AdapterSet::new(&set);
        sums.add(loss_and_gradients(
            model,
            &batch,
            set,
            objective.as_ref(),
            grads,
            &pass,
            ws,
        )?);
    }
    Ok((sums, tokens))
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
    let (sums, tokens) = accumulate(
        model,
        adapter,
        &mut state.grads,
        rows,
        state.step,
        options,
        ws,
    )?;
    options.pauses.pause();
    let count = sums.weight;
    // The gradients are sums over labels; a mean's are smaller by this, which the optimizer multiplies them by.
    let mut grad_scale = 1.0 / count;
    let grad_norm = sum_squares(state.grads.flat()).sqrt() * grad_scale;
    let loss = sums.mean();
    if !loss.is_finite() || !grad_norm.is_finite() {
        return Err(not_finite(
            adapter,
            state,
            loss,
            grad_norm,
            options.learning_rate,
        ));
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
    adamw_step(
        adapter.params.flat_mut(),
        state.grads.flat(),
        state.m.flat_mut(),
        state.v.flat_mut(),
        &adamw,
    );
    Ok(StepOutcome {
        loss,
        grad_norm,
        tokens,
        supervised_tokens: sums.tokens,
    })
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
    state: &OptimizerState,
    loss: f64,
    grad_norm: f64,
    learning_rate: f64,
) -> Error {
    let step = state.step + 1;
    let bad = (0..adapter.params.slots()).find(|&slot| !all_finite(state.grads.view(slot)));
    let place = bad.map_or_else(String::new, |slot| {
        format!("; first bad gradient: {}", adapter.names[slot])
    });
    let cause = if state.step > 0 && !all_finite(adapter.params.flat()) {
        "a trained value is already not finite: the learning rate is far too high, or the checkpoint that the run started from is damaged".to_owned()
    } else {
        probable_cause(state.step, learning_rate)
    };
    Error::Diverged(format!(
        "step {step}: the loss is {loss} and the gradient norm {grad_norm}{place}: {cause}"
    ))
}
