//! The simulated Dify app, driven over loopback.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use serde_json::{Value, json};
use tollgate_load::dify::{DifyApp, DifyConfig};

/// Status, body, and whether the body ended cleanly.
async fn send(app: &DifyApp, path: &str, key: &str, body: Option<Value>, fault: &str) -> (StatusCode, String, bool) {
    let client = Client::builder(TokioExecutor::new()).build_http::<Full<Bytes>>();
    let method = if body.is_some() { Method::POST } else { Method::GET };
    let mut request = Request::builder().method(method).uri(format!("{}{path}", app.url()));
    if !key.is_empty() {
        request = request.header("authorization", format!("Bearer {key}"));
    }
    if !fault.is_empty() {
        request = request.header("x-sim-fault", fault);
    }
    let body = body.map(|body| body.to_string()).unwrap_or_default();
    let response = client.request(request.body(Full::from(body)).unwrap()).await.unwrap();
    let status = response.status();
    let mut body = response.into_body();
    let mut bytes = Vec::new();
    let clean = loop {
        match body.frame().await {
            None => break true,
            Some(Err(_)) => break false,
            Some(Ok(frame)) => bytes.extend_from_slice(&frame.into_data().unwrap()),
        }
    };
    (status, String::from_utf8(bytes).unwrap(), clean)
}

fn run(mode: &str) -> Option<Value> {
    Some(json!({"inputs": {"q": "x"}, "query": "hello", "response_mode": mode, "user": "u1"}))
}

fn events(text: &str) -> Vec<Value> {
    text.split_terminator("\n\n").filter_map(|event| serde_json::from_str(event.strip_prefix("data: ")?).ok()).collect()
}

#[tokio::test]
async fn a_chat_streams_the_answer_a_blocking_call_gives_whole() {
    let app = DifyApp::start(DifyConfig::default()).await.unwrap();
    let (status, whole, _) = send(&app, "/v1/chat-messages", "app-1", run("blocking"), "").await;
    assert_eq!(status, 200);
    let whole: Value = serde_json::from_str(&whole).unwrap();
    assert_eq!((&whole["mode"], &whole["event"]), (&json!("chat"), &json!("message")));
    let (_, text, clean) = send(&app, "/v1/chat-messages", "app-1", run("streaming"), "").await;
    assert!(clean && text.starts_with(r#"data: {"event":"message","conversation_id":""#), "{text}");
    let events = events(&text);
    let (last, messages) = events.split_last().unwrap();
    let answer: String = messages.iter().map(|event| event["answer"].as_str().unwrap()).collect();
    assert_eq!(answer, whole["answer"].as_str().unwrap());
    assert_eq!(last["event"], "message_end");
    assert_eq!(last["metadata"]["usage"]["completion_tokens"], 16);
    assert_eq!(last["metadata"]["usage"]["total_tokens"], whole["metadata"]["usage"]["total_tokens"]);
    assert_eq!(last["conversation_id"], messages[0]["conversation_id"]);
    assert_eq!(app.requests()[1].output_tokens, 16);
}

#[tokio::test]
async fn completions_have_no_conversation() {
    let app = DifyApp::start(DifyConfig::default()).await.unwrap();
    let (_, text, _) = send(&app, "/v1/completion-messages", "app-1", run("streaming"), "").await;
    let events = events(&text);
    assert_eq!(events.len(), 17);
    assert!(events.iter().all(|event| event.get("conversation_id").is_none() && event["message_id"].is_string()));
}

#[tokio::test]
async fn a_workflow_opens_with_a_ping_and_tells_its_nodes() {
    let app = DifyApp::start(DifyConfig { answer_tokens: 2, ..DifyConfig::default() }).await.unwrap();
    let (_, text, _) = send(&app, "/v1/workflows/run", "app-1", run("streaming"), "").await;
    assert!(text.starts_with("event: ping\n\ndata: {\"event\":\"workflow_started\",\"workflow_run_id\":"), "{text}");
    let events = events(&text);
    let names: Vec<&str> = events.iter().map(|event| event["event"].as_str().unwrap()).collect();
    let expected = [
        "workflow_started",
        "node_started",
        "node_finished",
        "node_started",
        "text_chunk",
        "text_chunk",
        "node_finished",
        "node_started",
        "node_finished",
        "workflow_finished",
    ];
    assert_eq!(names, expected);
    let (_, whole, _) = send(&app, "/v1/workflows/run", "app-1", run("blocking"), "").await;
    let whole: Value = serde_json::from_str(&whole).unwrap();
    assert_eq!(whole["data"]["outputs"], events[9]["data"]["outputs"]);
    assert_eq!(whole["data"]["total_tokens"], events[9]["data"]["total_tokens"]);
}

#[tokio::test]
async fn silence_is_filled_with_pings() {
    let config = DifyConfig {
        per_token: Duration::from_millis(100),
        ping_every: Duration::from_millis(20),
        answer_tokens: 1,
        ..DifyConfig::default()
    };
    let app = DifyApp::start(config).await.unwrap();
    let (_, text, _) = send(&app, "/v1/chat-messages", "app-1", run("streaming"), "").await;
    assert!(text.matches("event: ping\n\n").count() >= 2, "{text}");
    assert_eq!(events(&text).len(), 2);
}

#[tokio::test]
async fn strangers_and_incomplete_bodies_are_refused_in_difys_words() {
    let app = DifyApp::start(DifyConfig { keys: vec!["app-good".into()], ..DifyConfig::default() }).await.unwrap();
    for key in ["", "app-bad", "sk-1"] {
        let (status, text, _) = send(&app, "/v1/parameters", key, None, "").await;
        assert_eq!(status, 401);
        assert_eq!(text, r#"{"code":"unauthorized","message":"Access token is invalid","status":401}"#);
    }
    assert_eq!(send(&app, "/v1/parameters", "app-good", None, "").await.0, 200);
    assert_eq!(send(&app, "/v1/info", "app-good", None, "").await.0, 200);
    let (status, text, _) = send(&app, "/v1/chat-messages", "app-good", Some(json!({"query": "x"})), "").await;
    assert_eq!(status, 400);
    assert_eq!(serde_json::from_str::<Value>(&text).unwrap()["code"], "invalid_param");
}

#[tokio::test]
async fn faults_act_on_runs() {
    let app = DifyApp::start(DifyConfig::default()).await.unwrap();
    let (status, ..) = send(&app, "/v1/chat-messages", "app-1", run("blocking"), "503").await;
    assert_eq!(status, 503);
    let (_, text, clean) = send(&app, "/v1/chat-messages", "app-1", run("streaming"), "cut:3").await;
    assert_eq!((events(&text).len(), clean), (3, false));
    let (_, text, clean) = send(&app, "/v1/chat-messages", "app-1", run("streaming"), "error_event").await;
    assert_eq!((events(&text)[0]["event"].as_str(), clean), (Some("error"), true));
}
