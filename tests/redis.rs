//! Several gateways on one Redis, and what becomes of calls when it is not there.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::harness::client::at_once;
use crate::harness::gateway::finish;
use crate::harness::redis::Redis;
use crate::harness::{
    ALICE, Conf, Gateway, RawNode, WENDY, chat, chat_stream, chunk_event, completion, eventually, node, tollgate,
};

const PATH: &str = "/v1/chat/completions";
/// A budget for tests that are not about it, on a machine that is busy with others.
const ROOMY: &str = "2s";

/// Model `chat` at this node, with the counters in Redis.
fn conf(redis: &Redis, node: &str, timeout: &str, when_down: &str) -> Conf {
    Conf::serving("qwen", &[node])
        .key("{ id: olga, key: olga-secret-key, tier: open }")
        .tier("open: { tokens_per_day: 50, when_down: open }")
        .key("{ id: carl, key: carl-secret-key, tier: closed }")
        .tier("closed: { tokens_per_day: 1_000_000, when_down: closed }")
        .key("{ id: sven, key: sven-secret-key, tier: slots }")
        .tier("slots: { concurrency: 2, tokens_per_day: 1_000_000 }")
        .also(&format!(
            "store: {{ replicas: 2, redis: {{ url: \"{}\", timeout: {timeout}, when_down: {when_down} }} }}",
            redis.url()
        ))
}

async fn gateway(redis: &Redis, node: &str, timeout: &str, when_down: &str) -> Gateway {
    Gateway::with(&conf(redis, node, timeout, when_down)).await
}

async fn row(gw: &Gateway, key: &str, dimension: &str) -> Value {
    let answer = gw.get("/v1/quota").key(key).send().await.expect(200).json();
    let rows = answer["limits"].as_array().expect("limits").clone();
    rows.into_iter().find(|row| row["dimension"] == dimension).expect("the dimension")
}

async fn settles(gw: &Gateway, key: &str, dimension: &str, used: u64) {
    eventually(&format!("{dimension} of {key} to be {used}"), || async {
        let row = row(gw, key, dimension).await;
        row["used"] == used && row["held"] == 0
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_gateways_admit_together_exactly_the_limit() {
    let (redis, near) = (Redis::start(), node("qwen").await);
    let gates =
        [gateway(&redis, &near.url(), ROOMY, "closed").await, gateway(&redis, &near.url(), ROOMY, "closed").await];
    let gates = Arc::new(gates);
    let one = |n: usize| {
        let gates = Arc::clone(&gates);
        async move { gates[n % 2].post(PATH).key(ALICE).json(&chat("hi")).send().await.status() }
    };
    let statuses = at_once(40, (0..200).map(one)).await;
    assert_eq!(statuses.iter().filter(|status| **status == 200).count(), 60);
    assert_eq!(statuses.iter().filter(|status| **status == 429).count(), 140);
    assert_eq!(near.requests().len(), 60);
    let refused = gates[0].post(PATH).key(ALICE).json(&chat("hi")).send().await;
    assert_eq!(refused.refusal(), (429, "rate_limit_exceeded".into()));
    let wait = refused.number("retry-after");
    assert!((1.0..=60.0).contains(&wait), "{wait}");
    // Both tell the same of what both have used, and it is what the node said.
    settles(&gates[0], ALICE, "requests_per_hour", 60).await;
    eventually("the same tokens in both", || async {
        let (a, b) = (row(&gates[0], ALICE, "tokens_per_day").await, row(&gates[1], ALICE, "tokens_per_day").await);
        a["held"] == 0 && a["used"] == b["used"] && a["used"].as_u64() >= Some(60)
    })
    .await;
    for gw in gates.iter() {
        gw.settles("tollgate_reservations_inflight", &[], 0.0).await;
        gw.settles("tollgate_store_up", &[], 1.0).await;
    }
    assert_eq!(redis.command(&["ZCARD", "tg:{tg}:z"]), "0");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_gateway_frees_its_slots_and_its_calls_are_charged_once() {
    let (redis, near) = (Redis::start(), RawNode::start().await);
    let dies = gateway(&redis, &near.url(), ROOMY, "closed").await;
    let stays = gateway(&redis, &near.url(), ROOMY, "closed").await;
    let mut calls = Vec::new();
    for _ in 0..2 {
        let asked = tokio::spawn(dies.post(PATH).key("sven-secret-key").json(&chat_stream("hi")).open());
        let mut call = near.call().await;
        call.stream_head().await;
        call.chunk(chunk_event("one")).await;
        calls.push((asked.await.expect("a task"), call));
    }
    assert_eq!(row(&stays, "sven-secret-key", "concurrency").await["used"], 2);
    let held = row(&stays, "sven-secret-key", "tokens_per_day").await["held"].as_u64().expect("a number");
    drop(dies);
    let refused = stays.post(PATH).key("sven-secret-key").json(&chat("hi")).send().await;
    assert_eq!(refused.refusal(), (429, "concurrency_exceeded".into()));
    // The minute that it takes is over at once.
    let expire = "for _, id in ipairs(redis.call('ZRANGE', KEYS[1], 0, -1)) do redis.call('ZADD', KEYS[1], 1, id) end";
    redis.command(&["EVAL", expire, "1", "tg:{tg}:z"]);
    eventually("the slots to be free", || async { row(&stays, "sven-secret-key", "concurrency").await["used"] == 0 })
        .await;
    let charged = row(&stays, "sven-secret-key", "tokens_per_day").await;
    assert_eq!(charged["held"], 0);
    let used = charged["used"].as_u64().expect("a number");
    assert!(used >= 2 && used <= held, "at least the prompts, at most what was reserved: {charged}, held {held}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_redis_stands_still_no_call_waits_and_every_policy_holds() {
    let (redis, near) = (Redis::start(), node("qwen").await);
    let gw = gateway(&redis, &near.url(), "20ms", "share").await;
    let ask = |key: &'static str| gw.post(PATH).key(key).json(&chat("hi")).send();
    ask(WENDY).await.expect(200);
    redis.signal("STOP");
    let mut slowest = Duration::ZERO;
    for _ in 0..50 {
        let begin = Instant::now();
        ask(WENDY).await.expect(200);
        slowest = slowest.max(begin.elapsed());
    }
    assert!(slowest < Duration::from_millis(500), "{slowest:?}");
    gw.settles("tollgate_store_up", &[], 0.0).await;
    for _ in 0..10 {
        ask("olga-secret-key").await.expect(200);
        assert_eq!(ask("carl-secret-key").await.refusal(), (503, "store_unavailable".into()));
    }
    // Alice's 60 a minute, for whichever number of gateways was seen.
    let mut admitted = 0;
    for _ in 0..80 {
        admitted += u32::from(ask(ALICE).await.status() == 200);
    }
    assert!((30..=60).contains(&admitted), "{admitted}");
    redis.signal("CONT");
    let begin = Instant::now();
    gw.settles("tollgate_store_up", &[], 1.0).await;
    assert!(begin.elapsed() < Duration::from_secs(2), "{:?}", begin.elapsed());
    // What was used meanwhile is there, and no reservation is left over.
    settles(&gw, ALICE, "requests_per_hour", admitted.into()).await;
    ask("carl-secret-key").await.expect(200);
    eventually("no lease", || async { redis.command(&["ZCARD", "tg:{tg}:z"]) == "0" }).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_redis_that_restarts_empty_is_told_what_is_open_and_what_was_used() {
    let (mut redis, near) = (Redis::start(), RawNode::start().await);
    let gw = gateway(&redis, &near.url(), ROOMY, "share").await;
    let asked = tokio::spawn(gw.post(PATH).key("sven-secret-key").json(&chat("hi")).send());
    let mut call = near.call().await;
    redis.restart();
    eventually("the open call to be known again", || async { redis.command(&["ZCARD", "tg:{tg}:z"]) == "1" }).await;
    gw.settles("tollgate_store_up", &[], 1.0).await;
    assert_eq!(row(&gw, "sven-secret-key", "concurrency").await["used"], 1);
    call.json("200 OK", &completion("hello", 17, 25)).await;
    asked.await.expect("a task").expect(200);
    settles(&gw, "sven-secret-key", "tokens_per_day", 42).await;
    assert_eq!(row(&gw, "sven-secret-key", "concurrency").await["used"], 0);
}

#[tokio::test]
async fn a_wrong_password_is_told_in_the_log_without_the_password() {
    let (redis, near) = (Redis::with(&["--requirepass", "right-password"]), node("qwen").await);
    let url = format!("{}?pass=wrong-password", redis.url());
    let conf = Conf::serving("qwen", &[near.url()])
        .also("store: { redis: { url: { env: REDIS_URL }, timeout: 2s, when_down: closed } }");
    let gw = Gateway::with_env(&conf, &[("REDIS_URL", &url)]).await;
    let refused = gw.post(PATH).key(ALICE).json(&chat("hi")).send().await;
    assert_eq!(refused.refusal(), (503, "store_unavailable".into()));
    gw.settles("tollgate_store_up", &[], 0.0).await;
    let told = gw.output();
    assert!(told.contains("limit store"), "{told}");
    assert!(!told.contains("wrong-password"), "the password is in the log");
}

/// A gateway that also looks keys up in Redis, and its configuration for the command line.
async fn with_keys(redis: &Redis, node: &str) -> (Gateway, Conf) {
    let conf = conf(redis, node, ROOMY, "closed").also("auth: { redis_keys: true }");
    (Gateway::with(&conf).await, conf)
}

/// Runs `tollgate keys` and gives its JSON.
async fn keys(conf: &Conf, words: &[&str]) -> Result<Value, String> {
    let home = tempfile::TempDir::new().expect("a temporary directory");
    let file = home.path().join("tollgate.yaml");
    std::fs::write(&file, conf.to_string()).expect("a file");
    let mut command = tollgate(&["keys"]);
    command.args(words).args(["--format", "json", "-c"]).arg(&file);
    let output = finish(command).await;
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    match output.status.success() {
        true => Ok(serde_json::from_str(&text).expect("JSON")),
        false => Err(String::from_utf8(output.stderr).expect("UTF-8")),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_in_redis_works_until_it_is_revoked_in_every_gateway_within_a_second() {
    let (redis, near) = (Redis::start(), node("qwen").await);
    let (a, conf) = with_keys(&redis, &near.url()).await;
    let (b, _) = with_keys(&redis, &near.url()).await;
    let made = keys(&conf, &["create", "--id", "dora", "--tier", "free", "--limit", "requests_per_minute=3"]).await;
    let key = made.expect("a key")["key"].as_str().expect("the key").to_owned();
    let ask = |gw: &Gateway, key: &str| gw.post(PATH).key(key).json(&chat("hi")).send();
    ask(&a, &key).await.expect(200);
    ask(&b, &key).await.expect(200);
    ask(&a, &key).await.expect(200);
    assert_eq!(ask(&b, &key).await.refusal(), (429, "rate_limit_exceeded".into()));
    let quota = a.get("/v1/quota").key(&key).send().await.expect(200).json();
    assert_eq!((quota["key_id"].as_str(), quota["tier"].as_str()), (Some("dora"), Some("free")));

    // The other gateway's operator sees the same, and gives it back.
    let shown = b.admin("GET", "/api/quota/dora").send().await.expect(200).json();
    assert_eq!(shown["limits"][0]["used"], 3);
    assert_eq!(b.admin("DELETE", "/api/quota/dora").send().await.status(), 204);
    assert_eq!(b.admin("GET", "/api/quota/nobody").send().await.status(), 404);
    for _ in 0..3 {
        ask(&b, &key).await.expect(200);
    }
    // Refusals are repeated for a moment without asking.
    eventually("the minute to be used up", || async { ask(&a, &key).await.status() == 429 }).await;

    let listed = keys(&conf, &["list"]).await.expect("a list");
    assert_eq!(listed["keys"][0]["limits"]["requests_per_minute"], 3);
    assert!(!listed.to_string().contains(&key) && redis.command(&["EXISTS", &format!("tg:key:{key}")]) == "0");
    assert!(keys(&conf, &["create", "--id", "dora"]).await.unwrap_err().contains("already"));
    assert!(keys(&conf, &["create", "--tier", "gold"]).await.unwrap_err().contains("no tier `gold`"));

    let rotated = keys(&conf, &["rotate", "dora"]).await.expect("a new key")["key"].as_str().expect("it").to_owned();
    let begin = Instant::now();
    for gw in [&a, &b] {
        eventually("the old key to be void", || async { ask(gw, &key).await.status() == 401 }).await;
        // The new one is the same caller, with its minute used up.
        assert_eq!(ask(gw, &rotated).await.refusal(), (429, "rate_limit_exceeded".into()));
    }
    keys(&conf, &["revoke", "dora"]).await.expect("revoked");
    for gw in [&a, &b] {
        eventually("the key to be void", || async { ask(gw, &rotated).await.status() == 401 }).await;
    }
    assert!(begin.elapsed() < Duration::from_secs(5), "{:?}", begin.elapsed());
    assert!(keys(&conf, &["revoke", "dora"]).await.unwrap_err().contains("no key `dora`"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_user_hash_of_an_older_gateway_is_a_key_and_strangers_are_none() {
    let (redis, near) = (Redis::start(), node("qwen").await);
    let (gw, _) = with_keys(&redis, &near.url()).await;
    redis.command(&["HSET", "user:sk-old", "user_id", "u-17", "tier", "free"]);
    redis.command(&["HSET", "user:sk-gold", "user_id", "u-18", "tier", "gold"]);
    redis.command(&["HSET", "user:sk-none", "user_id", "u-19"]);
    let ask = |key: &'static str| gw.post(PATH).key(key).json(&chat("hi")).send();
    ask("sk-old").await.expect(200);
    let quota = gw.get("/v1/quota").key("sk-old").send().await.expect(200).json();
    assert_eq!((quota["key_id"].as_str(), quota["tier"].as_str()), (Some("u-17"), Some("free")));
    // A tier that nobody knows, or none, would be no limit at all.
    for key in ["sk-gold", "sk-none", "sk-stranger"] {
        assert_eq!(ask(key).await.refusal(), (401, "invalid_api_key".into()), "{key}");
    }
    ask(ALICE).await.expect(200);
    // Nobody can be asked: who is known goes on (its limits say what happens), who is not cannot be judged.
    redis.signal("STOP");
    eventually("an answer without Redis", || async {
        ask("sk-other").await.refusal() == (503, "store_unavailable".into())
    })
    .await;
    redis.signal("CONT");
}
