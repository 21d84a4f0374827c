//! What a decision of the ledger costs: a reservation over all rules of a call, and its settlement.
//!
//! In memory; in Redis, which is started for this and has a core of its own; and, on the same server, as the plain
//! commands one after the other that a script in the proxy sends. They run one after another in rounds; of all rounds the
//! lowest figure counts, and all are shown. A limit is never reached: what is measured is the way through.

mod arms;
mod replay;
pub(super) mod server;

use std::fmt::Write;
use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;

use self::server::Server;
use super::cpu::Source;
use super::gateway::Cores;

/// What is measured, and how often.
#[derive(Clone, Debug)]
pub struct LedgerConfig {
    /// Keys that call in turn.
    pub keys: usize,
    /// Calls at a time, where the store is Redis.
    pub callers: usize,
    /// What a caller does between the end of a call and the next, where the store is Redis: without it the store is never
    /// idle, and what calls wait for is each other.
    pub pause: Duration,
    /// Rounds over all arms.
    pub rounds: usize,
    /// Decisions of a round in memory.
    pub in_memory: u32,
    /// Decisions of a round in Redis.
    pub in_redis: u32,
    /// The program `redis-server`.
    pub redis_server: PathBuf,
    /// Whether the store has a core of its own, if there are two.
    pub pinned: bool,
}

impl Default for LedgerConfig {
    fn default() -> Self {
        Self {
            keys: 10_000,
            callers: 16,
            pause: Duration::from_millis(5),
            rounds: 5,
            in_memory: 500_000,
            in_redis: 10_000,
            redis_server: "redis-server".into(),
            pinned: true,
        }
    }
}

/// One way to decide.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Arm {
    /// The ledger in memory: scopes key, model and global, each with the limits of a free tier.
    Memory,
    /// The ledger in Redis with the limits of the key alone: as much as the plain commands do.
    RedisKey,
    /// The ledger in Redis with all three scopes.
    RedisAll,
    /// Plain commands for the limits of the key.
    Commands,
}

impl Arm {
    const ALL: [Self; 4] = [Self::Memory, Self::RedisKey, Self::RedisAll, Self::Commands];

    const fn name(self) -> &'static str {
        match self {
            Self::Memory => "memory, 3 scopes",
            Self::RedisKey => "redis, 1 scope",
            Self::RedisAll => "redis, 3 scopes",
            Self::Commands => "plain commands, 1 scope",
        }
    }
}

/// One round of one arm, per decision.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Round {
    /// Microseconds of CPU time of this process: of the ledger and its client.
    pub own_us: f64,
    /// Microseconds of CPU time of the store.
    pub store_us: Option<f64>,
    /// Half of the calls waited no longer than so many microseconds before they could go on.
    pub p50_us: Option<f64>,
    /// 99 of 100 calls waited no longer.
    pub p99_us: Option<f64>,
    /// Questions to the store that a call waits for.
    pub before: f64,
    /// Questions to the store that come after it. Below 1 where many settlements go together.
    pub after: f64,
}

/// The figures of one arm.
#[derive(Clone, Debug, Serialize)]
pub struct LedgerRow {
    /// Which way to decide.
    pub arm: &'static str,
    /// The lowest of each figure over all rounds.
    pub lowest: Round,
    /// Decisions in a second of this process's CPU time.
    pub decisions_per_cpu_second: f64,
    /// CPU time of the store by that of the plain commands.
    pub store_ratio: Option<f64>,
    /// Half of the calls' wait by that of the plain commands.
    pub p50_ratio: Option<f64>,
    /// The wait of all but one of 100 calls by that of the plain commands.
    pub p99_ratio: Option<f64>,
    /// Every round.
    pub rounds: Vec<Round>,
}

/// The figures of all arms.
#[derive(Clone, Debug, Serialize)]
pub struct LedgerFigures {
    /// Where CPU time was read.
    pub cpu_source: &'static str,
    /// Core of the store; none if it could not be pinned.
    pub store_core: Option<usize>,
    /// Core of this process; none if it could not be pinned.
    pub own_core: Option<usize>,
    /// Keys that called in turn.
    pub keys: usize,
    /// Calls at a time, where the store is Redis.
    pub callers: usize,
    /// Milliseconds between the end of a caller's call and its next.
    pub pause_ms: f64,
    /// One row per arm.
    pub rows: Vec<LedgerRow>,
}

impl LedgerFigures {
    /// The figures as a table of text.
    pub fn table(&self) -> String {
        let mut out = String::new();
        // Writing to a text cannot fail.
        let _ = writeln!(
            out,
            "{:<24} {:>12} {:>9} {:>9} {:>6} {:>9} {:>6} {:>9} {:>6} {:>12}",
            "per decision",
            "per CPU s",
            "own us",
            "store us",
            "ratio",
            "p50 us",
            "ratio",
            "p99 us",
            "ratio",
            "round trips"
        );
        let figure = |figure: Option<f64>| figure.map_or_else(|| "-".to_owned(), |figure| format!("{figure:.1}"));
        let ratio = |ratio: Option<f64>| ratio.map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.2}"));
        for row in &self.rows {
            let low = &row.lowest;
            let trips = format!("{:.1} + {:.1}", low.before, low.after);
            let _ = writeln!(
                out,
                "{:<24} {:>12.0} {:>9.2} {:>9} {:>6} {:>9} {:>6} {:>9} {:>6} {:>12}",
                row.arm,
                row.decisions_per_cpu_second,
                low.own_us,
                figure(low.store_us),
                ratio(row.store_ratio),
                figure(low.p50_us),
                ratio(row.p50_ratio),
                figure(low.p99_us),
                ratio(row.p99_ratio),
                trips
            );
        }
        for row in &self.rows {
            let rounds = row
                .rounds
                .iter()
                .map(|round| format!("{:.2}/{}/{}", round.own_us, figure(round.store_us), figure(round.p50_us)));
            let _ = writeln!(out, "rounds of {}, own/store/p50: {}", row.arm, rounds.collect::<Vec<_>>().join(" "));
        }
        out
    }
}

/// Runs the bench. Progress goes to `say`, a line at a time.
///
/// # Errors
/// When Redis does not start, or any decision fails: figures with errors in them mean nothing.
pub async fn run(config: LedgerConfig, say: &mut (dyn FnMut(String) + Send)) -> Result<LedgerFigures, String> {
    let cores = if config.pinned { Cores::split() } else { Cores { gateway: None, load: None } };
    cores.pin_self()?;
    let source = Source::best(std::process::id());
    let server = Server::start(&config.redis_server, &cores).await?;
    let bench = arms::Bench::new(&config, source, &server);
    let mut all: Vec<(Arm, Vec<Round>)> = Arm::ALL.into_iter().map(|arm| (arm, Vec::new())).collect();
    for round in 1..=config.rounds.max(1) {
        for (arm, rounds) in &mut all {
            let done = bench.round(*arm).await?;
            let wait = done.p50_us.map_or_else(String::new, |p50| format!(", p50 {p50:.0} us"));
            say(format!("round {round}: {:<24} {:>7.2} us own{wait}", arm.name(), done.own_us));
            rounds.push(done);
        }
    }
    server.stop().await;
    let plain = all.iter().find(|(arm, _)| *arm == Arm::Commands).map(|(_, rounds)| lowest(rounds));
    let rows = all.into_iter().map(|(arm, rounds)| row(arm, rounds, plain.as_ref())).collect();
    Ok(LedgerFigures {
        cpu_source: source.name(),
        store_core: cores.gateway,
        own_core: cores.load,
        keys: config.keys,
        callers: config.callers,
        pause_ms: config.pause.as_secs_f64() * 1e3,
        rows,
    })
}

fn row(arm: Arm, rounds: Vec<Round>, plain: Option<&Round>) -> LedgerRow {
    let lowest = lowest(&rounds);
    let ratio = |of: fn(&Round) -> Option<f64>| Some(of(&lowest)? / of(plain?)?);
    LedgerRow {
        arm: arm.name(),
        decisions_per_cpu_second: 1e6 / lowest.own_us,
        store_ratio: ratio(|round| round.store_us),
        p50_ratio: ratio(|round| round.p50_us),
        p99_ratio: ratio(|round| round.p99_us),
        lowest,
        rounds,
    }
}

fn lowest(rounds: &[Round]) -> Round {
    let figure = |of: fn(&Round) -> f64| rounds.iter().map(of).fold(f64::INFINITY, f64::min);
    let known = |of: fn(&Round) -> Option<f64>| rounds.iter().filter_map(of).reduce(f64::min);
    Round {
        own_us: figure(|round| round.own_us),
        store_us: known(|round| round.store_us),
        p50_us: known(|round| round.p50_us),
        p99_us: known(|round| round.p99_us),
        before: figure(|round| round.before),
        after: figure(|round| round.after),
    }
}

/// The wait that so many of a hundred calls did not exceed, in microseconds.
fn percentile(sorted: &[Duration], of_hundred: usize) -> Option<f64> {
    let at = (sorted.len() * of_hundred / 100).min(sorted.len().saturating_sub(1));
    sorted.get(at).map(|took| took.as_secs_f64() * 1e6)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lowest_of_each_figure_counts_and_ratios_are_to_the_plain_commands() {
        let round = |own_us, p50_us| Round {
            own_us,
            store_us: None,
            p50_us: Some(p50_us),
            p99_us: Some(4.0 * p50_us),
            before: 1.0,
            after: 0.5,
        };
        let plain = lowest(&[round(9.0, 50.0), round(8.0, 60.0)]);
        assert_eq!((plain.own_us, plain.p50_us, plain.store_us), (8.0, Some(50.0), None));
        let row = row(Arm::RedisKey, vec![round(4.0, 25.0), round(5.0, 30.0)], Some(&plain));
        assert_eq!((row.p50_ratio, row.store_ratio, row.decisions_per_cpu_second), (Some(0.5), None, 250_000.0));
    }

    #[test]
    fn percentiles_are_waits_that_happened() {
        let waits: Vec<Duration> = (1..=100).map(Duration::from_micros).collect();
        let rounded = |of| percentile(&waits, of).map(f64::round);
        assert_eq!((rounded(50), rounded(99), rounded(100)), (Some(51.0), Some(100.0), Some(100.0)));
        assert_eq!(percentile(&[], 50), None);
    }

    #[tokio::test]
    async fn every_arm_is_measured() {
        let config = LedgerConfig {
            keys: 50,
            callers: 4,
            rounds: 1,
            in_memory: 2_000,
            in_redis: 200,
            pause: Duration::ZERO,
            pinned: false,
            ..LedgerConfig::default()
        };
        let figures = run(config, &mut |_| ()).await.unwrap();
        let trips: Vec<(f64, f64)> = figures.rows.iter().map(|row| (row.lowest.before, row.lowest.after)).collect();
        assert_eq!(trips.len(), Arm::ALL.len());
        assert_eq!(trips[0], (0.0, 0.0));
        assert!(trips[1].0 == 1.0 && trips[1].1 <= 1.0 && trips[2].0 == 1.0, "{trips:?}");
        // A key's first call of a window also says when it ends.
        assert!((4.0..=7.0).contains(&trips[3].0) && trips[3].1 == 2.0, "{trips:?}");
        assert!(figures.rows.iter().all(|row| row.lowest.own_us.is_finite()));
        assert!(figures.table().contains("plain commands"));
    }
}
