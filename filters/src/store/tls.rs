//! TLS to Redis: whom to trust, and what to show.

use std::fmt;
use std::sync::Arc;

use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore, crypto};

/// Certificates for a connection by TLS, read and checked.
#[derive(Clone)]
pub struct Tls(Arc<ClientConfig>);

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Tls(***)")
    }
}

impl Tls {
    /// Trusts the system's authorities and those in `ca`; shows the certificates and the key of `own`, if the server wants
    /// to know who asks. All of them PEM.
    ///
    /// # Errors
    /// Which of them is none.
    pub fn new(ca: Option<&str>, own: Option<(&str, &str)>) -> Result<Self, String> {
        let mut roots = RootCertStore::empty();
        // A machine without any, or with odd ones, may still have one of its own here.
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        if let Some(ca) = ca {
            for certificate in certificates(ca).map_err(|why| format!("`ca`: {why}"))? {
                roots.add(certificate).map_err(|error| format!("`ca`: {error}"))?;
            }
        }
        let config = ClientConfig::builder_with_provider(Arc::new(crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .map_err(|error| error.to_string())?
            .with_root_certificates(roots);
        let config = match own {
            None => config.with_no_client_auth(),
            Some((cert, key)) => {
                let chain = certificates(cert).map_err(|why| format!("`cert`: {why}"))?;
                let key = PrivateKeyDer::from_pem_slice(key.as_bytes())
                    .map_err(|_| "`key`: there is no private key in it".to_owned())?;
                config.with_client_auth_cert(chain, key).map_err(|error| format!("`cert` and `key`: {error}"))?
            }
        };
        Ok(Self(Arc::new(config)))
    }

    pub(super) async fn handshake(&self, host: &str, stream: TcpStream) -> std::io::Result<TlsStream<TcpStream>> {
        let name = ServerName::try_from(host.to_owned()).map_err(std::io::Error::other)?;
        TlsConnector::from(Arc::clone(&self.0)).connect(name, stream).await
    }
}

fn certificates(pem: &str) -> Result<Vec<CertificateDer<'static>>, String> {
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem.as_bytes()).collect();
    match all {
        Ok(all) if !all.is_empty() => Ok(all),
        _ => Err("there is no certificate in it".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_that_hold_something_else_are_told_by_name() {
        let rubbish = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
        assert!(Tls::new(Some("no certificate"), None).unwrap_err().contains("`ca`"));
        assert!(Tls::new(Some(rubbish), None).unwrap_err().contains("`ca`"));
        assert!(Tls::new(None, Some(("", ""))).unwrap_err().contains("`cert`"));
        assert!(Tls::new(None, Some((rubbish, "no key"))).unwrap_err().contains("`key`"));
        assert!(Tls::new(None, None).is_ok());
    }
}
