//! One call that goes well, or is refused for what it says: bodies in, answers out.

use std::collections::HashSet;

use bytes::Bytes;
use serde_json::{Value, json};

use crate::harness::{
    Conf, DONE, Gateway, RawNode, WENDY, chat, chat_stream, chunk_event, completion, node, sha256, usage_event,
};

const PATH: &str = "/v1/chat/completions";

#[tokio::test]
async fn a_json_answer_is_relayed_byte_for_byte() {
    let near = RawNode::start().await;
    let gw = Gateway::with(&Conf::serving("qwen", &[near.url()])).await;
    let body = completion("hello", 9, 3).replace(":", " : ");
    let asked = tokio::spawn(gw.post(PATH).key(WENDY).json(&chat("hi")).send());
    let mut call = near.call().await;
    call.json("200 OK", &body).await;
    let answer = asked.await.expect("a task").expect(200);
    assert_eq!(answer.text(), body);
    assert_eq!(answer.header("content-type"), "application/json");
    assert_eq!(answer.header("x-tollgate-route"), "llm");
    assert_eq!(answer.header("x-tollgate-model"), "qwen");
    assert_eq!(answer.header("x-tollgate-upstream"), "near");
    assert_eq!(answer.header("x-tollgate-attempts"), "1");
    assert!(["miss", "bypass", ""].contains(&answer.header("x-tollgate-cache")));
    assert!(!answer.header("x-request-id").is_empty());
}

#[tokio::test]
async fn every_call_gets_a_request_id_of_its_own() {
    let near = node("qwen").await;
    let gw = Gateway::with(&Conf::serving("qwen", &[near.url()])).await;
    let mut wire = gw.wire().await;
    let mut ids = HashSet::new();
    for _ in 0..5 {
        let answer = wire.send(gw.post(PATH).key(WENDY).json(&chat("hi"))).await.expect(200);
        assert!(ids.insert(answer.header("x-request-id").to_owned()), "an id came twice");
    }
    let told: HashSet<String> = near
        .requests()
        .iter()
        .filter_map(|seen| seen.headers.iter().find(|(name, _)| name == "x-request-id").map(|(_, id)| id.clone()))
        .collect();
    assert_eq!(told, ids, "nodes and clients see the same ids");
}

/// The node sends an event only after the client has the one before: nothing is held back.
#[tokio::test]
async fn each_event_arrives_before_the_next_is_made() {
    for http2 in [false, true] {
        let near = RawNode::start().await;
        let gw = Gateway::with(&Conf::serving("qwen", &[near.url()])).await;
        let mut request = gw.post(PATH).key(WENDY).json(&chat_stream("hi"));
        if http2 {
            request = request.http2();
        }
        let asked = tokio::spawn(request.open());
        let mut call = near.call().await;
        call.stream_head().await;
        call.chunk(chunk_event("word 0")).await;
        let mut reply = asked.await.expect("a task");
        assert_eq!(reply.status(), 200);
        assert!(reply.header("content-type").starts_with("text/event-stream"));
        assert_eq!(reply.header("x-tollgate-attempts"), "1");
        assert_eq!(reply.event().await.and_then(|event| event.delta()).as_deref(), Some("word 0"));
        for turn in 1..20 {
            call.chunk(chunk_event(&format!("word {turn}"))).await;
            let event = reply.event().await.expect("an event");
            assert_eq!(event.delta(), Some(format!("word {turn}")));
        }
        call.chunk(usage_event(5, 20)).await;
        call.chunk(DONE).await;
        assert_eq!(reply.event().await.expect("the end").data, "[DONE]");
        call.last_chunk().await;
        assert_eq!(reply.event().await, None);
        assert!(reply.clean(), "http2: {http2}");
    }
}

/// A body whose every byte matters: odd spacing, unknown fields, numbers and escapes that a parser would rewrite.
fn odd_body(model: &str, stream_options: &str) -> String {
    format!(
        "{{ \"messages\" :[ {{\"role\":\"user\",\"content\":\"\\u00e9 \\/ \\ud83d\\ude00 \u{e9}\", \"model\":\"chat\"}} ],\n\
         \t\"model\"  :  \"{model}\" , \"temperature\":0.70000, \"big\":12345678901234567890123, \"e\":1E+2,\n\
         \"unknown\": {{\"model\":\"chat\",\"a\":[1,2,{{}}],\"stream_options\":1}},\"max_tokens\":8{stream_options}, \"z\":null }}"
    )
}

#[tokio::test]
async fn only_the_model_name_is_rewritten_and_every_other_byte_kept() {
    let near = node("Qwen/Qwen2.5-72B").await;
    let gw = Gateway::with(&Conf::serving("Qwen/Qwen2.5-72B", &[near.url()])).await;
    let answer = gw.post(PATH).key(WENDY).json_text(odd_body("chat", "")).send().await.expect(200);
    assert_eq!(answer.header("x-tollgate-model"), "Qwen/Qwen2.5-72B");
    let body = near.requests()[0].body.clone().expect("recorded");
    assert_eq!(String::from_utf8_lossy(&body), odd_body("Qwen/Qwen2.5-72B", ""));
}

#[tokio::test]
async fn nothing_is_rewritten_where_nothing_has_to_be() {
    let near = node("chat").await;
    let gw = Gateway::with(&Conf::serving("chat", &[near.url()])).await;
    let asked = ",\"stream\":true, \"stream_options\" : {\"x\":1, \"include_usage\":true }";
    for options in ["", asked] {
        gw.post(PATH).key(WENDY).json_text(odd_body("chat", options)).send().await.expect(200);
        let seen = near.requests().pop().expect("a request");
        assert_eq!(seen.body_sha256, sha256(odd_body("chat", options).as_bytes()), "{options}");
    }
}

#[tokio::test]
async fn a_model_is_found_by_an_alias_and_by_an_escaped_name() {
    let near = node("qwen").await;
    let conf = Conf::new()
        .upstream("near", &[near.url()], "")
        .model("chat", &[("near", "qwen")], "aliases: [gpt-3.5-turbo]")
        .llm();
    let gw = Gateway::with(&conf).await;
    for name in ["gpt-3.5-turbo", "chat", "ch\\u0061t"] {
        let body = format!("{{\"model\":\"{name}\",\"messages\":[{{\"role\":\"user\",\"content\":\"x\"}}]}}");
        gw.post(PATH).key(WENDY).json_text(body).send().await.expect(200);
        let seen = near.requests().pop().and_then(|seen| seen.body).expect("a body");
        let seen: Value = serde_json::from_slice(&seen).expect("JSON");
        assert_eq!(seen["model"], "qwen");
    }
}

#[tokio::test]
async fn an_unknown_model_is_404_and_names_the_field() {
    let near = node("qwen").await;
    let gw = Gateway::with(&Conf::serving("qwen", &[near.url()])).await;
    let mut body = chat("hi");
    body["model"] = "gpt-17".into();
    let answer = gw.post(PATH).key(WENDY).json(&body).send().await;
    assert_eq!(answer.refusal(), (404, "model_not_found".into()));
    assert_eq!(answer.json()["error"]["param"], "model");
    assert!(near.requests().is_empty());
}

#[tokio::test]
async fn bodies_of_any_framing_reach_the_node_whole() {
    let near = node("chat").await;
    let gw = Gateway::with(&Conf::serving("chat", &[near.url()])).await;
    let body = Bytes::from(chat(&"word ".repeat(30_000)).to_string());
    let hash = sha256(&body);
    for http2 in [false, true] {
        for piece in [None, Some(1_000), Some(65_536)] {
            let mut request = gw.post(PATH).key(WENDY);
            request = match piece {
                None => request.json_text(body.clone()),
                Some(size) => request.json_in_pieces(&body, size),
            };
            if http2 {
                request = request.http2();
            }
            request.send().await.expect(200);
            let seen = near.requests().pop().expect("a request");
            assert_eq!(seen.body_sha256, hash, "http2 {http2}, pieces {piece:?}");
        }
    }
}

#[tokio::test]
async fn completions_and_embeddings_are_calls_as_well() {
    let near = node("qwen").await;
    let gw = Gateway::with(&Conf::serving("qwen", &[near.url()])).await;
    let body = json!({ "model": "chat", "prompt": "once upon", "max_tokens": 4 });
    let answer = gw.post("/v1/completions").key(WENDY).json(&body).send().await.expect(200);
    assert!(answer.json()["choices"][0]["text"].is_string(), "{}", answer.text());
    let body = json!({ "model": "chat", "input": ["a", "b"] });
    let answer = gw.post("/v1/embeddings").key(WENDY).json(&body).send().await.expect(200);
    assert_eq!(answer.json()["data"].as_array().map(Vec::len), Some(2), "{}", answer.text());
}

#[tokio::test]
async fn a_body_over_the_limit_is_413_by_its_length_and_by_its_chunks() {
    let near = node("qwen").await;
    let conf = Conf::serving("qwen", &[near.url()]).server("limits: { body_bytes: 10KiB }");
    let gw = Gateway::with(&conf).await;

    let mut client = gw.raw().await;
    let head = format!(
        "POST {PATH} HTTP/1.1\r\nhost: gw\r\nauthorization: Bearer {WENDY}\r\ncontent-type: application/json\r\n"
    );
    let answer = client.ask(format!("{head}content-length: 20000\r\n\r\n{{")).await;
    assert_eq!(answer.status(), 413, "by length, before the body is there");
    assert!(answer.text().contains("body_too_large"));

    let mut client = gw.raw().await;
    client.write(format!("{head}transfer-encoding: chunked\r\n\r\n")).await;
    for _ in 0..5 {
        client.write(format!("{:x}\r\n{}\r\n", 4096, "x".repeat(4096))).await;
    }
    let answer = client.answer().await;
    assert_eq!(answer.status(), 413, "by chunks, before their end");

    let body = Bytes::from(chat(&"x".repeat(20_000)).to_string());
    let answer = gw.post(PATH).key(WENDY).json_in_pieces(&body, 5_000).http2().send().await;
    assert_eq!(answer.refusal(), (413, "body_too_large".into()));
    assert!(near.requests().is_empty());

    let fits = chat(&"x".repeat(9_000));
    gw.post(PATH).key(WENDY).json(&fits).send().await.expect(200);
}

#[tokio::test]
async fn bad_json_is_400_and_says_where() {
    let near = node("qwen").await;
    let gw = Gateway::with(&Conf::serving("qwen", &[near.url()])).await;
    for (body, offset) in [
        (r#"{"model":"chat","messages":[}"#, "28"),
        (r#"{"model":"chat" "messages":[]}"#, "16"),
        (r#"{"model":"chat","messages":[]"#, "29"),
        ("not json", "0"),
    ] {
        let answer = gw.post(PATH).key(WENDY).json_text(body).send().await;
        assert_eq!(answer.refusal(), (400, "invalid_json".into()), "{body}");
        let message = answer.json()["error"]["message"].as_str().expect("a message").to_owned();
        assert!(message.contains(offset), "{body}: {message} does not name byte {offset}");
    }
    for body in ["", "{}x", "\u{feff}{}", "{\"model\":\"chat\",\"a\":\"\u{1}\"}"] {
        let answer = gw.post(PATH).key(WENDY).json_text(body.to_owned()).send().await;
        assert_eq!(answer.refusal(), (400, "invalid_json".into()), "{body:?}");
    }
    assert!(near.requests().is_empty());
}

#[tokio::test]
async fn json_nested_without_end_is_refused_and_nothing_falls_over() {
    let near = node("qwen").await;
    let mut gw = Gateway::with(&Conf::serving("qwen", &[near.url()])).await;
    for bracket in ["[", "{\"a\":"] {
        let body = format!("{{\"model\":\"chat\",\"messages\":{}", bracket.repeat(200_000));
        let answer = gw.post(PATH).key(WENDY).json_text(body).send().await;
        assert_eq!(answer.status(), 400, "{}", answer.text());
    }
    assert!(gw.runs());
}

#[tokio::test]
async fn a_field_that_occurs_twice_is_400() {
    let near = node("qwen").await;
    let gw = Gateway::with(&Conf::serving("qwen", &[near.url()])).await;
    for (body, field) in [
        (r#"{"model":"chat","messages":[],"model":"other"}"#, "model"),
        (r#"{"model":"chat","messages":[],"m\u006fdel":"other"}"#, "model"),
        (r#"{"model":"chat","stream":true,"messages":[],"stream":false}"#, "stream"),
    ] {
        let answer = gw.post(PATH).key(WENDY).json_text(body).send().await;
        assert_eq!(answer.refusal(), (400, "duplicate_field".into()), "{body}");
        assert_eq!(answer.json()["error"]["param"], field);
    }
    assert!(near.requests().is_empty());
}

#[tokio::test]
async fn a_field_of_the_wrong_type_is_400_and_named() {
    let near = node("qwen").await;
    let gw = Gateway::with(&Conf::serving("qwen", &[near.url()])).await;
    for (field, value) in [
        ("model", json!(7)),
        ("model", json!(null)),
        ("model", json!("")),
        ("stream", json!("yes")),
        ("max_tokens", json!("many")),
        ("max_tokens", json!(-1)),
        ("n", json!(0)),
        ("n", json!(1.5)),
        ("stream_options", json!("usage")),
    ] {
        let mut body = chat_stream("hi");
        body[field] = value.clone();
        let answer = gw.post(PATH).key(WENDY).json(&body).send().await;
        assert_eq!(answer.refusal(), (400, "invalid_request".into()), "{field}: {value}");
        assert_eq!(answer.json()["error"]["param"], field, "{field}: {value}");
    }
    for body in ["[]", "\"chat\"", "null", "7"] {
        let answer = gw.post(PATH).key(WENDY).json_text(body).send().await;
        assert_eq!(answer.status(), 400, "{body}");
    }
    let answer = gw.post(PATH).key(WENDY).json(&json!({ "messages": [] })).send().await;
    assert_eq!(
        (answer.refusal(), answer.json()["error"]["param"].clone()),
        ((400, "invalid_request".into()), json!("model"))
    );
    assert!(near.requests().is_empty());
}

#[tokio::test]
async fn expect_100_continue_is_answered_before_the_body_comes() {
    let near = node("qwen").await;
    let gw = Gateway::with(&Conf::serving("qwen", &[near.url()])).await;
    let body = chat("hi").to_string();
    let mut client = gw.raw().await;
    let head = format!(
        "POST {PATH} HTTP/1.1\r\nhost: gw\r\nauthorization: Bearer {WENDY}\r\ncontent-type: application/json\r\n\
         content-length: {}\r\n",
        body.len()
    );
    let interim = client.ask(format!("{head}expect: 100-continue\r\n\r\n")).await;
    assert_eq!(interim.status(), 100);
    let answer = client.ask(&body).await;
    assert_eq!(answer.status(), 200, "{}", answer.text());
    assert!(near.requests()[0].headers.iter().all(|(name, _)| name != "expect"));

    let mut client = gw.raw().await;
    let answer = client.ask(format!("{head}expect: a miracle\r\n\r\n")).await;
    assert_eq!(answer.status(), 417);
    assert!(answer.text().contains("expectation_failed"));

    let mut client = gw.raw().await;
    let stranger = head.replace(WENDY, "wrong");
    let answer = client.ask(format!("{stranger}expect: 100-continue\r\n\r\n")).await;
    assert_eq!(answer.status(), 401, "a stranger is not asked for the body");
}

#[tokio::test]
async fn a_body_that_is_no_json_by_its_type_is_415() {
    let near = node("qwen").await;
    let gw = Gateway::with(&Conf::serving("qwen", &[near.url()])).await;
    let body = chat("hi").to_string();
    for kind in ["text/plain", "multipart/form-data; boundary=x", "application/x-www-form-urlencoded"] {
        let answer = gw.post(PATH).key(WENDY).header("content-type", kind).bytes(body.clone()).send().await;
        assert_eq!(answer.refusal(), (415, "unsupported_media_type".into()), "{kind}");
    }
    let answer = gw.post(PATH).key(WENDY).header("content-encoding", "gzip").json_text(body.clone()).send().await;
    assert_eq!(answer.refusal(), (415, "unsupported_media_type".into()), "an encoded body");
    for kind in ["application/json", "application/json; charset=utf-8", "Application/JSON"] {
        gw.post(PATH).key(WENDY).header("content-type", kind).bytes(body.clone()).send().await.expect(200);
    }
}

#[tokio::test]
async fn contradictory_framing_is_refused_and_the_connection_closed() {
    let near = node("qwen").await;
    let gw = Gateway::with(&Conf::serving("qwen", &[near.url()])).await;
    let head = format!(
        "POST {PATH} HTTP/1.1\r\nhost: gw\r\nauthorization: Bearer {WENDY}\r\ncontent-type: application/json\r\n"
    );
    for framing in [
        "content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        "content-length: 2\r\ncontent-length: 3\r\n\r\n{}",
        "content-length: 2, 2\r\n\r\n{}",
        "content-length: +2\r\n\r\n{}",
        "transfer-encoding: chunked, identity\r\n\r\n0\r\n\r\n",
        "transfer-encoding: xchunked\r\n\r\n0\r\n\r\n",
    ] {
        let mut client = gw.raw().await;
        client.write(format!("{head}{framing}GET /health HTTP/1.1\r\nhost: gw\r\n\r\n")).await;
        let text = String::from_utf8_lossy(&client.read_to_close().await).into_owned();
        assert!(text.starts_with("HTTP/1.1 400"), "{framing:?}: {text}");
        assert_eq!(text.matches("HTTP/1.1 ").count(), 1, "{framing:?}: what followed was taken as a request: {text}");
    }
    assert!(near.requests().is_empty());
}

#[tokio::test]
async fn one_connection_serves_many_calls_of_both_kinds() {
    let near = node("qwen").await;
    let gw = Gateway::with(&Conf::serving("qwen", &[near.url()])).await;
    for mut wire in [gw.wire().await, gw.wire2().await] {
        for turn in 0..10 {
            let body = if turn % 2 == 0 { chat("hi") } else { chat_stream("hi") };
            let answer = wire.send(gw.post(PATH).key(WENDY).json(&body)).await.expect(200);
            assert!(answer.clean());
            let refused = wire.send(gw.post(PATH).key("wrong").json(&body)).await;
            assert_eq!(refused.status(), 401);
        }
    }
    let connections: HashSet<u64> = near.requests().iter().map(|seen| seen.connection).collect();
    assert!(connections.len() <= 4, "connections to the node are reused: {} were made", connections.len());
}

#[tokio::test]
async fn hop_by_hop_headers_of_the_node_stop_at_the_gateway() {
    let near = RawNode::start().await;
    let gw = Gateway::with(&Conf::serving("qwen", &[near.url()])).await;
    let asked = tokio::spawn(gw.post(PATH).key(WENDY).json(&chat("hi")).send());
    let mut call = near.call().await;
    let body = completion("hello", 1, 1);
    call.write(format!(
        "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nkeep-alive: timeout=5\r\nconnection: keep-alive, x-hop\r\n\
         x-hop: 1\r\nx-tollgate-route: forged\r\nx-model-version: 7\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    ))
    .await;
    let answer = asked.await.expect("a task").expect(200);
    assert_eq!(answer.header("x-model-version"), "7");
    assert_eq!(answer.header("x-tollgate-route"), "llm");
    for gone in ["keep-alive", "x-hop"] {
        assert!(!answer.has(gone), "{gone} was passed on");
    }
}
