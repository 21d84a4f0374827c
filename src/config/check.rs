//! What the types cannot say: references, ranges, secrets, routes that are never reached.

use std::path::Path;

use tollgate_filters::config::{Period, Secret, SecretSource, World};
use tollgate_filters::limit::dimension::Limits;

use super::Document;
use super::load::Names;
use super::place::{At, Places};
use super::problem::{Problem, Severity, suggest};
use super::words::Allowed;

mod alerts;
mod callers;
mod models;
mod routes;
mod server;
mod shadow;
pub(super) mod unsupported;
mod upstreams;

/// Checks a document that was read whole; problems are added to `problems`.
pub(crate) fn check(
    document: &Document,
    names: &Names,
    places: &Places,
    world: &dyn World,
    problems: &mut Vec<Problem>,
) {
    let mut check = Check { document, names, places, world, problems };
    check.server();
    check.store();
    check.auth();
    check.tiers();
    check.keys();
    check.limits(&At::root().key("limits").key("global"), &document.limits.global);
    check.upstreams();
    check.models();
    check.routes();
    check.alerts();
    check.unused_upstreams();
    check.unsupported();
}

struct Check<'a> {
    document: &'a Document,
    names: &'a Names,
    places: &'a Places,
    world: &'a dyn World,
    problems: &'a mut Vec<Problem>,
}

impl Check<'_> {
    fn error(&mut self, at: &At, message: impl Into<String>, hint: Option<String>) {
        self.problems.extend(self.places.problem(Severity::Error, at, message.into(), hint));
    }

    fn warn(&mut self, at: &At, message: impl Into<String>, hint: &str) {
        self.problems.extend(self.places.problem(Severity::Warning, at, message.into(), Some(hint.to_owned())));
    }

    /// Resolves a secret, so that a missing one is known before anything starts.
    fn secret(&mut self, at: &At, source: &SecretSource) -> Option<Secret> {
        if let SecretSource::Plain(secret) = source {
            if secret.is_empty() {
                self.error(
                    at,
                    "the secret is empty",
                    Some("write {env: NAME}, {file: PATH} or {credential: NAME}".into()),
                );
                return None;
            }
            self.warn(at, "a secret in plain text", "write {env: NAME}, {file: PATH} or {credential: NAME}");
        }
        match source.resolve(self.world) {
            Ok(secret) => Some(secret),
            Err(message) => {
                self.error(at, message, None);
                None
            }
        }
    }

    fn readable(&mut self, at: &At, path: &Path) {
        let name = path.display().to_string();
        if let Err(error) = self.world.read(&name) {
            self.error(at, format!("cannot read {name}: {error}"), None);
        }
    }

    /// A name in configuration, logs and labels.
    fn name(&mut self, at: &At, name: &str, what: &str) {
        let first = name.starts_with(|c: char| c.is_ascii_alphanumeric());
        let rest = name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | ':' | '/' | '-'));
        if !first || !rest || name.len() > 128 {
            let hint = "letters, digits and . _ : / - after a letter or digit, at most 128";
            self.error(at, format!("{name:?} is not a name for {what}"), Some(hint.to_owned()));
        }
    }

    fn known<'n>(&mut self, at: &At, name: &str, known: impl IntoIterator<Item = &'n String>, what: &str) {
        let known: Vec<&str> = known.into_iter().map(String::as_str).collect();
        // Where the whole section could not be understood, nothing can be said of its names.
        if self.places.broken.contains(&format!("{what}s")) {
            return;
        }
        if !known.contains(&name) {
            let hint = suggest(name, known.iter().copied());
            let hint = hint.unwrap_or_else(|| format!("there is no {what} at all"));
            self.error(at, format!("there is no {what} `{name}`"), Some(hint));
        }
    }

    fn positive(&mut self, at: &At, number: impl TryInto<u128>) {
        if matches!(number.try_into(), Ok(0)) {
            self.error(at, "0 is too small", Some("the least is 1".to_owned()));
        }
    }

    fn lasting(&mut self, at: &At, period: Period) {
        if period.0.is_zero() {
            self.error(at, "a period of zero", Some("the least is 1ms".to_owned()));
        }
    }

    /// A number from `least` to `most`.
    fn within(&mut self, at: &At, number: f64, least: f64, most: f64) {
        if !(least..=most).contains(&number) {
            let range = if most.is_finite() { format!("from {least} to {most}") } else { format!("at least {least}") };
            self.error(at, format!("{number} is out of range"), Some(format!("it is {range}")));
        }
    }

    fn limits(&mut self, at: &At, limits: &Limits) {
        for (dimension, limit) in limits.rows() {
            if limit.limit == 0 {
                let hint = "the least is 1; leave the row out for no limit";
                self.error(&at.key(dimension.name()), "a limit of 0 refuses every call", Some(hint.to_owned()));
            }
        }
    }

    fn empty_list(&mut self, at: &At, list: &[String], hint: &str) {
        if list.is_empty() && self.places.has(at) {
            self.error(at, "the list is empty", Some(hint.to_owned()));
        }
    }

    /// Models by name; an alias is not a name.
    fn model_names(&mut self, at: &At, models: &Allowed) {
        let Allowed::These(list) = models else { return };
        self.empty_list(at, list, "leave it out, or write \"*\" for all");
        for (index, name) in list.iter().enumerate() {
            let alias_of = self.document.models.iter().find(|(_, model)| model.aliases.contains(name));
            let place = self.places.listed(at, index);
            match alias_of {
                Some((model, _)) if !self.names.models.contains(name) => {
                    let hint = format!("write `{model}`, it covers all its aliases");
                    self.error(&place, format!("`{name}` is an alias of the model `{model}`"), Some(hint));
                }
                Some(_) | None => self.known(&place, name, &self.names.models, "model"),
            }
        }
    }
}
