//! The only writer of our own answers and errors, in the route's dialect.

use bytes::Bytes;
use http::header::{ALLOW, CACHE_CONTROL, CONTENT_LENGTH, CONTENT_TYPE, EXPECT, RETRY_AFTER, WWW_AUTHENTICATE};
use http::{HeaderValue, Method, StatusCode};
use pingora_core::protocols::http::ServerSession;
use pingora_http::ResponseHeader;
use tokio::time::{Duration, Instant, timeout_at};
use tollgate_filters::dialect;
use tollgate_filters::error::{BadRequest, GatewayError};
use tollgate_filters::exchange::Tally;
use tollgate_filters::filter::Reply;
use tollgate_filters::limit::headers::refusal_headers;

use super::{Ctx, body};
use crate::runtime::Lane;

/// How long a client that is still sending may go on after an early answer, so that it gets to read it.
const LINGER: Duration = Duration::from_secs(2);
/// A declared body up to this size is read to its end even if its request is refused.
const SHORT_BODY: u64 = 64 * 1024;

/// Sends a whole answer. An error means that the client is gone.
///
/// # Errors
/// What Pingora says of the connection.
pub(crate) async fn send(client: &mut ServerSession, ctx: &mut Ctx, reply: Reply) -> pingora_core::Result<()> {
    let mut head = ResponseHeader::build_no_case(reply.status, Some(16))?;
    for (name, value) in &reply.headers {
        head.append_header(name, value)?;
    }
    // A 204 has no body and must not announce one.
    if reply.status != StatusCode::NO_CONTENT {
        head.insert_header(CONTENT_LENGTH, reply.body.len())?;
    }
    decorate(&mut head, ctx)?;
    ctx.exchange.tally.status = reply.status.as_u16();
    let unread = is_unread(client).await;
    if unread || ctx.exchange.tally.close {
        client.set_keepalive(None);
    }
    let empty = reply.body.is_empty() || client.req_header().method == Method::HEAD;
    ctx.exchange.tally.bytes_out += if empty { 0 } else { reply.body.len() as u64 };
    client.write_response_header(Box::new(head)).await?;
    if !empty {
        client.write_response_body(reply.body, true).await?;
    }
    if unread {
        linger(client).await;
    }
    Ok(())
}

/// Whether body is left that is not worth reading. A short one is read and dropped, so that the connection may stay.
async fn is_unread(client: &mut ServerSession) -> bool {
    if client.is_body_empty() || client.is_body_done() {
        return false;
    }
    let length = body::declared_length(client);
    if client.get_header(EXPECT).is_some() || length.is_none_or(|length| length > SHORT_BODY) {
        return true;
    }
    let deadline = Instant::now() + LINGER;
    loop {
        match timeout_at(deadline, client.read_request_body()).await {
            Ok(Ok(Some(_))) => {}
            Ok(Ok(None)) => return false,
            Ok(Err(_)) | Err(_) => return true,
        }
    }
}

/// Closing a connection with unread data makes the kernel reset it, which can destroy the answer on its way.
async fn linger(client: &mut ServerSession) {
    let deadline = Instant::now() + LINGER;
    let _ = client.finish_body().await;
    while let Ok(Ok(Some(_))) = timeout_at(deadline, client.read_request_body()).await {}
}

/// What every answer carries: request id, and what the route's filters add.
///
/// # Errors
/// A header value that cannot be written.
pub(crate) fn decorate(head: &mut ResponseHeader, ctx: &Ctx) -> pingora_core::Result<()> {
    head.insert_header("x-request-id", ctx.exchange.arrival.request_id.header())?;
    if let Some(route) = &ctx.route {
        if route.is_configured() {
            head.insert_header("x-tollgate-route", &*route.name)?;
        }
        if matches!(route.lane, Lane::Call(_)) {
            tell_call(head, &ctx.exchange.tally)?;
        }
        if let Err(error) = route.chain.response(head, &ctx.exchange) {
            tracing::error!(%error, "a filter could not write its response headers");
        }
    }
    Ok(())
}

/// What became of a call's attempts.
fn tell_call(head: &mut ResponseHeader, tally: &Tally) -> pingora_core::Result<()> {
    if let Some(model) = tally.target_model.as_deref().filter(|m| !m.is_empty()) {
        head.insert_header("x-tollgate-model", model)?;
    }
    if let Some(upstream) = &tally.upstream {
        head.insert_header("x-tollgate-upstream", &**upstream)?;
    }
    head.insert_header("x-tollgate-attempts", tally.attempts)?;
    head.insert_header("x-tollgate-cache", "bypass")
}

/// Tells an error and notes it for log and metrics.
///
/// # Errors
/// What Pingora says of the connection.
pub(crate) async fn refuse(
    client: &mut ServerSession,
    ctx: &mut Ctx,
    error: &GatewayError,
) -> pingora_core::Result<()> {
    let face = error.face();
    ctx.exchange.tally.code = Some(face.code);
    let arrival = &ctx.exchange.arrival;
    let body = dialect::error_body(arrival.dialect, error, arrival.request_id.as_str());
    let mut headers = http::HeaderMap::with_capacity(6);
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    match error {
        GatewayError::MethodNotAllowed { allow } => {
            if let Ok(allow) = HeaderValue::from_str(allow) {
                headers.insert(ALLOW, allow);
            }
        }
        GatewayError::MissingApiKey | GatewayError::InvalidApiKey => {
            headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        // Where the request cannot be trusted to end where it seems to, nothing behind it is read.
        GatewayError::BadRequest {
            code: BadRequest::AmbiguousFraming | BadRequest::InvalidHost | BadRequest::UpgradeNotAllowed,
            ..
        } => {
            ctx.exchange.tally.close = true;
        }
        GatewayError::Limited(refusal) => headers.extend(refusal_headers(refusal)),
        other => {
            if let Some(wait) = other.retry_after() {
                let seconds = wait.as_millis().div_ceil(1000).max(1);
                headers.insert(RETRY_AFTER, HeaderValue::from(u64::try_from(seconds).unwrap_or(u64::MAX)));
            }
        }
    }
    let status = StatusCode::from_u16(face.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    send(client, ctx, Reply { status, headers, body: Bytes::from(body) }).await
}
