//! A run's folder: how it begins, and the files that a reader finds in it at the end.

use std::path::{Path, PathBuf};

use lowrank_formats::atomic;

use super::checkpoint;
use super::outcome::Outcome;
use super::run::Start;
use crate::Error;
use crate::base::{MODEL_FILES, Network, SIDE_FILES, SIDE_FOLDERS};
use crate::lock::LOCK_FILE;
use crate::model::Pooling;
use crate::names::{named, valued};
use crate::output;
use crate::report;
use crate::settings::{Began, TrainConfig};

const CONFIG: &str = "config.yaml";
const METRICS: &str = "metrics.jsonl";
/// What a run writes beside a model's own files.
const RUN_FILES: &[&str] = &[
    CONFIG,
    METRICS,
    "README.md",
    "report.html",
    "checkpoints",
    LOCK_FILE,
    "adapter_config.json",
    "adapter_model.safetensors",
];

/// Whether a run may begin, or go on, in its output folder; and when and where it began. Nothing is written.
pub(super) fn check(config: &TrainConfig, start: Start) -> Result<Option<Began>, Error> {
    match start {
        Start::Resume => check_resume(config),
        Start::Fresh { overwrite } => {
            check_fresh(config, overwrite)?;
            Ok(Some(Began::now()))
        }
    }
}

/// Makes the folder of a fresh run, in place of an earlier run's where [`check`] allows it.
pub(super) fn begin(config: &TrainConfig, overwrite: bool) -> Result<(), Error> {
    check_fresh(config, overwrite)?;
    let folder = &config.output;
    std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
    empty(folder)?;
    write_config(config, &config.output)
}

/// Deletes what an earlier run left in a folder. The folder itself stays, and with it this run's lock; its config.yaml goes
/// last, since a folder without one is never replaced.
fn empty(folder: &Path) -> Result<(), Error> {
    let mut config = None;
    for entry in std::fs::read_dir(folder).map_err(Error::io(folder))? {
        let entry = entry.map_err(Error::io(folder))?;
        let path = entry.path();
        if entry.file_name() == LOCK_FILE {
            continue;
        }
        if entry.file_name() == CONFIG {
            config = Some(path);
        } else if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            std::fs::remove_dir_all(&path).map_err(Error::io(&path))?;
        } else {
            std::fs::remove_file(&path).map_err(Error::io(&path))?;
        }
    }
    match config {
        Some(path) => std::fs::remove_file(&path).map_err(Error::io(&path)),
        None => Ok(()),
    }
}

fn check_resume(config: &TrainConfig) -> Result<Option<Began>, Error> {
    let earlier = read_config(config)?;
    let checkpoints = config.output.join("checkpoints");
    if checkpoints.exists() && !checkpoints.is_dir() {
        return Err(Error::Settings(format!(
            "{} is no folder, and the run's checkpoints are in a folder of that name; put it back, or start a new run with another {output}{}",
            checkpoints.display(),
            from_what_was_learned(config),
            output = named("output")
        )));
    }
    let changes = config.changes_since(&earlier);
    if changes.is_empty() {
        return Ok(earlier.began);
    }
    Err(Error::Settings(format!(
        "{}: these settings would change the result of the run, so it can't be resumed with them:\n  {}\nresume with the old ones, or start a new run with another {output}{}",
        config.output.join(CONFIG).display(),
        changes.join("\n  "),
        from_what_was_learned(config),
        output = named("output")
    )))
}

/// The settings that a run in the output folder was begun with.
fn read_config(config: &TrainConfig) -> Result<TrainConfig, Error> {
    let path = config.output.join(CONFIG);
    let text = std::fs::read_to_string(&path).map_err(|error| {
        Error::Settings(format!(
            "{}: {error}; there is no run to resume in this folder, so leave out {resume}",
            path.display(),
            resume = named("resume")
        ))
    })?;
    parse_config(&text).map_err(|problem| {
        Error::Settings(format!(
            "{}: {problem}; the file was damaged or edited, or another version wrote it; put it back as it was, or start a new run with another {output}{}",
            path.display(),
            from_what_was_learned(config),
            output = named("output")
        ))
    })
}

/// Settings from the text of a config.yaml; what is wrong with it, in words.
fn parse_config(text: &str) -> Result<TrainConfig, String> {
    if text.trim().is_empty() {
        return Err("the file is empty".to_owned());
    }
    let value: serde_json::Value = serde_saphyr::from_str(text)
        .map_err(|error| format!("it is not valid YAML: {}", error.without_snippet()))?;
    let Some(map) = value.as_object() else {
        return Err("it does not hold lines of the form `key: value`".to_owned());
    };
    let is_missing = |key: &&str| map.get(*key).is_none_or(serde_json::Value::is_null);
    let needed = ["method", "model", "data", "output", "learning_rate", "seed"];
    if let Some(key) = needed.iter().find(|key| is_missing(key)) {
        return Err(format!("it has no {key}"));
    }
    if let Some(began) = map.get("began").filter(|began| !began.is_null())
        && let time = began.get("time").unwrap_or(&serde_json::Value::Null)
        && !time.is_i64()
    {
        return Err(format!(
            "began.time is {time}, and must be a whole number of seconds since 1970"
        ));
    }
    // The text itself, whose lines the error names.
    serde_saphyr::from_str(text).map_err(|error| error.without_snippet().to_string())
}

/// How a new run takes over what the one in the output folder has learned, where there is something to take over.
pub(super) fn from_what_was_learned(config: &TrainConfig) -> String {
    let run = &config.output;
    if config.method.writes_model() {
        let model = run.join("model.safetensors").exists();
        let hint = || {
            format!(
                ", from what this one learned with {model}",
                model = valued("model", run.display())
            )
        };
        return model.then(hint).unwrap_or_default();
    }
    let newest = checkpoint::steps(run)
        .last()
        .map(|step| checkpoint::step_folder(run, *step));
    let has_adapter = |folder: &PathBuf| checkpoint::has_adapter(folder);
    match [Some(run.clone()), newest]
        .into_iter()
        .flatten()
        .find(has_adapter)
    {
        Some(folder) => format!(
            ", from what this one learned with {init_adapter}",
            init_adapter = valued("init_adapter", folder.display())
        ),
        None => String::new(),
    }
}

/// Lets config.yaml say where the model and the data are now, once they are known to be those that the run began with, and
/// what is recomputed from now on.
pub(super) fn record_changes(config: &TrainConfig) -> Result<(), Error> {
    // A run that was not begun by `train` has none.
    if !config.output.join(CONFIG).exists() {
        return Ok(());
    }
    let mut recorded = read_config(config)?;
    let begun = recorded.began.clone().and_then(|began| began.folder);
    let moved = |before: &Path, now: &Path| {
        let same = before == now
            || begun
                .as_ref()
                .is_some_and(|folder| folder.join(before) == now);
        (!same).then(|| std::path::absolute(now).unwrap_or_else(|_| now.to_path_buf()))
    };
    let before = recorded.clone();
    if let Some(data) = moved(&before.data, &config.data) {
        recorded.data = data;
    }
    if let Some(now) = &config.valid_data
        && let Some(valid) = moved(before.valid_data.as_deref().unwrap_or(Path::new("")), now)
    {
        recorded.valid_data = Some(valid);
    }
    if let Some(now) = &config.init_adapter
        && let Some(adapter) = moved(before.init_adapter.as_deref().unwrap_or(Path::new("")), now)
    {
        recorded.init_adapter = Some(adapter);
    }
    if let Some(model) = moved(Path::new(&before.model), Path::new(&config.model)) {
        recorded.model = match (model.is_dir(), model.to_str()) {
            (true, Some(path)) => path.to_owned(),
            // Not a folder, but a name.
            _ => config.model.clone(),
        };
    }
    recorded.recompute = config.recompute;
    if recorded == before {
        return Ok(());
    }
    write_config(&recorded, &config.output)
}

fn check_fresh(config: &TrainConfig, overwrite: bool) -> Result<(), Error> {
    let folder = &config.output;
    if !output::is_taken(folder)? {
        return Ok(());
    }
    if !overwrite && folder.join(CONFIG).exists() {
        return Err(Error::Settings(format!(
            "output {} exists; give another {output}, {resume} to go on with the run in it, or {overwrite} to replace it",
            folder.display(),
            output = named("output"),
            resume = named("resume"),
            overwrite = named("overwrite")
        )));
    }
    if !folder.join(CONFIG).exists() {
        return Err(Error::Settings(format!(
            "output {} holds files and no run (it has no {CONFIG}), so there is nothing to resume, and {overwrite} does not replace it; give another {output}, or empty the folder",
            folder.display(),
            overwrite = named("overwrite"),
            output = named("output")
        )));
    }
    output::check_replaceable(folder, &[RUN_FILES, MODEL_FILES, SIDE_FILES, SIDE_FOLDERS])?;
    let inputs = [
        Some(Path::new(&config.model)),
        Some(config.data.as_path()),
        config.valid_data.as_deref(),
        config.init_adapter.as_deref(),
        config.new_tokens(),
    ];
    for input in inputs.into_iter().flatten() {
        output::check_apart(folder, input)?;
    }
    Ok(())
}

fn write_config(config: &TrainConfig, folder: &Path) -> Result<(), Error> {
    let path = folder.join(CONFIG);
    let text = serde_saphyr::to_string(config)
        .map_err(|error| Error::Training(format!("{}: {error}", path.display())))?;
    Ok(atomic::write_file(&path, |out| {
        out.write_all(text.as_bytes())
    })?)
}

pub(super) fn metrics_path(folder: &Path) -> std::path::PathBuf {
    folder.join(METRICS)
}

/// Settings as (key, value), those that are unset left out, and what computed.
fn settings(config: &TrainConfig) -> Vec<(String, String)> {
    let Ok(serde_json::Value::Object(map)) = serde_json::to_value(config) else {
        return Vec::new();
    };
    map.into_iter()
        .filter(|(key, value)| {
            let path = matches!(
                key.as_str(),
                "output"
                    | "data"
                    | "valid_data"
                    | "model"
                    | "init_adapter"
                    | "add_tokens"
                    | "loftq_weights"
                    | "began"
            );
            let empty = value.is_null() || value.as_object().is_some_and(serde_json::Map::is_empty);
            !path && !empty && config.method.reads(key)
        })
        .map(|(key, value)| {
            (
                key,
                value
                    .as_str()
                    .map_or_else(|| value.to_string(), str::to_owned),
            )
        })
        .chain([(
            "computed".to_owned(),
            checkpoint::Computed::here(config).to_string(),
        )])
        .collect()
}

/// Writes report.html from metrics.jsonl. The text says which of its lines could not be used.
pub(super) fn write_report(
    config: &TrainConfig,
    summary: &str,
    figures: &[(String, String)],
) -> Result<Option<String>, Error> {
    let found = report::metrics::read(&metrics_path(&config.output))?;
    let title = config
        .output
        .file_name()
        .map_or_else(|| "run".into(), |name| name.to_string_lossy());
    let html = report::html::render(&report::html::Report {
        title: &title,
        summary,
        figures,
        settings: &settings(config),
        lines: &found.lines,
    });
    atomic::write_file(&config.output.join("report.html"), |out| {
        out.write_all(html.as_bytes())
    })?;
    Ok(found.damage)
}

/// Writes README.md, the model card. `python`: transformers loads the folder, or PEFT that of an adapter.
pub(super) fn write_card(
    config: &TrainConfig,
    base: &Network,
    outcome: &Outcome,
    python: bool,
) -> Result<(), Error> {
    let model = base.decoder.config();
    let classifier = base.labels.as_ref().zip(model.classifier());
    let classifier = classifier.map(|(labels, head)| report::model_card::CardClassifier {
        labels: &labels.names,
        of_tokens: head.pooling == Pooling::Each,
        problem_type: labels.problem_type,
    });
    let source = &base.source;
    let name = config.output.file_name().map_or_else(
        || "adapter".into(),
        |name| name.to_string_lossy().into_owned(),
    );
    let short = source.short_name();
    let base = if crate::hub::looks_like_id(&config.model) && !Path::new(&config.model).exists() {
        report::model_card::BaseModel::Hub(&config.model)
    } else {
        report::model_card::BaseModel::Local(&short)
    };
    let kind = if config.method.writes_model() {
        report::model_card::CardKind::Model
    } else {
        report::model_card::CardKind::Adapter(config.method)
    };
    let card = report::model_card::render(&report::model_card::ModelCard {
        name: &name,
        kind,
        python,
        base,
        new_tokens: !source.new_ids().is_empty(),
        method: config.method.title(),
        trainable_parameters: outcome.trainable_parameters as u64,
        base_parameters: outcome.base_parameters as u64,
        steps: outcome.steps,
        train_loss: outcome.train_loss,
        eval_loss_before: outcome.first_eval_loss,
        eval_loss_after: outcome.eval_loss,
        classifier,
        settings: &settings(config),
    });
    Ok(atomic::write_file(
        &config.output.join("README.md"),
        |out| out.write_all(card.as_bytes()),
    )?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tuning::Method;

    #[test]
    fn what_is_wrong_with_a_config_is_said_in_words() {
        let config = TrainConfig::new(Method::Lora, "m", "d", "o");
        let whole = serde_saphyr::to_string(&config).unwrap();
        assert_eq!(parse_config(&whole).unwrap(), config);
        let problem = |text: &str| parse_config(text).unwrap_err();
        assert_eq!(problem(" \n"), "the file is empty");
        assert_eq!(
            problem(&whole.replace("model: m\n", "model:\n")),
            "it has no model"
        );
        assert_eq!(problem(&whole.replace("data: d\n", "")), "it has no data");
        let yesterday = format!("{whole}began:\n  time: yesterday\n  folder: /\n");
        let words = "began.time is \"yesterday\", and must be";
        assert!(
            problem(&yesterday).contains(words),
            "{}",
            problem(&yesterday)
        );
        assert!(problem("- a\n- b\n").contains("`key: value`"));
    }
}
