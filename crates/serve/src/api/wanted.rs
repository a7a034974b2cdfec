//! What chat and text completions have in common: which model, how tokens are drawn, where a text ends, what is told of it.

use std::time::{Duration, Instant};

use axum::http::StatusCode;
use lowrank::generate::{GenerateOptions, LogProbs, Penalties, Sampling};
use serde_json::Value;

use super::fields::{Body, Field, Kind, field, kind_of, whole};
use crate::error::ApiError;
use crate::server::Caps;

/// Fields of both.
pub(crate) const COMMON: &[Field] = &[
    field("model", Kind::Text, "The base's name or an adapter's"),
    field(
        "adapters",
        Kind::Other(
            r#"{"type": ["array", "null"], "items": {"type": "object", "properties": {"id": {"type": "string"}, "weight": {"type": "number"}}, "required": ["id"]}}"#,
        ),
        "Several adapters at once, each with a weight (1 if absent); model is then the base. Low-rank adapters alone can be mixed",
    ),
    field(
        "stream",
        Kind::Bool,
        "Send pieces as they are made, as server-sent events",
    ),
    field(
        "stream_options",
        Kind::Other(
            r#"{"type": ["object", "null"], "properties": {"include_usage": {"type": ["boolean", "null"]}}}"#,
        ),
        "With include_usage a last event has the usage",
    ),
    field("n", Kind::Limited(1, |caps| caps.n), "How many choices [1]"),
    field(
        "seed",
        Kind::Integer(i64::MIN..=i64::MAX),
        "The same seed draws the same tokens",
    ),
    field(
        "max_tokens",
        Kind::Integer(0..=i64::MAX),
        "New tokens at most",
    ),
    field(
        "temperature",
        Kind::Number(0.0..=2.0),
        "0 takes the likeliest token each time [1]",
    ),
    field(
        "top_p",
        Kind::Number(0.0..=1.0),
        "Draw from the likeliest tokens that together have this probability [1]",
    ),
    field(
        "top_k",
        Kind::Integer(-1..=i64::MAX),
        "Draw from the k likeliest tokens; 0 or -1: all",
    ),
    field(
        "min_p",
        Kind::Number(0.0..=1.0),
        "Draw from tokens at least so likely as this share of the likeliest one [0]",
    ),
    field(
        "presence_penalty",
        Kind::Number(-2.0..=2.0),
        "Is taken from the logits of tokens that the text has [0]",
    ),
    field(
        "frequency_penalty",
        Kind::Number(-2.0..=2.0),
        "Is taken as often as the text has a token [0]",
    ),
    field(
        "repetition_penalty",
        Kind::Number(0.01..=10.0),
        "Makes tokens of the prompt and the text less likely; 1: none [1]",
    ),
    field(
        "logit_bias",
        Kind::Other(
            r#"{"type": ["object", "null"], "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100}}"#,
        ),
        "What is added to the logits of tokens, by their ids",
    ),
    field(
        "stop",
        Kind::Other(
            r#"{"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}, {"type": "null"}]}"#,
        ),
        "Texts that end the answer and are left out of it",
    ),
    field(
        "stop_token_ids",
        Kind::Other(r#"{"type": ["array", "null"], "items": {"type": "integer", "minimum": 0}}"#),
        "Tokens that end the answer, beside those of the model",
    ),
    field(
        "ignore_eos",
        Kind::Bool,
        "Let no token of the model end the answer [false]",
    ),
    field(
        "cache_salt",
        Kind::Text,
        "Share what was computed of a prompt only with requests of the same salt",
    ),
    field(
        "timeout",
        Kind::Number(0.001..=86_400.0),
        "Seconds after which the request is given up",
    ),
    field("user", Kind::Ignored, "Ignored"),
    field("metadata", Kind::Ignored, "Ignored"),
    field("store", Kind::Ignored, "Ignored"),
    field("service_tier", Kind::Ignored, "Ignored"),
    field("safety_identifier", Kind::Ignored, "Ignored"),
    field("prompt_cache_key", Kind::Ignored, "Ignored"),
    field("prompt_cache_retention", Kind::Ignored, "Ignored"),
];

/// What a request wants beside its prompt.
#[derive(Clone, Debug)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "fields of a request, none of which says anything of another"
)]
pub(crate) struct Wanted {
    pub(crate) model: Option<String>,
    pub(crate) mix: Vec<(String, f32)>,
    pub(crate) stream: bool,
    pub(crate) include_usage: bool,
    pub(crate) n: usize,
    /// New tokens at most, where the request says so.
    pub(crate) max_tokens: Option<usize>,
    /// All but the number of tokens.
    pub(crate) options: GenerateOptions,
    pub(crate) ignore_eos: bool,
    /// Whether the token that ends an answer is told, too, which the engine keeps to itself.
    pub(crate) shows_end: bool,
    pub(crate) stop: Vec<String>,
    pub(crate) log_probs: LogProbs,
    pub(crate) salt: Option<String>,
    pub(crate) deadline: Option<Instant>,
}

impl Wanted {
    /// What a request for a model wants that makes no text.
    pub(crate) fn of_model(body: &Body) -> Self {
        Self {
            model: body.text("model").map(str::to_owned),
            mix: Vec::new(),
            stream: false,
            include_usage: false,
            n: 1,
            max_tokens: None,
            options: GenerateOptions::default(),
            ignore_eos: false,
            stop: Vec::new(),
            log_probs: LogProbs::default(),
            salt: None,
            shows_end: false,
            deadline: None,
        }
    }

    /// Reads the common fields.
    pub(crate) fn read(body: &Body, caps: &Caps) -> Result<Self, ApiError> {
        let n = body.count("n").unwrap_or(1);
        let number = |name: &str, default: f64| body.number(name).unwrap_or(default) as f32;
        // 0 leaves the likeliest token alone, as at OpenAI.
        let top_p = number("top_p", 1.0).max(f32::MIN_POSITIVE);
        let seed = body
            .integer("seed")
            .map_or_else(random_seed, |seed| seed as u64);
        let timeout = body.number("timeout").map(Duration::from_secs_f64);
        let timeout = match (timeout, caps.timeout) {
            (Some(asked), Some(most)) => Some(asked.min(most)),
            (asked, most) => asked.or(most),
        };
        Ok(Self {
            model: body.text("model").map(str::to_owned),
            mix: mix(body)?,
            stream: body.bool("stream").unwrap_or(false),
            include_usage: include_usage(body)?,
            n,
            max_tokens: body.count("max_tokens"),
            options: GenerateOptions {
                sampling: Sampling {
                    temperature: number("temperature", 1.0),
                    top_k: body.count("top_k").unwrap_or(0),
                    top_p,
                    min_p: number("min_p", 0.0),
                    seed,
                },
                penalties: Penalties {
                    repetition: number("repetition_penalty", 1.0),
                    presence: number("presence_penalty", 0.0),
                    frequency: number("frequency_penalty", 0.0),
                },
                logit_bias: logit_bias(body)?,
                stop_ids: token_ids(body, "stop_token_ids")?,
                ..GenerateOptions::default()
            },
            ignore_eos: body.bool("ignore_eos").unwrap_or(false),
            shows_end: false,
            stop: stop(body, caps)?,
            log_probs: LogProbs::default(),
            salt: salt(body)?,
            deadline: timeout.map(|timeout| Instant::now() + timeout),
        })
    }

    /// Refuses ids of tokens that the model does not have.
    pub(crate) fn check_ids(&self, vocabulary: usize) -> Result<(), ApiError> {
        let biased = self.options.logit_bias.iter().map(|(id, _)| *id);
        check_ids("logit_bias", biased, vocabulary)?;
        let stops = self.options.stop_ids.iter().copied();
        check_ids("stop_token_ids", stops, vocabulary)
    }
}

/// Refuses ids of tokens from `vocabulary` on.
pub(crate) fn check_ids(
    param: &str,
    mut ids: impl Iterator<Item = u32>,
    vocabulary: usize,
) -> Result<(), ApiError> {
    match ids.find(|id| *id as usize >= vocabulary) {
        None => Ok(()),
        Some(id) => Err(ApiError::invalid(
            param,
            format!(
                "{param} has the token id {id}, and the vocabulary has {vocabulary} tokens, with ids from 0"
            ),
        )),
    }
}

/// An error about a list that the server's limits forbid.
pub(crate) fn too_long(param: &str, found: usize, most: usize) -> ApiError {
    let message = format!("{param} has {found} entries, and this server allows {most} at most");
    ApiError::invalid(param, message)
}

/// A field that this server cannot serve yet, though OpenAI does.
pub(crate) fn unsupported(param: &str, message: impl Into<String>) -> ApiError {
    ApiError {
        code: "unsupported_parameter",
        param: Some(param.to_owned()),
        ..ApiError::new(StatusCode::BAD_REQUEST, "unsupported_parameter", message)
    }
}

/// Salts are remembered, so they cannot be of any length.
fn salt(body: &Body) -> Result<Option<String>, ApiError> {
    match body.text("cache_salt") {
        Some(salt) if salt.len() > 256 => Err(ApiError::invalid(
            "cache_salt",
            format!("cache_salt has {} bytes, and may have 256", salt.len()),
        )),
        salt => Ok(salt.map(str::to_owned)),
    }
}

fn random_seed() -> u64 {
    use std::hash::{BuildHasher as _, RandomState};
    RandomState::new().hash_one(Instant::now())
}

fn include_usage(body: &Body) -> Result<bool, ApiError> {
    match body.get("stream_options") {
        None => Ok(false),
        Some(Value::Object(options)) => Ok(options.get("include_usage") == Some(&true.into())),
        Some(other) => {
            let message = format!("stream_options must be an object, not {}", kind_of(other));
            Err(ApiError::invalid("stream_options", message))
        }
    }
}

fn mix(body: &Body) -> Result<Vec<(String, f32)>, ApiError> {
    let wrong = |message: &str| Err(ApiError::invalid("adapters", message));
    let Some(value) = body.get("adapters") else {
        return Ok(Vec::new());
    };
    let Value::Array(items) = value else {
        return wrong("adapters must be a list of {\"id\", \"weight\"}");
    };
    if items.len() > 16 {
        return Err(too_long("adapters", items.len(), 16));
    }
    let mut mix = Vec::new();
    for item in items {
        let Some(id) = item.get("id").and_then(Value::as_str) else {
            return wrong("each of adapters needs an id");
        };
        let weight = match item.get("weight") {
            None | Some(Value::Null) => 1.0,
            Some(weight) => match weight.as_f64().filter(|weight| weight.abs() <= 100.0) {
                Some(weight) => weight,
                None => return wrong("a weight must be a number from -100 to 100"),
            },
        };
        mix.push((id.to_owned(), weight as f32));
    }
    Ok(mix)
}

fn logit_bias(body: &Body) -> Result<Vec<(u32, f32)>, ApiError> {
    let wrong = |message: String| Err(ApiError::invalid("logit_bias", message));
    match body.get("logit_bias") {
        None => Ok(Vec::new()),
        Some(Value::Object(map)) if map.len() > 1024 => {
            Err(too_long("logit_bias", map.len(), 1024))
        }
        Some(Value::Object(map)) => {
            let mut bias = Vec::new();
            for (id, value) in map {
                let Ok(id) = id.parse::<u32>() else {
                    return wrong(format!(
                        "logit_bias has the key {id:?}, which is no token id"
                    ));
                };
                match value.as_f64().filter(|value| value.abs() <= 100.0) {
                    Some(value) => bias.push((id, value as f32)),
                    None => {
                        return wrong(format!(
                            "the bias of {id} must be from -100 to 100, not {value}"
                        ));
                    }
                }
            }
            Ok(bias)
        }
        Some(other) => wrong(format!(
            "logit_bias must be an object, not {}",
            kind_of(other)
        )),
    }
}

/// Token ids of a field; none where it is absent.
pub(crate) fn token_ids(body: &Body, name: &'static str) -> Result<Vec<u32>, ApiError> {
    let wrong = || ApiError::invalid(name, format!("{name} must be a list of token ids"));
    match body.get(name) {
        None => Ok(Vec::new()),
        Some(Value::Array(items)) => items
            .iter()
            .map(|item| {
                let id = whole(item).and_then(|id| u32::try_from(id).ok());
                id.ok_or_else(wrong)
            })
            .collect(),
        Some(_) => Err(wrong()),
    }
}

fn stop(body: &Body, caps: &Caps) -> Result<Vec<String>, ApiError> {
    let wrong = || ApiError::invalid("stop", "stop must be a text or a list of texts");
    let all = match body.get("stop") {
        None => Vec::new(),
        Some(Value::String(text)) => vec![text.clone()],
        Some(Value::Array(items)) => items
            .iter()
            .map(|item| item.as_str().map(str::to_owned).ok_or_else(wrong))
            .collect::<Result<_, _>>()?,
        Some(_) => return Err(wrong()),
    };
    if all.len() > caps.stops {
        return Err(too_long("stop", all.len(), caps.stops));
    }
    if all.iter().any(|text| text.is_empty() || text.len() > 1024) {
        return Err(ApiError::invalid(
            "stop",
            "each stop must have 1 to 1024 bytes",
        ));
    }
    Ok(all)
}
