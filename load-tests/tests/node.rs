//! The simulated node, driven over loopback.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, clippy::print_stdout)]

use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde_json::{Value, json};
use tollgate_load::load::{self, Arrival, LoadConfig};
use tollgate_load::node::{Ending, Fault, Node, NodeConfig, Recorded};

type Http = Client<HttpConnector, Full<Bytes>>;

fn client() -> Http {
    Client::builder(TokioExecutor::new()).retry_canceled_requests(false).build_http()
}

fn client_h2() -> Http {
    Client::builder(TokioExecutor::new()).http2_only(true).build_http()
}

async fn send(http: &Http, node: &Node, path: &str, body: &Value) -> Result<Response<Incoming>, String> {
    send_with(http, node, path, body, "").await
}

async fn send_with(
    http: &Http,
    node: &Node,
    path: &str,
    body: &Value,
    fault: &str,
) -> Result<Response<Incoming>, String> {
    let mut request = Request::builder().method(Method::POST).uri(format!("{}{path}", node.url()));
    if !fault.is_empty() {
        request = request.header("x-sim-fault", fault);
    }
    let request = request.body(Full::from(body.to_string())).unwrap();
    http.request(request).await.map_err(|error| format!("{error:?}"))
}

async fn post(node: &Node, path: &str, body: &Value, fault: &str) -> (StatusCode, Value) {
    let response = send_with(&client(), node, path, body, fault).await.unwrap();
    let status = response.status();
    let bytes = response.into_body().collect().await.unwrap().to_bytes();
    (status, serde_json::from_slice(&bytes).unwrap_or_else(|_| panic!("not JSON: {bytes:?}")))
}

async fn get(node: &Node, path: &str) -> (StatusCode, String) {
    let response = client().get(format!("{}{path}", node.url()).parse().unwrap()).await.unwrap();
    let status = response.status();
    (status, String::from_utf8(response.into_body().collect().await.unwrap().to_bytes().to_vec()).unwrap())
}

fn chat(text: &str) -> Value {
    json!({"model": "sim", "messages": [{"role": "user", "content": text}]})
}

fn with(mut body: Value, more: Value) -> Value {
    for (name, value) in more.as_object().unwrap() {
        body[name] = value.clone();
    }
    body
}

/// What is left of a stream: its text so far and whether it ended cleanly.
async fn drain(mut body: Incoming) -> (String, bool) {
    let mut text = Vec::new();
    let clean = loop {
        match body.frame().await {
            None => break true,
            Some(Err(_)) => break false,
            Some(Ok(frame)) => text.extend_from_slice(&frame.into_data().unwrap()),
        }
    };
    (String::from_utf8(text).unwrap(), clean)
}

async fn stream(node: &Node, body: &Value, fault: &str) -> (String, bool) {
    let body = with(body.clone(), json!({"stream": true}));
    let path = if body.get("prompt").is_some() { "/v1/completions" } else { "/v1/chat/completions" };
    let response = send_with(&client(), node, path, &body, fault).await.unwrap();
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers()["content-type"], "text/event-stream; charset=utf-8");
    drain(response.into_body()).await
}

/// The JSON events of a stream that ends in `[DONE]`.
fn events(text: &str) -> Vec<Value> {
    let text = text.strip_suffix("data: [DONE]\n\n").unwrap_or_else(|| panic!("no [DONE]: {text}"));
    text.split_terminator("\n\n")
        .map(|event| serde_json::from_str(event.strip_prefix("data: ").unwrap()).unwrap())
        .collect()
}

fn content(events: &[Value]) -> String {
    events.iter().filter_map(|event| event["choices"][0]["delta"]["content"].as_str()).collect()
}

async fn instant() -> Node {
    Node::start(NodeConfig::instant()).await.unwrap()
}

async fn eventually<T>(mut look: impl FnMut() -> Option<T>) -> T {
    let limit = Instant::now() + Duration::from_secs(5);
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < limit, "did not happen within 5 s");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

async fn only_request_ended(node: &Node) -> Recorded {
    eventually(|| node.requests().pop().filter(|row| row.ended.is_some())).await
}

#[tokio::test]
async fn a_plain_answer_has_openais_shape_and_depends_on_the_prompt_alone() {
    let (node, other) = (instant().await, instant().await);
    let (status, first) = post(&node, "/v1/chat/completions", &chat("hello"), "").await;
    assert_eq!(status, 200);
    assert_eq!(first["object"], "chat.completion");
    assert!(first["id"].as_str().unwrap().starts_with("chatcmpl-"));
    assert_eq!(first["system_fingerprint"], "sim-node");
    assert_eq!(first["choices"][0]["finish_reason"], "stop");
    assert_eq!(first["usage"]["completion_tokens"], 32);
    let prompt = first["usage"]["prompt_tokens"].as_u64().unwrap();
    assert_eq!(prompt, "user\nhello\nassistant\n".len().div_ceil(4) as u64);
    assert_eq!(first["usage"]["total_tokens"], prompt + 32);
    assert_eq!(first["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
    let (_, second) = post(&other, "/v1/chat/completions", &chat("hello"), "").await;
    assert_eq!(first["choices"], second["choices"]);
    assert_ne!(first["id"], second["id"]);
    let (_, third) = post(&other, "/v1/chat/completions", &chat("goodbye"), "").await;
    assert_ne!(first["choices"], third["choices"]);
}

#[tokio::test]
async fn max_tokens_stop_and_n_are_honoured() {
    let node = instant().await;
    let path = "/v1/chat/completions";
    let (_, short) = post(&node, path, &with(chat("a"), json!({"max_tokens": 5, "n": 2})), "").await;
    assert_eq!(short["choices"][0]["finish_reason"], "length");
    assert_eq!(short["choices"][1]["index"], 1);
    assert_ne!(short["choices"][0]["message"], short["choices"][1]["message"]);
    assert_eq!(short["usage"]["completion_tokens"], 10);
    let (_, long) = post(&node, path, &with(chat("a"), json!({"max_completion_tokens": 60})), "").await;
    assert_eq!(long["usage"]["completion_tokens"], 60);
    let text = long["choices"][0]["message"]["content"].as_str().unwrap();
    let stop: String = text.split(' ').nth(5).unwrap().to_owned();
    let (_, stopped) = post(&node, path, &with(chat("a"), json!({"max_tokens": 60, "stop": [stop]})), "").await;
    assert_eq!(stopped["choices"][0]["finish_reason"], "stop");
    assert_eq!(stopped["choices"][0]["message"]["content"], text[..text.find(&stop).unwrap()]);
}

#[tokio::test]
async fn a_stream_opens_with_the_role_and_ends_with_the_reason() {
    let node = instant().await;
    let (text, clean) = stream(&node, &with(chat("hi"), json!({"max_tokens": 7})), "").await;
    assert!(clean);
    let events = events(&text);
    assert_eq!(events.len(), 1 + 7 + 1);
    assert_eq!(events[0]["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
    assert_eq!(events[8]["choices"][0]["delta"], json!({}));
    assert_eq!(events[8]["choices"][0]["finish_reason"], "length");
    assert!(events.iter().all(|event| event["object"] == "chat.completion.chunk" && event["id"] == events[0]["id"]));
    assert!(events.iter().all(|event| event.get("usage").is_none()), "usage was not asked for");
    let (_, plain) = post(&node, "/v1/chat/completions", &with(chat("hi"), json!({"max_tokens": 7})), "").await;
    assert_eq!(content(&events), plain["choices"][0]["message"]["content"].as_str().unwrap());
    let row = &node.requests()[0];
    assert_eq!((row.output_tokens, row.ended.unwrap().1), (7, Ending::Complete));
}

#[tokio::test]
async fn usage_in_a_stream_is_null_in_every_chunk_and_given_in_one_more() {
    let node = instant().await;
    let asked = json!({"max_tokens": 3, "stream_options": {"include_usage": true}});
    let (text, _) = stream(&node, &with(chat("hi"), asked), "").await;
    let list = events(&text);
    let (last, rest) = list.split_last().unwrap();
    assert_eq!(rest.len(), 5);
    assert!(rest.iter().all(|event| event.get("usage") == Some(&Value::Null)));
    assert_eq!(last["choices"], json!([]));
    assert_eq!(last["usage"]["completion_tokens"], 3);

    let asked = json!({"max_tokens": 3, "stream_options": {"include_usage": true, "continuous_usage_stats": true}});
    let (text, _) = stream(&node, &with(chat("hi"), asked), "").await;
    let made: Vec<_> =
        events(&text).iter().map(|event| event["usage"]["completion_tokens"].as_u64().unwrap()).collect();
    assert_eq!(made, [0, 1, 2, 3, 3, 3]);
}

#[tokio::test]
async fn text_completions_stream_and_answer() {
    let node = instant().await;
    let body = json!({"model": "sim", "prompt": "once", "max_tokens": 4});
    let (_, plain) = post(&node, "/v1/completions", &body, "").await;
    assert_eq!(plain["object"], "text_completion");
    let (text, _) = stream(&node, &body, "").await;
    let events = events(&text);
    assert_eq!(events.len(), 5);
    let joined: String = events.iter().map(|event| event["choices"][0]["text"].as_str().unwrap()).collect();
    assert_eq!(joined, plain["choices"][0]["text"].as_str().unwrap());
    assert_eq!(events[4]["choices"][0]["finish_reason"], "length");
}

#[tokio::test]
async fn a_tool_is_called_when_the_user_spoke_last() {
    let node = instant().await;
    let tools = json!({"tools": [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object",
        "properties": {"city": {"type": "string"}, "unit": {"enum": ["C", "F"]}, "days": {"type": "integer"}}}}}]});
    let (_, plain) = post(&node, "/v1/chat/completions", &with(chat("rain?"), tools.clone()), "").await;
    let choice = &plain["choices"][0];
    assert_eq!(choice["finish_reason"], "tool_calls");
    let call = &choice["message"]["tool_calls"][0];
    assert_eq!((&call["function"]["name"], &call["type"]), (&json!("weather"), &json!("function")));
    let arguments: Value = serde_json::from_str(call["function"]["arguments"].as_str().unwrap()).unwrap();
    assert_eq!(arguments["unit"], "C");
    assert!(arguments["days"].is_u64() && arguments["city"].is_string());

    let (text, _) = stream(&node, &with(chat("rain?"), tools.clone()), "").await;
    let events = events(&text);
    let deltas: Vec<&Value> = events.iter().map(|event| &event["choices"][0]["delta"]["tool_calls"][0]).collect();
    assert_eq!(deltas[1]["function"]["name"], "weather");
    assert!(deltas[1]["id"].as_str().unwrap().starts_with("call_"));
    let joined: String = deltas.iter().filter_map(|delta| delta["function"]["arguments"].as_str()).collect();
    assert_eq!(serde_json::from_str::<Value>(&joined).unwrap(), arguments);

    let none = with(with(chat("rain?"), tools.clone()), json!({"tool_choice": "none"}));
    assert_eq!(post(&node, "/v1/chat/completions", &none, "").await.1["choices"][0]["finish_reason"], "stop");
    let mut answered = with(chat("rain?"), tools);
    answered["messages"].as_array_mut().unwrap().push(json!({"role": "tool", "content": "sun", "tool_call_id": "x"}));
    assert_eq!(post(&node, "/v1/chat/completions", &answered, "").await.1["choices"][0]["finish_reason"], "stop");
}

#[tokio::test]
async fn embeddings_come_as_floats_and_as_base64() {
    let node = instant().await;
    let body = json!({"model": "sim", "input": ["a", "bb"], "dimensions": 8});
    let (_, floats) = post(&node, "/v1/embeddings", &body, "").await;
    assert_eq!(floats["data"][1]["embedding"].as_array().unwrap().len(), 8);
    assert_eq!(floats["usage"], json!({"prompt_tokens": 2, "total_tokens": 2}));
    let (_, coded) = post(&node, "/v1/embeddings", &with(body, json!({"encoding_format": "base64"})), "").await;
    assert_eq!(coded["data"][0]["embedding"].as_str().unwrap().len(), 44, "8 floats of 4 bytes");
}

#[tokio::test]
async fn reranking_orders_documents() {
    let node = instant().await;
    let body = json!({"model": "sim", "query": "red fox", "documents": ["a blue bird", "the red fox"], "top_n": 1});
    let (status, answer) = post(&node, "/v1/rerank", &body, "").await;
    assert_eq!(status, 200);
    assert_eq!(answer["results"].as_array().unwrap().len(), 1);
    assert_eq!(answer["results"][0]["index"], 1);
}

#[tokio::test]
async fn models_health_and_metrics_answer() {
    let node = instant().await;
    post(&node, "/v1/chat/completions", &with(chat("hi"), json!({"max_tokens": 4})), "").await;
    let models: Value = serde_json::from_str(&get(&node, "/v1/models").await.1).unwrap();
    assert_eq!(models["data"][0]["id"], "sim");
    assert_eq!(get(&node, "/v1/models/none").await.0, 404);
    assert_eq!(get(&node, "/health").await.0, 200);
    let (_, metrics) = get(&node, "/metrics").await;
    for line in [
        "vllm:num_requests_running{engine=\"0\",model_name=\"sim\"} 0.0",
        "vllm:num_requests_waiting{engine=\"0\",model_name=\"sim\"} 0.0",
        "vllm:kv_cache_usage_perc{engine=\"0\",model_name=\"sim\"} 0.0",
        "vllm:gpu_cache_usage_perc{engine=\"0\",model_name=\"sim\"} 0.0",
        "vllm:prompt_tokens_total{engine=\"0\",model_name=\"sim\"} 5.0",
        "vllm:generation_tokens_total{engine=\"0\",model_name=\"sim\"} 4.0",
        "vllm:request_success_total{finished_reason=\"length\",engine=\"0\",model_name=\"sim\"} 1.0",
    ] {
        assert!(metrics.lines().any(|have| have == line), "{line} not in\n{metrics}");
    }
    assert!(metrics.contains("vllm:cache_config_info{block_size=\"16\""));
}

#[tokio::test]
async fn bad_requests_are_refused_in_openais_shape() {
    let node = instant().await;
    let path = "/v1/chat/completions";
    let (status, error) = post(&node, path, &with(chat("x"), json!({"model": "gpt-9"})), "").await;
    assert_eq!((status.as_u16(), &error["error"]["code"]), (404, &json!("model_not_found")));
    for (body, param) in [
        (json!({"model": "sim"}), json!("messages")),
        (with(chat("x"), json!({"n": 0})), json!("n")),
        (with(chat("x"), json!({"max_tokens": 0})), json!("max_tokens")),
        (with(chat("x"), json!({"stream_options": {"include_usage": true}})), json!("stream_options")),
        (with(chat("x"), json!({"stream": "yes"})), Value::Null),
    ] {
        let (status, error) = post(&node, path, &body, "").await;
        assert_eq!((status.as_u16(), &error["error"]["param"]), (400, &param), "{body}: {error}");
    }
    assert_eq!(post(&node, "/v1/nothing", &chat("x"), "").await.0, 404);
    assert_eq!(post(&node, path, &chat("x"), "no_such_fault").await.0, 400, "a wrong fault is said, not ignored");
}

#[tokio::test]
async fn the_prefix_cache_counts_what_it_held() {
    let node = instant().await;
    let long = "one two three four five six seven eight ".repeat(40);
    let path = "/v1/chat/completions";
    let (_, first) = post(&node, path, &chat(&long), "").await;
    assert_eq!(first["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
    let prompt = first["usage"]["prompt_tokens"].as_u64().unwrap();
    let (_, again) = post(&node, path, &chat(&long), "").await;
    let cached = again["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap();
    assert_eq!(cached, prompt / 16 * 16);
    let mut turn = chat(&long);
    let answer = &again["choices"][0]["message"];
    turn["messages"].as_array_mut().unwrap().extend([answer.clone(), json!({"role": "user", "content": "and then?"})]);
    let (_, next) = post(&node, path, &turn, "").await;
    let more = next["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap();
    assert!(more > cached, "the next turn finds the answer's blocks too: {more} > {cached}");
    let stats = node.stats();
    assert_eq!(stats.prefix_cache_hits, cached + more);
    assert_eq!(stats.prefix_cache_queries, 2 * prompt + next["usage"]["prompt_tokens"].as_u64().unwrap());
    assert_eq!(node.requests()[1].cached_tokens, cached);
}

#[tokio::test]
async fn one_request_runs_one_waits_and_a_third_is_refused() {
    let config = NodeConfig { max_running: 1, queue: 1, decode: Duration::from_secs(60), ..NodeConfig::default() };
    let node = Node::start(config).await.unwrap();
    let http = client();
    let body = with(chat("x"), json!({"stream": true}));
    let first = send(&http, &node, "/v1/chat/completions", &body).await.unwrap();
    let second = send(&http, &node, "/v1/chat/completions", &body).await.unwrap();
    let stats = node.stats();
    assert_eq!((stats.running, stats.waiting), (1, 1));
    let third = send(&http, &node, "/v1/chat/completions", &body).await.unwrap();
    assert_eq!(third.status(), 503);
    drop(first);
    eventually(|| (node.stats().waiting == 0).then_some(())).await;
    assert_eq!(node.stats().running, 1, "the one that waited runs");
    drop(second);
    eventually(|| (node.stats().running == 0).then_some(())).await;
}

#[tokio::test]
async fn decoding_takes_the_time_it_is_told() {
    let config = NodeConfig { decode: Duration::from_millis(4), ..NodeConfig::instant() };
    let node = Node::start(config).await.unwrap();
    let started = Instant::now();
    stream(&node, &with(chat("x"), json!({"max_tokens": 25})), "").await;
    let took = started.elapsed();
    assert!(took >= Duration::from_millis(100), "{took:?}");
    let config = NodeConfig { prefill_tokens_per_second: 1000.0, ..NodeConfig::instant() };
    let node = Node::start(config).await.unwrap();
    let started = Instant::now();
    post(&node, "/v1/chat/completions", &chat(&"x".repeat(400)), "").await;
    let took = started.elapsed();
    assert!(took >= Duration::from_millis(100), "{took:?}");
}

#[tokio::test]
async fn abandonment_is_noticed_within_100_ms_over_both_protocols() {
    for (http, tokens) in [(client(), 1), (client_h2(), 1), (client(), 0), (client_h2(), 0)] {
        let config = NodeConfig { decode: Duration::from_secs(60), ..NodeConfig::default() };
        let node = Node::start(config).await.unwrap();
        // With a token: a stream that is open. Without: a plain answer still awaited.
        let body = with(chat("x"), json!({"stream": tokens == 1}));
        let gone = if tokens == 1 {
            let mut response = send(&http, &node, "/v1/chat/completions", &body).await.unwrap();
            response.body_mut().frame().await.unwrap().unwrap();
            drop(response);
            Instant::now()
        } else {
            let wait = Duration::from_millis(100);
            let sent = tokio::time::timeout(wait, send(&http, &node, "/v1/chat/completions", &body)).await;
            assert!(sent.is_err(), "no answer yet");
            Instant::now()
        };
        let row = only_request_ended(&node).await;
        let (ended, ending) = row.ended.unwrap();
        assert_eq!(ending, Ending::Abandoned);
        assert!(ended.saturating_duration_since(gone) < Duration::from_millis(100));
        assert_eq!(node.stats().running, 0);
    }
}

#[tokio::test]
async fn nothing_is_left_of_200_streams_of_which_half_are_dropped() {
    let node = Node::start(NodeConfig { max_running: 150, ..NodeConfig::default() }).await.unwrap();
    let report = load::run(LoadConfig {
        url: node.url(),
        arrival: Arrival::Closed { callers: 200 },
        requests: Some(400),
        stream: true,
        max_tokens: Some(20),
        abandon: 0.5,
        ..LoadConfig::default()
    })
    .await
    .unwrap();
    assert_eq!(report.ok + report.abandoned, 400, "{:?}", report.errors);
    eventually(|| node.requests().iter().all(|row| row.ended.is_some()).then_some(())).await;
    let stats = node.stats();
    assert_eq!((stats.running, stats.waiting, stats.kv_usage), (0, 0, 0.0));
    let abandoned = node.requests().iter().filter(|row| row.abandoned()).count() as u64;
    assert!(abandoned <= report.abandoned && abandoned > 0, "{abandoned} of {}", report.abandoned);
}

#[tokio::test]
async fn an_upload_broken_off_counts_as_abandoned() {
    use tokio::io::AsyncWriteExt;
    let node = instant().await;
    let mut raw = tokio::net::TcpStream::connect(node.addr()).await.unwrap();
    raw.write_all(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{\"mod").await.unwrap();
    eventually(|| node.requests().pop().filter(|row| row.body_len == 5)).await;
    drop(raw);
    let row = only_request_ended(&node).await;
    assert!(row.abandoned() && row.body.is_none() && row.body_sha256.is_empty());
}

#[tokio::test]
async fn connections_are_counted_and_kept_alive() {
    let node = instant().await;
    let http = client();
    for _ in 0..3 {
        let response = send(&http, &node, "/v1/chat/completions", &chat("x")).await.unwrap();
        response.into_body().collect().await.unwrap();
    }
    let stats = node.stats();
    assert_eq!((stats.total_connections, stats.open_connections, stats.total_requests), (1, 1, 3));
    assert!(node.requests().iter().all(|row| row.connection == 1 && !row.http2));
    drop(http);
    eventually(|| (node.stats().open_connections == 0).then_some(())).await;
}

#[tokio::test]
async fn bodies_are_hashed_and_small_ones_kept() {
    let node = Node::start(NodeConfig { record_bodies: 1000, ..NodeConfig::instant() }).await.unwrap();
    let http = client_h2();
    for text in ["small".to_owned(), "large".repeat(1_000_000)] {
        let response = send(&http, &node, "/v1/chat/completions", &chat(&text)).await.unwrap();
        assert_eq!(response.status(), 200);
        response.into_body().collect().await.unwrap();
    }
    let rows = node.requests();
    assert!(rows[0].http2);
    assert_eq!(rows[0].body.as_deref(), Some(chat("small").to_string().as_bytes()));
    assert_eq!(rows[1].body, None);
    assert_eq!(rows[1].body_len, chat(&"large".repeat(1_000_000)).to_string().len() as u64);
    assert_eq!(rows[1].body_sha256.len(), 64);
}

#[tokio::test]
async fn a_stopped_node_can_come_back_on_its_address() {
    let node = instant().await;
    let addr = node.addr();
    let http = client();
    send(&http, &node, "/v1/chat/completions", &chat("x")).await.unwrap().into_body().collect().await.unwrap();
    node.stop().await;
    assert!(tokio::net::TcpStream::connect(addr).await.is_err(), "nobody listens");
    let node = Node::start(NodeConfig { bind: addr, ..NodeConfig::instant() }).await.unwrap();
    assert_eq!(node.addr(), addr);
    assert_eq!(get(&node, "/health").await.0, 200);
}

#[tokio::test]
async fn statuses_are_answered_by_header_by_model_and_by_node() {
    let node = instant().await;
    let path = "/v1/chat/completions";
    for status in [400, 401, 429, 500, 503] {
        let (got, error) = post(&node, path, &chat("x"), &status.to_string()).await;
        assert_eq!(got.as_u16(), status);
        assert!(error["error"]["message"].is_string() && error["error"].get("code").is_some());
    }
    let body = with(chat("x"), json!({"model": "sim+429:retry-after=2"}));
    let response = send(&client(), &node, path, &body).await.unwrap();
    assert_eq!((response.status().as_u16(), response.headers()["retry-after"].to_str().unwrap()), (429, "2"));
    let (status, error) = post(&node, path, &chat("x"), "context_length").await;
    assert_eq!((status.as_u16(), &error["error"]["code"]), (400, &json!("context_length_exceeded")));
    node.set_fault(Some(Fault::Status(503, None)));
    assert_eq!(post(&node, path, &chat("x"), "").await.0, 503);
    assert_eq!(get(&node, "/health").await.0, 200);
    node.set_fault(None);
    assert_eq!(post(&node, path, &chat("x"), "").await.0, 200);
}

#[tokio::test]
async fn refuse_closes_the_connection_without_an_answer() {
    let node = instant().await;
    let error = send_with(&client(), &node, "/v1/chat/completions", &chat("x"), "refuse").await.unwrap_err();
    assert!(error.contains("IncompleteMessage") || error.contains("Connection reset"), "{error}");
    assert_eq!(only_request_ended(&node).await.ended.unwrap().1, Ending::Broken);
    assert!(send_with(&client_h2(), &node, "/v1/chat/completions", &chat("x"), "refuse").await.is_err());
}

#[tokio::test]
async fn cut_breaks_the_stream_after_so_many_tokens() {
    let node = instant().await;
    for (after, chunks) in [(0, 1), (3, 4)] {
        let (text, clean) = stream(&node, &chat("x"), &format!("cut:{after}")).await;
        assert!(!clean);
        assert_eq!(text.matches("data: ").count(), chunks);
        assert!(!text.contains("[DONE]"));
    }
    assert_eq!(node.requests()[1].output_tokens, 3);
    let response = send_with(&client(), &node, "/v1/chat/completions", &chat("x"), "cut:0").await.unwrap();
    assert_eq!(response.status(), 200);
    assert!(response.into_body().collect().await.is_err());
}

#[tokio::test]
async fn stall_goes_silent_and_notices_when_the_peer_leaves() {
    let node = instant().await;
    let body = with(chat("x"), json!({"stream": true}));
    let mut response = send_with(&client(), &node, "/v1/chat/completions", &body, "stall:2").await.unwrap();
    let mut text = String::new();
    let silent = tokio::time::timeout(Duration::from_millis(200), async {
        while let Some(frame) = response.body_mut().frame().await {
            text.push_str(std::str::from_utf8(frame.unwrap().data_ref().unwrap()).unwrap());
        }
    });
    assert!(silent.await.is_err());
    assert_eq!(text.matches("data: ").count(), 3);
    drop(response);
    assert!(only_request_ended(&node).await.abandoned());
}

#[tokio::test]
async fn slow_headers_and_slow_tokens_come_late() {
    let node = instant().await;
    let body = with(chat("x"), json!({"stream": true}));
    let started = Instant::now();
    send_with(&client(), &node, "/v1/chat/completions", &body, "slow_header:120").await.unwrap();
    assert!(started.elapsed() >= Duration::from_millis(120));
    let started = Instant::now();
    let mut response = send_with(&client(), &node, "/v1/chat/completions", &body, "slow_token:300").await.unwrap();
    let first = response.body_mut().frame().await.unwrap().unwrap();
    assert!(started.elapsed() < Duration::from_millis(300), "header and role chunk come at once");
    assert!(String::from_utf8_lossy(first.data_ref().unwrap()).contains("assistant"));
    response.body_mut().frame().await.unwrap().unwrap();
    assert!(started.elapsed() >= Duration::from_millis(300));
}

#[tokio::test]
async fn usage_can_be_missing_or_zero() {
    let node = instant().await;
    let asked = with(chat("x"), json!({"max_tokens": 2, "stream_options": {"include_usage": true}}));
    let (text, _) = stream(&node, &asked, "no_usage").await;
    assert!(!text.contains("usage"));
    assert_eq!(events(&text).len(), 4);
    let (text, _) = stream(&node, &asked, "usage_zero").await;
    assert_eq!(events(&text).last().unwrap()["usage"]["total_tokens"], 0);
    let (_, plain) = post(&node, "/v1/chat/completions", &chat("x"), "no_usage").await;
    assert!(plain.get("usage").is_none());
}

#[tokio::test]
async fn broken_first_events_and_error_bodies() {
    let node = instant().await;
    let (text, _) = stream(&node, &chat("x"), "malformed").await;
    let first = text.split("\n\n").next().unwrap().strip_prefix("data: ").unwrap();
    assert!(serde_json::from_str::<Value>(first).is_err());
    let (text, clean) = stream(&node, &chat("x"), "error_event").await;
    assert!(clean);
    let events = events(&text);
    assert_eq!(events.len(), 1);
    assert!(events[0]["error"]["message"].is_string());
    let (status, body) = post(&node, "/v1/chat/completions", &chat("x"), "error_body").await;
    assert_eq!(status, 200);
    assert!(body["error"]["message"].is_string());
    let (status, body) = post(&node, "/v1/chat/completions", &chat("x"), "error_event").await;
    assert!(status == 200 && body["error"]["message"].is_string());
    let (text, clean) = stream(&node, &chat("x"), "empty").await;
    assert!(clean);
    assert_eq!(text.matches("data: ").count(), 1);
}

#[tokio::test]
async fn line_ends_and_comments_change_the_framing_only() {
    let node = instant().await;
    let body = with(chat("x"), json!({"max_tokens": 3}));
    let shape = |text: &str| events(text).iter().map(|event| event["choices"].clone()).collect::<Vec<_>>();
    let plain = shape(&stream(&node, &body, "").await.0);
    let (crlf, _) = stream(&node, &body, "crlf").await;
    assert!(crlf.ends_with("data: [DONE]\r\n\r\n") && !crlf.replace("\r\n", "").contains('\n'));
    assert_eq!(shape(&crlf.replace("\r\n", "\n")), plain);
    let (comments, _) = stream(&node, &body, "comments").await;
    assert_eq!(comments.matches(": ping\n\n").count(), 6);
    assert_eq!(shape(&comments.replace(": ping\n\n", "")), plain);
}
