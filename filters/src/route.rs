//! Which route a request takes: canonical paths, matchers, first match wins.

use std::borrow::Cow;

use http::header::HeaderName;
use http::{HeaderMap, Method};

use crate::error::{BadRequest, GatewayError, Result};

/// The parts of a request head that routing looks at. The path is canonical (see [`canonical_path`]).
#[derive(Debug, Clone, Copy)]
pub struct Head<'a> {
    /// Request method.
    pub method: &'a Method,
    /// Canonical path, without query.
    pub path: &'a str,
    /// Query string without `?`, empty if there is none.
    pub query: &'a str,
    /// Host without port, lower case.
    pub host: &'a str,
    /// Request headers.
    pub headers: &'a HeaderMap,
}

/// Brings a request path into the one form used for matching, authorising and forwarding alike.
///
/// Percent-encoded unreserved characters are decoded, hex digits are upper case. What different servers
/// read differently is refused: empty and dot segments, encoded slashes, backslashes, control characters, path parameters.
///
/// # Errors
/// [`BadRequest::InvalidPath`].
pub fn canonical_path(path: &str) -> Result<Cow<'_, str>> {
    let bad = |why: &str| GatewayError::bad(BadRequest::InvalidPath, format!("the path {why}"));
    if !path.starts_with('/') {
        return Err(bad("must start with `/`"));
    }
    if path.bytes().any(|b| matches!(b, b'\\' | b';' | 0..=0x20 | 0x7f..)) {
        return Err(bad("has a character that is not allowed"));
    }
    let canonical = if path.contains('%') { Cow::Owned(decode_unreserved(path)?) } else { Cow::Borrowed(path) };
    let mut segments = canonical.split('/').skip(1).peekable();
    while let Some(segment) = segments.next() {
        let last = segments.peek().is_none();
        if segment.is_empty() && !last {
            return Err(bad("has an empty segment (`//`)"));
        }
        if segment == "." || segment == ".." {
            return Err(bad("has a dot segment"));
        }
    }
    Ok(canonical)
}

fn decode_unreserved(path: &str) -> Result<String> {
    let bad = |why: &str| GatewayError::bad(BadRequest::InvalidPath, format!("the path has {why}"));
    let mut out = String::with_capacity(path.len());
    let mut rest = path;
    while let Some((before, after)) = rest.split_once('%') {
        out.push_str(before);
        let byte = after
            .get(..2)
            .filter(|hex| hex.bytes().all(|b| b.is_ascii_hexdigit()))
            .and_then(|hex| u8::from_str_radix(hex, 16).ok())
            .ok_or_else(|| bad("a malformed percent-encoding"))?;
        match byte {
            b'/' | b'\\' | b';' => return Err(bad("an encoded separator")),
            0..=0x1f | 0x7f => return Err(bad("an encoded control character")),
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => out.push(char::from(byte)),
            other => out.push_str(&format!("%{other:02X}")),
        }
        rest = after.get(2..).unwrap_or_default();
    }
    out.push_str(rest);
    Ok(out)
}

/// One path of a matcher.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PathRule {
    /// The very path.
    Exact(Box<str>),
    /// The path and everything below it. `/v1/` covers `/v1/x`, `/` covers all; `/v1` covers `/v1` and `/v1/x`, not `/v1x`.
    Prefix(Box<str>),
    /// Segments, of which `None` (`*`) stands for any one non-empty segment.
    Segments(Box<[Option<Box<str>>]>),
}

impl PathRule {
    /// An exact path, or one with `*` segments.
    pub fn path(text: &str) -> Self {
        if text.split('/').any(|s| s == "*") {
            let segments = text.split('/').skip(1).map(|s| if s == "*" { None } else { Some(s.into()) });
            Self::Segments(segments.collect())
        } else {
            Self::Exact(text.into())
        }
    }

    /// Whether the canonical path is covered.
    pub fn covers(&self, path: &str) -> bool {
        match self {
            Self::Exact(exact) => **exact == *path,
            Self::Prefix(prefix) => match path.strip_prefix(&**prefix) {
                Some(rest) => rest.is_empty() || prefix.ends_with('/') || rest.starts_with('/'),
                None => false,
            },
            Self::Segments(rules) => {
                let mut segments = path.split('/').skip(1);
                rules.iter().all(|rule| match (rule, segments.next()) {
                    (Some(text), Some(segment)) => **text == *segment,
                    (None, Some(segment)) => !segment.is_empty(),
                    (_, None) => false,
                }) && segments.next().is_none()
            }
        }
    }
}

/// Everything that a route asks of a request head. Empty lists ask nothing.
#[derive(Debug, Clone, Default)]
pub struct Matcher {
    /// Any of these paths.
    pub paths: Vec<PathRule>,
    /// Any of these methods.
    pub methods: Vec<Method>,
    /// Any of these hosts, lower case; `*.example.com` covers one or more labels before it.
    pub hosts: Vec<Box<str>>,
    /// All of these headers with just these values.
    pub headers: Vec<(HeaderName, Box<str>)>,
    /// All of these query parameters with just these values.
    pub query: Vec<(Box<str>, Box<str>)>,
}

/// Why a matcher does not cover a request: the first part that failed, in the order in which parts are tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mismatch {
    /// The path.
    Path,
    /// The host.
    Host,
    /// A header.
    Header,
    /// A query parameter.
    Query,
    /// The method, everything else being right.
    Method,
}

impl Matcher {
    /// Checks a request head; the method last, so that a wrong method can be told from a wrong path.
    ///
    /// # Errors
    /// The first part that does not match.
    pub fn check(&self, head: &Head<'_>) -> std::result::Result<(), Mismatch> {
        if !self.paths.is_empty() && !self.paths.iter().any(|p| p.covers(head.path)) {
            return Err(Mismatch::Path);
        }
        if !self.hosts.is_empty() && !self.hosts.iter().any(|h| host_covers(h, head.host)) {
            return Err(Mismatch::Host);
        }
        let header_is = |name: &HeaderName, value: &str| {
            head.headers.get_all(name).iter().any(|v| v.as_bytes() == value.as_bytes())
        };
        if !self.headers.iter().all(|(name, value)| header_is(name, value)) {
            return Err(Mismatch::Header);
        }
        if !self.query.iter().all(|(name, value)| query_has(head.query, name, value)) {
            return Err(Mismatch::Query);
        }
        if !self.methods.is_empty() && !self.methods.contains(head.method) {
            return Err(Mismatch::Method);
        }
        Ok(())
    }

    /// Whether the very path is named, not only covered by a prefix or a pattern.
    pub fn names(&self, path: &str) -> bool {
        self.paths.iter().any(|p| matches!(p, PathRule::Exact(exact) if **exact == *path))
    }
}

fn host_covers(rule: &str, host: &str) -> bool {
    match rule.strip_prefix('*') {
        Some(suffix) => host.len() > suffix.len() && host.ends_with(suffix),
        None => rule == host,
    }
}

fn query_has(query: &str, name: &str, value: &str) -> bool {
    query.split('&').any(|pair| match pair.split_once('=') {
        Some((n, v)) => n == name && v == value,
        None => pair == name && value.is_empty(),
    })
}

/// Routes in the order of the configuration.
#[derive(Debug, Clone)]
pub struct Router<T> {
    routes: Vec<(Matcher, T)>,
}

impl<T> Default for Router<T> {
    fn default() -> Self {
        Self { routes: Vec::new() }
    }
}

impl<T> Router<T> {
    /// Adds a route behind those already there.
    pub fn push(&mut self, matcher: Matcher, route: T) {
        self.routes.push((matcher, route));
    }

    /// The first route that matches.
    ///
    /// # Errors
    /// [`GatewayError::MethodNotAllowed`] if routes match but for the method, else [`GatewayError::NotFound`].
    pub fn find(&self, head: &Head<'_>) -> Result<&T> {
        let mut allow: Vec<&str> = Vec::new();
        for (matcher, route) in &self.routes {
            match matcher.check(head) {
                Ok(()) => return Ok(route),
                Err(Mismatch::Method) => {
                    for method in &matcher.methods {
                        if !allow.contains(&method.as_str()) {
                            allow.push(method.as_str());
                        }
                    }
                }
                Err(Mismatch::Path | Mismatch::Host | Mismatch::Header | Mismatch::Query) => {}
            }
        }
        if allow.is_empty() {
            Err(GatewayError::NotFound)
        } else {
            Err(GatewayError::MethodNotAllowed { allow: allow.join(", ") })
        }
    }

    /// Whether some route names this very path, so that it wins over a built-in answer.
    pub fn names(&self, path: &str) -> bool {
        self.routes.iter().any(|(matcher, _)| matcher.names(path))
    }

    /// All routes with their matchers, in order.
    pub fn iter(&self) -> impl Iterator<Item = &(Matcher, T)> {
        self.routes.iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn code(path: &str) -> Option<&'static str> {
        canonical_path(path).err().map(|e| e.face().code)
    }

    #[test]
    fn paths_that_servers_read_differently_are_refused() {
        for path in [
            "/v1//x",
            "//v1",
            "/v1/./x",
            "/v1/../x",
            "/v1/%2e%2e/admin",
            "/v1/%2E/x",
            "/a%2Fb",
            "/a%5cb",
            "/a%00",
            "/a;b=c",
            "/a\\b",
            "a",
            "/%",
            "/%4",
            "/%zz",
        ] {
            assert_eq!(code(path), Some("invalid_path"), "{path}");
        }
    }

    #[test]
    fn canonical_paths_decode_what_needs_no_encoding_and_keep_the_rest() {
        assert_eq!(canonical_path("/v1/%63hat/%5b%C3%A9").unwrap(), "/v1/chat/%5B%C3%A9");
        assert_eq!(canonical_path("/v1/").unwrap(), "/v1/");
        assert_eq!(canonical_path("/").unwrap(), "/");
    }

    #[test]
    fn a_prefix_ends_at_a_segment() {
        let rule = PathRule::Prefix("/v1".into());
        assert!(rule.covers("/v1") && rule.covers("/v1/x") && !rule.covers("/v1x"));
        assert!(PathRule::Prefix("/".into()).covers("/anything"));
        assert!(!PathRule::Prefix("/v1/".into()).covers("/v1"));
    }

    #[test]
    fn a_star_stands_for_one_segment() {
        let rule = PathRule::path("/v1/workflows/*/run");
        assert!(rule.covers("/v1/workflows/42/run"));
        for path in [
            "/v1/workflows/run",
            "/v1/workflows//run",
            "/v1/workflows/4/2/run",
            "/v1/workflows/42/run/x",
            "/v1/workflows/42",
        ] {
            assert!(!rule.covers(path), "{path}");
        }
    }

    fn head<'a>(method: &'a Method, path: &'a str, headers: &'a HeaderMap) -> Head<'a> {
        Head { method, path, query: "a=1&b", host: "api.example.com", headers }
    }

    #[test]
    fn the_first_route_that_matches_wins_and_a_wrong_method_is_told_apart() {
        let mut router = Router::default();
        let path = |p: &str| vec![PathRule::path(p)];
        router.push(Matcher { paths: path("/a"), methods: vec![Method::POST], ..Matcher::default() }, 1);
        router.push(Matcher { paths: path("/a"), methods: vec![Method::PUT], ..Matcher::default() }, 2);
        router.push(Matcher { paths: vec![PathRule::Prefix("/b".into())], ..Matcher::default() }, 3);
        router.push(Matcher { paths: path("/b/c"), ..Matcher::default() }, 4);
        let headers = HeaderMap::new();
        assert_eq!(router.find(&head(&Method::PUT, "/a", &headers)).unwrap(), &2);
        assert_eq!(router.find(&head(&Method::GET, "/b/c", &headers)).unwrap(), &3);
        assert_eq!(router.find(&head(&Method::GET, "/z", &headers)).unwrap_err(), GatewayError::NotFound);
        let error = router.find(&head(&Method::GET, "/a", &headers)).unwrap_err();
        assert_eq!(error, GatewayError::MethodNotAllowed { allow: "POST, PUT".into() });
    }

    #[test]
    fn host_header_and_query_are_all_asked_for() {
        let mut headers = HeaderMap::new();
        headers.insert("app-id", "support".parse().unwrap());
        let matcher = Matcher {
            hosts: vec!["*.example.com".into()],
            headers: vec![(HeaderName::from_static("app-id"), "support".into())],
            query: vec![("a".into(), "1".into()), ("b".into(), "".into())],
            ..Matcher::default()
        };
        assert_eq!(matcher.check(&head(&Method::GET, "/", &headers)), Ok(()));
        assert_eq!(matcher.check(&head(&Method::GET, "/", &HeaderMap::new())), Err(Mismatch::Header));
        let other = Head { host: "example.com", ..head(&Method::GET, "/", &headers) };
        assert_eq!(matcher.check(&other), Err(Mismatch::Host));
        let other = Head { query: "a=2&b", ..head(&Method::GET, "/", &headers) };
        assert_eq!(matcher.check(&other), Err(Mismatch::Query));
    }
}
