//! The counters of one process.
//!
//! Scopes live in shards, each under its own lock. A decision locks the shards of all its scopes in ascending order, so
//! that it is atomic over them and two decisions never wait for each other in a circle. Leases live in a table of their
//! own; a lease is taken out of it before it is applied, so whoever takes it out is the only one who settles it.

mod lease;
#[cfg(test)]
pub(super) mod model;
mod scope;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use smallvec::SmallVec;

use self::lease::{Lease, LeaseTable};
use self::scope::{Locked, ScopeTable};
use super::clock::Instant64;
use super::dimension::{Unit, Window};
use super::reservation::Estimate;
use super::rule::{Plan, Rule, RuleSet, ScopeId};
use super::standing::{Row, Standings};
use super::window::{Counter, Grant, Verdict};
use crate::error::{LimitKind, Refusal};

/// How long a lease that expired is remembered, so that a true figure that comes late still corrects the charge.
pub(super) const TOMBSTONE: Duration = Duration::from_secs(3_600);

/// Names one reservation in its store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct LeaseId(pub(super) u64);

/// What the store decided of a call.
#[derive(Debug)]
pub enum Verdicts {
    /// Every rule took it.
    Admitted {
        /// To renew and settle by.
        id: LeaseId,
        /// What was reserved: the estimate, a guess in it clamped to what the limits allow at all.
        reserved: u64,
        /// How the rules stand with this call in them.
        standings: Standings,
    },
    /// A rule refused it, and no counter changed.
    Refused {
        /// The rule with the longest wait.
        refusal: Refusal,
        /// How the rules stand.
        standings: Standings,
    },
}

/// What became of a settlement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Settled {
    /// Charged, now or as a correction of what was charged when the lease expired.
    Done,
    /// There is no such lease any more: it was settled before. Nothing changed.
    Duplicate,
    /// The store has lost its data since the lease was made; never in memory.
    Lost,
}

/// What became of a renewal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Renewed {
    /// The lease lives on.
    Done,
    /// It had expired and was charged; its slot is gone. It can still be settled.
    Expired,
    /// There is no such lease.
    Unknown,
}

/// Limits in memory, exact for one process.
#[derive(Debug)]
pub struct MemoryStore {
    scopes: ScopeTable,
    leases: LeaseTable,
    /// The latest time seen: a decision that read its clock before another but locked after it must not turn time back.
    latest: AtomicU64,
    ids: AtomicU64,
    open: AtomicUsize,
    lost: AtomicU64,
    ttl: Option<Duration>,
}

impl MemoryStore {
    /// A store without any state. A lease that is not renewed for `ttl` is charged at its last known progress and its
    /// slots are freed; with `None` only its owner ends it.
    pub fn new(ttl: Option<Duration>) -> Self {
        Self {
            scopes: ScopeTable::new(),
            leases: LeaseTable::new(),
            latest: AtomicU64::new(0),
            ids: AtomicU64::new(1),
            open: AtomicUsize::new(0),
            lost: AtomicU64::new(0),
            ttl,
        }
    }

    /// Decides a call over all rules of its plan, all or nothing.
    pub fn reserve(&self, plan: &Plan, estimate: Estimate, now: Instant64) -> Verdicts {
        let tokens = clamp(plan, estimate);
        let mut locked = self.scopes.lock(plan);
        let now = self.forward(now);
        let check = Check::run(plan, &locked, tokens, now);
        if let Some(refusing) = check.binding {
            let rows = rows(plan, &locked, check.over, now);
            drop(locked);
            return Verdicts::Refused {
                refusal: refusing.refusal(),
                standings: Standings::new(plan.clone(), rows).bound_by(refusing.ordinal),
            };
        }
        let grants = commit(plan, &mut locked, tokens, now);
        let rows = rows(plan, &locked, check.over, now);
        drop(locked);
        let id = LeaseId(self.ids.fetch_add(1, Ordering::Relaxed));
        self.open.fetch_add(1, Ordering::AcqRel);
        self.leases.insert(
            id,
            Lease {
                admitted: now,
                estimate: tokens,
                charge: estimate.prompt.min(tokens),
                expires: self.expiry(now),
                expired: false,
                plan: plan.clone(),
                grants,
            },
        );
        Verdicts::Admitted { id, reserved: tokens, standings: Standings::new(plan.clone(), rows) }
    }

    /// Counts what was used of a scope elsewhere, as of `at`: one amount for each of its rules.
    pub(super) fn seed(&self, set: &Arc<RuleSet>, amounts: impl Iterator<Item = u64>, at: Instant64) {
        let mut locked = self.scopes.lock(&[set].into_iter().collect());
        let Some(scope) = locked.open(set) else { return };
        for (rule, n) in set.rules().iter().zip(amounts).filter(|(_, n)| *n > 0) {
            if let Some(counter) = scope.counter_mut(rule.dimension) {
                counter.seed(n, set.zone(), at.micros());
            }
        }
    }

    /// Charges what a call really used and gives its slots back. Settling twice is settling once.
    pub fn settle(&self, id: LeaseId, tokens: u64, now: Instant64) -> Settled {
        let Some(lease) = self.leases.remove(id) else { return Settled::Duplicate };
        self.charge(&lease, tokens, now, true);
        Settled::Done
    }

    /// Tells that a call lives, and what it used so far.
    pub fn renew(&self, id: LeaseId, progress: u64, now: Instant64) -> Renewed {
        let expires = self.expiry(self.forward(now));
        self.leases.with(id, |lease| {
            if lease.expired {
                return Renewed::Expired;
            }
            lease.charge = lease.charge.max(progress);
            lease.expires = expires;
            Renewed::Done
        })
    }

    /// How the rules of a plan stand. Consumes nothing and keeps nothing.
    pub fn query(&self, plan: &Plan, now: Instant64) -> Standings {
        let locked = self.scopes.lock(plan);
        let now = self.forward(now);
        let rows = rows(plan, &locked, 0, now);
        drop(locked);
        Standings::new(plan.clone(), rows)
    }

    /// Forgets what a scope used. Calls that are open stay live and held, and are charged when they settle.
    pub fn reset(&self, id: &ScopeId, now: Instant64) {
        self.scopes.with(id, |scope| {
            let now = self.forward(now);
            scope.reset(now);
            // Whatever is admitted from here on is later than the reset, so that refunds can tell the two apart.
            self.latest.fetch_max(now.saturating_add(1), Ordering::AcqRel);
        });
    }

    /// To be called about every second: charges leases that expired, and drops a part of the scopes that lie idle, all
    /// of them within sixteen calls.
    pub fn sweep(&self, now: Instant64) {
        let now = self.forward(now);
        // The lease stays in its locked table while it is charged: a settlement meanwhile waits, and then corrects.
        self.leases.expire(now, |lease| {
            if lease.expired {
                self.close(lease);
                return false;
            }
            self.charge(lease, lease.charge, Instant64(now), false);
            lease.expired = true;
            lease.expires = Instant64(now).plus(TOMBSTONE).micros();
            true
        });
        self.scopes.sweep(now);
    }

    /// Calls admitted and neither settled nor expired.
    pub fn open(&self) -> usize {
        self.open.load(Ordering::Acquire)
    }

    /// Tokens that no counter took because the period of their admission was forgotten; stays 0 unless a call crosses
    /// two calendar periods.
    pub fn lost_tokens(&self) -> u64 {
        self.lost.load(Ordering::Acquire)
    }

    /// Scopes that have any state at the moment.
    pub fn scopes(&self) -> usize {
        self.scopes.len()
    }

    fn forward(&self, now: Instant64) -> u64 {
        self.latest.fetch_max(now.micros(), Ordering::AcqRel).max(now.micros())
    }

    fn expiry(&self, now: u64) -> u64 {
        self.ttl.map_or(u64::MAX, |ttl| Instant64(now).plus(ttl).micros())
    }

    /// Charges a lease; with `last` it also lets go of its scopes.
    fn charge(&self, lease: &Lease, tokens: u64, now: Instant64, last: bool) {
        let mut locked = self.scopes.lock(&lease.plan);
        let now = self.forward(now);
        let mut grants = lease.grants.iter();
        let mut charged = true;
        for set in lease.plan.sets() {
            // The scope is there: it stays as long as a lease refers to it.
            let Some(scope) = locked.scope_mut(set.id()) else { continue };
            for (rule, grant) in set.rules().iter().zip(grants.by_ref()) {
                charged &= scope.charge(rule.dimension, lease, *grant, tokens, now);
            }
            if last {
                scope.close();
            }
        }
        drop(locked);
        if !lease.expired {
            self.open.fetch_sub(1, Ordering::AcqRel);
        }
        if !charged {
            self.lost.fetch_add(tokens, Ordering::AcqRel);
        }
    }

    /// Lets go of the scopes of a lease that was charged and will not be corrected any more.
    fn close(&self, lease: &Lease) {
        let mut locked = self.scopes.lock(&lease.plan);
        for set in lease.plan.sets() {
            if let Some(scope) = locked.scope_mut(set.id()) {
                scope.close();
            }
        }
    }
}

/// What to reserve: at least the prompt, all that the client asked for, and of a guess no more than the tightest limit could
/// ever allow. So a small first call is not refused for the sake of a guess, and what no window can hold is refused for good.
pub(super) fn clamp(plan: &Plan, estimate: Estimate) -> u64 {
    let prompt = estimate.prompt.max(1);
    let all = prompt.saturating_add(estimate.completion);
    if !estimate.guessed {
        return all;
    }
    let tightest = plan
        .rules()
        .filter(|(_, rule)| !rule.shadow && rule.dimension.unit() == Unit::Tokens)
        .map(|(_, rule)| rule.limit)
        .min()
        .unwrap_or(u64::MAX);
    all.min(tightest).max(prompt)
}

struct Check<'a> {
    /// The refusing rule with the longest wait.
    binding: Option<Refusing<'a>>,
    /// Rules that the call goes beyond, shadows included, as bits by place.
    over: u64,
}

/// A rule that refuses.
#[derive(Clone, Copy)]
pub(super) struct Refusing<'a> {
    /// Its place in the plan.
    pub(super) ordinal: usize,
    pub(super) set: &'a RuleSet,
    pub(super) rule: &'a Rule,
    pub(super) verdict: Verdict,
}

impl Refusing<'_> {
    pub(super) fn refusal(&self) -> Refusal {
        let wait = match self.verdict {
            Verdict::Wait(micros) => Some(Duration::from_micros(micros)),
            Verdict::Fits | Verdict::Never => None,
        };
        let kind = match self.rule.dimension.window() {
            Window::Rolling(_) => LimitKind::Rate,
            Window::Day | Window::Month => LimitKind::Quota,
            Window::Live => LimitKind::Concurrency,
        };
        let scope = self.set.id().label().into_owned();
        Refusal { scope, dimension: self.rule.dimension.name(), limit: self.rule.limit, wait, kind }
    }
}

impl<'a> Check<'a> {
    fn run(plan: &'a Plan, locked: &Locked<'_>, tokens: u64, now: u64) -> Self {
        let mut check = Self { binding: None, over: 0 };
        let mut ordinal = 0;
        for set in plan.sets() {
            let scope = locked.scope(set.id());
            for rule in set.rules() {
                let n = if rule.dimension.unit() == Unit::Tokens { tokens } else { 1 };
                let verdict = match scope.and_then(|scope| scope.counter(rule.dimension)) {
                    Some(counter) => counter.check(n, rule.limit, set.zone(), now),
                    None if n > rule.limit => Verdict::Never,
                    None => Verdict::Fits,
                };
                if verdict != Verdict::Fits {
                    check.over |= bit(ordinal);
                    if !rule.shadow && check.binding.is_none_or(|worst| verdict > worst.verdict) {
                        check.binding = Some(Refusing { ordinal, set, rule, verdict });
                    }
                }
                ordinal += 1;
            }
        }
        check
    }
}

fn bit(ordinal: usize) -> u64 {
    u32::try_from(ordinal).ok().and_then(|shift| 1u64.checked_shl(shift)).unwrap_or(0)
}

fn commit(plan: &Plan, locked: &mut Locked<'_>, tokens: u64, now: u64) -> SmallVec<[Grant; 8]> {
    let mut grants = SmallVec::new();
    for set in plan.sets() {
        let Some(scope) = locked.open(set) else { continue };
        for rule in set.rules() {
            let grant = scope.counter_mut(rule.dimension).map(|counter| match rule.dimension.unit() {
                Unit::Tokens => counter.take_tokens(tokens, set.zone(), now),
                Unit::Requests => counter.take_request(set.zone(), now),
            });
            grants.push(grant.unwrap_or_default());
        }
    }
    grants
}

fn rows(plan: &Plan, locked: &Locked<'_>, over: u64, now: u64) -> SmallVec<[Row; 6]> {
    let mut rows = SmallVec::new();
    for set in plan.sets() {
        let scope = locked.scope(set.id());
        for rule in set.rules() {
            let reading = match scope.and_then(|scope| scope.counter(rule.dimension)) {
                Some(counter) => counter.reading(set.zone(), now),
                None => Counter::new(rule.dimension.window()).reading(set.zone(), now),
            };
            rows.push(Row { reading, over: over & bit(rows.len()) != 0 });
        }
    }
    rows
}

#[cfg(test)]
mod tests;
