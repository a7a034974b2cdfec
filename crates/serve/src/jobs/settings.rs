//! From a request to the settings of a training.
//!
//! OpenAI's hyperparameters and lowrank's own keys under `lowrank` come to one [`TrainConfig`], through the parser that its files go through.

use std::path::{Path, PathBuf};

use lowrank::data::Example;
use lowrank::fields::{nearest, plain};
use lowrank::model::ModelConfig;
use lowrank::settings::{Began, TrainConfig};
use lowrank::tuning::{self, Method};
use serde_json::{Map, Value, json};

use crate::api::fields::{self, Field, Kind, field, kind_of, write_as_whole};
use crate::error::ApiError;

/// Fields of a request for a job.
pub(crate) const CREATE: &[Field] = &[
    field(
        "model",
        Kind::Text,
        "The base, or an adapter that the job goes on from",
    ),
    field("training_file", Kind::Text, "The id of a file of rows"),
    field(
        "validation_file",
        Kind::Text,
        "The id of a file of held-out rows",
    ),
    field(
        "method",
        Kind::Other(r#"{"type": ["object", "null"]}"#),
        "supervised, with its hyperparameters",
    ),
    field(
        "hyperparameters",
        Kind::Other(r#"{"type": ["object", "null"]}"#),
        "n_epochs, batch_size, learning_rate_multiplier; \"auto\" is lowrank's default",
    ),
    field("suffix", Kind::Text, "A part of the result's name"),
    field(
        "seed",
        Kind::Integer(0..=i64::MAX),
        "Decides the start and the order of the rows",
    ),
    field(
        "lowrank",
        Kind::Other(r#"{"type": ["object", "null"]}"#),
        "lowrank's own settings by their keys, such as r, lora_alpha, learning_rate, max_steps",
    ),
    field(
        "metadata",
        Kind::Other(r#"{"type": ["object", "null"]}"#),
        "Kept with the job",
    ),
    field(
        "integrations",
        Kind::Other(r#"{"type": ["array", "null"], "maxItems": 0}"#),
        "There are none",
    ),
];

/// Keys that a server decides.
const OF_SERVER: [(&str, &str); 11] = [
    ("model", "the request's model says it"),
    ("data", "the request's training_file says it"),
    ("valid_data", "the request's validation_file says it"),
    ("init_adapter", "give the adapter as the request's model"),
    (
        "output",
        "the server names the result; suffix is a part of its name",
    ),
    ("seed", "the request's seed says it"),
    ("base_dtype", "it is that of the base which is served"),
    (
        "load_in",
        "the base is quantized, or not, when the server starts",
    ),
    ("threads", "all jobs and requests share the server's"),
    ("began", "it is when the job was created"),
    ("force", "it cannot be set for a job"),
];

/// Tokens that a micro-batch has by the mean of the rows: requests wait for parts of one.
const TOKENS_OF_A_BATCH: f64 = 80.0;

/// What a request wants, checked as far as that goes without its rows.
#[derive(Debug)]
pub(super) struct Wanted {
    pub(super) config: TrainConfig,
    /// lowrank's keys as they were given.
    pub(super) given: Map<String, Value>,
}

/// Where a job's model is.
pub(super) struct Base<'a> {
    /// What the base is called where adapters name it.
    pub(super) name: String,
    pub(super) model: &'a ModelConfig,
    pub(super) dtype: lowrank::DType,
    /// The folder of the adapter that the job goes on from.
    pub(super) adapter: Option<&'a Path>,
}

/// Reads the settings of a request.
pub(super) fn read(body: &fields::Body, base: &Base, now: u64) -> Result<Wanted, ApiError> {
    if body
        .get("integrations")
        .and_then(Value::as_array)
        .is_some_and(|list| !list.is_empty())
    {
        let message = "there are no integrations here: the figures of a job are in its events";
        return Err(ApiError::invalid("integrations", message));
    }
    let given = object(body.get("lowrank"), "lowrank")?;
    let mut config = read_keys(&given)?;
    config.model.clone_from(&base.name);
    config.base_dtype = match base.dtype {
        lowrank::DType::F32 => lowrank::train::BaseDtype::F32,
        lowrank::DType::Bf16 => lowrank::train::BaseDtype::Bf16,
    };
    config.began = Some(Began {
        time: now.cast_signed(),
        folder: None,
    });
    if let Some(seed) = body.integer("seed") {
        config.seed = seed.cast_unsigned();
    }
    if let Some(folder) = base.adapter {
        adopt(&mut config, folder, base.model, &given)?;
    }
    if config.method.writes_model() {
        let message = format!(
            "the method {} makes whole models, and jobs make adapters",
            config.method.name()
        );
        return Err(ApiError::invalid("lowrank.method", message));
    }
    if config.options.lora.add_tokens.is_some() {
        let message = "add_tokens changes the base's tokenizer, which others use; train such an adapter with `lowrank train`";
        return Err(ApiError::invalid("lowrank.add_tokens", message));
    }
    if config.options.lora.loftq_weights.is_some() {
        let message = "loftq_weights names a folder of the server's; train such an adapter with `lowrank train`";
        return Err(ApiError::invalid("lowrank.loftq_weights", message));
    }
    if !given.contains_key("learning_rate") {
        config.learning_rate = config.method.learning_rate();
    }
    hyperparameters(&mut config, body, &given)?;
    refuse_idle(&config, &given)?;
    let problems = config.problems();
    if !problems.is_empty() {
        return Err(ApiError::invalid("lowrank", problems.join("; ")));
    }
    let laid_out = config.lay_out(base.model);
    laid_out.map_err(|error| ApiError::invalid("lowrank", error.to_string()))?;
    Ok(Wanted { config, given })
}

fn object(value: Option<&Value>, param: &str) -> Result<Map<String, Value>, ApiError> {
    match value {
        None => Ok(Map::new()),
        Some(Value::Object(map)) => {
            let mut map = map.clone();
            map.retain(|_, value| !value.is_null());
            Ok(map)
        }
        Some(other) => {
            let message = format!("{param} must be an object, not {}", kind_of(other));
            Err(ApiError::invalid(param, message))
        }
    }
}

fn to_map(config: &TrainConfig) -> Map<String, Value> {
    match serde_json::to_value(config) {
        Ok(Value::Object(map)) => map,
        _ => Map::new(),
    }
}

fn defaults() -> TrainConfig {
    TrainConfig::new(Method::Lora, "", PathBuf::new(), PathBuf::new())
}

/// lowrank's keys over the defaults, each by itself, so that an error names the one that is wrong.
fn read_keys(given: &Map<String, Value>) -> Result<TrainConfig, ApiError> {
    let defaults = to_map(&defaults());
    let mut values = defaults.clone();
    for (key, value) in given {
        let param = format!("lowrank.{key}");
        if let Some((_, why)) = OF_SERVER.iter().find(|(name, _)| name == key) {
            return Err(ApiError::invalid(
                param,
                format!("{key} is not a job's to set: {why}"),
            ));
        }
        if !defaults.contains_key(key) {
            return Err(unknown(key, defaults.keys().map(String::as_str), "setting"));
        }
        let mut candidate = defaults.clone();
        let mut value = value.clone();
        write_as_whole(&mut value);
        candidate.insert(key.clone(), value.clone());
        serde_json::from_value::<TrainConfig>(candidate.clone().into()).map_err(|error| {
            let reason = plain(&error.to_string());
            let is_negative = value.as_f64().is_some_and(|number| number < 0.0);
            let message = if is_negative && reason.contains("expected a whole number") {
                negative(candidate, key, &value)
            } else {
                format!("{key}: {reason}")
            };
            ApiError::invalid(param, message)
        })?;
        values.insert(key.clone(), value);
    }
    // Each was taken by itself, so all of them are.
    serde_json::from_value(values.into())
        .map_err(|error| ApiError::invalid("lowrank", plain(&error.to_string())))
}

/// What is said of a count that is negative: the range of the setting, which is what is said of 0 where that is too small, too.
fn negative(mut settings: Map<String, Value>, key: &str, value: &Value) -> String {
    settings.insert(key.to_owned(), 0.into());
    let problems = serde_json::from_value::<TrainConfig>(settings.into())
        .map_or(Vec::new(), |config| config.problems());
    let begin = format!("{key} must be ");
    problems
        .iter()
        .find_map(|problem| problem.strip_prefix(&begin)?.strip_suffix(", not 0"))
        .map_or_else(
            || format!("{key} must be a whole number, 0 or greater, not {value}"),
            |range| format!("{begin}{range}, not {value}"),
        )
}

fn unknown<'a>(name: &str, known: impl Iterator<Item = &'a str>, what: &str) -> ApiError {
    let near = nearest(name, known);
    let near = near.map_or(String::new(), |known| format!("; did you mean {known}?"));
    ApiError {
        code: "unknown_parameter",
        ..ApiError::invalid(
            if what == "setting" {
                format!("lowrank.{name}")
            } else {
                name.to_owned()
            },
            format!("there is no {what} {name:?}{near}"),
        )
    }
}

/// Takes over what the adapter to go on from decides; a key that says otherwise is an error.
fn adopt(
    config: &mut TrainConfig,
    folder: &Path,
    model: &ModelConfig,
    given: &Map<String, Value>,
) -> Result<(), ApiError> {
    let loaded = tuning::load(folder, model)
        .map_err(|error| ApiError::invalid("model", error.to_string()))?;
    let method = loaded.config.method();
    if given.contains_key("method") && config.method != method {
        let message = format!(
            "the adapter was trained with {}, and a job that goes on from it does the same; leave method out",
            method.name()
        );
        return Err(ApiError::invalid("lowrank.method", message));
    }
    config.method = method;
    let text = std::fs::read(folder.join("adapter_config.json"));
    let mut options: Map<String, Value> = text
        .ok()
        .and_then(|text| serde_json::from_slice(&text).ok())
        .unwrap_or_default();
    method.complete(&mut options);
    let mut values = to_map(config);
    let defaults = to_map(&defaults());
    for key in method.fixed_keys() {
        let of_adapter = options.get(key).filter(|value| !value.is_null());
        let Some(of_adapter) = of_adapter.or_else(|| defaults.get(key)) else {
            continue;
        };
        let mut candidate = values.clone();
        candidate.insert(key.to_owned(), of_adapter.clone());
        let Ok(taken) = serde_json::from_value::<TrainConfig>(candidate.into()) else {
            continue;
        };
        let Some(adopted) = to_map(&taken).remove(key) else {
            continue;
        };
        let ours = values.get(key).cloned().unwrap_or_default();
        if given.contains_key(key) && !is_same(&ours, &adopted) {
            let message = format!(
                "{key} is {ours}, and the adapter that the job goes on from has {adopted}, which cannot be changed; leave it out"
            );
            return Err(ApiError::invalid(format!("lowrank.{key}"), message));
        }
        values.insert(key.to_owned(), adopted);
    }
    if let Ok(adopted) = serde_json::from_value(values.into()) {
        let began = config.began.take();
        *config = adopted;
        config.began = began;
    }
    config.init_adapter = Some(folder.to_path_buf());
    Ok(())
}

/// Whether two values mean the same; the order of a list of modules does not.
fn is_same(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Array(a), Value::Array(b)) => {
            a.len() == b.len() && a.iter().all(|item| b.contains(item))
        }
        (Value::Number(a), Value::Number(b)) => a.as_f64() == b.as_f64(),
        _ => a == b,
    }
}

/// Refuses keys that the method does not read.
fn refuse_idle(config: &TrainConfig, given: &Map<String, Value>) -> Result<(), ApiError> {
    match given.keys().find(|key| !config.method.reads(key)) {
        None => Ok(()),
        Some(key) => Err(ApiError::invalid(
            format!("lowrank.{key}"),
            format!(
                "{key} does nothing with the method {}; leave it out",
                config.method.name()
            ),
        )),
    }
}

/// Puts OpenAI's hyperparameters into the settings.
fn hyperparameters(
    config: &mut TrainConfig,
    body: &fields::Body,
    given: &Map<String, Value>,
) -> Result<(), ApiError> {
    let (wanted, place) = find_hyperparameters(body)?;
    for (key, value) in &wanted {
        let param = format!("{place}.{key}");
        let known = ["n_epochs", "batch_size", "learning_rate_multiplier"];
        if !known.contains(&key.as_str()) {
            return Err(ApiError {
                param: Some(param),
                ..unknown(key, known.into_iter(), "hyperparameter")
            });
        }
        if value == "auto" {
            continue;
        }
        let wrong = |what: &str| {
            let message = format!("{key} must be {what} or \"auto\", not {value}");
            Err(ApiError::invalid(param.clone(), message))
        };
        let twice = |other: &str| {
            let message =
                format!("{key} and lowrank's {other} say the same thing; give one of them");
            Err(ApiError::invalid(param.clone(), message))
        };
        let number = value
            .as_f64()
            .filter(|number| *number > 0.0 && *number <= 1e6);
        match key.as_str() {
            "n_epochs" => match number {
                Some(_) if given.contains_key("num_train_epochs") => {
                    return twice("num_train_epochs");
                }
                Some(number) => config.num_train_epochs = number,
                None => return wrong("a number above 0"),
            },
            "batch_size" => match fields::whole(value).filter(|rows| (1..=65536).contains(rows)) {
                Some(_) if given.contains_key("batch_size") => return twice("batch_size"),
                Some(rows) => {
                    let steps = config.gradient_accumulation_steps as i64;
                    if rows % steps != 0 {
                        let message = format!(
                            "batch_size is the rows of an optimizer step, and {rows} cannot be divided by gradient_accumulation_steps {steps}"
                        );
                        return Err(ApiError::invalid(param, message));
                    }
                    config.batch_size = (rows / steps) as usize;
                }
                None => return wrong("a whole number from 1 to 65536"),
            },
            _ => match number {
                Some(_) if given.contains_key("learning_rate") => return twice("learning_rate"),
                Some(factor) => config.learning_rate *= factor,
                None => return wrong("a number above 0"),
            },
        }
    }
    Ok(())
}

/// The hyperparameters and where they stand: under `method`, or as they were given before there was one.
fn find_hyperparameters(
    body: &fields::Body,
) -> Result<(Map<String, Value>, &'static str), ApiError> {
    let old = object(body.get("hyperparameters"), "hyperparameters")?;
    let mut method = object(body.get("method"), "method")?;
    if method.is_empty() {
        return Ok((old, "hyperparameters"));
    }
    let kind = method.remove("type").unwrap_or_else(|| "supervised".into());
    if kind != "supervised" {
        let message = format!(
            "method.type must be \"supervised\", the only one that there is here, not {kind}"
        );
        return Err(ApiError::invalid("method.type", message));
    }
    let mut supervised = object(method.remove("supervised").as_ref(), "method.supervised")?;
    let new = object(
        supervised.remove("hyperparameters").as_ref(),
        "method.supervised.hyperparameters",
    )?;
    if let Some(key) = method.keys().chain(supervised.keys()).next() {
        let message = format!("a supervised method has no {key:?}");
        return Err(ApiError::invalid("method", message));
    }
    if !new.is_empty() && !old.is_empty() {
        let message = "hyperparameters are given twice; leave out those that are not under method";
        return Err(ApiError::invalid("hyperparameters", message));
    }
    if new.is_empty() {
        return Ok((old, "hyperparameters"));
    }
    Ok((new, "method.supervised.hyperparameters"))
}

/// Settles what the rows decide where the request does not: how many of them are computed at a time, and when the job evaluates and
/// writes checkpoints. It depends on nothing but the request and its rows.
pub(super) fn settle(
    config: &mut TrainConfig,
    given: &Map<String, Value>,
    train: &[Example],
    has_valid: bool,
) {
    let says = |key: &str| given.contains_key(key);
    if !says("batch_size") && !says("gradient_accumulation_steps") && !config.share_prompts {
        let tokens: usize = train.iter().map(|row| row.ids.len()).sum();
        let mean = tokens as f64 / train.len().max(1) as f64;
        let rows = config.rows_per_step();
        let fits =
            |size: &usize| rows.is_multiple_of(*size) && *size as f64 * mean <= TOKENS_OF_A_BATCH;
        config.batch_size = (1..=rows).rev().find(fits).unwrap_or(1);
        config.gradient_accumulation_steps = rows / config.batch_size;
    }
    let total = config.total_steps(train.len()).max(1);
    if !says("save_steps") {
        let epoch = train.len().div_ceil(config.rows_per_step()).max(1) as u64;
        config.save_steps = Some(epoch.min(total.div_ceil(10)).max(1));
        if !says("save_total_limit") {
            config.save_total_limit = Some(3);
        }
    }
    if has_valid && !says("eval_steps") {
        config.eval_steps = Some(total.div_ceil(20));
    }
}

/// The hyperparameters that a job has.
pub(super) fn shown(config: &TrainConfig) -> Value {
    let epochs = config.num_train_epochs;
    let epochs = if epochs.fract() == 0.0 {
        json!(epochs as u64)
    } else {
        json!(epochs)
    };
    json!({
        "n_epochs": epochs,
        "batch_size": config.rows_per_step(),
        "learning_rate_multiplier": config.learning_rate / config.method.learning_rate(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use lowrank::base::{BUILTIN, Source};

    fn wanted(request: Value) -> Result<Wanted, ApiError> {
        let model = Source::find(BUILTIN)
            .and_then(|source| source.model_config())
            .expect("the built-in model");
        let caps = crate::server::Caps::default();
        let body = fields::Body::of(request, &[CREATE], &caps).expect("a body");
        let base = Base {
            name: BUILTIN.to_owned(),
            model: &model,
            dtype: lowrank::DType::F32,
            adapter: None,
        };
        read(&body, &base, 7)
    }

    fn error(request: Value) -> (String, String) {
        let error = wanted(request).expect_err("an error");
        (error.param.unwrap_or_default(), error.message)
    }

    #[test]
    fn both_forms_of_hyperparameters_come_to_the_same() {
        let hyper = json!({"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 0.5});
        let old = wanted(json!({"hyperparameters": hyper, "seed": 9})).expect("good");
        let new = json!({"type": "supervised", "supervised": {"hyperparameters": hyper}});
        let new = wanted(json!({"method": new, "seed": 9, "hyperparameters": {}})).expect("good");
        assert_eq!(old.config, new.config);
        assert_eq!(
            (
                old.config.num_train_epochs,
                old.config.batch_size,
                old.config.seed
            ),
            (2.0, 4, 9)
        );
        assert_eq!(old.config.learning_rate, 0.5 * Method::Lora.learning_rate());
        assert_eq!(
            shown(&old.config),
            json!({"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 0.5})
        );
        let float = json!({"hyperparameters": {"batch_size": 4.0}, "lowrank": {"r": 16.0}});
        let float = wanted(float).expect("good");
        assert_eq!(
            (float.config.batch_size, float.config.options.lora.r),
            (4, 16)
        );
        let auto = wanted(json!({"hyperparameters": {"n_epochs": "auto", "batch_size": "auto"}}))
            .expect("good");
        let default = defaults();
        assert_eq!(auto.config.batch_size, default.batch_size);
        assert_eq!(auto.config.num_train_epochs, default.num_train_epochs);
    }

    #[test]
    fn errors_name_the_field_and_the_nearest_key() {
        for (request, param, part) in [
            (
                json!({"lowrank": {"lora_alfa": 3}}),
                "lowrank.lora_alfa",
                "did you mean lora_alpha?",
            ),
            (
                json!({"lowrank": {"r": "eight"}}),
                "lowrank.r",
                "got string \"eight\", expected a whole number",
            ),
            (json!({"lowrank": {"r": 0}}), "lowrank", "r must be from 1"),
            (
                json!({"lowrank": {"r": -1}}),
                "lowrank.r",
                "r must be from 1 to 65536, not -1",
            ),
            (
                json!({"lowrank": {"warmup_steps": -1}}),
                "lowrank.warmup_steps",
                "0 or greater, not -1",
            ),
            (
                json!({"lowrank": {"output": "/x"}}),
                "lowrank.output",
                "not a job's to set",
            ),
            (
                json!({"lowrank": {"method": "full"}}),
                "lowrank.method",
                "makes whole models",
            ),
            (
                json!({"lowrank": {"target_modules": ["nothing"]}}),
                "lowrank",
                "nothing",
            ),
            (
                json!({"lowrank": []}),
                "lowrank",
                "must be an object, not a list",
            ),
            (
                json!({"hyperparameters": {"n_epoch": 3}}),
                "hyperparameters.n_epoch",
                "did you mean n_epochs?",
            ),
            (
                json!({"hyperparameters": {"n_epochs": 0}}),
                "hyperparameters.n_epochs",
                "above 0",
            ),
            (
                json!({"hyperparameters": {"batch_size": 1.5}}),
                "hyperparameters.batch_size",
                "a whole number",
            ),
            (
                json!({"hyperparameters": {"learning_rate_multiplier": 2}, "lowrank": {"learning_rate": 1e-3}}),
                "hyperparameters.learning_rate_multiplier",
                "give one of them",
            ),
            (
                json!({"method": {"type": "dpo"}}),
                "method.type",
                "the only one",
            ),
            (
                json!({"integrations": [{"type": "wandb"}]}),
                "integrations",
                "no integrations",
            ),
        ] {
            let (found, message) = error(request);
            assert_eq!(found, param, "{message}");
            assert!(message.contains(part), "{message}");
        }
    }

    #[test]
    fn few_tokens_are_computed_at_a_time() {
        let rows = |length: usize| -> Vec<Example> {
            let row = Example {
                ids: vec![0; length],
                ..Example::default()
            };
            vec![row; 40]
        };
        for (length, size) in [(10, 8), (60, 1), (30, 2), (1000, 1)] {
            let mut wanted = wanted(json!({})).expect("good");
            settle(&mut wanted.config, &wanted.given, &rows(length), true);
            let config = &wanted.config;
            assert_eq!(
                (config.batch_size, config.rows_per_step()),
                (size, 8),
                "{length}"
            );
            // 15 steps in three passes.
            assert_eq!((config.save_steps, config.eval_steps), (Some(2), Some(1)));
        }
        let mut wanted =
            wanted(json!({"lowrank": {"batch_size": 8, "save_steps": 3}})).expect("good");
        settle(&mut wanted.config, &wanted.given, &rows(1000), false);
        let config = wanted.config;
        assert_eq!(
            (config.batch_size, config.save_steps, config.eval_steps),
            (8, Some(3), None)
        );
        assert_eq!(config.save_total_limit, None);
    }
}
