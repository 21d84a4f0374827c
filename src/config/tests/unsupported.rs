//! Tests of what has no engine yet.

use super::*;
use crate::config::check::unsupported::LACKS;
use crate::config::tree::{self, Source};

/// Whether a problem is about a setting without an engine.
pub(super) fn is_lack(problem: &Problem) -> bool {
    [" is not supported yet", " is read but not acted on yet", " is acted on only in part yet"]
        .iter()
        .any(|end| problem.message.ends_with(end))
}

/// What is said of lacks: `severity path`.
fn lacks(text: &str) -> Vec<String> {
    let problems = match load_text("t.yaml", text, &Supplied) {
        Ok(loaded) => loaded.warnings,
        Err(problems) => problems.0,
    };
    problems.iter().filter(|problem| is_lack(problem)).map(|p| format!("{:?} {}", p.severity, p.path)).collect()
}

#[test]
fn every_lack_is_a_setting_that_the_full_example_shows() {
    let text = uncommented(&std::fs::read_to_string(conf().join("full.yaml")).unwrap());
    // The full example lists nodes; the same without them is the other way to ask for discovery.
    let bare = "upstreams: { a: { discover: { dns: 'h:1' } } }";
    let trees = [text.as_str(), bare].map(|text| {
        let mut problems = Vec::new();
        tree::read(&Source::new("t.yaml".to_owned(), text.to_owned()), 0, &mut problems).unwrap()
    });
    for lack in LACKS {
        assert!(trees.iter().any(|tree| !lack.found(tree).is_empty()), "nothing asks for {}", lack.path);
    }
}

#[test]
fn what_is_off_or_left_out_is_no_lack() {
    let text = "auth: { redis_keys: false, jwt: [] }\n\
                upstreams: { a: { nodes: ['http://h'], eject: off, engine: none }, b: { nodes: ['http://h'], eject: false } }\n\
                models: { m: { targets: [{ upstream: a, larger_context: false, on: [429] }], resume: off, retry: { attempts: 2 } } }\n\
                routes: [{ name: r, match: { prefix: / }, call: { models: [m] }, on_abort: cancel, filters: { cache: off } }]";
    assert_eq!(lacks(text), [""; 0]);
}

#[test]
fn every_place_that_asks_is_named() {
    let text = "upstreams: { a: { nodes: ['http://h'], health: {} }, b: { discover: { dns: 'h:1' }, health: {} } }\n\
                models: { m: { targets: [{ upstream: a }, { upstream: b, on: [connect, content_filter] }], resume: replay } }\n";
    assert_eq!(
        lacks(text),
        ["Warning upstreams.a.health", "Error upstreams.b.discover", "Warning upstreams.b.health",]
    );
}
