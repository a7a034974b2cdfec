//! Checks of the training settings, alone and together.

use std::path::{Path, PathBuf};

use lowrank::data::{is_standard_input, why_missing};
use lowrank::tuning::lora::Targets;
use lowrank::tuning::prefix;
use serde_json::Value;

use super::TrainSettings;
use crate::failure::Misuse;
use crate::settings::paths::why_no_adapter;
use crate::settings::{Layered, flag, object};

/// Keys that `init_adapter` decides.
const ADAPTER_KEYS: &[&str] = &[
    "r",
    "lora_alpha",
    "target_modules",
    "exclude_modules",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "top_layers",
    "head_only",
    "adapter_kind",
    "bottleneck",
    "prefix_kind",
    "num_virtual_tokens",
    "infix_tokens",
];

/// Which numbers a setting takes, and the same in words.
type Range = (fn(f64) -> bool, &'static str);

impl Layered<TrainSettings> {
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
        // PEFT's files say it with their type.
        let kind = match config.get("peft_type").and_then(Value::as_str) {
            Some("PREFIX_TUNING") => Some("layer"),
            Some("PROMPT_TUNING") => Some("embedding"),
            _ => None,
        };
        if let Some(kind) = kind {
            config.insert("prefix_kind".to_owned(), kind.into());
        }
        let Ok(mut values) = object(&self.settings) else {
            return;
        };
        let defaults = object(&TrainSettings::defaults()).unwrap_or_default();
        let method = self.settings.trained.method;
        for key in ADAPTER_KEYS.iter().filter(|key| method.reads(key)) {
            let adapters = match config.get(*key) {
                None | Some(Value::Null) => defaults.get(*key),
                given => given,
            };
            let Some(adapters) = adapters else { continue };
            let mut candidate = values.clone();
            candidate.insert((*key).to_string(), adapters.clone());
            let Ok(taken) = serde_json::from_value::<TrainSettings>(Value::Object(candidate))
            else {
                continue;
            };
            let Some(adopted) = object(&taken).ok().and_then(|mut map| map.remove(*key)) else {
                continue;
            };
            let ours = values.get(*key).unwrap_or(&Value::Null);
            if self.given.contains(*key) && !same(ours, &adopted) {
                problems.push(format!(
                    "{} is {ours}, and the adapter to start from has {adopted}, which cannot be changed; leave it out",
                    self.name(key)
                ));
            }
            values.insert((*key).to_string(), adopted);
        }
        if let Ok(settings) = serde_json::from_value(Value::Object(values)) {
            self.settings = settings;
        }
    }

    pub(super) fn check_ranges(&self, problems: &mut Misuse) {
        let s = &self.settings;
        let mut number = |key: &str, value: f64, fine: &dyn Fn(f64) -> bool, range: &str| {
            // The engine computes in 32 bits, where a number may turn out as zero, one or infinite.
            let held = f64::from(value as f32);
            problems.require(fine(held) && held.is_finite(), || {
                let rounded = if fine(value) && value.is_finite() {
                    if held.is_infinite() {
                        return format!(
                            "{} must be {range}, and no larger than 3.4e38, the largest 32-bit number; it is {}",
                            self.name(key),
                            shown(value)
                        );
                    }
                    format!(", which is {held} as a 32-bit number")
                } else {
                    String::new()
                };
                format!(
                    "{} must be {range}, not {}{rounded}",
                    self.name(key),
                    shown(value)
                )
            });
        };
        let positive: Range = (|x| x > 0.0, "greater than 0");
        let not_negative: Range = (|x| x >= 0.0, "0 or greater");
        let share: Range = (|x| (0.0..1.0).contains(&x), "at least 0 and less than 1");
        let rate = s.learning_rate.unwrap_or(1.0);
        let rules: [(&str, f64, Range); 11] = [
            ("lora_alpha", s.lora_alpha, positive),
            ("lora_dropout", s.lora_dropout, share),
            ("learning_rate", rate, positive),
            (
                "warmup_ratio",
                s.warmup_ratio,
                (|x| (0.0..=1.0).contains(&x), "from 0 to 1"),
            ),
            ("weight_decay", s.weight_decay, not_negative),
            ("adam_beta1", s.adam_beta1, share),
            ("adam_beta2", s.adam_beta2, share),
            ("adam_epsilon", s.adam_epsilon, positive),
            ("max_grad_norm", s.max_grad_norm, not_negative),
            ("label_smoothing_factor", s.label_smoothing_factor, share),
            ("num_train_epochs", s.num_train_epochs, positive),
        ];
        for (key, value, (fine, range)) in rules {
            number(key, value, &fine, range);
        }
        for (pattern, alpha) in &s.alpha_pattern {
            let range = format!("greater than 0 for {pattern}");
            number("alpha_pattern", *alpha, &|x| x > 0.0, &range);
        }

        self.check_counts(problems);
    }

    /// Numbers that are at least one.
    fn check_counts(&self, problems: &mut Misuse) {
        let s = &self.settings;
        let mut count = |key: &str, value: Option<u64>| {
            problems.require(value != Some(0), || {
                format!("{} must be 1 or greater, not 0", self.name(key))
            });
        };
        let wide = |value: usize| Some(value as u64);
        count("r", wide(s.trained.r));
        count("top_layers", s.trained.top_layers.and_then(wide));
        count("bottleneck", wide(s.trained.bottleneck));
        count("max_seq_length", wide(s.max_seq_length));
        count("batch_size", wide(s.batch_size));
        count(
            "gradient_accumulation_steps",
            wide(s.gradient_accumulation_steps),
        );
        count("max_steps", s.max_steps);
        count("eval_steps", s.eval_steps);
        count("save_steps", s.save_steps);
        count("save_total_limit", s.save_total_limit.and_then(wide));
        count(
            "early_stopping_patience",
            s.early_stopping_patience.and_then(wide),
        );
        count("threads", s.threads.and_then(wide));
        for (_, rank) in &s.trained.rank_pattern {
            count("rank_pattern", wide(*rank));
        }
    }

    pub(super) fn check_combinations(&self, problems: &mut Misuse) {
        let s = &self.settings;
        let method = s.trained.method;
        // A run's own config.yaml names every key, so only values that ask for something are refused.
        let defaults = object(&TrainSettings::defaults()).unwrap_or_default();
        let values = object(s).unwrap_or_default();
        for (key, _) in values
            .iter()
            .filter(|(key, value)| !method.reads(key) && defaults.get(*key) != Some(*value))
        {
            problems.push(format!(
                "{} does nothing with the method {}; leave it out",
                self.name(key),
                values.get("method").and_then(Value::as_str).unwrap_or("")
            ));
        }
        problems.require(
            !(s.trained.head_only && s.trained.top_layers.is_some()),
            || {
                format!(
                    "{} trains the output projection alone, so leave {} out",
                    self.name("head_only"),
                    self.name("top_layers")
                )
            },
        );
        let layer = s.trained.prefix_kind == prefix::Kind::Layer;
        problems.require(!layer || s.trained.infix_tokens == 0, || {
            format!(
                "{} goes with {} embedding",
                self.name("infix_tokens"),
                self.name("prefix_kind")
            )
        });
        problems.require(
            s.trained.num_virtual_tokens > 0 || s.trained.infix_tokens > 0,
            || format!("{} must be 1 or greater", self.name("num_virtual_tokens")),
        );
        for (key, set) in [
            ("load_best_model_at_end", s.load_best_model_at_end),
            (
                "early_stopping_patience",
                s.early_stopping_patience.is_some(),
            ),
        ] {
            problems.require(!set || s.eval_steps.is_some(), || {
                format!(
                    "{} needs {}: without it the only evaluation is at the end",
                    self.name(key),
                    flag("eval_steps")
                )
            });
        }
        problems.require(!(s.share_prompts && s.batch_size == 1), || {
            format!(
                "{} needs a {} of 2 or more: a prompt is shared by rows of a batch",
                self.name("share_prompts"),
                flag("batch_size")
            )
        });
        for (key, targets) in [
            ("target_modules", &s.trained.target_modules),
            ("exclude_modules", &s.trained.exclude_modules),
        ] {
            let empty = match targets {
                Some(Targets::Names(names)) => names.is_empty(),
                Some(Targets::Pattern(pattern)) => pattern.is_empty(),
                None => false,
            };
            problems.require(!empty, || format!("{} names no module", self.name(key)));
        }
    }

    pub(super) fn check_paths(&self, problems: &mut Misuse) {
        let s = &self.settings;
        let missing = |key: &str, what: &str| format!("{} is missing: give {what}", flag(key));
        let given = |text: &str| !text.trim().is_empty();
        problems.require(s.model.as_deref().is_some_and(given), || {
            missing(
                "model",
                "a model folder, an id of the Hugging Face Hub, or builtin:tiny",
            )
        });
        problems.require(s.data.is_some(), || {
            missing("data", "a folder with train.jsonl, or one file of rows")
        });
        problems.require(s.output.is_some(), || {
            missing("output", "the folder to write the adapter to")
        });
        for (key, path) in [
            ("data", &s.data),
            ("valid_data", &s.valid_data),
            ("init_adapter", &s.init_adapter),
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
        let input = |path: &Option<PathBuf>| path.as_deref().is_some_and(is_standard_input);
        problems.require(!(input(&s.data) && input(&s.valid_data)), || {
            format!(
                "{} and {} are both standard input, which can be read only once; put one of them into a file",
                self.name("data"),
                self.name("valid_data")
            )
        });
    }
}

/// A number as a person would write it: 1e-60 without its zeros.
fn shown(value: f64) -> String {
    if value == 0.0 || (1e-6..1e16).contains(&value.abs()) {
        value.to_string()
    } else {
        format!("{value:e}")
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
