//! Days and months: budgets of a calendar period, with holds for calls that are still open.

use super::rule::Zone;
use super::window::{Grant, Reading};

const SECOND: u64 = 1_000_000;
const DAY_SECS: i64 = 86_400;

/// One day or month, from its first microsecond to the first of the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Period {
    start: u64,
    end: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Span {
    Day,
    Month,
}

impl Span {
    fn period(self, zone: Zone, now: u64) -> Period {
        let offset = i64::from(zone.0);
        let local = i64::try_from(now / SECOND).unwrap_or(i64::MAX / 2).saturating_add(offset);
        let day = local.div_euclid(DAY_SECS);
        let (first, next) = match self {
            Self::Day => (day, day + 1),
            Self::Month => {
                let (year, month) = month_of(day);
                let (after_year, after) = if month == 12 { (year + 1, 1) } else { (year, month + 1) };
                (first_day(year, month), first_day(after_year, after))
            }
        };
        let instant = |day: i64| u64::try_from(day * DAY_SECS - offset).unwrap_or(0).saturating_mul(SECOND);
        Period { start: instant(first), end: instant(next) }
    }
}

/// Year and month (1 to 12) of a day counted from 1970-01-01, in the Gregorian calendar.
///
/// Years are taken to begin in March, so that the leap day is the last of its year; 400 years are 146,097 days.
fn month_of(day: i64) -> (i64, i64) {
    let shifted = day + 719_468;
    let era = shifted.div_euclid(146_097);
    let of_era = shifted.rem_euclid(146_097);
    let year = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let from_march = (5 * of_year + 2) / 153;
    let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
    (year + era * 400 + i64::from(month <= 2), month)
}

/// The first day of a month, counted from 1970-01-01; the inverse of [`month_of`].
fn first_day(year: i64, month: i64) -> i64 {
    let year = year - i64::from(month <= 2);
    let era = year.div_euclid(400);
    let of_era = year.rem_euclid(400);
    let from_march = (month + 9) % 12;
    let of_year = (153 * from_march + 2) / 5;
    era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year - 719_468
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Book {
    period: Period,
    used: u64,
    held: u64,
}

/// The present period and the one before: a call that crosses midnight is charged to the day of its admission.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Calendar {
    span: Span,
    current: Book,
    previous: Book,
}

impl Calendar {
    pub(super) fn day() -> Self {
        Self { span: Span::Day, current: Book::default(), previous: Book::default() }
    }

    pub(super) fn month() -> Self {
        Self { span: Span::Month, ..Self::day() }
    }

    pub(super) fn reading(&self, zone: Zone, now: u64) -> Reading {
        // A period that has begun runs to its end, even where a reload moved the zone meanwhile.
        let book = if now < self.current.period.end {
            self.current
        } else {
            Book { period: self.span.period(zone, now), ..Book::default() }
        };
        let left = book.period.end.saturating_sub(now);
        Reading { used: book.used, held: book.held, next: left, full: left }
    }

    fn roll(&mut self, zone: Zone, now: u64) -> &mut Book {
        if now >= self.current.period.end {
            let fresh = Book { period: self.span.period(zone, now), ..Book::default() };
            self.previous = std::mem::replace(&mut self.current, fresh);
        }
        &mut self.current
    }

    pub(super) fn spend(&mut self, n: u64, zone: Zone, now: u64) -> Grant {
        let book = self.roll(zone, now);
        book.used = book.used.saturating_add(n);
        book.period.start
    }

    pub(super) fn hold(&mut self, n: u64, zone: Zone, now: u64) -> Grant {
        let book = self.roll(zone, now);
        book.held = book.held.saturating_add(n);
        book.period.start
    }

    fn book(&mut self, start: Grant) -> Option<&mut Book> {
        [&mut self.current, &mut self.previous]
            .into_iter()
            .find(|book| book.period.start == start && book.period.end > 0)
    }

    /// Turns a hold into what was really used, in the period of the admission. False if that period is forgotten.
    pub(super) fn settle(&mut self, start: Grant, held: u64, actual: u64) -> bool {
        let Some(book) = self.book(start) else { return false };
        book.held = book.held.saturating_sub(held);
        book.used = book.used.saturating_add(actual);
        true
    }

    /// Puts right what was charged already. False if that period is forgotten.
    pub(super) fn correct(&mut self, start: Grant, charged: u64, actual: u64) -> bool {
        let Some(book) = self.book(start) else { return false };
        book.used = book.used.saturating_add(actual).saturating_sub(charged);
        true
    }

    pub(super) fn clear_used(&mut self) {
        self.current.used = 0;
    }

    pub(super) const fn idle(&self, now: u64) -> bool {
        now >= self.current.period.end && self.current.held == 0 && self.previous.held == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn months_agree_with_an_independent_calendar() {
        for day in (-800_000..2_000_000).step_by(17) {
            let date = time::Date::from_julian_day(day + 2_440_588).unwrap();
            let (year, month) = month_of(i64::from(day));
            assert_eq!((year, month), (i64::from(date.year()), i64::from(u8::from(date.month()))));
            let first = date.replace_day(1).unwrap().to_julian_day() - 2_440_588;
            assert_eq!(first_day(year, month), i64::from(first));
        }
    }

    #[test]
    fn a_period_runs_from_midnight_to_midnight_of_its_zone() {
        let noon = u64::try_from(time::macros::datetime!(2028-02-29 12:00 UTC).unix_timestamp()).unwrap() * SECOND;
        let day = Span::Day.period(Zone::UTC, noon);
        assert_eq!((noon - day.start, day.end - noon), (43_200 * SECOND, 43_200 * SECOND));
        let month = Span::Month.period(Zone::UTC, noon);
        assert_eq!(month.end - month.start, 29 * 86_400 * SECOND);
        assert_eq!(month.end, day.end);
        // 12:00 UTC is 20:00 eight hours east: four hours are left of that day.
        assert_eq!(Span::Day.period(Zone(8 * 3_600), noon).end - noon, 4 * 3_600 * SECOND);
    }

    #[test]
    fn the_first_microsecond_of_a_day_belongs_to_it() {
        let midnight = 20_000 * 86_400 * SECOND;
        assert_eq!(Span::Day.period(Zone::UTC, midnight).start, midnight);
        assert_eq!(Span::Day.period(Zone::UTC, midnight - 1).end, midnight);
    }

    #[test]
    fn a_hold_counts_until_it_is_settled_and_crosses_midnight_with_its_day() {
        let midnight = 20_000 * 86_400 * SECOND;
        let mut calendar = Calendar::day();
        let start = calendar.hold(100, Zone::UTC, midnight - 1);
        assert_eq!(calendar.reading(Zone::UTC, midnight - 1).held, 100);
        assert_eq!(calendar.reading(Zone::UTC, midnight).held, 0);
        calendar.spend(1, Zone::UTC, midnight);
        assert!(!calendar.idle(midnight + 86_400 * SECOND));
        assert!(calendar.settle(start, 100, 70));
        assert_eq!(calendar.previous.used, 70);
        assert_eq!(calendar.reading(Zone::UTC, midnight).used, 1);
        assert!(calendar.idle(midnight + 86_400 * SECOND));
    }

    #[test]
    fn a_reload_that_moves_the_zone_lets_the_running_day_end() {
        let midnight = 20_000 * 86_400 * SECOND;
        let mut calendar = Calendar::day();
        let start = calendar.hold(10, Zone::UTC, midnight + 5);
        assert_eq!(calendar.hold(5, Zone(-8 * 3_600), midnight + 6), start);
        assert!(calendar.settle(start, 10, 3));
        assert_eq!(calendar.reading(Zone(-8 * 3_600), midnight + 7).used, 3);
        assert_eq!(calendar.reading(Zone(-8 * 3_600), midnight + 7).held, 5);
    }
}
