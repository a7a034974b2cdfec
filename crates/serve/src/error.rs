//! Errors as OpenAI's clients read them.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

/// What a request is answered with where it cannot be served: `{"error": {"message", "type", "param", "code"}}`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ApiError {
    /// The status.
    pub(crate) status: StatusCode,
    /// A stable name of the case, for programs.
    pub(crate) code: &'static str,
    /// What was found and how to mend it, for people.
    pub(crate) message: String,
    /// The field that is at fault.
    pub(crate) param: Option<String>,
    /// Seconds after which another try may succeed.
    pub(crate) retry_after: Option<u64>,
}

impl ApiError {
    /// An error of this status.
    pub(crate) fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self {
            status,
            code,
            message: message.into(),
            param: None,
            retry_after: None,
        }
    }

    /// A field whose value cannot be used.
    pub(crate) fn invalid(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            param: Some(param.into()),
            ..Self::new(StatusCode::BAD_REQUEST, "invalid_value", message)
        }
    }

    /// A request that cannot be served as it is.
    pub(crate) fn bad_request(code: &'static str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, code, message)
    }

    /// Something that is not there.
    pub(crate) fn not_found(code: &'static str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, code, message)
    }

    /// A model that is neither the base nor an adapter.
    pub(crate) fn no_model(name: &str, base: &str) -> Self {
        let message = format!(
            "there is no model {name:?}; the base is {base:?}, and GET /v1/models lists the adapters"
        );
        Self {
            param: Some("model".to_owned()),
            ..Self::not_found("model_not_found", message)
        }
    }

    /// A request that the server has no room for now.
    pub(crate) fn busy(code: &'static str, message: impl Into<String>, seconds: u64) -> Self {
        Self {
            retry_after: Some(seconds),
            ..Self::new(StatusCode::TOO_MANY_REQUESTS, code, message)
        }
    }

    /// A fault of the server.
    pub(crate) fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "internal_error", message)
    }

    /// Something that cannot be kept or taken from the disk. The log says why; the answer is to have no path of the server.
    pub(crate) fn storage(what: &str, why: impl std::fmt::Display) -> Self {
        tracing::warn!("{what}: {why}");
        Self {
            code: "storage_failed",
            ..Self::internal(format!("{what}; the server's log says why"))
        }
    }

    fn kind(&self) -> &'static str {
        match self.status {
            StatusCode::UNAUTHORIZED => "authentication_error",
            StatusCode::FORBIDDEN => "permission_error",
            StatusCode::NOT_FOUND => "not_found_error",
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            status if status.is_server_error() => "server_error",
            _ => "invalid_request_error",
        }
    }

    /// The body.
    pub(crate) fn body(&self) -> Value {
        json!({"error": {
            "message": self.message,
            "type": self.kind(),
            "param": self.param,
            "code": self.code,
        }})
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        let headers = response.headers_mut();
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        match self.retry_after {
            Some(seconds) => {
                headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
            }
            // openai-python tries some statuses again unless it is told that this is of no use.
            None if self.status != StatusCode::SERVICE_UNAVAILABLE => {
                headers.insert("x-should-retry", HeaderValue::from_static("false"));
            }
            None => {}
        }
        response
    }
}
