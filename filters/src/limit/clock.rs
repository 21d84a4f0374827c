//! Time as the limits see it: microseconds since the UNIX epoch, never going back.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;

/// A point in time in microseconds since the UNIX epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Instant64(pub u64);

impl Instant64 {
    /// A point in time given in whole seconds since the UNIX epoch.
    pub const fn from_secs(secs: u64) -> Self {
        Self(secs.saturating_mul(1_000_000))
    }

    /// Microseconds since the UNIX epoch.
    pub const fn micros(self) -> u64 {
        self.0
    }

    /// The time `span` later; saturates.
    #[must_use]
    pub fn plus(self, span: Duration) -> Self {
        Self(self.0.saturating_add(u64::try_from(span.as_micros()).unwrap_or(u64::MAX)))
    }
}

/// Where the limits get the time from.
pub trait Clock: Send + Sync + 'static {
    /// The present time; never earlier than an answer given before.
    fn now(&self) -> Instant64;
}

/// How far the wall clock may lie behind our own before we call it a step back and not a race of two threads.
const STEP_MICROS: u64 = 1_000;

/// The system's wall clock, made never to go back.
///
/// After the wall clock was set back, this one keeps going, a sixteenth too slow until the wall clock has caught up:
/// rates then stay below their limits by that little, and windows still age.
#[derive(Debug)]
pub struct SystemClock {
    last: AtomicU64,
    ticked: Mutex<Instant>,
}

impl SystemClock {
    /// Starts at the present wall-clock time.
    pub fn new() -> Self {
        Self { last: AtomicU64::new(0), ticked: Mutex::new(Instant::now()) }
    }

    fn advance(&self, wall: u64, monotonic: impl FnOnce() -> Instant) -> u64 {
        let last = self.last.fetch_max(wall, Ordering::AcqRel);
        if wall.saturating_add(STEP_MICROS) >= last {
            return wall.max(last);
        }
        let mut ticked = self.ticked.lock();
        let present = monotonic();
        // The first look after a step finds an old tick: at most a second is made up for.
        let elapsed = present.saturating_duration_since(*ticked).min(Duration::from_secs(1));
        *ticked = present;
        let slowed = u64::try_from(elapsed.as_micros()).unwrap_or(0) / 16 * 15;
        self.last.fetch_add(slowed, Ordering::AcqRel).saturating_add(slowed)
    }
}

impl Default for SystemClock {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock for SystemClock {
    fn now(&self) -> Instant64 {
        let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Instant64(self.advance(u64::try_from(wall.as_micros()).unwrap_or(u64::MAX), Instant::now))
    }
}

/// A clock that stands still until it is set, for tests.
#[derive(Debug, Default)]
pub struct ManualClock(AtomicU64);

impl ManualClock {
    /// A clock that shows `now`.
    pub fn at(now: Instant64) -> Self {
        Self(AtomicU64::new(now.0))
    }

    /// Moves forward.
    pub fn advance(&self, span: Duration) {
        self.set(self.now().plus(span));
    }

    /// Shows another time from now on.
    pub fn set(&self, now: Instant64) {
        self.0.store(now.0, Ordering::Release);
    }
}

impl Clock for ManualClock {
    fn now(&self) -> Instant64 {
        Instant64(self.0.load(Ordering::Acquire))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_system_clock_follows_the_wall_clock_forward() {
        let clock = SystemClock::new();
        let start = Instant::now();
        assert_eq!(clock.advance(5_000_000, || start), 5_000_000);
        assert_eq!(clock.advance(9_000_000, || start), 9_000_000);
    }

    #[test]
    fn a_wall_clock_set_back_slows_the_clock_and_never_turns_it() {
        let clock = SystemClock::new();
        let start = Instant::now() + Duration::from_secs(10);
        assert_eq!(clock.advance(10_000_000_000, || start), 10_000_000_000);
        let first = clock.advance(1_000_000_000, || start);
        assert!(first >= 10_000_000_000);
        let later = clock.advance(1_000_160_000, || start + Duration::from_micros(160_000));
        assert_eq!(later - first, 150_000);
        // Once the wall clock is ahead again it leads.
        assert_eq!(clock.advance(20_000_000_000, || start), 20_000_000_000);
    }

    #[test]
    fn two_threads_that_read_the_wall_clock_crosswise_see_the_later_time() {
        let clock = SystemClock::new();
        let start = Instant::now();
        clock.advance(5_000_500, || start);
        assert_eq!(clock.advance(5_000_400, || start), 5_000_500);
    }
}
