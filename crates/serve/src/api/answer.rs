//! Following the choices of a request to their ends, and sending what comes of them.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};

use axum::body::{Body, Bytes};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::Response;
use lowrank::data::Tokenizer;
use lowrank::generate::{Finish, Token};
use serde_json::{Value, json};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender};

use super::text::{Piece, Text};
use crate::engine::{Update, reason};
use crate::error::ApiError;
use crate::server::{Choice, Server};
use crate::tools::{Tool, ToolForm};

/// What happens to a choice.
pub(crate) enum Event {
    /// It is taken up; so many tokens of its prompt were there before.
    Begun(usize),
    /// Tokens of its prompt.
    Read(Vec<Token>),
    /// A token, and what became certain of the text. Text without a token is what was held back.
    Made(Piece, Option<Token>),
}

/// What a choice came to.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Summary {
    pub(crate) reason: &'static str,
    pub(crate) made: usize,
    pub(crate) cached: usize,
    pub(crate) has_calls: bool,
}

/// Follows one choice; `sink` says whether anybody still listens, and what it is given is whole once this returns.
pub(crate) async fn follow(
    tokenizer: &Tokenizer,
    choice: &mut Choice,
    stops: Vec<String>,
    tools: Option<(ToolForm, &[Tool], u64)>,
    mut sink: impl FnMut(Event) -> bool,
) -> Result<Summary, ApiError> {
    let mut text = Text::new(tokenizer, stops, tools);
    let mut summary = Summary::default();
    while let Some(update) = choice.updates.recv().await {
        let goes_on = match update {
            Update::Begun { cached_tokens } => {
                summary.cached = cached_tokens;
                sink(Event::Begun(cached_tokens))
            }
            Update::Read(tokens) => sink(Event::Read(tokens)),
            Update::Token(token) => {
                summary.made += 1;
                let (piece, has_ended) = text.push(token.id);
                summary.has_calls |= !piece.calls.is_empty();
                if has_ended {
                    summary.reason = "stop";
                }
                sink(Event::Made(piece, Some(token))) && !has_ended
            }
            Update::Finished(Finish::NotFinite) => {
                return Err(ApiError::new(
                    StatusCode::INTERNAL_SERVER_ERROR,
                    "not_finite",
                    "the model's numbers are no longer finite; weights that are too large or damaged cause this",
                ));
            }
            Update::Finished(finish) => {
                summary.reason = reason(finish);
                false
            }
            Update::TimedOut => {
                return Err(ApiError::new(
                    StatusCode::REQUEST_TIMEOUT,
                    "timeout",
                    "the request took longer than it may",
                ));
            }
            Update::TooLarge { tokens } => {
                return Err(ApiError::bad_request(
                    "cache_too_small",
                    format!(
                        "a prompt of {tokens} tokens with its answer needs more of the cache than the server has; ask for fewer \
                         tokens, or start it with a larger --kv-cache-memory"
                    ),
                ));
            }
        };
        if !goes_on {
            break;
        }
    }
    // The engine sees that nobody listens any more.
    choice.updates.close();
    if summary.reason.is_empty() {
        return Err(ApiError::internal("the engine has stopped"));
    }
    let rest = text.finish();
    summary.has_calls |= !rest.calls.is_empty();
    if rest != Piece::default() {
        sink(Event::Made(rest, None));
    }
    if summary.has_calls {
        summary.reason = "tool_calls";
    }
    Ok(summary)
}

/// `usage` of a request.
pub(crate) fn usage(prompt: usize, made: usize, cached: usize) -> Value {
    json!({
        "prompt_tokens": prompt,
        "completion_tokens": made,
        "total_tokens": prompt + made,
        "prompt_tokens_details": {"cached_tokens": cached},
    })
}

/// A token as OpenAI's chat log-probabilities show it.
pub(crate) fn token_entry(tokenizer: &Tokenizer, id: u32, log_prob: f64) -> Value {
    json!({
        "token": tokenizer.token_text(id),
        "logprob": log_prob,
        "bytes": tokenizer.token_bytes(id),
    })
}

/// Where events are put.
#[derive(Clone)]
pub(crate) struct Events(UnboundedSender<Bytes>);

impl Events {
    /// Sends one; whether anybody listens.
    pub(crate) fn send(&self, value: &Value) -> bool {
        self.0.send(format!("data: {value}\n\n").into()).is_ok()
    }

    /// Whether nobody listens any more.
    pub(crate) fn is_closed(&self) -> bool {
        self.0.is_closed()
    }

    /// Sends what OpenAI's streams end with.
    pub(crate) fn done(&self) {
        drop(self.0.send(Bytes::from_static(b"data: [DONE]\n\n")));
    }
}

/// The body that events are read from.
struct EventBody(UnboundedReceiver<Bytes>);

impl futures_core::Stream for EventBody {
    type Item = Result<Bytes, Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll_recv(context).map(|next| next.map(Ok))
    }
}

/// A response of server-sent events, and where to put them.
pub(crate) fn events() -> (Events, Response) {
    let (sender, receiver) = tokio::sync::mpsc::unbounded_channel();
    let mut response = Response::new(Body::from_stream(EventBody(receiver)));
    let headers = response.headers_mut();
    let event_stream = HeaderValue::from_static("text/event-stream; charset=utf-8");
    headers.insert(header::CONTENT_TYPE, event_stream);
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // Proxies would collect the events.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    (Events(sender), response)
}

/// A name of an object that no other has.
pub(crate) fn new_id(prefix: &str) -> String {
    use std::hash::{BuildHasher as _, RandomState};
    let (a, b) = (
        RandomState::new().hash_one(0),
        RandomState::new().hash_one(1),
    );
    format!("{prefix}{a:016x}{:08x}", b as u32)
}

impl Server {
    pub(crate) fn tokenizer(&self) -> &Tokenizer {
        &self.base.tokenizer
    }
}
