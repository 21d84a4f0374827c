//! A provider's grant as token buckets: a minute's worth, refilled all the time. Above a share of it, calls are spread so
//! that they go out as fast as the bucket refills. Pure; `redis/draw.lua` does the same, to the last figure.

use std::time::Duration;

/// One request or token in the unit in which buckets count: what one a minute refills in a millisecond.
const UNIT: i64 = 60_000;
const MINUTE: i64 = 60_000;
/// Redis counts in doubles: levels of so much are whole numbers there too.
const MOST: i64 = 10_000_000_000;

/// What a provider grants in a minute.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Grant {
    /// Requests; `None` is no limit.
    pub requests: Option<u64>,
    /// Tokens; `None` is no limit.
    pub tokens: Option<u64>,
    /// Share of it above which calls are spread, 0 to 1.
    pub pace_above: f64,
}

/// What a call asks of a grant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Draw {
    /// 1, or 0 to give back only.
    pub requests: u64,
    /// Tokens that it will probably use.
    pub tokens: u64,
    /// Longest delay that it accepts.
    pub wait: Duration,
    /// Requests given back; below 0 they were used elsewhere.
    pub back_requests: i64,
    /// Tokens given back; below 0 more were used than drawn.
    pub back_tokens: i64,
}

/// What a bucket answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Drawn {
    /// Whether the call was counted. It is to be sent after `delay`.
    pub granted: bool,
    /// Delay of the call; where it was not counted, the time until it would go out.
    pub delay: Duration,
}

/// One bucket's numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Lane {
    /// The grant of a minute; below 0 there is no limit.
    pub(super) grant: i64,
    /// Units below which calls are spread.
    pub(super) spread: i64,
}

impl Lane {
    fn of(grant: Option<u64>, pace_above: f64) -> Self {
        let Some(grant) = grant else { return Self { grant: -1, spread: 0 } };
        let grant = i64::try_from(grant.min(Grant::MOST)).unwrap_or(i64::MAX);
        let spread = (grant.saturating_mul(UNIT) as f64 * (1.0 - pace_above.clamp(0.0, 1.0))).round() as i64;
        Self { grant, spread }
    }

    const fn full(self) -> i64 {
        self.grant.saturating_mul(UNIT)
    }

    /// The level after `millis` of refilling, with `back` given back.
    fn refilled(self, level: i64, millis: i64, back: i64) -> i64 {
        let level = level.saturating_add(millis.clamp(0, MINUTE).saturating_mul(self.grant));
        let back = back.clamp(-MOST, MOST).saturating_mul(UNIT);
        // Who used more than a minute's grant waits no longer than two for it.
        level.saturating_add(back).clamp(-self.full(), self.full())
    }

    /// What would be left after `asked`, and the delay in milliseconds.
    fn after(self, level: i64, asked: u64) -> (i64, i64) {
        if asked == 0 {
            return (level, 0);
        }
        if self.grant == 0 {
            return (level, MINUTE);
        }
        let asked = i64::try_from(asked).unwrap_or(i64::MAX).saturating_mul(UNIT).min(self.full());
        let after = level.saturating_sub(asked);
        // A call that is larger than the unspread part goes out once the bucket is full.
        let floor = self.spread.min(self.full().saturating_sub(asked));
        let lacks = floor.saturating_sub(after).max(0);
        (after, lacks / self.grant + i64::from(lacks % self.grant > 0))
    }
}

impl Grant {
    /// More than this in a minute cannot be counted.
    pub const MOST: u64 = MOST.cast_unsigned();

    /// The part of one of so many gateways.
    #[must_use]
    pub fn part(self, gateways: u64) -> Self {
        let part = |grant: Option<u64>| grant.map(|grant| grant / gateways.max(1));
        Self { requests: part(self.requests), tokens: part(self.tokens), ..self }
    }

    /// Requests and tokens.
    pub(super) fn lanes(self) -> [Lane; 2] {
        [Lane::of(self.requests, self.pace_above), Lane::of(self.tokens, self.pace_above)]
    }
}

/// The buckets of one grant. Times are milliseconds since any beginning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bucket {
    levels: [i64; 2],
    at: i64,
}

impl Bucket {
    /// Full ones.
    pub fn full(grant: Grant, now: i64) -> Self {
        Self { levels: grant.lanes().map(Lane::full), at: now }
    }

    /// What a store said, as the part of one of so many gateways.
    pub(super) fn part(levels: [i64; 2], gateways: u64, now: i64) -> Self {
        let gateways = i64::try_from(gateways.max(1)).unwrap_or(i64::MAX);
        Self { levels: levels.map(|level| level.div_euclid(gateways)), at: now }
    }

    /// What is left of requests and tokens, in units.
    #[cfg(test)]
    pub(super) const fn levels(&self) -> [i64; 2] {
        self.levels
    }

    /// Gives back what was drawn and not used; below 0 it was more.
    pub fn give(&mut self, grant: Grant, requests: i64, tokens: i64) {
        for ((lane, level), back) in grant.lanes().into_iter().zip(&mut self.levels).zip([requests, tokens]) {
            if lane.grant >= 0 {
                *level = lane.refilled(*level, 0, back);
            }
        }
    }

    /// Draws from both buckets or from none. Time that steps back refills nothing.
    pub fn draw(&mut self, grant: Grant, draw: &Draw, now: i64) -> Drawn {
        let lanes = grant.lanes();
        let passed = now.saturating_sub(self.at);
        self.at = self.at.max(now);
        let asked = [(draw.requests, draw.back_requests), (draw.tokens, draw.back_tokens)];
        let mut after = self.levels;
        let mut delay = 0;
        for (((lane, level), left), (asked, back)) in lanes.into_iter().zip(&mut self.levels).zip(&mut after).zip(asked)
        {
            if lane.grant < 0 {
                continue;
            }
            *level = lane.refilled(*level, passed, back);
            let (rest, wait) = lane.after(*level, asked);
            (*left, delay) = (rest, delay.max(wait));
        }
        let delay = Duration::from_millis(u64::try_from(delay).unwrap_or(0));
        let granted = delay <= draw.wait;
        if granted {
            self.levels = after;
        }
        Drawn { granted, delay }
    }
}

#[cfg(test)]
mod tests;
