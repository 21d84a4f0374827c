//! Series resolved ahead: what a request touches while it is served.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use parking_lot::RwLock;
use prometheus::{Counter, Histogram, IntCounter, IntGauge};
use smallvec::SmallVec;

use super::family::Table;
use super::{Families, NONE, Shared};
use crate::usage::{Usage, UsageSource};

macro_rules! words {
    ($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident = $word:literal,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum $name { $($(#[$variant_doc])* $variant,)* }

        impl $name {
            /// Every value.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// The label value.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $word,)* }
            }
        }
    };
}

words! {
    /// How an attempt ended: label `outcome` of attempts, `reason` of fallbacks. The words are those of `on:` in the configuration.
    Attempted {
        /// The node's answer was relayed.
        Ok = "ok",
        /// No connection, or it broke before an answer.
        Connect = "connect",
        /// No answer's head within its time, or the whole took too long.
        Timeout = "timeout",
        /// A head came, but no token within its time.
        FirstToken = "first_token",
        /// The node's rate limit.
        RateLimited = "429",
        /// The node failed.
        ServerError = "5xx",
        /// Our credential was refused.
        Auth = "auth",
        /// The prompt is longer than the model takes.
        ContextLength = "context_length",
        /// The node's content filter refused.
        ContentFilter = "content_filter",
        /// Another refusal of the request itself, passed to the client.
        ClientError = "4xx",
        /// The answer broke after its first token.
        Broken = "broken",
        /// The client left while the attempt ran.
        Aborted = "aborted",
    }
}

words! {
    /// What the limiter decided.
    Decision {
        /// Admitted.
        Ok = "ok",
        /// Refused.
        Refused = "refused",
        /// Would have been refused, were the limit not in shadow.
        Shadow = "shadow",
    }
}

words! {
    /// What came of a stream that another node was to finish.
    Resumed {
        /// Another node went on with it.
        Resumed = "resumed",
        /// None could.
        Failed = "failed",
    }
}

words! {
    /// When a client left.
    AbortPhase {
        /// While its request was being read.
        Request = "request",
        /// Before a first token or body byte came back.
        FirstToken = "first_token",
        /// While the answer was relayed.
        Answer = "answer",
    }
}

words! {
    /// Kinds of tokens.
    TokenKind {
        /// Of the prompt, cached ones included.
        Input = "input",
        /// Of the completion.
        Output = "output",
        /// Of the prompt, from the upstream's prefix cache.
        Cached = "cached",
    }
}

/// Series under a small number of values that are met one by one, like status codes.
struct Few<K, S>(RwLock<SmallVec<[(K, S); 2]>>);

impl<K: Clone, S: Clone> Few<K, S> {
    fn new() -> Self {
        Self(RwLock::new(SmallVec::new()))
    }

    fn find_or<Q: PartialEq<K>>(&self, key: Q, make: impl FnOnce(&Q) -> (K, S)) -> S {
        if let Some((_, series)) = self.0.read().iter().find(|(known, _)| key == *known) {
            return series.clone();
        }
        let mut all = self.0.write();
        if let Some((_, series)) = all.iter().find(|(known, _)| key == *known) {
            return series.clone();
        }
        let made = make(&key);
        all.push(made.clone());
        made.1
    }
}

/// What one route counts. Cheap to clone.
#[derive(Clone)]
pub struct RouteMetrics(Arc<RouteSeries>);

struct RouteSeries {
    shared: Arc<Shared>,
    route: Box<str>,
    overhead: OnceLock<Histogram>,
    calls: Table<Arc<CallMetrics>>,
}

impl RouteMetrics {
    pub(super) fn new(shared: Arc<Shared>, route: &str) -> Self {
        let route = if route.is_empty() { NONE } else { route };
        let series = RouteSeries { shared, route: route.into(), overhead: OnceLock::new(), calls: Table::new() };
        Self(Arc::new(series))
    }

    /// The handles for requests of `key` for `model` on this route; both `-` or empty where there is none. Known combinations
    /// are found without allocation. `model` must be a configured name and `key` a key id.
    pub fn call(&self, model: &str, key: &str) -> Arc<CallMetrics> {
        let RouteSeries { shared, route, calls, .. } = &*self.0;
        let (model, key) = (shared.model(model), shared.key(key));
        calls.find_or(&[model, key], || Arc::new(CallMetrics::new(Arc::clone(shared), route, model, key)))
    }

    /// Time that one request spent in the gateway itself.
    pub fn overhead(&self, took: Duration) {
        let RouteSeries { shared, route, overhead, .. } = &*self.0;
        overhead.get_or_init(|| shared.families.overhead.with(&[route])).observe(took.as_secs_f64());
    }

    /// A look-up of the answer cache. `result` is a word of the contract: `hit`, `miss` or `bypass`.
    pub fn cache(&self, result: &'static str) {
        self.0.shared.families.cache.with(&[&self.0.route, result]).inc();
    }
}

/// What the requests of one key for one model on one route count.
pub struct CallMetrics {
    shared: Arc<Shared>,
    route: Box<str>,
    model: Box<str>,
    key: Box<str>,
    duration: Histogram,
    by_status: Few<u16, IntCounter>,
    // Resolved when first needed: a pass route has no tokens, and a series at zero for each key would say nothing.
    tokens: OnceLock<[IntCounter; 3]>,
    estimate_error: OnceLock<Histogram>,
    cost: Few<Box<str>, Counter>,
    times: Few<Box<str>, (Histogram, Histogram)>,
}

impl CallMetrics {
    fn new(shared: Arc<Shared>, route: &str, model: &str, key: &str) -> Self {
        Self {
            duration: shared.families.duration.with(&[route, model]),
            shared,
            route: route.into(),
            model: model.into(),
            key: key.into(),
            by_status: Few::new(),
            tokens: OnceLock::new(),
            estimate_error: OnceLock::new(),
            cost: Few::new(),
            times: Few::new(),
        }
    }

    /// The request is over. `status` is what was sent to the client; 499 stands for one that left before.
    pub fn answered(&self, status: u16, took: Duration) {
        let counter = self.by_status.find_or(status, |&status| {
            let code = if (100..600).contains(&status) { status.to_string() } else { super::OTHER.to_owned() };
            let labels = [&*self.route, &*self.model, &*self.key, &code];
            (status, self.shared.families.requests.with(&labels))
        });
        counter.inc();
        self.duration.observe(took.as_secs_f64());
    }

    /// The call was settled with this usage. Counts tokens, and where the upstream did not tell them, that they are our own figure.
    pub fn settled(&self, usage: &Usage) {
        let [input, output, cached] = self.tokens.get_or_init(|| {
            [TokenKind::Input, TokenKind::Output, TokenKind::Cached]
                .map(|kind| self.shared.families.tokens.with(&[&self.route, &self.model, &self.key, kind.as_str()]))
        });
        input.inc_by(usage.input);
        output.inc_by(usage.output);
        cached.inc_by(usage.cached_input);
        match usage.source {
            UsageSource::Upstream => {}
            UsageSource::Counted | UsageSource::Estimated => {
                let labels = [&*self.model, usage.source.as_str()];
                self.shared.families.tokens_estimated.with(&labels).inc_by(usage.total());
            }
        }
    }

    /// The prompt was estimated at `estimate` tokens, and the upstream stated `actual`. Without a statement nothing is counted.
    pub fn estimated(&self, estimate: u64, actual: u64) {
        if actual > 0 {
            let family = &self.shared.families.estimate_error;
            let error = self.estimate_error.get_or_init(|| family.with(&[&self.model]));
            error.observe(estimate.abs_diff(actual) as f64 / actual as f64);
        }
    }

    /// The call cost that much in a configured currency. Negative and undefined amounts are ignored.
    pub fn cost(&self, amount: f64, currency: &str) {
        if amount.is_finite() && amount >= 0.0 {
            let labels = [&*self.model, &*self.key, currency];
            self.cost
                .find_or(Name(currency), |_| (currency.into(), self.shared.families.cost.with(&labels)))
                .inc_by(amount);
        }
    }

    /// The first token of a stream was relayed `after` the request's head.
    pub fn first_token(&self, upstream: &str, after: Duration) {
        self.times(upstream).0.observe(after.as_secs_f64());
    }

    /// A stream gave its output tokens at this mean distance.
    pub fn per_output_token(&self, upstream: &str, mean: Duration) {
        self.times(upstream).1.observe(mean.as_secs_f64());
    }

    fn times(&self, upstream: &str) -> (Histogram, Histogram) {
        self.times.find_or(Name(upstream), |_| {
            let families = &self.shared.families;
            let first = families.first_token.with(&[&self.route, &self.model, upstream]);
            (upstream.into(), (first, families.per_token.with(&[&self.model, upstream])))
        })
    }
}

/// A borrowed name that is compared with an owned one.
struct Name<'a>(&'a str);

impl PartialEq<Box<str>> for Name<'_> {
    fn eq(&self, other: &Box<str>) -> bool {
        *self.0 == **other
    }
}

/// What one node counts.
pub struct NodeMetrics {
    attempts: Box<[(Attempted, IntCounter)]>,
    inflight: IntGauge,
    up: IntGauge,
    ejections: IntCounter,
    prefix_hits: IntCounter,
}

impl NodeMetrics {
    pub(super) fn new(families: &Families, upstream: &str, node: &str) -> Self {
        let attempts = Attempted::ALL
            .iter()
            .map(|&outcome| (outcome, families.attempts.with(&[upstream, node, outcome.as_str()])))
            .collect();
        Self {
            attempts,
            inflight: families.node_inflight.with(&[upstream, node]),
            up: families.node_up.with(&[upstream, node]),
            ejections: families.node_ejections.with(&[upstream, node]),
            prefix_hits: families.prefix_hits.with(&[upstream, node]),
        }
    }

    /// An attempt ended.
    pub fn attempted(&self, outcome: Attempted) {
        if let Some((_, counter)) = self.attempts.iter().find(|(known, _)| *known == outcome) {
            counter.inc();
        }
    }

    /// How many attempts are in flight now.
    pub fn set_inflight(&self, attempts: usize) {
        self.inflight.set(super::signed(attempts as u64));
    }

    /// Whether the node is eligible.
    pub fn set_up(&self, up: bool) {
        self.up.set(i64::from(up));
    }

    /// The node was put aside.
    pub fn ejected(&self) {
        self.ejections.inc();
    }

    /// The node was chosen for the prefix it holds.
    pub fn prefix_hit(&self) {
        self.prefix_hits.inc();
    }
}

/// A streamed answer being relayed; dropping it ends it.
#[must_use]
pub struct OpenStream(IntGauge);

impl OpenStream {
    pub(super) fn new(gauge: IntGauge) -> Self {
        gauge.inc();
        Self(gauge)
    }
}

impl Drop for OpenStream {
    fn drop(&mut self) {
        self.0.dec();
    }
}
