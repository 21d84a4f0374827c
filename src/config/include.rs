//! `include:` — further files, read and merged before anything is understood.

use std::path::{Path, PathBuf};

use tollgate_filters::config::World;

use super::load::unreadable;
use super::place::line_of;
use super::problem::Problem;
use super::tree::{self, Entry, Place, Source, Tree, Value};

/// Sections that an included file may hold.
const INCLUDABLE: &[&str] = &["tiers", "keys", "upstreams", "models", "routes"];

/// Something wrong with how the files fit together, shown once all of them are known.
#[derive(Debug)]
pub(crate) struct Misfit {
    /// Where it stands.
    pub place: Place,
    /// The place in the document.
    pub path: String,
    /// What is wrong.
    pub message: String,
    /// What would be right.
    pub hint: Option<String>,
}

/// The files of a configuration.
#[derive(Debug)]
pub(crate) struct Files {
    /// Every file that was read, the main one first.
    pub sources: Vec<Source>,
    /// Their paths.
    pub paths: Vec<PathBuf>,
    /// Folders in which a new file would be included.
    pub folders: Vec<PathBuf>,
    /// What does not fit together.
    pub misfits: Vec<Misfit>,
}

impl Files {
    /// The main file alone.
    pub(crate) fn new(path: &Path, main: Source) -> Self {
        Self { sources: vec![main], paths: vec![path.to_owned()], folders: Vec::new(), misfits: Vec::new() }
    }

    /// Reads what `include:` of the main file names and adds it to its tree.
    pub(crate) fn include(&mut self, tree: &mut Tree, world: &dyn World, problems: &mut Vec<Problem>) {
        let base = self.paths.first().and_then(|path| path.parent()).map(Path::to_owned).unwrap_or_default();
        for (pattern, place) in patterns(tree) {
            let found = matching(&base, &pattern);
            self.folders.extend(found.folder);
            if found.wild_folder {
                self.misfit(place, "include", format!("{pattern}: `*` and `?` are for the file name only"), None);
            } else if found.files.is_empty() && !pattern.contains(['*', '?']) {
                self.misfit(place, "include", format!("{pattern}: there is no such file"), None);
            }
            for file in found.files {
                if !self.paths.contains(&file) {
                    self.add(tree, file, world, problems);
                }
            }
        }
    }

    fn add(&mut self, tree: &mut Tree, file: PathBuf, world: &dyn World, problems: &mut Vec<Problem>) {
        let name = file.display().to_string();
        self.paths.push(file);
        match world.read(&name) {
            Err(error) => problems.push(unreadable(&name, &error)),
            Ok(text) => {
                let source = Source::new(name, text);
                let part = tree::read(&source, self.sources.len(), problems);
                self.sources.push(source);
                if let Some(part) = part {
                    self.merge(tree, part);
                }
            }
        }
    }

    fn misfit(&mut self, place: Place, path: &str, message: String, hint: Option<String>) {
        self.misfits.push(Misfit { place, path: path.to_owned(), message, hint });
    }

    /// Adds an included file to the tree.
    fn merge(&mut self, tree: &mut Tree, part: Tree) {
        let Value::Map(sections) = &mut tree.value else { return };
        let parts = match part.value {
            Value::Map(parts) => parts,
            Value::Null => return,
            Value::Bool(_) | Value::Whole(..) | Value::Number(..) | Value::Text(_) | Value::List(_) => {
                self.misfit(part.place, "", "an included file holds sections, like `routes:`".to_owned(), None);
                return;
            }
        };
        for entry in parts {
            if !INCLUDABLE.contains(&entry.key.as_str()) {
                let message = format!("`{}` cannot stand in an included file", entry.key);
                let hint = format!("an included file may hold {}", INCLUDABLE.join(", "));
                self.misfit(entry.place, &entry.key, message, Some(hint));
                continue;
            }
            let known = sections.iter_mut().find(|section| section.key == entry.key);
            let Some(section) = known else {
                sections.push(entry);
                continue;
            };
            match (&mut section.tree.value, entry.tree.value) {
                (Value::List(items), Value::List(more)) => items.extend(more),
                (Value::Map(entries), Value::Map(more)) => self.merge_entries(entries, more, &entry.key),
                (_, Value::Null) => {}
                (mine @ Value::Null, more) => *mine = more,
                (Value::List(_) | Value::Map(_), _) => {
                    let message = format!("`{}` is written in another form than in the main file", entry.key);
                    self.misfit(entry.place, &entry.key, message, None);
                }
                // The main file's own section is of the wrong kind: the document's reading says so.
                (Value::Bool(_) | Value::Whole(..) | Value::Number(..) | Value::Text(_), _) => {}
            }
        }
    }

    fn merge_entries(&mut self, entries: &mut Vec<Entry>, more: Vec<Entry>, section: &str) {
        for entry in more {
            if let Some(first) = entries.iter().find(|first| first.key == entry.key) {
                let message = format!("`{}` is defined twice in `{section}`", entry.key);
                let hint =
                    format!("it is already defined at {}", line_of(&self.sources, first.place, entry.place.file));
                self.misfit(entry.place, &format!("{section}.{}", entry.key), message, Some(hint));
            } else {
                entries.push(entry);
            }
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
