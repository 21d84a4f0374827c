//! The ledger: one reservation per call, settled exactly once whatever becomes of the call.

use std::sync::Arc;
use std::time::Duration;

use super::bucket::{Bucket, Draw, Drawn, Grant};
use super::clock::{Clock, Instant64, SystemClock};
use super::dimension::Unit;
use super::guess::Guesses;
use super::memory::{LeaseId, MemoryStore, Verdicts};
use super::redis::shared::{Answer, Live, RedisOptions, Shared};
use super::rule::{Plan, Rule, ScopeId};
use super::standing::Standings;
use super::watch::Watch;
use crate::error::{GatewayError, Refusal, Result};
use crate::usage::Usage;

/// What a call will probably use, in tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Estimate {
    /// The prompt, by the estimator. Reserved whole, and charged if the call is dispatched and nothing better is known.
    pub prompt: u64,
    /// The answer: `max_tokens` × `n` as the client said, or a learned guess ([`Guesses::get`]).
    pub completion: u64,
    /// Whether `completion` is a guess. A guess is clamped, so that it alone never refuses a call for good; what the client
    /// asked for is not, and a call that asks for more than its limit is refused.
    pub guessed: bool,
}

/// Where the counters are.
enum Store {
    /// In this process.
    Memory(MemoryStore),
    /// In Redis, for several gateways.
    Shared(Arc<Shared>),
}

/// By what a reservation is settled.
#[derive(Debug)]
enum Hold {
    Lease(LeaseId),
    Live(Arc<Live>),
}

struct Inner {
    store: Store,
    clock: Arc<dyn Clock>,
    guesses: Guesses,
}

/// All limits of the gateway. Cloning it is cheap; every clone is the same ledger.
#[derive(Clone)]
pub struct Ledger(Arc<Inner>);

impl std::fmt::Debug for Ledger {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ledger").field("inflight", &self.inflight()).finish_non_exhaustive()
    }
}

/// What the ledger says of a call.
#[derive(Debug)]
pub enum Decision {
    /// Go on; the reservation has to be settled.
    Admitted(Reservation),
    /// Answer 429: which rule bound, and how all of them stand. No counter changed.
    Refused(Refusal, Standings),
}

impl Ledger {
    /// A ledger in memory with the system's clock: what a single gateway uses.
    pub fn in_memory() -> Self {
        Self::with_clock(Arc::new(SystemClock::new()))
    }

    /// A ledger in memory with a clock of one's own.
    ///
    /// Its leases do not expire: a [`Reservation`] cannot be lost without being settled while the process lives, and
    /// with the process the counters are gone too.
    pub fn with_clock(clock: Arc<dyn Clock>) -> Self {
        let store = Store::Memory(MemoryStore::new(None));
        Self(Arc::new(Inner { store, clock, guesses: Guesses::default() }))
    }

    /// A ledger that several gateways share. Must be called in the tokio runtime that is to look after the connection. A
    /// store that is away at the start may come later; until then calls are decided as `when_down` says.
    pub async fn in_redis(options: &RedisOptions, watch: Arc<dyn Watch>) -> Self {
        let store = Store::Shared(Shared::start(options, watch).await);
        Self(Arc::new(Inner { store, clock: Arc::new(SystemClock::new()), guesses: Guesses::default() }))
    }

    /// Whether the counters are shared by several gateways.
    pub fn is_shared(&self) -> bool {
        matches!(self.0.store, Store::Shared(_))
    }

    /// Draws from what the provider of an upstream grants to all gateways together; with it this gateway's part of what is
    /// left, `now` being its own time. `None` if the store is away, or in memory.
    pub async fn draw(&self, upstream: &str, grant: Grant, draw: &Draw, now: i64) -> Option<(Drawn, Bucket)> {
        let Store::Shared(shared) = &self.0.store else { return None };
        let (drawn, levels) = shared.draw(upstream, grant, draw).await?;
        Some((drawn, Bucket::part(levels, shared.gateways(), now)))
    }

    /// Gateways that share the counters, this one included.
    pub fn gateways(&self) -> u64 {
        match &self.0.store {
            Store::Memory(_) => 1,
            Store::Shared(shared) => shared.gateways(),
        }
    }

    /// Waits until the calls that ended are charged, at most so long: before the process ends.
    pub async fn flush(&self, patience: Duration) {
        if let Store::Shared(shared) = &self.0.store {
            shared.flush(patience).await;
        }
    }

    /// Decides a call over all rules of `plan` in one step, before its first attempt.
    ///
    /// # Errors
    /// [`GatewayError::StoreUnavailable`] if the store is away and the policy is to refuse then; never in memory.
    pub async fn reserve(&self, plan: &Plan, estimate: Estimate) -> Result<Decision, GatewayError> {
        match &self.0.store {
            Store::Memory(memory) => Ok(match memory.reserve(plan, estimate, self.now()) {
                Verdicts::Admitted { id, reserved, standings } => {
                    Decision::Admitted(self.hold(Hold::Lease(id), estimate.prompt, reserved, standings))
                }
                Verdicts::Refused { refusal, standings } => Decision::Refused(refusal, standings),
            }),
            Store::Shared(shared) => Ok(match shared.reserve(plan, estimate).await? {
                Answer::Admitted { live, reserved, standings } => {
                    Decision::Admitted(self.hold(Hold::Live(live), estimate.prompt, reserved, standings))
                }
                Answer::Refused(refusal, standings) => Decision::Refused(refusal, standings),
            }),
        }
    }

    fn hold(&self, hold: Hold, prompt: u64, reserved: u64, standings: Standings) -> Reservation {
        Reservation { ledger: self.clone(), hold: Some(hold), prompt, reserved, known: Known::Nothing, standings }
    }

    /// How the rules of `plan` stand, without consuming anything.
    ///
    /// # Errors
    /// [`GatewayError::StoreUnavailable`] if the store is away; never in memory.
    pub async fn query(&self, plan: &Plan) -> Result<Standings, GatewayError> {
        match &self.0.store {
            Store::Memory(memory) => Ok(memory.query(plan, self.now())),
            Store::Shared(shared) => shared.query(plan).await,
        }
    }

    /// Tokens that the tightest rule of `plan` has left, as far as that is known without asking anybody; `None` without such a rule.
    pub fn room(&self, plan: &Plan) -> Option<u64> {
        let binds = |rule: &Rule| !rule.shadow && rule.dimension.unit() == Unit::Tokens;
        if !plan.rules().any(|(_, rule)| binds(rule)) {
            return None;
        }
        match &self.0.store {
            Store::Memory(memory) => {
                let standings = memory.query(plan, self.now());
                standings.iter().filter(|standing| binds(standing.rule())).map(|standing| standing.remaining()).min()
            }
            Store::Shared(_) => plan
                .sets()
                .iter()
                .filter_map(|set| {
                    let known = set.remote().known.lock();
                    let left = set.rules().iter().zip(&known.as_ref()?.remaining);
                    left.filter(|(rule, _)| binds(rule)).map(|(_, left)| *left).min()
                })
                .min(),
        }
    }

    /// Forgets what a scope used; open calls stay open.
    ///
    /// # Errors
    /// [`GatewayError::StoreUnavailable`] if the store is away; never in memory.
    pub async fn reset(&self, id: &ScopeId) -> Result<(), GatewayError> {
        match &self.0.store {
            Store::Memory(memory) => {
                memory.reset(id, self.now());
                Ok(())
            }
            Store::Shared(shared) => shared.reset(id).await,
        }
    }

    /// Drops state that lies idle. To be called about every [`Ledger::SWEEP`].
    pub fn sweep(&self) {
        match &self.0.store {
            Store::Memory(memory) => memory.sweep(self.now()),
            Store::Shared(shared) => shared.sweep(),
        }
    }

    /// How often [`Ledger::sweep`] wants to be called.
    pub const SWEEP: Duration = Duration::from_secs(1);

    /// Reservations that are not settled yet: `tollgate_reservations_inflight`.
    pub fn inflight(&self) -> usize {
        match &self.0.store {
            Store::Memory(memory) => memory.open(),
            Store::Shared(shared) => shared.open(),
        }
    }

    /// Tokens that could be charged to no period any more; should stay 0.
    pub fn lost_tokens(&self) -> u64 {
        match &self.0.store {
            Store::Memory(memory) => memory.lost_tokens(),
            Store::Shared(shared) => shared.lost_tokens(),
        }
    }

    /// How long answers have been, for the estimates of calls that set no `max_tokens`.
    pub fn guesses(&self) -> &Guesses {
        &self.0.guesses
    }

    fn now(&self) -> Instant64 {
        self.0.clock.now()
    }

    fn settle(&self, hold: &Hold, tokens: u64) {
        match (&self.0.store, hold) {
            // A few microseconds without waiting for anything but another settlement: done in place.
            (Store::Memory(memory), Hold::Lease(id)) => {
                memory.settle(*id, tokens, self.now());
            }
            (Store::Shared(shared), Hold::Live(live)) => shared.settle(live, tokens),
            // A reservation is settled in the ledger that made it.
            (Store::Memory(_), Hold::Live(_)) | (Store::Shared(_), Hold::Lease(_)) => {}
        }
    }
}

/// What is known of a call that has not been settled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Known {
    /// Nothing was sent to an upstream, or it failed before its first byte: no tokens.
    Nothing,
    /// It was sent: the prompt.
    Dispatched,
    /// Tokens were seen: so many in all.
    Seen(u64),
}

/// The right to make one call, and the duty to say what it used.
///
/// [`Reservation::settle`] consumes it; dropping it settles with what is known. So it is settled once on every way out:
/// an error, a client that left, a task that was cancelled, a panic.
#[derive(Debug)]
#[must_use = "a reservation that is dropped at once charges nothing and frees its slots"]
pub struct Reservation {
    ledger: Ledger,
    /// Taken by whatever settles first.
    hold: Option<Hold>,
    prompt: u64,
    reserved: u64,
    known: Known,
    standings: Standings,
}

impl Reservation {
    /// An attempt goes out to an upstream: from now on at least the prompt is charged.
    pub fn dispatched(&mut self) {
        if self.known == Known::Nothing {
            self.known = Known::Dispatched;
            self.tell();
        }
    }

    /// The attempt failed before its first byte: it cost no tokens. Tokens that were seen stay charged.
    pub fn failed(&mut self) {
        if self.known == Known::Dispatched {
            self.known = Known::Nothing;
        }
    }

    /// What the call used so far. An input of 0 means that it is not known yet: the estimate stands in. Never goes down.
    pub fn progress(&mut self, usage: &Usage) {
        let input = if usage.input == 0 { self.prompt } else { usage.input };
        let seen = input.saturating_add(usage.output);
        self.known = match self.known {
            Known::Seen(before) => Known::Seen(before.max(seen)),
            Known::Nothing | Known::Dispatched => Known::Seen(seen),
        };
        self.tell();
    }

    /// Charges what the call used, as the final truth; zero if it says zero. Where no usage is known, tell
    /// [`Reservation::progress`] what was counted and [`Reservation::release`] it.
    pub fn settle(mut self, usage: &Usage) {
        self.finish(usage.total());
    }

    /// Charges what is known by now and nothing more, as dropping does.
    pub fn release(self) {
        drop(self);
    }

    /// How the rules stand with this call in them, for the response headers.
    pub fn standings(&self) -> &Standings {
        &self.standings
    }

    /// Tokens reserved: the estimate, a guess in it clamped to what the limits allow at all.
    pub fn reserved(&self) -> u64 {
        self.reserved
    }

    /// What is charged if nothing more becomes known.
    const fn charge(&self) -> u64 {
        match self.known {
            Known::Nothing => 0,
            Known::Dispatched => self.prompt,
            Known::Seen(tokens) => tokens,
        }
    }

    /// Lets the shared store know of progress, in case this process is killed.
    fn tell(&self) {
        if let Some(Hold::Live(live)) = &self.hold {
            live.progress(self.charge());
        }
    }

    fn finish(&mut self, tokens: u64) {
        if let Some(hold) = self.hold.take() {
            self.ledger.settle(&hold, tokens);
        }
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.finish(self.charge());
    }
}

#[cfg(test)]
mod tests;
