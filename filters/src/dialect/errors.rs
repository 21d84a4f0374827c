//! The one writer of errors: a [`GatewayError`] as the body or the stream event that clients of a dialect expect.

use bytes::Bytes;
use serde::Serialize;

use super::Dialect;
use crate::error::{BadRequest, GatewayError};

/// The error as a JSON body in the dialect. `request_id` is used where the dialect has a place for it.
pub fn error_body(dialect: Dialect, error: &GatewayError, request_id: &str) -> Vec<u8> {
    let face = error.face();
    let message = error.to_string();
    match dialect {
        // A pass route without a dialect answers like OpenAI: every JSON client can at least show `error.message`.
        Dialect::Openai | Dialect::None => {
            let error = Openai { message: &message, kind: face.kind, param: error.param(), code: face.code };
            json(&Wrapped { error })
        }
        Dialect::Anthropic => {
            let error = Anthropic { kind: anthropic_type(face.status), message: &message };
            json(&AnthropicBody { kind: "error", error, request_id })
        }
        Dialect::Gemini => {
            let error = Gemini { code: face.status, message: &message, status: gemini_status(face.status) };
            json(&Wrapped { error })
        }
        Dialect::Dify => {
            json(&Dify { event: None, code: dify_code(error, face.code), message: &message, status: face.status })
        }
    }
}

/// The error as an event for a stream that has begun. What must follow is an unclean end: no terminal marker, no last chunk.
pub fn error_event(dialect: Dialect, error: &GatewayError, request_id: &str) -> Bytes {
    let face = error.face();
    let (head, body): (&[u8], Vec<u8>) = match dialect {
        Dialect::Anthropic => (b"event: error\ndata: ", error_body(dialect, error, request_id)),
        Dialect::Openai | Dialect::Gemini | Dialect::None => (b"data: ", error_body(dialect, error, request_id)),
        // Dify names its events inside the data.
        Dialect::Dify => {
            let message = error.to_string();
            let code = dify_code(error, face.code);
            (b"data: ", json(&Dify { event: Some("error"), code, message: &message, status: face.status }))
        }
    };
    let mut event = Vec::with_capacity(head.len() + body.len() + 2);
    event.extend_from_slice(head);
    event.extend_from_slice(&body);
    event.extend_from_slice(b"\n\n");
    event.into()
}

#[derive(Serialize)]
struct Wrapped<E> {
    error: E,
}

#[derive(Serialize)]
struct Openai<'a> {
    message: &'a str,
    #[serde(rename = "type")]
    kind: &'a str,
    param: Option<&'a str>,
    code: &'a str,
}

#[derive(Serialize)]
struct AnthropicBody<'a> {
    #[serde(rename = "type")]
    kind: &'a str,
    error: Anthropic<'a>,
    request_id: &'a str,
}

#[derive(Serialize)]
struct Anthropic<'a> {
    #[serde(rename = "type")]
    kind: &'a str,
    message: &'a str,
}

#[derive(Serialize)]
struct Gemini<'a> {
    code: u16,
    message: &'a str,
    status: &'a str,
}

#[derive(Serialize)]
struct Dify<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    event: Option<&'a str>,
    code: &'a str,
    message: &'a str,
    status: u16,
}

fn json(body: &impl Serialize) -> Vec<u8> {
    // Only strings and numbers are written into memory, which cannot fail; an empty body is still better than a panic.
    serde_json::to_vec(body).unwrap_or_default()
}

/// Anthropic's SDKs choose their exception by these words.
const fn anthropic_type(status: u16) -> &'static str {
    match status {
        401 => "authentication_error",
        403 => "permission_error",
        404 => "not_found_error",
        408 | 504 => "timeout_error",
        413 => "request_too_large",
        429 => "rate_limit_error",
        503 => "overloaded_error",
        500..=599 => "api_error",
        _ => "invalid_request_error",
    }
}

const fn gemini_status(status: u16) -> &'static str {
    match status {
        401 => "UNAUTHENTICATED",
        403 => "PERMISSION_DENIED",
        404 => "NOT_FOUND",
        408 | 504 => "DEADLINE_EXCEEDED",
        429 => "RESOURCE_EXHAUSTED",
        502 | 503 => "UNAVAILABLE",
        500..=599 => "INTERNAL",
        _ => "INVALID_ARGUMENT",
    }
}

/// Dify's word where Dify knows the case, else ours: its clients compare these words.
fn dify_code(error: &GatewayError, ours: &'static str) -> &'static str {
    match error {
        GatewayError::MissingApiKey | GatewayError::InvalidApiKey => "unauthorized",
        GatewayError::ModelNotAllowed(_) | GatewayError::RouteNotAllowed => "forbidden",
        GatewayError::NotFound => "not_found",
        GatewayError::MethodNotAllowed { .. } => "method_not_allowed",
        GatewayError::BadRequest { code, .. } => match code {
            BadRequest::InvalidJson => "bad_request",
            BadRequest::DuplicateField | BadRequest::InvalidRequest | BadRequest::FieldNotAllowed => "invalid_param",
            BadRequest::AmbiguousFraming
            | BadRequest::InvalidPath
            | BadRequest::InvalidHost
            | BadRequest::KeyInQuery
            | BadRequest::UpgradeNotAllowed => ours,
        },
        GatewayError::UnsupportedMediaType(_) => "unsupported_media_type",
        GatewayError::Limited(_) => "too_many_requests",
        // Dify's word for a model provider that answered 429.
        GatewayError::UpstreamRateLimited { .. } => "rate_limit_error",
        GatewayError::Internal => "internal_server_error",
        GatewayError::ModelNotFound(_)
        | GatewayError::BodyTooLarge { .. }
        | GatewayError::HeadersTooLarge
        | GatewayError::UriTooLong
        | GatewayError::ExpectationFailed
        | GatewayError::RequestTimeout
        | GatewayError::StoreUnavailable
        | GatewayError::ContentBlocked
        | GatewayError::UpstreamUnreachable
        | GatewayError::UpstreamError
        | GatewayError::UpstreamTimeout
        | GatewayError::Unavailable(_) => ours,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::error::{LimitKind, Refusal, Unavailable};

    fn body(dialect: Dialect, error: &GatewayError) -> Value {
        serde_json::from_slice(&error_body(dialect, error, "req-1")).unwrap()
    }

    #[test]
    fn openai_gets_message_type_param_and_code() {
        let error = GatewayError::bad_field(BadRequest::InvalidRequest, "stream", "`stream` must be true or false");
        let expected = json!({"error": {"message": "`stream` must be true or false", "type": "invalid_request_error",
            "param": "stream", "code": "invalid_request"}});
        assert_eq!(body(Dialect::Openai, &error), expected);
        assert_eq!(body(Dialect::Openai, &GatewayError::NotFound)["error"]["param"], Value::Null);
    }

    #[test]
    fn anthropic_gets_its_own_type_words_and_the_request_id() {
        let cases = [
            (GatewayError::InvalidApiKey, "authentication_error"),
            (GatewayError::RouteNotAllowed, "permission_error"),
            (GatewayError::ModelNotFound("x".into()), "not_found_error"),
            (GatewayError::BodyTooLarge { limit: 1 }, "request_too_large"),
            (GatewayError::UpstreamRateLimited { retry_after: None }, "rate_limit_error"),
            (GatewayError::Unavailable(Unavailable::Overloaded), "overloaded_error"),
            (GatewayError::UpstreamTimeout, "timeout_error"),
            (GatewayError::UpstreamError, "api_error"),
            (GatewayError::bad(BadRequest::InvalidJson, "no"), "invalid_request_error"),
        ];
        for (error, kind) in cases {
            let body = body(Dialect::Anthropic, &error);
            assert_eq!(body["type"], "error");
            assert_eq!(body["error"]["type"], kind, "{error:?}");
            assert_eq!(body["request_id"], "req-1");
        }
    }

    #[test]
    fn dify_gets_its_own_code_words_where_it_has_one() {
        let limited = GatewayError::Limited(Box::new(Refusal {
            scope: "key".into(),
            dimension: "requests_per_minute",
            limit: 5,
            wait: None,
            kind: LimitKind::Rate,
        }));
        let cases = [
            (GatewayError::MissingApiKey, "unauthorized", 401),
            (GatewayError::bad_field(BadRequest::InvalidRequest, "user", "no"), "invalid_param", 400),
            (GatewayError::bad(BadRequest::InvalidJson, "no"), "bad_request", 400),
            (GatewayError::NotFound, "not_found", 404),
            (limited, "too_many_requests", 429),
            (GatewayError::Internal, "internal_server_error", 500),
            (GatewayError::UpstreamTimeout, "upstream_timeout", 504),
        ];
        for (error, code, status) in cases {
            let body = body(Dialect::Dify, &error);
            assert_eq!(body["code"], code);
            assert_eq!(body["status"], status);
            assert_eq!(body["message"], error.to_string());
            assert_eq!(body.as_object().unwrap().len(), 3);
        }
    }

    #[test]
    fn an_error_event_is_one_whole_event_of_its_dialect() {
        let event =
            |dialect| String::from_utf8(error_event(dialect, &GatewayError::UpstreamError, "r").to_vec()).unwrap();
        let openai = event(Dialect::Openai);
        assert!(openai.starts_with("data: {\"error\":{\"message\":") && openai.ends_with("}}\n\n"), "{openai}");
        let anthropic = event(Dialect::Anthropic);
        assert!(anthropic.starts_with("event: error\ndata: {\"type\":\"error\","), "{anthropic}");
        let dify = event(Dialect::Dify);
        assert!(dify.starts_with("data: {\"event\":\"error\",\"code\":\"upstream_error\","), "{dify}");
        assert_eq!(dify.matches('\n').count(), 2);
    }

    #[test]
    fn quotes_and_line_breaks_in_a_message_stay_inside_the_json() {
        let error = GatewayError::ModelNotFound("a\"b\n\ndata: x".into());
        let event = error_event(Dialect::Openai, &error, "r");
        assert_eq!(event.iter().filter(|&&byte| byte == b'\n').count(), 2);
        assert_eq!(body(Dialect::Openai, &error)["error"]["message"], error.to_string());
    }
}
