//! Checks of `upstreams:`.

use tollgate_filters::limit::bucket::Grant;

use super::{At, Check};
use crate::config::{Balance, Timeouts, Upstream};

impl Check<'_> {
    pub(super) fn upstreams(&mut self) {
        for (name, upstream) in &self.document.upstreams {
            let at = At::root().key("upstreams").key(name);
            self.name(&at, name, "an upstream");
            self.nodes(&at, name, upstream);
            self.watch(&at, upstream);
            self.timeouts(&at.key("timeouts"), &upstream.timeouts);
            self.pool(&at.key("pool"), upstream);
            if let Balance::PrefixHash { load_factor } = upstream.balance {
                self.within(&at.key("balance").key("prefix_hash").key("load_factor"), load_factor, 1.0, f64::INFINITY);
            }
            for (index, credential) in upstream.credentials.iter().enumerate() {
                let at = at.key("credentials").item(index);
                self.secret(&at, &credential.secret);
                self.positive(&at.key("weight"), credential.weight);
            }
            self.lasting(&at.key("cooldown"), upstream.cooldown.0);
            if let Some(budget) = &upstream.budget {
                let at = at.key("budget");
                if budget.requests_per_minute.is_none() && budget.tokens_per_minute.is_none() {
                    let hint = "add requests_per_minute or tokens_per_minute";
                    self.error(&at, "a budget without a number", Some(hint.to_owned()));
                }
                self.positive(&at.key("requests_per_minute"), budget.requests_per_minute.unwrap_or(1));
                self.positive(&at.key("tokens_per_minute"), budget.tokens_per_minute.unwrap_or(1));
                for (key, number) in [
                    ("requests_per_minute", budget.requests_per_minute),
                    ("tokens_per_minute", budget.tokens_per_minute),
                ] {
                    if number > Some(Grant::MOST) {
                        let hint = format!("the most is {}; leave it out for no limit", Grant::MOST);
                        self.error(&at.key(key), "more than can be counted", Some(hint));
                    }
                }
                self.within(&at.key("pace_above"), budget.pace_above, 0.0, 1.0);
            }
        }
    }

    fn nodes(&mut self, at: &At, name: &str, upstream: &Upstream) {
        if upstream.nodes.is_empty() && upstream.discover.is_none() && !self.places.lost(&at.key("discover")) {
            let hint = "add `nodes: [http://HOST:PORT]` or `discover: { dns: HOST:PORT }`";
            self.error(&at.key("nodes"), format!("the upstream `{name}` has no nodes"), Some(hint.to_owned()));
        }
        for (index, node) in upstream.nodes.iter().enumerate() {
            let here = at.key("nodes").item(index);
            self.positive(&here.key("weight"), node.weight);
            if let Some(first) = upstream.nodes.iter().take(index).position(|first| first.url == node.url) {
                let first = self.places.whereabouts(&at.key("nodes").item(first), at);
                let hint = format!("the first is at {first}; use `weight` to give a node more");
                self.error(&here, format!("the node {} is listed twice", node.url), Some(hint));
            }
        }
    }

    fn watch(&mut self, at: &At, upstream: &Upstream) {
        if let Some(discover) = &upstream.discover {
            self.lasting(&at.key("discover").key("every"), discover.every);
        }
        if let Some(health) = &upstream.health {
            let at = at.key("health");
            if !health.path.starts_with('/') {
                self.error(&at.key("path"), "a path starts with /", Some(format!("write /{}", health.path)));
            }
            self.lasting(&at.key("every"), health.every);
            self.lasting(&at.key("timeout"), health.timeout);
            self.positive(&at.key("unhealthy_after"), health.unhealthy_after);
            self.positive(&at.key("healthy_after"), health.healthy_after);
        }
        if let Some(eject) = upstream.eject.on() {
            let at = at.key("eject");
            self.positive(&at.key("after"), eject.after);
            self.lasting(&at.key("for"), eject.period);
            if eject.max_ratio == 0.0 {
                self.error(&at.key("max_ratio"), "no node could be taken out", Some("write `eject: off`".to_owned()));
            }
            self.within(&at.key("max_ratio"), eject.max_ratio, 0.0, 1.0);
        }
    }

    fn timeouts(&mut self, at: &At, timeouts: &Timeouts) {
        let parts = [
            ("connect", timeouts.connect),
            ("first_byte", timeouts.first_byte),
            ("first_token", timeouts.first_token),
            ("between_tokens", timeouts.between_tokens),
        ];
        self.lasting(&at.key("total"), timeouts.total);
        for (key, period) in parts {
            self.lasting(&at.key(key), period);
            if self.places.has(&at.key(key)) && period > timeouts.total && !timeouts.total.0.is_zero() {
                let message = format!("`{key}` ({period}) is longer than `total` ({})", timeouts.total);
                self.warn(&at.key(key), message, "`total` ends the attempt first");
            }
        }
    }

    fn pool(&mut self, at: &At, upstream: &Upstream) {
        let pool = &upstream.pool;
        self.lasting(&at.key("idle"), pool.idle);
        self.positive(&at.key("concurrency"), pool.concurrency.unwrap_or(1));
        if let Some(queue) = &pool.queue {
            let at = at.key("queue");
            self.positive(&at.key("size"), queue.size as u64);
            self.lasting(&at.key("wait"), queue.wait);
            if pool.concurrency.is_none() {
                let hint = "add `concurrency: N` to the pool: calls wait while a node has N in flight";
                self.error(&at, "a queue without `concurrency` is never used", Some(hint.to_owned()));
            }
        }
    }

    /// An upstream that nothing goes to is mostly a slip.
    pub(super) fn unused_upstreams(&mut self) {
        let document = self.document;
        let targets = document.models.values().flat_map(|model| &model.targets).map(|target| &target.upstream);
        let calls = document.routes.iter().filter_map(|route| route.call.as_ref()?.upstream.as_ref());
        let passes = document.routes.iter().filter_map(|route| Some(&route.pass.as_ref()?.upstream));
        let used: Vec<&String> = targets.chain(calls).chain(passes).collect();
        // What refers to it may be among the parts that could not be understood.
        if !self.places.broken.is_empty() {
            return;
        }
        for name in document.upstreams.keys().filter(|name| !used.contains(name)) {
            let at = At::root().key("upstreams").key(name);
            self.warn(&at, format!("nothing uses the upstream `{name}`"), "name it in a model's targets or in a route");
        }
    }
}
