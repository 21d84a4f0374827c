//! The state of scopes, in shards that are locked in one canonical order.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::{Mutex, MutexGuard};
use smallvec::SmallVec;

use super::lease::Lease;
use crate::limit::dimension::{Dimension, Unit};
use crate::limit::rule::{Plan, RuleSet, ScopeId};
use crate::limit::window::{Counter, Grant};

const SHARDS: usize = 256;
/// Shards that one sweep looks at.
const SWEPT: usize = SHARDS / 16;

/// Passes the hash through that a scope carries already.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Carried(u64);

impl Hasher for Carried {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(*byte);
        }
    }

    fn write_u64(&mut self, hash: u64) {
        self.0 = hash;
    }
}

type Shard = HashMap<ScopeId, ScopeState, BuildHasherDefault<Carried>>;

/// The counters of one scope, made when a rule first counts there.
#[derive(Debug, Default)]
pub(super) struct ScopeState {
    counters: Vec<(Dimension, Counter)>,
    /// Leases that will still be charged here; until then the state stays.
    open: usize,
    /// When the counters were reset last; what was prepaid up to then is not given back.
    reset: u64,
}

impl ScopeState {
    pub(super) fn counter(&self, dimension: Dimension) -> Option<&Counter> {
        self.counters.iter().find(|(known, _)| *known == dimension).map(|(_, counter)| counter)
    }

    /// The counter of a dimension, made if there is none yet; so it always is there.
    pub(super) fn counter_mut(&mut self, dimension: Dimension) -> Option<&mut Counter> {
        if self.counter(dimension).is_none() {
            self.counters.push((dimension, Counter::new(dimension.window())));
        }
        self.counters.iter_mut().find(|(known, _)| *known == dimension).map(|(_, counter)| counter)
    }

    /// Charges one dimension of a lease; false if its calendar period is forgotten.
    pub(super) fn charge(&mut self, dimension: Dimension, lease: &Lease, grant: Grant, tokens: u64, now: u64) -> bool {
        let before_reset = lease.admitted <= self.reset;
        let charged = if lease.expired { lease.charge } else { lease.estimate };
        let Some(counter) = self.counter_mut(dimension) else { return false };
        match (counter, dimension.unit()) {
            (Counter::Live(count), _) => {
                if !lease.expired {
                    *count = count.saturating_sub(1);
                }
            }
            (Counter::Rolling(window), Unit::Tokens) => {
                if tokens > charged {
                    window.surcharge(grant, tokens - charged, now);
                } else if !before_reset {
                    window.refund(grant, charged - tokens, now);
                }
            }
            (Counter::Calendar(calendar), Unit::Tokens) => {
                return if lease.expired {
                    calendar.correct(grant, charged, tokens)
                } else {
                    calendar.settle(grant, charged, tokens)
                };
            }
            // A request that was admitted is a request, whatever became of it.
            (Counter::Rolling(_) | Counter::Calendar(_), Unit::Requests) => {}
        }
        true
    }

    pub(super) fn close(&mut self) {
        self.open = self.open.saturating_sub(1);
    }

    pub(super) fn reset(&mut self, now: u64) {
        self.reset = now;
        self.counters.iter_mut().for_each(|(_, counter)| counter.reset());
    }

    fn idle(&self, now: u64) -> bool {
        self.open == 0 && self.counters.iter().all(|(_, counter)| counter.idle(now))
    }
}

/// All scopes.
#[derive(Debug)]
pub(super) struct ScopeTable {
    shards: Box<[Mutex<Shard>]>,
    next: AtomicUsize,
}

impl ScopeTable {
    pub(super) fn new() -> Self {
        Self { shards: (0..SHARDS).map(|_| Mutex::default()).collect(), next: AtomicUsize::new(0) }
    }

    /// Locks the shards of all scopes of a plan, in ascending order, each once.
    pub(super) fn lock(&self, plan: &Plan) -> Locked<'_> {
        let mut places: SmallVec<[usize; 4]> = plan.sets().iter().map(|set| place(set.id())).collect();
        // Lets the tests of races meet in any gap that is left between two lockings.
        #[cfg(test)]
        std::thread::yield_now();
        places.sort_unstable();
        places.dedup();
        let guards = places.into_iter().filter_map(|at| self.shards.get(at).map(|shard| (at, shard.lock())));
        Locked { guards: guards.collect() }
    }

    /// Works on one scope, if it has any state.
    pub(super) fn with(&self, id: &ScopeId, work: impl FnOnce(&mut ScopeState)) {
        if let Some(mut shard) = self.shards.get(place(id)).map(Mutex::lock)
            && let Some(scope) = shard.get_mut(id)
        {
            work(scope);
        }
    }

    /// Drops idle scopes in the next few shards.
    pub(super) fn sweep(&self, now: u64) {
        let start = self.next.fetch_add(SWEPT, Ordering::Relaxed);
        for at in start..start.saturating_add(SWEPT) {
            let Some(mut shard) = self.shards.get(at % SHARDS).map(Mutex::lock) else { continue };
            shard.retain(|_, scope| !scope.idle(now));
            // Give memory back after a flood of keys, not at every small change.
            if shard.capacity() > 64 && shard.capacity() / 8 > shard.len() {
                let kept = shard.len() * 2;
                shard.shrink_to(kept);
            }
        }
    }

    pub(super) fn len(&self) -> usize {
        self.shards.iter().map(|shard| shard.lock().len()).sum()
    }
}

/// The middle bits: the hash table inside a shard uses the lowest and the highest.
#[allow(clippy::cast_possible_truncation, reason = "only the bits below SHARDS are wanted")]
fn place(id: &ScopeId) -> usize {
    (id.hash_value() >> 32) as usize % SHARDS
}

/// The shards of one decision, locked.
pub(super) struct Locked<'a> {
    guards: SmallVec<[(usize, MutexGuard<'a, Shard>); 4]>,
}

impl Locked<'_> {
    fn shard_mut(&mut self, id: &ScopeId) -> Option<&mut Shard> {
        let at = place(id);
        self.guards.iter_mut().find(|(place, _)| *place == at).map(|(_, shard)| &mut **shard)
    }

    pub(super) fn scope(&self, id: &ScopeId) -> Option<&ScopeState> {
        let at = place(id);
        self.guards.iter().find(|(place, _)| *place == at)?.1.get(id)
    }

    pub(super) fn scope_mut(&mut self, id: &ScopeId) -> Option<&mut ScopeState> {
        self.shard_mut(id)?.get_mut(id)
    }

    /// The state of a scope for one more lease, made if there is none yet.
    pub(super) fn open(&mut self, set: &RuleSet) -> Option<&mut ScopeState> {
        let id = set.id();
        let shard = self.shard_mut(id)?;
        if !shard.contains_key(id) {
            let counters = Vec::with_capacity(set.rules().len());
            shard.insert(id.clone(), ScopeState { counters, ..ScopeState::default() });
        }
        let scope = shard.get_mut(id)?;
        scope.open = scope.open.saturating_add(1);
        Some(scope)
    }
}
