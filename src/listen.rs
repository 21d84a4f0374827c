//! The data port's own accept loop. Pingora serves the HTTP on each connection; accepting them here gives what its
//! service does not: the bound port of `:0`, connection caps, a deadline for the whole request header, and an end of
//! the process as soon as the last request is over.

pub(crate) mod client_io;

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use pingora_core::apps::{HttpServerApp, ReusedHttpStream, ServerApp};
use pingora_core::listeners::tls::{Acceptor, TlsSettings};
use pingora_core::protocols::http::ServerSession;
use pingora_core::protocols::tls::server::handshake;
use pingora_core::protocols::{ALPN, Ssl, Stream};
use pingora_core::server::ShutdownWatch;
use pingora_proxy::HttpProxy;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{sleep, timeout};

use crate::proxy::Proxy;
use client_io::{CONNECTION, ClientIo, Phase};

const H2_PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Waiting accept queue; the kernel caps it at its own `somaxconn`.
const BACKLOG: i32 = 4096;
/// How long an idle keep-alive connection is kept, in seconds.
const KEEPALIVE: u64 = 60;

/// Caps on connections, from `server.limits`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Caps {
    /// Connections altogether.
    pub connections: usize,
    /// Connections from one address.
    pub per_ip: usize,
    /// For a whole request header.
    pub header_timeout: Duration,
}

/// Binds a listening socket.
///
/// # Errors
/// What the operating system says, with the address.
pub(crate) fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let named = |e: io::Error| io::Error::new(e.kind(), format!("cannot listen on {address}: {e}"));
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP)).map_err(named)?;
    socket.set_reuse_address(true).map_err(named)?;
    socket.set_nonblocking(true).map_err(named)?;
    socket.bind(&address.into()).map_err(named)?;
    socket.listen(BACKLOG).map_err(named)?;
    TcpListener::from_std(socket.into()).map_err(named)
}

/// Loads certificate and key for a TLS listener; HTTP/2 is offered by ALPN.
///
/// # Errors
/// Says which file is missing or holds no certificate or key.
pub(crate) fn acceptor(cert: &str, key: &str) -> Result<Arc<Acceptor>, String> {
    let mut settings = TlsSettings::intermediate(cert, key).map_err(|e| e.to_string())?;
    settings.set_certificate_chain_file(cert).map_err(|e| format!("certificate {cert}: {e}"))?;
    settings.set_private_key_file(key).map_err(|e| format!("key {key}: {e}"))?;
    settings.enable_h2();
    // Pingora panics on a pair that does not fit; that is the user's mistake, not ours.
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| Arc::new(settings.build())))
        .map_err(|_| format!("certificate {cert} and key {key} do not form a usable pair"))
}

/// Connections that are open now, altogether and by address.
#[derive(Debug, Default)]
struct Census {
    by_ip: Mutex<(usize, HashMap<IpAddr, usize>)>,
}

/// A connection's place in the census; dropping it gives the place back.
struct Place {
    census: Arc<Census>,
    ip: IpAddr,
}

impl Census {
    fn admit(self: &Arc<Self>, ip: IpAddr, caps: &Caps) -> Option<Place> {
        let mut guard = self.by_ip.lock();
        let (total, by_ip) = &mut *guard;
        let own = by_ip.entry(ip).or_insert(0);
        if *total >= caps.connections || *own >= caps.per_ip {
            if *own == 0 {
                by_ip.remove(&ip);
            }
            return None;
        }
        *own += 1;
        *total += 1;
        drop(guard);
        Some(Place { census: Arc::clone(self), ip })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut guard = self.census.by_ip.lock();
        let (total, by_ip) = &mut *guard;
        *total = total.saturating_sub(1);
        if let Some(own) = by_ip.get_mut(&self.ip) {
            *own -= 1;
            if *own == 0 {
                by_ip.remove(&self.ip);
            }
        }
    }
}

/// One listening socket with what each of its connections needs.
pub(crate) struct Listening {
    /// The socket.
    pub listener: TcpListener,
    /// Certificate and key, on a TLS listener.
    pub tls: Option<Arc<Acceptor>>,
    /// Caps on connections.
    pub caps: Caps,
}

/// Accepts connections until `shutdown` turns true; connections already accepted go on.
pub(crate) async fn serve(listening: Vec<Listening>, app: Arc<HttpProxy<Proxy>>, shutdown: ShutdownWatch) {
    let census = Arc::new(Census::default());
    let mut loops = tokio::task::JoinSet::new();
    for one in listening {
        loops.spawn(accept_loop(one, Arc::clone(&app), shutdown.clone(), Arc::clone(&census)));
    }
    while loops.join_next().await.is_some() {}
}

async fn accept_loop(
    listening: Listening,
    app: Arc<HttpProxy<Proxy>>,
    mut shutdown: ShutdownWatch,
    census: Arc<Census>,
) {
    let Listening { listener, tls, caps } = listening;
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = shutdown.changed() => return,
        };
        let (tcp, peer) = match accepted {
            Ok(pair) => pair,
            Err(error) => {
                // Out of file descriptors, most likely: wait for some to come back instead of spinning.
                tracing::warn!(%error, "cannot accept a connection");
                sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let Some(place) = census.admit(peer.ip(), &caps) else {
            tracing::debug!(%peer, "connection refused: too many are open");
            continue;
        };
        let (app, tls, shutdown) = (Arc::clone(&app), tls.clone(), shutdown.clone());
        tokio::spawn(async move {
            serve_connection(tcp, peer, tls, app, shutdown, caps.header_timeout).await;
            drop(place);
        });
    }
}

async fn serve_connection(
    tcp: TcpStream,
    peer: SocketAddr,
    tls: Option<Arc<Acceptor>>,
    app: Arc<HttpProxy<Proxy>>,
    shutdown: ShutdownWatch,
    header_timeout: Duration,
) {
    let _ = tcp.set_nodelay(true);
    let h2c = match tls {
        Some(_) => false,
        None => match timeout(header_timeout, speaks_h2(&tcp)).await {
            Ok(Ok(h2c)) => h2c,
            Ok(Err(_)) | Err(_) => return,
        },
    };
    let phase = Arc::new(Phase::new(header_timeout, Duration::from_secs(KEEPALIVE)));
    let io = ClientIo::new(tcp, peer, Arc::clone(&phase));
    let (stream, h2): (Stream, bool) = match tls {
        None => (Box::new(io), h2c),
        Some(acceptor) => match timeout(header_timeout, handshake(&acceptor, io)).await {
            Ok(Ok(stream)) => {
                let h2 = matches!(stream.selected_alpn_proto(), Some(ALPN::H2));
                (Box::new(stream), h2)
            }
            Ok(Err(_)) | Err(_) => return,
        },
    };
    if h2 {
        // Streams of one connection overlap, so no phase of a single request bounds it: Pingora's idle limit does.
        phase.open();
        app.process_new(stream, &shutdown).await;
    } else {
        CONNECTION.scope(Arc::clone(&phase), serve_h1(stream, app, shutdown, phase)).await;
    }
}

async fn serve_h1(stream: Stream, app: Arc<HttpProxy<Proxy>>, shutdown: ShutdownWatch, phase: Arc<Phase>) {
    let mut session = ServerSession::new_http1(stream);
    session.set_keepalive(if *shutdown.borrow() { None } else { Some(KEEPALIVE) });
    session.set_pipelining_enabled(true);
    let mut next = app.process_new_http(session, &shutdown).await;
    while let Some((stream, settings)) = next.map(ReusedHttpStream::consume) {
        phase.idle();
        let mut session = ServerSession::new_http1(stream);
        if let Some(settings) = settings {
            settings.apply_to_session(&mut session);
        }
        next = app.process_new_http(session, &shutdown).await;
    }
}

/// Whether a cleartext connection opens with the HTTP/2 preface.
async fn speaks_h2(tcp: &TcpStream) -> io::Result<bool> {
    let mut buffer = [0u8; 24];
    loop {
        let n = tcp.peek(&mut buffer).await?;
        let seen = buffer.get(..n).unwrap_or_default();
        if n == 0 || !H2_PREFACE.starts_with(seen) {
            return Ok(false);
        }
        if n == H2_PREFACE.len() {
            return Ok(true);
        }
        // A beginning of the preface and no more yet: peeking again returns at once, so pause in between.
        sleep(Duration::from_millis(2)).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_census_caps_addresses_and_the_whole_and_gives_places_back() {
        let census = Arc::new(Census::default());
        let caps = Caps { connections: 3, per_ip: 2, header_timeout: Duration::ZERO };
        let (a, b): (IpAddr, IpAddr) = ([127, 0, 0, 1].into(), [127, 0, 0, 2].into());
        let first = census.admit(a, &caps);
        let second = census.admit(a, &caps);
        assert!(first.is_some() && second.is_some() && census.admit(a, &caps).is_none());
        let third = census.admit(b, &caps);
        assert!(third.is_some() && census.admit(b, &caps).is_none());
        drop(first);
        assert!(census.admit(b, &caps).is_some());
    }
}
