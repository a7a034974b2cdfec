//! `/v1/completions`.

use std::sync::Arc;
use std::time::SystemTime;

use axum::Json;
use axum::response::{IntoResponse as _, Response};
use lowrank::data::{Prompt, Tokenizer};
use lowrank::generate::Token;
use serde_json::{Map, Value, json};

use super::answer::{Event, Events, Summary, events, follow, new_id, usage};
use super::fields::{Body, Field, Kind, field, kind_of, missing};
use super::wanted::{COMMON, Wanted, too_many, unsupported};
use crate::error::ApiError;
use crate::keys::Turn;
use crate::registry::unix;
use crate::server::{Choice, Server};

/// Fields of a completion.
pub(crate) const FIELDS: &[Field] = &[
    field(
        "prompt",
        Kind::Other(
            r#"{"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}, {"type": "array", "items": {"type": "integer"}}, {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}}]}"#,
        ),
        "A text, texts, token ids, or lists of token ids",
    ),
    field(
        "logprobs",
        Kind::Integer(0..=1000),
        "Log-probabilities of the tokens, and of so many that are the likeliest at the same place",
    ),
    field(
        "echo",
        Kind::Bool,
        "Give the prompt back before the answer [false]",
    ),
    field("best_of", Kind::Integer(1..=128), "As many as n"),
    field("suffix", Kind::Text, "Not supported"),
];

/// New tokens where the request says nothing, as at OpenAI.
const DEFAULT_TOKENS: usize = 16;

/// What all choices of a request have.
struct Asked {
    id: String,
    created: u64,
    model: String,
    n: usize,
    /// Text and ids of the prompts, where they are given back.
    echo: Option<Vec<(String, Vec<u32>)>>,
    log_probs: Option<usize>,
    stops: Vec<String>,
}

/// Continues prompts.
pub(crate) async fn complete(
    server: Arc<Server>,
    turn: Turn,
    bytes: &[u8],
) -> Result<Response, ApiError> {
    let body = Body::read(bytes, &[FIELDS, COMMON])?;
    let mut wanted = Wanted::read(&body, &server.caps)?;
    if body.get("suffix").is_some() {
        return Err(unsupported("suffix", "suffix is not supported"));
    }
    if let Some(best_of) = body.count("best_of")
        && best_of != wanted.n
    {
        return Err(unsupported(
            "best_of",
            format!(
                "best_of is {best_of} and n {}; both must be the same",
                wanted.n
            ),
        ));
    }
    let echo = body.bool("echo").unwrap_or(false);
    let log_probs = body.count("logprobs");
    if let Some(top) = log_probs {
        wanted.log_probs = server.log_probs("logprobs", top, echo)?;
    }
    let prompt = body.get("prompt").ok_or_else(|| missing("prompt"))?.clone();
    let model = server.model(&wanted).await?;
    let of_task = Arc::clone(&server);
    let prompts =
        crate::registry::blocking(move || read_prompts(of_task.tokenizer(), &prompt)).await?;
    if prompts.len() * wanted.n > 8 * server.caps.n {
        return Err(too_many(
            "prompt",
            prompts.len() * wanted.n,
            8 * server.caps.n,
        ));
    }
    let prompt_tokens: usize = prompts.iter().map(|(_, ids)| ids.len()).sum();
    if wanted.max_tokens == Some(0) && !echo {
        return Err(ApiError::invalid(
            "max_tokens",
            "max_tokens is 0, which needs echo: true",
        ));
    }
    // A prompt that is only given back is read all the same, as where its log-probabilities are wanted.
    wanted.log_probs.prompt |= wanted.max_tokens == Some(0);
    let ids = prompts.iter().map(|(_, ids)| ids.clone()).collect();
    let choices = server.submit(&wanted, &model, ids, Some(DEFAULT_TOKENS), None)?;
    let asked = Asked {
        id: new_id("cmpl-"),
        created: unix(SystemTime::now()),
        model: model.name.to_string(),
        n: wanted.n,
        echo: echo.then_some(prompts),
        log_probs,
        stops: wanted.stop.clone(),
    };
    if wanted.stream {
        return Ok(stream(
            server,
            turn,
            asked,
            choices,
            prompt_tokens,
            wanted.include_usage,
        ));
    }
    let mut parts = Vec::new();
    let (mut made, mut cached) = (0, 0);
    for mut choice in choices {
        let (summary, part) = collect(&server, &mut choice, &asked).await?;
        made += summary.made;
        if choice.index % asked.n == 0 {
            cached += summary.cached;
        }
        parts.push(part);
    }
    drop(turn);
    Ok(Json(json!({
        "id": asked.id,
        "object": "text_completion",
        "created": asked.created,
        "model": asked.model,
        "choices": parts,
        "usage": usage(prompt_tokens, made, cached),
        "system_fingerprint": null,
    }))
    .into_response())
}

/// Texts and ids of the prompts.
fn read_prompts(tokenizer: &Tokenizer, value: &Value) -> Result<Vec<(String, Vec<u32>)>, ApiError> {
    let wrong = |message: String| ApiError::invalid("prompt", message);
    let of_text = |text: &str| {
        let prompt =
            Prompt::from_text(tokenizer, text).map_err(|error| wrong(error.to_string()))?;
        Ok((prompt.text, prompt.ids))
    };
    let of_ids = |items: &[Value]| {
        let ids: Option<Vec<u32>> = items
            .iter()
            .map(|item| item.as_u64().and_then(|id| u32::try_from(id).ok()))
            .collect();
        let ids =
            ids.ok_or_else(|| wrong("prompt must be texts or lists of token ids".to_owned()))?;
        let text = tokenizer
            .decode(&ids, false)
            .map_err(|error| wrong(error.to_string()))?;
        Ok((text, ids))
    };
    match value {
        Value::String(text) => Ok(vec![of_text(text)?]),
        Value::Array(items) if items.is_empty() => Err(wrong("prompt is an empty list".to_owned())),
        Value::Array(items) if items[0].is_number() => Ok(vec![of_ids(items)?]),
        Value::Array(items) => items
            .iter()
            .map(|item| match item {
                Value::String(text) => of_text(text),
                Value::Array(ids) => of_ids(ids),
                other => Err(wrong(format!(
                    "prompt must have texts or lists of token ids, not {}",
                    kind_of(other)
                ))),
            })
            .collect(),
        other => Err(wrong(format!(
            "prompt must be a text or a list, not {}",
            kind_of(other)
        ))),
    }
}

/// Log-probabilities in the form of completions.
#[derive(Default)]
struct LogProbLists {
    tokens: Vec<String>,
    token_logprobs: Vec<Option<f64>>,
    top_logprobs: Vec<Option<Map<String, Value>>>,
    text_offset: Vec<usize>,
    offset: usize,
}

impl LogProbLists {
    fn push(&mut self, tokenizer: &Tokenizer, token: &Token, top: usize) {
        let text = tokenizer.token_text(token.id);
        let known = token.log_prob.is_some();
        let mut likeliest = Map::new();
        for (id, log_prob) in &token.top {
            likeliest.insert(tokenizer.token_text(*id), json!(log_prob));
        }
        self.text_offset.push(self.offset);
        self.offset += text.chars().count();
        self.tokens.push(text);
        self.token_logprobs.push(token.log_prob);
        self.top_logprobs
            .push((known && top > 0).then_some(likeliest));
    }

    fn take(&mut self) -> Value {
        let Self {
            tokens,
            token_logprobs,
            top_logprobs,
            text_offset,
            offset,
        } = std::mem::take(self);
        self.offset = offset;
        json!({
            "tokens": tokens,
            "token_logprobs": token_logprobs,
            "top_logprobs": top_logprobs,
            "text_offset": text_offset,
        })
    }
}

/// The first token of a prompt, which nothing predicts.
fn first_token(ids: &[u32]) -> Option<Token> {
    let id = *ids.first()?;
    Some(Token {
        id,
        log_prob: None,
        top: Vec::new(),
    })
}

async fn collect(
    server: &Server,
    choice: &mut Choice,
    asked: &Asked,
) -> Result<(Summary, Value), ApiError> {
    let tokenizer = server.tokenizer();
    let (mut text, mut lists) = (String::new(), LogProbLists::default());
    let index = choice.index;
    if let Some(prompts) = &asked.echo {
        let (prompt, ids) = &prompts[index / asked.n];
        text.push_str(prompt);
        if let Some(top) = asked.log_probs
            && let Some(token) = first_token(ids)
        {
            lists.push(tokenizer, &token, top);
        }
    }
    let summary = follow(tokenizer, choice, asked.stops.clone(), None, |event| {
        match event {
            Event::Begun(_) => {}
            Event::Read(tokens) => {
                for token in tokens.iter().filter(|_| asked.echo.is_some()) {
                    if let Some(top) = asked.log_probs {
                        lists.push(tokenizer, token, top);
                    }
                }
            }
            Event::Made(piece, token) => {
                text.push_str(&piece.content);
                if let (Some(top), Some(token)) = (asked.log_probs, token) {
                    lists.push(tokenizer, &token, top);
                }
            }
        }
        true
    })
    .await?;
    let part = json!({
        "index": index,
        "text": text,
        "logprobs": asked.log_probs.map(|_| lists.take()),
        "finish_reason": summary.reason,
    });
    Ok((summary, part))
}

fn stream(
    server: Arc<Server>,
    turn: Turn,
    asked: Asked,
    choices: Vec<Choice>,
    prompt_tokens: usize,
    include_usage: bool,
) -> Response {
    let (events, response) = events();
    let asked = Arc::new(asked);
    tokio::spawn(async move {
        let mut tasks = tokio::task::JoinSet::new();
        for choice in choices {
            let (server, asked) = (Arc::clone(&server), Arc::clone(&asked));
            let events = events.clone();
            tasks.spawn(async move {
                let index = choice.index;
                let done = stream_choice(&server, &asked, choice, &events, include_usage).await;
                done.map(|summary| (index, summary))
            });
        }
        let (mut made, mut cached) = (0, 0);
        while let Some(done) = tasks.join_next().await {
            match done {
                Ok(Ok((index, summary))) => {
                    made += summary.made;
                    if index % asked.n == 0 {
                        cached += summary.cached;
                    }
                }
                Ok(Err(error)) => {
                    events.send(&error.body());
                    return;
                }
                Err(_) => return,
            }
        }
        if include_usage {
            let mut last = chunk(&asked, json!([]));
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
    asked: &Asked,
    mut choice: Choice,
    events: &Events,
    include_usage: bool,
) -> Result<Summary, ApiError> {
    let tokenizer = server.tokenizer();
    let index = choice.index;
    let mut lists = LogProbLists::default();
    let send = |text: &str, reason: Option<&str>, log_probs: Option<Value>| {
        let mut chunk = chunk(
            asked,
            json!([{"index": index, "text": text, "logprobs": log_probs, "finish_reason": reason}]),
        );
        if include_usage {
            chunk["usage"] = Value::Null;
        }
        events.send(&chunk)
    };
    let mut sink = |event| match event {
        Event::Begun(_) => match &asked.echo {
            None => true,
            Some(prompts) => {
                let (prompt, ids) = &prompts[index / asked.n];
                if let (Some(top), Some(token)) = (asked.log_probs, first_token(ids)) {
                    lists.push(tokenizer, &token, top);
                }
                send(prompt, None, asked.log_probs.map(|_| lists.take()))
            }
        },
        Event::Read(tokens) => match (&asked.echo, asked.log_probs) {
            (Some(_), Some(top)) => {
                for token in &tokens {
                    lists.push(tokenizer, token, top);
                }
                send("", None, Some(lists.take()))
            }
            _ => true,
        },
        Event::Made(piece, token) => {
            if let (Some(top), Some(token)) = (asked.log_probs, token) {
                lists.push(tokenizer, &token, top);
            }
            if piece.content.is_empty() && lists.tokens.is_empty() {
                return !events.is_closed();
            }
            send(&piece.content, None, asked.log_probs.map(|_| lists.take()))
        }
    };
    let stops = asked.stops.clone();
    let summary = follow(tokenizer, &mut choice, stops, None, &mut sink).await?;
    send("", Some(summary.reason), None);
    Ok(summary)
}

fn chunk(asked: &Asked, choices: Value) -> Value {
    json!({
        "id": asked.id,
        "object": "text_completion",
        "created": asked.created,
        "model": asked.model,
        "choices": choices,
        "system_fingerprint": null,
    })
}
