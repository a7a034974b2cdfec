//! `/v1/completions`.

use std::sync::Arc;

use axum::response::Response;
use lowrank::data::{DecodeStream, Prompt, Tokenizer};
use lowrank::generate::{LogProbs, Token};
use serde_json::{Map, Value, json};

use super::answer::{Chunks, Event, Frame, Summary, follow, wait_for_first};
use super::fields::{Body, Field, Kind, field, kind_of, missing};
use super::wanted::{COMMON, Wanted, too_long, unsupported};
use crate::error::ApiError;
use crate::keys::Turn;
use crate::server::{Choice, Server};
use crate::sync::blocking;

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
        Kind::Limited(0, |caps| caps.top_log_probs),
        "Log-probabilities of the tokens, and of so many that are the likeliest at the same place",
    ),
    field(
        "echo",
        Kind::Bool,
        "Give the prompt back before the answer [false]",
    ),
    field("best_of", Kind::Limited(1, |caps| caps.n), "As many as n"),
    field("suffix", Kind::Text, "Not supported"),
];

/// What an answer is, and a piece of one, with what its id begins with.
const OBJECT: (&str, &str) = ("text_completion", "cmpl-");

/// New tokens where the request says nothing, as at OpenAI.
const DEFAULT_TOKENS: usize = 16;

/// What all choices of a request have.
struct Asked {
    n: usize,
    /// Text and ids of the prompts, where they are given back.
    echo: Option<Vec<(String, Vec<u32>)>>,
    log_probs: Option<usize>,
    stops: Vec<String>,
}

impl Asked {
    /// The prompt of a choice, where it is given back.
    fn prompt(&self, index: usize) -> Option<&(String, Vec<u32>)> {
        self.echo.as_ref()?.get(index / self.n)
    }

    /// Where the log-probabilities of a choice go, if they are wanted.
    fn lists<'t>(&self, tokenizer: &'t Tokenizer, index: usize) -> Option<LogProbLists<'t>> {
        let top = self.log_probs?;
        Some(LogProbLists::new(tokenizer, top, self.prompt(index)))
    }
}

/// Continues prompts.
pub(crate) async fn complete(
    server: Arc<Server>,
    turn: Turn,
    bytes: &[u8],
) -> Result<Response, ApiError> {
    let body = Body::read_within(bytes, &[FIELDS, COMMON], &server.caps)?;
    let mut wanted = Wanted::read(&body, &server.caps)?;
    wanted.check_ids(server.base.decoder.config().vocab_size)?;
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
        wanted.log_probs = LogProbs {
            made: true,
            prompt: echo,
            top,
        };
        // As at OpenAI, the lists have the end token; lm-evaluation-harness takes the last entry for the answer's.
        wanted.shows_end = true;
    }
    let prompt = body.get("prompt").ok_or_else(|| missing("prompt"))?.clone();
    let model = server.model(&wanted).await?;
    let of_task = Arc::clone(&server);
    let (prompts, most) = (count_of(&prompt), 8 * server.caps.n);
    if prompts > most {
        return Err(too_long("prompt", prompts, most));
    }
    if prompts * wanted.n > most {
        return Err(ApiError::invalid(
            "prompt",
            format!(
                "prompt has {prompts} entries and n is {}, which makes {} choices, and this server allows {most} at most",
                wanted.n,
                prompts * wanted.n
            ),
        ));
    }
    let prompts = blocking(move || read_prompts(of_task.tokenizer(), &prompt)).await?;
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
    let mut choices = server.submit(&wanted, &model, ids, Some(DEFAULT_TOKENS), None)?;
    let asked = Asked {
        n: wanted.n,
        echo: echo.then_some(prompts),
        log_probs,
        stops: wanted.stop.clone(),
    };
    let frame = Frame::new(OBJECT, &model, wanted.n, prompt_tokens);
    if wanted.stream {
        wait_for_first(&mut choices).await?;
        let asked = Arc::new(asked);
        let follow = |choice, chunks| {
            let (server, asked) = (Arc::clone(&server), Arc::clone(&asked));
            async move { stream(&server, &asked, choice, &chunks).await }
        };
        return Ok(frame.stream(turn, choices, wanted.include_usage, follow));
    }
    let (server, asked) = (&*server, &asked);
    let answer = frame
        .whole(choices, |choice| collect(server, choice, asked))
        .await;
    drop(turn);
    answer
}

/// How many prompts there are.
fn count_of(value: &Value) -> usize {
    match value {
        Value::Array(items) if !items.iter().all(Value::is_number) => items.len(),
        _ => 1,
    }
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
struct LogProbLists<'t> {
    tokenizer: &'t Tokenizer,
    /// Of how many tokens those are given that are the likeliest at the same place.
    top: usize,
    tokens: Vec<String>,
    token_logprobs: Vec<Option<f64>>,
    top_logprobs: Vec<Option<Map<String, Value>>>,
    text_offset: Vec<usize>,
    /// Characters of the text before the next token.
    offset: usize,
    stream: DecodeStream<'t>,
    /// Tokens of the prompt that come before the answer's, and characters of its text.
    prompt: (usize, usize),
}

impl<'t> LogProbLists<'t> {
    /// Lists of an answer; of a prompt before it where that is given back.
    fn new(tokenizer: &'t Tokenizer, top: usize, prompt: Option<&(String, Vec<u32>)>) -> Self {
        let (prompt, skips_special) = match prompt {
            Some((text, ids)) => {
                // Tokens that were put before a text are none of its characters.
                let written = tokenizer.decode(ids, false).unwrap_or_default();
                ((ids.len(), text.chars().count()), written != *text)
            }
            None => ((0, 0), true),
        };
        Self {
            tokenizer,
            top,
            tokens: Vec::new(),
            token_logprobs: Vec::new(),
            top_logprobs: Vec::new(),
            text_offset: Vec::new(),
            offset: 0,
            stream: tokenizer.decode_stream(skips_special),
            prompt,
        }
    }

    fn push(&mut self, token: &Token) {
        let text = self.tokenizer.token_text(token.id);
        let top = token.log_prob.filter(|_| self.top > 0).map(|own| {
            let all = token
                .top
                .iter()
                .map(|(id, log_prob)| (self.tokenizer.token_text(*id), json!(log_prob)));
            let mut all: Map<String, Value> = all.collect();
            // As at OpenAI, the token itself is always among them.
            all.insert(text.clone(), json!(own));
            all
        });
        self.text_offset.push(self.offset);
        self.tokens.push(text);
        self.token_logprobs.push(token.log_prob);
        self.top_logprobs.push(top);
        let certain = self.stream.push(token.id).unwrap_or_default();
        self.offset += certain.chars().count();
        let (left, length) = &mut self.prompt;
        if *left > 0 {
            *left -= 1;
            if *left == 0 {
                self.offset = *length;
                self.stream = self.tokenizer.decode_stream(true);
            }
        }
    }

    fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// What has come since this was asked last.
    fn take(&mut self) -> Value {
        use std::mem::take;
        let top = take(&mut self.top_logprobs);
        json!({
            "tokens": take(&mut self.tokens),
            "token_logprobs": take(&mut self.token_logprobs),
            "top_logprobs": (self.top > 0).then_some(top),
            "text_offset": take(&mut self.text_offset),
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
    mut choice: Choice,
    asked: &Asked,
) -> Result<(Summary, Value), ApiError> {
    let tokenizer = server.tokenizer();
    let mut text = String::new();
    let index = choice.index;
    let mut lists = asked.lists(tokenizer, index);
    if let Some((prompt, ids)) = asked.prompt(index) {
        text.push_str(prompt);
        if let (Some(lists), Some(token)) = (&mut lists, first_token(ids)) {
            lists.push(&token);
        }
    }
    let summary = follow(
        tokenizer,
        &mut choice,
        asked.stops.clone(),
        None,
        None,
        |event| {
            match (event, &mut lists) {
                (Event::Begun, _) | (Event::Read(_) | Event::Ended(_), None) => {}
                (Event::Ended(token), Some(lists)) => lists.push(&token),
                (Event::Read(tokens), Some(lists)) => {
                    for token in tokens.iter().filter(|_| asked.echo.is_some()) {
                        lists.push(token);
                    }
                }
                (Event::Made(piece, token), lists) => {
                    text.push_str(&piece.content);
                    if let (Some(lists), Some(token)) = (lists, token) {
                        lists.push(&token);
                    }
                }
            }
            true
        },
    )
    .await?;
    let part = json!({
        "index": index,
        "text": text,
        "logprobs": lists.as_mut().map(LogProbLists::take),
        "finish_reason": summary.reason,
    });
    Ok((summary, part))
}

/// Sends a choice as it is made.
async fn stream(
    server: &Server,
    asked: &Asked,
    mut choice: Choice,
    chunks: &Chunks,
) -> Result<Summary, ApiError> {
    let tokenizer = server.tokenizer();
    let index = choice.index;
    let mut lists = asked.lists(tokenizer, index);
    let send = |text: &str, reason: Option<&str>, log_probs: Option<Value>| {
        chunks.send(&json!({
            "index": index,
            "text": text,
            "logprobs": log_probs,
            "finish_reason": reason,
        }))
    };
    let mut sink = |event| match event {
        Event::Begun => match asked.prompt(index) {
            None => true,
            Some((prompt, ids)) => {
                if let (Some(lists), Some(token)) = (&mut lists, first_token(ids)) {
                    lists.push(&token);
                }
                send(prompt, None, lists.as_mut().map(LogProbLists::take))
            }
        },
        Event::Read(tokens) => match &mut lists {
            Some(lists) if asked.echo.is_some() => {
                for token in &tokens {
                    lists.push(token);
                }
                send("", None, Some(lists.take()))
            }
            _ => true,
        },
        Event::Ended(token) => match &mut lists {
            Some(lists) => {
                lists.push(&token);
                send("", None, Some(lists.take()))
            }
            None => true,
        },
        Event::Made(piece, token) => {
            if let (Some(lists), Some(token)) = (&mut lists, token) {
                lists.push(&token);
            }
            if piece.content.is_empty() && lists.as_ref().is_none_or(LogProbLists::is_empty) {
                return !chunks.is_closed();
            }
            send(&piece.content, None, lists.as_mut().map(LogProbLists::take))
        }
    };
    let stops = asked.stops.clone();
    let summary = follow(
        tokenizer,
        &mut choice,
        stops,
        None,
        Some(chunks.events()),
        &mut sink,
    )
    .await?;
    send("", Some(summary.reason), None);
    Ok(summary)
}
