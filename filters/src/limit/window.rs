//! Counters of one dimension of one scope, as pure state machines: time comes in as an argument, in microseconds.
//!
//! A rolling window of `W` is kept in sub-buckets of `W / 20`, each with the time of its last admission. A bucket counts
//! whole until that admission is `W` old: by then every other in it is older still. So a trailing window never holds more
//! than the limit, wherever it begins, and what came all at once comes back all at once, after exactly `W`.

use std::collections::VecDeque;

use super::calendar::Calendar;
use super::dimension::Window;
use super::zone::Zone;

/// Sub-buckets of a rolling window.
pub(super) const BUCKETS: u64 = 20;

/// What a caller waits for a slot when every slot is taken: nobody knows when a call will end.
const SLOT_WAIT: u64 = 1_000_000;

/// How a counter stands at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Reading {
    pub(super) used: u64,
    pub(super) held: u64,
    /// Microseconds until something of `used` comes back; 0 if nothing is used.
    pub(super) next: u64,
    /// Microseconds until all of it is back.
    pub(super) full: u64,
}

/// Whether a counter takes another `n`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Verdict {
    /// It fits now.
    Fits,
    /// It fits after so many microseconds if nothing else comes.
    Wait(u64),
    /// It is larger than the limit itself.
    Never,
}

/// How an open lease was charged to a counter: the time of its admission, or the start of its calendar period.
pub(super) type Grant = u64;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Counter {
    Rolling(Rolling),
    Calendar(Calendar),
    Live(u64),
}

impl Counter {
    pub(super) fn new(window: Window) -> Self {
        match window {
            Window::Rolling(secs) => Self::Rolling(Rolling::new(secs)),
            Window::Day => Self::Calendar(Calendar::day()),
            Window::Month => Self::Calendar(Calendar::month()),
            Window::Live => Self::Live(0),
        }
    }

    pub(super) fn reading(&self, zone: Zone, now: u64) -> Reading {
        match self {
            Self::Rolling(window) => window.reading(now),
            Self::Calendar(calendar) => calendar.reading(zone, now),
            Self::Live(count) => Reading { used: *count, held: 0, next: 0, full: 0 },
        }
    }

    /// Whether `n` more fit under `limit`. Changes nothing.
    pub(super) fn check(&self, n: u64, limit: u64, zone: Zone, now: u64) -> Verdict {
        let Some(room) = limit.checked_sub(n) else { return Verdict::Never };
        match self {
            Self::Rolling(window) => match window.until(room, now) {
                0 => Verdict::Fits,
                wait => Verdict::Wait(wait),
            },
            Self::Calendar(calendar) => {
                let reading = calendar.reading(zone, now);
                if reading.used.saturating_add(reading.held) <= room {
                    Verdict::Fits
                } else {
                    Verdict::Wait(reading.full.max(1))
                }
            }
            Self::Live(count) => {
                if *count <= room {
                    Verdict::Fits
                } else {
                    Verdict::Wait(SLOT_WAIT)
                }
            }
        }
    }

    /// Charges one call (a request or a slot): final at once, except that a slot comes back.
    pub(super) fn take_request(&mut self, zone: Zone, now: u64) -> Grant {
        match self {
            Self::Rolling(window) => window.add(1, now),
            Self::Calendar(calendar) => calendar.spend(1, zone, now),
            Self::Live(count) => {
                *count = count.saturating_add(1);
                0
            }
        }
    }

    /// Charges the estimate of a call: prepaid in a rolling window, held in a calendar one.
    pub(super) fn take_tokens(&mut self, estimate: u64, zone: Zone, now: u64) -> Grant {
        match self {
            Self::Rolling(window) => window.add(estimate, now),
            Self::Calendar(calendar) => calendar.hold(estimate, zone, now),
            Self::Live(_) => 0,
        }
    }

    /// Counts what was used elsewhere.
    pub(super) fn seed(&mut self, n: u64, zone: Zone, at: u64) {
        match self {
            Self::Rolling(window) => {
                window.add(n, at);
            }
            Self::Calendar(calendar) => {
                calendar.spend(n, zone, at);
            }
            Self::Live(count) => *count = count.saturating_add(n),
        }
    }

    /// Forgets what was used; what is live or held stays, for it is still true.
    pub(super) fn reset(&mut self) {
        match self {
            Self::Rolling(window) => window.clear(),
            Self::Calendar(calendar) => calendar.clear_used(),
            Self::Live(_) => {}
        }
    }

    /// Whether dropping it changes no later answer.
    pub(super) fn idle(&self, now: u64) -> bool {
        match self {
            Self::Rolling(window) => window.used(now) == 0,
            Self::Calendar(calendar) => calendar.idle(now),
            Self::Live(count) => *count == 0,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Bucket {
    index: u64,
    count: u64,
    /// Its last admission; lies within the bucket, so that the order by index is the order by this.
    last: u64,
}

/// A rolling window: sparse, at most 21 buckets, ordered by index.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Rolling {
    /// Width of a bucket.
    width: u64,
    /// Sum of all buckets kept, aged ones included until they are dropped.
    total: u64,
    buckets: VecDeque<Bucket>,
}

impl Rolling {
    pub(super) fn new(secs: u32) -> Self {
        Self { width: (u64::from(secs) * 1_000_000 / BUCKETS).max(1), total: 0, buckets: VecDeque::new() }
    }

    /// When an admission of that time no longer counts.
    const fn end(&self, admitted: u64) -> u64 {
        admitted.saturating_add(self.width.saturating_mul(BUCKETS))
    }

    fn counted(&self, now: u64) -> impl DoubleEndedIterator<Item = &Bucket> {
        self.buckets.iter().filter(move |bucket| self.end(bucket.last) > now && bucket.count > 0)
    }

    pub(super) fn used(&self, now: u64) -> u64 {
        let aged = self.buckets.iter().take_while(|bucket| self.end(bucket.last) <= now).map(|bucket| bucket.count);
        self.total.saturating_sub(aged.sum())
    }

    fn reading(&self, now: u64) -> Reading {
        let left = |bucket: &Bucket| self.end(bucket.last) - now;
        let next = self.counted(now).next().map_or(0, left);
        let full = self.counted(now).next_back().map_or(0, left);
        Reading { used: self.used(now), held: 0, next, full }
    }

    /// Microseconds until no more than `room` is used; 0 if that is so already.
    fn until(&self, room: u64, now: u64) -> u64 {
        let mut used = self.used(now);
        if used <= room {
            return 0;
        }
        for bucket in self.counted(now) {
            used = used.saturating_sub(bucket.count);
            if used <= room {
                return self.end(bucket.last) - now;
            }
        }
        0
    }

    fn age(&mut self, now: u64) {
        while let Some(bucket) = self.buckets.front().copied().filter(|bucket| self.end(bucket.last) <= now) {
            self.total = self.total.saturating_sub(bucket.count);
            self.buckets.pop_front();
        }
    }

    /// Adds an admission of now.
    fn add(&mut self, n: u64, now: u64) -> Grant {
        self.age(now);
        self.put(n, now);
        now
    }

    fn put(&mut self, n: u64, at: u64) {
        let index = at / self.width;
        self.total = self.total.saturating_add(n);
        match self.buckets.iter().rposition(|bucket| bucket.index <= index) {
            Some(place) => match self.buckets.get_mut(place).filter(|bucket| bucket.index == index) {
                Some(bucket) => {
                    bucket.count = bucket.count.saturating_add(n);
                    bucket.last = bucket.last.max(at);
                }
                None => self.buckets.insert(place + 1, Bucket { index, count: n, last: at }),
            },
            None => self.buckets.push_front(Bucket { index, count: n, last: at }),
        }
    }

    /// Gives back what was prepaid too much, while the bucket of the admission still counts; later it has aged out.
    pub(super) fn refund(&mut self, admitted: Grant, n: u64, now: u64) {
        self.age(now);
        let index = admitted / self.width;
        if let Some(bucket) = self.buckets.iter_mut().rfind(|bucket| bucket.index == index) {
            let back = n.min(bucket.count);
            bucket.count -= back;
            self.total = self.total.saturating_sub(back);
        }
    }

    /// Charges what was prepaid too little: at the admission if that still counts, else now, for it must count somewhere.
    pub(super) fn surcharge(&mut self, admitted: Grant, n: u64, now: u64) {
        self.age(now);
        let index = admitted / self.width;
        let counts = self.end(admitted) > now || self.buckets.iter().any(|bucket| bucket.index == index);
        self.put(n, if counts { admitted } else { now });
    }

    fn clear(&mut self) {
        self.total = 0;
        self.buckets.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000;

    fn minute() -> Counter {
        Counter::new(Window::Rolling(60))
    }

    fn check(counter: &Counter, limit: u64, now: u64) -> Verdict {
        counter.check(1, limit, Zone::UTC, now)
    }

    #[test]
    fn the_wait_is_exact_refused_just_before_and_admitted_at_it() {
        let mut counter = minute();
        let start = 1_000 * SECOND + 1_234_567;
        for i in 0..5 {
            counter.take_request(Zone::UTC, start + i * SECOND);
        }
        let now = start + 10 * SECOND;
        let Verdict::Wait(wait) = check(&counter, 5, now) else { panic!("should be full") };
        assert!(matches!(check(&counter, 5, now + wait - 1), Verdict::Wait(1)));
        assert_eq!(check(&counter, 5, now + wait), Verdict::Fits);
    }

    #[test]
    fn what_came_at_once_comes_back_at_once_after_exactly_the_window() {
        for start in [0, 2_999_999, 1_000 * SECOND + 17] {
            let mut counter = minute();
            (0..60).for_each(|_| {
                counter.take_request(Zone::UTC, start);
            });
            assert_eq!(check(&counter, 60, start), Verdict::Wait(60 * SECOND));
            assert_eq!(counter.reading(Zone::UTC, start).full, 60 * SECOND);
            assert_eq!(check(&counter, 60, start + 60 * SECOND - 1), Verdict::Wait(1));
            assert_eq!(counter.reading(Zone::UTC, start + 60 * SECOND), Reading::default());
            assert_eq!(counter.check(60, 60, Zone::UTC, start + 60 * SECOND), Verdict::Fits);
        }
    }

    #[test]
    fn a_bucket_counts_until_its_last_admission_is_old_and_not_longer() {
        let mut window = Rolling::new(60);
        window.add(1, 0);
        window.add(1, 2 * SECOND);
        assert_eq!((window.used(62 * SECOND - 1), window.used(62 * SECOND)), (2, 0));
    }

    #[test]
    fn nothing_fits_under_a_limit_of_zero() {
        assert_eq!(check(&minute(), 0, 0), Verdict::Never);
        assert_eq!(check(&Counter::new(Window::Day), 0, 0), Verdict::Never);
        assert_eq!(check(&Counter::new(Window::Live), 0, 0), Verdict::Never);
    }

    #[test]
    fn a_refund_reaches_the_bucket_of_the_admission_and_no_other() {
        let mut window = Rolling::new(60);
        let first = window.add(100, 0);
        window.add(10, 30 * SECOND);
        window.refund(first, 60, 31 * SECOND);
        assert_eq!(window.used(31 * SECOND), 50);
        // A minute later the first bucket is gone, and a second refund for it is a no-op.
        window.refund(first, 40, 70 * SECOND);
        assert_eq!(window.used(70 * SECOND), 10);
    }

    #[test]
    fn a_surcharge_after_the_admission_aged_out_counts_now() {
        let mut window = Rolling::new(60);
        let first = window.add(100, 0);
        window.surcharge(first, 50, 30 * SECOND);
        assert_eq!(window.used(30 * SECOND), 150);
        assert_eq!(window.reading(30 * SECOND).full, 30 * SECOND);
        window.surcharge(first, 7, 90 * SECOND);
        assert_eq!(window.used(90 * SECOND), 7);
    }

    #[test]
    fn a_surcharge_into_an_emptied_place_keeps_the_buckets_in_order() {
        let mut window = Rolling::new(60);
        window.add(1, 10 * SECOND);
        window.add(1, 40 * SECOND);
        window.surcharge(15 * SECOND, 4, 41 * SECOND);
        let order: Vec<_> = window.buckets.iter().map(|bucket| bucket.index).collect();
        assert_eq!(order, [3, 5, 13]);
        assert_eq!(window.used(41 * SECOND), 6);
    }

    #[test]
    fn a_window_keeps_at_most_one_bucket_more_than_its_division() {
        let mut window = Rolling::new(1);
        for i in 0..10_000 {
            window.add(1, i * 7_919);
        }
        assert!(window.buckets.len() as u64 <= BUCKETS + 1);
        assert_eq!(window.total, window.buckets.iter().map(|bucket| bucket.count).sum::<u64>());
    }
}
