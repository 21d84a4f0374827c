//! Refusals that are the client's business, that another target may not share, or that only speak against a credential.

use std::sync::Arc;

use parking_lot::Mutex;
use serde_json::json;

use super::*;
use crate::harness::{RawNode, Upcall, completion, node};

/// Model `chat` by `small` at `near`, then by `large` at `far` with these words of its own.
async fn two(near: &Node, far: &Node, more: &str) -> Gateway {
    let conf = Conf::new().upstream("near", &[near.url()], CALM).upstream("far", &[far.url()], CALM).llm().also(&format!(
        "models:\n  chat: {{ {RETRY}, targets: [{{ upstream: near, model: small }}, {{ upstream: far, model: large{more} }}] }}"
    ));
    Gateway::with(&conf).await
}

/// The refusal of `near` itself came, and `far` was asked so often.
async fn is_passed(gw: &Gateway, near: &Node, far: &Node, code: &str, at_far: usize) {
    for body in both() {
        let (before, far_before) = (near.requests().len(), far.requests().len());
        let told = ask(gw, &body).await;
        assert_eq!(told.status(), 400, "{}", told.text());
        assert_eq!(told.json()["error"]["code"], code);
        assert!(told.clean());
        assert_eq!((told.header("x-tollgate-upstream"), told.header("x-tollgate-model")), ("near", "small"));
        attempts_told(&told, 1 + at_far);
        assert_eq!((near.requests().len() - before, far.requests().len() - far_before), (1, at_far));
        let line = gw.logged(told.header("x-request-id")).await;
        assert_eq!((&line["upstream"], &line["node"]), (&json!("near"), &json!(near.addr().to_string())), "{line}");
        assert_eq!((&line["status"], &line["attempts"]), (&json!(400), &json!(1 + at_far)));
    }
    is_clean(gw).await;
}

#[tokio::test]
async fn a_prompt_that_is_too_long_goes_to_a_larger_context() {
    let (near, far) = (node("small").await, node("large").await);
    breaks(&near, "context_length");
    let gw = two(&near, &far, ", larger_context: true").await;
    for body in both() {
        let told = ask(&gw, &body).await;
        is_whole(&told, &body);
        attempts_told(&told, 2);
        assert_eq!((told.header("x-tollgate-upstream"), told.header("x-tollgate-model")), ("far", "large"));
    }
    assert_eq!((near.requests().len(), far.requests().len()), (2, 2));
    assert!(near.requests().iter().all(|seen| model_of(seen) == "small"));
    assert!(far.requests().iter().all(|seen| model_of(seen) == "large"));
    assert_eq!(node_state(&gw, "near", &near).await["failures"], 0, "the node is not at fault");
    gw.settles("tollgate_fallbacks_total", &[("reason", "context_length")], 2.0).await;
    is_clean(&gw).await;
}

#[tokio::test]
async fn a_prompt_that_is_too_long_is_told_where_there_is_no_larger_context() {
    let (near, far) = (node("small").await, node("large").await);
    breaks(&near, "context_length");
    let gw = two(&near, &far, "").await;
    is_passed(&gw, &near, &far, "context_length_exceeded", 0).await;
}

#[tokio::test]
async fn where_the_larger_context_fails_too_the_first_answer_is_passed() {
    for (what, at_far) in [("500", 2), ("context_length", 1), ("404", 1)] {
        let (near, far) = (node("small").await, node("large").await);
        breaks(&near, "context_length");
        breaks(&far, what);
        let gw = two(&near, &far, ", larger_context: true").await;
        is_passed(&gw, &near, &far, "context_length_exceeded", at_far).await;
    }
}

#[tokio::test]
async fn a_content_filter_is_told_with_the_providers_reason() {
    let (near, far) = (node("small").await, node("large").await);
    breaks(&near, "content_filter");
    let gw = two(&near, &far, "").await;
    is_passed(&gw, &near, &far, "content_filter", 0).await;
}

#[tokio::test]
async fn a_content_filter_is_no_last_word_for_a_target_that_says_so() {
    let (near, far) = (node("small").await, node("large").await);
    breaks(&near, "content_filter");
    let gw = two(&near, &far, ", on: [content_filter]").await;
    for body in both() {
        let told = ask(&gw, &body).await;
        is_whole(&told, &body);
        attempts_told(&told, 2);
        assert_eq!(told.header("x-tollgate-upstream"), "far");
    }
    assert_eq!((near.requests().len(), far.requests().len()), (2, 2));
    breaks(&far, "content_filter");
    is_passed(&gw, &near, &far, "content_filter", 1).await;
}

/// What is the client's own mistake is no failure of the node, however often.
#[tokio::test]
async fn a_clients_mistakes_speak_against_nobody() {
    let (near, far) = (node("small").await, node("large").await);
    breaks(&near, "422");
    let gw = two(&near, &far, "").await;
    for _ in 0..12 {
        let told = ask(&gw, &chat("hi")).await;
        assert_eq!(told.status(), 422);
        attempts_told(&told, 1);
    }
    assert_eq!((near.requests().len(), far.requests().len()), (12, 0));
    let state = node_state(&gw, "near", &near).await;
    assert_eq!((&state["up"], &state["failures"]), (&json!(true), &json!(0)), "{state}");
}

/// A provider that refuses these keys with that status; which keys it saw.
async fn provider(refused: &'static [&'static str], status: &'static str) -> (RawNode, Arc<Mutex<Vec<String>>>) {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let log = Arc::clone(&seen);
    let node = RawNode::answering(move |mut call: Upcall| {
        let log = Arc::clone(&log);
        async move {
            let key = call.request.header("authorization").trim_start_matches("Bearer ").to_owned();
            log.lock().push(key.clone());
            if refused.contains(&key.as_str()) {
                let body = json!({ "error": { "message": format!("bad key {key}"), "code": "invalid_api_key" } });
                call.json(status, &body.to_string()).await;
            } else if String::from_utf8_lossy(&call.request.body).contains("\"stream\":true") {
                call.sse(&format!("{}{}", crate::harness::chunk_event("one"), crate::harness::DONE)).await;
            } else {
                call.json("200 OK", &completion("hello", 1, 1)).await;
            }
            Some(call)
        }
    })
    .await;
    (node, seen)
}

async fn with_keys(node: &RawNode, more: &str) -> Gateway {
    let keys = ["sk-a", "sk-b"].map(|key| format!("{key}-0123456789")).join(", ");
    let more = format!("credentials: [{keys}]{more}");
    Gateway::with(&Conf::new().upstream("far", &[node.url()], &more).model("chat", &[("far", "gpt")], RETRY).llm())
        .await
}

async fn credentials(gw: &Gateway) -> Vec<String> {
    let all = gw.admin("GET", "/api/upstreams").send().await.expect(200).json();
    let rows = all["upstreams"][0]["credentials"].as_array().expect("credentials").clone();
    rows.iter().map(|row| row["state"].as_str().expect("a word").to_owned()).collect()
}

#[tokio::test]
async fn a_refused_credential_is_put_aside_and_the_next_one_tried() {
    for status in ["401 Unauthorized", "403 Forbidden"] {
        let (node, seen) = provider(&["sk-a-0123456789"], status).await;
        let gw = with_keys(&node, "").await;
        for body in both().iter().cycle().take(6) {
            let told = ask(&gw, body).await.expect(200);
            assert!(told.clean());
        }
        let seen = seen.lock().clone();
        assert_eq!(seen.iter().filter(|key| *key == "sk-a-0123456789").count(), 1, "{seen:?}");
        assert_eq!(seen.iter().filter(|key| *key == "sk-b-0123456789").count(), 6, "{seen:?}");
        assert_eq!(credentials(&gw).await, ["refused", "ready"]);
        gw.settles("tollgate_attempts_total", &[("outcome", "auth")], 1.0).await;
        // The node did nothing wrong.
        assert_eq!(gw.metric("tollgate_node_up", &[("upstream", "far")]).await, 1.0);
        let all = gw.admin("GET", "/api/upstreams").send().await.json();
        assert_eq!(all["upstreams"][0]["nodes"][0]["failures"], 0, "{all}");
        is_clean(&gw).await;
    }
}

#[tokio::test]
async fn when_all_credentials_are_refused_it_is_502_and_says_nothing_of_them() {
    for body in both() {
        let (node, seen) = provider(&["sk-a-0123456789", "sk-b-0123456789"], "401 Unauthorized").await;
        let gw = with_keys(&node, "").await;
        for attempts in [2, 0] {
            let told = ask(&gw, &body).await;
            is_error(&told, 502, "upstream_error");
            assert!(!told.text().contains("sk-"), "{}", told.text());
            if attempts > 0 {
                attempts_told(&told, attempts);
            }
        }
        assert_eq!(seen.lock().len(), 2, "each was tried once, and no more while it rests");
        assert_eq!(credentials(&gw).await, ["refused", "refused"]);
        assert!(!gw.output().contains("sk-a-0123456789"), "a credential in the log");
        is_clean(&gw).await;
    }
}

/// A rest after a 429 of one credential: the other takes all calls, and after the rest both do.
#[tokio::test]
async fn a_limited_credential_rests_and_comes_back() {
    let (node, seen) = provider(&["sk-a-0123456789"], "429 Too Many Requests").await;
    let gw = with_keys(&node, ", cooldown: 1s").await;
    let since = std::time::Instant::now();
    for _ in 0..6 {
        let told = ask(&gw, &chat("hi")).await.expect(200);
        assert!(told.took < SLACK);
    }
    assert!(since.elapsed() < ms(900), "too slow to tell anything");
    let tried = || seen.lock().iter().filter(|key| *key == "sk-a-0123456789").count();
    assert_eq!((tried(), credentials(&gw).await), (1, vec!["resting".to_owned(), "ready".to_owned()]));
    tokio::time::sleep(ms(1100)).await;
    for _ in 0..6 {
        ask(&gw, &chat("hi")).await.expect(200);
    }
    assert_eq!(tried(), 2, "tried once again, and rests once more");
}

mod runs {
    use super::*;
    use crate::harness::Refused;
    use tollgate_load::dify::{DifyApp, DifyConfig};

    async fn two_apps(urls: &[String]) -> Gateway {
        let conf = Conf::new()
            .upstream("dify", urls, "dialect: dify, balance: round_robin, timeouts: { first_byte: 400ms, total: 700ms }")
            .route("{ name: bot, match: { path: /v1/chat-messages }, call: { upstream: dify }, filters: { auth: off, limit: off } }");
        Gateway::with(&conf).await
    }

    async fn run(gw: &Gateway, mode: &str) -> Answer {
        let body = json!({ "inputs": {}, "query": "hi", "user": "u", "response_mode": mode });
        gw.post("/v1/chat-messages").key("app-simulated").json(&body).send().await
    }

    async fn app() -> DifyApp {
        DifyApp::start(DifyConfig { per_token: Duration::ZERO, ..DifyConfig::default() }).await.expect("an app")
    }

    /// Whether a run was begun or not cannot be known: it must not be begun again.
    #[tokio::test]
    async fn a_run_that_may_have_begun_is_not_begun_again() {
        for (what, status) in [
            ("500", 502),
            ("503", 502),
            ("refuse", 502),
            ("slow_header:60000", 504),
            ("cut:0", 502),
            ("slow_token:60000", 504),
        ] {
            for mode in ["streaming", "blocking"] {
                let (one, two) = (app().await, app().await);
                one.set_fault(Some(fault(what)));
                two.set_fault(Some(fault(what)));
                let gw = two_apps(&[one.url(), two.url()]).await;
                let told = run(&gw, mode).await;
                assert_eq!(told.status(), status, "{what} {mode}: {}", told.text());
                assert!(told.clean(), "{what} {mode}");
                let error = told.json();
                assert_eq!(error["status"], status, "in Dify's dialect: {error}");
                assert!(error["code"].is_string() && error["message"].is_string(), "{error}");
                assert_eq!(one.requests().len() + two.requests().len(), 1, "{what} {mode}: the run was begun twice");
                is_clean(&gw).await;
            }
        }
    }

    #[tokio::test]
    async fn a_run_that_surely_did_not_begin_goes_elsewhere() {
        for mode in ["streaming", "blocking"] {
            let (closed, good) = (Refused::new(), app().await);
            let gw = two_apps(&[closed.url(), good.url()]).await;
            let mut attempts = Vec::new();
            for _ in 0..2 {
                let told = run(&gw, mode).await.expect(200);
                assert!(told.clean());
                attempts.push(told.header("x-tollgate-attempts").to_owned());
            }
            attempts.sort();
            assert_eq!((attempts, good.requests().len()), (vec!["1".to_owned(), "2".to_owned()], 2));
        }
    }
}
