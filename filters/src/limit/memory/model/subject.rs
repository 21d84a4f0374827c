//! What the model is compared with: anything that keeps counters.

use super::*;

/// A store under test.
pub(in crate::limit) trait Subject {
    fn reserve(&self, plan: &Plan, estimate: Estimate, now: Instant64) -> Verdicts;
    fn settle(&self, id: LeaseId, tokens: u64, now: Instant64) -> Settled;
    fn renew(&self, id: LeaseId, progress: u64, now: Instant64) -> Renewed;
    fn query(&self, plan: &Plan, now: Instant64) -> Standings;
    fn reset(&self, id: &ScopeId, now: Instant64);
    fn sweep(&self, now: Instant64);
    /// How long a lease lives, in microseconds.
    fn ttl(&self) -> u64;
}

impl Subject for MemoryStore {
    fn reserve(&self, plan: &Plan, estimate: Estimate, now: Instant64) -> Verdicts {
        Self::reserve(self, plan, estimate, now)
    }

    fn settle(&self, id: LeaseId, tokens: u64, now: Instant64) -> Settled {
        Self::settle(self, id, tokens, now)
    }

    fn renew(&self, id: LeaseId, progress: u64, now: Instant64) -> Renewed {
        Self::renew(self, id, progress, now)
    }

    fn query(&self, plan: &Plan, now: Instant64) -> Standings {
        Self::query(self, plan, now)
    }

    fn reset(&self, id: &ScopeId, now: Instant64) {
        Self::reset(self, id, now);
    }

    fn sweep(&self, now: Instant64) {
        Self::sweep(self, now);
    }

    fn ttl(&self) -> u64 {
        TTL
    }
}
