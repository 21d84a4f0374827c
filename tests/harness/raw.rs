//! Bare TCP on both sides, where bytes and their timing are the point.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Mutex, mpsc};
use tokio::task::JoinHandle;

use super::in_time;

/// A client that sends exactly the bytes it is told to.
pub(crate) struct RawClient {
    stream: TcpStream,
}

/// An HTTP/1.1 message as it came over the wire.
#[derive(Debug, Clone)]
pub(crate) struct Seen {
    /// The first line.
    pub(crate) line: String,
    pub(crate) headers: Vec<(String, String)>,
    /// The body without its framing.
    pub(crate) body: Vec<u8>,
    /// Whether the body came to its end.
    pub(crate) complete: bool,
}

impl Seen {
    /// The header's value, empty if it is missing; values of repeated headers are joined by `, `.
    pub(crate) fn header(&self, name: &str) -> String {
        let values = self.headers.iter().filter(|(key, _)| key.eq_ignore_ascii_case(name));
        values.map(|(_, value)| value.as_str()).collect::<Vec<_>>().join(", ")
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        self.headers.iter().any(|(key, _)| key.eq_ignore_ascii_case(name))
    }

    /// The status of an answer, or 0.
    pub(crate) fn status(&self) -> u16 {
        self.line.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0)
    }

    /// Path and query of a request.
    pub(crate) fn target(&self) -> &str {
        self.line.split(' ').nth(1).unwrap_or_default()
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    fn parse(head: &[u8]) -> Self {
        let head = String::from_utf8_lossy(head);
        let mut lines = head.split("\r\n");
        let line = lines.next().unwrap_or_default().to_owned();
        let header = |text: &str| text.split_once(':').map(|(key, value)| (key.to_owned(), value.trim().to_owned()));
        Self { line, headers: lines.filter_map(header).collect(), body: Vec::new(), complete: false }
    }
}

/// Bytes of a connection that were read but not used yet.
#[derive(Default)]
struct Inbox {
    bytes: Vec<u8>,
}

impl Inbox {
    /// Reads more; false at the end of the stream.
    async fn more(&mut self, stream: &mut TcpStream) -> bool {
        stream.read_buf(&mut self.bytes).await.is_ok_and(|n| n > 0)
    }

    async fn until(&mut self, stream: &mut TcpStream, mark: &[u8]) -> Option<Vec<u8>> {
        loop {
            if let Some(at) = self.bytes.windows(mark.len()).position(|window| window == mark) {
                let found = self.bytes.drain(..at + mark.len()).take(at).collect();
                return Some(found);
            }
            if !self.more(stream).await {
                return None;
            }
        }
    }

    async fn exactly(&mut self, stream: &mut TcpStream, count: usize, into: &mut Vec<u8>) -> bool {
        while self.bytes.len() < count {
            if !self.more(stream).await {
                into.append(&mut self.bytes);
                return false;
            }
        }
        into.extend(self.bytes.drain(..count));
        true
    }

    async fn head(&mut self, stream: &mut TcpStream) -> Option<Seen> {
        self.until(stream, b"\r\n\r\n").await.map(|head| Seen::parse(&head))
    }

    /// Reads the body by its framing; `until_close` if neither length nor chunks are given.
    async fn body(&mut self, stream: &mut TcpStream, seen: &mut Seen, until_close: bool) {
        if seen.header("transfer-encoding").eq_ignore_ascii_case("chunked") {
            loop {
                let Some(size) = self.until(stream, b"\r\n").await else { return };
                let size = String::from_utf8_lossy(&size).trim().to_owned();
                let Ok(size) = usize::from_str_radix(size.split(';').next().unwrap_or_default(), 16) else { return };
                if !self.exactly(stream, size, &mut seen.body).await || self.until(stream, b"\r\n").await.is_none() {
                    return;
                }
                if size == 0 {
                    seen.complete = true;
                    return;
                }
            }
        }
        if let Ok(length) = seen.header("content-length").parse() {
            seen.complete = self.exactly(stream, length, &mut seen.body).await;
        } else if until_close {
            while self.more(stream).await {}
            seen.body.append(&mut self.bytes);
            seen.complete = true;
        } else {
            seen.complete = true;
        }
    }
}

impl RawClient {
    pub(crate) async fn connect(to: SocketAddr) -> Self {
        let stream = in_time("a TCP connection", TcpStream::connect(to)).await.expect("a TCP connection");
        stream.set_nodelay(true).expect("no delay");
        Self { stream }
    }

    pub(crate) async fn write(&mut self, bytes: impl AsRef<[u8]>) {
        in_time("a write", self.stream.write_all(bytes.as_ref())).await.expect("bytes are taken");
    }

    /// Reads one answer.
    pub(crate) async fn answer(&mut self) -> Seen {
        in_time("an answer", async {
            let mut inbox = Inbox::default();
            let mut seen = inbox.head(&mut self.stream).await.expect("an answer");
            if seen.status() >= 200 {
                inbox.body(&mut self.stream, &mut seen, true).await;
            }
            assert!(inbox.bytes.is_empty(), "bytes after the answer: {:?}", String::from_utf8_lossy(&inbox.bytes));
            seen
        })
        .await
    }

    /// Writes a request and reads its answer.
    pub(crate) async fn ask(&mut self, bytes: impl AsRef<[u8]>) -> Seen {
        self.write(bytes).await;
        self.answer().await
    }

    /// Everything until the other side closes.
    pub(crate) async fn read_to_close(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        // A reset is an end as well: what came before it counts.
        let _ = in_time("the connection to close", self.stream.read_to_end(&mut bytes)).await;
        bytes
    }

    /// Waits until at least this text has come; gives everything read.
    pub(crate) async fn read_until(&mut self, mark: &str) -> String {
        in_time(mark, async {
            let mut bytes = Vec::new();
            while !String::from_utf8_lossy(&bytes).contains(mark) {
                let count = self.stream.read_buf(&mut bytes).await.expect("readable");
                assert!(count > 0, "closed before {mark:?}: {}", String::from_utf8_lossy(&bytes));
            }
            String::from_utf8_lossy(&bytes).into_owned()
        })
        .await
    }
}

/// A request that has reached a [`RawNode`], to be answered by the test byte for byte.
pub(crate) struct Upcall {
    pub(crate) request: Seen,
    stream: TcpStream,
    inbox: Inbox,
    /// Whether the connection ends with this call, and says so.
    last: bool,
}

impl Upcall {
    /// Reads the next request of a connection; `None` when it closes.
    async fn read(mut stream: TcpStream, mut inbox: Inbox, with_body: bool, last: bool) -> Option<Self> {
        let mut request = inbox.head(&mut stream).await?;
        if with_body {
            inbox.body(&mut stream, &mut request, false).await;
        }
        Some(Self { request, stream, inbox, last })
    }

    fn kept(&self) -> &'static str {
        if self.last { "connection: close\r\n" } else { "" }
    }

    /// Writes bytes as they are. A peer that has gone is no error here.
    pub(crate) async fn write(&mut self, bytes: impl AsRef<[u8]>) {
        let _ = in_time("a node's write", self.stream.write_all(bytes.as_ref())).await;
    }

    /// The head of a chunked `text/event-stream`.
    pub(crate) async fn stream_head(&mut self) {
        let kept = self.kept();
        self.write(format!(
            "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n{kept}transfer-encoding: chunked\r\n\r\n"
        ))
        .await;
    }

    /// One chunk of a chunked body.
    pub(crate) async fn chunk(&mut self, bytes: impl AsRef<[u8]>) {
        let bytes = bytes.as_ref();
        let mut framed = format!("{:x}\r\n", bytes.len()).into_bytes();
        framed.extend_from_slice(bytes);
        framed.extend_from_slice(b"\r\n");
        self.write(framed).await;
    }

    /// The last chunk.
    pub(crate) async fn last_chunk(&mut self) {
        self.write("0\r\n\r\n").await;
    }

    /// A whole JSON answer.
    pub(crate) async fn json(&mut self, status: &str, body: &str) {
        let length = body.len();
        let kept = self.kept();
        self.write(format!(
            "HTTP/1.1 {status}\r\ncontent-type: application/json\r\n{kept}content-length: {length}\r\n\r\n{body}"
        ))
        .await;
    }

    /// A whole event stream, as one chunk.
    pub(crate) async fn sse(&mut self, body: &str) {
        self.stream_head().await;
        self.chunk(body).await;
        self.last_chunk().await;
    }

    /// Bytes of the request body that have arrived, where the node does not read it by itself.
    pub(crate) async fn body_until(&mut self, mark: &str) {
        in_time(mark, async {
            while !String::from_utf8_lossy(&self.inbox.bytes).contains(mark) {
                assert!(self.inbox.more(&mut self.stream).await, "closed before {mark:?}");
            }
        })
        .await;
    }

    /// Reads the request's body now.
    pub(crate) async fn body(&mut self) -> &Seen {
        let Self { request, stream, inbox, .. } = self;
        in_time("a request body", inbox.body(stream, request, false)).await;
        &self.request
    }

    /// Waits until the gateway closes the connection; says when it was seen.
    pub(crate) async fn closed(&mut self) -> Instant {
        in_time("the gateway to close the connection", async {
            let mut sink = [0; 4096];
            while self.stream.read(&mut sink).await.is_ok_and(|n| n > 0) {}
            Instant::now()
        })
        .await
    }

    /// Ends the connection with a reset.
    pub(crate) fn reset(self) {
        socket2::SockRef::from(&self.stream).set_linger(Some(Duration::ZERO)).expect("a socket option");
    }

    /// Sends every byte back until the peer closes.
    pub(crate) async fn echo(mut self) {
        let mut bytes = std::mem::take(&mut self.inbox.bytes);
        loop {
            if self.stream.write_all(&bytes).await.is_err() {
                return;
            }
            bytes.clear();
            if !self.stream.read_buf(&mut bytes).await.is_ok_and(|n| n > 0) {
                return;
            }
        }
    }
}

/// A node written by hand: every request is given to the test, which answers it.
pub(crate) struct RawNode {
    addr: SocketAddr,
    calls: Arc<Mutex<mpsc::UnboundedReceiver<Upcall>>>,
    task: JoinHandle<()>,
}

impl RawNode {
    /// Reads each request with its body, then hands it over.
    pub(crate) async fn start() -> Self {
        Self::listen(true).await
    }

    /// Hands each request over as soon as its head is there.
    pub(crate) async fn before_bodies() -> Self {
        Self::listen(false).await
    }

    async fn listen(with_body: bool) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let addr = listener.local_addr().expect("its address");
        let (sender, receiver) = mpsc::unbounded_channel();
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                stream.set_nodelay(true).expect("no delay");
                let sender = sender.clone();
                tokio::spawn(async move {
                    if let Some(call) = Upcall::read(stream, Inbox::default(), with_body, true).await {
                        let _ = sender.send(call);
                    }
                });
            }
        });
        Self { addr, calls: Arc::new(Mutex::new(receiver)), task }
    }

    /// Answers every request of every connection by this function, connections kept alive.
    pub(crate) async fn answering<F, Fut>(answer: F) -> Self
    where
        F: Fn(Upcall) -> Fut + Clone + Send + Sync + 'static,
        Fut: Future<Output = Option<Upcall>> + Send + 'static,
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let addr = listener.local_addr().expect("its address");
        let (_, receiver) = mpsc::unbounded_channel();
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                stream.set_nodelay(true).expect("no delay");
                let answer = answer.clone();
                tokio::spawn(async move {
                    let (mut stream, mut inbox) = (stream, Inbox::default());
                    while let Some(call) = Upcall::read(stream, inbox, true, false).await {
                        let Some(call) = answer(call).await else { return };
                        (stream, inbox) = (call.stream, call.inbox);
                    }
                });
            }
        });
        Self { addr, calls: Arc::new(Mutex::new(receiver)), task }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.addr)
    }

    pub(crate) fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// The next request that arrives.
    pub(crate) async fn call(&self) -> Upcall {
        let mut calls = self.calls.lock().await;
        in_time("a request at the node", calls.recv()).await.expect("the node listens")
    }

    /// Whether a request is there or comes within that time.
    pub(crate) async fn called_within(&self, time: Duration) -> bool {
        let mut calls = self.calls.lock().await;
        tokio::time::timeout(time, calls.recv()).await.is_ok()
    }
}

impl Drop for RawNode {
    fn drop(&mut self) {
        self.task.abort();
    }
}
