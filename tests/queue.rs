//! Calls that wait for a node: in order, fair between keys, bounded, and gone with their clients.

use std::time::{Duration, Instant};

use serde_json::Value;
use tokio::task::JoinHandle;

use crate::harness::{Answer, Conf, Gateway, RawNode, Upcall, WENDY, chat, completion, eventually, in_time, named};

const PATH: &str = "/v1/chat/completions";
const NORA: &str = "nora-secret-key";

/// Model `chat` at this node, which takes one call at a time; further parts of the upstream in `pool`.
fn conf(node: &str, pool: &str) -> Conf {
    Conf::new()
        .key("{ id: nora, key: nora-secret-key, tier: wide }")
        .upstream("near", &[node], &format!("pool: {{ {pool} }}"))
        .model("chat", &[("near", "qwen")], "")
        .llm()
}

fn ask(gw: &Gateway, key: &str, text: &str) -> JoinHandle<Answer> {
    tokio::spawn(gw.post(PATH).key(key).json(&chat(text)).send())
}

/// What the client wrote in its message.
fn said(call: &Upcall) -> String {
    let body: Value = serde_json::from_slice(&call.request.body).expect("JSON");
    body["messages"][0]["content"].as_str().expect("a text").to_owned()
}

async fn answer(mut call: Upcall) {
    call.json("200 OK", &completion("hello", 3, 2)).await;
}

async fn waiting(gw: &Gateway, calls: u32) {
    gw.settles("tollgate_queue_waiting", &[("upstream", "near")], f64::from(calls)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_burst_of_one_key_waits_and_a_single_call_of_another_is_served_next() {
    let near = RawNode::start().await;
    let gw = Gateway::with(&conf(&near.url(), "concurrency: 1, queue: { size: 200, wait: 60s }")).await;
    let first = ask(&gw, WENDY, "first");
    let call = near.call().await;
    let mut burst = Vec::new();
    for n in 0..100 {
        burst.push(ask(&gw, WENDY, &format!("burst {n}")));
    }
    waiting(&gw, 100).await;
    let single = ask(&gw, NORA, "single");
    waiting(&gw, 101).await;
    let upstreams = gw.admin("GET", "/api/upstreams").send().await.expect(200).json();
    assert_eq!(upstreams["upstreams"][0]["queue"]["waiting"], 101);
    assert_eq!(upstreams["upstreams"][0]["queue"]["size"], 200);
    assert!(!near.called_within(Duration::from_millis(100)).await, "the node has its one call");

    answer(call).await;
    in_time("the first answer", first).await.expect("a task").expect(200);
    let call = near.call().await;
    assert_eq!(said(&call), "single");
    answer(call).await;
    in_time("the single answer", single).await.expect("a task").expect(200);
    for left in (0..100).rev() {
        let call = near.call().await;
        assert!(said(&call).starts_with("burst"));
        waiting(&gw, left).await;
        answer(call).await;
    }
    for one in burst {
        in_time("an answer", one).await.expect("a task").expect(200);
    }
    waiting(&gw, 0).await;
    gw.settles("tollgate_queue_wait_seconds_count", &[("upstream", "near")], 101.0).await;
    gw.settles("tollgate_node_inflight", &[], 0.0).await;
    gw.settles("tollgate_reservations_inflight", &[], 0.0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_of_one_key_are_served_in_their_order() {
    let near = RawNode::start().await;
    let gw = Gateway::with(&conf(&near.url(), "concurrency: 1, queue: { size: 10, wait: 60s }")).await;
    let mut asked = vec![ask(&gw, WENDY, "0")];
    let mut call = near.call().await;
    for n in 1..6 {
        asked.push(ask(&gw, WENDY, &n.to_string()));
        waiting(&gw, n).await;
    }
    for n in 0..6 {
        assert_eq!(said(&call), n.to_string());
        answer(call).await;
        if n == 5 {
            break;
        }
        call = near.call().await;
    }
    for one in asked {
        in_time("an answer", one).await.expect("a task").expect(200);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_leaves_the_queue_is_out_of_it_at_once_and_pays_nothing() {
    let near = RawNode::start().await;
    let gw = Gateway::with(&conf(&near.url(), "concurrency: 1, queue: { size: 10, wait: 60s }")).await;
    let first = ask(&gw, WENDY, "first");
    let call = near.call().await;
    let leaves = ask(&gw, NORA, "leaves");
    let stays = {
        waiting(&gw, 1).await;
        let stays = ask(&gw, NORA, "stays");
        waiting(&gw, 2).await;
        stays
    };
    let left = Instant::now();
    leaves.abort();
    waiting(&gw, 1).await;
    assert!(left.elapsed() < Duration::from_millis(500), "it took {:?}", left.elapsed());
    answer(call).await;
    let call = near.call().await;
    assert_eq!(said(&call), "stays");
    answer(call).await;
    in_time("the first answer", first).await.expect("a task").expect(200);
    in_time("the other answer", stays).await.expect("a task").expect(200);
    gw.settles("tollgate_reservations_inflight", &[], 0.0).await;
    let quota = gw.get("/v1/quota").key(NORA).send().await.expect(200).json();
    let rows = quota["limits"].as_array().expect("limits");
    let row = rows.iter().find(|row| row["dimension"] == "tokens_per_day").expect("a row");
    assert_eq!((&row["used"], &row["held"]), (&Value::from(5), &Value::from(0)), "one call's tokens");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_queue_and_a_wait_that_is_over_are_503_with_retry_after() {
    let near = RawNode::start().await;
    let gw = Gateway::with(&conf(&near.url(), "concurrency: 1, queue: { size: 1, wait: 700ms }")).await;
    let _first = ask(&gw, WENDY, "first");
    let _call = near.call().await;
    let waits = ask(&gw, WENDY, "waits");
    waiting(&gw, 1).await;
    let refused = gw.post(PATH).key(NORA).json(&chat("hi")).send().await;
    assert_eq!(refused.refusal(), (503, "overloaded".into()));
    assert!(refused.number("retry-after") >= 1.0);
    assert!(refused.took < Duration::from_millis(600), "at once, not after {:?}", refused.took);
    let over = in_time("the wait to be over", waits).await.expect("a task");
    assert_eq!(over.refusal(), (503, "overloaded".into()));
    assert!(over.took >= Duration::from_millis(700), "it waited {:?}", over.took);
    waiting(&gw, 0).await;
}

/// Whatever its `on:` says: a full upstream has not failed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_next_target_takes_what_does_not_fit_into_the_queue() {
    let (near, far) = (RawNode::start().await, named("far").await);
    let conf = Conf::new()
        .upstream("near", &[near.url()], "pool: { concurrency: 1, queue: { size: 1, wait: 300ms } }")
        .upstream("far", &[far.url()], "")
        .llm()
        .also("models:\n  chat: { targets: [{ upstream: near, model: m }, { upstream: far, model: m, on: [content_filter] }] }");
    let gw = Gateway::with(&conf).await;
    let _first = ask(&gw, WENDY, "first");
    let _call = near.call().await;
    let waits = ask(&gw, WENDY, "waits");
    waiting(&gw, 1).await;
    let answer = gw.post(PATH).key(WENDY).json(&chat("hi")).send().await.expect(200);
    assert_eq!((answer.header("x-tollgate-upstream"), answer.header("x-tollgate-attempts")), ("far", "1"));
    let over = in_time("the wait to be over", waits).await.expect("a task").expect(200);
    assert_eq!(over.header("x-tollgate-upstream"), "far");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gateway_that_is_about_to_end_keeps_nobody_waiting() {
    let near = RawNode::start().await;
    let mut gw =
        Gateway::with(&conf(&near.url(), "concurrency: 1, queue: { size: 9, wait: 60s }").server("drain: 20s")).await;
    let first = ask(&gw, WENDY, "first");
    let call = near.call().await;
    let waits = ask(&gw, WENDY, "waits");
    waiting(&gw, 1).await;
    gw.terminate();
    let ended = in_time("the wait to end", waits).await.expect("a task");
    assert_eq!(ended.refusal(), (503, "draining".into()));
    answer(call).await;
    in_time("the first answer", first).await.expect("a task").expect(200);
    gw.exit().await;
}

/// Many clients, few slots, some leave: no more calls at the node than slots, and nothing is left behind.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn in_a_crowd_that_comes_and_goes_every_slot_is_used_and_none_twice() {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    let (now, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let near = {
        let (now, most) = (Arc::clone(&now), Arc::clone(&most));
        RawNode::answering(move |mut call: Upcall| {
            let (now, most) = (Arc::clone(&now), Arc::clone(&most));
            async move {
                most.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                tokio::time::sleep(Duration::from_millis(3)).await;
                now.fetch_sub(1, Ordering::SeqCst);
                call.json("200 OK", &completion("hello", 3, 2)).await;
                Some(call)
            }
        })
        .await
    };
    let gw = Gateway::with(&conf(&near.url(), "concurrency: 4, queue: { size: 500, wait: 60s }")).await;
    let mut asked = Vec::new();
    for n in 0..200_usize {
        let one = ask(&gw, if n % 3 == 0 { NORA } else { WENDY }, "hi");
        if n % 10 == 9 {
            tokio::time::sleep(Duration::from_millis(2)).await;
            one.abort();
        } else {
            asked.push(one);
        }
    }
    for one in asked {
        in_time("an answer", one).await.expect("a task").expect(200);
    }
    // A client that left frees its slot before its node has noticed.
    let most = most.load(Ordering::SeqCst);
    assert!((4..=8).contains(&most), "{most} calls at once");
    waiting(&gw, 0).await;
    gw.settles("tollgate_node_inflight", &[], 0.0).await;
    eventually("no reservation", || async { gw.metric("tollgate_reservations_inflight", &[]).await == 0.0 }).await;
}
