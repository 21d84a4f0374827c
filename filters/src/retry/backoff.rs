//! How long to wait before a node is asked again: exponential with full jitter (Brooker, "Exponential Backoff and Jitter").

use std::time::Duration;

/// No wait is longer, however many came before it.
const LONGEST: Duration = Duration::from_secs(5);

/// The wait before the `round`th repetition, the first being 0. `random` lies in 0..1 and spreads the wait over the whole
/// of its span; without it the wait is the span.
pub fn backoff(base: Duration, round: u32, random: Option<f64>) -> Duration {
    let span = base.saturating_mul(2u32.saturating_pow(round)).min(LONGEST.max(base));
    match random {
        Some(random) => span.mul_f64(random.clamp(0.0, 1.0)),
        None => span,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_a_bound() {
        let waits: Vec<u64> =
            (0..8).map(|round| backoff(Duration::from_millis(100), round, None).as_millis() as u64).collect();
        assert_eq!(waits, [100, 200, 400, 800, 1600, 3200, 5000, 5000]);
        assert_eq!(backoff(Duration::from_secs(9), 3, None), Duration::from_secs(9));
        assert_eq!(backoff(Duration::ZERO, u32::MAX, None), Duration::ZERO);
    }

    #[test]
    fn jitter_spreads_a_wait_over_its_whole_span() {
        let span = Duration::from_millis(400);
        assert_eq!(backoff(Duration::from_millis(100), 2, Some(0.0)), Duration::ZERO);
        assert_eq!(backoff(Duration::from_millis(100), 2, Some(0.5)), span / 2);
        assert_eq!(backoff(Duration::from_millis(100), 2, Some(1.0)), span);
    }
}
