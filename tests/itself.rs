//! The harness itself, without a gateway: it must see a clean end as clean and a broken one as broken, or its tests say
//! nothing.

use std::time::Instant;

use bytes::Bytes;
use futures::stream;
use tollgate_load::node::Ending;

use crate::harness::client::{GONE, Request, Wire};
use crate::harness::raw::RawClient;
use crate::harness::{
    DONE, RawNode, Refused, Upcall, chat, chat_stream, chunk_event, eventually, fault, named, node, node_with, sha256,
};

const PATH: &str = "/v1/chat/completions";

#[tokio::test]
async fn a_clean_stream_is_seen_as_clean_and_a_cut_one_is_not() {
    let near = node("chat").await;
    for http2 in [false, true] {
        let ask = || {
            let request = Request::new(near.addr(), "POST", PATH).json(&chat_stream("hi"));
            if http2 { request.http2() } else { request }
        };
        near.set_fault(None);
        let answer = ask().send().await.expect(200);
        assert!(answer.clean());
        assert_eq!(answer.events().iter().filter(|event| event.delta().is_some()).count(), 8);
        assert_eq!(answer.events().last().expect("events").data, "[DONE]");
        near.set_fault(Some(fault("cut:3")));
        let answer = ask().send().await.expect(200);
        assert!(!answer.clean(), "http2 {http2}");
        assert_eq!(answer.events().iter().filter(|event| event.delta().is_some()).count(), 3);
    }
}

#[tokio::test]
async fn bodies_arrive_as_they_were_given_in_every_framing() {
    let near = node("chat").await;
    let body = Bytes::from(chat(&"word ".repeat(50_000)).to_string());
    for http2 in [false, true] {
        for pieces in [None, Some(10_000)] {
            let request = Request::new(near.addr(), "POST", PATH);
            let request = match pieces {
                None => request.json_text(body.clone()),
                Some(size) => request.json_in_pieces(&body, size),
            };
            let request = if http2 { request.http2() } else { request };
            request.send().await.expect(200);
            let seen = near.requests().pop().expect("a request");
            assert_eq!((seen.http2, seen.body_sha256.clone()), (http2, sha256(&body)));
            assert_eq!(seen.header("content-length").is_some(), pieces.is_none());
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leaving_is_seen_by_the_node_at_once() {
    let near = node_with("chat", |config| config.decode = std::time::Duration::from_millis(10)).await;
    for http2 in [false, true] {
        let mut body = chat_stream("hi");
        body["max_tokens"] = 1000.into();
        let request = Request::new(near.addr(), "POST", PATH).json(&body);
        let request = if http2 { request.http2() } else { request };
        let mut reply = request.open().await;
        assert!(reply.event().await.is_some());
        let left = reply.leave();
        eventually("the node to see it", || async { near.requests().iter().all(|seen| seen.ended.is_some()) }).await;
        let (ended, how) = near.requests().pop().and_then(|seen| seen.ended).expect("ended");
        assert_eq!(how, Ending::Abandoned);
        assert!(ended - left < GONE, "took {:?}", ended - left);
    }
}

#[tokio::test]
async fn a_node_by_hand_reads_requests_and_sends_what_it_is_told() {
    let near = RawNode::start().await;
    let pieces = stream::iter(["{\"a\":", "1}"].map(Bytes::from));
    let asked = tokio::spawn(Request::new(near.addr(), "POST", "/x?y").header("x-one", "1").pieces(pieces).open());
    let mut call = near.call().await;
    assert_eq!((call.request.target(), call.request.text().as_str()), ("/x?y", "{\"a\":1}"));
    assert!(call.request.complete);
    assert_eq!(call.request.header("X-One"), "1");
    call.stream_head().await;
    call.chunk(chunk_event("one")).await;
    let mut reply = asked.await.expect("a task");
    assert_eq!(reply.event().await.and_then(|event| event.delta()).as_deref(), Some("one"));
    call.chunk(&DONE[..5]).await;
    call.chunk(&DONE[5..]).await;
    call.last_chunk().await;
    assert_eq!(reply.event().await.expect("an event").data, "[DONE]");
    assert_eq!(reply.event().await, None);
    assert!(reply.clean());
    let left = Instant::now();
    drop(reply);
    assert!(call.closed().await - left < GONE);
}

#[tokio::test]
async fn a_node_by_hand_serves_many_requests_of_one_connection() {
    let near = named("a").await;
    let mut wire = Wire::http1(near.addr()).await;
    for turn in 0..3 {
        let target = format!("/turn/{turn}");
        let answer = wire.send(Request::new(near.addr(), "GET", &target)).await.expect(200);
        assert_eq!(
            (answer.json()["node"].as_str(), answer.json()["target"].as_str()),
            (Some("a"), Some(target.as_str()))
        );
    }
    let mut client = RawClient::connect(near.addr()).await;
    let answer = client.ask("GET /raw HTTP/1.1\r\nhost: x\r\n\r\n").await;
    assert_eq!((answer.status(), answer.complete), (200, true));
    assert!(answer.text().contains("/raw"));
}

#[tokio::test]
async fn a_body_that_breaks_off_is_seen_as_broken() {
    let near = RawNode::answering(|mut call: Upcall| async move {
        call.write("HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf").await;
        None
    })
    .await;
    let answer = Request::new(near.addr(), "GET", "/").send().await;
    assert_eq!((answer.text().as_str(), answer.clean()), ("half", false));
}

#[tokio::test]
async fn a_refused_port_refuses() {
    let closed = Refused::new();
    let addr = closed.url().trim_start_matches("http://").to_owned();
    let error = tokio::net::TcpStream::connect(addr).await.expect_err("nobody listens");
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused);
}

#[tokio::test]
async fn events_are_read_in_every_way_they_are_written() {
    let near = RawNode::start().await;
    let asked = tokio::spawn(Request::new(near.addr(), "GET", "/").send());
    let text = ": hello\n\ndata:one\r\n\r\nevent: x\ndata: two\ndata: lines\n\ndata: {\"a\":1}\n\ndata: unfinished";
    near.call().await.sse(text).await;
    let events = asked.await.expect("a task").events();
    let data: Vec<&str> = events.iter().map(|event| event.data.as_str()).collect();
    assert_eq!(data, ["one", "two\nlines", "{\"a\":1}"]);
    assert_eq!(events[1].name.as_deref(), Some("x"));
    assert_eq!(events[2].json()["a"], 1);
}
