//! Tests of the configuration as a whole: the examples load, bad files are refused with the right words.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use tollgate_filters::dialect::Dialect;

use serde_json::Value;
use tollgate_filters::config::World;

use super::*;

mod bad;
mod include;
mod unsupported;

/// A world with whatever the full example asks for.
struct Supplied;

impl World for Supplied {
    fn env(&self, name: &str) -> Option<String> {
        match name {
            "REDIS_URL" => Some("redis://127.0.0.1/".to_owned()),
            "CREDENTIALS_DIRECTORY" => Some("/run/credentials".to_owned()),
            "MISSING" => None,
            "EMPTY" => Some(String::new()),
            name => Some(format!("value-of-{name}")),
        }
    }

    fn read(&self, path: &str) -> io::Result<String> {
        if path.starts_with("/missing") {
            return Err(io::ErrorKind::NotFound.into());
        }
        if let Some(name) = path.strip_prefix("/etc/tollgate/redis") {
            static OWN: std::sync::OnceLock<(String, String)> = std::sync::OnceLock::new();
            let (cert, key) = OWN.get_or_init(|| {
                let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
                (made.cert.pem(), made.signing_key.serialize_pem())
            });
            return Ok(if name == ".key" { key.clone() } else { cert.clone() });
        }
        if path.starts_with("/etc/") || path.starts_with("/run/") {
            return Ok(format!("content-of-{}\n", path.replace('/', "-")));
        }
        std::fs::read_to_string(path)
    }
}

/// A world that has nothing.
struct Bare;

impl World for Bare {
    fn env(&self, _: &str) -> Option<String> {
        None
    }

    fn read(&self, path: &str) -> io::Result<String> {
        std::fs::read_to_string(path)
    }
}

fn conf() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("conf")
}

/// A text with its commented-out settings in force: those behind a `#` without a space, and what stands indented below them.
fn uncommented(text: &str) -> String {
    let line = |line: &str| match line.trim_start().strip_prefix('#') {
        Some(rest) if rest.starts_with("  ") || rest.starts_with(|c: char| c.is_ascii_alphanumeric()) => {
            format!("{}{rest}\n", &line[..line.len() - line.trim_start().len()])
        }
        _ => format!("{line}\n"),
    };
    text.lines().map(line).collect()
}

#[test]
fn every_example_loads_on_a_bare_machine() {
    let mut seen = 0;
    for entry in std::fs::read_dir(conf()).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|end| end == "yaml") {
            let loaded = load(&path, &Bare).unwrap_or_else(|problems| panic!("{problems}"));
            let text = std::fs::read_to_string(&path).unwrap();
            assert!(text.starts_with("# yaml-language-server: $schema=./schema.json\n"), "{}", path.display());
            let plain = |warning: &&Problem| warning.message == "a secret in plain text";
            let lack = |warning: &&Problem| unsupported::is_lack(warning) && path.ends_with("full.yaml");
            let others: Vec<_> = loaded.warnings.iter().filter(|warning| !plain(warning) && !lack(warning)).collect();
            assert!(others.is_empty(), "{others:#?}");
            assert!(!path.ends_with("tollgate.yaml") || loaded.warnings.is_empty());
            seen += 1;
        }
    }
    assert!(seen >= 3);
}

#[test]
fn the_example_of_the_readme_is_right() {
    let readme = std::fs::read_to_string(conf().join("../README.md")).unwrap();
    let (_, rest) = readme.split_once("```yaml\n").unwrap();
    let (example, rest) = rest.split_once("```").unwrap();
    let loaded = load_text("README.md", example, &Supplied).unwrap_or_else(|problems| panic!("{problems}"));
    assert_eq!(loaded.warnings, []);
    assert!(!rest.contains("```yaml"), "only one example is checked here");
}

#[test]
fn the_full_example_is_right_in_its_commented_settings_too() {
    let text = uncommented(&std::fs::read_to_string(conf().join("full.yaml")).unwrap());
    let problems = load_text(conf().join("full.yaml").to_str().unwrap(), &text, &Supplied).unwrap_err();
    let errors: Vec<_> = problems.errors().filter(|error| !unsupported::is_lack(error)).collect();
    assert!(errors.is_empty(), "{errors:#?}");
}

#[test]
fn the_examples_have_the_shape_that_the_schema_promises() {
    let schema: Value = serde_json::from_str(&crate::cli::schema::schema().unwrap()).unwrap();
    for name in ["tollgate.yaml", "demo.yaml", "full.yaml"] {
        let text = std::fs::read_to_string(conf().join(name)).unwrap();
        let text = if name == "full.yaml" { uncommented(&text) } else { text };
        let value: Value = serde_yaml::from_str(&text).unwrap();
        let mut used = BTreeSet::new();
        walk(&schema, &schema, &value, "", &mut used);
    }
}

#[test]
fn the_full_example_has_every_key_of_the_schema() {
    let schema: Value = serde_json::from_str(&crate::cli::schema::schema().unwrap()).unwrap();
    let text = uncommented(&std::fs::read_to_string(conf().join("full.yaml")).unwrap());
    let value: Value = serde_yaml::from_str(&text).unwrap();
    let mut used = BTreeSet::new();
    walk(&schema, &schema, &value, "", &mut used);
    let mut all = BTreeSet::new();
    for (name, definition) in schema["$defs"].as_object().unwrap() {
        // One set of dimensions is enough of an example; it stands under `tiers`. Secrets, with a weight or not, are plain text there.
        if !["Limits", "Secret", "Credential"].contains(&name.as_str()) {
            properties(definition, name, &mut all);
        }
    }
    properties(&schema, "", &mut all);
    let missing: Vec<_> = all.difference(&used).collect();
    assert!(missing.is_empty(), "conf/full.yaml lacks {missing:?}");
}

/// The properties a definition has itself, as `definition.key`; of inner definitions without a name too.
fn properties(schema: &Value, name: &str, all: &mut BTreeSet<String>) {
    for key in schema["properties"].as_object().into_iter().flat_map(|map| map.keys()) {
        all.insert(format!("{name}.{key}"));
    }
    for alternative in schema["anyOf"].as_array().into_iter().flatten() {
        properties(alternative, name, all);
    }
}

/// Follows a value along its schema; notes each property used, and fails on one that is not there.
fn walk(root: &Value, schema: &Value, value: &Value, name: &str, used: &mut BTreeSet<String>) {
    if let Some(reference) = schema["$ref"].as_str() {
        let name = reference.rsplit('/').next().unwrap();
        return walk(root, &root["$defs"][name], value, name, used);
    }
    if let Some(alternatives) = schema["anyOf"].as_array() {
        let fitting = alternatives.iter().filter(|schema| fits(root, schema, value));
        let chosen = fitting.collect::<Vec<_>>();
        assert!(!chosen.is_empty(), "{value} fits no alternative of {schema}");
        return chosen.into_iter().for_each(|schema| walk(root, schema, value, name, used));
    }
    match value {
        Value::Object(map) => {
            for (key, value) in map {
                let own = &schema["properties"][key];
                if own.is_null() {
                    let any = &schema["additionalProperties"];
                    assert!(any.is_object(), "the schema has no {name}.{key}: {schema}");
                    walk(root, any, value, name, used);
                } else {
                    used.insert(format!("{name}.{key}"));
                    walk(root, own, value, name, used);
                }
            }
        }
        Value::Array(list) => list.iter().for_each(|value| walk(root, &schema["items"], value, name, used)),
        scalar => assert!(fits(root, schema, scalar), "{scalar} does not fit {schema}"),
    }
}

fn fits(root: &Value, schema: &Value, value: &Value) -> bool {
    if let Some(reference) = schema["$ref"].as_str() {
        return fits(root, &root["$defs"][reference.rsplit('/').next().unwrap()], value);
    }
    if let Some(alternatives) = schema["anyOf"].as_array().or(schema["oneOf"].as_array()) {
        return alternatives.iter().any(|schema| fits(root, schema, value));
    }
    if let Some(words) = schema["enum"].as_array() {
        return words.contains(value);
    }
    if !schema["const"].is_null() {
        return schema["const"] == *value;
    }
    let kind = match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(number) if number.is_u64() || number.is_i64() => "integer",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    };
    let allowed = |kinds: &Value| match kinds {
        Value::String(one) => one == kind || one == "number" && kind == "integer",
        Value::Array(many) => many.iter().any(|one| one == kind || one == "number" && kind == "integer"),
        _ => true,
    };
    let keys_known = value.as_object().is_none_or(|map| {
        let open = schema["additionalProperties"] != Value::Bool(false);
        open || map.keys().all(|key| !schema["properties"][key].is_null())
    });
    allowed(&schema["type"]) && keys_known
}

#[test]
fn what_is_left_out_has_the_default_of_the_contract() {
    let text = "upstreams: { a: { nodes: ['http://127.0.0.1:1'] } }\nmodels: { m: { targets: [{ upstream: a }] } }";
    let document = load_text("t", text, &Bare).unwrap().document;
    let server = &document.server;
    assert_eq!(server.listen[0].bind.to_string(), "127.0.0.1:8080");
    assert_eq!(server.admin.bind.to_string(), "127.0.0.1:9180");
    assert_eq!(server.drain.to_string(), "2m");
    let limits = &server.limits;
    assert_eq!((limits.connections, limits.connections_per_ip), (8000, 1000));
    assert_eq!((limits.header_bytes.0, limits.body_bytes.0, limits.buffered_bytes.0), (64 << 10, 32 << 20, 1 << 30));
    let upstream = &document.upstreams["a"];
    assert_eq!((upstream.dialect, upstream.balance), (Dialect::Openai, Balance::Prefix));
    assert_eq!(upstream.eject.on().map(|eject| (eject.after, eject.period.0.as_secs())), Some((5, 10)));
    let times = &upstream.timeouts;
    let seconds = [times.connect, times.first_byte, times.first_token, times.between_tokens, times.total];
    assert_eq!(seconds.map(|period| period.0.as_secs()), [2, 30, 30, 30, 1200]);
    assert_eq!((upstream.pool.size, upstream.pool.idle.0.as_secs(), upstream.pool.concurrency), (128, 60, None));
    assert_eq!(upstream.cooldown.0.0.as_secs(), 60);
    let model = &document.models["m"];
    assert_eq!((model.retry.attempts, model.retry.jitter, model.retry.budget), (3, true, 0.2));
    assert_eq!(model.resume, Resume::Off);
    assert_eq!(
        model.targets[0].on.iter().map(|on| on.as_str()).collect::<Vec<_>>().join(" "),
        "connect timeout 429 5xx first_token auth"
    );
}

#[test]
fn off_and_false_both_turn_a_filter_off() {
    let text = "upstreams: { a: { nodes: ['http://127.0.0.1:1'], eject: false } }\nroutes: [{ name: r, match: { prefix: / }, \
                pass: { upstream: a }, filters: { auth: off, guard: false, cache: {} } }]";
    let document = load_text("t", text, &Bare).unwrap().document;
    let filters = &document.routes[0].filters;
    assert!(filters.auth.on().is_none() && filters.guard.on().is_none() && filters.limit.on().is_some());
    assert_eq!(filters.cache.on().map(|cache| cache.ttl.0.as_secs()), Some(3600));
    assert!(document.upstreams["a"].eject.on().is_none());
}

#[test]
fn a_number_is_text_where_text_is_wanted_as_it_was_written() {
    let text = "upstreams: { a: { nodes: ['http://127.0.0.1:1'] } }\nmodels: { m: { targets: [{ upstream: a, model: 1.10 }] } }";
    let document = load_text("t", text, &Bare).unwrap().document;
    assert_eq!(document.models["m"].targets[0].model.as_deref(), Some("1.10"));
}

#[test]
fn anchors_aliases_and_merge_keys_work() {
    let text = "upstreams:\n  a: &base { nodes: ['http://127.0.0.1:1'], dialect: dify }\n  b: { <<: *base, dialect: none }\n\
                routes:\n  - { name: a, match: { path: /a }, pass: { upstream: a } }\n  - { name: b, match: { path: /b }, pass: { upstream: b } }\n";
    let document = load_text("t", text, &Bare).unwrap_or_else(|problems| panic!("{problems}")).document;
    assert_eq!(document.upstreams["b"].dialect, Dialect::None);
    assert_eq!(document.upstreams["b"].nodes, document.upstreams["a"].nodes);
}

#[test]
fn the_hash_changes_with_the_text() {
    let hash = |text: &str| load_text("t", text, &Bare).unwrap().hash;
    assert_eq!(hash("").len(), 64);
    assert_eq!(hash("limits: {}"), hash("limits: {}"));
    assert_ne!(hash("limits: {}"), hash("limits:  {}"));
}
