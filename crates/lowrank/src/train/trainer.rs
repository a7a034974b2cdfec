//! A training under way: adapter, optimizer, schedule, metrics and observer in one value that takes a step at a time.
//!
//! [`train`](super::train) drives one from the settings to the finished folder. Whatever has rows and a base of its own drives it itself:
//! [`Trainer::new`] or [`Trainer::resume`], [`advance`](Trainer::advance) until nothing is left, [`finish`](Trainer::finish).

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use lowrank_kernels::{Pauses, Workspace};

use super::batch::{Scoring, balanced};
use super::checkpoint::{self, TrainerState};
use super::evaluate::Evaluation;
use super::events::{Event, Observer};
use super::folder;
use super::groups::Groups;
use super::memory::{choose_saving, most_frugal, peak_rss};
use super::order::StepRows;
use super::outcome::Outcome;
use super::prepare::Trained;
use super::resume;
use super::schedule::Schedule;
use super::step::{OptimizerState, StepOptions, StepOutcome, probable_cause, shared_step};
use super::values::Values;
use crate::Error;
use crate::base::Network;
use crate::data::{Example, Labels, ProblemType};
use crate::lock::check_held;
use crate::model::{Adapter, AdapterSet, Batch, Saving, split, stages_of_slots};
use crate::names::{named, valued};
use crate::objective::LossSum;
use crate::random::{hash, mix};
use crate::ranks::Ranks;
use crate::report::{EvalMetrics, MetricsLine, MetricsWriter, StepMetrics};
use crate::settings::{ClassWeights, TrainConfig};
use crate::tuning::lora::NO_DROPOUT;
use crate::tuning::{self, AdapterConfig, BaseMark};

/// Steps whose losses are averaged for the final figure.
pub(super) const LAST_STEPS: usize = 20;

/// `save_steps` of several ranks where the settings have none: the more machines there are, the sooner one of them fails.
const SAVE_STEPS_OF_RANKS: u64 = 100;
/// `save_total_limit` then.
const SAVED_OF_RANKS: usize = 2;

/// The rows of a training.
#[derive(Clone, Copy)]
pub struct Rows<'a> {
    /// Rows to train on.
    pub train: &'a [Example],
    /// Held-out rows; there may be none.
    pub valid: &'a [Example],
}

/// A training under way.
pub struct Trainer<'a> {
    pub(super) ranks: Ranks<'a>,
    pub(super) config: &'a TrainConfig,
    pub(super) base: &'a Network,
    pub(super) rows: Rows<'a>,
    pub(super) observer: &'a mut dyn Observer,
    pub(super) adapter: Adapter,
    /// What the adapter's files say; `None` for full training.
    pub(super) adapter_config: Option<AdapterConfig>,
    pub(super) optimizer: OptimizerState,
    order: StepRows<'a>,
    schedule: Schedule,
    saving: Saving,
    scoring: Scoring,
    pub(super) pauses: Pauses<'a>,
    pub(super) ws: Workspace,
    pub(super) state: TrainerState,
    /// On rank 0 alone.
    metrics: Option<MetricsWriter>,
    /// Losses of the last steps, at most [`LAST_STEPS`].
    pub(super) last_losses: Vec<f64>,
    /// What it has come to so far.
    pub(super) outcome: Outcome,
}

impl<'a> Trainer<'a> {
    /// A training that begins, in a folder that is made for it; with `overwrite` in place of an earlier run's. Until
    /// [`Event::Begin`] nothing is written.
    ///
    /// # Errors
    /// Settings, rows or a folder that can't be used; too little memory.
    pub fn new(
        config: &'a TrainConfig,
        base: &'a Network,
        trained: Trained,
        rows: Rows<'a>,
        overwrite: bool,
        observer: &'a mut dyn Observer,
    ) -> Result<Self, Error> {
        config.check()?;
        let ranks = Ranks::alone();
        Self::begin(ranks, config, base, trained, rows, overwrite, observer)
    }

    /// [`new`](Self::new) on some ranks, with settings that were checked.
    pub(super) fn begin(
        ranks: Ranks<'a>,
        config: &'a TrainConfig,
        base: &'a Network,
        trained: Trained,
        rows: Rows<'a>,
        overwrite: bool,
        observer: &'a mut dyn Observer,
    ) -> Result<Self, Error> {
        ranks.agree(check(config, rows, base, &trained.adapter))?;
        let mut state = resume::new_state(config, base, rows);
        agree_on(&ranks, config, &state, &trained.adapter)?;
        let (trained, mut optimizer) = own_part(&ranks, base, trained);
        let adapter = &trained.adapter;
        let chosen = choose_saving(&ranks, config, base, adapter, rows.train, None, observer);
        let (saving, teams) = ranks.agree(chosen)?;
        let saving = most_frugal(&ranks, saving)?;
        optimizer.most_teams = teams;
        state.recompute = Some(saving.recompute);
        observer.event(&Event::Begin);
        ranks.on_first(|| {
            folder::begin(config, overwrite)?;
            base.source.write_added_tokens(&config.output)
        })?;
        let parts = (trained, optimizer);
        Self::start(ranks, config, base, parts, rows, (state, saving), observer)
    }

    /// A training that goes on from the newest checkpoint in its folder, or begins if there is none yet.
    ///
    /// # Errors
    /// As [`new`](Self::new); a checkpoint of another base or other rows.
    pub fn resume(
        config: &'a TrainConfig,
        base: &'a Network,
        trained: Trained,
        rows: Rows<'a>,
        observer: &'a mut dyn Observer,
    ) -> Result<Self, Error> {
        config.check()?;
        Self::go_on(Ranks::alone(), config, base, trained, rows, observer)
    }

    /// [`resume`](Self::resume) on some ranks, with settings that were checked.
    pub(super) fn go_on(
        ranks: Ranks<'a>,
        config: &'a TrainConfig,
        base: &'a Network,
        trained: Trained,
        rows: Rows<'a>,
        observer: &'a mut dyn Observer,
    ) -> Result<Self, Error> {
        ranks.agree(check(config, rows, base, &trained.adapter))?;
        let now = resume::new_state(config, base, rows);
        agree_on(&ranks, config, &now, &trained.adapter)?;
        observer.event(&Event::Begin);
        let (mut trained, mut optimizer) = own_part(&ranks, base, trained);
        let values = (&mut trained.adapter, &mut optimizer);
        let mut state = resume::open_state(&ranks, config, now, rows, values, observer)?;
        let (adapter, kept) = (&trained.adapter, state.recompute);
        let chosen = choose_saving(&ranks, config, base, adapter, rows.train, kept, observer);
        let (saving, teams) = ranks.agree(chosen)?;
        let saving = most_frugal(&ranks, saving)?;
        optimizer.most_teams = teams;
        state.recompute = Some(saving.recompute);
        ranks.on_first(|| folder::record_changes(config))?;
        let parts = (trained, optimizer);
        Self::start(ranks, config, base, parts, rows, (state, saving), observer)
    }

    fn start(
        ranks: Ranks<'a>,
        config: &'a TrainConfig,
        base: &'a Network,
        (trained, mut optimizer): (Trained, OptimizerState),
        rows: Rows<'a>,
        (state, saving): (TrainerState, Saving),
        observer: &'a mut dyn Observer,
    ) -> Result<Self, Error> {
        optimizer.groups = Groups::of(config, &trained.adapter)?;
        let Trained {
            adapter,
            config: adapter_config,
        } = trained;
        let opened = ranks.on_first(|| {
            let metrics = resume::open_metrics(config, &state, observer)?;
            let path = folder::metrics_path(&config.output);
            Ok((metrics, resume::last_losses(&path)?))
        })?;
        let (metrics, last_losses) = opened.unzip();
        let total_steps = config.total_steps(rows.train.len());
        let mut trainer = Self {
            order: StepRows::new(config, rows.train),
            schedule: Schedule::of(config, total_steps),
            last_losses: last_losses.unwrap_or_default(),
            outcome: Outcome {
                steps: state.step,
                first_eval_loss: state.first_eval_loss,
                groups: optimizer.groups.words(config, &adapter),
                ..Outcome::planned(config, base, &adapter, total_steps)
            },
            ranks,
            config,
            base,
            rows,
            observer,
            adapter,
            adapter_config,
            optimizer,
            saving,
            scoring: Scoring {
                label_smoothing: config.label_smoothing_factor as f32,
                class_weights: match config.class_weights {
                    None => Vec::new(),
                    Some(ClassWeights::Balanced) => balanced(rows.train, base),
                },
            },
            pauses: Pauses::NONE,
            ws: Workspace::new(),
            state,
            metrics,
        };
        trainer.schedule.warn_of_warmup(trainer.observer);
        trainer.warn_of_idle_ranks();
        trainer.order.announce(trainer.observer);
        for group in &trainer.outcome.groups {
            trainer.observer.event(&Event::Note(group.clone()));
        }
        trainer.observer.event(&Event::Start {
            total_steps,
            done_steps: trainer.state.step,
            trainable_parameters: trainer.outcome.trainable_parameters,
            base_parameters: trainer.outcome.base_parameters,
        });
        Ok(trainer)
    }

    /// Says where a step has too few pieces for all replicas.
    fn warn_of_idle_ranks(&mut self) {
        let (replicas, batches) = (
            self.ranks.replicas(),
            self.config.gradient_accumulation_steps,
        );
        let rows = self.rows.train;
        let tokens: usize = rows.iter().map(|row| row.ids.len()).sum();
        let of_batch = self.config.batch_size.min(rows.len()) * tokens / rows.len().max(1);
        let model = self.base.decoder.config();
        let of_batch = Batch::pieces(model, self.adapter.parameters(), of_batch);
        let pieces = batches * of_batch.min(self.config.batch_size);
        if pieces >= replicas {
            return;
        }
        let each = self.ranks.stages();
        let of = if pieces > batches {
            format!(" of about {pieces} pieces")
        } else {
            String::new()
        };
        self.observer.event(&Event::Note(format!(
            "warning: {} of {} ranks have nothing to do: a step has {batches} micro-batch{}{of}, and a rank takes whole ones; set {accumulation} (and a smaller {batch_size}, so that a step has as many rows as before)",
            (replicas - pieces) * each,
            replicas * each,
            if batches == 1 { "" } else { "es" },
            accumulation = valued("gradient_accumulation_steps", replicas),
            batch_size = named("batch_size"),
        )));
    }

    /// Lets something be done between the parts of steps and evaluations, such as answering requests. What is trained does not depend on it;
    /// held-out losses may differ in their last bits from those of a training without pauses.
    #[must_use]
    pub fn with_pauses(mut self, pauses: Pauses<'a>) -> Self {
        self.pauses = pauses;
        self
    }

    /// What is trained, as it is now.
    pub fn adapter(&self) -> &Adapter {
        &self.adapter
    }

    /// Optimizer steps taken.
    pub fn steps(&self) -> u64 {
        self.state.step
    }

    /// Optimizer steps planned.
    pub fn total_steps(&self) -> u64 {
        self.schedule.total_steps
    }

    /// Takes all steps, or as many as there are before `stop`, and writes the folder's files.
    ///
    /// # Errors
    /// As [`advance`](Self::advance) and [`finish`](Self::finish).
    pub fn run(mut self, stop: &AtomicBool) -> Result<Outcome, Error> {
        while self.advance(stop)? {}
        self.finish()
    }

    /// Takes the next step, and evaluates and writes a checkpoint where the settings say so after it; before the first one the
    /// held-out loss of the start is taken. Whether there is more to do: not after the last step, nor where the run stops early, nor
    /// after `stop`, which leaves a checkpoint.
    ///
    /// # Errors
    /// A loss that is not finite; a file that can't be written.
    pub fn advance(&mut self, stop: &AtomicBool) -> Result<bool, Error> {
        if self.state.step == 0 && self.state.first_eval_loss.is_none() && self.has_valid() {
            self.state.first_eval_loss = self.evaluate_unless(Some(stop))?;
            self.outcome.first_eval_loss = self.state.first_eval_loss;
            if self.state.first_eval_loss.is_none() {
                self.outcome.interrupted = true;
                return Ok(false);
            }
        }
        // The last checkpoint may be that of the very step after which the run stopped early.
        if self.is_done() || self.stops_early() {
            return Ok(false);
        }
        let (_, asked) = self.step_until(Some(stop))?;
        let mut save = self.is_due(self.save_steps());
        if self.has_valid() && (self.is_done() || self.is_due(self.config.eval_steps)) {
            let improved = self.evaluate()?;
            save |= improved && self.config.load_best_model_at_end;
        }
        let stops_early = self.stops_early();
        // Several ranks stop together, as they have agreed in the step.
        let asked = asked || (!self.ranks.are_several() && stop.load(Ordering::Relaxed));
        let interrupted = !self.is_done() && !stops_early && asked;
        self.outcome.interrupted = interrupted;
        if save || interrupted {
            self.checkpoint()?;
        }
        Ok(!self.is_done() && !stops_early && !interrupted)
    }

    fn save_steps(&self) -> Option<u64> {
        let of_ranks = self.ranks.are_several().then_some(SAVE_STEPS_OF_RANKS);
        self.config.save_steps.or(of_ranks)
    }

    fn save_total_limit(&self) -> Option<usize> {
        let of_ranks = self.ranks.are_several() && self.config.save_steps.is_none();
        let of_ranks = of_ranks.then_some(SAVED_OF_RANKS);
        self.config.save_total_limit.or(of_ranks)
    }

    fn is_done(&self) -> bool {
        self.state.step >= self.schedule.total_steps
    }

    fn has_valid(&self) -> bool {
        !self.rows.valid.is_empty()
    }

    /// Whether something is to be done after this step that is done every so many, and at the end.
    fn is_due(&self, every: Option<u64>) -> bool {
        every.is_some_and(|every| self.is_done() || self.state.step.is_multiple_of(every))
    }

    /// Passes over the rows by the end of so many steps.
    fn epoch_after(&self, steps: u64) -> f64 {
        steps as f64 / self.order.steps_per_epoch() as f64
    }

    fn options(&self) -> StepOptions<'a> {
        let config = self.config;
        StepOptions {
            learning_rate: self.schedule.at(self.state.step),
            betas: (config.adam_beta1, config.adam_beta2),
            epsilon: config.adam_epsilon,
            weight_decay: config.weight_decay,
            max_grad_norm: config.max_grad_norm,
            scoring: self.scoring.clone(),
            batch_size: config.batch_size,
            share_prompts: config.share_prompts,
            saving: self.saving,
            compute_dtype: self.config.compute_format().into(),
            seed: mix(config.seed, 2),
            pauses: self.pauses,
        }
    }

    /// Takes one optimizer step and writes its line of metrics.
    ///
    /// # Errors
    /// A loss or gradient that is not finite; metrics that can't be written.
    pub fn step(&mut self) -> Result<StepOutcome, Error> {
        Ok(self.step_until(None)?.0)
    }

    /// The same; the second value says whether any rank is asked to stop.
    fn step_until(&mut self, stop: Option<&AtomicBool>) -> Result<(StepOutcome, bool), Error> {
        let begun = Instant::now();
        let (rows, options) = (self.order.rows(self.state.step), self.options());
        let (done, stops) = shared_step(
            &self.ranks,
            &self.base.decoder,
            &mut self.adapter,
            &mut self.optimizer,
            &rows,
            &options,
            &self.ws,
            || stop.is_some_and(|stop| stop.load(Ordering::Relaxed)),
        )
        .map_err(|error| self.with_last_good(error))?;
        let seconds = begun.elapsed().as_secs_f64();
        self.state.step += 1;
        let outcome = &mut self.outcome;
        outcome.steps = self.state.step;
        outcome.tokens += done.tokens as u64;
        outcome.seconds += seconds;
        self.last_losses.push(done.loss);
        if self.last_losses.len() > LAST_STEPS {
            self.last_losses.remove(0);
        }
        let line = StepMetrics {
            step: self.state.step,
            epoch: self.epoch_after(self.state.step),
            loss: done.loss,
            learning_rate: options.learning_rate,
            grad_norm: done.grad_norm,
            tokens: done.tokens as u64,
            supervised_tokens: done.supervised_tokens as u64,
            tokens_per_second: done.tokens as f64 / seconds.max(f64::EPSILON),
            peak_rss: peak_rss(),
        };
        self.write_line(&line.clone().into())?;
        self.observer.event(&Event::Step(line));
        Ok((done, stops))
    }

    /// Evaluates the held-out rows after a step; whether their loss is the lowest so far.
    ///
    /// # Errors
    /// A loss that is not finite; metrics that can't be written.
    pub fn evaluate(&mut self) -> Result<bool, Error> {
        // Never stopped: a resumed run would not evaluate after this step again.
        let Some(loss) = self.evaluate_unless(None)? else {
            return Ok(false);
        };
        let improved = self.state.best.is_none_or(|(best, _)| loss < best);
        if improved {
            self.state.best = Some((loss, self.state.step));
            self.state.evaluations_without_best = 0;
        } else {
            self.state.evaluations_without_best += 1;
        }
        Ok(improved)
    }

    /// The held-out loss; `None` where `stop` ended the evaluation.
    fn evaluate_unless(&mut self, stop: Option<&AtomicBool>) -> Result<Option<f64>, Error> {
        let stopped = || stop.is_some_and(|stop| stop.load(Ordering::Relaxed));
        let Some(sums) = self.loss_of(self.rows.valid, stopped)? else {
            return Ok(None);
        };
        if !sums.mean().is_finite() {
            return Err(self.not_finite("held-out loss", sums.mean()));
        }
        let line = EvalMetrics {
            step: self.state.step,
            epoch: self.epoch_after(self.state.step),
            eval_loss: sums.mean(),
            eval_accuracy: Some(sums.correct as f64 / sums.tokens as f64),
            eval_supervised_tokens: Some(sums.tokens as u64),
        };
        self.write_line(&line.clone().into())?;
        self.observer.event(&Event::Eval(line));
        Ok(Some(sums.mean()))
    }

    /// The losses of rows, as long as no rank stops.
    pub(super) fn loss_of(
        &self,
        rows: &[Example],
        stops: impl Fn() -> bool,
    ) -> Result<Option<LossSum>, Error> {
        let set = [&self.adapter];
        let evaluation = Evaluation {
            model: &self.base.decoder,
            adapters: AdapterSet::new(&set),
            adapter: Some(0),
            pauses: self.pauses,
            ws: &self.ws,
        };
        evaluation.on(&self.ranks, rows, stops)
    }

    /// The trained values, wherever they are held.
    pub(super) fn values(&self) -> Values<'_> {
        Values {
            ranks: &self.ranks,
            adapter: &self.adapter,
            optimizer: &self.optimizer,
        }
    }

    /// Adds a line of metrics on rank 0. A file that was deleted meanwhile is begun anew, as long as the folder is still this run's.
    fn write_line(&mut self, line: &MetricsLine) -> Result<(), Error> {
        let Some(metrics) = &mut self.metrics else {
            return Ok(());
        };
        if !metrics.is_in_place() {
            let run = &self.config.output;
            check_held(run)?;
            let path = folder::metrics_path(run);
            *metrics = MetricsWriter::create(&path)?;
            self.observer.event(&Event::Note(format!(
                "warning: {} was deleted or moved away; it begins anew with step {}, and the report lacks what was before",
                path.display(),
                line.step()
            )));
        }
        Ok(metrics.write(line)?)
    }

    /// Whether the run ends before its last step, since the held-out loss no longer falls; said once.
    fn stops_early(&mut self) -> bool {
        let without = self.state.evaluations_without_best;
        let patience = self.config.early_stopping_patience;
        let stopping = !self.is_done() && patience.is_some_and(|patience| without >= patience);
        if stopping && !std::mem::replace(&mut self.outcome.stopped_early, true) {
            self.observer.event(&Event::Note(format!(
                "stopping early: {without} evaluations without a lower eval_loss"
            )));
        }
        stopping
    }

    /// Writes a checkpoint of this step, and deletes those that are not to be kept.
    ///
    /// # Errors
    /// A file that can't be written; a folder that is no longer this run's.
    pub fn checkpoint(&mut self) -> Result<(), Error> {
        let run = &self.config.output;
        let folder = self.values().on_first(|values| {
            check_held(run)?;
            let folder = checkpoint::write(run, values, &self.state, |folder| {
                self.save_adapter(values, folder)
            })
            .map_err(|error| self.with_last_good(error))?;
            if let Some(limit) = self.save_total_limit() {
                let best = self.state.best;
                let best = best.filter(|_| self.config.load_best_model_at_end);
                checkpoint::prune(run, limit, best.map(|(_, step)| step))?;
            }
            Ok(folder)
        })?;
        if let Some(folder) = folder {
            self.observer.event(&Event::Checkpoint(folder));
        }
        Ok(())
    }

    /// Writes the adapter's files, on rank 0; full training has none.
    pub(super) fn save_adapter(&self, values: &Values<'_>, folder: &Path) -> Result<(), Error> {
        let Some(config) = &self.adapter_config else {
            return Ok(());
        };
        let whole;
        let adapter = if self.ranks.stages() == 1 {
            &self.adapter
        } else {
            whole = values.whole_adapter()?;
            &whole
        };
        let labels = self.base.labels.as_ref();
        let labels = labels.map(|labels| serde_json::json!(labels).to_string());
        let base = BaseMark {
            name: &self.config.model,
            fingerprint: &self.state.base,
            labels: labels.as_deref(),
        };
        let model = self.base.decoder.config();
        tuning::save(folder, model, config, adapter, base)?;
        self.base.source.write_added_tokens(folder)
    }

    /// The error for a loss that the weights of the current step give.
    pub(super) fn not_finite(&self, what: &str, loss: f64) -> Error {
        let step = self.state.step;
        let cause = probable_cause(step, self.config.learning_rate);
        self.with_last_good(Error::Diverged(format!(
            "after step {step} the {what} is {loss}: {cause}"
        )))
    }

    /// A run that fails tells where it can be taken up again. A checkpoint of the current step is left out: it holds the
    /// very values that failed, or is the one that could not be written.
    pub(super) fn with_last_good(&self, error: Error) -> Error {
        // Rank 0 tells it.
        if !self.ranks.is_first() {
            return error;
        }
        let steps = checkpoint::steps(&self.config.output);
        let last = steps.into_iter().rfind(|step| *step < self.state.step);
        let rescue = last.map_or_else(
            || "no checkpoint was written before it".to_owned(),
            |step| {
                format!(
                    "the last good checkpoint is {}",
                    checkpoint::step_folder(&self.config.output, step).display()
                )
            },
        );
        let message = format!("{error}; {rescue}");
        match error {
            Error::Diverged(_) => Error::Diverged(message),
            Error::Agreed(_) => Error::Training(message).agreed(),
            _ => Error::Training(message),
        }
    }
}

/// Refuses ranks that would train something else than rank 0.
fn agree_on(
    ranks: &Ranks<'_>,
    config: &TrainConfig,
    state: &TrainerState,
    adapter: &Adapter,
) -> Result<(), Error> {
    if !ranks.are_several() {
        return Ok(());
    }
    let rows = |mark: &checkpoint::DataMark| {
        format!(
            "({} rows, {} tokens, {})",
            mark.rows, mark.tokens, mark.hash
        )
    };
    let mark = state.base_mark.clone().unwrap_or_default();
    let named = [
        ("version", env!("CARGO_PKG_VERSION").to_owned()),
        ("program file", program_mark()),
        ("training data", rows(&state.data)),
        ("held-out data", rows(&state.valid)),
        ("base", state.base.clone()),
        ("config.json of the base", mark.config),
        ("weights of the base", mark.weights),
    ];
    let named = named.map(|(what, mark)| (what.to_owned(), mark));
    let mut marks: Vec<_> = config.marks().into_iter().chain(named).collect();
    // A stage of a pipeline may have no first values of another one, unless they were read from a file.
    if ranks.stages() == 1 || config.init_adapter.is_some() {
        let first = hash(bytemuck::cast_slice(adapter.params.as_slice()));
        let what = if config.init_adapter.is_some() {
            "init_adapter's values"
        } else {
            "first trained values"
        };
        marks.push((what.to_owned(), format!("{first:016x}")));
    }
    ranks.same(&marks)
}

/// A hash of the program's own file: two builds of one version may compute otherwise.
fn program_mark() -> String {
    let program = std::env::current_exe().and_then(std::fs::read);
    program.map_or_else(
        |_| "unknown".to_owned(),
        |bytes| format!("{:016x}", hash(&bytes)),
    )
}

/// What this rank holds of the trained values, with room for its share of their moments.
fn own_part(ranks: &Ranks<'_>, base: &Network, trained: Trained) -> (Trained, OptimizerState) {
    let mut trained = trained;
    let adapter = &mut trained.adapter;
    let stages = if ranks.stages() == 1 {
        vec![vec![0]; adapter.params.slots()]
    } else {
        let config = base.decoder.config();
        let stages = split(config, adapter, ranks.stages()).unwrap_or_default();
        let of_slots = stages_of_slots(config, adapter, &stages);
        let stage = ranks.stage();
        let is_own = |slot: usize| of_slots[slot].contains(&stage);
        adapter.params = adapter.params.cut(is_own);
        adapter.initial = adapter.initial.as_ref().map(|initial| initial.cut(is_own));
        of_slots
    };
    let optimizer = OptimizerState::of(ranks, adapter, stages);
    (trained, optimizer)
}

/// Checks settings and rows together.
fn check(
    config: &TrainConfig,
    rows: Rows<'_>,
    base: &Network,
    adapter: &Adapter,
) -> Result<(), Error> {
    if rows.train.is_empty() {
        return Err(Error::Settings("there is no row to train on".to_owned()));
    }
    // Other settings that need them need this one.
    if rows.valid.is_empty() && config.eval_steps.is_some() {
        return Err(Error::Settings(format!(
            "eval_steps needs held-out rows: put a valid.jsonl (or validation, val, eval or dev.jsonl) beside train.jsonl, or give {valid_data}",
            valid_data = valued("valid_data", "FILE")
        )));
    }
    check_dropout(adapter)?;
    Groups::of(config, adapter)?;
    check_task(config, base.labels.as_ref())?;
    let all = rows.train.iter().chain(rows.valid);
    let longest = all.map(|row| row.ids.len()).max().unwrap_or(0);
    check_length(base, adapter, longest)
}

/// Refuses dropout beside magnitudes, which an adapter to start from may have.
fn check_dropout(adapter: &Adapter) -> Result<(), Error> {
    let drops = |id| {
        let branches = adapter.low_rank.get(id).into_iter().flatten();
        branches.into_iter().any(|branch| branch.dropout > 0.0)
    };
    if !adapter.magnitudes.keys().any(drops) {
        return Ok(());
    }
    Err(Error::Settings(format!(
        "lora_dropout goes without use_dora, which the adapter to start from has: {NO_DROPOUT}; leave {dropout} out",
        dropout = named("lora_dropout")
    )))
}

/// Refuses settings that mean nothing to what the rows teach.
///
/// # Errors
/// Every such setting, by its key.
pub fn check_task(config: &TrainConfig, labels: Option<&Labels>) -> Result<(), Error> {
    let has_classes =
        labels.is_some_and(|labels| labels.problem_type == ProblemType::SingleLabelClassification);
    let of_classes = "goes with rows of which each has one label";
    let of_prompts = "goes with prompts and completions, and these rows have labels";
    let problems: Vec<String> = [
        (
            "class_weights",
            config.class_weights.is_some() && !has_classes,
            of_classes,
        ),
        (
            "label_smoothing_factor",
            config.label_smoothing_factor > 0.0 && labels.is_some() && !has_classes,
            of_classes,
        ),
        (
            "share_prompts",
            config.share_prompts && labels.is_some(),
            of_prompts,
        ),
        (
            "train_on_prompt",
            config.train_on_prompt && labels.is_some(),
            of_prompts,
        ),
    ]
    .into_iter()
    .filter(|(_, means_nothing, _)| *means_nothing)
    .map(|(key, _, why)| format!("{key} {why}; leave it out"))
    .collect();
    if problems.is_empty() {
        Ok(())
    } else {
        Err(Error::Settings(problems.join("\n")))
    }
}

/// Refuses rows that the model's context has no room for beside the adapter's virtual tokens.
fn check_length(base: &Network, adapter: &Adapter, longest: usize) -> Result<(), Error> {
    let taken = adapter.virtual_tokens().total();
    let limit = base.decoder.config().longest_sequence();
    let room = limit.saturating_sub(taken);
    if longest <= room {
        return Ok(());
    }
    let of_them = match taken {
        0 => String::new(),
        _ => format!(", {taken} of them virtual"),
    };
    Err(Error::Settings(format!(
        "the longest row has {longest} tokens and the model was made for {limit}{of_them}; set {max_seq_length} to cut rows there",
        max_seq_length = valued("max_seq_length", room)
    )))
}
