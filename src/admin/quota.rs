//! `/api/quota/{key_id}`: what a key has used, and giving it back.

use std::sync::Arc;

use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use tollgate_filters::auth::Caller;
use tollgate_filters::limit::{Plan, Scope, ScopeId, quota};

use super::{Admin, error};

fn away() -> Response {
    error(StatusCode::SERVICE_UNAVAILABLE, "store_unavailable", "the limit store cannot be asked at the moment")
}

/// The key of that id, in the configuration or in Redis.
async fn caller(admin: &Admin, id: &str) -> Option<Arc<Caller>> {
    let runtime = admin.gateway.live.load_full();
    if let Some(caller) = runtime.keys.callers().find(|caller| &*caller.id == id) {
        return Some(Arc::clone(caller));
    }
    let elsewhere = runtime.keys.elsewhere()?;
    let record = elsewhere.keyring.get(id).await.ok()?;
    elsewhere.caller(&record).ok().map(Arc::new)
}

fn unknown() -> Response {
    error(StatusCode::NOT_FOUND, "not_found", "there is no such key")
}

pub(super) async fn show(State(admin): State<Admin>, Path(id): Path<String>) -> Response {
    let Some(caller) = caller(&admin, &id).await else { return unknown() };
    let plan: Plan = [&caller.rules].into_iter().collect();
    let Ok(standings) = admin.gateway.ledger.query(&plan).await else { return away() };
    match quota::body(&caller.id, caller.tier.as_deref(), &standings) {
        Ok(body) => ([(CONTENT_TYPE, "application/json")], body).into_response(),
        Err(_) => error(StatusCode::INTERNAL_SERVER_ERROR, "internal_error", "an internal error occurred"),
    }
}

pub(super) async fn reset(State(admin): State<Admin>, Path(id): Path<String>) -> Response {
    let Some(caller) = caller(&admin, &id).await else { return unknown() };
    match admin.gateway.ledger.reset(&ScopeId::new(Scope::Key, &caller.id)).await {
        Ok(()) => StatusCode::NO_CONTENT.into_response(),
        Err(_) => away(),
    }
}
