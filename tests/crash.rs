//! Gateways that are killed in the middle of things: what they held comes back, what was used is charged, and nothing twice.

use std::future::pending;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use futures::future::join_all;
use serde_json::json;
use socket2::{Domain, Socket, Type};
use tokio::task::JoinHandle;

use crate::harness::client::Reply;
use crate::harness::redis::Redis;
use crate::harness::{Conf, Gateway, RawNode, Upcall, chat, eventually, node, node_with};

const PATH: &str = "/v1/chat/completions";
const KEY: &str = "carl-secret-key";
/// What an answer may be as long as, in the calls of these tests.
const ROOM: u64 = 8;
/// The longest that slots of a killed gateway may stay taken.
const FREED: Duration = Duration::from_secs(60);
/// How much of what was used before the kill may not have been told to the store yet.
const UNTOLD: Duration = Duration::from_secs(5);

/// Model `chat` at this node, counters in Redis, and a key with many slots.
fn conf(redis: &Redis, node: &str) -> Conf {
    Conf::new()
        .upstream("near", &[node], "timeouts: { connect: 60s, first_byte: 120s }")
        .model("chat", &[("near", "qwen")], "")
        .llm()
        .tier("crowd: { requests_per_hour: 10_000, tokens_per_day: 1_000_000_000, concurrency: 300 }")
        .key("{ id: carl, key: carl-secret-key, tier: crowd }")
        .also(&format!("store: {{ redis: {{ url: \"{}\", timeout: 10s, when_down: closed }} }}", redis.url()))
}

/// A node that takes calls and never answers them.
async fn silent() -> RawNode {
    RawNode::answering(|call: Upcall| async move {
        pending::<()>().await;
        Some(call)
    })
    .await
}

/// A node that nobody gets through to: as many connections wait to be accepted as may.
struct Full {
    _socket: Socket,
    _waiting: Vec<TcpStream>,
    addr: SocketAddr,
}

impl Full {
    fn new() -> Self {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
        socket.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into()).expect("a free port");
        socket.listen(0).expect("a listener");
        let addr = socket.local_addr().expect("its address").as_socket().expect("an IP address");
        let connect = || TcpStream::connect_timeout(&addr, Duration::from_millis(300)).ok();
        Self { _socket: socket, _waiting: std::iter::from_fn(connect).collect(), addr }
    }

    fn url(&self) -> String {
        format!("http://{}", self.addr)
    }
}

/// Used and held of one dimension of the key.
async fn row(gw: &Gateway, dimension: &str) -> (u64, u64) {
    let answer = gw.get("/v1/quota").key(KEY).send().await.expect(200).json();
    let rows = answer["limits"].as_array().expect("limits");
    let row = rows.iter().find(|row| row["dimension"] == dimension).expect("the dimension");
    (row["used"].as_u64().expect("a number"), row["held"].as_u64().expect("a number"))
}

async fn slots(gw: &Gateway) -> u64 {
    row(gw, "concurrency").await.0
}

/// Makes so many calls that will not be answered; returns when all of them hold a slot.
async fn calls(gw: &Gateway, n: u64) -> Vec<JoinHandle<()>> {
    let before = slots(gw).await;
    let ask = |_| {
        let asked = gw.post(PATH).key(KEY).json(&chat("hi")).try_open();
        tokio::spawn(async move { drop(asked.await) })
    };
    let calls = (0..n).map(ask).collect();
    eventually("the calls to be open", || async { slots(gw).await == before + n }).await;
    calls
}

/// Waits until nothing is taken or held; says what was charged.
async fn all_back(gw: &Gateway) -> u64 {
    eventually("all slots to be free and nothing held", || async {
        slots(gw).await == 0 && row(gw, "tokens_per_day").await.1 == 0
    })
    .await;
    row(gw, "tokens_per_day").await.0
}

/// Lets the rest of time pass: what was remembered of expired calls is forgotten, and charges nothing more.
async fn assert_charged_for_good(gw: &Gateway, redis: &Redis, charged: u64) {
    redis.expire_leases();
    eventually("expired calls to be forgotten", || async { redis.leases() == 0 }).await;
    assert_eq!(row(gw, "tokens_per_day").await, (charged, 0));
    assert_eq!(slots(gw).await, 0);
    assert_eq!(redis.command(&["HLEN", "tg:{tg}:l"]), "1", "only the name of this life of the data is left");
}

/// Streams under way, and how many tokens their clients have seen.
struct Streams {
    tasks: Vec<JoinHandle<()>>,
    seen: Arc<AtomicU64>,
}

impl Streams {
    async fn open(gw: &Gateway, n: usize) -> Self {
        let body = json!({
            "model": "chat", "messages": [{ "role": "user", "content": "tell me a long story" }], "max_tokens": 5_000,
            "stream": true, "stream_options": { "include_usage": true, "continuous_usage_stats": true },
        });
        let replies = join_all((0..n).map(|_| gw.post(PATH).key(KEY).json(&body).open())).await;
        let seen = Arc::new(AtomicU64::new(0));
        let follow = |mut reply: Reply| {
            let seen = Arc::clone(&seen);
            tokio::spawn(async move {
                while let Some(event) = reply.event().await {
                    seen.fetch_add(u64::from(event.delta().is_some()), Ordering::AcqRel);
                }
            })
        };
        let tasks = replies.into_iter().map(follow).collect();
        Self { tasks, seen }
    }

    fn seen(&self) -> u64 {
        self.seen.load(Ordering::Acquire)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_streams_of_a_killed_gateway_are_charged_once_and_free_their_slots_within_a_minute() {
    const STREAMS: u64 = 100;
    let redis = Redis::start();
    let near = node_with("qwen", |config| config.decode = Duration::from_millis(200)).await;
    let conf = conf(&redis, &near.url());
    let (dies, stays) = (Gateway::with(&conf).await, Gateway::with(&conf).await);
    // One stream of a gateway that lives on is not to be touched by any of this.
    let alive = Streams::open(&stays, 1).await;
    let streams = Streams::open(&dies, usize::try_from(STREAMS).expect("few")).await;
    // Long enough that what is told of them has been told more than once.
    let mut samples = Vec::new();
    let begin = Instant::now();
    while begin.elapsed() < 2 * UNTOLD + Duration::from_secs(1) {
        samples.push((Instant::now(), streams.seen()));
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(streams.seen() > 20 * STREAMS, "the streams do not run: {}", streams.seen());
    assert_eq!(slots(&stays).await, STREAMS + 1);
    let killed = Instant::now();
    drop(dies);
    let told = samples.iter().rev().find(|(at, _)| *at + UNTOLD <= killed).expect("a sample").1;
    let again = Gateway::with(&conf).await;
    join_all(streams.tasks).await;
    eventually("the node to see them gone", || async {
        near.requests().iter().filter(|seen| seen.ended.is_some()).count() as u64 == STREAMS
    })
    .await;
    let ended: Vec<_> = near.requests().into_iter().filter(|seen| seen.ended.is_some()).collect();
    let prompts: u64 = ended.iter().map(|seen| seen.prompt_tokens).sum();
    let made: u64 = ended.iter().map(|seen| seen.output_tokens).sum();

    while slots(&stays).await > 1 {
        assert!(killed.elapsed() < FREED, "{} slots are still taken", slots(&stays).await);
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    assert_eq!(slots(&again).await, 1);
    let (charged, held) = row(&stays, "tokens_per_day").await;
    assert!(
        (prompts + told..=prompts + made).contains(&charged),
        "charged {charged} of prompts {prompts} and answers {made}, of which {told} were seen {UNTOLD:?} before the kill"
    );
    assert!(held > 5_000 && held < 5_100, "the stream that goes on is held, and only that: {held}");
    assert_eq!(row(&stays, "requests_per_hour").await.0, STREAMS + 1);

    // That stream ends as any other, and the rest of time passes.
    assert!(!alive.tasks[0].is_finished());
    alive.tasks[0].abort();
    let total = all_back(&again).await;
    let last = near.requests().into_iter().max_by_key(|seen| seen.output_tokens).expect("a request");
    let own = total - charged;
    assert!(own > alive.seen() && own <= last.prompt_tokens + last.output_tokens, "the stream was charged {own}");
    assert_charged_for_good(&again, &redis, total).await;
    again.settles("tollgate_store_up", &[], 1.0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gateway_killed_between_reservation_and_dispatch_leaves_nothing_held() {
    // The calls have their reservation, and wait for a connection.
    let (redis, near) = (Redis::start(), Full::new());
    let conf = conf(&redis, &near.url());
    let (dies, stays) = (Gateway::with(&conf).await, Gateway::with(&conf).await);
    let waiting = calls(&dies, 5).await;
    let (used, held) = row(&stays, "tokens_per_day").await;
    assert_eq!((used, held % 5), (0, 0));
    drop(dies);
    join_all(waiting).await;
    assert_eq!((slots(&stays).await, row(&stays, "tokens_per_day").await), (5, (0, held)), "until their time is over");
    redis.expire_leases();
    let charged = all_back(&stays).await;
    // Nobody knows any more whether they were sent: at most their prompts.
    assert!(charged <= held - 5 * ROOM, "{charged} of {held}");
    assert_eq!(row(&stays, "requests_per_hour").await.0, 5);
    assert_charged_for_good(&stays, &redis, charged).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gateway_killed_while_it_charges_anothers_calls_leaves_the_rest_to_a_third() {
    const CALLS: u64 = 250;
    let (redis, near) = (Redis::start(), silent().await);
    let conf = conf(&redis, &near.url());
    let (dies, sweeps) = (Gateway::with(&conf).await, Gateway::with(&conf).await);
    let open = calls(&dies, CALLS).await;
    let (_, held) = row(&sweeps, "tokens_per_day").await;
    let prompts = held - CALLS * ROOM;
    assert_eq!(held % CALLS, 0);
    drop(dies);
    join_all(open).await;
    redis.expire_leases();
    // Seen from the store, since whoever is asked might have charged more by then.
    let charged = "local n = 0 for _, lease in ipairs(redis.call('HVALS', KEYS[1])) do \
                   local known, lease = pcall(cmsgpack.unpack, lease) \
                   if known and type(lease) == 'table' and lease[4] == 1 then n = n + 1 end end return n";
    let charged = || redis.command(&["EVAL", charged, "1", "tg:{tg}:l"]).parse::<u64>().expect("a number");
    eventually("some to be charged", || async { charged() > 0 }).await;
    drop(sweeps);
    let before = charged();
    assert!(before < CALLS, "it had charged all of them already");
    let third = Gateway::with(&conf).await;
    assert_eq!(all_back(&third).await, prompts, "each is charged its prompt, once");
    assert_charged_for_good(&third, &redis, prompts).await;
    assert_eq!(row(&third, "requests_per_hour").await.0, CALLS);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_all_gateways_were_killed_the_next_one_settles_what_they_left() {
    let (redis, near, good) = (Redis::start(), silent().await, node("qwen").await);
    let silent = conf(&redis, &near.url());
    let (one, two) = (Gateway::with(&silent).await, Gateway::with(&silent).await);
    let mut open = calls(&one, 30).await;
    open.extend(calls(&two, 20).await);
    let (_, held) = row(&one, "tokens_per_day").await;
    drop((one, two));
    join_all(open).await;
    assert_eq!(redis.leases(), 50, "nobody is there to charge them");
    let next = Gateway::with(&conf(&redis, &good.url())).await;
    assert_eq!((slots(&next).await, row(&next, "tokens_per_day").await), (50, (0, held)), "until their time is over");
    // It serves meanwhile, and what it serves is its own.
    let served = next.post(PATH).key(KEY).json(&chat("hi")).send().await.expect(200).json();
    let own = served["usage"]["total_tokens"].as_u64().expect("usage");
    eventually("its call to be charged", || async { row(&next, "tokens_per_day").await == (own, held) }).await;
    redis.expire_leases();
    assert_eq!(all_back(&next).await, own + held - 50 * ROOM);
    // The same again for one that is started once more.
    drop(next);
    let last = Gateway::with(&silent).await;
    assert_charged_for_good(&last, &redis, own + held - 50 * ROOM).await;
    assert_eq!(row(&last, "requests_per_hour").await.0, 51);
}
