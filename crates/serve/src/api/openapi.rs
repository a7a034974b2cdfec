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
use crate::server::{Caps, Server};

/// Tables of a body's fields, and the fields that must be there.
type Fields = (&'static [&'static [Field]], &'static [&'static str]);

/// A route of the document.
struct Route {
    method: &'static str,
    path: &'static str,
    summary: &'static str,
    body: Option<Fields>,
    /// The schema of its answer among those of the document; none where it is text.
    answer: Option<&'static str>,
}

const fn get(path: &'static str, summary: &'static str, answer: Option<&'static str>) -> Route {
    Route {
        method: "get",
        path,
        summary,
        body: None,
        answer,
    }
}

const fn post(
    path: &'static str,
    summary: &'static str,
    body: Fields,
    answer: Option<&'static str>,
) -> Route {
    Route {
        method: "post",
        path,
        summary,
        body: Some(body),
        answer,
    }
}

const ROUTES: &[Route] = &[
    post(
        "/v1/chat/completions",
        "Answer a conversation",
        (&[chat::FIELDS, COMMON], &["messages"]),
        Some("ChatCompletion"),
    ),
    post(
        "/v1/completions",
        "Continue prompts",
        (&[completions::FIELDS, COMMON], &["prompt"]),
        Some("Completion"),
    ),
    post(
        "/v1/embeddings",
        "Vectors of texts, of an encoder",
        (&[vectors::EMBEDDINGS], &["input"]),
        Some("Answer"),
    ),
    post(
        "/v1/classify",
        "Labels of texts, of a classifier",
        (&[vectors::CLASSIFY], &["input"]),
        Some("Answer"),
    ),
    get("/v1/models", "The base and its adapters", Some("Models")),
    get("/v1/models/{id}", "One of them", Some("Model")),
    get(
        "/v1/adapters",
        "Adapters with their sizes and uses",
        Some("Adapters"),
    ),
    post(
        "/v1/adapters/{id}/pin",
        "Keep an adapter's values in memory",
        (&[manage::PIN], &[]),
        Some("Adapter"),
    ),
    post(
        "/v1/load_lora_adapter",
        "Load an adapter",
        (&[manage::LOAD], &["lora_name", "lora_path"]),
        None,
    ),
    post(
        "/v1/unload_lora_adapter",
        "Forget an adapter",
        (&[manage::UNLOAD], &["lora_name"]),
        None,
    ),
    Route {
        method: "post",
        ..get(
            "/v1/files",
            "Upload a file of rows, as a form",
            Some("Answer"),
        )
    },
    get("/v1/files", "The files", Some("Answer")),
    get("/v1/files/{id}", "A file", Some("Answer")),
    Route {
        method: "delete",
        ..get("/v1/files/{id}", "Delete a file", Some("Answer"))
    },
    get("/v1/files/{id}/content", "What is in a file", None),
    get(
        "/v1/files/{id}/preview",
        "What a model would learn of a file",
        Some("Answer"),
    ),
    post(
        "/v1/fine_tuning/jobs",
        "Train an adapter",
        (&[crate::jobs::CREATE], &["model", "training_file"]),
        Some("Answer"),
    ),
    get("/v1/fine_tuning/jobs", "The jobs", Some("Answer")),
    get("/v1/fine_tuning/jobs/{id}", "A job", Some("Answer")),
    Route {
        method: "post",
        ..get(
            "/v1/fine_tuning/jobs/{id}/cancel",
            "End a job",
            Some("Answer"),
        )
    },
    Route {
        method: "post",
        ..get(
            "/v1/fine_tuning/jobs/{id}/pause",
            "Let a job rest",
            Some("Answer"),
        )
    },
    Route {
        method: "post",
        ..get(
            "/v1/fine_tuning/jobs/{id}/resume",
            "Go on with a job",
            Some("Answer"),
        )
    },
    get(
        "/v1/fine_tuning/jobs/{id}/events",
        "What a job told, newest first, or as it comes",
        Some("Answer"),
    ),
    get(
        "/v1/fine_tuning/jobs/{id}/checkpoints",
        "The checkpoints of a job",
        Some("Answer"),
    ),
    post(
        "/tokenize",
        "A text or a conversation as tokens",
        (&[tokens::TOKENIZE], &[]),
        Some("Tokens"),
    ),
    post(
        "/detokenize",
        "Tokens as text",
        (&[tokens::DETOKENIZE], &["tokens"]),
        Some("Text"),
    ),
    get(
        "/tokenizer_info",
        "What the tokenizer is",
        Some("TokenizerInfo"),
    ),
    get("/health", "Whether the server runs", Some("Health")),
    get("/ready", "Whether it takes requests", Some("Ready")),
    get("/metrics", "Metrics in Prometheus' form", None),
];

/// Schemas of answers. They say what is always there, and leave room for more.
const ANSWERS: &str = r##"{
    "Error": {"type": "object", "required": ["error"], "properties": {"error": {
        "type": "object", "required": ["message", "type", "code"], "properties": {
            "message": {"type": "string"}, "type": {"type": "string"}, "param": {"type": ["string", "null"]}, "code": {"type": "string"}}}}},
    "Usage": {"type": "object", "required": ["prompt_tokens", "completion_tokens", "total_tokens"], "properties": {
        "prompt_tokens": {"type": "integer"}, "completion_tokens": {"type": "integer"}, "total_tokens": {"type": "integer"},
        "prompt_tokens_details": {"type": "object", "properties": {"cached_tokens": {"type": "integer"}}}}},
    "FinishReason": {"enum": ["stop", "length", "tool_calls"]},
    "ChatCompletion": {"type": "object", "required": ["id", "object", "created", "model", "choices", "usage"], "properties": {
        "id": {"type": "string"}, "object": {"const": "chat.completion"}, "created": {"type": "integer"}, "model": {"type": "string"},
        "choices": {"type": "array", "items": {"type": "object", "required": ["index", "message", "finish_reason"], "properties": {
            "index": {"type": "integer"}, "finish_reason": {"$ref": "#/components/schemas/FinishReason"},
            "logprobs": {"type": ["object", "null"]},
            "message": {"type": "object", "required": ["role", "content"], "properties": {
                "role": {"const": "assistant"}, "content": {"type": ["string", "null"]}, "tool_calls": {"type": "array"}}}}}},
        "usage": {"$ref": "#/components/schemas/Usage"}}},
    "Completion": {"type": "object", "required": ["id", "object", "created", "model", "choices", "usage"], "properties": {
        "id": {"type": "string"}, "object": {"const": "text_completion"}, "created": {"type": "integer"}, "model": {"type": "string"},
        "choices": {"type": "array", "items": {"type": "object", "required": ["index", "text", "finish_reason"], "properties": {
            "index": {"type": "integer"}, "text": {"type": "string"}, "finish_reason": {"$ref": "#/components/schemas/FinishReason"},
            "logprobs": {"type": ["object", "null"]}}}},
        "usage": {"$ref": "#/components/schemas/Usage"}}},
    "Model": {"type": "object", "required": ["id", "object", "created", "owned_by", "parent"], "properties": {
        "id": {"type": "string"}, "object": {"const": "model"}, "created": {"type": "integer"}, "owned_by": {"type": "string"},
        "parent": {"type": ["string", "null"]}, "max_model_len": {"type": "integer"}}},
    "Models": {"type": "object", "required": ["object", "data"], "properties": {
        "object": {"const": "list"}, "data": {"type": "array", "items": {"$ref": "#/components/schemas/Model"}}}},
    "Adapter": {"type": "object", "required": ["id", "generation", "resident", "pinned", "requests", "running"], "properties": {
        "id": {"type": "string"}, "generation": {"type": "integer"}, "resident": {"type": "boolean"}, "pinned": {"type": "boolean"},
        "requests": {"type": "integer"}, "running": {"type": "integer"}, "error": {"type": ["string", "null"]}}},
    "Adapters": {"type": "object", "required": ["object", "data", "memory"], "properties": {
        "object": {"const": "list"}, "data": {"type": "array", "items": {"$ref": "#/components/schemas/Adapter"}},
        "memory": {"type": "object", "required": ["used", "limit"], "properties": {
            "used": {"type": "integer"}, "limit": {"type": ["integer", "null"]}}}}},
    "Tokens": {"type": "object", "required": ["count", "max_model_len", "tokens"], "properties": {
        "count": {"type": "integer"}, "max_model_len": {"type": "integer"},
        "tokens": {"type": "array", "items": {"type": "integer"}}, "token_strs": {"type": ["array", "null"], "items": {"type": "string"}}}},
    "Text": {"type": "object", "required": ["prompt"], "properties": {"prompt": {"type": "string"}}},
    "TokenizerInfo": {"type": "object", "required": ["tokenizer_class", "eos_token"], "properties": {
        "tokenizer_class": {"type": "string"}, "eos_token": {"type": "string"}, "bos_token": {"type": ["string", "null"]},
        "chat_template": {"type": ["string", "null"]}}},
    "Health": {"type": "object", "required": ["status", "model", "running", "waiting"], "properties": {
        "status": {"type": "string"}, "model": {"type": "string"}, "running": {"type": "integer"}, "waiting": {"type": "integer"}}},
    "Answer": {"type": "object", "properties": {"object": {"type": "string"}, "id": {"type": "string"}}},
    "Ready": {"type": "object", "required": ["status"], "properties": {"status": {"type": "string"}}}
}"##;

/// The document of a route.
fn operation(route: &Route, caps: &Caps) -> Value {
    let reference = |name: &str| json!({"$ref": format!("#/components/schemas/{name}")});
    let of_json = |schema: Value| json!({"application/json": {"schema": schema}});
    let mut content = match route.answer {
        Some(name) => of_json(reference(name)),
        None => json!({"text/plain": {"schema": {"type": "string"}}}),
    };
    if matches!(route.answer, Some("ChatCompletion" | "Completion")) {
        content["text/event-stream"] = json!({"schema": {}});
    }
    let mut operation = json!({
        "summary": route.summary,
        "responses": {
            "200": {"description": "Done", "content": content},
            "default": {"description": "An error", "content": of_json(reference("Error"))},
        },
    });
    if let Some((tables, required)) = route.body {
        operation["requestBody"] =
            json!({"required": true, "content": of_json(schema(tables, required, caps))});
    }
    if route.path.contains("{id}") {
        operation["parameters"] = json!([{"name": "id", "in": "path", "required": true, "schema": {"type": "string", "minLength": 1}}]);
    }
    operation
}

/// The document.
pub(super) async fn document(
    State(server): State<Arc<Server>>,
    headers: HeaderMap,
) -> Result<Json<Value>, ApiError> {
    server.keys.caller(&headers)?;
    let mut paths = Map::new();
    for route in ROUTES {
        let entry = paths.entry(route.path).or_insert_with(|| json!({}));
        entry[route.method] = operation(route, &server.caps);
    }
    let schemas: Value = serde_json::from_str(ANSWERS).unwrap_or_default();
    Ok(Json(json!({
        "openapi": "3.1.0",
        "info": {"title": "lowrank serve", "version": env!("CARGO_PKG_VERSION")},
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}, {}],
    })))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_answer_has_a_schema() {
        let schemas: Value = serde_json::from_str(ANSWERS).expect("JSON");
        for route in ROUTES {
            if let Some(name) = route.answer {
                assert!(schemas[name].is_object(), "{name}");
            }
        }
    }
}
