//! A load generator: so many requests a second whatever comes back (open loop), or so many callers each waiting for
//! its answer (closed loop).

mod report;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{Method, Request, StatusCode, Uri};
use http_body_util::{BodyExt, Full};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::json;
use tokio::task::JoinSet;

use self::report::{Outcome, Sample, Totals};
pub use self::report::{Quantiles, Report};

/// When requests are sent.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Arrival {
    /// So many a second, at random moments (a Poisson process), however many are still being answered.
    Open {
        /// Requests per second.
        rate: f64,
    },
    /// So many callers, each sending its next request when its last is answered.
    Closed {
        /// Callers.
        callers: usize,
    },
}

/// What is sent, and for how long. The first of the two ends reached is the end.
#[derive(Clone, Debug)]
pub struct LoadConfig {
    /// The gateway, as `http://HOST:PORT` with an optional path; without one, `/v1/chat/completions`.
    pub url: String,
    /// The key, sent as a bearer token.
    pub key: Option<String>,
    /// The model asked for.
    pub model: String,
    /// When requests are sent.
    pub arrival: Arrival,
    /// Sending ends after this time; what is under way is waited for.
    pub duration: Option<Duration>,
    /// Sending ends after so many requests.
    pub requests: Option<u64>,
    /// Whether answers are streamed.
    pub stream: bool,
    /// Whether streams are asked to report usage.
    pub include_usage: bool,
    /// Bytes of the user's message.
    pub prompt_bytes: usize,
    /// `max_tokens` of each request, if any.
    pub max_tokens: Option<usize>,
    /// Share of the streams that are dropped at a random event, 0 to 1.
    pub abandon: f64,
    /// Seed of everything random.
    pub seed: u64,
    /// A request that takes longer is given up as failed.
    pub timeout: Duration,
}

impl Default for LoadConfig {
    fn default() -> Self {
        Self {
            url: String::new(),
            key: None,
            model: "sim".to_owned(),
            arrival: Arrival::Closed { callers: 1 },
            duration: None,
            requests: None,
            stream: false,
            include_usage: false,
            prompt_bytes: 400,
            max_tokens: None,
            abandon: 0.0,
            seed: 1,
            timeout: Duration::from_secs(60),
        }
    }
}

/// Finds where a URL leads on this machine; load never goes anywhere else.
///
/// # Errors
/// When the URL is not plain `http`, or its host is not a loopback address.
pub async fn loopback(url: &str) -> Result<(SocketAddr, Uri), String> {
    let uri: Uri = url.parse().map_err(|error| format!("{url}: not a URL: {error}"))?;
    if uri.scheme_str() != Some("http") {
        return Err(format!("{url}: only http:// URLs of this machine are loaded"));
    }
    let host = uri.host().ok_or_else(|| format!("{url}: no host"))?;
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let port = uri.port_u16().unwrap_or(80);
    let found: Vec<SocketAddr> =
        tokio::net::lookup_host((host, port)).await.map_err(|error| format!("{host}: {error}"))?.collect();
    match found.first() {
        Some(first) if found.iter().all(|addr| addr.ip().is_loopback()) => Ok((*first, uri)),
        Some(_) => Err(format!("{url}: not a loopback address; load is only put on this machine")),
        None => Err(format!("{url}: no address")),
    }
}

struct Load {
    client: Client<HttpConnector, Full<Bytes>>,
    uri: Uri,
    body: Bytes,
    config: LoadConfig,
    totals: Mutex<Totals>,
    sent: AtomicU64,
    until: Option<Instant>,
}

/// Puts the load on and tells what came of it.
///
/// # Errors
/// When the URL is not one of this machine, or there is no end to the load.
pub async fn run(config: LoadConfig) -> Result<Report, String> {
    let (addr, uri) = loopback(&config.url).await?;
    if config.duration.is_none() && config.requests.is_none() {
        return Err("say how long: a duration, a number of requests, or both".to_owned());
    }
    if !(0.0..=1.0).contains(&config.abandon) {
        return Err("the share of abandoned streams must be between 0 and 1".to_owned());
    }
    let path = match uri.path_and_query().map_or("/", |path| path.as_str()) {
        "/" | "" => "/v1/chat/completions",
        path => path,
    };
    // The address found and checked is the one used.
    let uri: Uri = format!("http://{addr}{path}").parse().map_err(|error| format!("{path}: {error}"))?;
    let mut connector = HttpConnector::new();
    connector.set_nodelay(true);
    let started = Instant::now();
    let load = Arc::new(Load {
        client: Client::builder(TokioExecutor::new()).build(connector),
        uri,
        body: body(&config),
        totals: Mutex::default(),
        sent: AtomicU64::new(0),
        until: config.duration.map(|duration| started + duration),
        config,
    });
    match load.config.arrival {
        Arrival::Closed { callers } => closed(&load, callers).await,
        Arrival::Open { rate } => open(&load, rate).await?,
    }
    let totals = std::mem::take(&mut *load.totals.lock());
    Ok(totals.report(started.elapsed()))
}

fn body(config: &LoadConfig) -> Bytes {
    let text = "lorem ipsum ".repeat(config.prompt_bytes / 12 + 1);
    let text = text.get(..config.prompt_bytes).unwrap_or_default();
    let mut body = json!({"model": config.model, "messages": [{"role": "user", "content": text}]});
    if let Some(fields) = body.as_object_mut() {
        if config.stream {
            fields.insert("stream".to_owned(), json!(true));
            if config.include_usage {
                fields.insert("stream_options".to_owned(), json!({"include_usage": true}));
            }
        }
        if let Some(tokens) = config.max_tokens {
            fields.insert("max_tokens".to_owned(), json!(tokens));
        }
    }
    Bytes::from(body.to_string())
}

async fn closed(load: &Arc<Load>, callers: usize) {
    let mut tasks = JoinSet::new();
    for _ in 0..callers.max(1) {
        let load = Arc::clone(load);
        tasks.spawn(async move {
            while let Some(number) = load.next() {
                load.one(number).await;
            }
        });
    }
    while tasks.join_next().await.is_some() {}
}

async fn open(load: &Arc<Load>, rate: f64) -> Result<(), String> {
    if !(rate.is_finite() && rate > 0.0) {
        return Err("the rate must be more than 0 requests a second".to_owned());
    }
    let mut random = StdRng::seed_from_u64(load.config.seed);
    let mut tasks = JoinSet::new();
    let mut due = tokio::time::Instant::now();
    loop {
        due += Duration::try_from_secs_f64(-(1.0 - random.random::<f64>()).ln() / rate).unwrap_or_default();
        tokio::time::sleep_until(due).await;
        let Some(number) = load.next() else { break };
        let load = Arc::clone(load);
        tasks.spawn(async move { load.one(number).await });
        while tasks.try_join_next().is_some() {}
    }
    while tasks.join_next().await.is_some() {}
    Ok(())
}

impl Load {
    /// The number of the next request, while there is one.
    fn next(&self) -> Option<u64> {
        if self.until.is_some_and(|until| Instant::now() >= until) {
            return None;
        }
        let number = self.sent.fetch_add(1, Ordering::Relaxed);
        self.config.requests.is_none_or(|most| number < most).then_some(number)
    }

    async fn one(&self, number: u64) {
        // What becomes of a request depends on its number alone, not on which caller sends it.
        let mut random = StdRng::seed_from_u64(self.config.seed.wrapping_add(number));
        let leave_at = (self.config.stream && random.random::<f64>() < self.config.abandon)
            .then(|| random.random_range(0..=self.config.max_tokens.unwrap_or(32) as u64));
        let started = Instant::now();
        let mut sample = Sample::default();
        let exchange = self.exchange(started, leave_at, &mut sample);
        let outcome = match tokio::time::timeout(self.config.timeout, exchange).await {
            Ok(outcome) => outcome,
            Err(_) => Outcome::Failed("timeout"),
        };
        sample.took = started.elapsed();
        self.totals.lock().add(sample, outcome);
    }

    async fn exchange(&self, started: Instant, leave_at: Option<u64>, sample: &mut Sample) -> Outcome {
        let mut request =
            Request::builder().method(Method::POST).uri(self.uri.clone()).header("content-type", "application/json");
        if let Some(key) = &self.config.key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        let Ok(request) = request.body(Full::new(self.body.clone())) else { return Outcome::Failed("request") };
        let mut response = match self.client.request(request).await {
            Ok(response) => response,
            Err(error) if error.is_connect() => return Outcome::Failed("connect"),
            Err(_) => return Outcome::Failed("no_answer"),
        };
        let status = response.status();
        let streamed = self.config.stream && status == StatusCode::OK;
        let mut events = Events::default();
        loop {
            if streamed && leave_at.is_some_and(|at| events.seen >= at) {
                return Outcome::Abandoned;
            }
            match response.body_mut().frame().await {
                None => break,
                Some(Err(_)) => return Outcome::Failed("broken_body"),
                Some(Ok(frame)) => {
                    let Ok(data) = frame.into_data() else { continue };
                    sample.bytes += data.len() as u64;
                    if streamed {
                        events.take(&data);
                        sample.chunks = events.seen;
                        // The first event of a chat is its role; the one after it is a token.
                        if sample.first_token.is_none() && events.seen >= 2 {
                            sample.first_token = Some(started.elapsed());
                        }
                    }
                }
            }
        }
        match status {
            StatusCode::OK if streamed && !events.done() => Outcome::Failed("no_done"),
            StatusCode::OK => Outcome::Whole,
            status => Outcome::Status(status.as_u16()),
        }
    }
}

/// Counts the data lines of an event stream and remembers its end.
struct Events {
    seen: u64,
    matched: usize,
    tail: Vec<u8>,
}

impl Default for Events {
    fn default() -> Self {
        // The stream begins like a line, as if after a line end.
        Self { seen: 0, matched: 1, tail: Vec::new() }
    }
}

impl Events {
    fn take(&mut self, bytes: &[u8]) {
        const WORD: &[u8] = b"\ndata:";
        for byte in bytes {
            if WORD.get(self.matched) == Some(byte) {
                self.matched += 1;
            } else {
                self.matched = usize::from(*byte == b'\n');
            }
            if self.matched == WORD.len() {
                self.seen += 1;
                self.matched = 0;
            }
        }
        let kept = bytes.len().saturating_sub(32);
        self.tail.extend_from_slice(bytes.get(kept..).unwrap_or_default());
        let over = self.tail.len().saturating_sub(32);
        self.tail.drain(..over);
    }

    fn done(&self) -> bool {
        self.tail.trim_ascii_end().ends_with(b"[DONE]")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::{Node, NodeConfig};

    #[test]
    fn data_lines_are_counted_however_they_are_split() {
        let text = b"data: a\n\ndata: b data: c\n\n: data:\n\ndata: [DONE]\n\n";
        for size in 1..text.len() {
            let mut events = Events::default();
            text.chunks(size).for_each(|piece| events.take(piece));
            assert_eq!((events.seen, events.done()), (3, true), "in pieces of {size}");
        }
    }

    #[tokio::test]
    async fn only_this_machine_is_loaded() {
        for url in ["http://192.0.2.1:80/", "http://10.0.0.1", "https://127.0.0.1/", "127.0.0.1:1", "http://0.0.0.0:1/"]
        {
            assert!(loopback(url).await.is_err(), "{url}");
        }
        for url in ["http://127.0.0.1:8080", "http://[::1]:1/v1/x", "http://127.9.9.9/"] {
            assert!(loopback(url).await.is_ok(), "{url}");
        }
    }

    #[tokio::test]
    async fn a_closed_loop_sends_as_many_as_asked_and_counts_what_came() {
        let node = Node::start(NodeConfig::instant()).await.unwrap();
        let config = LoadConfig {
            url: node.url(),
            arrival: Arrival::Closed { callers: 4 },
            requests: Some(40),
            stream: true,
            max_tokens: Some(10),
            ..LoadConfig::default()
        };
        let report = run(config.clone()).await.unwrap();
        assert_eq!((report.requests, report.ok, report.chunks), (40, 40, 40 * 13), "10 tokens, role, reason, [DONE]");
        let report = run(LoadConfig { model: "sim+429".to_owned(), ..config.clone() }).await.unwrap();
        assert_eq!((report.ok, report.errors.get("429")), (0, Some(&40)));
        let report = run(LoadConfig { abandon: 0.5, ..config.clone() }).await.unwrap();
        assert!((5..=35).contains(&report.abandoned), "{}", report.abandoned);
        let again = run(LoadConfig { abandon: 0.5, ..config }).await.unwrap();
        assert!(report.ok + report.abandoned == 40 && again.ok + again.abandoned == 40);
    }

    #[tokio::test]
    async fn an_open_loop_does_not_wait_for_answers() {
        let config = NodeConfig { decode: Duration::from_millis(50), answer_tokens: 4, ..NodeConfig::instant() };
        let node = Node::start(config).await.unwrap();
        let config = LoadConfig {
            url: node.url(),
            arrival: Arrival::Open { rate: 500.0 },
            requests: Some(50),
            ..LoadConfig::default()
        };
        let report = run(config).await.unwrap();
        assert_eq!(report.ok, 50);
        assert!(report.seconds < 5.0, "one after another it would be 10 s: {}", report.seconds);
        assert!(report.latency_ms.p50 >= 200.0);
    }
}
