//! The body of a call, read whole: under a cap, a share of the byte budget and a deadline.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::header::{CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, EXPECT};
use http::{HeaderMap, HeaderValue};
use pingora_core::protocols::http::ServerSession;
use tokio::time::{Instant, timeout_at};
use tollgate_filters::error::{GatewayError, Result};

use crate::gateway::ByteShare;

/// Time that any body may take.
const PATIENCE: Duration = Duration::from_secs(60);
/// Beyond that, a body has to arrive at this pace, in bytes per second.
const PACE: u64 = 16 * 1024;
/// A declared length is believed up to here; beyond, the buffer grows with what arrives.
const TRUSTED_LENGTH: u64 = 1 << 20;

/// Checks that the body is plain JSON by its headers.
///
/// # Errors
/// `unsupported_media_type`, `expectation_failed`.
pub(crate) fn check_headers(headers: &HeaderMap) -> Result<()> {
    if headers.get(EXPECT).is_some_and(|v| !v.as_bytes().eq_ignore_ascii_case(b"100-continue")) {
        return Err(GatewayError::ExpectationFailed);
    }
    if headers.get(CONTENT_ENCODING).is_some_and(|v| !v.as_bytes().eq_ignore_ascii_case(b"identity")) {
        return Err(GatewayError::UnsupportedMediaType("an encoded body (`Content-Encoding`) is not accepted"));
    }
    match headers.get(CONTENT_TYPE) {
        Some(kind) if is_json(kind) => Ok(()),
        _ => Err(GatewayError::UnsupportedMediaType("the body must be JSON: send `Content-Type: application/json`")),
    }
}

fn is_json(kind: &HeaderValue) -> bool {
    let Ok(kind) = kind.to_str() else { return false };
    let mut parts = kind.split(';').map(str::trim);
    let essence = parts.next().unwrap_or_default().to_ascii_lowercase();
    let json = essence == "application/json" || (essence.starts_with("application/") && essence.ends_with("+json"));
    let utf8 = |p: &str| match p.split_once('=') {
        Some((name, value)) if name.eq_ignore_ascii_case("charset") => {
            value.trim_matches('"').eq_ignore_ascii_case("utf-8")
        }
        _ => true,
    };
    json && parts.all(utf8)
}

/// The length that the client declares of its body, if it does.
pub(crate) fn declared_length(client: &ServerSession) -> Option<u64> {
    client.get_header(CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// Reads the whole body.
///
/// # Errors
/// `body_too_large` (at once, where the length is declared), `overloaded`, `request_timeout`; `None` if the client left.
pub(crate) async fn read(client: &mut ServerSession, cap: u64, share: &mut ByteShare) -> Result<Option<Bytes>> {
    let declared = declared_length(client);
    if declared.is_some_and(|length| length > cap) {
        return Err(GatewayError::BodyTooLarge { limit: cap });
    }
    if client.get_header(EXPECT).is_some() && client.write_continue_response().await.is_err() {
        return Ok(None);
    }
    let trusted = declared.unwrap_or(0).min(TRUSTED_LENGTH) as usize;
    let start = Instant::now();
    let mut first: Option<Bytes> = None;
    let mut body = BytesMut::new();
    let mut length = 0u64;
    loop {
        let deadline = start + PATIENCE + Duration::from_secs(length / PACE);
        let chunk = match timeout_at(deadline, client.read_request_body()).await {
            Ok(Ok(Some(chunk))) => chunk,
            Ok(Ok(None)) => break,
            Ok(Err(_)) => return Ok(None),
            Err(_) => return Err(GatewayError::RequestTimeout),
        };
        length += chunk.len() as u64;
        if length > cap {
            return Err(GatewayError::BodyTooLarge { limit: cap });
        }
        share.grow(chunk.len())?;
        // Most bodies come in one piece, which is then kept as it is.
        match (first.take(), body.is_empty()) {
            (None, true) => first = Some(chunk),
            (Some(head), _) => {
                body.reserve(trusted.max(head.len() + chunk.len()));
                body.extend_from_slice(&head);
                body.extend_from_slice(&chunk);
            }
            (None, false) => body.extend_from_slice(&chunk),
        }
    }
    Ok(Some(first.unwrap_or_else(|| body.freeze())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(pairs: &[(&'static str, &str)]) -> std::result::Result<(), &'static str> {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(*name, value.parse().unwrap());
        }
        check_headers(&headers).map_err(|e| e.face().code)
    }

    #[test]
    fn only_plain_json_is_a_call() {
        for kind in ["application/json", "Application/JSON; charset=UTF-8", "application/vnd.api+json"] {
            assert_eq!(check(&[("content-type", kind)]), Ok(()), "{kind}");
        }
        for kind in ["text/plain", "application/x-www-form-urlencoded", "application/json; charset=utf-16", ""] {
            assert_eq!(check(&[("content-type", kind)]), Err("unsupported_media_type"), "{kind}");
        }
        assert_eq!(check(&[]), Err("unsupported_media_type"));
        assert_eq!(
            check(&[("content-type", "application/json"), ("content-encoding", "gzip")]),
            Err("unsupported_media_type")
        );
        assert_eq!(check(&[("content-type", "application/json"), ("expect", "the-best")]), Err("expectation_failed"));
    }
}
