//! `/v1/chat/completions`.

use std::sync::Arc;
use std::time::SystemTime;

use axum::Json;
use axum::response::{IntoResponse as _, Response};
use lowrank::data::Prompt;
use lowrank::generate::Token;
use serde_json::{Value, json};
use tokio::task::JoinSet;

use super::answer::{
    Event, Events, Summary, events, finish_all, follow, new_id, token_entry, usage, wait_for_first,
};
use super::fields::{Body, Field, Kind, field, missing};
use super::wanted::{COMMON, Wanted, unsupported};
use crate::error::ApiError;
use crate::grammar::Grammar;
use crate::keys::Turn;
use crate::registry::unix;
use crate::server::{Choice, Server, grammar_error};
use crate::tools::{self, Tool, ToolCall, ToolChoice, ToolForm};

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
        Kind::Integer(0..=1000),
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
    field(
        "modalities",
        Kind::Other(r#"{"type": ["array", "null"]}"#),
        "Text alone",
    ),
    field("reasoning_effort", Kind::Ignored, "Ignored"),
    field("verbosity", Kind::Ignored, "Ignored"),
    field("prediction", Kind::Ignored, "Ignored"),
];

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
    let body = Body::read(bytes, &[FIELDS, COMMON])?;
    let mut wanted = Wanted::read(&body, &server.caps)?;
    wanted.max_tokens = body.count("max_completion_tokens").or(wanted.max_tokens);
    let log_probs = body.bool("logprobs").unwrap_or(false);
    let top = body.count("top_logprobs").unwrap_or(0);
    if log_probs {
        wanted.log_probs = server.log_probs("top_logprobs", top, false)?;
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
    let (prompt, grammar) = crate::registry::blocking(move || {
        let prompt = Prompt::from_chat(of_task.tokenizer(), &messages, shown.as_ref())
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
    let answer = Answer {
        id: new_id("chatcmpl-"),
        created: unix(SystemTime::now()),
        model: model.name.to_string(),
    };
    if wanted.stream {
        wait_for_first(&mut choices).await?;
        return Ok(stream(
            server,
            turn,
            answer,
            reading,
            choices,
            wanted.include_usage,
        ));
    }
    let mut parts = Vec::new();
    let (mut made, mut cached) = (0, 0);
    for mut choice in choices {
        let (summary, message, entries) = collect(&server, &mut choice, &reading).await?;
        made += summary.made;
        cached = cached.max(summary.cached);
        parts.push(json!({
            "index": choice.index,
            "message": message,
            "logprobs": log_probs.then(|| json!({"content": entries, "refusal": null})),
            "finish_reason": summary.reason,
        }));
    }
    drop(turn);
    Ok(Json(json!({
        "id": answer.id,
        "object": "chat.completion",
        "created": answer.created,
        "model": answer.model,
        "choices": parts,
        "usage": usage(prompt_tokens, made, cached),
        "system_fingerprint": null,
    }))
    .into_response())
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
        return Err(super::wanted::too_many("tools", tools.len(), 128));
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

/// What all parts of an answer have.
#[derive(Clone)]
struct Answer {
    id: String,
    created: u64,
    model: String,
}

/// A whole choice: what it came to, its message, its log-probabilities.
async fn collect(
    server: &Server,
    choice: &mut Choice,
    reading: &Reading,
) -> Result<(Summary, Value, Vec<Value>), ApiError> {
    let (mut content, mut calls, mut entries) = (String::new(), Vec::new(), Vec::new());
    let tokenizer = server.tokenizer();
    let stops = reading.stops.clone();
    let summary = follow(tokenizer, choice, stops, reading.tools(), None, |event| {
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
    })
    .await?;
    let mut message = json!({"role": "assistant", "content": content, "refusal": null});
    if !calls.is_empty() {
        message["tool_calls"] = json!(calls);
        if content.is_empty() {
            message["content"] = Value::Null;
        }
    }
    Ok((summary, message, entries))
}

fn entry(server: &Server, token: &Token) -> Value {
    let tokenizer = server.tokenizer();
    let mut entry = token_entry(tokenizer, token.id, token.log_prob.unwrap_or(0.0));
    let top = token.top.iter();
    let top: Vec<Value> = top.map(|(id, p)| token_entry(tokenizer, *id, *p)).collect();
    entry["top_logprobs"] = json!(top);
    entry
}

/// Sends the choices as they are made.
fn stream(
    server: Arc<Server>,
    turn: Turn,
    answer: Answer,
    reading: Reading,
    choices: Vec<Choice>,
    include_usage: bool,
) -> Response {
    let (events, response) = events();
    let prompt_tokens = choices.first().map_or(0, |choice| choice.prompt_tokens);
    tokio::spawn(async move {
        let mut tasks = JoinSet::new();
        for choice in choices {
            let (server, answer) = (Arc::clone(&server), answer.clone());
            let (reading, events) = (reading.clone(), events.clone());
            tasks.spawn(async move {
                stream_choice(&server, &answer, &reading, choice, &events, include_usage).await
            });
        }
        let (mut made, mut cached) = (0, 0);
        let all = finish_all(tasks, &events, |summary: Summary| {
            made += summary.made;
            cached = cached.max(summary.cached);
        });
        if !all.await {
            return;
        }
        if include_usage {
            let mut last = chunk(&answer, &json!([]));
            last["usage"] = usage(prompt_tokens, made, cached);
            events.send(&last);
        }
        events.done();
        drop(turn);
    });
    response
}

async fn stream_choice(
    server: &Server,
    answer: &Answer,
    reading: &Reading,
    mut choice: Choice,
    events: &Events,
    include_usage: bool,
) -> Result<Summary, ApiError> {
    let index = choice.index;
    let send = |delta: Value, reason: Option<&str>, log_probs: Value| {
        let mut chunk = chunk(
            answer,
            &json!([{"index": index, "delta": delta, "logprobs": log_probs, "finish_reason": reason}]),
        );
        if include_usage {
            chunk["usage"] = Value::Null;
        }
        events.send(&chunk)
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
                return !events.is_closed();
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
        Some(events),
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

fn chunk(answer: &Answer, choices: &Value) -> Value {
    json!({
        "id": answer.id,
        "object": "chat.completion.chunk",
        "created": answer.created,
        "model": answer.model,
        "choices": choices,
        "system_fingerprint": null,
    })
}
