//! Clients that leave while their call is tried again: the work for them ends at once, and nothing stays behind.

use std::sync::Arc;

use super::failing::Full;
use super::*;
use crate::harness::client::at_once;
use crate::harness::{RawNode, Rng, chunk_event, in_time, node, node_with};

/// How long it may take until a node sees that the client has left, on a machine that has other things to do.
const SOON: Duration = Duration::from_millis(500);

/// Sends a call that is given up after `after`, and checks that nothing of it is left soon after that.
async fn leaves_after(gw: &Gateway, body: &Value, after: Duration) {
    let asked = tokio::spawn(gw.post(PATH).key(WENDY).json(body).try_open());
    tokio::time::sleep(after).await;
    assert!(!asked.is_finished(), "it is answered already");
    assert_eq!(gw.metric("tollgate_reservations_inflight", &[]).await, 1.0);
    let left = Instant::now();
    asked.abort();
    is_clean(gw).await;
    assert!(left.elapsed() < SOON, "took {:?}", left.elapsed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_a_retry_after_is_waited_for() {
    for body in both() {
        let near = node("qwen").await;
        breaks(&near, "429:retry-after=2");
        let gw = gateway(&[&near], CALM).await;
        leaves_after(&gw, &body, ms(300)).await;
        tokio::time::sleep(ms(2200)).await;
        assert_eq!(near.requests().len(), 1, "nobody waits for a second attempt");
        gw.settles("tollgate_client_aborts_total", &[], 1.0).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_the_backoff_is_waited_for() {
    for body in both() {
        let near = node("qwen").await;
        breaks(&near, "500");
        let retry = "retry: { attempts: 3, backoff: 2s, jitter: false }";
        let conf = Conf::new().upstream("near", &[near.url()], CALM).model("chat", &[("near", "qwen")], retry).llm();
        let gw = Gateway::with(&conf).await;
        leaves_after(&gw, &body, ms(300)).await;
        tokio::time::sleep(ms(2200)).await;
        assert_eq!(near.requests().len(), 1);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_a_connection_is_being_made() {
    let full = Full::new().await;
    let more = "eject: off, timeouts: { connect: 15s }";
    let conf = Conf::new().upstream("near", &[full.url()], more).model("chat", &[("near", "qwen")], RETRY).llm();
    let gw = Gateway::with(&conf).await;
    for body in both() {
        leaves_after(&gw, &body, ms(300)).await;
    }
    // No connection is being made any more either.
    let rows = std::fs::read_to_string(format!("/proc/{}/net/tcp", gw.pid())).expect("Linux");
    let port = full.url().rsplit(':').next().and_then(|port| port.parse::<u16>().ok()).expect("a port");
    let open = |row: &&str| row.contains(&format!("0100007F:{port:04X} 02"));
    assert_eq!(rows.lines().filter(open).count(), 0, "{rows}");
}

/// The first target has failed; the second has the call, but not said a word.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_another_node_is_waited_for() {
    for body in both() {
        let (near, far) = (node("small").await, RawNode::start().await);
        breaks(&near, "503");
        let conf = Conf::new()
            .upstream("near", &[near.url()], CALM)
            .upstream("far", &[far.url()], CALM)
            .model("chat", &[("near", "small"), ("far", "large")], RETRY)
            .llm();
        let gw = Gateway::with(&conf).await;
        let asked = tokio::spawn(gw.post(PATH).key(WENDY).json(&body).try_open());
        let mut call = far.call().await;
        let left = Instant::now();
        asked.abort();
        let closed = call.closed().await;
        assert!(closed - left <= SOON, "took {:?}", closed - left);
        is_clean(&gw).await;
        assert_eq!(near.requests().len(), 1);
        assert!(!far.called_within(ms(100)).await, "nobody waits for a further attempt");
    }
}

/// The first target has failed; the second is amid its stream.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_another_node_streams() {
    let (near, far) = (node("small").await, RawNode::start().await);
    breaks(&near, "503");
    let conf = Conf::new()
        .upstream("near", &[near.url()], CALM)
        .upstream("far", &[far.url()], CALM)
        .model("chat", &[("near", "small"), ("far", "large")], RETRY)
        .llm();
    let gw = Gateway::with(&conf).await;
    for http2 in [false, true] {
        let request = gw.post(PATH).key(WENDY).json(&chat_stream("hi"));
        let asked = tokio::spawn(if http2 { request.http2() } else { request }.open());
        let mut call = far.call().await;
        call.stream_head().await;
        call.chunk(chunk_event("one")).await;
        let mut reply = in_time("the head", asked).await.expect("a task");
        assert!(reply.event().await.is_some());
        let id = reply.header("x-request-id").to_owned();
        let left = reply.leave();
        let closed = call.closed().await;
        assert!(closed.saturating_duration_since(left) <= SOON, "took {:?}", closed - left);
        is_clean(&gw).await;
        let line = gw.logged(&id).await;
        assert_eq!((&line["attempts"], &line["upstream"]), (&2.into(), &"far".into()), "{line}");
    }
}

/// A thousand clients that leave whenever they like, or stay, while nodes fail in every way.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_clients_at_random() {
    let slow = |config: &mut tollgate_load::node::NodeConfig| {
        config.decode = ms(10);
        config.max_running = 2000;
        config.queue = 2000;
    };
    let nodes = [node_with("qwen", slow).await, node_with("qwen", slow).await, node_with("qwen", slow).await];
    let urls: Vec<String> = nodes.iter().map(Node::url).collect();
    let more = "balance: round_robin, eject: { after: 5, for: 300ms }, pool: { concurrency: 60 }, \
                timeouts: { first_byte: 500ms, first_token: 500ms, between_tokens: 500ms }";
    let conf = Conf::new()
        .tier("busy: { requests_per_minute: 1_000_000, tokens_per_day: 1_000_000_000, concurrency: 100_000 }")
        .key("{ id: busy, key: busy-secret-key, tier: busy }")
        .upstream("near", &urls, more)
        .model("chat", &[("near", "qwen")], "retry: { attempts: 4, backoff: 50ms, budget: 1 }")
        .llm();
    let gw = Arc::new(Gateway::with(&conf).await);
    let faults = [
        "500",
        "429:retry-after=1",
        "refuse",
        "slow_header:60000",
        "slow_token:300",
        "cut:5",
        "stall:5",
        "error_event",
    ];
    let mut rng = Rng::new(1000);
    // Of three nodes one is always broken, each in turn and each time in another way.
    let breaking = {
        let nodes: Vec<&Node> = nodes.iter().collect();
        async move {
            for turn in 0.. {
                let node = nodes[turn % 3];
                breaks(node, faults[turn % faults.len()]);
                tokio::time::sleep(ms(250)).await;
                node.set_fault(None);
            }
        }
    };
    let plans: Vec<(usize, u64)> = (0..1000).map(|turn| (turn, rng.next() % 1000)).collect();
    let one = |(turn, after): (usize, u64)| {
        let gw = Arc::clone(&gw);
        async move {
            let mut body = if turn % 4 == 0 { chat("hi") } else { chat_stream("hi") };
            body["max_tokens"] = 20.into();
            let request = gw.post(PATH).key("busy-secret-key").json(&body);
            let request = if turn % 3 == 0 { request.http2() } else { request };
            let reading = tokio::spawn(async move {
                let mut reply = request.try_open().await?;
                while reply.event().await.is_some() {}
                Ok::<_, String>(())
            });
            tokio::time::sleep(ms(after)).await;
            reading.abort();
        }
    };
    tokio::select! {
        _ = at_once(150, plans.into_iter().map(one)) => {}
        () = breaking => {}
    }
    let left = Instant::now();
    is_clean(&gw).await;
    assert!(left.elapsed() < Duration::from_secs(2), "took {:?}", left.elapsed());
    for node in &nodes {
        ended(node).await;
    }
    let used = gw.get("/v1/quota").key("busy-secret-key").send().await.expect(200).json();
    for row in used["limits"].as_array().expect("limits") {
        assert_eq!(row["held"].as_u64().unwrap_or(0), 0, "{row}");
    }
    let concurrency = used["limits"].as_array().expect("limits").iter().find(|row| row["dimension"] == "concurrency");
    assert_eq!(concurrency.expect("a limit")["used"], 0);
    assert!(nodes.iter().all(|node| node.requests().len() > 100), "too few came through to tell anything");
    // It still serves.
    nodes.iter().for_each(|node| node.set_fault(None));
    tokio::time::sleep(ms(400)).await;
    let body = chat_stream("hi");
    is_whole(&ask(&gw, &body).await, &body);
}
