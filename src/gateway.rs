//! What all requests share: the runtime of the present configuration, the connector with its pool, the ledger, metrics.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime};

use arc_swap::ArcSwap;
use pingora_core::connectors::http::Connector;
use tokio::sync::{Notify, Semaphore};
use tollgate_filters::access::AccessLog;
use tollgate_filters::error::{GatewayError, Unavailable};
use tollgate_filters::limit::Ledger;
use tollgate_filters::metrics::Metrics;

use crate::alerts::Alerts;
use crate::runtime::Runtime;

/// The process's shared state.
pub(crate) struct Gateway {
    /// What the present configuration makes; swapped whole on reload.
    pub(crate) live: ArcSwap<Runtime>,
    /// Connections of the call lane to upstreams.
    pub(crate) connector: Connector,
    /// The ledger of all limits.
    pub(crate) ledger: Ledger,
    /// All metrics.
    pub(crate) metrics: Arc<Metrics>,
    /// Events that are told to a webhook.
    pub(crate) alerts: Alerts,
    /// One line per request.
    pub(crate) access: AccessLog,
    /// Bytes of all buffered bodies together.
    pub(crate) buffered: Arc<ByteBudget>,
    /// Requests being served now.
    pub(crate) open: AtomicUsize,
    /// Set once the process is asked to end.
    pub(crate) draining: AtomicBool,
    /// Wakes what works for nobody any more once the process is asked to end.
    pub(crate) leaving: Cut,
    /// Wakes what is still open when the time for draining is over.
    pub(crate) cut: Cut,
    /// Rights to read on an answer whose client has left.
    pub(crate) drains: Arc<Semaphore>,
    /// When the process started.
    pub(crate) started: Instant,
    /// When the process started, by the wall clock.
    pub(crate) started_at: SystemTime,
}

impl Gateway {
    /// Counts a request in until the guard is dropped.
    pub(crate) fn enter(self: &Arc<Self>) -> Open {
        self.open.fetch_add(1, Ordering::AcqRel);
        Open(Arc::clone(self))
    }

    /// Time since the process started, for rests and budgets of upstreams.
    pub(crate) fn now(&self) -> Duration {
        self.started.elapsed()
    }

    /// Whether the process is about to end.
    pub(crate) fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Acquire)
    }
}

/// Answers that are read on at the same time although their clients have left.
pub(crate) const DRAINS: usize = 1_000;

/// The end of patience: set once, seen by every request that is still open.
#[derive(Debug, Default)]
pub(crate) struct Cut {
    set: AtomicBool,
    wake: Notify,
}

impl Cut {
    /// Ends everything that is open.
    pub(crate) fn now(&self) {
        self.set.store(true, Ordering::Release);
        self.wake.notify_waiters();
    }

    /// Waits for the end. Waking is not missed by whoever made this future before the end.
    pub(crate) async fn wait(&self) {
        let woken = self.wake.notified();
        if !self.set.load(Ordering::Acquire) {
            woken.await;
        }
    }
}

/// A request being served; dropping it counts it out.
pub(crate) struct Open(Arc<Gateway>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::AcqRel);
    }
}

/// A cap on the bytes of all buffered bodies together.
#[derive(Debug)]
pub(crate) struct ByteBudget {
    most: u64,
    used: AtomicU64,
}

impl ByteBudget {
    /// A budget of that many bytes.
    pub(crate) fn new(most: u64) -> Arc<Self> {
        Arc::new(Self { most, used: AtomicU64::new(0) })
    }

    /// Bytes in use.
    pub(crate) fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// An empty share that may grow.
    pub(crate) fn share(self: &Arc<Self>) -> ByteShare {
        ByteShare { budget: Arc::clone(self), bytes: 0 }
    }
}

/// Bytes that one body holds of the budget; dropping it gives them back.
#[derive(Debug)]
pub(crate) struct ByteShare {
    budget: Arc<ByteBudget>,
    bytes: u64,
}

impl ByteShare {
    /// Takes more bytes.
    ///
    /// # Errors
    /// `overloaded` if the budget has not that many left.
    pub(crate) fn grow(&mut self, bytes: usize) -> Result<(), GatewayError> {
        let bytes = bytes as u64;
        let before = self.budget.used.fetch_add(bytes, Ordering::Relaxed);
        if before.saturating_add(bytes) > self.budget.most {
            self.budget.used.fetch_sub(bytes, Ordering::Relaxed);
            return Err(GatewayError::Unavailable(Unavailable::Overloaded));
        }
        self.bytes += bytes;
        Ok(())
    }
}

impl Drop for ByteShare {
    fn drop(&mut self) {
        self.budget.used.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bodies_share_one_budget_and_give_it_back() {
        let budget = ByteBudget::new(100);
        let mut a = budget.share();
        let mut b = budget.share();
        assert!(a.grow(60).is_ok() && b.grow(40).is_ok());
        assert_eq!(b.grow(1).unwrap_err().face().code, "overloaded");
        drop(a);
        assert!(b.grow(60).is_ok());
        drop(b);
        assert_eq!(budget.used(), 0);
    }
}
