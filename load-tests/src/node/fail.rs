//! The node's error answers, in OpenAI's shape.

use http::header::{HeaderValue, RETRY_AFTER};
use http::{Response, StatusCode};
use serde_json::{Value, json};

use crate::record::CallGuard;
use crate::serve::Reply;

/// An error the node answers with.
#[derive(Debug)]
pub(crate) struct Refusal {
    pub(crate) status: u16,
    pub(crate) retry_after: Option<u32>,
    kind: &'static str,
    code: Option<&'static str>,
    param: Option<&'static str>,
    message: String,
}

impl Refusal {
    pub(crate) fn new(status: u16, kind: &'static str, code: Option<&'static str>, message: impl Into<String>) -> Self {
        Self { status, retry_after: None, kind, code, param: None, message: message.into() }
    }

    pub(crate) fn invalid(message: &str, param: Option<&'static str>) -> Self {
        Self { param, ..Self::new(400, "invalid_request_error", None, message) }
    }

    pub(crate) fn unknown_model(model: &str) -> Self {
        let message = format!("The model `{model}` is not served here.");
        Self { param: Some("model"), ..Self::new(404, "invalid_request_error", Some("model_not_found"), message) }
    }

    pub(crate) fn not_found() -> Self {
        Self::new(404, "invalid_request_error", None, "No such path, or not with this method.")
    }

    pub(crate) fn full() -> Self {
        Self::new(503, "server_error", Some("overloaded"), "The queue of this node is full.")
    }

    pub(crate) fn context_length() -> Self {
        let message = "The prompt is longer than the context of this model.";
        Self {
            param: Some("messages"),
            ..Self::new(400, "invalid_request_error", Some("context_length_exceeded"), message)
        }
    }

    pub(crate) fn content_filter() -> Self {
        let message = "The response was filtered as the prompt triggered the content policy.";
        Self { param: Some("prompt"), ..Self::new(400, "invalid_request_error", Some("content_filter"), message) }
    }

    /// What a fault asks for by its status.
    pub(crate) fn status(status: u16, retry_after: Option<u32>) -> Self {
        let (kind, code) = match status {
            401 => ("invalid_request_error", Some("invalid_api_key")),
            429 => ("requests", Some("rate_limit_exceeded")),
            400..500 => ("invalid_request_error", None),
            _ => ("server_error", None),
        };
        Self { retry_after, ..Self::new(status, kind, code, format!("Simulated fault: {status}.")) }
    }

    pub(crate) fn body(&self) -> Value {
        json!({"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}})
    }

    pub(crate) fn answer(&self, call: CallGuard) -> Response<Reply> {
        let status = StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = Reply::json(status, &self.body(), call);
        if let Some(after) = self.retry_after {
            response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(after));
        }
        response
    }
}
