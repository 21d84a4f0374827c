//! Toward a node: its address, the request head it gets, and what an error of the connection means.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use http::header::{self, HeaderName};
use http::{HeaderMap, HeaderValue, Uri};
use pingora_core::upstreams::peer::HttpPeer;
use pingora_core::{Error, ErrorType};
use pingora_http::RequestHeader;
use tollgate_filters::auth::{KEY_HEADERS, KEY_PARAMETER};
use tollgate_filters::dialect::Dialect;
use tollgate_filters::exchange::Exchange;
use tollgate_filters::retry::{Class, Failure};
use tollgate_filters::upstream::{Credential, Node, Upstream};

/// Headers that speak of one connection only.
pub(crate) const HOP_BY_HOP: [HeaderName; 9] = [
    header::CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
];

/// Headers of which only the gateway may speak.
pub(crate) fn is_gateway_header(name: &HeaderName) -> bool {
    let name = name.as_str();
    name.starts_with("x-tollgate-")
        || name.starts_with("x-forwarded-")
        || matches!(name, "x-user-id" | "x-user-tier" | "x-real-ip" | "forwarded" | "x-request-id" | "traceparent")
}

/// Where a connection goes. `fresh` makes sure that no pooled connection is taken.
///
/// # Errors
/// `connect`, if the host has no address.
pub(crate) fn peer(node: &Node, upstream: &Upstream, fresh: bool) -> Result<HttpPeer, Failure> {
    let addresses = node.addresses.load();
    let address = addresses.first().copied().ok_or_else(|| unresolved(node))?;
    Ok(peer_at(address, node, upstream, fresh))
}

fn unresolved(node: &Node) -> Failure {
    Failure { unprocessed: true, ..Failure::new(Class::Connect, format!("{} has no address", node.host)) }
}

fn peer_at(address: SocketAddr, node: &Node, upstream: &Upstream, fresh: bool) -> HttpPeer {
    let sni = if node.tls { node.host.to_string() } else { String::new() };
    let mut peer = HttpPeer::new(address, node.tls, sni);
    // Pooled connections are found by this key; nothing is ever released under the one of fresh connections.
    peer.group_key = u64::from(fresh);
    let options = &mut peer.options;
    options.connection_timeout = Some(upstream.timeouts.connect);
    options.total_connection_timeout = Some(upstream.timeouts.connect);
    options.idle_timeout = Some(upstream.pool.idle);
    if node.tls {
        options.set_http_version(2, 1);
        options.max_h2_streams = 100;
        options.h2_ping_interval = Some(Duration::from_secs(20));
    }
    peer
}

/// What the gateway tells a node of the client.
#[derive(Debug, Clone)]
pub(crate) struct Forwarded {
    /// `X-Forwarded-For`, the peer included.
    pub(crate) chain: String,
    /// The client's address.
    pub(crate) client: IpAddr,
    /// `http` or `https`.
    pub(crate) proto: &'static str,
    /// The host that was asked for.
    pub(crate) host: String,
}

/// The request head for one attempt of a call.
///
/// # Errors
/// What cannot be written as a header, a defect.
pub(crate) fn call_head(
    from: &RequestHeader,
    exchange: &Exchange,
    toward: (&Upstream, &Node, Option<&Credential>),
    forwarded: &Forwarded,
    length: usize,
) -> pingora_core::Result<RequestHeader> {
    let (upstream, node, credential) = toward;
    let path = target(from, &node.prefix);
    let mut head = RequestHeader::build_no_case(from.method.clone(), path.as_bytes(), Some(from.headers.len() + 12))?;
    let own_key = upstream.dialect == Dialect::Dify && credential.is_none();
    let nominated = nominated(&from.headers);
    for (name, value) in &from.headers {
        let dropped = HOP_BY_HOP.contains(name)
            || is_gateway_header(name)
            || matches!(
                *name,
                header::HOST | header::CONTENT_LENGTH | header::ACCEPT_ENCODING | header::EXPECT | header::COOKIE
            )
            || (KEY_HEADERS.contains(name) && !(own_key && *name == header::AUTHORIZATION))
            || is_nominated(&nominated, name);
        if !dropped {
            head.append_header(name.clone(), value.clone())?;
        }
    }
    head.insert_header(header::HOST, &*node.authority)?;
    head.insert_header(header::CONTENT_LENGTH, length)?;
    identify(&mut head, upstream.dialect, credential)?;
    if upstream.is_own() {
        introduce(&mut head, exchange, forwarded)?;
    }
    Ok(head)
}

/// Path and query toward a node. A key in the query has done its work at our door.
fn target(from: &RequestHeader, prefix: &str) -> String {
    let mut target = format!("{prefix}{}", from.uri.path());
    let pairs = from.uri.query().unwrap_or_default().split('&');
    let kept =
        pairs.filter(|pair| !pair.is_empty() && pair.split_once('=').is_none_or(|(name, _)| name != KEY_PARAMETER));
    for (index, pair) in kept.enumerate() {
        target.push(if index == 0 { '?' } else { '&' });
        target.push_str(pair);
    }
    target
}

/// Header names that a `Connection` declares to be of its hop only.
pub(crate) fn nominated(headers: &HeaderMap) -> Vec<String> {
    let lines = headers.get_all(header::CONNECTION).iter().filter_map(|v| v.to_str().ok());
    lines.flat_map(|v| v.split(',')).map(|n| n.trim().to_owned()).filter(|n| !n.is_empty()).collect()
}

/// Whether a header is among the nominated ones.
pub(crate) fn is_nominated(nominated: &[String], name: &HeaderName) -> bool {
    nominated.iter().any(|n| n.eq_ignore_ascii_case(name.as_str()))
}

/// Puts our credential where the dialect wants it.
///
/// # Errors
/// A credential with characters that a header cannot carry.
pub(crate) fn identify(
    head: &mut RequestHeader,
    dialect: Dialect,
    credential: Option<&Credential>,
) -> pingora_core::Result<()> {
    let Some(credential) = credential else { return Ok(()) };
    let (name, text) = match dialect {
        Dialect::Openai | Dialect::Dify | Dialect::None => {
            (header::AUTHORIZATION, format!("Bearer {}", credential.secret.expose()))
        }
        Dialect::Anthropic => (HeaderName::from_static("x-api-key"), credential.secret.expose().to_owned()),
        Dialect::Gemini => (HeaderName::from_static("x-goog-api-key"), credential.secret.expose().to_owned()),
    };
    let mut value = HeaderValue::from_str(&text).map_err(|_| {
        Error::explain(ErrorType::InternalError, "a credential has characters that a header cannot carry")
    })?;
    value.set_sensitive(true);
    head.insert_header(name, value)
}

/// Tells a node of our own who calls and from where.
///
/// # Errors
/// What cannot be written as a header.
pub(crate) fn introduce(
    head: &mut RequestHeader,
    exchange: &Exchange,
    forwarded: &Forwarded,
) -> pingora_core::Result<()> {
    let arrival = &exchange.arrival;
    head.insert_header("x-request-id", arrival.request_id.header())?;
    if let Some(caller) = &arrival.caller {
        head.insert_header("x-user-id", &*caller.id)?;
        if let Some(tier) = &caller.tier {
            head.insert_header("x-user-tier", &**tier)?;
        }
    }
    head.insert_header("x-forwarded-for", forwarded.chain.as_str())?;
    head.insert_header("x-forwarded-proto", forwarded.proto)?;
    head.insert_header("x-forwarded-host", forwarded.host.as_str())?;
    head.insert_header("x-real-ip", forwarded.client.to_string())?;
    head.insert_header("traceparent", arrival.trace.header())
}

/// Puts a node's path prefix before the path of a request that is passed on.
///
/// # Errors
/// A path that does not parse.
pub(crate) fn prefixed(uri: &Uri, prefix: &str) -> pingora_core::Result<Uri> {
    let target = format!("{prefix}{}", uri.path_and_query().map_or("/", |p| p.as_str()));
    target.parse().map_err(|_| Error::explain(ErrorType::InternalError, "the prefixed path does not parse"))
}

/// Whether an error can mean that a pooled connection had been closed by the node before it saw the request.
pub(crate) fn is_stale(error: &Error) -> bool {
    matches!(
        error.etype(),
        ErrorType::ConnectionClosed
            | ErrorType::ReadError
            | ErrorType::WriteError
            | ErrorType::H2Error
            | ErrorType::H2Downgrade
    )
}

/// The failure that an error of connecting, sending or receiving the header means.
pub(crate) fn failure(error: &Error) -> Failure {
    let class = match error.etype() {
        ErrorType::ConnectTimedout | ErrorType::TLSHandshakeTimedout => Class::Connect,
        ErrorType::ReadTimedout | ErrorType::WriteTimedout => Class::Timeout,
        ErrorType::InvalidHTTPHeader | ErrorType::H1Error => Class::ServerError,
        _ => Class::Connect,
    };
    let unprocessed = matches!(
        error.etype(),
        ErrorType::ConnectTimedout
            | ErrorType::ConnectRefused
            | ErrorType::ConnectNoRoute
            | ErrorType::ConnectError
            | ErrorType::TLSHandshakeFailure
            | ErrorType::TLSHandshakeTimedout
            | ErrorType::InvalidCert
            | ErrorType::BindError
            | ErrorType::SocketError
    );
    let silent = matches!(
        error.etype(),
        ErrorType::ConnectTimedout
            | ErrorType::TLSHandshakeTimedout
            | ErrorType::ReadTimedout
            | ErrorType::WriteTimedout
    );
    Failure { unprocessed, silent, ..Failure::new(class, error.etype().as_str()) }
}
