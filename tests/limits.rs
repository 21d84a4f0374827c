//! Limits: who may do how much, what it says when it is too much, and that counters tell the truth.

use std::collections::BTreeSet;
use std::sync::Arc;

use serde_json::{Value, json};

use crate::harness::client::at_once;
use crate::harness::{
    ALICE, Answer, Conf, DONE, Gateway, RawNode, WENDY, chat, chat_stream, chunk_event, completion, eventually, fault,
    node, usage_event,
};

const PATH: &str = "/v1/chat/completions";

/// The caller's own limit of that dimension, as `/v1/quota` tells it.
async fn quota(gw: &Gateway, key: &str, dimension: &str) -> Value {
    let answer = gw.get("/v1/quota").key(key).send().await.expect(200).json();
    let limits = answer["limits"].as_array().expect("limits").clone();
    let found = limits.into_iter().find(|row| row["scope"] == "key" && row["dimension"] == dimension);
    found.unwrap_or_else(|| panic!("no {dimension} in {answer}"))
}

/// Waits until a dimension has this much used and nothing held.
async fn settles(gw: &Gateway, key: &str, dimension: &str, used: u64) {
    let what = format!("{dimension} to have {used} used and nothing held");
    eventually(&what, || async {
        let row = quota(gw, key, dimension).await;
        row["used"] == used && row["held"] == 0
    })
    .await;
}

fn assert_refused(answer: &Answer, code: &str) {
    assert_eq!(answer.refusal(), (429, code.into()));
    let seconds = answer.number("retry-after");
    let millis = answer.number("retry-after-ms");
    assert!(seconds >= 1.0 && seconds.fract() == 0.0, "retry-after: {seconds}");
    assert!(millis > 0.0 && (millis / 1000.0).ceil() <= seconds, "retry-after-ms: {millis}, retry-after: {seconds}");
}

#[tokio::test]
async fn the_61st_request_of_a_minute_is_refused_and_says_when_to_come_back() {
    let near = node("qwen").await;
    let gw = Gateway::with(&Conf::serving("qwen", &[near.url()])).await;
    let mut wire = gw.wire().await;
    for turn in 1..=60 {
        let answer = wire.send(gw.post(PATH).key(ALICE).json(&chat("hi"))).await.expect(200);
        assert_eq!(answer.number("x-ratelimit-limit-requests"), 60.0);
        assert_eq!(answer.number("x-ratelimit-remaining-requests"), f64::from(60 - turn));
    }
    let answer = wire.send(gw.post(PATH).key(ALICE).json(&chat("hi"))).await;
    assert_refused(&answer, "rate_limit_exceeded");
    let error = answer.json()["error"].clone();
    assert_eq!(error["type"], "requests");
    let message = error["message"].as_str().expect("a message");
    assert!(message.contains("key") && message.contains("minute"), "scope and dimension are named: {message}");
    assert!(answer.number("retry-after") <= 60.0);
    assert_eq!(answer.number("x-ratelimit-remaining-requests"), 0.0);
    assert!(!answer.header("x-ratelimit-reset-requests").is_empty());
    assert!(!answer.header("ratelimit").is_empty() && !answer.header("ratelimit-policy").is_empty());
    assert_eq!(answer.header("content-type"), "application/json");
    assert!(!answer.header("x-request-id").is_empty());
    assert_eq!(near.requests().len(), 60, "the refused call never reached the node");

    // A refusal changes no counter, and other keys are not concerned.
    assert_eq!(quota(&gw, ALICE, "requests_per_minute").await["used"], 60);
    assert_eq!(quota(&gw, ALICE, "requests_per_hour").await["used"], 60);
    settles(&gw, ALICE, "requests_per_hour", 60).await;
    wire.send(gw.post(PATH).key(WENDY).json(&chat("hi"))).await.expect(200);
    assert!(gw.metric("tollgate_limit_decisions_total", &[("decision", "refused")]).await >= 1.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_200_calls_at_once_exactly_the_limit_is_admitted() {
    let near = node("qwen").await;
    let gw = Arc::new(Gateway::with(&Conf::serving("qwen", &[near.url()])).await);
    let one = |_| {
        let gw = Arc::clone(&gw);
        async move { gw.post(PATH).key(ALICE).json(&chat("hi")).send().await.status() }
    };
    let statuses = at_once(50, (0..200).map(one)).await;
    assert_eq!(statuses.iter().filter(|status| **status == 200).count(), 60);
    assert_eq!(statuses.iter().filter(|status| **status == 429).count(), 140);
    assert_eq!(near.requests().len(), 60);
}

#[tokio::test]
async fn quota_tells_every_limit_and_never_consumes() {
    let near = node("qwen").await;
    let gw = Gateway::with(&Conf::serving("qwen", &[near.url()])).await;
    gw.post(PATH).key(ALICE).json(&chat("hi")).send().await.expect(200);
    settles(&gw, ALICE, "requests_per_minute", 1).await;
    for _ in 0..70 {
        gw.get("/v1/quota").key(ALICE).send().await.expect(200);
    }
    let answer = gw.get("/v1/quota").header("x-api-key", ALICE).send().await.expect(200).json();
    assert_eq!((&answer["key_id"], &answer["tier"]), (&json!("alice"), &json!("free")));
    let rows = answer["limits"].as_array().expect("limits");
    let dimensions: BTreeSet<&str> = rows.iter().filter_map(|row| row["dimension"].as_str()).collect();
    assert_eq!(dimensions, BTreeSet::from(["requests_per_minute", "requests_per_hour", "tokens_per_day"]));
    for row in rows {
        let fields: BTreeSet<&str> = row.as_object().expect("an object").keys().map(String::as_str).collect();
        assert_eq!(fields, BTreeSet::from(["scope", "dimension", "limit", "used", "held", "remaining", "resets_in"]));
        assert_eq!(row["scope"], "key");
        let number = |field: &str| row[field].as_f64().unwrap_or_else(|| panic!("{field} in {row}"));
        assert_eq!(number("limit") - number("used") - number("held"), number("remaining"), "{row}");
        assert!(number("resets_in") >= 0.0 && number("resets_in") <= 86_400.0, "{row}");
    }
    assert_eq!(quota(&gw, ALICE, "requests_per_minute").await["used"], 1);
    assert_eq!(gw.get("/v1/quota").send().await.refusal(), (401, "missing_api_key".into()));
    assert_eq!(gw.get("/v1/quota").key("wrong").send().await.refusal(), (401, "invalid_api_key".into()));
}

#[tokio::test]
async fn tokens_are_held_during_a_call_and_settled_to_what_the_upstream_says() {
    let near = RawNode::start().await;
    let gw = Gateway::with(&Conf::serving("qwen", &[near.url()])).await;

    let asked = tokio::spawn(gw.post(PATH).key(ALICE).json(&chat("hi")).send());
    let mut call = near.call().await;
    let during = quota(&gw, ALICE, "tokens_per_day").await;
    let held = during["held"].as_u64().expect("a number");
    assert!((8..200).contains(&held), "the prompt and max_tokens are held: {during}");
    assert_eq!(during["used"], 0);
    assert_eq!(during["remaining"], 100_000 - held);
    assert_eq!(gw.metric("tollgate_reservations_inflight", &[]).await, 1.0);
    call.json("200 OK", &completion("hello", 17, 25)).await;
    asked.await.expect("a task").expect(200);
    settles(&gw, ALICE, "tokens_per_day", 42).await;
    gw.settles("tollgate_reservations_inflight", &[], 0.0).await;

    let asked = tokio::spawn(gw.post(PATH).key(ALICE).json(&chat_stream("hi")).send());
    let mut call = near.call().await;
    call.sse(&format!("{}{}{DONE}", chunk_event("hello"), usage_event(30, 28))).await;
    asked.await.expect("a task").expect(200);
    settles(&gw, ALICE, "tokens_per_day", 100).await;
    settles(&gw, ALICE, "requests_per_minute", 2).await;
    gw.settles("tollgate_tokens_total", &[("key", "alice"), ("kind", "input")], 47.0).await;
    gw.settles("tollgate_tokens_total", &[("key", "alice"), ("kind", "output")], 53.0).await;
}

#[tokio::test]
async fn an_upstream_that_fails_costs_a_request_and_no_tokens() {
    let near = node("qwen").await;
    let conf = Conf::new()
        .upstream("near", &[near.url()], "timeouts: { first_byte: 300ms, first_token: 300ms }, eject: { after: 1000 }")
        .model("chat", &[("near", "qwen")], "retry: { attempts: 1 }")
        .llm();
    let gw = Gateway::with(&conf).await;
    for (turn, name) in ["500", "refuse", "slow_header:3000", "429"].into_iter().enumerate() {
        near.set_fault(Some(fault(name)));
        let answer = gw.post(PATH).key(ALICE).json(&chat_stream("hi")).send().await;
        assert!(answer.status() >= 429, "{name}: {}", answer.text());
        settles(&gw, ALICE, "tokens_per_day", 0).await;
        settles(&gw, ALICE, "requests_per_minute", turn as u64 + 1).await;
    }
    gw.settles("tollgate_reservations_inflight", &[], 0.0).await;
}

#[tokio::test]
async fn a_client_that_leaves_before_a_token_pays_the_prompt() {
    let near = RawNode::start().await;
    let gw = Gateway::with(&Conf::serving("qwen", &[near.url()])).await;
    let mut body = chat_stream(&"word ".repeat(100));
    body["max_tokens"] = 5000.into();
    let asked = tokio::spawn(gw.post(PATH).key(ALICE).json(&body).try_open());
    let mut call = near.call().await;
    asked.abort();
    call.closed().await;
    eventually("the reservation to settle", || async { quota(&gw, ALICE, "tokens_per_day").await["held"] == 0 }).await;
    let used = quota(&gw, ALICE, "tokens_per_day").await["used"].as_u64().expect("a number");
    assert!((50..400).contains(&used), "a prompt of a hundred words was charged as {used}");
}

#[tokio::test]
async fn a_client_that_leaves_amid_the_answer_pays_prompt_and_what_was_said() {
    let near = RawNode::start().await;
    let gw = Gateway::with(&Conf::serving("qwen", &[near.url()])).await;
    let mut body = chat_stream("hi");
    body["max_tokens"] = 5000.into();
    let asked = tokio::spawn(gw.post(PATH).key(ALICE).json(&body).open());
    let mut call = near.call().await;
    call.stream_head().await;
    for _ in 0..50 {
        call.chunk(chunk_event(" word")).await;
    }
    let mut reply = asked.await.expect("a task");
    for _ in 0..50 {
        assert!(reply.event().await.is_some());
    }
    reply.leave();
    eventually("the reservation to settle", || async { quota(&gw, ALICE, "tokens_per_day").await["held"] == 0 }).await;
    let used = quota(&gw, ALICE, "tokens_per_day").await["used"].as_u64().expect("a number");
    assert!((40..200).contains(&used), "fifty words were charged as {used}");
}

#[tokio::test]
async fn a_key_may_override_rows_of_its_tier() {
    let near = node("qwen").await;
    let conf = Conf::serving("qwen", &[near.url()])
        .key("{ id: bob, key: bob-secret-key, tier: free, limits: { requests_per_minute: 2 } }");
    let gw = Gateway::with(&conf).await;
    for _ in 0..2 {
        let answer = gw.post(PATH).key("bob-secret-key").json(&chat("hi")).send().await.expect(200);
        assert_eq!(answer.number("x-ratelimit-limit-requests"), 2.0);
    }
    let answer = gw.post(PATH).key("bob-secret-key").json(&chat("hi")).send().await;
    assert_refused(&answer, "rate_limit_exceeded");
    assert_eq!(quota(&gw, "bob-secret-key", "requests_per_hour").await["limit"], 1000, "the other rows stay");
}

#[tokio::test]
async fn a_shadow_limit_counts_and_never_refuses() {
    let near = node("qwen").await;
    let conf = Conf::serving("qwen", &[near.url()])
        .tier("watched: { requests_per_minute: { limit: 1, shadow: true }, requests_per_hour: 100 }")
        .key("{ id: bob, key: bob-secret-key, tier: watched }");
    let gw = Gateway::with(&conf).await;
    for _ in 0..3 {
        let answer = gw.post(PATH).key("bob-secret-key").json(&chat("hi")).send().await.expect(200);
        assert_eq!(answer.number("x-ratelimit-limit-requests"), 100.0, "clients are told of limits that bind");
    }
    let shadowed = gw
        .metric("tollgate_limit_decisions_total", &[("dimension", "requests_per_minute"), ("decision", "shadow")])
        .await;
    assert_eq!(shadowed, 2.0);
}

#[tokio::test]
async fn a_day_that_is_used_up_is_quota_exceeded_and_not_worth_a_retry() {
    let near = RawNode::start().await;
    let conf = Conf::serving("qwen", &[near.url()])
        .tier("small: { requests_per_minute: 100, tokens_per_day: 100 }")
        .key("{ id: bob, key: bob-secret-key, tier: small }");
    let gw = Gateway::with(&conf).await;
    let asked = tokio::spawn(gw.post(PATH).key("bob-secret-key").json(&chat("hi")).send());
    near.call().await.json("200 OK", &completion("hello", 50, 45)).await;
    asked.await.expect("a task").expect(200);
    settles(&gw, "bob-secret-key", "tokens_per_day", 95).await;

    let answer = gw.post(PATH).key("bob-secret-key").json(&chat("hi")).send().await;
    assert_refused(&answer, "quota_exceeded");
    assert_eq!(answer.header("x-should-retry"), "false");
    assert_eq!(answer.json()["error"]["type"], "tokens");
    assert_eq!(answer.number("x-ratelimit-limit-tokens"), 100.0);
    assert!(answer.number("retry-after") <= 86_400.0);
    settles(&gw, "bob-secret-key", "requests_per_minute", 1).await;
}

/// It can never be admitted: larger than the limit itself, whoever waits.
#[tokio::test]
async fn a_call_larger_than_its_limit_is_refused_for_good() {
    let near = node("qwen").await;
    let gw = Gateway::with(&Conf::serving("qwen", &[near.url()])).await;
    let mut body = chat("hi");
    body["max_tokens"] = 200_000.into();
    let answer = gw.post(PATH).key(ALICE).json(&body).send().await;
    assert_eq!(answer.refusal(), (429, "quota_exceeded".into()));
    assert_eq!(answer.header("x-should-retry"), "false");
    assert!(near.requests().is_empty());
    settles(&gw, ALICE, "requests_per_minute", 0).await;
}

#[tokio::test]
async fn streams_carry_the_rate_limit_headers_as_well() {
    let near = node("qwen").await;
    let gw = Gateway::with(&Conf::serving("qwen", &[near.url()])).await;
    let answer = gw.post(PATH).key(ALICE).json(&chat_stream("hi")).send().await.expect(200);
    assert_eq!(answer.number("x-ratelimit-limit-requests"), 60.0);
    assert_eq!(answer.number("x-ratelimit-remaining-requests"), 59.0);
    assert_eq!(answer.number("x-ratelimit-limit-tokens"), 100_000.0);
    let left = answer.number("x-ratelimit-remaining-tokens");
    assert!((99_000.0..100_000.0).contains(&left), "{left}");
    for name in ["x-ratelimit-reset-requests", "x-ratelimit-reset-tokens", "ratelimit", "ratelimit-policy"] {
        assert!(!answer.header(name).is_empty(), "{name} is missing");
    }
    let reset = answer.header("x-ratelimit-reset-requests");
    assert!(reset.ends_with('s'), "OpenAI's form is like 1m0s, not {reset}");
}

#[tokio::test]
async fn calls_refused_for_other_reasons_cost_nothing() {
    let near = node("qwen").await;
    let gw = Gateway::with(&Conf::serving("qwen", &[near.url()])).await;
    let mut unknown = chat("hi");
    unknown["model"] = "nothing".into();
    gw.post(PATH).key(ALICE).json(&unknown).send().await.expect(404);
    gw.post(PATH).key(ALICE).json_text("{").send().await.expect(400);
    gw.get(PATH).key(ALICE).send().await.expect(405);
    gw.get("/v1/models").key(ALICE).send().await.expect(200);
    settles(&gw, ALICE, "requests_per_minute", 0).await;
    settles(&gw, ALICE, "tokens_per_day", 0).await;
}

#[tokio::test]
async fn retries_of_one_call_count_as_one_request() {
    let (sick, good) = (node("qwen").await, node("qwen").await);
    sick.set_fault(Some(fault("503")));
    let conf = Conf::new()
        .upstream("near", &[sick.url()], "")
        .upstream("far", &[good.url()], "")
        .model("chat", &[("near", "qwen"), ("far", "qwen")], "retry: { backoff: 1ms }")
        .llm();
    let gw = Gateway::with(&conf).await;
    let answer = gw.post(PATH).key(ALICE).json(&chat("hi")).send().await.expect(200);
    assert_eq!(answer.header("x-tollgate-attempts"), "2");
    settles(&gw, ALICE, "requests_per_minute", 1).await;
    let used = answer.json()["usage"]["total_tokens"].as_u64().expect("usage");
    settles(&gw, ALICE, "tokens_per_day", used).await;
}
