//! The real binary as a child process.

use std::io::{BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

use super::client::{Request, Wire};
use super::raw::RawClient;
use super::{PATIENCE, eventually};

/// Lines that a child has written so far.
type Lines = Arc<Mutex<Vec<String>>>;

/// A running `tollgate`, killed when the test lets go of it.
pub(crate) struct Gateway {
    child: Child,
    data: Vec<SocketAddr>,
    admin: SocketAddr,
    stdout: Lines,
    stderr: Lines,
    _home: TempDir,
}

/// A `tollgate` command with a clean environment.
pub(crate) fn tollgate(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tollgate"));
    command.args(args).env("NO_COLOR", "1").env_remove("RUST_LOG").stdin(Stdio::null());
    command
}

fn follow(stream: impl Read + Send + 'static) -> Lines {
    let lines = Lines::default();
    let sink = Arc::clone(&lines);
    thread::spawn(move || {
        let mut reader = BufReader::new(stream);
        let mut line = Vec::new();
        while reader.read_until(b'\n', &mut line).is_ok_and(|n| n > 0) {
            let text = String::from_utf8_lossy(&line).trim_end().to_owned();
            sink.lock().expect("lines").push(text);
            line.clear();
        }
    });
    lines
}

/// The addresses in lines like `... listening data=127.0.0.1:4711 ...`.
fn listening(lines: &[String], which: &str) -> Vec<SocketAddr> {
    let mark = format!("listening {which}=");
    lines
        .iter()
        .filter_map(|line| line.split_once(&mark))
        .filter_map(|(_, rest)| rest.split_whitespace().next())
        .filter_map(|addr| addr.parse().ok())
        .collect()
}

impl Gateway {
    /// Serves this configuration; returns when it is ready.
    pub(crate) async fn with(config: &(impl ToString + ?Sized)) -> Self {
        Self::with_env(config, &[]).await
    }

    /// The same with environment variables set.
    pub(crate) async fn with_env(config: &(impl ToString + ?Sized), env: &[(&str, &str)]) -> Self {
        Self::in_home(TempDir::new().expect("a temporary directory"), config, env).await
    }

    /// The same with a directory that already holds files the configuration names.
    pub(crate) async fn in_home(home: TempDir, config: &(impl ToString + ?Sized), env: &[(&str, &str)]) -> Self {
        let file = home.path().join("tollgate.yaml");
        std::fs::write(&file, config.to_string()).expect("the configuration is written");
        let mut command = tollgate(&["run", "-c", file.to_str().expect("a path in UTF-8")]);
        command.envs(env.iter().copied()).current_dir(home.path());
        Self::launch(command, home, true).await
    }

    /// `tollgate demo` on a free port.
    pub(crate) async fn demo() -> Self {
        let home = TempDir::new().expect("a temporary directory");
        let mut command = tollgate(&["demo", "--port", "0"]);
        command.current_dir(home.path());
        Self::launch(command, home, false).await
    }

    async fn launch(mut command: Command, home: TempDir, with_admin: bool) -> Self {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the gateway starts");
        let stdout = follow(child.stdout.take().expect("piped"));
        let stderr = follow(child.stderr.take().expect("piped"));
        let deadline = Instant::now() + PATIENCE;
        loop {
            let gone = child.try_wait().expect("a child that can be waited for");
            let lines = stderr.lock().expect("lines").clone();
            let (data, admin) = (listening(&lines, "data"), listening(&lines, "admin"));
            let ready = lines.iter().any(|line| line.split_whitespace().any(|word| word.contains("ready")));
            if ready && !data.is_empty() && (!admin.is_empty() || !with_admin) {
                let admin = admin.first().copied().unwrap_or_else(|| data[0]);
                return Self { child, data, admin, stdout, stderr, _home: home };
            }
            if gone.is_some() || Instant::now() > deadline {
                let _ = child.kill();
                let _ = child.wait();
                panic!("the gateway did not get ready ({gone:?}):\n{}", stderr.lock().expect("lines").join("\n"));
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Where clients connect.
    pub(crate) fn addr(&self) -> SocketAddr {
        self.data[0]
    }

    /// Every address of the data port, in the order of `server.listen`.
    pub(crate) fn addrs(&self) -> &[SocketAddr] {
        &self.data
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.addr())
    }

    /// The admin port.
    pub(crate) fn admin_url(&self) -> String {
        format!("http://{}", self.admin)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn request(&self, method: &str, target: &str) -> Request {
        Request::new(self.addr(), method, target)
    }

    pub(crate) fn get(&self, target: &str) -> Request {
        self.request("GET", target)
    }

    pub(crate) fn post(&self, target: &str) -> Request {
        self.request("POST", target)
    }

    /// A request to the admin port.
    pub(crate) fn admin(&self, method: &str, target: &str) -> Request {
        Request::new(self.admin, method, target)
    }

    /// A kept-alive HTTP/1.1 connection.
    pub(crate) async fn wire(&self) -> Wire {
        Wire::http1(self.addr()).await
    }

    /// An HTTP/2 connection without TLS, by prior knowledge.
    pub(crate) async fn wire2(&self) -> Wire {
        Wire::http2(self.addr()).await
    }

    /// A bare TCP connection.
    pub(crate) async fn raw(&self) -> RawClient {
        RawClient::connect(self.addr()).await
    }

    /// Sum of the samples with that name and (at least) those labels; 0 if there are none.
    pub(crate) async fn metric(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        self.samples(name, labels).await.iter().sum()
    }

    /// The samples with that name and (at least) those labels.
    pub(crate) async fn samples(&self, name: &str, labels: &[(&str, &str)]) -> Vec<f64> {
        let answer = self.admin("GET", "/metrics").send().await;
        assert_eq!(answer.status(), 200, "/metrics: {}", answer.text());
        answer.text().lines().filter_map(|line| sample(line, name, labels)).collect()
    }

    /// Waits until a metric has that value.
    pub(crate) async fn settles(&self, name: &str, labels: &[(&str, &str)], value: f64) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let now = self.metric(name, labels).await;
            if (now - value).abs() < 1e-9 {
                return;
            }
            assert!(Instant::now() < deadline, "{name}{labels:?} is {now}, expected {value}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// The lines of the access log so far.
    pub(crate) fn access_log(&self) -> Vec<Value> {
        let lines = self.stdout.lock().expect("lines").clone();
        lines.iter().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    /// Everything written to stdout and stderr so far, for searching secrets in it.
    pub(crate) fn output(&self) -> String {
        let stdout = self.stdout.lock().expect("lines").join("\n");
        let stderr = self.stderr.lock().expect("lines").join("\n");
        format!("{stdout}\n{stderr}")
    }

    /// What was written to stdout so far.
    pub(crate) fn stdout(&self) -> String {
        self.stdout.lock().expect("lines").join("\n")
    }

    /// The access log line of a request, as soon as it is there.
    pub(crate) async fn logged(&self, request_id: &str) -> Value {
        let find = || self.access_log().into_iter().find(|line| line["request_id"] == request_id);
        eventually(&format!("an access log line of {request_id}"), || async { find().is_some() }).await;
        find().expect("just seen")
    }

    /// Sends SIGTERM.
    pub(crate) fn terminate(&self) {
        let status = Command::new("kill").args(["-TERM", &self.pid().to_string()]).status().expect("kill runs");
        assert!(status.success(), "SIGTERM could not be sent");
    }

    /// Waits for the process to end by itself.
    pub(crate) async fn exit(&mut self) -> ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().expect("a child that can be waited for") {
                return status;
            }
            assert!(Instant::now() < deadline, "the gateway did not exit");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Whether it still runs.
    pub(crate) fn runs(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if thread::panicking() {
            let lines = self.stderr.lock().expect("lines");
            let tail = lines.len().saturating_sub(60);
            eprintln!("--- the gateway's stderr ---\n{}\n---", lines[tail..].join("\n"));
        }
    }
}

/// Runs a command to its end, with a deadline.
pub(crate) async fn finish(mut command: Command) -> Output {
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let run = tokio::task::spawn_blocking(move || command.output());
    super::in_time("a command to end", run).await.expect("a task").expect("the command runs")
}

fn sample(line: &str, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
    let rest = line.strip_prefix(name)?;
    let (set, value) = match rest.strip_prefix('{') {
        Some(rest) => rest.rsplit_once('}')?,
        None => ("", rest.strip_prefix(' ').map(|_| rest)?),
    };
    let has = |(key, value): &(&str, &str)| {
        let pair = format!("{key}=\"{value}\"");
        set.split(',').any(|part| part == pair)
    };
    if labels.iter().all(has) { value.split_whitespace().next()?.parse().ok() } else { None }
}

#[test]
fn samples_are_told_apart_by_name_and_labels() {
    let line = "tollgate_x_total{route=\"a,b\",key=\"k\"} 2.5";
    assert_eq!(sample(line, "tollgate_x_total", &[]), Some(2.5));
    assert_eq!(sample(line, "tollgate_x_total", &[("key", "k")]), Some(2.5));
    assert_eq!(sample(line, "tollgate_x_total", &[("key", "other")]), None);
    assert_eq!(sample(line, "tollgate_x", &[]), None);
    assert_eq!(sample("tollgate_y 3", "tollgate_y", &[]), Some(3.0));
    assert_eq!(sample("# TYPE tollgate_y gauge", "tollgate_y", &[]), None);
}
