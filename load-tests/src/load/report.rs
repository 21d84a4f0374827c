//! What came of a load.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;

/// How one request went.
#[derive(Default)]
pub(super) struct Sample {
    pub(super) took: Duration,
    pub(super) first_token: Option<Duration>,
    pub(super) chunks: u64,
    pub(super) bytes: u64,
}

/// What became of one request.
pub(super) enum Outcome {
    Whole,
    Abandoned,
    Status(u16),
    Failed(&'static str),
}

#[derive(Default)]
pub(super) struct Totals {
    requests: u64,
    ok: u64,
    abandoned: u64,
    errors: BTreeMap<String, u64>,
    chunks: u64,
    bytes: u64,
    latency: Vec<Duration>,
    first_token: Vec<Duration>,
}

/// Quantiles in milliseconds; all 0 where nothing was measured.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Quantiles {
    /// Half were faster.
    pub p50: f64,
    /// 90 of 100 were faster.
    pub p90: f64,
    /// 99 of 100 were faster.
    pub p99: f64,
    /// The slowest.
    pub max: f64,
}

impl Quantiles {
    fn of(mut times: Vec<Duration>) -> Self {
        times.sort_unstable();
        let at = |percent: usize| {
            let rank = (times.len() * percent).div_ceil(100).max(1) - 1;
            times.get(rank).map_or(0.0, |time| time.as_secs_f64() * 1000.0)
        };
        Self { p50: at(50), p90: at(90), p99: at(99), max: at(100) }
    }
}

/// What came of a load.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Requests sent.
    pub requests: u64,
    /// Answered whole with status 200.
    pub ok: u64,
    /// Streams dropped on purpose.
    pub abandoned: u64,
    /// The others, by status or by what went wrong (`connect`, `no_answer`, `broken_body`, `no_done`, `timeout`).
    pub errors: BTreeMap<String, u64>,
    /// From the first request to the last answer.
    pub seconds: f64,
    /// Requests per second over that time.
    pub requests_per_second: f64,
    /// Times of whole answers.
    pub latency_ms: Quantiles,
    /// Times to the second event of a stream.
    pub ttft_ms: Quantiles,
    /// SSE data lines received.
    pub chunks: u64,
    /// SSE data lines per second.
    pub chunks_per_second: f64,
    /// Bytes of answers received.
    pub bytes: u64,
}

impl Totals {
    pub(super) fn add(&mut self, sample: Sample, outcome: Outcome) {
        self.requests += 1;
        self.chunks += sample.chunks;
        self.bytes += sample.bytes;
        self.first_token.extend(sample.first_token);
        match outcome {
            Outcome::Whole => {
                self.ok += 1;
                self.latency.push(sample.took);
            }
            Outcome::Abandoned => self.abandoned += 1,
            Outcome::Status(status) => *self.errors.entry(status.to_string()).or_default() += 1,
            Outcome::Failed(what) => *self.errors.entry(what.to_owned()).or_default() += 1,
        }
    }

    pub(super) fn report(self, took: Duration) -> Report {
        let seconds = took.as_secs_f64();
        Report {
            requests: self.requests,
            ok: self.ok,
            abandoned: self.abandoned,
            errors: self.errors,
            seconds,
            requests_per_second: self.requests as f64 / seconds,
            latency_ms: Quantiles::of(self.latency),
            ttft_ms: Quantiles::of(self.first_token),
            chunks: self.chunks,
            chunks_per_second: self.chunks as f64 / seconds,
            bytes: self.bytes,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_values_that_occurred() {
        let times = (1..=100).rev().map(Duration::from_millis).collect();
        let quantiles = Quantiles::of(times);
        assert_eq!((quantiles.p50, quantiles.p90, quantiles.p99, quantiles.max), (50.0, 90.0, 99.0, 100.0));
        assert_eq!(Quantiles::of(Vec::new()).p99, 0.0);
        assert_eq!(Quantiles::of(vec![Duration::from_millis(7)]).p50, 7.0);
    }
}
