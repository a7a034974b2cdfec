//! The routes.

mod answer;
mod chat;
mod completions;
pub(crate) mod fields;
mod manage;
mod openapi;
mod page;
mod text;
mod tokens;
mod vectors;
pub(crate) mod wanted;

use std::sync::Arc;
use std::time::Instant;

use axum::Router;
use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, MatchedPath, Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};

use crate::error::ApiError;
use crate::server::Server;

pub(crate) use answer::{events, new_id};

/// All routes of a server.
pub(crate) fn router(server: Arc<Server>) -> Router {
    let body = server.caps.body;
    let mut router = Router::new()
        .route("/v1/chat/completions", post(chat_route))
        .route("/v1/completions", post(completions_route))
        .route("/v1/embeddings", post(vectors::embeddings))
        .route("/v1/classify", post(vectors::classify))
        .route("/classify", post(vectors::classify))
        .route("/v1/models", get(manage::models))
        .route("/v1/models/{*id}", get(manage::model))
        .route("/v1/adapters", get(manage::adapters))
        .route("/v1/adapters/{id}/pin", post(manage::pin))
        .route("/v1/load_lora_adapter", post(manage::load))
        .route("/v1/unload_lora_adapter", post(manage::unload))
        .route("/tokenize", post(tokens::tokenize))
        .route("/detokenize", post(tokens::detokenize))
        .route("/tokenizer_info", get(tokens::info))
        .route("/health", get(manage::health))
        .route("/ready", get(manage::ready))
        .route("/metrics", get(manage::metrics))
        .route("/openapi.json", get(openapi::document));
    router = page::add(router);
    router = crate::jobs::add(router);
    router
        .fallback(async || {
            ApiError::not_found(
                "not_found",
                "there is no such route; GET /openapi.json lists them",
            )
        })
        .method_not_allowed_fallback(async || {
            ApiError::new(
                StatusCode::METHOD_NOT_ALLOWED,
                "method_not_allowed",
                "the route has another method; GET /openapi.json lists them",
            )
        })
        .layer(DefaultBodyLimit::max(body))
        .layer(tower_http::catch_panic::CatchPanicLayer::custom(
            |_: Box<dyn std::any::Any + Send>| {
                ApiError::internal("the server met a fault of its own; its log says more")
                    .into_response()
            },
        ))
        .layer(middleware::from_fn_with_state(Arc::clone(&server), observe))
        .with_state(server)
}

/// A request that a caller may make, and its body.
pub(crate) type Body = Result<Bytes, axum::extract::rejection::BytesRejection>;

/// The body, or why there is none.
pub(crate) fn whole(body: Body) -> Result<Bytes, ApiError> {
    body.map_err(|error| {
        let status = error.status();
        if status == StatusCode::PAYLOAD_TOO_LARGE {
            return ApiError::new(
                status,
                "body_too_large",
                "the body is larger than this server takes",
            );
        }
        ApiError::bad_request("unreadable_body", error.body_text())
    })
}

async fn chat_route(
    State(server): State<Arc<Server>>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    let caller = server.keys.caller(&headers)?;
    let turn = server.keys.enter(&caller, server.caps.requests_per_key)?;
    chat::chat(server, turn, &whole(body)?).await
}

async fn completions_route(
    State(server): State<Arc<Server>>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    let caller = server.keys.caller(&headers)?;
    let turn = server.keys.enter(&caller, server.caps.requests_per_key)?;
    completions::complete(server, turn, &whole(body)?).await
}

/// Gives every answer a request id, counts it and writes a line of the access log.
async fn observe(State(_server): State<Arc<Server>>, request: Request, next: Next) -> Response {
    let begun = Instant::now();
    let id = request
        .headers()
        .get("x-request-id")
        .filter(|id| id.len() <= 128)
        .cloned()
        .or_else(|| HeaderValue::from_str(&new_id("req-")).ok());
    let path = request.extensions().get::<MatchedPath>();
    let path = path.map_or("other", MatchedPath::as_str).to_owned();
    let method = request.method().clone();
    let mut response = next.run(request).await;
    let status = response.status();
    let shown = id
        .as_ref()
        .and_then(|id| id.to_str().ok())
        .unwrap_or_default();
    tracing::info!(
        target: "lowrank_serve::access",
        "{method} {path} {} {:.1} ms {shown}",
        status.as_u16(),
        begun.elapsed().as_secs_f64() * 1e3
    );
    metrics::counter!(
        "http_requests_total",
        "handler" => path, "method" => method.to_string(), "status" => status.as_u16().to_string()
    )
    .increment(1);
    if let Some(id) = id {
        response.headers_mut().insert("x-request-id", id);
    }
    response
}
