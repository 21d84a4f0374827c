//! What the tests are written with: the gateway as a child process, clients that speak exact bytes, nodes, and the
//! configuration that ties them together. Every wait has a deadline; nothing here is a mock of the gateway itself.

pub(crate) mod client;
pub(crate) mod conf;
pub(crate) mod gateway;
pub(crate) mod raw;
pub(crate) mod redis;
pub(crate) mod sentinel;
mod watched;
pub(crate) mod wire;

use std::future::Future;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tollgate_load::node::{Fault, Node, NodeConfig};

pub(crate) use client::Answer;
pub(crate) use conf::Conf;
pub(crate) use gateway::{Gateway, tollgate};
pub(crate) use raw::{RawNode, Upcall};

/// The key of tier `free`: 60 requests a minute.
pub(crate) const ALICE: &str = "alice-secret-key";
/// The key of tier `wide`, for tests that are not about limits.
pub(crate) const WENDY: &str = "wendy-secret-key";
/// How long anything may take before a test gives up on it.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// Asks again and again until the answer is yes; fails the test with `what` when it stays no.
pub(crate) async fn eventually<F, Fut>(what: &str, mut ask: F)
where
    F: FnMut() -> Fut,
    Fut: Future<Output = bool>,
{
    let deadline = Instant::now() + PATIENCE;
    while !ask().await {
        assert!(Instant::now() < deadline, "did not come true within {PATIENCE:?}: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// The future's output, or a failed test when it does not come in time.
pub(crate) async fn in_time<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(PATIENCE, future).await {
        Ok(output) => output,
        Err(_) => panic!("did not happen within {PATIENCE:?}: {what}"),
    }
}

/// A simulated node without delays that serves one model.
pub(crate) async fn node(model: &str) -> Node {
    node_with(model, |_| ()).await
}

/// A simulated node that serves one model, changed as the test needs it.
pub(crate) async fn node_with(model: &str, change: impl FnOnce(&mut NodeConfig)) -> Node {
    let mut config = NodeConfig {
        bind: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
        name: format!("node-{model}"),
        models: vec![model.to_owned()],
        ..NodeConfig::instant()
    };
    change(&mut config);
    Node::start(config).await.expect("a simulated node starts")
}

/// A fault by its name.
pub(crate) fn fault(text: &str) -> Fault {
    text.parse().unwrap_or_else(|_| panic!("the simulator knows no fault {text}"))
}

/// A port that refuses connections for as long as the value lives: bound, never listening.
pub(crate) struct Refused {
    _socket: socket2::Socket,
    addr: SocketAddr,
}

impl Refused {
    pub(crate) fn new() -> Self {
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).expect("a socket");
        socket.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into()).expect("a free port");
        let addr = socket.local_addr().expect("its address").as_socket().expect("an IP address");
        Self { _socket: socket, addr }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.addr)
    }
}

/// Lower-case hex of the SHA-256.
pub(crate) fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// SplitMix64: random enough for tests, the same on every run.
pub(crate) struct Rng(u64);

impl Rng {
    pub(crate) const fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `end`, which is not 0.
    pub(crate) fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.next() % end as u64).expect("fits")
    }
}

/// A chat completion request of the model `chat`.
pub(crate) fn chat(text: &str) -> Value {
    json!({ "model": "chat", "messages": [{ "role": "user", "content": text }], "max_tokens": 8 })
}

/// The same, streamed.
pub(crate) fn chat_stream(text: &str) -> Value {
    let mut body = chat(text);
    body["stream"] = true.into();
    body
}

/// A node written by hand that answers everything with its own name and the target it was asked for.
pub(crate) async fn named(name: &'static str) -> RawNode {
    RawNode::answering(move |mut call: Upcall| async move {
        let body = json!({ "node": name, "target": call.request.target(), "host": call.request.header("host") });
        call.json("200 OK", &body.to_string()).await;
        Some(call)
    })
    .await
}

/// One chunk of a chat completion, as a line of an event stream.
pub(crate) fn chunk_event(text: &str) -> String {
    let chunk = json!({
        "id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "qwen",
        "choices": [{ "index": 0, "delta": { "content": text }, "finish_reason": null }],
    });
    format!("data: {chunk}\n\n")
}

/// The chunk that gives the usage, as vLLM and OpenAI send it last.
pub(crate) fn usage_event(input: u64, output: u64) -> String {
    let usage = json!({ "prompt_tokens": input, "completion_tokens": output, "total_tokens": input + output });
    let chunk = json!({
        "id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "qwen", "choices": [], "usage": usage,
    });
    format!("data: {chunk}\n\n")
}

/// The end of an event stream in OpenAI's form.
pub(crate) const DONE: &str = "data: [DONE]\n\n";

/// A whole chat completion that is not streamed.
pub(crate) fn completion(text: &str, input: u64, output: u64) -> String {
    json!({
        "id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "qwen",
        "choices": [{ "index": 0, "message": { "role": "assistant", "content": text }, "finish_reason": "stop" }],
        "usage": { "prompt_tokens": input, "completion_tokens": output, "total_tokens": input + output },
    })
    .to_string()
}
