//! Checks of `routes:`.

use std::collections::HashMap;

use super::shadow::shadowed_by;
use super::{At, Check};
use tollgate_filters::cors::Cors;
use tollgate_filters::dialect::Dialect;

use crate::config::{Call, Match, Route};

impl Check<'_> {
    pub(super) fn routes(&mut self) {
        let routes = &self.document.routes;
        if routes.is_empty() {
            self.warn(&At::root().key("routes"), "no routes: every request gets 404", "add `routes:`");
        }
        let mut names: HashMap<&str, At> = HashMap::new();
        for (index, route) in routes.iter().enumerate() {
            let at = At::root().key("routes").item(index);
            self.name(&at.key("name"), &route.name, "a route");
            if let Some(first) = names.get(route.name.as_str()) {
                let hint = format!("it is already the name of the route at {}", self.places.whereabouts(first, &at));
                self.error(&at.key("name"), format!("duplicate route name `{}`", route.name), Some(hint));
            } else {
                names.insert(&route.name, at.key("name"));
            }
            self.matching(&at.key("match"), &route.matching);
            self.lane(&at, route);
            self.filters(&at.key("filters"), route);
            self.limits(&at.key("limits"), &route.limits);
            self.positive(&at.key("body_bytes"), route.body_bytes.map_or(1, |size| size.0));
            self.reached(index, route);
        }
    }

    fn matching(&mut self, at: &At, matching: &Match) {
        let empty = "leave it out to match all";
        for (key, list) in [
            ("path", &matching.path),
            ("prefix", &matching.prefix),
            ("method", &matching.method),
            ("host", &matching.host),
        ] {
            self.empty_list(&at.key(key), list, empty);
        }
        if !matching.path.is_empty() && !matching.prefix.is_empty() {
            self.error(&at.key("prefix"), "both `path` and `prefix`", Some("make two routes of it".to_owned()));
        }
        let open = matching.method.is_empty()
            && matching.host.is_empty()
            && matching.header.is_empty()
            && matching.query.is_empty();
        if open && !self.places.has_any(at) {
            self.error(at, "an empty match", Some("write `prefix: /` to match every request".to_owned()));
        }
        for (index, path) in matching.path.iter().enumerate() {
            let at = self.places.listed(&at.key("path"), index);
            self.path(&at, path);
            if path.split('/').any(|segment| segment.contains('*') && segment != "*") {
                let hint = "`*` stands for one whole segment, like /v1/apps/*/run";
                self.error(&at, "`*` inside a segment", Some(hint.to_owned()));
            }
        }
        for (index, prefix) in matching.prefix.iter().enumerate() {
            let at = self.places.listed(&at.key("prefix"), index);
            self.path(&at, prefix);
            if prefix.contains('*') {
                let hint =
                    format!("write {:?}: a prefix takes everything below it", prefix.split('*').next().unwrap_or("/"));
                self.error(&at, "`*` in a prefix", Some(hint));
            }
        }
        self.names_in(at, matching);
    }

    fn path(&mut self, at: &At, path: &str) {
        if !path.starts_with('/') {
            self.error(at, format!("{path:?} does not start with /"), Some(format!("write /{path}")));
        } else if path.contains(['?', '#']) {
            self.error(at, format!("{path:?} has a query or fragment"), Some("use `query:` for parameters".to_owned()));
        } else if path.contains(|c: char| c.is_whitespace() || c.is_control()) {
            self.error(at, format!("{path:?} has white space"), Some("percent-encode it".to_owned()));
        }
    }

    fn names_in(&mut self, at: &At, matching: &Match) {
        for (index, method) in matching.method.iter().enumerate() {
            let at = self.places.listed(&at.key("method"), index);
            self.method(&at, method);
        }
        for (index, host) in matching.host.iter().enumerate() {
            let at = self.places.listed(&at.key("host"), index);
            let name = host.strip_prefix("*.").unwrap_or(host);
            let plain = name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_'));
            let v6 = name.starts_with('[') && name.ends_with(']');
            if name.is_empty() || !(plain || v6) {
                let hint = "a name without scheme and port, like example.org or *.example.org";
                self.error(&at, format!("{host:?} is not a host name"), Some(hint.to_owned()));
            }
        }
        for (name, value) in &matching.header {
            let at = at.key("header").key(name);
            self.header_name(&at, name);
            if value.chars().any(char::is_control) {
                self.error(&at, "no header has such a value", None);
            }
        }
    }

    fn method(&mut self, at: &At, method: &str) {
        const KNOWN: [&str; 9] = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"];
        if !KNOWN.contains(&method) {
            let hint = super::suggest(method, KNOWN);
            self.error(at, format!("{method:?} is not a method"), hint);
        }
    }

    fn header_name(&mut self, at: &At, name: &str) {
        let token = |c: char| c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~".contains(c);
        if name.is_empty() || !name.chars().all(token) {
            self.error(at, format!("{name:?} is not the name of a header"), Some("like x-app-id".to_owned()));
        }
    }

    fn lane(&mut self, at: &At, route: &Route) {
        match (&route.call, &route.pass) {
            (Some(call), None) => self.call(&at.key("call"), call),
            (None, Some(pass)) => {
                self.known(&at.key("pass").key("upstream"), &pass.upstream, &self.names.upstreams, "upstream");
            }
            (Some(_), Some(_)) => {
                let message = format!("the route `{}` has both `call` and `pass`", route.name);
                self.error(&at.key("pass"), message, Some("keep one of them".to_owned()));
            }
            (None, None) if self.places.lost(&at.key("call")) || self.places.lost(&at.key("pass")) => {}
            (None, None) => {
                let hint = "add `call: { models: \"*\" }` or `pass: { upstream: NAME }`";
                let message = format!("the route `{}` has neither `call` nor `pass`", route.name);
                self.error(&at.key("name"), message, Some(hint.to_owned()));
            }
        }
    }

    fn call(&mut self, at: &At, call: &Call) {
        match (&call.models, &call.upstream) {
            (Some(models), None) => self.model_names(&at.key("models"), models),
            (None, Some(name)) => {
                self.known(&at.key("upstream"), name, &self.names.upstreams, "upstream");
                let upstream = self.document.upstreams.get(name);
                if upstream.is_some_and(|upstream| upstream.dialect == Dialect::None) {
                    let message = format!("the upstream `{name}` speaks no dialect, so its calls cannot be metered");
                    let hint = "use `pass`, or set the upstream's `dialect`";
                    self.error(&at.key("upstream"), message, Some(hint.to_owned()));
                }
            }
            (Some(_), Some(_)) => {
                self.error(&at.key("upstream"), "both `models` and `upstream`", Some("keep one of them".to_owned()));
            }
            (None, None) => {
                let hint = "write `call: { models: \"*\" }` or `call: { upstream: NAME }`";
                self.error(at, "a call goes to `models` or to an `upstream`", Some(hint.to_owned()));
            }
        }
    }

    fn filters(&mut self, at: &At, route: &Route) {
        if let Some(cache) = route.filters.cache.on() {
            self.lasting(&at.key("cache").key("ttl"), cache.ttl);
        }
        if let Some(cors) = route.filters.cors.on() {
            self.cors(&at.key("cors"), cors);
        }
    }

    fn cors(&mut self, at: &At, cors: &Cors) {
        let Err(error) = cors.policy("") else { return };
        // The error's path is relative to the filter: `.origins[1]`.
        let at = error.path.split(['.', '[', ']']).filter(|part| !part.is_empty()).fold(at.clone(), |at, part| {
            match part.parse() {
                Ok(index) => self.places.listed(&at, index),
                Err(_) => at.key(part),
            }
        });
        self.error(&at, error.message, error.hint);
    }

    /// A route behind others that take everything it matches is an error: somebody relies on it.
    fn reached(&mut self, index: usize, route: &Route) {
        let earlier = self.document.routes.get(..index).unwrap_or_default();
        // What a match lacks because it was refused would make it wider than it is.
        let whole = |index: usize| !self.places.lost(&At::root().key("routes").item(index).key("match"));
        if !self.places.broken.is_empty() && !(0..=index).all(whole) {
            return;
        }
        let Some(others) = shadowed_by(route, earlier) else { return };
        let at = At::root().key("routes").item(index).key("name");
        let named: Vec<String> = others
            .iter()
            .filter_map(|other| Some((other, earlier.get(*other)?)))
            .map(|(other, route)| {
                let place = At::root().key("routes").item(*other).key("name");
                format!("`{}` ({})", route.name, self.places.whereabouts(&place, &at))
            })
            .collect();
        let message = format!("the route `{}` is never reached", route.name);
        let verb = if named.len() == 1 { "takes" } else { "take" };
        let hint = format!("{} {verb} all it matches: the first match wins, so put it before", named.join(" and "));
        self.error(&at, message, Some(hint));
    }
}
