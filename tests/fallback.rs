//! A call that fails before its first useful event goes to the next node, then to the next target.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tollgate_load::node::{Node, Recorded};

use crate::harness::{
    Conf, Gateway, RawNode, Refused, Upcall, WENDY, chat, chat_stream, completion, fault, in_time, node,
};

const PATH: &str = "/v1/chat/completions";
const QUICK: &str = "timeouts: { connect: 1s, first_byte: 300ms, first_token: 300ms, between_tokens: 2s, total: 10s }, \
                     eject: { after: 1000 }";
const RETRY: &str = "retry: { attempts: 3, backoff: 1ms }";

/// Model `chat`: first `small` at upstream `near`, then `large` at upstream `far`.
async fn two_targets(near: &str, far: &str) -> Gateway {
    let conf = Conf::new()
        .upstream("near", &[near], QUICK)
        .upstream("far", &[far], QUICK)
        .model("chat", &[("near", "small"), ("far", "large")], RETRY)
        .llm();
    Gateway::with(&conf).await
}

fn model_of(seen: &Recorded) -> Value {
    serde_json::from_slice::<Value>(seen.body.as_ref().expect("recorded")).expect("JSON")["model"].clone()
}

/// Asks for a plain answer and for a stream; both must come from the second target after the first was tried once.
async fn falls_over(near: &Node, gw: &Gateway, far: &Node, streams_only: bool) {
    let bodies = [chat_stream("hi"), chat("hi")];
    for body in bodies.iter().take(if streams_only { 1 } else { 2 }) {
        let answer = gw.post(PATH).key(WENDY).json(body).send().await.expect(200);
        assert!(answer.clean());
        assert_eq!(answer.header("x-tollgate-attempts"), "2");
        assert_eq!(answer.header("x-tollgate-upstream"), "far");
        assert_eq!(answer.header("x-tollgate-model"), "large");
        assert_eq!(model_of(&far.requests().pop().expect("a request")), "large");
        if body["stream"] == true {
            let events = answer.events();
            assert_eq!(events.last().expect("events").data, "[DONE]");
            assert!(events.iter().any(|event| event.delta().is_some()));
            assert!(events.iter().all(|event| !event.data.contains("\"error\"")), "{}", answer.text());
        } else {
            assert!(answer.json()["choices"][0]["message"]["content"].is_string());
        }
    }
    for seen in near.requests() {
        assert_eq!(model_of(&seen), "small");
    }
    let line = gw.access_log();
    assert!(line.iter().all(|line| line["attempts"] == 2 || line["attempts"].is_null()), "{line:?}");
}

/// Each of these faults of the first target, before anything useful was said, ends at the second.
async fn fault_falls_over(name: &str, streams_only: bool) {
    let (near, far) = (node("small").await, node("large").await);
    near.set_fault(Some(fault(name)));
    let gw = two_targets(&near.url(), &far.url()).await;
    falls_over(&near, &gw, &far, streams_only).await;
    assert_eq!(far.requests().len(), if streams_only { 1 } else { 2 });
    gw.settles("tollgate_reservations_inflight", &[], 0.0).await;
    gw.settles("tollgate_node_inflight", &[], 0.0).await;
}

#[tokio::test]
async fn a_port_that_refuses_connections_is_passed_over() {
    let (closed, far) = (Refused::new(), node("large").await);
    let gw = two_targets(&closed.url(), &far.url()).await;
    for body in [chat_stream("hi"), chat("hi")] {
        let answer = gw.post(PATH).key(WENDY).json(&body).send().await.expect(200);
        assert_eq!(answer.header("x-tollgate-attempts"), "2");
        assert_eq!(answer.header("x-tollgate-model"), "large");
    }
}

#[tokio::test]
async fn a_node_that_closes_without_a_word_is_passed_over() {
    fault_falls_over("refuse", false).await;
}

#[tokio::test]
async fn status_429_is_passed_over() {
    fault_falls_over("429", false).await;
}

#[tokio::test]
async fn status_500_is_passed_over() {
    fault_falls_over("500", false).await;
}

#[tokio::test]
async fn status_503_is_passed_over() {
    fault_falls_over("503", false).await;
}

#[tokio::test]
async fn a_head_that_does_not_come_in_time_is_passed_over() {
    fault_falls_over("slow_header:5000", true).await;
}

#[tokio::test]
async fn a_first_token_that_does_not_come_in_time_is_passed_over() {
    fault_falls_over("slow_token:5000", true).await;
}

#[tokio::test]
async fn a_first_event_that_is_malformed_is_passed_over() {
    fault_falls_over("malformed", true).await;
}

#[tokio::test]
async fn a_first_event_that_is_an_error_is_passed_over() {
    fault_falls_over("error_event", true).await;
}

#[tokio::test]
async fn an_error_in_a_body_of_status_200_is_passed_over() {
    fault_falls_over("error_body", false).await;
}

#[tokio::test]
async fn an_empty_answer_is_passed_over() {
    fault_falls_over("empty", true).await;
}

/// A role chunk, a ping and a comment are not tokens: what fails after them is still passed over.
#[tokio::test]
async fn a_stream_that_dies_before_its_first_token_is_passed_over() {
    let far = node("large").await;
    let near = RawNode::answering(|mut call: Upcall| async move {
        call.stream_head().await;
        call.chunk(": ping\n\n").await;
        call.chunk(
            "data: {\"id\":\"x\",\"choices\":[{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":\"\"}}]}\n\n",
        )
        .await;
        None
    })
    .await;
    let gw = two_targets(&near.url(), &far.url()).await;
    let answer = gw.post(PATH).key(WENDY).json(&chat_stream("hi")).send().await.expect(200);
    assert_eq!(answer.header("x-tollgate-upstream"), "far");
    assert_eq!(answer.events().last().expect("events").data, "[DONE]");
}

#[tokio::test]
async fn a_plain_answer_that_breaks_off_is_passed_over() {
    let far = node("large").await;
    let near = RawNode::answering(|mut call: Upcall| async move {
        call.write("HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 500\r\n\r\n{\"id\":").await;
        None
    })
    .await;
    let gw = two_targets(&near.url(), &far.url()).await;
    let answer = gw.post(PATH).key(WENDY).json(&chat("hi")).send().await.expect(200);
    assert_eq!(answer.header("x-tollgate-upstream"), "far");
}

#[tokio::test]
async fn the_other_node_of_an_upstream_comes_before_the_next_target() {
    let (sick, good, far) = (node("small").await, node("small").await, node("large").await);
    sick.set_fault(Some(fault("500")));
    let conf = Conf::new()
        .upstream("near", &[sick.url(), good.url()], &format!("balance: round_robin, {QUICK}"))
        .upstream("far", &[far.url()], QUICK)
        .model("chat", &[("near", "small"), ("far", "large")], RETRY)
        .llm();
    let gw = Gateway::with(&conf).await;
    let mut tried = Vec::new();
    for _ in 0..6 {
        let answer = gw.post(PATH).key(WENDY).json(&chat("hi")).send().await.expect(200);
        assert_eq!(answer.header("x-tollgate-upstream"), "near");
        tried.push(answer.header("x-tollgate-attempts").to_owned());
    }
    assert!(
        tried.contains(&"1".to_owned()) && tried.contains(&"2".to_owned()),
        "round robin starts at each: {tried:?}"
    );
    assert!(far.requests().is_empty());
    assert_eq!(good.requests().len(), 6);
}

#[tokio::test]
async fn a_4xx_of_the_node_is_passed_as_it_is_and_never_retried() {
    let far = node("large").await;
    for (status, body) in [
        (
            "400 Bad Request",
            r#"{"error":{"message":"max_tokens is too large","type":"BadRequestError","param":null,"code":400}}"#,
        ),
        ("404 Not Found", r#"{"object":"error","message":"The model `small` does not exist"}"#),
        ("422 Unprocessable Entity", r#"{"detail":[{"loc":["body"]}]}"#),
    ] {
        let near = RawNode::answering(move |mut call: Upcall| async move {
            call.json(status, body).await;
            Some(call)
        })
        .await;
        let gw = two_targets(&near.url(), &far.url()).await;
        for request in [chat("hi"), chat_stream("hi")] {
            let answer = gw.post(PATH).key(WENDY).json(&request).send().await;
            assert_eq!(answer.status().to_string(), status[..3]);
            assert_eq!(answer.text(), body);
            assert_eq!(answer.header("x-tollgate-attempts"), "1");
            assert_eq!(answer.header("x-tollgate-upstream"), "near");
        }
    }
    assert!(far.requests().is_empty());
}

/// The next target may be another model of the same node: what failed was the model, not the node.
#[tokio::test]
async fn a_node_that_failed_for_one_target_may_serve_the_next() {
    let near = node("small").await;
    let conf = Conf::new()
        .upstream("near", &[near.url()], "")
        .model("chat", &[("near", "small+500"), ("near", "small")], "")
        .llm();
    let gw = Gateway::with(&conf).await;
    let answer = gw.post(PATH).key(WENDY).json(&chat("hi")).send().await.expect(200);
    assert_eq!(answer.header("x-tollgate-attempts"), "2");
    assert_eq!(answer.header("x-tollgate-model"), "small");
}

#[tokio::test]
async fn when_nothing_can_be_reached_it_is_502_upstream_unreachable() {
    let (one, two) = (Refused::new(), Refused::new());
    let gw = two_targets(&one.url(), &two.url()).await;
    let answer = gw.post(PATH).key(WENDY).json(&chat_stream("hi")).send().await;
    assert_eq!(answer.refusal(), (502, "upstream_unreachable".into()));
    assert_eq!(answer.header("x-tollgate-attempts"), "3", "the first is asked once more");
    assert_eq!(answer.header("content-type"), "application/json");
}

#[tokio::test]
async fn when_every_target_fails_it_is_502_upstream_error() {
    let (near, far) = (node("small").await, node("large").await);
    for name in ["500", "refuse"] {
        near.set_fault(Some(fault(name)));
        far.set_fault(Some(fault("500")));
        let gw = two_targets(&near.url(), &far.url()).await;
        let answer = gw.post(PATH).key(WENDY).json(&chat("hi")).send().await;
        assert_eq!(answer.refusal(), (502, "upstream_error".into()), "{name}");
        assert_eq!(answer.header("x-tollgate-attempts"), "3", "the first is asked once more");
    }
}

#[tokio::test]
async fn when_every_target_is_too_slow_it_is_504() {
    let (near, far) = (node("small").await, node("large").await);
    near.set_fault(Some(fault("slow_header:5000")));
    far.set_fault(Some(fault("slow_token:5000")));
    let gw = two_targets(&near.url(), &far.url()).await;
    let answer = gw.post(PATH).key(WENDY).json(&chat_stream("hi")).send().await;
    assert_eq!(answer.refusal(), (504, "upstream_timeout".into()));
    assert!(answer.took < Duration::from_secs(4), "took {:?}", answer.took);
}

#[tokio::test]
async fn the_total_time_binds_a_plain_answer() {
    let near = node("small").await;
    near.set_fault(Some(fault("slow_header:5000")));
    let conf = Conf::new()
        .upstream("near", &[near.url()], "timeouts: { first_byte: 100ms, total: 600ms }")
        .model("chat", &[("near", "small")], "retry: { attempts: 1 }")
        .llm();
    let gw = Gateway::with(&conf).await;
    let answer = gw.post(PATH).key(WENDY).json(&chat("hi")).send().await;
    assert_eq!(answer.refusal(), (504, "upstream_timeout".into()));
    assert!(answer.took >= Duration::from_millis(550), "first_byte binds streams only; took {:?}", answer.took);
}

#[tokio::test]
async fn when_every_target_answers_429_so_do_we_with_the_soonest_retry_after() {
    let (near, far) = (node("small").await, node("large").await);
    near.set_fault(Some(fault("429:retry-after=30")));
    far.set_fault(Some(fault("429:retry-after=7")));
    let gw = two_targets(&near.url(), &far.url()).await;
    let answer = gw.post(PATH).key(WENDY).json(&chat("hi")).send().await;
    assert_eq!(answer.refusal(), (429, "upstream_rate_limited".into()));
    let wait = answer.number("retry-after");
    assert!((1.0..=7.0).contains(&wait), "retry-after: {wait}");
}

#[tokio::test]
async fn attempts_bounds_the_tries_of_one_call_over_all_targets() {
    let nodes = [node("m").await, node("m").await, node("m").await, node("m").await];
    let mut conf = Conf::new();
    let mut targets = Vec::new();
    for (name, node) in ["a", "b", "c", "d"].into_iter().zip(&nodes) {
        node.set_fault(Some(fault("500")));
        conf = conf.upstream(name, &[node.url()], QUICK);
        targets.push((name, "m"));
    }
    let gw = Gateway::with(&conf.model("chat", &targets, RETRY).llm()).await;
    let answer = gw.post(PATH).key(WENDY).json(&chat("hi")).send().await;
    assert_eq!((answer.status(), answer.header("x-tollgate-attempts")), (502, "3"));
    let tries: Vec<usize> = nodes.iter().map(|node| node.requests().len()).collect();
    assert_eq!(tries, [1, 1, 1, 0]);
}

#[tokio::test]
async fn a_class_that_on_does_not_name_is_not_passed_over() {
    let (near, far) = (node("small").await, node("large").await);
    near.set_fault(Some(fault("500")));
    let conf = Conf::new()
        .upstream("near", &[near.url()], QUICK)
        .upstream("far", &[far.url()], QUICK)
        .llm()
        .also(
            "models:\n  chat: { targets: [{ upstream: near, model: small }, { upstream: far, model: large, on: [connect, 429] }], \
             retry: { attempts: 3, backoff: 1ms } }",
        );
    let gw = Gateway::with(&conf).await;
    let answer = gw.post(PATH).key(WENDY).json(&chat("hi")).send().await;
    assert_eq!(answer.refusal(), (502, "upstream_error".into()));
    assert!(far.requests().is_empty());
    near.set_fault(Some(fault("429")));
    let answer = gw.post(PATH).key(WENDY).json(&chat("hi")).send().await.expect(200);
    assert_eq!(answer.header("x-tollgate-upstream"), "far");
}

/// What the log and the metrics say of it.
#[tokio::test]
async fn a_fallback_is_counted_and_logged() {
    let (near, far) = (node("small").await, node("large").await);
    near.set_fault(Some(fault("503")));
    let gw = two_targets(&near.url(), &far.url()).await;
    let answer = gw.post(PATH).key(WENDY).json(&chat("hi")).send().await.expect(200);
    gw.settles("tollgate_fallbacks_total", &[("model", "chat")], 1.0).await;
    gw.settles("tollgate_attempts_total", &[("upstream", "near")], 1.0).await;
    gw.settles("tollgate_attempts_total", &[("upstream", "far")], 1.0).await;
    let line = gw.logged(answer.header("x-request-id")).await;
    assert_eq!((&line["attempts"], &line["upstream"], &line["status"]), (&json!(2), &json!("far"), &json!(200)));
}

/// The connection of a refused attempt is used again where its body was small.
#[tokio::test]
async fn the_first_target_is_tried_again_for_the_next_call() {
    let (near, far) = (node("small").await, node("large").await);
    near.set_fault(Some(fault("503")));
    let gw = two_targets(&near.url(), &far.url()).await;
    gw.post(PATH).key(WENDY).json(&chat("hi")).send().await.expect(200);
    near.set_fault(None);
    let answer = gw.post(PATH).key(WENDY).json(&chat("hi")).send().await.expect(200);
    assert_eq!((answer.header("x-tollgate-upstream"), answer.header("x-tollgate-attempts")), ("near", "1"));
}

/// A connection that the node closed while it lay in the pool costs no attempt that the client sees fail.
#[tokio::test]
async fn a_pooled_connection_that_went_stale_is_no_failure() {
    let near = RawNode::answering(|mut call: Upcall| async move {
        call.json("200 OK", &completion("hello", 1, 1)).await;
        None
    })
    .await;
    let conf = Conf::serving("qwen", &[near.url()]);
    let gw = Gateway::with(&conf).await;
    for _ in 0..10 {
        gw.post(PATH).key(WENDY).json(&chat("hi")).send().await.expect(200);
    }
}

#[tokio::test]
async fn a_slow_first_target_is_left_at_once_when_its_time_is_up() {
    let far = node("large").await;
    let near = RawNode::start().await;
    let gw = two_targets(&near.url(), &far.url()).await;
    let asked = tokio::spawn(gw.post(PATH).key(WENDY).json(&chat_stream("hi")).send());
    let mut call = near.call().await;
    let arrived = Instant::now();
    let closed = call.closed().await;
    assert!(closed - arrived < Duration::from_millis(900), "the attempt was held for {:?}", closed - arrived);
    in_time("the answer", asked).await.expect("a task").expect(200);
}
