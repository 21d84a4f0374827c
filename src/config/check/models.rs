//! Checks of `models:`.

use std::collections::HashMap;

use super::{At, Check};
use tollgate_filters::dialect::Dialect;
use tollgate_filters::retry::Class;

use crate::config::{Model, Resume, Target};

impl Check<'_> {
    pub(super) fn models(&mut self) {
        let mut aliases: HashMap<&str, (&str, At)> = HashMap::new();
        for (name, model) in &self.document.models {
            let at = At::root().key("models").key(name);
            self.name(&at, name, "a model");
            if model.targets.is_empty() {
                let hint = "add `targets: [{ upstream: NAME }]`";
                self.error(&at.key("targets"), format!("the model `{name}` has no targets"), Some(hint.to_owned()));
            }
            for (index, target) in model.targets.iter().enumerate() {
                self.target(&at.key("targets").item(index), target);
            }
            self.model(&at, name, model);
            for (index, alias) in model.aliases.iter().enumerate() {
                let at = at.key("aliases").item(index);
                self.name(&at, alias, "a model");
                if self.names.models.contains(alias) {
                    self.error(&at, format!("`{alias}` is already the name of a model"), None);
                } else if let Some((other, first)) = aliases.get(alias.as_str()) {
                    let first = self.places.whereabouts(first, &at);
                    let hint = format!("it is already an alias of `{other}` at {first}");
                    self.error(&at, format!("duplicate alias `{alias}`"), Some(hint));
                } else {
                    aliases.insert(alias, (name, at));
                }
            }
        }
    }

    fn target(&mut self, at: &At, target: &Target) {
        self.known(&at.key("upstream"), &target.upstream, &self.names.upstreams, "upstream");
        let upstream = self.document.upstreams.get(&target.upstream);
        if upstream.is_some_and(|upstream| upstream.dialect == Dialect::None) {
            let message = format!("the upstream `{}` speaks no dialect, so it cannot serve a model", target.upstream);
            self.error(&at.key("upstream"), message, Some("set the upstream's `dialect`".to_owned()));
        }
        if target.model.as_ref().is_some_and(String::is_empty) {
            self.error(&at.key("model"), "the name is empty", Some("leave it out to keep the name".to_owned()));
        }
        if target.on.is_empty() {
            let hint = "leave it out for the default: connect, timeout, 429, 5xx, first_token, auth";
            self.error(&at.key("on"), "the target would never be tried", Some(hint.to_owned()));
        }
        if target.on.contains(&Class::ContextLength) && !target.larger_context {
            let hint = "add `larger_context: true` if it takes longer prompts";
            self.warn(&at.key("on"), "context_length goes only to a target with `larger_context`", hint);
        }
    }

    fn model(&mut self, at: &At, name: &str, model: &Model) {
        let retry = at.key("retry");
        self.positive(&retry.key("attempts"), model.retry.attempts);
        self.within(&retry.key("budget"), model.retry.budget, 0.0, 1.0);
        if model.resume == Resume::Continue && !model.targets.iter().any(|target| target.continues) {
            let message = format!("no target of `{name}` can go on with a broken answer");
            self.warn(&at.key("resume"), message, "set `continues: true` on targets whose engine can");
        }
        self.limits(&at.key("limits"), &model.limits);
        let Some(price) = &model.price else { return };
        let at = at.key("price");
        self.within(&at.key("input"), price.input, 0.0, f64::INFINITY);
        self.within(&at.key("output"), price.output, 0.0, f64::INFINITY);
        self.within(&at.key("cached_input"), price.cached_input.unwrap_or(0.0), 0.0, f64::INFINITY);
        self.positive(&at.key("per"), price.per);
        if price.currency.len() != 3 || !price.currency.bytes().all(|byte| byte.is_ascii_uppercase()) {
            let message = format!("{:?} is not a currency", price.currency);
            self.error(&at.key("currency"), message, Some("three capital letters, like USD".to_owned()));
        }
    }
}
