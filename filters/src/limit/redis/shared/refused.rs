//! Refusals that hold for a moment: a flood of calls that are over a limit does not reach the store.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::error::Refusal;
use crate::limit::rule::Plan;
use crate::limit::standing::Standings;

/// Longest time that a refusal is repeated without asking again: another gateway may have given something back.
const HELD: Duration = Duration::from_millis(250);
/// Plans that are remembered at most.
const MOST: usize = 8_192;

struct Refused {
    at: Instant,
    until: Instant,
    /// What the refused call asked for; a smaller one may fit.
    tokens: u64,
    refusal: Refusal,
    standings: Standings,
}

#[derive(Default)]
pub(super) struct Refusals {
    by_plan: Mutex<HashMap<u64, Refused>>,
    /// So that calls need no lock where nothing is refused.
    len: AtomicUsize,
}

impl Refusals {
    /// The refusal that holds for a call of this plan and size, with the wait that is left of it.
    pub(super) fn find(&self, plan: &Plan, tokens: u64, now: Instant) -> Option<(Refusal, Standings)> {
        if self.len.load(Ordering::Acquire) == 0 {
            return None;
        }
        let mut by_plan = self.by_plan.lock();
        let known = by_plan.get(&plan.hash_value())?;
        if now >= known.until || !same(known.standings.plan(), plan) {
            by_plan.remove(&plan.hash_value());
            self.len.store(by_plan.len(), Ordering::Release);
            return None;
        }
        if tokens < known.tokens {
            return None;
        }
        let mut refusal = known.refusal.clone();
        let passed = now.saturating_duration_since(known.at);
        refusal.wait = refusal.wait.map(|wait| wait.saturating_sub(passed));
        Some((refusal, known.standings.clone()))
    }

    pub(super) fn note(&self, tokens: u64, refusal: &Refusal, standings: &Standings, now: Instant) {
        let until = now + refusal.wait.unwrap_or(HELD).min(HELD);
        let mut by_plan = self.by_plan.lock();
        if by_plan.len() >= MOST {
            by_plan.retain(|_, refused| refused.until > now);
        }
        if by_plan.len() < MOST {
            let (refusal, standings) = (refusal.clone(), standings.clone());
            let refused = Refused { at: now, until, tokens, refusal, standings };
            by_plan.insert(refused.standings.plan().hash_value(), refused);
        }
        self.len.store(by_plan.len(), Ordering::Release);
    }

    /// Something was given back.
    pub(super) fn forget(&self, plan: &Plan) {
        if self.len.load(Ordering::Acquire) > 0 {
            let mut by_plan = self.by_plan.lock();
            by_plan.remove(&plan.hash_value());
            self.len.store(by_plan.len(), Ordering::Release);
        }
    }

    pub(super) fn clear(&self) {
        self.by_plan.lock().clear();
        self.len.store(0, Ordering::Release);
    }
}

/// Whether they are the same limits of the same scopes, and not those of before a reload.
fn same(a: &Plan, b: &Plan) -> bool {
    a.sets().len() == b.sets().len() && a.sets().iter().zip(b.sets()).all(|(a, b)| Arc::ptr_eq(a, b))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limit::clock::Instant64;
    use crate::limit::dimension::{Limit, Limits};
    use crate::limit::memory::{MemoryStore, Verdicts};
    use crate::limit::reservation::Estimate;
    use crate::limit::rule::{RuleSet, Scope};

    fn plan() -> Plan {
        let limits = Limits { tokens_per_minute: Some(Limit { limit: 10, shadow: false }), ..Limits::default() };
        [&Arc::new(RuleSet::new(Scope::Key, "a", &limits))].into_iter().collect()
    }

    #[test]
    fn a_refusal_holds_for_its_plan_and_for_calls_as_large_and_only_for_a_moment() {
        let (plan, store, refusals) = (plan(), MemoryStore::new(None), Refusals::default());
        let estimate = Estimate { prompt: 8, completion: 0, guessed: false };
        store.reserve(&plan, estimate, Instant64(0));
        let Verdicts::Refused { refusal, standings } = store.reserve(&plan, estimate, Instant64(0)) else {
            panic!("admitted")
        };
        let start = Instant::now();
        let after = |ms| start + Duration::from_millis(ms);
        assert!(refusals.find(&plan, 8, start).is_none());
        refusals.note(8, &refusal, &standings, start);
        let (again, _) = refusals.find(&plan, 9, after(100)).unwrap();
        assert_eq!(again.wait, Some(Duration::from_millis(59_900)));
        assert!(refusals.find(&plan, 2, after(100)).is_none(), "a smaller call may fit");
        assert!(refusals.find(&self::plan(), 9, after(100)).is_none(), "a reload made new limits");
        refusals.note(8, &refusal, &standings, start);
        assert!(refusals.find(&plan, 8, after(249)).is_some());
        assert!(refusals.find(&plan, 8, after(250)).is_none());
        refusals.note(8, &refusal, &standings, start);
        refusals.forget(&plan);
        assert!(refusals.find(&plan, 8, start).is_none());
    }
}
