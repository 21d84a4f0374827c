use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use proptest::prelude::*;

use super::server::Server;
use super::*;
use crate::limit::dimension::{Limit, Limits};
use crate::limit::memory::model::{Subject, cases, starts, steps};
use crate::limit::memory::{Verdicts, clamp, model};
use crate::limit::reservation::Estimate;
use crate::limit::rule::{RuleSet, Scope};

fn limit(limit: u64) -> Option<Limit> {
    Some(Limit { limit, shadow: false })
}

fn key(limits: &Limits) -> Plan {
    [&Arc::new(RuleSet::new(Scope::Key, "alice", limits))].into_iter().collect()
}

/// The commands over one connection, with a clock that stands where it is set.
struct Remote {
    tokio: tokio::runtime::Runtime,
    connection: MultiplexedConnection,
    commands: Commands,
    ids: AtomicU64,
    _server: Arc<Server>,
}

impl Remote {
    fn to(server: &Arc<Server>) -> Self {
        let tokio = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let client = redis::Client::open(server.url()).unwrap();
        let connection = tokio.block_on(async {
            let mut connection = client.get_multiplexed_async_connection().await.unwrap();
            redis::cmd("FLUSHALL").query_async::<()>(&mut connection).await.unwrap();
            connection
        });
        let look = "local clock = redis.call('TIME')\nlocal now = clock[1] * 1000000 + clock[2]";
        assert!(LIB.contains(look));
        let mut commands = Commands::with(7, &LIB.replace(look, "local now = tonumber(table.remove(ARGV))"));
        commands.now = Some(AtomicU64::new(0));
        Self { tokio, connection, commands, ids: AtomicU64::new(1), _server: Arc::clone(server) }
    }

    fn at(&self, now: Instant64) {
        self.commands.now.as_ref().unwrap().store(now.0, Ordering::Release);
    }

    fn wait<T>(&self, future: impl Future<Output = RedisResult<T>>) -> T {
        self.tokio.block_on(future).unwrap()
    }

    fn epoch(&self) -> u64 {
        self.wait(self.commands.beat(&self.connection, 1)).epoch
    }

    fn raw<T: redis::FromRedisValue>(&self, command: &[&str]) -> T {
        let mut connection = self.connection.clone();
        let mut cmd = redis::cmd(command[0]);
        cmd.arg(&command[1..]);
        self.wait(cmd.query_async(&mut connection))
    }
}

impl Subject for Remote {
    fn reserve(&self, plan: &Plan, estimate: Estimate, now: Instant64) -> Verdicts {
        self.at(now);
        let id = LeaseId(self.ids.load(Ordering::Relaxed));
        let tokens = clamp(plan, estimate);
        let charge = estimate.prompt.min(tokens);
        let asked = Asked { id, plan, tokens, charge, admitted: false, deadline: 0 };
        match self.wait(self.commands.reserve(&self.connection, &asked)) {
            Decided::Admitted(standings) => {
                self.ids.fetch_add(1, Ordering::Relaxed);
                Verdicts::Admitted { id, reserved: tokens, standings }
            }
            Decided::Refused(refusal, standings) => Verdicts::Refused { refusal, standings },
            Decided::Known | Decided::Late => panic!("neither known nor late"),
        }
    }

    fn settle(&self, id: LeaseId, tokens: u64, now: Instant64) -> Settled {
        self.at(now);
        let ended = [Ended { id, tokens, epoch: 1 }];
        self.wait(self.commands.settle(&self.connection, &ended)).0[0]
    }

    fn renew(&self, id: LeaseId, progress: u64, now: Instant64) -> Renewed {
        self.at(now);
        self.wait(self.commands.renew(&self.connection, &[(id, progress)]))[0]
    }

    fn query(&self, plan: &Plan, now: Instant64) -> Standings {
        self.at(now);
        self.wait(self.commands.query(&self.connection, plan))
    }

    fn reset(&self, id: &ScopeId, now: Instant64) {
        self.at(now);
        self.wait(self.commands.reset(&self.connection, id));
    }

    fn sweep(&self, now: Instant64) {
        self.at(now);
        while self.wait(self.commands.sweep(&self.connection)).0 > 0 {}
    }

    fn ttl(&self) -> u64 {
        LEASE_MICROS
    }
}

proptest! {
    #![proptest_config(cases(200))]

    #[test]
    fn redis_answers_as_the_memory_does_and_as_the_log_does(start in starts(), steps in steps(true)) {
        static SERVER: std::sync::OnceLock<Arc<Server>> = std::sync::OnceLock::new();
        let server = SERVER.get_or_init(|| Arc::new(Server::start()));
        let remote = Remote::to(server);
        remote.epoch();
        model::both_answer_alike(&remote, start, steps)?;
    }
}

#[test]
fn a_clock_that_steps_back_admits_nothing_more_and_loses_nothing() {
    let remote = Remote::to(&Arc::new(Server::start()));
    let plan = key(&Limits { requests_per_minute: limit(3), tokens_per_day: limit(100), ..Limits::default() });
    let noon = Instant64::from_secs(20_000 * 86_400 + 43_200);
    let estimate = Estimate { prompt: 10, completion: 0, guessed: false };
    let earlier = Instant64(noon.0 - 30_000_000);
    let mut admitted = 0;
    for now in [noon, earlier, noon, earlier, earlier] {
        admitted += u32::from(matches!(remote.reserve(&plan, estimate, now), Verdicts::Admitted { .. }));
    }
    assert_eq!(admitted, 3);
    let used: Vec<_> = remote.query(&plan, earlier).iter().map(|s| (s.used(), s.held())).collect();
    assert_eq!(used, [(3, 0), (0, 30)]);
}

#[test]
fn every_scope_has_a_time_to_live_and_leases_go_with_their_calls() {
    let remote = Remote::to(&Arc::new(Server::start()));
    let plan = key(&Limits { requests_per_minute: limit(30), concurrency: limit(30), ..Limits::default() });
    let now = Instant64::from_secs(20_000 * 86_400);
    let estimate = Estimate { prompt: 10, completion: 0, guessed: false };
    let ids: Vec<_> = (0..20)
        .map(|_| match remote.reserve(&plan, estimate, now) {
            Verdicts::Admitted { id, .. } => id,
            Verdicts::Refused { refusal, .. } => panic!("{refusal:?}"),
        })
        .collect();
    assert_eq!(remote.raw::<u64>(&["HLEN", LEASES]), 20);
    assert_eq!(remote.raw::<u64>(&["ZCARD", EXPIRY]), 20);
    let left = remote.raw::<u64>(&["TTL", "tg:{tg}:s:k:alice"]);
    assert!((172_000..=172_860).contains(&left), "{left}");
    for id in ids {
        assert_eq!(remote.settle(id, 5, now), Settled::Done);
    }
    assert_eq!((remote.raw::<u64>(&["HLEN", LEASES]), remote.raw::<u64>(&["ZCARD", EXPIRY])), (0, 0));
}

#[test]
fn a_settlement_after_the_data_was_lost_is_told_from_one_that_comes_twice() {
    let remote = Remote::to(&Arc::new(Server::start()));
    let plan = key(&Limits { tokens_per_day: limit(100), ..Limits::default() });
    let now = Instant64::from_secs(20_000 * 86_400);
    let epoch = remote.epoch();
    let Verdicts::Admitted { id, .. } =
        remote.reserve(&plan, Estimate { prompt: 10, completion: 0, guessed: false }, now)
    else {
        panic!("refused")
    };
    let settle =
        |epoch| remote.wait(remote.commands.settle(&remote.connection, &[Ended { id, tokens: 5, epoch }])).0[0];
    remote.raw::<()>(&["FLUSHALL"]);
    assert_eq!(settle(epoch), Settled::Lost);
    // Pushed under one mark, it counts once.
    for _ in 0..3 {
        remote.wait(remote.commands.spend(&remote.connection, 77, &plan, (1, 5)));
    }
    assert_eq!(remote.query(&plan, now).iter().next().map(|s| s.used()), Some(5));
    remote.at(now);
    let other = remote.wait(remote.commands.beat(&remote.connection, 99)).epoch;
    assert_eq!((other, settle(other)), (99, Settled::Duplicate));
}

#[test]
fn a_question_that_comes_too_late_writes_nothing() {
    let remote = Remote::to(&Arc::new(Server::start()));
    let plan = key(&Limits { requests_per_minute: limit(3), ..Limits::default() });
    remote.at(Instant64(5_000_001));
    let asked = |deadline| Asked { id: LeaseId(1), plan: &plan, tokens: 1, charge: 1, admitted: false, deadline };
    let reserve = |deadline| remote.wait(remote.commands.reserve(&remote.connection, &asked(deadline)));
    assert!(matches!(reserve(5_000_000), Decided::Late));
    assert_eq!(remote.raw::<Vec<String>>(&["KEYS", "*"]), Vec::<String>::new());
    assert!(matches!(reserve(5_000_001), Decided::Admitted(_)));
}

#[test]
fn scripts_that_the_server_forgot_are_sent_again() {
    let remote = Remote::to(&Arc::new(Server::start()));
    let plan = key(&Limits { requests_per_minute: limit(30), ..Limits::default() });
    let now = Instant64::from_secs(1_000_000);
    let estimate = Estimate { prompt: 10, completion: 0, guessed: false };
    for used in 1..=3 {
        remote.raw::<()>(&["SCRIPT", "FLUSH"]);
        assert!(matches!(remote.reserve(&plan, estimate, now), Verdicts::Admitted { .. }));
        assert_eq!(remote.query(&plan, now).iter().next().map(|s| s.used()), Some(used));
    }
}
