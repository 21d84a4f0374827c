//! Upstreams, their nodes and credentials, and the live state of a node.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use arc_swap::ArcSwap;
use bytes::Bytes;

use crate::balance::Policy;
use crate::config::Secret;
use crate::dialect::Dialect;

/// A set of nodes that serve the same thing, with what is needed to talk to them.
#[derive(Debug)]
pub struct Upstream {
    /// Its name in the configuration.
    pub name: Arc<str>,
    /// What its API speaks.
    pub dialect: Dialect,
    /// Whether its nodes can state the usage of a stream with every event, as vLLM can.
    pub continuous_usage: bool,
    /// How a node is chosen.
    pub policy: Policy,
    /// Its nodes.
    pub nodes: Vec<Arc<Node>>,
    /// API keys toward the provider; empty for nodes of our own.
    pub credentials: Vec<Credential>,
    /// Deadlines of one attempt.
    pub timeouts: Timeouts,
    /// Connection pool and admission of each node.
    pub pool: Pool,
    /// Next turn for round robin over nodes.
    pub turn: AtomicUsize,
    /// Next turn for spreading calls over credentials.
    pub credential_turn: AtomicUsize,
}

impl Upstream {
    /// The credential whose turn it is, if the upstream has any.
    pub fn next_credential(&self) -> Option<&Credential> {
        let turn = self.credential_turn.fetch_add(1, Ordering::Relaxed);
        self.credentials.get(turn.checked_rem(self.credentials.len())?)
    }

    /// The next turn, for policies that go round.
    pub fn next_turn(&self) -> usize {
        self.turn.fetch_add(1, Ordering::Relaxed)
    }

    /// Whether these are nodes of our own, which may learn who the caller is.
    pub fn is_own(&self) -> bool {
        self.credentials.is_empty()
    }
}

/// An upstream API key and the label it has in logs.
#[derive(Debug, Clone)]
pub struct Credential {
    /// `NAME#0`, `NAME#1`, ...
    pub label: Arc<str>,
    /// The key itself.
    pub secret: Secret,
}

impl Credential {
    /// The text with every copy of the key replaced by stars: an upstream may echo it in an error.
    pub fn mask(&self, text: Bytes) -> Bytes {
        let secret = self.secret.expose().as_bytes();
        let mut copies = memchr::memmem::find_iter(&text, secret).peekable();
        if secret.is_empty() || copies.peek().is_none() {
            drop(copies);
            return text;
        }
        let mut masked = Vec::with_capacity(text.len());
        let mut from = 0;
        for at in copies {
            masked.extend_from_slice(text.get(from..at).unwrap_or_default());
            masked.extend_from_slice(b"***");
            from = at + secret.len();
        }
        masked.extend_from_slice(text.get(from..).unwrap_or_default());
        masked.into()
    }
}

/// Deadlines of one attempt, counted from its dispatch (between tokens: from the last token).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timeouts {
    /// Until the TCP (and TLS) connection stands.
    pub connect: Duration,
    /// Until the response header of a stream.
    pub first_byte: Duration,
    /// Until the first token of a stream.
    pub first_token: Duration,
    /// Between two tokens of a stream.
    pub between_tokens: Duration,
    /// Until the end of the answer.
    pub total: Duration,
}

/// Connections to one node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pool {
    /// How long an idle connection is kept.
    pub idle: Duration,
    /// Calls at the same time on one node; `None` is unlimited.
    pub concurrency: Option<u32>,
}

/// One host and port of an upstream.
#[derive(Debug)]
pub struct Node {
    /// `host:port`, the name in metrics, logs and the admin API.
    pub name: Arc<str>,
    /// Host name without port: the SNI and the name that a certificate must carry.
    pub host: Arc<str>,
    /// Port.
    pub port: u16,
    /// Whether the node speaks TLS.
    pub tls: bool,
    /// Value of the `Host` header: the host, with the port where it is not the scheme's own.
    pub authority: Arc<str>,
    /// Path prefix put before the request path, without trailing slash; often empty.
    pub prefix: Arc<str>,
    /// Share of the traffic relative to the other nodes; 0 drains it.
    pub weight: u32,
    /// Stable hash of the name, for rendezvous hashing.
    pub seed: u64,
    /// Addresses that the host resolves to; refreshed in the background.
    pub addresses: ArcSwap<Vec<std::net::SocketAddr>>,
    /// What is going on there; survives a reload.
    pub state: Arc<NodeState>,
}

/// Live state of a node. It outlives a configuration: a reload hands it to the node of the same name.
#[derive(Debug, Default)]
pub struct NodeState {
    inflight: AtomicU32,
    attempts: AtomicU64,
    failures: AtomicU64,
}

impl NodeState {
    /// Calls that are on the node now.
    pub fn inflight(&self) -> u32 {
        self.inflight.load(Ordering::Relaxed)
    }

    /// Attempts ever made.
    pub fn attempts(&self) -> u64 {
        self.attempts.load(Ordering::Relaxed)
    }

    /// Attempts that failed by the node's fault.
    pub fn failures(&self) -> u64 {
        self.failures.load(Ordering::Relaxed)
    }

    /// Counts a failed attempt.
    pub fn failed(&self) {
        self.failures.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a call in until the guard is dropped.
    pub fn enter(self: &Arc<Self>) -> InFlight {
        self.inflight.fetch_add(1, Ordering::Relaxed);
        self.attempts.fetch_add(1, Ordering::Relaxed);
        InFlight(Arc::clone(self))
    }

    /// Counts a call in, unless that many are there already.
    pub fn try_enter(self: &Arc<Self>, most: Option<u32>) -> Option<InFlight> {
        let Some(most) = most else { return Some(self.enter()) };
        self.inflight
            .try_update(Ordering::Relaxed, Ordering::Relaxed, |n| (n < most).then_some(n.saturating_add(1)))
            .ok()?;
        self.attempts.fetch_add(1, Ordering::Relaxed);
        Some(InFlight(Arc::clone(self)))
    }
}

/// One call on a node; dropping it counts the call out, whatever path led there.
#[derive(Debug)]
#[must_use]
pub struct InFlight(Arc<NodeState>);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.inflight.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guard_counts_in_and_out_on_every_path() {
        let state = Arc::new(NodeState::default());
        let guard = state.enter();
        assert_eq!(state.inflight(), 1);
        let inner = Arc::clone(&state);
        let panicked = std::thread::spawn(move || {
            let _guard = inner.enter();
            panic!("a call that dies");
        });
        assert!(panicked.join().is_err());
        assert_eq!(state.inflight(), 1);
        drop(guard);
        assert_eq!((state.inflight(), state.attempts()), (0, 2));
    }

    #[test]
    fn an_echoed_key_is_masked_everywhere() {
        let key = Credential { label: "far#0".into(), secret: Secret::new("sk-far") };
        let masked = key.mask(Bytes::from_static(b"bad key sk-far, really sk-far!"));
        assert_eq!(masked, "bad key ***, really ***!");
        let clean = Bytes::from_static(b"nothing here");
        assert_eq!(key.mask(clean.clone()).as_ptr(), clean.as_ptr(), "what needs no masking is not copied");
    }

    #[test]
    fn a_full_node_takes_no_further_call() {
        let state = Arc::new(NodeState::default());
        let first = state.try_enter(Some(1));
        assert!(first.is_some() && state.try_enter(Some(1)).is_none());
        drop(first);
        assert!(state.try_enter(Some(1)).is_some());
    }
}
