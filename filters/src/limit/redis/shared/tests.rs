use std::sync::atomic::AtomicBool;

use super::super::server::Server;
use super::*;
use crate::limit::dimension::{Limit, Limits};
use crate::limit::reservation::{Decision, Ledger, Reservation};
use crate::limit::rule::{RuleSet, Scope};
use crate::usage::Usage;

/// Long enough for a machine that is busy with other tests; what is not about time uses it.
const ROOMY: Duration = Duration::from_secs(2);

struct Gate {
    ledger: Ledger,
    seen: Arc<Seen>,
}

/// What the ledger told of its store.
#[derive(Default)]
struct Seen {
    up: AtomicBool,
    asked: AtomicU64,
    again: AtomicU64,
}

impl Watch for Seen {
    fn set_store_up(&self, up: bool) {
        self.up.store(up, Ordering::Release);
    }

    fn store_took(&self, op: &'static str, _: Duration) {
        self.asked.fetch_add(u64::from(op == "reserve"), Ordering::AcqRel);
    }

    fn refused_again(&self) {
        self.again.fetch_add(1, Ordering::AcqRel);
    }
}

async fn gate(server: &Server, timeout: Duration, when_down: WhenDown) -> Gate {
    gate_at(&server.url(), timeout, when_down).await
}

async fn gate_at(url: &str, timeout: Duration, when_down: WhenDown) -> Gate {
    let seen = Arc::new(Seen::default());
    let options = RedisOptions { address: Address::parse(url).unwrap(), timeout, when_down, replicas: 2 };
    Gate { ledger: Ledger::in_redis(&options, Arc::clone(&seen) as Arc<dyn Watch>).await, seen }
}

impl Gate {
    fn is_up(&self) -> bool {
        self.seen.up.load(Ordering::Acquire)
    }

    async fn becomes(&self, up: bool) {
        let what = if up { "up" } else { "down" };
        eventually(what, || async { self.is_up() == up }).await;
    }

    async fn reserve(&self, plan: &Plan) -> Decision {
        self.ledger.reserve(plan, small()).await.unwrap()
    }

    async fn admit(&self, plan: &Plan) -> Reservation {
        match self.reserve(plan).await {
            Decision::Admitted(reservation) => reservation,
            Decision::Refused(refusal, _) => panic!("refused: {refusal:?}"),
        }
    }

    /// How many calls one after the other are admitted; each uses 10 tokens.
    async fn admits(&self, plan: &Plan, tries: usize) -> usize {
        let mut admitted = 0;
        for _ in 0..tries {
            if let Decision::Admitted(reservation) = self.reserve(plan).await {
                reservation.settle(&Usage { input: 10, ..Usage::default() });
                admitted += 1;
            }
        }
        admitted
    }

    /// Used and held of each rule.
    async fn state(&self, plan: &Plan) -> Vec<(u64, u64)> {
        self.ledger.query(plan).await.unwrap().iter().map(|s| (s.used(), s.held())).collect()
    }

    async fn settles(&self, plan: &Plan, state: &[(u64, u64)]) {
        eventually(&format!("{state:?}"), || async { self.state(plan).await == state }).await;
    }
}

async fn eventually<F: Future<Output = bool>>(what: &str, mut ask: impl FnMut() -> F) {
    let patience = Instant::now() + Duration::from_secs(20);
    while !ask().await {
        assert!(Instant::now() < patience, "did not come true: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn small() -> Estimate {
    Estimate { prompt: 10, completion: 0, guessed: false }
}

fn limit(limit: u64) -> Option<Limit> {
    Some(Limit { limit, shadow: false })
}

fn key(limits: &Limits) -> Plan {
    [&Arc::new(RuleSet::new(Scope::Key, "alice", limits))].into_iter().collect()
}

fn daily(tokens: u64) -> Plan {
    key(&Limits { requests_per_hour: limit(1_000), tokens_per_day: limit(tokens), ..Limits::default() })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn four_gateways_admit_together_exactly_the_limit() {
    let server = Server::start();
    let mut gates = Vec::new();
    for _ in 0..4 {
        gates.push(gate(&server, ROOMY, WhenDown::Closed).await);
    }
    let cases = [
        ("rpm", Limits { requests_per_minute: limit(97), ..Limits::default() }, 97),
        ("tpm", Limits { tokens_per_minute: limit(505), ..Limits::default() }, 50),
        ("tpd", Limits { tokens_per_day: limit(777), ..Limits::default() }, 77),
        ("slots", Limits { concurrency: limit(13), ..Limits::default() }, 13),
    ];
    for (name, limits, expected) in cases {
        let plan: Plan = [&Arc::new(RuleSet::new(Scope::Key, name, &limits))].into_iter().collect();
        let tries = (0..2_000).map(|n| {
            let (ledger, plan) = (gates[n % 4].ledger.clone(), plan.clone());
            tokio::spawn(async move {
                match ledger.reserve(&plan, small()).await.unwrap() {
                    // Kept: what is held and live counts.
                    Decision::Admitted(reservation) => Some(reservation),
                    Decision::Refused(..) => None,
                }
            })
        });
        let mut kept = Vec::new();
        for task in tries.collect::<Vec<_>>() {
            kept.extend(task.await.unwrap());
        }
        assert_eq!(kept.len(), expected, "{name}");
        drop(kept);
        eventually("nothing open", || async { gates[0].state(&plan).await[0].1 == 0 }).await;
    }
    for gate in &gates {
        assert_eq!((gate.ledger.inflight(), gate.ledger.lost_tokens()), (0, 0));
    }
}

#[tokio::test]
async fn slots_and_tokens_come_back_in_every_gateway() {
    let server = Server::start();
    let (a, b) = (gate(&server, ROOMY, WhenDown::Closed).await, gate(&server, ROOMY, WhenDown::Closed).await);
    let plan = key(&Limits { tokens_per_day: limit(100), concurrency: limit(1), ..Limits::default() });
    let first = a.admit(&plan).await;
    assert!(matches!(b.reserve(&plan).await, Decision::Refused(..)));
    assert_eq!(b.state(&plan).await, [(0, 10), (1, 0)]);
    first.settle(&Usage { input: 4, output: 3, ..Usage::default() });
    b.settles(&plan, &[(7, 0), (0, 0)]).await;
    eventually("a free slot", || async { matches!(b.reserve(&plan).await, Decision::Admitted(_)) }).await;
}

#[tokio::test]
async fn a_flood_of_refused_calls_does_not_reach_the_store() {
    let server = Server::start();
    let gate = gate(&server, ROOMY, WhenDown::Closed).await;
    let plan = key(&Limits { requests_per_minute: limit(2), ..Limits::default() });
    let begin = Instant::now();
    assert_eq!(gate.admits(&plan, 20_000).await, 2);
    let asked = u128::from(gate.seen.asked.load(Ordering::Acquire));
    assert!(asked <= 3 + begin.elapsed().as_millis() / 250, "{asked} questions");
    let Decision::Refused(refusal, standings) = gate.reserve(&plan).await else { panic!("admitted") };
    assert!(refusal.wait.unwrap() <= Duration::from_secs(60) && standings.binding().is_some());
}

#[tokio::test]
async fn a_question_that_nobody_waits_for_gives_back_what_it_counted() {
    let server = Server::start();
    let gate = gate(&server, ROOMY, WhenDown::Closed).await;
    let plan = key(&Limits { concurrency: limit(5), ..Limits::default() });
    for _ in 0..5 {
        let mut asking = Box::pin(gate.ledger.reserve(&plan, small()));
        let _ = futures_poll(asking.as_mut());
        tokio::time::sleep(Duration::from_millis(5)).await;
        drop(asking);
    }
    gate.settles(&plan, &[(0, 0)]).await;
    assert_eq!(gate.ledger.inflight(), 0);
}

fn futures_poll<F: Future>(future: std::pin::Pin<&mut F>) -> std::task::Poll<F::Output> {
    future.poll(&mut std::task::Context::from_waker(std::task::Waker::noop()))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_the_store_stands_still_calls_are_quick_and_get_their_share() {
    let server = Server::start();
    let budget = Duration::from_millis(30);
    let (a, b) = (gate(&server, budget, WhenDown::Share).await, gate(&server, budget, WhenDown::Share).await);
    let plan = daily(1_000);
    // The gateways have seen each other by their second heartbeat.
    tokio::time::sleep(Duration::from_millis(2_200)).await;
    assert_eq!((a.admits(&plan, 10).await, b.admits(&plan, 10).await), (10, 10));
    a.settles(&plan, &[(20, 0), (200, 0)]).await;
    b.settles(&plan, &[(20, 0), (200, 0)]).await;
    assert_eq!((a.admits(&plan, 1).await, b.admits(&plan, 1).await), (1, 1));
    a.settles(&plan, &[(22, 0), (220, 0)]).await;

    server.signal("STOP");
    let mut slowest = Duration::ZERO;
    let mut admitted = [0, 0];
    for _ in 0..200 {
        for (gate, admitted) in [&a, &b].into_iter().zip(&mut admitted) {
            let begin = Instant::now();
            *admitted += gate.admits(&plan, 1).await;
            slowest = slowest.max(begin.elapsed());
        }
    }
    assert!(slowest < budget + Duration::from_millis(100), "{slowest:?}");
    assert!(!a.is_up() && !b.is_up());
    // 780 to 800 were left when each heard of it last, 78 calls; each gateway grants half of them, and together no more.
    assert!(admitted.iter().all(|n| (39..=40).contains(n)), "{admitted:?}");

    server.signal("CONT");
    let back = Instant::now();
    a.becomes(true).await;
    b.becomes(true).await;
    assert!(back.elapsed() < Duration::from_secs(2), "{:?}", back.elapsed());
    // Everything that was used meanwhile is there, once; of requests that got no answer in time, none is left.
    let used = 220 + 10 * (admitted[0] + admitted[1]) as u64;
    eventually("all pushed", || async { a.state(&plan).await[1] == (used, 0) }).await;
    assert_eq!(a.state(&plan).await, b.state(&plan).await);
    assert_eq!((a.ledger.lost_tokens(), b.ledger.lost_tokens()), (0, 0));
}

#[tokio::test]
async fn a_store_that_comes_back_empty_learns_of_open_calls_and_of_what_was_used() {
    let mut server = Server::start();
    let gate = gate(&server, ROOMY, WhenDown::Share).await;
    let plan = key(&Limits { tokens_per_day: limit(1_000), concurrency: limit(10), ..Limits::default() });
    let mut before = gate.admit(&plan).await;
    let ends = gate.admit(&plan).await;
    server.kill();
    gate.becomes(false).await;
    let mut during = gate.admit(&plan).await;
    ends.settle(&Usage { input: 70, ..Usage::default() });
    gate.admit(&plan).await.settle(&Usage { input: 5, ..Usage::default() });
    during.progress(&Usage { input: 3, output: 1, ..Usage::default() });
    server.run();
    gate.becomes(true).await;
    // Two calls are open and hold what they reserved; what ended meanwhile is charged.
    gate.settles(&plan, &[(75, 20), (2, 0)]).await;
    before.dispatched();
    drop(before);
    during.settle(&Usage { input: 3, output: 4, ..Usage::default() });
    gate.settles(&plan, &[(92, 0), (0, 0)]).await;
    assert_eq!((gate.ledger.inflight(), gate.ledger.lost_tokens()), (0, 0));
}

#[tokio::test]
async fn without_the_store_each_policy_does_what_it_says() {
    let away = "redis+unix:///nonexistent/tollgate.sock";
    let plan = daily(100);
    let closed = gate_at(away, ROOMY, WhenDown::Closed).await;
    assert!(!closed.is_up());
    assert!(matches!(closed.ledger.reserve(&plan, small()).await, Err(GatewayError::StoreUnavailable)));
    assert!(matches!(closed.ledger.query(&plan).await, Err(GatewayError::StoreUnavailable)));
    // No rule, no store.
    assert!(matches!(closed.ledger.reserve(&Plan::new(), small()).await, Ok(Decision::Admitted(_))));
    let open = gate_at(away, ROOMY, WhenDown::Open).await;
    assert_eq!(open.admits(&plan, 50).await, 50);
    // Two gateways, as configured: each has never seen the other.
    let share = gate_at(away, ROOMY, WhenDown::Share).await;
    assert_eq!(share.admits(&plan, 50).await, 5);

    let limits = Limits { tokens_per_day: limit(100), ..Limits::default() };
    let tier = Arc::new(RuleSet::new(Scope::Key, "bob", &limits).when_down(Some(WhenDown::Open)));
    let route = RuleSet::new(Scope::Route, "llm", &Limits::default()).when_down(Some(WhenDown::Closed));
    let of_tier: Plan = [&tier].into_iter().collect();
    assert_eq!(share.admits(&of_tier, 50).await, 50);
    let of_both: Plan = [&tier, &Arc::new(route)].into_iter().collect();
    assert!(matches!(share.ledger.reserve(&of_both, small()).await, Err(GatewayError::StoreUnavailable)));
}

#[tokio::test]
async fn a_store_that_is_not_there_at_the_start_may_come_later() {
    let mut server = Server::start();
    server.kill();
    let gate = gate(&server, ROOMY, WhenDown::Share).await;
    let plan = daily(1_000);
    assert_eq!(gate.admits(&plan, 3).await, 3);
    server.run();
    gate.becomes(true).await;
    gate.settles(&plan, &[(3, 0), (30, 0)]).await;
}

#[tokio::test]
async fn a_wrong_password_is_an_outage_and_no_secret_is_told() {
    let server = Server::with(&["--requirepass", "right"]);
    let url = |password: &str| format!("{}?pass={password}", server.url());
    let wrong = gate_at(&url("wrong-password"), ROOMY, WhenDown::Closed).await;
    assert!(!wrong.is_up());
    assert!(matches!(wrong.ledger.reserve(&daily(100), small()).await, Err(GatewayError::StoreUnavailable)));
    let right = gate_at(&url("right"), ROOMY, WhenDown::Closed).await;
    assert_eq!(right.admits(&daily(100), 20).await, 10);
}

/// Sends one command to the server by other means than the ledger's.
async fn command(server: &Server, words: &[&str]) {
    let client = redis::Client::open(server.url()).unwrap();
    let mut connection = client.get_multiplexed_async_connection().await.unwrap();
    redis::cmd(words[0]).arg(&words[1..]).query_async::<redis::Value>(&mut connection).await.unwrap();
}

#[tokio::test]
async fn a_store_that_takes_no_writes_counts_as_away_until_it_does() {
    let cases: [(&[&str], &[&str]); 2] = [
        (&["CONFIG", "SET", "maxmemory", "1"], &["CONFIG", "SET", "maxmemory", "0"]),
        (&["REPLICAOF", "127.0.0.1", "1"], &["REPLICAOF", "NO", "ONE"]),
    ];
    for (break_it, mend_it) in cases {
        let server = Server::start();
        let gate = gate(&server, ROOMY, WhenDown::Share).await;
        let plan = daily(1_000);
        assert_eq!(gate.admits(&plan, 5).await, 5);
        gate.settles(&plan, &[(5, 0), (50, 0)]).await;
        command(&server, break_it).await;
        // No call fails: each is decided by what is known here.
        assert_eq!(gate.admits(&plan, 10).await, 10, "{break_it:?}");
        gate.becomes(false).await;
        assert_eq!(gate.admits(&plan, 5).await, 5);
        command(&server, mend_it).await;
        gate.becomes(true).await;
        gate.settles(&plan, &[(20, 0), (200, 0)]).await;
    }
}

#[tokio::test]
async fn forgotten_scripts_are_sent_again_without_a_word() {
    let server = Server::start();
    let gate = gate(&server, ROOMY, WhenDown::Closed).await;
    for used in 1..=5 {
        command(&server, &["SCRIPT", "FLUSH"]).await;
        assert_eq!(gate.admits(&daily(1_000), 1).await, 1);
        gate.settles(&daily(1_000), &[(used, 0), (used * 10, 0)]).await;
    }
    assert!(gate.is_up());
}

#[tokio::test]
async fn a_killed_gateways_calls_are_charged_at_their_progress_and_their_slots_come_back() {
    let server = Server::start();
    let other = gate(&server, ROOMY, WhenDown::Closed).await;
    let plan = key(&Limits { tokens_per_day: limit(1_000), concurrency: limit(3), ..Limits::default() });
    {
        let tokio = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let url = server.url();
        let dies = tokio.spawn(async move { gate_at(&url, ROOMY, WhenDown::Closed).await }).await.unwrap();
        let (ledger, asked) = (dies.ledger.clone(), plan.clone());
        let mut calls = tokio
            .spawn(async move {
                let mut calls = Vec::new();
                for _ in 0..3 {
                    if let Decision::Admitted(call) = ledger.reserve(&asked, small()).await.unwrap() {
                        calls.push(call);
                    }
                }
                calls
            })
            .await
            .unwrap();
        assert_eq!(calls.len(), 3);
        calls[0].progress(&Usage { input: 10, output: 33, ..Usage::default() });
        // The renewal of every fourth heartbeat tells of it; then the gateway is gone without a word.
        eventually("the progress is told", || async { told(&server, "43").await }).await;
        std::mem::forget((calls, dies));
        tokio.shutdown_background();
    }
    assert!(matches!(other.reserve(&plan).await, Decision::Refused(..)));
    // A minute passes.
    let expire = "local z = redis.call('ZRANGE', KEYS[1], 0, -1) \
                  for _, id in ipairs(z) do redis.call('ZADD', KEYS[1], 1, id) end";
    command(&server, &["EVAL", expire, "1", "tg:{tg}:z"]).await;
    other.settles(&plan, &[(43 + 10 + 10, 0), (0, 0)]).await;
    eventually("free slots", || async { matches!(other.reserve(&plan).await, Decision::Admitted(_)) }).await;
}

/// Whether some lease has this progress.
async fn told(server: &Server, progress: &str) -> bool {
    let client = redis::Client::open(server.url()).unwrap();
    let mut connection = client.get_multiplexed_async_connection().await.unwrap();
    let look = "for _, id in ipairs(redis.call('ZRANGE', KEYS[2], 0, -1)) do \
                if cmsgpack.unpack(redis.call('HGET', KEYS[1], id))[3] == tonumber(ARGV[1]) then return 1 end end return 0";
    redis::cmd("EVAL")
        .arg(&[look, "2", "tg:{tg}:l", "tg:{tg}:z", progress])
        .query_async::<bool>(&mut connection)
        .await
        .unwrap()
}

/// Not a test of anything but speed: `cargo test --release -p tollgate-filters --lib -- --ignored --nocapture questions`.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
#[ignore = "a measurement, to be run in release"]
async fn questions_to_redis_cost() {
    let server = Server::start();
    let gate = gate(&server, ROOMY, WhenDown::Closed).await;
    let most = limit(1_000_000_000);
    let limits = Limits {
        requests_per_minute: most,
        requests_per_hour: most,
        tokens_per_day: limit(1 << 50),
        ..Limits::default()
    };
    let plans: Vec<Plan> = (0..1_000)
        .map(|n| [&Arc::new(RuleSet::new(Scope::Key, &n.to_string(), &limits))].into_iter().collect())
        .collect();
    for width in [1, 16, 64] {
        let mut took = Vec::new();
        let rounds = 20_000 / width;
        let begin = Instant::now();
        let (cpu, theirs) = (cpu("self"), cpu(&server.pid().to_string()));
        for round in 0..rounds {
            let tasks: Vec<_> = (0..width)
                .map(|n| {
                    let (ledger, plan) = (gate.ledger.clone(), plans[(round * width + n) % plans.len()].clone());
                    tokio::spawn(async move {
                        let begin = Instant::now();
                        let decision = ledger.reserve(&plan, small()).await.unwrap();
                        let took = begin.elapsed();
                        drop(decision);
                        took
                    })
                })
                .collect();
            for task in tasks {
                took.push(task.await.unwrap());
            }
        }
        gate.ledger.flush(ROOMY).await;
        let n = u32::try_from(took.len()).unwrap();
        took.sort_unstable();
        println!(
            "{width} at once: {:.0} a second; asking took p50 {:?} p99 {:?}; CPU of a reserve and its settle {:?} here, {:?} there",
            f64::from(n) / begin.elapsed().as_secs_f64(),
            took[took.len() / 2],
            took[took.len() * 99 / 100],
            (self::cpu("self") - cpu) / n,
            (self::cpu(&server.pid().to_string()) - theirs) / n,
        );
    }
}

/// CPU time of a process so far.
fn cpu(pid: &str) -> Duration {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit_once(") ").unwrap().1.split(' ').collect();
    let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
    Duration::from_millis(ticks * 10)
}
