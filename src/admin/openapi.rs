//! `/api/openapi.json`: the endpoints of the admin port, described. The schemas are made of the types that are sent.

use axum::Json;
use axum::extract::State;
use schemars::generate::SchemaSettings;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde_json::{Map, Value, json};

use super::{Admin, Failure, api, keys};
use crate::keys::{Made, NewKey};

/// What an endpoint answers.
enum Answer {
    Nothing,
    Text(&'static str),
    Json(fn(&mut SchemaGenerator) -> Schema),
}

type Other = (&'static str, &'static str);

/// One endpoint as it is described.
struct Endpoint {
    path: &'static str,
    method: &'static str,
    summary: &'static str,
    /// What is sent to it.
    asked: Option<fn(&mut SchemaGenerator) -> Schema>,
    /// The status when all went well.
    status: &'static str,
    answer: Answer,
    /// Whether it asks for the token where one is set.
    guarded: bool,
    /// Any other status but 401.
    others: &'static [Other],
}

const fn open(path: &'static str, summary: &'static str, kind: &'static str) -> Endpoint {
    let (method, status, answer) = ("get", "200", Answer::Text(kind));
    Endpoint { path, method, summary, asked: None, status, answer, guarded: false, others: &[] }
}

const fn guarded(path: &'static str, summary: &'static str, schema: fn(&mut SchemaGenerator) -> Schema) -> Endpoint {
    let (method, status, answer) = ("get", "200", Answer::Json(schema));
    Endpoint { path, method, summary, asked: None, status, answer, guarded: true, others: &[] }
}

const fn delete(path: &'static str, summary: &'static str) -> Endpoint {
    let (method, status, answer) = ("delete", "204", Answer::Nothing);
    Endpoint { path, method, summary, asked: None, status, answer, guarded: true, others: &[] }
}

fn of<T: JsonSchema>(generator: &mut SchemaGenerator) -> Schema {
    generator.subschema_for::<T>()
}

fn anything(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "type": "object" })
}

const AWAY: Other = ("503", "Redis cannot be asked");
const NO_KEY: Other = ("404", "There is no such key");
const NOT_HERE: Other = ("409", "The key stands in the configuration, or keys are not kept in Redis");
const UNUSABLE: Other = ("400", "It is no key that could work");

fn endpoints(open_metrics: bool) -> Vec<Endpoint> {
    let making: &[Other] = &[
        UNUSABLE,
        ("409", "There is a key of that id, or keys are not kept in Redis"),
        ("413", "The body is too large"),
        ("415", "It is not sent as JSON"),
        AWAY,
    ];
    vec![
        open("/", "The console", "text/html"),
        Endpoint {
            guarded: !open_metrics,
            ..open("/metrics", "Metrics in the text format of Prometheus", "text/plain")
        },
        open("/livez", "The process runs", "text/plain"),
        Endpoint {
            others: &[("503", "The gateway drains")],
            ..open("/readyz", "The gateway takes requests", "text/plain")
        },
        guarded("/api/status", "The gateway as a whole", of::<api::Status>),
        guarded("/api/upstreams", "All upstreams with their nodes", of::<api::Upstreams>),
        guarded("/api/routes", "All routes, in the order in which they are tried", of::<api::Routes>),
        guarded("/api/models", "All names that clients may ask for", of::<api::Models>),
        Endpoint {
            others: &[AWAY],
            ..guarded(
                "/api/keys",
                "All keys, of the configuration and in Redis; never the keys themselves",
                of::<keys::AllKeys>,
            )
        },
        Endpoint {
            method: "post",
            asked: Some(of::<NewKey>),
            status: "201",
            others: making,
            ..guarded("/api/keys", "Makes a key in Redis; it is shown this once", of::<Made>)
        },
        Endpoint {
            others: &[NO_KEY, NOT_HERE, AWAY],
            ..delete("/api/keys/{key_id}", "Makes a key void in all gateways")
        },
        Endpoint {
            method: "post",
            others: &[NO_KEY, NOT_HERE, AWAY],
            ..guarded(
                "/api/keys/{key_id}/rotate",
                "Puts a new key in the place of an old one, which is void",
                of::<Made>,
            )
        },
        Endpoint {
            others: &[NO_KEY, UNUSABLE, AWAY],
            ..guarded("/api/quota/{key_id}", "What a key has used, and what is left", anything)
        },
        Endpoint {
            others: &[NO_KEY, UNUSABLE, AWAY],
            ..delete("/api/quota/{key_id}", "Gives a key back what it used")
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
    let mut paths: Map<String, Value> = Map::new();
    for endpoint in endpoints(open_metrics) {
        let content = match endpoint.answer {
            Answer::Nothing => None,
            Answer::Text(kind) => Some(json!({ kind: { "schema": { "type": "string" } } })),
            Answer::Json(schema) => Some(json!({ "application/json": { "schema": schema(&mut generator) } })),
        };
        let mut responses = Map::new();
        let mut answer = json!({ "description": endpoint.summary });
        if let (Some(answer), Some(content)) = (answer.as_object_mut(), content) {
            answer.insert("content".into(), content);
        }
        responses.insert(endpoint.status.into(), answer);
        let closed = endpoint.guarded && has_token;
        let unknown = closed.then_some(("401", "The token is missing or wrong"));
        for (status, why) in unknown.iter().chain(endpoint.others) {
            // The probes say no in plain text.
            let content = json!({ "application/json": { "schema": failure } });
            let answer = if endpoint.guarded {
                json!({ "description": why, "content": content })
            } else {
                json!({ "description": why })
            };
            responses.insert((*status).into(), answer);
        }
        let security = if closed { json!([{ "token": [] }]) } else { json!([]) };
        let parameters = if endpoint.path.contains("{key_id}") {
            json!([{ "name": "key_id", "in": "path", "required": true, "schema": { "type": "string" } }])
        } else {
            json!([])
        };
        let mut told = json!({
            "summary": endpoint.summary, "parameters": parameters, "security": security, "responses": responses,
        });
        if let (Some(told), Some(asked)) = (told.as_object_mut(), endpoint.asked) {
            let content = json!({ "application/json": { "schema": asked(&mut generator) } });
            told.insert("requestBody".into(), json!({ "required": true, "content": content }));
        }
        let methods = paths.entry(endpoint.path).or_insert_with(|| json!({}));
        if let Some(methods) = methods.as_object_mut() {
            methods.insert(endpoint.method.to_owned(), told);
        }
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
