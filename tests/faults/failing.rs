//! Nodes that fail before their first token: with an error, without a word, too late, or not there at all.

use std::time::Instant;

use tokio::net::TcpListener;

use super::*;
use crate::harness::{RawNode, Refused, Upcall, completion, node};

/// One node alone, broken once: it is asked a second time, and the client sees nothing of it.
async fn alone_once(what: &str) {
    for body in both() {
        let near = node("qwen").await;
        breaks_once(&near, what);
        let gw = gateway(&[&near], CALM).await;
        let told = ask(&gw, &body).await;
        is_whole(&told, &body);
        attempts_told(&told, 2);
        assert_eq!(ended(&near).await.len(), 2, "{what}");
        is_clean(&gw).await;
    }
}

/// One node alone, broken for ever: it is asked so often, then there is one error.
async fn alone_for_ever(what: &str, requests: usize, status: u16, code: &str) {
    for body in both() {
        let near = node("qwen").await;
        breaks(&near, what);
        let gw = gateway(&[&near], QUICK).await;
        let since = Instant::now();
        let refused = ask(&gw, &body).await;
        is_error(&refused, status, code);
        attempts_told(&refused, requests);
        assert_eq!(seen(&near, since).len(), requests, "{what}");
        assert!(refused.took < ms(700) * u32::try_from(requests).expect("few") + SLACK, "took {:?}", refused.took);
        is_clean(&gw).await;
        let line = gw.logged(refused.header("x-request-id")).await;
        assert_eq!((&line["attempts"], &line["code"]), (&requests.into(), &code.into()), "{line}");
    }
}

/// Of two nodes the broken one is left for the other within `wait`, and not asked again.
async fn another_is_asked(what: &str, stream_wait: Duration, plain_wait: Duration) {
    for body in both() {
        let (sick, good) = (node("qwen").await, node("qwen").await);
        breaks(&sick, what);
        let gw = gateway(&[&sick, &good], QUICK).await;
        let wait = if is_stream(&body) { stream_wait } else { plain_wait };
        for _ in 0..2 {
            let since = Instant::now();
            let told = ask(&gw, &body).await;
            is_whole(&told, &body);
            let (at_sick, at_good) = (seen(&sick, since), seen(&good, since));
            assert_eq!(at_good.len(), 1, "{what}");
            assert!(at_sick.len() <= 1, "{what}: asked again");
            attempts_told(&told, 1 + at_sick.len());
            if let Some(first) = at_sick.first() {
                let gap = at_good[0].checked_sub(*first).expect("the sick one is asked first");
                are_about(&[gap], &[wait]);
            }
            assert_eq!(told.header("x-tollgate-upstream"), "near");
            let line = gw.logged(told.header("x-request-id")).await;
            assert_eq!(line["node"], good.addr().to_string(), "{line}");
        }
        // Round robin started once at each.
        assert_eq!((sick.requests().len(), good.requests().len()), (1, 2), "{what}");
        ended(&sick).await;
        is_clean(&gw).await;
    }
}

#[tokio::test]
async fn status_500() {
    alone_once("500").await;
    alone_for_ever("500", 3, 502, "upstream_error").await;
    another_is_asked("500", Duration::ZERO, Duration::ZERO).await;
}

#[tokio::test]
async fn status_503() {
    alone_once("503").await;
    alone_for_ever("503", 3, 502, "upstream_error").await;
    alone_for_ever("503:retry-after=30", 1, 502, "upstream_error").await;
    another_is_asked("503", Duration::ZERO, Duration::ZERO).await;
}

#[tokio::test]
async fn an_error_as_the_answer() {
    alone_once("error_body").await;
    alone_for_ever("error_event", 3, 502, "upstream_error").await;
    another_is_asked("error_event", Duration::ZERO, Duration::ZERO).await;
    another_is_asked("malformed", Duration::ZERO, Duration::ZERO).await;
}

#[tokio::test]
async fn a_connection_closed_before_the_header() {
    alone_once("refuse").await;
    alone_for_ever("refuse", 3, 502, "upstream_unreachable").await;
    another_is_asked("refuse", Duration::ZERO, Duration::ZERO).await;
}

/// The same with a reset in place of an orderly close.
#[tokio::test]
async fn a_connection_reset_before_the_header() {
    for body in both() {
        let good = node("qwen").await;
        let sick = RawNode::start().await;
        let urls = [sick.url(), good.url()];
        let conf = Conf::new()
            .upstream("near", &urls, &format!("balance: round_robin, {QUICK}"))
            .model("chat", &[("near", "qwen")], RETRY)
            .llm();
        let gw = Gateway::with(&conf).await;
        let mut first_at_sick = 0;
        for _ in 0..2 {
            let asked = async {
                let told = ask(&gw, &body).await;
                is_whole(&told, &body);
                told.header("x-tollgate-attempts") == "2"
            };
            let reset = async {
                sick.call().await.reset();
            };
            tokio::pin!(asked, reset);
            let two = tokio::select! {
                two = &mut asked => two,
                () = &mut reset => asked.await,
            };
            first_at_sick += usize::from(two);
        }
        assert_eq!((first_at_sick, good.requests().len()), (1, 2));
        is_clean(&gw).await;
    }
    // For ever, and no other node.
    let sick = RawNode::start().await;
    let conf = Conf::new().upstream("near", &[sick.url()], QUICK).model("chat", &[("near", "qwen")], RETRY).llm();
    let gw = Gateway::with(&conf).await;
    for body in both() {
        let resets = async {
            for _ in 0..3 {
                sick.call().await.reset();
            }
        };
        let (refused, ()) = tokio::join!(ask(&gw, &body), resets);
        is_error(&refused, 502, "upstream_unreachable");
        attempts_told(&refused, 3);
    }
    assert!(!sick.called_within(ms(50)).await, "asked more often than it may");
    is_clean(&gw).await;
}

/// A node that says nothing is not asked twice; the next attempt goes elsewhere.
#[tokio::test]
async fn no_answer_at_all() {
    alone_for_ever("slow_header:60000", 1, 504, "upstream_timeout").await;
    another_is_asked("slow_header:60000", ms(400), ms(700)).await;
}

#[tokio::test]
async fn a_slow_first_token_after_an_instant_header() {
    alone_for_ever("slow_token:60000", 1, 504, "upstream_timeout").await;
    another_is_asked("slow_token:60000", ms(400), ms(700)).await;
}

/// Where the header is late but the token in time, or both are just slow, nothing is done at all.
#[tokio::test]
async fn a_slow_answer_within_its_deadlines_is_waited_for() {
    for what in ["slow_header:150", "slow_token:150", "slow_header:100,slow_token:50"] {
        for body in both() {
            let (slow, other) = (node("qwen").await, node("qwen").await);
            breaks(&slow, what);
            breaks(&other, what);
            let gw = gateway(&[&slow, &other], QUICK).await;
            let told = ask(&gw, &body).await;
            is_whole(&told, &body);
            attempts_told(&told, 1);
            assert!(told.took >= ms(150));
        }
    }
}

/// All nodes silent: each is asked once, whatever else may be tried.
#[tokio::test]
async fn silent_nodes_are_asked_once_each() {
    for body in both() {
        let (one, two) = (node("qwen").await, node("qwen").await);
        breaks(&one, "slow_header:60000");
        breaks(&two, "slow_token:60000");
        let gw = gateway(&[&one, &two], QUICK).await;
        let refused = ask(&gw, &body).await;
        is_error(&refused, 504, "upstream_timeout");
        attempts_told(&refused, 2);
        assert_eq!((one.requests().len(), two.requests().len()), (1, 1));
        for node in [&one, &two] {
            assert_eq!(how(&ended(node).await[0]), Ending::Abandoned, "the connection of a late node is closed");
        }
    }
}

#[tokio::test]
async fn a_port_that_refuses() {
    let (closed, good) = (Refused::new(), node("qwen").await);
    let urls = [closed.url(), good.url()];
    let more = format!("balance: round_robin, {QUICK}");
    let conf = Conf::new().upstream("near", &urls, &more).model("chat", &[("near", "qwen")], RETRY).llm();
    let gw = Gateway::with(&conf).await;
    for body in both() {
        let mut attempts = Vec::new();
        for _ in 0..2 {
            let told = ask(&gw, &body).await;
            is_whole(&told, &body);
            attempts.push(told.header("x-tollgate-attempts").to_owned());
        }
        attempts.sort();
        assert_eq!(attempts, ["1", "2"]);
    }
    assert_eq!(good.requests().len(), 4);
    let closed = Refused::new();
    let conf = Conf::new().upstream("near", &[closed.url()], QUICK).model("chat", &[("near", "qwen")], RETRY).llm();
    let gw = Gateway::with(&conf).await;
    for body in both() {
        let refused = ask(&gw, &body).await;
        is_error(&refused, 502, "upstream_unreachable");
        attempts_told(&refused, 3);
        assert!(refused.took < SLACK);
    }
    is_clean(&gw).await;
}

/// A port whose queue of connections is full: the handshake never ends.
#[tokio::test]
async fn a_port_that_does_not_answer() {
    let full = Full::new().await;
    let good = node("qwen").await;
    let urls = [full.url(), good.url()];
    let more = "balance: round_robin, timeouts: { connect: 300ms }, eject: off";
    let conf = Conf::new().upstream("near", &urls, more).model("chat", &[("near", "qwen")], RETRY).llm();
    let gw = Gateway::with(&conf).await;
    for body in both() {
        for _ in 0..2 {
            let told = ask(&gw, &body).await;
            is_whole(&told, &body);
            if told.header("x-tollgate-attempts") == "2" {
                are_about(&[told.took], &[ms(300)]);
            }
        }
    }
    assert_eq!(good.requests().len(), 4);
    is_clean(&gw).await;
}

/// A listener that accepts nothing and whose queue is full.
pub(super) struct Full {
    listener: TcpListener,
    _waiting: Vec<tokio::net::TcpStream>,
}

impl Full {
    pub(super) async fn new() -> Self {
        let socket = tokio::net::TcpSocket::new_v4().expect("a socket");
        socket.bind("127.0.0.1:0".parse().expect("an address")).expect("a free port");
        let listener = socket.listen(1).expect("it listens");
        let to = listener.local_addr().expect("its address");
        let mut waiting = Vec::new();
        while let Ok(Ok(stream)) = tokio::time::timeout(ms(200), tokio::net::TcpStream::connect(to)).await {
            waiting.push(stream);
            assert!(waiting.len() < 64, "the queue is never full");
        }
        Self { listener, _waiting: waiting }
    }

    pub(super) fn url(&self) -> String {
        format!("http://{}", self.listener.local_addr().expect("its address"))
    }
}

/// The node closes its idle connections: the call that finds one is sent again on a new one and counts as one attempt.
#[tokio::test]
async fn a_pooled_connection_that_went_stale() {
    for body in both() {
        let near = RawNode::answering(|mut call: Upcall| async move {
            if String::from_utf8_lossy(&call.request.body).contains("\"stream\":true") {
                let chunks = format!("{}{}", crate::harness::chunk_event("one"), crate::harness::DONE);
                call.sse(&chunks).await;
            } else {
                call.json("200 OK", &completion("hello", 1, 1)).await;
            }
            // It says nothing of it, and closes the connection.
            None
        })
        .await;
        let conf = Conf::new()
            .upstream("near", &[near.url()], CALM)
            .model("chat", &[("near", "qwen")], "retry: { attempts: 1 }")
            .llm();
        let gw = Gateway::with(&conf).await;
        for _ in 0..10 {
            let told = ask(&gw, &body).await.expect(200);
            assert!(told.clean());
            attempts_told(&told, 1);
        }
        gw.settles("tollgate_attempts_total", &[("outcome", "ok")], 10.0).await;
        assert_eq!(gw.metric("tollgate_attempts_total", &[]).await, 10.0);
        is_clean(&gw).await;
    }
}
