//! A client's TCP connection as Pingora's I/O: small writes are gathered until they are flushed, and a request header
//! has one deadline for all of it, on a fresh connection as on a reused one.

use std::fmt;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use async_trait::async_trait;
use parking_lot::Mutex;
use pingora_core::protocols::{
    GetProxyDigest, GetSocketDigest, GetTimingDigest, Peek, Shutdown, SocketDigest, Ssl, TimingDigest, UniqueID,
    UniqueIDType,
};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, BufWriter, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep, sleep_until};

/// Writes up to this size are gathered until the next flush; larger ones go out directly.
const WRITE_BUFFER: usize = 2048;

tokio::task_local! {
    /// The phase of the HTTP/1 connection that the current task serves.
    pub static CONNECTION: Arc<Phase>;
}

/// What a connection waits for, and until when.
#[derive(Debug)]
pub(crate) struct Phase {
    header_timeout: Duration,
    idle_timeout: Duration,
    now: Mutex<Wait>,
}

#[derive(Debug, Clone, Copy)]
enum Wait {
    /// For the rest of a request header.
    Header(Instant),
    /// For the first byte of the next request.
    Idle(Instant),
    /// A request is being served: its own deadlines hold.
    Open,
}

impl Phase {
    /// A fresh connection: its first header is due.
    pub(crate) fn new(header_timeout: Duration, idle_timeout: Duration) -> Self {
        Self { header_timeout, idle_timeout, now: Mutex::new(Wait::Header(Instant::now() + header_timeout)) }
    }

    /// A request header has arrived whole.
    pub(crate) fn open(&self) {
        *self.now.lock() = Wait::Open;
    }

    /// The connection waits for its next request.
    pub(crate) fn idle(&self) {
        *self.now.lock() = Wait::Idle(Instant::now() + self.idle_timeout);
    }

    fn deadline(&self) -> Option<Instant> {
        match *self.now.lock() {
            Wait::Header(at) | Wait::Idle(at) => Some(at),
            Wait::Open => None,
        }
    }

    fn bytes_came(&self) {
        let mut now = self.now.lock();
        if matches!(*now, Wait::Idle(_)) {
            *now = Wait::Header(Instant::now() + self.header_timeout);
        }
    }
}

/// Marks the header of the current HTTP/1 request as arrived; does nothing on HTTP/2.
pub(crate) fn header_arrived() {
    let _ = CONNECTION.try_with(|phase| phase.open());
}

/// The connection itself.
pub(crate) struct ClientIo {
    io: BufWriter<TcpStream>,
    phase: Arc<Phase>,
    timer: Option<Pin<Box<Sleep>>>,
    digest: Arc<SocketDigest>,
    id: UniqueIDType,
}

impl ClientIo {
    /// Takes over an accepted connection.
    pub(crate) fn new(tcp: TcpStream, peer: SocketAddr, phase: Arc<Phase>) -> Self {
        let fd = tcp.as_raw_fd();
        let digest = SocketDigest::from_raw_fd(fd);
        let _ = digest.peer_addr.set(Some(peer.into()));
        Self { io: BufWriter::with_capacity(WRITE_BUFFER, tcp), phase, timer: None, digest: Arc::new(digest), id: fd }
    }
}

impl fmt::Debug for ClientIo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientIo").field("id", &self.id).finish_non_exhaustive()
    }
}

impl AsyncRead for ClientIo {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        match Pin::new(&mut self.io).poll_read(cx, buf) {
            Poll::Ready(result) => {
                if buf.filled().len() > before {
                    self.phase.bytes_came();
                }
                self.timer = None;
                Poll::Ready(result)
            }
            Poll::Pending => {
                let Some(deadline) = self.phase.deadline() else { return Poll::Pending };
                let timer = self.timer.get_or_insert_with(|| Box::pin(sleep_until(deadline)));
                if timer.deadline() != deadline {
                    timer.as_mut().reset(deadline);
                }
                match timer.as_mut().poll(cx) {
                    Poll::Ready(()) => Poll::Ready(Err(io::ErrorKind::TimedOut.into())),
                    Poll::Pending => Poll::Pending,
                }
            }
        }
    }
}

impl AsyncWrite for ClientIo {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}

#[async_trait]
impl Shutdown for ClientIo {
    async fn shutdown(&mut self) {
        let _ = self.io.shutdown().await;
    }
}

impl UniqueID for ClientIo {
    fn id(&self) -> UniqueIDType {
        self.id
    }
}

impl Ssl for ClientIo {}
impl Peek for ClientIo {}

impl GetTimingDigest for ClientIo {
    fn get_timing_digest(&self) -> Vec<Option<TimingDigest>> {
        Vec::new()
    }
}

impl GetProxyDigest for ClientIo {
    fn get_proxy_digest(&self) -> Option<Arc<pingora_core::protocols::raw_connect::ProxyDigest>> {
        None
    }

    fn set_proxy_digest(&mut self, _: pingora_core::protocols::raw_connect::ProxyDigest) {}
}

impl GetSocketDigest for ClientIo {
    fn get_socket_digest(&self) -> Option<Arc<SocketDigest>> {
        Some(Arc::clone(&self.digest))
    }

    fn set_socket_digest(&mut self, digest: SocketDigest) {
        self.digest = Arc::new(digest);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncReadExt;
    use tokio::net::TcpListener;

    async fn pair(phase: &Arc<Phase>) -> (ClientIo, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (server, peer) = listener.accept().await.unwrap();
        (ClientIo::new(server, peer, Arc::clone(phase)), client)
    }

    #[tokio::test]
    async fn a_header_that_trickles_in_is_cut_at_its_deadline() {
        let phase = Arc::new(Phase::new(Duration::from_millis(80), Duration::from_secs(60)));
        let (mut io, mut client) = pair(&phase).await;
        let trickle = tokio::spawn(async move {
            while client.write_all(b"x").await.is_ok() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        });
        let mut byte = [0u8; 1];
        let error = loop {
            if let Err(error) = io.read_exact(&mut byte).await {
                break error;
            }
            // Bytes that are there already are read; the deadline is for waiting.
            if Instant::now() > phase.deadline().unwrap() + Duration::from_millis(500) {
                panic!("the header deadline did not hold");
            }
        };
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        drop(io);
        trickle.await.unwrap();
    }

    #[tokio::test]
    async fn an_open_request_has_no_header_deadline_and_a_reused_connection_gets_a_new_one() {
        let phase = Arc::new(Phase::new(Duration::from_millis(50), Duration::from_secs(60)));
        let (mut io, mut client) = pair(&phase).await;
        phase.open();
        let mut byte = [0u8; 1];
        let waited = tokio::time::timeout(Duration::from_millis(150), io.read_exact(&mut byte)).await;
        assert!(waited.is_err(), "still waiting, not cut");
        phase.idle();
        client.write_all(b"G").await.unwrap();
        io.read_exact(&mut byte).await.unwrap();
        let error = io.read_exact(&mut byte).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }
}
