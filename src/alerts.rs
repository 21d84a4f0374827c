//! Events that are told to a webhook: an upstream with nothing but rate limits, a node that was taken out, a key that has
//! used most of its tokens. Looked for in the background (the last one costs a call a comparison), told by a courier of
//! each alert's own, so that no call and no other alert waits for a slow receiver.

mod post;
mod watch;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;
use serde::Serialize;
use tokio::sync::mpsc;
use tollgate_filters::config::{ConfigError, World};
use tollgate_filters::limit::{Dimension, Scope, Standings};
use tollgate_filters::metrics::Metrics;

use crate::config::{Document, When};
use crate::gateway::Gateway;
use post::Courier;
use watch::{Change, Watched};

/// Alerts of one kind that wait for their courier at most.
const WAITING: usize = 256;
/// How often upstreams and nodes are looked at.
const LOOK: Duration = Duration::from_millis(250);
/// Told shares are forgotten once so many are known and their periods are over.
const TOLD: usize = 10_000;
/// Two ends of a period that lie no further apart are one: they are worked out anew for each call.
const SAME: u64 = 120;

/// What a receiver is told.
#[derive(Debug, Clone, PartialEq, Serialize)]
struct Notice {
    /// Different for each notice, the same for each try to tell it.
    id: String,
    /// What happened.
    event: &'static str,
    /// `fired`, or `resolved` once it is over.
    state: &'static str,
    /// Of what: names and ids only.
    subject: Subject,
    /// Since when, in seconds since 1970.
    since: u64,
    /// Which gateway says so.
    gateway: Arc<str>,
    /// When it was noticed, in seconds since 1970.
    timestamp: u64,
}

/// Of what a notice is.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize)]
#[serde(untagged)]
enum Subject {
    /// A set of nodes.
    Upstream { upstream: Arc<str> },
    /// One of them.
    Node { upstream: Arc<str>, node: Arc<str> },
    /// A key, and which of its limits.
    Key { key: String, dimension: &'static str },
}

/// One alert of the configuration.
struct Rule {
    when: When,
    courier: mpsc::Sender<Notice>,
}

/// All alerts.
pub(crate) struct Alerts {
    rules: Vec<Rule>,
    /// Which of the rules are about the tokens of keys, with their shares.
    shares: Vec<(usize, f64)>,
    /// Until when which key has been told of, by rule.
    told: Mutex<HashMap<(usize, Subject), u64>>,
    gateway: Arc<str>,
    metrics: Arc<Metrics>,
}

/// Those who tell; to be sent off once the gateway stands.
pub(crate) struct Couriers(Vec<(Courier, mpsc::Receiver<Notice>)>);

impl Alerts {
    /// The alerts of a document.
    ///
    /// # Errors
    /// A secret that has gone meanwhile.
    pub(crate) fn new(
        document: &Document,
        world: &dyn World,
        metrics: &Arc<Metrics>,
    ) -> Result<(Self, Couriers), ConfigError> {
        let (mut rules, mut couriers) = (Vec::new(), Vec::new());
        for (index, written) in document.alerts.iter().enumerate() {
            let path = |key: &str| format!("alerts[{index}].{key}");
            let secret = written.secret.resolve(world).map_err(|why| ConfigError::new(path("secret"), why))?;
            let address = written.address();
            let address = address.ok_or_else(|| ConfigError::new(path("webhook"), "not an address to post to"))?;
            let (courier, notices) = mpsc::channel(WAITING);
            rules.push(Rule { when: written.when, courier });
            couriers.push((Courier::new(&address, secret), notices));
        }
        let share = |(index, rule): (usize, &Rule)| match rule.when {
            When::BudgetSpent(share) => Some((index, share)),
            When::UpstreamLimitedFor(_) | When::NodeDown => None,
        };
        let shares = rules.iter().enumerate().filter_map(share).collect();
        let (gateway, metrics) = (name(), Arc::clone(metrics));
        Ok((Self { rules, shares, told: Mutex::default(), gateway, metrics }, Couriers(couriers)))
    }

    /// Looks at how the limits of a call stand. Without an alert on them this is one comparison.
    pub(crate) fn saw(&self, standings: &Standings) {
        if self.shares.is_empty() {
            return;
        }
        let is_budget = |dimension| matches!(dimension, Dimension::TokensPerDay | Dimension::TokensPerMonth);
        for standing in standings.iter() {
            let rule = standing.rule();
            if standing.scope().scope() != Scope::Key || !is_budget(rule.dimension) {
                continue;
            }
            for (index, share) in &self.shares {
                if standing.used() as f64 >= rule.limit as f64 * share {
                    let key = standing.scope().name().to_owned();
                    let subject = Subject::Key { key, dimension: rule.dimension.name() };
                    self.spent(*index, subject, standing.resets_in(), unix());
                }
            }
        }
    }

    /// A key has used its share of a period that ends in so long: told once.
    fn spent(&self, rule: usize, subject: Subject, resets_in: Duration, now: u64) {
        let end = now.saturating_add(resets_in.as_secs());
        let mut told = self.told.lock();
        if told.len() >= TOLD {
            told.retain(|_, end| *end >= now);
        }
        let known = told.entry((rule, subject.clone())).or_insert(0);
        if end <= known.saturating_add(SAME) {
            return;
        }
        *known = end;
        drop(told);
        self.tell(rule, "fired", subject, now);
    }

    /// Hands a notice to its courier; never waits.
    fn tell(&self, rule: usize, state: &'static str, subject: Subject, since: u64) {
        let Some(rule) = self.rules.get(rule) else { return };
        let event = match rule.when {
            When::UpstreamLimitedFor(_) => "upstream_limited",
            When::NodeDown => "node_down",
            When::BudgetSpent(_) => "budget_spent",
        };
        tracing::info!(event, state, ?subject, "alert");
        let id = format!("{:016x}", rand::random::<u64>());
        let gateway = Arc::clone(&self.gateway);
        let notice = Notice { id, event, state, subject, since, gateway, timestamp: unix() };
        if rule.courier.try_send(notice).is_err() {
            self.metrics.alert("dropped");
            tracing::warn!(event, "an alert is dropped: too many wait for their receiver");
        }
    }
}

/// Sends the couriers off and looks at upstreams and nodes from then on.
pub(crate) fn start(gateway: &Arc<Gateway>, couriers: Couriers) {
    if couriers.0.is_empty() {
        return;
    }
    for (courier, notices) in couriers.0 {
        tokio::spawn(courier.run(notices, Arc::clone(gateway)));
    }
    tokio::spawn(look(Arc::clone(gateway)));
}

async fn look(gateway: Arc<Gateway>) {
    let mut known: HashMap<(usize, Subject), Watched> = HashMap::new();
    loop {
        tokio::time::sleep(LOOK).await;
        let (runtime, now) = (gateway.live.load_full(), gateway.now());
        for (index, rule) in gateway.alerts.rules.iter().enumerate() {
            let (found, patience) = match rule.when {
                When::UpstreamLimitedFor(period) => (watch::limited(&runtime, now), period.0),
                When::NodeDown => (watch::down(&runtime, now), Duration::ZERO),
                When::BudgetSpent(_) => continue,
            };
            for (subject, change, lasted) in watch::changes(&mut known, index, found, patience, now) {
                let state = match change {
                    Change::Fired => "fired",
                    Change::Resolved => "resolved",
                };
                gateway.alerts.tell(index, state, subject, unix().saturating_sub(lasted.as_secs()));
            }
        }
    }
}

/// The machine's name, with something that no other process on it has.
fn name() -> Arc<str> {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    format!("{}-{:08x}", host.trim(), rand::random::<u32>()).into()
}

fn unix() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn alerts() -> (Alerts, mpsc::Receiver<Notice>) {
        let (courier, notices) = mpsc::channel(2);
        let rules = vec![Rule { when: When::BudgetSpent(0.9), courier }];
        let metrics = Arc::new(Metrics::new("test").unwrap());
        let alerts = Alerts { rules, shares: vec![(0, 0.9)], told: Mutex::default(), gateway: "g".into(), metrics };
        (alerts, notices)
    }

    #[test]
    fn a_spent_budget_is_told_once_for_each_key_and_period() {
        let (alerts, mut notices) = alerts();
        let key = |key: &str| Subject::Key { key: key.into(), dimension: "tokens_per_day" };
        let day = Duration::from_secs(86_400);
        alerts.spent(0, key("alice"), Duration::from_secs(100), 1_000);
        alerts.spent(0, key("alice"), Duration::from_secs(91), 1_010);
        let told = notices.try_recv().unwrap();
        assert_eq!((told.event, told.state, told.subject), ("budget_spent", "fired", key("alice")));
        assert!(notices.try_recv().is_err());
        alerts.spent(0, key("bob"), Duration::from_secs(80), 1_020);
        assert_eq!(notices.try_recv().unwrap().subject, key("bob"));
        alerts.spent(0, key("alice"), day, 1_101);
        assert_eq!(notices.try_recv().unwrap().subject, key("alice"));
    }

    #[test]
    fn what_does_not_fit_is_dropped_and_counted() {
        let (alerts, _notices) = alerts();
        for n in 0..5 {
            let subject = Subject::Key { key: n.to_string(), dimension: "tokens_per_day" };
            alerts.spent(0, subject, Duration::from_secs(1_000), 1_000);
        }
        assert!(alerts.metrics.render().contains("tollgate_alerts_total{result=\"dropped\"} 3"));
    }
}
