//! What a model teaches of our estimates: how far its own counts lie from ours.

use std::sync::atomic::{AtomicU64, Ordering};

/// Calls after which a correction is believed.
const NEEDED: u32 = 20;
/// Weight of the newest call; before [`NEEDED`] calls, all count alike.
const NEWEST: f32 = 1.0 / NEEDED as f32;
/// No correction goes beyond these: an upstream that states nonsense must not make calls free, or refuse them all.
const LEAST: f32 = 0.5;
const MOST: f32 = 2.0;

/// The moving mean of actual / estimate. One atomic: the mean in the low half, the number of calls seen in the high half.
#[derive(Debug)]
pub struct Ratio(AtomicU64);

impl Default for Ratio {
    fn default() -> Self {
        Self(AtomicU64::new(pack(0, 1.0)))
    }
}

const fn pack(seen: u32, mean: f32) -> u64 {
    ((seen as u64) << 32) | mean.to_bits() as u64
}

const fn unpack(packed: u64) -> (u32, f32) {
    ((packed >> 32) as u32, f32::from_bits(packed as u32))
}

impl Ratio {
    /// Learns from one call. A call without tokens teaches nothing.
    pub fn observe(&self, estimate: u64, actual: u64) {
        if estimate == 0 || actual == 0 {
            return;
        }
        // One odd call moves the mean no further than the bounds allow.
        let ratio = (actual as f64 / estimate as f64).clamp(f64::from(LEAST / 2.0), f64::from(MOST * 2.0)) as f32;
        let learn = |packed| {
            let (seen, mean) = unpack(packed);
            let weight = (1.0 / (seen as f32 + 1.0)).max(NEWEST);
            Some(pack(seen.saturating_add(1), mean + weight * (ratio - mean)))
        };
        // The closure never declines, so there is nothing to handle.
        let _ = self.0.try_update(Ordering::Relaxed, Ordering::Relaxed, learn);
    }

    /// The correction, once enough was seen.
    pub fn known(&self) -> Option<f32> {
        let (seen, mean) = unpack(self.0.load(Ordering::Relaxed));
        (seen >= NEEDED).then(|| mean.clamp(LEAST, MOST))
    }

    /// An estimate, corrected as far as that is known.
    pub fn correct(&self, estimate: u64) -> u64 {
        match self.known() {
            Some(ratio) => (estimate as f64 * f64::from(ratio)).round() as u64,
            None => estimate,
        }
    }
}

/// What is known of one model at one upstream. It outlives a configuration.
#[derive(Debug, Default)]
pub struct Learned {
    /// Of prompts.
    pub input: Ratio,
    /// Of answers.
    pub output: Ratio,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_correction_is_applied_after_twenty_calls_and_not_before() {
        let ratio = Ratio::default();
        for _ in 0..19 {
            ratio.observe(100, 130);
        }
        assert_eq!((ratio.known(), ratio.correct(1_000)), (None, 1_000));
        ratio.observe(100, 130);
        assert_eq!(ratio.correct(1_000), 1_300);
    }

    #[test]
    fn a_correction_follows_the_model_and_stays_within_half_and_double() {
        let ratio = Ratio::default();
        (0..50).for_each(|_| ratio.observe(100, 80));
        assert_eq!(ratio.correct(1_000), 800);
        (0..200).for_each(|_| ratio.observe(100, 120));
        assert_eq!(ratio.correct(1_000), 1_200);
        (0..200).for_each(|_| ratio.observe(1, u64::MAX));
        assert_eq!(ratio.correct(1_000), 2_000);
        (0..200).for_each(|_| ratio.observe(u64::MAX, 1));
        assert_eq!(ratio.correct(1_000), 500);
    }

    #[test]
    fn one_odd_call_does_not_overturn_what_was_learned() {
        let ratio = Ratio::default();
        (0..100).for_each(|_| ratio.observe(100, 100));
        ratio.observe(1, 1_000_000);
        assert!((1_000..1_200).contains(&ratio.correct(1_000)));
        ratio.observe(0, 10);
        ratio.observe(10, 0);
        assert!((1_000..1_200).contains(&ratio.correct(1_000)));
    }

    #[test]
    fn calls_at_the_same_time_are_all_counted() {
        let ratio = Ratio::default();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..1_000).for_each(|_| ratio.observe(10, 15)));
            }
        });
        assert_eq!(unpack(ratio.0.load(Ordering::Relaxed)).0, 4_000);
        assert_eq!(ratio.correct(1_000), 1_500);
    }
}
