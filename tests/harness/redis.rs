//! A real redis-server of a test's own, and a word with it.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::PATIENCE;

/// A running server on a socket, killed when the test lets go of it.
pub(crate) struct Redis {
    child: Child,
    home: TempDir,
    more: Vec<String>,
    port: u16,
    /// Keeps the port of a server that was killed from being given to another test's.
    kept: Option<socket2::Socket>,
}

impl Redis {
    pub(crate) fn start() -> Self {
        Self::with(&[])
    }

    /// A server with further settings on its command line.
    pub(crate) fn with(more: &[&str]) -> Self {
        let home = TempDir::new().expect("a temporary directory");
        let more: Vec<String> = more.iter().map(ToString::to_string).collect();
        Self { child: launch(&home, &more), home, more, port: 0, kept: None }
    }

    /// A server that also listens on a free port of 127.0.0.1.
    pub(crate) fn on_port(more: &[&str]) -> Self {
        let port = free_port();
        let mut all = vec!["--port".to_owned(), port.to_string(), "--bind".to_owned(), "127.0.0.1".to_owned()];
        all.extend(["--repl-diskless-sync-delay", "0"].map(str::to_owned));
        all.extend(more.iter().map(ToString::to_string));
        let home = TempDir::new().expect("a temporary directory");
        Self { child: launch(&home, &all), home, more: all, port, kept: None }
    }

    /// The port given by [`Redis::on_port`].
    pub(crate) const fn port(&self) -> u16 {
        self.port
    }

    /// Kills it and starts it again with other settings. Its files stay.
    pub(crate) fn restart_with(&mut self, more: &[&str]) {
        self.more = more.iter().map(ToString::to_string).collect();
        self.restart();
    }

    /// Kills it and starts it again, with nothing in it.
    pub(crate) fn restart(&mut self) {
        self.kill();
        self.kept = None;
        self.child = launch(&self.home, &self.more);
    }

    pub(crate) fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if self.port != 0 {
            let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).expect("a socket");
            socket.set_reuse_address(true).expect("a reusable address");
            let address = std::net::SocketAddr::from(([127, 0, 0, 1], self.port));
            self.kept = socket.bind(&address.into()).is_ok().then_some(socket);
        }
    }

    pub(crate) fn url(&self) -> String {
        format!("redis+unix://{}", self.socket().display())
    }

    /// Sends a signal, like `STOP`.
    pub(crate) fn signal(&self, name: &str) {
        let status = Command::new("kill").args([&format!("-{name}"), &self.child.id().to_string()]).status();
        assert!(status.expect("kill runs").success());
    }

    /// One command; its answer if that is a number or a line.
    pub(crate) fn command(&self, words: &[&str]) -> String {
        self.ask(words).trim_start_matches([':', '+', '$']).lines().next().unwrap_or_default().to_owned()
    }

    /// One command; its answer as it comes.
    pub(crate) fn ask(&self, words: &[&str]) -> String {
        speak(UnixStream::connect(self.socket()).expect("redis-server listens"), words)
    }

    /// One command as this user, who needs no password.
    pub(crate) fn command_as(&self, user: &str, words: &[&str]) -> String {
        let mut stream = UnixStream::connect(self.socket()).expect("redis-server listens");
        speak(&mut stream, &["AUTH", user, "-"]);
        speak(&mut stream, words)
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.home.path().join("redis.sock")
    }

    /// How often a command was called.
    pub(crate) fn calls(&self, command: &str) -> u64 {
        let stats = self.ask(&["INFO", "commandstats"]);
        let line = stats.lines().find_map(|line| line.strip_prefix(&format!("cmdstat_{command}:calls=")));
        line.map_or(0, |line| line.split(',').next().expect("a number").parse().expect("a number"))
    }
}

/// Says one thing and reads one answer: a line, and the text after it if it announces one.
fn speak(mut stream: impl Read + Write, words: &[&str]) -> String {
    let mut text = format!("*{}\r\n", words.len());
    words.iter().for_each(|word| text.push_str(&format!("${}\r\n{word}\r\n", word.len())));
    stream.write_all(text.as_bytes()).expect("a command is sent");
    let mut stream = BufReader::new(stream);
    let mut answer = String::new();
    stream.read_line(&mut answer).expect("an answer");
    assert!(!answer.starts_with('-'), "{words:?}: {answer}");
    if let Some(len) = answer.strip_prefix('$').and_then(|len| len.trim_end().parse::<usize>().ok()) {
        let mut bulk = vec![0; len];
        stream.read_exact(&mut bulk).expect("the whole answer");
        answer.push_str(&String::from_utf8_lossy(&bulk));
    }
    answer.trim_end().to_owned()
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a free port").port()
}

/// A Sentinel that watches one master under the name `main`, and may fail it over on its own.
pub(crate) struct Sentinel {
    child: Child,
    port: u16,
    _home: TempDir,
}

impl Sentinel {
    pub(crate) fn of(master: &Redis) -> Self {
        let (home, port) = (TempDir::new().expect("a temporary directory"), free_port());
        let file = home.path().join("sentinel.conf");
        let text = format!(
            "port {port}\nbind 127.0.0.1\nsentinel monitor main 127.0.0.1 {} 1\n\
             sentinel down-after-milliseconds main 500\nsentinel failover-timeout main 5000\n",
            master.port()
        );
        std::fs::write(&file, text).expect("a file");
        let mut command = Command::new("redis-server");
        command.arg(&file).arg("--sentinel").current_dir(home.path()).stdout(Stdio::null()).stderr(Stdio::null());
        let child = command.spawn().expect("a Sentinel starts");
        let sentinel = Self { child, port, _home: home };
        let patience = Instant::now() + PATIENCE;
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert!(Instant::now() < patience, "the Sentinel did not listen");
            std::thread::sleep(Duration::from_millis(5));
        }
        sentinel
    }

    pub(crate) const fn port(&self) -> u16 {
        self.port
    }

    pub(crate) fn ask(&self, words: &[&str]) -> String {
        speak(TcpStream::connect(("127.0.0.1", self.port)).expect("the Sentinel listens"), words)
    }

    /// Whether it knows a replica that could take over.
    pub(crate) fn is_ready(&self) -> bool {
        self.ask(&["INFO", "sentinel"]).contains("status=ok,address=")
            && self.ask(&["INFO", "sentinel"]).contains("slaves=1")
    }
}

impl Drop for Sentinel {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn launch(home: &TempDir, more: &[String]) -> Child {
    let socket = home.path().join("redis.sock");
    let _ = std::fs::remove_file(&socket);
    let child = Command::new("redis-server")
        .args(["--port", "0", "--save", "", "--appendonly", "no", "--unixsocket"])
        .arg(&socket)
        .args(more)
        .current_dir(home.path())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    let child = child.unwrap_or_else(|error| {
        panic!(
            "redis-server is needed for this test and does not start: {error} (Debian: apt-get install redis-server)"
        )
    });
    let patience = Instant::now() + PATIENCE;
    while UnixStream::connect(&socket).is_err() {
        assert!(Instant::now() < patience, "redis-server did not listen");
        std::thread::sleep(Duration::from_millis(5));
    }
    child
}

impl Drop for Redis {
    fn drop(&mut self) {
        self.kill();
    }
}
