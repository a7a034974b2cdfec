//! `lowrank train`.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use clap::parser::ValueSource;
use clap::{ArgMatches, Args};
use lowrank::data::is_read_once;
use lowrank::fields::Fields;
use lowrank::ranks::Ranks;
use lowrank::settings::TrainConfig;
use lowrank::train::{Event, Observer, Outcome, Start, checkpoint};
use lowrank::units;
use serde_json::{Map, Value};

use crate::failure::{DIVERGED, Interrupted, Misuse, SaidElsewhere};
use crate::interrupt;
use crate::output::{Output, shell_word};
use crate::progress::{Mode, TrainProgress};
use crate::ranks::{Job, RanksArgs, is_other_rank, quietly};
use crate::settings::train::{self as training, Resolved};
use crate::settings::{self, File, paths, schema};
use crate::table::Facts;

/// A run's own settings file in its folder.
const RUN_CONFIG: &str = "config.yaml";

/// `lowrank train config.yaml --learning-rate 1e-4`: a flag wins over the file, and every key of the file is a flag.
#[derive(Debug, Args)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is a switch of the command line"
)]
pub struct TrainArgs {
    /// A YAML file of settings; each key is a flag's name with _ for -, and flags win over it
    #[arg(value_name = "CONFIG")]
    pub config: Option<PathBuf>,

    /// The same as CONFIG
    #[arg(
        short = 'c',
        long = "config",
        value_name = "FILE",
        conflicts_with = "config"
    )]
    pub config_flag: Option<PathBuf>,

    /// Every setting
    #[command(flatten)]
    pub settings: TrainConfig,

    /// Go on with the run in the output folder, with its own settings
    #[arg(long)]
    pub resume: bool,

    /// Replace an earlier run in the output folder
    #[arg(long, conflicts_with = "resume")]
    pub overwrite: bool,

    /// Run although the memory is expected not to suffice
    #[arg(long)]
    pub force: bool,

    /// How ranks share the training
    #[command(flatten)]
    pub ranks: RanksArgs,

    /// Print the outcome as one JSON object
    #[arg(long)]
    pub json: bool,

    /// Print the settings as they would be used, as YAML, and do nothing
    #[arg(long)]
    pub print_config: bool,

    /// Print a JSON schema of the settings file and do nothing
    #[arg(long, conflicts_with = "print_config")]
    pub print_schema: bool,
}

/// Runs the command.
///
/// # Errors
/// Settings that cannot be used, or a training that fails.
pub fn run(args: TrainArgs, matches: &ArgMatches, progress: Mode) -> anyhow::Result<()> {
    let output = Output::detect(args.json);
    if args.print_schema {
        let schema = serde_json::to_string_pretty(&settings_schema()?)?;
        return output.write(
            &(schema
                + "
"),
        );
    }
    let (print_config, force) = (args.print_config, args.force);
    let start = if args.resume {
        Start::Resume
    } else {
        Start::Fresh {
            overwrite: args.overwrite,
        }
    };
    let switches = [
        ("--resume", args.resume),
        ("--overwrite", args.overwrite),
        ("--print-config", print_config),
    ];
    let given = switches.iter().filter(|(_, given)| *given);
    let words = std::iter::once("train").chain(given.map(|(flag, _)| *flag));
    let job = Job::join(&args.ranks, &words.collect::<Vec<_>>().join(" "))?;
    if print_config {
        let resolved = resolve(args, matches)?;
        return if is_other_rank() {
            Ok(())
        } else {
            output.write(&serde_saphyr::to_string(&resolved.values)?)
        };
    }
    let stages = args.ranks.pipeline_stages;
    let ranks = job.ranks()?;
    let resolved = resolve_on(&ranks, args, matches)?;
    let done = train(&job, ranks, &resolved, start, force, progress);
    if !ranks.is_first() {
        return match done? {
            outcome if outcome.interrupted => {
                let code = interrupt::exit_code();
                Err(SaidElsewhere { code }.into())
            }
            _ => Ok(()),
        };
    }
    let outcome = done?;
    if !outcome.interrupted {
        return output.result(&outcome, |output| summary(&outcome, output));
    }
    if output.json {
        output.result(&outcome, |_| String::new())?;
    }
    let done = match outcome.steps {
        0 => "no step was taken yet".to_owned(),
        steps => format!(
            "{steps} of {} steps are done and saved",
            outcome.total_steps
        ),
    };
    let word = shell_word(&outcome.output);
    let place = match word.strip_prefix('-') {
        Some(_) => format!("--output={word}"),
        None => format!("--output {word}"),
    };
    let data = resolved.values.get("data").and_then(Value::as_str);
    let data = match data {
        Some(data) if is_read_once(Path::new(data)) => {
            " --data FILE, where FILE has the rows that came from the pipe; save them first"
        }
        _ => "",
    };
    let (by, stages) = match (ranks.are_several(), stages) {
        (false, _) => ("", String::new()),
        (true, 1) => (" by the launcher", String::new()),
        (true, stages) => (" by the launcher", format!(" --pipeline-stages {stages}")),
    };
    let message = format!("{done}; go on{by} with: lowrank train {place} --resume{stages}{data}");
    Err(Interrupted { message }.into())
}

/// The settings, on which all ranks have agreed that they can be used. A rank that does not see the folder of a run that goes on takes those
/// of rank 0.
fn resolve_on(
    ranks: &Ranks<'_>,
    args: TrainArgs,
    matches: &ArgMatches,
) -> anyhow::Result<Resolved> {
    if !ranks.are_several() {
        return Ok(resolve(args, matches)?);
    }
    let resumes = args.resume;
    let own = resolve(args, matches);
    let first = match &own {
        _ if !ranks.is_first() => None,
        Ok(resolved) => Some(Some(resolved.values.clone())),
        Err(_) => Some(None),
    };
    let first = ranks.from_first(first)?;
    let own = match (own, first) {
        (Err(_), Some(values)) if resumes && !sees_run(&values) => Ok(Resolved {
            output: values["output"].as_str().unwrap_or_default().into(),
            values,
            given: BTreeSet::new(),
        }),
        (own, _) => own.map_err(|misuse| lowrank::Error::Settings(misuse.to_string())),
    };
    ranks.agree(own).map_err(quietly)
}

/// Whether the folder of a run that goes on can be seen here.
fn sees_run(values: &Map<String, Value>) -> bool {
    let output = values.get("output").and_then(Value::as_str);
    output.is_some_and(|output| Path::new(output).join(RUN_CONFIG).is_file())
}

/// A JSON schema of the settings file.
///
/// # Errors
/// Never with the defaults as they are.
pub fn settings_schema() -> anyhow::Result<Value> {
    let defaults = settings::object(&training::defaults()).map_err(anyhow::Error::msg)?;
    Ok(schema::schema(
        "lowrank train",
        &training::command(),
        &TrainConfig::fields(),
        &defaults,
    ))
}

/// Puts flags, file and, when resuming, the settings of the run so far together.
fn resolve(args: TrainArgs, matches: &ArgMatches) -> Result<Resolved, Misuse> {
    let typed = |key: &str| matches.value_source(key) == Some(ValueSource::CommandLine);
    let mut given = args
        .config
        .or(args.config_flag)
        .map(|path| File::read(&path))
        .transpose()?;
    if let Some(file) = &mut given {
        // The config.yaml of a run is a settings file, too.
        paths::find(file, &typed);
    }
    let mut files = Vec::new();
    let mut first_adapter = None;
    if args.resume {
        let named = given
            .as_ref()
            .and_then(|file| file.values.get("output")?.as_str().map(PathBuf::from));
        let typed_output = typed("output").then(|| args.settings.output.clone());
        let Some(folder) = typed_output.or(named) else {
            return Err(Misuse::new(
                "--resume needs --output, the folder of the run to go on with",
            ));
        };
        let over = |key: &str| {
            typed(key)
                || given
                    .as_ref()
                    .is_some_and(|file| file.values.contains_key(key))
        };
        let (file, adapter) = earlier_settings(&folder, &over)?;
        files.push(file);
        first_adapter = adapter;
    }
    files.extend(given);
    let mut resolved = training::resolve(settings::layer(args.settings, matches, files))?;
    if args.resume {
        // The folder may have been moved since its config.yaml was written; where it is now is what counts.
        resolved.values.insert(
            "output".to_string(),
            resolved.output.display().to_string().into(),
        );
    }
    if let Some(adapter) = first_adapter {
        resolved.values.insert("init_adapter".to_owned(), adapter);
    }
    Ok(resolved)
}

/// The settings of the run in a folder, with its paths as they can be found from here; `over` says which keys are given
/// anew. An adapter that the run began with and that is gone is handed back apart: a checkpoint has all of it.
fn earlier_settings(
    folder: &Path,
    over: &dyn Fn(&str) -> bool,
) -> Result<(File, Option<Value>), Misuse> {
    let path = folder.join(RUN_CONFIG);
    if !path.is_file() {
        let shown = folder.display();
        return Err(Misuse::new(format!(
            "there is no run to resume in {shown}: {}",
            if folder
                .read_dir()
                .is_ok_and(|mut entries| entries.next().is_some())
            {
                "it holds other files, and no config.yaml; give the folder of a run, or leave --resume out and give a new folder as --output"
            } else {
                "it holds no config.yaml; leave --resume out"
            }
        )));
    }
    let mut file = File::read(&path)?;
    for (key, value) in TrainConfig::values_of_older_files() {
        file.values.entry(key).or_insert(value);
    }
    let mut lost = paths::find(&mut file, over);
    let has_checkpoint = !checkpoint::steps(folder).is_empty();
    let mut first_adapter = None;
    lost.retain(|lost| {
        let needless = lost.key == "init_adapter" && has_checkpoint;
        if needless {
            first_adapter = file.values.shift_remove("init_adapter");
        }
        !needless
    });
    let mut problems = Misuse::default();
    for lost in lost {
        problems.push(lost.problem());
    }
    problems.or((file, first_adapter))
}

/// The call into the library.
fn train(
    job: &Job,
    ranks: Ranks<'_>,
    resolved: &Resolved,
    start: Start,
    force: bool,
    progress: Mode,
) -> anyhow::Result<Outcome> {
    let mut config: TrainConfig = serde_json::from_value(Value::Object(resolved.values.clone()))
        .context("the settings do not fit the trainer's")?;
    config.force = force;
    job.start_threads(config.threads)?;
    let stop = interrupt::install_all("finishing this step and saving")?;
    interrupt::nothing_to_save();
    let mut watcher = Watcher::new(progress);
    let done = lowrank::train::train_on(ranks, &config, start, &mut watcher, stop);
    let outcome = done.map_err(|error| {
        job.note_failure(&error);
        match error {
            lowrank::Error::Diverged(_) if !ranks.is_first() => {
                SaidElsewhere { code: DIVERGED }.into()
            }
            error => quietly(error),
        }
    })?;
    if outcome.interrupted {
        job.share_signal()?;
    }
    Ok(outcome)
}

/// Shows a run's events as they come.
pub(super) struct Watcher {
    progress: TrainProgress,
}

impl Watcher {
    pub(super) fn new(mode: Mode) -> Self {
        Self {
            progress: TrainProgress::new(mode),
        }
    }
}

impl Observer for Watcher {
    fn event(&mut self, event: &Event) {
        match event {
            Event::Begin => interrupt::saving_begins(),
            Event::Start {
                total_steps,
                done_steps,
                ..
            } => self.progress.start(*total_steps, *done_steps),
            Event::Step(step) => self.progress.step(step),
            Event::Eval(eval) => self.progress.eval(eval),
            Event::Checkpoint(path) => self.progress.checkpoint(path),
            Event::Note(text) => self.progress.note(text),
            _ => {}
        }
    }
}

fn summary(outcome: &Outcome, output: &Output) -> String {
    let mut facts = Facts::default();
    let place = outcome.output.display();
    let percent =
        100.0 * outcome.trainable_parameters as f64 / outcome.base_parameters.max(1) as f64;
    let trainable = units::grouped(outcome.trainable_parameters as u64);
    // The base of a run that was finished before may be gone.
    if outcome.base_parameters > 0 {
        facts.add(
            "trainable parameters",
            format!("{trainable} ({percent:.3} %)"),
        );
    }
    let early = if outcome.stopped_early {
        ", stopped early"
    } else {
        ""
    };
    facts.add("steps", format!("{}{early}", outcome.steps));
    if let Some(loss) = outcome.train_loss {
        facts.add(
            "training loss",
            format!("{loss:.4}, mean of the last steps"),
        );
    }
    match (outcome.first_eval_loss, outcome.eval_loss) {
        (Some(before), Some(after)) => facts.add(
            "held-out loss",
            format!("{before:.4} before, {after:.4} after"),
        ),
        (None, Some(after)) => facts.add("held-out loss", format!("{after:.4}")),
        _ => {}
    }
    if outcome.seconds > 0.0 {
        let time =
            units::duration(Duration::try_from_secs_f64(outcome.seconds).unwrap_or_default());
        facts.add(
            "time",
            format!(
                "{time}, {:.0} tokens/s",
                outcome.tokens as f64 / outcome.seconds
            ),
        );
    }
    if outcome.peak_rss > 0 {
        facts.add("peak memory", units::bytes(outcome.peak_rss));
    }
    facts.render(
        &if outcome.already_finished {
            format!("finished before, and left as it is: {place}")
        } else {
            format!("written to {place}")
        },
        output.color,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_schema_knows_every_key() {
        let schema = settings_schema().unwrap();
        let properties = schema["properties"].as_object().unwrap();
        assert_eq!(
            properties.len(),
            settings::object(&training::defaults()).unwrap().len()
        );
        assert_eq!(properties["learning_rate"]["type"], "number");
        assert_eq!(properties["r"]["default"], 8);
        assert_eq!(properties["shuffle"]["default"], true);
        let limits = |key: &str| {
            let keywords = ["minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum"];
            keywords.map(|keyword| properties[key][keyword].as_i64())
        };
        assert_eq!(limits("r"), [Some(1), None, Some(65_536), None]);
        assert_eq!(limits("seed"), [Some(0), None, None, None]);
        assert_eq!(limits("learning_rate"), [None, Some(0), None, None]);
        assert_eq!(limits("warmup_ratio"), [Some(0), None, Some(1), None]);
        assert_eq!(limits("adam_beta1"), [Some(0), None, None, Some(1)]);
        let ranks = &properties["rank_pattern"]["additionalProperties"];
        assert_eq!(ranks["minimum"], 1);
        assert_eq!(
            properties["method"]["enum"],
            serde_json::json!(["lora", "full", "top", "bitfit", "adapter", "prefix", "ia3"])
        );
        assert!(
            properties
                .values()
                .all(|property| property["description"].is_string())
        );
    }
}
