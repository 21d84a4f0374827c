//! `/api/openapi.json`: the endpoints of the admin port, described. The schemas are made of the types that are sent.

use axum::Json;
use axum::extract::State;
use schemars::generate::SchemaSettings;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde_json::{Map, Value, json};

use super::{Admin, Failure, api};

/// What an endpoint answers.
enum Answer {
    Text(&'static str),
    Json(fn(&mut SchemaGenerator) -> Schema),
}

/// One endpoint as it is described.
struct Endpoint {
    path: &'static str,
    summary: &'static str,
    answer: Answer,
    /// Whether it asks for the token where one is set.
    guarded: bool,
    /// The status beside 200 and 401.
    other: Option<(&'static str, &'static str)>,
}

const fn open(path: &'static str, summary: &'static str, kind: &'static str) -> Endpoint {
    Endpoint { path, summary, answer: Answer::Text(kind), guarded: false, other: None }
}

const fn guarded(path: &'static str, summary: &'static str, schema: fn(&mut SchemaGenerator) -> Schema) -> Endpoint {
    Endpoint { path, summary, answer: Answer::Json(schema), guarded: true, other: None }
}

fn of<T: JsonSchema>(generator: &mut SchemaGenerator) -> Schema {
    generator.subschema_for::<T>()
}

fn anything(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "type": "object" })
}

fn endpoints(open_metrics: bool) -> [Endpoint; 10] {
    [
        open("/", "The console", "text/html"),
        Endpoint {
            guarded: !open_metrics,
            ..open("/metrics", "Metrics in the text format of Prometheus", "text/plain")
        },
        open("/livez", "The process runs", "text/plain"),
        Endpoint {
            other: Some(("503", "The gateway drains")),
            ..open("/readyz", "The gateway takes requests", "text/plain")
        },
        guarded("/api/status", "The gateway as a whole", of::<api::Status>),
        guarded("/api/upstreams", "All upstreams with their nodes", of::<api::Upstreams>),
        guarded("/api/routes", "All routes, in the order in which they are tried", of::<api::Routes>),
        guarded("/api/models", "All names that clients may ask for", of::<api::Models>),
        Endpoint {
            other: Some(("404", "There is no such key")),
            ..guarded("/api/quota/{key_id}", "What a key has used; DELETE gives it back", anything)
        },
        guarded("/api/openapi.json", "This document", anything),
    ]
}

/// The document.
pub(super) fn document(has_token: bool, open_metrics: bool) -> Value {
    let settings = SchemaSettings::draft2020_12().with(|settings| {
        settings.definitions_path = "/components/schemas".into();
        settings.meta_schema = None;
    });
    let mut generator = settings.into_generator();
    let failure = generator.subschema_for::<Failure>();
    let mut paths = Map::new();
    for endpoint in endpoints(open_metrics) {
        let (kind, schema) = match endpoint.answer {
            Answer::Text(kind) => (kind, json_schema!({ "type": "string" })),
            Answer::Json(schema) => ("application/json", schema(&mut generator)),
        };
        let mut responses = Map::new();
        responses.insert(
            "200".into(),
            json!({ "description": endpoint.summary, "content": { kind: { "schema": schema } } }),
        );
        if endpoint.guarded && has_token {
            let content = json!({ "application/json": { "schema": failure } });
            responses
                .insert("401".into(), json!({ "description": "The token is missing or wrong", "content": content }));
        }
        if let Some((status, why)) = endpoint.other {
            responses.insert(status.into(), json!({ "description": why }));
        }
        let security = if endpoint.guarded && has_token { json!([{ "token": [] }]) } else { json!([]) };
        let parameters = if endpoint.path.contains("{key_id}") {
            json!([{ "name": "key_id", "in": "path", "required": true, "schema": { "type": "string" } }])
        } else {
            json!([])
        };
        let get = json!({
            "summary": endpoint.summary, "parameters": parameters, "security": security, "responses": responses,
        });
        paths.insert(endpoint.path.to_owned(), json!({ "get": get }));
    }
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Tollgate admin port",
            "version": env!("CARGO_PKG_VERSION"),
            "license": { "name": "Apache-2.0", "identifier": "Apache-2.0" },
        },
        "paths": paths,
        "components": {
            "schemas": generator.take_definitions(true),
            "securitySchemes": { "token": { "type": "http", "scheme": "bearer" } },
        },
    })
}

pub(super) async fn openapi(State(admin): State<Admin>) -> Json<Value> {
    Json(document(admin.access.token.is_some(), admin.access.open_metrics))
}
