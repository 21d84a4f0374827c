//! The connection to Redis, and when not to use it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use arc_swap::ArcSwapOption;
use parking_lot::Mutex;
use redis::RedisResult;
use redis::aio::MultiplexedConnection;

use super::share::Group;
use super::{Beat, Commands};
use crate::limit::watch::Watch;
use crate::store::{Address, Connection, is_useless};

/// How long a probe may take over a connection that is there.
const PATIENCE: Duration = Duration::from_millis(250);
/// Failures in a row after which the store counts as away.
const IN_A_ROW: u32 = 5;
/// Of so many calls within a second, half may fail.
const ENOUGH: u32 = 20;
/// A reservation that the server reads so long after its budget is not made any more: nobody waits for it.
/// Short, so that it is not made either when the word that it is void came first, over another connection.
const STALE: Duration = Duration::from_millis(100);

/// Decides from the outcome of calls whether the store is there.
#[derive(Debug, Default)]
pub(super) struct Breaker {
    open: AtomicBool,
    in_a_row: AtomicU32,
    calls: AtomicU32,
    failures: AtomicU32,
}

impl Breaker {
    pub(super) fn is_open(&self) -> bool {
        self.open.load(Ordering::Acquire)
    }

    pub(super) fn succeeded(&self) {
        self.calls.fetch_add(1, Ordering::Relaxed);
        self.in_a_row.store(0, Ordering::Relaxed);
    }

    /// Counts a failure; true if that one opened it.
    pub(super) fn failed(&self) -> bool {
        let calls = self.calls.fetch_add(1, Ordering::Relaxed).saturating_add(1);
        let failures = self.failures.fetch_add(1, Ordering::Relaxed).saturating_add(1);
        let in_a_row = self.in_a_row.fetch_add(1, Ordering::Relaxed).saturating_add(1);
        let away = in_a_row >= IN_A_ROW || (calls >= ENOUGH && failures.saturating_mul(2) >= calls);
        away && self.trip()
    }

    /// Opens at once; true if it was closed.
    pub(super) fn trip(&self) -> bool {
        !self.open.swap(true, Ordering::AcqRel)
    }

    pub(super) fn close(&self) {
        self.tick();
        self.in_a_row.store(0, Ordering::Relaxed);
        self.open.store(false, Ordering::Release);
    }

    /// A second is over.
    pub(super) fn tick(&self) {
        self.calls.store(0, Ordering::Relaxed);
        self.failures.store(0, Ordering::Relaxed);
    }
}

/// One connection, made anew when it fails.
pub(super) struct Link {
    address: Address,
    connection: ArcSwapOption<Connection>,
    pub(super) breaker: Breaker,
    pub(super) commands: Commands,
    pub(super) budget: Duration,
    pub(super) watch: Arc<dyn Watch>,
    started: Instant,
    /// Server's time less our own since the start, in microseconds.
    offset: AtomicU64,
    epoch: AtomicU64,
    group: Mutex<Group>,
}

impl Link {
    pub(super) fn new(
        address: Address,
        commands: Commands,
        budget: Duration,
        replicas: u32,
        watch: Arc<dyn Watch>,
    ) -> Self {
        let breaker = Breaker::default();
        breaker.trip();
        Self {
            address,
            connection: ArcSwapOption::empty(),
            breaker,
            commands,
            budget,
            watch,
            started: Instant::now(),
            offset: AtomicU64::new(0),
            epoch: AtomicU64::new(0),
            group: Mutex::new(Group::unseen(replicas.into())),
        }
    }

    /// Which life of the store's data this is, as far as known.
    pub(super) fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::Acquire)
    }

    /// The gateways that were alive when the store was last heard of.
    pub(super) fn group(&self) -> Group {
        *self.group.lock()
    }

    fn elapsed(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_micros()).unwrap_or(u64::MAX)
    }

    /// The server's time in microseconds; this machine's as long as that is not known.
    pub(super) fn now(&self) -> u64 {
        match self.offset.load(Ordering::Acquire) {
            0 => {
                let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
                u64::try_from(now.as_micros()).unwrap_or(u64::MAX)
            }
            offset => offset.saturating_add(self.elapsed()),
        }
    }

    /// The server's time after which nobody waits for the answer to a question of now; 0 if its clock is not known yet.
    pub(super) fn deadline(&self) -> u64 {
        let patience = u64::try_from((self.budget + STALE).as_micros()).unwrap_or(u64::MAX);
        match self.offset.load(Ordering::Acquire) {
            0 => 0,
            _ => self.now().saturating_add(patience),
        }
    }

    /// Asks the store within `patience`. `None` if it is away, too slow, or refuses; that is counted.
    pub(super) async fn ask<'a, T, F>(
        &'a self,
        op: &'static str,
        patience: Duration,
        ask: impl FnOnce(&'a Commands, MultiplexedConnection) -> F,
    ) -> Option<T>
    where
        F: Future<Output = RedisResult<T>>,
    {
        let connection = self.connection.load_full()?;
        let begin = Instant::now();
        let outcome = tokio::time::timeout(patience, ask(&self.commands, connection.commands())).await;
        self.watch.store_took(op, begin.elapsed());
        let error = match outcome {
            Ok(Ok(answer)) => {
                self.breaker.succeeded();
                return Some(answer);
            }
            Ok(Err(error)) => Some(error),
            Err(_) => None,
        };
        let useless = error.as_ref().is_some_and(is_useless);
        let opened = if useless { self.breaker.trip() } else { self.breaker.failed() };
        if useless {
            // The next one may lead to another server: the master that took over.
            self.connection.store(None);
        }
        if opened {
            self.watch.set_store_up(false);
            match error {
                Some(error) => tracing::warn!(op, %error, "the limit store is away"),
                None => tracing::warn!(op, budget = ?patience, "the limit store is too slow"),
            }
        }
        None
    }

    /// Looks whether the store is there and takes writes; connects if need be.
    ///
    /// # Errors
    /// What is wrong, in words for the log.
    pub(super) async fn probe(&self) -> Result<(), String> {
        let connection = match self.connection.load_full() {
            Some(connection) => connection,
            None => Arc::new(self.address.connect().await?),
        };
        match tokio::time::timeout(PATIENCE, self.commands.beat(&connection.commands(), rand::random::<u64>() >> 12))
            .await
        {
            Ok(Ok(beat)) => {
                self.heard(beat);
                self.connection.store(Some(connection));
                Ok(())
            }
            Ok(Err(error)) => {
                self.connection.store(None);
                Err(error.to_string())
            }
            Err(_) => {
                self.connection.store(None);
                Err("it does not answer".to_owned())
            }
        }
    }

    fn heard(&self, beat: Beat) {
        self.offset.store(beat.now.saturating_sub(self.elapsed()), Ordering::Release);
        *self.group.lock() = Group::new(beat.gateways, beat.before);
        self.epoch.store(beat.epoch, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn five_failures_in_a_row_open_the_breaker_once() {
        let breaker = Breaker::default();
        (0..4).for_each(|_| assert!(!breaker.failed()));
        breaker.succeeded();
        (0..4).for_each(|_| assert!(!breaker.failed()));
        assert!(breaker.failed() && breaker.is_open());
        assert!(!breaker.failed());
        breaker.close();
        assert!(!breaker.is_open() && !breaker.failed());
    }

    #[test]
    fn half_of_twenty_failing_within_a_second_open_it_too() {
        let breaker = Breaker::default();
        for turn in 0..10 {
            breaker.succeeded();
            assert_eq!(breaker.failed(), turn == 9);
        }
        breaker.close();
        for _ in 0..9 {
            breaker.succeeded();
            breaker.failed();
        }
        // Those failures lie in the second before.
        breaker.tick();
        breaker.succeeded();
        assert!(!breaker.failed());
    }
}
