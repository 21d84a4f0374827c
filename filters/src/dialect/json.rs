//! A walk over JSON text that is already known to be well formed: no tree, no allocation, strings skipped at the speed of `memchr`.

use std::fmt;

use memchr::memchr2;
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

/// How deep a request body may nest, the body itself included.
pub(crate) const MAX_DEPTH: usize = 128;

/// The value nests deeper than [`MAX_DEPTH`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TooDeep;

/// What a walk tells. `depth` counts the open brackets around the thing, those outside the walked text included.
pub(crate) trait Visit {
    /// A string value (not a key): its raw text between the quotes, and the key that it or its array stands under (also raw).
    fn string(&mut self, _key: &[u8], _depth: usize, _text: &[u8]) {}
    /// A number.
    fn number(&mut self) {}
    /// An object or array at `depth` ended; `end` is the offset just behind it.
    fn close(&mut self, _depth: usize, _end: usize) {}
}

/// Only the depth is of interest.
impl Visit for () {}

/// Walks `raw`, which stands inside `outer` open brackets. Text that is not well formed gives no error, only odd visits.
pub(crate) fn walk(raw: &[u8], outer: usize, visit: &mut impl Visit) -> Result<(), TooDeep> {
    let mut depth = outer;
    let mut key: &[u8] = b"";
    let mut rest = raw;
    while let Some((&byte, tail)) = rest.split_first() {
        rest = tail;
        match byte {
            b'"' => {
                let length = string_length(tail);
                let (text, after) = tail.split_at_checked(length).unwrap_or((tail, b""));
                rest = after.get(1..).unwrap_or_default();
                // In well-formed JSON only a key is followed by a colon.
                if rest.trim_ascii_start().first() == Some(&b':') {
                    key = text;
                } else {
                    visit.string(key, depth, text);
                }
            }
            b'{' | b'[' => {
                depth += 1;
                if depth > MAX_DEPTH {
                    return Err(TooDeep);
                }
            }
            b'}' | b']' => {
                visit.close(depth, raw.len() - rest.len());
                depth = depth.saturating_sub(1);
                key = b"";
            }
            b'0'..=b'9' | b'-' => {
                let digits =
                    rest.iter().take_while(|byte| matches!(byte, b'0'..=b'9' | b'.' | b'e' | b'E' | b'+' | b'-'));
                rest = rest.get(digits.count()..).unwrap_or_default();
                visit.number();
            }
            _ => {}
        }
    }
    Ok(())
}

/// Length of the string text that begins here, just behind its opening quote, up to its closing quote.
fn string_length(text: &[u8]) -> usize {
    let mut at = 0;
    while let Some(found) = text.get(at..).and_then(|rest| memchr2(b'"', b'\\', rest)) {
        let end = at + found;
        if text.get(end) == Some(&b'"') {
            return end;
        }
        at = end + 2;
    }
    text.len()
}

/// Where `part`, a slice of `whole`, stands in it; `None` if it is not a slice of it.
pub(crate) fn span(whole: &[u8], part: &str) -> Option<(usize, usize)> {
    let start = (part.as_ptr() as usize).checked_sub(whole.as_ptr() as usize)?;
    let end = start.checked_add(part.len())?;
    (end <= whole.len()).then_some((start, end))
}

/// Whether a value says nothing: null or empty.
pub(crate) fn is_blank(raw: &RawValue) -> bool {
    matches!(raw.get(), "null" | "\"\"" | "[]" | "{}" | "false")
}

/// A non-negative number, however it is written; anything else is `None`. A strange figure must not make an event unreadable.
pub(crate) fn number(raw: Option<&RawValue>) -> Option<u64> {
    let text = raw?.get();
    text.parse().ok().or_else(|| {
        let float: f64 = text.parse().ok()?;
        // `as` saturates, which is what is wanted of a figure out of range.
        (float >= 0.0).then_some(float as u64)
    })
}

/// A string value, decoded; anything else is `None`.
pub(crate) fn string(raw: Option<&RawValue>) -> Option<String> {
    serde_json::from_str(raw?.get()).ok()
}

/// An object whose members keep their order and their text. For what is rewritten seldom: it copies.
#[derive(Debug, Default)]
pub(crate) struct Object(Vec<(String, String)>);

impl Object {
    /// Takes an object apart; `None` if it is none.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        serde_json::from_str(text).ok()
    }

    /// Takes the objects of an array apart.
    pub(crate) fn parse_all(text: &str) -> Option<Vec<Self>> {
        serde_json::from_str(text).ok()
    }

    /// A member's value, as JSON.
    pub(crate) fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    /// Whether a member is there and says something.
    pub(crate) fn speaks(&self, name: &str) -> bool {
        self.get(name).is_some_and(|value| !matches!(value, "null" | "\"\"" | "[]" | "{}" | "false"))
    }

    /// Whether any member says something.
    pub(crate) fn says_something(&self) -> bool {
        self.0.iter().any(|(name, _)| self.speaks(name))
    }

    /// Gives a member another value, in its place; a new one comes last.
    pub(crate) fn set(&mut self, name: &str, value: String) {
        match self.0.iter_mut().find(|(known, _)| known == name) {
            Some((_, old)) => *old = value,
            None => self.0.push((name.to_owned(), value)),
        }
    }

    /// Takes a member out.
    pub(crate) fn remove(&mut self, name: &str) {
        self.0.retain(|(known, _)| known != name);
    }
}

impl fmt::Display for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("{")?;
        for (place, (name, value)) in self.0.iter().enumerate() {
            let comma = if place > 0 { "," } else { "" };
            write!(f, "{comma}{}:{value}", serde_json::Value::from(name.as_str()))?;
        }
        f.write_str("}")
    }
}

impl<'de> Deserialize<'de> for Object {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Members;
        impl<'de> Visitor<'de> for Members {
            type Value = Object;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Object, A::Error> {
                let mut members = Vec::new();
                while let Some((name, value)) = map.next_entry::<String, &'de RawValue>()? {
                    members.push((name, value.get().to_owned()));
                }
                Ok(Object(members))
            }
        }
        deserializer.deserialize_map(Members)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Record(Vec<(String, usize, String)>, usize, Vec<(usize, usize)>);

    impl Visit for Record {
        fn string(&mut self, key: &[u8], depth: usize, text: &[u8]) {
            let own = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
            self.0.push((own(key), depth, own(text)));
        }
        fn number(&mut self) {
            self.1 += 1;
        }
        fn close(&mut self, depth: usize, end: usize) {
            self.2.push((depth, end));
        }
    }

    #[test]
    fn a_walk_tells_strings_with_their_keys_numbers_and_ends() {
        let mut record = Record::default();
        let text = r#"[{"role" : "user","content":"a\"b\\"},["x",-1.5e3,12]]"#;
        walk(text.as_bytes(), 1, &mut record).unwrap();
        let expected = [("role", 3, "user"), ("content", 3, r#"a\"b\\"#), ("", 3, "x")];
        let found: Vec<_> = record.0.iter().map(|(k, d, t)| (k.as_str(), *d, t.as_str())).collect();
        assert_eq!(found, expected);
        assert_eq!(record.1, 2);
        assert_eq!(record.2, [(3, 37), (3, 53), (2, 54)]);
    }

    #[test]
    fn depth_is_capped_and_broken_text_does_not_hang() {
        let deep = |n: usize| "[".repeat(n) + &"]".repeat(n);
        assert_eq!(walk(deep(MAX_DEPTH).as_bytes(), 0, &mut ()), Ok(()));
        assert_eq!(walk(deep(MAX_DEPTH + 1).as_bytes(), 0, &mut ()), Err(TooDeep));
        assert_eq!(walk(br#"{"a":"b\"#, 0, &mut ()), Ok(()));
        assert_eq!(walk(br#"]]]"\"#, 0, &mut ()), Ok(()));
    }

    #[test]
    fn an_object_keeps_the_order_and_the_text_of_its_members() {
        let mut object = Object::parse(r#"{ "b": [1.50, 2], "a" : {"x": null}, "c":"\u0041" }"#).unwrap();
        object.set("a", "7".to_owned());
        object.set("new \"one\"", "[]".to_owned());
        object.remove("none");
        assert_eq!(object.to_string(), r#"{"b":[1.50, 2],"a":7,"c":"\u0041","new \"one\"":[]}"#);
        assert!(object.speaks("b") && !object.speaks("new \"one\"") && object.says_something());
        assert!(Object::parse("[]").is_none());
    }

    #[test]
    fn odd_figures_are_numbers_or_nothing() {
        let of = |text: &str| number(Some(&RawValue::from_string(text.to_owned()).unwrap()));
        assert_eq!(of("12"), Some(12));
        assert_eq!(of("12.0"), Some(12));
        assert_eq!(of("-3"), None);
        assert_eq!(of("1e400"), Some(u64::MAX));
        assert_eq!(of("\"12\""), None);
        assert_eq!(of("null"), None);
    }
}
