//! The processes that are measured.

use std::fs::{self, File};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use tokio::process::{Child, Command};

use super::BenchConfig;
use crate::load::{self, LoadConfig};

/// The key in the configuration written here.
pub(super) const KEY: &str = "tg-bench-0123456789abcdef0123456789abcdef";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    BarePingora,
    Tollgate,
}

impl Kind {
    pub(super) const ALL: [Self; 2] = [Self::BarePingora, Self::Tollgate];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::BarePingora => "bare-pingora",
            Self::Tollgate => "tollgate",
        }
    }
}

/// Which core does what.
pub(super) struct Cores {
    pub(super) gateway: Option<usize>,
    pub(super) load: Option<usize>,
}

impl Cores {
    /// The last core for the gateway, the first for node and load; nothing is pinned on a machine with one.
    pub(super) fn split() -> Self {
        let count = std::thread::available_parallelism().map_or(1, usize::from);
        if count < 2 {
            return Self { gateway: None, load: None };
        }
        Self { gateway: Some(count - 1), load: Some(0) }
    }

    /// A program pinned to the gateway's core.
    pub(super) fn command(&self, program: &Path) -> Command {
        let Some(core) = self.gateway else { return Command::new(program) };
        let mut command = Command::new("taskset");
        command.args(["-c", &core.to_string()]).arg(program);
        command
    }

    /// Pins this process with all its threads.
    pub(super) fn pin_self(&self) -> Result<(), String> {
        let Some(core) = self.load else { return Ok(()) };
        let pid = std::process::id().to_string();
        let done = std::process::Command::new("taskset").args(["-a", "-c", "-p", &core.to_string(), &pid]).output();
        match done {
            Ok(output) if output.status.success() => Ok(()),
            Ok(output) => Err(format!("taskset: {}", String::from_utf8_lossy(&output.stderr).trim())),
            Err(error) => Err(format!("taskset (package util-linux): {error}")),
        }
    }
}

/// A folder for configurations and logs, removed when it is dropped.
pub(super) struct Scratch(PathBuf);

impl Scratch {
    pub(super) fn new() -> Result<Self, String> {
        let path = std::env::temp_dir().join(format!("tollgate-bench-{}", std::process::id()));
        fs::create_dir_all(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        Ok(Self(path))
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // What stays behind is a few small files in the folder for such.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A gateway that is up; killed when it is dropped.
pub(super) struct Process {
    pub(super) pid: u32,
    pub(super) url: String,
    child: Child,
}

impl Process {
    pub(super) async fn start(
        kind: Kind,
        config: &BenchConfig,
        cores: &Cores,
        scratch: &Scratch,
        node: SocketAddr,
    ) -> Result<Self, String> {
        let port = free_port()?;
        let binary = binary(kind, config)?;
        let arguments = match kind {
            Kind::BarePingora => {
                ["--listen", &format!("127.0.0.1:{port}"), "--upstream", &node.to_string()].map(str::to_owned).to_vec()
            }
            Kind::Tollgate => {
                let path = scratch.0.join("tollgate.yaml");
                let text = tollgate_config(config, port, node)?;
                fs::write(&path, text).map_err(|error| format!("{}: {error}", path.display()))?;
                vec!["run".to_owned(), "-c".to_owned(), path.display().to_string()]
            }
        };
        let log = scratch.0.join(format!("{}.log", kind.name()));
        let errors = File::create(&log).map_err(|error| format!("{}: {error}", log.display()))?;
        let mut command = cores.command(&binary);
        // The access log is written, as it would be, but nobody reads it.
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(errors).kill_on_drop(true);
        let child = command.spawn().map_err(|error| format!("{}: {error}", binary.display()))?;
        let pid = child.id().ok_or("the gateway ended at once")?;
        let mut process = Self { pid, url: format!("http://127.0.0.1:{port}"), child };
        process.wait_until_up(kind, &log).await?;
        Ok(process)
    }

    async fn wait_until_up(&mut self, kind: Kind, log: &Path) -> Result<(), String> {
        let give_up = Instant::now() + Duration::from_secs(15);
        loop {
            let probe = LoadConfig {
                url: self.url.clone(),
                key: Some(KEY.to_owned()),
                requests: Some(1),
                timeout: Duration::from_secs(2),
                ..LoadConfig::default()
            };
            let report = load::run(probe).await?;
            if report.ok == 1 {
                return Ok(());
            }
            let ended = self.child.try_wait().ok().flatten();
            if ended.is_some() || Instant::now() > give_up {
                let text = fs::read_to_string(log).unwrap_or_default();
                let errors: Vec<&String> = report.errors.keys().collect();
                return Err(format!("{} does not answer ({errors:?}):\n{text}", kind.name()));
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    pub(super) async fn stop(mut self) {
        // It is killed on drop as well; this waits for it to be gone.
        let _ = self.child.kill().await;
    }
}

fn binary(kind: Kind, config: &BenchConfig) -> Result<PathBuf, String> {
    let folder = match &config.binaries {
        Some(folder) => folder.clone(),
        None => {
            let own = std::env::current_exe().map_err(|error| error.to_string())?;
            own.parent().map(Path::to_owned).unwrap_or_default()
        }
    };
    let path = folder.join(kind.name());
    if path.is_file() { Ok(path) } else { Err(format!("{}: no such program; build it first", path.display())) }
}

pub(super) fn free_port() -> Result<u16, String> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).map_err(|error| error.to_string())?;
    Ok(listener.local_addr().map_err(|error| error.to_string())?.port())
}

fn tollgate_config(config: &BenchConfig, port: u16, node: SocketAddr) -> Result<String, String> {
    let text = match &config.tollgate_config {
        Some(path) => fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))?,
        None => TOLLGATE.replace("ADMIN_PORT", &free_port()?.to_string()).replace("BENCH_KEY", KEY),
    };
    Ok(text.replace("LISTEN_PORT", &port.to_string()).replace("NODE_PORT", &node.port().to_string()))
}

const TOLLGATE: &str = "\
server:
  listen: [{ bind: \"127.0.0.1:LISTEN_PORT\" }]
  admin: { bind: \"127.0.0.1:ADMIN_PORT\" }
  threads: 1
tiers:
  bench: { requests_per_minute: 1_000_000_000, requests_per_hour: 1_000_000_000, tokens_per_day: 1_000_000_000_000 }
keys:
  - { id: bench, key: \"BENCH_KEY\", tier: bench }
upstreams:
  node:
    dialect: openai
    balance: least_request
    nodes: [\"http://127.0.0.1:NODE_PORT\"]
models:
  sim: { targets: [{ upstream: node, model: sim }] }
routes:
  - name: llm
    match: { path: /v1/chat/completions, method: [POST] }
    call: { models: \"*\" }
";
