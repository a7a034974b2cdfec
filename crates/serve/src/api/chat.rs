//! `/v1/chat/completions`.

use std::sync::Arc;

use axum::response::Response;
use lowrank::data::Prompt;
use lowrank::generate::{LogProbs, Token};
use serde_json::{Map, Value, json};

use super::answer::{Chunks, Event, Frame, Summary, follow, token_entry, wait_for_first};
use super::fields::{Body, Field, Kind, field, kind_of, missing};
use super::wanted::{COMMON, Wanted, unsupported};
use crate::error::ApiError;
use crate::grammar::Grammar;
use crate::keys::Turn;
use crate::server::{Choice, Server, grammar_error};
use crate::sync::blocking;
use crate::tools::{self, Tool, ToolCall, ToolChoice, ToolForm};

/// Variables for the chat template.
pub(crate) const TEMPLATE_VARIABLES: Field = field(
    "chat_template_kwargs",
    Kind::Other(r#"{"type": ["object", "null"]}"#),
    "Variables for the chat template, such as enable_thinking",
);

/// Names that the server gives to the template itself.
const OF_SERVER: [&str; 11] = [
    "messages",
    "tools",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template",
    "tokenize",
    "bos_token",
    "eos_token",
    "pad_token",
    "unk_token",
    "sep_token",
];

/// Fields of a conversation.
pub(crate) const FIELDS: &[Field] = &[
    field(
        "messages",
        Kind::Other(r#"{"type": "array", "minItems": 1, "items": {"type": "object"}}"#),
        "The conversation, as OpenAI's",
    ),
    field(
        "max_completion_tokens",
        Kind::Integer(0..=i64::MAX),
        "New tokens at most; counts before max_tokens [until the context is full]",
    ),
    field("logprobs", Kind::Bool, "Log-probabilities of the tokens"),
    field(
        "top_logprobs",
        Kind::Limited(0, |caps| caps.top_log_probs),
        "And of so many that are the likeliest at the same place",
    ),
    field(
        "tools",
        Kind::Other(r#"{"type": ["array", "null"], "items": {"type": "object"}}"#),
        "Functions that may be called",
    ),
    field(
        "tool_choice",
        Kind::Other(r#"{"type": ["string", "object", "null"]}"#),
        "none, auto, required, or a function by its name",
    ),
    field(
        "parallel_tool_calls",
        Kind::Bool,
        "Whether several calls may be made at once [true]",
    ),
    field(
        "response_format",
        Kind::Other(r#"{"type": ["object", "null"]}"#),
        "text, json_object, or json_schema with a schema that the answer follows",
    ),
    TEMPLATE_VARIABLES,
    field(
        "modalities",
        Kind::Other(r#"{"type": ["array", "null"]}"#),
        "Text alone",
    ),
    field("reasoning_effort", Kind::Ignored, "Ignored"),
    field("verbosity", Kind::Ignored, "Ignored"),
    field("prediction", Kind::Ignored, "Ignored"),
];

/// What a whole answer is, and a piece of a stream, with what their ids begin with.
const WHOLE: (&str, &str) = ("chat.completion", "chatcmpl-");
const CHUNK: (&str, &str) = ("chat.completion.chunk", "chatcmpl-");

/// How an answer is read.
#[derive(Clone)]
struct Reading {
    tools: Arc<Vec<Tool>>,
    form: Option<ToolForm>,
    stops: Vec<String>,
    log_probs: bool,
    seed: u64,
}

impl Reading {
    fn tools(&self) -> Option<(ToolForm, &[Tool], u64)> {
        let form = self.form?;
        Some((form, &self.tools, self.seed))
    }
}

/// Answers a conversation.
pub(crate) async fn chat(
    server: Arc<Server>,
    turn: Turn,
    bytes: &[u8],
) -> Result<Response, ApiError> {
    let body = Body::read_within(bytes, &[FIELDS, COMMON], &server.caps)?;
    let mut wanted = Wanted::read(&body, &server.caps)?;
    wanted.check_ids(server.base.decoder.config().vocab_size)?;
    wanted.max_tokens = body.count("max_completion_tokens").or(wanted.max_tokens);
    let log_probs = body.bool("logprobs").unwrap_or(false);
    let top = body.count("top_logprobs").unwrap_or(0);
    if log_probs {
        wanted.log_probs = LogProbs {
            made: true,
            prompt: false,
            top,
        };
    } else if top > 0 {
        return Err(ApiError::invalid(
            "top_logprobs",
            "top_logprobs needs logprobs: true",
        ));
    }
    check_modalities(&body)?;
    let messages = body
        .get("messages")
        .ok_or_else(|| missing("messages"))?
        .clone();
    let variables = template_variables(&body)?;
    let (tools, choice) = read_tools(&body)?;
    let shown = match (&choice, body.get("tools")) {
        (ToolChoice::None, _) | (_, None) => None,
        (_, Some(tools)) => Some(tools.clone()),
    };
    if !server.tokenizer().has_chat_template() {
        return Err(ApiError::bad_request(
            "no_chat_template",
            format!("{} has no chat template; use /v1/completions", server.name),
        ));
    }
    let form = server.tool_form.filter(|_| shown.is_some());
    let model = server.model(&wanted).await?;
    let parallel = body.bool("parallel_tool_calls").unwrap_or(true);
    let format = body.get("response_format").cloned();
    let (of_task, of_tools) = (Arc::clone(&server), tools.clone());
    let (prompt, grammar) = blocking(move || {
        let tokenizer = of_task.tokenizer();
        let prompt = Prompt::from_chat_with(tokenizer, &messages, shown.as_ref(), &variables)
            .map_err(|error| ApiError::invalid("messages", error.to_string()))?;
        let grammar = grammar(&of_task, &of_tools, &choice, parallel, format.as_ref())?;
        Ok((prompt.ids, grammar))
    })
    .await?;
    let reading = Reading {
        tools: Arc::new(tools),
        form,
        stops: wanted.stop.clone(),
        log_probs,
        seed: wanted.options.sampling.seed,
    };
    let prompt_tokens = prompt.len();
    let mut choices = server.submit(&wanted, &model, vec![prompt], None, grammar.as_ref())?;
    if wanted.stream {
        wait_for_first(&mut choices).await?;
        let frame = Frame::new(CHUNK, &model, wanted.n, prompt_tokens);
        let follow = |choice, chunks| {
            let (server, reading) = (Arc::clone(&server), reading.clone());
            async move { stream(&server, &reading, choice, &chunks).await }
        };
        return Ok(frame.stream(turn, choices, wanted.include_usage, follow));
    }
    let frame = Frame::new(WHOLE, &model, wanted.n, prompt_tokens);
    let (server, reading) = (&*server, &reading);
    let answer = frame
        .whole(choices, |choice| collect(server, choice, reading))
        .await;
    drop(turn);
    answer
}

/// What a request gives the chat template beside the conversation.
pub(crate) fn template_variables(body: &Body) -> Result<Map<String, Value>, ApiError> {
    let name = TEMPLATE_VARIABLES.name;
    match body.get(name) {
        None => Ok(Map::new()),
        Some(Value::Object(variables)) => {
            match variables
                .keys()
                .find(|key| OF_SERVER.contains(&key.as_str()))
            {
                None => Ok(variables.clone()),
                Some(key) => Err(ApiError::invalid(
                    format!("{name}.{key}"),
                    format!("{name} cannot set {key}, which the server gives to the template"),
                )),
            }
        }
        Some(other) => Err(ApiError::invalid(
            name,
            format!("{name} must be an object, not {}", kind_of(other)),
        )),
    }
}

fn check_modalities(body: &Body) -> Result<(), ApiError> {
    match body.get("modalities") {
        None => Ok(()),
        Some(Value::Array(items)) if items.iter().all(|item| item == "text") => Ok(()),
        Some(other) => Err(unsupported(
            "modalities",
            format!("modalities is {other}, and this server answers with text alone"),
        )),
    }
}

fn read_tools(body: &Body) -> Result<(Vec<Tool>, ToolChoice), ApiError> {
    let tools: Vec<Tool> = match body.get("tools") {
        None => Vec::new(),
        Some(value) => serde_json::from_value(value.clone())
            .map_err(|error| ApiError::invalid("tools", format!("tools: {error}")))?,
    };
    if tools.len() > 128 {
        return Err(super::wanted::too_long("tools", tools.len(), 128));
    }
    tools::check(&tools).map_err(|error| ApiError::invalid("tools", error.to_string()))?;
    let choice = match body.get("tool_choice") {
        None => ToolChoice::Auto,
        Some(value) => serde_json::from_value(value.clone())
            .map_err(|error| ApiError::invalid("tool_choice", format!("tool_choice: {error}")))?,
    };
    Ok((tools, choice))
}

/// What the answer must follow: a call that is demanded, or the format of the response.
fn grammar(
    server: &Server,
    tools: &[Tool],
    choice: &ToolChoice,
    parallel: bool,
    format: Option<&Value>,
) -> Result<Option<Grammar>, ApiError> {
    if matches!(choice, ToolChoice::Required | ToolChoice::Named(_)) {
        let form = server.tool_form.ok_or_else(|| {
            unsupported(
                "tool_choice",
                "the model's chat template shows no form of calls that this server knows, so none can be demanded",
            )
        })?;
        let framed = tools::forced(form, tools, choice, parallel)
            .map_err(|error| ApiError::invalid("tool_choice", error.to_string()))?;
        return framed
            .map(|framed| {
                server
                    .vocabulary()?
                    .framed(&framed)
                    .map_err(|e| grammar_error("tools", &e))
            })
            .transpose();
    }
    let Some(format) = format else {
        return Ok(None);
    };
    let param = "response_format";
    let grammar = match format.get("type").and_then(Value::as_str) {
        Some("text") => return Ok(None),
        Some("json_object") => server.vocabulary()?.json_object(),
        Some("json_schema") => {
            let schema = format
                .get("json_schema")
                .and_then(|named| named.get("schema"));
            let schema = schema.ok_or_else(|| {
                ApiError::invalid(param, "response_format.json_schema.schema is missing")
            })?;
            server.vocabulary()?.json_schema(schema)
        }
        _ => {
            return Err(ApiError::invalid(
                param,
                "response_format.type must be text, json_object or json_schema",
            ));
        }
    };
    grammar
        .map(Some)
        .map_err(|error| grammar_error(param, &error))
}

/// A whole choice.
async fn collect(
    server: &Server,
    mut choice: Choice,
    reading: &Reading,
) -> Result<(Summary, Value), ApiError> {
    let (mut content, mut calls, mut entries) = (String::new(), Vec::new(), Vec::new());
    let tokenizer = server.tokenizer();
    let stops = reading.stops.clone();
    let summary = follow(
        tokenizer,
        &mut choice,
        stops,
        reading.tools(),
        None,
        |event| {
            if let Event::Made(piece, token) = event {
                content.push_str(&piece.content);
                calls.extend(piece.calls);
                entries.extend(
                    token
                        .filter(|_| reading.log_probs)
                        .map(|t| entry(server, &t)),
                );
            }
            true
        },
    )
    .await?;
    let mut message = json!({"role": "assistant", "content": content, "refusal": null});
    if !calls.is_empty() {
        message["tool_calls"] = json!(calls);
        if content.is_empty() {
            message["content"] = Value::Null;
        }
    }
    let log_probs = reading.log_probs;
    let part = json!({
        "index": choice.index,
        "message": message,
        "logprobs": log_probs.then(|| json!({"content": entries, "refusal": null})),
        "finish_reason": summary.reason,
    });
    Ok((summary, part))
}

fn entry(server: &Server, token: &Token) -> Value {
    let tokenizer = server.tokenizer();
    let mut entry = token_entry(tokenizer, token.id, token.log_prob.unwrap_or(0.0));
    let top = token.top.iter();
    let top: Vec<Value> = top.map(|(id, p)| token_entry(tokenizer, *id, *p)).collect();
    entry["top_logprobs"] = json!(top);
    entry
}

/// Sends a choice as it is made.
async fn stream(
    server: &Server,
    reading: &Reading,
    mut choice: Choice,
    chunks: &Chunks,
) -> Result<Summary, ApiError> {
    let index = choice.index;
    let send = |delta: Value, reason: Option<&str>, log_probs: Value| {
        chunks.send(&json!({
            "index": index,
            "delta": delta,
            "logprobs": log_probs,
            "finish_reason": reason,
        }))
    };
    let (stops, mut calls) = (reading.stops.clone(), 0);
    let mut held: Vec<Value> = Vec::new();
    let mut sink = |event| match event {
        Event::Begun => send(
            json!({"role": "assistant", "content": "", "refusal": null}),
            None,
            Value::Null,
        ),
        Event::Read(_) | Event::Ended(_) => true,
        Event::Made(piece, token) => {
            held.extend(
                token
                    .filter(|_| reading.log_probs)
                    .map(|t| entry(server, &t)),
            );
            let mut delta = json!({});
            if !piece.content.is_empty() {
                delta["content"] = piece.content.into();
            }
            if !piece.calls.is_empty() {
                delta["tool_calls"] = call_deltas(&piece.calls, calls);
                calls += piece.calls.len();
            }
            if delta == json!({}) && held.is_empty() {
                return !chunks.is_closed();
            }
            let log_probs = if held.is_empty() {
                Value::Null
            } else {
                json!({"content": std::mem::take(&mut held), "refusal": null})
            };
            send(delta, None, log_probs)
        }
    };
    let summary = follow(
        server.tokenizer(),
        &mut choice,
        stops,
        reading.tools(),
        Some(chunks.events()),
        &mut sink,
    )
    .await?;
    send(json!({}), Some(summary.reason), Value::Null);
    Ok(summary)
}

fn call_deltas(calls: &[ToolCall], first: usize) -> Value {
    let deltas = calls.iter().enumerate().map(|(at, call)| {
        let mut delta = json!(call);
        delta["index"] = (first + at).into();
        delta
    });
    deltas.collect()
}
