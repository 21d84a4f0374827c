//! What goes on in the background: the connection, heartbeats, renewals, settlements, and the way back after an outage.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use super::{Asked, Live, Outage, PATIENCE, Place, Shared};
use crate::limit::memory::{LeaseId, Renewed};

/// Between two heartbeats.
const BEAT: Duration = Duration::from_secs(1);
/// Between two looks at a store that is away, 20 % more or less.
const PROBE_MS: u64 = 200;
/// Looks that have to succeed before the store is back, and the pause between them.
const LOOKS: u32 = 3;
const LOOK: Duration = Duration::from_millis(20);
/// Heartbeats between two renewals: a killed gateway's calls are charged as of so long before, at the most.
const RENEW_EVERY: u64 = 4;
/// Seconds after which a lease is renewed although its call has used nothing more.
const IDLE_RENEW: u64 = 16;
/// Leases in one renewal.
const RENEWED: usize = 256;
/// After an outage others may not have renewed yet: for so long nothing is taken to be expired.
const MERCY: Duration = Duration::from_secs(55);

struct Keeper {
    shared: Weak<Shared>,
    looks: u32,
    beats: u64,
    away_since: Option<Instant>,
    mercy_until: Option<Instant>,
    complained: Option<Instant>,
}

/// Connects if the store is there, and leaves two tasks behind that end with the ledger.
pub(super) async fn start(shared: &Arc<Shared>) {
    let mut keeper = Keeper {
        shared: Arc::downgrade(shared),
        looks: LOOKS,
        beats: 0,
        away_since: None,
        mercy_until: None,
        complained: None,
    };
    let pause = keeper.turn(shared).await;
    tokio::spawn(async move {
        tokio::time::sleep(pause).await;
        while let Some(shared) = keeper.shared.upgrade() {
            let pause = keeper.turn(&shared).await;
            drop(shared);
            tokio::time::sleep(pause).await;
        }
    });
    tokio::spawn(settle(Arc::downgrade(shared)));
}

async fn settle(shared: Weak<Shared>) {
    while let Some(shared) = shared.upgrade() {
        let _ = tokio::time::timeout(BEAT, shared.wake.notified()).await;
        while !shared.link.breaker.is_open() && shared.settle_some().await {}
    }
}

impl Keeper {
    /// One step; says how long to wait for the next.
    async fn turn(&mut self, shared: &Shared) -> Duration {
        let open = shared.link.breaker.is_open();
        if open && self.away_since.is_none() {
            self.away_since = Some(Instant::now());
        }
        if let Err(why) = shared.link.probe().await {
            self.looks = 0;
            shared.link.breaker.trip();
            shared.link.watch.set_store_up(false);
            self.complain(&why);
            return Duration::from_millis(rand::random_range(PROBE_MS * 8 / 10..=PROBE_MS * 12 / 10));
        }
        if open {
            self.looks += 1;
            if self.looks < LOOKS {
                return LOOK;
            }
            return self.come_back(shared).await;
        }
        shared.link.breaker.tick();
        self.beats += 1;
        self.work(shared).await;
        BEAT
    }

    fn complain(&mut self, why: &str) {
        let now = Instant::now();
        if self.complained.is_none_or(|last| now.duration_since(last) > Duration::from_secs(10)) {
            tracing::warn!(why, "the limit store is away");
            self.complained = Some(now);
        }
    }

    /// Tells the store all that happened meanwhile, then lets calls reach it again.
    async fn come_back(&mut self, shared: &Shared) -> Duration {
        if !shared.reconcile(true).await {
            self.looks = 0;
            return LOOK;
        }
        shared.outage.store(Arc::new(Outage::new(shared.link.group())));
        shared.link.breaker.close();
        shared.link.watch.set_store_up(true);
        // What was admitted between the last look and this moment.
        shared.reconcile(false).await;
        let away = self.away_since.take().map(|since| since.elapsed()).unwrap_or_default();
        if away > MERCY / 5 {
            self.mercy_until = Some(Instant::now() + MERCY);
        }
        self.complained = None;
        tracing::info!(?away, gateways = shared.link.group().size(), "the limit store is there");
        BEAT
    }

    async fn work(&mut self, shared: &Shared) {
        let outage = shared.outage.load_full();
        if outage.group() != shared.link.group() || outage.is_touched() {
            shared.outage.store(Arc::new(Outage::new(shared.link.group())));
        }
        if !shared.reconcile(self.beats.is_multiple_of(RENEW_EVERY)).await {
            return;
        }
        if self.mercy_until.is_none_or(|until| Instant::now() >= until) {
            let swept = shared
                .link
                .ask("sweep", PATIENCE, |commands, connection| async move { commands.sweep(&connection).await })
                .await;
            if let Some((charged, lost)) = swept {
                shared.lost.fetch_add(lost, Ordering::AcqRel);
                if charged > 0 {
                    tracing::info!(charged, "calls that nobody ended were charged at their last known progress");
                }
            }
        }
    }
}

impl Shared {
    /// Makes the store agree with what is known here. False if it did not answer.
    async fn reconcile(&self, renew: bool) -> bool {
        while !self.ended.lock().is_empty() {
            if !self.settle_some().await && !self.ended.lock().is_empty() {
                return false;
            }
        }
        for live in self.living(|live| live.is(Place::Here)) {
            if live.moved(Place::Here, Place::There) && !self.restore(&live).await {
                return false;
            }
        }
        if renew && !self.renew().await {
            return false;
        }
        self.push().await
    }

    fn living(&self, wanted: impl Fn(&Live) -> bool) -> Vec<Arc<Live>> {
        let mut all = Vec::new();
        for shard in &self.live {
            all.extend(shard.lock().values().filter(|live| wanted(live)).cloned());
        }
        all
    }

    /// Makes the lease of an open call in a store that does not have it.
    async fn restore(&self, live: &Live) -> bool {
        let _turn = self.turn.lock().await;
        if live.is(Place::Nowhere) {
            return true;
        }
        let charge = live.progress.load(Ordering::Relaxed);
        let (id, plan, tokens, at) = (live.id, &live.plan, live.tokens, live.at);
        let asked = Asked { id, plan, tokens, charge, admitted: true, at };
        let asked = &asked;
        let answer = self
            .link
            .ask("restore", PATIENCE, |commands, connection| async move { commands.reserve(&connection, asked).await });
        let made = answer.await.is_some();
        if made {
            live.epoch.store(self.link.epoch(), Ordering::Release);
        }
        made
    }

    /// Renews the leases of open calls that used more, or were not renewed for long.
    async fn renew(&self) -> bool {
        let second = self.now().micros() / 1_000_000;
        let due = self.living(|live| {
            live.is(Place::There)
                && (live.progress.load(Ordering::Relaxed) > live.told.load(Ordering::Relaxed)
                    || second >= live.told_at.load(Ordering::Relaxed).saturating_add(IDLE_RENEW))
        });
        for part in due.chunks(RENEWED) {
            let list: Vec<(LeaseId, u64)> =
                part.iter().map(|live| (live.id, live.progress.load(Ordering::Relaxed))).collect();
            let list = &list;
            let answer = self
                .link
                .ask("renew", PATIENCE, |commands, connection| async move { commands.renew(&connection, list).await });
            let Some(renewed) = answer.await else { return false };
            for ((live, (_, told)), renewed) in part.iter().zip(list).zip(renewed) {
                live.told.store(*told, Ordering::Relaxed);
                live.told_at.store(second, Ordering::Relaxed);
                // The store has lost it, else it could not be gone: only we settle it.
                if renewed == Renewed::Unknown && !self.restore(live).await {
                    return false;
                }
            }
        }
        true
    }

    /// Pushes what was spent without the store.
    async fn push(&self) -> bool {
        let mut pushing = self.pushing.lock().await;
        pushing.extend(self.spent.lock().drain().map(|(_, spent)| (rand::random::<u64>(), spent)));
        while let Some((mark, spent)) = pushing.last() {
            let amounts = &spent.amounts();
            let answer = self.link.ask("push", PATIENCE, |commands, connection| async move {
                commands.spend(&connection, *mark, &spent.plan, amounts).await
            });
            let Some(lost) = answer.await else { return false };
            self.lost.fetch_add(lost, Ordering::AcqRel);
            pushing.pop();
        }
        true
    }
}
