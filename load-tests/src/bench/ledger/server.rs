//! A redis-server of the bench's own.

use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use tokio::net::TcpStream;
use tokio::process::Child;

use super::super::gateway::{Cores, Scratch, free_port};

/// A server that keeps nothing, on loopback; killed when it is dropped.
pub(in crate::bench) struct Server {
    pub(in crate::bench) pid: u32,
    pub(in crate::bench) port: u16,
    child: Child,
    _scratch: Scratch,
}

impl Server {
    pub(in crate::bench) async fn start(program: &Path, cores: &Cores) -> Result<Self, String> {
        let port = free_port()?;
        let scratch = Scratch::new()?;
        let mut command = cores.command(program);
        command
            .args(["--bind", "127.0.0.1", "--port", &port.to_string(), "--save", "", "--appendonly", "no"])
            .current_dir(scratch.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true);
        let needed = |why: &str| format!("{}: {why} (Debian: apt-get install redis-server)", program.display());
        let mut child = command.spawn().map_err(|error| needed(&error.to_string()))?;
        let pid = child.id().ok_or_else(|| needed("it ended at once"))?;
        let give_up = Instant::now() + Duration::from_secs(15);
        while TcpStream::connect(("127.0.0.1", port)).await.is_err() {
            if Instant::now() > give_up || child.try_wait().ok().flatten().is_some() {
                return Err(needed("it does not listen"));
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(Self { pid, port, child, _scratch: scratch })
    }

    pub(in crate::bench) async fn stop(mut self) {
        // It is killed on drop as well; this waits for it to be gone.
        let _ = self.child.kill().await;
    }
}
