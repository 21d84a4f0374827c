//! What the operator sees: metrics, probes, status, the access log, and a clean end.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use crate::harness::{
    ALICE, Conf, DONE, Gateway, RawNode, WENDY, chat, chat_stream, chunk_event, completion, eventually, fault, node,
    usage_event,
};

const PATH: &str = "/v1/chat/completions";

#[tokio::test]
async fn metrics_are_open_and_have_the_names_of_the_contract() {
    let near = node("qwen").await;
    let gw = Gateway::with(&Conf::serving("qwen", &[near.url()])).await;
    gw.post(PATH).key(ALICE).json(&chat("hi")).send().await.expect(200);
    gw.post(PATH).key(ALICE).json(&chat_stream("hi")).send().await.expect(200);
    gw.settles("tollgate_requests_total", &[("route", "llm"), ("model", "chat"), ("key", "alice")], 2.0).await;

    let answer = gw.admin("GET", "/metrics").send().await.expect(200);
    assert!(answer.header("content-type").starts_with("text/plain"));
    let text = answer.text();
    for name in [
        "tollgate_requests_total",
        "tollgate_request_duration_seconds",
        "tollgate_overhead_seconds",
        "tollgate_time_to_first_token_seconds",
        "tollgate_time_per_output_token_seconds",
        "tollgate_tokens_total",
        "tollgate_attempts_total",
        "tollgate_limit_decisions_total",
        "tollgate_reservations_inflight",
        "tollgate_node_inflight",
        "tollgate_node_up",
        "tollgate_config_generation",
        "tollgate_streams_open",
        "tollgate_build_info",
    ] {
        assert!(text.contains(&format!("# TYPE {name} ")), "{name} is missing");
    }
    for (name, labels) in [
        ("tollgate_request_duration_seconds_count", &[("route", "llm"), ("model", "chat")][..]),
        ("tollgate_time_to_first_token_seconds_count", &[("route", "llm"), ("model", "chat"), ("upstream", "near")]),
        ("tollgate_tokens_total", &[("route", "llm"), ("model", "chat"), ("key", "alice"), ("kind", "input")]),
        (
            "tollgate_limit_decisions_total",
            &[("scope", "key"), ("dimension", "requests_per_minute"), ("decision", "ok")],
        ),
        ("tollgate_node_up", &[("upstream", "near")]),
    ] {
        assert!(gw.metric(name, labels).await > 0.0, "{name}{labels:?}");
    }
    assert_eq!(gw.metric("tollgate_attempts_total", &[("upstream", "near")]).await, 2.0);
}

#[tokio::test]
async fn no_label_and_no_log_ever_comes_from_a_client() {
    let near = node("qwen").await;
    let gw = Gateway::with(&Conf::serving("qwen", &[near.url()])).await;
    let mut body = chat("a private prompt");
    gw.post(PATH).key(ALICE).json(&body).send().await.expect(200);
    body["model"] = "marker-model".into();
    gw.post(PATH).key(ALICE).json(&body).send().await.expect(404);
    let last = gw.get("/marker-path").key("marker-key").header("x-request-id", "the-last").send().await;
    assert_eq!(last.status(), 404);
    gw.logged("the-last").await;
    let metrics = gw.admin("GET", "/metrics").send().await.expect(200).text();
    for marker in ["marker-model", "marker-path", "marker-key", ALICE] {
        assert!(!metrics.contains(marker), "{marker} is in the metrics");
    }
    let output = gw.output();
    for secret in ["a private prompt", "marker-key", ALICE] {
        assert!(!output.contains(secret), "{secret} is in the log");
    }
}

#[tokio::test]
async fn the_probes_answer_without_a_token() {
    let conf = Conf::new().server("admin: { bind: \"127.0.0.1:0\", token: admin-secret }");
    let gw = Gateway::with(&conf).await;
    for path in ["/livez", "/readyz", "/metrics"] {
        gw.admin("GET", path).send().await.expect(200);
    }
}

#[tokio::test]
async fn everything_else_asks_for_the_token_where_one_is_set() {
    let conf = Conf::new().server("admin: { bind: \"127.0.0.1:0\", token: admin-secret }");
    let gw = Gateway::with(&conf).await;
    for path in ["/api/status", "/api/upstreams"] {
        for wrong in [None, Some("wrong"), Some("admin-secre"), Some(""), Some("admin-secret-more")] {
            let mut request = gw.admin("GET", path);
            if let Some(wrong) = wrong {
                request = request.key(wrong);
            }
            let answer = request.send().await;
            assert_eq!(answer.status(), 401, "{path} with {wrong:?}: {}", answer.text());
        }
        gw.admin("GET", path).key("admin-secret").send().await.expect(200);
    }
    assert!(!gw.output().contains("admin-secret"));
    let gw = Gateway::with(&Conf::new()).await;
    gw.admin("GET", "/api/status").send().await.expect(200);
}

#[tokio::test]
async fn the_metrics_can_be_closed_too() {
    let conf = Conf::new().server("admin: { bind: \"127.0.0.1:0\", token: admin-secret, metrics: token }");
    let gw = Gateway::with(&conf).await;
    gw.admin("GET", "/metrics").send().await.expect(401);
    gw.admin("GET", "/metrics").key("admin-secret").send().await.expect(200);
}

#[tokio::test]
async fn the_status_tells_version_generation_and_configuration() {
    let gw = Gateway::with(&Conf::new()).await;
    let status = gw.admin("GET", "/api/status").send().await.expect(200).json();
    assert_eq!(status["version"], env!("CARGO_PKG_VERSION"));
    assert!(status["generation"].as_u64().is_some_and(|generation| generation >= 1), "{status}");
    assert!(status["config_hash"].as_str().is_some_and(|hash| !hash.is_empty()), "{status}");
    assert!(status.as_object().expect("an object").contains_key("last_reload"), "{status}");
}

/// Every place in a document where a string has this value.
fn mentions(value: &Value, text: &str) -> bool {
    match value {
        Value::String(string) => string.contains(text),
        Value::Array(values) => values.iter().any(|value| mentions(value, text)),
        Value::Object(fields) => fields.iter().any(|(name, value)| name.contains(text) || mentions(value, text)),
        Value::Null | Value::Bool(_) | Value::Number(_) => false,
    }
}

#[tokio::test]
async fn the_upstreams_are_listed_with_their_nodes_and_no_secret() {
    let near = node("qwen").await;
    let conf = Conf::serving("qwen", &[near.url()]).upstream(
        "far",
        &["http://127.0.0.1:9"],
        "credentials: [{ env: FAR_KEY }]",
    );
    let gw = Gateway::with_env(&conf, &[("FAR_KEY", "far-credential")]).await;
    let upstreams = gw.admin("GET", "/api/upstreams").send().await.expect(200).json();
    for text in ["near", "far", &near.addr().to_string(), "127.0.0.1:9"] {
        assert!(mentions(&upstreams, text), "{text} is missing in {upstreams}");
    }
    assert!(!mentions(&upstreams, "far-credential"));
}

const FIELDS: [&str; 25] = [
    "ts",
    "request_id",
    "trace_id",
    "key",
    "tier",
    "route",
    "model",
    "upstream",
    "node",
    "attempts",
    "status",
    "code",
    "stream",
    "input_tokens",
    "cached_tokens",
    "output_tokens",
    "usage_source",
    "cost",
    "ttft_ms",
    "duration_ms",
    "overhead_ms",
    "cache",
    "client_ip",
    "bytes_in",
    "bytes_out",
];

#[tokio::test]
async fn a_line_of_the_access_log_has_exactly_the_fields_of_the_contract() {
    let near = RawNode::start().await;
    let gw = Gateway::with(&Conf::serving("qwen", &[near.url()])).await;
    let events = format!("{}{}{DONE}", chunk_event("hello"), usage_event(7, 9));
    let body = chat_stream("hi").to_string();
    let asked = tokio::spawn(gw.post(PATH).key(ALICE).header("x-request-id", "one").json_text(body.clone()).send());
    near.call().await.sse(&events).await;
    let answer = asked.await.expect("a task").expect(200);

    let line = gw.logged("one").await;
    let fields: BTreeSet<&str> = line.as_object().expect("an object").keys().map(String::as_str).collect();
    assert_eq!(fields, BTreeSet::from(FIELDS));
    for (field, value) in [
        ("key", json!("alice")),
        ("tier", json!("free")),
        ("route", json!("llm")),
        ("model", json!("chat")),
        ("upstream", json!("near")),
        ("attempts", json!(1)),
        ("status", json!(200)),
        ("stream", json!(true)),
        ("input_tokens", json!(7)),
        ("output_tokens", json!(9)),
        ("usage_source", json!("upstream")),
        ("client_ip", json!("127.0.0.1")),
        ("bytes_in", json!(body.len())),
        ("bytes_out", json!(answer.body().len())),
    ] {
        assert_eq!(line[field], value, "{field} in {line}");
    }
    assert!(line["node"].as_str().is_some_and(|node| node.contains(&near.addr().to_string())), "{line}");
    assert!(line["ts"].as_str().is_some_and(|ts| ts.starts_with("20") && ts.ends_with('Z')), "{line}");
    for field in ["ttft_ms", "duration_ms", "overhead_ms"] {
        assert!(line[field].as_f64().is_some_and(|ms| (0.0..20_000.0).contains(&ms)), "{field} in {line}");
    }
    assert!(line["ttft_ms"].as_f64() <= line["duration_ms"].as_f64());
}

#[tokio::test]
async fn refusals_are_logged_with_their_code() {
    let near = node("qwen").await;
    let gw = Gateway::with(&Conf::serving("qwen", &[near.url()])).await;
    near.set_fault(Some(fault("400")));
    gw.post(PATH).header("x-request-id", "no-key").json(&chat("hi")).send().await.expect(401);
    gw.post(PATH).key(ALICE).header("x-request-id", "no-json").json_text("{").send().await.expect(400);
    gw.get("/nowhere").header("x-request-id", "no-path").send().await.expect(404);
    gw.post(PATH).key(ALICE).header("x-request-id", "their-400").json(&chat("hi")).send().await.expect(400);
    for (id, status, code) in [
        ("no-key", 401, json!("missing_api_key")),
        ("no-json", 400, json!("invalid_json")),
        ("no-path", 404, json!("not_found")),
    ] {
        let line = gw.logged(id).await;
        assert_eq!((&line["status"], &line["code"]), (&json!(status), &code), "{line}");
        let fields: BTreeSet<&str> = line.as_object().expect("an object").keys().map(String::as_str).collect();
        assert_eq!(fields, BTreeSet::from(FIELDS), "{id}");
    }
    let line = gw.logged("their-400").await;
    assert_eq!((&line["status"], &line["attempts"]), (&json!(400), &json!(1)));
    gw.settles("tollgate_requests_total", &[("code", "401")], 1.0).await;
}

#[tokio::test]
async fn every_request_is_logged_once() {
    let near = node("qwen").await;
    let gw = Gateway::with(&Conf::serving("qwen", &[near.url()])).await;
    for turn in 0..20 {
        let body = if turn % 2 == 0 { chat("hi") } else { chat_stream("hi") };
        gw.post(PATH).key(WENDY).header("x-request-id", &format!("turn-{turn}")).json(&body).send().await.expect(200);
    }
    eventually("20 lines", || async { gw.access_log().len() >= 20 }).await;
    gw.get("/nowhere").header("x-request-id", "last").send().await;
    gw.logged("last").await;
    let ids: Vec<String> = gw.access_log().iter().map(|line| line["request_id"].to_string()).collect();
    assert_eq!(ids.iter().collect::<BTreeSet<_>>().len(), ids.len(), "a request was logged twice: {ids:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sigterm_finishes_streams_and_then_ends_with_0() {
    let near = RawNode::start().await;
    let mut gw = Gateway::with(&Conf::serving("qwen", &[near.url()]).server("drain: 15s")).await;
    let mut idle = gw.wire().await;
    idle.send(gw.get("/health")).await.expect(200);
    let asked =
        tokio::spawn(gw.post(PATH).key(ALICE).header("x-request-id", "drained").json(&chat_stream("hi")).open());
    let mut call = near.call().await;
    call.stream_head().await;
    call.chunk(chunk_event("one")).await;
    let mut reply = asked.await.expect("a task");
    assert!(reply.event().await.is_some());

    gw.terminate();
    let addr = gw.addr();
    eventually("the gateway to stop accepting", || async { tokio::net::TcpStream::connect(addr).await.is_err() }).await;
    assert!(gw.runs(), "it waits for the stream");
    call.chunk(chunk_event("two")).await;
    call.chunk(usage_event(3, 2)).await;
    call.chunk(DONE).await;
    call.last_chunk().await;
    assert_eq!(reply.event().await.and_then(|event| event.delta()).as_deref(), Some("two"));
    assert_eq!(reply.event().await.expect("the end").data, "[DONE]");
    assert_eq!(reply.event().await, None);
    assert!(reply.clean());
    assert_eq!(gw.exit().await.code(), Some(0));
    let line = gw.logged("drained").await;
    assert_eq!((&line["status"], &line["output_tokens"]), (&json!(200), &json!(2)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sigterm_without_work_ends_at_once() {
    let mut gw = Gateway::with(&Conf::new().server("drain: 15s")).await;
    gw.get("/health").send().await.expect(200);
    let started = std::time::Instant::now();
    gw.terminate();
    assert_eq!(gw.exit().await.code(), Some(0));
    assert!(started.elapsed() < std::time::Duration::from_secs(10), "took {:?}", started.elapsed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_longer_than_the_drain_is_ended_and_settled() {
    let near = RawNode::start().await;
    let mut gw = Gateway::with(&Conf::serving("qwen", &[near.url()])).await;
    let asked = tokio::spawn(gw.post(PATH).key(ALICE).header("x-request-id", "cut").json(&chat_stream("hi")).open());
    let mut call = near.call().await;
    call.stream_head().await;
    call.chunk(chunk_event("one")).await;
    let reply = asked.await.expect("a task");
    gw.terminate();
    let answer = reply.whole().await;
    assert!(!answer.clean(), "{}", answer.text());
    assert!(answer.events().iter().all(|event| event.data != "[DONE]"));
    assert_eq!(gw.exit().await.code(), Some(0));
    assert_eq!(gw.logged("cut").await["key"], "alice", "what was cut is logged, so it is settled");
}

/// The caller is told of a plain answer's tokens by metrics as well.
#[tokio::test]
async fn a_price_becomes_a_cost() {
    let near = RawNode::start().await;
    let conf = Conf::new()
        .upstream("near", &[near.url()], "")
        .model("chat", &[("near", "qwen")], "price: { input: 2.0, output: 8.0, currency: USD, per: 1_000_000 }")
        .llm();
    let gw = Gateway::with(&conf).await;
    let asked = tokio::spawn(gw.post(PATH).key(ALICE).header("x-request-id", "paid").json(&chat("hi")).send());
    near.call().await.json("200 OK", &completion("hello", 1000, 500)).await;
    asked.await.expect("a task").expect(200);
    let line = gw.logged("paid").await;
    assert!(line["cost"].as_f64().is_some_and(|cost| (cost - 0.006).abs() < 1e-9), "{line}");
    gw.settles("tollgate_cost_total", &[("model", "chat"), ("key", "alice"), ("currency", "USD")], 0.006).await;
}
