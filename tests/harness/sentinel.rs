//! A real Sentinel of a test's own.

use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::redis::{Redis, answer, free_port, speak};
use super::{PATIENCE, eventually};

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

    /// Makes the replica the master. A Sentinel that has just heard of the replica wants to know it better first.
    pub(crate) async fn fail_over(&self) {
        eventually("the Sentinel to begin a failover", || async {
            let stream = TcpStream::connect(("127.0.0.1", self.port)).expect("the Sentinel listens");
            answer(stream, &["SENTINEL", "FAILOVER", "main"]).starts_with("+OK")
        })
        .await;
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
