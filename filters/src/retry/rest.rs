//! The rest of a node or a credential that failed: out of use for a while, then tried with one call before all others follow.
//!
//! Times are spans since a common beginning, as a monotonic clock gives them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// Whether something rests. Reading it is one atomic load.
#[derive(Debug, Default)]
pub struct Rest {
    /// End of the rest in microseconds; 0 if there is none. Stays set after the rest until a call has succeeded.
    until: AtomicU64,
    probing: AtomicBool,
}

/// What a rest says to a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admits {
    /// There is no rest.
    Freely,
    /// The rest is over, and nobody has tried yet: one call may.
    OneCall,
    /// It goes on until then. While another call tries, that is now.
    NotBefore(Duration),
}

impl Rest {
    /// What it says at `now`; changes nothing.
    pub fn admits(&self, now: Duration) -> Admits {
        let until = self.until.load(Ordering::Acquire);
        if until == 0 {
            return Admits::Freely;
        }
        let until = Duration::from_micros(until);
        if now < until || self.probing.load(Ordering::Acquire) {
            return Admits::NotBefore(until.max(now));
        }
        Admits::OneCall
    }

    /// Rests until then, or longer if it already does. True if there was no rest before.
    pub fn until(&self, end: Duration) -> bool {
        let end = u64::try_from(end.as_micros()).unwrap_or(u64::MAX).max(1);
        self.until.fetch_max(end, Ordering::AcqRel) == 0
    }

    /// A call succeeded: there is no rest any more. True if there was one.
    pub fn over(&self) -> bool {
        self.until.load(Ordering::Relaxed) != 0 && self.until.swap(0, Ordering::AcqRel) != 0
    }

    /// Takes the place of the one call that may try. Dropping it gives the place back; what came of the call is told by
    /// [`over`](Self::over) or [`until`](Self::until) before that.
    pub fn probe(self: &Arc<Self>) -> Option<Probe> {
        let taken = self.probing.compare_exchange(false, true, Ordering::AcqRel, Ordering::Acquire);
        taken.is_ok().then(|| Probe(Arc::clone(self)))
    }
}

/// The one call that finds out whether a rest has helped.
#[derive(Debug)]
#[must_use]
pub struct Probe(Arc<Rest>);

impl Drop for Probe {
    fn drop(&mut self) {
        self.0.probing.store(false, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn secs(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    #[test]
    fn the_longer_rest_wins() {
        let rest = Rest::default();
        assert_eq!(rest.admits(secs(1)), Admits::Freely);
        assert!(rest.until(secs(10)));
        assert!(!rest.until(secs(5)), "a shorter rest does not cut it");
        assert_eq!(rest.admits(secs(9)), Admits::NotBefore(secs(10)));
        assert!(!rest.until(secs(20)));
        assert_eq!(rest.admits(secs(19)), Admits::NotBefore(secs(20)));
    }

    #[test]
    fn after_the_rest_one_call_tries_and_its_fate_decides() {
        let rest = Arc::new(Rest::default());
        rest.until(secs(10));
        assert_eq!(rest.admits(secs(10)), Admits::OneCall);
        let probe = rest.probe().unwrap();
        assert!(rest.probe().is_none());
        assert_eq!(rest.admits(secs(11)), Admits::NotBefore(secs(11)));
        rest.until(secs(20));
        drop(probe);
        assert_eq!(rest.admits(secs(15)), Admits::NotBefore(secs(20)));
        let probe = rest.probe().unwrap();
        assert!(rest.over());
        drop(probe);
        assert_eq!(rest.admits(secs(21)), Admits::Freely);
        assert!(!rest.over());
    }

    #[test]
    fn a_try_that_came_to_nothing_leaves_room_for_the_next() {
        let rest = Arc::new(Rest::default());
        rest.until(secs(10));
        drop(rest.probe());
        assert_eq!(rest.admits(secs(12)), Admits::OneCall);
    }
}
