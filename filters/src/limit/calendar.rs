//! Days and months: budgets of a calendar period, with holds for calls that are still open.

use super::window::{Grant, Reading};
use super::zone::{Change, Zone};

const SECOND: u64 = 1_000_000;
const DAY_SECS: i64 = 86_400;
/// How far from now a period can begin or end, and the clocks of two machines apart, in seconds.
const AROUND: i64 = 60 * DAY_SECS;

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
    /// The period in which `now` lies.
    ///
    /// A day begins the first time that its zone writes its date. So it may have 23 or 25 hours, and what the clocks repeat
    /// of the day before, once it has begun, belongs to it. `lib.lua` does the same.
    fn period(self, zone: Zone, now: u64) -> Period {
        let now = i64::try_from(now / SECOND).unwrap_or(i64::MAX / 2);
        let day = now.saturating_add(i64::from(zone.from(now).0)).div_euclid(DAY_SECS);
        let day = if begin(zone, now, day + 1) <= now { day + 1 } else { day };
        let (first, next) = match self {
            Self::Day => (day, day + 1),
            Self::Month => {
                let (year, month) = month_of(day);
                let (after_year, after) = if month == 12 { (year + 1, 1) } else { (year, month + 1) };
                (first_day(year, month), first_day(after_year, after))
            }
        };
        let instant = |day: i64| u64::try_from(begin(zone, now, day)).unwrap_or(0).saturating_mul(SECOND);
        Period { start: instant(first), end: instant(next) }
    }
}

/// The changes of a zone that can matter to the months around `now`: the offset before them, and they.
pub(super) fn changes_around(zone: Zone, now: i64) -> (i32, &'static [Change]) {
    let (offset, after) = zone.from(now.saturating_sub(AROUND));
    let near = after.partition_point(|change| change.at < now.saturating_add(AROUND));
    (offset, after.get(..near).unwrap_or_default())
}

/// The second in which a day, counted from 1970-01-01, begins in that zone; it must be near `now`.
fn begin(zone: Zone, now: i64, day: i64) -> i64 {
    let midnight = day.saturating_mul(DAY_SECS);
    let (mut offset, changes) = changes_around(zone, now);
    let mut from = i64::MIN;
    for change in changes {
        let begin = midnight.saturating_sub(offset.into()).max(from);
        if begin < change.at {
            return begin;
        }
        (from, offset) = (change.at, change.offset);
    }
    midnight.saturating_sub(offset.into()).max(from)
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
        assert_eq!(Span::Day.period(Zone::Fixed(8 * 3_600), noon).end - noon, 4 * 3_600 * SECOND);
    }

    /// The period of a zone at a moment, as two moments.
    fn written(span: Span, zone: &str, now: &str) -> (String, String) {
        let now = now.parse::<jiff::Timestamp>().unwrap().as_microsecond();
        let period = span.period(Zone::named(zone).unwrap(), now.try_into().unwrap());
        let text = |at: u64| jiff::Timestamp::from_microsecond(at.try_into().unwrap()).unwrap().to_string();
        (text(period.start), text(period.end))
    }

    #[test]
    fn a_day_has_23_or_25_hours_where_the_clocks_are_changed() {
        let pair = |a: &str, b: &str| (a.to_owned(), b.to_owned());
        for now in ["2026-03-28T23:00:00Z", "2026-03-29T00:59:59Z", "2026-03-29T01:00:00Z", "2026-03-29T21:59:59Z"] {
            let day = pair("2026-03-28T23:00:00Z", "2026-03-29T22:00:00Z");
            assert_eq!(written(Span::Day, "Europe/Berlin", now), day, "{now}");
        }
        for now in ["2026-10-24T22:00:00Z", "2026-10-25T00:59:59Z", "2026-10-25T01:00:00Z", "2026-10-25T22:59:59Z"] {
            let day = pair("2026-10-24T22:00:00Z", "2026-10-25T23:00:00Z");
            assert_eq!(written(Span::Day, "Europe/Berlin", now), day, "{now}");
        }
        // Beirut's clocks skip the midnight, Cairo's come back from it; the half hour of Lord Howe is one too.
        let beirut = written(Span::Day, "Asia/Beirut", "2026-03-28T23:30:00Z");
        assert_eq!(beirut, pair("2026-03-28T22:00:00Z", "2026-03-29T21:00:00Z"));
        let cairo = written(Span::Day, "Africa/Cairo", "2026-10-29T21:30:00Z");
        assert_eq!(cairo, pair("2026-10-28T21:00:00Z", "2026-10-29T22:00:00Z"));
        let lord_howe = written(Span::Day, "Australia/Lord_Howe", "2026-04-05T00:00:00Z");
        assert_eq!(lord_howe, pair("2026-04-04T13:00:00Z", "2026-04-05T13:30:00Z"));
    }

    #[test]
    fn a_month_begins_and_ends_in_the_offset_of_its_own_edges() {
        let pair = |a: &str, b: &str| (a.to_owned(), b.to_owned());
        let march = written(Span::Month, "Europe/Berlin", "2026-03-15T12:00:00Z");
        assert_eq!(march, pair("2026-02-28T23:00:00Z", "2026-03-31T22:00:00Z"));
        let october = written(Span::Month, "Europe/Berlin", "2026-10-31T22:59:59.999999Z");
        assert_eq!(october, pair("2026-09-30T22:00:00Z", "2026-10-31T23:00:00Z"));
        assert_eq!(written(Span::Month, "Europe/Berlin", "2026-10-31T23:00:00Z").0, "2026-10-31T23:00:00Z");
        // The first and the last place on earth where a day begins are 26 hours apart.
        let line = written(Span::Month, "Pacific/Kiritimati", "2026-12-31T10:00:00Z");
        assert_eq!(line, pair("2026-12-31T10:00:00Z", "2027-01-31T10:00:00Z"));
        let midway = written(Span::Month, "Pacific/Midway", "2027-01-01T10:59:59Z");
        assert_eq!(midway, pair("2026-12-01T11:00:00Z", "2027-01-01T11:00:00Z"));
    }

    #[test]
    fn a_date_that_was_skipped_is_no_day_and_one_that_comes_twice_is_one() {
        let pair = |a: &str, b: &str| (a.to_owned(), b.to_owned());
        // Samoa went over the date line: after the 29th of December came the 31st.
        let before = written(Span::Day, "Pacific/Apia", "2011-12-30T09:59:59Z");
        assert_eq!(before, pair("2011-12-29T10:00:00Z", "2011-12-30T10:00:00Z"));
        let after = written(Span::Day, "Pacific/Apia", "2011-12-30T10:00:00Z");
        assert_eq!(after, pair("2011-12-30T10:00:00Z", "2011-12-31T10:00:00Z"));
        // St. John's put its clocks back from one past midnight to one past eleven of the day before.
        let begun = pair("2010-11-07T02:30:00Z", "2010-11-08T03:30:00Z");
        for now in ["2010-11-07T02:30:00Z", "2010-11-07T02:31:00Z", "2010-11-07T03:29:59Z", "2010-11-07T03:30:00Z"] {
            assert_eq!(written(Span::Day, "America/St_Johns", now), begun, "{now}");
        }
    }

    #[test]
    fn in_every_zone_days_and_months_follow_each_other_without_gap_and_begin_where_the_calendar_says() {
        let begin = jiff::civil::date(2024, 1, 1);
        for name in Zone::names() {
            let (zone, known) =
                (Zone::named(&name).unwrap(), jiff::tz::TimeZoneDatabase::bundled().get(&name).unwrap());
            let midnight = |date: jiff::civil::Date| {
                let begin = date.at(12, 0, 0, 0).to_zoned(known.clone()).unwrap().start_of_day().unwrap();
                u64::try_from(begin.timestamp().as_second()).unwrap() * SECOND
            };
            let mut date = begin;
            while date < jiff::civil::date(2027, 1, 1) {
                let (next, at) = (date.tomorrow().unwrap(), midnight(date));
                let day = Period { start: at, end: midnight(next) };
                assert_eq!(Span::Day.period(zone, day.start), day, "{name} {date}");
                assert_eq!(Span::Day.period(zone, day.end - 1), day, "{name} {date}");
                let month = Period {
                    start: midnight(date.first_of_month()),
                    end: midnight(date.last_of_month().tomorrow().unwrap()),
                };
                assert_eq!(Span::Month.period(zone, at + 1), month, "{name} {date}");
                date = next;
            }
        }
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
        assert_eq!(calendar.hold(5, Zone::Fixed(-8 * 3_600), midnight + 6), start);
        assert!(calendar.settle(start, 10, 3));
        assert_eq!(calendar.reading(Zone::Fixed(-8 * 3_600), midnight + 7).used, 3);
        assert_eq!(calendar.reading(Zone::Fixed(-8 * 3_600), midnight + 7).held, 5);
    }
}
