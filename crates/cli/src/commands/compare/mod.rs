//! `lowrank compare`: several methods on the same rows, one budget, one table.

mod child;
mod config;
mod show;
mod store;
mod work;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::thread::sleep;
use std::time::Duration;

use anyhow::Context;
use clap::{Args, ValueEnum};
use lowrank::compare::{BaseResult, Comparison, MethodResult};
use lowrank::{report, write_text};
use serde_json::json;

use crate::failure::{Interrupted, paragraph};
use crate::interrupt;
use crate::output::Output;
use crate::progress::{Mode, stderr_line};
use child::Children;
use config::{Config, Entry, Overrides};
use store::Store;
use work::{Piece, Worker};

/// How long to wait for a piece that another process makes.
const WAIT: Duration = Duration::from_millis(500);

/// Arguments of `lowrank compare`.
#[derive(Debug, Args)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is a switch of the command line"
)]
pub struct CompareArgs {
    /// The comparison, a YAML file: model, data, methods with their options, seeds, a budget
    #[arg(value_name = "CONFIG")]
    pub config: PathBuf,

    /// The folder of the comparison; what is finished in it is not done again
    #[arg(long, value_name = "DIR")]
    pub output: PathBuf,

    /// The base model, instead of the file's
    #[arg(long, value_name = "MODEL")]
    pub model: Option<String>,

    /// The rows, instead of the file's: a folder with train.jsonl, valid.jsonl and maybe test.jsonl
    #[arg(long, value_name = "PATH")]
    pub data: Option<PathBuf>,

    /// Only this method, by its name; may be repeated
    #[arg(long, value_name = "NAME")]
    pub only: Vec<String>,

    /// Only these kinds of work
    #[arg(
        long,
        value_name = "STAGES",
        value_delimiter = ',',
        default_value = "sweep,train,cost"
    )]
    pub stages: Vec<Stage>,

    /// Say what would be run, with solved sizes and numbers of values, and run nothing
    #[arg(long, conflicts_with = "report")]
    pub dry_run: bool,

    /// Run nothing, and put together what is finished
    #[arg(long)]
    pub report: bool,

    /// Keep whole models of full fine-tuning after they were scored; adapters are always kept
    #[arg(long)]
    pub keep_models: bool,

    /// Threads of each training [default: one a core]
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,

    /// Start trainings, and passes over held-out rows, as ranks: a command such as 'mpirun -n 4'
    #[arg(long, value_name = "COMMAND")]
    pub launcher: Option<String>,

    /// Print the comparison as one JSON object
    #[arg(long)]
    pub json: bool,
}

/// Kinds of work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Stage {
    /// Trying learning rates, where a method lists several
    Sweep,
    /// Training with each seed, and scoring
    Train,
    /// Measuring speed, memory, latency and swaps; leave the machine alone meanwhile
    Cost,
}

/// Runs the command.
///
/// # Errors
/// A file that cannot be used; a run that fails; Ctrl-C or another signal that asks to stop.
pub fn run(args: &CompareArgs, progress: Mode) -> anyhow::Result<()> {
    let output = Output::detect(args.json);
    let overrides = Overrides {
        model: args.model.clone(),
        data: args.data.clone(),
        only: args.only.clone(),
    };
    let config = Config::read(&args.config, &overrides)?;
    if args.dry_run {
        return output.result(&planned(&config), |output| show::plan(&config, output));
    }
    let store = Store::new(&args.output);
    let stop = interrupt::install_all("stopping after what is under way has been saved")?;
    let launcher = args.launcher.as_deref().unwrap_or_default();
    let launcher: Vec<String> = launcher.split_whitespace().map(str::to_owned).collect();
    let children = Children {
        launcher: &launcher,
        threads: args.threads,
        progress,
        stop,
    };
    let worker = Worker::new(&config, &store, children, args.keep_models)?;
    let failures = if args.report {
        Vec::new()
    } else {
        work_off(&worker, args, progress)?
    };
    let told = tell(&worker, &args.output, &output);
    if failures.is_empty() {
        return told;
    }
    let untold = match told {
        Ok(()) => String::new(),
        // A full disk, as a rule, which the runs have met, too.
        Err(error) => format!("\nnor could the report be written: {error:#}"),
    };
    anyhow::bail!(
        "{} of the runs failed:\n  - {}{untold}\nwhat is finished is kept; mend the cause and run the same command again",
        failures.len(),
        failures.join("\n  - ")
    )
}

/// Writes the report of what is there, and prints it.
fn tell(worker: &Worker<'_>, root: &Path, output: &Output) -> anyhow::Result<()> {
    let comparison = collect(worker)?;
    fs::create_dir_all(root)
        .with_context(|| format!("cannot make the folder {}", root.display()))?;
    for (name, text) in [
        (
            "comparison.json",
            serde_json::to_string_pretty(&comparison)?,
        ),
        ("comparison.csv", report::comparison::csv(&comparison)),
        ("comparison.html", report::comparison::html(&comparison)),
    ] {
        write_text(&root.join(name), &text)?;
    }
    output.result(&comparison, |output| {
        let shown = root.join("comparison.html");
        let tables = show::tables(&comparison, output);
        format!("{tables}\nwritten to {}\n", shown.display())
    })
}

/// A piece of a method; no method: the base.
type Job<'a> = (Option<&'a Entry>, Piece);

/// Makes every piece that is wanted and not there; says which failed.
fn work_off(worker: &Worker, args: &CompareArgs, progress: Mode) -> anyhow::Result<Vec<String>> {
    let jobs = jobs(worker.config, args);
    let mut failures: Vec<String> = Vec::new();
    let mut failed: Vec<usize> = Vec::new();
    loop {
        let mut waiting = false;
        for (index, &(entry, piece)) in jobs.iter().enumerate() {
            if worker.children.stop.load(Ordering::SeqCst) {
                return Err(child::interrupted());
            }
            if failed.contains(&index) || is_done(worker, entry, piece)? {
                continue;
            }
            let name = entry.map_or("the base", |entry| entry.name.as_str());
            let failure =
                |error: &anyhow::Error| format!("{name}, {}: {}", piece.title(), paragraph(error));
            match is_ready(worker, entry, piece) {
                Ok(true) => {}
                Ok(false) => {
                    // The learning rates are being tried, by this process or another, or have failed.
                    waiting |= !sweep_failed(&jobs, &failed, entry);
                    continue;
                }
                Err(error) => {
                    failed.push(index);
                    failures.push(failure(&error));
                    continue;
                }
            }
            let Some(_claim) = Store::claim(&worker.place(entry, piece))? else {
                waiting = true;
                continue;
            };
            // Another process may have finished it between the two looks.
            if is_done(worker, entry, piece)? {
                continue;
            }
            if progress != Mode::Quiet {
                stderr_line(&format!(
                    "[{}/{}] {name}: {}",
                    index + 1,
                    jobs.len(),
                    piece.title()
                ));
            }
            if let Err(error) = worker.make(entry, piece) {
                if error.is::<Interrupted>() {
                    return Err(error);
                }
                failed.push(index);
                failures.push(failure(&error));
            }
        }
        if !waiting {
            return Ok(failures);
        }
        sleep(WAIT);
    }
}

/// All that is wanted, in the order that gives a first picture of every method early.
fn jobs<'a>(config: &'a Config, args: &CompareArgs) -> Vec<Job<'a>> {
    let wants = |stage| args.stages.contains(&stage);
    let chosen: Vec<&Entry> = config
        .entries
        .iter()
        .filter(|entry| args.only.is_empty() || args.only.iter().any(|name| entry.is_called(name)))
        .collect();
    let mut jobs: Vec<Job> = Vec::new();
    if wants(Stage::Sweep) {
        for entry in chosen.iter().filter(|entry| entry.rates.len() > 1) {
            jobs.extend(
                entry
                    .rates
                    .iter()
                    .map(|&rate| (Some(*entry), Piece::Rate(rate))),
            );
        }
    }
    if wants(Stage::Train) {
        let most = chosen.iter().map(|entry| entry.seeds.len()).max();
        for place in 0..most.unwrap_or(0) {
            let seeds = chosen
                .iter()
                .filter_map(|entry| Some((*entry, *entry.seeds.get(place)?)));
            jobs.extend(seeds.map(|(entry, seed)| (Some(entry), Piece::Seed(seed))));
        }
        if config.has_base() {
            jobs.push((None, Piece::Base));
        }
    }
    if wants(Stage::Cost) {
        jobs.extend(chosen.iter().map(|entry| (Some(*entry), Piece::Cost)));
    }
    jobs
}

fn is_done(worker: &Worker, entry: Option<&Entry>, piece: Piece) -> anyhow::Result<bool> {
    Ok(match (entry, piece) {
        (None, _) | (_, Piece::Base) => worker.untrained()?.is_some(),
        (Some(entry), Piece::Rate(rate)) => {
            let tried = worker.tried(entry)?;
            tried.iter().any(|one| one.learning_rate == rate)
        }
        (Some(entry), Piece::Seed(seed)) => worker.trained(entry, seed)?.is_some(),
        (Some(entry), Piece::Cost) => worker.measured(entry)?.is_some(),
    })
}

/// Whether everything that a piece builds on is there.
fn is_ready(worker: &Worker, entry: Option<&Entry>, piece: Piece) -> anyhow::Result<bool> {
    match (entry, piece) {
        (Some(entry), Piece::Seed(_)) => Ok(worker.rate(entry)?.is_some()),
        _ => Ok(true),
    }
}

/// Whether a learning rate of this method cannot be tried, so that waiting for it is in vain; or nobody tries it.
fn sweep_failed(jobs: &[Job], failed: &[usize], entry: Option<&Entry>) -> bool {
    let of_this = |job: &Job| {
        matches!(job.1, Piece::Rate(_))
            && job.0.map(|other| &other.slug) == entry.map(|entry| &entry.slug)
    };
    let wanted = jobs.iter().any(of_this);
    !wanted || failed.iter().any(|&index| of_this(&jobs[index]))
}

/// Puts together what is finished.
fn collect(worker: &Worker) -> anyhow::Result<Comparison> {
    let config = worker.config;
    let metrics = config
        .texts
        .as_ref()
        .map_or_else(|| config.metrics.clone(), |texts| texts.metrics.clone());
    let mut held_out = String::new();
    let mut machines: Vec<String> = Vec::new();
    let mut bare = Vec::new();
    let mut methods = Vec::new();
    for entry in &config.entries {
        let tried = worker.tried(entry)?;
        let mut trained = Vec::new();
        for &seed in &entry.seeds {
            trained.extend(worker.trained(entry, seed)?);
        }
        let measured = worker.measured(entry)?;
        if let Some(one) = trained.first() {
            held_out.clone_from(&one.held_out);
        }
        if let Some(one) = &measured {
            bare.push(one.cost.base_milliseconds_per_token);
            if !machines.contains(&one.machine) {
                machines.push(one.machine.clone());
            }
        }
        let bytes = trained.first().map(|one| one.checkpoint_bytes);
        let mut method = MethodResult {
            name: entry.name.clone(),
            method: entry.method,
            options: entry.options.clone(),
            trainable_parameters: entry.trainable,
            checkpoint_bytes: bytes.or(measured.as_ref().map(|one| one.checkpoint_bytes)),
            learning_rate: trained.first().map(|one| one.learning_rate),
            sweep: tried
                .iter()
                .map(|one| (one.learning_rate, one.loss))
                .collect(),
            missing_runs: entry.seeds.len() - trained.len(),
            runs: trained.into_iter().map(|one| one.run).collect(),
            loss: None,
            scores: indexmap::IndexMap::new(),
            cost: measured.map(|one| one.cost),
        };
        method.summarize(&metrics);
        methods.push(method);
    }
    let untrained = worker.untrained()?;
    bare.sort_by(f64::total_cmp);
    Ok(Comparison {
        title: config.title.clone(),
        model: config.model.clone(),
        base_parameters: config.shapes.parameters() as u64,
        held_out,
        decoding: config
            .texts
            .as_ref()
            .map(config::Texts::describe)
            .unwrap_or_default(),
        machine: machines.join("; "),
        metrics,
        unit: config.unit(),
        base: BaseResult {
            loss: untrained.as_ref().map(|one| one.loss),
            metrics: untrained.map(|one| one.metrics).unwrap_or_default(),
            milliseconds_per_token: bare.get(bare.len() / 2).copied(),
        },
        methods,
    })
}

/// What `--dry-run` says, for programs.
fn planned(config: &Config) -> serde_json::Value {
    let methods: Vec<_> = config
        .entries
        .iter()
        .map(|entry| {
            json!({
                "name": entry.name,
                "method": entry.method,
                "options": entry.options,
                "trainable_parameters": entry.trainable,
                "learning_rates": entry.rates,
                "seeds": entry.seeds,
            })
        })
        .collect();
    json!({ "title": config.title, "model": config.model, "methods": methods })
}
