//! A real redis-server of a test's own, and a word with it.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::PATIENCE;
use super::watched::Watched;

/// A running server on a socket, killed when the test lets go of it.
pub(crate) struct Redis {
    child: Child,
    home: TempDir,
    more: Vec<String>,
    port: u16,
    /// Keeps the port of a server that was killed from being given to another test's.
    kept: Option<socket2::Socket>,
    env: Vec<(&'static str, String)>,
}

impl Redis {
    pub(crate) fn start() -> Self {
        Self::with(&[])
    }

    /// A server with further settings on its command line.
    pub(crate) fn with(more: &[&str]) -> Self {
        Self::in_env(more, Vec::new())
    }

    /// A server whose clock starts at that time, like `2026-03-01 23:59:50` (UTC), and runs so many times as fast.
    pub(crate) fn at(time: &str, speed: u32) -> Self {
        // The C library is named a second time so that its allocator comes before the one that the server is linked with:
        // that one looks at the clock before the library that tells the time is ready.
        let env = vec![
            ("LD_PRELOAD", format!("{} libc.so.6", faketime().display())),
            ("FAKETIME", format!("@{time} x{speed}")),
            ("FAKETIME_DONT_FAKE_MONOTONIC", "1".to_owned()),
            ("TZ", "UTC".to_owned()),
        ];
        Self::in_env(&[], env)
    }

    fn in_env(more: &[&str], env: Vec<(&'static str, String)>) -> Self {
        let home = TempDir::new().expect("a temporary directory");
        let more: Vec<String> = more.iter().map(ToString::to_string).collect();
        Self { child: launch(&home, &more, &env), home, more, port: 0, kept: None, env }
    }

    /// A server that also listens on a free port of 127.0.0.1.
    pub(crate) fn on_port(more: &[&str]) -> Self {
        let port = free_port();
        let mut all = vec!["--port".to_owned(), port.to_string(), "--bind".to_owned(), "127.0.0.1".to_owned()];
        all.extend(["--repl-diskless-sync-delay", "0"].map(str::to_owned));
        all.extend(more.iter().map(ToString::to_string));
        let home = TempDir::new().expect("a temporary directory");
        Self { child: launch(&home, &all, &[]), home, more: all, port, kept: None, env: Vec::new() }
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
        self.child = launch(&self.home, &self.more, &self.env);
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

    /// One command whose answer is a text, like `INFO`.
    pub(crate) fn text(&self, words: &[&str]) -> String {
        let answer = self.ask(words);
        answer.split_once("\r\n").unwrap_or_else(|| panic!("{words:?}: {answer}")).1.to_owned()
    }

    /// Watches what scripts write from now on.
    pub(crate) fn watch(&self) -> Watched {
        let mut stream = UnixStream::connect(self.socket()).expect("redis-server listens");
        stream.write_all(b"MONITOR\r\n").expect("a command is sent");
        let mut lines = BufReader::new(stream);
        let mut line = String::new();
        lines.read_line(&mut line).expect("an answer");
        assert_eq!(line, "+OK\r\n");
        let watched = Watched::default();
        let told = watched.clone();
        thread::spawn(move || lines.lines().map_while(Result::ok).for_each(|line| told.line(&line)));
        watched
    }

    /// The server's time in microseconds since 1970.
    pub(crate) fn now(&self) -> u64 {
        let time = "local t = redis.call('TIME') return t[1] * 1000000 + t[2]";
        self.command(&["EVAL", time, "0"]).parse().expect("a number")
    }

    /// Makes every lease expire at once, as if its time had passed.
    pub(crate) fn expire_leases(&self) {
        let expire =
            "for _, id in ipairs(redis.call('ZRANGE', KEYS[1], 0, -1)) do redis.call('ZADD', KEYS[1], 1, id) end";
        self.command(&["EVAL", expire, "1", "tg:{tg}:z"]);
    }

    /// Leases there are, those among them that expired.
    pub(crate) fn leases(&self) -> usize {
        self.command(&["ZCARD", "tg:{tg}:z"]).parse().expect("a number")
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

/// Says one thing and reads one answer: a line, and the text after it if it announces one. No complaint.
pub(crate) fn speak(stream: impl Read + Write, words: &[&str]) -> String {
    let answer = answer(stream, words);
    assert!(!answer.starts_with('-'), "{words:?}: {answer}");
    answer
}

/// The same, whatever the answer is.
pub(crate) fn answer(mut stream: impl Read + Write, words: &[&str]) -> String {
    let mut text = format!("*{}\r\n", words.len());
    words.iter().for_each(|word| text.push_str(&format!("${}\r\n{word}\r\n", word.len())));
    stream.write_all(text.as_bytes()).expect("a command is sent");
    let mut stream = BufReader::new(stream);
    let mut answer = String::new();
    stream.read_line(&mut answer).expect("an answer");
    if let Some(len) = answer.strip_prefix('$').and_then(|len| len.trim_end().parse::<usize>().ok()) {
        let mut bulk = vec![0; len];
        stream.read_exact(&mut bulk).expect("the whole answer");
        answer.push_str(&String::from_utf8_lossy(&bulk));
    }
    answer.trim_end().to_owned()
}

pub(crate) fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a free port").port()
}

/// The library that lets a process see another time.
fn faketime() -> PathBuf {
    let places = std::fs::read_dir("/usr/lib").expect("/usr/lib").flatten().map(|entry| entry.path());
    let mut found = places.map(|place| place.join("faketime/libfaketime.so.1")).filter(|path| path.exists());
    found.next().expect("libfaketime is needed for this test (Debian: apt-get install faketime)")
}

fn launch(home: &TempDir, more: &[String], env: &[(&'static str, String)]) -> Child {
    let socket = home.path().join("redis.sock");
    let _ = std::fs::remove_file(&socket);
    let child = Command::new("redis-server")
        .args(["--port", "0", "--save", "", "--appendonly", "no", "--unixsocket"])
        .arg(&socket)
        .args(more)
        .envs(env.iter().map(|(name, value)| (name, value)))
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
