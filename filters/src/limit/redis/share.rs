//! What a gateway may grant on its own while the store is away: of what was last known to be left, one part in as many as
//! there are gateways. As long as that number is right, all of them together grant no more than the limit.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::limit::clock::Instant64;
use crate::limit::memory::{LeaseId, MemoryStore, Verdicts};
use crate::limit::reservation::Estimate;
use crate::limit::rule::{Known, Plan, RuleSet, ScopeId};
use crate::limit::standing::Standings;

/// The gateways that share, and which of them this one is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::limit) struct Group {
    size: u64,
    /// How many come before this one.
    before: u64,
}

impl Group {
    pub(super) fn new(size: u64, before: u64) -> Self {
        let size = size.max(1);
        Self { size, before: before.min(size - 1) }
    }

    /// So many, of which none has been seen.
    pub(super) fn unseen(size: u64) -> Self {
        Self::new(size, u64::MAX)
    }

    pub(super) const fn size(self) -> u64 {
        self.size
    }

    /// This gateway's part of `n`; what does not divide goes to the first ones. The last one's part is the smallest, so that
    /// a gateway which does not know its place takes no more than its own.
    pub(in crate::limit) const fn part(self, n: u64) -> u64 {
        n / self.size + (self.before < n % self.size) as u64
    }
}

/// One outage: counters that begin with what others may have used.
#[derive(Debug)]
pub(super) struct Outage {
    store: MemoryStore,
    group: Group,
    parts: Mutex<HashMap<ScopeId, Part>>,
}

/// The part of a scope that this gateway may grant.
#[derive(Debug)]
struct Part {
    of: Arc<RuleSet>,
    set: Arc<RuleSet>,
}

/// Remembers how the scopes of a plan stand, for the time when nobody can be asked.
pub(super) fn remember(standings: &Standings, at: Instant64) {
    let mut rows = standings.iter();
    for set in standings.plan().sets() {
        let remaining = rows.by_ref().take(set.rules().len()).map(|standing| standing.remaining()).collect();
        *set.remote().known.lock() = Some(Known { at, remaining });
    }
}

impl Outage {
    pub(super) fn new(group: Group) -> Self {
        Self { store: MemoryStore::new(None), group, parts: Mutex::default() }
    }

    pub(super) fn reserve(&self, plan: &Plan, estimate: Estimate, now: Instant64) -> Verdicts {
        self.store.reserve(&self.part(plan), estimate, now)
    }

    pub(super) fn query(&self, plan: &Plan, now: Instant64) -> Standings {
        self.store.query(&self.part(plan), now)
    }

    pub(super) fn settle(&self, id: LeaseId, tokens: u64, now: Instant64) {
        self.store.settle(id, tokens, now);
    }

    pub(super) fn sweep(&self, now: Instant64) {
        self.store.sweep(now);
    }

    pub(super) const fn group(&self) -> Group {
        self.group
    }

    /// Whether anything was decided by it.
    pub(super) fn is_touched(&self) -> bool {
        !self.parts.lock().is_empty()
    }

    fn part(&self, plan: &Plan) -> Plan {
        let mut parts = self.parts.lock();
        let mut part = Plan::new();
        for whole in plan.sets() {
            if let Some(known) = parts.get(whole.id()).filter(|known| Arc::ptr_eq(&known.of, whole)) {
                part.add(&known.set);
                continue;
            }
            let set = Arc::new(whole.share(|limit| self.group.part(limit)));
            // New limits after a reload keep what was counted under the old ones.
            if !parts.contains_key(whole.id()) {
                self.begin(whole, &set);
            }
            part.add(&set);
            parts.insert(whole.id().clone(), Part { of: Arc::clone(whole), set });
        }
        part
    }

    /// Counts what is not ours to grant as used already, as of when that was known.
    fn begin(&self, whole: &RuleSet, part: &Arc<RuleSet>) {
        let Some(known) = whole.remote().known.lock().clone() else { return };
        let left = known.remaining.iter().map(|remaining| self.group.part(*remaining));
        let gone = part.rules().iter().zip(left).map(|(rule, left)| rule.limit.saturating_sub(left));
        self.store.seed(part, gone, known.at);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::limit::dimension::{Limit, Limits};
    use crate::limit::rule::Scope;

    const NOON: Instant64 = Instant64::from_secs(20_000 * 86_400 + 43_200);

    fn plan() -> Plan {
        let limit = |limit| Some(Limit { limit, shadow: false });
        let limits = Limits { requests_per_minute: limit(60), tokens_per_day: limit(10_000), ..Limits::default() };
        [&Arc::new(RuleSet::new(Scope::Key, "alice", &limits))].into_iter().collect()
    }

    fn admitted(outage: &Outage, plan: &Plan, now: Instant64) -> usize {
        let estimate = Estimate { prompt: 1, completion: 0, guessed: false };
        (0..100).filter(|_| matches!(outage.reserve(plan, estimate, now), Verdicts::Admitted { .. })).count()
    }

    #[test]
    fn a_scope_never_seen_grants_its_part_of_the_limit() {
        assert_eq!(admitted(&Outage::new(Group::unseen(4)), &plan(), NOON), 15);
        assert_eq!(admitted(&Outage::new(Group::unseen(1)), &plan(), NOON), 60);
    }

    #[test]
    fn what_does_not_divide_goes_to_the_first_ones_and_all_of_it_is_granted_once() {
        for (n, size) in [(0, 3), (1, 3), (2, 3), (7, 3), (9, 3), (10, 4), (3, 7)] {
            let parts: Vec<u64> = (0..size).map(|before| Group::new(size, before).part(n)).collect();
            assert_eq!(parts.iter().sum::<u64>(), n, "{n} over {size}: {parts:?}");
            assert!(parts.is_sorted_by(|a, b| a >= b) && parts[0] - parts.last().unwrap() <= 1, "{parts:?}");
            assert_eq!(Group::unseen(size).part(n), n / size);
        }
        let one_each = Limits { requests_per_minute: Some(Limit { limit: 2, shadow: false }), ..Limits::default() };
        let plan: Plan = [&Arc::new(RuleSet::new(Scope::Key, "a", &one_each))].into_iter().collect();
        let granted = [0, 1, 2].map(|before| admitted(&Outage::new(Group::new(3, before)), &plan, NOON));
        assert_eq!(granted, [1, 1, 0]);
    }

    #[test]
    fn of_what_was_left_every_gateway_grants_a_part_and_later_its_part_of_the_limit() {
        let (plan, store) = (plan(), MemoryStore::new(None));
        let estimate = Estimate { prompt: 100, completion: 0, guessed: false };
        for _ in 0..39 {
            store.reserve(&plan, estimate, NOON);
        }
        remember(&store.query(&plan, NOON), NOON);
        let outage = Outage::new(Group::unseen(2));
        let later = NOON.plus(Duration::from_secs(30));
        assert_eq!(admitted(&outage, &plan, later), 10);
        let day = outage.query(&plan, later).iter().nth(1).map(|s| (s.rule().limit, s.remaining()));
        assert_eq!(day, Some((5_000, 3_040)));
        // What was used before the outage leaves the window; the ten of our own do not yet.
        assert_eq!(admitted(&outage, &plan, NOON.plus(Duration::from_secs(60))), 20);
    }

    #[test]
    fn an_open_call_of_the_outage_gives_back_what_it_did_not_use() {
        let (plan, outage) = (plan(), Outage::new(Group::unseen(1)));
        let estimate = Estimate { prompt: 100, completion: 9_900, guessed: false };
        let Verdicts::Admitted { id, .. } = outage.reserve(&plan, estimate, NOON) else { panic!("refused") };
        assert_eq!(admitted(&outage, &plan, NOON), 0);
        outage.settle(id, 9_990, NOON);
        assert_eq!(admitted(&outage, &plan, NOON), 10);
    }
}
