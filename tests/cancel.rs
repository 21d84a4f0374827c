//! A client that leaves: the node is told at once, and nothing of the call stays behind.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tollgate_load::node::Ending;

use crate::harness::client::{GONE, at_once};
use crate::harness::{Conf, Gateway, RawNode, Rng, WENDY, chat, chat_stream, chunk_event, eventually, node_with};

const PATH: &str = "/v1/chat/completions";

/// Nothing of any call is left in the gateway.
async fn is_clean(gw: &Gateway) {
    gw.settles("tollgate_reservations_inflight", &[], 0.0).await;
    gw.settles("tollgate_node_inflight", &[], 0.0).await;
    gw.settles("tollgate_streams_open", &[], 0.0).await;
}

async fn raw_gateway() -> (RawNode, Gateway) {
    let near = RawNode::start().await;
    let gw = Gateway::with(&Conf::serving("qwen", &[near.url()])).await;
    (near, gw)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_leaves_before_the_first_token_ends_the_attempt() {
    for http2 in [false, true] {
        for body in [chat_stream("hi"), chat("hi")] {
            let (near, gw) = raw_gateway().await;
            let mut request = gw.post(PATH).key(WENDY).json(&body);
            if http2 {
                request = request.http2();
            }
            let asked = tokio::spawn(request.try_open());
            let mut call = near.call().await;
            let left = Instant::now();
            asked.abort();
            let closed = call.closed().await;
            assert!(closed - left <= GONE, "http2 {http2}, {}: took {:?}", body["stream"], closed - left);
            is_clean(&gw).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_leaves_before_the_first_token_but_after_the_head_ends_the_attempt() {
    let (near, gw) = raw_gateway().await;
    let asked = tokio::spawn(gw.post(PATH).key(WENDY).json(&chat_stream("hi")).try_open());
    let mut call = near.call().await;
    call.stream_head().await;
    call.chunk(": ping\n\n").await;
    let left = Instant::now();
    asked.abort();
    let closed = call.closed().await;
    assert!(closed - left <= GONE, "took {:?}", closed - left);
    is_clean(&gw).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_leaves_amid_a_stream_ends_the_attempt() {
    for http2 in [false, true] {
        let (near, gw) = raw_gateway().await;
        let mut request = gw.post(PATH).key(WENDY).json(&chat_stream("hi"));
        if http2 {
            request = request.http2();
        }
        let asked = tokio::spawn(request.open());
        let mut call = near.call().await;
        call.stream_head().await;
        call.chunk(chunk_event("one")).await;
        let mut reply = asked.await.expect("a task");
        assert!(reply.event().await.is_some());
        let id = reply.header("x-request-id").to_owned();
        // The node is silent now: it is the client's leaving itself that must be noticed.
        let left = reply.leave();
        let closed = call.closed().await;
        assert!(closed - left <= GONE, "http2 {http2}: took {:?}", closed - left);
        is_clean(&gw).await;
        let line = gw.logged(&id).await;
        assert!(line["output_tokens"].as_u64().is_some_and(|count| count >= 1), "what was sent is counted: {line}");
        assert!(line["input_tokens"].as_u64().is_some_and(|count| count >= 1), "so is the prompt: {line}");
        gw.settles("tollgate_client_aborts_total", &[], 1.0).await;
    }
}

/// One stream of an HTTP/2 connection is given up; the others go on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leaving_one_stream_of_an_http2_connection_leaves_the_others_alone() {
    let (near, gw) = raw_gateway().await;
    let mut wire = gw.wire2().await;
    let mut replies = Vec::new();
    let mut calls = Vec::new();
    for _ in 0..2 {
        let request = gw.post(PATH).key(WENDY).json(&chat_stream("hi"));
        let opened = async {
            let mut call = near.call().await;
            call.stream_head().await;
            call.chunk(chunk_event("one")).await;
            call
        };
        let (reply, call) = tokio::join!(wire.open(request), opened);
        replies.push(reply);
        calls.push(call);
    }
    let mut stays = replies.pop().expect("two");
    let leaves = replies.pop().expect("two");
    let mut kept = calls.pop().expect("two");
    let mut given_up = calls.pop().expect("two");
    let left = leaves.leave();
    let closed = given_up.closed().await;
    assert!(closed - left <= GONE, "took {:?}", closed - left);
    kept.chunk(chunk_event("two")).await;
    assert_eq!(stays.event().await.and_then(|event| event.delta()).as_deref(), Some("one"));
    assert_eq!(stays.event().await.and_then(|event| event.delta()).as_deref(), Some("two"));
}

/// A client that stops reading but stays is no client that left, until its time is up; one that is slow gets everything.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_reader_gets_everything() {
    let near = node_with("qwen", |_| ()).await;
    let gw = Gateway::with(&Conf::serving("qwen", &[near.url()])).await;
    let mut body = chat_stream("hi");
    body["max_tokens"] = 400.into();
    let mut reply = gw.post(PATH).key(WENDY).json(&body).open().await;
    let mut words = 0;
    while let Some(event) = reply.event().await {
        words += usize::from(event.delta().is_some());
        if words % 100 == 0 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    assert_eq!(words, 400);
    assert!(reply.clean());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_200_streams_half_are_abandoned_and_nothing_is_left() {
    let near = node_with("qwen", |config| {
        config.decode = Duration::from_millis(50);
        config.max_running = 1000;
        config.queue = 1000;
    })
    .await;
    let gw = Arc::new(Gateway::with(&Conf::serving("qwen", &[near.url()])).await);
    let mut rng = Rng::new(200);
    let plans: Vec<(usize, Option<Duration>)> =
        (0..200).map(|turn| (turn, (turn % 2 == 0).then(|| Duration::from_millis(rng.next() % 900)))).collect();
    let one = |(turn, leaves): (usize, Option<Duration>)| {
        let gw = Arc::clone(&gw);
        async move {
            let mut body = chat_stream(&format!("stream {turn}"));
            body["max_tokens"] = 24.into();
            let id = format!("stream-{turn}");
            let mut request = gw.post(PATH).key(WENDY).header("x-request-id", &id).json(&body);
            if turn % 3 == 0 {
                request = request.http2();
            }
            let Some(after) = leaves else {
                let answer = request.send().await.expect(200);
                assert!(answer.clean(), "{id}");
                assert_eq!(answer.events().iter().filter(|event| event.delta().is_some()).count(), 24, "{id}");
                return None;
            };
            let reading = tokio::spawn(async move {
                let mut reply = request.try_open().await?;
                while reply.event().await.is_some() {}
                Ok::<_, String>(())
            });
            tokio::time::sleep(after).await;
            let left = Instant::now();
            reading.abort();
            Some((id, left))
        }
    };
    let abandoned: Vec<(String, Instant)> =
        at_once(200, plans.into_iter().map(one)).await.into_iter().flatten().collect();
    assert_eq!(abandoned.len(), 100);
    is_clean(&gw).await;
    eventually("every stream to end at the node", || async { near.requests().iter().all(|seen| seen.ended.is_some()) })
        .await;

    let requests = near.requests();
    let mut late = Vec::new();
    let mut seen_there = 0;
    for (id, left) in &abandoned {
        let find = |seen: &&tollgate_load::node::Recorded| {
            seen.headers.iter().any(|(name, value)| name == "x-request-id" && value == id)
        };
        // One that left before it was sent on never came to the node.
        let Some(seen) = requests.iter().find(find) else { continue };
        seen_there += 1;
        let (ended, how) = seen.ended.expect("just checked");
        let after = ended.saturating_duration_since(*left);
        if after > GONE || !matches!(how, Ending::Abandoned) {
            late.push((id, after));
        }
    }
    assert!(late.is_empty(), "seen too late at the node: {late:?}");
    assert!(seen_there >= 50, "only {seen_there} of 100 were under way");
    let complete = requests.iter().filter(|seen| matches!(seen.ended, Some((_, Ending::Complete)))).count();
    assert!(complete >= 100, "the other half is whole");
}
