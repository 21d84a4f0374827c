//! `/api/quota/{key_id}`: what a key has used, and giving it back.

use std::sync::Arc;

use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use tollgate_filters::auth::Caller;
use tollgate_filters::auth::keyring::KeyError;
use tollgate_filters::limit::{Plan, Scope, ScopeId, quota};

use super::keys::refused;
use super::{Admin, error};

fn away() -> Response {
    error(StatusCode::SERVICE_UNAVAILABLE, "store_unavailable", "the limit store cannot be asked at the moment")
}

/// The key of that id, in the configuration or in Redis.
async fn caller(admin: &Admin, id: &str) -> Result<Arc<Caller>, KeyError> {
    let runtime = admin.gateway.live.load_full();
    if let Some(caller) = runtime.keys.callers().find(|caller| &*caller.id == id) {
        return Ok(Arc::clone(caller));
    }
    let elsewhere = runtime.keys.elsewhere().ok_or_else(|| KeyError::Unknown(id.to_owned()))?;
    let record = elsewhere.keyring.get(id).await?;
    let unusable = |why| KeyError::Unusable(format!("the key `{id}` does not work: {why}"));
    elsewhere.caller(&record).map(Arc::new).map_err(unusable)
}

pub(super) async fn show(State(admin): State<Admin>, Path(id): Path<String>) -> Response {
    let caller = match caller(&admin, &id).await {
        Ok(caller) => caller,
        Err(error) => return refused(&error),
    };
    let plan: Plan = [&caller.rules].into_iter().collect();
    let Ok(standings) = admin.gateway.ledger.query(&plan).await else { return away() };
    match quota::body(&caller.id, caller.tier.as_deref(), &standings) {
        Ok(body) => ([(CONTENT_TYPE, "application/json")], body).into_response(),
        Err(_) => error(StatusCode::INTERNAL_SERVER_ERROR, "internal_error", "an internal error occurred"),
    }
}

pub(super) async fn reset(State(admin): State<Admin>, Path(id): Path<String>) -> Response {
    let caller = match caller(&admin, &id).await {
        Ok(caller) => caller,
        Err(error) => return refused(&error),
    };
    match admin.gateway.ledger.reset(&ScopeId::new(Scope::Key, &caller.id)).await {
        Ok(()) => StatusCode::NO_CONTENT.into_response(),
        Err(_) => away(),
    }
}
