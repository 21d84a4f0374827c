//! Event streams: bytes, usage, breaks.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use serde_json::{Value, json};

use crate::harness::client::at_once;
use crate::harness::{
    Answer, Conf, DONE, Gateway, RawNode, Rng, Upcall, WENDY, chat_stream, chunk_event, fault, node, usage_event,
};

const PATH: &str = "/v1/chat/completions";

/// A stream as nodes really write them: CRLF and LF mixed, comments, event names, ids, no space after the colon, data over
/// two lines, text in many scripts, usage at the end.
fn recorded() -> Bytes {
    let mut text = String::from(": vllm says hello\n\nretry: 3000\n\n");
    text.push_str("data: {\"id\":\"chatcmpl-1\",\"choices\":[{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":\"\"},\"finish_reason\":null}]}\n\n");
    for (turn, word) in [
        "The",
        " cost",
        " of",
        " größte",
        " 中文",
        " 😀",
        " \"quoted\"",
        " back\\slash",
        "\n\n",
        " data: [DONE]",
        " fin",
    ]
    .into_iter()
    .enumerate()
    {
        let chunk = json!({
            "id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1_700_000_000, "model": "chat",
            "choices": [{ "index": 0, "delta": { "content": word }, "logprobs": null, "finish_reason": null }],
        });
        match turn % 4 {
            0 => text.push_str(&format!("data: {chunk}\n\n")),
            1 => text.push_str(&format!("data: {chunk}\r\n\r\n")),
            2 => text.push_str(&format!(": ping\n\ndata:{chunk}\n\n")),
            _ => text.push_str(&format!("event: message\r\nid: {turn}\r\ndata: {chunk}\r\n\r\n")),
        }
    }
    text.push_str(
        "data: {\"id\":\"chatcmpl-1\",\ndata: \"choices\":[{\"index\":0,\"delta\":{},\"finish_reason\":\"stop\"}]}\n\n",
    );
    text.push_str(&usage_event(11, 13));
    text.push_str(DONE);
    text.into()
}

/// Cuts bytes at random places: sometimes a few cuts, sometimes every byte on its own.
fn cut(bytes: &Bytes, seed: u64) -> Vec<Bytes> {
    let mut rng = Rng::new(seed);
    let most = match seed % 10 {
        0 if seed.is_multiple_of(100) => 3,
        1 => bytes.len() / 40,
        _ => bytes.len() / 4,
    };
    let mut pieces = Vec::new();
    let mut at = 0;
    while at < bytes.len() {
        let size = if seed % 500 == 7 { 1 } else { 1 + rng.below(most.max(1)) };
        let end = (at + size).min(bytes.len());
        pieces.push(bytes.slice(at..end));
        at = end;
    }
    pieces
}

#[test]
fn cutting_loses_nothing() {
    let bytes = recorded();
    for seed in 0..50 {
        assert_eq!(cut(&bytes, seed).concat(), bytes);
    }
    assert!(cut(&bytes, 7).len() == bytes.len(), "some seeds cut at every byte");
}

/// A node that sends the recorded stream in the pieces that the request's `x-split` asks for, each its own chunk and write.
async fn splitter(bytes: Bytes) -> RawNode {
    RawNode::answering(move |mut call: Upcall| {
        let bytes = bytes.clone();
        async move {
            let seed = call.request.header("x-split").parse().expect("a seed");
            call.stream_head().await;
            for (count, piece) in cut(&bytes, seed).into_iter().enumerate() {
                call.chunk(piece).await;
                if count % 3 == 0 {
                    tokio::task::yield_now().await;
                }
            }
            call.last_chunk().await;
            Some(call)
        }
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_random_splits_of_a_stream_arrive_byte_identical() {
    let bytes = recorded();
    let near = splitter(bytes.clone()).await;
    let gw = Arc::new(Gateway::with(&Conf::serving("chat", &[near.url()])).await);
    let mut body = chat_stream("hi");
    body["stream_options"] = json!({ "include_usage": true });
    let worker = |first: u64| {
        let (gw, body, bytes) = (Arc::clone(&gw), body.clone(), bytes.clone());
        async move {
            let mut wire = if first % 4 == 3 { gw.wire2().await } else { gw.wire().await };
            for seed in (first..10_000).step_by(8) {
                let request = gw.post(PATH).key(WENDY).header("x-split", &seed.to_string()).json(&body);
                let answer = wire.send(request).await.expect(200);
                assert!(answer.clean(), "split {seed}");
                assert!(answer.body() == &bytes, "split {seed} came as:\n{}", answer.text());
            }
        }
    };
    at_once(8, (0..8).map(worker)).await;
    gw.settles("tollgate_reservations_inflight", &[], 0.0).await;
    gw.settles("tollgate_tokens_total", &[("kind", "output")], 130_000.0).await;
}

/// The gateway's own question for usage is taken out again, wherever the stream is cut.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_split_lets_usage_through_that_was_not_asked_for() {
    let bytes = recorded();
    let near = splitter(bytes.clone()).await;
    let gw = Gateway::with(&Conf::serving("chat", &[near.url()])).await;
    let expected = String::from_utf8(bytes.to_vec()).expect("UTF-8").replace(&usage_event(11, 13), "");
    let mut wire = gw.wire().await;
    for seed in 0..500 {
        let request = gw.post(PATH).key(WENDY).header("x-split", &seed.to_string()).json(&chat_stream("hi"));
        let answer = wire.send(request).await.expect(200);
        assert_eq!(answer.text(), expected, "split {seed}");
    }
    gw.settles("tollgate_tokens_total", &[("kind", "output")], 6_500.0).await;
}

fn usages(answer: &Answer) -> Vec<Value> {
    let events = answer.events();
    events.iter().filter(|event| event.data != "[DONE]").map(|event| event.json()["usage"].clone()).collect()
}

#[tokio::test]
async fn include_usage_is_asked_of_the_node_and_hidden_from_a_client_that_did_not_ask() {
    let near = node("qwen").await;
    let gw = Gateway::with(&Conf::serving("qwen", &[near.url()])).await;
    for options in
        [None, Some(json!(null)), Some(json!({})), Some(json!({ "include_usage": false })), Some(json!({ "x": 1 }))]
    {
        let mut body = chat_stream("hi");
        if let Some(options) = &options {
            body["stream_options"] = options.clone();
        }
        let answer = gw.post(PATH).key(WENDY).json(&body).send().await.expect(200);
        let sent: Value =
            serde_json::from_slice(&near.requests().pop().and_then(|seen| seen.body).expect("a body")).expect("JSON");
        assert_eq!(sent["stream_options"]["include_usage"], true, "{options:?}");
        if options == Some(json!({ "x": 1 })) {
            assert_eq!(sent["stream_options"]["x"], 1);
        }
        assert!(!answer.text().contains("usage"), "{options:?}: {}", answer.text());
        let events = answer.events();
        assert_eq!(events.iter().filter(|event| event.delta().is_some()).count(), 8, "all eight tokens");
        assert!(
            events.iter().all(|event| event.data == "[DONE]" || event.json()["choices"] != json!([])),
            "an extra chunk"
        );
        assert_eq!(events.last().expect("events").data, "[DONE]");
        let line = gw.logged(answer.header("x-request-id")).await;
        assert_eq!((&line["output_tokens"], &line["usage_source"]), (&json!(8), &json!("upstream")), "still counted");
    }
}

#[tokio::test]
async fn usage_stays_for_a_client_that_asked() {
    let near = node("qwen").await;
    let gw = Gateway::with(&Conf::serving("qwen", &[near.url()])).await;
    let mut body = chat_stream("hi");
    body["stream_options"] = json!({ "include_usage": true });
    let answer = gw.post(PATH).key(WENDY).json(&body).send().await.expect(200);
    let given: Vec<Value> = usages(&answer).into_iter().filter(|usage| !usage.is_null()).collect();
    assert_eq!(given.len(), 1);
    assert_eq!(given[0]["completion_tokens"], 8);
    let events = answer.events();
    assert_eq!(events[events.len() - 2].json()["choices"], json!([]), "the extra chunk comes before [DONE]");
}

/// OpenAI writes `"usage":null` into every chunk once asked; a client that did not ask sees none of them.
#[tokio::test]
async fn a_null_usage_in_each_chunk_is_removed_too() {
    let near = RawNode::start().await;
    let gw = Gateway::with(&Conf::serving("qwen", &[near.url()])).await;
    let asked = tokio::spawn(gw.post(PATH).key(WENDY).json(&chat_stream("hi")).send());
    let mut call = near.call().await;
    let chunk = |text: &str, usage: &str| {
        format!(
            "data: {{\"id\":\"a\", \"choices\":[{{\"index\":0,\"delta\":{{\"content\":\"{text}\"}}}}]{usage}, \"z\":1.50}}\n\n"
        )
    };
    let null = ", \"usage\": null";
    let body = format!("{}{}{}{DONE}", chunk("one", null), chunk("\\\"usage\\\":null", null), usage_event(3, 2));
    call.sse(&body).await;
    let answer = asked.await.expect("a task").expect(200);
    let plain = format!("{}{}{DONE}", chunk("one", ""), chunk("\\\"usage\\\":null", ""));
    let data = |text: &str| -> Vec<Value> {
        text.split("\n\n").filter_map(|event| serde_json::from_str(event.trim_start_matches("data: ")).ok()).collect()
    };
    assert_eq!(data(&answer.text()), data(&plain));
    assert!(answer.text().ends_with(DONE));
}

#[tokio::test]
async fn crlf_and_comments_are_understood() {
    let near = node("qwen").await;
    let gw = Gateway::with(&Conf::serving("qwen", &[near.url()])).await;
    for name in ["crlf", "comments"] {
        near.set_fault(Some(fault(name)));
        let answer = gw.post(PATH).key(WENDY).json(&chat_stream("hi")).send().await.expect(200);
        assert!(answer.clean(), "{name}");
        assert_eq!(answer.events().iter().filter(|event| event.delta().is_some()).count(), 8, "{name}");
        let line = gw.logged(answer.header("x-request-id")).await;
        assert_eq!((&line["output_tokens"], &line["usage_source"]), (&json!(8), &json!("upstream")), "{name}");
    }
}

#[tokio::test]
async fn without_usage_from_the_node_the_text_is_counted() {
    let near = node("qwen").await;
    near.set_fault(Some(fault("no_usage")));
    let gw = Gateway::with(&Conf::serving("qwen", &[near.url()])).await;
    for body in [chat_stream("hi"), crate::harness::chat("hi")] {
        let answer = gw.post(PATH).key(WENDY).json(&body).send().await.expect(200);
        let line = gw.logged(answer.header("x-request-id")).await;
        assert_eq!(line["usage_source"], "counted");
        let output = line["output_tokens"].as_u64().expect("a number");
        assert!((4..=24).contains(&output), "eight words are some tokens, not {output}");
    }
}

/// After the first token nothing can be taken back: an error event, no `[DONE]`, and an end that no client takes for a good one.
async fn breaks(http2: bool, name: &str, code: &str) {
    let near = node("qwen").await;
    near.set_fault(Some(fault(name)));
    let conf = Conf::new()
        .upstream("near", &[near.url()], "timeouts: { between_tokens: 300ms }, eject: { after: 1000 }")
        .model("chat", &[("near", "qwen")], "")
        .llm();
    let gw = Gateway::with(&conf).await;
    let mut request = gw.post(PATH).key(WENDY).json(&chat_stream("hi"));
    if http2 {
        request = request.http2();
    }
    let answer = request.send().await.expect(200);
    assert!(!answer.clean(), "{name}: the body ended as if all were well: {}", answer.text());
    let events = answer.events();
    assert!(events.iter().any(|event| event.delta().is_some()), "{name}: the tokens before the break are kept");
    assert!(events.iter().all(|event| event.data != "[DONE]"), "{name}");
    let last = events.last().expect("events").json();
    assert_eq!(last["error"]["code"], code, "{name}: {last}");
    assert!(last["error"]["message"].is_string() && last["error"]["type"].is_string(), "{last}");
    gw.settles("tollgate_reservations_inflight", &[], 0.0).await;
    gw.settles("tollgate_node_inflight", &[], 0.0).await;
    gw.settles("tollgate_streams_open", &[], 0.0).await;
    let line = gw.logged(answer.header("x-request-id")).await;
    assert_eq!(line["code"], code);
}

#[tokio::test]
async fn a_stream_cut_after_its_first_token_ends_in_an_error_event_over_http1() {
    breaks(false, "cut:3", "upstream_error").await;
}

#[tokio::test]
async fn a_stream_cut_after_its_first_token_ends_in_an_error_event_over_http2() {
    breaks(true, "cut:3", "upstream_error").await;
}

#[tokio::test]
async fn a_stream_that_stalls_ends_after_between_tokens() {
    breaks(false, "stall:3", "upstream_timeout").await;
    breaks(true, "stall:3", "upstream_timeout").await;
}

/// A clean end of the body without `[DONE]` is a break as well: nobody said that the answer is whole.
#[tokio::test]
async fn a_stream_that_ends_without_done_is_no_good_end() {
    let near = RawNode::start().await;
    let gw = Gateway::with(&Conf::serving("qwen", &[near.url()])).await;
    let asked = tokio::spawn(gw.post(PATH).key(WENDY).json(&chat_stream("hi")).send());
    let mut call = near.call().await;
    call.sse(&chunk_event("one")).await;
    let answer = asked.await.expect("a task").expect(200);
    assert!(answer.events().iter().all(|event| event.data != "[DONE]"), "{}", answer.text());
    let line = gw.logged(answer.header("x-request-id")).await;
    assert_eq!(line["usage_source"], "counted");
}

#[tokio::test]
async fn a_body_by_connection_close_is_streamed_as_well() {
    let near = RawNode::start().await;
    let gw = Gateway::with(&Conf::serving("qwen", &[near.url()])).await;
    let asked = tokio::spawn(gw.post(PATH).key(WENDY).json(&chat_stream("hi")).send());
    let mut call = near.call().await;
    let events = format!("{}{}{DONE}", chunk_event("one"), chunk_event("two"));
    call.write(format!("HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n{events}"))
        .await;
    drop(call);
    let answer = asked.await.expect("a task").expect(200);
    assert!(answer.clean());
    assert_eq!(answer.text(), events);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_line_of_up_to_4_mib_passes_and_a_longer_one_ends_the_stream() {
    const MIB: usize = 1024 * 1024;
    for (size, passes) in [(4 * MIB - 4096, true), (4 * MIB + 4096, false)] {
        let near = RawNode::start().await;
        let gw = Gateway::with(&Conf::serving("qwen", &[near.url()])).await;
        let asked = tokio::spawn(gw.post(PATH).key(WENDY).json(&chat_stream("hi")).send());
        let mut call = near.call().await;
        let long = chunk_event(&"x".repeat(size - chunk_event("").len()));
        call.stream_head().await;
        call.chunk(chunk_event("first")).await;
        for piece in long.as_bytes().chunks(50_000) {
            call.chunk(piece).await;
        }
        call.chunk(DONE).await;
        call.last_chunk().await;
        let answer = asked.await.expect("a task").expect(200);
        if passes {
            assert!(answer.clean());
            assert_eq!(answer.body().len(), chunk_event("first").len() + long.len() + DONE.len());
        } else {
            assert!(!answer.clean(), "{} bytes came through", answer.body().len());
            assert!(answer.body().ends_with(b"\n\n"), "the error event is whole");
            assert_eq!(answer.events().last().expect("events").json()["error"]["code"], "upstream_error");
        }
    }
}

/// The node says little for long: nothing but pings does not keep a stream alive for ever.
#[tokio::test]
async fn pings_are_no_tokens() {
    let near = RawNode::start().await;
    let conf = Conf::new()
        .upstream("near", &[near.url()], "timeouts: { between_tokens: 400ms }")
        .model("chat", &[("near", "qwen")], "")
        .llm();
    let gw = Gateway::with(&conf).await;
    let asked = tokio::spawn(gw.post(PATH).key(WENDY).json(&chat_stream("hi")).send());
    let mut call = near.call().await;
    call.stream_head().await;
    call.chunk(chunk_event("one")).await;
    let pinging = tokio::spawn(async move {
        for _ in 0..200 {
            call.chunk(": ping\n\n").await;
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    });
    let answer = asked.await.expect("a task").expect(200);
    pinging.abort();
    assert!(!answer.clean());
    assert!(answer.took < Duration::from_secs(5), "took {:?}", answer.took);
    assert_eq!(answer.events().last().expect("events").json()["error"]["code"], "upstream_timeout");
}
