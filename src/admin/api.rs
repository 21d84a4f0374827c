//! What the admin port tells as JSON. The types are also what `/api/openapi.json` describes.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::Json;
use axum::extract::State;
use schemars::JsonSchema;
use serde::Serialize;
use tollgate_filters::model::Model;
use tollgate_filters::retry::Admits;
use tollgate_filters::upstream::{Credential, Node, Upstream};

use super::{Admin, is_up};
use crate::runtime::{Callee, Lane, Route};

/// The gateway as a whole.
#[derive(Debug, Serialize, JsonSchema)]
pub(super) struct Status {
    /// Version of the program.
    version: &'static str,
    /// Counts up with each configuration that took effect; the first is 1.
    generation: u64,
    /// SHA-256 of the configuration, in hex.
    config_hash: String,
    /// The last time the configuration was read.
    last_reload: Reload,
    /// When the process started, in seconds since 1970.
    started_at: f64,
    /// For how long it has been running.
    uptime_seconds: u64,
    /// Whether it finishes what is open and takes nothing new.
    draining: bool,
    /// Requests being served now.
    requests_open: usize,
    /// Calls whose limits are reserved and not settled yet.
    reservations_inflight: u64,
    /// Bytes of all buffered bodies together.
    buffered_bytes: u64,
    /// Keys in the configuration.
    keys: usize,
}

/// A reading of the configuration.
#[derive(Debug, Serialize, JsonSchema)]
struct Reload {
    /// When, in seconds since 1970.
    at: f64,
    /// Whether it took effect.
    success: bool,
    /// Why it did not.
    error: Option<String>,
}

/// All upstreams.
#[derive(Debug, Serialize, JsonSchema)]
pub(super) struct Upstreams {
    upstreams: Vec<UpstreamState>,
}

/// A set of nodes.
#[derive(Debug, Serialize, JsonSchema)]
struct UpstreamState {
    /// Its name.
    name: String,
    /// What its nodes speak.
    dialect: &'static str,
    /// How a node is chosen.
    balance: &'static str,
    /// Its credentials by their labels, never the credentials themselves.
    credentials: Vec<CredentialState>,
    /// Its queue, if it has one.
    queue: Option<QueueState>,
    /// Its nodes.
    nodes: Vec<NodeState>,
}

/// Where calls wait while all nodes are full.
#[derive(Debug, Serialize, JsonSchema)]
struct QueueState {
    /// Calls that wait now.
    waiting: u64,
    /// Most calls that may wait.
    size: u64,
    /// Longest wait in seconds.
    wait: f64,
}

/// A credential and how it does.
#[derive(Debug, Serialize, JsonSchema)]
struct CredentialState {
    /// Upstream and place, like `openai#0`.
    name: String,
    /// Its share relative to the other credentials.
    weight: u32,
    /// `ready`; `resting` after a 429, or `refused` after 401 or 403, until its rest is over.
    state: &'static str,
    /// Seconds until it is used again; 0 if it is in use.
    rests_for: f64,
}

/// A node and how it does.
#[derive(Debug, Serialize, JsonSchema)]
struct NodeState {
    /// Host and port.
    name: String,
    /// Its share relative to the other nodes.
    weight: u32,
    /// Whether it is given calls.
    up: bool,
    /// Whether it was taken out because its attempts failed.
    ejected: bool,
    /// Seconds until it may be tried again; 0 if it is in use.
    rests_for: f64,
    /// Calls that it is answering now.
    inflight: u64,
    /// Attempts since the gateway started.
    attempts: u64,
    /// Those of them that failed.
    failures: u64,
    /// Addresses that its name resolves to.
    addresses: Vec<String>,
}

/// All routes, in the order in which they are tried.
#[derive(Debug, Serialize, JsonSchema)]
pub(super) struct Routes {
    routes: Vec<RouteState>,
}

/// A route.
#[derive(Debug, Serialize, JsonSchema)]
struct RouteState {
    /// Its name.
    name: String,
    /// `call` or `pass`.
    lane: &'static str,
    /// Where its requests go; none where the model decides.
    upstream: Option<String>,
    /// Whether WebSocket upgrades are let through.
    websocket: bool,
    /// In which dialect its errors are told.
    dialect: &'static str,
    /// Names of its filters, in their order.
    filters: Vec<&'static str>,
}

/// All names of models, aliases too.
#[derive(Debug, Serialize, JsonSchema)]
pub(super) struct Models {
    models: Vec<ModelState>,
}

/// A name that clients may ask for.
#[derive(Debug, Serialize, JsonSchema)]
struct ModelState {
    /// The name.
    name: String,
    /// The model that it leads to; another one for an alias.
    model: String,
    /// Where it is answered, in the order in which it is tried.
    targets: Vec<TargetState>,
}

/// An upstream and the name of the model there.
#[derive(Debug, Serialize, JsonSchema)]
struct TargetState {
    /// The upstream.
    upstream: String,
    /// The model's name there.
    model: String,
}

fn seconds(time: SystemTime) -> f64 {
    time.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs_f64()
}

pub(super) async fn status(State(admin): State<Admin>) -> Json<Status> {
    let gateway = &admin.gateway;
    let runtime = gateway.live.load();
    Json(Status {
        version: env!("CARGO_PKG_VERSION"),
        generation: runtime.generation,
        config_hash: runtime.hash.clone(),
        last_reload: Reload { at: seconds(runtime.since), success: true, error: None },
        started_at: seconds(gateway.started_at),
        uptime_seconds: gateway.started.elapsed().as_secs(),
        draining: gateway.is_draining(),
        requests_open: gateway.open.load(Ordering::Relaxed),
        reservations_inflight: gateway.ledger.inflight() as u64,
        buffered_bytes: gateway.buffered.used(),
        keys: runtime.keys.len(),
    })
}

pub(super) async fn upstreams(State(admin): State<Admin>) -> Json<Upstreams> {
    let (runtime, now) = (admin.gateway.live.load(), admin.gateway.now());
    Json(Upstreams { upstreams: runtime.upstreams.values().map(|upstream| UpstreamState::of(upstream, now)).collect() })
}

pub(super) async fn routes(State(admin): State<Admin>) -> Json<Routes> {
    let runtime = admin.gateway.live.load();
    Json(Routes { routes: runtime.router.iter().map(|(_, route)| RouteState::of(route)).collect() })
}

pub(super) async fn models(State(admin): State<Admin>) -> Json<Models> {
    let runtime = admin.gateway.live.load();
    Json(Models { models: runtime.models.iter().map(|(name, model)| ModelState::of(name, model)).collect() })
}

impl UpstreamState {
    fn of(upstream: &Upstream, now: Duration) -> Self {
        let node = |node: &Arc<Node>| NodeState {
            name: node.name.to_string(),
            weight: node.weight,
            up: is_up(node, now),
            ejected: node.state.ejected.admits(now) != Admits::Freely,
            rests_for: rests_for(node.state.admits(now), now),
            inflight: u64::from(node.state.inflight()),
            attempts: node.state.attempts(),
            failures: node.state.failures(),
            addresses: node.addresses.load().iter().map(ToString::to_string).collect(),
        };
        Self {
            name: upstream.name.to_string(),
            dialect: upstream.dialect.as_str(),
            balance: upstream.policy.name(),
            credentials: upstream.credentials.iter().map(|credential| CredentialState::of(credential, now)).collect(),
            queue: (upstream.queue.size() > 0).then(|| QueueState {
                waiting: upstream.queue.waiting() as u64,
                size: upstream.queue.size() as u64,
                wait: upstream.queue.wait().as_secs_f64(),
            }),
            nodes: upstream.nodes.iter().map(node).collect(),
        }
    }
}

fn rests_for(admits: Admits, now: Duration) -> f64 {
    match admits {
        Admits::NotBefore(until) => until.saturating_sub(now).as_secs_f64(),
        Admits::Freely | Admits::OneCall => 0.0,
    }
}

impl CredentialState {
    fn of(credential: &Credential, now: Duration) -> Self {
        let admits = credential.state.rest.admits(now);
        let state = match admits {
            Admits::Freely => "ready",
            Admits::OneCall | Admits::NotBefore(_) if credential.is_refused() => "refused",
            Admits::OneCall | Admits::NotBefore(_) => "resting",
        };
        let (name, weight) = (credential.label.to_string(), credential.weight);
        Self { name, weight, state, rests_for: rests_for(admits, now) }
    }
}

impl RouteState {
    fn of(route: &Route) -> Self {
        let (lane, upstream, websocket) = match &route.lane {
            Lane::Own => ("own", None, false),
            Lane::Call(Callee::Models(_)) => ("call", None, false),
            Lane::Call(Callee::Upstream(model)) => {
                ("call", model.targets.first().map(|target| target.upstream.name.to_string()), false)
            }
            Lane::Pass(pass) => ("pass", Some(pass.upstream.name.to_string()), pass.websocket),
        };
        Self {
            name: route.name.to_string(),
            lane,
            upstream,
            websocket,
            dialect: route.dialect.as_str(),
            filters: route.chain.names(),
        }
    }
}

impl ModelState {
    fn of(name: &str, model: &Model) -> Self {
        let targets = model.targets.iter();
        Self {
            name: name.to_owned(),
            model: model.name.to_string(),
            targets: targets
                .map(|target| TargetState {
                    upstream: target.upstream.name.to_string(),
                    model: target.model.to_string(),
                })
                .collect(),
        }
    }
}
