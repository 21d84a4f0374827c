//! What callers notice when one of three nodes fails, each way in turn: errors, extra requests upstream, and the time to the
//! first token beside that of three healthy nodes.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;

use super::BenchConfig;
use super::gateway::{Cores, KEY, Kind, Process, Scratch, free_port};
use crate::load::{self, Arrival, LoadConfig, Quantiles};
use crate::node::{Fault, Node, NodeConfig};

/// Extra requests upstream that are too many, in percent of the calls.
const MOST_EXTRA: f64 = 20.0;
/// Deadlines of the gateway for the header and the first token.
const PATIENCE: Duration = Duration::from_secs(1);

/// What is tried, and for how long.
#[derive(Clone, Debug)]
pub struct FaultsConfig {
    /// The folder with the binary `tollgate`; none: that of this program.
    pub binaries: Option<PathBuf>,
    /// Calls per second.
    pub rate: f64,
    /// Time of each class.
    pub duration: Duration,
    /// Time with three healthy nodes before each class.
    pub warm: Duration,
    /// Output tokens of a call.
    pub tokens: usize,
    /// Only the classes with these names; none: all.
    pub only: Vec<String>,
    /// `resume:` of the model (`continue` or `replay`): streams that break after their first token are tried as well.
    pub resume: Option<String>,
}

impl Default for FaultsConfig {
    fn default() -> Self {
        Self {
            binaries: None,
            rate: 300.0,
            duration: Duration::from_secs(60),
            warm: Duration::from_secs(5),
            tokens: 20,
            only: Vec::new(),
            resume: None,
        }
    }
}

/// A way in which the node fails.
struct Class {
    name: &'static str,
    /// `down`: nothing listens; else a fault of the simulator.
    fault: &'static str,
    /// Whether only a deadline tells of it.
    late: bool,
    /// Whether it shows after the first token only.
    after_token: bool,
}

const fn class(name: &'static str, fault: &'static str) -> Class {
    Class { name, fault, late: false, after_token: false }
}

const CLASSES: &[Class] = &[
    class("healthy", ""),
    class("429", "429"),
    class("429_retry_after", "429:retry-after=1"),
    class("500", "500"),
    class("503", "503"),
    class("closed", "refuse"),
    class("down", "down"),
    class("error_event", "error_event"),
    class("malformed", "malformed"),
    class("empty", "empty"),
    Class { late: true, ..class("silent", "slow_header:3600000") },
    Class { late: true, ..class("slow_token", "slow_token:3600000") },
    Class { after_token: true, ..class("cut", "cut:10") },
    Class { after_token: true, late: true, ..class("stall", "stall:10") },
];

/// The figures of one class.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// How the node failed; `healthy` if none did.
    pub class: String,
    /// Calls sent.
    pub calls: u64,
    /// Calls that were not answered whole.
    pub failed: u64,
    /// The same by status or by what went wrong.
    pub errors: BTreeMap<String, u64>,
    /// Requests that the nodes saw beyond the calls, in percent of these.
    pub extra_percent: f64,
    /// Requests that the failing node saw.
    pub at_failing: u64,
    /// Times to the first token.
    pub ttft_ms: Quantiles,
    /// The 99th percentile of these by that of the healthy run, if there was one.
    pub p99_ratio: Option<f64>,
    /// Whether only a deadline tells of the failure: the time to the first token is not judged.
    pub late: bool,
}

impl Row {
    /// Whether callers noticed nothing, and the nodes little.
    pub fn is_good(&self) -> bool {
        self.failed == 0 && self.extra_percent <= MOST_EXTRA
    }
}

/// The figures of all classes.
#[derive(Clone, Debug, Serialize)]
pub struct Figures {
    /// Calls per second that were asked for.
    pub rate: f64,
    /// Seconds of each class.
    pub seconds: f64,
    /// One row per class.
    pub rows: Vec<Row>,
}

impl Figures {
    /// Whether no class shows an error or too many extra requests.
    pub fn is_good(&self) -> bool {
        self.rows.iter().all(Row::is_good)
    }

    /// The figures as a table of text.
    pub fn table(&self) -> String {
        let mut out = String::new();
        // Writing to a text cannot fail.
        let _ = writeln!(
            out,
            "{:<16} {:>8} {:>7} {:>8} {:>8} {:>9} {:>9} {:>6}",
            "class", "calls", "failed", "extra %", "at sick", "p50 ms", "p99 ms", "ratio"
        );
        for row in &self.rows {
            let ratio = row.p99_ratio.map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.2}"));
            let _ = writeln!(
                out,
                "{:<16} {:>8} {:>7} {:>8.2} {:>8} {:>9.1} {:>9.1} {:>6}{}",
                row.class,
                row.calls,
                row.failed,
                row.extra_percent,
                row.at_failing,
                row.ttft_ms.p50,
                row.ttft_ms.p99,
                ratio,
                if row.is_good() { String::new() } else { format!("  NOT GOOD {:?}", row.errors) }
            );
        }
        out
    }
}

/// Runs all classes. Progress goes to `say`, a line at a time.
///
/// # Errors
/// When the binary is missing or does not start, or a name in `only` is none of a class.
pub async fn run(config: FaultsConfig, say: &mut (dyn FnMut(String) + Send)) -> Result<Figures, String> {
    if let Some(unknown) = config.only.iter().find(|name| !CLASSES.iter().any(|class| class.name == **name)) {
        let names: Vec<&str> = CLASSES.iter().map(|class| class.name).collect();
        return Err(format!("no such class: {unknown} (known: {})", names.join(", ")));
    }
    let asked = |class: &&Class| {
        (config.only.is_empty() || config.only.iter().any(|name| name == class.name) || class.name == "healthy")
            && (!class.after_token || config.resume.is_some())
    };
    let scratch = Scratch::new()?;
    let mut rows: Vec<Row> = Vec::new();
    for (place, class) in CLASSES.iter().filter(asked).enumerate() {
        let mut row = one(&config, class, place, &scratch).await?;
        let healthy = rows.first().map(|first| first.ttft_ms.p99).filter(|p99| *p99 > 0.0);
        row.p99_ratio = healthy.map(|p99| row.ttft_ms.p99 / p99);
        say(format!("{}: {} of {} failed, {:.2} % extra", row.class, row.failed, row.calls, row.extra_percent));
        rows.push(row);
    }
    Ok(Figures { rate: config.rate, seconds: config.duration.as_secs_f64(), rows })
}

async fn one(config: &FaultsConfig, class: &Class, place: usize, scratch: &Scratch) -> Result<Row, String> {
    let mut nodes = Vec::new();
    for _ in 0..3 {
        nodes.push(start(SocketAddr::from(([127, 0, 0, 1], 0))).await?);
    }
    let addrs: Vec<SocketAddr> = nodes.iter().map(Node::addr).collect();
    let file = scratch.path().join("faults.yaml");
    let text = written(config, &addrs)?;
    fs::write(&file, text).map_err(|error| format!("{}: {error}", file.display()))?;
    let bench =
        BenchConfig { binaries: config.binaries.clone(), tollgate_config: Some(file), ..BenchConfig::default() };
    let unpinned = Cores { gateway: None, load: None };
    let first = addrs.first().copied().ok_or("there is no node")?;
    let gateway = Process::start(Kind::Tollgate, &bench, &unpinned, scratch, first).await?;
    if !config.warm.is_zero() {
        load::run(calls(config, &gateway, config.warm)).await?;
    }
    let before: u64 = nodes.iter().map(requests).sum();
    // Each class has another node fail.
    let failing = nodes.swap_remove(place % nodes.len());
    let at_failing = requests(&failing);
    let report;
    let after;
    if class.fault == "down" {
        failing.stop().await;
        report = load::run(calls(config, &gateway, config.duration)).await?;
        // What was refused a connection is seen by nobody: it is no load.
        after = nodes.iter().map(requests).sum::<u64>() + at_failing;
        nodes.clear();
    } else {
        failing.set_fault(fault(class)?);
        report = load::run(calls(config, &gateway, config.duration)).await?;
        nodes.push(failing);
        after = nodes.iter().map(requests).sum();
    }
    gateway.stop().await;
    let seen = nodes.last().map_or(0, |failing| requests(failing).saturating_sub(at_failing));
    let extra = (after - before) as f64 - report.requests as f64;
    Ok(Row {
        class: class.name.to_owned(),
        calls: report.requests,
        failed: report.requests - report.ok,
        errors: report.errors,
        extra_percent: 100.0 * extra / (report.requests.max(1) as f64),
        at_failing: seen,
        ttft_ms: report.ttft_ms,
        p99_ratio: None,
        late: class.late,
    })
}

fn fault(class: &Class) -> Result<Option<Fault>, String> {
    if class.fault.is_empty() {
        return Ok(None);
    }
    class.fault.parse().map(Some).map_err(|error: crate::node::UnknownFault| error.to_string())
}

fn requests(node: &Node) -> u64 {
    node.stats().total_requests
}

/// A node that answers like a busy engine: 20 ms to the first token, 5 ms for each further.
async fn start(bind: SocketAddr) -> Result<Node, String> {
    let config = NodeConfig {
        bind,
        prefill_tokens_per_second: 5000.0,
        decode: Duration::from_millis(5),
        max_running: 4096,
        queue: 4096,
        records: 0,
        record_bodies: 0,
        ..NodeConfig::default()
    };
    Node::start(config).await.map_err(|error| format!("the node does not start: {error}"))
}

fn calls(config: &FaultsConfig, gateway: &Process, duration: Duration) -> LoadConfig {
    LoadConfig {
        url: gateway.url.clone(),
        key: Some(KEY.to_owned()),
        arrival: Arrival::Open { rate: config.rate },
        duration: Some(duration),
        stream: true,
        max_tokens: Some(config.tokens),
        timeout: Duration::from_secs(30),
        ..LoadConfig::default()
    }
}

fn written(config: &FaultsConfig, nodes: &[SocketAddr]) -> Result<String, String> {
    let urls: Vec<String> = nodes.iter().map(|addr| format!("\"http://{addr}\"")).collect();
    let resume = config.resume.as_ref().map(|how| format!(", resume: {how}")).unwrap_or_default();
    let continues = if config.resume.is_some() { ", continues: true" } else { "" };
    Ok(format!(
        "\
server:
  listen: [{{ bind: \"127.0.0.1:LISTEN_PORT\" }}]
  admin: {{ bind: \"127.0.0.1:{admin}\" }}
tiers:
  bench: {{ requests_per_minute: 1_000_000_000, tokens_per_day: 1_000_000_000_000 }}
keys:
  - {{ id: bench, key: \"{KEY}\", tier: bench }}
upstreams:
  nodes:
    dialect: openai
    balance: least_request
    nodes: [{nodes}]
    timeouts: {{ first_byte: {patience}ms, first_token: {patience}ms, between_tokens: {patience}ms }}
models:
  sim: {{ targets: [{{ upstream: nodes, model: sim{continues} }}]{resume} }}
routes:
  - name: llm
    match: {{ path: /v1/chat/completions, method: [POST] }}
    call: {{ models: \"*\" }}
",
        admin = free_port()?,
        nodes = urls.join(", "),
        patience = PATIENCE.as_millis(),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_class_is_a_fault_of_the_simulator_and_has_a_name_of_its_own() {
        let mut names: Vec<&str> = CLASSES.iter().map(|class| class.name).collect();
        for class in CLASSES.iter().filter(|class| class.fault != "down") {
            assert_eq!(fault(class).unwrap().is_none(), class.name == "healthy", "{}", class.name);
        }
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), CLASSES.len());
    }

    #[test]
    fn an_error_or_too_many_extra_requests_are_not_good() {
        let row = |failed, extra_percent| Row {
            class: "500".to_owned(),
            calls: 100,
            failed,
            errors: BTreeMap::new(),
            extra_percent,
            at_failing: 0,
            ttft_ms: Quantiles::default(),
            p99_ratio: None,
            late: false,
        };
        let good = |row| Figures { rate: 1.0, seconds: 1.0, rows: vec![row] }.is_good();
        assert!(good(row(0, 20.0)));
        assert!(!good(row(1, 0.0)) && !good(row(0, 20.1)));
    }

    #[tokio::test]
    async fn a_class_that_is_none_is_told() {
        let config = FaultsConfig { only: vec!["earthquake".to_owned()], ..FaultsConfig::default() };
        let error = run(config, &mut |_| ()).await.unwrap_err();
        assert!(error.contains("earthquake") && error.contains("429_retry_after"), "{error}");
    }
}
