//! Rules: a scope, what it limits, and the plan of all rules that bind one call.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::hash::{BuildHasher, Hash, Hasher, RandomState};
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;
use schemars::JsonSchema;
use serde::Deserialize;
use smallvec::SmallVec;

use super::clock::Instant64;
use super::dimension::{Dimension, Limits, Window};
use super::redis::Wire;
use super::zone::Zone;

/// What a limit counts over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Scope {
    /// All calls of the gateway.
    Global,
    /// The calls of one route.
    Route,
    /// The calls of one key.
    Key,
    /// The calls for one model.
    Model,
}

impl Scope {
    /// The word for it, as metric label: bounded, without a name.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Global => "global",
            Self::Route => "route",
            Self::Key => "key",
            Self::Model => "model",
        }
    }
}

/// The identity of one scope: key `a` and route `a` are two.
#[derive(Debug, Clone)]
pub struct ScopeId {
    scope: Scope,
    name: Arc<str>,
    hash: u64,
}

/// One seed for the whole process, so that a hash can be kept in a rule and still not be foreseen by a client.
pub(super) fn seed() -> &'static RandomState {
    static SEED: OnceLock<RandomState> = OnceLock::new();
    SEED.get_or_init(RandomState::new)
}

impl ScopeId {
    /// The scope `scope` of the key, route or model `name`; of the global scope the name is dropped.
    pub fn new(scope: Scope, name: &str) -> Self {
        let name = if scope == Scope::Global { "" } else { name };
        Self { scope, name: name.into(), hash: seed().hash_one((scope, name)) }
    }

    /// What kind of scope it is.
    pub const fn scope(&self) -> Scope {
        self.scope
    }

    /// Key id, route name or model name; empty for the global scope.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// `key`, `route:NAME`, `model:NAME` or `global`. A key is not named: it is always the caller's own.
    pub fn label(&self) -> Cow<'static, str> {
        match self.scope {
            Scope::Global => Cow::Borrowed("global"),
            Scope::Key => Cow::Borrowed("key"),
            Scope::Route => Cow::Owned(format!("route:{}", self.name)),
            Scope::Model => Cow::Owned(format!("model:{}", self.name)),
        }
    }

    pub(super) const fn hash_value(&self) -> u64 {
        self.hash
    }
}

impl PartialEq for ScopeId {
    fn eq(&self, other: &Self) -> bool {
        self.hash == other.hash && self.scope == other.scope && self.name == other.name
    }
}

impl Eq for ScopeId {}

impl Hash for ScopeId {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(self.hash);
    }
}

/// One limit of a scope.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// What it counts.
    pub dimension: Dimension,
    /// The most that is admitted.
    pub limit: u64,
    /// Counted and reported, never refused.
    pub shadow: bool,
    /// Its name as a structured-field string, quotes included; scopes other than the key are named in front.
    policy: Box<str>,
}

impl Rule {
    /// The policy name for the `RateLimit` headers, in quotes.
    pub fn policy(&self) -> &str {
        &self.policy
    }
}

/// A scope with all its limits: built once when a configuration is loaded or a key is first seen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RuleSet {
    id: ScopeId,
    zone: Zone,
    rules: Box<[Rule]>,
    when_down: Option<WhenDown>,
    remote: Remote,
}

/// What happens to calls while the store that the gateways share is away or slow.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum WhenDown {
    /// Every gateway enforces its share of the limit on its own.
    #[default]
    Share,
    /// Calls are admitted uncounted.
    Open,
    /// Calls are refused with 503.
    Closed,
}

/// What is remembered of a scope whose counters are elsewhere; no part of what the scope is.
#[derive(Debug, Default)]
pub(super) struct Remote {
    /// The scope as it is written there.
    pub(super) wire: OnceLock<Wire>,
    /// How its rules stood when they were last heard of.
    pub(super) known: Mutex<Option<Known>>,
}

/// How the rules of a scope stood.
#[derive(Debug, Clone)]
pub(super) struct Known {
    /// When that was, by the gateway's clock.
    pub(super) at: Instant64,
    /// What was left of each rule, in their order.
    pub(super) remaining: SmallVec<[u64; 6]>,
}

impl Clone for Remote {
    fn clone(&self) -> Self {
        Self::default()
    }
}

impl PartialEq for Remote {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for Remote {}

impl RuleSet {
    /// The limits of one scope. For a key, `limits` is its tier overridden by its own rows ([`Limits::overridden`]).
    pub fn new(scope: Scope, name: &str, limits: &Limits) -> Self {
        let id = ScopeId::new(scope, name);
        let rules = limits.rows().map(|(dimension, limit)| Rule {
            dimension,
            limit: limit.limit,
            shadow: limit.shadow,
            policy: policy_name(&id, dimension),
        });
        Self { rules: rules.collect(), zone: Zone::UTC, when_down: None, remote: Remote::default(), id }
    }

    /// The same limits with a word of their own on what happens while the store is away.
    #[must_use]
    pub fn when_down(self, when_down: Option<WhenDown>) -> Self {
        Self { when_down, ..self }
    }

    /// These limits, each replaced by the part of it that one gateway may grant on its own.
    pub(super) fn share(&self, part: impl Fn(u64) -> u64) -> Self {
        let rule = |rule: &Rule| Rule { limit: part(rule.limit), ..rule.clone() };
        Self { rules: self.rules.iter().map(rule).collect(), ..self.clone() }
    }

    pub(super) const fn remote(&self) -> &Remote {
        &self.remote
    }

    /// The same limits with calendar days of another zone.
    #[must_use]
    pub fn in_zone(self, zone: Zone) -> Self {
        Self { zone, ..self }
    }

    /// Whose limits they are.
    pub const fn id(&self) -> &ScopeId {
        &self.id
    }

    /// Where its days begin.
    pub const fn zone(&self) -> Zone {
        self.zone
    }

    /// The limits, in the order of [`Dimension::ALL`], each dimension once.
    pub fn rules(&self) -> &[Rule] {
        &self.rules
    }
}

fn policy_name(id: &ScopeId, dimension: Dimension) -> Box<str> {
    let mut text = String::from("\"");
    if id.scope() != Scope::Key {
        for c in id.label().chars() {
            match c {
                '"' | '\\' => text.extend(['\\', c]),
                ' '..='~' => text.push(c),
                // A structured-field string is ASCII; a foreign letter becomes its code point.
                _ => {
                    let _ = write!(text, "%{:X}", u32::from(c));
                }
            }
        }
        text.push(':');
    }
    text.push_str(dimension.name());
    text.push('"');
    text.into()
}

/// The window of a rule in seconds, where it has a fixed one.
pub(super) const fn window_secs(window: Window) -> Option<u32> {
    match window {
        Window::Rolling(secs) => Some(secs),
        Window::Day => Some(86_400),
        Window::Month | Window::Live => None,
    }
}

/// All rules that bind one call. Building it for a call costs one reference count per scope.
#[derive(Debug, Clone, Default)]
pub struct Plan {
    sets: SmallVec<[Arc<RuleSet>; 4]>,
    when_down: Option<WhenDown>,
}

impl Plan {
    /// A plan without a rule: everything is admitted.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a scope. One without limits is left out, and so is one that is in the plan already: it would count twice.
    pub fn add(&mut self, set: &Arc<RuleSet>) {
        // What a route says wins over what a tier says.
        if self.when_down.is_none() || set.id.scope == Scope::Route {
            self.when_down = set.when_down.or(self.when_down);
        }
        if !set.rules.is_empty() && self.sets.iter().all(|known| known.id != set.id) {
            self.sets.push(Arc::clone(set));
        }
    }

    /// The scopes with their limits, in the order in which they were added.
    pub fn sets(&self) -> &[Arc<RuleSet>] {
        &self.sets
    }

    /// Every rule with its scope, in a fixed order.
    pub fn rules(&self) -> impl Iterator<Item = (&RuleSet, &Rule)> {
        self.sets.iter().flat_map(|set| set.rules.iter().map(move |rule| (&**set, rule)))
    }

    /// What happens to the call while the store is away, if one of its scopes says.
    pub const fn when_down(&self) -> Option<WhenDown> {
        self.when_down
    }

    /// A number for the set of scopes, whatever their order.
    pub(super) fn hash_value(&self) -> u64 {
        self.sets.iter().fold(0, |sum, set| sum.wrapping_add(set.id.hash))
    }

    /// Whether nothing limits the call.
    pub fn is_empty(&self) -> bool {
        self.sets.is_empty()
    }
}

impl<'a> FromIterator<&'a Arc<RuleSet>> for Plan {
    fn from_iter<I: IntoIterator<Item = &'a Arc<RuleSet>>>(sets: I) -> Self {
        let mut plan = Self::new();
        sets.into_iter().for_each(|set| plan.add(set));
        plan
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limit::dimension::Limit;

    fn rpm(limit: u64) -> Limits {
        Limits { requests_per_minute: Some(Limit { limit, shadow: false }), ..Limits::default() }
    }

    #[test]
    fn a_key_and_a_route_of_the_same_name_are_two_scopes() {
        assert_ne!(ScopeId::new(Scope::Key, "a"), ScopeId::new(Scope::Route, "a"));
        assert_ne!(ScopeId::new(Scope::Key, "a").hash_value(), ScopeId::new(Scope::Route, "a").hash_value());
        assert_eq!(ScopeId::new(Scope::Key, "a"), ScopeId::new(Scope::Key, "a"));
        assert_eq!(ScopeId::new(Scope::Global, "x"), ScopeId::new(Scope::Global, "y"));
    }

    #[test]
    fn labels_are_those_of_the_contract() {
        let label = |scope, name| ScopeId::new(scope, name).label().into_owned();
        assert_eq!(label(Scope::Global, ""), "global");
        assert_eq!(label(Scope::Key, "alice"), "key");
        assert_eq!(label(Scope::Route, "llm"), "route:llm");
        assert_eq!(label(Scope::Model, "chat"), "model:chat");
    }

    #[test]
    fn a_plan_takes_a_scope_once_and_leaves_out_one_without_limits() {
        let key = Arc::new(RuleSet::new(Scope::Key, "a", &rpm(5)));
        let again = Arc::new(RuleSet::new(Scope::Key, "a", &rpm(7)));
        let none = Arc::new(RuleSet::new(Scope::Route, "a", &Limits::default()));
        let plan: Plan = [&key, &again, &none].into_iter().collect();
        assert_eq!(plan.sets().len(), 1);
        assert_eq!(plan.rules().map(|(_, rule)| rule.limit).collect::<Vec<_>>(), [5]);
    }

    #[test]
    fn policy_names_are_valid_structured_field_strings() {
        let name = |scope, name| RuleSet::new(scope, name, &rpm(1)).rules()[0].policy().to_owned();
        assert_eq!(name(Scope::Key, "\"x"), "\"requests_per_minute\"");
        assert_eq!(name(Scope::Route, "a\"b\\"), "\"route:a\\\"b\\\\:requests_per_minute\"");
        assert_eq!(name(Scope::Model, "模"), "\"model:%6A21:requests_per_minute\"");
    }
}
