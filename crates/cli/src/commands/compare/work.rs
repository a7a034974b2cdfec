//! The pieces of a comparison: trying learning rates, training and scoring, measuring what a method costs.

use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Context;
use indexmap::IndexMap;
use lowrank::base::{MODEL_FILES, Network, Source};
use lowrank::bench;
use lowrank::classify::predict;
use lowrank::compare::{Cost, SeedResult};
use lowrank::data::{Example, Split, count_rows, split_file};
use lowrank::generate::{GenerateOptions, PromptIds, generate};
use lowrank::model::{Adapter, Decoder, LoadIn};
use lowrank::report::{MetricsLine, StepMetrics, read_metrics};
use lowrank::train::{TrainConfig, split_columns};
use lowrank::tuning::{self, Method};
use lowrank::{Workspace, write_text};
use serde_json::{Map, Value};

use super::child::Children;
use super::config::{Config, Entry, word};
use super::store::{Measured, Store, Trained, Tried, Untrained, with_ending};
use crate::commands::common::adapter_set;

/// Points of a loss curve that are kept.
const CURVE_POINTS: usize = 200;
/// Times that latency and swaps are measured; the median counts.
const ROUNDS: usize = 5;
/// Files that a task's folder adds to the base.
const ADAPTER_FILES: &[&str] = &["adapter_config.json", "adapter_model.safetensors"];

/// Something to do.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Piece {
    /// Loss and scores of the base.
    Base,
    /// A short training with one of several learning rates.
    Rate(f64),
    /// A training with a seed, and its scores.
    Seed(u64),
    /// Speed, memory, latency and swaps.
    Cost,
}

impl Piece {
    /// Its name in the store.
    pub(super) fn name(self) -> String {
        match self {
            Self::Base => "scores".to_owned(),
            Self::Rate(rate) => format!("rate-{rate:e}"),
            Self::Seed(seed) => format!("seed-{seed}"),
            Self::Cost => "cost".to_owned(),
        }
    }

    /// What is done, for a line of progress.
    pub(super) fn title(self) -> String {
        match self {
            Self::Base => "loss and scores without training".to_owned(),
            Self::Rate(rate) => format!("trying the learning rate {rate:e}"),
            Self::Seed(seed) => format!("training with seed {seed}"),
            Self::Cost => "measuring speed, memory and latency".to_owned(),
        }
    }
}

/// Everything that the pieces share.
pub(super) struct Worker<'a> {
    /// The comparison.
    pub config: &'a Config,
    /// Its folder.
    store: &'a Store,
    /// How children are run.
    pub children: Children<'a>,
    /// Whether whole models stay after they were scored.
    keep_models: bool,
    /// Bytes of each file of rows: other rows are other results.
    row_bytes: Value,
}

impl<'a> Worker<'a> {
    /// # Errors
    /// Rows that cannot be looked at.
    pub(super) fn new(
        config: &'a Config,
        store: &'a Store,
        children: Children<'a>,
        keep_models: bool,
    ) -> anyhow::Result<Self> {
        Ok(Self {
            config,
            store,
            children,
            keep_models,
            row_bytes: row_bytes(config)?,
        })
    }

    /// The base's scores, if they are there.
    ///
    /// # Errors
    /// When the file is damaged or of other settings.
    pub(super) fn untrained(&self) -> anyhow::Result<Option<Untrained>> {
        Store::find(&self.place(None, Piece::Base), &self.scored(&Map::new())?)
    }

    /// The losses of the learning rates tried so far.
    ///
    /// # Errors
    /// As [`untrained`](Self::untrained).
    pub(super) fn tried(&self, entry: &Entry) -> anyhow::Result<Vec<Tried>> {
        let mut tried = Vec::new();
        for &rate in &entry.rates {
            let place = self.place(Some(entry), Piece::Rate(rate));
            tried.extend(Store::find::<Tried>(
                &place,
                &self.rate_settings(entry, rate),
            )?);
        }
        Ok(tried)
    }

    /// The learning rate that trains: the only one, or the best of those tried, once all were.
    ///
    /// # Errors
    /// When none of them trained at all.
    pub(super) fn rate(&self, entry: &Entry) -> anyhow::Result<Option<f64>> {
        if let [rate] = entry.rates[..] {
            return Ok(Some(rate));
        }
        let tried = self.tried(entry)?;
        if tried.len() < entry.rates.len() {
            return Ok(None);
        }
        let losses = tried
            .iter()
            .filter_map(|one| Some((one.loss?, one.learning_rate)));
        let best = losses.min_by(|a, b| a.0.total_cmp(&b.0));
        match best {
            Some((_, rate)) => Ok(Some(rate)),
            None => anyhow::bail!(
                "no learning rate of {} trains: each of {:?} fails; give lower ones",
                entry.name,
                entry.rates
            ),
        }
    }

    /// A finished training.
    ///
    /// # Errors
    /// As [`untrained`](Self::untrained).
    pub(super) fn trained(&self, entry: &Entry, seed: u64) -> anyhow::Result<Option<Trained>> {
        // Where no rate trains there is nothing to find; whoever would train says so.
        let Ok(Some(rate)) = self.rate(entry) else {
            return Ok(None);
        };
        let settings = self.seed_settings(entry, rate, seed)?;
        Store::find(&self.place(Some(entry), Piece::Seed(seed)), &settings)
    }

    /// A method's cost.
    ///
    /// # Errors
    /// As [`untrained`](Self::untrained).
    pub(super) fn measured(&self, entry: &Entry) -> anyhow::Result<Option<Measured>> {
        let settings = self.cost_settings(entry)?;
        Store::find(&self.place(Some(entry), Piece::Cost), &settings)
    }

    /// Where a piece is kept.
    pub(super) fn place(&self, entry: Option<&Entry>, piece: Piece) -> PathBuf {
        let method = entry.map_or("base", |entry| entry.slug.as_str());
        self.store.place(method, &piece.name())
    }

    /// Makes a piece and keeps it.
    ///
    /// # Errors
    /// [`Interrupted`], or what went wrong.
    pub(super) fn make(&self, entry: Option<&Entry>, piece: Piece) -> anyhow::Result<()> {
        let place = self.place(entry, piece);
        match (piece, entry) {
            (Piece::Base, _) | (_, None) => self.make_base(&place),
            (Piece::Rate(rate), Some(entry)) => self.make_rate(entry, rate, &place),
            (Piece::Seed(seed), Some(entry)) => self.make_seed(entry, seed, &place),
            (Piece::Cost, Some(entry)) => self.make_cost(entry, &place),
        }
    }

    fn make_base(&self, place: &Path) -> anyhow::Result<()> {
        let scored = self.score(None, place)?;
        let settings = self.scored(&Map::new())?;
        let untrained = Untrained {
            loss: scored.loss,
            metrics: scored.metrics,
        };
        Store::keep(place, &settings, untrained)
    }

    fn make_rate(&self, entry: &Entry, rate: f64, place: &Path) -> anyhow::Result<()> {
        let settings = self.rate_settings(entry, rate);
        let loss = match self.train(&settings, place) {
            Ok(outcome) => outcome["eval_loss"].as_f64(),
            Err(error) if matches!(error.downcast_ref(), Some(lowrank::Error::Diverged(_))) => {
                tracing::warn!("{}, learning rate {rate:e}: {error:#}", entry.name);
                None
            }
            Err(error) => return Err(error),
        };
        let tried = Tried {
            learning_rate: rate,
            loss,
        };
        Store::keep(place, &settings, tried)?;
        forget(place)
    }

    fn make_seed(&self, entry: &Entry, seed: u64, place: &Path) -> anyhow::Result<()> {
        let rate = self.rate(entry)?.context("no learning rate was chosen")?;
        let settings = self.seed_settings(entry, rate, seed)?;
        let outcome = self.train(&settings, place)?;
        let scored = self.score(Some((entry.method, place)), place)?;
        let lines = read_metrics(&place.join("metrics.jsonl"))?.lines;
        let trained = Trained {
            learning_rate: rate,
            checkpoint_bytes: task_bytes(entry.method, place),
            held_out: scored.held_out,
            run: SeedResult {
                seed,
                loss: scored.loss,
                metrics: scored.metrics,
                training: thin(&lines),
                validation: held_out_curve(&lines),
                seconds: outcome["seconds"].as_f64().unwrap_or(0.0),
            },
        };
        Store::keep(place, &settings, trained)?;
        if entry.method.writes_model() && !self.keep_models {
            forget(place)?;
        }
        Ok(())
    }

    fn make_cost(&self, entry: &Entry, place: &Path) -> anyhow::Result<()> {
        let settings = self.cost_settings(entry)?;
        let outcome = self.train(&settings, place)?;
        let lines = read_metrics(&place.join("metrics.jsonl"))?.lines;
        // The first step also brings in the weights from the disk and the buffers from the system.
        let speeds = steps(&lines).skip(1).map(|step| step.tokens_per_second);
        let base = self.load(&self.config.model, self.config.shared()?.load_in)?;
        let task = self.load_task(entry.method, place, &base)?;
        let (own, bare) = self.latency(&base, &task)?;
        let swaps = (0..ROUNDS).map(|_| self.switch(entry.method, place, &base, own));
        let switch = median(swaps)?;
        let bytes = task_bytes(entry.method, place);
        let measured = Measured {
            machine: machine(),
            checkpoint_bytes: bytes,
            cost: Cost {
                tokens_per_second: median(speeds.map(Ok))?,
                peak_memory: outcome["peak_rss"].as_u64().unwrap_or(0),
                milliseconds_per_token: 1e3 * own,
                base_milliseconds_per_token: 1e3 * bare,
                mergeable: entry.method.merges(),
                positions_taken: entry.positions,
                switch_bytes: bytes,
                switch_milliseconds: 1e3 * switch,
            },
        };
        Store::keep(place, &settings, measured)?;
        forget(place)
    }

    /// Runs a training with these settings in the folder `place`, or goes on with it; its outcome.
    fn train(&self, settings: &Map<String, Value>, place: &Path) -> anyhow::Result<Value> {
        let outcome = with_ending(place, "outcome.json");
        if place.is_dir()
            && let Some(known) = fs::read_to_string(&outcome)
                .ok()
                .and_then(|text| serde_json::from_str(&text).ok())
        {
            return Ok(known);
        }
        let mut settings = settings.clone();
        settings.remove(SIZES);
        settings.remove(TEXTS);
        settings.remove(METRICS);
        settings.insert("output".to_owned(), place.display().to_string().into());
        let yaml = with_ending(place, "yaml");
        write_text(&yaml, &serde_saphyr::to_string(&settings)?)?;
        let config: TrainConfig = serde_json::from_value(Value::Object(settings))?;
        let mut args = vec!["train".to_owned(), yaml.display().to_string()];
        if has_checkpoint(place) {
            args.push("--resume".to_owned());
        } else if place.exists() {
            args.push("--overwrite".to_owned());
        }
        let columns = config.columns.as_deref().map(split_columns);
        let rows = count_rows(&config.data, Split::Train, columns.as_deref())?;
        let total = config.total_steps(rows);
        let log = with_ending(place, "log");
        let found = self.children.train(&args, &log, place, total)?;
        write_text(&outcome, &serde_json::to_string_pretty(&found)?)?;
        Ok(found)
    }

    /// Loss and scores of the base or of what was trained in a folder.
    fn score(&self, task: Option<(Method, &Path)>, place: &Path) -> anyhow::Result<Scored> {
        let log = with_ending(place, "log");
        let mut args = vec!["eval".to_owned()];
        let shared = self.config.shared()?;
        let mut load_in = shared.load_in;
        match task {
            Some((method, folder)) if method.writes_model() => {
                args.push(format!("--model={}", folder.display()));
                load_in = None;
            }
            Some((_, folder)) => {
                args.push(format!("--model={}", self.config.model));
                args.push(format!("--adapter={}", folder.display()));
            }
            None => args.push(format!("--model={}", self.config.model)),
        }
        args.push(format!("--data={}", self.config.held_out.display()));
        args.push(format!("--base-dtype={}", word(&shared.base_dtype)));
        args.extend(load_in.map(|load_in| format!("--load-in={}", word(&load_in))));
        let mut loss_args = args.clone();
        loss_args.push(format!("--on-bad-row={}", word(&shared.on_bad_row)));
        let boundary = word(&shared.completion_boundary);
        loss_args.push(format!("--completion-boundary={boundary}"));
        loss_args.push(format!("--max-seq-length={}", shared.max_seq_length));
        if let Some(columns) = &shared.columns {
            loss_args.push(format!("--columns={columns}"));
        }
        if shared.train_on_prompt {
            loss_args.push("--train-on-prompt".to_owned());
        }
        let report = if self.config.labels.is_none() {
            self.children.run_on_ranks(&loss_args, &log)?
        } else {
            self.children.run(&loss_args, &log)?
        };
        let of_classes = self.config.metrics.iter();
        let mut scored = Scored {
            loss: report["loss"].as_f64().unwrap_or(f64::NAN),
            held_out: held_out(&report),
            metrics: of_classes
                .filter_map(|name| Some((name.clone(), report[name].as_f64()?)))
                .collect(),
        };
        if let Some(texts) = &self.config.texts {
            let predictions = with_ending(place, "predictions.jsonl");
            if predictions.exists() {
                fs::remove_file(&predictions)
                    .with_context(|| format!("cannot replace {}", predictions.display()))?;
            }
            args.extend(texts.flags());
            args.push(format!("--predictions={}", predictions.display()));
            let report = self.children.run(&args, &log)?;
            let scores = report["metrics"].as_object().cloned().unwrap_or_default();
            scored.metrics = scores
                .into_iter()
                .map(|(name, score)| (name, score.as_f64().unwrap_or(f64::NAN)))
                .collect();
        }
        Ok(scored)
    }

    /// A model as it is compared here; what full training has written is not quantized again.
    fn load(&self, model: &str, load_in: Option<LoadIn>) -> anyhow::Result<Network> {
        let dtype = self.config.shared()?.base_dtype.into();
        let (purpose, labels) = (self.config.purpose, self.config.labels.clone());
        let source = Source::find(model)?.load_in(load_in)?;
        Ok(source.load_for(dtype, purpose, labels, 0)?)
    }

    /// What was trained in a folder.
    fn load_task(&self, method: Method, folder: &Path, base: &Network) -> anyhow::Result<Task> {
        if method.writes_model() {
            let own = self.load(&folder.display().to_string(), None)?;
            return Ok(Task::Model(Box::new(own)));
        }
        let loaded = tuning::load(folder, base.decoder.config())?;
        Ok(Task::Adapter(Box::new(loaded.adapter)))
    }

    /// Seconds a token, or a row that is classified, at batch 1 with the task and without, in turn.
    fn latency(&self, base: &Network, task: &Task) -> anyhow::Result<(f64, f64)> {
        let cost = self.config.cost;
        let vocabulary = self.config.shapes.vocab_size as u32;
        let prompt = |round: usize| -> Vec<u32> {
            // Any tokens do, as long as they differ.
            let token = |place: usize| ((round * 7919 + place * 104_729) as u32) % vocabulary;
            (0..cost.prompt_tokens).map(token).collect()
        };
        let time = |model: &Decoder, adapter: Option<&Adapter>, ids: Vec<u32>| {
            if self.config.labels.is_some() {
                return seconds_of_row(model, adapter, ids);
            }
            bench::generate(model, adapter.as_slice(), &[ids], cost.new_tokens, false).median_pass()
        };
        let (mut own, mut bare) = (Vec::new(), Vec::new());
        for round in 0..ROUNDS {
            let (model, adapter) = task.parts(base);
            own.push(time(model, adapter, prompt(round)));
            bare.push(time(&base.decoder, None, prompt(round)));
        }
        Ok((
            median(own.into_iter().map(Ok))?,
            median(bare.into_iter().map(Ok))?,
        ))
    }

    /// Seconds from the files of a task to a first token or row with it, less what that takes anyway.
    fn switch(
        &self,
        method: Method,
        folder: &Path,
        base: &Network,
        anyway: f64,
    ) -> anyhow::Result<f64> {
        let begun = Instant::now();
        let task = self.load_task(method, folder, base)?;
        let (model, adapter) = task.parts(base);
        if self.config.labels.is_some() {
            let ids = vec![0; self.config.cost.prompt_tokens];
            seconds_of_row(model, adapter, ids);
        } else {
            first_token(model, adapter);
        }
        Ok((begun.elapsed().as_secs_f64() - anyway).max(0.0))
    }

    fn rate_settings(&self, entry: &Entry, rate: f64) -> Map<String, Value> {
        let seed = entry.seeds.first().copied().unwrap_or_default();
        self.training(&entry.sweep, rate, seed)
    }

    fn seed_settings(
        &self,
        entry: &Entry,
        rate: f64,
        seed: u64,
    ) -> anyhow::Result<Map<String, Value>> {
        self.scored(&self.training(&entry.settings, rate, seed))
    }

    fn cost_settings(&self, entry: &Entry) -> anyhow::Result<Map<String, Value>> {
        let rate = entry.rates.first().copied().unwrap_or_default();
        let seed = entry.seeds.first().copied().unwrap_or_default();
        let mut settings = self.training(&entry.settings, rate, seed);
        let data = split_file(&self.config.data, Split::Train)?;
        let data = data.unwrap_or_else(|| self.config.data.clone());
        // Rows to evaluate would add their time and memory to those of training.
        for key in [
            "valid_data",
            "eval_steps",
            "save_steps",
            "early_stopping_patience",
        ] {
            settings.insert(key.to_owned(), Value::Null);
        }
        settings.insert("load_best_model_at_end".to_owned(), false.into());
        settings.insert("data".to_owned(), data.display().to_string().into());
        settings.insert("max_steps".to_owned(), self.config.cost.steps.into());
        Ok(settings)
    }

    fn training(&self, settings: &Map<String, Value>, rate: f64, seed: u64) -> Map<String, Value> {
        let mut settings = settings.clone();
        settings.insert("learning_rate".to_owned(), rate.into());
        settings.insert("seed".to_owned(), seed.into());
        for key in ["output", "threads", "memory_budget"] {
            settings.insert(key.to_owned(), Value::Null);
        }
        settings.insert(SIZES.to_owned(), self.row_bytes.clone());
        settings
    }

    /// Settings of something that is scored.
    fn scored(&self, settings: &Map<String, Value>) -> anyhow::Result<Map<String, Value>> {
        let mut settings = settings.clone();
        settings.insert("model".to_owned(), self.config.model.clone().into());
        settings.insert(SIZES.to_owned(), self.row_bytes.clone());
        settings.insert(TEXTS.to_owned(), serde_json::to_value(&self.config.texts)?);
        if !self.config.metrics.is_empty() {
            settings.insert(METRICS.to_owned(), self.config.metrics.clone().into());
        }
        Ok(settings)
    }
}

fn row_bytes(config: &Config) -> anyhow::Result<Value> {
    let mut files = Vec::new();
    for split in [Split::Train, Split::Valid, Split::Test] {
        files.extend(split_file(&config.data, split)?);
    }
    files.extend(config.shared()?.valid_data);
    let mut sizes = Map::new();
    for file in files {
        let name = file.file_name().unwrap_or_default();
        let bytes = fs::metadata(&file)
            .with_context(|| format!("cannot look at {}", file.display()))?
            .len();
        sizes.insert(name.to_string_lossy().into_owned(), bytes.into());
    }
    Ok(Value::Object(sizes))
}

/// Keys of a piece's settings that `train` does not have: the sizes of the files of rows, how texts are made, and a classifier's metrics.
const SIZES: &str = "bytes_of_rows";
const TEXTS: &str = "texts";
const METRICS: &str = "metrics";

struct Scored {
    loss: f64,
    held_out: String,
    metrics: IndexMap<String, f64>,
}

/// What was trained, loaded.
enum Task {
    Adapter(Box<Adapter>),
    Model(Box<Network>),
}

impl Task {
    fn parts<'a>(&'a self, base: &'a Network) -> (&'a Decoder, Option<&'a Adapter>) {
        match self {
            Self::Adapter(adapter) => (&base.decoder, Some(adapter)),
            Self::Model(own) => (&own.decoder, None),
        }
    }
}

/// Seconds to classify one row.
fn seconds_of_row(model: &Decoder, adapter: Option<&Adapter>, ids: Vec<u32>) -> f64 {
    let row = Example {
        ids,
        ..Example::default()
    };
    let ws = Workspace::new();
    let begun = Instant::now();
    predict(
        model,
        adapter,
        &[row],
        &ws,
        |_, _| ControlFlow::Continue(()),
    );
    begun.elapsed().as_secs_f64()
}

/// Generates one token.
fn first_token(model: &Decoder, adapter: Option<&Adapter>) {
    let one: Vec<&Adapter> = adapter.into_iter().collect();
    let prompt = PromptIds {
        ids: vec![0],
        adapter: adapter.map(|_| 0),
    };
    let options = GenerateOptions {
        max_new_tokens: 1,
        ..GenerateOptions::default()
    };
    let ws = Workspace::new();
    generate(
        model,
        adapter_set(&one),
        &[prompt],
        &options,
        &ws,
        |_, _| true,
    );
}

/// Bytes that a task takes beside the base.
fn task_bytes(method: Method, folder: &Path) -> u64 {
    let names = if method.writes_model() {
        MODEL_FILES
    } else {
        ADAPTER_FILES
    };
    let sizes = names
        .iter()
        .filter_map(|name| Some(fs::metadata(folder.join(name)).ok()?.len()));
    sizes.sum()
}

/// "740 rows of test.jsonl".
fn held_out(report: &Value) -> String {
    let file = report["data"].as_str().map(Path::new);
    let name = file.and_then(Path::file_name).unwrap_or_default();
    format!("{} rows of {}", report["rows"], name.to_string_lossy())
}

fn steps(lines: &[MetricsLine]) -> impl Iterator<Item = &StepMetrics> {
    lines.iter().filter_map(|line| match line {
        MetricsLine::Step(step) => Some(step),
        MetricsLine::Eval(_) => None,
    })
}

/// The training loss; of a long run, means of neighbouring steps.
fn thin(lines: &[MetricsLine]) -> Vec<(u64, f64)> {
    let all: Vec<(u64, f64)> = steps(lines).map(|step| (step.step, step.loss)).collect();
    all.chunks(all.len().div_ceil(CURVE_POINTS).max(1))
        .filter_map(|part| {
            let mean = part.iter().map(|(_, loss)| loss).sum::<f64>() / part.len() as f64;
            Some((part.last()?.0, mean))
        })
        .collect()
}

fn held_out_curve(lines: &[MetricsLine]) -> Vec<(u64, f64)> {
    lines
        .iter()
        .filter_map(|line| match line {
            MetricsLine::Eval(eval) => Some((eval.step, eval.eval_loss)),
            MetricsLine::Step(_) => None,
        })
        .collect()
}

fn median(values: impl Iterator<Item = anyhow::Result<f64>>) -> anyhow::Result<f64> {
    let mut values = values.collect::<anyhow::Result<Vec<f64>>>()?;
    values.sort_by(f64::total_cmp);
    values
        .get(values.len() / 2)
        .copied()
        .context("a training of so few steps has no speed; raise steps of cost")
}

fn has_checkpoint(folder: &Path) -> bool {
    fs::read_dir(folder.join("checkpoints")).is_ok_and(|mut entries| entries.next().is_some())
}

/// Takes a training's folder away once nothing needs it.
fn forget(folder: &Path) -> anyhow::Result<()> {
    let _ = fs::remove_file(with_ending(folder, "outcome.json"));
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot delete {}", folder.display()))
        }
        _ => Ok(()),
    }
}

/// The machine in words: "2 threads, Intel Xeon …".
fn machine() -> String {
    let threads = rayon::current_num_threads();
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key.trim() == "model name").then(|| value.trim().to_owned())
    });
    let name = name.unwrap_or_else(|| std::env::consts::ARCH.to_owned());
    format!("{threads} threads, {name}")
}
