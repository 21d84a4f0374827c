//! What may befall Redis: each with what becomes of calls, of the metrics, and of what was counted.

use std::time::{Duration, Instant};

use serde_json::Value;
use tollgate_load::node::Node;

use crate::harness::client::at_once;
use crate::harness::redis::Redis;
use crate::harness::wire::{Mode, Wire};
use crate::harness::{ALICE, Conf, Gateway, WENDY, chat, eventually, node};

const PATH: &str = "/v1/chat/completions";
const CARL: &str = "carl-secret-key";
const OLGA: &str = "olga-secret-key";
const BUDGET: Duration = Duration::from_millis(50);
/// What a call may take beyond the budget on a machine that is busy with other tests.
const SLACK: Duration = Duration::from_millis(400);

struct Scene {
    redis: Redis,
    gw: Gateway,
    _near: Node,
}

/// What a fault did to calls.
struct Toll {
    /// Calls of Wendy that were admitted.
    admitted: u64,
}

impl Scene {
    async fn new(redis: Redis) -> Self {
        let url = redis.url();
        Self::at(redis, &url).await
    }

    async fn at(redis: Redis, url: &str) -> Self {
        let near = node("qwen").await;
        let conf = Conf::serving("qwen", &[near.url()])
            .key(&format!("{{ id: olga, key: {OLGA}, tier: open }}"))
            .tier("open: { tokens_per_day: 50, when_down: open }")
            .key(&format!("{{ id: carl, key: {CARL}, tier: closed }}"))
            .tier("closed: { tokens_per_day: 1_000_000, when_down: closed }")
            .also(&format!("store: {{ redis: {{ url: \"{url}\", timeout: {}ms }} }}", BUDGET.as_millis()));
        let scene = Self { redis, gw: Gateway::with(&conf).await, _near: near };
        scene.gw.settles("tollgate_store_up", &[], 1.0).await;
        scene
    }

    async fn ask(&self, key: &str) -> u16 {
        let begin = Instant::now();
        let status = self.gw.post(PATH).key(key).json(&chat("hi")).send().await.status();
        assert!(begin.elapsed() < BUDGET + SLACK, "a call took {:?}", begin.elapsed());
        status
    }

    async fn used(&self, key: &str, dimension: &str) -> (u64, u64) {
        let answer = self.gw.get("/v1/quota").key(key).send().await.expect(200).json();
        let rows = answer["limits"].as_array().expect("limits").clone();
        let row: Value = rows.into_iter().find(|row| row["dimension"] == dimension).expect("the dimension");
        (row["used"].as_u64().expect("a number"), row["held"].as_u64().expect("a number"))
    }

    async fn counted(&self, requests: u64) {
        eventually(&format!("{requests} requests to be counted"), || async {
            self.used(WENDY, "requests_per_hour").await.0 == requests && self.used(WENDY, "tokens_per_day").await.1 == 0
        })
        .await;
    }

    /// Five calls before; then a fault, and calls until the gateway knows, each quick and decided as its policy says.
    async fn before(&self) {
        // On a busy machine one may miss the budget; it is counted all the same.
        for _ in 0..5 {
            assert_eq!(self.ask(WENDY).await, 200);
        }
        self.counted(5).await;
    }

    async fn during(&self) -> Toll {
        let mut toll = Toll { admitted: 0 };
        let known = Instant::now() + Duration::from_secs(10);
        while self.gw.metric("tollgate_store_up", &[]).await > 0.5 {
            assert_eq!(self.ask(WENDY).await, 200);
            toll.admitted += 1;
            assert!(Instant::now() < known, "nobody noticed");
        }
        let asked = self.gw.metric("tollgate_store_duration_seconds_count", &[("op", "reserve")]).await;
        for _ in 0..10 {
            assert_eq!((self.ask(WENDY).await, self.ask(OLGA).await, self.ask(CARL).await), (200, 200, 503));
            toll.admitted += 1;
        }
        // While it is known to be away nobody asks it, and nobody waits for it.
        assert_eq!(self.gw.metric("tollgate_store_duration_seconds_count", &[("op", "reserve")]).await, asked);
        toll
    }

    /// All that was used is counted once, and nothing is left over.
    async fn after(&self, before: u64, toll: &Toll, back: Duration) {
        let begin = Instant::now();
        self.gw.settles("tollgate_store_up", &[], 1.0).await;
        assert!(begin.elapsed() < back, "it took {:?}", begin.elapsed());
        self.counted(before + toll.admitted).await;
        assert_eq!(self.ask(CARL).await, 200);
        assert_eq!(self.ask(WENDY).await, 200);
        self.counted(before + toll.admitted + 1).await;
        eventually("no lease", || async { self.redis.command(&["ZCARD", "tg:{tg}:z"]) == "0" }).await;
        let forever = "local n = 0 for _, key in ipairs(redis.call('KEYS', 'tg:{tg}:s:*')) do \
                       if redis.call('PTTL', key) < 0 then n = n + 1 end end return n";
        assert_eq!(self.redis.command(&["EVAL", forever, "0"]), "0", "scopes without a time to live");
        assert_ne!(self.redis.command(&["EXISTS", "tg:{tg}:s:k:wendy"]), "0");
        assert_eq!(self.gw.metric("tollgate_tokens_lost_total", &[]).await, 0.0);
        self.gw.settles("tollgate_reservations_inflight", &[], 0.0).await;
        let labels = [("scope", "key"), ("dimension", "requests_per_minute"), ("decision", "ok")];
        // Wendy's calls; nobody else's tier has that dimension.
        assert_eq!(self.gw.metric("tollgate_limit_decisions_total", &labels).await, (5 + toll.admitted + 1) as f64);
    }
}

const SOON: Duration = Duration::from_secs(3);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_stands_still() {
    let scene = Scene::new(Redis::start()).await;
    scene.before().await;
    scene.redis.signal("STOP");
    let toll = scene.during().await;
    scene.redis.signal("CONT");
    scene.after(5, &toll, SOON).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_pauses_its_clients() {
    let scene = Scene::new(Redis::start()).await;
    scene.before().await;
    scene.redis.command(&["CLIENT", "PAUSE", "3000", "ALL"]);
    let toll = scene.during().await;
    scene.after(5, &toll, 2 * SOON).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_was_killed_and_comes_back_empty() {
    let mut scene = Scene::new(Redis::start()).await;
    scene.before().await;
    scene.redis.kill();
    let toll = scene.during().await;
    scene.redis.restart();
    // What was settled before is lost with the data.
    scene.after(0, &toll, SOON).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_is_loading_its_data() {
    let mut scene = Scene::new(Redis::start()).await;
    scene.before().await;
    let fill = "for i = 1, 4000 do redis.call('SET', 'fill:' .. i, string.rep('x', 200)) end return 1";
    scene.redis.command(&["EVAL", fill, "0"]);
    scene.redis.command(&["SAVE"]);
    // Four thousand keys, half a millisecond each.
    scene.redis.restart_with(&["--key-load-delay", "500", "--loading-process-events-interval-bytes", "1024"]);
    let loading = || scene.redis.ask(&["INFO", "persistence"]).contains("loading:1");
    assert!(loading(), "it has loaded before anybody could ask");
    let toll = scene.during().await;
    assert!(loading(), "it has loaded before all was asked");
    scene.after(5, &toll, Duration::from_secs(15)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_is_out_of_memory() {
    let scene = Scene::new(Redis::start()).await;
    scene.before().await;
    scene.redis.command(&["CONFIG", "SET", "maxmemory", "1"]);
    let toll = scene.during().await;
    scene.redis.command(&["CONFIG", "SET", "maxmemory", "0"]);
    scene.after(5, &toll, SOON).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_takes_no_writes() {
    let scene = Scene::new(Redis::start()).await;
    scene.before().await;
    scene.redis.command(&["REPLICAOF", "127.0.0.1", "1"]);
    let toll = scene.during().await;
    scene.redis.command(&["REPLICAOF", "NO", "ONE"]);
    scene.after(5, &toll, SOON).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_password_that_is_no_longer_right() {
    let redis = Redis::with(&["--user", "admin", "on", "nopass", "~*", "&*", "+@all"]);
    let scene = Scene::new(redis).await;
    scene.before().await;
    // Whoever is logged in stays so; whoever comes anew needs the password.
    scene.redis.command_as("admin", &["ACL", "SETUSER", "default", "resetpass", ">secret"]);
    scene.redis.command_as("admin", &["CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"]);
    let toll = scene.during().await;
    eventually("the log to say why", || async { scene.gw.output().contains("NOAUTH") }).await;
    scene.redis.command_as("admin", &["ACL", "SETUSER", "default", "nopass"]);
    scene.after(5, &toll, SOON).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wire_that_passes_nothing_on() {
    let redis = Redis::start();
    let wire = Wire::to(redis.socket()).await;
    let scene = Scene::at(redis, &wire.url()).await;
    scene.before().await;
    wire.set(Mode::Holds);
    let toll = scene.during().await;
    wire.set(Mode::Forwards);
    scene.after(5, &toll, SOON).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wire_that_is_cut_in_the_middle_of_an_answer() {
    let redis = Redis::start();
    let wire = Wire::to(redis.socket()).await;
    let scene = Scene::at(redis, &wire.url()).await;
    scene.before().await;
    wire.set(Mode::Cuts);
    let toll = scene.during().await;
    wire.set(Mode::Forwards);
    scene.after(5, &toll, SOON).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn forgotten_scripts_are_no_outage() {
    let scene = Scene::new(Redis::start()).await;
    scene.before().await;
    for _ in 0..5 {
        scene.redis.command(&["SCRIPT", "FLUSH"]);
        assert_eq!((scene.ask(WENDY).await, scene.ask(CARL).await), (200, 200));
    }
    assert_eq!(scene.gw.metric("tollgate_store_up", &[]).await, 1.0);
    scene.counted(10).await;
    assert_eq!(scene.gw.metric("tollgate_tokens_lost_total", &[]).await, 0.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_admitted_call_costs_one_question_before_and_one_word_after() {
    let scene = Scene::new(Redis::start()).await;
    scene.before().await;
    let op = async |op| scene.gw.metric("tollgate_store_duration_seconds_count", &[("op", op)]).await as u64;
    scene.redis.command(&["CONFIG", "RESETSTAT"]);
    let (reserves, settles, begin) = (op("reserve").await, op("settle").await, Instant::now());
    for _ in 0..100 {
        assert_eq!(scene.ask(WENDY).await, 200);
    }
    eventually("all settled", || async { scene.redis.command(&["ZCARD", "tg:{tg}:z"]) == "0" }).await;
    let (reserves, settles) = (op("reserve").await - reserves, op("settle").await - settles);
    assert_eq!(reserves, 100);
    assert!((1..=100).contains(&settles), "{settles}");
    // Heartbeat, sweep, and at times a renewal, every second.
    let beats = 3 * (begin.elapsed().as_secs() + 2);
    let asked = scene.redis.calls("evalsha");
    assert!((reserves + settles..=reserves + settles + beats).contains(&asked), "{asked}, {settles} settlements");
    assert_eq!((scene.redis.calls("eval"), scene.redis.calls("ping")), (0, 0));

    // Many at once end together: fewer words than calls.
    let before = op("settle").await;
    let statuses =
        at_once(64, (0..256).map(|_| async { scene.gw.post(PATH).key(WENDY).json(&chat("hi")).send().await.status() }))
            .await;
    assert!(statuses.iter().all(|status| *status == 200));
    scene.counted(361).await;
    let settles = op("settle").await - before;
    assert!(settles < 256, "{settles}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_of_refused_calls_does_not_reach_the_server() {
    let scene = Scene::new(Redis::start()).await;
    for _ in 0..60 {
        assert_eq!(scene.ask(ALICE).await, 200);
    }
    eventually("all settled", || async { scene.redis.command(&["ZCARD", "tg:{tg}:z"]) == "0" }).await;
    scene.redis.command(&["CONFIG", "RESETSTAT"]);
    let begin = Instant::now();
    let flood = (0..2_000).map(|_| async { scene.gw.post(PATH).key(ALICE).json(&chat("hi")).send().await.status() });
    let statuses = at_once(32, flood).await;
    assert!(statuses.iter().all(|status| *status == 429));
    // One question every quarter of a second and, the first time, of as many as come at once; and the heartbeats.
    let took = begin.elapsed();
    let most = 32 * (1 + took.as_millis() as u64 / 250) + 3 * (took.as_secs() + 2);
    let asked = scene.redis.calls("evalsha");
    assert!(asked <= most.min(400), "{asked} questions in {took:?}");
    let again = scene.gw.metric("tollgate_limit_refusals_repeated_total", &[]).await;
    assert!(again >= 1_600.0, "{again}");
}
