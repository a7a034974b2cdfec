//! `lowrank demo`: the whole story on the built-in model and its two tasks, with nothing to download.

use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::Args;
use lowrank::Unfinished;
use lowrank::base::{BUILTIN, BUILTIN_TASKS, BUILTIN_WORDS, Base, Source, write_builtin_task};
use lowrank::data::{DataOptions, Dataset, Split, load_prompts};
use lowrank::generate::{GenerateOptions, PromptIds, generate};
use lowrank::merge::{MergeOptions, merge, passages};
use lowrank::model::AdapterSet;
use lowrank::train::{Outcome, Start, TrainConfig, evaluate, train};
use lowrank::tuning::Method;
use lowrank::tuning::targets::Targets;
use lowrank::tuning::{self, Loaded};
use lowrank::units;
use lowrank::{DType, Workspace};
use serde::Serialize;

use super::train::Watcher;
use crate::failure::Interrupted;
use crate::interrupt;
use crate::output::Output;
use crate::progress::Mode;
use crate::table::{Align, Facts, Table, bold, dim};

/// Optimizer steps of each task: enough that a prompt's names and things arrive in the text.
const STEPS: u64 = 720;
/// Prompts of each task that are shown.
const SAMPLES: usize = 2;

/// Arguments of `lowrank demo`.
#[derive(Debug, Args)]
pub struct DemoArgs {
    /// Keep the data, the adapters and the merged model in this new folder
    #[arg(long, value_name = "DIR")]
    pub output: Option<PathBuf>,

    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// What the demo measured.
#[derive(Debug, Serialize)]
struct Demo {
    model: &'static str,
    base_parameters: usize,
    base_bytes: u64,
    tasks: Vec<Task>,
    seconds: f64,
    kept_in: Option<PathBuf>,
}

/// One task's figures.
#[derive(Debug, Serialize)]
struct Task {
    name: &'static str,
    trainable_parameters: usize,
    adapter_bytes: u64,
    steps: u64,
    train_seconds: f64,
    loss_before: f64,
    loss_after: f64,
    swap_seconds: f64,
    merge_logit_difference: f32,
    carried: Carried,
    samples: Vec<Sample>,
}

/// How many names, animals, things and places of the test prompts arrive in the text, of those that the references take.
#[derive(Clone, Copy, Debug, Default, Serialize)]
struct Carried {
    expected: usize,
    base: usize,
    adapter: usize,
}

impl Carried {
    /// Adds one prompt's words. What stands before a word in both prompt and reference belongs to it: a golden key is no rusty key.
    fn add(&mut self, sample: &Sample) {
        let reference = sample.reference.as_deref().unwrap_or_default();
        let known = || {
            BUILTIN_WORDS
                .lines()
                .filter(|word| has(&sample.prompt, word))
        };
        for word in known().filter(|word| has(reference, word)) {
            // A bear of a teddy bear is none of its own.
            if known().any(|longer| longer != word && has(longer, word)) {
                continue;
            }
            let before = word_before(&sample.prompt, word);
            let phrase = match before.filter(|before| word_before(reference, word) == Some(before))
            {
                Some(before) => format!("{before} {word}"),
                None => word.to_owned(),
            };
            self.expected += 1;
            self.base += usize::from(has(&sample.base, &phrase));
            self.adapter += usize::from(has(&sample.adapter, &phrase));
        }
    }

    /// A share in percent; nothing was lost where nothing was to be carried.
    fn percent(self, arrived: usize) -> f64 {
        match self.expected {
            0 => 100.0,
            expected => 100.0 * arrived as f64 / expected as f64,
        }
    }
}

/// Whether a text has a word, or several in a row, as words of its own.
fn has(text: &str, word: &str) -> bool {
    place(text, word).is_some()
}

/// Where that is.
fn place(text: &str, word: &str) -> Option<usize> {
    let mut found = text.match_indices(word).map(|(at, _)| at);
    found.find(|&at| {
        let (before, after) = (&text[..at], &text[at + word.len()..]);
        !before.ends_with(char::is_alphanumeric) && !after.starts_with(char::is_alphanumeric)
    })
}

/// The word right before another one.
fn word_before<'a>(text: &'a str, word: &str) -> Option<&'a str> {
    let before = text[..place(text, word)?].strip_suffix(' ')?;
    before.rsplit(' ').next()
}

/// A prompt with what follows it.
#[derive(Debug, Serialize)]
struct Sample {
    prompt: String,
    base: String,
    adapter: String,
    reference: Option<String>,
}

/// Runs the command.
///
/// # Errors
/// A folder that can't be written, or an interrupt.
pub fn run(args: &DemoArgs, progress: Mode) -> anyhow::Result<()> {
    let output = Output::detect(args.json);
    let temporary = tempfile::tempdir().context("cannot make a temporary folder")?;
    let folder = match &args.output {
        Some(folder) => {
            if folder.exists() {
                return Err(crate::failure::Misuse::new(format!(
                    "output {} exists; give a new folder",
                    folder.display()
                ))
                .into());
            }
            folder.as_path()
        }
        None => temporary.path(),
    };
    let stop = interrupt::install_all("stopping after this step")?;
    let unfinished = Unfinished::new(folder);
    let demo = make(args, folder, progress, stop);
    if demo.is_err() && args.output.is_some() {
        // A demonstration in part is of no use, and would be in the way of the next one. What cannot be deleted stays.
        drop(std::fs::remove_dir_all(folder));
    }
    drop(unfinished);
    let demo = demo?;
    output.result(&demo, |output| text(&demo, output))
}

/// The demonstration, with its files in `folder`.
fn make(
    args: &DemoArgs,
    folder: &Path,
    progress: Mode,
    stop: &std::sync::atomic::AtomicBool,
) -> anyhow::Result<Demo> {
    let begun = Instant::now();
    let base = Source::Builtin.load(DType::Bf16)?;
    let mut tasks = Vec::new();
    for (name, _) in BUILTIN_TASKS {
        write_builtin_task(name, &folder.join("data").join(name))?;
        let outcome = train_task(folder, name, progress, stop)?;
        refuse_stopped(stop)?;
        tasks.push(measure(&base, folder, name, &outcome)?);
        refuse_stopped(stop)?;
    }
    Ok(Demo {
        model: BUILTIN,
        base_parameters: base.decoder.config().parameters(),
        base_bytes: base.source.tensors()?.total_bytes(),
        tasks,
        seconds: begun.elapsed().as_secs_f64(),
        kept_in: args.output.clone(),
    })
}

fn refuse_stopped(stop: &std::sync::atomic::AtomicBool) -> Result<(), Interrupted> {
    if !stop.load(Ordering::Relaxed) {
        return Ok(());
    }
    let message = "the demo was stopped, and nothing of it is kept".to_owned();
    Err(Interrupted { message })
}

fn train_task(
    folder: &Path,
    name: &str,
    progress: Mode,
    stop: &std::sync::atomic::AtomicBool,
) -> anyhow::Result<Outcome> {
    let mut config = TrainConfig {
        learning_rate: 5e-3,
        warmup_steps: 10,
        max_steps: Some(STEPS),
        ..TrainConfig::new(
            Method::Lora,
            BUILTIN,
            folder.join("data").join(name),
            folder.join(name),
        )
    };
    config.options.targets.target_modules = Some(Targets::Pattern("all-linear".to_owned()));
    if progress != Mode::Quiet {
        crate::progress::stderr_line(&format!("task {name}"));
    }
    let mut watcher = Watcher::new(progress);
    Ok(train(
        &config,
        Start::Fresh { overwrite: false },
        &mut watcher,
        stop,
    )?)
}

fn measure(
    base: &Base,
    folder: &Path,
    name: &'static str,
    outcome: &Outcome,
) -> anyhow::Result<Task> {
    let data = folder.join("data").join(name);
    let adapter_folder = folder.join(name);
    let begun = Instant::now();
    let loaded = tuning::load(&adapter_folder, base.decoder.config())?;
    let swap_seconds = begun.elapsed().as_secs_f64();
    let set = [&loaded.adapter];
    let adapters = AdapterSet::new(&set);
    let ws = Workspace::new();
    let test =
        Dataset::load(&data, Split::Test, &base.tokenizer, &DataOptions::default())?.examples;
    let before = evaluate(&base.decoder, AdapterSet::none(), None, &test, &ws);
    let after = evaluate(&base.decoder, adapters, Some(0), &test, &ws);
    let (text, output) = (passages(&base.tokenizer)?, folder.join("merged").join(name));
    let merged = merge(&MergeOptions::new(
        &base.source,
        &loaded.adapter,
        &text,
        &output,
    ))?;
    let weights = adapter_folder.join("adapter_model.safetensors");
    let mut samples = samples(base, &data, &loaded, &ws)?;
    let mut carried = Carried::default();
    for sample in &samples {
        carried.add(sample);
    }
    samples.truncate(SAMPLES);
    Ok(Task {
        name,
        trainable_parameters: outcome.trainable_parameters,
        adapter_bytes: std::fs::metadata(&weights)
            .with_context(|| format!("cannot read {}", weights.display()))?
            .len(),
        steps: outcome.steps,
        train_seconds: outcome.seconds,
        loss_before: before.mean(),
        loss_after: after.mean(),
        swap_seconds,
        merge_logit_difference: merged.max_logit_difference,
        carried,
        samples,
    })
}

/// All test prompts, continued by the base and by the adapter in one batch.
fn samples(
    base: &Base,
    data: &Path,
    loaded: &Loaded,
    ws: &Workspace,
) -> anyhow::Result<Vec<Sample>> {
    let rows = load_prompts(data, Split::Test, &base.tokenizer)?;
    let prompts: Vec<PromptIds> = rows
        .iter()
        .flat_map(|row| [None, Some(0)].map(|adapter| PromptIds::new(row.ids.clone(), adapter)))
        .collect();
    let options = GenerateOptions::greedy(48, base.tokenizer.stop_ids());
    let set = [&loaded.adapter];
    let made = generate(
        &base.decoder,
        AdapterSet::new(&set),
        &prompts,
        &options,
        ws,
        |_, _| true,
    );
    let text = |ids: &[u32]| -> anyhow::Result<String> {
        Ok(base
            .tokenizer
            .decode(ids, true)?
            .trim()
            .replace('\n', " / "))
    };
    rows.into_iter()
        .zip(made.chunks_exact(2))
        .map(|(row, pair)| {
            Ok(Sample {
                prompt: row.text,
                base: text(&pair[0].ids)?,
                adapter: text(&pair[1].ids)?,
                reference: row.reference.map(|reference| reference.trim().to_owned()),
            })
        })
        .collect()
}

fn text(demo: &Demo, output: &Output) -> String {
    let time =
        |seconds: f64| units::duration(Duration::try_from_secs_f64(seconds).unwrap_or_default());
    let mut model = Facts::default();
    model.add("parameters", units::grouped(demo.base_parameters as u64));
    model.add("weights", units::bytes(demo.base_bytes));
    let mut out = model.render(&format!("base model {}", demo.model), output.color);
    out.push('\n');

    let tasks = demo.tasks.iter().map(|task| (task.name, Align::Right));
    let mut table = Table::new(std::iter::once(("", Align::Left)).chain(tasks));
    let mut row = |name: &str, value: &dyn Fn(&Task) -> String| {
        table.row(std::iter::once(name.to_owned()).chain(demo.tasks.iter().map(value)));
    };
    row("trainable parameters", &|task| {
        units::grouped(task.trainable_parameters as u64)
    });
    row("fewer than full training", &|task| {
        format!(
            "{:.0} ×",
            demo.base_parameters as f64 / task.trainable_parameters as f64
        )
    });
    row("adapter on disk", &|task| units::bytes(task.adapter_bytes));
    row("steps", &|task| task.steps.to_string());
    row("training time", &|task| time(task.train_seconds));
    row("held-out loss, base", &|task| {
        format!("{:.3}", task.loss_before)
    });
    row("held-out loss, adapter", &|task| {
        format!("{:.3}", task.loss_after)
    });
    row("words carried over, base", &|task| {
        format!("{:.1} %", task.carried.percent(task.carried.base))
    });
    row("words carried over, adapter", &|task| {
        format!("{:.1} %", task.carried.percent(task.carried.adapter))
    });
    row("swap to it (read and check)", &|task| {
        time(task.swap_seconds)
    });
    row("merged: largest logit difference", &|task| {
        format!("{:.1e}", task.merge_logit_difference)
    });
    out.push_str(&table.render(output.width, output.color));

    for task in &demo.tasks {
        out.push('\n');
        out.push_str(&bold(
            &format!("{}: unseen prompts", task.name),
            output.color,
        ));
        out.push('\n');
        for sample in &task.samples {
            for (label, line) in [
                ("prompt", Some(&sample.prompt)),
                ("base", Some(&sample.base)),
                ("adapter", Some(&sample.adapter)),
                ("reference", sample.reference.as_ref()),
            ] {
                if let Some(line) = line {
                    let label = dim(&format!("{label:<9}"), output.color);
                    out.extend([
                        "  ", &label, "  ", line, "
",
                    ]);
                }
            }
            out.push('\n');
        }
    }
    let kept = match &demo.kept_in {
        Some(folder) => format!("everything is in {}", folder.display()),
        None => "give --output DIR to keep the adapters and the merged models".to_owned(),
    };
    out.extend([time(demo.seconds).as_str(), " in all; ", &kept, "\n"]);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_counted_where_prompt_and_reference_have_them() {
        let mut carried = Carried::default();
        let mut add = |base: &str, adapter: &str| {
            carried.add(&Sample {
                prompt: "name: Tom | animal: cat | thing: toy boat | text:".into(),
                base: base.into(),
                adapter: adapter.into(),
                reference: Some("Tom's cat took the toy boat.".into()),
            });
        };
        add("the catalog", "Tom and the cats had a toy boat");
        add("Tomorrow", "Tom's dog took the toy train.");
        assert_eq!((carried.expected, carried.base, carried.adapter), (6, 0, 3));
        assert!((carried.percent(carried.adapter) - 50.0).abs() < 1e-9);
        // A thing is carried with what is said of it.
        let mut carried = Carried::default();
        for adapter in ["Tom took the golden key", "Tom's rusty key"] {
            carried.add(&Sample {
                prompt: "name: Tom | thing: rusty key | text:".into(),
                base: String::new(),
                adapter: adapter.into(),
                reference: Some("Tom had a rusty key.".into()),
            });
        }
        assert_eq!((carried.expected, carried.adapter), (4, 3));
    }
}
