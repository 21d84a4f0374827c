//! Small words of the document: switches, lists, moments.

use std::borrow::Cow;
use std::fmt;
use std::marker::PhantomData;
use std::path::PathBuf;
use std::str::FromStr;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, de};

/// Settings, or `off` (also written `false`). Absent settings are the defaults.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Toggle<T> {
    /// Turned off.
    Off,
    /// Turned on with these settings.
    On(T),
}

impl<T> Toggle<T> {
    /// The settings, if it is on.
    pub(crate) const fn on(&self) -> Option<&T> {
        match self {
            Self::On(settings) => Some(settings),
            Self::Off => None,
        }
    }
}

impl<T: Default> Default for Toggle<T> {
    fn default() -> Self {
        Self::On(T::default())
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Toggle<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> de::Visitor<'de> for Visitor<T> {
            type Value = Toggle<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("settings in { } or off")
            }

            fn visit_str<E: de::Error>(self, word: &str) -> Result<Self::Value, E> {
                if word == "off" { Ok(Toggle::Off) } else { Err(E::invalid_value(de::Unexpected::Str(word), &self)) }
            }

            fn visit_bool<E: de::Error>(self, on: bool) -> Result<Self::Value, E> {
                if on { Err(E::invalid_type(de::Unexpected::Bool(on), &self)) } else { Ok(Toggle::Off) }
            }

            fn visit_map<A: de::MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
                T::deserialize(de::value::MapAccessDeserializer::new(map)).map(Toggle::On)
            }
        }
        deserializer.deserialize_any(Visitor(PhantomData))
    }
}

impl<T: JsonSchema> JsonSchema for Toggle<T> {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        format!("Toggle_{}", T::schema_name()).into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let settings = generator.subschema_for::<T>();
        json_schema!({ "anyOf": [settings, { "enum": ["off", false] }] })
    }
}

/// One word or a list of words.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Many(pub Vec<String>);

impl std::ops::Deref for Many {
    type Target = [String];

    fn deref(&self) -> &[String] {
        &self.0
    }
}

struct ManyVisitor;
impl<'de> de::Visitor<'de> for ManyVisitor {
    type Value = Many;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a text or a list of texts")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Many, E> {
        Ok(Many(vec![text.to_owned()]))
    }

    fn visit_seq<A: de::SeqAccess<'de>>(self, list: A) -> Result<Many, A::Error> {
        Deserialize::deserialize(de::value::SeqAccessDeserializer::new(list)).map(Many)
    }
}

impl<'de> Deserialize<'de> for Many {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ManyVisitor)
    }
}

impl JsonSchema for Many {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "Many".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "anyOf": [{ "type": "string" }, { "type": "array", "items": { "type": "string" }, "minItems": 1 }] })
    }
}

/// All names (`"*"`), or just these.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) enum Allowed {
    /// All of them.
    #[default]
    Any,
    /// Only these.
    These(Vec<String>),
}

impl Allowed {
    /// Whether `name` is among them.
    pub(crate) fn allows(&self, name: &str) -> bool {
        match self {
            Self::Any => true,
            Self::These(names) => names.iter().any(|one| one == name),
        }
    }
}

impl<'de> Deserialize<'de> for Allowed {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let Many(names) = deserializer.deserialize_any(ManyVisitor)?;
        Ok(if names.iter().any(|name| name == "*") { Self::Any } else { Self::These(names) })
    }
}

impl JsonSchema for Allowed {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "Allowed".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        Many::json_schema(generator)
    }
}

/// Worker threads of the process.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Threads {
    /// One per CPU.
    #[default]
    Auto,
    /// So many.
    Count(usize),
}

impl<'de> Deserialize<'de> for Threads {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = Threads;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("auto or a number of threads")
            }

            fn visit_str<E: de::Error>(self, word: &str) -> Result<Threads, E> {
                if word == "auto" { Ok(Threads::Auto) } else { Err(E::invalid_value(de::Unexpected::Str(word), &self)) }
            }

            fn visit_u64<E: de::Error>(self, number: u64) -> Result<Threads, E> {
                match usize::try_from(number) {
                    Ok(count @ 1..=1024) => Ok(Threads::Count(count)),
                    _ => Err(E::custom(format!("{number} threads; the number is from 1 to 1024"))),
                }
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

impl JsonSchema for Threads {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "Threads".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "anyOf": [{ "const": "auto" }, { "type": "integer", "minimum": 1, "maximum": 1024 }] })
    }
}

/// Where the access log goes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) enum AccessLog {
    /// Standard output.
    #[default]
    Stdout,
    /// Nowhere.
    Off,
    /// A file, appended to.
    File(PathBuf),
}

impl<'de> Deserialize<'de> for AccessLog {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = AccessLog;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("stdout, off or the path of a file")
            }

            fn visit_str<E: de::Error>(self, word: &str) -> Result<AccessLog, E> {
                match word {
                    "stdout" => Ok(AccessLog::Stdout),
                    "off" => Ok(AccessLog::Off),
                    "" => Err(E::invalid_value(de::Unexpected::Str(word), &self)),
                    path => Ok(AccessLog::File(PathBuf::from(path))),
                }
            }

            fn visit_bool<E: de::Error>(self, on: bool) -> Result<AccessLog, E> {
                if on { Err(E::invalid_type(de::Unexpected::Bool(on), &self)) } else { Ok(AccessLog::Off) }
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

impl JsonSchema for AccessLog {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "AccessLog".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "anyOf": [{ "type": "string", "minLength": 1 }, { "const": false }] })
    }
}

macro_rules! parsed {
    ($name:ident, $expecting:literal, $schema:tt) => {
        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                struct Visitor;
                impl de::Visitor<'_> for Visitor {
                    type Value = $name;
                    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                        f.write_str($expecting)
                    }
                    fn visit_str<E: de::Error>(self, text: &str) -> Result<$name, E> {
                        text.parse().map_err(E::custom)
                    }
                }
                deserializer.deserialize_str(Visitor)
            }
        }

        impl JsonSchema for $name {
            fn schema_name() -> std::borrow::Cow<'static, str> {
                stringify!($name).into()
            }
            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                json_schema!($schema)
            }
        }
    };
}

pub(super) use parsed;

/// A moment: RFC 3339 text, or a date (its midnight in UTC).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Timestamp(pub time::OffsetDateTime);

impl FromStr for Timestamp {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        use time::format_description::well_known::Rfc3339;
        let whole = if text.len() == 10 { Cow::from(format!("{text}T00:00:00Z")) } else { Cow::from(text) };
        time::OffsetDateTime::parse(&whole, &Rfc3339)
            .map(Self)
            .map_err(|_| format!("{text:?} is not a moment; write it like 2027-01-01T00:00:00Z"))
    }
}

parsed!(Timestamp, "a moment, like 2027-01-01T00:00:00Z", {
    "type": "string", "description": "A moment, like 2027-01-01T00:00:00Z, or a date"
});

/// Distance from UTC in seconds; written `+08:00`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct UtcOffset(pub i32);

impl FromStr for UtcOffset {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("{text:?} is not a distance from UTC; write it like +08:00 or -05:30");
        let (sign, rest) = match text.split_at_checked(1) {
            Some(("+", rest)) => (1, rest),
            Some(("-", rest)) => (-1, rest),
            _ => return Err(bad()),
        };
        let (hours, minutes) = rest.split_once(':').ok_or_else(bad)?;
        let part = |text: &str, most: i32| {
            let sane = text.len() == 2 && text.bytes().all(|b| b.is_ascii_digit());
            text.parse::<i32>().ok().filter(|number| sane && *number <= most).ok_or_else(bad)
        };
        Ok(Self(sign * (part(hours, 14)? * 3600 + part(minutes, 59)? * 60)))
    }
}

parsed!(UtcOffset, "a distance from UTC, like +08:00", {
    "type": "string", "pattern": "^[+-][0-9]{2}:[0-9]{2}$", "description": "Distance from UTC, like +08:00"
});

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_and_distances_from_utc_are_read_strictly() {
        assert_eq!("2027-01-01".parse::<Timestamp>(), "2027-01-01T00:00:00Z".parse());
        assert!("tomorrow".parse::<Timestamp>().is_err());
        assert_eq!("+08:00".parse(), Ok(UtcOffset(28_800)));
        assert_eq!("-05:30".parse(), Ok(UtcOffset(-19_800)));
        for bad in ["08:00", "+8:00", "+08", "+15:00", "+08:60", "+0a:00", ""] {
            assert!(bad.parse::<UtcOffset>().is_err(), "{bad}");
        }
    }
}
