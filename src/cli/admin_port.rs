//! The admin port of a gateway that runs, for the commands that ask it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use http::header::{AUTHORIZATION, CONTENT_TYPE, HOST};
use http::{HeaderValue, Method, Request, StatusCode, Uri};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::TcpStream;
use tollgate_filters::config::{Secret, SecretSource, World};

use crate::cli::check;

/// How long a gateway may take.
const PATIENCE: Duration = Duration::from_secs(5);
/// Nothing that it tells is longer.
const LONGEST: usize = 16 << 20;
const TOKEN: &str = "TOLLGATE_ADMIN_TOKEN";

/// Which gateway to ask.
#[derive(Debug, Args)]
pub(super) struct Whom {
    /// Its configuration, which names the admin port and the token. Default: ./conf/tollgate.yaml, then /etc/tollgate/tollgate.yaml.
    #[arg(short, long, value_name = "FILE", global = true)]
    config: Option<PathBuf>,
    /// Its admin port, like http://127.0.0.1:9180, in place of a configuration; the token is that of TOLLGATE_ADMIN_TOKEN.
    #[arg(long, value_name = "URL", global = true, conflicts_with = "config")]
    admin: Option<Uri>,
    /// File with the admin token.
    #[arg(long, value_name = "FILE", global = true)]
    token_file: Option<PathBuf>,
}

/// A gateway's admin port and the token for it.
pub(super) struct AdminPort {
    /// Host and port.
    authority: String,
    token: Option<Secret>,
}

/// What a gateway answered.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) status: StatusCode,
    /// Null if it has no body, or one that is no JSON.
    pub(super) body: Value,
}

impl AdminPort {
    /// The port of the gateway that is meant.
    ///
    /// # Errors
    /// A configuration, an address or a token that cannot be used; in words, perhaps of several lines.
    pub(super) fn of(whom: &Whom, world: &dyn World) -> Result<Self, String> {
        let told = match &whom.token_file {
            Some(path) => {
                let source = SecretSource::File(path.display().to_string());
                Some(source.resolve(world).map_err(|why| format!("the admin token: {why}"))?)
            }
            None => None,
        };
        if let Some(url) = &whom.admin {
            let token = told.or_else(|| world.env(TOKEN).filter(|token| !token.is_empty()).map(Secret::new));
            return Ok(Self { authority: authority(url)?, token });
        }
        let document = check::look(whom.config.as_ref(), world).map_err(|problems| problems.to_string())?;
        let admin = &document.server.admin;
        if admin.bind.0.port() == 0 {
            return Err("the configuration leaves the port of `server.admin` open; name it with --admin URL".to_owned());
        }
        let token = match (&told, &admin.token) {
            (None, Some(source)) => Some(source.resolve(world).map_err(|why| format!("server.admin.token: {why}"))?),
            _ => told,
        };
        Ok(Self { authority: near(admin.bind.0).to_string(), token })
    }

    /// Host and port, to be told.
    pub(super) fn authority(&self) -> &str {
        &self.authority
    }

    /// Asks it. Only an answer that refuses the token is an error here.
    ///
    /// # Errors
    /// When nobody is there, it takes too long, it is no gateway, or it does not accept the token; in words.
    pub(super) async fn ask(&self, method: Method, target: &str) -> Result<Answer, String> {
        let at = &self.authority;
        let answer = tokio::time::timeout(PATIENCE, self.exchange(method, target)).await;
        let answer =
            answer.map_err(|_| format!("the gateway at {at} did not answer within {} s", PATIENCE.as_secs()))??;
        if answer.status != StatusCode::UNAUTHORIZED {
            return Ok(answer);
        }
        Err(match self.token {
            Some(_) => format!("the gateway at {at} does not accept this admin token"),
            None => format!("the gateway at {at} asks for its admin token: set {TOKEN}, or use --token-file FILE"),
        })
    }

    async fn exchange(&self, method: Method, target: &str) -> Result<Answer, String> {
        let at = &self.authority;
        let stream =
            TcpStream::connect(at).await.map_err(|error| format!("there is no gateway at {at}: {}", plain(&error)))?;
        let strange = |error: hyper::Error| format!("what answers at {at} is no admin port of a gateway: {error}");
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(strange)?;
        let connection = tokio::spawn(connection);
        let mut request = Request::builder().method(method).uri(target).header(HOST, at);
        if let Some(token) = &self.token {
            let value = HeaderValue::from_str(&format!("Bearer {}", token.expose()));
            let mut value =
                value.map_err(|_| "the admin token has characters that a header cannot carry".to_owned())?;
            value.set_sensitive(true);
            request = request.header(AUTHORIZATION, value);
        }
        let request = request.body(Full::<Bytes>::default()).map_err(|error| error.to_string())?;
        let (head, body) = sender.send_request(request).await.map_err(strange)?.into_parts();
        let body = Limited::new(body, LONGEST).collect().await;
        connection.abort();
        let body = body.map_err(|error| format!("the answer of {at} broke off: {error}"))?.to_bytes();
        let json = head.headers.get(CONTENT_TYPE).is_some_and(|kind| kind.as_bytes().starts_with(b"application/json"));
        let body = if json { serde_json::from_slice(&body).unwrap_or_default() } else { Value::Null };
        Ok(Answer { status: head.status, body })
    }
}

impl Answer {
    /// What the gateway says of its failure.
    pub(super) fn failure(&self) -> String {
        let told = self.body.pointer("/error/message").and_then(Value::as_str);
        told.map_or_else(
            || format!("the gateway answered {}", self.status),
            |words| format!("the gateway says: {words}"),
        )
    }
}

/// The error without the number of the system.
fn plain(error: &std::io::Error) -> String {
    let text = error.to_string();
    text.split_once(" (os error").map_or(text.clone(), |(words, _)| words.to_owned())
}

fn authority(url: &Uri) -> Result<String, String> {
    if !matches!(url.scheme_str(), Some("http") | None) {
        return Err(format!("{url}: the admin port speaks plain HTTP, like http://127.0.0.1:9180"));
    }
    let bad = || format!("{url} is not the address of an admin port, like http://127.0.0.1:9180");
    if !matches!(url.path(), "" | "/") || url.query().is_some() {
        return Err(bad());
    }
    let authority = url.authority().filter(|authority| !authority.as_str().contains('@')).ok_or_else(bad)?;
    match authority.port_u16() {
        Some(_) => Ok(authority.to_string()),
        None if url.scheme().is_some() => Ok(format!("{authority}:80")),
        None => Err(bad()),
    }
}

/// Where an address that is bound to can be reached from this machine.
fn near(bound: SocketAddr) -> SocketAddr {
    let ip = match bound.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, bound.port())
}

/// A part of a path, with everything escaped that is not plain.
pub(super) fn segment(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-' | b'~');
    text.bytes().fold(String::with_capacity(text.len()), |mut path, byte| {
        if plain(byte) {
            path.push(byte.into())
        } else {
            path.push_str(&format!("%{byte:02X}"))
        }
        path
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_is_that_of_a_plain_port() {
        let of = |text: &str| authority(&text.parse().unwrap());
        assert_eq!(of("http://127.0.0.1:9180").unwrap(), "127.0.0.1:9180");
        assert_eq!(of("http://gate.internal:9180/").unwrap(), "gate.internal:9180");
        assert_eq!(of("127.0.0.1:9180").unwrap(), "127.0.0.1:9180");
        assert_eq!(of("http://gate").unwrap(), "gate:80");
        for bad in ["https://127.0.0.1:9180", "http://127.0.0.1:9180/api", "http://u:p@127.0.0.1:1", "localhost", "/x"]
        {
            assert!(of(bad).unwrap_err().contains("127.0.0.1:9180"), "{bad}");
        }
    }

    #[test]
    fn a_port_open_to_all_is_asked_from_nearby() {
        let near = |text: &str| near(text.parse().unwrap()).to_string();
        assert_eq!(near("0.0.0.0:9180"), "127.0.0.1:9180");
        assert_eq!(near("[::]:9180"), "[::1]:9180");
        assert_eq!(near("10.0.0.1:9180"), "10.0.0.1:9180");
    }

    #[test]
    fn an_id_stays_one_part_of_a_path() {
        assert_eq!(segment("team:a/b.c-d_1"), "team%3Aa%2Fb.c-d_1");
        assert_eq!(segment("../x y?é"), "..%2Fx%20y%3F%C3%A9");
    }
}
