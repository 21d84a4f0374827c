//! Races: four gateways on one Redis, and far more calls at once than any limit takes. What is admitted is the limit, to
//! the call; at the edge of a minute and of a day too, with a server whose clock is set there.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use futures::future::join_all;
use serde_json::{Value, json};
use tokio::sync::watch;

use crate::harness::client::Request;
use crate::harness::redis::Redis;
use crate::harness::{Answer, Conf, Gateway, RawNode, Rng, Upcall, WENDY, completion, eventually};

const PATH: &str = "/v1/chat/completions";
const GATEWAYS: usize = 4;
const CALLS: usize = 2_000;
/// HTTP/2 connections to each gateway; the calls to it are spread over them.
const WIRES: usize = 10;
/// What each call reserves where tokens are limited.
const RESERVED: u64 = 100;
/// For what may take long on a machine that is busy with other tests.
const LONG: Duration = Duration::from_secs(60);
const MINUTE: u64 = 60_000_000;

/// Four gateways on that server; a call that could not ask it would be answered with 503.
async fn gateways(redis: &Redis, node: &str) -> Arc<Vec<Gateway>> {
    let mut conf = Conf::serving("qwen", &[node])
        .also(&format!("store: {{ redis: {{ url: \"{}\", timeout: 30s, when_down: closed }} }}", redis.url()));
    let tiers = [
        ("rpm", "requests_per_minute: 97"),
        ("tpm", "tokens_per_minute: 5_050"),
        ("tpd", "tokens_per_day: 7_777"),
        ("slots", "concurrency: 13"),
    ];
    for (name, limits) in tiers {
        conf = conf
            .tier(&format!("{name}: {{ {limits} }}"))
            .key(&format!("{{ id: {name}, key: {name}-secret-key, tier: {name} }}"));
    }
    Arc::new(join_all((0..GATEWAYS).map(|_| Gateway::with(&conf))).await)
}

fn secret(key: &str) -> String {
    format!("{key}-secret-key")
}

/// The one limit of that key, as a gateway tells it.
async fn row(gw: &Gateway, key: &str) -> Value {
    gw.get("/v1/quota").key(&secret(key)).send().await.expect(200).json()["limits"][0].clone()
}

/// Waits until every gateway tells that so much is used and nothing held, and nothing is left of any call.
async fn all_settled(gates: &[Gateway], redis: &Redis, key: &str, used: u64) {
    for gw in gates {
        eventually(&format!("{used} used by {key} and nothing held"), || async {
            let row = row(gw, key).await;
            row["used"] == used && row["held"] == 0
        })
        .await;
        gw.settles("tollgate_reservations_inflight", &[], 0.0).await;
        gw.settles("tollgate_store_up", &[], 1.0).await;
    }
    eventually("no lease to be left", || async { redis.leases() == 0 }).await;
    // Beside the leases only the name of this life of the data is there.
    assert_eq!(redis.command(&["HLEN", "tg:{tg}:l"]), "1");
}

/// What each call used where the node answers less than was reserved.
const USED: u64 = 30;

/// A node that keeps its calls until it is told, and says that each used [`USED`] tokens.
struct Holding {
    node: RawNode,
    arrived: Arc<AtomicUsize>,
    go: watch::Sender<bool>,
}

impl Holding {
    /// The prompt costs what the gateways think: they learn from it, and must not come to reserve something else.
    async fn start(room: u64) -> Self {
        let (go, may) = watch::channel(false);
        let arrived = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&arrived);
        let node = RawNode::answering(move |mut call: Upcall| {
            let mut may = may.clone();
            count.fetch_add(1, Ordering::AcqRel);
            async move {
                may.wait_for(|go| *go).await.ok()?;
                call.json("200 OK", &completion("hello", RESERVED - room, USED + room - RESERVED)).await;
                Some(call)
            }
        })
        .await;
        Self { node, arrived, go }
    }

    fn arrived(&self) -> usize {
        self.arrived.load(Ordering::Acquire)
    }
}

/// A call that reserves [`RESERVED`] tokens: the answer may be as long as its prompt leaves room.
fn call(max_tokens: u64) -> Value {
    json!({ "model": "chat", "messages": [{ "role": "user", "content": "hi" }], "max_tokens": max_tokens })
}

/// How long an answer the call has to ask for, by what one that asks for 8 is held with.
async fn room() -> u64 {
    let node = RawNode::start().await;
    let gw = Gateway::with(&Conf::serving("qwen", &[node.url()])).await;
    let asked = tokio::spawn(gw.post(PATH).key(WENDY).json(&call(8)).send());
    let mut held = node.call().await;
    let quota = gw.get("/v1/quota").key(WENDY).send().await.expect(200).json();
    let day = quota["limits"].as_array().expect("limits").iter().find(|row| row["dimension"] == "tokens_per_day");
    let prompt = day.and_then(|row| row["held"].as_u64()).expect("a number") - 8;
    held.json("200 OK", &completion("hello", prompt, 8)).await;
    asked.await.expect("a task").expect(200);
    RESERVED - prompt
}

/// All calls of one key, at once; the node answers none before each was decided. The answers to those that were admitted,
/// and to those that were not.
async fn race(gates: &Arc<Vec<Gateway>>, node: &Holding, key: &str, max_tokens: u64) -> (Vec<Answer>, Vec<Answer>) {
    let mut wires = Vec::new();
    for gw in gates.iter() {
        wires.extend(join_all((0..WIRES).map(|_| gw.wire2())).await);
    }
    let (before, decided) = (node.arrived(), Arc::new(AtomicUsize::new(0)));
    let (start, _) = watch::channel(false);
    let calls: Vec<_> = (0..CALLS)
        .map(|n| {
            let mut wire = wires[n % wires.len()].again();
            let request = gates[n % wires.len() / WIRES].post(PATH).key(&secret(key)).json(&call(max_tokens));
            let (mut start, decided) = (start.subscribe(), Arc::clone(&decided));
            tokio::spawn(async move {
                start.wait_for(|go| *go).await.expect("the test runs");
                let reply = wire.try_send(request).await.expect("an answer");
                decided.fetch_add(usize::from(reply.status() != 200), Ordering::AcqRel);
                reply.whole().await
            })
        })
        .collect();
    start.send_replace(true);
    let deadline = Instant::now() + LONG;
    while decided.load(Ordering::Acquire) + node.arrived() - before < CALLS {
        let refused = decided.load(Ordering::Acquire);
        assert!(Instant::now() < deadline, "{key}: {refused} refused, {} at the node", node.arrived() - before);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    node.go.send_replace(true);
    let answers = join_all(calls).await.into_iter().map(|answer| answer.expect("a task"));
    let (admitted, refused): (Vec<_>, Vec<_>) = answers.partition(|answer| answer.status() == 200);
    node.go.send_replace(false);
    assert_eq!(node.arrived() - before, admitted.len(), "{key}: the node got what was admitted");
    (admitted, refused)
}

/// That a refusal says what it is by: code, scope, dimension, limit, and what is left of it.
fn assert_named(answer: &Answer, code: &str, says: &str, policy: &str, headers: &[(&str, &str)]) {
    assert_eq!(answer.refusal(), (429, code.into()));
    let message = answer.json()["error"]["message"].as_str().expect("a message").to_owned();
    assert!(message.contains(says), "{message} does not say {says}");
    let told = answer.header("ratelimit-policy");
    assert!(told.contains(policy), "{told} does not say {policy}");
    for (name, value) in headers {
        assert_eq!(answer.header(name), *value, "{name}");
    }
    let (seconds, millis) = (answer.number("retry-after"), answer.number("retry-after-ms"));
    assert!(seconds >= 1.0 && (millis / 1000.0).ceil() <= seconds, "{seconds} s, {millis} ms");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_2000_calls_at_once_four_gateways_admit_each_limit_exactly() {
    let (redis, room) = (Redis::start(), room().await);
    let node = Holding::start(room).await;
    let gates = gateways(&redis, &node.node.url()).await;

    let (admitted, refused) = race(&gates, &node, "rpm", room).await;
    assert_eq!((admitted.len(), refused.len()), (97, CALLS - 97));
    for answer in &refused {
        let headers = [("x-ratelimit-limit-requests", "97"), ("x-ratelimit-remaining-requests", "0")];
        assert_named(answer, "rate_limit_exceeded", "key allows 97 requests per minute", ";q=97;w=60", &headers);
        assert!(answer.number("retry-after") <= 60.0);
    }
    let mut left: Vec<f64> = admitted.iter().map(|answer| answer.number("x-ratelimit-remaining-requests")).collect();
    left.sort_by(f64::total_cmp);
    assert_eq!(left, (0..97).map(f64::from).collect::<Vec<_>>(), "each was told what it left to the next");
    all_settled(&gates, &redis, "rpm", 97).await;

    let (admitted, refused) = race(&gates, &node, "tpm", room).await;
    assert_eq!((admitted.len(), refused.len()), (50, CALLS - 50));
    for answer in &refused {
        let headers = [("x-ratelimit-limit-tokens", "5050"), ("x-ratelimit-remaining-tokens", "50")];
        assert_named(answer, "rate_limit_exceeded", "key allows 5050 tokens per minute", ";q=5050;w=60", &headers);
    }
    // What was reserved and not used is back.
    all_settled(&gates, &redis, "tpm", 50 * USED).await;

    let (admitted, refused) = race(&gates, &node, "tpd", room).await;
    assert_eq!((admitted.len(), refused.len()), (77, CALLS - 77));
    for answer in &refused {
        let headers =
            [("x-ratelimit-limit-tokens", "7777"), ("x-ratelimit-remaining-tokens", "77"), ("x-should-retry", "false")];
        assert_named(answer, "quota_exceeded", "key allows 7777 tokens per day", ";q=7777;w=86400", &headers);
    }
    all_settled(&gates, &redis, "tpd", 77 * USED).await;

    let (admitted, refused) = race(&gates, &node, "slots", room).await;
    assert_eq!((admitted.len(), refused.len()), (13, CALLS - 13));
    for answer in &refused {
        let policy = ";q=13;qu=\"concurrent-requests\"";
        assert_named(answer, "concurrency_exceeded", "key allows 13 (concurrency)", policy, &[]);
    }
    all_settled(&gates, &redis, "slots", 0).await;
}

/// Callers who ask again and again until they are told to stop.
struct Load {
    stop: Arc<AtomicBool>,
    callers: Vec<tokio::task::JoinHandle<usize>>,
}

impl Load {
    fn start(gates: &Arc<Vec<Gateway>>, key: &str, each: usize, max_tokens: u64) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let callers = (0..GATEWAYS * each)
            .map(|n| {
                let (gates, stop, key) = (Arc::clone(gates), Arc::clone(&stop), secret(key));
                tokio::spawn(async move {
                    let gw = &gates[n % GATEWAYS];
                    let request = || -> Request { gw.post(PATH).key(&key).json(&call(max_tokens)) };
                    let (mut wire, mut admitted) = (gw.wire().await, 0);
                    while !stop.load(Ordering::Acquire) {
                        let reply = wire.try_send(request()).await.expect("an answer");
                        let status = reply.status();
                        let answer = reply.whole().await;
                        assert!(matches!(status, 200 | 429), "{}", answer.text());
                        admitted += usize::from(status == 200);
                        if status == 429 {
                            tokio::time::sleep(Duration::from_millis(20)).await;
                        }
                    }
                    admitted
                })
            })
            .collect();
        Self { stop, callers }
    }

    /// Stops, and says how many calls were admitted.
    async fn end(self) -> usize {
        self.stop.store(true, Ordering::Release);
        join_all(self.callers).await.into_iter().map(|admitted| admitted.expect("a caller")).sum()
    }
}

/// A node that answers at once that each call used what it had reserved.
async fn using_all(room: u64) -> RawNode {
    RawNode::answering(move |mut call: Upcall| async move {
        call.json("200 OK", &completion("hello", RESERVED - room, room)).await;
        Some(call)
    })
    .await
}

/// Every admission of the key by the server's own clock: never more than the limit in any trailing minute, and the limit
/// itself as soon as one may.
fn assert_rolling(times: &[u64], limit: usize) {
    for (n, pair) in times.iter().zip(&times[limit..]).enumerate() {
        let apart = pair.1 - pair.0;
        assert!(apart >= MINUTE, "admissions {n} and {} lie within a minute: {apart} us", n + limit);
    }
    assert!(times.len() >= 2 * limit, "{} admissions in more than two minutes", times.len());
    assert!(times[limit - 1] - times[0] < MINUTE / 2, "the first {limit} were admitted as they came");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn over_the_edges_of_minutes_no_trailing_minute_has_more_than_the_limit() {
    let room = room().await;
    // Ten seconds before a minute begins, and six times as fast as the clock on the wall.
    let (redis, node) = (Redis::at("2026-03-01 10:58:50", 6), using_all(room).await);
    let watched = redis.watch();
    let gates = gateways(&redis, &node.url()).await;
    let begin = redis.now();
    let loads = [Load::start(&gates, "rpm", 8, room), Load::start(&gates, "tpm", 8, room)];
    let deadline = Instant::now() + LONG;
    while redis.now() < begin + 130_000_000 {
        assert!(Instant::now() < deadline, "the server's clock does not run");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let [requests, tokens] = loads;
    let (requests, tokens) = (requests.end().await, tokens.end().await);
    for gw in gates.iter() {
        gw.settles("tollgate_reservations_inflight", &[], 0.0).await;
    }
    eventually("no lease to be left", || async { redis.leases() == 0 }).await;
    let times = watched.admissions("rpm");
    assert_eq!(times.len(), requests);
    assert_rolling(&times, 97);
    let times = watched.admissions("tpm");
    assert_eq!(times.len(), tokens);
    assert_rolling(&times, 50);
}

/// Used and held of the key's day, and of the day before.
fn days(redis: &Redis, key: &str) -> [u64; 4] {
    let scope = format!("tg:{{tg}}:s:k:{key}");
    let read = "local _, day = next(cmsgpack.unpack(redis.call('GET', KEYS[1]))[3]) return day[tonumber(ARGV[1])]";
    ["3", "4", "7", "8"].map(|field| redis.command(&["EVAL", read, "1", &scope, field]).parse().expect("a number"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn over_midnight_each_day_takes_exactly_its_limit_and_pays_for_its_own_calls() {
    let room = room().await;
    // Every other call of before midnight is answered only when the new day has begun; the others soon.
    let (begun, day) = watch::channel(false);
    let count = Arc::new(AtomicUsize::new(0));
    let seen = Arc::clone(&count);
    let node = RawNode::answering(move |mut call: Upcall| {
        let (mut day, n) = (day.clone(), seen.fetch_add(1, Ordering::AcqRel));
        async move {
            if n % 2 == 0 {
                day.wait_for(|begun| *begun).await.ok()?;
            }
            tokio::time::sleep(Duration::from_millis(Rng::new(n as u64).next() % 300)).await;
            call.json("200 OK", &completion("hello", RESERVED - room, room)).await;
            Some(call)
        }
    })
    .await;
    let redis = Redis::at("2026-03-01 23:59:48", 1);
    let midnight = 1_772_409_600_000_000;
    let watched = redis.watch();
    let gates = gateways(&redis, &node.url()).await;
    assert!(redis.now() < midnight - 5_000_000, "the gateways took too long to start");
    let load = Load::start(&gates, "tpd", 24, room);
    eventually("the old day to be used up", || async { count.load(Ordering::Acquire) >= 77 }).await;
    assert!(redis.now() < midnight - 500_000, "the old day's calls took too long");
    // They go on asking, into the new day. Those that are held still count for the old one then, and only there.
    while redis.now() < midnight + 1_500_000 {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    begun.send_replace(true);
    eventually("the new day to be used up", || async { count.load(Ordering::Acquire) >= 2 * 77 }).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let admitted = load.end().await;
    all_settled(&gates, &redis, "tpd", 77 * RESERVED).await;
    let times = watched.admissions("tpd");
    let old = times.iter().filter(|time| **time < midnight).count();
    assert_eq!((admitted, old, times.len() - old), (2 * 77, 77, 77));
    assert_eq!(count.load(Ordering::Acquire), 2 * 77, "the node got what was admitted");
    assert_eq!(days(&redis, "tpd"), [77 * RESERVED, 0, 77 * RESERVED, 0]);
}
