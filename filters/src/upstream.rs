//! Upstreams, their nodes and credentials, and the live state of a node.

mod queue;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use arc_swap::ArcSwap;
use bytes::Bytes;
use smallvec::SmallVec;

use crate::balance::{Candidate, Policy, round_robin};
use crate::config::Secret;
use crate::dialect::Dialect;
use crate::limit::budget::Budget;
use crate::retry::{Admits, Class, Failure, Probe, Rest, RetryBudget};

pub use queue::{Joined, Queue, Ticket};

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
    /// When a node is taken out by the failures of its traffic; `None` is never.
    pub eject: Option<Eject>,
    /// Shortest rest of a credential that was refused.
    pub cooldown: Duration,
    /// Attempts beyond the calls; survives a reload.
    pub extra: Arc<RetryBudget>,
    /// Calls that wait for one of its nodes; survives a reload.
    pub queue: Arc<Queue>,
    /// What its provider grants; `None` is unknown. Survives a reload.
    pub budget: Option<Arc<Budget>>,
    /// Next turn for round robin over nodes.
    pub turn: AtomicUsize,
    /// Next turn for spreading calls over credentials.
    pub credential_turn: AtomicUsize,
}

/// When a node is taken out by the failures of its traffic.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Eject {
    /// Failures in a row.
    pub after: u32,
    /// For how long, before one call may try.
    pub period: Duration,
    /// Share of the nodes that may be out at one time.
    pub max_ratio: f64,
}

/// An upstream that asks for a longer rest of a node than this does not get it: a node of our own knows no hours.
const LONGEST_REST: Duration = Duration::from_secs(60);

/// Rest of a node that answers 429 again and again and names no time.
const BUSY_REST: Duration = Duration::from_secs(1);

/// Which credential takes an attempt.
#[derive(Debug)]
pub enum Key {
    /// The upstream needs none.
    None,
    /// This one. The probe is there if it comes from a rest.
    Use(Credential, Option<Probe>),
    /// All rest, the first of them until then.
    Resting(Duration),
}

impl Upstream {
    /// The credential whose turn it is among those that do not rest.
    pub fn key(&self, now: Duration) -> Key {
        if self.credentials.is_empty() {
            return Key::None;
        }
        let turn = self.credential_turn.fetch_add(1, Ordering::Relaxed);
        let mut fit: SmallVec<[(&Credential, bool); 8]> = SmallVec::new();
        let mut soonest = Duration::MAX;
        for credential in &self.credentials {
            match credential.state.rest.admits(now) {
                Admits::Freely => fit.push((credential, false)),
                Admits::OneCall => fit.push((credential, true)),
                Admits::NotBefore(until) => soonest = soonest.min(until),
            }
        }
        while !fit.is_empty() {
            let weigh = |(c, _): &(&Credential, bool)| Candidate { inflight: 0, weight: c.weight, seed: 0 };
            let candidates: SmallVec<[Candidate; 8]> = fit.iter().map(weigh).collect();
            let Some(at) = round_robin::pick(&candidates, turn) else { break };
            let (credential, rested) = fit.remove(at);
            if !rested {
                return Key::Use(credential.clone(), None);
            }
            if let Some(probe) = credential.state.rest.probe() {
                return Key::Use(credential.clone(), Some(probe));
            }
            soonest = soonest.min(now);
        }
        Key::Resting(soonest)
    }

    /// Notes that an attempt brought an answer. True if the node had been taken out before.
    pub fn succeeded(&self, node: &Node, credential: Option<&Credential>) -> bool {
        if let Some(credential) = credential {
            credential.state.rest.over();
            credential.state.refused.store(false, Ordering::Relaxed);
        }
        node.state.limited_in_a_row.store(0, Ordering::Relaxed);
        node.state.in_a_row.store(0, Ordering::Relaxed);
        let (limited, ejected) = (node.state.limited.over(), node.state.ejected.over());
        if limited || ejected {
            self.queue.fill(&node.state);
        }
        ejected
    }

    /// Counts a call in on a node, unless the node is full.
    pub fn enter(&self, node: &Node) -> Option<InFlight> {
        node.state.try_enter(self.pool.concurrency, &self.queue)
    }

    /// Notes a failed attempt: whoever is at fault rests. True if the node was taken out by it.
    pub fn failed(&self, node: &Node, credential: Option<&Credential>, failure: &Failure, now: Duration) -> bool {
        let told = failure.retry_after;
        match failure.class {
            Class::RateLimited | Class::Auth => {
                match credential {
                    Some(credential) => {
                        credential.state.refused.store(failure.class == Class::Auth, Ordering::Relaxed);
                        credential.state.rest.until(now + self.cooldown.max(told.unwrap_or_default()));
                    }
                    None => match told {
                        Some(told) => {
                            node.state.limited.until(now + told.min(LONGEST_REST));
                        }
                        None => self.busy(node, now),
                    },
                }
                false
            }
            Class::Connect | Class::Timeout | Class::ServerError | Class::FirstToken => {
                node.state.failures.fetch_add(1, Ordering::Relaxed);
                if let Some(told) = told {
                    node.state.limited.until(now + told.min(LONGEST_REST));
                }
                let in_a_row = node.state.in_a_row.fetch_add(1, Ordering::Relaxed).saturating_add(1);
                self.eject(node, in_a_row, now)
            }
            Class::ContextLength | Class::ContentFilter => false,
        }
    }

    /// A node of ours that names no time is busy now, and who knows in a moment. One that keeps saying so, and has the fewest
    /// calls because of it, would draw all of them: it is left alone for a moment, while there are others.
    fn busy(&self, node: &Node, now: Duration) {
        let in_a_row = node.state.limited_in_a_row.fetch_add(1, Ordering::Relaxed).saturating_add(1);
        let free = |other: &&Arc<Node>| {
            !std::ptr::eq(Arc::as_ptr(other), node) && other.weight > 0 && other.state.admits(now) == Admits::Freely
        };
        if self.eject.is_some_and(|eject| in_a_row >= eject.after) && self.nodes.iter().any(|other| free(&other)) {
            node.state.limited.until(now + BUSY_REST);
        }
    }

    /// Notes that an answer was relayed to its end.
    pub fn finished(&self, node: &Node) {
        node.state.broken_in_a_row.store(0, Ordering::Relaxed);
    }

    /// Notes that an answer broke off after its beginning, which had looked like a success. True if the node was taken out
    /// by it.
    pub fn broke_off(&self, node: &Node, now: Duration) -> bool {
        node.state.failures.fetch_add(1, Ordering::Relaxed);
        let in_a_row = node.state.broken_in_a_row.fetch_add(1, Ordering::Relaxed).saturating_add(1);
        self.eject(node, in_a_row, now)
    }

    /// Takes a node out if it has failed that often and others are left; one that failed while it was out rests anew.
    fn eject(&self, node: &Node, in_a_row: u32, now: Duration) -> bool {
        let Some(eject) = self.eject else { return false };
        let again = node.state.ejected.admits(now) != Admits::Freely;
        if !again && (in_a_row < eject.after || !self.may_lose_one(&eject, now)) {
            return false;
        }
        node.state.ejected.until(now + eject.period);
        !again
    }

    /// Whether one node more may be taken out. A node that is alone may: whether it is passed over then, the plan of
    /// the call decides.
    fn may_lose_one(&self, eject: &Eject, now: Duration) -> bool {
        let out = self.nodes.iter().filter(|node| node.state.ejected.admits(now) != Admits::Freely).count();
        let most = (self.nodes.len() as f64 * eject.max_ratio) as usize;
        out < most.max(1)
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
    /// Share of the calls relative to the other credentials.
    pub weight: u32,
    /// How it fares; survives a reload.
    pub state: Arc<CredentialState>,
}

/// Live state of a credential.
#[derive(Debug, Default)]
pub struct CredentialState {
    /// Its rest after a 429 or a refusal.
    pub rest: Arc<Rest>,
    /// Whether it rests because it was refused, and not for the rate.
    pub refused: AtomicBool,
}

impl Credential {
    /// Whether it rests because the upstream refused it, and not for its rate.
    pub fn is_refused(&self) -> bool {
        self.state.refused.load(Ordering::Relaxed)
    }

    /// The end of its rest; `now` if it has none.
    pub fn rests_until(&self, now: Duration) -> Duration {
        match self.state.rest.admits(now) {
            Admits::NotBefore(until) => until,
            Admits::Freely | Admits::OneCall => now,
        }
    }

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
    /// Failures since the last success.
    in_a_row: AtomicU32,
    /// Answers of 429 that named no time, since the last success.
    limited_in_a_row: AtomicU32,
    /// Answers that broke off since the last whole one: each had begun like a success.
    broken_in_a_row: AtomicU32,
    /// Its rest after too many of them.
    pub ejected: Arc<Rest>,
    /// Its rest because it asked for it.
    pub limited: Arc<Rest>,
}

impl NodeState {
    /// Whether it may be given a call at `now`; the later of its rests counts.
    pub fn admits(&self, now: Duration) -> Admits {
        match (self.ejected.admits(now), self.limited.admits(now)) {
            (Admits::NotBefore(a), Admits::NotBefore(b)) => Admits::NotBefore(a.max(b)),
            (Admits::NotBefore(until), _) | (_, Admits::NotBefore(until)) => Admits::NotBefore(until),
            (Admits::OneCall, _) | (_, Admits::OneCall) => Admits::OneCall,
            (Admits::Freely, Admits::Freely) => Admits::Freely,
        }
    }

    /// The places of the one call that tries after a rest; `None` if another has taken one.
    pub fn probe(&self, now: Duration) -> Option<SmallVec<[Probe; 2]>> {
        let rests = [&self.ejected, &self.limited].into_iter().filter(|rest| rest.admits(now) != Admits::Freely);
        rests.map(Rest::probe).collect()
    }

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

    /// Counts a call in until the guard is dropped, whether the node is full or not.
    pub fn enter(self: &Arc<Self>, queue: &Arc<Queue>) -> InFlight {
        self.inflight.fetch_add(1, Ordering::Relaxed);
        self.attempts.fetch_add(1, Ordering::Relaxed);
        InFlight::counted(self, queue.is_used().then_some(queue))
    }

    /// Counts a call in, unless that many are there already. When it is over, its slot goes to the next in the queue.
    fn try_enter(self: &Arc<Self>, most: Option<u32>, queue: &Arc<Queue>) -> Option<InFlight> {
        let Some(most) = most else { return Some(self.enter(queue)) };
        self.inflight
            .try_update(Ordering::Relaxed, Ordering::Relaxed, |n| (n < most).then_some(n.saturating_add(1)))
            .ok()?;
        self.attempts.fetch_add(1, Ordering::Relaxed);
        Some(InFlight::counted(self, Some(queue)))
    }
}

/// One call on a node; dropping it counts the call out, whatever path led there, and hands its slot to the next in line.
#[derive(Debug)]
#[must_use]
pub struct InFlight(Option<Held>);

#[derive(Debug)]
struct Held {
    node: Arc<NodeState>,
    /// Who may wait for the slot.
    queue: Option<Arc<Queue>>,
}

impl InFlight {
    /// A call that was counted in.
    fn counted(node: &Arc<NodeState>, queue: Option<&Arc<Queue>>) -> Self {
        Self(Some(Held { node: Arc::clone(node), queue: queue.map(Arc::clone) }))
    }

    /// Whether the call is on that node.
    pub fn is_on(&self, node: &Node) -> bool {
        self.0.as_ref().is_some_and(|held| Arc::ptr_eq(&held.node, &node.state))
    }

    /// The call stays counted: somebody else sees to it.
    fn disarm(mut self) {
        self.0 = None;
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        match self.0.take() {
            Some(Held { node, queue: Some(queue) }) => queue.free(&node),
            Some(Held { node, queue: None }) => {
                node.inflight.fetch_sub(1, Ordering::Relaxed);
            }
            None => {}
        }
    }
}

#[cfg(test)]
mod tests;
