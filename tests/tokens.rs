//! What calls cost: streams that their clients cut, answers whose upstream says nothing, prompts near a limit.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tollgate_load::node::{Ending, Node, NodeConfig, Recorded};

use crate::harness::client::{GONE, Reply, at_once};
use crate::harness::{ALICE, Conf, Gateway, Rng, WENDY, chat, chat_stream, eventually, fault, node, node_with};

const PATH: &str = "/v1/chat/completions";

/// Tokens by OpenAI's own vocabulary.
fn o200k(text: &str) -> usize {
    bpe_openai::o200k_base().count(text)
}

async fn quota(gw: &Gateway, key: &str, dimension: &str) -> Value {
    let answer = gw.get("/v1/quota").key(key).send().await.expect(200).json();
    let limits = answer["limits"].as_array().expect("limits").clone();
    let found = limits.into_iter().find(|row| row["scope"] == "key" && row["dimension"] == dimension);
    found.unwrap_or_else(|| panic!("no {dimension} in {answer}"))
}

/// Nothing of any call is left in the gateway.
async fn is_clean(gw: &Gateway) {
    gw.settles("tollgate_reservations_inflight", &[], 0.0).await;
    gw.settles("tollgate_node_inflight", &[], 0.0).await;
    gw.settles("tollgate_streams_open", &[], 0.0).await;
}

fn find<'r>(requests: &'r [Recorded], id: &str) -> Option<&'r Recorded> {
    requests.iter().find(|seen| seen.header("x-request-id") == Some(id))
}

fn number(line: &Value, name: &str) -> u64 {
    line[name].as_u64().unwrap_or(0)
}

/// Prose of about so many words, another each time.
fn prose(rng: &mut Rng, words: usize) -> String {
    const WORDS: [&str; 16] = [
        "the", "toll", "is", "due", "at", "every", "gate", "and", "no", "cart", "passes", "before", "its", "weight",
        "was", "written",
    ];
    let words: Vec<&str> = (0..words).map(|_| WORDS[rng.below(WORDS.len())]).collect();
    words.join(" ")
}

/// Where a client leaves its stream.
#[derive(Debug, Clone, Copy)]
enum Leaves {
    /// So long after it asked; the first token is later.
    Before(Duration),
    /// Having read so many tokens.
    After(usize),
    /// Having read that the answer is finished, before its usage comes.
    AtTheEnd,
}

/// A kind of upstream.
struct Kind {
    name: &'static str,
    model: &'static str,
    key: &'static str,
    node: Node,
}

const STREAMS: usize = 1_000;

async fn kinds() -> Vec<Kind> {
    let node = |model: &'static str, faults: &'static str, exact: bool| async move {
        let node = node_with(model, |config| {
            config.decode = Duration::from_millis(2);
            config.max_running = 1_000;
            config.queue = 1_000;
            config.records = 2_000;
            if exact {
                config.count = o200k;
            }
        })
        .await;
        node.set_fault(Some(fault(faults)));
        node
    };
    vec![
        // Counts as it likes, and says so with every token.
        Kind { name: "vllm", model: "qwen", key: "vllm-secret", node: node("qwen", "slow_usage:60", false).await },
        // Says it at the end only.
        Kind {
            name: "late",
            model: "gpt-4o-mini",
            key: "late-secret",
            node: node("gpt-4o-mini", "slow_usage:60", true).await,
        },
        // Never says it.
        Kind {
            name: "mute",
            model: "gpt-4o",
            key: "mute-secret",
            node: node("gpt-4o", "no_usage,slow_usage:60", true).await,
        },
    ]
}

async fn gateway_of(kinds: &[Kind]) -> Gateway {
    let mut conf = Conf::new().tier("counted: { tokens_per_day: 1_000_000_000, concurrency: 1_000 }");
    for kind in kinds {
        let engine = if kind.name == "vllm" { "engine: vllm" } else { "" };
        conf = conf
            .key(&format!("{{ id: {}, key: {}, tier: counted }}", kind.name, kind.key))
            .upstream(kind.name, &[kind.node.url()], engine)
            .model(kind.name, &[(kind.name, kind.model)], "");
    }
    Gateway::with(&conf.llm()).await
}

/// Reads as far as the client wants to; says how many tokens it got.
async fn read(mut reply: Reply, leaves: Leaves) -> u64 {
    let mut got = 0;
    while let Some(event) = reply.event().await {
        assert_ne!(event.data, "[DONE]", "every client leaves before");
        let chunk = event.json();
        assert!(chunk.get("usage").is_none(), "usage that nobody asked for: {chunk}");
        got += u64::from(event.delta().is_some());
        let over = match leaves {
            Leaves::Before(_) => false,
            Leaves::After(tokens) => got >= tokens as u64,
            Leaves::AtTheEnd => chunk["choices"][0]["finish_reason"].is_string(),
        };
        if over {
            break;
        }
    }
    reply.leave();
    got
}

/// What the clients of one kind got, by request id.
type Got = HashMap<String, (Leaves, u64)>;

async fn cut_streams(gw: &Arc<Gateway>, kinds: &[Kind]) -> Got {
    let mut rng = Rng::new(6);
    let plans: Vec<_> = (0..STREAMS)
        .map(|turn| {
            let kind = &kinds[turn % kinds.len()];
            let length = 20 + rng.below(100);
            let leaves = match rng.below(10) {
                0 => Leaves::Before(Duration::from_micros(rng.next() % 40_000)),
                1 => Leaves::AtTheEnd,
                _ => Leaves::After(1 + rng.below(length)),
            };
            let mut body = chat_stream(&prose(&mut rng, 200));
            body["model"] = kind.name.into();
            body["max_tokens"] = length.into();
            let id = format!("{}-{turn}", kind.name);
            let mut request = gw.post(PATH).key(kind.key).header("x-request-id", &id).json(&body);
            if let Leaves::Before(_) = leaves {
                // The header and the role come at once, the first token when the client is gone.
                request = request.header("x-sim-fault", "slow_token:200");
            }
            if rng.below(3) == 0 {
                request = request.http2();
            }
            (id, request, leaves)
        })
        .collect();
    let work = plans.into_iter().map(|(id, request, leaves)| async move {
        let got = match leaves {
            Leaves::Before(after) => {
                let asked = tokio::spawn(async move { request.try_open().await.map(|_| ()) });
                tokio::time::sleep(after).await;
                asked.abort();
                0
            }
            Leaves::After(_) | Leaves::AtTheEnd => read(request.open().await, leaves).await,
        };
        (id, (leaves, got))
    });
    at_once(24, work).await.into_iter().collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_streams_cut_at_random_are_charged_within_5_percent_of_what_the_node_produced() {
    let began = Instant::now();
    let kinds = kinds().await;
    let gw = Arc::new(gateway_of(&kinds).await);
    let got = cut_streams(&gw, &kinds).await;
    is_clean(&gw).await;
    // A client that leaves at once may be gone before it has said what it wants.
    let seen: Vec<Recorded> = kinds.iter().flat_map(|kind| kind.node.requests()).collect();
    let logged = || -> HashMap<String, Value> {
        let lines = gw.access_log().into_iter();
        lines.map(|line| (line["request_id"].as_str().unwrap_or("").to_owned(), line)).collect()
    };
    eventually("a log line of every call that came to a node", || async {
        let lines = logged();
        seen.iter().all(|seen| seen.header("x-request-id").is_some_and(|id| lines.contains_key(id)))
    })
    .await;
    let lines = logged();
    assert!(seen.len() >= STREAMS * 9 / 10, "only {} calls came to a node", seen.len());
    for kind in &kinds {
        let requests = kind.node.requests();
        let mut sums = [0_u64; 4];
        let mut sources: HashMap<String, u32> = HashMap::new();
        for (id, (leaves, got)) in got.iter().filter(|(id, _)| id.starts_with(kind.name)) {
            let line = lines.get(id).unwrap_or(&Value::Null);
            let charged = (number(line, "input_tokens"), number(line, "output_tokens"));
            let Some(seen) = find(&requests, id) else {
                assert_eq!(charged, (0, 0), "{id} never came to the node: {line}");
                continue;
            };
            let produced = (seen.prompt_tokens, seen.output_tokens);
            let near =
                |charged: u64, true_count: u64, slack: u64| charged.abs_diff(true_count) <= slack + true_count / 10;
            assert!(
                near(charged.0, produced.0, 3),
                "{id} {leaves:?}: prompt of {} charged as {}",
                produced.0,
                charged.0
            );
            assert!(
                charged.1 + 3 + got / 10 >= *got && charged.1 <= produced.1 + 3 + produced.1 / 10,
                "{id} {leaves:?}: the client got {got}, the node made {}, charged were {}",
                produced.1,
                charged.1
            );
            *sources.entry(line["usage_source"].as_str().unwrap_or("none").to_owned()).or_default() += 1;
            sums = [sums[0] + charged.0, sums[1] + produced.0, sums[2] + charged.1, sums[3] + produced.1];
        }
        let [input, true_input, output, true_output] = sums;
        let error = |charged: u64, produced: u64| (charged as f64 / produced as f64 - 1.0) * 100.0;
        eprintln!(
            "{}: prompts {input} of {true_input} ({:+.2} %), output {output} of {true_output} ({:+.2} %), by {sources:?}",
            kind.name,
            error(input, true_input),
            error(output, true_output)
        );
        assert!(true_output > 5_000, "{}: streams were read", kind.name);
        assert!(error(input, true_input).abs() <= 5.0, "prompts of {}: {input} of {true_input}", kind.name);
        assert!(error(output, true_output).abs() <= 5.0, "output of {}: {output} of {true_output}", kind.name);
        let used = quota(&gw, kind.key, "tokens_per_day").await;
        assert_eq!(
            (number(&used, "used"), number(&used, "held")),
            (input + output, 0),
            "the key of {} has paid that",
            kind.name
        );
        assert_eq!(quota(&gw, kind.key, "concurrency").await["used"], 0);
    }
    eprintln!("took {:?}", began.elapsed());
}

fn draining(node: &Node, on_abort: &str) -> Conf {
    Conf::new()
        .upstream("near", &[node.url()], "")
        .model("chat", &[("near", "qwen")], "")
        .route(&format!("{{ name: llm, match: {{ path: {PATH} }}, call: {{ models: \"*\" }}, on_abort: {on_abort} }}"))
}

async fn slow_node() -> Node {
    node_with("qwen", |config: &mut NodeConfig| config.decode = Duration::from_millis(10)).await
}

fn long(tokens: usize) -> Value {
    let mut body = chat_stream("hi");
    body["max_tokens"] = tokens.into();
    body
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drained_stream_is_read_to_its_end_and_charged_as_the_node_says() {
    for http2 in [false, true] {
        let near = slow_node().await;
        let gw = Gateway::with(&draining(&near, "drain")).await;
        let mut request = gw.post(PATH).key(WENDY).header("x-request-id", "drained").json(&long(60));
        if http2 {
            request = request.http2();
        }
        let mut reply = request.open().await;
        while reply.event().await.expect("an event").delta().is_none() {}
        reply.leave();
        tokio::time::sleep(Duration::from_millis(150)).await;
        assert_eq!(gw.metric("tollgate_reservations_inflight", &[]).await, 1.0, "held until the node is done");
        assert_eq!(gw.metric("tollgate_node_inflight", &[]).await, 1.0);
        let line = gw.logged("drained").await;
        assert_eq!((number(&line, "output_tokens"), &line["usage_source"]), (60, &json!("upstream")), "{line}");
        let seen = near.requests().pop().expect("a request");
        assert_eq!(seen.ended.map(|(_, how)| how), Some(Ending::Complete));
        assert_eq!(number(&line, "input_tokens"), seen.prompt_tokens);
        is_clean(&gw).await;
        gw.settles("tollgate_client_aborts_total", &[], 1.0).await;
        let used = quota(&gw, WENDY, "tokens_per_day").await;
        assert_eq!((number(&used, "used"), number(&used, "held")), (60 + seen.prompt_tokens, 0));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_plain_call_is_drained_too_and_so_is_one_left_before_its_first_token() {
    let near = slow_node().await;
    let gw = Gateway::with(&draining(&near, "drain")).await;
    for (id, stream, pause) in [("plain", false, ""), ("early", true, "slow_token:200")] {
        let mut body = long(30);
        body["stream"] = stream.into();
        let mut request = gw.post(PATH).key(WENDY).header("x-request-id", id).json(&body);
        if !pause.is_empty() {
            request = request.header("x-sim-fault", pause);
        }
        let asked = tokio::spawn(request.try_open());
        eventually("the call to be at the node", || async { near.stats().running == 1 }).await;
        asked.abort();
        let line = gw.logged(id).await;
        assert_eq!((number(&line, "output_tokens"), &line["usage_source"]), (30, &json!("upstream")), "{line}");
        assert_eq!(line["status"], Value::Null, "nothing was sent: {line}");
        is_clean(&gw).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_ends_at_its_bound_and_with_the_gateway() {
    let near = slow_node().await;
    let mut gw = Gateway::with(&draining(&near, "{ drain: 400ms }")).await;
    let leave = |id: &'static str| {
        let request = gw.post(PATH).key(WENDY).header("x-request-id", id).json(&long(1_000));
        async move {
            let mut reply = request.open().await;
            while reply.event().await.expect("an event").delta().is_none() {}
            reply.leave()
        }
    };
    let left = leave("bounded").await;
    let line = gw.logged("bounded").await;
    let took = left.elapsed();
    assert!((Duration::from_millis(380)..Duration::from_secs(3)).contains(&took), "{took:?}");
    let made = near.requests().pop().expect("a request").output_tokens;
    let charged = number(&line, "output_tokens");
    assert!(charged >= 20 && charged.abs_diff(made) <= 3 + made / 10, "{charged} of {made}: {line}");
    is_clean(&gw).await;

    let gw_conf = draining(&near, "{ drain: 20s }");
    drop(std::mem::replace(&mut gw, Gateway::with(&gw_conf).await));
    let request = gw.post(PATH).key(WENDY).json(&long(1_000));
    let mut reply = request.open().await;
    while reply.event().await.expect("an event").delta().is_none() {}
    reply.leave();
    tokio::time::sleep(GONE).await;
    let asked = Instant::now();
    gw.terminate();
    assert!(gw.exit().await.success());
    assert!(
        asked.elapsed() < Duration::from_secs(2),
        "nobody waits for an answer that nobody gets: {:?}",
        asked.elapsed()
    );
}

/// The answer's bytes, less what is new in every answer.
fn timeless(text: &str) -> String {
    let mut out = String::new();
    for line in text.lines() {
        match line.strip_prefix("data: ").and_then(|data| serde_json::from_str::<Value>(data).ok()) {
            Some(chunk) => {
                let id = chunk["id"].as_str().unwrap_or("");
                let created = format!("\"created\":{}", chunk["created"]);
                out.push_str(&line.replace(id, "ID").replace(&created, "\"created\":0"));
            }
            None => out.push_str(line),
        }
        out.push('\n');
    }
    out
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_of_a_vllm_node_sees_what_it_asked_for_and_nothing_else() {
    let near = node("qwen").await;
    let conf = Conf::new()
        .upstream("vllm", &[near.url()], "engine: vllm")
        .upstream("bare", &[near.url()], "")
        .model("vllm", &[("vllm", "qwen")], "")
        .model("bare", &[("bare", "qwen")], "")
        .llm();
    let gw = Gateway::with(&conf).await;
    for options in [
        Value::Null,
        json!({}),
        json!({"include_usage": false}),
        json!({"include_usage": true}),
        json!({"include_usage": true, "continuous_usage_stats": false}),
        json!({"include_usage": true, "continuous_usage_stats": true}),
        json!({"continuous_usage_stats": true}),
    ] {
        for n in [1, 2] {
            let mut seen = Vec::new();
            for model in ["vllm", "bare"] {
                let mut body = chat_stream("hi");
                body["model"] = model.into();
                body["n"] = n.into();
                body["stream_options"] = options.clone();
                seen.push(timeless(&gw.post(PATH).key(WENDY).json(&body).send().await.expect(200).text()));
                let sent: Value =
                    serde_json::from_slice(near.requests().pop().expect("a request").body.as_ref().expect("a body"))
                        .expect("JSON");
                let asked = &sent["stream_options"];
                assert_eq!(asked["include_usage"], true, "{options}");
                if model == "vllm" {
                    assert_eq!(asked["continuous_usage_stats"], true, "{options}");
                } else {
                    assert_eq!(asked["continuous_usage_stats"], options["continuous_usage_stats"], "{options}");
                }
            }
            assert!(seen[0].contains("[DONE]") && seen[0].matches("\"content\":\" ").count() >= 5, "{}", seen[0]);
            assert_eq!(seen[0], seen[1], "{options}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn near_the_limit_the_tokenizer_decides_and_not_the_estimate() {
    let near = node_with("gpt-4o", |config| config.count = o200k).await;
    // Words that are one token each are estimated at an eighth too many.
    let text = prose(&mut Rng::new(3), 400);
    let truth = o200k(&text) as u64 + 6 + 8;
    let conf = |limit: u64| {
        Conf::new()
            .tier(&format!("tight: {{ tokens_per_day: {limit} }}"))
            .key("{ id: tess, key: tess-secret, tier: tight }")
            .upstream("near", &[near.url()], "")
            .model("chat", &[("near", "gpt-4o")], "")
            .llm()
    };
    let mut body = chat(&text);
    body["max_tokens"] = 8.into();
    let gw = Gateway::with(&conf(truth + 2)).await;
    // Until the vocabulary is there the estimate stands, and refuses.
    eventually("the call to fit", || async {
        gw.post(PATH).key("tess-secret").json(&body).send().await.status() == 200
    })
    .await;
    let used = quota(&gw, "tess-secret", "tokens_per_day").await;
    assert!(number(&used, "used").abs_diff(truth) <= 6, "{used} for {truth}");
    let gw = Gateway::with(&conf(truth - 10)).await;
    for _ in 0..20 {
        assert_eq!(gw.post(PATH).key("tess-secret").json(&body).send().await.status(), 429);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(quota(&gw, "tess-secret", "tokens_per_day").await["used"], 0, "a refusal changes nothing");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_model_that_counts_otherwise_teaches_the_estimate() {
    // A node that counts half as many again as OpenAI would.
    let near = node_with("qwen", |config| config.count = |text| o200k(text) * 3 / 2).await;
    let gw = Gateway::with(&Conf::serving("qwen", &[near.url()])).await;
    let mut rng = Rng::new(1);
    let mut wire = gw.wire().await;
    let text = prose(&mut rng, 300);
    let mut ask = || chat(&prose(&mut rng, 300));
    for _ in 0..20 {
        wire.send(gw.post(PATH).key(WENDY).json(&ask())).await.expect(200);
    }
    gw.settles("tollgate_estimate_error_ratio_count", &[("model", "chat")], 20.0).await;
    let wrong = gw.metric("tollgate_estimate_error_ratio_sum", &[("model", "chat")]).await / 20.0;
    assert!((0.2..0.4).contains(&wrong), "before: {wrong}");
    for _ in 0..20 {
        wire.send(gw.post(PATH).key(WENDY).json(&ask())).await.expect(200);
    }
    gw.settles("tollgate_estimate_error_ratio_count", &[("model", "chat")], 40.0).await;
    let right = gw.metric("tollgate_estimate_error_ratio_sum", &[("model", "chat")]).await / 20.0 - wrong;
    assert!(right < 0.05, "after: {right}");
    // Where the node says nothing, the corrected estimate stands in.
    near.set_fault(Some(fault("no_usage")));
    wire.send(gw.post(PATH).key(WENDY).header("x-request-id", "mute").json(&chat(&text))).await.expect(200);
    let line = gw.logged("mute").await;
    let truth = near.requests().pop().expect("a request").prompt_tokens;
    assert!(number(&line, "input_tokens").abs_diff(truth) <= truth / 20, "{line} for {truth}");
    assert_eq!(line["usage_source"], "counted");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_small_first_call_is_never_refused_for_the_sake_of_a_guess() {
    let near = node("qwen").await;
    let conf = Conf::new()
        .tier("small: { tokens_per_minute: 100 }")
        .key("{ id: sam, key: sam-secret, tier: small }")
        .upstream("near", &[near.url()], "")
        .model("chat", &[("near", "qwen")], "")
        .llm();
    let gw = Gateway::with(&conf).await;
    let mut body = chat("hi");
    body.as_object_mut().expect("an object").remove("max_tokens");
    gw.post(PATH).key("sam-secret").json(&body).send().await.expect(200);
    // What the client asks for itself is no guess: it cannot ever fit.
    body["max_tokens"] = 500.into();
    assert_eq!(gw.post(PATH).key("sam-secret").json(&body).send().await.status(), 429);
    assert_eq!(gw.post(PATH).key(ALICE).json(&body).send().await.status(), 200);
}
