//! `/api/keys`: all keys, and making and revoking those in Redis.

use axum::Json;
use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{Path, State};
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use schemars::JsonSchema;
use serde::Serialize;
use tollgate_filters::auth::keyring::KeyError;

use super::{Admin, error};
use crate::keys::{self, KeyState, Made, Names, NewKey, Where};
use crate::runtime::Runtime;

/// All keys: those of the configuration, then those in Redis.
#[derive(Debug, Serialize, JsonSchema)]
pub(super) struct AllKeys {
    keys: Vec<KeyState>,
}

/// The answer for what could not be done.
pub(super) fn refused(failed: &KeyError) -> Response {
    match failed {
        KeyError::Unknown(id) => error(StatusCode::NOT_FOUND, "not_found", format!("there is no key `{id}`")),
        KeyError::Taken(_) => error(StatusCode::CONFLICT, "key_exists", failed.to_string()),
        KeyError::Unusable(why) => error(StatusCode::BAD_REQUEST, "invalid_request", why.clone()),
        KeyError::Away(why) => {
            // Where Redis is and what it says is the operator's business, who reads the log.
            tracing::warn!(why, "the keys in Redis cannot be asked");
            let message = "the keys in Redis cannot be asked at the moment";
            error(StatusCode::SERVICE_UNAVAILABLE, "store_unavailable", message)
        }
    }
}

fn nowhere() -> Response {
    let message = "keys are made in Redis, and the configuration lacks `store.redis` or `auth.redis_keys: true`";
    error(StatusCode::CONFLICT, "no_key_store", message)
}

fn in_file(id: &str) -> Response {
    let message = format!("the key `{id}` stands in the configuration: change it there");
    error(StatusCode::CONFLICT, "key_in_configuration", message)
}

fn is_in_file(runtime: &Runtime, id: &str) -> bool {
    runtime.keys.callers().any(|caller| &*caller.id == id)
}

pub(super) async fn list(State(admin): State<Admin>) -> Response {
    let runtime = admin.gateway.live.load_full();
    let mut keys: Vec<KeyState> = runtime.keys.callers().map(|caller| KeyState::of(caller, Where::File)).collect();
    keys.sort_unstable_by(|a, b| a.id.cmp(&b.id));
    if let Some(elsewhere) = runtime.keys.elsewhere() {
        match keys::stored(elsewhere).await {
            Ok(stored) => keys.extend(stored),
            Err(error) => return refused(&error),
        }
    }
    Json(AllKeys { keys }).into_response()
}

/// A body that says it is JSON: no web page can send that without asking.
fn is_json(headers: &HeaderMap) -> bool {
    let kind = headers.get(CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    kind.split(';').next().is_some_and(|kind| kind.trim().eq_ignore_ascii_case("application/json"))
}

pub(super) async fn create(
    State(admin): State<Admin>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Response {
    if !is_json(&headers) {
        let message = "send the key to be made as `Content-Type: application/json`";
        return error(StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type", message);
    }
    let body = match body {
        Ok(body) => body,
        Err(why) => return error(why.status(), "invalid_request", why.body_text()),
    };
    let wanted = match NewKey::read(&body) {
        Ok(wanted) => wanted,
        Err(why) => {
            let code = if why.is_data() { "invalid_request" } else { "invalid_json" };
            return error(StatusCode::BAD_REQUEST, code, why.to_string());
        }
    };
    let runtime = admin.gateway.live.load_full();
    let Some(elsewhere) = runtime.keys.elsewhere() else { return nowhere() };
    match keys::create(&wanted, &Names::at_work(&runtime, elsewhere), elsewhere).await {
        Ok(made) => shown(StatusCode::CREATED, made),
        Err(error) => refused(&error),
    }
}

fn shown(status: StatusCode, made: Made) -> Response {
    (status, [(CACHE_CONTROL, "no-store")], Json(made)).into_response()
}

pub(super) async fn revoke(State(admin): State<Admin>, Path(id): Path<String>) -> Response {
    let runtime = admin.gateway.live.load_full();
    if is_in_file(&runtime, &id) {
        return in_file(&id);
    }
    let Some(elsewhere) = runtime.keys.elsewhere() else { return nowhere() };
    match elsewhere.keyring.revoke(&id).await {
        Ok(()) => StatusCode::NO_CONTENT.into_response(),
        Err(error) => refused(&error),
    }
}

pub(super) async fn rotate(State(admin): State<Admin>, Path(id): Path<String>) -> Response {
    let runtime = admin.gateway.live.load_full();
    if is_in_file(&runtime, &id) {
        return in_file(&id);
    }
    let Some(elsewhere) = runtime.keys.elsewhere() else { return nowhere() };
    match elsewhere.keyring.rotate(&id).await {
        Ok(key) => shown(StatusCode::OK, Made::new(id, &key)),
        Err(error) => refused(&error),
    }
}
