//! The YAML text as a tree in which every key and value knows its place.

use std::fmt;

use serde::{Deserialize, Deserializer, de};
use serde_yaml::{Location, Spanned};

use super::problem::{Problem, Severity, snippet};

/// One file that was read.
#[derive(Debug, Clone)]
pub(crate) struct Source {
    /// Its name as shown in problems.
    pub name: String,
    /// Its text, without a byte order mark.
    pub text: String,
    /// Where its lines begin.
    starts: Vec<usize>,
}

impl Source {
    /// A file and its text.
    pub(crate) fn new(name: String, mut text: String) -> Self {
        if text.starts_with('\u{feff}') {
            text.remove(0);
        }
        let breaks = text.bytes().enumerate().filter(|(_, byte)| *byte == b'\n').map(|(at, _)| at + 1);
        let starts = std::iter::once(0).chain(breaks).collect();
        Self { name, text, starts }
    }

    /// A line by its number from 1, without its end; empty if there is none.
    pub(crate) fn line(&self, number: u32) -> &str {
        let start = (number as usize).checked_sub(1).and_then(|index| self.starts.get(index));
        start.and_then(|start| self.text.get(*start..)?.lines().next()).unwrap_or_default()
    }
}

/// Where something stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub(crate) struct Place {
    /// Index of the file.
    pub file: usize,
    /// Line from 1.
    pub line: u32,
    /// Column from 1, in characters.
    pub column: u32,
    /// Length in characters.
    pub width: u32,
}

/// A value and where it stands.
#[derive(Debug, Clone)]
pub(crate) struct Tree {
    /// Where it stands; of an alias, where the alias stands.
    pub place: Place,
    /// Its path in the whole document as written, like `routes[2].match`.
    pub path: String,
    /// The value.
    pub value: Value,
}

/// An entry of a map.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    /// The key.
    pub key: String,
    /// Where the key stands.
    pub place: Place,
    /// The value.
    pub tree: Tree,
}

/// A value of YAML.
#[derive(Debug, Clone)]
pub(crate) enum Value {
    /// Nothing, `null` or `~`.
    Null,
    /// `true` or `false`.
    Bool(bool),
    /// A whole number, and how it was written.
    Whole(i128, String),
    /// A number, and how it was written.
    Number(f64, String),
    /// Text.
    Text(String),
    /// A list.
    List(Vec<Tree>),
    /// A map, in the order of the text.
    Map(Vec<Entry>),
}

impl Tree {
    /// A map without entries.
    pub(crate) fn empty(place: Place) -> Self {
        Self { place, path: String::new(), value: Value::Map(Vec::new()) }
    }

    /// The entries, if it is a map.
    pub(crate) fn entries(&self) -> &[Entry] {
        if let Value::Map(entries) = &self.value { entries } else { &[] }
    }

    /// The entry `key`, if it is a map that has it.
    pub(crate) fn entry(&self, key: &str) -> Option<&Entry> {
        self.entries().iter().find(|entry| entry.key == key)
    }

    /// The items, if it is a list.
    pub(crate) fn items(&self) -> &[Tree] {
        if let Value::List(items) = &self.value { items } else { &[] }
    }

    /// Writes into every value its path in the document.
    pub(crate) fn label(&mut self, path: &str) {
        path.clone_into(&mut self.path);
        match &mut self.value {
            Value::Map(entries) => {
                for entry in entries {
                    let below = if path.is_empty() { entry.key.clone() } else { format!("{path}.{}", entry.key) };
                    entry.tree.label(&below);
                }
            }
            Value::List(items) => {
                for (index, item) in items.iter_mut().enumerate() {
                    item.label(&format!("{path}[{index}]"));
                }
            }
            Value::Null | Value::Bool(_) | Value::Whole(..) | Value::Number(..) | Value::Text(_) => {}
        }
    }
}

/// A value as the YAML library hands it out.
enum Raw {
    Null,
    Bool(bool),
    Whole(i128),
    Number(f64),
    Text(String),
    List(Vec<Spanned<Raw>>),
    Map(Vec<(Spanned<String>, Spanned<Raw>)>),
}

impl<'de> Deserialize<'de> for Raw {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl<'de> de::Visitor<'de> for Visitor {
            type Value = Raw;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a value")
            }
            fn visit_unit<E: de::Error>(self) -> Result<Raw, E> {
                Ok(Raw::Null)
            }
            fn visit_bool<E: de::Error>(self, value: bool) -> Result<Raw, E> {
                Ok(Raw::Bool(value))
            }
            fn visit_u64<E: de::Error>(self, value: u64) -> Result<Raw, E> {
                Ok(Raw::Whole(value.into()))
            }
            fn visit_i64<E: de::Error>(self, value: i64) -> Result<Raw, E> {
                Ok(Raw::Whole(value.into()))
            }
            fn visit_f64<E: de::Error>(self, value: f64) -> Result<Raw, E> {
                Ok(Raw::Number(value))
            }
            fn visit_str<E: de::Error>(self, value: &str) -> Result<Raw, E> {
                Ok(Raw::Text(value.to_owned()))
            }
            fn visit_seq<A: de::SeqAccess<'de>>(self, mut list: A) -> Result<Raw, A::Error> {
                let mut items = Vec::new();
                while let Some(item) = list.next_element()? {
                    items.push(item);
                }
                Ok(Raw::List(items))
            }
            fn visit_map<A: de::MapAccess<'de>>(self, mut map: A) -> Result<Raw, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(Raw::Map(entries))
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

/// The only place that calls the YAML library: strict booleans, no duplicate keys, bounded aliases and depth.
fn parse(text: &str, duplicate_keys: serde_yaml::DuplicateKeyPolicy) -> Result<Spanned<Raw>, serde_yaml::Error> {
    let mut budget = serde_yaml::Budget::default();
    budget.max_depth = 64;
    budget.max_events = 4_000_000;
    budget.max_nodes = 2_000_000;
    let mut limits = serde_yaml::options::AliasLimits::default();
    limits.max_total_replayed_events = 100_000;
    limits.max_replay_stack_depth = 16;
    let mut options = serde_yaml::Options::default();
    options.budget = Some(budget);
    options.alias_limits = limits;
    options.strict_booleans = true;
    options.duplicate_keys = duplicate_keys;
    options.with_snippet = false;
    options.non_finite_float_policy = serde_yaml::NonFiniteFloatPolicy::AsString;
    serde_yaml::from_str_with_options(text, options)
}

/// Reads one file. Syntax errors end it; duplicate keys are all reported and the last of them stays.
pub(crate) fn read(source: &Source, file: usize, problems: &mut Vec<Problem>) -> Option<Tree> {
    let blank = |line: &str| matches!(line.trim_start().as_bytes().first(), None | Some(b'#'));
    if source.text.lines().all(blank) {
        return Some(Tree::empty(Place { file, line: 1, column: 1, width: 1 }));
    }
    let mut grower = Grower { source, file, problems };
    match parse(&source.text, serde_yaml::DuplicateKeyPolicy::Error) {
        Ok(raw) => Some(grower.grow(raw)),
        Err(first) => {
            let duplicate = matches!(first.without_snippet(), serde_yaml::Error::DuplicateMappingKey { .. });
            // The library stops at the first duplicate; a second look that lets them pass finds them all.
            let again = duplicate.then(|| parse(&source.text, serde_yaml::DuplicateKeyPolicy::LastWins).ok()).flatten();
            let before = grower.problems.len();
            let tree = again.map(|raw| grower.grow(raw));
            if grower.problems.len() == before {
                grower.syntax(&first);
            }
            tree
        }
    }
}

struct Grower<'a> {
    source: &'a Source,
    file: usize,
    problems: &'a mut Vec<Problem>,
}

impl Grower<'_> {
    fn place(&self, location: Location) -> Place {
        let number = |n: u64| u32::try_from(n).unwrap_or(u32::MAX);
        Place {
            file: self.file,
            line: number(location.line()),
            column: number(location.column()),
            width: number(location.span().len().max(1)),
        }
    }

    fn grow(&mut self, raw: Spanned<Raw>) -> Tree {
        let place = self.place(raw.referenced);
        let value = match raw.value {
            Raw::Null => Value::Null,
            Raw::Bool(value) => Value::Bool(value),
            Raw::Whole(value) => Value::Whole(value, self.written(raw.defined).unwrap_or_else(|| value.to_string())),
            Raw::Number(value) => Value::Number(value, self.written(raw.defined).unwrap_or_else(|| value.to_string())),
            Raw::Text(text) => Value::Text(text),
            Raw::List(items) => Value::List(items.into_iter().map(|item| self.grow(item)).collect()),
            Raw::Map(entries) => Value::Map(self.grow_map(entries)),
        };
        Tree { place, path: String::new(), value }
    }

    fn grow_map(&mut self, raw: Vec<(Spanned<String>, Spanned<Raw>)>) -> Vec<Entry> {
        let mut entries: Vec<Entry> = Vec::with_capacity(raw.len());
        let mut seen = std::collections::HashMap::new();
        for (key, value) in raw {
            let entry = Entry { place: self.place(key.referenced), tree: self.grow(value), key: key.value };
            if let Some(index) = seen.insert(entry.key.clone(), entries.len())
                && let Some(first) = entries.get_mut(index)
            {
                let (line, column) = (first.place.line, first.place.column);
                let mut problem = self.problem(entry.place, format!("duplicate key `{}`", entry.key));
                problem.hint = Some(format!("it is already set at line {line}, column {column}"));
                self.problems.push(problem);
                seen.insert(entry.key.clone(), index);
                *first = entry;
            } else {
                entries.push(entry);
            }
        }
        entries
    }

    /// How a scalar was written.
    fn written(&self, defined: Location) -> Option<String> {
        let offset = usize::try_from(defined.span().byte_offset()?).ok()?;
        let len = usize::try_from(defined.span().byte_len()?).ok()?;
        let text = self.source.text.get(offset..offset.checked_add(len)?)?.trim();
        (!text.is_empty()).then(|| text.to_owned())
    }

    fn problem(&self, place: Place, message: String) -> Problem {
        let line = self.source.line(place.line);
        Problem {
            severity: Severity::Error,
            file: self.source.name.clone(),
            line: place.line,
            column: place.column,
            path: String::new(),
            message,
            hint: None,
            // There may be no tree to know the secrets by.
            snippet: Some(snippet(&guess_secrets(line), place.line, place.column, place.width)),
        }
    }

    fn syntax(&mut self, error: &serde_yaml::Error) {
        let place = error.location().map(|location| self.place(location));
        let message = error.without_snippet().to_string();
        // The library ends its message with the place, which is shown anyway.
        let message =
            message.split(" at line ").next().unwrap_or_default().trim_end_matches([' ', ',', ':']).to_owned();
        let place = Place { width: 1, ..place.unwrap_or(Place { file: self.file, line: 1, column: 1, width: 1 }) };
        let mut problem = self.problem(place, message);
        if matches!(error.without_snippet(), serde_yaml::Error::MultipleDocuments { .. }) {
            problem.message = "a second YAML document".to_owned();
            problem.hint = Some("a configuration is one document; `include:` adds further files".to_owned());
        } else if self.source.line(place.line).trim_start_matches(' ').starts_with('\t') {
            problem.hint = Some("YAML is indented with spaces, never with tabs".to_owned());
        }
        self.problems.push(problem);
    }
}

/// Masks what stands where secrets mostly stand, in a line of a text that could not be understood.
fn guess_secrets(line: &str) -> String {
    let mut shown = String::with_capacity(line.len());
    let mut rest = line;
    let marks = ["key:", "token:", "url:", "credentials:", "sk-"];
    while let Some((at, mark)) = marks.iter().filter_map(|mark| rest.find(mark).map(|at| (at, mark))).min() {
        let (before, after) = rest.split_at(at + mark.len());
        shown.push_str(before);
        let value = after.trim_start_matches([' ', '"', '\'', '[', '{']);
        shown.push_str(after.get(..after.len() - value.len()).unwrap_or_default());
        let end = value.find([' ', ',', '"', '\'', ']', '}']).unwrap_or(value.len());
        let (secret, after) = value.split_at(end);
        // `{ env: NAME }` holds no secret.
        let source = ["env:", "file:", "credential:"].contains(&secret);
        shown.extend(secret.chars().map(|c| if source { c } else { '*' }));
        rest = after;
    }
    shown.push_str(rest);
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(text: &str) -> (Option<Tree>, Vec<Problem>) {
        let mut problems = Vec::new();
        let source = Source::new("t.yaml".into(), text.into());
        let tree = read(&source, 0, &mut problems);
        (tree, problems)
    }

    #[test]
    fn keys_and_values_know_where_they_stand() {
        let (tree, problems) = tree("a: 1\nbé:\n  - { c: 100_000 }\n");
        assert_eq!(problems, []);
        let tree = tree.unwrap();
        let list = tree.entry("bé").unwrap();
        assert_eq!((list.place.line, list.place.column), (2, 1));
        let c = list.tree.items()[0].entry("c").unwrap();
        assert_eq!((c.place.line, c.place.column, c.tree.place.column), (3, 7, 10));
        let Value::Whole(number, written) = &c.tree.value else { panic!("{c:?}") };
        assert_eq!((*number, written.as_str()), (100_000, "100_000"));
    }

    #[test]
    fn words_that_were_booleans_long_ago_are_text() {
        let (tree, _) = tree("[yes, on, off, true]");
        let tree = tree.unwrap();
        let kinds: Vec<bool> = tree.items().iter().map(|item| matches!(item.value, Value::Text(_))).collect();
        assert_eq!(kinds, [true, true, true, false]);
    }

    #[test]
    fn every_duplicate_key_is_reported_with_the_place_of_the_first() {
        let (_, problems) = tree("a: 1\nb: {c: 1, c: 2}\na: 3\n");
        let mut shown: Vec<_> =
            problems.iter().map(|p| (p.line, p.message.as_str(), p.hint.as_deref().unwrap())).collect();
        shown.sort();
        assert_eq!(
            shown,
            [
                (2, "duplicate key `c`", "it is already set at line 2, column 5"),
                (3, "duplicate key `a`", "it is already set at line 1, column 1"),
            ]
        );
    }

    #[test]
    fn an_alias_bomb_is_refused() {
        let mut text = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n".to_owned();
        for n in 1..10 {
            let below = format!("*a{}, ", n - 1).repeat(9);
            text.push_str(&format!("a{n}: &a{n} [{below}]\n"));
        }
        let (tree, problems) = tree(&text);
        assert!(tree.is_none());
        assert_eq!(problems.len(), 1);
    }

    #[test]
    fn deep_nesting_is_refused() {
        let (tree, problems) = tree(&"[".repeat(100_000));
        assert!(tree.is_none());
        assert_eq!(problems.len(), 1);
    }

    #[test]
    fn a_text_that_cannot_be_read_shows_no_secret() {
        assert_eq!(guess_secrets("  - { id: a, key: abc, tier: x"), "  - { id: a, key: ***, tier: x");
        assert_eq!(guess_secrets("token: \"abc\""), "token: \"***\"");
        assert_eq!(guess_secrets("key: { env: NAME }"), "key: { env: NAME }");
        assert_eq!(guess_secrets("nothing here"), "nothing here");
    }
}
