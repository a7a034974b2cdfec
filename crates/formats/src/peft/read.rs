//! From JSON to a checked [`LoraConfig`]; every problem is collected before anything is returned.

use serde_json::{Map, Value, json};

use super::target::{compile, compile_pattern};
use super::{LoraConfig, ModuleNames, TargetModules, TokenIndices};
use crate::json::show;

/// Above any useful rank and any model's width.
const MOST_RANK: u64 = 1 << 16;

/// Every key that PEFT 0.21 writes for LoRA, with its default.
pub(super) fn defaults() -> Map<String, Value> {
    let nulls = [
        "alora_invocation_tokens",
        "arrow_config",
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "eva_config",
        "exclude_modules",
        "kasa_config",
        "layer_replication",
        "layers_pattern",
        "layers_to_transform",
        "lora_ga_config",
        "megatron_config",
        "modules_to_save",
        "monteclora_config",
        "peft_type",
        "peft_version",
        "revision",
        "target_modules",
        "target_parameters",
        "task_type",
        "trainable_token_indices",
        "use_bdlora",
        "velora_config",
    ];
    let mut map: Map<String, Value> = nulls
        .into_iter()
        .map(|key| (key.to_string(), Value::Null))
        .collect();
    for (key, value) in [
        ("alpha_pattern", json!({})),
        ("bias", json!("none")),
        ("ensure_weight_tying", json!(false)),
        ("fan_in_fan_out", json!(false)),
        ("inference_mode", json!(false)),
        ("init_lora_weights", json!(true)),
        ("loftq_config", json!({})),
        ("lora_alpha", json!(8)),
        ("lora_bias", json!(false)),
        ("lora_dropout", json!(0.0)),
        ("megatron_core", json!("megatron.core")),
        ("qalora_group_size", json!(16)),
        ("r", json!(8)),
        ("rank_pattern", json!({})),
        ("use_dora", json!(false)),
        ("use_qalora", json!(false)),
        ("use_rslora", json!(false)),
    ] {
        map.insert(key.to_string(), value);
    }
    map
}

/// Keys that are read into fields, and keys that mean nothing by themselves: how an adapter was initialised or what
/// reads it, or parameters of a feature whose own switch is another key.
const HARMLESS: [&str; 29] = [
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_alpha",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "trainable_token_indices",
    "use_dora",
    "use_rslora",
];

pub(super) fn read(map: &Map<String, Value>) -> Result<LoraConfig, Vec<String>> {
    let mut reader = Reader {
        map,
        problems: Vec::new(),
    };
    reader.check_type();
    reader.check_unsupported();
    let config = reader.config();
    if reader.problems.is_empty() {
        Ok(config)
    } else {
        Err(reader.problems)
    }
}

struct Reader<'a> {
    map: &'a Map<String, Value>,
    problems: Vec<String>,
}

impl<'a> Reader<'a> {
    /// The value, unless it is missing or null.
    fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    fn wrong(&mut self, key: &str, value: &Value, accepted: &str) {
        self.problems
            .push(format!("`{key}` is {}; accepted: {accepted}", show(value)));
    }

    fn check_type(&mut self) {
        match self.get("peft_type") {
            None => self
                .problems
                .push("`peft_type` is missing; accepted: \"LORA\"".into()),
            Some(Value::String(kind)) if kind == "LORA" => {}
            Some(other) => self.wrong("peft_type", other, "\"LORA\""),
        }
    }

    fn check_unsupported(&mut self) {
        let defaults = defaults();
        for (key, value) in self.map {
            let default = defaults.get(key);
            if HARMLESS.contains(&key.as_str()) || default == Some(value) || is_inactive(value) {
                continue;
            }
            let problem = match default {
                Some(default) => format!(
                    "`{key}` is {}: this feature is not supported; accepted: {}",
                    show(value),
                    show(default)
                ),
                None => format!(
                    "`{key}` is {}: this key is not known here, and what it switches on would be lost; remove it or \
                     set it to null if it does not change the adapter",
                    show(value)
                ),
            };
            self.problems.push(problem);
        }
    }

    fn config(&mut self) -> LoraConfig {
        let default = LoraConfig::default();
        let config = LoraConfig {
            r: self.get("r").map_or(default.r, |v| self.rank("r", v)),
            lora_alpha: self
                .get("lora_alpha")
                .map_or(default.lora_alpha, |v| self.alpha("lora_alpha", v)),
            lora_dropout: self.dropout().unwrap_or(default.lora_dropout),
            target_modules: self.targets(),
            exclude_modules: self.excluded(),
            fan_in_fan_out: self.bool("fan_in_fan_out"),
            use_rslora: self.bool("use_rslora"),
            use_dora: self.bool("use_dora"),
            init_lora_weights: self.init(),
            rank_pattern: self.pattern("rank_pattern", Reader::rank),
            alpha_pattern: self.pattern("alpha_pattern", Reader::alpha),
            layers_to_transform: self.layers(),
            layers_pattern: self.layers_pattern(),
            base_model_name_or_path: self.string("base_model_name_or_path"),
            revision: self.string("revision"),
            task_type: self.string("task_type"),
            modules_to_save: self.saved(),
            trainable_token_indices: self.token_indices(),
            inference_mode: self.bool("inference_mode"),
            auto_mapping: self.get("auto_mapping").cloned(),
            peft_version: self.string("peft_version"),
        };
        // PEFT refuses the same combinations.
        let by_list = matches!(config.target_modules, TargetModules::List(_));
        if !by_list && (config.layers_to_transform.is_some() || !config.layers_pattern.is_empty()) {
            self.problems.push(
                "`layers_to_transform` and `layers_pattern` need a list in `target_modules`, which is a string".into(),
            );
        }
        if !config.layers_pattern.is_empty() && config.layers_to_transform.is_none() {
            self.problems
                .push("`layers_pattern` is given without `layers_to_transform`".into());
        }
        config
    }

    fn rank(&mut self, key: &str, value: &Value) -> usize {
        match value.as_u64() {
            Some(r) if (1..=MOST_RANK).contains(&r) => r as usize,
            _ => {
                self.wrong(key, value, &format!("an integer from 1 to {MOST_RANK}"));
                1
            }
        }
    }

    fn alpha(&mut self, key: &str, value: &Value) -> f64 {
        match value.as_f64() {
            Some(alpha) if alpha.is_finite() && (alpha as f32).is_finite() => alpha,
            _ => {
                self.wrong(key, value, "a finite number");
                1.0
            }
        }
    }

    fn dropout(&mut self) -> Option<f64> {
        let value = self.get("lora_dropout")?;
        let dropout = value.as_f64().filter(|p| (0.0..1.0).contains(p));
        if dropout.is_none() {
            self.wrong("lora_dropout", value, "a number from 0 up to but without 1");
        }
        dropout
    }

    fn bool(&mut self, key: &str) -> bool {
        match self.get(key) {
            None => false,
            Some(Value::Bool(value)) => *value,
            Some(other) => {
                self.wrong(key, other, "true or false");
                false
            }
        }
    }

    fn string(&mut self, key: &str) -> Option<String> {
        let value = self.get(key)?;
        if let Value::String(text) = value {
            return Some(text.clone());
        }
        self.wrong(key, value, "a string or null");
        None
    }

    fn saved(&mut self) -> Vec<String> {
        const KEY: &str = "modules_to_save";
        let Some(value) = self.get(KEY) else {
            return Vec::new();
        };
        let names = value.as_array().and_then(|names| {
            let names = names.iter().map(|name| Some(name.as_str()?.to_owned()));
            names.collect::<Option<Vec<_>>>()
        });
        names.unwrap_or_else(|| {
            self.wrong(KEY, value, "a list of module names, or null");
            Vec::new()
        })
    }

    fn token_indices(&mut self) -> Option<TokenIndices> {
        const KEY: &str = "trainable_token_indices";
        let value = self.get(KEY).filter(|value| **value != json!({}))?;
        match TokenIndices::from_json(KEY, value) {
            Ok(indices) => Some(indices),
            Err(problems) => {
                self.problems.extend(problems);
                None
            }
        }
    }

    fn targets(&mut self) -> TargetModules {
        match self.get("target_modules") {
            None => self.problems.push(
                "`target_modules` is missing or null; accepted: a list of module names, a regular expression, or \
                 \"all-linear\""
                    .into(),
            ),
            Some(Value::String(text)) if text.eq_ignore_ascii_case("all-linear") => {
                return TargetModules::AllLinear;
            }
            Some(value) => match self.names("target_modules", value) {
                Some(ModuleNames::List(list)) if list.is_empty() => {
                    self.wrong("target_modules", value, "at least one module name");
                }
                Some(ModuleNames::List(list)) => return TargetModules::List(list),
                Some(ModuleNames::Regex(regex)) => return TargetModules::Regex(regex),
                None => {}
            },
        }
        TargetModules::List(Vec::new())
    }

    fn excluded(&mut self) -> Option<ModuleNames> {
        let value = self
            .get("exclude_modules")
            .filter(|value| !is_inactive(value))?;
        self.names("exclude_modules", value)
    }

    fn names(&mut self, key: &str, value: &Value) -> Option<ModuleNames> {
        if let Value::String(regex) = value {
            if let Err(problem) = compile(regex) {
                self.problems
                    .push(format!("`{key}` is {}: {problem}", show(value)));
            }
            return Some(ModuleNames::Regex(regex.clone()));
        }
        let list: Option<Vec<String>> = value.as_array().and_then(|list| {
            list.iter()
                .map(|name| name.as_str().map(String::from))
                .collect()
        });
        if list.is_none() {
            self.wrong(
                key,
                value,
                "a list of module names, or a regular expression",
            );
        }
        list.map(ModuleNames::List)
    }

    fn init(&mut self) -> Value {
        // The other schemes also change the base's weights when an adapter is made (or loaded): A and B alone are then
        // not the adapter.
        const KEEP_THE_BASE: [&str; 3] = ["gaussian", "eva", "orthogonal"];
        let Some(value) = self.get("init_lora_weights") else {
            return Value::Bool(true);
        };
        let fine = match value {
            Value::Bool(_) => true,
            Value::String(name) => KEEP_THE_BASE.contains(&name.as_str()),
            _ => false,
        };
        if !fine {
            self.wrong(
                "init_lora_weights",
                value,
                "true, false, \"gaussian\", \"eva\", \"orthogonal\"; others change the base's weights, so convert the \
                 adapter with PEFT's `path_initial_model_for_weight_conversion` first",
            );
        }
        value.clone()
    }

    fn pattern<T>(
        &mut self,
        key: &str,
        read: impl Fn(&mut Self, &str, &Value) -> T,
    ) -> Vec<(String, T)> {
        let map = match self.get(key) {
            None => return Vec::new(),
            Some(Value::Object(map)) => map,
            Some(other) => {
                self.wrong(key, other, "an object of module names and numbers");
                return Vec::new();
            }
        };
        map.iter()
            .map(|(name, value)| {
                let field = format!("{key}.{name}");
                if let Err(problem) = compile_pattern(name) {
                    self.problems.push(format!("`{field}`: {problem}"));
                }
                let number = read(self, &field, value);
                (name.clone(), number)
            })
            .collect()
    }

    fn layers(&mut self) -> Option<Vec<usize>> {
        let value = self.get("layers_to_transform")?;
        let index = |v: &Value| v.as_u64().and_then(|n| usize::try_from(n).ok());
        let layers = match value {
            Value::Array(list) => list.iter().map(index).collect(),
            one => index(one).map(|layer| vec![layer]),
        };
        if layers.is_none() {
            self.wrong(
                "layers_to_transform",
                value,
                "a layer's number, a list of them, or null",
            );
        }
        layers
    }

    fn layers_pattern(&mut self) -> Vec<String> {
        let Some(value) = self
            .get("layers_pattern")
            .filter(|value| !is_inactive(value))
        else {
            return Vec::new();
        };
        let patterns: Option<Vec<String>> = match value {
            Value::String(one) => Some(vec![one.clone()]),
            Value::Array(list) => list.iter().map(|p| p.as_str().map(String::from)).collect(),
            _ => None,
        };
        let Some(patterns) = patterns else {
            self.wrong("layers_pattern", value, "a name, a list of names, or null");
            return Vec::new();
        };
        for pattern in &patterns {
            if let Err(problem) = compile(pattern) {
                self.problems
                    .push(format!("`layers_pattern` has {pattern:?}: {problem}"));
            }
        }
        patterns
    }
}

/// Null, false, zero-length: a feature that is switched off, whatever it is.
pub fn is_inactive(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        Value::Bool(true) | Value::Number(_) => false,
    }
}
