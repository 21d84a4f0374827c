//! What a provider grants is not exceeded: calls are spread, go elsewhere, or are told when to come back.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::harness::client::at_once;
use crate::harness::redis::Redis;
use crate::harness::{Conf, Gateway, WENDY, chat, eventually, named, node};

const PATH: &str = "/v1/chat/completions";

fn conf(node: &str, more: &str) -> Conf {
    Conf::new().upstream("far", &[node], more).model("chat", &[("far", "m")], "").llm()
}

#[tokio::test]
async fn beyond_the_grant_it_is_429_with_the_time_until_there_is_room() {
    let far = node("m").await;
    let gw = Gateway::with(&conf(
        &far.url(),
        "budget: { requests_per_minute: 6, pace_above: 1 }, pool: { concurrency: 9, queue: { wait: 1ms } }",
    ))
    .await;
    for _ in 0..6 {
        gw.post(PATH).key(WENDY).json(&chat("hi")).send().await.expect(200);
    }
    let refused = gw.post(PATH).key(WENDY).json(&chat("hi")).send().await;
    assert_eq!(refused.refusal(), (429, "upstream_rate_limited".into()));
    let wait = refused.number("retry-after");
    assert!((1.0..=10.0).contains(&wait), "one in ten seconds: {wait}");
    assert_eq!(far.requests().len(), 6);
    gw.settles("tollgate_reservations_inflight", &[], 0.0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn above_the_share_calls_are_spread_as_the_grant_refills() {
    let far = node("m").await;
    // Ten a second; six of sixty... the first 540 of 600 at once, then one every 100 ms.
    let gw = Arc::new(Gateway::with(&conf(&far.url(), "budget: { requests_per_minute: 600, pace_above: 0.05 }")).await);
    let began = Instant::now();
    let one = |_| {
        let gw = Arc::clone(&gw);
        async move { gw.post(PATH).key(WENDY).json(&chat("hi")).send().await.status() }
    };
    let statuses = at_once(50, (0..50).map(one)).await;
    assert!(statuses.iter().all(|status| *status == 200), "{statuses:?}");
    // Thirty at once, twenty more in two seconds.
    let took = began.elapsed();
    assert!(took >= Duration::from_millis(1_500), "took {took:?}");
    assert_eq!(far.requests().len(), 50);
    let delayed = gw.metric("tollgate_paced_seconds_count", &[("upstream", "far")]).await;
    assert!((10.0..=20.0).contains(&delayed), "{delayed} were delayed");
}

#[tokio::test]
async fn what_the_grant_does_not_hold_goes_to_the_next_target() {
    let (far, next) = (node("m").await, named("next").await);
    let conf = Conf::new()
        .upstream("far", &[far.url()], "budget: { requests_per_minute: 2, pace_above: 1 }")
        .upstream("next", &[next.url()], "")
        .model("chat", &[("far", "m"), ("next", "m")], "")
        .llm();
    let gw = Gateway::with(&conf).await;
    let mut took = Vec::new();
    for _ in 0..5 {
        let answer = gw.post(PATH).key(WENDY).json(&chat("hi")).send().await.expect(200);
        assert_eq!(answer.header("x-tollgate-attempts"), "1");
        took.push(answer.header("x-tollgate-upstream").to_owned());
    }
    assert_eq!(took, ["far", "far", "next", "next", "next"]);
}

/// An estimate is corrected by what was used: `max_tokens` is no reason to hold back.
#[tokio::test]
async fn tokens_are_drawn_by_estimate_and_corrected_by_use() {
    let far = node("m").await;
    let gw = Gateway::with(&conf(
        &far.url(),
        "budget: { tokens_per_minute: 1000, pace_above: 1 }, pool: { concurrency: 9, queue: { wait: 1ms } }",
    ))
    .await;
    let mut body = chat("hi");
    body["max_tokens"] = 700.into();
    body["stop"] = serde_json::json!([]);
    let first = gw.post(PATH).key(WENDY).json(&body).send().await.expect(200);
    let used = first.json()["usage"]["total_tokens"].as_u64().expect("usage");
    let second = gw.post(PATH).key(WENDY).json(&body).send().await;
    // Twice the estimate is more than there is; what the first one used is known by now.
    assert_eq!(second.status(), if used < 290 { 200 } else { 429 }, "the first used {used}");
    let mut small = chat("hi");
    small["max_tokens"] = 1.into();
    let left = 1000 - used;
    assert!(left > 20, "{used}");
    gw.post(PATH).key(WENDY).json(&small).send().await.expect(200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_gateways_on_one_redis_send_together_no_more_than_the_grant() {
    let (redis, far) = (Redis::start(), node("m").await);
    let conf = conf(
        &far.url(),
        "budget: { requests_per_minute: 60, pace_above: 1 }, pool: { concurrency: 99, queue: { wait: 1ms } }",
    )
    .also(&format!("store: {{ replicas: 2, redis: {{ url: \"{}\", timeout: 2s }} }}", redis.url()));
    let gates = Arc::new([Gateway::with(&conf).await, Gateway::with(&conf).await]);
    let began = Instant::now();
    let one = |n: usize| {
        let gates = Arc::clone(&gates);
        async move { gates[n % 2].post(PATH).key(WENDY).json(&chat("hi")).send().await.status() }
    };
    let statuses = at_once(20, (0..150).map(one)).await;
    let sent = statuses.iter().filter(|status| **status == 200).count();
    let refilled = usize::try_from(began.elapsed().as_secs()).expect("fits") + 1;
    assert!((60..=60 + refilled).contains(&sent), "{sent} sent");
    assert!(statuses.iter().all(|status| [200, 429].contains(status)), "{statuses:?}");
    assert_eq!(far.requests().len(), sent);
    assert_ne!(redis.command(&["EXISTS", "tg:{tg}:b:far"]), "0");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_redis_each_gateway_has_its_part_of_the_grant() {
    let (mut redis, far) = (Redis::start(), node("m").await);
    let conf = conf(
        &far.url(),
        "budget: { requests_per_minute: 20, pace_above: 1 }, pool: { concurrency: 99, queue: { wait: 1ms } }",
    )
    .also(&format!("store: {{ replicas: 2, redis: {{ url: \"{}\", timeout: 2s, when_down: open }} }}", redis.url()));
    let gates = [Gateway::with(&conf).await, Gateway::with(&conf).await];
    for gw in &gates {
        gw.settles("tollgate_store_up", &[], 1.0).await;
    }
    // Both know of each other after a beat.
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    gates[0].post(PATH).key(WENDY).json(&chat("hi")).send().await.expect(200);
    gates[1].post(PATH).key(WENDY).json(&chat("hi")).send().await.expect(200);
    redis.kill();
    let began = Instant::now();
    for gw in &gates {
        eventually("the store to be away", || async { gw.metric("tollgate_store_up", &[]).await == 0.0 }).await;
    }
    let mut sent = 2;
    for n in 0..60 {
        let status = gates[n % 2].post(PATH).key(WENDY).json(&chat("hi")).send().await.status();
        sent += usize::from(status == 200);
    }
    let refilled = usize::try_from(began.elapsed().as_secs()).expect("fits") / 3 + 2;
    assert!((17..=20 + refilled).contains(&sent), "{sent} sent");
    assert_eq!(far.requests().len(), sent);
}

#[tokio::test]
async fn credentials_take_their_share_of_the_calls() {
    use serde_json::Value;
    use std::sync::Mutex;

    use crate::harness::{RawNode, Upcall, completion};
    let seen = Arc::new(Mutex::new(Vec::new()));
    let far = {
        let seen = Arc::clone(&seen);
        RawNode::answering(move |mut call: Upcall| {
            seen.lock().unwrap().push(call.request.header("authorization"));
            async move {
                call.json("200 OK", &completion("hello", 3, 2)).await;
                Some(call)
            }
        })
        .await
    };
    let conf = conf(&far.url(), "credentials: [{ env: K1, weight: 3 }, { env: K2 }]");
    let gw = Gateway::with_env(&conf, &[("K1", "sk-one"), ("K2", "sk-two")]).await;
    for _ in 0..8 {
        gw.post(PATH).key(WENDY).json(&chat("hi")).send().await.expect(200);
    }
    let ones = seen.lock().unwrap().iter().filter(|key| **key == "Bearer sk-one").count();
    assert_eq!((ones, seen.lock().unwrap().len()), (6, 8));
    let upstreams: Value = gw.admin("GET", "/api/upstreams").send().await.expect(200).json();
    let credentials = &upstreams["upstreams"][0]["credentials"];
    assert_eq!((&credentials[0]["name"], &credentials[0]["weight"]), (&"far#0".into(), &3.into()));
    assert!(!upstreams.to_string().contains("sk-"));
}
