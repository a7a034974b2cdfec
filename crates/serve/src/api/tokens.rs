//! `/tokenize`, `/detokenize`, `/tokenizer_info`, with vLLM's requests and answers.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::HeaderMap;
use lowrank::data::Prompt;
use serde_json::{Value, json};

use super::chat::{TEMPLATE_VARIABLES, template_variables};
use super::fields::{self, Field, Kind, field, missing};
use super::wanted::{Wanted, check_ids, token_ids};
use super::{Body, whole};
use crate::error::ApiError;
use crate::server::Server;
use crate::sync::blocking;

type Shared = State<Arc<Server>>;

/// Fields of `/tokenize`.
pub(crate) const TOKENIZE: &[Field] = &[
    field("model", Kind::Text, "All models have the base's tokenizer"),
    field("prompt", Kind::Text, "A text"),
    field(
        "messages",
        Kind::Other(r#"{"type": ["array", "null"]}"#),
        "Or a conversation",
    ),
    field(
        "tools",
        Kind::Other(r#"{"type": ["array", "null"]}"#),
        "Its tools",
    ),
    field(
        "add_special_tokens",
        Kind::Bool,
        "Whether the tokenizer adds what it adds to texts [true]",
    ),
    field(
        "return_token_strs",
        Kind::Bool,
        "Give the tokens as texts, too [false]",
    ),
    field("add_generation_prompt", Kind::Ignored, "Always"),
    TEMPLATE_VARIABLES,
];

/// Fields of `/detokenize`.
pub(crate) const DETOKENIZE: &[Field] = &[
    field("model", Kind::Text, "All models have the base's tokenizer"),
    field(
        "tokens",
        Kind::Other(
            r#"{"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 4294967295}}"#,
        ),
        "Token ids",
    ),
];

pub(super) async fn tokenize(
    State(server): Shared,
    headers: HeaderMap,
    body: Body,
) -> Result<Json<Value>, ApiError> {
    server.keys.caller(&headers)?;
    let body = fields::Body::read(&whole(body)?, &[TOKENIZE])?;
    check_model(&server, &body).await?;
    // Long texts take their time.
    blocking(move || tokens_of(&server, &body)).await
}

/// All models have the base's tokenizer, but one that is not there has none.
async fn check_model(server: &Server, body: &fields::Body) -> Result<(), ApiError> {
    let is_known = |name: &str| name == server.name || server.registry.get(name).is_some();
    if body.text("model").is_none_or(is_known) {
        return Ok(());
    }
    // It may lie in the folder of adapters, or be a checkpoint.
    server.model(&Wanted::of_model(body)).await.map(drop)
}

fn tokens_of(server: &Server, body: &fields::Body) -> Result<Json<Value>, ApiError> {
    let tokenizer = server.tokenizer();
    let ids = match (body.text("prompt"), body.get("messages")) {
        (Some(text), _) => {
            let add_special = body.bool("add_special_tokens").unwrap_or(true);
            tokenizer
                .encode(text, add_special)
                .map_err(|error| ApiError::invalid("prompt", error.to_string()))?
        }
        (None, Some(messages)) => {
            let variables = template_variables(body)?;
            Prompt::from_chat_with(tokenizer, messages, body.get("tools"), &variables)
                .map_err(|error| ApiError::invalid("messages", error.to_string()))?
                .ids
        }
        (None, None) => return Err(missing("prompt")),
    };
    let texts = body.bool("return_token_strs").unwrap_or(false);
    let texts = texts.then(|| {
        ids.iter()
            .map(|id| tokenizer.token_text(*id))
            .collect::<Vec<_>>()
    });
    Ok(Json(json!({
        "count": ids.len(),
        "max_model_len": server.base.decoder.config().longest_sequence(),
        "tokens": ids,
        "token_strs": texts,
    })))
}

pub(super) async fn detokenize(
    State(server): Shared,
    headers: HeaderMap,
    body: Body,
) -> Result<Json<Value>, ApiError> {
    server.keys.caller(&headers)?;
    let body = fields::Body::read(&whole(body)?, &[DETOKENIZE])?;
    if body.get("tokens").is_none() {
        return Err(missing("tokens"));
    }
    check_model(&server, &body).await?;
    let ids = token_ids(&body, "tokens")?;
    // A model may have more rows than its tokenizer has tokens.
    let rows = server.base.decoder.config().vocab_size;
    let vocabulary = rows.max(server.tokenizer().vocab_size());
    check_ids("tokens", ids.iter().copied(), vocabulary)?;
    blocking(move || {
        let text = server
            .tokenizer()
            .decode(&ids, false)
            .map_err(|error| ApiError::invalid("tokens", error.to_string()))?;
        Ok(Json(json!({"prompt": text})))
    })
    .await
}

pub(super) async fn info(
    State(server): Shared,
    headers: HeaderMap,
) -> Result<Json<Value>, ApiError> {
    server.keys.caller(&headers)?;
    let tokenizer = server.tokenizer();
    let name = |id: u32| tokenizer.token_text(id);
    Ok(Json(json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "vocab_size": tokenizer.vocab_size(),
        "model_max_length": server.base.decoder.config().longest_sequence(),
        "bos_token": tokenizer.bos_id().map(name),
        "eos_token": name(tokenizer.eos_id()),
        "stop_tokens": tokenizer.stop_ids().iter().map(|id| name(*id)).collect::<Vec<_>>(),
        "add_bos_token": tokenizer.adds_bos(),
        "chat_template": tokenizer.chat_template(),
    })))
}
