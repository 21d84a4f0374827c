//! From a request head to a route: strict checks, one canonical path, the filters that work on the head alone.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use http::header::{CONTENT_LENGTH, HOST, TRANSFER_ENCODING, UPGRADE};
use http::{HeaderMap, HeaderValue, Method, Version};
use pingora_core::protocols::http::ServerSession;
use pingora_http::RequestHeader;
use tollgate_filters::error::{BadRequest, GatewayError, Result, Unavailable};
use tollgate_filters::exchange::{Arrival, Exchange};
use tollgate_filters::filter::Flow;
use tollgate_filters::route::{Head, canonical_path};
use tollgate_filters::trace;

use super::Ctx;
use crate::runtime::{Lane, Route, Runtime};

/// Longest request target, in bytes.
const MAX_TARGET: usize = 16 * 1024;
/// Most header fields of a request.
const MAX_FIELDS: usize = 100;

/// Finds the route and runs the head through its chain. `ctx.route` is set as soon as the route is known, so that an
/// error is told in its dialect.
///
/// # Errors
/// The refusal to send.
pub(crate) async fn arrive(client: &mut ServerSession, ctx: &mut Ctx) -> Result<Flow> {
    let runtime = Arc::clone(&ctx.runtime);
    check_head(client, &runtime)?;
    canonicalise(client.req_header_mut())?;
    let route = find(client, &runtime)?;
    ctx.exchange.arrival.route = Arc::clone(&route.name);
    ctx.exchange.arrival.route_rules = Arc::clone(&route.rules);
    ctx.exchange.arrival.dialect = route.dialect;
    ctx.route = Some(Arc::clone(&route));
    if ctx.gateway.is_draining() {
        return Err(GatewayError::Unavailable(Unavailable::Draining));
    }
    check_upgrade(client.req_header(), &route)?;
    route.chain.arrive(client.req_header(), &mut ctx.exchange.arrival).await
}

/// What is known before the route is: ids, address, time.
pub(crate) fn arrival(client: &ServerSession, runtime: &Runtime) -> Exchange {
    let head = client.req_header();
    let client_ip = client_ip(client, &head.headers, runtime);
    let unix_seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    Exchange::new(Arrival {
        route: Arc::clone(&runtime.own.name),
        route_rules: Arc::clone(&runtime.own.rules),
        dialect: runtime.own.dialect,
        request_id: trace::request_id(head.headers.get("x-request-id").map(HeaderValue::as_bytes), rand::random()),
        trace: trace::TraceContext::of_request(
            head.headers.get("traceparent").map(HeaderValue::as_bytes),
            rand::random(),
            rand::random(),
        ),
        client_ip,
        unix_seconds,
        origin: None,
        preflight: false,
        caller: None,
    })
}

/// The peer's address, or what trusted proxies say of the client: the last address of the chain that is not theirs.
fn client_ip(client: &ServerSession, headers: &HeaderMap, runtime: &Runtime) -> IpAddr {
    let peer = peer_ip(client);
    if !runtime.trusts(peer) {
        return peer;
    }
    let chain: Vec<&str> =
        headers.get_all("x-forwarded-for").iter().filter_map(|v| v.to_str().ok()).flat_map(|v| v.split(',')).collect();
    let mut last = peer;
    for hop in chain.iter().rev() {
        match hop.trim().parse() {
            Ok(ip) if runtime.trusts(ip) => last = ip,
            Ok(ip) => return ip,
            Err(_) => return last,
        }
    }
    last
}

/// Address of the other end of the connection.
pub(crate) fn peer_ip(client: &ServerSession) -> IpAddr {
    client.client_addr().and_then(|a| a.as_inet()).map_or(IpAddr::from([0, 0, 0, 0]), |a| a.ip())
}

fn check_head(client: &ServerSession, runtime: &Runtime) -> Result<()> {
    let head = client.req_header();
    if head.uri.path_and_query().map_or(0, |p| p.as_str().len()) > MAX_TARGET {
        return Err(GatewayError::UriTooLong);
    }
    let bytes: usize = head.headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 4).sum();
    if bytes > runtime.header_bytes || head.headers.len() > MAX_FIELDS {
        return Err(GatewayError::HeadersTooLarge);
    }
    if head.method == Method::TRACE || head.method == Method::CONNECT {
        return Err(GatewayError::MethodNotAllowed {
            allow: "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS".to_owned(),
        });
    }
    check_framing(client)?;
    check_host(head)
}

/// `Content-Length` and `Transfer-Encoding` must leave no doubt where the body ends.
fn check_framing(client: &ServerSession) -> Result<()> {
    let bad = |why: &str| Err(GatewayError::bad(BadRequest::AmbiguousFraming, why.to_owned()));
    let headers = &client.req_header().headers;
    if headers.get_all(CONTENT_LENGTH).iter().count() > 1 {
        return bad("more than one `Content-Length`");
    }
    if headers.get(CONTENT_LENGTH).is_some_and(|v| v.is_empty() || !v.as_bytes().iter().all(u8::is_ascii_digit)) {
        return bad("`Content-Length` must be one whole number");
    }
    let mut encodings = headers.get_all(TRANSFER_ENCODING).iter();
    let Some(encoding) = encodings.next() else { return Ok(()) };
    if encodings.next().is_some() || !encoding.as_bytes().eq_ignore_ascii_case(b"chunked") {
        return bad("`Transfer-Encoding` must be just `chunked`");
    }
    // Pingora drops the length where both are given; the raw head still has it.
    let raw = client.as_http1().map(|h1| h1.get_headers_raw_bytes()).unwrap_or_default();
    let has_length = raw
        .split(|&b| b == b'\n')
        .any(|line| line.get(..15).is_some_and(|name| name.eq_ignore_ascii_case(b"content-length:")));
    if has_length { bad("`Content-Length` and `Transfer-Encoding` together") } else { Ok(()) }
}

fn check_host(head: &RequestHeader) -> Result<()> {
    let bad = |why: &str| Err(GatewayError::bad(BadRequest::InvalidHost, format!("the `Host` {why}")));
    let mut hosts = head.headers.get_all(HOST).iter();
    let first = hosts.next();
    if hosts.next().is_some() {
        return bad("is doubled");
    }
    let host = match (first, head.uri.authority()) {
        (Some(host), _) => host.as_bytes(),
        (None, Some(authority)) => authority.as_str().as_bytes(),
        (None, None) if head.version < Version::HTTP_11 => return Ok(()),
        (None, None) => return bad("is missing"),
    };
    let legal = |b: &u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_' | b':' | b'[' | b']');
    let name = host_name(std::str::from_utf8(host).unwrap_or_default());
    if name.is_empty() || !host.iter().all(legal) {
        return bad("is malformed");
    }
    match std::str::from_utf8(host).unwrap_or_default().get(name.len()..).and_then(|p| p.strip_prefix(':')) {
        Some(port) if !port.parse::<u16>().is_ok_and(|p| p > 0) => bad("has a malformed port"),
        _ => Ok(()),
    }
}

/// The host without its port.
fn host_name(host: &str) -> &str {
    if host.starts_with('[') {
        return host.find(']').and_then(|end| host.get(..=end)).unwrap_or_default();
    }
    host.split_once(':').map_or(host, |(name, _)| name)
}

/// The name in the request's `Host` or authority, lower case, without port.
pub(crate) fn requested_host(head: &RequestHeader) -> String {
    let host =
        head.headers.get(HOST).and_then(|v| v.to_str().ok()).or_else(|| head.uri.authority().map(|a| a.as_str()));
    host_name(host.unwrap_or_default()).to_ascii_lowercase()
}

/// Puts the canonical path into the head, so that what was matched is what is forwarded.
fn canonicalise(head: &mut RequestHeader) -> Result<()> {
    let path = head.uri.path();
    let decoded = super::own::decoded_model(path).filter(|_| path.contains('%'));
    let canonical = canonical_path(decoded.as_deref().unwrap_or(path))?;
    if canonical == path {
        return Ok(());
    }
    let target = match head.uri.query() {
        Some(query) => format!("{canonical}?{query}"),
        None => canonical.into_owned(),
    };
    let uri = target.parse().map_err(|_| GatewayError::bad(BadRequest::InvalidPath, "the path is malformed"))?;
    head.set_uri(uri);
    Ok(())
}

fn find(client: &ServerSession, runtime: &Runtime) -> Result<Arc<Route>> {
    let req = client.req_header();
    let host = requested_host(req);
    let (path, query) = (req.uri.path(), req.uri.query().unwrap_or_default());
    let head = Head { method: &req.method, path, query, host: &host, headers: &req.headers };
    let own = super::own::names(path) && !runtime.router.names(path);
    if own {
        return Ok(Arc::clone(if path == "/health" { &runtime.open } else { &runtime.own }));
    }
    match runtime.router.find(&head) {
        Ok(route) => Ok(Arc::clone(route)),
        // A preflight asks for the method it announces.
        Err(GatewayError::MethodNotAllowed { allow }) => {
            preflight(&head, runtime).ok_or(GatewayError::MethodNotAllowed { allow })
        }
        Err(other) => Err(other),
    }
}

fn preflight(head: &Head<'_>, runtime: &Runtime) -> Option<Arc<Route>> {
    let announced = head.headers.get("access-control-request-method")?;
    let method = Method::from_bytes(announced.as_bytes()).ok()?;
    let route = runtime.router.find(&Head { method: &method, ..*head }).ok()?;
    (head.method == Method::OPTIONS && route.chain.cors.is_some()).then(|| Arc::clone(route))
}

fn check_upgrade(head: &RequestHeader, route: &Route) -> Result<()> {
    let Some(upgrade) = head.headers.get(UPGRADE) else { return Ok(()) };
    if upgrade.as_bytes().eq_ignore_ascii_case(b"h2c") {
        // An offer that may be ignored: the request is served as it is.
        return Ok(());
    }
    let allowed = matches!(&route.lane, Lane::Pass(pass) if pass.websocket)
        && upgrade.as_bytes().eq_ignore_ascii_case(b"websocket");
    if allowed {
        Ok(())
    } else {
        Err(GatewayError::bad(BadRequest::UpgradeNotAllowed, "this route does not take an upgrade"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(value: &[u8]) -> Option<&'static str> {
        let mut head = RequestHeader::build("GET", b"/", None).unwrap();
        head.append_header("host", http::HeaderValue::from_bytes(value).unwrap()).unwrap();
        check_host(&head).err().map(|e| e.face().code)
    }

    #[test]
    fn hosts_that_could_move_the_path_are_refused() {
        for good in [b"api.example.com".as_slice(), b"localhost:8080", b"[::1]:8080", b"10.0.0.1"] {
            assert_eq!(host(good), None, "{}", String::from_utf8_lossy(good));
        }
        for bad in [b"".as_slice(), b"a/b", b"a?b", b"a#b", b"u@h", b"a,b", b"h:0", b"h:99999", b"h:", b"h:8a", b"a b"]
        {
            assert_eq!(host(bad), Some("invalid_host"), "{}", String::from_utf8_lossy(bad));
        }
    }

    #[test]
    fn the_requested_host_has_no_port_and_is_lower_case() {
        let mut head = RequestHeader::build("GET", b"/", None).unwrap();
        head.append_header("host", "API.Example.com:8080").unwrap();
        assert_eq!(requested_host(&head), "api.example.com");
    }

    #[test]
    fn the_canonical_path_is_what_is_forwarded() {
        let mut head = RequestHeader::build("GET", b"/v1/%63hat?x=%2e", None).unwrap();
        canonicalise(&mut head).unwrap();
        assert_eq!(head.uri.path_and_query().unwrap().as_str(), "/v1/chat?x=%2e");
    }
}
