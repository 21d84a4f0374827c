//! From a checked document to a runtime. What the check could not see (a secret that has vanished meanwhile) is
//! reported with its path.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use http::Method;
use http::header::HeaderName;
use tollgate_filters::auth::keyring::Keyring;
use tollgate_filters::auth::{Auth, AuthConfig, Caller, Elsewhere, KeyHash, Keys, hash_key};
use tollgate_filters::balance::{self, Policy};
use tollgate_filters::chain::Chain;
use tollgate_filters::config::{ConfigError, Secret, World};
use tollgate_filters::dialect::Dialect;
use tollgate_filters::filter::{Deps, Filter};
use tollgate_filters::limit::bucket::Grant;
use tollgate_filters::limit::budget::Budget;
use tollgate_filters::limit::{Limits, RuleSet, Scope};
use tollgate_filters::meter::OnMalformed;
use tollgate_filters::meter::exact::Tokens;
use tollgate_filters::meter::learned::Learned;
use tollgate_filters::meter::seam::Way;
use tollgate_filters::model::{Model, Price, Retry, Target};
use tollgate_filters::retry::Class;
use tollgate_filters::route::{Matcher, PathRule, Router};
use tollgate_filters::upstream::{Credential, Eject, Node, NodeState, Pool, Queue, Timeouts, Upstream};

use super::{Callee, Checked, Lane, Lasting, OnAbort, Pass, Route, Runtime};
use crate::config::{self, Allowed, Document, Toggle};

type Built<T> = Result<T, ConfigError>;

/// Builds the runtime of a document; state of nodes that were there before is carried over.
///
/// # Errors
/// A secret that does not resolve, a value that no header can carry.
pub(crate) fn build(
    checked: &Checked<'_>,
    before: Option<&Runtime>,
    world: &dyn World,
    lasting: &Lasting,
) -> Built<Runtime> {
    let document = checked.document;
    let generation = before.map_or(1, |b| b.generation + 1);
    let keyring = lasting.keyring.as_ref().filter(|_| document.auth.redis_keys);
    let elsewhere = keyring.map(|keyring| elsewhere(document, Arc::clone(keyring), generation));
    let keys = Arc::new(keys(document, world)?.and(elsewhere));
    let global = Arc::new(RuleSet::new(Scope::Global, "", &document.limits.global));
    let deps = Deps {
        keys: Arc::clone(&keys),
        ledger: lasting.ledger.clone(),
        global: Arc::clone(&global),
        metrics: Arc::clone(&lasting.metrics),
    };
    let upstreams = upstreams(document, before, world)?;
    let mut lessons = Lessons { before, all: HashMap::new() };
    let models = models(document, &upstreams, &mut lessons);
    let mut router = Router::default();
    for (index, route) in document.routes.iter().enumerate() {
        router.push(matcher(route), Arc::new(build_route(route, index, &upstreams, &mut lessons, &deps)?));
    }
    let nodes = upstreams.values().flat_map(|u| {
        u.nodes.iter().map(|n| ((Arc::clone(&u.name), Arc::clone(&n.name)), lasting.metrics.node(&u.name, &n.name)))
    });
    Ok(Runtime {
        generation,
        hash: checked.hash.to_owned(),
        since: SystemTime::now(),
        router,
        learned: lessons.all,
        models,
        nodes: nodes.collect::<HashMap<_, _>>(),
        upstreams,
        keys,
        global,
        own: Arc::new(own(
            "gateway",
            &deps,
            Chain { auth: Some(Auth::build(&AuthConfig {}, "auth", &deps)?), ..Chain::default() },
        )),
        open: Arc::new(own("gateway", &deps, Chain::default())),
        unmatched: lasting.metrics.route(tollgate_filters::metrics::NONE),
        trusted: document.server.trusted_proxies.clone(),
        header_bytes: document.server.limits.header_bytes.bytes(),
        body_bytes: document.server.limits.body_bytes.0,
    })
}

fn own(name: &str, deps: &Deps, chain: Chain) -> Route {
    Route {
        name: name.into(),
        dialect: Dialect::Openai,
        rules: Arc::new(RuleSet::new(Scope::Route, name, &Limits::default())),
        chain,
        body_bytes: None,
        lane: Lane::Own,
        on_abort: OnAbort::Cancel,
        on_malformed: OnMalformed::Skip,
        metrics: deps.metrics.route(name),
    }
}

/// The keys that are not in the document, with the tiers that are in it.
pub(crate) fn elsewhere(document: &Document, keyring: Arc<Keyring>, generation: u64) -> Elsewhere {
    let tiers = document.tiers.iter().map(|(name, tier)| (name.clone(), (tier.limits.clone(), tier.when_down)));
    Elsewhere { keyring, tiers: tiers.collect(), generation }
}

fn keys(document: &Document, world: &dyn World) -> Built<Keys> {
    let mut all = Vec::with_capacity(document.keys.len());
    for (index, key) in document.keys.iter().enumerate() {
        let hash = key_hash(key, world).map_err(|why| ConfigError::new(format!("keys[{index}]"), why))?;
        let tier = key.tier.as_ref().and_then(|name| document.tiers.get(name));
        let limits = tier.map(|t| t.limits.clone()).unwrap_or_default().overridden(&key.limits);
        let zone =
            key.zone().ok_or_else(|| ConfigError::new(format!("keys[{index}].zone"), "there is no such zone"))?;
        let caller = Caller {
            id: key.id.as_str().into(),
            tier: key.tier.as_deref().map(Into::into),
            models: names(&key.models),
            routes: names(&key.routes),
            expires: key.expires.as_ref().map(|t| u64::try_from(t.0.unix_timestamp()).unwrap_or(0)),
            rules: Arc::new(
                RuleSet::new(Scope::Key, &key.id, &limits).in_zone(zone).when_down(tier.and_then(|t| t.when_down)),
            ),
        };
        all.push((hash, Arc::new(caller)));
    }
    Ok(Keys::new(all, document.auth.sources.clone()))
}

fn key_hash(key: &config::Key, world: &dyn World) -> Result<KeyHash, String> {
    if let Some(secret) = &key.key {
        return Ok(hash_key(secret.resolve(world)?.expose().as_bytes()));
    }
    let hex = key.sha256.as_deref().unwrap_or_default();
    let mut hash = KeyHash::default();
    let pairs = hex
        .as_bytes()
        .chunks_exact(2)
        .map(|pair| std::str::from_utf8(pair).ok().and_then(|p| u8::from_str_radix(p, 16).ok()));
    for (slot, byte) in hash.iter_mut().zip(pairs) {
        *slot = byte.ok_or("sha256 must be 64 hexadecimal digits")?;
    }
    if hex.len() == 64 { Ok(hash) } else { Err("sha256 must be 64 hexadecimal digits".to_owned()) }
}

fn names(allowed: &Allowed) -> Option<HashSet<Box<str>>> {
    match allowed {
        Allowed::Any => None,
        Allowed::These(names) => Some(names.iter().map(|n| n.as_str().into()).collect()),
    }
}

fn upstreams(
    document: &Document,
    before: Option<&Runtime>,
    world: &dyn World,
) -> Built<BTreeMap<String, Arc<Upstream>>> {
    let mut all = BTreeMap::new();
    for (name, written) in &document.upstreams {
        let known = before.and_then(|b| b.upstreams.get(name));
        let mut credentials = Vec::with_capacity(written.credentials.len());
        for (index, source) in written.credentials.iter().enumerate() {
            let path = format!("upstreams.{name}.credentials[{index}]");
            let secret: Secret = source.secret.resolve(world).map_err(|why| ConfigError::new(&*path, why))?;
            if http::HeaderValue::from_str(secret.expose()).is_err() {
                return Err(ConfigError::new(path, "the credential has characters that a header cannot carry"));
            }
            let label: Arc<str> = format!("{name}#{index}").into();
            let before = known.and_then(|u| u.credentials.iter().find(|c| c.secret.expose() == secret.expose()));
            let state = before.map_or_else(Arc::default, |c| Arc::clone(&c.state));
            credentials.push(Credential { label, secret, weight: source.weight, state });
        }
        let timeouts = &written.timeouts;
        let upstream = Upstream {
            name: name.as_str().into(),
            dialect: written.dialect,
            continuous_usage: written.engine == config::Engine::Vllm,
            policy: policy(written.balance),
            nodes: written.nodes.iter().map(|n| Arc::new(node(n, known))).collect(),
            credentials,
            timeouts: Timeouts {
                connect: timeouts.connect.0,
                first_byte: timeouts.first_byte.0,
                first_token: timeouts.first_token.0,
                between_tokens: timeouts.between_tokens.0,
                total: timeouts.total.0,
            },
            pool: Pool { idle: written.pool.idle.0, concurrency: written.pool.concurrency },
            eject: written.eject.on().map(|eject| Eject {
                after: eject.after,
                period: eject.period.0,
                max_ratio: eject.max_ratio,
            }),
            cooldown: written.cooldown.0.0,
            extra: known.map_or_else(Arc::default, |u| Arc::clone(&u.extra)),
            queue: queue(written, known),
            budget: written.budget.as_ref().map(|budget| Arc::new(grant(name, written, budget, known))),
            turn: AtomicUsize::new(0),
            credential_turn: AtomicUsize::new(0),
        };
        all.insert(name.clone(), Arc::new(upstream));
    }
    Ok(all)
}

/// The queue of an upstream; who waits in it goes on waiting under the new settings.
fn queue(written: &config::Upstream, known: Option<&Arc<Upstream>>) -> Arc<Queue> {
    let queue = known.map_or_else(Arc::default, |u| Arc::clone(&u.queue));
    let (size, wait) = written.pool.queue.as_ref().map_or((0, Duration::ZERO), |q| (q.size, q.wait.0));
    queue.set(size.saturating_mul(written.nodes.len()), wait, written.pool.concurrency);
    for node in known.iter().flat_map(|u| &u.nodes) {
        queue.fill(&node.state);
    }
    queue
}

fn grant(name: &str, written: &config::Upstream, budget: &config::Budget, known: Option<&Arc<Upstream>>) -> Budget {
    let grant =
        Grant { requests: budget.requests_per_minute, tokens: budget.tokens_per_minute, pace_above: budget.pace_above };
    let wait = written.pool.queue.clone().unwrap_or_default().wait.0;
    Budget::new(name.into(), grant, wait, known.and_then(|u| u.budget.as_deref()))
}

const fn policy(written: config::Balance) -> Policy {
    match written {
        // The index that makes `prefix` better than its stateless sister is not there yet: both hash the prompt's beginning.
        config::Balance::Prefix => Policy::PrefixHash { load_factor: config::LOAD_FACTOR },
        config::Balance::PrefixHash { load_factor } => Policy::PrefixHash { load_factor },
        config::Balance::LeastRequest => Policy::LeastRequest,
        config::Balance::RoundRobin => Policy::RoundRobin,
        config::Balance::Session => Policy::Session { load_factor: config::LOAD_FACTOR },
    }
}

fn node(written: &config::Node, known: Option<&Arc<Upstream>>) -> Node {
    let url = &written.url;
    let name: Arc<str> = if url.host.contains(':') {
        format!("[{}]:{}", url.host, url.port)
    } else {
        format!("{}:{}", url.host, url.port)
    }
    .into();
    let default_port = if url.tls { 443 } else { 80 };
    let bare: Arc<str> = if url.host.contains(':') { format!("[{}]", url.host) } else { url.host.clone() }.into();
    let before = known.and_then(|u| u.nodes.iter().find(|n| n.name == name));
    let literal = url.host.parse().map(|ip| vec![std::net::SocketAddr::new(ip, url.port)]).unwrap_or_default();
    let addresses = before.map_or(literal, |n| n.addresses.load_full().to_vec());
    Node {
        seed: balance::session_mark(&name),
        host: url.host.as_str().into(),
        port: url.port,
        tls: url.tls,
        authority: if url.port == default_port { bare } else { Arc::clone(&name) },
        prefix: url.prefix.trim_end_matches('/').into(),
        weight: written.weight,
        addresses: ArcSwap::from_pointee(addresses),
        state: before.map_or_else(|| Arc::new(NodeState::default()), |n| Arc::clone(&n.state)),
        name,
    }
}

/// What was learned of models, handed on to the next configuration as far as it still has them.
struct Lessons<'a> {
    before: Option<&'a Runtime>,
    all: HashMap<(Arc<str>, Arc<str>), Arc<Learned>>,
}

impl Lessons<'_> {
    fn target(&mut self, upstream: Arc<Upstream>, model: &str, on: Vec<Class>) -> Target {
        let model: Arc<str> = model.into();
        let names = (Arc::clone(&upstream.name), Arc::clone(&model));
        let known = self.before.and_then(|before| before.learned.get(&names));
        let learned = self.all.entry(names).or_insert_with(|| known.map(Arc::clone).unwrap_or_default());
        Target {
            upstream,
            tokens: Tokens::of(&model),
            learned: Arc::clone(learned),
            model,
            on,
            larger_context: false,
            continues: false,
        }
    }
}

fn models(
    document: &Document,
    upstreams: &BTreeMap<String, Arc<Upstream>>,
    lessons: &mut Lessons<'_>,
) -> BTreeMap<Box<str>, Arc<Model>> {
    let mut all = BTreeMap::new();
    for (name, written) in &document.models {
        let targets = written.targets.iter().filter_map(|written| {
            let upstream = Arc::clone(upstreams.get(&written.upstream)?);
            let target = Target {
                larger_context: written.larger_context,
                continues: written.continues,
                ..lessons.target(upstream, written.model.as_deref().unwrap_or(name), written.on.clone())
            };
            Some(target)
        });
        let model = Arc::new(Model {
            name: name.as_str().into(),
            targets: targets.collect(),
            retry: Retry {
                attempts: written.retry.attempts,
                backoff: written.retry.backoff.0,
                jitter: written.retry.jitter,
                budget: written.retry.budget,
            },
            rules: Arc::new(RuleSet::new(Scope::Model, name, &written.limits)),
            price: written.price.as_ref().map(price),
            resume: match written.resume {
                config::Resume::Off => None,
                config::Resume::Continue => Some(Way::Continue),
                config::Resume::Replay => Some(Way::Replay),
            },
            report_requested: written.report_model == config::ReportModel::Requested,
        });
        for alias in &written.aliases {
            all.insert(alias.as_str().into(), Arc::clone(&model));
        }
        all.insert(name.as_str().into(), model);
    }
    all
}

fn price(written: &config::Price) -> Price {
    Price {
        input: written.input,
        cached_input: written.cached_input.unwrap_or(written.input),
        output: written.output,
        currency: written.currency.as_str().into(),
        per: written.per as f64,
    }
}

fn matcher(route: &config::Route) -> Matcher {
    let written = &route.matching;
    let paths = written.path.0.iter().map(|p| PathRule::path(p));
    let prefixes = written.prefix.0.iter().map(|p| PathRule::Prefix(p.as_str().into()));
    let header =
        |(name, value): (&String, &String)| Some((HeaderName::try_from(name.as_str()).ok()?, value.as_str().into()));
    Matcher {
        paths: paths.chain(prefixes).collect(),
        methods: written
            .method
            .0
            .iter()
            .filter_map(|m| Method::try_from(m.to_ascii_uppercase().as_str()).ok())
            .collect(),
        hosts: written.host.0.iter().map(|h| h.to_ascii_lowercase().into()).collect(),
        headers: written.header.iter().filter_map(header).collect(),
        query: written.query.iter().map(|(n, v)| (n.as_str().into(), v.as_str().into())).collect(),
    }
}

fn build_route(
    written: &config::Route,
    index: usize,
    upstreams: &BTreeMap<String, Arc<Upstream>>,
    lessons: &mut Lessons<'_>,
    deps: &Deps,
) -> Built<Route> {
    let missing = |name: &str| ConfigError::new(format!("routes[{index}]"), format!("there is no upstream `{name}`"));
    let find = |name: &String| upstreams.get(name).cloned().ok_or_else(|| missing(name));
    let rules = Arc::new(RuleSet::new(Scope::Route, &written.name, &written.limits).when_down(written.when_down));
    let (lane, upstream) = match (&written.call, &written.pass) {
        (Some(call), _) => match &call.upstream {
            Some(name) => {
                let upstream = find(name)?;
                (Lane::Call(Callee::Upstream(Arc::new(nameless(&upstream, lessons)))), Some(upstream))
            }
            None => (Lane::Call(Callee::Models(call.models.clone().unwrap_or_default())), None),
        },
        (None, Some(pass)) => {
            let upstream = find(&pass.upstream)?;
            let lane =
                Pass { upstream: Arc::clone(&upstream), websocket: pass.websocket, preserve_host: pass.preserve_host };
            (Lane::Pass(lane), Some(upstream))
        }
        (None, None) => return Err(ConfigError::new(format!("routes[{index}]"), "a route needs `call` or `pass`")),
    };
    let anthropic = written.matching.path.0.iter().any(|p| p == "/v1/messages");
    let dialect = written.dialect.unwrap_or(match upstream.map(|u| u.dialect) {
        Some(Dialect::Dify) => Dialect::Dify,
        _ if anthropic => Dialect::Anthropic,
        _ => Dialect::Openai,
    });
    Ok(Route {
        name: written.name.as_str().into(),
        dialect,
        rules,
        chain: chain(written, index, deps)?,
        body_bytes: written.body_bytes.map(|s| s.0),
        lane,
        on_abort: match written.on_abort {
            config::OnAbort::Cancel => OnAbort::Cancel,
            config::OnAbort::Drain(at_most) => OnAbort::Drain(at_most.0),
        },
        on_malformed: match written.on_malformed {
            config::OnMalformed::Skip => OnMalformed::Skip,
            config::OnMalformed::End => OnMalformed::End,
        },
        metrics: deps.metrics.route(&written.name),
    })
}

/// A route to one upstream has a model without a name: its calls are sent as they are.
fn nameless(upstream: &Arc<Upstream>, lessons: &mut Lessons<'_>) -> Model {
    let target = lessons.target(Arc::clone(upstream), "", Class::DEFAULT.to_vec());
    Model {
        name: "".into(),
        targets: vec![target],
        retry: Retry::default(),
        rules: Arc::new(RuleSet::new(Scope::Model, "", &Limits::default())),
        price: None,
        resume: None,
        report_requested: false,
    }
}

fn chain(written: &config::Route, index: usize, deps: &Deps) -> Built<Chain> {
    let filters = &written.filters;
    Ok(Chain {
        cors: on(&filters.cors, index, deps)?,
        auth: on(&filters.auth, index, deps)?,
        guard: on(&filters.guard, index, deps)?,
        limit: on(&filters.limit, index, deps)?,
    })
}

fn on<F: Filter>(toggle: &Toggle<F::Config>, index: usize, deps: &Deps) -> Built<Option<F>> {
    toggle.on().map(|config| F::build(config, &format!("routes[{index}].filters.{}", F::NAME), deps)).transpose()
}
