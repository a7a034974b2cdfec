//! The settings of a training, from the command line, from files and by default.
//!
//! The library's [`TrainConfig`] declares each of them: a field `learning_rate` is the flag `--learning-rate` and the key
//! `learning_rate`, with its help, default and range. [`layer`] puts the command line over the file over the defaults and
//! finds every unknown key and wrong value on the way; [`train::resolve`] then checks what the values mean.

pub mod method;
pub mod paths;
pub mod peers;
pub mod schema;
pub mod train;
pub mod values;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use clap::ArgMatches;
use clap::parser::ValueSource;
use lowrank::fields::{Names, nearest, plain};
use lowrank::settings::TrainConfig;
use serde::Serialize;
use serde_json::{Map, Value};

use crate::failure::Misuse;

/// A settings file as read.
#[derive(Debug, Clone)]
pub struct File {
    /// Where it was read.
    pub path: PathBuf,
    /// Its keys and values.
    pub values: Map<String, Value>,
}

impl File {
    /// Reads a YAML file (JSON is YAML too).
    ///
    /// # Errors
    /// When the file cannot be read, is not YAML, or is not a mapping.
    pub fn read(path: &Path) -> Result<Self, Misuse> {
        let shown = path.display();
        let text = match std::fs::read(path) {
            Ok(bytes) => String::from_utf8(bytes).map_err(|error| {
                Misuse::new(format!(
                    "the settings file {shown} is not UTF-8 text: {error}"
                ))
            })?,
            Err(error) => {
                // A word behind a flag that takes none.
                let is_switch = ["true", "false"].iter().any(|word| path == Path::new(word));
                let hint = if is_switch {
                    format!(
                        "; a flag that is on or off takes no word behind it: --flag, or --flag={shown}"
                    )
                } else {
                    String::new()
                };
                return Err(Misuse::new(format!(
                    "cannot read the settings file {shown}: {error}{hint}"
                )));
            }
        };
        let parsed = if text.trim().is_empty() {
            Ok(Value::Null)
        } else {
            serde_saphyr::from_str(&text)
        };
        match parsed {
            Ok(Value::Object(values)) => Ok(Self {
                path: path.to_path_buf(),
                values,
            }),
            Ok(Value::Null) => Ok(Self {
                path: path.to_path_buf(),
                values: Map::new(),
            }),
            Ok(_) => Err(Misuse::new(format!(
                "the settings file {shown} must hold lines of the form `key: value`"
            ))),
            Err(error) => Err(Misuse::new(describe(&error, &text, path))),
        }
    }

    fn name(&self) -> String {
        self.path.file_name().map_or_else(
            || self.path.display().to_string(),
            |name| name.to_string_lossy().into_owned(),
        )
    }
}

/// What is wrong with a settings file, in words. A number that is none names its line, and with it the key.
fn describe(error: &serde_saphyr::Error, text: &str, path: &Path) -> String {
    let (error, shown) = (error.without_snippet(), path.display());
    if let (serde_saphyr::Error::NonFiniteFloat { value, .. }, Some(location)) =
        (error, error.location())
    {
        let number = location.line();
        let line = text.lines().nth(number.saturating_sub(1) as usize);
        return format!(
            "the settings file {shown}, line {number} (`{}`): {value} is not a finite number",
            line.unwrap_or_default().trim()
        );
    }
    format!("the settings file {shown} is not valid YAML: {error}")
}

/// Settings put together from their layers.
#[derive(Debug)]
pub struct Layered {
    /// The values in force.
    pub settings: TrainConfig,
    /// Keys that were given on the command line or in a file, rather than left to their defaults.
    pub given: BTreeSet<String>,
    /// What is wrong so far.
    pub problems: Misuse,
    flags: BTreeSet<String>,
    files: Vec<File>,
}

impl Layered {
    /// Counts keys as given that come from elsewhere than a flag or a file.
    pub fn count_as_given(&mut self, keys: &[&str]) {
        self.given.extend(keys.iter().map(|key| (*key).to_owned()));
    }

    /// How the user would recognise a setting: `--r`, or `r (in run.yaml)` where the value came from a file.
    pub fn name(&self, key: &str) -> String {
        let from_file = || {
            self.files
                .iter()
                .rev()
                .find(|file| file.values.contains_key(key))
        };
        if !self.flags.contains(key)
            && let Some(file) = from_file()
        {
            return format!("{key} (in {})", file.name());
        }
        flag(key)
    }
}

impl Names for Layered {
    fn given(&self, key: &str) -> String {
        self.name(key)
    }

    fn to_give(&self, key: &str) -> String {
        flag(key)
    }
}

/// Settings are called by their flags.
#[derive(Debug, Clone, Copy)]
pub struct Flags;

impl Names for Flags {
    fn given(&self, key: &str) -> String {
        flag(key)
    }

    fn to_give(&self, key: &str) -> String {
        flag(key)
    }
}

/// The flag of a key.
pub fn flag(key: &str) -> String {
    match key {
        "shuffle" => "--no-shuffle".to_string(),
        _ => format!("--{}", key.replace('_', "-")),
    }
}

/// Puts the command line over the files (later ones win) over the defaults.
///
/// `parsed` is what clap made of `matches`; files that hold unknown keys or values of the wrong kind leave problems.
pub fn layer(parsed: TrainConfig, matches: &ArgMatches, files: Vec<File>) -> Layered {
    let mut problems = Misuse::default();
    let mut values = match object(&parsed) {
        Ok(values) => values,
        Err(problem) => {
            problems.push(problem);
            return Layered {
                settings: parsed,
                given: BTreeSet::new(),
                problems,
                flags: BTreeSet::new(),
                files,
            };
        }
    };
    let flags: BTreeSet<String> = values
        .keys()
        .filter(|key| matches.value_source(key) == Some(ValueSource::CommandLine))
        .cloned()
        .collect();
    let out_of_force: BTreeSet<&str> = flags
        .iter()
        .flat_map(|key| displaces(key))
        .copied()
        .collect();
    let defaults = values.clone();
    let mut given = flags.clone();
    for file in &files {
        let said = file.values.iter().filter(|(_, value)| !value.is_null());
        for key in said.flat_map(|(key, _)| displaces(key)) {
            // A stronger file displaces what a weaker one said; what they say themselves comes below.
            if let (Some(value), false) = (defaults.get(*key), flags.contains(*key)) {
                values.insert((*key).to_string(), value.clone());
                given.remove(*key);
            }
        }
        for (key, value) in &file.values {
            if !defaults.contains_key(key) {
                problems.push(unknown_key(
                    key,
                    &file.name(),
                    defaults.keys().map(String::as_str),
                ));
            } else if !value.is_null() {
                match accepted(&defaults, key, value) {
                    Ok(_) if flags.contains(key) || out_of_force.contains(key.as_str()) => {}
                    Ok(value) => {
                        values.insert(key.clone(), value);
                        given.insert(key.clone());
                    }
                    Err(reason) => problems.push(format!("{key} (in {}): {reason}", file.name())),
                }
            }
        }
    }
    // Every value was accepted on its own, so the whole is too.
    let settings = serde_json::from_value(Value::Object(values)).unwrap_or_else(|error| {
        problems.push(plain(&error.to_string()));
        parsed
    });
    Layered {
        settings,
        given,
        problems,
        flags,
        files,
    }
}

/// Keys that a given `key` puts out of force where they come from a weaker layer: with `--num-train-epochs 2` a
/// `max_steps` in the file no longer counts.
fn displaces(key: &str) -> &'static [&'static str] {
    match key {
        "num_train_epochs" => &["max_steps"],
        "warmup_ratio" => &["warmup_steps"],
        _ => &[],
    }
}

/// The struct as a map of its keys.
///
/// # Errors
/// When a path is not UTF-8, which YAML could not hold.
pub fn object<T: Serialize>(settings: &T) -> Result<Map<String, Value>, String> {
    match serde_json::to_value(settings) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(_) => Err("the settings are not a map of keys".to_string()),
        Err(error) => Err(format!(
            "a setting cannot be written to config.yaml: {error}"
        )),
    }
}

/// The value as the settings write it, if it is of the right kind for its key.
fn accepted(defaults: &Map<String, Value>, key: &str, value: &Value) -> Result<Value, String> {
    let mut candidate = defaults.clone();
    candidate.insert(key.to_string(), value.clone());
    let settings: TrainConfig = serde_json::from_value(Value::Object(candidate))
        .map_err(|error| plain(&error.to_string()))?;
    Ok(object(&settings)?.remove(key).unwrap_or(Value::Null))
}

fn unknown_key<'a>(key: &str, file: &str, known: impl Iterator<Item = &'a str> + Clone) -> String {
    if let Some(advice) = peers::advice(key, |ours| known.clone().any(|known| known == ours)) {
        return format!("{key} (in {file}): {}", advice.for_key());
    }
    match nearest(key, known) {
        Some(near) => format!("{key} (in {file}) is not a setting; did you mean {near}?"),
        None => format!("{key} (in {file}) is not a setting; `lowrank train --help` lists them"),
    }
}
