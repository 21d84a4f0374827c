//! Streams that break after their first token: finished on another node, or ended in one clear way.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tollgate_load::node::Node;

use crate::harness::{
    Answer, Conf, DONE, Gateway, RawNode, Upcall, WENDY, chat, chat_stream, chunk_event, completion, fault, node,
    usage_event,
};

const PATH: &str = "/v1/chat/completions";

/// Two nodes of one target that can go on, `from` tried first.
fn conf(nodes: &[String; 2], more: &str) -> Conf {
    let [first, second] = nodes;
    let quick = "timeouts: { between_tokens: 300ms }, eject: off";
    let targets = "targets: [{ upstream: first, model: qwen }, { upstream: second, model: qwen, continues: true }]";
    let mut conf = Conf::new().upstream("first", &[first], quick).upstream("second", &[second], quick).llm();
    conf = conf.also(&format!("models: {{ chat: {{ {targets}, {more} }} }}"));
    conf
}

async fn pair(more: &str) -> (Node, Node, Gateway) {
    let (first, second) = (node("qwen").await, node("qwen").await);
    let gw = Gateway::with(&conf(&[first.url(), second.url()], more)).await;
    (first, second, gw)
}

fn body(tokens: u64) -> Value {
    let mut body = chat_stream("tell me");
    body["max_tokens"] = tokens.into();
    body["stream_options"] = json!({ "include_usage": true });
    body
}

async fn ask(gw: &Gateway, body: &Value) -> Answer {
    gw.post(PATH).key(WENDY).json(body).send().await.expect(200)
}

fn text(answer: &Answer) -> String {
    answer.events().iter().filter_map(|event| event.delta()).collect()
}

/// The answer looks as if one node had given it.
fn is_one(answer: &Answer, tokens: u64) {
    assert!(answer.clean(), "{}", answer.text());
    let events = answer.events();
    assert_eq!(events.iter().filter(|event| event.data == "[DONE]").count(), 1, "{}", answer.text());
    assert_eq!(events.last().expect("events").data, "[DONE]");
    let chunks: Vec<Value> = events[..events.len() - 1].iter().map(|event| event.json()).collect();
    for name in ["id", "created", "model", "system_fingerprint"] {
        assert!(chunks.iter().all(|chunk| chunk[name] == chunks[0][name]), "one {name}: {}", answer.text());
    }
    let count = |wanted: &dyn Fn(&Value) -> bool| chunks.iter().filter(|chunk| wanted(chunk)).count();
    assert_eq!(count(&|chunk| !chunk["choices"][0]["delta"]["role"].is_null()), 1, "{}", answer.text());
    assert_eq!(count(&|chunk| chunk["choices"][0]["finish_reason"].is_string()), 1, "{}", answer.text());
    assert_eq!(count(&|chunk| chunk["usage"].is_object()), 1, "{}", answer.text());
    let usage = &chunks[chunks.len() - 1]["usage"];
    assert_eq!(usage["completion_tokens"], tokens, "{usage}");
    assert_eq!(usage["total_tokens"], json!(usage["prompt_tokens"].as_u64().expect("a count") + tokens));
}

fn is_error(answer: &Answer, code: &str) {
    assert!(!answer.clean(), "{}", answer.text());
    let events = answer.events();
    assert!(events.iter().all(|event| event.data != "[DONE]"), "{}", answer.text());
    let errors: Vec<Value> =
        events.iter().map(|event| event.json()).filter(|chunk| !chunk["error"].is_null()).collect();
    assert_eq!(errors.len(), 1, "{}", answer.text());
    assert_eq!(errors[0]["error"]["code"], code, "{}", answer.text());
}

async fn finished(way: &str, name: &str) {
    let (first, second, gw) = pair(way).await;
    let expected = ask(&gw, &body(60)).await;
    is_one(&expected, 60);
    first.set_fault(Some(fault(name)));
    let answer = ask(&gw, &body(60)).await;
    is_one(&answer, 60);
    assert_eq!(text(&answer), text(&expected), "{name}");
    let usage =
        |answer: &Answer| answer.events().iter().rev().nth(1).expect("usage").json()["usage"]["prompt_tokens"].clone();
    let (told, true_one) = (usage(&answer).as_u64().expect("a count"), usage(&expected).as_u64().expect("a count"));
    assert!(told.abs_diff(true_one) <= 40, "the prompt is counted once: {told} and not {true_one}");
    assert_eq!((first.requests().len(), second.requests().len()), (2, 1), "{name}");
    let line = gw.logged(answer.header("x-request-id")).await;
    assert_eq!(
        (&line["attempts"], &line["output_tokens"], &line["code"]),
        (&json!(2), &json!(60), &Value::Null),
        "{line}"
    );
    gw.settles("tollgate_reservations_inflight", &[], 0.0).await;
    gw.settles("tollgate_node_inflight", &[], 0.0).await;
    gw.settles("tollgate_resumes_total", &[("model", "chat"), ("result", "resumed")], 1.0).await;
    gw.settles("tollgate_attempts_total", &[("outcome", "broken")], 1.0).await;
    gw.settles("tollgate_tokens_total", &[("kind", "output")], 120.0).await;
}

#[tokio::test]
async fn a_cut_answer_is_gone_on_with_elsewhere_and_the_client_sees_one() {
    for name in ["cut:40", "error_after:40", "stall:20"] {
        finished("resume: continue", name).await;
    }
}

#[tokio::test]
async fn a_cut_answer_is_replayed_elsewhere_and_the_client_sees_one() {
    for name in ["cut:40", "error_after:1", "stall:20"] {
        finished("resume: replay", name).await;
    }
}

#[tokio::test]
async fn the_node_that_goes_on_gets_the_text_so_far_and_the_tokens_that_are_left() {
    let (first, second, gw) = pair("resume: continue").await;
    first.set_fault(Some(fault("cut:40")));
    let answer = ask(&gw, &body(60)).await;
    let sent: Value = serde_json::from_slice(&second.requests()[0].body.clone().expect("a body")).expect("JSON");
    assert_eq!((&sent["continue_final_message"], &sent["add_generation_prompt"]), (&json!(true), &json!(false)));
    let last = sent["messages"].as_array().expect("messages").last().expect("one").clone();
    assert_eq!(last["role"], "assistant");
    let begun = last["content"].as_str().expect("a text");
    assert!(!begun.is_empty() && text(&answer).starts_with(begun));
    assert!(sent["max_tokens"].as_u64().expect("a count") < 60);
}

#[tokio::test]
async fn a_refused_continuation_is_not_the_clients_error() {
    let (first, second, gw) = pair("resume: continue").await;
    first.set_fault(Some(fault("cut:5")));
    second.set_fault(Some(fault("no_continue")));
    let answer = ask(&gw, &body(20)).await;
    is_error(&answer, "upstream_error");
    assert!(!text(&answer).is_empty());
    assert_eq!((first.requests().len(), second.requests().len()), (1, 1));
    gw.settles("tollgate_resumes_total", &[("model", "chat"), ("result", "failed")], 1.0).await;
    let line = gw.logged(answer.header("x-request-id")).await;
    assert!(
        line["output_tokens"].as_u64().is_some_and(|count| (3..=9).contains(&count)),
        "what the client got: {line}"
    );
    gw.settles("tollgate_reservations_inflight", &[], 0.0).await;
}

#[tokio::test]
async fn a_replay_that_says_something_else_ends_with_the_error() {
    let (first, second) = (node("qwen").await, RawNode::start().await);
    first.set_fault(Some(fault("cut:5")));
    let gw = Gateway::with(&conf(&[first.url(), second.url()], "resume: replay")).await;
    let asked = tokio::spawn(gw.post(PATH).key(WENDY).json(&body(20)).send());
    let mut call = second.call().await;
    call.sse(&format!("{}{}{DONE}", chunk_event("quite another text"), usage_event(3, 2))).await;
    let answer = asked.await.expect("a task").expect(200);
    is_error(&answer, "upstream_error");
    assert!(!answer.text().contains("another"));
}

#[tokio::test]
async fn without_resume_a_break_ends_with_the_error() {
    let (first, second, gw) = pair("resume: off").await;
    for name in ["cut:5", "error_after:5"] {
        first.set_fault(Some(fault(name)));
        is_error(&ask(&gw, &body(20)).await, "upstream_error");
    }
    assert!(second.requests().is_empty());
}

#[tokio::test]
async fn an_answer_in_odd_pieces_is_joined_as_well() {
    let second = RawNode::answering(|mut call: Upcall| async move {
        let events = format!(
            "{}{}{}{DONE}",
            chunk_event("one two three"),
            chunk_event(" four"),
            "data: {\"id\":\"x\",\"choices\":[{\"index\":0,\"delta\":{},\"finish_reason\":\"stop\"}]}\n\n"
        );
        call.stream_head().await;
        for piece in events.as_bytes().chunks(7) {
            call.chunk(piece).await;
        }
        call.last_chunk().await;
        Some(call)
    })
    .await;
    let first = RawNode::start().await;
    let gw = Gateway::with(&conf(&[first.url(), second.url()], "resume: replay")).await;
    let asked = tokio::spawn(gw.post(PATH).key(WENDY).json(&chat_stream("hi")).send());
    let mut call = first.call().await;
    call.stream_head().await;
    call.chunk(format!("{}{}data: {{\"choi", chunk_event("one"), chunk_event(" tw"))).await;
    drop(call);
    let answer = asked.await.expect("a task").expect(200);
    assert!(answer.clean(), "{}", answer.text());
    let deltas: Vec<String> = answer.events().iter().filter_map(|event| event.delta()).collect();
    assert_eq!(deltas, ["one", " tw", "o three", " four"]);
    assert!(answer.text().ends_with(DONE));
}

#[tokio::test]
async fn a_malformed_event_is_left_out_or_ends_the_stream_as_the_route_says() {
    let near = node("qwen").await;
    near.set_fault(Some(fault("garbage:5")));
    let gw = Gateway::with(&Conf::serving("qwen", &[near.url()])).await;
    let answer = ask(&gw, &body(12)).await;
    is_one(&answer, 12);
    assert!(!answer.text().contains("chatcmpl-broken"));
    let conf = Conf::new()
        .upstream("near", &[near.url()], "")
        .model("chat", &[("near", "qwen")], "")
        .route("{ name: llm, match: { path: /v1/chat/completions }, call: { models: \"*\" }, on_malformed: end }");
    let gw = Gateway::with(&conf).await;
    let answer = ask(&gw, &body(12)).await;
    is_error(&answer, "upstream_error");
    assert_eq!(answer.events().iter().filter(|event| event.delta().is_some()).count(), 5);
}

#[tokio::test]
async fn a_stream_without_its_last_event_is_completed_promptly() {
    let near = node("qwen").await;
    let gw = Gateway::with(&Conf::serving("qwen", &[near.url()])).await;
    for name in ["no_done", "open_end", "no_usage,open_end"] {
        near.set_fault(Some(fault(name)));
        let began = Instant::now();
        let answer = ask(&gw, &body(12)).await;
        assert!(began.elapsed() < Duration::from_millis(1800), "{name}: took {:?}", began.elapsed());
        assert!(answer.clean() && answer.text().ends_with(DONE), "{name}: {}", answer.text());
        assert_eq!(answer.events().iter().filter(|event| event.delta().is_some()).count(), 12, "{name}");
    }
}

#[tokio::test]
async fn what_fails_before_its_first_token_is_answered_elsewhere() {
    let (first, second, gw) = pair("resume: off").await;
    for (turn, name) in
        ["error_event", "malformed", "empty", "error_body", "cut:0", "error_after:0"].into_iter().enumerate()
    {
        first.set_fault(Some(fault(name)));
        is_one(&ask(&gw, &body(12)).await, 12);
        assert_eq!(second.requests().len(), turn + 1, "{name}");
    }
    for name in ["error_body", "malformed", "cut:0"] {
        let before = second.requests().len();
        first.set_fault(Some(fault(name)));
        let answer = gw.post(PATH).key(WENDY).json(&chat("hi")).send().await.expect(200);
        assert_eq!(answer.json()["usage"]["completion_tokens"], 8, "{name}");
        assert_eq!(second.requests().len(), before + 1, "{name}");
    }
}

#[tokio::test]
async fn the_model_is_reported_as_the_target_has_it_or_as_it_was_asked_for() {
    let near = RawNode::answering(|mut call: Upcall| async move {
        let stream = call.request.text().contains("\"stream\"");
        let filler = "x".repeat(200_000);
        match stream {
            true => {
                call.sse(&format!("{}{}{DONE}", chunk_event("one \\\"model\\\":\\\"qwen\\\""), usage_event(1, 1))).await
            }
            false => call.json("200 OK", &completion(&filler, 1, 1)).await,
        }
        Some(call)
    })
    .await;
    for (setting, name) in [("report_model: target", "qwen"), ("report_model: requested", "alias")] {
        let conf = Conf::new().upstream("near", &[near.url()], "").llm();
        let conf = conf.model("chat", &[("near", "qwen")], &format!("aliases: [alias], {setting}"));
        let gw = Gateway::with(&conf).await;
        for stream in [true, false] {
            let mut body = json!({ "model": "alias", "messages": [{ "role": "user", "content": "hi" }] });
            if stream {
                body["stream"] = true.into();
                body["stream_options"] = json!({ "include_usage": true });
            }
            let answer = ask(&gw, &body).await;
            assert!(answer.clean());
            assert_eq!(answer.header("x-tollgate-model"), "qwen");
            let whole = match stream {
                true => format!("{}{}{DONE}", chunk_event("one \\\"model\\\":\\\"qwen\\\""), usage_event(1, 1)),
                false => completion(&"x".repeat(200_000), 1, 1),
            };
            assert!(answer.text() == whole.replace(r#""model":"qwen""#, &format!(r#""model":"{name}""#)), "{setting}");
        }
    }
}
