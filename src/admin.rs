//! The admin port: metrics, liveness, the console, and what the gateway knows of itself.

mod api;
mod keys;
mod openapi;
mod quota;

use std::borrow::Cow;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::Router;
use axum::extract::{Request, State};
use axum::http::header::{
    AUTHORIZATION, CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS,
};
use axum::http::{HeaderMap, StatusCode};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, delete, get, post};
use schemars::JsonSchema;
use serde::Serialize;
use sha2::{Digest, Sha256};
use tokio::net::TcpListener;
use tollgate_filters::config::Secret;
use tollgate_filters::retry::Admits;
use tollgate_filters::upstream::Node;

use crate::gateway::Gateway;

/// Who may use the admin port.
#[derive(Clone)]
pub(crate) struct Access {
    /// The token asked for, if one is set.
    pub token: Option<Secret>,
    /// Whether `/metrics` is open all the same.
    pub open_metrics: bool,
}

#[derive(Clone)]
struct Admin {
    gateway: Arc<Gateway>,
    access: Access,
}

/// What anybody who reaches the port may ask.
fn open() -> [(&'static str, MethodRouter<Admin>); 4] {
    [("/", get(console)), ("/metrics", get(metrics)), ("/livez", get(|| async { "ok" })), ("/readyz", get(ready))]
}

/// What asks for the token where one is set.
fn guarded() -> [(&'static str, MethodRouter<Admin>); 9] {
    [
        ("/api/status", get(api::status)),
        ("/api/upstreams", get(api::upstreams)),
        ("/api/routes", get(api::routes)),
        ("/api/models", get(api::models)),
        ("/api/keys", get(keys::list).post(keys::create)),
        ("/api/keys/{key_id}", delete(keys::revoke)),
        ("/api/keys/{key_id}/rotate", post(keys::rotate)),
        ("/api/quota/{key_id}", get(quota::show).delete(quota::reset)),
        ("/api/openapi.json", get(openapi::openapi)),
    ]
}

/// Serves the admin port until the task is aborted.
///
/// # Errors
/// What the listener says.
pub(crate) async fn serve(listener: TcpListener, gateway: Arc<Gateway>, access: Access) -> io::Result<()> {
    let admin = Admin { gateway, access };
    let all = |paths: &[(&'static str, MethodRouter<Admin>)]| {
        paths.iter().fold(Router::new(), |router, (path, method)| router.route(path, method.clone()))
    };
    let app = all(&guarded())
        .route_layer(middleware::from_fn_with_state(admin.clone(), ask_token))
        .merge(all(&open()))
        .method_not_allowed_fallback(|| async {
            error(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", "this path does not take this method")
        })
        .fallback(|| async { error(StatusCode::NOT_FOUND, "not_found", "there is nothing at this path") })
        .with_state(admin);
    axum::serve(listener, app).await
}

/// Why the admin port did not answer.
#[derive(Debug, Serialize, JsonSchema)]
struct Failure {
    error: Reason,
}

/// Why, in words and in a code.
#[derive(Debug, Serialize, JsonSchema)]
struct Reason {
    /// For people.
    message: Cow<'static, str>,
    /// `invalid_request_error`.
    r#type: &'static str,
    /// Always null.
    param: Option<&'static str>,
    /// For programs.
    code: &'static str,
}

fn error(status: StatusCode, code: &'static str, message: impl Into<Cow<'static, str>>) -> Response {
    let error = Reason { message: message.into(), r#type: "invalid_request_error", param: None, code };
    (status, Json(Failure { error })).into_response()
}

fn no_token() -> Response {
    let message = "the admin token is missing or wrong: send it as `Authorization: Bearer TOKEN`";
    error(StatusCode::UNAUTHORIZED, "invalid_token", message)
}

/// Compares hashes, so that the time taken tells nothing of the token.
fn token_fits(expected: &Secret, headers: &HeaderMap) -> bool {
    let shown = headers.get(AUTHORIZATION).and_then(|v| v.as_bytes().strip_prefix(b"Bearer ")).unwrap_or_default();
    Sha256::digest(shown) == Sha256::digest(expected.expose().as_bytes())
}

async fn ask_token(State(admin): State<Admin>, request: Request, next: Next) -> Response {
    match &admin.access.token {
        Some(token) if !token_fits(token, request.headers()) => no_token(),
        Some(_) | None => next.run(request).await,
    }
}

async fn metrics(State(admin): State<Admin>, headers: HeaderMap) -> Response {
    if let Some(token) = admin.access.token.as_ref().filter(|_| !admin.access.open_metrics)
        && !token_fits(token, &headers)
    {
        return no_token();
    }
    let gateway = &admin.gateway;
    gateway.metrics.set_reservations(gateway.ledger.inflight());
    gateway.metrics.set_tokens_lost(gateway.ledger.lost_tokens());
    gateway.metrics.set_access_dropped(gateway.access.dropped());
    let runtime = gateway.live.load();
    for upstream in runtime.upstreams.values() {
        if upstream.queue.size() > 0 {
            gateway.metrics.set_queue_waiting(&upstream.name, upstream.queue.waiting());
        }
        for node in &upstream.nodes {
            if let Some(handles) = runtime.node(&upstream.name, &node.name) {
                handles.set_inflight(node.state.inflight() as usize);
                handles.set_up(is_up(node, gateway.now()));
            }
        }
    }
    ([(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], gateway.metrics.render()).into_response()
}

fn is_up(node: &Node, now: Duration) -> bool {
    let out = matches!(node.state.ejected.admits(now), Admits::NotBefore(_));
    node.weight > 0 && !node.addresses.load().is_empty() && !out
}

async fn ready(State(admin): State<Admin>) -> Response {
    if admin.gateway.is_draining() {
        (StatusCode::SERVICE_UNAVAILABLE, "draining").into_response()
    } else {
        "ok".into_response()
    }
}

/// The page has no data in it: it asks for that itself, with the token that it is given.
async fn console() -> Response {
    const PAGE: &str = include_str!("admin/console.html");
    let nonce = format!("{:032x}", rand::random::<u128>());
    let policy = format!(
        "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; img-src data:; \
         base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    );
    let headers = [
        (CONTENT_TYPE, "text/html; charset=utf-8"),
        (CONTENT_SECURITY_POLICY, policy.as_str()),
        (REFERRER_POLICY, "no-referrer"),
        (X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (CACHE_CONTROL, "no-store"),
    ];
    (headers, PAGE.replace("NONCE", &nonce)).into_response()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn only_the_very_token_fits() {
        let token = Secret::new("admin-token");
        let shown = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(AUTHORIZATION, text.parse().unwrap());
            token_fits(&token, &headers)
        };
        assert!(shown("Bearer admin-token"));
        assert!(!shown("Bearer admin-toke") && !shown("admin-token") && !token_fits(&token, &HeaderMap::new()));
    }
    /// Asks an admin port that was started for it; gives head and body.
    async fn ask(address: std::net::SocketAddr, path: &str, more: &str) -> (String, String) {
        send(address, "get", path, more).await
    }

    async fn send(address: std::net::SocketAddr, method: &str, path: &str, more: &str) -> (String, String) {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
        let method = method.to_uppercase();
        let request = format!("{method} {path} HTTP/1.1\r\nhost: admin\r\nconnection: close\r\n{more}\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head.to_owned(), body.to_owned())
    }

    /// A gateway with the configuration of the demo and an admin token.
    async fn started() -> std::net::SocketAddr {
        use tollgate_filters::config::Process;
        let text = include_str!("../conf/demo.yaml")
            .replace("127.0.0.1:8080", "127.0.0.1:0")
            .replace("{ bind: 127.0.0.1:9180 }", "{ bind: 127.0.0.1:0, token: admin-token }");
        let loaded = crate::config::load_text("demo.yaml", &text, &Process).unwrap();
        let server = crate::server::Server::start(&loaded, &Process).await.unwrap();
        let address = server.admin_address();
        tokio::spawn(server.run_until_signal());
        address
    }

    /// Fails unless an answer has just the fields that its schema has, all of which it promises.
    fn fits(document: &Value, schema: &Value, value: &Value) {
        if let Some(name) = schema["$ref"].as_str() {
            let name = name.strip_prefix("#/components/schemas/").unwrap();
            return fits(document, &document["components"]["schemas"][name], value);
        }
        if let Some(list) = value.as_array() {
            assert!(!list.is_empty(), "an empty list shows nothing: {schema}");
            return list.iter().for_each(|item| fits(document, &schema["items"], item));
        }
        if let (Some(fields), Some(properties)) = (value.as_object(), schema["properties"].as_object()) {
            assert_eq!(fields.keys().collect::<BTreeSet<_>>(), properties.keys().collect::<BTreeSet<_>>());
            fields.iter().filter(|(name, _)| *name != "credentials").for_each(|(name, field)| {
                fits(document, &properties[name], field);
            });
        }
    }

    #[tokio::test]
    async fn every_endpoint_is_described_and_answers_as_it_is_described() {
        let address = started().await;
        let token = "authorization: Bearer admin-token\r\n";
        let (_, text) = ask(address, "/api/openapi.json", token).await;
        let document: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(document, openapi::document(true, true));
        let described: BTreeSet<&str> = document["paths"].as_object().unwrap().keys().map(String::as_str).collect();
        let served: BTreeSet<&str> = open().iter().chain(&guarded()).map(|(path, _)| *path).collect();
        assert_eq!(described, served);
        for path in served {
            let methods = document["paths"][path].as_object().unwrap();
            assert!(!methods.is_empty(), "{path}");
            let path = &path.replace("{key_id}", "demo");
            for (method, endpoint) in methods.iter().filter(|(method, _)| *method != "get") {
                // What they do is tried elsewhere; here only that they are there, and closed to strangers.
                let target = path.replace("demo", "nobody");
                let (head, body) = send(address, method, &target, token).await;
                let described = |status: &str| !endpoint["responses"][status].is_null();
                assert!(described(head.split(' ').nth(1).unwrap()), "{method} {path}: {head}");
                let refused = serde_json::from_str(&body).unwrap();
                fits(&document, &json!({ "$ref": "#/components/schemas/Failure" }), &refused);
                let (head, _) = send(address, method, &target, "").await;
                assert!(head.starts_with("HTTP/1.1 401") && described("401"), "{method} {path}: {head}");
            }
            let Some(endpoint) = methods.get("get") else {
                assert!(ask(address, path, token).await.0.starts_with("HTTP/1.1 405"), "{path}");
                continue;
            };
            let (head, body) = ask(address, path, token).await;
            assert!(head.starts_with("HTTP/1.1 200"), "{path}: {head}");
            let content = endpoint["responses"]["200"]["content"].as_object().unwrap();
            let (kind, shape) = content.iter().next().unwrap();
            assert!(head.contains(&format!("content-type: {kind}")), "{path}: {head}");
            if kind == "application/json" {
                fits(&document, &shape["schema"], &serde_json::from_str(&body).unwrap());
            }
            let (head, body) = ask(address, path, "").await;
            let refused = &endpoint["responses"]["401"];
            assert_eq!(head.starts_with("HTTP/1.1 401"), !refused.is_null(), "{path}: {head}");
            if !refused.is_null() {
                let shape = &refused["content"]["application/json"]["schema"];
                fits(&document, shape, &serde_json::from_str(&body).unwrap());
            }
        }
        let (head, _) = ask(address, "/nowhere", token).await;
        assert!(head.starts_with("HTTP/1.1 404"), "{head}");
    }

    #[tokio::test]
    async fn the_console_stands_alone_and_its_policy_lets_only_itself_run() {
        let (head, page) = ask(started().await, "/", "").await;
        let nonce = head.split_once("script-src 'nonce-").unwrap().1.split_once('\'').unwrap().0;
        assert_eq!(nonce.len(), 32);
        assert_eq!(page.matches(&format!("nonce=\"{nonce}\"")).count(), 2);
        assert_eq!(page.matches("nonce=").count(), page.matches("<script").count() + page.matches("<style").count());
        for outside in ["http://", "https://", "//cdn", "src=", "innerHTML", " style=\""] {
            let found = page.lines().find(|line| line.contains(outside) && !line.trim_start().starts_with("//"));
            assert!(found.is_none(), "{outside}: {found:?}");
        }
        for path in ["/api/status", "/api/upstreams", "/api/models", "/api/routes"] {
            assert!(page.contains(path) && guarded().iter().any(|(known, _)| *known == path), "{path}");
        }
    }
}
