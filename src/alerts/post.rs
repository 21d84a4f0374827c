//! Telling a notice: a signed POST, tried again for a while.

use std::fmt::Write;
use std::sync::Arc;
use std::time::Duration;

use hmac::{Hmac, Mac};
use http::Uri;
use pingora_core::upstreams::peer::HttpPeer;
use pingora_http::RequestHeader;
use sha2::Sha256;
use tokio::sync::mpsc;
use tollgate_filters::config::Secret;

use super::Notice;
use crate::gateway::Gateway;

/// How often a notice is tried in all.
const TRIES: u32 = 5;
/// Pause after the first try; doubled after each further one.
const PAUSE: Duration = Duration::from_millis(500);
/// Longest time of one try.
const PATIENCE: Duration = Duration::from_secs(10);

/// Where notices go.
pub(super) struct Courier {
    host: String,
    port: u16,
    tls: bool,
    /// Host and port as written.
    authority: String,
    path: String,
    secret: Secret,
}

impl Courier {
    /// A courier to an address that was checked.
    pub(super) fn new(address: &Uri, secret: Secret) -> Self {
        let tls = address.scheme_str() == Some("https");
        let host = address.host().unwrap_or_default().trim_start_matches('[').trim_end_matches(']').to_owned();
        let authority = address.authority().map(ToString::to_string).unwrap_or_default();
        let path = address.path_and_query().map_or_else(|| "/".to_owned(), ToString::to_string);
        Self { port: address.port_u16().unwrap_or(if tls { 443 } else { 80 }), host, tls, authority, path, secret }
    }

    /// Tells one notice after another.
    pub(super) async fn run(self, mut notices: mpsc::Receiver<Notice>, gateway: Arc<Gateway>) {
        while let Some(notice) = notices.recv().await {
            let told = self.tell(&notice, &gateway).await;
            gateway.metrics.alert(if told { "sent" } else { "failed" });
        }
    }

    async fn tell(&self, notice: &Notice, gateway: &Gateway) -> bool {
        let Ok(body) = serde_json::to_vec(notice) else { return false };
        let Some(signature) = sign(&self.secret, &body) else { return false };
        for tried in 0..TRIES {
            if tried > 0 {
                tokio::time::sleep(PAUSE * 2_u32.pow(tried - 1)).await;
            }
            // The address is not logged beyond its host: its path may be a secret.
            match tokio::time::timeout(PATIENCE, self.post(gateway, &signature, &body)).await {
                Ok(Ok(status)) if (200..300).contains(&status) => return true,
                Ok(Ok(status)) => tracing::warn!(host = self.host, status, tried, "an alert was not taken"),
                Ok(Err(why)) => tracing::warn!(host = self.host, why, tried, "an alert cannot be told"),
                Err(_) => tracing::warn!(host = self.host, tried, "an alert's receiver does not answer"),
            }
        }
        tracing::error!(host = self.host, event = notice.event, "an alert is given up");
        false
    }

    async fn post(&self, gateway: &Gateway, signature: &str, body: &[u8]) -> Result<u16, String> {
        let mut addresses =
            tokio::net::lookup_host((self.host.as_str(), self.port)).await.map_err(|error| error.to_string())?;
        let address = addresses.next().ok_or("its host has no address")?;
        let mut peer = HttpPeer::new(address, self.tls, self.host.clone());
        peer.options.connection_timeout = Some(PATIENCE);
        peer.options.total_connection_timeout = Some(PATIENCE);
        let head = self.head(signature, body.len()).map_err(|error| error.to_string())?;
        let exchange = async {
            let (mut session, _) = gateway.connector.get_http_session(&peer).await?;
            session.write_request_header(Box::new(head)).await?;
            session.write_request_body(body.to_vec().into(), true).await?;
            session.finish_request_body().await?;
            session.read_response_header().await?;
            Ok(session.response_header().map_or(0, |head| head.status.as_u16()))
        };
        exchange.await.map_err(|error: Box<pingora_core::Error>| error.etype().as_str().to_owned())
    }

    fn head(&self, signature: &str, length: usize) -> pingora_core::Result<RequestHeader> {
        let mut head = RequestHeader::build("POST", self.path.as_bytes(), Some(5))?;
        head.insert_header("host", &self.authority)?;
        head.insert_header("content-type", "application/json")?;
        head.insert_header("content-length", length)?;
        head.insert_header("user-agent", concat!("tollgate/", env!("CARGO_PKG_VERSION")))?;
        head.insert_header("x-tollgate-signature", signature)?;
        Ok(head)
    }
}

/// `sha256=` and the HMAC-SHA256 of the body in hex.
fn sign(secret: &Secret, body: &[u8]) -> Option<String> {
    let mut mac = Hmac::<Sha256>::new_from_slice(secret.expose().as_bytes()).ok()?;
    mac.update(body);
    let mut text = "sha256=".to_owned();
    for byte in mac.finalize().into_bytes() {
        let _ = write!(text, "{byte:02x}");
    }
    Some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_signature_is_the_hmac_of_the_body() {
        // RFC 4231, test case 2.
        let signed = sign(&Secret::new("Jefe"), b"what do ya want for nothing?").unwrap();
        assert_eq!(signed, "sha256=5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843");
    }

    #[test]
    fn an_address_is_taken_apart() {
        let to = |text: &str| Courier::new(&text.parse().unwrap(), Secret::new("s"));
        let plain = to("http://127.0.0.1:9/hook?a=b");
        assert_eq!((&*plain.host, plain.port, plain.tls, &*plain.path), ("127.0.0.1", 9, false, "/hook?a=b"));
        let safe = to("https://[::1]");
        assert_eq!((&*safe.host, safe.port, safe.tls, &*safe.path, &*safe.authority), ("::1", 443, true, "/", "[::1]"));
    }
}
