//! A real redis-server for tests, of their own.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// A running server without a TCP port, ended when the test lets go of it.
pub(crate) struct Server {
    child: Option<Child>,
    socket: PathBuf,
    more: Vec<&'static str>,
}

impl Server {
    pub(crate) fn start() -> Self {
        Self::with(&[])
    }

    /// A server with further settings on its command line.
    pub(crate) fn with(more: &[&'static str]) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("tollgate-test-{}-{}.sock", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let mut server = Self { child: None, socket: std::env::temp_dir().join(name), more: more.to_vec() };
        server.run();
        server
    }

    /// Starts again, with nothing in it.
    pub(crate) fn run(&mut self) {
        let child = Command::new("redis-server")
            .args(["--port", "0", "--save", "", "--appendonly", "no", "--unixsocket"])
            .arg(&self.socket)
            .args(&self.more)
            .current_dir(std::env::temp_dir())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        self.child = Some(child.unwrap_or_else(|error| {
            panic!("redis-server is needed for this test and does not start: {error} (Debian: apt-get install redis-server)")
        }));
        let patience = Instant::now() + Duration::from_secs(20);
        while std::os::unix::net::UnixStream::connect(&self.socket).is_err() {
            assert!(Instant::now() < patience, "redis-server did not listen");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub(crate) fn url(&self) -> String {
        format!("redis+unix://{}", self.socket.display())
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.as_ref().unwrap().id()
    }

    /// Sends a signal, like `STOP` and `CONT`.
    pub(crate) fn signal(&self, name: &str) {
        let pid = self.pid().to_string();
        assert!(Command::new("kill").args([&format!("-{name}"), &pid]).status().unwrap().success());
    }

    /// Ends it at once; what was in it is gone.
    pub(crate) fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        let _ = std::fs::remove_file(&self.socket);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}
