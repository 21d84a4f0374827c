//! The admin port: metrics, liveness, and what the gateway knows of itself.

use std::io;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::Json;
use axum::Router;
use axum::extract::{Request, State};
use axum::http::header::{AUTHORIZATION, CONTENT_TYPE};
use axum::http::{HeaderMap, StatusCode};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio::net::TcpListener;
use tollgate_filters::config::Secret;
use tollgate_filters::upstream::Upstream;

use crate::gateway::Gateway;
use crate::runtime::{Callee, Lane, Route};

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

/// Serves the admin port until the task is aborted.
///
/// # Errors
/// What the listener says.
pub(crate) async fn serve(listener: TcpListener, gateway: Arc<Gateway>, access: Access) -> io::Result<()> {
    let admin = Admin { gateway, access };
    let guarded = Router::new()
        .route("/api/status", get(status))
        .route("/api/upstreams", get(upstreams))
        .route("/api/routes", get(routes))
        .route("/api/models", get(models))
        .route_layer(middleware::from_fn_with_state(admin.clone(), ask_token));
    let app = Router::new()
        .route("/metrics", get(metrics))
        .route("/livez", get(|| async { "ok" }))
        .route("/readyz", get(ready))
        .route("/", get(console))
        .merge(guarded)
        .fallback(|| async { error(StatusCode::NOT_FOUND, "not_found", "there is nothing at this path") })
        .with_state(admin);
    axum::serve(listener, app).await
}

fn error(status: StatusCode, code: &str, message: &str) -> Response {
    (
        status,
        Json(json!({ "error": { "message": message, "type": "invalid_request_error", "param": null, "code": code } })),
    )
        .into_response()
}

/// Compares hashes, so that the time taken tells nothing of the token.
fn token_fits(expected: &Secret, headers: &HeaderMap) -> bool {
    let shown = headers.get(AUTHORIZATION).and_then(|v| v.as_bytes().strip_prefix(b"Bearer ")).unwrap_or_default();
    Sha256::digest(shown) == Sha256::digest(expected.expose().as_bytes())
}

async fn ask_token(State(admin): State<Admin>, request: Request, next: Next) -> Response {
    match &admin.access.token {
        Some(token) if !token_fits(token, request.headers()) => error(
            StatusCode::UNAUTHORIZED,
            "invalid_token",
            "the admin token is missing or wrong: send it as `Authorization: Bearer TOKEN`",
        ),
        _ => next.run(request).await,
    }
}

async fn metrics(State(admin): State<Admin>, headers: HeaderMap) -> Response {
    if let Some(token) = admin.access.token.as_ref().filter(|_| !admin.access.open_metrics)
        && !token_fits(token, &headers)
    {
        return error(
            StatusCode::UNAUTHORIZED,
            "invalid_token",
            "the admin token is missing or wrong: send it as `Authorization: Bearer TOKEN`",
        );
    }
    let gateway = &admin.gateway;
    gateway.metrics.set_reservations(gateway.ledger.inflight());
    gateway.metrics.set_access_dropped(gateway.access.dropped());
    let runtime = gateway.live.load();
    for upstream in runtime.upstreams.values() {
        for node in &upstream.nodes {
            if let Some(handles) = runtime.node(&upstream.name, &node.name) {
                handles.set_inflight(node.state.inflight() as usize);
                handles.set_up(is_up(upstream, node));
            }
        }
    }
    ([(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], gateway.metrics.render()).into_response()
}

fn is_up(_: &Upstream, node: &tollgate_filters::upstream::Node) -> bool {
    node.weight > 0 && !node.addresses.load().is_empty()
}

async fn ready(State(admin): State<Admin>) -> Response {
    if admin.gateway.is_draining() {
        (StatusCode::SERVICE_UNAVAILABLE, "draining").into_response()
    } else {
        "ok".into_response()
    }
}

async fn console() -> Response {
    let text = "Tollgate admin port\n\n/metrics /livez /readyz\n/api/status /api/upstreams /api/routes /api/models\n";
    ([(CONTENT_TYPE, "text/plain; charset=utf-8")], text).into_response()
}

fn seconds(time: SystemTime) -> f64 {
    time.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs_f64()
}

async fn status(State(admin): State<Admin>) -> Json<Value> {
    let gateway = &admin.gateway;
    let runtime = gateway.live.load();
    Json(json!({
        "version": env!("CARGO_PKG_VERSION"),
        "generation": runtime.generation,
        "config_hash": runtime.hash,
        "last_reload": { "at": seconds(runtime.since), "success": true, "error": null },
        "started_at": seconds(gateway.started_at),
        "uptime_seconds": gateway.started.elapsed().as_secs(),
        "draining": gateway.is_draining(),
        "requests_open": gateway.open.load(std::sync::atomic::Ordering::Relaxed),
        "reservations_inflight": gateway.ledger.inflight(),
        "buffered_bytes": gateway.buffered.used(),
        "keys": runtime.keys.len(),
    }))
}

async fn upstreams(State(admin): State<Admin>) -> Json<Value> {
    let runtime = admin.gateway.live.load();
    let list: Vec<Value> = runtime
        .upstreams
        .values()
        .map(|upstream| {
            let nodes: Vec<Value> = upstream
                .nodes
                .iter()
                .map(|node| {
                    json!({
                        "name": &*node.name, "weight": node.weight, "up": is_up(upstream, node),
                        "inflight": node.state.inflight(), "attempts": node.state.attempts(), "failures": node.state.failures(),
                        "addresses": node.addresses.load().iter().map(ToString::to_string).collect::<Vec<_>>(),
                    })
                })
                .collect();
            json!({
                "name": &*upstream.name, "dialect": upstream.dialect.as_str(), "balance": upstream.policy.name(),
                "credentials": upstream.credentials.iter().map(|c| &*c.label).collect::<Vec<_>>(), "nodes": nodes,
            })
        })
        .collect();
    Json(json!({ "upstreams": list }))
}

fn lane(route: &Route) -> Value {
    match &route.lane {
        Lane::Own => json!("own"),
        Lane::Call(Callee::Models(_)) => json!({ "call": "models" }),
        Lane::Call(Callee::Upstream(model)) => json!({ "call": model.targets.first().map(|t| &*t.upstream.name) }),
        Lane::Pass(pass) => json!({ "pass": &*pass.upstream.name, "websocket": pass.websocket }),
    }
}

async fn routes(State(admin): State<Admin>) -> Json<Value> {
    let runtime = admin.gateway.live.load();
    let list: Vec<Value> = runtime
        .router
        .iter()
        .map(|(_, route)| json!({ "name": &*route.name, "dialect": route.dialect.as_str(), "filters": route.chain.names(), "lane": lane(route) }))
        .collect();
    Json(json!({ "routes": list }))
}

async fn models(State(admin): State<Admin>) -> Json<Value> {
    let runtime = admin.gateway.live.load();
    let list: Vec<Value> = runtime
        .models
        .iter()
        .map(|(name, model)| {
            let targets: Vec<Value> =
                model.targets.iter().map(|t| json!({ "upstream": &*t.upstream.name, "model": &*t.model })).collect();
            json!({ "name": name, "model": &*model.name, "targets": targets })
        })
        .collect();
    Json(json!({ "models": list }))
}

#[cfg(test)]
mod tests {
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
}
