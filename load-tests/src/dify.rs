//! A simulated Dify app, as its callers see it: chat, completion and workflow runs, blocking and streamed.
//!
//! One app serves all paths, where a real one has a single mode. Ping events carry no data, as Dify sends them.
//! The header `x-sim-fault` and [`DifyApp::set_fault`] take the node's faults; those that act here are `refuse`, a status,
//! `slow_header`, `slow_token`, `cut`, `stall`, `error_event`, `no_usage`, `usage_zero`, `crlf` and `comments`.

mod api;
mod events;

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use parking_lot::Mutex;

use self::api::App;
use crate::node::{Fault, Numbers};
use crate::record::{Journal, Recorded};
use crate::serve::{Connections, Listener};

/// How an app behaves.
#[derive(Clone, Debug)]
pub struct DifyConfig {
    /// Where to listen; port 0 takes a free one.
    pub bind: SocketAddr,
    /// The app's name, shown by `GET /v1/info`.
    pub name: String,
    /// The keys it takes; none means any that begins with `app-`.
    pub keys: Vec<String>,
    /// Time per token of an answer.
    pub per_token: Duration,
    /// Tokens of an answer.
    pub answer_tokens: usize,
    /// A ping event is sent in every such silence of a stream.
    pub ping_every: Duration,
    /// Bodies up to this many bytes are kept with their record.
    pub record_bodies: usize,
    /// How many requests are remembered, the newest.
    pub records: usize,
}

impl Default for DifyConfig {
    /// Fast enough for tests: a millisecond per token.
    fn default() -> Self {
        Self {
            bind: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            name: "simulated".to_owned(),
            keys: Vec::new(),
            per_token: Duration::from_millis(1),
            answer_tokens: 16,
            ping_every: Duration::from_secs(10),
            record_bodies: 64 * 1024,
            records: 10_000,
        }
    }
}

/// What an app has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DifyStats {
    /// Connections open now.
    pub open_connections: u64,
    /// Connections accepted since the start.
    pub total_connections: u64,
    /// Requests whose head was read.
    pub total_requests: u64,
}

/// A running app. Dropping it stops it and closes its connections.
pub struct DifyApp {
    app: Arc<App>,
    seen: Arc<Connections>,
    listener: Listener,
}

impl DifyApp {
    /// Starts an app on the running tokio runtime.
    ///
    /// # Errors
    /// When the address cannot be bound.
    pub async fn start(config: DifyConfig) -> io::Result<Self> {
        let bind = config.bind;
        let app = Arc::new(App {
            journal: Journal::new(config.records, config.record_bodies),
            fault: Mutex::new(None),
            ids: Mutex::new(Numbers::new(rand::random())),
            config,
        });
        let seen = Arc::new(Connections::default());
        let listener = Listener::start(bind, Arc::clone(&app), Arc::clone(&seen)).await?;
        Ok(Self { app, seen, listener })
    }

    /// Where it listens.
    pub fn addr(&self) -> SocketAddr {
        self.listener.addr()
    }

    /// Its address as `http://HOST:PORT`.
    pub fn url(&self) -> String {
        format!("http://{}", self.addr())
    }

    /// Sets or clears the fault of every further run.
    pub fn set_fault(&self, fault: Option<Fault>) {
        *self.app.fault.lock() = fault;
    }

    /// The requests seen, oldest first, those still running included.
    pub fn requests(&self) -> Vec<Recorded> {
        self.app.journal.all()
    }

    /// What the app has done.
    pub fn stats(&self) -> DifyStats {
        DifyStats {
            open_connections: self.seen.open.load(Ordering::Relaxed),
            total_connections: self.seen.total.load(Ordering::Relaxed),
            total_requests: self.app.journal.total(),
        }
    }

    /// Closes the port and every connection, and returns once they are closed.
    pub async fn stop(self) {
        self.listener.stop().await;
    }
}
