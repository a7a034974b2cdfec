//! What a run comes to, and the files that say so.

use std::path::PathBuf;

use lowrank_kernels::DType;

use super::checkpoint::{self, Opened};
use super::events::Event;
use super::folder;
use super::memory::peak_rss;
use super::trainer::Trainer;
use super::values::{self, Kind};
use crate::Error;
use crate::base::{Network, classifier_keys};
use crate::lock::check_held;
use crate::model::{Adapter, families};
use crate::names::valued;
use crate::report::MetricsLine;
use crate::settings::TrainConfig;
use crate::tuning::full;

/// What a run came to.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
#[non_exhaustive]
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
    /// Which tensors have which learning rate and weight decay, where they do not all have the same.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub groups: Vec<String>,
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
    pub(super) fn planned(
        config: &TrainConfig,
        base: &Network,
        adapter: &Adapter,
        total_steps: u64,
    ) -> Self {
        Self {
            output: config.output.clone(),
            trainable_parameters: adapter.parameters(),
            base_parameters: base.decoder.config().parameters(),
            total_steps,
            ..Self::default()
        }
    }
}

impl Trainer<'_> {
    /// Ends the run: writes the adapter or the model, unless the run was interrupted, and the report.
    ///
    /// # Errors
    /// A result that is not finite; a file that can't be written.
    pub fn finish(mut self) -> Result<Outcome, Error> {
        self.outcome.train_loss = mean(&self.last_losses);
        if !self.outcome.interrupted {
            if self.rows.valid.is_empty() {
                self.check_result()?;
            }
            self.write_result()?;
        }
        self.report()?;
        Ok(self.outcome)
    }

    /// The weights that the last step made were not used yet: a pass over a few rows shows whether they work.
    fn check_result(&self) -> Result<(), Error> {
        let rows = self.rows.train;
        let rows = &rows[..rows.len().min(self.config.batch_size)];
        let sums = self.loss_of(rows, || false)?.unwrap_or_default();
        if sums.mean().is_finite() {
            Ok(())
        } else {
            Err(self.not_finite("training loss", sums.mean()))
        }
    }

    /// Writes what the run was for.
    fn write_result(&mut self) -> Result<(), Error> {
        let config = self.config;
        if let (true, Some((loss, step))) = (config.load_best_model_at_end, self.state.best) {
            if step != self.state.step {
                self.take_best(loss, step)?;
            }
            self.outcome.eval_loss = Some(loss);
        } else if !self.rows.valid.is_empty() && self.ranks.is_first() {
            let found = crate::report::metrics::read(&folder::metrics_path(&config.output))?;
            self.outcome.eval_loss = found.lines.iter().rev().find_map(|line| match line {
                MetricsLine::Eval(eval) => Some(eval.eval_loss),
                MetricsLine::Step(_) => None,
            });
        }
        let dtype = config.base_dtype.into();
        self.values().on_first(|values| {
            check_held(&config.output)?;
            if self.adapter_config.is_some() {
                return self.save_adapter(values, &config.output);
            }
            let model = self.base.decoder.config();
            full::save_values(model, &config.output, dtype, |slot| {
                values.slot(Kind::Param, slot)
            })?;
            let changes = classifier_keys(model, self.base.labels.as_ref());
            let source = &self.base.source;
            source.write_changed_side_files(&config.output, dtype, &changes)
        })?;
        if self.adapter_config.is_none() {
            self.evaluate_as_written(dtype)?;
        }
        let model = self.base.decoder.config();
        let python = match &self.adapter_config {
            Some(adapter) => adapter.is_pefts(model),
            None => families::is_in_transformers(model),
        };
        let write = |_: &_| folder::write_card(config, self.base, &self.outcome, python);
        self.values().on_first(write)?;
        Ok(())
    }

    /// Takes the values of the step whose held-out loss was the lowest.
    fn take_best(&mut self, loss: f64, step: u64) -> Result<(), Error> {
        let best = checkpoint::step_folder(&self.config.output, step);
        let opened = self.ranks.on_first(|| Opened::open(&best, &self.adapter))?;
        let read = |kind, slot| match &opened {
            Some(opened) => opened.values(kind, slot),
            None => Ok(Vec::new()),
        };
        let (adapter, optimizer) = (&mut self.adapter, &mut self.optimizer);
        values::take(&self.ranks, adapter, optimizer, &[Kind::Param], read)?;
        adapter.forget_norms();
        self.observer.event(&Event::Note(format!(
            "finishing with the weights of step {step}, whose eval_loss is {loss:.4}"
        )));
        Ok(())
    }

    /// The held-out loss of a whole model that was rounded as it was written, which is then the run's.
    fn evaluate_as_written(&mut self, dtype: DType) -> Result<(), Error> {
        if self.rows.valid.is_empty() || dtype == DType::F32 {
            return Ok(());
        }
        self.adapter.round_to(dtype);
        let sums = self.loss_of(self.rows.valid, || false)?;
        let Some(before) = self.outcome.eval_loss else {
            return Ok(());
        };
        let loss = sums.unwrap_or_default().mean();
        self.outcome.eval_loss = Some(loss);
        self.observer.event(&Event::Note(format!(
            "held-out loss {loss:.4} as the model was written in {dtype}, {before:.4} before it was rounded; {base_dtype} rounds nothing",
            base_dtype = valued("base_dtype", "f32")
        )));
        Ok(())
    }

    /// Writes report.html.
    fn report(&mut self) -> Result<(), Error> {
        self.outcome.peak_rss = peak_rss();
        let damage = self.values().on_first(|_| {
            check_held(&self.config.output)?;
            let summary = self.summary();
            folder::write_report(self.config, &summary, &figures(&self.outcome))
        })?;
        if let Some(Some(damage)) = damage {
            self.observer
                .event(&Event::Note(format!("warning: {damage}; left out")));
        }
        Ok(())
    }

    fn summary(&self) -> String {
        let outcome = &self.outcome;
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
    for group in &outcome.groups {
        figures.push(("group".to_owned(), group.clone()));
    }
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
