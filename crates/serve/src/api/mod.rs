//! The routes.

mod answer;
mod chat;
mod completions;
pub(crate) mod fields;
mod manage;
mod openapi;
mod origin;
mod page;
mod text;
mod tokens;
mod vectors;
pub(crate) mod wanted;

use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, FromRequest, MatchedPath, Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{IntoMakeService, get, post};
use axum::{Router, ServiceExt};
use tower_http::normalize_path::NormalizePath;

use crate::error::ApiError;
use crate::objects::new_id;
use crate::server::Server;

pub(crate) use answer::events;

/// How long a client has for a body.
const BODY_TIME: Duration = Duration::from_secs(120);

/// What answers connections: all routes, with or without a slash at their end.
pub(crate) fn service(server: Arc<Server>) -> IntoMakeService<NormalizePath<Router>> {
    let routes = NormalizePath::trim_trailing_slash(router(server));
    ServiceExt::<Request>::into_make_service(routes)
}

/// All routes of a server.
fn router(server: Arc<Server>) -> Router {
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
        .layer(middleware::from_fn_with_state(Arc::clone(&server), guard))
        .layer(middleware::from_fn(observe))
        .with_state(server)
}

/// The body of a request, or why there is none.
pub(crate) struct Body(Result<Bytes, ApiError>);

impl FromRequest<Arc<Server>> for Body {
    type Rejection = Infallible;

    async fn from_request(request: Request, server: &Arc<Server>) -> Result<Self, Infallible> {
        let length = request.headers().get(header::CONTENT_LENGTH);
        let length = length.and_then(|length| length.to_str().ok()?.parse::<u64>().ok());
        if length.is_some_and(|length| length > server.caps.body as u64) {
            return Ok(Self(Err(too_large())));
        }
        let read = tokio::time::timeout(BODY_TIME, Bytes::from_request(request, server)).await;
        Ok(Self(match read {
            Ok(Ok(bytes)) => Ok(bytes),
            Ok(Err(error)) if error.status() == StatusCode::PAYLOAD_TOO_LARGE => Err(too_large()),
            Ok(Err(error)) => Err(ApiError::bad_request("unreadable_body", error.body_text())),
            Err(_) => Err(ApiError::new(
                StatusCode::REQUEST_TIMEOUT,
                "timeout",
                format!("the body did not come within {} s", BODY_TIME.as_secs()),
            )),
        }))
    }
}

fn too_large() -> ApiError {
    ApiError::new(
        StatusCode::PAYLOAD_TOO_LARGE,
        "body_too_large",
        "the body is larger than this server takes",
    )
}

/// The body, or why there is none.
pub(crate) fn whole(body: Body) -> Result<Bytes, ApiError> {
    body.0
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

/// The method's name; clients can make up others, which are one.
fn method_name(method: &Method) -> &'static str {
    match method.as_str() {
        "GET" => "GET",
        "POST" => "POST",
        "DELETE" => "DELETE",
        "HEAD" => "HEAD",
        "OPTIONS" => "OPTIONS",
        _ => "other",
    }
}

/// Lets no other site's page use a server without keys.
async fn guard(
    State(server): State<Arc<Server>>,
    request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    if let Some(is_loopback) = server.keys.open_on() {
        origin::check(request.method(), request.headers(), is_loopback)?;
    }
    Ok(next.run(request).await)
}

/// Gives every answer a request id, counts it and writes a line of the access log.
async fn observe(request: Request, next: Next) -> Response {
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
        "handler" => path, "method" => method_name(&method), "status" => status.as_u16().to_string()
    )
    .increment(1);
    if let Some(id) = id {
        response.headers_mut().insert("x-request-id", id);
    }
    response
}
