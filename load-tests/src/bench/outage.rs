//! What callers feel of a store that stands still: two gateways on one Redis, which is stopped for a while under load.
//!
//! One key is far from its limits: its calls must go on as if nothing had happened. Another asks for more than its minute
//! allows: what it gets must stay within the minute, with the store and without.

use std::fmt::Write;
use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::{BodyExt, Empty};
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use serde::Serialize;

use super::BenchConfig;
use super::gateway::{Cores, KEY, Kind, Process, Scratch, free_port};
use super::ledger::server::Server;
use crate::load::{self, Arrival, LoadConfig, Report};
use crate::node::{Node, NodeConfig};

/// What is done to the store, and under which load.
#[derive(Clone, Debug)]
pub struct OutageConfig {
    /// Calls a second of the key that is far from its limits, over both gateways.
    pub rate: f64,
    /// For how long the store is stopped. Before and after it are half as long each.
    pub stopped: Duration,
    /// How long the gateways wait for the store.
    pub budget: Duration,
    /// The program `redis-server`.
    pub redis_server: PathBuf,
    /// Where the gateway's program lies; beside this one if not given.
    pub binaries: Option<PathBuf>,
}

impl Default for OutageConfig {
    fn default() -> Self {
        Self {
            rate: 200.0,
            stopped: Duration::from_secs(10),
            budget: Duration::from_millis(5),
            redis_server: "redis-server".into(),
            binaries: None,
        }
    }
}

/// One stretch of the run.
#[derive(Clone, Debug, Serialize)]
pub struct Stretch {
    /// `before`, `stopped` or `after`.
    pub name: &'static str,
    /// What the calls of the key far from its limits met, at each gateway.
    pub wide: [Report; 2],
    /// Calls that were neither answered nor, for the other key, refused by its limit.
    pub errors: u64,
    /// Calls of the other key that were admitted.
    pub admitted: u64,
    /// Calls of the other key that were refused.
    pub refused: u64,
}

/// What came of it.
#[derive(Clone, Debug, Serialize)]
pub struct OutageFigures {
    /// The stretches in their order.
    pub stretches: Vec<Stretch>,
    /// Those of all stretches.
    pub errors: u64,
    /// What the key with the small limit got in all.
    pub admitted: u64,
    /// What its minute allows.
    pub limit: u64,
    /// From the store's going on to its being used again by both gateways.
    pub recovery_ms: f64,
}

/// A minute's calls of the key with the small limit.
const LIMIT: u64 = 600;
const TIGHT: &str = "tg-tight-0123456789abcdef0123456789abcdef";

const GATEWAY: &str = "\
server:
  listen: [{ bind: \"127.0.0.1:LISTEN_PORT\" }]
  admin: { bind: \"127.0.0.1:ADMIN_PORT\" }
  threads: 1
store: { replicas: 2, redis: { url: \"redis://127.0.0.1:REDIS_PORT\", timeout: BUDGET, when_down: share } }
tiers:
  wide: { requests_per_minute: 1_000_000, requests_per_hour: 1_000_000, tokens_per_day: 1_000_000_000_000 }
  tight: { requests_per_minute: LIMIT }
keys:
  - { id: wide, key: \"WIDE_KEY\", tier: wide }
  - { id: tight, key: \"TIGHT_KEY\", tier: tight }
upstreams:
  node: { nodes: [\"http://127.0.0.1:NODE_PORT\"] }
models:
  sim: { targets: [{ upstream: node, model: sim }] }
routes:
  - { name: llm, match: { path: /v1/chat/completions }, call: { models: \"*\" } }
";

struct Gateway {
    process: Process,
    admin: u16,
}

impl Gateway {
    async fn start(config: &OutageConfig, scratch: &Scratch, redis: u16, node: &Node) -> Result<Self, String> {
        let admin = free_port()?;
        let template = scratch.path().join("template.yaml");
        let text = GATEWAY
            .replace("ADMIN_PORT", &admin.to_string())
            .replace("REDIS_PORT", &redis.to_string())
            .replace("BUDGET", &format!("{}ms", config.budget.as_millis()))
            .replace("LIMIT", &LIMIT.to_string())
            .replace("WIDE_KEY", KEY)
            .replace("TIGHT_KEY", TIGHT);
        fs::write(&template, text).map_err(|error| format!("{}: {error}", template.display()))?;
        let bench = BenchConfig {
            binaries: config.binaries.clone(),
            tollgate_config: Some(template),
            ..BenchConfig::default()
        };
        let cores = Cores { gateway: None, load: None };
        let process = Process::start(Kind::Tollgate, &bench, &cores, scratch, node.addr()).await?;
        Ok(Self { process, admin })
    }

    /// Whether it uses the store.
    async fn uses_store(&self) -> bool {
        let client: Client<_, Empty<Bytes>> = Client::builder(TokioExecutor::new()).build_http();
        let Ok(uri) = format!("http://127.0.0.1:{}/metrics", self.admin).parse() else { return false };
        let Ok(answer) = client.get(uri).await else { return false };
        let Ok(body) = answer.into_body().collect().await else { return false };
        body.to_bytes().windows(19).any(|part| part == b"tollgate_store_up 1")
    }
}

/// Runs it.
///
/// # Errors
/// A program that does not start.
pub async fn run(config: OutageConfig, say: &mut (dyn FnMut(String) + Send)) -> Result<OutageFigures, String> {
    let node = Node::start(NodeConfig { answer_bytes: 1024, ..NodeConfig::instant() });
    let node = node.await.map_err(|error| format!("the node does not start: {error}"))?;
    let (scratch, nowhere) = (Scratch::new()?, Cores { gateway: None, load: None });
    let redis = Server::start(&config.redis_server, &nowhere).await?;
    let gateways = [
        Gateway::start(&config, &scratch, redis.port, &node).await?,
        Gateway::start(&config, &scratch, redis.port, &node).await?,
    ];
    // The gateways have to see each other before they know what their share is.
    tokio::time::sleep(Duration::from_secs(3)).await;
    let mut stretches = vec![stretch("before", &config, config.stopped / 2, &gateways).await?];
    signal(redis.pid, "STOP")?;
    let stopped = stretch("stopped", &config, config.stopped, &gateways).await;
    signal(redis.pid, "CONT")?;
    let begin = Instant::now();
    let back = async {
        while !(gateways[0].uses_store().await && gateways[1].uses_store().await) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        begin.elapsed()
    };
    let recovery = tokio::time::timeout(Duration::from_secs(30), back).await;
    let recovery = recovery.map_err(|_| "the gateways did not come back to the store")?;
    stretches.push(stopped?);
    stretches.push(stretch("after", &config, config.stopped / 2, &gateways).await?);
    for stretch in &stretches {
        say(stretch.line());
    }
    for gateway in gateways {
        gateway.process.stop().await;
    }
    redis.stop().await;
    let errors = stretches.iter().map(|stretch| stretch.errors).sum();
    let admitted = stretches.iter().map(|s| s.admitted).sum();
    Ok(OutageFigures { stretches, errors, admitted, limit: LIMIT, recovery_ms: recovery.as_secs_f64() * 1000.0 })
}

fn signal(pid: u32, name: &str) -> Result<(), String> {
    let done = std::process::Command::new("kill").args([&format!("-{name}"), &pid.to_string()]).status();
    if done.is_ok_and(|status| status.success()) { Ok(()) } else { Err(format!("kill -{name} {pid} failed")) }
}

async fn stretch(
    name: &'static str,
    config: &OutageConfig,
    lasts: Duration,
    gateways: &[Gateway; 2],
) -> Result<Stretch, String> {
    let load = |gateway: &Gateway, key: &str, rate: f64, seed: u64| {
        load::run(LoadConfig {
            url: gateway.process.url.clone(),
            key: Some(key.to_owned()),
            arrival: Arrival::Open { rate },
            duration: Some(lasts),
            seed,
            ..LoadConfig::default()
        })
    };
    // The other key asks for its minute's calls within a few seconds.
    let (half, much) = (config.rate / 2.0, LIMIT as f64 / lasts.as_secs_f64());
    let [one, two] = gateways;
    let (wide_one, wide_two, tight_one, tight_two) = tokio::try_join!(
        load(one, KEY, half, 1),
        load(two, KEY, half, 2),
        load(one, TIGHT, much / 2.0, 3),
        load(two, TIGHT, much / 2.0, 4)
    )?;
    let refused = |report: &Report| report.errors.get("429").copied().unwrap_or(0);
    let lost = [&wide_one, &wide_two].map(|report| report.requests - report.ok);
    let others = [&tight_one, &tight_two].map(|report| report.requests - report.ok - refused(report));
    Ok(Stretch {
        name,
        errors: lost.into_iter().chain(others).sum(),
        wide: [wide_one, wide_two],
        admitted: tight_one.ok + tight_two.ok,
        refused: refused(&tight_one) + refused(&tight_two),
    })
}

impl Stretch {
    fn line(&self) -> String {
        let [one, two] = &self.wide;
        let slowest = |of: fn(&Report) -> f64| of(one).max(of(two));
        let (p50, p99) = (slowest(|report| report.latency_ms.p50), slowest(|report| report.latency_ms.p99));
        format!(
            "{:<8} {:>6} calls, {} errors; ms p50 {p50:.2} p99 {p99:.2} slowest {:.2}; small limit: {} admitted, {} refused",
            self.name,
            one.requests + two.requests,
            self.errors,
            slowest(|report| report.latency_ms.max),
            self.admitted,
            self.refused
        )
    }
}

impl OutageFigures {
    /// The figures in words.
    pub fn table(&self) -> String {
        let mut text = String::new();
        for stretch in &self.stretches {
            // Writing to a string does not fail.
            let _ = writeln!(text, "{}", stretch.line());
        }
        let _ = writeln!(
            text,
            "errors: {}; small limit: {} admitted of {} a minute; back after {:.0} ms",
            self.errors, self.admitted, self.limit, self.recovery_ms
        );
        text
    }
}
