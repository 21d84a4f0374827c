use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use proptest::prelude::*;

use super::server::Server;
use super::*;
use crate::limit::bucket::Bucket;
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
        let asked = Asked { id, plan, tokens, charge, admitted: false, at: 0 };
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
        let ended = [Ended { id, tokens: Some(tokens), epoch: 1 }];
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
        |epoch| remote.wait(remote.commands.settle(&remote.connection, &[Ended { id, tokens: Some(5), epoch }])).0[0];
    remote.raw::<()>(&["FLUSHALL"]);
    assert_eq!(settle(epoch), Settled::Lost);
    // Pushed under one mark, it counts once.
    for _ in 0..3 {
        remote.wait(remote.commands.spend(
            &remote.connection,
            77,
            &plan,
            &[Amount { at: now.0, requests: 1, tokens: 5 }],
        ));
    }
    assert_eq!(remote.query(&plan, now).iter().next().map(|s| s.used()), Some(5));
    remote.at(now);
    let other = remote.wait(remote.commands.beat(&remote.connection, 99)).epoch;
    assert_eq!((other, settle(other)), (99, Settled::Duplicate));
}

/// Used and held of each rule.
fn state(remote: &Remote, plan: &Plan, now: Instant64) -> Vec<(u64, u64)> {
    remote.query(plan, now).iter().map(|s| (s.used(), s.held())).collect()
}

const DAY: u64 = 86_400;
const MIDNIGHT: Instant64 = Instant64::from_secs(20_000 * DAY);

fn at(secs: i64) -> Instant64 {
    Instant64(MIDNIGHT.0.checked_add_signed(secs * 1_000_000).unwrap())
}

fn amount(at: Instant64, requests: u64, tokens: u64) -> Amount {
    Amount { at: at.0, requests, tokens }
}

#[test]
fn what_was_used_during_an_outage_is_charged_to_the_time_of_its_admission() {
    let remote = Remote::to(&Arc::new(Server::start()));
    let limits = Limits {
        requests_per_minute: limit(100),
        tokens_per_hour: limit(1_000),
        tokens_per_day: limit(1_000),
        ..Limits::default()
    };
    let plan = key(&limits);
    let spend = |mark, amounts: &[Amount]| remote.wait(remote.commands.spend(&remote.connection, mark, &plan, amounts));
    // Some of the new day is known before the old one's is told, some of the old day was known when it was the present.
    remote.at(at(-600));
    spend(1, &[amount(at(-600), 1, 2)]);
    remote.at(at(50));
    let all = [
        amount(at(-4_000), 1, 10),
        amount(at(-3_000), 1, 20),
        amount(at(-5), 2, 40),
        amount(at(0), 3, 80),
        amount(at(40), 4, 160),
        // From the clock of a machine that is ahead.
        amount(at(90), 5, 320),
    ];
    assert_eq!(spend(2, &all), 0);
    let expected = [(14, 0), (622, 0), (560, 0)];
    assert_eq!(state(&remote, &plan, at(50)), expected);
    // Once, under whatever mark it was sent.
    assert_eq!(spend(2, &all), 0);
    assert_eq!(state(&remote, &plan, at(50)), expected);
    // Each leaves its window in its own time.
    assert_eq!(state(&remote, &plan, at(56))[0], (12, 0));
    assert_eq!(state(&remote, &plan, at(61))[0], (9, 0));
    assert_eq!(state(&remote, &plan, at(101))[0], (5, 0));
    assert_eq!(state(&remote, &plan, at(601))[1], (602, 0));
    assert_eq!(state(&remote, &plan, at(111))[0], (0, 0));
    // The day before yesterday is over; nothing knows it any more.
    remote.at(at(60));
    assert_eq!(spend(3, &[amount(at(-100_000), 1, 7), amount(at(1), 0, 1)]), 7);
    assert_eq!(state(&remote, &plan, at(60))[2], (561, 0));
}

#[test]
fn a_lease_made_again_after_midnight_is_settled_in_the_day_of_its_admission() {
    let remote = Remote::to(&Arc::new(Server::start()));
    let limits = Limits {
        tokens_per_minute: limit(1_000),
        tokens_per_day: limit(1_000),
        concurrency: limit(10),
        ..Limits::default()
    };
    let plan = key(&limits);
    let again = |id, admitted: Instant64| {
        let asked = Asked { id: LeaseId(id), plan: &plan, tokens: 50, charge: 10, admitted: true, at: admitted.0 };
        remote.wait(remote.commands.reserve(&remote.connection, &asked))
    };
    let settle = |id, tokens| {
        let ended = [Ended { id: LeaseId(id), tokens: Some(tokens), epoch: 1 }];
        remote.wait(remote.commands.settle(&remote.connection, &ended))
    };
    remote.at(at(10));
    assert!(matches!(again(1, at(-20)), Decided::Admitted(_)));
    assert!(matches!(again(1, at(-20)), Decided::Known));
    assert!(matches!(again(2, at(-300)), Decided::Admitted(_)));
    assert!(matches!(again(3, at(5)), Decided::Admitted(_)));
    assert!(matches!(again(4, at(-200_000)), Decided::Admitted(_)));
    // The first is within the minute, the second of longer ago; the third alone is of today.
    assert_eq!(state(&remote, &plan, at(10)), [(100, 0), (0, 50), (4, 0)]);
    assert_eq!(settle(1, 30), (vec![Settled::Done], 0));
    assert_eq!(settle(3, 40), (vec![Settled::Done], 0));
    assert_eq!(state(&remote, &plan, at(10)), [(70, 0), (40, 0), (2, 0)]);
    // What it used beyond its estimate was used just now.
    assert_eq!(settle(2, 60), (vec![Settled::Done], 0));
    assert_eq!(settle(4, 60), (vec![Settled::Done], 60));
    assert_eq!(state(&remote, &plan, at(10)), [(90, 0), (40, 0), (0, 0)]);
    assert_eq!(state(&remote, &plan, at(41))[0], (60, 0));
    assert_eq!(remote.raw::<u64>(&["ZCARD", EXPIRY]), 0);
}

#[test]
fn a_call_that_never_was_gives_back_its_request_too() {
    let remote = Remote::to(&Arc::new(Server::start()));
    let limits = Limits {
        requests_per_minute: limit(9),
        requests_per_day: limit(9),
        tokens_per_minute: limit(100),
        tokens_per_day: limit(100),
        concurrency: limit(9),
        ..Limits::default()
    };
    let plan = key(&limits);
    let admit = |now| match remote.reserve(&plan, Estimate { prompt: 10, completion: 0, guessed: false }, now) {
        Verdicts::Admitted { id, .. } => id,
        Verdicts::Refused { refusal, .. } => panic!("{refusal:?}"),
    };
    let never = |id, now| {
        remote.at(now);
        remote.wait(remote.commands.settle(&remote.connection, &[Ended { id, tokens: None, epoch: 1 }])).0[0]
    };
    remote.at(at(-1));
    remote.epoch();
    let (stays, yesterday) = (admit(at(-1)), admit(at(-1)));
    let today = admit(at(2));
    assert_eq!(never(yesterday, at(3)), Settled::Done);
    assert_eq!(never(today, at(3)), Settled::Done);
    assert_eq!(never(today, at(3)), Settled::Duplicate);
    assert_eq!(state(&remote, &plan, at(3)), [(1, 0), (0, 0), (10, 0), (0, 0), (1, 0)]);
    assert_eq!(remote.settle(stays, 7, at(4)), Settled::Done);
    assert_eq!(state(&remote, &plan, at(4)), [(1, 0), (0, 0), (7, 0), (0, 0), (0, 0)]);
}

#[test]
fn a_question_that_comes_too_late_writes_nothing() {
    let remote = Remote::to(&Arc::new(Server::start()));
    let plan = key(&Limits { requests_per_minute: limit(3), ..Limits::default() });
    remote.at(Instant64(5_000_001));
    let asked = |at| Asked { id: LeaseId(1), plan: &plan, tokens: 1, charge: 1, admitted: false, at };
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

proptest! {
    #![proptest_config(cases(100))]

    #[test]
    fn a_grant_is_drawn_in_redis_as_in_memory(
        (requests, tokens, pace) in
            (proptest::option::of(0_u64..200), proptest::option::of(0_u64..10_000_000_000), 0_u32..=100),
        steps in proptest::collection::vec(
            (-500_i64..30_000, 0_u64..2, 0_u64..6_000_000_000, 0_u64..10, -3_i64..3, -900_000_000_i64..900_000_000), 1..40),
    ) {
        static SERVER: std::sync::OnceLock<Arc<Server>> = std::sync::OnceLock::new();
        let remote = Remote::to(SERVER.get_or_init(|| Arc::new(Server::start())));
        let grant = Grant { requests, tokens, pace_above: f64::from(pace) / 100.0 };
        let mut now = 1_700_000_000_000;
        let mut first = None;
        for (passed, requests, tokens, wait, back_requests, back_tokens) in steps {
            now += passed;
            let draw = Draw { requests, tokens, wait: Duration::from_secs(wait), back_requests, back_tokens };
            remote.at(Instant64(now.cast_unsigned() * 1_000 + 7));
            let (there, levels) = remote.wait(remote.commands.draw(&remote.connection, "far", grant, &draw));
            let bucket = first.get_or_insert_with(|| Bucket::full(grant, now));
            let here = bucket.draw(grant, &draw, now);
            prop_assert_eq!(there, here);
            let limited = |level: i64, grant: Option<u64>| grant.map(|_| level);
            let mirrored = Bucket::part(levels, 1, now);
            prop_assert_eq!(limited(mirrored.levels()[0], grant.requests), limited(bucket.levels()[0], grant.requests));
            prop_assert_eq!(limited(mirrored.levels()[1], grant.tokens), limited(bucket.levels()[1], grant.tokens));
        }
    }
}
