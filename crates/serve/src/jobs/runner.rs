//! What is done for jobs: their files are read on threads of their own, and one after the other is trained between requests.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use lowrank::Error;
use lowrank::data::{DataOptions, Dataset, Example, Split, TaskType, Tokenizer};
use lowrank::formats::atomic::{write_file, write_folder};
use lowrank::formats::{FormatError, peft};
use lowrank::kernels::Pauses;
use lowrank::lock::FolderLock;
use lowrank::report::metrics::{self, MetricsLine};
use lowrank::settings::TrainConfig;
use lowrank::train::{Event, Observer, Outcome, Rows, Trainer, prepare, saving_beside};

use super::events::{Figures, Level};
use super::job::{Failure, Job, Status, result_name};
use super::{Jobs, settings, without_paths};
use crate::error::ApiError;
use crate::sync::lock;

/// How long a training goes on without a checkpoint, beside those that its settings ask for.
const UNSAVED: Duration = Duration::from_secs(60);

/// Steps that are told one by one, and about so many of all: a job of a million steps would fill memory with its curve.
const TOLD: u64 = 1000;
const TOLD_OF_ALL: u64 = 5000;

/// A job's settings and rows.
struct Prepared {
    config: TrainConfig,
    train: Vec<Example>,
    valid: Vec<Example>,
}

/// Reads a job's files, and lets it wait for its turn.
pub(super) fn validate(jobs: &Arc<Jobs>, job: &Arc<Job>) {
    let record = job.record();
    job.tell(
        Level::Info,
        format!("Validating training file: {}", record.training_file),
    );
    if let Some(file) = &record.validation_file {
        job.tell(Level::Info, format!("Validating validation file: {file}"));
    }
    let checked = catch(|| check(jobs, job));
    let config = match checked {
        Ok(config) => config,
        Err(failure) => return job.fail(failure),
    };
    let moved = job.change(|record| {
        if record.status != Status::ValidatingFiles {
            return false;
        }
        record.hyperparameters = settings::shown(&config);
        record.config = serde_json::to_value(&config).unwrap_or_default();
        record.status = Status::Queued;
        true
    });
    match moved {
        Ok(true) => job.tell(Level::Info, "Files validated, the job waits for its turn"),
        Ok(false) => {}
        Err(error) => job.fail(Failure::new("internal_error", error.message)),
    }
}

/// What the settings come to with the rows.
fn check(jobs: &Jobs, job: &Job) -> Result<TrainConfig, Failure> {
    let mut prepared = read(jobs, job, true)?;
    let config = &mut prepared.config;
    let given = job.record().lowrank;
    settings::settle(config, &given, &prepared.train, !prepared.valid.is_empty());
    let failure = |error: &Error| failure_of(jobs, job, error);
    config.check().map_err(|error| failure(&error))?;
    let adapter = config.lay_out(jobs.base.decoder.config());
    let adapter = adapter.map_err(|error| failure(&error))?;
    let saving = saving_beside(config, &jobs.base, &adapter, &prepared.train);
    // What is computed again must not depend on what is free when the job begins, or begins again.
    config.recompute = Some(saving.map_err(|error| failure(&error))?.recompute);
    // It is read once, and not while requests wait for the thread that trains.
    jobs.base.decoder.weights_hash();
    Ok(prepared.config)
}

/// Reads a job's settings and rows.
fn read(jobs: &Jobs, job: &Job, tells: bool) -> Result<Prepared, Failure> {
    let record = job.record();
    let config = serde_json::from_value(record.config.clone());
    let mut config: TrainConfig = config.map_err(|error| {
        Failure::new(
            "invalid_settings",
            format!("the settings were written by another version: {error}"),
        )
    })?;
    config.output = job.run_folder();
    if config.init_adapter.is_some() {
        config.init_adapter = Some(job.init_folder());
    }
    let source = &jobs.base.source;
    let tokenizer = source.tokenizer();
    let mut tokenizer =
        tokenizer.map_err(|error| Failure::new("internal_error", error.to_string()))?;
    tokenizer.set_date(record.created_at.cast_signed());
    let (data, train) = load(
        jobs,
        job,
        &tokenizer,
        &config,
        ("training_file", &record.training_file),
        tells,
    )?;
    config.data = data;
    let mut valid = Vec::new();
    if let Some(file) = &record.validation_file {
        let (data, rows) = load(
            jobs,
            job,
            &tokenizer,
            &config,
            ("validation_file", file),
            tells,
        )?;
        config.valid_data = Some(data);
        valid = rows;
    }
    Ok(Prepared {
        config,
        train,
        valid,
    })
}

fn load(
    jobs: &Jobs,
    job: &Job,
    tokenizer: &Tokenizer,
    config: &TrainConfig,
    (param, id): (&str, &str),
    tells: bool,
) -> Result<(std::path::PathBuf, Vec<Example>), Failure> {
    let about = |code: &str, message: String| Failure {
        param: Some(param.to_owned()),
        ..Failure::new(code, message)
    };
    let file = jobs.files.get(id, param);
    let file = file.map_err(|error| about("file_not_found", error.message))?;
    let path = jobs.files.path(&file);
    let options = data_options(config);
    let loaded = Dataset::load(&path, Split::File, tokenizer, &options);
    let loaded = loaded.map_err(|error| {
        let message = without_paths(&error.to_string(), &path, &file.filename);
        about(&format!("invalid_{param}"), message)
    })?;
    if loaded.kind.task() != TaskType::CausalLm {
        let message = format!(
            "{}: its rows have labels ({}), and jobs train language models; train a classifier with `lowrank train`",
            file.filename, loaded.kind
        );
        return Err(about(&format!("invalid_{param}"), message));
    }
    if tells {
        let report = without_paths(&loaded.report.to_string(), &path, &file.filename);
        job.tell(Level::Info, report);
    }
    Ok((path, loaded.examples))
}

/// How the rows of a job are read.
pub(super) fn data_options(config: &TrainConfig) -> DataOptions {
    let columns = config.columns.as_deref();
    DataOptions {
        max_seq_length: config.max_seq_length,
        train_on_prompt: config.train_on_prompt,
        on_bad_row: config.on_bad_row,
        completion_boundary: config.completion_boundary,
        task: config.task_type,
        labels: None,
        order: None,
        columns: columns.map(lowrank::train::split_columns),
    }
}

/// Trains one job after the other until the server stops.
pub(super) fn run(jobs: &Arc<Jobs>) {
    while let Some(job) = next(jobs) {
        job.is_active.store(true, Ordering::SeqCst);
        // Whoever cancels it sets this after the status.
        job.stop.store(false, Ordering::SeqCst);
        let taken = job.change(|record| {
            let waits = matches!(record.status, Status::Queued | Status::Running);
            record.status = if waits {
                Status::Running
            } else {
                record.status
            };
            waits
        });
        match taken {
            Ok(true) if !jobs.is_stopping() => take_up(jobs, &job),
            Ok(_) => {}
            Err(error) => job.fail(Failure::new("internal_error", error.message)),
        }
        job.rest();
    }
}

/// The job that is next: one that an earlier server has begun, or the first that waits.
fn next(jobs: &Jobs) -> Option<Arc<Job>> {
    let mut all = lock(&jobs.all);
    loop {
        if jobs.is_stopping() {
            return None;
        }
        let of = |status| all.iter().find(|job| job.status() == status);
        if let Some(job) = of(Status::Running).or_else(|| of(Status::Queued)) {
            return Some(Arc::clone(job));
        }
        all = match jobs.wake.wait(all) {
            Ok(all) => all,
            Err(poisoned) => poisoned.into_inner(),
        };
    }
}

fn take_up(jobs: &Arc<Jobs>, job: &Arc<Job>) {
    job.tell(Level::Info, "Fine-tuning job started");
    let done = catch(|| {
        let prepared = read(jobs, job, false)?;
        let outcome = train_beside(jobs, job, prepared)?;
        if outcome.interrupted {
            let (steps, total) = (outcome.steps, outcome.total_steps);
            job.tell(
                Level::Info,
                format!("Stopped after step {steps} of {total}"),
            );
            return Ok(());
        }
        publish(jobs, job)
    });
    if let Err(failure) = done {
        job.fail(failure);
    }
}

/// Trains on the engine's thread, and waits for the end.
fn train_beside(jobs: &Arc<Jobs>, job: &Arc<Job>, prepared: Prepared) -> Result<Outcome, Failure> {
    let (sender, receiver) = std::sync::mpsc::channel();
    let (of_jobs, of_job) = (Arc::clone(jobs), Arc::clone(job));
    jobs.engine.background(Box::new(move |_, pace| {
        let pace = Mutex::new(pace);
        let answer = || {
            let mut pace = lock(&pace);
            pace();
        };
        let trained = catch(|| {
            let trained = train(&of_jobs, &of_job, &prepared, Pauses::with(&answer));
            trained.map_err(|error| failure_of(&of_jobs, &of_job, &error))
        });
        drop(sender.send(trained));
    }));
    let gone = |_| Failure::new("internal_error", "the thread that trains has ended");
    receiver.recv().map_err(gone)?
}

/// Trains from the last checkpoint on, or from the beginning where there is none.
fn train(
    jobs: &Jobs,
    job: &Arc<Job>,
    prepared: &Prepared,
    pauses: Pauses<'_>,
) -> Result<Outcome, Error> {
    let Prepared {
        config,
        train,
        valid,
    } = prepared;
    let began = config.output.join("config.yaml").is_file();
    if !began && config.output.exists() {
        fs::remove_dir_all(&config.output).map_err(|source| Error::Io {
            path: config.output.clone(),
            source,
        })?;
    }
    let (_lock, _) = FolderLock::take(&config.output)?;
    let mut watch = Watch {
        job,
        jobs,
        total_steps: 0,
    };
    let rows = Rows { train, valid };
    let trained = prepare(config, &jobs.base, train, &mut watch)?;
    pauses.pause();
    let trainer = if began {
        Trainer::resume(config, &jobs.base, trained, rows, &mut watch)
    } else {
        Trainer::new(config, &jobs.base, trained, rows, false, &mut watch)
    };
    let mut trainer = trainer?.with_pauses(pauses);
    let mut saved = Instant::now();
    while trainer.advance(&job.stop)? {
        if saved.elapsed() >= UNSAVED {
            trainer.checkpoint()?;
            saved = Instant::now();
        }
        pauses.pause();
    }
    trainer.finish()
}

/// Puts the result into the folder of adapters, and serves it.
fn publish(jobs: &Jobs, job: &Arc<Job>) -> Result<(), Failure> {
    let record = job.record();
    let name = result_name(&jobs.base_name, record.suffix.as_deref(), &record.id);
    let run = job.run_folder();
    let unwritten = |error: FormatError| Failure::new("result_unwritten", error.to_string());
    write_folder(&jobs.adapters.join(&name), true, |folder| {
        for file in [peft::ADAPTER_CONFIG, peft::ADAPTER_WEIGHTS, "README.md"] {
            copy(&run.join(file), &folder.join(file))?;
        }
        Ok(())
    })
    .map_err(unwritten)?;
    let served = jobs.registry.load(&name, &name, true, None);
    jobs.runtime
        .block_on(served)
        .map_err(|error| Failure::new(error.code, error.message))?;
    let tokens = trained_tokens(&run);
    job.tell(Level::Info, format!("New fine-tuned model created: {name}"));
    let ended = job.end(Status::Succeeded, |record| {
        record.fine_tuned_model = Some(name);
        record.trained_tokens = tokens;
    });
    if ended.map_err(|error: ApiError| Failure::new("internal_error", error.message))? {
        job.tell(Level::Info, "The job has successfully completed");
    }
    Ok(())
}

fn copy(from: &Path, to: &Path) -> Result<(), FormatError> {
    let mut file = fs::File::open(from).map_err(|error| FormatError::io(from, "open", error))?;
    write_file(to, |out| std::io::copy(&mut file, out).map(|_| ()))
}

/// Tokens of all steps of a run.
fn trained_tokens(run: &Path) -> Option<u64> {
    let found = metrics::read(&run.join("metrics.jsonl")).ok()?;
    let tokens = found.lines.iter().map(|line| match line {
        MetricsLine::Step(step) => step.tokens,
        MetricsLine::Eval(_) => 0,
    });
    Some(tokens.sum())
}

/// Runs something whose fault must not end the server.
fn catch<T>(work: impl FnOnce() -> Result<T, Failure>) -> Result<T, Failure> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| {
        Err(Failure::new(
            "internal_error",
            "the server met a fault of its own; its log says more",
        ))
    })
}

fn failure_of(jobs: &Jobs, job: &Job, error: &Error) -> Failure {
    let code = match error {
        Error::Settings(_) => "invalid_settings",
        Error::Diverged(_) => "training_diverged",
        Error::Data(_) => "invalid_training_file",
        _ => "training_failed",
    };
    Failure::new(code, tidied(jobs, job, &error.to_string()))
}

/// A message of the library without the server's folders.
fn tidied(jobs: &Jobs, job: &Job, message: &str) -> String {
    let message = without_paths(message, &job.run_folder(), "the job's folder");
    without_paths(&message, &jobs.folder, "the server's folder")
}

/// Tells a job what its training does.
struct Watch<'a> {
    job: &'a Arc<Job>,
    jobs: &'a Jobs,
    total_steps: u64,
}

impl Observer for Watch<'_> {
    fn event(&mut self, event: &Event) {
        match event {
            Event::Start { total_steps, .. } => self.total_steps = *total_steps,
            Event::Step(line) => {
                ::metrics::counter!("lowrank_train_steps_total").increment(1);
                ::metrics::counter!("lowrank_train_tokens_total").increment(line.tokens);
                ::metrics::gauge!("lowrank_train_loss").set(line.loss);
                let every = self.total_steps.div_ceil(TOLD_OF_ALL).max(1);
                let is_told = line.step <= TOLD || line.step.is_multiple_of(every);
                if !is_told && line.step != self.total_steps {
                    return;
                }
                self.job.measure(Figures {
                    step: line.step,
                    total_steps: self.total_steps,
                    train_loss: Some(line.loss),
                    valid_loss: None,
                    learning_rate: Some(line.learning_rate),
                    tokens_per_second: Some(line.tokens_per_second),
                });
            }
            Event::Eval(line) => self.job.measure(Figures {
                step: line.step,
                total_steps: self.total_steps,
                train_loss: None,
                valid_loss: Some(line.eval_loss),
                learning_rate: None,
                tokens_per_second: None,
            }),
            Event::Checkpoint(folder) => {
                let step = folder.file_name().unwrap_or_default().to_string_lossy();
                let step = step.strip_prefix("step-").unwrap_or(&step).to_owned();
                self.job
                    .tell(Level::Info, format!("Checkpoint created at step {step}"));
            }
            Event::Note(text) => {
                let text = tidied(self.jobs, self.job, text);
                match text.strip_prefix("warning: ") {
                    Some(text) => self.job.tell(Level::Warn, text),
                    None => self.job.tell(Level::Info, text),
                }
            }
            _ => {}
        }
    }
}
