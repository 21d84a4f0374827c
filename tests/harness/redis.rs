//! A real redis-server of a test's own, and a word with it.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::PATIENCE;

/// A running server on a socket, killed when the test lets go of it.
pub(crate) struct Redis {
    child: Child,
    home: TempDir,
    more: Vec<String>,
}

impl Redis {
    pub(crate) fn start() -> Self {
        Self::with(&[])
    }

    /// A server with further settings on its command line.
    pub(crate) fn with(more: &[&str]) -> Self {
        let home = TempDir::new().expect("a temporary directory");
        let more: Vec<String> = more.iter().map(ToString::to_string).collect();
        Self { child: launch(&home, &more), home, more }
    }

    /// Kills it and starts it again, with nothing in it.
    pub(crate) fn restart(&mut self) {
        self.kill();
        self.child = launch(&self.home, &self.more);
    }

    pub(crate) fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    pub(crate) fn url(&self) -> String {
        format!("redis+unix://{}", self.home.path().join("redis.sock").display())
    }

    /// Sends a signal, like `STOP`.
    pub(crate) fn signal(&self, name: &str) {
        let status = Command::new("kill").args([&format!("-{name}"), &self.child.id().to_string()]).status();
        assert!(status.expect("kill runs").success());
    }

    /// One command; its answer if that is a number or a line.
    pub(crate) fn command(&self, words: &[&str]) -> String {
        let mut stream = UnixStream::connect(self.home.path().join("redis.sock")).expect("redis-server listens");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        let mut text = format!("*{}\r\n", words.len());
        words.iter().for_each(|word| text.push_str(&format!("${}\r\n{word}\r\n", word.len())));
        stream.write_all(text.as_bytes()).expect("a command is sent");
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line).expect("an answer");
        assert!(!line.starts_with('-'), "{words:?}: {line}");
        line.trim_end().trim_start_matches([':', '+', '$']).to_owned()
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
