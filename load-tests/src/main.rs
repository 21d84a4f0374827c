//! The `tollgate-load` command.
#![allow(clippy::print_stdout)]

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use tollgate_load::bench::faults::{self, FaultsConfig};
use tollgate_load::bench::ledger::{self, LedgerConfig};
use tollgate_load::bench::outage::{self, OutageConfig};
use tollgate_load::bench::{self, BenchConfig};
use tollgate_load::dify::{DifyApp, DifyConfig};
use tollgate_load::load::{self, Arrival, LoadConfig};
use tollgate_load::node::{Fault, Node, NodeConfig};

// The bench is slowed by its own node and load least with the allocator the gateways use.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

#[derive(Parser)]
#[command(version, about = "Simulated node, simulated Dify app, load and CPU figures for Tollgate")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run a simulated LLM node until it is stopped.
    Node(NodeArgs),
    /// Run a simulated Dify app until it is stopped.
    Dify(DifyArgs),
    /// Put load on a gateway of this machine; prints JSON.
    Run(RunArgs),
    /// Measure CPU time per request and per SSE chunk of Tollgate, beside a bare Pingora proxy.
    Bench(BenchArgs),
    /// Measure what a decision of the ledger costs, in memory and in Redis, beside a script of plain commands.
    Ledger(LedgerArgs),
    /// Measure what callers feel while Redis stands still: two gateways on one server that is stopped for a while.
    Outage(OutageArgs),
    /// Let one of three nodes fail under load, each way in turn; fails if callers notice or the nodes get too much.
    Faults(FaultsArgs),
}

/// Durations are written like 250us, 20ms, 1.5s or 2m.
#[derive(Args)]
struct NodeArgs {
    /// Where to listen; port 0 takes a free one.
    #[arg(long, default_value = "127.0.0.1:8000")]
    bind: SocketAddr,
    /// Shown in system_fingerprint.
    #[arg(long, default_value = "node")]
    name: String,
    /// A model it serves; may be repeated.
    #[arg(long = "model", default_value = "sim")]
    models: Vec<String>,
    /// Prompt tokens per second.
    #[arg(long, default_value_t = 8000.0)]
    prefill_tokens_per_second: f64,
    /// Time per output token of a request that runs alone.
    #[arg(long, default_value = "15ms", value_parser = duration)]
    decode: Duration,
    /// Time added to it for every further running request.
    #[arg(long, default_value = "300us", value_parser = duration)]
    decode_per_running: Duration,
    /// Blocks of the KV cache.
    #[arg(long, default_value_t = 65_536)]
    kv_blocks: usize,
    /// Tokens in a block.
    #[arg(long, default_value_t = 16)]
    block_tokens: usize,
    /// Requests that run at once.
    #[arg(long, default_value_t = 256)]
    max_running: usize,
    /// Requests that may wait.
    #[arg(long, default_value_t = 1024)]
    queue: usize,
    /// Keep bodies up to this size.
    #[arg(long, default_value_t = 0)]
    record_bodies: usize,
    /// Remember so many requests.
    #[arg(long, default_value_t = 0)]
    records: usize,
    /// Tokens of an answer where the request does not say.
    #[arg(long, default_value_t = 64)]
    answer_tokens: usize,
    /// No answer is longer.
    #[arg(long, default_value_t = 100_000)]
    longest_answer: usize,
    /// No delays at all: the three speeds above are not used.
    #[arg(long)]
    instant: bool,
    /// Prepared answers of so many bytes; nothing is parsed.
    #[arg(long, default_value_t = 0)]
    answer_bytes: usize,
    /// Content chunks of prepared streams.
    #[arg(long, default_value_t = 200)]
    stream_chunks: usize,
    /// Time between the chunks of prepared streams.
    #[arg(long, default_value = "0ms", value_parser = duration)]
    chunk_gap: Duration,
    /// A fault of every POST, such as `429:retry-after=2` or `slow_token:500,cut:3`.
    #[arg(long)]
    fault: Option<Fault>,
}

#[derive(Args)]
struct DifyArgs {
    /// Where to listen; port 0 takes a free one.
    #[arg(long, default_value = "127.0.0.1:5001")]
    bind: SocketAddr,
    /// The app's name.
    #[arg(long, default_value = "simulated")]
    name: String,
    /// A key it takes; may be repeated. None: any that begins with `app-`.
    #[arg(long = "key")]
    keys: Vec<String>,
    /// Time per token.
    #[arg(long, default_value = "20ms", value_parser = duration)]
    per_token: Duration,
    /// Tokens of an answer.
    #[arg(long, default_value_t = 32)]
    answer_tokens: usize,
    /// A ping is sent in every such silence.
    #[arg(long, default_value = "10s", value_parser = duration)]
    ping_every: Duration,
}

#[derive(Args)]
struct RunArgs {
    /// The gateway, a loopback address such as http://127.0.0.1:8080.
    #[arg(long)]
    url: String,
    /// Sent as a bearer token.
    #[arg(long)]
    key: Option<String>,
    /// The model asked for.
    #[arg(long, default_value = "sim")]
    model: String,
    /// Open loop: so many requests a second, however many are under way.
    #[arg(long, conflicts_with = "concurrency")]
    rps: Option<f64>,
    /// Closed loop: so many callers, each waiting for its answer.
    #[arg(long, default_value_t = 8)]
    concurrency: usize,
    /// Send for so long.
    #[arg(long, value_parser = duration)]
    duration: Option<Duration>,
    /// Send so many requests.
    #[arg(long)]
    requests: Option<u64>,
    /// Ask for streams.
    #[arg(long)]
    stream: bool,
    /// Ask streams for usage.
    #[arg(long, requires = "stream")]
    include_usage: bool,
    /// Bytes of the user's message.
    #[arg(long, default_value_t = 400)]
    prompt_bytes: usize,
    /// `max_tokens` of each request.
    #[arg(long)]
    max_tokens: Option<usize>,
    /// Share of the streams dropped at a random event, 0 to 1.
    #[arg(long, default_value_t = 0.0, requires = "stream")]
    abandon: f64,
    /// Seed of everything random.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// A request that takes longer has failed.
    #[arg(long, default_value = "60s", value_parser = duration)]
    timeout: Duration,
}

#[derive(Args)]
struct BenchArgs {
    /// The folder with the release binaries; without it they are built where cargo runs this, and looked for beside it.
    #[arg(long)]
    binaries: Option<PathBuf>,
    /// Do not build the gateways first.
    #[arg(long)]
    no_build: bool,
    /// Run Tollgate with this file; LISTEN_PORT and NODE_PORT in it are replaced.
    #[arg(long)]
    tollgate_config: Option<PathBuf>,
    /// Only this gateway (bare-pingora, tollgate); may be repeated.
    #[arg(long, value_parser = ["bare-pingora", "tollgate"])]
    only: Vec<String>,
    /// Rounds over all gateways; the lowest figure counts.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Plain requests in a round.
    #[arg(long, default_value_t = 4000)]
    requests: u64,
    /// Streams in a round.
    #[arg(long, default_value_t = 64)]
    streams: u64,
    /// Callers at a time.
    #[arg(long, default_value_t = 16)]
    callers: usize,
    /// Callers ask streams for usage: nothing has to be taken out of them.
    #[arg(long)]
    include_usage: bool,
    /// Content chunks of a stream.
    #[arg(long, default_value_t = 200)]
    chunks: usize,
    /// Time between chunks.
    #[arg(long, default_value = "1ms", value_parser = duration)]
    chunk_gap: Duration,
}

#[derive(Args)]
struct LedgerArgs {
    /// Keys that call in turn.
    #[arg(long, default_value_t = 10_000)]
    keys: usize,
    /// Calls at a time, where the store is Redis.
    #[arg(long, default_value_t = 16)]
    callers: usize,
    /// Between the end of a caller's call and its next, where the store is Redis; 0ms shows the store at its limit.
    #[arg(long, default_value = "5ms", value_parser = duration)]
    pause: Duration,
    /// Rounds over all of them; the lowest figure counts.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Decisions of a round in memory.
    #[arg(long, default_value_t = 500_000)]
    in_memory: u32,
    /// Decisions of a round in Redis.
    #[arg(long, default_value_t = 10_000)]
    in_redis: u32,
    /// The server, started for this on a free port of loopback.
    #[arg(long, default_value = "redis-server")]
    redis_server: PathBuf,
    /// Print JSON alone.
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct OutageArgs {
    /// Calls a second over both gateways.
    #[arg(long, default_value_t = 200.0)]
    rps: f64,
    /// For how long Redis is stopped.
    #[arg(long, default_value = "10s", value_parser = duration)]
    stopped: Duration,
    /// How long the gateways wait for Redis.
    #[arg(long, default_value = "5ms", value_parser = duration)]
    budget: Duration,
    /// The server, started for this on a free port of loopback.
    #[arg(long, default_value = "redis-server")]
    redis_server: PathBuf,
    /// Where the gateway's program lies. Default: beside this one.
    #[arg(long)]
    binaries: Option<PathBuf>,
}

#[derive(Args)]
struct FaultsArgs {
    /// The folder with the release binary; without it it is built where cargo runs this, and looked for beside it.
    #[arg(long)]
    binaries: Option<PathBuf>,
    /// Do not build the gateway first.
    #[arg(long)]
    no_build: bool,
    /// Calls per second.
    #[arg(long, default_value_t = 300.0)]
    rate: f64,
    /// Time of each class.
    #[arg(long, default_value = "60s", value_parser = duration)]
    duration: Duration,
    /// Time with three healthy nodes before each class.
    #[arg(long, default_value = "5s", value_parser = duration)]
    warm: Duration,
    /// Output tokens of a call.
    #[arg(long, default_value_t = 20)]
    tokens: usize,
    /// Only this class, beside the healthy one; may be repeated.
    #[arg(long)]
    only: Vec<String>,
    /// Also streams that break after their first token, with this `resume:` of the model.
    #[arg(long, value_parser = ["continue", "replay"])]
    resume: Option<String>,
    /// Print JSON alone.
    #[arg(long)]
    json: bool,
}

fn duration(text: &str) -> Result<Duration, String> {
    let at = text.find(|sign: char| sign.is_ascii_alphabetic()).unwrap_or(text.len());
    let (number, unit) = text.split_at(at);
    let seconds = match unit {
        "us" => 1e-6,
        "ms" => 1e-3,
        "s" => 1.0,
        "m" => 60.0,
        _ => return Err(format!("`{text}`: write a number and a unit, such as 250us, 20ms, 1.5s or 2m")),
    };
    let number: f64 = number.parse().map_err(|_| format!("`{number}` is not a number"))?;
    Duration::try_from_secs_f64(number * seconds).map_err(|error| error.to_string())
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    // One thread: in the bench it has one core, and a simulator needs no more.
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&error.to_string()),
    };
    let done = match cli.command {
        Command::Node(args) => runtime.block_on(run_node(args)),
        Command::Dify(args) => runtime.block_on(run_dify(args)),
        Command::Run(args) => runtime.block_on(run_load(args)),
        Command::Bench(args) => runtime.block_on(run_bench(args)),
        Command::Ledger(args) => runtime.block_on(run_ledger(args)),
        Command::Outage(args) => runtime.block_on(run_outage(args)),
        Command::Faults(args) => runtime.block_on(run_faults(args)),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error),
    }
}

fn fail(error: &str) -> ExitCode {
    eprintln!("tollgate-load: {error}");
    ExitCode::FAILURE
}

async fn until_stopped() -> Result<(), String> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate()).map_err(|error| error.to_string())?;
    tokio::select! {
        _ = terminate.recv() => Ok(()),
        done = tokio::signal::ctrl_c() => done.map_err(|error| error.to_string()),
    }
}

async fn run_node(args: NodeArgs) -> Result<(), String> {
    let speeds = if args.instant {
        NodeConfig::instant()
    } else {
        NodeConfig {
            prefill_tokens_per_second: args.prefill_tokens_per_second,
            decode: args.decode,
            decode_per_running: args.decode_per_running,
            ..NodeConfig::default()
        }
    };
    let config = NodeConfig {
        bind: args.bind,
        name: args.name,
        models: args.models,
        kv_blocks: args.kv_blocks,
        block_tokens: args.block_tokens,
        max_running: args.max_running,
        queue: args.queue,
        record_bodies: args.record_bodies,
        records: args.records,
        answer_tokens: args.answer_tokens,
        longest_answer: args.longest_answer,
        answer_bytes: args.answer_bytes,
        stream_chunks: args.stream_chunks,
        chunk_gap: args.chunk_gap,
        ..speeds
    };
    let node = Node::start(config).await.map_err(|error| format!("{}: {error}", args.bind))?;
    node.set_fault(args.fault);
    println!("listening on {}", node.url());
    until_stopped().await?;
    node.stop().await;
    Ok(())
}

async fn run_dify(args: DifyArgs) -> Result<(), String> {
    let config = DifyConfig {
        bind: args.bind,
        name: args.name,
        keys: args.keys,
        per_token: args.per_token,
        answer_tokens: args.answer_tokens,
        ping_every: args.ping_every,
        record_bodies: 0,
        records: 0,
    };
    let app = DifyApp::start(config).await.map_err(|error| format!("{}: {error}", args.bind))?;
    println!("listening on {}", app.url());
    until_stopped().await?;
    app.stop().await;
    Ok(())
}

async fn run_load(args: RunArgs) -> Result<(), String> {
    let arrival = match args.rps {
        Some(rate) => Arrival::Open { rate },
        None => Arrival::Closed { callers: args.concurrency },
    };
    let config = LoadConfig {
        url: args.url,
        key: args.key,
        model: args.model,
        arrival,
        duration: args.duration,
        requests: args.requests,
        stream: args.stream,
        include_usage: args.include_usage,
        prompt_bytes: args.prompt_bytes,
        max_tokens: args.max_tokens,
        abandon: args.abandon,
        seed: args.seed,
        timeout: args.timeout,
    };
    print_json(&load::run(config).await?)
}

/// Builds the release binaries of the gateways, where cargo runs this and they are not there yet.
fn build_gateways(built: bool) -> Result<(), String> {
    // Started by cargo: the gateways are built the same way, so that the figures are those of this source.
    if let Some(cargo) = std::env::var_os("CARGO").filter(|_| !built) {
        let build = [
            "build",
            "--release",
            "-p",
            "tollgate",
            "--bin",
            "tollgate",
            "-p",
            "tollgate-load",
            "--bin",
            "bare-pingora",
        ];
        let status = std::process::Command::new(cargo).args(build).status().map_err(|error| error.to_string())?;
        if !status.success() {
            return Err("the gateways do not build".to_owned());
        }
    }
    Ok(())
}

async fn run_bench(args: BenchArgs) -> Result<(), String> {
    build_gateways(args.no_build || args.binaries.is_some())?;
    let config = BenchConfig {
        binaries: args.binaries,
        tollgate_config: args.tollgate_config,
        only: args.only,
        rounds: args.rounds,
        requests: args.requests,
        streams: args.streams,
        callers: args.callers,
        include_usage: args.include_usage,
        chunks: args.chunks,
        chunk_gap: args.chunk_gap,
        ..BenchConfig::default()
    };
    let figures = bench::run(config, &mut |line| eprintln!("{line}")).await?;
    print!("{}", figures.table());
    print_json(&figures)
}

async fn run_ledger(args: LedgerArgs) -> Result<(), String> {
    let config = LedgerConfig {
        keys: args.keys,
        callers: args.callers,
        rounds: args.rounds,
        in_memory: args.in_memory,
        in_redis: args.in_redis,
        redis_server: args.redis_server,
        pause: args.pause,
        pinned: true,
    };
    let figures = ledger::run(config, &mut |line| eprintln!("{line}")).await?;
    if !args.json {
        print!("{}", figures.table());
    }
    print_json(&figures)
}

async fn run_outage(args: OutageArgs) -> Result<(), String> {
    let config = OutageConfig {
        rate: args.rps,
        stopped: args.stopped,
        budget: args.budget,
        redis_server: args.redis_server,
        binaries: args.binaries,
    };
    let figures = outage::run(config, &mut |line| eprintln!("{line}")).await?;
    print!("{}", figures.table());
    print_json(&figures)
}

async fn run_faults(args: FaultsArgs) -> Result<(), String> {
    build_gateways(args.no_build || args.binaries.is_some())?;
    let config = FaultsConfig {
        binaries: args.binaries,
        rate: args.rate,
        duration: args.duration,
        warm: args.warm,
        tokens: args.tokens,
        only: args.only,
        resume: args.resume,
    };
    let figures = faults::run(config, &mut |line| eprintln!("{line}")).await?;
    if args.json {
        print_json(&figures)?;
    } else {
        print!("{}", figures.table());
    }
    if figures.is_good() { Ok(()) } else { Err("callers noticed, or the nodes got too many extra requests".to_owned()) }
}

fn print_json(value: &impl serde::Serialize) -> Result<(), String> {
    println!("{}", serde_json::to_string_pretty(value).map_err(|error| error.to_string())?);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_a_unit() {
        assert_eq!(duration("250us").unwrap(), Duration::from_micros(250));
        assert_eq!(duration("1.5s").unwrap(), Duration::from_millis(1500));
        assert_eq!(duration("2m").unwrap(), Duration::from_secs(120));
        for text in ["5", "s", "-1s", "1h", ""] {
            assert!(duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn the_command_line_is_sound() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }
}
