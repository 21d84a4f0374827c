//! What the document may say before its engine is there. Nothing is ignored in silence: what would be dangerous to
//! ignore is refused, the rest is warned of. When an engine lands, its row goes.

use super::{At, Check};
use crate::config::tree::{Tree, Value};

/// A setting without an engine.
pub(in crate::config) struct Lack {
    /// Where it stands; `*` is every key of a map, `[]` every item of a list.
    pub path: &'static str,
    when: When,
    risk: Risk,
    /// What the user gets instead, or can write.
    hint: &'static str,
}

/// When a setting asks for what is not there.
enum When {
    /// It is written, and not as off.
    Asked,
    /// It is asked for and its neighbour is absent or empty.
    Without(&'static str),
    /// It is asked for and its neighbour is there.
    Beside(&'static str),
}

/// What it would mean to ignore a setting.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Risk {
    /// Callers let in or turned away wrongly, or answers that are not what was promised.
    Refuse,
    /// Less comfort or speed.
    Warn,
    /// The same, and a part of it works.
    Partly,
}

use Risk::{Partly, Refuse, Warn};
use When::{Asked, Beside, Without};

const fn lack(path: &'static str, when: When, risk: Risk, hint: &'static str) -> Lack {
    Lack { path, when, risk, hint }
}

/// Every setting without an engine.
#[rustfmt::skip]
pub(in crate::config) const LACKS: &[Lack] = &[
    lack("auth.jwt", Asked, Refuse, "callers are recognised by `keys`"),
    lack("upstreams.*.discover", Without("nodes"), Refuse, "list the nodes under `nodes`"),

    lack("server.runtime_dir", Asked, Warn, "there is no upgrade socket to put there"),
    lack("upstreams.*.discover", Beside("nodes"), Warn, "only the nodes under `nodes` get calls"),
    lack("upstreams.*.health", Asked, Warn, "no node is probed; calls go on to the next node when one fails"),
    lack("upstreams.*.engine", Asked, Partly, "vLLM is asked for usage with every event, but no node is polled; load is what this gateway has in flight"),
    lack("routes.[].filters.cache", Asked, Warn, "every call is answered by a node"),
];

/// The words that ask for nothing.
const NOTHING: &[&str] = &["off", "none"];

impl When {
    fn holds(&self, holder: &Tree, value: &Tree) -> bool {
        match self {
            Asked => asked(value),
            Without(neighbour) => asked(value) && !has(holder, neighbour),
            Beside(neighbour) => asked(value) && has(holder, neighbour),
        }
    }
}

fn asked(tree: &Tree) -> bool {
    match &tree.value {
        Value::Null | Value::Bool(false) => false,
        Value::Text(text) => !NOTHING.contains(&text.as_str()),
        Value::List(items) => !items.is_empty(),
        Value::Bool(true) | Value::Whole(..) | Value::Number(..) | Value::Map(_) => true,
    }
}

fn has(holder: &Tree, key: &str) -> bool {
    holder.entry(key).is_some_and(|entry| !entry.tree.items().is_empty())
}

impl Check<'_> {
    /// Tells what is written but has no engine.
    pub(super) fn unsupported(&mut self) {
        let places = self.places;
        for lack in LACKS {
            for (at, subject) in lack.found(&places.tree) {
                match lack.risk {
                    Refuse => self.error(&at, format!("`{subject}` is not supported yet"), Some(lack.hint.to_owned())),
                    Partly => self.warn(&at, format!("`{subject}` is acted on only in part yet"), lack.hint),
                    Warn => self.warn(&at, format!("`{subject}` is read but not acted on yet"), lack.hint),
                }
            }
        }
    }
}

impl Lack {
    /// Where it is asked for in this document, and what to call it.
    pub(in crate::config) fn found(&self, root: &Tree) -> Vec<(At, String)> {
        let mut here = vec![(At::root(), root, root)];
        for step in self.path.split('.') {
            here = here.into_iter().flat_map(|(at, _, tree)| below(&at, tree, step)).collect();
        }
        let named = self.path.rsplit('.').find(|step| !matches!(*step, "[]" | "*")).unwrap_or(self.path);
        here.into_iter()
            .filter(|(_, holder, value)| self.when.holds(holder, value))
            .map(|(at, _, _)| (at, named.to_owned()))
            .collect()
    }
}

/// What one step of a path leads to: its place, the part that holds it, and itself.
fn below<'a>(at: &At, tree: &'a Tree, step: &str) -> Vec<(At, &'a Tree, &'a Tree)> {
    if step == "[]" {
        return tree.items().iter().enumerate().map(|(index, item)| (at.item(index), tree, item)).collect();
    }
    let meant = tree.entries().iter().filter(|entry| step == "*" || entry.key == step);
    meant.map(|entry| (at.key(&entry.key), tree, &entry.tree)).collect()
}
