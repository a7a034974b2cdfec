//! Following the choices of a request to their ends, and sending what comes of them.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Json;
use axum::body::{Body, Bytes};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use lowrank::data::Tokenizer;
use lowrank::generate::{Finish, Token};
use serde_json::{Value, json};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender};
use tokio::task::JoinSet;

use super::text::{Piece, Text};
use crate::engine::{Update, reason};
use crate::error::ApiError;
use crate::keys::Turn;
use crate::objects::{new_id, now};
use crate::server::{Choice, Model, Server, cache_too_small};
use crate::tools::{Tool, ToolForm};

/// What happens to a choice.
pub(crate) enum Event {
    /// It is taken up.
    Begun,
    /// Tokens of its prompt.
    Read(Vec<Token>),
    /// A token, and what became certain of the text. Text without a token is what was held back.
    Made(Piece, Option<Token>),
    /// The token that ends it, which is no part of the text.
    Ended(Token),
}

/// What a choice came to.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Summary {
    pub(crate) reason: &'static str,
    pub(crate) made: usize,
    pub(crate) cached: usize,
    pub(crate) has_calls: bool,
}

/// Follows one choice; `sink` says whether anybody still listens, and what it is given is whole once this returns. Where the answer is a stream, whoever
/// reads it may leave at any time.
///
/// # Errors
/// What went wrong with the choice, or that nobody reads its stream any more.
pub(crate) async fn follow(
    tokenizer: &Tokenizer,
    choice: &mut Choice,
    stops: Vec<String>,
    tools: Option<(ToolForm, &[Tool], u64)>,
    stream: Option<&Events>,
    mut sink: impl FnMut(Event) -> bool,
) -> Result<Summary, ApiError> {
    let mut text = Text::new(tokenizer, stops, tools);
    let mut summary = Summary::default();
    let has_left = async {
        match stream {
            Some(events) => events.0.closed().await,
            None => std::future::pending().await,
        }
    };
    tokio::pin!(has_left);
    loop {
        let update = tokio::select! {
            biased;
            update = choice.next() => update,
            () = &mut has_left => return Err(ApiError::internal("the client has left")),
        };
        let Some(update) = update else { break };
        if let Some(error) = failure(&update) {
            return Err(error);
        }
        let goes_on = match update {
            Update::Begun { cached_tokens } => {
                summary.cached = cached_tokens;
                sink(Event::Begun)
            }
            Update::Read(tokens) => sink(Event::Read(tokens)),
            Update::Token(token) if choice.ends.contains(&token.id) => {
                summary.reason = "stop";
                sink(Event::Ended(token));
                false
            }
            Update::Token(token) => {
                summary.made += 1;
                let (piece, has_ended) = text.push(token.id);
                summary.has_calls |= !piece.calls.is_empty();
                if has_ended {
                    summary.reason = "stop";
                }
                sink(Event::Made(piece, Some(token))) && !has_ended
            }
            Update::Finished(finish) => {
                summary.reason = reason(finish);
                false
            }
            // These are failures.
            Update::TimedOut | Update::TooLarge { .. } | Update::Cut => false,
        };
        if !goes_on {
            break;
        }
    }
    // The engine sees that nobody listens any more, and whether that is since the text is whole.
    choice
        .is_over
        .store(summary.reason == "stop", Ordering::SeqCst);
    choice.updates.close();
    if summary.reason.is_empty() {
        return Err(ApiError::internal("the engine has stopped"));
    }
    let rest = text.finish();
    summary.has_calls |= !rest.calls.is_empty();
    if rest != Piece::default() {
        sink(Event::Made(rest, None));
    }
    if summary.has_calls && summary.reason == "stop" {
        summary.reason = "tool_calls";
    }
    Ok(summary)
}

/// The error that an update is, if it is one.
fn failure(update: &Update) -> Option<ApiError> {
    match update {
        Update::Finished(Finish::NotFinite) => Some(ApiError::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "not_finite",
            "the model's numbers are no longer finite; weights that are too large or damaged cause this",
        )),
        Update::TimedOut => Some(ApiError::new(
            StatusCode::REQUEST_TIMEOUT,
            "timeout",
            "the request took longer than it may",
        )),
        Update::TooLarge { tokens } => Some(cache_too_small(*tokens)),
        Update::Cut => Some(ApiError::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "shutting_down",
            "the server ends before the answer is whole",
        )),
        _ => None,
    }
}

/// Waits for the first token of a stream, so that what goes wrong before it has a status of its own. A stream that waits for long begins
/// without, since clients give up where nothing comes.
///
/// # Errors
/// What has gone wrong.
pub(crate) async fn wait_for_first(choices: &mut [Choice]) -> Result<(), ApiError> {
    let Some(choice) = choices.first_mut() else {
        return Ok(());
    };
    drop(tokio::time::timeout(FIRST_PAUSE, choice.begin()).await);
    match choice.early.iter().find_map(failure) {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

/// How long a stream's head waits for its first token.
const FIRST_PAUSE: Duration = Duration::from_secs(10);

/// How often a stream says that it is still there, for proxies that close silent connections.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

impl Choice {
    /// What it is told next.
    async fn next(&mut self) -> Option<Update> {
        match self.early.pop_front() {
            Some(update) => Some(update),
            None => self.updates.recv().await,
        }
    }

    /// Waits until its first token is there, or it is over.
    async fn begin(&mut self) {
        while let Some(update) = self.updates.recv().await {
            let is_token = !matches!(update, Update::Begun { .. } | Update::Read(_));
            self.early.push_back(update);
            if is_token {
                return;
            }
        }
    }
}

/// What all parts of an answer have.
#[derive(Clone)]
pub(crate) struct Frame {
    /// The object's kind: of a whole answer, or of a piece of a stream.
    kind: &'static str,
    id: String,
    created: u64,
    model: String,
    /// Choices of each prompt.
    n: usize,
    prompt_tokens: usize,
}

/// What the choices of an answer came to together.
#[derive(Default)]
struct Totals {
    made: usize,
    cached: usize,
}

impl Frame {
    /// An answer of `n` choices for each of the prompts, which have so many tokens together.
    pub(crate) fn new(
        (kind, prefix): (&'static str, &str),
        model: &Model,
        n: usize,
        prompt_tokens: usize,
    ) -> Self {
        Self {
            kind,
            id: new_id(prefix),
            created: now(),
            model: model.name.to_string(),
            n,
            prompt_tokens,
        }
    }

    fn object(&self, choices: &[Value]) -> Value {
        json!({
            "id": self.id,
            "object": self.kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
            "system_fingerprint": null,
        })
    }

    /// `usage`. A prompt is counted once: other choices of it read what the first has computed.
    fn usage(&self, totals: &Totals) -> Value {
        json!({
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": totals.made,
            "total_tokens": self.prompt_tokens + totals.made,
            "prompt_tokens_details": {"cached_tokens": totals.cached},
        })
    }

    fn add(&self, totals: &mut Totals, index: usize, summary: Summary) {
        totals.made += summary.made;
        if index.is_multiple_of(self.n) {
            totals.cached += summary.cached;
        }
    }

    /// The whole answer, once `collect` has each choice's summary and object.
    pub(crate) async fn whole<F>(
        self,
        choices: Vec<Choice>,
        collect: impl Fn(Choice) -> F,
    ) -> Result<Response, ApiError>
    where
        F: Future<Output = Result<(Summary, Value), ApiError>>,
    {
        let (mut parts, mut totals) = (Vec::new(), Totals::default());
        for choice in choices {
            let index = choice.index;
            let (summary, part) = collect(choice).await?;
            self.add(&mut totals, index, summary);
            parts.push(part);
        }
        let mut object = self.object(&parts);
        object["usage"] = self.usage(&totals);
        Ok(Json(object).into_response())
    }

    /// A stream of what `follow` sends of each choice, all of them at once. What goes wrong is its last event. `turn` ends with it.
    pub(crate) fn stream<F>(
        self,
        turn: Turn,
        choices: Vec<Choice>,
        include_usage: bool,
        follow: impl Fn(Choice, Chunks) -> F,
    ) -> Response
    where
        F: Future<Output = Result<Summary, ApiError>> + Send + 'static,
    {
        let (events, response) = events();
        let chunks = Chunks {
            frame: Arc::new(self),
            events,
            include_usage,
        };
        let mut tasks = JoinSet::new();
        for choice in choices {
            let index = choice.index;
            let following = follow(choice, chunks.clone());
            tasks.spawn(async move { following.await.map(|summary| (index, summary)) });
        }
        tokio::spawn(async move {
            chunks.finish(tasks).await;
            drop(turn);
        });
        response
    }
}

/// Where the pieces of a stream's choices go.
#[derive(Clone)]
pub(crate) struct Chunks {
    frame: Arc<Frame>,
    events: Events,
    include_usage: bool,
}

impl Chunks {
    /// Sends a piece of a choice; whether anybody listens.
    pub(crate) fn send(&self, choice: &Value) -> bool {
        let mut chunk = self.frame.object(std::slice::from_ref(choice));
        if self.include_usage {
            chunk["usage"] = Value::Null;
        }
        self.events.send(&chunk)
    }

    /// Whether nobody listens any more.
    pub(crate) fn is_closed(&self) -> bool {
        self.events.is_closed()
    }

    /// Where they are put.
    pub(crate) fn events(&self) -> &Events {
        &self.events
    }

    /// Waits for the ends of all choices, and ends the stream.
    async fn finish(&self, mut choices: JoinSet<Result<(usize, Summary), ApiError>>) {
        let mut totals = Totals::default();
        loop {
            let ended = tokio::select! {
                ended = choices.join_next() => ended,
                () = tokio::time::sleep(KEEP_ALIVE) => {
                    drop(self.events.0.send(Bytes::from_static(b": still here\n\n")));
                    continue;
                }
            };
            let error = match ended {
                None => break,
                Some(Ok(Ok((index, summary)))) => {
                    self.frame.add(&mut totals, index, summary);
                    continue;
                }
                Some(Ok(Err(error))) => error,
                Some(Err(error)) => ApiError::internal(format!("a choice was lost: {error}")),
            };
            // The other choices still send pieces until they are stopped.
            choices.shutdown().await;
            self.events.send(&error.body());
            return;
        }
        if self.include_usage {
            let mut last = self.frame.object(&[]);
            last["usage"] = self.frame.usage(&totals);
            self.events.send(&last);
        }
        self.events.done();
    }
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

impl Server {
    pub(crate) fn tokenizer(&self) -> &Tokenizer {
        &self.base.tokenizer
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_goes_wrong_is_the_last_event_beside_a_busy_choice() {
        let frame = Frame {
            kind: "text_completion",
            id: "cmpl-0".to_owned(),
            created: 0,
            model: "tiny".to_owned(),
            n: 2,
            prompt_tokens: 1,
        };
        let (sender, mut sent) = tokio::sync::mpsc::unbounded_channel();
        let chunks = Chunks {
            frame: Arc::new(frame),
            events: Events(sender),
            include_usage: false,
        };
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_time()
            .build()
            .expect("a runtime");
        runtime.block_on(async {
            for _ in 0..50 {
                let busy = chunks.clone();
                let mut choices = JoinSet::new();
                choices.spawn(async move {
                    loop {
                        busy.send(&Value::Null);
                        tokio::task::yield_now().await;
                    }
                });
                choices.spawn(async { Err(ApiError::internal("an error".to_owned())) });
                chunks.finish(choices).await;
                let mut last = Bytes::new();
                while let Ok(event) = sent.try_recv() {
                    last = event;
                }
                let last = String::from_utf8_lossy(&last);
                assert!(last.contains("an error"), "{last}");
            }
        });
    }
}
