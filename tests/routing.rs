//! Which route a request takes.

use serde_json::{Value, json};

use crate::harness::{Conf, Gateway, RawNode, WENDY, chat, named, node};

/// Nodes `a` to `e`, each an upstream of that name, and pass routes to them as the test says.
struct Town {
    gw: Gateway,
    _nodes: Vec<RawNode>,
}

impl Town {
    async fn with(routes: &[&str]) -> Self {
        let mut nodes = Vec::new();
        let mut conf = Conf::new();
        for name in ["a", "b", "c", "d", "e"] {
            let node = named(name).await;
            conf = conf.upstream(name, &[node.url()], "dialect: none");
            nodes.push(node);
        }
        for route in routes {
            conf = conf.route(route);
        }
        Self { gw: Gateway::with(&conf).await, _nodes: nodes }
    }

    /// The node that a GET of this target ends at.
    async fn node(&self, target: &str) -> Value {
        self.gw.get(target).send().await.expect(200).json()["node"].clone()
    }
}

fn pass(name: &str, matches: &str, to: &str) -> String {
    format!("{{ name: {name}, match: {{ {matches} }}, pass: {{ upstream: {to} }}, filters: {{ auth: off }} }}")
}

#[tokio::test]
async fn an_exact_path_matches_nothing_but_itself() {
    let town = Town::with(&[&pass("one", "path: /one", "a"), &pass("two", "path: [/two, /zwei]", "b")]).await;
    assert_eq!(town.node("/one").await, "a");
    assert_eq!(town.node("/two").await, "b");
    assert_eq!(town.node("/zwei?x=1").await, "b");
    for target in ["/", "/one/", "/one/more", "/On", "/ONE", "/onemore"] {
        assert_eq!(town.gw.get(target).send().await.refusal(), (404, "not_found".into()), "{target}");
    }
}

#[tokio::test]
async fn a_prefix_matches_everything_below_it() {
    let town = Town::with(&[&pass("files", "prefix: /files/", "a"), &pass("rest", "prefix: /", "b")]).await;
    assert_eq!(town.node("/files/").await, "a");
    assert_eq!(town.node("/files/x/y.txt").await, "a");
    assert_eq!(town.node("/filesystem").await, "b");
    assert_eq!(town.node("/").await, "b");
}

#[tokio::test]
async fn a_star_stands_for_one_segment() {
    let town = Town::with(&[&pass("run", "path: /apps/*/run", "a"), &pass("rest", "prefix: /", "b")]).await;
    assert_eq!(town.node("/apps/42/run").await, "a");
    assert_eq!(town.node("/apps/42/43/run").await, "b");
    assert_eq!(town.node("/apps/run").await, "b");
}

#[tokio::test]
async fn the_first_route_that_matches_wins() {
    let town = Town::with(&[
        &pass("wide", "prefix: /v1/, method: [GET]", "a"),
        &pass("narrow", "path: /v1/thing", "b"),
        &pass("rest", "prefix: /", "c"),
    ])
    .await;
    assert_eq!(town.node("/v1/thing").await, "a", "the more specific route comes later");
    assert_eq!(town.gw.post("/v1/thing").bytes("x").send().await.expect(200).json()["node"], "b");
    assert_eq!(town.gw.post("/v1/other").bytes("x").send().await.expect(200).json()["node"], "c");
    assert_eq!(town.node("/elsewhere").await, "c");
}

#[tokio::test]
async fn routes_are_told_apart_by_host_header_and_query() {
    let town = Town::with(&[
        &pass("host", "prefix: /, host: chat.example", "a"),
        &pass("header", "prefix: /, header: { app-id: support }", "b"),
        &pass("query", "prefix: /, query: { version: \"2\" }", "c"),
        &pass("rest", "prefix: /", "d"),
    ])
    .await;
    let gw = &town.gw;
    let by = async |request: crate::harness::client::Request| request.send().await.expect(200).json()["node"].clone();
    assert_eq!(by(gw.get("/x").header("host", "chat.example")).await, "a");
    assert_eq!(by(gw.get("/x").header("host", "CHAT.example:8080")).await, "a", "case and port do not count");
    assert_eq!(by(gw.get("/x").header("host", "other.example")).await, "d");
    assert_eq!(by(gw.get("/x").header("App-Id", "support")).await, "b");
    assert_eq!(by(gw.get("/x").header("app-id", "sales")).await, "d");
    assert_eq!(by(gw.get("/x?a=1&version=2")).await, "c");
    assert_eq!(by(gw.get("/x?version=22")).await, "d");
}

#[tokio::test]
async fn a_known_path_with_another_method_is_405_and_names_the_right_ones() {
    let town =
        Town::with(&[&pass("post", "path: /thing, method: [POST, PUT]", "a"), &pass("other", "path: /x", "b")]).await;
    let answer = town.gw.get("/thing").send().await;
    assert_eq!(answer.refusal(), (405, "method_not_allowed".into()));
    let mut allowed: Vec<&str> = answer.header("allow").split(',').map(str::trim).collect();
    allowed.sort_unstable();
    assert_eq!(allowed, ["POST", "PUT"]);
    assert_eq!(town.gw.post("/thing").bytes("x").send().await.expect(200).json()["node"], "a");
}

#[tokio::test]
async fn a_method_that_a_later_route_takes_is_not_refused() {
    let town = Town::with(&[
        &pass("post", "path: /thing, method: [POST]", "a"),
        &pass("get", "path: /thing, method: [GET]", "b"),
    ])
    .await;
    assert_eq!(town.node("/thing").await, "b");
    assert_eq!(town.gw.post("/thing").bytes("x").send().await.expect(200).json()["node"], "a");
}

#[tokio::test]
async fn what_no_route_takes_is_404_in_openai_shape() {
    let town = Town::with(&[&pass("one", "path: /one", "a")]).await;
    let answer = town.gw.get("/nothing").send().await;
    assert_eq!(answer.refusal(), (404, "not_found".into()));
    assert_eq!(answer.header("content-type"), "application/json");
    assert!(answer.has("x-request-id"));
    let json = answer.json();
    assert_eq!(json["error"]["type"], "invalid_request_error");
    assert_eq!(json["error"]["param"], Value::Null);
    assert_eq!(json.as_object().expect("an object").len(), 1);
}

/// A path is either refused or taken as it is meant; no spelling of it slips into another route.
#[tokio::test]
async fn no_odd_spelling_of_a_path_reaches_another_route() {
    let town = Town::with(&[&pass("open", "prefix: /open/", "a"), &pass("secret", "prefix: /secret/", "b")]).await;
    for target in [
        "/open/../secret/x",
        "/open/%2e%2e/secret/x",
        "/open/%2E%2e/secret/x",
        "/open/.%2e/secret/x",
        "/open/..%2fsecret/x",
        "/open/%2e%2e%2fsecret/x",
        "/open/..%5csecret/x",
        "/open/..\\secret/x",
        "/open/..;/secret/x",
        "/open/./../secret/x",
        "/open/%252e%252e/secret/x",
        "/open//../secret/x",
        "//secret/x",
        "/open/x%00y",
        "/open/x%0d%0ay",
        "/open/%zz",
        "/open/%2",
    ] {
        let request = format!("GET {target} HTTP/1.1\r\nhost: gw\r\nconnection: close\r\n\r\n");
        let answer = town.gw.raw().await.ask(request).await;
        match answer.status() {
            400 => assert!(answer.text().contains("invalid_path"), "{target}: {}", answer.text()),
            404 => (),
            200 => {
                let json: Value = serde_json::from_slice(&answer.body).expect("JSON");
                assert_eq!(json["node"], "a", "{target} may only end where it plainly points");
                let seen = json["target"].as_str().expect("a target").to_lowercase();
                let meant = seen.replace("%2e", ".").replace("%2f", "/").replace("%5c", "/").replace('\\', "/");
                assert!(!meant.contains(".."), "{target} was passed on as {seen}");
            }
            other => panic!("{target}: {other} {}", answer.text()),
        }
    }
}

#[tokio::test]
async fn an_encoded_slash_or_dot_is_no_way_around_an_exact_call_route() {
    let near = node("qwen").await;
    let gw = Gateway::with(&Conf::serving("qwen", &[near.url()])).await;
    for target in ["/v1%2fchat/completions", "/v1//chat/completions", "/v1/./chat/completions", "/v1/chat/completions/"]
    {
        let answer = gw.post(target).key(WENDY).json(&chat("hello")).send().await;
        let (status, code) = answer.refusal();
        assert!(
            matches!((status, code.as_str()), (400, "invalid_path") | (404, "not_found")),
            "{target}: {status} {code}"
        );
    }
    assert!(near.requests().is_empty());
}

#[tokio::test]
async fn the_path_and_query_arrive_as_they_were_sent() {
    let town = Town::with(&[&pass("rest", "prefix: /", "a")]).await;
    for target in ["/a/b?x=1&y=%20z", "/a%20b/c?q=a%2Fb", "/emoji/%F0%9F%98%80", "/a?", "/a/?x", "/@a/:b,c~d"] {
        let answer = town.gw.get(target).send().await.expect(200).json();
        assert_eq!(answer["target"], json!(target));
    }
}

#[tokio::test]
async fn health_and_our_own_lists_win_over_a_prefix_route() {
    let town = Town::with(&[&pass("rest", "prefix: /", "a")]).await;
    let health = town.gw.get("/health").send().await.expect(200);
    assert_eq!(health.text().trim(), "ok");
    let models = town.gw.get("/v1/models").key(WENDY).send().await.expect(200);
    assert_eq!(models.json()["object"], "list");
    assert_eq!(town.gw.get("/v1/models").send().await.refusal(), (401, "missing_api_key".into()));
    assert!(town.gw.get("/v1/quota").key(WENDY).send().await.expect(200).json()["limits"].is_array());
    assert_eq!(town.node("/v1/other").await, "a");
}

#[tokio::test]
async fn a_route_that_names_the_very_path_wins_over_our_own() {
    let town = Town::with(&[&pass("own", "path: [/health, /v1/models]", "a"), &pass("rest", "prefix: /", "b")]).await;
    assert_eq!(town.node("/health").await, "a");
    assert_eq!(town.node("/v1/models").await, "a");
}

#[tokio::test]
async fn health_asks_for_no_key_and_knows_head() {
    let gw = Gateway::with(&Conf::new()).await;
    assert_eq!(gw.get("/health").send().await.expect(200).text().trim(), "ok");
    assert_eq!(gw.get("/health").header("authorization", "Bearer nonsense").send().await.status(), 200);
    assert_eq!(gw.get("/health").http2().send().await.status(), 200);
    let head = gw.request("HEAD", "/health").send().await.expect(200);
    assert!(head.body().is_empty() && head.clean());
}
