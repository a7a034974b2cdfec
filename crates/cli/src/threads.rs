//! The threads that everything computes with: rayon's global pool, started before anything can need it.
//!
//! Rayon starts its pool by itself at the first use, and panics where the system refuses a thread, as containers and
//! `ulimit -u` do. A pool that could not be started cannot be tried again either. So the threads are started here first,
//! as many as there may be, and the pool is made of those.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::{env, io, thread};

use anyhow::Context;
use rayon::{ThreadBuilder, ThreadPoolBuilder};

use crate::failure::Misuse;

/// Threads that are left to others where the system does not give as many as are wanted: for signals, and to spare.
const RESERVE: usize = 2;

/// Names the processor as which this one computes, for measurements: one that has no more than that.
const PROCESSOR: &str = "LOWRANK_CPU";

static STARTED: AtomicBool = AtomicBool::new(false);

/// Starts the threads, once in a process: `threads` of them where a number is given, but never more than there are
/// processors for this process. More would only wait for each other, and results have the same bits with any number.
///
/// # Errors
/// When the number is zero, so many cannot be started, or the environment names a processor that this one cannot stand for.
pub fn set_threads(threads: Option<usize>) -> anyhow::Result<()> {
    if threads == Some(0) {
        return Err(Misuse::new("--threads must be 1 or greater").into());
    }
    if STARTED.swap(true, Ordering::SeqCst) {
        return Ok(());
    }
    if let Some(name) = env::var_os(PROCESSOR).filter(|name| !name.is_empty()) {
        let name = name.to_string_lossy();
        if let Err(message) = lowrank::kernels::limit_engine(&name) {
            return Err(Misuse::new(format!("{PROCESSOR}={name}: {message}")).into());
        }
    }
    let processors = thread::available_parallelism().ok().map(usize::from);
    let asked = threads.or_else(|| from_environment(|name| env::var(name).ok()));
    let wanted = limited(asked, processors);
    if let Some(asked) = asked.filter(|&asked| asked > wanted) {
        let name = match threads {
            Some(_) => "--threads",
            None => "RAYON_NUM_THREADS",
        };
        tracing::warn!(
            "{name} is {asked}, and this process has {wanted} processor{}; {} used",
            if wanted == 1 { "" } else { "s" },
            counted(wanted)
        );
    }
    let (mut workers, refusal) = start(wanted);
    if let Some(error) = refusal {
        let found = workers.len();
        // One is enough where one is wanted: the main thread.
        if threads.is_some() && wanted > 1 {
            return Err(Misuse::new(format!(
                "--threads {wanted}: the system starts only {found} ({error}); lower --threads, or raise the limit on processes (ulimit -u, pids.max) or on memory (ulimit -v)"
            ))
            .into());
        }
        workers.truncate(found.saturating_sub(RESERVE));
        if wanted > 1 {
            tracing::warn!(
                "the system starts only {found} of {wanted} threads ({error}); {} used",
                counted(workers.len().max(1))
            );
        }
    }
    pool(workers).context("cannot start the threads")
}

fn counted(threads: usize) -> String {
    match threads {
        1 => "1 thread is".to_owned(),
        _ => format!("{threads} threads are"),
    }
}

/// As many as are asked for, else one a processor, and never more than that.
fn limited(asked: Option<usize>, processors: Option<usize>) -> usize {
    match (asked, processors) {
        (Some(asked), Some(processors)) => asked.min(processors),
        (Some(one), None) | (None, Some(one)) => one,
        (None, None) => 1,
    }
}

/// What rayon's own variables ask for. As it does, anything that is no number of threads is passed over.
fn from_environment(variable: impl Fn(&str) -> Option<String>) -> Option<usize> {
    let number = |name| variable(name)?.parse::<usize>().ok();
    match number("RAYON_NUM_THREADS") {
        Some(0) => None,
        Some(threads) => Some(threads),
        None => number("RAYON_RS_NUM_CPUS").filter(|&threads| threads > 0),
    }
}

/// Starts threads that wait for a worker's place in the pool; one that gets none ends. The error is that of the first
/// thread that could not be started.
fn start(count: usize) -> (Vec<Sender<ThreadBuilder>>, Option<io::Error>) {
    let mut workers = Vec::new();
    for index in 0..count {
        let (place, given) = channel::<ThreadBuilder>();
        let thread = thread::Builder::new().name(format!("compute {index}"));
        let started = thread.spawn(move || {
            if let Ok(worker) = given.recv() {
                worker.run();
            }
        });
        match started {
            Ok(_) => workers.push(place),
            Err(error) => return (workers, Some(error)),
        }
    }
    (workers, None)
}

/// Makes the global pool of threads that were started; of the main thread where there are none.
fn pool(workers: Vec<Sender<ThreadBuilder>>) -> anyhow::Result<()> {
    let builder = ThreadPoolBuilder::new().num_threads(workers.len().max(1));
    let builder = if workers.is_empty() {
        builder.use_current_thread()
    } else {
        builder
    };
    let mut places = workers.into_iter();
    builder
        .spawn_handler(move |worker| {
            let place = places.next().ok_or(io::ErrorKind::NotFound)?;
            place.send(worker).map_err(|_| io::ErrorKind::BrokenPipe)?;
            Ok(())
        })
        .build_global()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_are_no_more_threads_than_processors() {
        assert_eq!(limited(Some(1000), Some(2)), 2);
        assert_eq!(limited(Some(1), Some(2)), 1);
        assert_eq!(limited(None, Some(2)), 2);
        assert_eq!(limited(Some(3), None), 3);
        assert_eq!(limited(None, None), 1);
    }

    #[test]
    fn rayons_variables_count_where_they_are_numbers() {
        let asked = |threads: &str, processors: &str| {
            from_environment(|name| {
                let text = if name == "RAYON_NUM_THREADS" {
                    threads
                } else {
                    processors
                };
                Some(text.to_owned()).filter(|text| !text.is_empty())
            })
        };
        assert_eq!(asked("3", ""), Some(3));
        assert_eq!(asked("", "4"), Some(4));
        assert_eq!(asked("0", "4"), None);
        for rubbish in ["x", "-1", "1.5", " 2", ""] {
            assert_eq!(asked(rubbish, ""), None, "{rubbish:?}");
        }
    }
}
