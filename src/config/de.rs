//! From the located tree to the document: one serde deserializer whose errors say where they happened.

use std::fmt;

use serde::de::{self, DeserializeSeed, Deserializer, IntoDeserializer, Visitor};
use serde::forward_to_deserialize_any;

use super::problem::suggest;
use super::tree::{Entry, Tree, Value};

/// What a value of the tree was refused for.
#[derive(Debug)]
pub(crate) struct Fault {
    /// What is wrong.
    pub message: String,
    /// What would be right.
    pub hint: Option<String>,
    /// A key of the map at `way` is the culprit.
    pub culprit: Culprit,
    /// Indices of entries and items from the value up to the root.
    pub way: Vec<usize>,
}

/// What of a value is wrong.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Culprit {
    /// The value itself.
    Value,
    /// It has a key that is not known.
    Key(String),
    /// It lacks a key.
    Missing(&'static str),
}

impl Fault {
    fn new(message: String) -> Self {
        Self { message, hint: None, culprit: Culprit::Value, way: Vec::new() }
    }

    fn below(mut self, index: usize) -> Self {
        self.way.push(index);
        self
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Fault {}

const WHOLE: &str = "a whole number, not negative";

/// What was expected, in the user's words.
fn expected(expected: &dyn de::Expected) -> String {
    let text = expected.to_string();
    match text.as_str() {
        "u8" | "u16" | "u32" | "u64" | "usize" => WHOLE.to_owned(),
        "i8" | "i16" | "i32" | "i64" | "isize" => "a whole number".to_owned(),
        "f32" | "f64" => "a number".to_owned(),
        "a boolean" => "true or false".to_owned(),
        "a sequence" => "a list".to_owned(),
        "a string" => "text".to_owned(),
        "a map" => "a map of names to settings".to_owned(),
        other if other.starts_with("struct ") => "settings, as `key: value`".to_owned(),
        other => other.to_owned(),
    }
}

fn found(unexpected: &de::Unexpected<'_>) -> String {
    match unexpected {
        de::Unexpected::Bool(value) => format!("`{value}`"),
        de::Unexpected::Unsigned(value) => format!("`{value}`"),
        de::Unexpected::Signed(value) => format!("`{value}`"),
        de::Unexpected::Float(value) => format!("`{value}`"),
        de::Unexpected::Str(text) => format!("{text:?}"),
        de::Unexpected::Seq => "a list".to_owned(),
        de::Unexpected::Map => "a map".to_owned(),
        de::Unexpected::Unit | de::Unexpected::Option => "nothing".to_owned(),
        other => other.to_string(),
    }
}

impl de::Error for Fault {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Self::new(message.to_string())
    }

    fn invalid_type(unexpected: de::Unexpected<'_>, wanted: &dyn de::Expected) -> Self {
        let wanted = expected(wanted);
        let mut fault = Self::new(format!("expected {wanted}, found {}", found(&unexpected)));
        if wanted == "true or false"
            && let de::Unexpected::Str(word) = unexpected
        {
            fault.hint = match word.to_lowercase().as_str() {
                "yes" | "on" | "y" => Some("write true".to_owned()),
                "no" | "off" | "n" => Some("write false".to_owned()),
                _ => None,
            };
        }
        fault
    }

    fn invalid_value(unexpected: de::Unexpected<'_>, wanted: &dyn de::Expected) -> Self {
        match (unexpected, expected(wanted).as_str()) {
            (de::Unexpected::Unsigned(number), "a whole number" | WHOLE) => Self::new(format!("{number} is too large")),
            (unexpected, wanted) => Self::new(format!("expected {wanted}, found {}", found(&unexpected))),
        }
    }

    fn unknown_field(field: &str, known: &'static [&'static str]) -> Self {
        let mut fault = Self::new(format!("unknown key `{field}`"));
        fault.hint = suggest(field, known.iter().copied());
        fault.culprit = Culprit::Key(field.to_owned());
        fault
    }

    fn unknown_variant(word: &str, known: &'static [&'static str]) -> Self {
        let mut fault = Self::new(format!("`{word}` is not known here"));
        fault.hint = suggest(word, known.iter().copied());
        fault
    }

    fn missing_field(field: &'static str) -> Self {
        let mut fault = Self::new(format!("`{field}` is missing"));
        fault.culprit = Culprit::Missing(field);
        fault
    }
}

impl Tree {
    fn unexpected(&self) -> de::Unexpected<'_> {
        match &self.value {
            Value::Null => de::Unexpected::Unit,
            Value::Bool(value) => de::Unexpected::Bool(*value),
            Value::Whole(_, written) | Value::Number(_, written) => de::Unexpected::Str(written),
            Value::Text(text) => de::Unexpected::Str(text),
            Value::List(_) => de::Unexpected::Seq,
            Value::Map(_) => de::Unexpected::Map,
        }
    }
}

impl<'de> Deserializer<'de> for &'de Tree {
    type Error = Fault;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        match &self.value {
            Value::Null => visitor.visit_unit(),
            Value::Bool(value) => visitor.visit_bool(*value),
            Value::Whole(value, _) => match (u64::try_from(*value), i64::try_from(*value)) {
                (Ok(value), _) => visitor.visit_u64(value),
                (Err(_), Ok(value)) => visitor.visit_i64(value),
                (Err(_), Err(_)) => Err(de::Error::invalid_value(self.unexpected(), &visitor)),
            },
            Value::Number(value, _) => visitor.visit_f64(*value),
            Value::Text(text) => visitor.visit_borrowed_str(text),
            Value::List(items) => visitor.visit_seq(Items { items: items.iter().enumerate() }),
            Value::Map(entries) => visitor.visit_map(Entries { entries: entries.iter().enumerate(), now: None }),
        }
    }

    /// A number or a boolean is text where text is wanted, as it was written.
    fn deserialize_str<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        match &self.value {
            Value::Text(text) => visitor.visit_borrowed_str(text),
            Value::Whole(_, written) | Value::Number(_, written) => visitor.visit_borrowed_str(written),
            Value::Bool(value) => visitor.visit_str(if *value { "true" } else { "false" }),
            Value::Null | Value::List(_) | Value::Map(_) => Err(de::Error::invalid_type(self.unexpected(), &visitor)),
        }
    }

    fn deserialize_string<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        self.deserialize_str(visitor)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        visitor.visit_some(self)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, _: &'static str, visitor: V) -> Result<V::Value, Fault> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        words: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Fault> {
        match &self.value {
            Value::Text(word) => visitor.visit_enum(word.as_str().into_deserializer()),
            _ => Err(Fault::new(format!("expected one of {}, found {}", words.join(", "), found(&self.unexpected())))),
        }
    }

    /// A list is no settings, though serde would take its items for fields.
    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Fault> {
        match &self.value {
            Value::List(_) => Err(de::Error::invalid_type(self.unexpected(), &visitor)),
            _ => self.deserialize_any(visitor),
        }
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char bytes byte_buf unit unit_struct seq tuple
        tuple_struct map identifier ignored_any
    }
}

struct Items<'de> {
    items: std::iter::Enumerate<std::slice::Iter<'de, Tree>>,
}

impl<'de> de::SeqAccess<'de> for Items<'de> {
    type Error = Fault;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, Fault> {
        let Some((index, item)) = self.items.next() else { return Ok(None) };
        seed.deserialize(item).map(Some).map_err(|fault| fault.below(index))
    }

    fn size_hint(&self) -> Option<usize> {
        Some(self.items.len())
    }
}

struct Entries<'de> {
    entries: std::iter::Enumerate<std::slice::Iter<'de, Entry>>,
    now: Option<(usize, &'de Entry)>,
}

impl<'de> de::MapAccess<'de> for Entries<'de> {
    type Error = Fault;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, Fault> {
        self.now = self.entries.next();
        let Some((_, entry)) = self.now else { return Ok(None) };
        // An unknown key is found again by its name, so the place needs no note here.
        seed.deserialize(de::value::BorrowedStrDeserializer::new(&entry.key)).map(Some)
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, Fault> {
        let Some((index, entry)) = self.now else { return Err(Fault::new("a value without a key".to_owned())) };
        if matches!(entry.tree.value, Value::Null) {
            let mut fault = Fault::new(format!("`{}` has no value", entry.key));
            fault.hint = Some("give it one, or leave the key out to get the default".to_owned());
            return Err(fault.below(index));
        }
        seed.deserialize(&entry.tree).map_err(|fault| fault.below(index))
    }
}
