//! Faults of upstreams, seen from both ends: what the client got and when, and each attempt that the nodes saw with its
//! time. Each ends in the full answer or, where none can exist, in one clean error.

mod books;
mod broken;
mod circuit;
mod failing;
mod leaving;
mod limited;
mod refused;
mod storm;

use std::time::{Duration, Instant};

use serde_json::Value;
use tollgate_load::node::{Ending, Node, Recorded};

use crate::harness::{Answer, Conf, Gateway, WENDY, chat, chat_stream, eventually, fault};

pub(crate) const PATH: &str = "/v1/chat/completions";

/// How much later than it should anything may happen here: the machine may be busy.
const SLACK: Duration = Duration::from_millis(900);

/// Short deadlines, and no node is ever taken out.
const QUICK: &str = "timeouts: { connect: 1s, first_byte: 400ms, first_token: 400ms, between_tokens: 400ms, total: 700ms }, \
                     eject: off";
/// Long deadlines, for tests that wait.
const CALM: &str = "eject: off";
/// Three attempts, soon after each other.
const RETRY: &str = "retry: { attempts: 3, backoff: 1ms }";

const fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

/// The call as a stream and as a plain one.
fn both() -> [Value; 2] {
    [chat_stream("hi"), chat("hi")]
}

fn is_stream(body: &Value) -> bool {
    body["stream"] == true
}

/// Model `chat` by one upstream `near` over these nodes, three attempts.
async fn gateway(nodes: &[&Node], more: &str) -> Gateway {
    let urls: Vec<String> = nodes.iter().map(|node| node.url()).collect();
    let more = format!("balance: round_robin, {more}");
    Gateway::with(&Conf::new().upstream("near", &urls, &more).model("chat", &[("near", "qwen")], RETRY).llm()).await
}

async fn ask(gw: &Gateway, body: &Value) -> Answer {
    gw.post(PATH).key(WENDY).json(body).send().await
}

/// The whole answer of a simulated node to a call of [`both`] came, once.
#[track_caller]
fn is_whole(answer: &Answer, body: &Value) {
    assert_eq!(answer.status(), 200, "{}", answer.text());
    assert!(answer.clean(), "{}", answer.text());
    let most = body["max_tokens"].as_u64().expect("a bound");
    if !is_stream(body) {
        let json = answer.json();
        assert!(json["choices"][0]["message"]["content"].is_string(), "{json}");
        assert_eq!(json["usage"]["completion_tokens"], most, "{json}");
        return;
    }
    let events = answer.events();
    assert_eq!(events.iter().filter(|event| event.delta().is_some()).count() as u64, most, "{}", answer.text());
    assert_eq!(events.iter().filter(|event| event.data == "[DONE]").count(), 1);
    assert_eq!(events.last().expect("events").data, "[DONE]");
    let chunks: Vec<Value> = events.iter().filter(|event| event.data != "[DONE]").map(|event| event.json()).collect();
    assert!(chunks.iter().all(|chunk| chunk["error"].is_null()), "{}", answer.text());
    assert!(chunks.iter().all(|chunk| chunk["id"] == chunks[0]["id"]), "one answer has one id: {}", answer.text());
    let roles = chunks.iter().filter(|chunk| chunk["choices"][0]["delta"]["role"].is_string()).count();
    assert_eq!(roles, 1, "{}", answer.text());
}

/// One clean error in OpenAI's dialect, whole and not a stream.
#[track_caller]
fn is_error(answer: &Answer, status: u16, code: &str) {
    assert_eq!(answer.refusal(), (status, code.to_owned()), "{}", answer.text());
    assert!(answer.clean());
    assert_eq!(answer.header("content-type"), "application/json");
}

#[track_caller]
fn attempts_told(answer: &Answer, attempts: usize) {
    assert_eq!(answer.header("x-tollgate-attempts"), attempts.to_string());
}

/// When a node saw its requests from `since` on, counted from there.
fn seen(node: &Node, since: Instant) -> Vec<Duration> {
    let mut times: Vec<Duration> =
        node.requests().iter().filter_map(|request| request.started.checked_duration_since(since)).collect();
    times.sort();
    times
}

/// The times between requests.
fn gaps(times: &[Duration]) -> Vec<Duration> {
    times.windows(2).map(|pair| pair[1] - pair[0]).collect()
}

/// Each gap is that long, or a little longer.
#[track_caller]
fn are_about(gaps: &[Duration], expected: &[Duration]) {
    assert_eq!(gaps.len(), expected.len(), "{gaps:?}, expected {expected:?}");
    for (gap, expected) in gaps.iter().zip(expected) {
        // A timer counts in milliseconds, and the request before took a moment to be seen.
        assert!(*gap + ms(20) >= *expected && *gap <= *expected + SLACK, "{gaps:?}, expected {expected:?}");
    }
}

fn model_of(seen: &Recorded) -> Value {
    serde_json::from_slice::<Value>(seen.body.as_ref().expect("recorded")).expect("JSON")["model"].clone()
}

/// Nothing of any call is left in the gateway.
async fn is_clean(gw: &Gateway) {
    gw.settles("tollgate_reservations_inflight", &[], 0.0).await;
    gw.settles("tollgate_node_inflight", &[], 0.0).await;
    gw.settles("tollgate_streams_open", &[], 0.0).await;
}

/// No attempt goes on at the node; gives the requests in the order of their arrival.
async fn ended(node: &Node) -> Vec<Recorded> {
    eventually("every request to end at the node", || async {
        node.requests().iter().all(|seen| seen.ended.is_some())
    })
    .await;
    node.requests()
}

fn how(seen: &Recorded) -> Ending {
    seen.ended.expect("it has ended").1
}

/// What `/api/upstreams` tells of a node.
async fn node_state(gw: &Gateway, upstream: &str, node: &Node) -> Value {
    let all = gw.admin("GET", "/api/upstreams").send().await.expect(200).json();
    let found = all["upstreams"].as_array().expect("a list").iter().find(|row| row["name"] == upstream);
    let nodes = found.expect("the upstream")["nodes"].as_array().expect("nodes").clone();
    nodes.into_iter().find(|row| row["name"] == node.addr().to_string()).expect("the node")
}

/// Sets the fault of every further call.
fn breaks(node: &Node, text: &str) {
    node.set_fault(Some(fault(text)));
}

/// Sets the fault of the next call alone.
fn breaks_once(node: &Node, text: &str) {
    node.set_next_faults([fault(text)]);
}
