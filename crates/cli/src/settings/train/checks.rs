//! Checks of what the library cannot know: which adapter, method and files the settings name.

use std::path::Path;

use lowrank::data::{is_standard_input, why_missing};
use lowrank::settings::TrainConfig;
use serde_json::Value;

use super::defaults;
use crate::failure::Misuse;
use crate::settings::paths::why_no_adapter;
use crate::settings::{Layered, flag, object};

impl Layered {
    /// Takes over what the config of `init_adapter` says; a setting that was given and says otherwise is a problem.
    /// A config that cannot be read is left to the trainer, whose message says why.
    pub(super) fn adopt_adapter(&mut self, problems: &mut Misuse) {
        let Some(folder) = &self.settings.init_adapter else {
            return;
        };
        let Ok(text) = std::fs::read(folder.join("adapter_config.json")) else {
            return;
        };
        let Ok(Value::Object(mut config)) = serde_json::from_slice(&text) else {
            return;
        };
        let method = self.settings.method;
        method.complete(&mut config);
        let Ok(mut values) = object(&self.settings) else {
            return;
        };
        let defaults = object(&defaults()).unwrap_or_default();
        for key in method.fixed_keys() {
            let adapters = match config.get(key) {
                None | Some(Value::Null) => defaults.get(key),
                given => given,
            };
            let Some(adapters) = adapters else { continue };
            let mut candidate = values.clone();
            candidate.insert(key.to_string(), adapters.clone());
            let Ok(taken) = serde_json::from_value::<TrainConfig>(Value::Object(candidate)) else {
                continue;
            };
            let Some(adopted) = object(&taken).ok().and_then(|mut map| map.remove(key)) else {
                continue;
            };
            let ours = values.get(key).unwrap_or(&Value::Null);
            if self.given.contains(key) && !same(ours, &adopted) {
                problems.push(format!(
                    "{} is {ours}, and the adapter to start from has {adopted}, which cannot be changed; leave it out",
                    self.name(key)
                ));
            }
            values.insert(key.to_string(), adopted);
        }
        if let Ok(settings) = serde_json::from_value(Value::Object(values)) {
            self.settings = settings;
        }
    }

    /// Refuses options of another method than the run's.
    pub(super) fn check_method(&self, problems: &mut Misuse) {
        let method = self.settings.method;
        // A run's own config.yaml names every key, so only values that ask for something are refused.
        let defaults = object(&defaults()).unwrap_or_default();
        let values = object(&self.settings).unwrap_or_default();
        for (key, _) in values
            .iter()
            .filter(|(key, value)| !method.reads(key) && defaults.get(*key) != Some(*value))
        {
            problems.push(format!(
                "{} does nothing with the method {}; leave it out",
                self.name(key),
                method.name()
            ));
        }
    }

    pub(super) fn check_paths(&self, problems: &mut Misuse) {
        let s = &self.settings;
        let missing = |key: &str, what: &str| format!("{} is missing: give {what}", flag(key));
        let is_given = |key: &str| self.given.contains(key);
        let has_model = is_given("model") && !s.model.trim().is_empty();
        problems.require(has_model, || {
            missing(
                "model",
                "a model folder, an id of the Hugging Face Hub, or builtin:tiny",
            )
        });
        problems.require(is_given("data"), || {
            missing("data", "a folder with train.jsonl, or one file of rows")
        });
        problems.require(is_given("output"), || {
            missing("output", "the folder to write the adapter to")
        });
        for (key, path) in [
            ("data", is_given("data").then_some(&s.data)),
            ("valid_data", s.valid_data.as_ref()),
            ("init_adapter", s.init_adapter.as_ref()),
        ] {
            if let Some(path) = path {
                // Rows may come from standard input, but only once.
                let input = key != "init_adapter" && is_standard_input(path);
                problems.require(input || exists(path), || {
                    let reason = if key == "init_adapter" {
                        why_no_adapter(path)
                    } else {
                        why_missing(path)
                    };
                    let reason = reason.unwrap_or_else(|| "does not exist".to_owned());
                    format!("{}: {} {reason}", self.name(key), path.display())
                });
            }
        }
        let valid_data = s.valid_data.as_deref();
        let both = is_standard_input(&s.data) && valid_data.is_some_and(is_standard_input);
        problems.require(!both, || {
            format!(
                "{} and {} are both standard input, which can be read only once; put one of them into a file",
                self.name("data"),
                self.name("valid_data")
            )
        });
    }
}

/// Whether two values mean the same; PEFT sorts lists of modules as it likes.
fn same(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Array(a), Value::Array(b)) => {
            a.len() == b.len() && a.iter().all(|item| b.contains(item))
        }
        (Value::Number(a), Value::Number(b)) => a.as_f64() == b.as_f64(),
        _ => a == b,
    }
}

fn exists(path: &Path) -> bool {
    // A path that cannot be looked at is left to whoever opens it, whose message says why.
    path.try_exists().unwrap_or(true)
}
