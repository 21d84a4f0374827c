//! Reading a configuration: files, includes, tree, document, checks.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use sha2::{Digest, Sha256};
use tollgate_filters::config::World;

use super::Document;
use super::check;
use super::de::{Culprit, Fault};
use super::place::Places;
use super::problem::{Problem, Problems, Severity};
use super::tree::{self, Entry, Place, Source, Tree, Value};

/// More problems than this are not listed; the first ones matter.
const MOST: usize = 100;

/// Sections that an included file may hold.
const INCLUDABLE: &[&str] = &["tiers", "keys", "upstreams", "models", "routes"];

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

/// Parses and checks a text that is called `name` in problems.
///
/// # Errors
/// Every problem found, warnings too, if one of them is an error.
pub(crate) fn load_text(name: &str, text: &str, world: &dyn World) -> Result<Loaded, Problems> {
    read(Path::new(name), Source::new(name.to_owned(), text.to_owned()), world)
}

fn unreadable(name: &str, error: &std::io::Error) -> Problem {
    let message = match error.kind() {
        std::io::ErrorKind::NotFound => "there is no such file".to_owned(),
        std::io::ErrorKind::InvalidData => "it is not UTF-8 text".to_owned(),
        _ => format!("it cannot be read: {error}"),
    };
    Problem::of_file(name, message)
}

fn read(path: &Path, main: Source, world: &dyn World) -> Result<Loaded, Problems> {
    let mut problems = Vec::new();
    let mut files = vec![path.to_owned()];
    let mut folders = Vec::new();
    let Some(mut tree) = tree::read(&main, 0, &mut problems) else { return Err(sorted(problems, &[])) };
    if matches!(tree.value, Value::Null) {
        tree = Tree::empty(tree.place);
    }
    let mut sources = vec![main];

    for (pattern, place) in patterns(&tree) {
        let base = path.parent().unwrap_or(Path::new(""));
        let found = matching(base, &pattern);
        folders.extend(found.folder);
        let missing = found.files.is_empty() && !pattern.contains(['*', '?']);
        if missing || found.wild_folder {
            let places = Places::new(sources.clone(), tree.clone());
            let message = if missing {
                format!("{pattern}: there is no such file")
            } else {
                format!("{pattern}: `*` and `?` are for the file name only")
            };
            problems.push(places.show(Severity::Error, place, "include".to_owned(), message, None));
        }
        for file in found.files {
            if files.contains(&file) {
                continue;
            }
            let name = file.display().to_string();
            match world.read(&name) {
                Err(error) => problems.push(unreadable(&name, &error)),
                Ok(text) => {
                    sources.push(Source::new(name, text));
                    let Some(source) = sources.last() else { continue };
                    if let Some(part) = tree::read(source, sources.len() - 1, &mut problems) {
                        let places = Places::new(sources.clone(), part.clone());
                        merge(&mut tree, part, &places, &mut problems);
                    }
                }
            }
            files.push(file);
        }
    }

    tree.label("");
    let whole = Names::of(&tree);
    let mut places = Places::new(sources, tree);
    let document = understand(&mut places, &mut problems);
    if let Some(document) = &document {
        check::check(document, &whole, &places, world, &mut problems);
    }
    let Problems(problems) = sorted(problems, &places.sources);
    let hash = hash(&places.sources);
    match document {
        Some(document) if problems.iter().all(|problem| problem.severity == Severity::Warning) => {
            Ok(Loaded { document, warnings: problems, files, folders, hash })
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

fn patterns(tree: &Tree) -> Vec<(String, Place)> {
    let items = tree.entry("include").map(|entry| entry.tree.items()).unwrap_or_default();
    let text = |item: &Tree| match &item.value {
        Value::Text(pattern) => Some((pattern.clone(), item.place)),
        _ => None,
    };
    items.iter().filter_map(text).collect()
}

#[derive(Default)]
struct Found {
    files: Vec<PathBuf>,
    folder: Option<PathBuf>,
    wild_folder: bool,
}

/// Files that a pattern names, in the order of their names.
fn matching(base: &Path, pattern: &str) -> Found {
    let path = base.join(pattern);
    let folder = path.parent().unwrap_or(Path::new("")).to_owned();
    if folder.strip_prefix(base).unwrap_or(&folder).to_string_lossy().contains(['*', '?']) {
        return Found { wild_folder: true, ..Found::default() };
    }
    if !pattern.contains(['*', '?']) {
        let files = if path.is_file() { vec![path] } else { Vec::new() };
        return Found { files, ..Found::default() };
    }
    let wanted: Vec<char> = path.file_name().unwrap_or_default().to_string_lossy().chars().collect();
    let listed = if folder.as_os_str().is_empty() { Path::new(".") } else { &folder };
    let names = std::fs::read_dir(listed).into_iter().flatten().flatten().map(|entry| entry.file_name());
    let fits = |name: &std::ffi::OsString| {
        let name: Vec<char> = name.to_string_lossy().chars().collect();
        // Editors' copies are hidden files; they are meant by no pattern that does not say so.
        (name.first() != Some(&'.') || wanted.first() == Some(&'.')) && wild(&wanted, &name)
    };
    let mut files: Vec<PathBuf> =
        names.filter(fits).map(|name| folder.join(name)).filter(|path| path.is_file()).collect();
    files.sort();
    Found { files, folder: Some(folder), wild_folder: false }
}

/// Whether `name` fits `pattern` with `*` for any characters and `?` for one.
fn wild(pattern: &[char], name: &[char]) -> bool {
    match (pattern.split_first(), name.split_first()) {
        (None, None) => true,
        (Some(('*', rest)), None) => wild(rest, name),
        (Some(('*', rest)), Some((_, tail))) => wild(rest, name) || wild(pattern, tail),
        (Some(('?', rest)), Some((_, tail))) => wild(rest, tail),
        (Some((c, rest)), Some((d, tail))) => c == d && wild(rest, tail),
        (None, Some(_)) | (Some(_), None) => false,
    }
}

/// Adds an included file to the tree.
fn merge(tree: &mut Tree, part: Tree, places: &Places, problems: &mut Vec<Problem>) {
    let Value::Map(sections) = &mut tree.value else { return };
    let part_place = part.place;
    let Value::Map(parts) = part.value else {
        let message = "an included file holds sections, like `routes:`".to_owned();
        problems.push(places.show(Severity::Error, part_place, String::new(), message, None));
        return;
    };
    for entry in parts {
        if !INCLUDABLE.contains(&entry.key.as_str()) {
            let message = format!("`{}` cannot stand in an included file", entry.key);
            let hint = format!("an included file may hold {}", INCLUDABLE.join(", "));
            problems.push(places.show(Severity::Error, entry.place, entry.key.clone(), message, Some(hint)));
            continue;
        }
        let known = sections.iter_mut().find(|section| section.key == entry.key);
        let Some(section) = known else {
            sections.push(entry);
            continue;
        };
        match (&mut section.tree.value, entry.tree.value) {
            (Value::List(items), Value::List(more)) => items.extend(more),
            (Value::Map(entries), Value::Map(more)) => merge_entries(entries, more, &entry.key, places, problems),
            (_, Value::Null) => {}
            (mine @ Value::Null, more) => *mine = more,
            (Value::List(_) | Value::Map(_), _) => {
                let message = format!("`{}` is written in another form than in the main file", entry.key);
                problems.push(places.show(Severity::Error, entry.place, entry.key, message, None));
            }
            // The main file's own section is of the wrong kind: the document's reading says so.
            (_, _) => {}
        }
    }
}

fn merge_entries(
    entries: &mut Vec<Entry>,
    more: Vec<Entry>,
    section: &str,
    places: &Places,
    problems: &mut Vec<Problem>,
) {
    for entry in more {
        if let Some(first) = entries.iter().find(|first| first.key == entry.key) {
            let message = format!("`{}` is defined twice in `{section}`", entry.key);
            let hint = format!("it is already defined at {}", places.line_of(first.place, entry.place.file));
            let path = format!("{section}.{}", entry.key);
            problems.push(places.show(Severity::Error, entry.place, path, message, Some(hint)));
        } else {
            entries.push(entry);
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
