//! A job: what was asked for, how far it is, and its folder.
//!
//! ```text
//! jobs/ftjob-…/
//!   job.json        what this file calls a record, written whole whenever it changes
//!   events.jsonl    what was told
//!   init/           the adapter that it goes on from, if it does
//!   run/            the training's own folder, with its checkpoints
//! ```

use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use tokio::sync::watch;

use super::events::{Event, Figures, Level, Log};
use crate::error::ApiError;
use crate::objects::now;
use crate::sync::lock;

/// How far a job is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Status {
    ValidatingFiles,
    Queued,
    Running,
    Paused,
    Succeeded,
    Failed,
    Cancelled,
}

impl Status {
    pub(super) const ALL: [Self; 7] = [
        Self::ValidatingFiles,
        Self::Queued,
        Self::Running,
        Self::Paused,
        Self::Succeeded,
        Self::Failed,
        Self::Cancelled,
    ];

    pub(super) fn is_over(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::Cancelled)
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::ValidatingFiles => "validating_files",
            Self::Queued => "queued",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }
}

/// Why a job has failed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Failure {
    pub(super) code: String,
    pub(super) message: String,
    pub(super) param: Option<String>,
}

impl Failure {
    pub(super) fn new(code: &str, message: impl Into<String>) -> Self {
        Self {
            code: code.to_owned(),
            message: message.into(),
            param: None,
        }
    }
}

/// What is kept of a job.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) version: u32,
    pub(super) id: String,
    /// Jobs are taken up in the order of their numbers.
    pub(super) number: u64,
    pub(super) status: Status,
    pub(super) created_at: u64,
    pub(super) finished_at: Option<u64>,
    pub(super) model: String,
    pub(super) training_file: String,
    pub(super) validation_file: Option<String>,
    pub(super) suffix: Option<String>,
    pub(super) hyperparameters: Value,
    pub(super) seed: u64,
    pub(super) metadata: Option<Value>,
    /// lowrank's keys as they were given.
    pub(super) lowrank: Map<String, Value>,
    /// All settings, but for where files are.
    pub(super) config: Value,
    pub(super) trained_tokens: Option<u64>,
    pub(super) fine_tuned_model: Option<String>,
    pub(super) error: Option<Failure>,
}

/// A job of this server.
pub(super) struct Job {
    pub(super) id: String,
    pub(super) folder: PathBuf,
    record: Mutex<Record>,
    log: Mutex<Log>,
    /// Ends the training after the step under way.
    pub(super) stop: AtomicBool,
    /// Whether something works for it.
    pub(super) is_active: AtomicBool,
    /// Counts what happened, for those who watch.
    changed: watch::Sender<u64>,
}

impl Job {
    pub(super) fn new(folder: PathBuf, record: Record) -> Self {
        let short = short(&record.id);
        Self {
            log: Mutex::new(Log::new(
                folder.join("events.jsonl"),
                format!("ftevent-{short}"),
            )),
            id: record.id.clone(),
            folder,
            record: Mutex::new(record),
            stop: AtomicBool::new(false),
            is_active: AtomicBool::new(false),
            changed: watch::Sender::new(0),
        }
    }

    pub(super) fn record(&self) -> Record {
        lock(&self.record).clone()
    }

    pub(super) fn status(&self) -> Status {
        lock(&self.record).status
    }

    /// Where the training writes.
    pub(super) fn run_folder(&self) -> PathBuf {
        self.folder.join("run")
    }

    /// Where the adapter is that the job goes on from.
    pub(super) fn init_folder(&self) -> PathBuf {
        self.folder.join("init")
    }

    /// Changes the record if `change` says so, and writes it before anybody sees the change.
    pub(super) fn change(
        &self,
        change: impl FnOnce(&mut Record) -> bool,
    ) -> Result<bool, ApiError> {
        let mut record = lock(&self.record);
        let mut changed = record.clone();
        if !change(&mut changed) {
            return Ok(false);
        }
        save(&self.folder, &changed)?;
        *record = changed;
        let is_over = record.status.is_over();
        drop(record);
        self.notify();
        if is_over && !self.is_active.load(Ordering::SeqCst) {
            lock(&self.log).close();
        }
        Ok(true)
    }

    /// Moves on from one status to another; not where the job is elsewhere by now, such as cancelled.
    pub(super) fn move_on(&self, from: Status, to: Status) -> Result<bool, ApiError> {
        self.change(|record| {
            let is_there = record.status == from;
            if is_there {
                record.status = to;
            }
            is_there
        })
    }

    /// Ends a job that is not over.
    pub(super) fn end(
        &self,
        status: Status,
        change: impl FnOnce(&mut Record),
    ) -> Result<bool, ApiError> {
        let ended = self.change(|record| {
            if record.status.is_over() {
                return false;
            }
            record.status = status;
            record.finished_at = Some(now());
            change(record);
            true
        })?;
        if ended {
            metrics::counter!("lowrank_jobs_finished_total", "status" => status.name())
                .increment(1);
        }
        Ok(ended)
    }

    pub(super) fn fail(&self, failure: Failure) {
        self.tell(Level::Error, format!("The job failed: {}", failure.message));
        if let Err(error) = self.end(Status::Failed, |record| record.error = Some(failure)) {
            tracing::error!("{}: {}", self.id, error.message);
        }
    }

    pub(super) fn tell(&self, level: Level, message: impl Into<String>) {
        lock(&self.log).tell(level, message.into(), now());
        self.notify();
    }

    pub(super) fn measure(&self, figures: Figures) {
        lock(&self.log).measure(figures, now());
        self.notify();
    }

    /// Nothing works for it any more.
    pub(super) fn rest(&self) {
        self.is_active.store(false, Ordering::SeqCst);
        if self.status().is_over() {
            lock(&self.log).close();
        }
        self.notify();
    }

    fn notify(&self) {
        self.changed.send_modify(|count| *count += 1);
    }

    pub(super) fn watch(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Whether nothing more will be told.
    pub(super) fn is_silent(&self) -> bool {
        self.status().is_over() && !self.is_active.load(Ordering::SeqCst)
    }

    /// Does something with the events, oldest first.
    pub(super) fn with_events<T>(&self, read: impl FnOnce(&[Event]) -> T) -> T {
        let mut log = lock(&self.log);
        let found = read(log.all());
        if self.is_silent() {
            log.close();
        }
        found
    }

    /// The job as OpenAI's clients read it.
    pub(super) fn object(&self) -> Value {
        let record = self.record();
        json!({
            "id": record.id,
            "object": "fine_tuning.job",
            "created_at": record.created_at,
            "finished_at": record.finished_at,
            "estimated_finish": null,
            "status": record.status,
            "model": record.model,
            "fine_tuned_model": record.fine_tuned_model,
            "organization_id": "lowrank",
            "training_file": record.training_file,
            "validation_file": record.validation_file,
            "result_files": [],
            "trained_tokens": record.trained_tokens,
            "hyperparameters": record.hyperparameters,
            "method": {"type": "supervised", "supervised": {"hyperparameters": record.hyperparameters}},
            "seed": record.seed,
            "user_provided_suffix": record.suffix,
            "metadata": record.metadata,
            "integrations": [],
            "error": record.error,
            "lowrank": record.lowrank,
        })
    }
}

/// The part of an id that tells a job from others.
pub(super) fn short(id: &str) -> &str {
    let tail = id.strip_prefix("ftjob-").unwrap_or(id);
    tail.get(..8).unwrap_or(tail)
}

/// Writes a record into a job's folder.
pub(super) fn save(folder: &Path, record: &Record) -> Result<(), ApiError> {
    let text = serde_json::to_string_pretty(record)
        .map_err(|error| ApiError::internal(error.to_string()))?;
    lowrank::write_text(&folder.join("job.json"), &(text + "\n"))
        .map_err(|error| ApiError::storage("the job cannot be written", error))
}

/// The name of a job's result: one that the registry takes and that every file system can have.
pub(super) fn result_name(base: &str, suffix: Option<&str>, id: &str) -> String {
    let plain = |text: &str| -> String {
        let kept = text.chars().map(|c| {
            if c.is_ascii_alphanumeric() || "-_.".contains(c) {
                c
            } else {
                '-'
            }
        });
        kept.collect()
    };
    let base: String = plain(base).chars().take(64).collect();
    let suffix = suffix.map_or(String::new(), |suffix| format!("-{}", plain(suffix)));
    format!("ft-{base}{suffix}-{}", short(id))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_have_names_that_are_folders_everywhere() {
        let id = "ftjob-0123456789abcdef";
        assert_eq!(result_name("tiny", None, id), "ft-tiny-01234567");
        assert_eq!(
            result_name("builtin:tiny", Some("my model/2"), id),
            "ft-builtin-tiny-my-model-2-01234567"
        );
        assert_eq!(result_name("x", Some("ü"), id), "ft-x---01234567");
    }
}
