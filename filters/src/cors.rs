//! CORS: which web pages may use a route, and what their browsers are told.
//!
//! Pure: it reads header values and gives header values. A preflight carries no key, so it is answered before `auth`.

use bytes::Bytes;
use http::header::{
    ACCESS_CONTROL_ALLOW_CREDENTIALS, ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS,
    ACCESS_CONTROL_ALLOW_ORIGIN, ACCESS_CONTROL_EXPOSE_HEADERS, ACCESS_CONTROL_MAX_AGE, ACCESS_CONTROL_REQUEST_HEADERS,
    ACCESS_CONTROL_REQUEST_METHOD, HeaderName, HeaderValue, ORIGIN, VARY,
};
use http::{Method, StatusCode};
use pingora_http::ResponseHeader;
use schemars::JsonSchema;
use serde::Deserialize;
use smallvec::{SmallVec, smallvec};

use crate::config::{ConfigError, Period};
use crate::error::{self, GatewayError};
use crate::exchange::{Arrival, Exchange};
use crate::filter::{Deps, Filter, Flow, Reply};

/// Headers to set on an answer. `vary` is to be appended to what is there, every other one replaces its namesakes.
pub type Headers = SmallVec<[(HeaderName, HeaderValue); 6]>;

/// What an upstream may have said about CORS itself; remove it from an answer before adding [`CorsPolicy::response`],
/// as browsers refuse an answer that says it twice.
pub const REPLACED: [HeaderName; 6] = [
    ACCESS_CONTROL_ALLOW_ORIGIN,
    ACCESS_CONTROL_ALLOW_CREDENTIALS,
    ACCESS_CONTROL_ALLOW_METHODS,
    ACCESS_CONTROL_ALLOW_HEADERS,
    ACCESS_CONTROL_EXPOSE_HEADERS,
    ACCESS_CONTROL_MAX_AGE,
];

/// The settings of the filter `cors`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Cors {
    /// Origins whose pages may use the route, like `https://app.example`; or `["*"]` for every page. There is no default.
    pub origins: Vec<String>,
    /// Methods that a page may use.
    pub methods: Vec<String>,
    /// Request headers that a page may send; `["*"]` for any.
    pub headers: Vec<String>,
    /// Response headers that a page may read.
    pub expose: Vec<String>,
    /// How long a browser may remember a preflight's answer.
    pub max_age: Period,
    /// Whether a page may send cookies and other credentials of its user. Not together with `origins: ["*"]`.
    pub credentials: bool,
}

impl Default for Cors {
    fn default() -> Self {
        let all = |words: &[&str]| words.iter().map(|&word| word.to_owned()).collect();
        Self {
            origins: Vec::new(),
            methods: all(&["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"]),
            headers: all(&["*"]),
            expose: all(&[
                "x-request-id",
                "x-tollgate-route",
                "x-tollgate-model",
                "x-tollgate-cache",
                "x-ratelimit-limit-requests",
                "x-ratelimit-remaining-requests",
                "x-ratelimit-reset-requests",
                "x-ratelimit-limit-tokens",
                "x-ratelimit-remaining-tokens",
                "x-ratelimit-reset-tokens",
                "ratelimit",
                "ratelimit-policy",
                "retry-after",
                "retry-after-ms",
                "x-should-retry",
            ]),
            max_age: Period::secs(600),
            credentials: false,
        }
    }
}

/// Which origins are let in.
#[derive(Debug, Clone)]
enum Origins {
    Any,
    These(Vec<HeaderValue>),
}

/// Which request headers a page may send.
#[derive(Debug, Clone)]
enum Allowed {
    Any,
    These { names: Vec<HeaderName>, line: HeaderValue },
}

/// Checked settings, ready to answer.
#[derive(Debug, Clone)]
pub struct CorsPolicy {
    origins: Origins,
    methods: Vec<Method>,
    methods_line: HeaderValue,
    headers: Allowed,
    expose: Option<HeaderValue>,
    max_age: HeaderValue,
    credentials: bool,
}

impl Cors {
    /// Checks the settings. `path` is their place in the configuration, like `routes[2].filters.cors`.
    ///
    /// # Errors
    /// No origin, something that is not an origin, a method or a header name, `*` beside others, or `*` with credentials.
    pub fn policy(&self, path: &str) -> Result<CorsPolicy, ConfigError> {
        let at = |field: &str| format!("{path}.{field}");
        let methods = self.methods.iter().enumerate().map(|(n, text)| method(text, &at(&format!("methods[{n}]"))));
        let methods = methods.collect::<Result<Vec<_>, _>>()?;
        let headers = match self.headers.as_slice() {
            [any] if any == "*" => Allowed::Any,
            named => {
                let names = header_names(named, &at("headers"))?;
                Allowed::These { line: list(&names, &at("headers"))?, names }
            }
        };
        let expose = header_names(&self.expose, &at("expose"))?;
        Ok(CorsPolicy {
            origins: self.checked_origins(path)?,
            methods_line: list(&methods, &at("methods"))?,
            methods,
            headers,
            expose: if expose.is_empty() { None } else { Some(list(&expose, &at("expose"))?) },
            max_age: HeaderValue::from(self.max_age.0.as_secs()),
            credentials: self.credentials,
        })
    }

    fn checked_origins(&self, path: &str) -> Result<Origins, ConfigError> {
        let place = format!("{path}.origins");
        let hint = r#"name the pages that may use the route, like ["https://app.example"], or every page: ["*"]"#;
        if self.origins.is_empty() {
            return Err(ConfigError::new(place, "no origin is let in").hint(hint));
        }
        if self.origins.iter().any(|origin| origin == "*") {
            if self.origins.len() > 1 {
                return Err(ConfigError::new(place, "\"*\" lets every origin in; it stands alone").hint(hint));
            }
            if self.credentials {
                let message = "origins: [\"*\"] with credentials: true would let every page act for its visitor";
                return Err(
                    ConfigError::new(format!("{path}.credentials"), message).hint("name the origins one by one")
                );
            }
            return Ok(Origins::Any);
        }
        let each = self.origins.iter().enumerate().map(|(n, text)| origin(text, &format!("{place}[{n}]")));
        Ok(Origins::These(each.collect::<Result<_, _>>()?))
    }
}

/// An origin as browsers send it: scheme, host and a port other than the scheme's own, in lower case.
fn origin(text: &str, place: &str) -> Result<HeaderValue, ConfigError> {
    let bad = || {
        ConfigError::new(place, format!("{text:?} is not an origin")).hint(
            "an origin is scheme://host or scheme://host:port, without path and without wildcard: https://app.example",
        )
    };
    let lower = text.to_ascii_lowercase();
    let (scheme, authority) = lower.split_once("://").ok_or_else(bad)?;
    let fits = |c: char| c.is_ascii_alphanumeric() || "-._:[]".contains(c);
    if scheme.is_empty() || !authority.chars().all(fits) {
        return Err(bad());
    }
    // A port begins at the colon after the host; those of an IPv6 address are inside its brackets.
    let (host, port) = match authority.rsplit_once(':') {
        Some((host, digits)) if !digits.ends_with(']') => (host, Some(digits.parse::<u16>().map_err(|_| bad())?)),
        Some(_) | None => (authority, None),
    };
    let bracketed = host.starts_with('[') && host.ends_with(']');
    if host.is_empty() || (host.contains([':', '[', ']']) && !bracketed) {
        return Err(bad());
    }
    let implied = matches!((scheme, port), ("http", Some(80)) | ("https", Some(443)));
    let sent = if implied { lower.rsplit_once(':').map_or(lower.as_str(), |(front, _)| front) } else { &lower };
    HeaderValue::from_str(sent).map_err(|_| bad())
}

fn method(text: &str, place: &str) -> Result<Method, ConfigError> {
    let bad =
        || ConfigError::new(place, format!("{text:?} is not a method")).hint("write it in capitals: GET, POST, DELETE");
    if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_uppercase()) {
        return Err(bad());
    }
    text.parse().map_err(|_| bad())
}

fn header_names(texts: &[String], place: &str) -> Result<Vec<HeaderName>, ConfigError> {
    let one = |(n, text): (usize, &String)| {
        let place = format!("{place}[{n}]");
        if text == "*" {
            return Err(ConfigError::new(place, "\"*\" cannot stand here beside names, nor among exposed headers"));
        }
        text.parse().map_err(|_| ConfigError::new(place, format!("{text:?} is not a header name")))
    };
    texts.iter().enumerate().map(one).collect()
}

fn list<T: AsRef<str>>(words: &[T], place: &str) -> Result<HeaderValue, ConfigError> {
    let line = words.iter().map(AsRef::as_ref).collect::<Vec<_>>().join(", ");
    HeaderValue::from_str(&line).map_err(|_| ConfigError::new(place, "is not a list of words"))
}

impl CorsPolicy {
    /// The answer to a preflight: an `OPTIONS` with `Origin` and `Access-Control-Request-Method`. Answer 204 with these headers.
    ///
    /// `None` where the page, its method or one of its headers is not allowed. Answer 204 then too, with
    /// [`CorsPolicy::refused`]: the browser finds the permission missing, and nothing was told to the page.
    pub fn preflight(&self, origin: &[u8], method: &[u8], headers: Option<&[u8]>) -> Option<Headers> {
        let allow_origin = self.allowed(origin)?;
        if !self.methods.iter().any(|known| known.as_str().as_bytes() == method) {
            return None;
        }
        let allow_headers = self.allowed_headers(headers)?;
        let mut out = self.refused();
        out.push((ACCESS_CONTROL_ALLOW_ORIGIN, allow_origin));
        out.push((ACCESS_CONTROL_ALLOW_METHODS, self.methods_line.clone()));
        out.push((ACCESS_CONTROL_MAX_AGE, self.max_age.clone()));
        if let Some(line) = allow_headers {
            out.push((ACCESS_CONTROL_ALLOW_HEADERS, line));
        }
        if self.credentials {
            out.push((ACCESS_CONTROL_ALLOW_CREDENTIALS, HeaderValue::from_static("true")));
        }
        Some(out)
    }

    /// The headers of a preflight's answer that permits nothing.
    pub fn refused(&self) -> Headers {
        let vary = "origin, access-control-request-method, access-control-request-headers";
        smallvec![(VARY, HeaderValue::from_static(vary))]
    }

    /// What any other answer of the route gets, errors included; `origin` is the request's, if it has one.
    pub fn response(&self, origin: Option<&[u8]>) -> Headers {
        let mut out = Headers::new();
        let allow = match &self.origins {
            Origins::Any => Some(HeaderValue::from_static("*")),
            // Said even to a request without an origin: a cache must not give its answer to a page.
            Origins::These(_) => {
                out.push((VARY, HeaderValue::from_static("origin")));
                origin.and_then(|origin| self.allowed(origin))
            }
        };
        let Some(allow) = allow else { return out };
        out.push((ACCESS_CONTROL_ALLOW_ORIGIN, allow));
        if let Some(line) = &self.expose {
            out.push((ACCESS_CONTROL_EXPOSE_HEADERS, line.clone()));
        }
        if self.credentials {
            out.push((ACCESS_CONTROL_ALLOW_CREDENTIALS, HeaderValue::from_static("true")));
        }
        out
    }

    /// The configured value that lets this origin in. What is sent back is ours, never the client's bytes.
    fn allowed(&self, origin: &[u8]) -> Option<HeaderValue> {
        match &self.origins {
            Origins::Any => Some(HeaderValue::from_static("*")),
            Origins::These(known) => known.iter().find(|known| known.as_bytes() == origin).cloned(),
        }
    }

    /// `None`: a header is not allowed. `Some(None)`: none was asked for.
    fn allowed_headers(&self, asked: Option<&[u8]>) -> Option<Option<HeaderValue>> {
        let Some(asked) = asked.filter(|asked| !asked.is_empty()) else { return Some(None) };
        let words = || asked.split(|&byte| byte == b',').map(<[u8]>::trim_ascii).filter(|word| !word.is_empty());
        let names = words().map(|word| HeaderName::from_bytes(word).ok()).collect::<Option<SmallVec<[_; 8]>>>()?;
        match &self.headers {
            // A `*` would not do: it does not cover `authorization`. So the names are listed, as we read them.
            Allowed::Any => list(&names, "").ok().map(Some),
            Allowed::These { names: known, line } => {
                names.iter().all(|name| known.contains(name)).then(|| Some(line.clone()))
            }
        }
    }
}

impl Filter for CorsPolicy {
    const NAME: &'static str = "cors";
    type Config = Cors;

    fn build(config: &Self::Config, path: &str, _: &Deps) -> Result<Self, ConfigError> {
        config.policy(path)
    }

    async fn arrive(&self, head: &http::request::Parts, arrival: &mut Arrival) -> error::Result<Flow> {
        let origin = head.headers.get(ORIGIN);
        arrival.origin = origin.cloned();
        let (Some(origin), Some(method)) = (origin, head.headers.get(ACCESS_CONTROL_REQUEST_METHOD)) else {
            return Ok(Flow::Next);
        };
        if head.method != Method::OPTIONS {
            return Ok(Flow::Next);
        }
        arrival.preflight = true;
        let asked = head.headers.get(ACCESS_CONTROL_REQUEST_HEADERS).map(HeaderValue::as_bytes);
        let told = self.preflight(origin.as_bytes(), method.as_bytes(), asked).unwrap_or_else(|| self.refused());
        let headers = told.into_iter().collect();
        Ok(Flow::Answer(Box::new(Reply { status: StatusCode::NO_CONTENT, headers, body: Bytes::new() })))
    }

    fn response(&self, head: &mut ResponseHeader, exchange: &Exchange) -> error::Result<()> {
        if exchange.arrival.preflight {
            return Ok(());
        }
        for name in &REPLACED {
            head.remove_header(name);
        }
        let origin = exchange.arrival.origin.as_ref().map(HeaderValue::as_bytes);
        for (name, value) in CorsPolicy::response(self, origin) {
            let written = if name == VARY {
                head.append_header(name, value).map(|_| ())
            } else {
                head.insert_header(name, value)
            };
            written.map_err(|_| GatewayError::Internal)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
