//! What a configuration becomes: router, chains, models, upstreams, keys. Built whole, swapped whole. A request keeps
//! the runtime it began with; node state and counters live outside and are carried over.

mod build;
pub(crate) mod resolve;

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tollgate_filters::auth::Keys;
use tollgate_filters::auth::keyring::Keyring;
use tollgate_filters::chain::Chain;
use tollgate_filters::dialect::Dialect;
use tollgate_filters::limit::{Ledger, RuleSet};
use tollgate_filters::meter::OnMalformed;
use tollgate_filters::meter::learned::Learned;
use tollgate_filters::metrics::{Metrics, NodeMetrics, RouteMetrics};
use tollgate_filters::model::Model;
use tollgate_filters::route::Router;
use tollgate_filters::upstream::Upstream;

use crate::config::{Allowed, Cidr, Document};
pub(crate) use build::{build, elsewhere};

/// A configuration at work.
pub(crate) struct Runtime {
    /// Counts up with each configuration that took effect; the first is 1.
    pub generation: u64,
    /// Hash of the configuration's text.
    pub hash: String,
    /// Since when it is at work.
    pub since: SystemTime,
    /// Routes in order.
    pub router: Router<Arc<Route>>,
    /// What was learned of each model of an upstream, by the names of both.
    pub learned: HashMap<(Arc<str>, Arc<str>), Arc<Learned>>,
    /// Models by every name that clients may use for them.
    pub models: BTreeMap<Box<str>, Arc<Model>>,
    /// Upstreams by name.
    pub upstreams: BTreeMap<String, Arc<Upstream>>,
    /// Metric handles of each node, by upstream and node name.
    pub nodes: HashMap<(Arc<str>, Arc<str>), NodeMetrics>,
    /// All keys.
    pub keys: Arc<Keys>,
    /// Limits of the whole gateway.
    pub global: Arc<RuleSet>,
    /// The gateway's own answers that need a key.
    pub own: Arc<Route>,
    /// The gateway's own answers that need none.
    pub open: Arc<Route>,
    /// Metric handles of requests that no route takes.
    pub(crate) unmatched: RouteMetrics,
    /// Who may speak for clients.
    pub trusted: Vec<Cidr>,
    /// Most bytes of a request header.
    pub header_bytes: usize,
    /// Most bytes of a call's body, unless its route says otherwise.
    pub body_bytes: u64,
}

impl Runtime {
    /// Whether a peer may set `X-Forwarded-*`.
    pub(crate) fn trusts(&self, peer: IpAddr) -> bool {
        self.trusted.iter().any(|net| net.contains(peer))
    }

    /// Metric handles of a node.
    pub(crate) fn node(&self, upstream: &Arc<str>, node: &Arc<str>) -> Option<&NodeMetrics> {
        self.nodes.get(&(Arc::clone(upstream), Arc::clone(node)))
    }
}

/// A route with its filters and its lane.
pub(crate) struct Route {
    /// Its name in the configuration.
    pub name: Arc<str>,
    /// In which dialect its errors are told.
    pub dialect: Dialect,
    /// Its own limits.
    pub rules: Arc<RuleSet>,
    /// Its filters.
    pub chain: Chain,
    /// Most bytes of a body; `None` is the server's for calls and unlimited for passes.
    pub body_bytes: Option<u64>,
    /// What becomes of its requests.
    pub lane: Lane,
    /// What becomes of a call whose client leaves.
    pub on_abort: OnAbort,
    /// What becomes of an event of a stream that is no JSON.
    pub on_malformed: OnMalformed,
    /// Its metric handles.
    pub metrics: RouteMetrics,
}

impl Route {
    /// Whether it stands in the configuration, and is not one of the gateway's own answers.
    pub(crate) fn is_configured(&self) -> bool {
        !matches!(self.lane, Lane::Own)
    }
}

/// What becomes of a route's requests.
pub(crate) enum Lane {
    /// Answered by the gateway itself.
    Own,
    /// A call: body read, model looked up, attempt after attempt.
    Call(Callee),
    /// Passed on as it streams.
    Pass(Pass),
}

/// What becomes of a call whose client leaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum OnAbort {
    /// The attempt is given up at once.
    Cancel,
    /// The answer is read on to its end, at most so long, to know what it cost.
    Drain(Duration),
}

/// Who answers the calls of a route.
pub(crate) enum Callee {
    /// The model that the body names, of these.
    Models(Allowed),
    /// One upstream, whatever the body says.
    Upstream(Arc<Model>),
}

/// A route of the pass lane.
pub(crate) struct Pass {
    /// Where requests go.
    pub upstream: Arc<Upstream>,
    /// Whether WebSocket upgrades are taken.
    pub websocket: bool,
    /// Whether the client's `Host` is kept.
    pub preserve_host: bool,
}

/// What outlives a configuration and is handed to the next one.
#[derive(Clone)]
pub(crate) struct Lasting {
    /// The ledger.
    pub ledger: Ledger,
    /// Keys in Redis, if they are asked for.
    pub keyring: Option<Arc<Keyring>>,
    /// All metrics.
    pub metrics: Arc<Metrics>,
}

/// A checked document with what `build` needs to know of where it came from.
pub(crate) struct Checked<'a> {
    /// The document.
    pub document: &'a Document,
    /// Hash of its text.
    pub hash: &'a str,
}
