//! The pass lane: Pingora's stock loop streams both ways; here is what the gateway adds to it.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use http::HeaderMap;
use http::header::{self, HeaderName};
use pingora_core::protocols::http::ServerSession;
use pingora_core::upstreams::peer::{H1UpgradePolicy, HttpPeer};
use pingora_core::{Error, ErrorSource, ErrorType};
use pingora_http::{RequestHeader, ResponseHeader};
use pingora_proxy::Session;
use tollgate_filters::balance::{self, Candidate, Marks};
use tollgate_filters::dialect::Dialect;
use tollgate_filters::error::{GatewayError, Unavailable};
use tollgate_filters::filter::Flow;
use tollgate_filters::retry::{Admits, Class, Failure};
use tollgate_filters::upstream::{InFlight, Key, Node, Upstream};

use super::upstream::{Forwarded, introduce, is_gateway_header, prefixed};
use super::{Ctx, body, intake, reply, upstream};
use crate::runtime::Pass;

/// State of one request in the pass lane.
pub(crate) struct Passage {
    upstream: Arc<Upstream>,
    websocket: bool,
    preserve_host: bool,
    body_bytes: Option<u64>,
    read: u64,
    forwarded: Forwarded,
    tried: Vec<Arc<Node>>,
    current: Option<(Arc<Node>, InFlight)>,
    began: Instant,
    marks: Marks,
}

impl Passage {
    /// When the request went on its way to an upstream.
    pub(crate) fn began(&self) -> Instant {
        self.began
    }
}

/// Runs the filters; `Ok(true)` if the request is answered already.
///
/// # Errors
/// What Pingora says of the client's connection.
pub(crate) async fn begin(client: &mut ServerSession, ctx: &mut Ctx, lane: &Pass) -> pingora_core::Result<bool> {
    let body_bytes = ctx.route.as_ref().and_then(|r| r.body_bytes);
    if let (Some(limit), Some(length)) = (body_bytes, body::declared_length(client))
        && length > limit
    {
        return reply::refuse(client, ctx, &GatewayError::BodyTooLarge { limit }).await.map(|()| true);
    }
    let Some(route) = ctx.route.clone() else { return Ok(false) };
    match route.chain.request(&mut ctx.exchange).await {
        Ok(Flow::Next) => {}
        Ok(Flow::Answer(answer)) => return reply::send(client, ctx, *answer).await.map(|()| true),
        Err(error) => return reply::refuse(client, ctx, &error).await.map(|()| true),
    }
    ctx.passage = Some(Passage {
        upstream: Arc::clone(&lane.upstream),
        websocket: lane.websocket,
        preserve_host: lane.preserve_host,
        body_bytes,
        read: 0,
        forwarded: forwarded(client, ctx),
        tried: Vec::new(),
        current: None,
        began: Instant::now(),
        marks: marks(ctx, &lane.upstream),
    });
    Ok(false)
}

/// What nodes are told of the client: the chain of a trusted proxy is kept, a stranger's is replaced.
pub(crate) fn forwarded(client: &ServerSession, ctx: &Ctx) -> Forwarded {
    let head = client.req_header();
    let peer = intake::peer_ip(client);
    let trusted = ctx.runtime.trusts(peer);
    let told = |name: &str| trusted.then(|| text(&head.headers, name)).flatten();
    let tls = client.digest().is_some_and(|d| d.ssl_digest.is_some());
    let proto = match told("x-forwarded-proto") {
        Some("https") => "https",
        Some("http") => "http",
        _ if tls => "https",
        _ => "http",
    };
    let host = told("x-forwarded-host").map(str::to_owned);
    Forwarded {
        chain: chain(told("x-forwarded-for"), peer),
        client: ctx.exchange.arrival.client_ip,
        proto,
        host: host.unwrap_or_else(|| asked_host(head)),
    }
}

fn chain(before: Option<&str>, peer: IpAddr) -> String {
    before.map_or_else(|| peer.to_string(), |before| format!("{before}, {peer}"))
}

fn text<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name).and_then(|v| v.to_str().ok())
}

fn asked_host(head: &RequestHeader) -> String {
    text(&head.headers, "host")
        .or_else(|| head.uri.authority().map(http::uri::Authority::as_str))
        .unwrap_or_default()
        .to_owned()
}

/// The node of the next attempt.
///
/// # Errors
/// Status 503, if no node is left.
pub(crate) fn peer(ctx: &mut Ctx) -> pingora_core::Result<Box<HttpPeer>> {
    let Some(passage) = &mut ctx.passage else { return Err(super::unset()) };
    let upstream = Arc::clone(&passage.upstream);
    let now = ctx.gateway.now();
    let fresh = |n: &&Arc<Node>| n.weight > 0 && !passage.tried.iter().any(|t| Arc::ptr_eq(t, n));
    // Nodes that are out are asked only when there is no other.
    let up = |n: &&Arc<Node>| !matches!(n.state.ejected.admits(now), Admits::NotBefore(_));
    let mut nodes: Vec<&Arc<Node>> = upstream.nodes.iter().filter(|n| fresh(n) && up(n)).collect();
    if nodes.is_empty() {
        nodes = upstream.nodes.iter().filter(fresh).collect();
    }
    let candidates: Vec<Candidate> =
        nodes.iter().map(|n| Candidate { inflight: n.state.inflight(), weight: n.weight, seed: n.seed }).collect();
    let chosen = balance::pick(upstream.policy, &candidates, passage.marks).and_then(|i| nodes.get(i));
    let Some(node) = chosen.map(|n| Arc::clone(n)) else {
        return Error::e_explain(ErrorType::HTTPStatus(503), "no node is left");
    };
    passage.tried.push(Arc::clone(&node));
    let mut peer = upstream::peer(&node, &upstream, false)
        .map_err(|f| Error::explain(ErrorType::ConnectError, f.detail).into_up())?;
    peer.options.http_upstream_request_policy.h1_upgrade =
        if passage.websocket { H1UpgradePolicy::WebSocketOnly } else { H1UpgradePolicy::Deny };
    let tally = &mut ctx.exchange.tally;
    tally.attempts += 1;
    tally.upstream = Some(Arc::clone(&upstream.name));
    tally.node = Some(Arc::clone(&node.name));
    let guard = node.state.enter(&upstream.queue);
    passage.current = Some((node, guard));
    Ok(Box::new(peer))
}

/// Pages and files of one client stay on one node where the policy is a hash.
fn marks(ctx: &Ctx, upstream: &Upstream) -> Marks {
    let address = balance::session_mark(&ctx.exchange.arrival.client_ip.to_string());
    Marks { anchor: address, session: Some(address), random: rand::random(), turn: upstream.next_turn() }
}

/// Counts what the client sends, under the route's cap.
///
/// # Errors
/// Status 413.
pub(crate) fn request_body(ctx: &mut Ctx, body: Option<&Bytes>) -> pingora_core::Result<()> {
    let length = body.map_or(0, |b| b.len() as u64);
    ctx.exchange.tally.bytes_in += length;
    let Some(passage) = &mut ctx.passage else { return Ok(()) };
    passage.read += length;
    match passage.body_bytes {
        Some(limit) if passage.read > limit => {
            Err(Error::explain(ErrorType::HTTPStatus(413), "the body is larger than the route allows"))
        }
        _ => Ok(()),
    }
}

/// The head toward the node: the gateway's own headers instead of the client's copies of them.
///
/// # Errors
/// What cannot be written as a header.
pub(crate) fn upstream_request(
    client: &ServerSession,
    head: &mut RequestHeader,
    ctx: &mut Ctx,
) -> pingora_core::Result<()> {
    let Some(passage) = &ctx.passage else { return Err(super::unset()) };
    let Some((node, _)) = &passage.current else { return Err(super::unset()) };
    let spoofed: Vec<HeaderName> = head.headers.keys().filter(|name| is_gateway_header(name)).cloned().collect();
    for name in spoofed {
        head.remove_header(&name);
    }
    if ctx.route.as_ref().is_some_and(|r| r.chain.auth.is_some()) && passage.upstream.dialect != Dialect::Dify {
        for name in &tollgate_filters::auth::KEY_HEADERS {
            head.remove_header(name);
        }
    }
    let host = if passage.preserve_host { asked_host(client.req_header()) } else { node.authority.to_string() };
    head.insert_header(header::HOST, host)?;
    if !node.prefix.is_empty() {
        head.set_uri(prefixed(&head.uri, &node.prefix)?);
    }
    let credential = match passage.upstream.key(ctx.gateway.now()) {
        Key::Use(credential, _) => Some(credential),
        Key::None => None,
        // A request that is passed on is the provider's to refuse.
        Key::Resting(_) => passage.upstream.credentials.first().cloned(),
    };
    upstream::identify(head, passage.upstream.dialect, credential.as_ref())?;
    if passage.upstream.is_own() {
        introduce(head, &ctx.exchange, &passage.forwarded)?;
    }
    Ok(())
}

/// The head toward the client.
///
/// # Errors
/// What cannot be written as a header.
pub(crate) fn response(head: &mut ResponseHeader, ctx: &mut Ctx) -> pingora_core::Result<()> {
    ctx.exchange.tally.status = head.status.as_u16();
    if let Some(passage) = &ctx.passage
        && let Some((node, _)) = &passage.current
    {
        passage.upstream.succeeded(node, None);
    }
    reply::decorate(head, ctx)
}

/// A node that cannot be reached: the next one is tried while there is one.
pub(crate) fn connect_failed(ctx: &mut Ctx, mut error: Box<Error>) -> Box<Error> {
    if let Some(passage) = &mut ctx.passage {
        if let Some((node, _)) = passage.current.take() {
            let failure = Failure::new(Class::Connect, error.etype().as_str());
            if passage.upstream.failed(&node, None, &failure, ctx.gateway.now())
                && let Some(handles) = ctx.runtime.node(&passage.upstream.name, &node.name)
            {
                handles.ejected();
            }
        }
        error.set_retry(passage.tried.len() < passage.upstream.nodes.iter().filter(|n| n.weight > 0).count());
    }
    error
}

/// A connection that failed after it stood: tried again only if the node had closed a pooled one before it answered.
pub(crate) fn failed(session: &Session, mut error: Box<Error>, reused: bool) -> Box<Error> {
    let replayable = !session.as_downstream().retry_buffer_truncated() && session.response_written().is_none();
    let stale = reused && *error.esource() == ErrorSource::Upstream && upstream::is_stale(&error);
    error.set_retry(stale && replayable);
    error
}

/// What the client is told of an error of Pingora's loop.
pub(crate) fn client_error(error: &Error, ctx: &Ctx) -> GatewayError {
    match error.etype() {
        ErrorType::HTTPStatus(413) => GatewayError::BodyTooLarge {
            limit: ctx.passage.as_ref().and_then(|passage| passage.body_bytes).unwrap_or(0),
        },
        ErrorType::HTTPStatus(503) => GatewayError::Unavailable(Unavailable::NoHealthyUpstream),
        ErrorType::ReadTimedout | ErrorType::WriteTimedout => GatewayError::UpstreamTimeout,
        _ => match error.esource() {
            ErrorSource::Upstream if upstream::failure(error).unprocessed => GatewayError::UpstreamUnreachable,
            ErrorSource::Upstream => GatewayError::UpstreamError,
            ErrorSource::Downstream | ErrorSource::Internal | ErrorSource::Unset => GatewayError::Internal,
        },
    }
}
