//! Every error that a client of the data port can get, and its face: status, type and code.
//!
//! Detail for the operator goes to the log, never into the message of an internal or upstream error.

use std::borrow::Cow;
use std::time::Duration;

/// The error that ends a request. One flat list, named by what the client can do about it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GatewayError {
    /// No key was presented.
    #[error("no API key: send it as `Authorization: Bearer KEY`")]
    MissingApiKey,
    /// The key is unknown, revoked or expired; the same words for all three.
    #[error("the API key is not valid")]
    InvalidApiKey,
    /// The key may not use the model.
    #[error("the API key may not use the model `{0}`")]
    ModelNotAllowed(String),
    /// The key may not use the route.
    #[error("the API key may not use this route")]
    RouteNotAllowed,
    /// No such model.
    #[error("the model `{0}` does not exist")]
    ModelNotFound(String),
    /// No route matches.
    #[error("there is nothing at this path")]
    NotFound,
    /// The path exists, the method does not; carries the `Allow` header.
    #[error("this path does not take that method; it takes {allow}")]
    MethodNotAllowed {
        /// Value of the `Allow` header.
        allow: String,
    },
    /// The request is malformed.
    #[error("{message}")]
    BadRequest {
        /// Which rule was broken.
        code: BadRequest,
        /// The field at fault, if one is.
        param: Option<Cow<'static, str>>,
        /// What is wrong, for the client.
        message: String,
    },
    /// The body is larger than allowed.
    #[error("the request body is larger than {limit} bytes")]
    BodyTooLarge {
        /// The limit in bytes.
        limit: u64,
    },
    /// The header is larger than allowed.
    #[error("the request headers are too large")]
    HeadersTooLarge,
    /// The request target is longer than allowed.
    #[error("the request URI is too long")]
    UriTooLong,
    /// The body is not JSON by its `Content-Type`, or is encoded.
    #[error("{0}")]
    UnsupportedMediaType(&'static str),
    /// An `Expect` other than `100-continue`.
    #[error("only `Expect: 100-continue` is understood")]
    ExpectationFailed,
    /// The body did not arrive in time.
    #[error("the request did not arrive in time")]
    RequestTimeout,
    /// A limit refused the call.
    #[error("{}", .0.message())]
    Limited(Box<Refusal>),
    /// Every target answered 429 or cools down.
    #[error("every upstream of this model is rate limited, try again later")]
    UpstreamRateLimited {
        /// The soonest time at which one may answer again.
        retry_after: Option<Duration>,
    },
    /// The limit store is away and the policy is `closed`.
    #[error("limits cannot be checked at the moment")]
    StoreUnavailable,
    /// The guard refused the content.
    #[error("the content was refused by a content rule")]
    ContentBlocked,
    /// No node could be reached.
    #[error("the upstream could not be reached")]
    UpstreamUnreachable,
    /// The upstream answered with an error of its own, or broke off.
    #[error("the upstream failed to answer")]
    UpstreamError,
    /// The upstream did not answer in time.
    #[error("the upstream did not answer in time")]
    UpstreamTimeout,
    /// No node is up, or the gateway sheds load, or it drains.
    #[error("{}", .0.message())]
    Unavailable(Unavailable),
    /// A defect of ours; the log has the detail.
    #[error("an internal error occurred")]
    Internal,
}

/// The rule that a malformed request broke.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum BadRequest {
    /// The body is not JSON; the message has the byte offset.
    InvalidJson,
    /// A field occurs twice at the top level.
    DuplicateField,
    /// A field has a wrong type or value.
    InvalidRequest,
    /// `Content-Length` and `Transfer-Encoding` contradict each other.
    AmbiguousFraming,
    /// The path cannot be brought into one canonical form.
    InvalidPath,
    /// The `Host` is missing, doubled or malformed.
    InvalidHost,
    /// The field is not accepted toward LLM nodes.
    FieldNotAllowed,
    /// A key was sent in the query string.
    KeyInQuery,
    /// An upgrade was asked for where the route allows none.
    UpgradeNotAllowed,
}

/// Why the gateway cannot serve at the moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Unavailable {
    /// All nodes of the upstream are out.
    NoHealthyUpstream,
    /// A limit of the gateway itself is reached.
    Overloaded,
    /// The gateway is shutting down.
    Draining,
}

impl Unavailable {
    const fn message(self) -> &'static str {
        match self {
            Self::NoHealthyUpstream => "no healthy upstream node is left",
            Self::Overloaded => "the gateway is overloaded, try again soon",
            Self::Draining => "the gateway is shutting down, try again",
        }
    }
}

/// A refusal by a limit: which scope and dimension bound, and how long to wait.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// `key`, `route:NAME`, `model:NAME` or `global`.
    pub scope: String,
    /// The dimension that bound, like `requests_per_minute`.
    pub dimension: &'static str,
    /// Its limit.
    pub limit: u64,
    /// Until the same call could be admitted; `None` if never (larger than the limit itself).
    pub wait: Option<Duration>,
    /// What kind of limit it is, for the code.
    pub kind: LimitKind,
}

/// Kinds of limits as the client tells them apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum LimitKind {
    /// A rolling rate.
    Rate,
    /// A calendar budget (day, month).
    Quota,
    /// Calls at the same time.
    Concurrency,
}

impl Refusal {
    fn message(&self) -> String {
        let scope = &self.scope;
        let what = self.dimension.replace('_', " ");
        let limit = self.limit;
        match (self.kind, self.wait) {
            (LimitKind::Concurrency, _) => format!("too many calls at the same time: {scope} allows {limit} ({what})"),
            (_, None) => format!("this call alone is larger than the limit of {limit} {what} of {scope}"),
            (_, Some(wait)) => {
                format!("limit reached: {scope} allows {limit} {what}; try again in {} s", wait.as_secs_f64().ceil())
            }
        }
    }
}

/// How an error looks from outside, whatever the dialect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Face {
    /// HTTP status.
    pub status: u16,
    /// OpenAI's `type`.
    pub kind: &'static str,
    /// The code word of the contract.
    pub code: &'static str,
}

impl GatewayError {
    /// A malformed request without a field to name.
    pub fn bad(code: BadRequest, message: impl Into<String>) -> Self {
        Self::BadRequest { code, param: None, message: message.into() }
    }

    /// A malformed request with the field at fault.
    pub fn bad_field(code: BadRequest, param: impl Into<Cow<'static, str>>, message: impl Into<String>) -> Self {
        Self::BadRequest { code, param: Some(param.into()), message: message.into() }
    }

    /// Status, type and code.
    pub fn face(&self) -> Face {
        let (status, kind, code) = match self {
            Self::MissingApiKey => (401, "invalid_request_error", "missing_api_key"),
            Self::InvalidApiKey => (401, "invalid_request_error", "invalid_api_key"),
            Self::ModelNotAllowed(_) => (403, "permission_error", "model_not_allowed"),
            Self::RouteNotAllowed => (403, "permission_error", "route_not_allowed"),
            Self::ModelNotFound(_) => (404, "invalid_request_error", "model_not_found"),
            Self::NotFound => (404, "invalid_request_error", "not_found"),
            Self::MethodNotAllowed { .. } => (405, "invalid_request_error", "method_not_allowed"),
            Self::BadRequest { code, .. } => (400, "invalid_request_error", code.as_str()),
            Self::BodyTooLarge { .. } => (413, "invalid_request_error", "body_too_large"),
            Self::HeadersTooLarge => (431, "invalid_request_error", "headers_too_large"),
            Self::UriTooLong => (414, "invalid_request_error", "uri_too_long"),
            Self::UnsupportedMediaType(_) => (415, "invalid_request_error", "unsupported_media_type"),
            Self::ExpectationFailed => (417, "invalid_request_error", "expectation_failed"),
            Self::RequestTimeout => (408, "invalid_request_error", "request_timeout"),
            Self::Limited(refusal) => refusal.kind.face(refusal.dimension),
            Self::UpstreamRateLimited { .. } => (429, "rate_limit_error", "upstream_rate_limited"),
            Self::StoreUnavailable => (503, "server_error", "store_unavailable"),
            Self::ContentBlocked => (403, "permission_error", "content_blocked"),
            Self::UpstreamUnreachable => (502, "server_error", "upstream_unreachable"),
            Self::UpstreamError => (502, "server_error", "upstream_error"),
            Self::UpstreamTimeout => (504, "server_error", "upstream_timeout"),
            Self::Unavailable(Unavailable::NoHealthyUpstream) => (503, "server_error", "no_healthy_upstream"),
            Self::Unavailable(Unavailable::Overloaded) => (503, "server_error", "overloaded"),
            Self::Unavailable(Unavailable::Draining) => (503, "server_error", "draining"),
            Self::Internal => (500, "server_error", "internal_error"),
        };
        Face { status, kind, code }
    }

    /// The field at fault, if one is.
    pub fn param(&self) -> Option<&str> {
        match self {
            Self::BadRequest { param, .. } => param.as_deref(),
            Self::ModelNotFound(_) | Self::ModelNotAllowed(_) => Some("model"),
            _ => None,
        }
    }

    /// How long the client should wait, where waiting helps.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Limited(refusal) => refusal.wait,
            Self::UpstreamRateLimited { retry_after } => *retry_after,
            Self::StoreUnavailable | Self::Unavailable(_) => Some(Duration::from_secs(1)),
            _ => None,
        }
    }
}

impl LimitKind {
    const fn face(self, dimension: &str) -> (u16, &'static str, &'static str) {
        // OpenAI's `type` of a 429 says what ran out: `requests` or `tokens`.
        let unit = if matches!(dimension.as_bytes().first(), Some(b't')) { "tokens" } else { "requests" };
        match self {
            Self::Rate => (429, unit, "rate_limit_exceeded"),
            Self::Quota => (429, unit, "quota_exceeded"),
            Self::Concurrency => (429, "requests", "concurrency_exceeded"),
        }
    }
}

impl BadRequest {
    /// The code word of the contract.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::InvalidJson => "invalid_json",
            Self::DuplicateField => "duplicate_field",
            Self::InvalidRequest => "invalid_request",
            Self::AmbiguousFraming => "ambiguous_framing",
            Self::InvalidPath => "invalid_path",
            Self::InvalidHost => "invalid_host",
            Self::FieldNotAllowed => "field_not_allowed",
            Self::KeyInQuery => "key_in_query",
            Self::UpgradeNotAllowed => "upgrade_not_allowed",
        }
    }
}

/// Result with the error of the data port.
pub type Result<T, E = GatewayError> = std::result::Result<T, E>;
