//! The only writer of our own answers and errors, in the route's dialect.

use bytes::Bytes;
use http::header::{ALLOW, CACHE_CONTROL, CONTENT_LENGTH, CONTENT_TYPE, RETRY_AFTER};
use http::{HeaderValue, Method, StatusCode};
use pingora_core::protocols::http::ServerSession;
use pingora_http::ResponseHeader;
use tokio::time::{Duration, Instant, timeout_at};
use tollgate_filters::dialect;
use tollgate_filters::error::GatewayError;
use tollgate_filters::filter::Reply;
use tollgate_filters::limit::headers::refusal_headers;

use super::Ctx;

/// How long a client that is still sending may go on after an early answer, so that it gets to read it.
const LINGER: Duration = Duration::from_secs(2);

/// Sends a whole answer. An error means that the client is gone.
///
/// # Errors
/// What Pingora says of the connection.
pub(crate) async fn send(client: &mut ServerSession, ctx: &mut Ctx, reply: Reply) -> pingora_core::Result<()> {
    let mut head = ResponseHeader::build(reply.status, Some(16))?;
    for (name, value) in &reply.headers {
        head.append_header(name, value)?;
    }
    // A 204 has no body and must not announce one.
    if reply.status != StatusCode::NO_CONTENT {
        head.insert_header(CONTENT_LENGTH, reply.body.len())?;
    }
    decorate(&mut head, ctx)?;
    ctx.exchange.tally.status = reply.status.as_u16();
    let unread = !client.is_body_done() && !client.is_body_empty();
    if unread {
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
        if let Err(error) = route.chain.response(head, &ctx.exchange) {
            tracing::error!(%error, "a filter could not write its response headers");
        }
    }
    Ok(())
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
