//! Every metric and label set of the product.
//!
//! The list below is the only place where a metric is named. Label values come from the configuration or from the closed lists
//! here, never from a client: what is not known is `-`, and what is beyond a bound is `other`. What a request needs is resolved
//! into handles ([`CallMetrics`], [`NodeMetrics`]), so that counting is an atomic addition and formats nothing.

mod family;
mod handle;

use std::sync::Arc;
use std::time::Duration;

use parking_lot::RwLock;
use prometheus::{Counter, Histogram, IntCounter, IntGauge, Registry, TextEncoder};

use crate::limit::Watch;
use crate::limit::dimension::Dimension;
use family::{Family, Registered, Table};
pub use handle::{
    AbortPhase, Attempted, CallMetrics, Decision, NodeMetrics, OpenStream, Resumed, RouteMetrics, TokenKind,
};

/// The label value for what is not known: no key, no model, no upstream.
pub const NONE: &str = "-";
/// The label value for what is beyond a bound.
pub const OTHER: &str = "other";
/// How many different key ids get series of their own, if nothing else is said.
pub const KEY_CAP: usize = 10_000;
// Models are configured, so this bound is only met by a mistake; it keeps a mistake from eating the memory.
const MODEL_CAP: usize = 1_000;

/// 10 µs to 100 ms: the gateway's own work.
const OVERHEAD: &[f64] =
    &[10e-6, 25e-6, 50e-6, 100e-6, 250e-6, 500e-6, 1e-3, 2.5e-3, 5e-3, 10e-3, 25e-3, 50e-3, 100e-3];
/// 5 ms to 300 s: first tokens and whole answers.
const ANSWER: &[f64] =
    &[5e-3, 10e-3, 25e-3, 50e-3, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0];
/// 1 ms to 2 s: one output token.
const TOKEN: &[f64] =
    &[1e-3, 2.5e-3, 5e-3, 10e-3, 15e-3, 20e-3, 30e-3, 40e-3, 50e-3, 75e-3, 100e-3, 200e-3, 500e-3, 1.0, 2.0];
/// 1 % to twice the truth.
const ERROR: &[f64] = &[0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0];
/// 50 µs to 1 s: one operation of the store.
const STORE: &[f64] = &[50e-6, 100e-6, 250e-6, 500e-6, 1e-3, 2.5e-3, 5e-3, 10e-3, 25e-3, 100e-3, 1.0];

macro_rules! families {
    ($($field:ident: $kind:ty = $name:literal [$($label:literal),*] $buckets:expr, $help:literal;)*) => {
        pub(crate) struct Families { $(pub(crate) $field: Arc<Family<$kind>>,)* }

        impl Families {
            fn register(registry: &Registry) -> prometheus::Result<Self> {
                Ok(Self { $($field: {
                    let family = Arc::new(Family::new($name, $help, &[$($label),*], $buckets)?);
                    registry.register(Box::new(Registered(Arc::clone(&family))))?;
                    family
                },)* })
            }
        }

        /// Name, labels and help of every metric, for documentation and tests.
        pub const LIST: &[(&str, &[&str], &str)] = &[$(($name, &[$($label),*], $help),)*];
    };
}

families! {
    requests: IntCounter = "tollgate_requests_total" ["route", "model", "key", "code"] &[],
        "Requests answered, by the HTTP status sent (499: the client left before one was sent).";
    duration: Histogram = "tollgate_request_duration_seconds" ["route", "model"] ANSWER,
        "Time from the request's head to the end of the answer.";
    overhead: Histogram = "tollgate_overhead_seconds" ["route"] OVERHEAD,
        "Time of a request that was spent in the gateway itself.";
    first_token: Histogram = "tollgate_time_to_first_token_seconds" ["route", "model", "upstream"] ANSWER,
        "Time from the request's head to the first token relayed.";
    per_token: Histogram = "tollgate_time_per_output_token_seconds" ["model", "upstream"] TOKEN,
        "Mean time between output tokens of one stream.";
    tokens: IntCounter = "tollgate_tokens_total" ["route", "model", "key", "kind"] &[],
        "Tokens settled; cached tokens are a part of the input.";
    tokens_estimated: IntCounter = "tollgate_tokens_estimated_total" ["model", "reason"] &[],
        "Tokens settled without a figure of the upstream, by reason.";
    estimate_error: Histogram = "tollgate_estimate_error_ratio" ["model"] ERROR,
        "How far the estimate of a prompt lay from what the upstream stated, as a share of the latter.";
    cost: Counter = "tollgate_cost_total" ["model", "key", "currency"] &[],
        "Cost of settled tokens by the configured prices.";
    attempts: IntCounter = "tollgate_attempts_total" ["upstream", "node", "outcome"] &[],
        "Attempts on a node, by outcome.";
    fallbacks: IntCounter = "tollgate_fallbacks_total" ["model", "from", "to", "reason"] &[],
        "Calls that went on from one upstream to another, by the outcome that caused it.";
    resumes: IntCounter = "tollgate_resumes_total" ["model", "result"] &[],
        "Streams that broke after their first token and were to be finished on another node, by result: resumed or failed.";
    limit_decisions: IntCounter = "tollgate_limit_decisions_total" ["scope", "dimension", "decision"] &[],
        "Decisions of the limiter: ok, refused, or shadow (would have been refused).";
    reservations: IntGauge = "tollgate_reservations_inflight" [] &[],
        "Reservations made and not settled yet.";
    refused_again: IntCounter = "tollgate_limit_refusals_repeated_total" [] &[],
        "Calls refused by a refusal of a moment before, without asking the store again.";
    tokens_lost: IntCounter = "tollgate_tokens_lost_total" [] &[],
        "Tokens used that no limit could be charged with, as their period was over; should stay 0.";
    node_inflight: IntGauge = "tollgate_node_inflight" ["upstream", "node"] &[],
        "Attempts in flight on a node.";
    node_up: IntGauge = "tollgate_node_up" ["upstream", "node"] &[],
        "Whether a node is eligible for attempts (1) or not (0).";
    node_ejections: IntCounter = "tollgate_node_ejections_total" ["upstream", "node"] &[],
        "Times a node was put aside because its traffic failed.";
    queue_waiting: IntGauge = "tollgate_queue_waiting" ["upstream"] &[],
        "Calls that wait for a node of an upstream, as all of them are full.";
    queue_wait: Histogram = "tollgate_queue_wait_seconds" ["upstream"] ANSWER,
        "Time that calls waited for a node of an upstream, whether they got one or not.";
    paced: Histogram = "tollgate_paced_seconds" ["upstream"] ANSWER,
        "Delays of calls that were spread to stay within what the provider grants.";
    alerts: IntCounter = "tollgate_alerts_total" ["result"] &[],
        "Alerts, by what became of them: sent, failed (given up after several tries), dropped (too many were waiting).";
    prefix_hits: IntCounter = "tollgate_prefix_hits_total" ["upstream", "node"] &[],
        "Attempts sent to a node because it was known to hold the prompt's prefix.";
    cache: IntCounter = "tollgate_cache_total" ["route", "result"] &[],
        "Look-ups of the answer cache, by result.";
    store_up: IntGauge = "tollgate_store_up" [] &[],
        "Whether the store of limits answers (1) or not (0).";
    store_duration: Histogram = "tollgate_store_duration_seconds" ["op"] STORE,
        "Time of one operation of the store.";
    config_generation: IntGauge = "tollgate_config_generation" [] &[],
        "Number of the configuration in use; counts up with each reload that took effect.";
    config_reloads: IntCounter = "tollgate_config_reloads_total" ["result"] &[],
        "Reloads tried, by result.";
    config_last_reload: IntGauge = "tollgate_config_last_reload_success" [] &[],
        "Whether the last reload took effect (1) or not (0).";
    streams: IntGauge = "tollgate_streams_open" [] &[],
        "Streamed answers being relayed now.";
    client_aborts: IntCounter = "tollgate_client_aborts_total" ["phase"] &[],
        "Requests whose client left before the answer was whole, by phase.";
    access_dropped: IntCounter = "tollgate_access_log_dropped_total" [] &[],
        "Lines of the access log that were dropped because its reader was too slow or failed.";
    build: IntGauge = "tollgate_build_info" ["version"] &[],
        "Always 1; the label tells the version.";
}

/// All metrics of one process. Tests make their own; nothing here is global.
pub struct Metrics {
    registry: Registry,
    shared: Arc<Shared>,
}

/// What the handles need to know to resolve series later.
pub(crate) struct Shared {
    pub(crate) families: Families,
    keys: Bounded,
    models: Bounded,
}

impl Shared {
    /// The key's label value.
    fn key<'a>(&self, id: &'a str) -> &'a str {
        self.keys.admit(id)
    }

    /// The model's label value.
    pub(crate) fn model<'a>(&self, name: &'a str) -> &'a str {
        self.models.admit(name)
    }
}

/// A set of label values that stops growing.
struct Bounded {
    cap: usize,
    seen: Table<()>,
    count: RwLock<usize>,
}

impl Bounded {
    fn new(cap: usize) -> Self {
        Self { cap, seen: Table::new(), count: RwLock::new(0) }
    }

    fn admit<'a>(&self, value: &'a str) -> &'a str {
        if value.is_empty() || value == NONE {
            return NONE;
        }
        if self.seen.find(&[value]).is_some() {
            return value;
        }
        if *self.count.read() >= self.cap {
            return OTHER;
        }
        let mut count = self.count.write();
        if *count >= self.cap {
            return if self.seen.find(&[value]).is_some() { value } else { OTHER };
        }
        self.seen.find_or(&[value], || *count += 1);
        value
    }
}

impl std::fmt::Debug for Metrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}

impl Metrics {
    /// All metrics, at zero. `version` is the gateway's own.
    ///
    /// # Errors
    /// A metric of the list is not one that Prometheus allows, or is there twice: a mistake in this file.
    pub fn new(version: &str) -> prometheus::Result<Self> {
        Self::with_key_cap(version, KEY_CAP)
    }

    /// Like [`Metrics::new`], with another bound for the number of key ids that get series of their own.
    ///
    /// # Errors
    /// See [`Metrics::new`].
    pub fn with_key_cap(version: &str, key_cap: usize) -> prometheus::Result<Self> {
        let registry = Registry::new();
        let families = Families::register(&registry)?;
        families.build.with(&[version]).set(1);
        let shared = Shared { families, keys: Bounded::new(key_cap), models: Bounded::new(MODEL_CAP) };
        Ok(Self { registry, shared: Arc::new(shared) })
    }

    /// The text that `/metrics` answers, as `text/plain; version=0.0.4`.
    pub fn render(&self) -> String {
        TextEncoder::new().encode_to_string(&self.registry.gather()).unwrap_or_else(|error| {
            tracing::error!(%error, "metrics cannot be rendered");
            String::new()
        })
    }

    /// The handles of a route; made once, when the route is built. `route` is its configured name.
    pub fn route(&self, route: &str) -> RouteMetrics {
        RouteMetrics::new(Arc::clone(&self.shared), route)
    }

    /// The handles of a node; made once, when the upstream is built.
    pub fn node(&self, upstream: &str, node: &str) -> NodeMetrics {
        NodeMetrics::new(&self.shared.families, upstream, node)
    }

    /// Drops the gauges of nodes that are no longer configured. Counters stay, as a counter that vanishes loses its rate.
    pub fn retain_nodes(&self, keep: impl Fn(&str, &str) -> bool) {
        let keep = |values: &[Box<str>]| match values {
            [upstream, node] => keep(upstream, node),
            _ => true,
        };
        self.shared.families.node_inflight.retain(keep);
        self.shared.families.node_up.retain(keep);
    }

    /// A call of `model` went on from one upstream to the next.
    pub fn fallback(&self, model: &str, from: &str, to: &str, reason: Attempted) {
        self.shared.families.fallbacks.with(&[self.shared.model(model), from, to, reason.as_str()]).inc();
    }

    /// A stream of `model` broke, and another node was to finish it.
    pub fn resumed(&self, model: &str, result: Resumed) {
        self.shared.families.resumes.with(&[self.shared.model(model), result.as_str()]).inc();
    }

    /// How many calls wait for a node of an upstream.
    pub fn set_queue_waiting(&self, upstream: &str, calls: usize) {
        self.shared.families.queue_waiting.with(&[upstream]).set(signed(calls as u64));
    }

    /// A call waited so long for a node of an upstream.
    pub fn queue_waited(&self, upstream: &str, took: Duration) {
        self.shared.families.queue_wait.with(&[upstream]).observe(took.as_secs_f64());
    }

    /// A call was delayed so long to stay within what the provider of an upstream grants.
    pub fn paced(&self, upstream: &str, delay: Duration) {
        self.shared.families.paced.with(&[upstream]).observe(delay.as_secs_f64());
    }

    /// An alert came to its end. `result` is a word of the code: sent, failed or dropped.
    pub fn alert(&self, result: &'static str) {
        self.shared.families.alerts.with(&[result]).inc();
    }

    /// The limiter decided. `scope` is the kind of scope (`global`, `route`, `key`, `model`), never its name.
    pub fn limit_decision(&self, scope: &'static str, dimension: Dimension, decision: Decision) {
        self.shared.families.limit_decisions.with(&[scope, dimension.name(), decision.as_str()]).inc();
    }

    /// How many reservations are open now.
    pub fn set_reservations(&self, open: usize) {
        self.shared.families.reservations.with(&[]).set(signed(open as u64));
    }

    /// Whether the store answers.
    pub fn set_store_up(&self, up: bool) {
        self.shared.families.store_up.with(&[]).set(i64::from(up));
    }

    /// One operation of the store took that long. `op` is a word of the code, like `reserve` or `settle`.
    pub fn store_took(&self, op: &'static str, took: Duration) {
        self.shared.families.store_duration.with(&[op]).observe(took.as_secs_f64());
    }

    /// How many tokens were lost since the start; the highest figure told counts.
    pub fn set_tokens_lost(&self, total: u64) {
        let counter = self.shared.families.tokens_lost.with(&[]);
        counter.inc_by(total.saturating_sub(counter.get()));
    }

    /// A call was refused without asking the store again.
    pub fn refused_again(&self) {
        self.shared.families.refused_again.with(&[]).inc();
    }

    /// A configuration took effect, at the start or by a reload.
    pub fn set_generation(&self, generation: u64) {
        self.shared.families.config_generation.with(&[]).set(signed(generation));
    }

    /// A reload was tried.
    pub fn reloaded(&self, success: bool) {
        self.shared.families.config_reloads.with(&[if success { "success" } else { "failure" }]).inc();
        self.shared.families.config_last_reload.with(&[]).set(i64::from(success));
    }

    /// A streamed answer begins; it counts as open until the returned object is dropped.
    pub fn open_stream(&self) -> OpenStream {
        OpenStream::new(self.shared.families.streams.with(&[]))
    }

    /// A client left.
    pub fn client_left(&self, phase: AbortPhase) {
        self.shared.families.client_aborts.with(&[phase.as_str()]).inc();
    }

    /// How many lines of the access log were dropped since the start; the highest figure told counts.
    pub fn set_access_dropped(&self, total: u64) {
        let counter = self.shared.families.access_dropped.with(&[]);
        counter.inc_by(total.saturating_sub(counter.get()));
    }
}

impl Watch for Metrics {
    fn set_store_up(&self, up: bool) {
        Self::set_store_up(self, up);
    }

    fn store_took(&self, op: &'static str, took: Duration) {
        Self::store_took(self, op, took);
    }

    fn refused_again(&self) {
        Self::refused_again(self);
    }
}

fn signed(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests;
