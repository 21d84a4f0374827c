//! The ways to decide, each for one round.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use futures::future::try_join_all;
use tollgate_filters::limit::{
    Decision, Estimate, Ledger, Limit, Limits, Plan, RedisOptions, Reservation, RuleSet, Scope, Watch, WhenDown,
};
use tollgate_filters::store::Address;
use tollgate_filters::usage::Usage;

use super::replay::Replay;
use super::server::Server;
use super::{Arm, LedgerConfig, Round, percentile};
use crate::bench::cpu::{CpuTime, Source};

const ESTIMATE: Estimate = Estimate { prompt: 100, completion: 400, guessed: false };
/// For what may take long on a busy machine; no decision may fail.
const ROOMY: Duration = Duration::from_secs(10);

/// Counts what the store is asked.
#[derive(Default)]
struct Counted {
    reserved: AtomicU64,
    settled: AtomicU64,
}

impl Watch for Counted {
    fn set_store_up(&self, _: bool) {}

    fn store_took(&self, op: &'static str, _: Duration) {
        self.reserved.fetch_add(u64::from(op == "reserve"), Ordering::Relaxed);
        self.settled.fetch_add(u64::from(op == "settle"), Ordering::Relaxed);
    }

    fn refused_again(&self) {}
}

pub(super) struct Bench<'a> {
    config: &'a LedgerConfig,
    source: Source,
    server: &'a Server,
    keys: Vec<Arc<RuleSet>>,
    /// Model and global.
    above: [Arc<RuleSet>; 2],
}

impl<'a> Bench<'a> {
    pub(super) fn new(config: &'a LedgerConfig, source: Source, server: &'a Server) -> Self {
        // The free tier's dimensions, so wide that none is ever reached.
        let limit = |limit| Some(Limit { limit, shadow: false });
        let limits = Limits {
            requests_per_minute: limit(1 << 40),
            requests_per_hour: limit(1 << 40),
            tokens_per_day: limit(1 << 50),
            ..Limits::default()
        };
        let set = |scope, name: &str| Arc::new(RuleSet::new(scope, name, &limits));
        Self {
            config,
            source,
            server,
            keys: (0..config.keys.max(1)).map(|n| set(Scope::Key, &n.to_string())).collect(),
            above: [set(Scope::Model, "chat"), set(Scope::Global, "")],
        }
    }

    pub(super) async fn round(&self, arm: Arm) -> Result<Round, String> {
        match arm {
            Arm::Memory => self.memory().await,
            Arm::RedisKey => self.redis(&[]).await,
            Arm::RedisAll => self.redis(&self.above).await,
            Arm::Commands => self.commands().await,
        }
    }

    /// Keys in an order that no cache foresees.
    fn key(&self, n: u32) -> Result<&Arc<RuleSet>, String> {
        let at = n.wrapping_mul(2_654_435_761) as usize % self.keys.len();
        self.keys.get(at).ok_or_else(|| "there are no keys".to_owned())
    }

    fn plan(&self, n: u32, above: &[Arc<RuleSet>]) -> Result<Plan, String> {
        let mut plan = Plan::new();
        plan.add(self.key(n)?);
        above.iter().for_each(|set| plan.add(set));
        Ok(plan)
    }

    /// Half as long to half as long again, so that the callers do not come all at once.
    async fn pause(&self) {
        if !self.config.pause.is_zero() {
            tokio::time::sleep(self.config.pause.mul_f64(rand::random_range(0.5..1.5))).await;
        }
    }

    fn look(&self) -> Result<(CpuTime, CpuTime), String> {
        let look = |pid| CpuTime::look(pid, self.source).ok_or_else(|| format!("process {pid} is gone"));
        Ok((look(std::process::id())?, look(self.server.pid)?))
    }

    /// Microseconds of CPU time per decision since then, of this process and of the store.
    fn used(&self, since: &(CpuTime, CpuTime), decisions: u32) -> Result<(f64, f64), String> {
        let now = self.look()?;
        let each = |used: Duration| used.as_secs_f64() * 1e6 / f64::from(decisions.max(1));
        Ok((each(now.0.since(&since.0)), each(now.1.since(&since.1))))
    }

    async fn memory(&self) -> Result<Round, String> {
        let (ledger, decisions) = (Ledger::in_memory(), self.config.in_memory);
        // Every key has its counters before it counts.
        for n in 0..u32::try_from(self.keys.len()).unwrap_or(u32::MAX) {
            settle(reserve(&ledger, &self.plan(n, &self.above)?).await?);
        }
        let before = self.look()?;
        for n in 0..decisions {
            settle(reserve(&ledger, &self.plan(n, &self.above)?).await?);
        }
        let own_us = self.used(&before, decisions)?.0;
        Ok(Round { own_us, store_us: None, p50_us: None, p99_us: None, before: 0.0, after: 0.0 })
    }

    async fn redis(&self, above: &[Arc<RuleSet>]) -> Result<Round, String> {
        let counted = Arc::new(Counted::default());
        let options = RedisOptions {
            address: Address::parse(&format!("redis://127.0.0.1:{}", self.server.port))?,
            timeout: ROOMY,
            when_down: WhenDown::Closed,
            replicas: 1,
        };
        let ledger = Ledger::in_redis(&options, Arc::clone(&counted) as Arc<dyn Watch>).await;
        // The scripts are there, and so is the connection.
        settle(reserve(&ledger, &self.plan(0, above)?).await?);
        ledger.flush(ROOMY).await;
        let asked = || (counted.reserved.load(Ordering::Relaxed), counted.settled.load(Ordering::Relaxed));
        let (first, before) = (asked(), self.look()?);
        let (ledger, callers) = (&ledger, self.config.callers.max(1));
        let calls = (0..callers).map(|caller| async move {
            let mut waits = Vec::new();
            for n in (0..self.config.in_redis).skip(caller).step_by(callers) {
                let plan = self.plan(n, above)?;
                let begin = Instant::now();
                let reservation = reserve(ledger, &plan).await?;
                waits.push(begin.elapsed());
                settle(reservation);
                self.pause().await;
            }
            Ok::<_, String>(waits)
        });
        let waits = try_join_all(calls).await?;
        ledger.flush(ROOMY).await;
        let used = self.used(&before, self.config.in_redis)?;
        let last = asked();
        Ok(round(used, waits, (last.0 - first.0, last.1 - first.1)))
    }

    async fn commands(&self) -> Result<Round, String> {
        let callers = self.config.callers.max(1);
        let mut wires = Vec::new();
        for _ in 0..callers {
            wires.push(Replay::connect(self.server.port).await?);
        }
        let before = self.look()?;
        let calls = wires.into_iter().enumerate().map(|(caller, mut replay)| async move {
            let mut waits = Vec::new();
            for n in (0..self.config.in_redis).skip(caller).step_by(callers) {
                let key = self.key(n)?.id().name();
                let begin = Instant::now();
                replay.begin(key).await?;
                waits.push(begin.elapsed());
                replay.end(key).await?;
                self.pause().await;
            }
            Ok::<_, String>((waits, replay.asked()))
        });
        let done = try_join_all(calls).await?;
        let used = self.used(&before, self.config.in_redis)?;
        let asked = done.iter().fold((0, 0), |sum, (_, asked)| (sum.0 + asked.0, sum.1 + asked.1));
        Ok(round(used, done.into_iter().map(|(waits, _)| waits).collect(), asked))
    }
}

async fn reserve(ledger: &Ledger, plan: &Plan) -> Result<Reservation, String> {
    match ledger.reserve(plan, ESTIMATE).await {
        Ok(Decision::Admitted(reservation)) => Ok(reservation),
        Ok(Decision::Refused(refusal, _)) => Err(format!("refused: {refusal:?}")),
        Err(error) => Err(error.to_string()),
    }
}

fn settle(reservation: Reservation) {
    reservation.settle(&Usage { input: 90, output: 210, ..Usage::default() });
}

fn round(used: (f64, f64), waits: Vec<Vec<Duration>>, asked: (u64, u64)) -> Round {
    let mut waits = waits.concat();
    waits.sort_unstable();
    let each = |asked: u64| asked as f64 / waits.len().max(1) as f64;
    Round {
        own_us: used.0,
        store_us: Some(used.1),
        p50_us: percentile(&waits, 50),
        p99_us: percentile(&waits, 99),
        before: each(asked.0),
        after: each(asked.1),
    }
}
