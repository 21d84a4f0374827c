//! Clients over HTTP/1.1 and HTTP/2, and what they get.

use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::{Stream, StreamExt, TryStreamExt, stream};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Empty, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::Value;
use tokio::net::TcpStream;
use tokio::task::AbortHandle;

use super::{PATIENCE, in_time};

type Body = BoxBody<Bytes, io::Error>;

/// A request being put together.
pub(crate) struct Request {
    to: SocketAddr,
    method: String,
    target: String,
    headers: Vec<(String, String)>,
    body: Body,
    http2: bool,
}

impl Request {
    pub(crate) fn new(to: SocketAddr, method: &str, target: &str) -> Self {
        let body = Empty::new().map_err(io::Error::other).boxed();
        Self { to, method: method.into(), target: target.into(), headers: Vec::new(), body, http2: false }
    }

    pub(crate) fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.into(), value.into()));
        self
    }

    /// The API key as a bearer token.
    pub(crate) fn key(self, key: &str) -> Self {
        self.header("authorization", &format!("Bearer {key}"))
    }

    pub(crate) fn json(self, body: &Value) -> Self {
        self.header("content-type", "application/json").bytes(body.to_string())
    }

    /// A body that is already text, sent as JSON.
    pub(crate) fn json_text(self, body: impl Into<Bytes>) -> Self {
        self.header("content-type", "application/json").bytes(body)
    }

    /// A body with `Content-Length`.
    pub(crate) fn bytes(mut self, body: impl Into<Bytes>) -> Self {
        self.body = Full::new(body.into()).map_err(io::Error::other).boxed();
        self
    }

    /// A JSON body without `Content-Length`, in pieces of that size.
    pub(crate) fn json_in_pieces(self, body: &Bytes, size: usize) -> Self {
        let pieces: Vec<Bytes> =
            (0..body.len()).step_by(size).map(|at| body.slice(at..(at + size).min(body.len()))).collect();
        self.header("content-type", "application/json").pieces(stream::iter(pieces))
    }

    /// A body without `Content-Length`, as it comes.
    pub(crate) fn pieces(mut self, pieces: impl Stream<Item = Bytes> + Send + Sync + 'static) -> Self {
        self.body = BodyExt::boxed(StreamBody::new(pieces.map(|piece| io::Result::Ok(Frame::data(piece)))));
        self
    }

    /// Over HTTP/2 without TLS.
    pub(crate) fn http2(mut self) -> Self {
        self.http2 = true;
        self
    }

    /// Sends it on a connection of its own and waits for the head of the answer.
    pub(crate) async fn open(self) -> Reply {
        let what = format!("{} {} to answer", self.method, self.target);
        in_time(&what, self.try_open()).await.unwrap_or_else(|error| panic!("{what}: {error}"))
    }

    /// Sends it on a connection of its own and waits for the whole answer.
    pub(crate) async fn send(self) -> Answer {
        self.open().await.whole().await
    }

    /// The same, where the connection may break instead of an answer.
    pub(crate) async fn try_open(self) -> Result<Reply, String> {
        let mut wire = if self.http2 { Wire::http2(self.to).await } else { Wire::http1(self.to).await };
        let mut reply = wire.try_send(self).await?;
        reply.wire = Some(wire);
        Ok(reply)
    }
}

enum Sender {
    One(http1::SendRequest<Body>),
    Two(http2::SendRequest<Body>),
}

/// One connection; closed when dropped.
pub(crate) struct Wire {
    to: SocketAddr,
    sender: Sender,
    task: AbortHandle,
}

impl Wire {
    pub(crate) async fn http1(to: SocketAddr) -> Self {
        let io = TokioIo::new(connect(to).await);
        let (sender, connection) = http1::handshake(io).await.expect("an HTTP/1.1 connection");
        let task = tokio::spawn(async move { drop(connection.await) }).abort_handle();
        Self { to, sender: Sender::One(sender), task }
    }

    pub(crate) async fn http2(to: SocketAddr) -> Self {
        let io = TokioIo::new(connect(to).await);
        let (sender, connection) = http2::handshake(TokioExecutor::new(), io).await.expect("an HTTP/2 connection");
        let task = tokio::spawn(async move { drop(connection.await) }).abort_handle();
        Self { to, sender: Sender::Two(sender), task }
    }

    /// Another handle of the same HTTP/2 connection, for one more call at the same time; it lives as long as the first.
    pub(crate) fn again(&self) -> Self {
        let Sender::Two(sender) = &self.sender else { panic!("only HTTP/2 carries many calls at once") };
        let task = tokio::spawn(async {}).abort_handle();
        Self { to: self.to, sender: Sender::Two(sender.clone()), task }
    }

    /// Waits for the head of the answer.
    pub(crate) async fn open(&mut self, request: Request) -> Reply {
        let what = format!("{} {} to answer", request.method, request.target);
        in_time(&what, self.try_send(request)).await.unwrap_or_else(|error| panic!("{what}: {error}"))
    }

    /// Waits for the whole answer.
    pub(crate) async fn send(&mut self, request: Request) -> Answer {
        self.open(request).await.whole().await
    }

    /// Waits for the head of the answer as long as it takes; the connection may break instead.
    pub(crate) async fn try_send(&mut self, request: Request) -> Result<Reply, String> {
        let mut built = http::Request::builder().method(request.method.as_str());
        let named = request.headers.iter().find(|(name, _)| name.eq_ignore_ascii_case("host"));
        let host = named.map_or_else(|| self.to.to_string(), |(_, host)| host.clone());
        match self.sender {
            Sender::One(_) => built = built.uri(request.target.as_str()).header("host", host),
            Sender::Two(_) => built = built.uri(format!("http://{host}{}", request.target)),
        }
        for (name, value) in request.headers.iter().filter(|(name, _)| !name.eq_ignore_ascii_case("host")) {
            built = built.header(name, value);
        }
        let built = built.body(request.body).expect("a well-formed request");
        let sent = Instant::now();
        let response = match &mut self.sender {
            Sender::One(sender) => {
                sender.ready().await.map_err(|error| error.to_string())?;
                sender.send_request(built).await
            }
            Sender::Two(sender) => {
                sender.ready().await.map_err(|error| error.to_string())?;
                sender.send_request(built).await
            }
        };
        let (head, body) = response.map_err(|error| format!("{error:?}"))?.into_parts();
        Ok(Reply { sent, head, body, rest: Vec::new(), ended: None, wire: None })
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn connect(to: SocketAddr) -> TcpStream {
    let stream = in_time("a TCP connection", TcpStream::connect(to)).await.expect("a TCP connection");
    stream.set_nodelay(true).expect("no delay");
    stream
}

/// An answer whose head has come; the body is read as it arrives.
pub(crate) struct Reply {
    /// When the request was sent.
    pub(crate) sent: Instant,
    head: http::response::Parts,
    body: Incoming,
    /// Bytes received and not handed out yet.
    rest: Vec<u8>,
    /// Whether the body has ended, and cleanly.
    ended: Option<bool>,
    wire: Option<Wire>,
}

impl Reply {
    pub(crate) fn status(&self) -> u16 {
        self.head.status.as_u16()
    }

    /// The header's value, empty if it is missing.
    pub(crate) fn header(&self, name: &str) -> &str {
        header(&self.head.headers, name)
    }

    /// The next piece of the body; `None` at its end, `Err` if it breaks off.
    pub(crate) async fn piece(&mut self) -> Option<Result<Bytes, String>> {
        if !self.rest.is_empty() {
            return Some(Ok(std::mem::take(&mut self.rest).into()));
        }
        self.receive().await
    }

    async fn receive(&mut self) -> Option<Result<Bytes, String>> {
        loop {
            match in_time("the next piece of a body", self.body.frame()).await {
                None => {
                    self.ended = Some(true);
                    return None;
                }
                Some(Err(error)) => {
                    self.ended = Some(false);
                    return Some(Err(format!("{error:?}")));
                }
                Some(Ok(frame)) => {
                    // An empty frame only carries the end of the body.
                    if let Ok(data) = frame.into_data()
                        && !data.is_empty()
                    {
                        return Some(Ok(data));
                    }
                }
            }
        }
    }

    /// The next event of a stream; `None` when the body has ended, cleanly or not.
    pub(crate) async fn event(&mut self) -> Option<Event> {
        loop {
            if let Some((end, next)) = event_end(&self.rest) {
                let event = Event::parse(&self.rest[..end]);
                self.rest.drain(..next);
                if event.name.is_some() || !event.data.is_empty() {
                    return Some(event);
                }
                continue;
            }
            match self.receive().await {
                Some(Ok(data)) => self.rest.extend_from_slice(&data),
                Some(Err(_)) | None => return None,
            }
        }
    }

    /// Whether the body's end was clean; only known once it ended.
    pub(crate) fn clean(&self) -> bool {
        self.ended.expect("the body has ended")
    }

    /// Reads the rest of the body.
    pub(crate) async fn whole(mut self) -> Answer {
        let mut body = std::mem::take(&mut self.rest);
        while let Some(Ok(data)) = self.receive().await {
            body.extend_from_slice(&data);
        }
        let clean = self.ended == Some(true);
        Answer { head: self.head, body: body.into(), clean, took: self.sent.elapsed() }
    }

    /// Closes the connection with whatever is still under way; says when.
    pub(crate) fn leave(self) -> Instant {
        let now = Instant::now();
        drop(self);
        now
    }
}

/// A whole answer.
pub(crate) struct Answer {
    head: http::response::Parts,
    body: Bytes,
    clean: bool,
    /// From sending the request to the end of the answer.
    pub(crate) took: Duration,
}

impl Answer {
    pub(crate) fn status(&self) -> u16 {
        self.head.status.as_u16()
    }

    /// The header's value, empty if it is missing.
    pub(crate) fn header(&self, name: &str) -> &str {
        header(&self.head.headers, name)
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        self.head.headers.contains_key(name)
    }

    /// The header's value as a number.
    pub(crate) fn number(&self, name: &str) -> f64 {
        let text = self.header(name);
        text.parse().unwrap_or_else(|_| panic!("{name} is no number: {text:?}"))
    }

    pub(crate) fn body(&self) -> &Bytes {
        &self.body
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|error| panic!("{} is no JSON ({error}): {}", self.status(), self.text()))
    }

    /// `error.code` of an answer in OpenAI's shape, whose other fields are checked on the way.
    pub(crate) fn code(&self) -> String {
        let json = self.json();
        let error = &json["error"];
        assert!(error["message"].as_str().is_some_and(|text| !text.is_empty()), "no error.message: {json}");
        assert!(error["type"].is_string(), "no error.type: {json}");
        assert!(error.as_object().is_some_and(|fields| fields.contains_key("param")), "no error.param: {json}");
        error["code"].as_str().unwrap_or_else(|| panic!("no error.code: {json}")).to_owned()
    }

    /// Status and code of an error, for comparing both at once.
    pub(crate) fn refusal(&self) -> (u16, String) {
        (self.status(), self.code())
    }

    /// The events of a stream.
    pub(crate) fn events(&self) -> Vec<Event> {
        let mut rest = &self.body[..];
        let mut events = Vec::new();
        while let Some((end, next)) = event_end(rest) {
            let event = Event::parse(&rest[..end]);
            if event.name.is_some() || !event.data.is_empty() {
                events.push(event);
            }
            rest = &rest[next..];
        }
        events
    }

    /// Whether the body's end was clean: last chunk seen, length met, stream not reset.
    pub(crate) fn clean(&self) -> bool {
        self.clean
    }

    /// Fails unless the status is this one.
    #[track_caller]
    pub(crate) fn expect(self, status: u16) -> Self {
        assert_eq!(self.status(), status, "{}", self.text());
        self
    }
}

fn header<'a>(headers: &'a http::HeaderMap, name: &str) -> &'a str {
    headers.get(name).map_or("", |value| value.to_str().expect("a header in ASCII"))
}

/// Where the first event of a stream ends, and where the next one starts.
fn event_end(bytes: &[u8]) -> Option<(usize, usize)> {
    let marks: [&[u8]; 3] = [b"\n\n", b"\r\n\r\n", b"\r\r"];
    (0..bytes.len()).find_map(|at| {
        let mark = marks.iter().find(|mark| bytes[at..].starts_with(mark))?;
        Some((at, at + mark.len()))
    })
}

/// One server-sent event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Event {
    pub(crate) name: Option<String>,
    pub(crate) data: String,
}

impl Event {
    fn parse(bytes: &[u8]) -> Self {
        let mut event = Self { name: None, data: String::new() };
        for line in String::from_utf8_lossy(bytes).lines() {
            let (field, value) = line.split_once(':').unwrap_or((line, ""));
            let value = value.strip_prefix(' ').unwrap_or(value);
            match field {
                "event" => event.name = Some(value.to_owned()),
                "data" if event.data.is_empty() => event.data = value.to_owned(),
                "data" => event.data = format!("{}\n{value}", event.data),
                _ => (),
            }
        }
        event
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.data).unwrap_or_else(|error| panic!("no JSON ({error}): {}", self.data))
    }

    /// The text that a chunk of a chat completion adds.
    pub(crate) fn delta(&self) -> Option<String> {
        let chunk: Value = serde_json::from_str(&self.data).ok()?;
        chunk["choices"][0]["delta"]["content"].as_str().filter(|text| !text.is_empty()).map(str::to_owned)
    }
}

/// Pieces that a test hands over one by one while the request is under way.
pub(crate) fn fed() -> (tokio::sync::mpsc::UnboundedSender<Bytes>, impl Stream<Item = Bytes> + Send + Sync + 'static) {
    let (sender, mut receiver) = tokio::sync::mpsc::unbounded_channel();
    (sender, stream::poll_fn(move |context| receiver.poll_recv(context)))
}

/// Longest that a node may take to see that its client has gone.
pub(crate) const GONE: Duration = Duration::from_millis(100);

/// Collects a stream of answers, at most `width` at a time.
pub(crate) async fn at_once<T>(width: usize, work: impl Iterator<Item = impl Future<Output = T>>) -> Vec<T> {
    let work = stream::iter(work.map(|one| async { io::Result::Ok(one.await) })).buffer_unordered(width);
    tokio::time::timeout(PATIENCE * 6, work.try_collect()).await.expect("all answers in time").expect("never fails")
}
