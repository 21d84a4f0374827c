//! What the gateway answers itself on the data port: models, quota, health.

use bytes::Bytes;
use http::header::CONTENT_TYPE;
use http::{HeaderMap, HeaderValue, Method, StatusCode};
use pingora_http::RequestHeader;
use serde_json::json;
use tollgate_filters::error::{GatewayError, Result};
use tollgate_filters::filter::Reply;
use tollgate_filters::limit::{Plan, quota};

use super::Ctx;

/// Whether a path is one of ours.
pub(crate) fn names(path: &str) -> bool {
    matches!(path, "/health" | "/v1/models" | "/v1/quota") || path.strip_prefix(MODEL).is_some_and(|id| !id.is_empty())
}

/// Path below which each model has its own.
const MODEL: &str = "/v1/models/";

/// A model's path with its id decoded: ids may hold slashes, which clients encode.
pub(crate) fn decoded_model(path: &str) -> Option<String> {
    let mut rest = path.strip_prefix(MODEL)?;
    let mut decoded = MODEL.to_owned();
    while let Some((before, after)) = rest.split_once('%') {
        decoded.push_str(before);
        match after.get(..2)? {
            "2F" | "2f" => decoded.push('/'),
            "3A" | "3a" => decoded.push(':'),
            _ => return None,
        }
        rest = after.get(2..)?;
    }
    decoded.push_str(rest);
    Some(decoded)
}

/// Answers one of our paths.
///
/// # Errors
/// `method_not_allowed`, `model_not_found`.
pub(crate) async fn answer(head: &RequestHeader, ctx: &Ctx) -> Result<Reply> {
    if head.method != Method::GET && head.method != Method::HEAD {
        return Err(GatewayError::MethodNotAllowed { allow: "GET, HEAD".to_owned() });
    }
    match head.uri.path() {
        "/health" => Ok(health(ctx)),
        "/v1/quota" => own_quota(ctx).await,
        "/v1/models" => Ok(models(ctx)),
        path => model(path.strip_prefix(MODEL).unwrap_or_default(), ctx),
    }
}

fn health(ctx: &Ctx) -> Reply {
    let (status, text) =
        if ctx.gateway.is_draining() { (StatusCode::SERVICE_UNAVAILABLE, "draining") } else { (StatusCode::OK, "ok") };
    let mut headers = HeaderMap::new();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    Reply { status, headers, body: Bytes::from_static(text.as_bytes()) }
}

fn json_reply(body: &impl serde::Serialize) -> Reply {
    json_bytes(serde_json::to_vec(body).unwrap_or_default())
}

fn json_bytes(body: Vec<u8>) -> Reply {
    let mut headers = HeaderMap::new();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    Reply { status: StatusCode::OK, headers, body: Bytes::from(body) }
}

async fn own_quota(ctx: &Ctx) -> Result<Reply> {
    let caller = ctx.exchange.arrival.caller.as_ref();
    let mut plan = Plan::new();
    if let Some(caller) = caller {
        plan.add(&caller.rules);
        for route in ctx.runtime.router.iter().map(|(_, route)| route).filter(|r| caller.may_use_route(&r.name)) {
            plan.add(&route.rules);
        }
        for model in ctx.runtime.models.values().filter(|m| caller.may_use_model(&m.name)) {
            plan.add(&model.rules);
        }
    }
    plan.add(&ctx.runtime.global);
    let standings = ctx.gateway.ledger.query(&plan).await?;
    let (id, tier) = caller.map_or(("", None), |c| (&*c.id, c.tier.as_deref()));
    let body = quota::body(id, tier, &standings).map_err(|_| GatewayError::Internal)?;
    Ok(json_bytes(body))
}

fn entry(id: &str) -> serde_json::Value {
    json!({ "id": id, "object": "model", "created": 0, "owned_by": "tollgate" })
}

fn models(ctx: &Ctx) -> Reply {
    let caller = ctx.exchange.arrival.caller.as_ref();
    let list: Vec<_> = ctx
        .runtime
        .models
        .iter()
        .filter(|(_, model)| caller.is_none_or(|c| c.may_use_model(&model.name)))
        .map(|(name, _)| entry(name))
        .collect();
    json_reply(&json!({ "object": "list", "data": list }))
}

fn model(id: &str, ctx: &Ctx) -> Result<Reply> {
    let caller = ctx.exchange.arrival.caller.as_ref();
    match ctx.runtime.models.get(id) {
        Some(model) if caller.is_none_or(|c| c.may_use_model(&model.name)) => Ok(json_reply(&entry(id))),
        _ => Err(GatewayError::ModelNotFound(id.to_owned())),
    }
}
