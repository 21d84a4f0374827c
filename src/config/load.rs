//! Reading a configuration: files, includes, tree, document, checks.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use sha2::{Digest, Sha256};
use tollgate_filters::config::World;

use super::Document;
use super::check;
use super::de::{Culprit, Fault};
use super::include::{Files, Misfit};
use super::place::Places;
use super::problem::{Problem, Problems, Severity};
use super::tree::{self, Place, Source, Tree, Value};

/// More problems than this are not listed; the first ones matter.
const MOST: usize = 100;

/// A configuration that may be used.
#[derive(Debug, Clone)]
pub(crate) struct Loaded {
    /// The document.
    pub document: Document,
    /// What should be looked at.
    pub warnings: Vec<Problem>,
    /// Every file that was read, the main one first.
    pub files: Vec<PathBuf>,
    /// Folders in which a new file would be included.
    #[cfg_attr(not(test), expect(dead_code, reason = "files are not watched yet"))]
    pub folders: Vec<PathBuf>,
    /// SHA-256 of all that was read, in hex.
    pub hash: String,
}

/// Where the configuration lies if nobody says: `./conf/tollgate.yaml`, then `/etc/tollgate/tollgate.yaml`.
pub(crate) fn default_path() -> Option<PathBuf> {
    ["conf/tollgate.yaml", "/etc/tollgate/tollgate.yaml"].into_iter().map(PathBuf::from).find(|path| path.is_file())
}

/// Reads, includes, parses and checks the file at `path`.
///
/// # Errors
/// Every problem found, warnings too, if one of them is an error.
pub(crate) fn load(path: &Path, world: &dyn World) -> Result<Loaded, Problems> {
    let name = path.display().to_string();
    match world.read(&name) {
        Ok(text) => read(path, Source::new(name, text), world),
        Err(error) => Err(Problems(vec![unreadable(&name, &error)])),
    }
}

/// Reads the file at `path` for a command that asks a gateway which runs already: what it refers to and its secrets are
/// not looked at, as whoever operates a gateway need not hold them.
///
/// # Errors
/// Every problem found, if one of them is an error.
pub(crate) fn look(path: &Path, world: &dyn World) -> Result<Document, Problems> {
    let name = path.display().to_string();
    match world.read(&name) {
        Ok(text) => read_if(path, Source::new(name, text), world, false).map(|loaded| loaded.document),
        Err(error) => Err(Problems(vec![unreadable(&name, &error)])),
    }
}

/// Parses and checks a text that is called `name` in problems.
///
/// # Errors
/// Every problem found, warnings too, if one of them is an error.
pub(crate) fn load_text(name: &str, text: &str, world: &dyn World) -> Result<Loaded, Problems> {
    read(Path::new(name), Source::new(name.to_owned(), text.to_owned()), world)
}

/// A file that could not be read.
pub(crate) fn unreadable(name: &str, error: &std::io::Error) -> Problem {
    let message = match error.kind() {
        std::io::ErrorKind::NotFound => "there is no such file".to_owned(),
        std::io::ErrorKind::InvalidData => "it is not UTF-8 text".to_owned(),
        _ => format!("it cannot be read: {error}"),
    };
    Problem::of_file(name, message)
}

fn read(path: &Path, main: Source, world: &dyn World) -> Result<Loaded, Problems> {
    read_if(path, main, world, true)
}

fn read_if(path: &Path, main: Source, world: &dyn World, checked: bool) -> Result<Loaded, Problems> {
    let mut problems = Vec::new();
    let Some(mut tree) = tree::read(&main, 0, &mut problems) else { return Err(sorted(problems, &[])) };
    if matches!(tree.value, Value::Null) {
        tree = Tree::empty(tree.place);
    }
    let mut files = Files::new(path, main);
    files.include(&mut tree, world, &mut problems);

    tree.label("");
    let whole = Names::of(&tree);
    let mut places = Places::new(files.sources, tree);
    for Misfit { place, path, message, hint } in files.misfits {
        problems.push(places.show(Severity::Error, place, path, message, hint));
    }
    let document = understand(&mut places, &mut problems);
    if let Some(document) = document.as_ref().filter(|_| checked) {
        check::check(document, &whole, &places, world, &mut problems);
    }
    let Problems(problems) = sorted(problems, &places.sources);
    let hash = hash(&places.sources);
    match document {
        Some(document) if problems.iter().all(|problem| problem.severity == Severity::Warning) => {
            Ok(Loaded { document, warnings: problems, files: files.paths, folders: files.folders, hash })
        }
        Some(_) | None => Err(Problems(problems)),
    }
}

fn hash(sources: &[Source]) -> String {
    use std::fmt::Write as _;
    let mut hasher = Sha256::new();
    for source in sources {
        hasher.update((source.text.len() as u64).to_be_bytes());
        hasher.update(source.text.as_bytes());
    }
    hasher.finalize().iter().fold(String::with_capacity(64), |mut hex, byte| {
        // Writing into a String cannot fail.
        let _ = write!(hex, "{byte:02x}");
        hex
    })
}

/// In the order of the files and their lines, each said once.
fn sorted(mut problems: Vec<Problem>, sources: &[Source]) -> Problems {
    let rank = |problem: &Problem| sources.iter().position(|source| source.name == problem.file);
    problems.sort_by_key(|problem| (rank(problem), problem.line, problem.column, problem.severity));
    problems.dedup();
    Problems(problems)
}

/// Names that may be referred to, also of parts that could not be understood: these are reported once, where they stand.
#[derive(Debug, Default)]
pub(crate) struct Names {
    /// Of upstreams.
    pub upstreams: BTreeSet<String>,
    /// Of tiers.
    pub tiers: BTreeSet<String>,
    /// Of models, without their aliases.
    pub models: BTreeSet<String>,
    /// Of routes.
    pub routes: BTreeSet<String>,
}

impl Names {
    fn of(tree: &Tree) -> Self {
        let section = |name: &str| tree.entry(name).map(|entry| &entry.tree);
        let keys = |name: &str| {
            section(name).map(Tree::entries).unwrap_or_default().iter().map(|entry| entry.key.clone()).collect()
        };
        let name = |route: &Tree| match route.entry("name").map(|entry| &entry.tree.value) {
            Some(Value::Text(name) | Value::Whole(_, name) | Value::Number(_, name)) => Some(name.clone()),
            _ => None,
        };
        let routes = section("routes").map(Tree::items).unwrap_or_default();
        Self {
            upstreams: keys("upstreams"),
            tiers: keys("tiers"),
            models: keys("models"),
            routes: routes.iter().filter_map(name).collect(),
        }
    }
}

/// Turns the tree into the document. What is wrong is reported, cut out, and the rest read again, so all of it comes out.
fn understand(places: &mut Places, problems: &mut Vec<Problem>) -> Option<Document> {
    // A section with nothing in it but comments is an absent one.
    if let Value::Map(sections) = &mut places.tree.value {
        sections.retain(|section| !matches!(section.tree.value, Value::Null));
    }
    for _ in 0..MOST {
        let fault = match Document::deserialize(&places.tree) {
            Ok(document) => return Some(document),
            Err(fault) => fault,
        };
        if fault.way.is_empty() && !matches!(fault.culprit, Culprit::Key(_)) {
            let place = places.tree.place;
            problems.push(places.show(Severity::Error, place, String::new(), fault.message, fault.hint));
            return None;
        }
        let follows = prune(places, fault, problems);
        debug_assert!(follows, "a fault names a part of the tree");
        if !follows {
            return None;
        }
    }
    let hint = "there are more; mend these first".to_owned();
    if let Some(last) = problems.last_mut() {
        last.hint = Some(last.hint.take().map_or(hint.clone(), |first| format!("{first}; {hint}")));
    }
    None
}

/// Reports a fault and cuts its part out of the tree. False if there is no such part.
fn prune(places: &mut Places, fault: Fault, problems: &mut Vec<Problem>) -> bool {
    let mut way = fault.way;
    way.reverse();
    let Some((holder, spot)) = below(&places.tree, &way) else { return false };
    let (mut place, mut path) = (spot.unwrap_or(holder.place), holder.path.clone());
    let mut cut = way;
    let mut said = false;
    match &fault.culprit {
        Culprit::Value => {}
        Culprit::Key(key) => {
            let Some(index) = holder.entries().iter().position(|entry| entry.key == *key) else { return false };
            let Some(entry) = holder.entries().get(index) else { return false };
            (place, path) = (entry.place, entry.tree.path.clone());
            cut.push(index);
        }
        // What is missing may have been there and been refused: that was said.
        Culprit::Missing(key) => {
            let lost = if path.is_empty() { (*key).to_owned() } else { format!("{path}.{key}") };
            said = places.broken.contains(&lost);
        }
    }
    if !said {
        let message =
            if fault.culprit == Culprit::Value && places.is_secret(place) && fault.message.starts_with("expected ") {
                "expected a secret as text; put it in quotes".to_owned()
            } else {
                fault.message
            };
        problems.push(places.show(Severity::Error, place, path.clone(), message, fault.hint));
    }
    // An unknown key leaves nothing out that a later check could miss.
    if !matches!(fault.culprit, Culprit::Key(_)) {
        places.broken.insert(path);
    }
    remove(&mut places.tree, &cut)
}

/// The part at the end of the way, and the place to show for it: of a collection that of its key.
fn below<'a>(tree: &'a Tree, way: &[usize]) -> Option<(&'a Tree, Option<Place>)> {
    let Some((index, rest)) = way.split_first() else { return Some((tree, None)) };
    let (next, key) = match &tree.value {
        Value::Map(entries) => entries.get(*index).map(|entry| (&entry.tree, Some(entry.place)))?,
        Value::List(items) => items.get(*index).map(|item| (item, None))?,
        Value::Null | Value::Bool(_) | Value::Whole(..) | Value::Number(..) | Value::Text(_) => return None,
    };
    if !rest.is_empty() {
        return below(next, rest);
    }
    let spot = match next.value {
        Value::Map(_) | Value::List(_) | Value::Null => key.or(Some(Place { width: 1, ..next.place })),
        Value::Bool(_) | Value::Whole(..) | Value::Number(..) | Value::Text(_) => None,
    };
    Some((next, spot))
}

fn remove(tree: &mut Tree, way: &[usize]) -> bool {
    let Some((index, rest)) = way.split_first() else { return false };
    match &mut tree.value {
        Value::Map(entries) if rest.is_empty() && *index < entries.len() => {
            entries.remove(*index);
            true
        }
        Value::List(items) if rest.is_empty() && *index < items.len() => {
            items.remove(*index);
            true
        }
        Value::Map(entries) => entries.get_mut(*index).is_some_and(|entry| remove(&mut entry.tree, rest)),
        Value::List(items) => items.get_mut(*index).is_some_and(|item| remove(item, rest)),
        Value::Null | Value::Bool(_) | Value::Whole(..) | Value::Number(..) | Value::Text(_) => false,
    }
}
