//! Training on the served base: files of rows, jobs that train adapters on them, and their results, which are served at once.
//!
//! One job is trained at a time, on the thread that answers requests: between the parts of a step it answers whoever is due. What a job
//! comes to depends on its settings and rows alone. Its state is in files that are written whole, so a server that was killed goes on with its
//! jobs from their last checkpoints, to the same result.

mod checkpoints;
mod events;
mod files;
mod job;
mod preview;
mod routes;
mod runner;
mod settings;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use lowrank::base::{Base, Network};
use lowrank::lock::Lock;

use crate::engine::Engine;
use crate::error::ApiError;
use crate::registry::Registry;
use crate::server::state_folder;
use crate::sync::lock;

pub(crate) use routes::add;
pub(crate) use settings::CREATE;

use files::Files;
use job::{Job, Status};

/// Jobs and files of a server.
pub(crate) struct Jobs {
    folder: PathBuf,
    /// The folder that results are put into.
    adapters: PathBuf,
    base: Network,
    base_name: String,
    engine: Engine,
    registry: Arc<Registry>,
    runtime: tokio::runtime::Handle,
    files: Files,
    /// In the order of their numbers.
    all: Mutex<Vec<Arc<Job>>>,
    /// Wakes the thread that trains.
    wake: Condvar,
    is_stopping: AtomicBool,
    /// Threads that work for jobs.
    working: Mutex<usize>,
    rested: Condvar,
    /// No other server works in the folder.
    /// Threads of jobs may outlast the server.
    _lock: Option<Arc<Lock>>,
}

impl Jobs {
    /// The jobs in the state of a folder of adapters, which is locked; those that are not over go on.
    ///
    /// # Errors
    /// Why there can be none.
    pub(crate) fn open(
        base: &Base,
        base_name: &str,
        adapters: Option<&Path>,
        lock: Option<Arc<Lock>>,
        engine: Engine,
        registry: Arc<Registry>,
        runtime: tokio::runtime::Handle,
    ) -> Result<Arc<Self>, ApiError> {
        let Some(adapters) = adapters else {
            let message = "the server has no folder for files, jobs and their results; start it with --adapter-dir DIR";
            return Err(ApiError::bad_request("jobs_unavailable", message));
        };
        let folder = state_folder(adapters);
        let unusable = |error: &dyn std::fmt::Display| {
            let message = format!("the folder of jobs cannot be used: {error}");
            tracing::warn!("{message}");
            ApiError::bad_request("jobs_unavailable", message)
        };
        fs::create_dir_all(folder.join("jobs")).map_err(|error| unusable(&error))?;
        let files = Files::open(folder.join("files")).map_err(|error| unusable(&error))?;
        let all = read_jobs(&folder.join("jobs")).map_err(|error| unusable(&error))?;
        let jobs = Arc::new(Self {
            folder,
            adapters: adapters.to_path_buf(),
            base: base.network(),
            base_name: base_name.to_owned(),
            engine,
            registry,
            runtime,
            files,
            all: Mutex::new(all),
            wake: Condvar::new(),
            is_stopping: AtomicBool::new(false),
            working: Mutex::new(0),
            rested: Condvar::new(),
            _lock: lock,
        });
        for job in jobs.all() {
            if job.status() == Status::ValidatingFiles {
                jobs.validate(job);
            }
        }
        jobs.work("jobs", runner::run);
        Ok(jobs)
    }

    fn all(&self) -> Vec<Arc<Job>> {
        lock(&self.all).clone()
    }

    fn get(&self, id: &str) -> Result<Arc<Job>, ApiError> {
        let found = lock(&self.all).iter().find(|job| job.id == id).cloned();
        found.ok_or_else(|| {
            ApiError::not_found(
                "job_not_found",
                format!("there is no job {id:?}; GET /v1/fine_tuning/jobs lists them"),
            )
        })
    }

    /// Reads a job's files on a thread of their own.
    fn validate(self: &Arc<Self>, job: Arc<Job>) {
        job.is_active.store(true, Ordering::SeqCst);
        self.work("validation", move |jobs| {
            runner::validate(jobs, &job);
            job.rest();
            jobs.wake();
        });
    }

    /// Does something on a thread that [`finish`](Self::finish) waits for.
    fn work(self: &Arc<Self>, name: &str, work: impl FnOnce(&Arc<Self>) + Send + 'static) {
        *lock(&self.working) += 1;
        let jobs = Arc::clone(self);
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                work(&jobs);
                *lock(&jobs.working) -= 1;
                jobs.rested.notify_all();
            });
        if let Err(error) = thread {
            tracing::error!("no thread for {name}: {error}");
            *lock(&self.working) -= 1;
        }
    }

    /// Lets the thread that trains look for what is to be done.
    fn wake(&self) {
        let _all = lock(&self.all);
        self.wake.notify_all();
    }

    fn is_stopping(&self) -> bool {
        self.is_stopping.load(Ordering::SeqCst)
    }

    /// Ends the work after the step under way, with a checkpoint; jobs stay as they are and go on at the next start.
    pub(crate) fn stop(&self) {
        self.is_stopping.store(true, Ordering::SeqCst);
        for job in self.all() {
            job.stop.store(true, Ordering::SeqCst);
        }
        self.wake();
    }

    /// Waits until all work has ended, at most so long.
    pub(crate) fn finish(&self, patience: Duration) {
        let end = Instant::now() + patience;
        let mut working = lock(&self.working);
        while *working > 0 {
            let Some(left) = end.checked_duration_since(Instant::now()) else {
                tracing::warn!("a job was still at work; it goes on from its last checkpoint");
                return;
            };
            let waited = self.rested.wait_timeout(working, left);
            working = match waited {
                Ok((working, _)) => working,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
    }

    /// Sets the gauges of jobs.
    pub(crate) fn measure(&self) {
        let all = self.all();
        for status in Status::ALL {
            let count = all.iter().filter(|job| job.status() == status).count();
            metrics::gauge!("lowrank_jobs", "status" => status.name()).set(count as f64);
        }
    }
}

/// The jobs of a folder. One whose record cannot be read is left alone.
fn read_jobs(folder: &Path) -> std::io::Result<Vec<Arc<Job>>> {
    sweep(folder);
    let mut all = Vec::new();
    for entry in fs::read_dir(folder)? {
        let folder = entry?.path();
        let text = fs::read_to_string(folder.join("job.json"));
        let record = text.map_err(|error| error.to_string()).and_then(|text| {
            serde_json::from_str::<job::Record>(&text).map_err(|error| error.to_string())
        });
        match record {
            Ok(record) => all.push(Arc::new(Job::new(folder, record))),
            Err(error) => tracing::warn!("{} is left alone: {error}", folder.display()),
        }
    }
    all.sort_by_key(|job| job.record().number);
    Ok(all)
}

/// Deletes what an earlier server left unfinished.
fn sweep(folder: &Path) {
    let Ok(entries) = fs::read_dir(folder) else {
        return;
    };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with('.') && name.ends_with(".tmp") {
            let path = entry.path();
            let done = if path.is_dir() {
                fs::remove_dir_all(&path)
            } else {
                fs::remove_file(&path)
            };
            if let Err(error) = done {
                tracing::warn!("{}: {error}", path.display());
            }
        }
    }
}

/// Whether a text may be an id with this prefix: nothing else becomes a part of a path.
fn is_id(text: &str, prefix: &str) -> bool {
    let tail = text.strip_prefix(prefix);
    tail.is_some_and(|tail| !tail.is_empty() && tail.chars().all(|c| c.is_ascii_alphanumeric()))
}

/// A message with another name in place of a path of the server.
fn without_paths(message: &str, path: &Path, name: &str) -> String {
    message.replace(&path.display().to_string(), name)
}
