//! The wire under both simulators: a listener, its connections, and a body that knows when it was dropped.

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};

use bytes::Bytes;
use futures::stream::BoxStream;
use futures::{FutureExt, StreamExt};
use http::{Request, Response, StatusCode};
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, oneshot};
use tokio::task::{JoinHandle, JoinSet};

use crate::record::{CallGuard, Ending};

/// What answers the requests of a listener.
pub(crate) trait App: Send + Sync + 'static {
    fn answer(self: Arc<Self>, request: Request<Incoming>, peer: Peer) -> impl Future<Output = Response<Reply>> + Send;
}

/// The connection a request came on.
#[derive(Clone)]
pub(crate) struct Peer {
    pub(crate) connection: u64,
    kill: Arc<Notify>,
}

impl Peer {
    /// Closes the connection as it stands, and never returns.
    pub(crate) async fn hang_up(&self, call: &mut CallGuard) -> ! {
        call.finish(Ending::Broken);
        self.kill.notify_one();
        std::future::pending().await
    }
}

#[derive(Default)]
pub(crate) struct Connections {
    pub(crate) total: AtomicU64,
    pub(crate) open: AtomicU64,
}

struct Open(Arc<Connections>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A running listener. Dropping it closes the listener and every connection.
pub(crate) struct Listener {
    addr: SocketAddr,
    task: JoinHandle<()>,
    stop: Option<oneshot::Sender<()>>,
}

impl Listener {
    pub(crate) async fn start<A: App>(bind: SocketAddr, app: Arc<A>, seen: Arc<Connections>) -> io::Result<Self> {
        let listener = TcpListener::bind(bind).await?;
        let addr = listener.local_addr()?;
        let (stop, stopped) = oneshot::channel();
        let task = tokio::spawn(accept(listener, app, seen, stopped));
        Ok(Self { addr, task, stop: Some(stop) })
    }

    pub(crate) fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Closes everything and returns when it is closed.
    pub(crate) async fn stop(mut self) {
        drop(self.stop.take());
        // The task cannot panic of itself; were it gone already, everything is closed as well.
        let _ = (&mut self.task).await;
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn accept<A: App>(
    listener: TcpListener,
    app: Arc<A>,
    seen: Arc<Connections>,
    mut stopped: oneshot::Receiver<()>,
) {
    let mut open = JoinSet::new();
    loop {
        tokio::select! {
            _ = &mut stopped => break,
            Some(_) = open.join_next() => {}
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    let connection = seen.total.fetch_add(1, Ordering::Relaxed) + 1;
                    seen.open.fetch_add(1, Ordering::Relaxed);
                    open.spawn(serve(stream, connection, Arc::clone(&app), Open(Arc::clone(&seen))));
                }
                // Out of descriptors: wait for some to be freed rather than spin.
                Err(_) => tokio::time::sleep(std::time::Duration::from_millis(10)).await,
            },
        }
    }
    drop(listener);
    open.shutdown().await;
}

async fn serve<A: App>(stream: TcpStream, connection: u64, app: Arc<A>, _open: Open) {
    // Only latency is lost without it.
    let _ = stream.set_nodelay(true);
    let peer = Peer { connection, kill: Arc::default() };
    let kill = Arc::clone(&peer.kill);
    let service = service_fn(move |request| Arc::clone(&app).answer(request, peer.clone()).map(Ok::<_, Infallible>));
    let builder = auto::Builder::new(TokioExecutor::new());
    let talk = builder.serve_connection(TokioIo::new(stream), service);
    tokio::select! {
        biased;
        () = kill.notified() => {}
        // A peer that breaks the protocol or leaves is its own affair.
        _ = talk => {}
    }
}

/// The body of an answer.
pub(crate) enum Reply {
    /// Sent at once; the request is complete when the connection took it.
    Whole(Option<Bytes>, Option<CallGuard>),
    /// Sent as it comes.
    Stream(BoxStream<'static, Bytes>),
}

impl Reply {
    pub(crate) fn new(
        status: StatusCode,
        kind: &'static str,
        body: impl Into<Bytes>,
        call: CallGuard,
    ) -> Response<Self> {
        let mut response = Response::new(Self::Whole(Some(body.into()), Some(call)));
        *response.status_mut() = status;
        response.headers_mut().insert(http::header::CONTENT_TYPE, http::HeaderValue::from_static(kind));
        response
    }

    pub(crate) fn json(status: StatusCode, body: &impl serde::Serialize, call: CallGuard) -> Response<Self> {
        // Only maps with keys that are not strings fail, and there are none.
        Self::new(status, "application/json", serde_json::to_vec(body).unwrap_or_default(), call)
    }

    pub(crate) fn stream(kind: &'static str, stream: BoxStream<'static, Bytes>) -> Response<Self> {
        let mut response = Response::new(Self::Stream(stream));
        response.headers_mut().insert(http::header::CONTENT_TYPE, http::HeaderValue::from_static(kind));
        response
    }
}

impl Body for Reply {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        match &mut *self {
            Self::Whole(body, call) => {
                if let Some(call) = call {
                    call.finish(Ending::Complete);
                }
                Poll::Ready(body.take().map(|bytes| Ok(Frame::data(bytes))))
            }
            Self::Stream(stream) => stream.poll_next_unpin(cx).map(|next| next.map(|bytes| Ok(Frame::data(bytes)))),
        }
    }

    fn is_end_stream(&self) -> bool {
        matches!(self, Self::Whole(None, _))
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Whole(body, _) => SizeHint::with_exact(body.as_ref().map_or(0, |bytes| bytes.len() as u64)),
            Self::Stream(_) => SizeHint::default(),
        }
    }
}
