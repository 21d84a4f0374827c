//! Who may do what, and what a node learns of the caller.

use serde_json::json;
use tempfile::TempDir;

use crate::harness::client::Request;
use crate::harness::{ALICE, Conf, Gateway, WENDY, chat, node, sha256};

const PATH: &str = "/v1/chat/completions";

#[tokio::test]
async fn a_key_is_taken_as_bearer_x_api_key_or_api_key() {
    let near = node("qwen").await;
    let gw = Gateway::with(&Conf::serving("qwen", &[near.url()])).await;
    for (name, value) in [
        ("authorization", format!("Bearer {WENDY}")),
        ("authorization", format!("bearer {WENDY}")),
        ("x-api-key", WENDY.to_owned()),
        ("api-key", WENDY.to_owned()),
    ] {
        gw.post(PATH).header(name, &value).json(&chat("hello")).send().await.expect(200);
    }
}

#[tokio::test]
async fn a_missing_key_and_a_wrong_key_are_401_in_openai_shape() {
    let near = node("qwen").await;
    let gw = Gateway::with(&Conf::serving("qwen", &[near.url()])).await;
    let missing = gw.post(PATH).json(&chat("hello")).send().await;
    assert_eq!(missing.refusal(), (401, "missing_api_key".into()));
    assert_eq!(missing.json()["error"]["type"], "invalid_request_error");
    assert_eq!(missing.header("content-type"), "application/json");
    assert!(missing.has("www-authenticate"), "a 401 names the scheme");
    for wrong in ["nonsense", "alice", "alice-secret-ke", "alice-secret-keyy", "ALICE-SECRET-KEY"] {
        let answer = gw.post(PATH).key(wrong).json(&chat("hello")).send().await;
        assert_eq!(answer.refusal(), (401, "invalid_api_key".into()), "{wrong}");
        assert!(!answer.text().contains(wrong), "the key is not repeated");
    }
    assert!(near.requests().is_empty());
    assert!(!gw.output().contains("nonsense"), "a wrong key is not logged");
}

#[tokio::test]
async fn an_authorization_of_another_scheme_is_no_key() {
    let near = node("qwen").await;
    let gw = Gateway::with(&Conf::serving("qwen", &[near.url()])).await;
    for value in ["Basic YTpi", "Bearer", "Bearer ", ""] {
        let answer = gw.post(PATH).header("authorization", value).json(&chat("hello")).send().await;
        assert_eq!(answer.status(), 401, "{value:?}: {}", answer.text());
    }
    assert!(near.requests().is_empty());
}

#[tokio::test]
async fn an_expired_key_is_refused_with_the_words_of_an_unknown_one() {
    let near = node("qwen").await;
    let conf = Conf::serving("qwen", &[near.url()])
        .key("{ id: old, key: old-secret-key, tier: wide, expires: 2020-01-01T00:00:00Z }")
        .key("{ id: young, key: young-secret-key, tier: wide, expires: 2999-01-01T00:00:00Z }");
    let gw = Gateway::with(&conf).await;
    let old = gw.post(PATH).key("old-secret-key").json(&chat("hello")).send().await;
    let unknown = gw.post(PATH).key("unknown-secret-key").json(&chat("hello")).send().await;
    assert_eq!(old.status(), 401);
    assert_eq!(old.json(), unknown.json());
    gw.post(PATH).key("young-secret-key").json(&chat("hello")).send().await.expect(200);
}

#[tokio::test]
async fn keys_come_as_a_hash_from_the_environment_or_from_a_file() {
    let near = node("qwen").await;
    let home = TempDir::new().expect("a directory");
    std::fs::write(home.path().join("carol.key"), "carol-secret-key\n").expect("written");
    let file = home.path().join("carol.key");
    let hash = sha256(b"bob-secret-key");
    let conf = Conf::serving("qwen", &[near.url()])
        .key(&format!("{{ id: bob, sha256: {hash}, tier: wide }}"))
        .key(&format!("{{ id: carol, key: {{ file: \"{}\" }}, tier: wide }}", file.display()))
        .key("{ id: dave, key: { env: DAVE_KEY }, tier: wide }");
    let gw = Gateway::in_home(home, &conf, &[("DAVE_KEY", "dave-secret-key")]).await;
    for key in ["bob-secret-key", "carol-secret-key", "dave-secret-key"] {
        gw.post(PATH).key(key).json(&chat("hello")).send().await.expect(200);
    }
    let answer = gw.post(PATH).key(&hash).json(&chat("hello")).send().await;
    assert_eq!(answer.refusal(), (401, "invalid_api_key".into()), "the hash itself is no key");
}

#[tokio::test]
async fn a_key_may_be_bound_to_models_and_routes() {
    let near = node("qwen").await;
    let conf = Conf::serving("qwen", &[near.url()])
        .model("other", &[("near", "qwen")], "")
        .route("{ name: second, match: { path: /v1/rerank }, call: { models: \"*\" } }")
        .key("{ id: bob, key: bob-secret-key, tier: wide, models: [chat] }")
        .key("{ id: carol, key: carol-secret-key, tier: wide, routes: [second] }");
    let gw = Gateway::with(&conf).await;

    gw.post(PATH).key("bob-secret-key").json(&chat("hello")).send().await.expect(200);
    let mut body = chat("hello");
    body["model"] = "other".into();
    let refused = gw.post(PATH).key("bob-secret-key").json(&body).send().await;
    assert_eq!(refused.refusal(), (403, "model_not_allowed".into()));
    assert_eq!(refused.json()["error"]["param"], "model");

    let rerank = json!({ "model": "chat", "query": "toll", "documents": ["a gate", "a road"] });
    gw.post("/v1/rerank").key("carol-secret-key").json(&rerank).send().await.expect(200);
    let refused = gw.post(PATH).key("carol-secret-key").json(&chat("hello")).send().await;
    assert_eq!(refused.refusal(), (403, "route_not_allowed".into()));
    assert_eq!(near.requests().len(), 2);
}

#[tokio::test]
async fn a_route_may_ask_for_no_key() {
    let near = node("qwen").await;
    let conf = Conf::new().upstream("near", &[near.url()], "").model("chat", &[("near", "qwen")], "").route(
        "{ name: open, match: { path: /v1/chat/completions }, call: { models: \"*\" }, filters: { auth: off } }",
    );
    let gw = Gateway::with(&conf).await;
    gw.post(PATH).json(&chat("hello")).send().await.expect(200);
}

/// A stranger's body is never read: the refusal comes while most of it is still to be sent.
#[tokio::test]
async fn a_wrong_key_is_refused_before_its_body_is_read() {
    let near = node("qwen").await;
    let gw = Gateway::with(&Conf::serving("qwen", &[near.url()])).await;
    let mut client = gw.raw().await;
    let answer = client
        .ask(
            "POST /v1/chat/completions HTTP/1.1\r\nhost: gw\r\nauthorization: Bearer wrong\r\n\
             content-type: application/json\r\ncontent-length: 1000000\r\n\r\n{\"model\":",
        )
        .await;
    assert_eq!(answer.status(), 401);
    assert!(answer.text().contains("invalid_api_key"));
}

fn with_disguise(request: Request) -> Request {
    request
        .header("x-user-id", "root")
        .header("x-user-tier", "enterprise")
        .header("x-tollgate-route", "forged")
        .header("x-forwarded-for", "6.6.6.6")
        .header("x-forwarded-proto", "https")
        .header("x-forwarded-host", "forged.example")
        .header("x-real-ip", "6.6.6.6")
        .header("forwarded", "for=6.6.6.6")
}

#[tokio::test]
async fn our_own_nodes_learn_who_calls_and_never_the_key() {
    let near = node("qwen").await;
    let gw = Gateway::with(&Conf::serving("qwen", &[near.url()])).await;
    let request = with_disguise(gw.post(PATH).key(ALICE)).header("x-request-id", "req-42").header("x-own", "kept");
    let answer = request.json(&chat("hello")).send().await.expect(200);
    assert_eq!(answer.header("x-request-id"), "req-42");

    let requests = near.requests();
    let seen = &requests[0];
    let all = |name: &str| -> Vec<&str> {
        seen.headers.iter().filter(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str()).collect()
    };
    assert_eq!(all("x-user-id"), ["alice"]);
    assert_eq!(all("x-user-tier"), ["free"]);
    assert_eq!(all("x-request-id"), ["req-42"]);
    assert_eq!(all("x-forwarded-for"), ["127.0.0.1"]);
    assert_eq!(all("x-forwarded-proto"), ["http"]);
    assert_eq!(all("x-forwarded-host"), [gw.addr().to_string()]);
    assert_eq!(all("x-real-ip"), ["127.0.0.1"]);
    assert_eq!(all("x-own"), ["kept"]);
    assert_eq!(all("traceparent").len(), 1);
    let trace = all("traceparent")[0];
    let parts: Vec<&str> = trace.split('-').collect();
    assert_eq!(parts.iter().map(|part| part.len()).collect::<Vec<_>>(), [2, 32, 16, 2], "{trace}");
    for gone in ["authorization", "x-api-key", "api-key", "x-tollgate-route", "forwarded"] {
        assert!(all(gone).is_empty(), "{gone} reached the node: {:?}", all(gone));
    }
    assert!(!format!("{:?}", seen.headers).contains(ALICE));
}

#[tokio::test]
async fn a_trace_goes_on_through_the_gateway() {
    let near = node("qwen").await;
    let gw = Gateway::with(&Conf::serving("qwen", &[near.url()])).await;
    let trace = "4bf92f3577b34da6a3ce929d0e0e4736";
    let request = gw.post(PATH).key(WENDY).header("traceparent", &format!("00-{trace}-00f067aa0ba902b7-01"));
    let answer = request.json(&chat("hello")).send().await.expect(200);
    let requests = near.requests();
    let sent = requests[0].headers.iter().find(|(name, _)| name == "traceparent").map(|(_, value)| value.clone());
    assert!(sent.is_some_and(|sent| sent.starts_with(&format!("00-{trace}-"))), "the trace id is kept");
    let line = gw.logged(answer.header("x-request-id")).await;
    assert_eq!(line["trace_id"], trace);
}

#[tokio::test]
async fn a_foreign_upstream_gets_the_credential_and_nothing_of_the_caller() {
    let far = node("gpt").await;
    let conf = Conf::new()
        .upstream("far", &[far.url()], "credentials: [{ env: FAR_KEY }]")
        .model("chat", &[("far", "gpt")], "")
        .llm();
    let gw = Gateway::with_env(&conf, &[("FAR_KEY", "far-credential")]).await;
    for request in
        [gw.post(PATH).key(ALICE), gw.post(PATH).header("x-api-key", ALICE), gw.post(PATH).header("api-key", ALICE)]
    {
        with_disguise(request).header("cookie", "session=1").json(&chat("hello")).send().await.expect(200);
    }
    for seen in far.requests() {
        let header = |name: &str| {
            seen.headers.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.clone())
        };
        assert_eq!(header("authorization").as_deref(), Some("Bearer far-credential"));
        for hidden in [
            "x-user-id",
            "x-user-tier",
            "x-api-key",
            "api-key",
            "x-forwarded-for",
            "x-forwarded-host",
            "x-forwarded-proto",
            "x-real-ip",
            "forwarded",
            "x-tollgate-route",
            "traceparent",
        ] {
            assert_eq!(header(hidden), None, "{hidden} reached a foreign upstream");
        }
        assert!(!format!("{:?}", seen.headers).contains(ALICE));
    }
    assert!(!gw.output().contains("far-credential"));
    assert!(!gw.output().contains(ALICE));
}

#[tokio::test]
async fn a_credential_echoed_in_an_error_is_masked() {
    let far = crate::harness::RawNode::answering(|mut call: crate::harness::Upcall| async move {
        let body = json!({ "error": { "message": "Incorrect API key provided: far-credential", "type": "invalid_request_error" } });
        call.json("400 Bad Request", &body.to_string()).await;
        Some(call)
    })
    .await;
    let conf = Conf::new()
        .upstream("far", &[far.url()], "credentials: [{ env: FAR_KEY }]")
        .model("chat", &[("far", "gpt")], "")
        .llm();
    let gw = Gateway::with_env(&conf, &[("FAR_KEY", "far-credential")]).await;
    let answer = gw.post(PATH).key(WENDY).json(&chat("hello")).send().await;
    assert_eq!(answer.status(), 400);
    assert!(!answer.text().contains("far-credential"), "{}", answer.text());
}

#[tokio::test]
async fn a_key_in_the_query_is_refused_unless_asked_for() {
    let near = node("qwen").await;
    let gw = Gateway::with(&Conf::serving("qwen", &[near.url()])).await;
    let answer = gw.post(&format!("{PATH}?api_key={WENDY}")).json(&chat("hello")).send().await;
    assert!(matches!(answer.status(), 400 | 401), "{} {}", answer.status(), answer.text());
    assert!(near.requests().is_empty());

    let conf = Conf::serving("qwen", &[near.url()]).also("auth: { sources: [bearer, query] }");
    let gw = Gateway::with(&conf).await;
    gw.post(&format!("{PATH}?api_key={WENDY}")).json(&chat("hello")).send().await.expect(200);
    assert!(near.requests().iter().all(|seen| !seen.path_and_query.contains(WENDY)), "the key went upstream");
    assert!(!gw.output().contains(WENDY));
}

#[tokio::test]
async fn an_unsane_request_id_is_replaced() {
    let near = node("qwen").await;
    let gw = Gateway::with(&Conf::serving("qwen", &[near.url()])).await;
    let long = "x".repeat(500);
    for given in ["a b", "<script>", long.as_str()] {
        let request = gw.post(PATH).key(WENDY).header("x-request-id", given);
        let answer = request.json(&chat("hello")).send().await.expect(200);
        let ours = answer.header("x-request-id");
        assert!(!ours.is_empty() && ours != given, "{given:?} came back");
    }
}
