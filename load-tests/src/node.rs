//! A simulated LLM node with an OpenAI-compatible interface.
//!
//! It takes the time a real engine would: requests queue, prefill one after another (what the KV prefix cache holds
//! costs nothing) and decode together, slower the more they are. Answers depend on the prompt alone, so two nodes answer
//! alike. Without `max_tokens` an answer has [`NodeConfig::answer_tokens`] tokens and ends with `stop`; with it, it has
//! exactly so many (never more than [`NodeConfig::longest_answer`]) and ends with `length`.
//! A token is one word in an answer, and four bytes of a prompt unless [`NodeConfig::count`] says otherwise.

mod api;
mod ask;
mod canned;
mod engine;
mod fail;
mod fault;
mod kv;
mod metrics;
mod script;
mod vectors;
mod words;

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use parking_lot::Mutex;

use self::api::NodeApp;
pub(crate) use self::api::{EVENTS, asked_by_header, now};
use self::canned::Canned;
use self::engine::Engine;
pub(crate) use self::engine::Run;
pub(crate) use self::fault::Plan;
pub use self::fault::{Fault, UnknownFault};
pub(crate) use self::kv::tokens_of;
pub(crate) use self::words::{Numbers, answer as words};
use crate::record::Journal;
pub use crate::record::{Ending, Recorded};
use crate::serve::{Connections, Listener};

/// How a node behaves.
#[derive(Clone, Debug)]
pub struct NodeConfig {
    /// Where to listen; port 0 takes a free one.
    pub bind: SocketAddr,
    /// The node's name, shown in `system_fingerprint` as `sim-NAME`.
    pub name: String,
    /// The models it serves; none means any.
    pub models: Vec<String>,
    /// Prompt tokens computed per second, for one request at a time; 0 or infinite: no time at all.
    pub prefill_tokens_per_second: f64,
    /// Time per output token of a request that runs alone.
    pub decode: Duration,
    /// Time added to it for every further running request.
    pub decode_per_running: Duration,
    /// How the tokens of a prompt are counted: four bytes each, if a test does not bring a tokenizer.
    pub count: fn(&str) -> usize,
    /// Blocks of the KV cache.
    pub kv_blocks: usize,
    /// Tokens in a block.
    pub block_tokens: usize,
    /// Requests that run at once.
    pub max_running: usize,
    /// Requests that may wait; one more is answered with 503.
    pub queue: usize,
    /// Bodies up to this many bytes are kept with their record.
    pub record_bodies: usize,
    /// How many requests are remembered, the newest; 0 remembers none and hashes nothing.
    pub records: usize,
    /// Tokens of an answer where the request does not say.
    pub answer_tokens: usize,
    /// No answer is longer, whatever the request says.
    pub longest_answer: usize,
    /// If not 0: every POST gets a prepared answer of so many bytes (or a prepared stream), nothing is parsed or
    /// recorded. For measuring what stands before the node.
    pub answer_bytes: usize,
    /// Content chunks of the prepared stream.
    pub stream_chunks: usize,
    /// Time between the chunks of the prepared stream.
    pub chunk_gap: Duration,
}

impl Default for NodeConfig {
    /// Fast enough for tests: a millisecond per token, a million prompt tokens per second.
    fn default() -> Self {
        Self {
            bind: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            name: "node".to_owned(),
            models: vec!["sim".to_owned()],
            prefill_tokens_per_second: 1_000_000.0,
            decode: Duration::from_millis(1),
            decode_per_running: Duration::ZERO,
            count: |prompt| tokens_of(prompt.len()),
            kv_blocks: 65_536,
            block_tokens: 16,
            max_running: 256,
            queue: 1024,
            record_bodies: 64 * 1024,
            records: 10_000,
            answer_tokens: 32,
            longest_answer: 100_000,
            answer_bytes: 0,
            stream_chunks: 200,
            chunk_gap: Duration::ZERO,
        }
    }
}

impl NodeConfig {
    /// No delays at all.
    pub fn instant() -> Self {
        Self { prefill_tokens_per_second: f64::INFINITY, decode: Duration::ZERO, ..Self::default() }
    }
}

/// What a node is doing and has done.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Stats {
    /// Requests in prefill or decode.
    pub running: usize,
    /// Requests in the queue.
    pub waiting: usize,
    /// Connections open now.
    pub open_connections: u64,
    /// Connections accepted since the start.
    pub total_connections: u64,
    /// Requests whose head was read, of any kind.
    pub total_requests: u64,
    /// Prompt tokens looked up in the prefix cache.
    pub prefix_cache_queries: u64,
    /// Prompt tokens found there.
    pub prefix_cache_hits: u64,
    /// Prompt tokens taken in.
    pub prompt_tokens: u64,
    /// Tokens generated.
    pub output_tokens: u64,
    /// Share of KV blocks that running requests hold, 0 to 1.
    pub kv_usage: f64,
    /// Blocks in the prefix cache.
    pub cached_blocks: usize,
}

/// A running node. Dropping it stops it and closes its connections.
pub struct Node {
    app: Arc<NodeApp>,
    seen: Arc<Connections>,
    listener: Listener,
}

impl Node {
    /// Starts a node on the running tokio runtime.
    ///
    /// # Errors
    /// When the address cannot be bound.
    pub async fn start(config: NodeConfig) -> io::Result<Self> {
        let bind = config.bind;
        let model = config.models.first().cloned().unwrap_or_else(|| "sim".to_owned());
        let canned = (config.answer_bytes > 0)
            .then(|| Canned::new(&model, config.answer_bytes, config.stream_chunks, config.chunk_gap));
        let app = Arc::new(NodeApp {
            engine: Arc::new(Engine::new(&config)),
            journal: Journal::new(config.records, config.record_bodies),
            fault: Mutex::new(None),
            next_faults: Mutex::default(),
            canned,
            ids: Mutex::new(Numbers::new(rand::random())),
            config,
        });
        let seen = Arc::new(Connections::default());
        let listener = Listener::start(bind, Arc::clone(&app), Arc::clone(&seen)).await?;
        Ok(Self { app, seen, listener })
    }

    /// Where it listens.
    pub fn addr(&self) -> SocketAddr {
        self.listener.addr()
    }

    /// Its address as `http://HOST:PORT`.
    pub fn url(&self) -> String {
        format!("http://{}", self.addr())
    }

    /// Sets or clears the fault of every further POST. Probes (GET) are not touched: stop the node for that.
    pub fn set_fault(&self, fault: Option<Fault>) {
        *self.app.fault.lock() = fault;
    }

    /// Gives each of the next POSTs one of these faults, beside the one of every POST.
    pub fn set_next_faults(&self, faults: impl IntoIterator<Item = Fault>) {
        *self.app.next_faults.lock() = faults.into_iter().collect();
    }

    /// The requests seen, oldest first, those still running included.
    pub fn requests(&self) -> Vec<Recorded> {
        self.app.journal.all()
    }

    /// What the node is doing and has done.
    pub fn stats(&self) -> Stats {
        let load = self.app.engine.load();
        let counters = &self.app.engine.counters;
        Stats {
            running: load.running,
            waiting: load.waiting,
            open_connections: self.seen.open.load(Ordering::Relaxed),
            total_connections: self.seen.total.load(Ordering::Relaxed),
            total_requests: self.app.journal.total(),
            prefix_cache_queries: counters.queries.load(Ordering::Relaxed),
            prefix_cache_hits: counters.hits.load(Ordering::Relaxed),
            prompt_tokens: counters.prompt.load(Ordering::Relaxed),
            output_tokens: counters.output.load(Ordering::Relaxed),
            kv_usage: load.kv_usage,
            cached_blocks: load.cached_blocks,
        }
    }

    /// Closes the port and every connection, and returns once they are closed. Its address can be bound again.
    pub async fn stop(self) {
        self.listener.stop().await;
    }
}
