//! How the limits of a call stand: what headers, `/v1/quota` and metrics are made from.

use std::time::Duration;

use smallvec::SmallVec;

use super::rule::{Plan, Rule, RuleSet, ScopeId};
use super::window::Reading;

/// One rule of a plan and how it stands.
#[derive(Debug, Clone, Copy)]
pub struct Standing<'a> {
    set: &'a RuleSet,
    rule: &'a Rule,
    row: Row,
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Row {
    pub(super) reading: Reading,
    pub(super) over: bool,
}

impl<'a> Standing<'a> {
    /// Whose limit it is.
    pub fn scope(&self) -> &'a ScopeId {
        self.set.id()
    }

    /// The rule itself: dimension, limit, shadow.
    pub fn rule(&self) -> &'a Rule {
        self.rule
    }

    /// What is used, or for concurrency the calls that are live.
    pub fn used(&self) -> u64 {
        self.row.reading.used
    }

    /// What open calls have reserved of a calendar budget.
    pub fn held(&self) -> u64 {
        self.row.reading.held
    }

    /// What is left; 0 if more is used than the limit.
    pub fn remaining(&self) -> u64 {
        self.rule.limit.saturating_sub(self.used()).saturating_sub(self.held())
    }

    /// Until more is left than now; zero if nothing is used of a rolling window, and for concurrency.
    pub fn more_in(&self) -> Duration {
        Duration::from_micros(self.row.reading.next)
    }

    /// Until all of the limit is back.
    pub fn resets_in(&self) -> Duration {
        Duration::from_micros(self.row.reading.full)
    }

    /// Whether the call that was decided went beyond this rule: it was refused, or only counted if the rule is a shadow.
    pub fn over(&self) -> bool {
        self.row.over
    }
}

/// Every rule of a plan with how it stands, in the plan's order.
#[derive(Debug, Clone, Default)]
pub struct Standings {
    plan: Plan,
    rows: SmallVec<[Row; 6]>,
    binding: Option<usize>,
}

impl Standings {
    pub(super) fn new(plan: Plan, rows: SmallVec<[Row; 6]>) -> Self {
        Self { plan, rows, binding: None }
    }

    pub(super) fn bound_by(self, ordinal: usize) -> Self {
        Self { binding: Some(ordinal), ..self }
    }

    /// The rules that were looked at.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The rule that refused the call, if it was refused.
    pub fn binding(&self) -> Option<Standing<'_>> {
        self.iter().nth(self.binding?)
    }

    /// Each rule with how it stands.
    pub fn iter(&self) -> impl Iterator<Item = Standing<'_>> {
        self.plan.rules().zip(&self.rows).map(|((set, rule), row)| Standing { set, rule, row: *row })
    }
}
