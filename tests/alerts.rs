//! Alerts: a webhook is told once of a change and once of its end, signed, and again if it was not there.

use std::time::Duration;

use hmac::{Hmac, Mac};
use serde_json::Value;
use sha2::Sha256;

use crate::harness::gateway::finish;
use crate::harness::{Conf, Gateway, RawNode, Upcall, WENDY, chat, fault, node, tollgate};

const PATH: &str = "/v1/chat/completions";

fn alerts(when: &str, hook: &RawNode) -> String {
    format!("alerts: [{{ when: {when}, webhook: \"{}/hook\", secret: {{ env: ALERT_SECRET }} }}]", hook.url())
}

async fn gateway(conf: &Conf) -> Gateway {
    Gateway::with_env(conf, &[("ALERT_SECRET", "shared-with-the-receiver")]).await
}

/// The next notice, its signature verified; answered with this status.
async fn told(hook: &RawNode, status: &str) -> Value {
    let mut call: Upcall = hook.call().await;
    assert_eq!(call.request.line, "POST /hook HTTP/1.1");
    assert_eq!(call.request.header("content-type"), "application/json");
    let mut mac = Hmac::<Sha256>::new_from_slice(b"shared-with-the-receiver").expect("a key");
    mac.update(&call.request.body);
    let hex: String = mac.finalize().into_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(call.request.header("x-tollgate-signature"), format!("sha256={hex}"));
    let notice: Value = serde_json::from_slice(&call.request.body).expect("JSON");
    assert!(notice["timestamp"].as_u64() >= notice["since"].as_u64() && notice["since"].as_u64() > Some(1_700_000_000));
    assert!(!notice["gateway"].as_str().expect("a name").is_empty());
    call.json(status, "{}").await;
    notice
}

async fn quiet(hook: &RawNode) {
    assert!(!hook.called_within(Duration::from_millis(800)).await, "nothing more is told");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_taken_out_is_told_until_it_is_heard_and_so_is_its_return() {
    let (near, hook) = (node("qwen").await, RawNode::start().await);
    near.set_fault(Some(fault("500")));
    let conf = Conf::new()
        .upstream("near", &[near.url()], "eject: { after: 2, for: 500ms, max_ratio: 1 }")
        .model("chat", &[("near", "qwen")], "retry: { attempts: 2, backoff: 1ms }")
        .llm()
        .also(&alerts("node_down", &hook));
    let gw = gateway(&conf).await;
    gw.post(PATH).key(WENDY).json(&chat("hi")).send().await.expect(502);
    let first = told(&hook, "500 Internal Server Error").await;
    let again = told(&hook, "200 OK").await;
    assert_eq!(first, again, "the same notice, told again");
    assert_eq!((&first["event"], &first["state"]), (&"node_down".into(), &"fired".into()));
    let name = near.url().trim_start_matches("http://").to_owned();
    assert_eq!(first["subject"], serde_json::json!({ "upstream": "near", "node": name }));
    gw.settles("tollgate_alerts_total", &[("result", "sent")], 1.0).await;
    // It goes on failing, which is nothing new.
    gw.post(PATH).key(WENDY).json(&chat("hi")).send().await;
    quiet(&hook).await;
    near.set_fault(None);
    gw.post(PATH).key(WENDY).json(&chat("hi")).send().await.expect(200);
    let over = told(&hook, "204 No Content").await;
    assert_eq!((&over["event"], &over["state"]), (&"node_down".into(), &"resolved".into()));
    assert_ne!(over["id"], first["id"]);
    quiet(&hook).await;
    assert!(!gw.output().contains("shared-with-the-receiver"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upstream_that_stays_limited_is_told_after_its_time() {
    let (far, hook) = (node("m").await, RawNode::start().await);
    far.set_fault(Some(fault("429")));
    let conf = Conf::new()
        .upstream("far", &[far.url()], "credentials: [sk-far], cooldown: 1s")
        .model("chat", &[("far", "m")], "retry: { attempts: 1 }")
        .llm()
        .also(&alerts("{ upstream_limited_for: 2s }", &hook));
    let gw = gateway(&conf).await;
    gw.post(PATH).key(WENDY).json(&chat("hi")).send().await.expect(429);
    assert!(!hook.called_within(Duration::from_millis(1_500)).await, "not before its time");
    let fired = told(&hook, "200 OK").await;
    assert_eq!((&fired["event"], &fired["state"]), (&"upstream_limited".into(), &"fired".into()));
    assert_eq!(fired["subject"], serde_json::json!({ "upstream": "far" }));
    assert!(fired["timestamp"].as_u64() >= fired["since"].as_u64().map(|since| since + 1));
    far.set_fault(None);
    gw.post(PATH).key(WENDY).json(&chat("hi")).send().await.expect(200);
    assert_eq!(told(&hook, "200 OK").await["state"], "resolved");
    quiet(&hook).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_that_has_used_its_share_is_told_of_once() {
    let (near, hook) = (node("qwen").await, RawNode::start().await);
    let conf = Conf::serving("qwen", &[near.url()])
        .tier("small: { tokens_per_day: 60 }")
        .key("{ id: sam, key: sam-secret-key, tier: small }")
        .also(&alerts("{ budget_spent: 0.2 }", &hook));
    let gw = gateway(&conf).await;
    let ask = || gw.post(PATH).key("sam-secret-key").json(&chat("hi")).send();
    ask().await.expect(200);
    gw.settles("tollgate_reservations_inflight", &[], 0.0).await;
    ask().await;
    let fired = told(&hook, "200 OK").await;
    assert_eq!(fired["event"], "budget_spent");
    assert_eq!(fired["subject"], serde_json::json!({ "key": "sam", "dimension": "tokens_per_day" }));
    for _ in 0..5 {
        ask().await;
    }
    quiet(&hook).await;
    assert!(!gw.output().contains("sam-secret-key"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_receiver_that_never_answers_holds_up_no_call() {
    let (near, hook) = (node("qwen").await, RawNode::start().await);
    near.set_fault(Some(fault("500")));
    let conf = Conf::new()
        .upstream("near", &[near.url()], "eject: { after: 1, for: 10s, max_ratio: 1 }")
        .upstream("next", &[node("qwen").await.url()], "")
        .model("chat", &[("near", "qwen"), ("next", "qwen")], "")
        .llm()
        .also(&alerts("node_down", &hook));
    let gw = gateway(&conf).await;
    gw.post(PATH).key(WENDY).json(&chat("hi")).send().await;
    let _silent = hook.call().await;
    near.set_fault(None);
    for _ in 0..20 {
        let answer = gw.post(PATH).key(WENDY).json(&chat("hi")).send().await;
        assert!(answer.took < Duration::from_secs(2), "took {:?}", answer.took);
    }
}

#[tokio::test]
async fn mistakes_in_alerts_are_told() {
    let home = tempfile::TempDir::new().expect("a temporary directory");
    let file = home.path().join("t.yaml");
    for (alert, said) in [
        ("{ when: node_dwn, webhook: 'http://a/b', secret: { env: S } }", "did you mean `node_down`?"),
        (
            "{ when: { upstream_limited: 5m }, webhook: 'http://a/b', secret: { env: S } }",
            "did you mean `upstream_limited_for`?",
        ),
        ("{ when: { budget_spent: 1.5 }, webhook: 'http://a/b', secret: { env: S } }", "1.5 is out of range"),
        (
            "{ when: budget_spent, webhook: 'http://a/b', secret: { env: S } }",
            "it needs a share, like { budget_spent: 0.9 }",
        ),
        ("{ when: { upstream_limited_for: 0s }, webhook: 'http://a/b', secret: { env: S } }", "a period of zero"),
        ("{ when: node_down, webhook: 'ftp://a/b', secret: { env: S } }", "not an address to post to"),
        ("{ when: node_down, webhook: '/hook', secret: { env: S } }", "not an address to post to"),
        ("{ when: node_down, webhook: 'http://a/b', secret: { env: EMPTY } }", "is empty"),
        ("{ when: node_down, webhook: 'http://a/b', secret: '' }", "the secret is empty"),
        ("{ when: node_down, webhook: 'http://a/b' }", "secret"),
        ("{ when: node_down, webhok: 'http://a/b', secret: { env: S } }", "did you mean `webhook`?"),
    ] {
        std::fs::write(&file, format!("alerts: [{alert}]\n")).expect("written");
        let mut command = tollgate(&["check", "-c", file.to_str().expect("UTF-8")]);
        command.env("S", "secret").env("EMPTY", "");
        let output = finish(command).await;
        let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert_eq!(output.status.code(), Some(1), "{alert}: {text}");
        assert!(text.contains(said), "{alert}: {text}");
    }
}
