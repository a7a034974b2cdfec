//! `/openapi.json`, from the tables that bodies are checked with.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::HeaderMap;
use serde_json::{Map, Value, json};

use super::fields::{Field, schema};
use super::wanted::COMMON;
use super::{chat, completions, manage, tokens, vectors};
use crate::error::ApiError;
use crate::server::Server;

/// A route: method, path, what it does, and its body's tables with the fields that must be there.
type Route = (
    &'static str,
    &'static str,
    &'static str,
    Option<(&'static [&'static [Field]], &'static [&'static str])>,
);

const ROUTES: &[Route] = &[
    (
        "post",
        "/v1/chat/completions",
        "Answer a conversation",
        Some((&[chat::FIELDS, COMMON], &["messages"])),
    ),
    (
        "post",
        "/v1/completions",
        "Continue prompts",
        Some((&[completions::FIELDS, COMMON], &["prompt"])),
    ),
    (
        "post",
        "/v1/embeddings",
        "Vectors of texts, of an encoder",
        Some((&[vectors::EMBEDDINGS], &["input"])),
    ),
    (
        "post",
        "/v1/classify",
        "Labels of texts, of a classifier",
        Some((&[vectors::CLASSIFY], &["input"])),
    ),
    ("get", "/v1/models", "The base and its adapters", None),
    (
        "get",
        "/v1/adapters",
        "Adapters with their sizes and uses",
        None,
    ),
    (
        "post",
        "/v1/load_lora_adapter",
        "Load an adapter",
        Some((&[manage::LOAD], &["lora_name", "lora_path"])),
    ),
    (
        "post",
        "/v1/unload_lora_adapter",
        "Forget an adapter",
        Some((&[manage::UNLOAD], &["lora_name"])),
    ),
    (
        "post",
        "/v1/files",
        "Upload a file of rows, as a form",
        None,
    ),
    ("get", "/v1/files", "The files", None),
    ("get", "/v1/files/{id}", "A file", None),
    ("delete", "/v1/files/{id}", "Delete a file", None),
    ("get", "/v1/files/{id}/content", "What is in a file", None),
    (
        "get",
        "/v1/files/{id}/preview",
        "What a model would learn of a file",
        None,
    ),
    (
        "post",
        "/v1/fine_tuning/jobs",
        "Train an adapter",
        Some((&[crate::jobs::CREATE], &["model", "training_file"])),
    ),
    ("get", "/v1/fine_tuning/jobs", "The jobs", None),
    ("get", "/v1/fine_tuning/jobs/{id}", "A job", None),
    (
        "post",
        "/v1/fine_tuning/jobs/{id}/cancel",
        "End a job",
        None,
    ),
    (
        "post",
        "/v1/fine_tuning/jobs/{id}/pause",
        "Let a job rest",
        None,
    ),
    (
        "post",
        "/v1/fine_tuning/jobs/{id}/resume",
        "Go on with a job",
        None,
    ),
    (
        "get",
        "/v1/fine_tuning/jobs/{id}/events",
        "What a job told, newest first, or as it comes",
        None,
    ),
    (
        "get",
        "/v1/fine_tuning/jobs/{id}/checkpoints",
        "The checkpoints of a job",
        None,
    ),
    (
        "post",
        "/tokenize",
        "A text or a conversation as tokens",
        Some((&[tokens::TOKENIZE], &[])),
    ),
    (
        "post",
        "/detokenize",
        "Tokens as text",
        Some((&[tokens::DETOKENIZE], &["tokens"])),
    ),
    ("get", "/tokenizer_info", "What the tokenizer is", None),
    ("get", "/health", "Whether the server runs", None),
    ("get", "/ready", "Whether it takes requests", None),
    ("get", "/metrics", "Metrics in Prometheus' form", None),
];

/// The document.
pub(super) async fn document(
    State(server): State<Arc<Server>>,
    headers: HeaderMap,
) -> Result<Json<Value>, ApiError> {
    server.keys.caller(&headers)?;
    let error = json!({"description": "An error", "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}});
    let mut paths = Map::new();
    for (method, path, summary, body) in ROUTES {
        let mut operation = json!({
            "summary": summary,
            "responses": {"200": {"description": "Done"}, "default": error},
        });
        let parameters: Vec<Value> = path
            .split(['{', '}'])
            .skip(1)
            .step_by(2)
            .map(|name| json!({"name": name, "in": "path", "required": true, "schema": {"type": "string"}}))
            .collect();
        if !parameters.is_empty() {
            operation["parameters"] = parameters.into();
        }
        if let Some((tables, required)) = body {
            operation["requestBody"] = json!({
                "required": true,
                "content": {"application/json": {"schema": schema(tables, required)}},
            });
        }
        let entry = paths.entry(*path).or_insert_with(|| json!({}));
        entry[*method] = operation;
    }
    Ok(Json(json!({
        "openapi": "3.1.0",
        "info": {"title": "lowrank serve", "version": env!("CARGO_PKG_VERSION")},
        "paths": paths,
        "components": {
            "schemas": {"Error": {"type": "object", "properties": {"error": {"type": "object", "properties": {
                "message": {"type": "string"}, "type": {"type": "string"},
                "param": {"type": ["string", "null"]}, "code": {"type": "string"},
            }, "required": ["message", "type", "code"]}}, "required": ["error"]}},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}, {}],
    })))
}
