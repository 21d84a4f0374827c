//! Finding the place of a path in the files, and making problems that show it.

use std::collections::{BTreeSet, HashMap, HashSet};

use super::problem::{Problem, Severity, snippet};
use super::tree::{Place, Source, Tree, Value};

/// One step into the document.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Step {
    Key(String),
    Item(usize),
}

/// A path into the document: `At::root().key("routes").item(2).key("pass")`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct At(Vec<Step>);

impl At {
    /// The document itself.
    pub(crate) fn root() -> Self {
        Self::default()
    }

    /// The value below `key`.
    pub(crate) fn key(&self, key: &str) -> Self {
        let mut steps = self.0.clone();
        steps.push(Step::Key(key.to_owned()));
        Self(steps)
    }

    /// The item `index` of a list.
    pub(crate) fn item(&self, index: usize) -> Self {
        let mut steps = self.0.clone();
        steps.push(Step::Item(index));
        Self(steps)
    }
}

/// The files, the tree read from them, and which parts of it had to be left out.
#[derive(Debug)]
pub(crate) struct Places {
    /// The files that were read.
    pub sources: Vec<Source>,
    /// The tree without the parts that could not be understood.
    pub tree: Tree,
    /// Paths of these parts.
    pub broken: BTreeSet<String>,
    secrets: HashSet<Place>,
    masks: HashMap<(usize, u32), Vec<(usize, usize)>>,
}

impl Places {
    /// Notes where secrets stand, so that no snippet shows them.
    pub(crate) fn new(sources: Vec<Source>, tree: Tree) -> Self {
        let secrets = secrets(&tree);
        let masks = masks(&sources, &secrets);
        Self { sources, tree, broken: BTreeSet::new(), secrets, masks }
    }

    /// Where `at` stands and its path as written; of a part that is absent, where the closest part around it stands.
    fn find(&self, at: &At) -> (Place, String) {
        let mut tree = &self.tree;
        let mut place = tree.place;
        let mut steps = at.0.iter();
        let mut path = String::new();
        for step in steps.by_ref() {
            let below = match step {
                Step::Key(key) => tree.entry(key).map(|entry| (&entry.tree, entry.place)),
                Step::Item(index) => tree.items().get(*index).map(|item| (item, Place { width: 1, ..item.place })),
            };
            let Some((next, holder)) = below else {
                path = extended(&tree.path, step);
                break;
            };
            tree = next;
            tree.path.clone_into(&mut path);
            // Of a scalar its own place, of a collection that of its key: it may go over many lines.
            place = match tree.value {
                Value::List(_) | Value::Map(_) => holder,
                Value::Null | Value::Bool(_) | Value::Whole(..) | Value::Number(..) | Value::Text(_) => tree.place,
            };
        }
        (place, steps.fold(path, |path, step| extended(&path, step)))
    }

    /// Whether something at, in or around this part was refused, so that what is left of it says nothing.
    pub(crate) fn lost(&self, at: &At) -> bool {
        !self.broken.is_empty() && self.touched(&self.find(at).1)
    }

    fn touched(&self, path: &str) -> bool {
        self.broken.iter().any(|part| within(part, path) || within(path, part))
    }

    /// A problem at `at`; none if that part was already refused for another reason.
    pub(crate) fn problem(
        &self,
        severity: Severity,
        at: &At,
        message: String,
        hint: Option<String>,
    ) -> Option<Problem> {
        let (place, path) = self.find(at);
        if self.touched(&path) { None } else { Some(self.show(severity, place, path, message, hint)) }
    }

    fn get(&self, at: &At) -> Option<&Tree> {
        at.0.iter().try_fold(&self.tree, |tree, step| match step {
            Step::Key(key) => tree.entry(key).map(|entry| &entry.tree),
            Step::Item(index) => tree.items().get(*index),
        })
    }

    /// Whether this part is written down.
    pub(crate) fn has(&self, at: &At) -> bool {
        self.get(at).is_some()
    }

    /// Whether anything is written below this part.
    pub(crate) fn has_any(&self, at: &At) -> bool {
        self.get(at).is_some_and(|tree| !tree.entries().is_empty())
    }

    /// The item `index` of a list that may also be written as its only item.
    pub(crate) fn listed(&self, at: &At, index: usize) -> At {
        if self.get(at).is_some_and(|tree| matches!(tree.value, Value::List(_))) { at.item(index) } else { at.clone() }
    }

    /// The place of `at` for a hint: the line, and the file where it is not that of `near`.
    pub(crate) fn whereabouts(&self, at: &At, near: &At) -> String {
        let (place, _) = self.find(at);
        line_of(&self.sources, place, self.find(near).0.file)
    }

    /// Whether a secret stands at this place.
    pub(crate) fn is_secret(&self, place: Place) -> bool {
        self.secrets.contains(&place)
    }

    /// A problem at a place.
    pub(crate) fn show(
        &self,
        severity: Severity,
        place: Place,
        path: String,
        message: String,
        hint: Option<String>,
    ) -> Problem {
        let source = self.sources.get(place.file);
        let line = self.masked(place);
        Problem {
            severity,
            file: source.map(|source| source.name.clone()).unwrap_or_default(),
            line: place.line,
            column: place.column,
            path,
            message,
            hint,
            snippet: Some(snippet(&line, place.line, place.column, place.width)),
        }
    }

    fn masked(&self, place: Place) -> String {
        let line = self.sources.get(place.file).map(|source| source.line(place.line)).unwrap_or_default();
        let Some(spans) = self.masks.get(&(place.file, place.line)) else { return line.to_owned() };
        let mut chars: Vec<char> = line.chars().collect();
        for (start, width) in spans {
            chars.iter_mut().skip(*start).take(*width).for_each(|c| *c = '*');
        }
        chars.into_iter().collect()
    }
}

/// What to mask of each line: start and width in characters. A secret may go over several lines.
fn masks(sources: &[Source], secrets: &HashSet<Place>) -> HashMap<(usize, u32), Vec<(usize, usize)>> {
    let mut masks: HashMap<(usize, u32), Vec<(usize, usize)>> = HashMap::new();
    for secret in secrets {
        let Some(source) = sources.get(secret.file) else { continue };
        let mut start = (secret.column as usize).saturating_sub(1);
        let mut left = secret.width as usize;
        let mut number = secret.line;
        while left > 0 {
            let length = source.line(number).chars().count();
            let here = left.min(length.saturating_sub(start));
            masks.entry((secret.file, number)).or_default().push((start, here));
            // The line's end counts as one character.
            left = left.saturating_sub(here + 1);
            (start, number) = (0, number + 1);
        }
    }
    masks
}

/// A place in words, seen from the file `near`.
pub(crate) fn line_of(sources: &[Source], place: Place, near: usize) -> String {
    match sources.get(place.file) {
        Some(source) if place.file != near => format!("line {} of {}", place.line, source.name),
        Some(_) | None => format!("line {}", place.line),
    }
}

fn extended(path: &str, step: &Step) -> String {
    match step {
        Step::Key(key) if path.is_empty() => key.clone(),
        Step::Key(key) => format!("{path}.{key}"),
        Step::Item(index) => format!("{path}[{index}]"),
    }
}

/// Whether the path `inner` is `outer` or below it.
fn within(inner: &str, outer: &str) -> bool {
    inner.strip_prefix(outer).is_some_and(|rest| rest.is_empty() || outer.is_empty() || rest.starts_with(['.', '[']))
}

/// Where plain-text secrets stand.
fn secrets(tree: &Tree) -> HashSet<Place> {
    fn below<'a>(tree: &'a Tree, path: &[&str]) -> Option<&'a Tree> {
        path.iter().try_fold(tree, |tree, key| tree.entry(key).map(|entry| &entry.tree))
    }
    let mut found: Vec<&Tree> = Vec::new();
    found.extend(below(tree, &["store", "redis", "url"]));
    found.extend(below(tree, &["server", "admin", "token"]));
    if let Some(keys) = tree.entry("keys") {
        found.extend(keys.tree.items().iter().filter_map(|key| below(key, &["key"])));
    }
    for upstream in tree.entry("upstreams").map(|entry| entry.tree.entries()).unwrap_or_default() {
        found.extend(below(&upstream.tree, &["credentials"]).into_iter().flat_map(Tree::items));
        let nodes = below(&upstream.tree, &["nodes"]);
        for node in nodes.into_iter().flat_map(Tree::items) {
            let url = node.entry("url").map_or(node, |entry| &entry.tree);
            // An address with a password is refused, and then shown.
            if matches!(&url.value, Value::Text(text) if text.contains('@')) {
                found.push(url);
            }
        }
    }
    found.retain(|tree| !matches!(tree.value, Value::Map(_) | Value::List(_) | Value::Null));
    found.iter().map(|tree| tree.place).collect()
}
