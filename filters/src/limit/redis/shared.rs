//! The ledger that several gateways share: one question to the store before a call, one word to it after, and a plan for
//! the time when it is away.
//!
//! Open calls are remembered here as well: so their leases can be renewed, and made again in a store that lost its data.
//! What was admitted without the store, and is over when it returns, is summed per plan and pushed.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use tokio::sync::Notify;

use super::link::Link;
use super::share::{Outage, remember};
use super::spent::Spent;
use super::{Asked, Commands, Decided, Ended};
use crate::error::{GatewayError, Refusal};
use crate::limit::bucket::{Draw, Drawn, Grant};
use crate::limit::clock::{Clock, Instant64, SystemClock};
use crate::limit::memory::{LeaseId, Settled, Verdicts, clamp};
use crate::limit::reservation::Estimate;
use crate::limit::rule::{Plan, ScopeId, WhenDown};
use crate::limit::standing::Standings;
use crate::limit::watch::Watch;
use crate::store::Address;

mod keep;
mod refused;

use refused::Refusals;

/// Settlements that wait for the store at most; more than that, and leases are left to expire.
const QUEUE: usize = 65_536;
/// Settlements in one question to the store: as many as keep it for a fraction of a reservation's budget.
const BATCH: usize = 16;
/// How long anything may take that no call waits for.
const PATIENCE: Duration = Duration::from_millis(250);
const SHARDS: usize = 16;

/// Where the counters of several gateways are.
#[derive(Debug, Clone)]
pub struct RedisOptions {
    /// Where it is.
    pub address: Address,
    /// Longest wait for an answer that a call waits for.
    pub timeout: Duration,
    /// What happens to calls while the store is away.
    pub when_down: WhenDown,
    /// Number of gateways, as long as they have not seen each other.
    pub replicas: u32,
}

/// Where an open call is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Place {
    /// In the store.
    There,
    /// Here, as the store was away.
    Here,
    /// Nowhere: no rule binds it, or it is over.
    Nowhere,
}

/// An open call.
#[derive(Debug)]
pub(in crate::limit) struct Live {
    id: LeaseId,
    plan: Plan,
    /// When it was admitted, by the server's clock.
    at: u64,
    tokens: u64,
    /// What to charge if nobody settles it; grows with the answer.
    progress: AtomicU64,
    /// How much of that the store was told, and when.
    told: AtomicU64,
    told_at: AtomicU64,
    place: AtomicU8,
    /// In which life of the store's data it was counted there; 0 is not known.
    epoch: AtomicU64,
    /// Its lease in the outage in which it began.
    outage: Option<(Arc<Outage>, LeaseId)>,
}

impl Live {
    fn new(id: LeaseId, plan: &Plan, at: u64, (tokens, charge): (u64, u64), place: Place) -> Self {
        Self {
            id,
            plan: plan.clone(),
            at,
            tokens,
            progress: AtomicU64::new(charge),
            told: AtomicU64::new(charge),
            told_at: AtomicU64::new(0),
            place: AtomicU8::new(place as u8),
            epoch: AtomicU64::new(0),
            outage: None,
        }
    }

    /// What the call used so far.
    pub(in crate::limit) fn progress(&self, tokens: u64) {
        self.progress.fetch_max(tokens, Ordering::Relaxed);
    }

    fn is(&self, place: Place) -> bool {
        self.place.load(Ordering::Acquire) == place as u8
    }

    fn moved(&self, from: Place, to: Place) -> bool {
        self.place.compare_exchange(from as u8, to as u8, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }
}

/// A call that ended and is to be charged in the store.
#[derive(Debug, Clone)]
struct Queued {
    live: Arc<Live>,
    tokens: u64,
    /// Whether it was a call at all, and not a question whose answer never came.
    was_call: bool,
}

/// What the ledger says of a call.
pub(in crate::limit) enum Answer {
    Admitted { live: Arc<Live>, reserved: u64, standings: Standings },
    Refused(Refusal, Standings),
}

pub(in crate::limit) struct Shared {
    link: Link,
    clock: SystemClock,
    when_down: WhenDown,
    ids: AtomicU64,
    live: [Mutex<HashMap<u64, Arc<Live>>>; SHARDS],
    open: AtomicUsize,
    ended: Mutex<VecDeque<Queued>>,
    wake: Notify,
    /// Held by whoever settles leases or makes them again: a lease must not be made after it was settled.
    turn: tokio::sync::Mutex<()>,
    spent: Mutex<HashMap<u64, Spent>>,
    /// Taken out of `spent`, each with the mark under which it is pushed until that succeeds.
    pushing: tokio::sync::Mutex<Vec<(u64, Spent)>>,
    refused: Refusals,
    outage: ArcSwap<Outage>,
    lost: AtomicU64,
}

impl Shared {
    /// Connects, and looks after the connection from then on. A store that is away now may come later.
    pub(in crate::limit) async fn start(options: &RedisOptions, watch: Arc<dyn Watch>) -> Arc<Self> {
        let commands = Commands::new(rand::random());
        let link = Link::new(options.address.clone(), commands, options.timeout, options.replicas, watch);
        let shared = Arc::new(Self {
            outage: ArcSwap::from_pointee(Outage::new(link.group())),
            link,
            clock: SystemClock::new(),
            when_down: options.when_down,
            ids: AtomicU64::new(1),
            live: std::array::from_fn(|_| Mutex::default()),
            open: AtomicUsize::new(0),
            ended: Mutex::default(),
            wake: Notify::new(),
            turn: tokio::sync::Mutex::default(),
            spent: Mutex::default(),
            pushing: tokio::sync::Mutex::default(),
            refused: Refusals::default(),
            lost: AtomicU64::new(0),
        });
        keep::start(&shared).await;
        shared
    }

    fn now(&self) -> Instant64 {
        self.clock.now()
    }

    pub(in crate::limit) async fn reserve(&self, plan: &Plan, estimate: Estimate) -> Result<Answer, GatewayError> {
        let tokens = clamp(plan, estimate);
        let charge = estimate.prompt.min(tokens);
        let id = LeaseId(self.ids.fetch_add(1, Ordering::Relaxed));
        if plan.is_empty() {
            let live = Live::new(id, plan, self.link.now(), (tokens, charge), Place::Nowhere);
            return Ok(self.enter(live, tokens, Standings::default()));
        }
        if let Some((refusal, standings)) = self.refused.find(plan, tokens, Instant::now()) {
            self.link.watch.refused_again();
            return Ok(Answer::Refused(refusal, standings));
        }
        if self.link.breaker.is_open() {
            return self.away(id, plan, estimate);
        }
        let live = Live::new(id, plan, self.link.now(), (tokens, charge), Place::There);
        live.epoch.store(self.link.epoch(), Ordering::Release);
        let mut asking = Asking { shared: self, live: Some(live) };
        let asked = Asked { id, plan, tokens, charge, admitted: false, at: self.link.deadline() };
        let asked = &asked;
        let answer = self.link.ask("reserve", self.link.budget, |commands, connection| async move {
            commands.reserve(&connection, asked).await
        });
        match answer.await {
            Some(Decided::Admitted(standings)) => {
                remember(&standings, self.now());
                let live = asking
                    .live
                    .take()
                    .unwrap_or_else(|| Live::new(id, plan, self.link.now(), (tokens, charge), Place::There));
                Ok(self.enter(live, tokens, standings))
            }
            Some(Decided::Refused(refusal, standings)) => {
                asking.live = None;
                remember(&standings, self.now());
                self.refused.note(tokens, &refusal, &standings, Instant::now());
                Ok(Answer::Refused(refusal, standings))
            }
            Some(Decided::Late | Decided::Known) => {
                asking.live = None;
                self.link.breaker.failed();
                self.away(id, plan, estimate)
            }
            None => {
                // It may have been counted all the same.
                drop(asking);
                self.away(id, plan, estimate)
            }
        }
    }

    /// Decides without the store.
    fn away(&self, id: LeaseId, plan: &Plan, estimate: Estimate) -> Result<Answer, GatewayError> {
        let tokens = clamp(plan, estimate);
        let mut live = Live::new(id, plan, self.link.now(), (tokens, estimate.prompt.min(tokens)), Place::Here);
        match plan.when_down().unwrap_or(self.when_down) {
            WhenDown::Closed => Err(GatewayError::StoreUnavailable),
            WhenDown::Open => Ok(self.enter(live, tokens, Standings::default())),
            WhenDown::Share => {
                let outage = self.outage.load_full();
                match outage.reserve(plan, estimate, self.now()) {
                    Verdicts::Admitted { id, reserved, standings } => {
                        live.tokens = reserved;
                        live.outage = Some((outage, id));
                        Ok(self.enter(live, reserved, standings))
                    }
                    Verdicts::Refused { refusal, standings } => Ok(Answer::Refused(refusal, standings)),
                }
            }
        }
    }

    #[allow(clippy::cast_possible_truncation, reason = "only the bits below SHARDS are wanted")]
    fn shard(&self, id: LeaseId) -> Option<&Mutex<HashMap<u64, Arc<Live>>>> {
        self.live.get(id.0 as usize % SHARDS)
    }

    fn enter(&self, live: Live, reserved: u64, standings: Standings) -> Answer {
        let live = Arc::new(live);
        self.open.fetch_add(1, Ordering::AcqRel);
        if let Some(shard) = self.shard(live.id).filter(|_| !live.is(Place::Nowhere)) {
            shard.lock().insert(live.id.0, Arc::clone(&live));
        }
        Answer::Admitted { live, reserved, standings }
    }

    /// Charges what a call used, soon; never waits.
    pub(in crate::limit) fn settle(&self, live: &Arc<Live>, tokens: u64) {
        self.open.fetch_sub(1, Ordering::AcqRel);
        if let Some(shard) = self.shard(live.id) {
            shard.lock().remove(&live.id.0);
        }
        let place = live.place.swap(Place::Nowhere as u8, Ordering::AcqRel);
        if place == Place::Here as u8 {
            if let Some((outage, id)) = &live.outage {
                outage.settle(*id, tokens, self.now());
            }
            self.spend(live, tokens);
        } else if place == Place::There as u8 {
            self.end(Queued { live: Arc::clone(live), tokens, was_call: true });
        }
    }

    fn spend(&self, live: &Live, tokens: u64) {
        let mut spent = self.spent.lock();
        spent.entry(live.plan.hash_value()).or_insert_with(|| Spent::new(&live.plan)).add(live.at, tokens);
    }

    fn end(&self, queued: Queued) {
        let mut ended = self.ended.lock();
        if ended.len() >= QUEUE {
            drop(ended);
            // Its lease expires and is charged at what the store was told last.
            let told = queued.live.told.load(Ordering::Relaxed);
            self.lost.fetch_add(queued.tokens.saturating_sub(told), Ordering::AcqRel);
            return;
        }
        ended.push_back(queued);
        drop(ended);
        self.wake.notify_one();
    }

    /// Settles some of the calls that ended. False if there are none, or the store did not answer.
    async fn settle_some(&self) -> bool {
        let _turn = self.turn.lock().await;
        let batch: Vec<Queued> = {
            let mut ended = self.ended.lock();
            let most = ended.len().min(BATCH);
            ended.drain(..most).collect()
        };
        if batch.is_empty() {
            return false;
        }
        let ended = |queued: &Queued| Ended {
            id: queued.live.id,
            tokens: queued.was_call.then_some(queued.tokens),
            epoch: queued.live.epoch.load(Ordering::Acquire),
        };
        let list: Vec<Ended> = batch.iter().map(ended).collect();
        let list = &list;
        let answer = self
            .link
            .ask("settle", PATIENCE, |commands, connection| async move { commands.settle(&connection, list).await });
        let Some((fates, lost)) = answer.await else {
            let mut ended = self.ended.lock();
            batch.into_iter().rev().for_each(|queued| ended.push_front(queued));
            return false;
        };
        self.lost.fetch_add(lost, Ordering::AcqRel);
        for (queued, fate) in batch.iter().zip(fates) {
            if fate == Settled::Lost && queued.was_call {
                self.spend(&queued.live, queued.tokens);
            }
            self.refused.forget(&queued.live.plan);
        }
        true
    }

    pub(in crate::limit) async fn query(&self, plan: &Plan) -> Result<Standings, GatewayError> {
        if !self.link.breaker.is_open() {
            let answer = self.link.ask("query", self.link.budget, |commands, connection| async move {
                commands.query(&connection, plan).await
            });
            if let Some(standings) = answer.await {
                return Ok(standings);
            }
        }
        match plan.when_down().unwrap_or(self.when_down) {
            WhenDown::Closed => Err(GatewayError::StoreUnavailable),
            WhenDown::Open | WhenDown::Share => Ok(self.outage.load().query(plan, self.now())),
        }
    }

    /// Draws from what the provider of an upstream grants; `None` if the store is away.
    pub(in crate::limit) async fn draw(&self, upstream: &str, grant: Grant, draw: &Draw) -> Option<(Drawn, [i64; 2])> {
        if self.link.breaker.is_open() {
            return None;
        }
        let ask =
            |commands, connection| async move { Commands::draw(commands, &connection, upstream, grant, draw).await };
        self.link.ask("draw", self.link.budget, ask).await
    }

    /// How many gateways were alive when the store was last heard of.
    pub(in crate::limit) fn gateways(&self) -> u64 {
        self.link.group().size()
    }

    pub(in crate::limit) async fn reset(&self, id: &ScopeId) -> Result<(), GatewayError> {
        let answer = self
            .link
            .ask("reset", PATIENCE, |commands, connection| async move { commands.reset(&connection, id).await });
        let done = answer.await;
        self.refused.clear();
        done.ok_or(GatewayError::StoreUnavailable)
    }

    pub(in crate::limit) fn sweep(&self) {
        self.outage.load().sweep(self.now());
    }

    pub(in crate::limit) fn open(&self) -> usize {
        self.open.load(Ordering::Acquire)
    }

    pub(in crate::limit) fn lost_tokens(&self) -> u64 {
        self.lost.load(Ordering::Acquire)
    }

    /// Waits until what ended is charged, at most so long.
    pub(in crate::limit) async fn flush(&self, patience: Duration) {
        let charged = async {
            while !self.link.breaker.is_open() && !self.ended.lock().is_empty() {
                if !self.settle_some().await {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            }
            let _turn = self.turn.lock().await;
        };
        let _ = tokio::time::timeout(patience, charged).await;
    }
}

/// A question that is on its way. If nobody waits for the answer any more, or it does not come, what it may have counted is
/// given back.
struct Asking<'a> {
    shared: &'a Shared,
    live: Option<Live>,
}

impl Drop for Asking<'_> {
    fn drop(&mut self) {
        if let Some(live) = self.live.take() {
            live.place.store(Place::Nowhere as u8, Ordering::Release);
            self.shared.end(Queued { live: Arc::new(live), tokens: 0, was_call: false });
        }
    }
}

#[cfg(test)]
mod tests;
