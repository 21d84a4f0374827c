//! CPU time that a gateway process spends on a request and on an SSE chunk, beside peers.
//!
//! The gateways run one after another in rounds, each pinned to one core with a single worker thread; the node and the
//! load share another core. Of all rounds the lowest figure counts, and all are shown.

mod cpu;
pub mod faults;
mod gateway;
pub mod ledger;
pub mod outage;

use std::fmt::Write;
use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;

use self::cpu::{CpuTime, Source};
use self::gateway::{Cores, Kind, Process, Scratch};
use crate::load::{self, Arrival, LoadConfig};
use crate::node::{Node, NodeConfig};

/// What is measured, and how often.
#[derive(Clone, Debug)]
pub struct BenchConfig {
    /// The folder with the release binaries `tollgate` and `bare-pingora`; none: that of this program.
    pub binaries: Option<PathBuf>,
    /// A configuration to run Tollgate with in place of the one written here. It must listen on
    /// `127.0.0.1:LISTEN_PORT` and use the node `127.0.0.1:NODE_PORT`; both words are replaced.
    pub tollgate_config: Option<PathBuf>,
    /// Only these gateways (`bare-pingora`, `tollgate`); none: all.
    pub only: Vec<String>,
    /// Rounds over all gateways.
    pub rounds: usize,
    /// Plain requests in a round.
    pub requests: u64,
    /// Streams in a round.
    pub streams: u64,
    /// Callers at a time.
    pub callers: usize,
    /// Whether the streams' callers ask for usage. If not, a gateway that asks the node for it must take it out again.
    pub include_usage: bool,
    /// Bytes of a request's message.
    pub prompt_bytes: usize,
    /// Bytes of a plain answer.
    pub answer_bytes: usize,
    /// Content chunks of a stream.
    pub chunks: usize,
    /// Time between chunks.
    pub chunk_gap: Duration,
}

impl Default for BenchConfig {
    fn default() -> Self {
        Self {
            binaries: None,
            tollgate_config: None,
            only: Vec::new(),
            rounds: 5,
            requests: 4000,
            streams: 64,
            callers: 16,
            include_usage: false,
            prompt_bytes: 400,
            answer_bytes: 1024,
            chunks: 200,
            chunk_gap: Duration::from_millis(1),
        }
    }
}

/// The figures of one gateway, in microseconds of CPU time.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// Which gateway.
    pub gateway: String,
    /// Per plain request, of every round.
    pub request_rounds: Vec<f64>,
    /// Per SSE chunk, of every round.
    pub chunk_rounds: Vec<f64>,
    /// The lowest per plain request.
    pub request_us: f64,
    /// The lowest per SSE chunk.
    pub chunk_us: f64,
    /// Its lowest request figure by that of the bare proxy.
    pub request_ratio: Option<f64>,
    /// Its lowest chunk figure by that of the bare proxy.
    pub chunk_ratio: Option<f64>,
}

/// The figures of all gateways.
#[derive(Clone, Debug, Serialize)]
pub struct Figures {
    /// Where CPU time was read.
    pub cpu_source: &'static str,
    /// Core of the gateway; none if it could not be pinned.
    pub gateway_core: Option<usize>,
    /// Core of node and load; none if they could not be pinned.
    pub load_core: Option<usize>,
    /// One row per gateway.
    pub rows: Vec<Row>,
}

impl Figures {
    /// The figures as a table of text.
    pub fn table(&self) -> String {
        let mut out = String::new();
        // Writing to a text cannot fail.
        let _ = writeln!(
            out,
            "{:<14} {:>12} {:>7} {:>12} {:>7}   rounds",
            "gateway", "us/request", "ratio", "us/chunk", "ratio"
        );
        let ratio = |ratio: Option<f64>| ratio.map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.2}"));
        let list = |rounds: &[f64]| rounds.iter().map(|figure| format!("{figure:.1}")).collect::<Vec<_>>().join(" ");
        for row in &self.rows {
            let _ = writeln!(
                out,
                "{:<14} {:>12.1} {:>7} {:>12.2} {:>7}   requests: {}; chunks: {}",
                row.gateway,
                row.request_us,
                ratio(row.request_ratio),
                row.chunk_us,
                ratio(row.chunk_ratio),
                list(&row.request_rounds),
                list(&row.chunk_rounds)
            );
        }
        out
    }
}

/// Runs the bench. Progress goes to `say`, a line at a time.
///
/// # Errors
/// When a binary is missing or does not start, or any request fails: figures with errors in them mean nothing.
pub async fn run(config: BenchConfig, say: &mut (dyn FnMut(String) + Send)) -> Result<Figures, String> {
    let cores = Cores::split();
    cores.pin_self()?;
    let node = Node::start(NodeConfig {
        answer_bytes: config.answer_bytes,
        stream_chunks: config.chunks,
        chunk_gap: config.chunk_gap,
        ..NodeConfig::instant()
    })
    .await
    .map_err(|error| format!("the node does not start: {error}"))?;
    let scratch = Scratch::new()?;
    let mut rows: Vec<(Kind, Vec<f64>, Vec<f64>)> = Kind::ALL
        .into_iter()
        .filter(|kind| config.only.is_empty() || config.only.iter().any(|name| name == kind.name()))
        .map(|kind| (kind, Vec::new(), Vec::new()))
        .collect();
    let mut source = Source::best(std::process::id());
    for round in 1..=config.rounds.max(1) {
        for (kind, requests, chunks) in &mut rows {
            let gateway = Process::start(*kind, &config, &cores, &scratch, node.addr()).await?;
            load::run(plain(&config, &gateway, 200)).await?;
            source = Source::best(gateway.pid);
            let per_request = measure(&gateway, source, plain(&config, &gateway, config.requests)).await?.0;
            let per_chunk = measure(&gateway, source, streamed(&config, &gateway)).await?.1;
            say(format!("round {round}: {:<14} {per_request:>8.1} us/request {per_chunk:>8.2} us/chunk", kind.name()));
            requests.push(per_request);
            chunks.push(per_chunk);
            gateway.stop().await;
        }
    }
    node.stop().await;
    Ok(figures(rows, source, &cores))
}

fn plain(config: &BenchConfig, gateway: &Process, requests: u64) -> LoadConfig {
    LoadConfig {
        url: gateway.url.clone(),
        key: Some(gateway::KEY.to_owned()),
        arrival: Arrival::Closed { callers: config.callers },
        requests: Some(requests),
        prompt_bytes: config.prompt_bytes,
        ..LoadConfig::default()
    }
}

fn streamed(config: &BenchConfig, gateway: &Process) -> LoadConfig {
    LoadConfig { stream: true, include_usage: config.include_usage, ..plain(config, gateway, config.streams) }
}

/// Microseconds of CPU time per request and per chunk of a load.
async fn measure(gateway: &Process, source: Source, load: LoadConfig) -> Result<(f64, f64), String> {
    let look = || CpuTime::look(gateway.pid, source).ok_or_else(|| format!("{} is gone", gateway.url));
    let before = look()?;
    let report = load::run(load).await?;
    let used = look()?.since(&before).as_secs_f64() * 1e6;
    if report.ok != report.requests {
        return Err(format!(
            "{} of {} requests failed: {:?}",
            report.requests - report.ok,
            report.requests,
            report.errors
        ));
    }
    Ok((used / report.requests.max(1) as f64, used / report.chunks.max(1) as f64))
}

fn figures(rows: Vec<(Kind, Vec<f64>, Vec<f64>)>, source: Source, cores: &Cores) -> Figures {
    let lowest = |rounds: &[f64]| rounds.iter().copied().fold(f64::INFINITY, f64::min);
    let bare = rows.iter().find(|(kind, ..)| *kind == Kind::BarePingora);
    let bare = bare.map(|(_, requests, chunks)| (lowest(requests), lowest(chunks)));
    let rows = rows
        .iter()
        .map(|(kind, requests, chunks)| Row {
            gateway: kind.name().to_owned(),
            request_us: lowest(requests),
            chunk_us: lowest(chunks),
            request_ratio: bare.map(|bare| lowest(requests) / bare.0),
            chunk_ratio: bare.map(|bare| lowest(chunks) / bare.1),
            request_rounds: requests.clone(),
            chunk_rounds: chunks.clone(),
        })
        .collect();
    Figures { cpu_source: source.name(), gateway_core: cores.gateway, load_core: cores.load, rows }
}
