//! How many attempts an upstream may get beyond the calls themselves, so that retries do not multiply an outage.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Seconds that are looked back on.
const WINDOW: u64 = 10;
/// Extra attempts within the window that are always allowed.
const ALWAYS: u64 = 10;

/// Calls and extra attempts of the last ten seconds, by second.
#[derive(Debug, Default)]
pub struct RetryBudget {
    slots: [Slot; WINDOW as usize],
}

/// One second: its number in the upper half, a count in the lower, twice.
#[derive(Debug, Default)]
struct Slot {
    calls: AtomicU64,
    extra: AtomicU64,
}

fn bump(count: &AtomicU64, second: u64) {
    let grow = |packed: u64| {
        let (of, n) = (packed >> 32, packed & 0xFFFF_FFFF);
        Some((second << 32) | if of == second { (n + 1).min(0xFFFF_FFFF) } else { 1 })
    };
    // It never refuses.
    let _ = count.fetch_update(Ordering::Relaxed, Ordering::Relaxed, grow);
}

fn recent(count: &AtomicU64, second: u64) -> u64 {
    let packed = count.load(Ordering::Relaxed);
    if second.saturating_sub(packed >> 32) < WINDOW { packed & 0xFFFF_FFFF } else { 0 }
}

impl RetryBudget {
    fn slot(&self, second: u64) -> Option<&Slot> {
        self.slots.get(usize::try_from(second % WINDOW).ok()?)
    }

    fn sum(&self, second: u64, of: impl Fn(&Slot) -> &AtomicU64) -> u64 {
        self.slots.iter().map(|slot| recent(of(slot), second)).sum()
    }

    /// A call comes to the upstream for the first time.
    pub fn called(&self, now: Duration) {
        let second = now.as_secs() & 0xFFFF_FFFF;
        if let Some(slot) = self.slot(second) {
            bump(&slot.calls, second);
        }
    }

    /// Takes one extra attempt, if `share` of the calls (or the few that are always allowed) leaves one. Under a race a
    /// few more may pass.
    pub fn take(&self, now: Duration, share: f64) -> bool {
        let second = now.as_secs() & 0xFFFF_FFFF;
        let calls = self.sum(second, |slot| &slot.calls);
        let allowed = ((calls as f64 * share) as u64).max(ALWAYS);
        if self.sum(second, |slot| &slot.extra) >= allowed {
            return false;
        }
        if let Some(slot) = self.slot(second) {
            bump(&slot.extra, second);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(budget: &RetryBudget, now: Duration) -> usize {
        (0..1000).filter(|_| budget.take(now, 0.2)).count()
    }

    #[test]
    fn a_few_extra_attempts_are_always_allowed() {
        let budget = RetryBudget::default();
        assert_eq!(taken(&budget, Duration::from_secs(1000)), 10);
        assert_eq!(taken(&budget, Duration::from_secs(1005)), 0);
        assert_eq!(taken(&budget, Duration::from_secs(1010)), 10, "ten seconds later they are forgotten");
    }

    #[test]
    fn beyond_that_they_are_a_share_of_the_calls() {
        let budget = RetryBudget::default();
        for second in 0..10 {
            (0..100).for_each(|_| budget.called(Duration::from_secs(second)));
        }
        assert_eq!(taken(&budget, Duration::from_secs(9)), 200);
        // The calls of the first five seconds are out of sight, the extra attempts are not.
        assert_eq!(taken(&budget, Duration::from_secs(14)), 0);
    }

    #[test]
    fn a_share_of_nothing_leaves_the_few() {
        let budget = RetryBudget::default();
        (0..1000).for_each(|_| budget.called(Duration::from_secs(5)));
        assert_eq!((0..1000).filter(|_| budget.take(Duration::from_secs(5), 0.0)).count(), 10);
    }
}
