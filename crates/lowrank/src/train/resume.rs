//! Going on with a run: what it left behind, whether it is finished, and the state that the loop begins with.

use std::path::Path;

use lowrank_formats::checkpoint::Checkpoint;

use super::checkpoint::{self, Computed, DataMark, ModelMark, Opened, TrainerState};
use super::events::{Event, Observer};
use super::folder;
use super::outcome::{Outcome, mean};
use super::step::OptimizerState;
use super::trainer::{LAST_STEPS, Rows};
use super::values::{self, Kind};
use crate::Error;
use crate::base::{Network, Source, purpose_for};
use crate::model::{Adapter, ModelConfig};
use crate::names::named;
use crate::ranks::Ranks;
use crate::report::{self, MetricsLine, MetricsWriter, StepMetrics};
use crate::settings::TrainConfig;
use crate::tuning::task_of;

/// What a run in the output folder came to, if it is finished: it has what it was for, and took its last step or stopped
/// early. Nothing is to be done then, and nothing is read but its own files.
pub(super) fn finished(config: &TrainConfig) -> Option<Outcome> {
    let run = &config.output;
    let (has_files, weights) = if config.method.writes_model() {
        (run.join("config.json").is_file(), "model.safetensors")
    } else {
        (checkpoint::has_adapter(run), "adapter_model.safetensors")
    };
    // What is damaged is written anew.
    if !has_files || Checkpoint::open(&run.join(weights)).is_err() {
        return None;
    }
    let has_card = run.join("README.md").is_file();
    let has_checkpoint = !checkpoint::steps(run).is_empty();
    // The card is written last. Where it is missing, a checkpoint can make it; without one there is nothing to make it from.
    if !has_card && has_checkpoint {
        return None;
    }
    let found = report::metrics::read(&folder::metrics_path(run));
    let lines = found.map(|found| found.lines).unwrap_or_default();
    let steps: Vec<&StepMetrics> = lines.iter().filter_map(step_line).collect();
    let Some(last) = steps.last() else {
        // Without its metrics the card alone says that the run came to its end.
        return (has_card && !has_checkpoint).then(|| outcome_of(config, &lines, None));
    };
    let total_steps = planned_steps(config, last);
    let stopped_early = stops_early(config, &lines);
    (last.step >= total_steps || stopped_early).then(|| Outcome {
        stopped_early: stopped_early && last.step < total_steps,
        ..outcome_of(config, &lines, Some(total_steps))
    })
}

/// What the folder says about a finished run.
fn outcome_of(config: &TrainConfig, lines: &[MetricsLine], total_steps: Option<u64>) -> Outcome {
    let evals: Vec<_> = lines
        .iter()
        .filter_map(|line| match line {
            MetricsLine::Eval(eval) => Some((eval.step, eval.eval_loss)),
            MetricsLine::Step(_) => None,
        })
        .collect();
    let mut after = evals.iter().filter(|(step, _)| *step > 0);
    let eval_loss = if config.load_best_model_at_end {
        after.map(|(_, loss)| *loss).min_by(f64::total_cmp)
    } else {
        after.next_back().map(|(_, loss)| *loss)
    };
    let last = lines.iter().rev().find_map(step_line);
    let steps = last.map_or(0, |line| line.step);
    // The model may be gone by now, and only the figures need it.
    let model = model_of(config);
    let adapter = model
        .as_ref()
        .ok()
        .and_then(|model| config.lay_out(model).ok());
    Outcome {
        output: config.output.clone(),
        already_finished: true,
        steps,
        total_steps: total_steps.unwrap_or(steps),
        trainable_parameters: adapter.as_ref().map_or(0, Adapter::parameters),
        base_parameters: model.map_or(0, |model| model.parameters()),
        train_loss: mean(&losses(lines)),
        first_eval_loss: evals
            .first()
            .filter(|(step, _)| *step == 0)
            .map(|eval| eval.1),
        eval_loss,
        peak_rss: last.map_or(0, |line| line.peak_rss),
        ..Outcome::default()
    }
}

/// The shapes of a finished run's model, with the classifier that the run has trained.
fn model_of(config: &TrainConfig) -> Result<ModelConfig, Error> {
    let source = Source::find(&config.model)?.load_in(config.load_in)?;
    let purpose = if config.method.writes_model() {
        Source::Folder(config.output.clone()).purpose()?.0
    } else {
        let task = task_of(&config.output)?;
        let task_type = serde_json::from_value(task.task_type.into()).ok();
        purpose_for(&source.config()?, task_type, task.outputs)?
    };
    source.model_config_for(purpose)
}

/// The steps that a run was to take, without its rows: a line of metrics says how many passes its steps were.
fn planned_steps(config: &TrainConfig, last: &StepMetrics) -> u64 {
    config.max_steps.unwrap_or_else(|| {
        let steps_per_epoch = (last.step as f64 / last.epoch).round();
        (steps_per_epoch * config.num_train_epochs).ceil() as u64
    })
}

/// Whether the run's patience was at its end in its last evaluation.
fn stops_early(config: &TrainConfig, lines: &[MetricsLine]) -> bool {
    let Some(patience) = config.early_stopping_patience else {
        return false;
    };
    let (mut best, mut without) = (f64::INFINITY, 0);
    for line in lines {
        let MetricsLine::Eval(eval) = line else {
            continue;
        };
        if eval.step == 0 {
            continue;
        }
        if eval.eval_loss < best {
            (best, without) = (eval.eval_loss, 0);
        } else {
            without += 1;
        }
    }
    without >= patience
}

/// What is said about a run that is finished.
pub(super) fn finished_note(config: &TrainConfig, outcome: &Outcome) -> String {
    let early = if outcome.stopped_early {
        ", stopped early"
    } else {
        ""
    };
    let on = folder::from_what_was_learned(config);
    format!(
        "the run in {} is finished ({} of {} steps{early}), and is left as it is; to train it again, give {overwrite} in place of {resume}; to train on, start a new run with another {output}{on}",
        config.output.display(),
        outcome.steps,
        outcome.total_steps,
        overwrite = named("overwrite"),
        resume = named("resume"),
        output = named("output")
    )
}

/// Refuses another base than the run began with, before anything that depends on the base's shape is done.
pub(super) fn check_base(config: &TrainConfig, base: &Network) -> Result<(), Error> {
    let steps = checkpoint::steps(&config.output).into_iter().rev();
    let mut folders = steps.map(|step| checkpoint::step_folder(&config.output, step));
    let earlier = folders.find_map(|folder| checkpoint::read_state(&folder).ok());
    let Some(earlier) = earlier else {
        return Ok(());
    };
    let now = TrainerState {
        base: base.decoder.weights().fingerprint(),
        data: earlier.data.clone(),
        valid: earlier.valid.clone(),
        ..TrainerState::default()
    };
    check_same(config, &earlier, &now)
}

fn check_same(
    config: &TrainConfig,
    earlier: &TrainerState,
    now: &TrainerState,
) -> Result<(), Error> {
    let differences = earlier.differences(now);
    if differences.is_empty() {
        return Ok(());
    }
    Err(Error::Settings(format!(
        "{}: {}, so it can't be resumed; give back what it began with ({model}, {data}, {valid_data}), or start a new run with another {output}{}",
        config.output.display(),
        differences.join("; "),
        folder::from_what_was_learned(config),
        model = named("model"),
        data = named("data"),
        valid_data = named("valid_data"),
        output = named("output")
    )))
}

/// The state that a run begins with.
pub(super) fn new_state(config: &TrainConfig, base: &Network, rows: Rows<'_>) -> TrainerState {
    let decoder = &base.decoder;
    TrainerState {
        base: decoder.weights().fingerprint(),
        base_mark: Some(ModelMark::of(decoder)),
        computed: Some(Computed::here(config)),
        data: DataMark::of(rows.train),
        valid: DataMark::of(rows.valid),
        ..TrainerState::default()
    }
}

/// The state that a run goes on with, or `now` where there is no checkpoint yet; rank 0 reads it for all.
pub(super) fn open_state(
    ranks: &Ranks<'_>,
    config: &TrainConfig,
    now: TrainerState,
    rows: Rows<'_>,
    (adapter, optimizer): (&mut Adapter, &mut OptimizerState),
    observer: &mut dyn Observer,
) -> Result<TrainerState, Error> {
    let total_steps = config.total_steps(rows.train.len());
    let opened = ranks.on_first(|| {
        checkpoint::sweep(&config.output);
        checkpoint::open_newest(
            &config.output,
            adapter,
            total_steps,
            |earlier| check_same(config, earlier, &now),
            |text| observer.event(&Event::Note(text)),
        )
    })?;
    let opened: Option<Opened> = opened.flatten();
    let state = opened.as_ref().map(|opened| opened.state.clone());
    let Some(mut earlier) = ranks.from_first(ranks.is_first().then_some(state))? else {
        observer.event(&Event::Note(
            "there is no checkpoint yet; starting from the beginning".to_owned(),
        ));
        return Ok(now);
    };
    let read = |kind, slot| match &opened {
        Some(opened) => opened.values(kind, slot),
        None => Ok(Vec::new()),
    };
    values::take(ranks, adapter, optimizer, &Kind::ALL, read)?;
    adapter.forget_norms();
    optimizer.step = earlier.step;
    observer.event(&Event::Note(format!(
        "resuming after step {} of {total_steps}",
        earlier.step
    )));
    if let (Some(then), Some(now)) = (&earlier.computed, &now.computed)
        && then != now
    {
        observer.event(&Event::Note(format!(
            "warning: until now factors were read as {then}, and from here on as {now}, which rounds otherwise; the result is not quite that of a run on one kind of processor"
        )));
    }
    earlier.computed = now.computed;
    // From now on also where the checkpoint is of an older version.
    earlier.base_mark = now.base_mark;
    Ok(earlier)
}

/// The file of metrics, cut to what the state knows of.
pub(super) fn open_metrics(
    config: &TrainConfig,
    state: &TrainerState,
    observer: &mut dyn Observer,
) -> Result<MetricsWriter, Error> {
    let path = folder::metrics_path(&config.output);
    if state.step == 0 {
        return Ok(MetricsWriter::create(&path)?);
    }
    let (metrics, damage) = MetricsWriter::resume(&path, state.step)?;
    if let Some(damage) = damage {
        observer.event(&Event::Note(format!("warning: {damage}; dropped")));
    }
    Ok(metrics)
}

/// The losses of the last steps that metrics.jsonl holds: a resumed run states the same figure as one that never stopped.
pub(super) fn last_losses(metrics: &Path) -> Result<Vec<f64>, Error> {
    Ok(losses(&report::metrics::read(metrics)?.lines))
}

fn losses(lines: &[MetricsLine]) -> Vec<f64> {
    let losses: Vec<f64> = lines
        .iter()
        .filter_map(step_line)
        .map(|step| step.loss)
        .collect();
    losses[losses.len().saturating_sub(LAST_STEPS)..].to_vec()
}

fn step_line(line: &MetricsLine) -> Option<&StepMetrics> {
    match line {
        MetricsLine::Step(step) => Some(step),
        MetricsLine::Eval(_) => None,
    }
}
