//! What is served, and how it fares: models, adapters, health, metrics.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::SystemTime;

use axum::Json;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::fields::{self, Field, Kind, field};
use super::{Body, whole};
use crate::error::ApiError;
use crate::objects::unix;
use crate::registry::About;
use crate::server::Server;
use crate::sync::lock;

type Shared = State<Arc<Server>>;

/// Fields of `/v1/load_lora_adapter`, vLLM's and a few of our own.
pub(crate) const LOAD: &[Field] = &[
    field(
        "lora_name",
        Kind::Text,
        "The name that requests give as model",
    ),
    field(
        "lora_path",
        Kind::Text,
        "The adapter's folder, inside of --adapter-dir",
    ),
    field(
        "load_inplace",
        Kind::Bool,
        "Replace an adapter of this name; requests under way keep theirs [false]",
    ),
    field(
        "expected_generation",
        Kind::Integer(0..=i64::MAX),
        "Replace this generation alone",
    ),
    field("base_model_name", Kind::Ignored, "Ignored"),
    field("is_3d_lora_weight", Kind::Ignored, "Ignored"),
];

/// Fields of `/v1/unload_lora_adapter`.
pub(crate) const UNLOAD: &[Field] = &[
    field("lora_name", Kind::Text, "The adapter's name"),
    field("lora_int_id", Kind::Ignored, "Ignored"),
];

/// Fields of `/v1/adapters/{id}/pin`.
pub(crate) const PIN: &[Field] = &[field(
    "pinned",
    Kind::Bool,
    "Whether its values stay in memory",
)];

pub(super) async fn models(
    State(server): Shared,
    headers: HeaderMap,
) -> Result<Json<Value>, ApiError> {
    server.keys.caller(&headers)?;
    let mut data = vec![base_object(&server)];
    let all = server.registry.offered();
    data.extend(all.iter().map(|about| model_object(&server, about)));
    Ok(Json(json!({"object": "list", "data": data})))
}

pub(super) async fn model(
    State(server): Shared,
    headers: HeaderMap,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    server.keys.caller(&headers)?;
    if id == server.name {
        return Ok(Json(base_object(&server)));
    }
    match server.registry.get(&id) {
        Some(about) => Ok(Json(model_object(&server, &about))),
        None => Err(ApiError::no_model(&id, &server.name)),
    }
}

fn base_object(server: &Server) -> Value {
    json!({
        "id": server.name,
        "object": "model",
        "created": unix(server.started),
        "owned_by": "lowrank",
        "root": server.name,
        "parent": null,
        "max_model_len": server.base.decoder.config().longest_sequence(),
    })
}

fn model_object(server: &Server, about: &About) -> Value {
    json!({
        "id": about.id,
        "object": "model",
        "created": about.created,
        "owned_by": "lowrank",
        "root": about.id,
        "parent": server.name,
        "max_model_len": server.base.decoder.config().longest_sequence(),
        "lowrank": {"generation": about.generation, "method": about.method, "rank": about.rank},
    })
}

pub(super) async fn adapters(
    State(server): Shared,
    headers: HeaderMap,
) -> Result<Json<Value>, ApiError> {
    server.keys.caller(&headers)?.require_admin()?;
    Ok(Json(json!({
        "object": "list",
        "data": server.registry.offered(),
        "memory": {"used": server.registry.bytes(), "limit": server.registry.memory()},
    })))
}

pub(super) async fn pin(
    State(server): Shared,
    headers: HeaderMap,
    Path(id): Path<String>,
    body: Body,
) -> Result<Json<Value>, ApiError> {
    server.keys.caller(&headers)?.require_admin()?;
    let body = fields::Body::read(&whole(body)?, &[PIN])?;
    let about = server
        .registry
        .pin(&id, body.bool("pinned").unwrap_or(true))
        .await?;
    Ok(Json(json!(about)))
}

pub(super) async fn load(
    State(server): Shared,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    server.keys.caller(&headers)?.require_admin()?;
    let body = fields::Body::read(&whole(body)?, &[LOAD])?;
    let name = body.require_text("lora_name")?;
    let path = body.require_text("lora_path")?;
    let in_place = body.bool("load_inplace").unwrap_or(false);
    let expected = body
        .count("expected_generation")
        .map(|generation| generation as u64);
    server.registry.load(name, path, in_place, expected).await?;
    Ok(format!("Success: LoRA adapter '{name}' added successfully.").into_response())
}

pub(super) async fn unload(
    State(server): Shared,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    server.keys.caller(&headers)?.require_admin()?;
    let body = fields::Body::read(&whole(body)?, &[UNLOAD])?;
    let name = body.require_text("lora_name")?;
    if let Some(number) = server.registry.unload(name)? {
        server.forget(number);
    }
    Ok(format!("Success: LoRA adapter '{name}' removed successfully.").into_response())
}

pub(super) async fn health(State(server): Shared) -> Json<Value> {
    let load = &server.engine.load;
    Json(json!({
        "status": "ok",
        "model": server.name,
        "running": load.running.load(Ordering::SeqCst),
        "waiting": load.waiting.load(Ordering::SeqCst),
    }))
}

/// Whether new requests are taken.
pub(super) async fn ready(State(server): Shared) -> Response {
    if server.engine.load.is_draining.load(Ordering::SeqCst) {
        let status = StatusCode::SERVICE_UNAVAILABLE;
        return (status, Json(json!({"status": "draining"}))).into_response();
    }
    Json(json!({"status": "ready"})).into_response()
}

/// The metrics in Prometheus' text form.
pub(super) async fn metrics(
    State(server): Shared,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    server.keys.caller(&headers)?;
    let all = server.registry.list();
    if let Ok(jobs) = &server.jobs {
        jobs.measure();
    }
    let running = all.iter().filter(|about| about.running > 0);
    let running: Vec<&str> = running.map(|about| about.id.as_str()).collect();
    let resident = all.iter().filter(|about| about.resident).count();
    metrics::gauge!("lowrank_adapters_resident").set(resident as f64);
    metrics::gauge!("lowrank_adapters_known").set(all.len() as f64);
    metrics::gauge!("lowrank_adapter_memory_bytes").set(server.registry.bytes() as f64);
    let mut text = crate::metrics::render();
    // A gauge whose value is the time, as vLLM gives it and gateways read it.
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let now = now.map_or(0.0, |since| since.as_secs_f64());
    let waiting = lock(&server.engine.load.waiting_parties).clone();
    let waiting: Vec<&str> = waiting.iter().map(|party| &**party).collect();
    let waiting = waiting.into_iter().filter(|party| *party != server.name);
    let info = format!(
        "# HELP vllm:lora_requests_info Adapters with requests under way or waiting.\n# TYPE vllm:lora_requests_info gauge\n\
         vllm:lora_requests_info{{max_lora=\"{}\",running_lora_adapters=\"{}\",waiting_lora_adapters=\"{}\"}} {now}",
        all.len(),
        running.join(","),
        waiting.collect::<Vec<_>>().join(","),
    );
    text.push_str(&info);
    let kind = "text/plain; version=0.0.4; charset=utf-8";
    Ok(([(header::CONTENT_TYPE, kind)], text).into_response())
}
