//! What was used without the store, by the time of admission: so that a day is charged with what was admitted in it.
//!
//! Close to now the times are exact to a second. What is older is only of interest for longer windows and is summed over
//! longer spans, so that a long outage of many keys stays small. Every span counts as of its last admission: it leaves a
//! window late rather than early.

use std::collections::BTreeMap;

use super::Amount;
use crate::limit::rule::Plan;

const SECOND: u64 = 1_000_000;
/// No two calendar days, in whatever zone, share one of these.
const QUARTER: u64 = 900 * SECOND;
/// Spans after which old ones are summed.
const MANY: usize = 192;

/// What the calls of one plan used.
#[derive(Debug)]
pub(super) struct Spent {
    pub(super) plan: Plan,
    /// By the beginning of the span, in microseconds of the server's clock.
    spans: BTreeMap<u64, Amount>,
    /// Spans at which the next sum is due.
    due: usize,
}

impl Spent {
    pub(super) fn new(plan: &Plan) -> Self {
        Self { plan: plan.clone(), spans: BTreeMap::new(), due: MANY }
    }

    /// One call more, admitted at `at`.
    pub(super) fn add(&mut self, at: u64, tokens: u64) {
        put(&mut self.spans, at - at % SECOND, Amount { at, requests: 1, tokens });
        if self.spans.len() >= self.due {
            self.sum();
            self.due = self.spans.len().saturating_add(MANY);
        }
    }

    fn sum(&mut self) {
        let newest = self.spans.last_key_value().map_or(0, |(start, _)| *start);
        for (start, amount) in std::mem::take(&mut self.spans) {
            let width = match (newest - start) / SECOND {
                0..=60 => SECOND,
                61..=3_600 => 60 * SECOND,
                _ => QUARTER,
            };
            put(&mut self.spans, start - start % width, amount);
        }
    }

    /// All of it, oldest first.
    pub(super) fn amounts(&self) -> Vec<Amount> {
        self.spans.values().copied().collect()
    }
}

fn put(spans: &mut BTreeMap<u64, Amount>, start: u64, amount: Amount) {
    let sum = spans.entry(start).or_insert(Amount { at: 0, requests: 0, tokens: 0 });
    sum.at = sum.at.max(amount.at);
    sum.requests = sum.requests.saturating_add(amount.requests);
    sum.tokens = sum.tokens.saturating_add(amount.tokens);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_outage_stays_small_loses_nothing_and_mixes_no_two_days() {
        let mut spent = Spent::new(&Plan::new());
        let midnight = 20_000 * 86_400;
        // Two calls a second, for an hour before midnight and two after it.
        for second in 0..10_800 {
            let at = (midnight - 3_600 + second) * SECOND;
            spent.add(at, 3);
            spent.add(at + 400_000, 4);
        }
        let amounts = spent.amounts();
        assert!(amounts.len() < 2 * MANY, "{}", amounts.len());
        let sum = |of: &dyn Fn(&Amount) -> bool| {
            let some = amounts.iter().filter(|amount| of(amount));
            some.fold((0, 0), |sum, amount| (sum.0 + amount.requests, sum.1 + amount.tokens))
        };
        assert_eq!(sum(&|amount| amount.at < midnight * SECOND), (7_200, 25_200));
        assert_eq!(sum(&|amount| amount.at >= midnight * SECOND), (14_400, 50_400));
        // The last minute is known to the second.
        let last = (midnight - 3_600 + 10_799) * SECOND;
        assert!(sum(&|amount| amount.at > last - 60 * SECOND).0 <= 122);
        assert_eq!(amounts.last(), Some(&Amount { at: last + 400_000, requests: 2, tokens: 7 }));
    }
}
