//! The run: from settings to a folder that PEFT loads.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use lowrank_kernels::Workspace;

use super::checkpoint::{self, TrainerState};
use super::config::TrainConfig;
use super::evaluate::{evaluate, evaluate_rows};
use super::events::{Event, Observer, Silent};
use super::folder;
use super::memory::{check_room, choose_saving, peak_rss};
use super::order::StepRows;
use super::prepare::{Trained, prepare};
use super::resume;
use super::schedule::Schedule;
use super::step::{OptimizerState, StepOptions, StepOutcome, optimizer_step, probable_cause};
use crate::Error;
use crate::base::{Base, Network, Source};
use crate::data::{DataOptions, Dataset, Example, Split, split_file};
use crate::lock::{FolderLock, check_held};
use crate::model::Saving;
use crate::model::{Adapter, AdapterSet};
use crate::random::mix;
use crate::report::{EvalMetrics, MetricsLine, MetricsWriter, StepMetrics};
use crate::tuning::{self, AdapterConfig, BaseMark, full};

/// Steps whose losses are averaged for the final figure.
pub(super) const LAST_STEPS: usize = 20;

/// How a run begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// In a new folder, or in place of an earlier run's.
    Fresh {
        /// Whether an earlier run's folder is replaced.
        overwrite: bool,
    },
    /// From the newest checkpoint of the run in the output folder.
    Resume,
}

/// What a run came to.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
pub struct Outcome {
    /// The run's folder.
    pub output: PathBuf,
    /// The run had been finished before, and nothing was done.
    pub already_finished: bool,
    /// Optimizer steps taken in all.
    pub steps: u64,
    /// Optimizer steps planned.
    pub total_steps: u64,
    /// Stopped by the user before the end; a checkpoint was written.
    pub interrupted: bool,
    /// Stopped because the held-out loss no longer fell.
    pub stopped_early: bool,
    /// Values trained.
    pub trainable_parameters: usize,
    /// Parameters of the base.
    pub base_parameters: usize,
    /// Mean loss of the last steps.
    pub train_loss: Option<f64>,
    /// Held-out loss before the first step.
    pub first_eval_loss: Option<f64>,
    /// Held-out loss of what was saved.
    pub eval_loss: Option<f64>,
    /// Tokens computed by this process.
    pub tokens: u64,
    /// Seconds of this process's steps.
    pub seconds: f64,
    /// Largest resident memory, bytes.
    pub peak_rss: u64,
}

impl Outcome {
    /// What is known before the first step.
    fn planned(config: &TrainConfig, base: &Network, adapter: &Adapter, total_steps: u64) -> Self {
        Self {
            output: config.output.clone(),
            trainable_parameters: adapter.parameters(),
            base_parameters: base.decoder.config().parameters(),
            total_steps,
            ..Self::default()
        }
    }
}

/// Runs a training from its settings and writes its folder, in which no other run may be at work. `stop` ends it after
/// the step under way.
///
/// # Errors
/// Settings, files or data that can't be used; a loss that is not finite; a file that can't be written.
pub fn train(
    config: &TrainConfig,
    start: Start,
    observer: &mut dyn Observer,
    stop: &AtomicBool,
) -> Result<Outcome, Error> {
    check_settings(config)?;
    let find_base = || Source::find(&config.model);
    if start != Start::Resume {
        find_base()?;
    }
    FolderLock::refuse_busy(&config.output)?;
    let config = &TrainConfig {
        began: folder::check(config, start)?,
        ..config.clone()
    };
    if start == Start::Resume
        && let Some(outcome) = resume::finished(config)
    {
        observer.event(&Event::Note(resume::finished_note(config, &outcome)));
        return Ok(outcome);
    }
    let source = find_base()?;
    // The same but for where an adapter to start from is found.
    let begins = &adapter_in_checkpoint(config, start).unwrap_or_else(|| config.clone());
    let model = source.model_config()?;
    let loading = source.loading_bytes(&model, config.base_dtype.into());
    check_room(begins, &model, loading)?;
    let (_lock, warning) = FolderLock::take(&config.output)?;
    if let Some(warning) = warning {
        observer.event(&Event::Note(warning));
    }
    let mut base = source.load(config.base_dtype.into())?;
    if let Some(began) = &config.began {
        base.tokenizer.set_date(began.time);
    }
    let options = DataOptions {
        max_seq_length: config.max_seq_length,
        train_on_prompt: config.train_on_prompt,
        on_bad_row: config.on_bad_row,
        completion_boundary: config.completion_boundary,
    };
    let data = Dataset::load(&config.data, Split::Train, &base.tokenizer, &options)?;
    observer.event(&Event::Note(data.report.to_string()));
    let valid = load_valid(config, &base, &options)?;
    if let Some(valid) = &valid {
        observer.event(&Event::Note(valid.report.to_string()));
    }
    check(config, valid.as_ref())?;
    let network = base.into_network();
    if start == Start::Resume {
        resume::check_base(config, &network)?;
    }
    let trained = prepare(begins, &network, &data.examples, observer)?;
    let longest = data
        .report
        .longest
        .max(valid.as_ref().map_or(0, |v| v.report.longest));
    check_length(&network, &trained.adapter, longest)?;
    if matches!(start, Start::Fresh { .. }) {
        // A run that cannot fit leaves no folder behind.
        let (adapter, rows) = (&trained.adapter, &data.examples);
        choose_saving(config, &network, adapter, rows, None, &mut Silent)?;
    }
    observer.event(&Event::Begin);
    if matches!(start, Start::Fresh { .. }) {
        folder::begin(config, start)?;
    }
    let valid = valid.map(|valid| valid.examples).unwrap_or_default();
    let outcome = fit(
        config,
        &network,
        trained,
        &data.examples,
        &valid,
        start,
        observer,
        stop,
    )?;
    Ok(outcome)
}

/// The settings of a resumed run whose `init_adapter` is gone: the newest checkpoint has its options, and the values are
/// read from there in any case.
fn adapter_in_checkpoint(config: &TrainConfig, start: Start) -> Option<TrainConfig> {
    let folder = config.init_adapter.as_ref()?;
    if start != Start::Resume || folder.exists() {
        return None;
    }
    let steps = checkpoint::steps(&config.output).into_iter().rev();
    let found = steps
        .map(|step| checkpoint::step_folder(&config.output, step))
        .find(|folder| checkpoint::has_adapter(folder))?;
    Some(TrainConfig {
        init_adapter: Some(found),
        ..config.clone()
    })
}

fn load_valid(
    config: &TrainConfig,
    base: &Base,
    options: &DataOptions,
) -> Result<Option<Dataset>, Error> {
    if let Some(path) = &config.valid_data {
        let split = if path.is_dir() {
            Split::Valid
        } else {
            Split::File
        };
        return Ok(Some(Dataset::load(path, split, &base.tokenizer, options)?));
    }
    match split_file(&config.data, Split::Valid)? {
        Some(_) => Ok(Some(Dataset::load(
            &config.data,
            Split::Valid,
            &base.tokenizer,
            options,
        )?)),
        None => Ok(None),
    }
}

fn check_settings(config: &TrainConfig) -> Result<(), Error> {
    let problems = config.problems();
    if problems.is_empty() {
        Ok(())
    } else {
        Err(Error::Settings(problems.join("\n")))
    }
}

fn check(config: &TrainConfig, valid: Option<&Dataset>) -> Result<(), Error> {
    let needs_valid = [
        (config.eval_steps.is_some(), "eval_steps"),
        (config.load_best_model_at_end, "load_best_model_at_end"),
        (
            config.early_stopping_patience.is_some(),
            "early_stopping_patience",
        ),
    ];
    if valid.is_none()
        && let Some((_, key)) = needs_valid.iter().find(|(set, _)| *set)
    {
        return Err(Error::Settings(format!(
            "{key} needs held-out rows: put a valid.jsonl (or validation, val, eval or dev.jsonl) beside train.jsonl, or give --valid-data FILE"
        )));
    }
    Ok(())
}

/// Refuses rows that the model's context has no room for beside the adapter's virtual tokens.
fn check_length(base: &Network, adapter: &Adapter, longest: usize) -> Result<(), Error> {
    let taken = adapter.virtual_tokens().total();
    let limit = base.decoder.config().max_position_embeddings;
    let room = limit.saturating_sub(taken);
    if longest <= room {
        return Ok(());
    }
    let of_them = match taken {
        0 => String::new(),
        _ => format!(", {taken} of them virtual"),
    };
    Err(Error::Settings(format!(
        "the longest row has {longest} tokens and the model was made for {limit}{of_them}; set --max-seq-length {room} to cut rows there"
    )))
}

/// The state of the loop.
struct Loop<'a> {
    config: &'a TrainConfig,
    base: &'a Network,
    adapter_config: Option<&'a AdapterConfig>,
    saving: Saving,
    valid: &'a [Example],
    ws: Workspace,
    state: TrainerState,
    metrics: MetricsWriter,
}

/// Trains on examples that are already loaded, in a prepared output folder, and writes the folder's files.
///
/// # Errors
/// As [`train`].
pub fn fit(
    config: &TrainConfig,
    base: &Network,
    trained: Trained,
    examples: &[Example],
    valid: &[Example],
    start: Start,
    observer: &mut dyn Observer,
    stop: &AtomicBool,
) -> Result<Outcome, Error> {
    check_settings(config)?;
    if examples.is_empty() {
        return Err(Error::Settings("there is no row to train on".to_owned()));
    }
    let Trained {
        mut adapter,
        config: adapter_config,
    } = trained;
    let mut optimizer = OptimizerState::new(&adapter);
    let total_steps = config.total_steps(examples.len());
    let mut step_rows = StepRows::new(config, examples);
    let mut state = resume::open_state(
        config,
        base,
        (examples, valid),
        start == Start::Resume,
        (&mut adapter, &mut optimizer),
        observer,
    )?;
    let saving = choose_saving(config, base, &adapter, examples, state.recompute, observer)?;
    state.recompute = Some(saving.recompute);
    if start == Start::Resume {
        folder::record_changes(config)?;
    }
    let metrics = resume::open_metrics(config, &state, observer)?;
    let mut last_losses = resume::last_losses(&folder::metrics_path(&config.output))?;
    let mut run = Loop {
        config,
        base,
        adapter_config: adapter_config.as_ref(),
        saving,
        valid,
        ws: Workspace::new(),
        state,
        metrics,
    };
    let schedule = run.schedule(total_steps);
    warn_of_warmup(schedule, observer);
    let mut outcome = Outcome::planned(config, base, &adapter, total_steps);
    step_rows.announce(observer);
    observer.event(&Event::Start {
        total_steps,
        done_steps: run.state.step,
        trainable_parameters: outcome.trainable_parameters,
        base_parameters: outcome.base_parameters,
    });
    if run.state.step == 0 && !valid.is_empty() {
        run.state.first_eval_loss = run.evaluate(&adapter, 0.0, Some(stop), observer)?;
        outcome.interrupted = run.state.first_eval_loss.is_none();
    }

    // Its last checkpoint may be that of the very step after which it stopped.
    let more = run.state.step < total_steps;
    outcome.stopped_early = more && run.has_no_patience(observer);
    while run.state.step < total_steps && !outcome.interrupted && !outcome.stopped_early {
        let step = run.state.step;
        let rows = step_rows.rows(step);
        let options = run.step_options(schedule.at(step));
        let epochs = (step + 1) as f64 / step_rows.steps_per_epoch() as f64;
        let (done, seconds) = run.step(
            &mut adapter,
            &mut optimizer,
            &rows,
            &options,
            epochs,
            observer,
        )?;
        outcome.tokens += done.tokens as u64;
        outcome.seconds += seconds;
        last_losses.push(done.loss);
        if last_losses.len() > LAST_STEPS {
            last_losses.remove(0);
        }
        let last = run.state.step == total_steps;
        let due = |every: Option<u64>| {
            every.is_some_and(|every| last || run.state.step.is_multiple_of(every))
        };
        let mut save = due(config.save_steps);
        if !valid.is_empty() && (last || due(config.eval_steps)) {
            let best = run.evaluate_and_compare(&adapter, epochs, observer)?;
            save |= best && config.load_best_model_at_end;
        }
        outcome.stopped_early = !last && run.has_no_patience(observer);
        outcome.interrupted = !last && !outcome.stopped_early && stop.load(Ordering::Relaxed);
        if save || outcome.interrupted {
            run.checkpoint(&adapter, &optimizer, observer)?;
        }
        if outcome.stopped_early || outcome.interrupted {
            break;
        }
    }
    outcome.steps = run.state.step;
    outcome.first_eval_loss = run.state.first_eval_loss;
    outcome.train_loss = mean(&last_losses);
    if !outcome.interrupted {
        if valid.is_empty() {
            run.check_result(&adapter, examples)?;
        }
        run.finish(&mut adapter, &mut outcome, observer)?;
    }
    run.report(&mut outcome, observer)?;
    Ok(outcome)
}

fn warn_of_warmup(schedule: Schedule, observer: &mut dyn Observer) {
    let Schedule {
        warmup_steps,
        total_steps,
        learning_rate,
        ..
    } = schedule;
    if warmup_steps >= total_steps {
        observer.event(&Event::Note(format!(
            "warning: the warm-up takes {warmup_steps} steps and the run {total_steps}, so the learning rate never reaches {learning_rate}"
        )));
    }
}

impl Loop<'_> {
    fn schedule(&self, total_steps: u64) -> Schedule {
        let config = self.config;
        let warmup_steps = if config.warmup_steps > 0 {
            config.warmup_steps
        } else {
            (config.warmup_ratio * total_steps as f64).ceil() as u64
        };
        Schedule {
            kind: config.lr_scheduler_type,
            learning_rate: config.learning_rate,
            warmup_steps,
            total_steps,
        }
    }

    fn step_options(&self, learning_rate: f64) -> StepOptions {
        let config = self.config;
        StepOptions {
            learning_rate,
            betas: (config.adam_beta1, config.adam_beta2),
            epsilon: config.adam_epsilon,
            weight_decay: config.weight_decay,
            max_grad_norm: config.max_grad_norm,
            label_smoothing: config.label_smoothing_factor,
            batch_size: config.batch_size,
            share_prompts: config.share_prompts,
            saving: self.saving,
            seed: mix(config.seed, 2),
        }
    }

    /// The held-out loss; `None` where `stop` ended the evaluation.
    fn evaluate(
        &mut self,
        adapter: &Adapter,
        epoch: f64,
        stop: Option<&AtomicBool>,
        observer: &mut dyn Observer,
    ) -> Result<Option<f64>, Error> {
        let set = [adapter];
        let stopped = || stop.is_some_and(|stop| stop.load(Ordering::Relaxed));
        let sums = evaluate_rows(
            &self.base.decoder,
            AdapterSet::new(&set),
            Some(0),
            self.valid,
            &self.ws,
            |_| {
                if stopped() {
                    ControlFlow::Break(())
                } else {
                    ControlFlow::Continue(())
                }
            },
        );
        if stopped() {
            return Ok(None);
        }
        if !sums.mean().is_finite() {
            return Err(self.not_finite("held-out loss", sums.mean()));
        }
        let line = EvalMetrics {
            step: self.state.step,
            epoch,
            eval_loss: sums.mean(),
            eval_accuracy: Some(sums.correct as f64 / sums.tokens as f64),
            eval_supervised_tokens: Some(sums.tokens as u64),
        };
        self.write_line(&line.clone().into(), observer)?;
        observer.event(&Event::Eval(line));
        Ok(Some(sums.mean()))
    }

    /// One optimizer step with its line of metrics, and the seconds it took.
    fn step(
        &mut self,
        adapter: &mut Adapter,
        optimizer: &mut OptimizerState,
        rows: &[&Example],
        options: &StepOptions,
        epoch: f64,
        observer: &mut dyn Observer,
    ) -> Result<(StepOutcome, f64), Error> {
        let begun = Instant::now();
        let model = &self.base.decoder;
        let done = optimizer_step(model, adapter, optimizer, rows, options, &self.ws)
            .map_err(|error| self.with_last_good(&error))?;
        let seconds = begun.elapsed().as_secs_f64();
        self.state.step += 1;
        let line = StepMetrics {
            step: self.state.step,
            epoch,
            loss: done.loss,
            learning_rate: options.learning_rate,
            grad_norm: done.grad_norm,
            tokens: done.tokens as u64,
            supervised_tokens: done.supervised_tokens as u64,
            tokens_per_second: done.tokens as f64 / seconds.max(f64::EPSILON),
            peak_rss: peak_rss(),
        };
        self.write_line(&line.clone().into(), observer)?;
        observer.event(&Event::Step(line));
        Ok((done, seconds))
    }

    /// Adds a line of metrics. A file that was deleted meanwhile is begun anew, as long as the folder is still this run's.
    fn write_line(&mut self, line: &MetricsLine, observer: &mut dyn Observer) -> Result<(), Error> {
        if !self.metrics.is_in_place() {
            let run = &self.config.output;
            check_held(run)?;
            let path = folder::metrics_path(run);
            self.metrics = MetricsWriter::create(&path)?;
            observer.event(&Event::Note(format!(
                "warning: {} was deleted or moved away; it begins anew with step {}, and the report lacks what was before",
                path.display(),
                line.step()
            )));
        }
        Ok(self.metrics.write(line)?)
    }

    /// Evaluates after a step; whether that is the best loss so far.
    fn evaluate_and_compare(
        &mut self,
        adapter: &Adapter,
        epoch: f64,
        observer: &mut dyn Observer,
    ) -> Result<bool, Error> {
        // Never stopped: a resumed run would not evaluate after this step again.
        let Some(loss) = self.evaluate(adapter, epoch, None, observer)? else {
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

    fn has_no_patience(&self, observer: &mut dyn Observer) -> bool {
        let without = self.state.evaluations_without_best;
        let patience = self.config.early_stopping_patience;
        let stopping = patience.is_some_and(|patience| without >= patience);
        if stopping {
            observer.event(&Event::Note(format!(
                "stopping early: {without} evaluations without a lower eval_loss"
            )));
        }
        stopping
    }

    fn checkpoint(
        &self,
        adapter: &Adapter,
        optimizer: &OptimizerState,
        observer: &mut dyn Observer,
    ) -> Result<(), Error> {
        let run = &self.config.output;
        check_held(run)?;
        let folder = checkpoint::write(run, adapter, optimizer, &self.state, |folder| {
            self.save_adapter(folder, adapter)
        })
        .map_err(|error| self.with_last_good(&error))?;
        if let Some(limit) = self.config.save_total_limit {
            let best = self
                .state
                .best
                .filter(|_| self.config.load_best_model_at_end)
                .map(|(_, step)| step);
            checkpoint::prune(run, limit, best)?;
        }
        observer.event(&Event::Checkpoint(folder));
        Ok(())
    }

    /// Writes the adapter's files; full training has none.
    fn save_adapter(&self, folder: &Path, adapter: &Adapter) -> Result<(), Error> {
        let Some(config) = self.adapter_config else {
            return Ok(());
        };
        let base = BaseMark {
            name: &self.config.model,
            fingerprint: &self.state.base,
        };
        tuning::save(folder, self.base.decoder.config(), config, adapter, base)
    }

    /// The weights that the last step made were not used yet: a pass over a few rows shows whether they work.
    fn check_result(&self, adapter: &Adapter, examples: &[Example]) -> Result<(), Error> {
        let set = [adapter];
        let rows = &examples[..examples.len().min(self.config.batch_size)];
        let sums = evaluate(
            &self.base.decoder,
            AdapterSet::new(&set),
            Some(0),
            rows,
            &self.ws,
        );
        if sums.mean().is_finite() {
            Ok(())
        } else {
            Err(self.not_finite("training loss", sums.mean()))
        }
    }

    /// The error for a loss that the weights of the current step give.
    fn not_finite(&self, what: &str, loss: f64) -> Error {
        let step = self.state.step;
        let cause = probable_cause(step, self.config.learning_rate);
        self.with_last_good(&Error::Diverged(format!(
            "after step {step} the {what} is {loss}: {cause}"
        )))
    }

    /// Writes what the run was for.
    fn finish(
        &mut self,
        adapter: &mut Adapter,
        outcome: &mut Outcome,
        observer: &mut dyn Observer,
    ) -> Result<(), Error> {
        let config = self.config;
        check_held(&config.output)?;
        if let (true, Some((loss, step))) = (config.load_best_model_at_end, self.state.best) {
            if step != self.state.step {
                checkpoint::read_params(&checkpoint::step_folder(&config.output, step), adapter)?;
                observer.event(&Event::Note(format!(
                    "finishing with the weights of step {step}, whose eval_loss is {loss:.4}"
                )));
            }
            outcome.eval_loss = Some(loss);
        } else if !self.valid.is_empty() {
            let found = crate::report::metrics::read(&folder::metrics_path(&config.output))?;
            outcome.eval_loss = found.lines.iter().rev().find_map(|line| match line {
                MetricsLine::Eval(eval) => Some(eval.eval_loss),
                MetricsLine::Step(_) => None,
            });
        }
        if self.adapter_config.is_some() {
            self.save_adapter(&config.output, adapter)?;
        } else {
            let (model, dtype) = (self.base.decoder.config(), config.base_dtype.into());
            full::save_weights(model, adapter, &config.output, dtype)?;
            self.base.source.write_side_files(&config.output, dtype)?;
        }
        let pefts = self.adapter_config.is_some_and(AdapterConfig::is_pefts);
        folder::write_card(config, &self.base.source, outcome, pefts)
    }

    /// A run that fails tells where it can be taken up again. A checkpoint of the current step is left out: it holds the
    /// very values that failed, or is the one that could not be written.
    fn with_last_good(&self, error: &Error) -> Error {
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
            _ => Error::Training(message),
        }
    }

    /// Writes report.html.
    fn report(&self, outcome: &mut Outcome, observer: &mut dyn Observer) -> Result<(), Error> {
        outcome.peak_rss = peak_rss();
        check_held(&self.config.output)?;
        let summary = self.summary(outcome);
        let damage = folder::write_report(self.config, &summary, &figures(outcome))?;
        if let Some(damage) = damage {
            observer.event(&Event::Note(format!("warning: {damage}; left out")));
        }
        Ok(())
    }

    fn summary(&self, outcome: &Outcome) -> String {
        let end = if outcome.interrupted {
            ", interrupted"
        } else {
            ""
        };
        let title = self.config.method.title();
        let method = title[..1].to_uppercase() + &title[1..];
        format!(
            "{method} of {}, {} of {} steps{end}",
            self.base.source.short_name(),
            outcome.steps,
            outcome.total_steps
        )
    }
}

pub(super) fn mean(values: &[f64]) -> Option<f64> {
    (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
}

fn figures(outcome: &Outcome) -> Vec<(String, String)> {
    let percent = 100.0 * outcome.trainable_parameters as f64 / outcome.base_parameters as f64;
    let mut figures = vec![
        (
            "trainable parameters".to_owned(),
            format!("{} ({percent:.3} %)", outcome.trainable_parameters),
        ),
        ("steps".to_owned(), outcome.steps.to_string()),
    ];
    let mut add = |name: &str, value: Option<f64>| {
        if let Some(value) = value {
            figures.push((name.to_owned(), format!("{value:.4}")));
        }
    };
    add("training loss, last steps", outcome.train_loss);
    add("held-out loss before", outcome.first_eval_loss);
    add("held-out loss after", outcome.eval_loss);
    if outcome.seconds > 0.0 {
        figures.push((
            "tokens a second".to_owned(),
            format!("{:.0}", outcome.tokens as f64 / outcome.seconds),
        ));
    }
    if outcome.peak_rss > 0 {
        figures.push((
            "peak memory".to_owned(),
            format!("{:.0} MiB", outcome.peak_rss as f64 / 1_048_576.0),
        ));
    }
    figures
}
