//! How long an answer will probably be, learned per key and model.

use std::collections::HashMap;
use std::hash::BuildHasher;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use super::rule::seed;

/// The guess while too few answers were seen.
pub const START: u64 = 512;

/// Answers that are remembered, and how many are needed before they are believed.
const REMEMBERED: usize = 32;
const NEEDED: usize = 8;

const SHARDS: usize = 16;
/// Pairs of key and model per shard; more push out old ones.
const PER_SHARD: usize = 4_096;

#[derive(Debug)]
struct Answers {
    /// The last answers in tokens, as a ring.
    ring: [u32; REMEMBERED],
    seen: usize,
    guess: u32,
    touched: u64,
}

impl Answers {
    fn observe(&mut self, output: u64, tick: u64) {
        if let Some(slot) = self.ring.get_mut(self.seen % REMEMBERED) {
            *slot = u32::try_from(output).unwrap_or(u32::MAX);
        }
        self.seen = self.seen.saturating_add(1);
        self.touched = tick;
        let mut sorted = self.ring;
        let known = self.seen.min(REMEMBERED);
        if let Some(sorted) = sorted.get_mut(..known) {
            sorted.sort_unstable();
            self.guess = sorted.get((known * 9).div_ceil(10).saturating_sub(1)).copied().unwrap_or_default();
        }
    }
}

/// The 90th percentile of the last answers, for every key and model in use. Bounded: what was not used for longest goes.
#[derive(Debug, Default)]
pub struct Guesses {
    shards: [Mutex<HashMap<u64, Answers>>; SHARDS],
    tick: AtomicU64,
}

impl Guesses {
    /// Tokens to reserve for an answer without `max_tokens`. 512 until eight answers were seen.
    pub fn get(&self, key: &str, model: &str) -> u64 {
        let pair = seed().hash_one((key, model));
        let shard = self.shard(pair).map(Mutex::lock);
        let known = shard.as_ref().and_then(|shard| shard.get(&pair)).filter(|answers| answers.seen >= NEEDED);
        known.map_or(START, |answers| u64::from(answers.guess).max(1))
    }

    /// Learns from an answer of `output` tokens that came to its end.
    pub fn observe(&self, key: &str, model: &str, output: u64) {
        let pair = seed().hash_one((key, model));
        let tick = self.tick.fetch_add(1, Ordering::Relaxed);
        let Some(mut shard) = self.shard(pair).map(Mutex::lock) else { return };
        if shard.len() >= PER_SHARD && !shard.contains_key(&pair) {
            // The stalest of a handful: near enough to the stalest of all, without an order to maintain.
            let stale = shard.iter().take(8).min_by_key(|(_, answers)| answers.touched).map(|(pair, _)| *pair);
            if let Some(stale) = stale {
                shard.remove(&stale);
            }
        }
        let fresh = || Answers { ring: [0; REMEMBERED], seen: 0, guess: 0, touched: tick };
        shard.entry(pair).or_insert_with(fresh).observe(output, tick);
    }

    fn shard(&self, pair: u64) -> Option<&Mutex<HashMap<u64, Answers>>> {
        self.shards.get(usize::try_from(pair % SHARDS as u64).unwrap_or(0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_pair_starts_at_the_default_and_learns_the_ninetieth_percentile() {
        let guesses = Guesses::default();
        assert_eq!(guesses.get("alice", "chat"), START);
        for output in 1..=7 {
            guesses.observe("alice", "chat", output);
        }
        assert_eq!(guesses.get("alice", "chat"), START);
        for output in 8..=10 {
            guesses.observe("alice", "chat", output);
        }
        assert_eq!(guesses.get("alice", "chat"), 9);
        assert_eq!(guesses.get("alice", "other"), START);
        assert_eq!(guesses.get("bob", "chat"), START);
    }

    #[test]
    fn old_answers_are_forgotten() {
        let guesses = Guesses::default();
        (0..100).for_each(|_| guesses.observe("alice", "chat", 4_000));
        assert_eq!(guesses.get("alice", "chat"), 4_000);
        (0..REMEMBERED).for_each(|_| guesses.observe("alice", "chat", 20));
        assert_eq!(guesses.get("alice", "chat"), 20);
    }

    #[test]
    fn an_empty_answer_still_reserves_something() {
        let guesses = Guesses::default();
        (0..NEEDED).for_each(|_| guesses.observe("alice", "embed", 0));
        assert_eq!(guesses.get("alice", "embed"), 1);
    }

    #[test]
    fn the_number_of_pairs_is_bounded() {
        let guesses = Guesses::default();
        for key in 0..(SHARDS * PER_SHARD + 5_000) {
            guesses.observe(&key.to_string(), "chat", 1);
        }
        let pairs: usize = guesses.shards.iter().map(|shard| shard.lock().len()).sum();
        assert!(pairs <= SHARDS * PER_SHARD);
    }
}
