//! How scopes and rules are written for the scripts, and how their answers are read.

use std::borrow::Cow;

use redis::{RedisResult, Value};
use smallvec::SmallVec;

use super::{MOST, PREFIX, Plan, Reading, Row, unexpected};
use crate::limit::calendar::changes_around;
use crate::limit::dimension::{Dimension, Unit, Window};
use crate::limit::rule::{Rule, RuleSet, Scope, ScopeId};
use crate::limit::zone::Zone;

const DAY_SECS: u64 = 86_400;
/// How long a scope is kept after its longest window: longer than any call lasts.
const GRACE_SECS: u64 = 2 * DAY_SECS;

/// A scope as the scripts know it, made once.
#[derive(Debug)]
pub(in crate::limit) struct Wire {
    key: Box<str>,
    /// The rules, without the zone that stands before them.
    head: Box<[u8]>,
    tail: Box<[u8]>,
    /// All of it, if the zone is the same at all times.
    whole: Option<Box<[u8]>>,
}

impl Wire {
    pub(super) fn key(&self) -> &str {
        &self.key
    }

    /// The rules in that zone, with its changes around `now` (seconds since the epoch).
    pub(super) fn rules(&self, zone: Zone, now: impl FnOnce() -> i64) -> Cow<'_, [u8]> {
        match &self.whole {
            Some(whole) => Cow::Borrowed(whole),
            None => Cow::Owned(self.with(&pack_zone(zone, now()))),
        }
    }

    fn with(&self, zone: &[u8]) -> Vec<u8> {
        [&self.head, zone, &self.tail].concat()
    }
}

pub(super) fn of(set: &RuleSet) -> &Wire {
    set.remote().wire.get_or_init(|| {
        let (head, tail) = pack(set);
        let mut wire = Wire { key: key(set.id()).into(), head: head.into(), tail: tail.into(), whole: None };
        if let Zone::Fixed(_) = set.zone() {
            wire.whole = Some(wire.with(&pack_zone(set.zone(), 0)).into());
        }
        wire
    })
}

/// The key of a scope's state.
pub(super) fn key(id: &ScopeId) -> String {
    let letter = match id.scope() {
        Scope::Global => 'g',
        Scope::Route => 'r',
        Scope::Key => 'k',
        Scope::Model => 'm',
    };
    format!("{PREFIX}s:{letter}:{}", id.name())
}

/// The number of a dimension, fixed for ever: state is stored under it.
const fn number(dimension: Dimension) -> u8 {
    match dimension {
        Dimension::RequestsPerSecond => 1,
        Dimension::RequestsPerMinute => 2,
        Dimension::RequestsPerHour => 3,
        Dimension::RequestsPerDay => 4,
        Dimension::TokensPerMinute => 5,
        Dimension::TokensPerHour => 6,
        Dimension::TokensPerDay => 7,
        Dimension::TokensPerMonth => 8,
        Dimension::Concurrency => 9,
    }
}

const fn kind(window: Window) -> u8 {
    match window {
        Window::Rolling(_) => 1,
        Window::Day => 2,
        Window::Month => 3,
        Window::Live => 4,
    }
}

fn span_secs(window: Window) -> u64 {
    match window {
        Window::Rolling(secs) => secs.into(),
        Window::Day => DAY_SECS,
        Window::Month => 31 * DAY_SECS,
        Window::Live => 0,
    }
}

/// The kind of every dimension, by its number.
pub(super) fn kinds() -> Vec<u8> {
    let mut all: Vec<_> = Dimension::ALL.iter().map(|d| (number(*d), kind(d.window()))).collect();
    all.sort_unstable();
    let mut text = Vec::with_capacity(all.len() + 3);
    array(&mut text, all.len());
    all.iter().for_each(|(_, kind)| unsigned(&mut text, u64::from(*kind)));
    text
}

/// What stands before the zone, and what stands behind it.
fn pack(set: &RuleSet) -> (Vec<u8>, Vec<u8>) {
    let longest = set.rules().iter().map(|rule| span_secs(rule.dimension.window())).max().unwrap_or(0);
    let mut head = Vec::with_capacity(16);
    array(&mut head, 2 + set.rules().len());
    unsigned(&mut head, (longest + GRACE_SECS) * 1_000);
    let mut text = Vec::with_capacity(24 * set.rules().len());
    for Rule { dimension, limit, shadow, .. } in set.rules() {
        let window = dimension.window();
        array(&mut text, 6);
        unsigned(&mut text, number(*dimension).into());
        unsigned(&mut text, kind(window).into());
        unsigned(&mut text, u64::from(dimension.unit() == Unit::Tokens));
        unsigned(&mut text, (*limit).min(MOST));
        unsigned(&mut text, span_secs(window) * 1_000_000);
        unsigned(&mut text, u64::from(*shadow));
    }
    (head, text)
}

fn pack_zone(zone: Zone, now: i64) -> Vec<u8> {
    let (offset, changes) = changes_around(zone, now);
    let mut text = Vec::with_capacity(8 + 14 * changes.len());
    array(&mut text, 1 + 2 * changes.len());
    signed(&mut text, offset);
    for change in changes {
        unsigned(&mut text, u64::try_from(change.at).unwrap_or(0));
        signed(&mut text, change.offset);
    }
    text
}

/// A MessagePack number that may be negative.
fn signed(text: &mut Vec<u8>, number: i32) {
    text.push(0xd2);
    text.extend(number.to_be_bytes());
}

/// The head of a MessagePack array; none here is longer than a few dozen.
fn array(text: &mut Vec<u8>, len: usize) {
    text.push(0xdc);
    text.extend(u16::try_from(len).unwrap_or(u16::MAX).to_be_bytes());
}

/// A MessagePack number.
fn unsigned(text: &mut Vec<u8>, number: u64) {
    match u8::try_from(number) {
        Ok(small) if small < 0x80 => text.push(small),
        _ => {
            text.push(0xcf);
            text.extend(number.to_be_bytes());
        }
    }
}

/// The numbers of a script's reply.
pub(super) fn integers(reply: Value) -> RedisResult<SmallVec<[i64; 48]>> {
    let number = |value: Value| match value {
        Value::Int(number) => Ok(number),
        // The epoch is kept as text.
        other => redis::from_redis_value::<i64>(other).map_err(|_| unexpected()),
    };
    match reply {
        Value::Array(values) => values.into_iter().map(number).collect(),
        other => number(other).map(|number| SmallVec::from_slice(&[number])),
    }
}

/// One row for each rule of the plan; `None` if there are too few numbers.
pub(super) fn rows(plan: &Plan, numbers: &mut impl Iterator<Item = i64>) -> Option<SmallVec<[Row; 6]>> {
    let mut rows = SmallVec::new();
    let mut next = || numbers.next().map(|number| u64::try_from(number).unwrap_or(0));
    for _ in plan.rules() {
        let reading = Reading { used: next()?, held: next()?, next: next()?, full: next()? };
        rows.push(Row { reading, over: false });
    }
    Some(rows)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limit::dimension::{Limit, Limits};

    #[test]
    fn the_keys_of_scopes_share_one_slot_and_differ() {
        let key = |scope, name| key(&ScopeId::new(scope, name));
        assert_eq!(key(Scope::Key, "alice"), "tg:{tg}:s:k:alice");
        assert_eq!(key(Scope::Route, "alice"), "tg:{tg}:s:r:alice");
        assert_eq!(key(Scope::Model, "a}b{c"), "tg:{tg}:s:m:a}b{c");
        assert_eq!(key(Scope::Global, ""), "tg:{tg}:s:g:");
    }

    #[test]
    fn rules_are_packed_as_the_scripts_read_them() {
        let limits = Limits { tokens_per_minute: Some(Limit { limit: 300, shadow: true }), ..Limits::default() };
        let set = RuleSet::new(Scope::Key, "a", &limits).in_zone(Zone::Fixed(-1));
        let mut expected = vec![0xdc, 0, 3, 0xcf];
        expected.extend(172_860_000u64.to_be_bytes());
        expected.extend([0xdc, 0, 1, 0xd2, 0xff, 0xff, 0xff, 0xff, 0xdc, 0, 6, 5, 1, 1, 0xcf]);
        expected.extend(300u64.to_be_bytes());
        expected.push(0xcf);
        expected.extend(60_000_000u64.to_be_bytes());
        expected.push(1);
        assert_eq!(*of(&set).rules(set.zone(), || panic!("nobody has to know the time")), expected);
    }

    #[test]
    fn a_zone_is_sent_with_the_changes_around_now_and_no_others() {
        let berlin = Zone::named("Europe/Berlin").unwrap();
        let second = |text: &str| text.parse::<jiff::Timestamp>().unwrap().as_second();
        assert_eq!(pack_zone(berlin, second("2026-06-30T00:00:00Z")), [0xdc, 0, 1, 0xd2, 0, 0, 0x1c, 0x20]);
        let autumn = second("2026-10-25T01:00:00Z");
        let mut expected = vec![0xdc, 0, 3, 0xd2, 0, 0, 0x1c, 0x20, 0xcf];
        expected.extend(autumn.to_be_bytes());
        expected.extend([0xd2, 0, 0, 0x0e, 0x10]);
        assert_eq!(pack_zone(berlin, autumn + 86_400), expected);
    }

    #[test]
    fn every_dimension_has_a_number_of_its_own() {
        let mut numbers: Vec<_> = Dimension::ALL.iter().map(|d| number(*d)).collect();
        numbers.sort_unstable();
        assert_eq!(numbers, (1..=9).collect::<Vec<_>>());
        assert_eq!(kinds(), [0xdc, 0, 9, 1, 1, 1, 2, 1, 1, 2, 3, 4]);
    }
}
