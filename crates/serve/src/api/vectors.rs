//! `/v1/embeddings` and `/v1/classify`.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::HeaderMap;
use serde_json::Value;

use super::{Body, whole};
use crate::error::ApiError;
use crate::server::Server;

/// Vectors of texts, of an encoder.
pub(super) async fn embeddings(
    State(server): State<Arc<Server>>,
    headers: HeaderMap,
    body: Body,
) -> Result<Json<Value>, ApiError> {
    server.keys.caller(&headers)?;
    whole(body)?;
    Err(no_encoder(&server))
}

/// Labels of texts, of a classifier.
pub(super) async fn classify(
    State(server): State<Arc<Server>>,
    headers: HeaderMap,
    body: Body,
) -> Result<Json<Value>, ApiError> {
    server.keys.caller(&headers)?;
    whole(body)?;
    Err(no_encoder(&server))
}

fn no_encoder(server: &Server) -> ApiError {
    ApiError::bad_request(
        "unsupported_by_model",
        format!(
            "{} is a language model; vectors and labels are of encoders and classifiers",
            server.name
        ),
    )
}
