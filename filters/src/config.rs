//! The words of the configuration that every section shares: secrets, periods, sizes, and the error that names a place.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, de};

/// A resolved secret. It cannot be printed: `Debug` and `Display` show `***`, and it is not `Serialize`.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Secret(String);

impl Secret {
    /// Takes ownership of the secret text.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The secret itself, for the one place that has to send or hash it.
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// Whether nothing is left of it; an empty secret is a configuration error everywhere.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

impl fmt::Display for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// Where a secret comes from, as written in the configuration: `{env: NAME}`, `{file: PATH}`, `{credential: NAME}` or plain text.
#[derive(Clone, PartialEq, Eq)]
pub enum SecretSource {
    /// The value of an environment variable.
    Env(String),
    /// The content of a file, without its last line break.
    File(String),
    /// A systemd credential: a file of that name below `$CREDENTIALS_DIRECTORY`.
    Credential(String),
    /// The secret itself, written into the configuration. `tollgate check` warns of it.
    Plain(Secret),
}

impl fmt::Debug for SecretSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Env(name) => write!(f, "{{env: {name}}}"),
            Self::File(path) => write!(f, "{{file: {path}}}"),
            Self::Credential(name) => write!(f, "{{credential: {name}}}"),
            Self::Plain(secret) => write!(f, "{secret:?}"),
        }
    }
}

/// The outside world as far as reading a configuration needs it; tests bring their own.
pub trait World {
    /// An environment variable.
    fn env(&self, name: &str) -> Option<String>;
    /// The content of a file as text.
    ///
    /// # Errors
    /// What the file system says, or that the content is not UTF-8.
    fn read(&self, path: &str) -> std::io::Result<String>;
}

/// The process's own environment and file system.
#[derive(Debug, Clone, Copy, Default)]
pub struct Process;

impl World for Process {
    fn env(&self, name: &str) -> Option<String> {
        std::env::var(name).ok()
    }

    fn read(&self, path: &str) -> std::io::Result<String> {
        std::fs::read_to_string(path)
    }
}

impl SecretSource {
    /// Reads the secret from where it lies.
    ///
    /// # Errors
    /// Says which source is missing, unreadable or empty; never the content.
    pub fn resolve(&self, world: &dyn World) -> Result<Secret, String> {
        let text = match self {
            Self::Env(name) => world.env(name).ok_or_else(|| format!("environment variable {name} is not set"))?,
            Self::File(path) => read_secret(world, path)?,
            Self::Credential(name) => {
                let dir = world
                    .env("CREDENTIALS_DIRECTORY")
                    .ok_or_else(|| format!("credential {name}: CREDENTIALS_DIRECTORY is not set (systemd sets it)"))?;
                read_secret(world, &format!("{dir}/{name}"))?
            }
            Self::Plain(secret) => secret.expose().to_owned(),
        };
        if text.is_empty() { Err(format!("the secret {self:?} is empty")) } else { Ok(Secret::new(text)) }
    }
}

fn read_secret(world: &dyn World, path: &str) -> Result<String, String> {
    let text = world.read(path).map_err(|e| format!("cannot read {path}: {e}"))?;
    Ok(text.trim_end_matches(['\n', '\r']).to_owned())
}

impl<'de> Deserialize<'de> for SecretSource {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl<'de> de::Visitor<'de> for Visitor {
            type Value = SecretSource;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a secret: {env: NAME}, {file: PATH}, {credential: NAME} or plain text")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<SecretSource, E> {
                Ok(SecretSource::Plain(Secret::new(text)))
            }

            fn visit_map<A: de::MapAccess<'de>>(self, mut map: A) -> Result<SecretSource, A::Error> {
                let Some((kind, value)) = map.next_entry::<String, String>()? else {
                    return Err(de::Error::custom("a secret needs one of: env, file, credential"));
                };
                let source = match kind.as_str() {
                    "env" => SecretSource::Env(value),
                    "file" => SecretSource::File(value),
                    "credential" => SecretSource::Credential(value),
                    other => return Err(de::Error::unknown_field(other, &["env", "file", "credential"])),
                };
                if map.next_key::<String>()?.is_some() {
                    return Err(de::Error::custom("a secret has just one of: env, file, credential"));
                }
                Ok(source)
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

impl JsonSchema for SecretSource {
    fn schema_name() -> Cow<'static, str> {
        "Secret".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        let one = |name: &str, text: &str| {
            json_schema!({
                "type": "object", "properties": { (name): { "type": "string", "description": text } },
                "required": [name], "additionalProperties": false
            })
        };
        json_schema!({
            "description": "A secret: {env: NAME}, {file: PATH}, {credential: NAME}, or plain text (warned of)",
            "anyOf": [
                one("env", "name of an environment variable"),
                one("file", "path of a file"),
                one("credential", "name of a systemd credential"),
                { "type": "string" }
            ]
        })
    }
}

/// A span of time as users write it: `5ms`, `10s`, `20m`, `1h`, `2d`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Period(pub Duration);

impl Period {
    /// A period of whole seconds.
    pub const fn secs(n: u64) -> Self {
        Self(Duration::from_secs(n))
    }

    /// A period of whole milliseconds.
    pub const fn millis(n: u64) -> Self {
        Self(Duration::from_millis(n))
    }
}

impl FromStr for Period {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad =
            || format!("{text:?} is not a period; write a whole number and a unit, like 500ms, 10s, 5m, 1h or 2d");
        let digits = text.find(|c: char| !c.is_ascii_digit()).ok_or_else(bad)?;
        let (number, unit) = text.split_at(digits);
        let number: u64 = number.parse().map_err(|_| bad())?;
        let millis = match unit {
            "ms" => 1,
            "s" => 1_000,
            "m" => 60_000,
            "h" => 3_600_000,
            "d" => 86_400_000,
            _ => return Err(bad()),
        };
        number.checked_mul(millis).map(Self::millis).ok_or_else(bad)
    }
}

impl fmt::Display for Period {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = self.0.as_millis();
        for (size, unit) in [(86_400_000, "d"), (3_600_000, "h"), (60_000, "m"), (1_000, "s")] {
            if ms >= size && ms.is_multiple_of(size) {
                return write!(f, "{}{unit}", ms / size);
            }
        }
        write!(f, "{ms}ms")
    }
}

/// A number of bytes as users write it: `64KiB`, `32MiB`, `1GiB`, or a plain number of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Size(pub u64);

impl Size {
    /// The size in bytes, for buffers.
    pub fn bytes(self) -> usize {
        usize::try_from(self.0).unwrap_or(usize::MAX)
    }
}

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad =
            || format!("{text:?} is not a size; write a whole number and a unit, like 512B, 64KiB, 32MiB or 1GiB");
        let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let (number, unit) = text.split_at(digits);
        let number: u64 = number.parse().map_err(|_| bad())?;
        let factor: u64 = match unit.trim_start() {
            "" | "B" => 1,
            "KiB" => 1 << 10,
            "MiB" => 1 << 20,
            "GiB" => 1 << 30,
            "kB" | "KB" => 1_000,
            "MB" => 1_000_000,
            "GB" => 1_000_000_000,
            _ => return Err(bad()),
        };
        number.checked_mul(factor).map(Self).ok_or_else(bad)
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (size, unit) in [(1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")] {
            if self.0 >= size && self.0.is_multiple_of(size) {
                return write!(f, "{}{unit}", self.0 / size);
            }
        }
        write!(f, "{}B", self.0)
    }
}

macro_rules! text_word {
    ($name:ident, $schema:literal, $pattern:literal, $example:literal) => {
        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                struct Visitor;
                impl de::Visitor<'_> for Visitor {
                    type Value = $name;
                    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                        f.write_str($example)
                    }
                    fn visit_str<E: de::Error>(self, text: &str) -> Result<$name, E> {
                        text.parse().map_err(E::custom)
                    }
                    fn visit_u64<E: de::Error>(self, number: u64) -> Result<$name, E> {
                        number.to_string().parse().map_err(E::custom)
                    }
                }
                deserializer.deserialize_any(Visitor)
            }
        }
        impl JsonSchema for $name {
            fn schema_name() -> Cow<'static, str> {
                $schema.into()
            }
            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                json_schema!({ "type": ["string", "integer"], "pattern": $pattern, "description": $example })
            }
        }
        impl serde::Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }
    };
}

text_word!(Period, "Period", "^[0-9]+(ms|s|m|h|d)$", "a period such as 500ms, 10s, 5m, 1h or 2d");
text_word!(Size, "Size", "^[0-9]+ *(B|KiB|MiB|GiB|kB|KB|MB|GB)?$", "a size such as 64KiB, 32MiB or 1GiB");

/// Something wrong with a configuration, found after its text was parsed. The document adds file, line and column.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{path}: {message}")]
pub struct ConfigError {
    /// The place in the document, like `routes[2].pass.upstream` or `tiers.free`.
    pub path: String,
    /// What is wrong, for the user.
    pub message: String,
    /// What would be right, if that can be said.
    pub hint: Option<String>,
}

impl ConfigError {
    /// An error at `path`.
    pub fn new(path: impl Into<String>, message: impl Into<String>) -> Self {
        Self { path: path.into(), message: message.into(), hint: None }
    }

    /// Adds what would be right.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn periods_and_sizes_read_what_they_print() {
        for text in ["5ms", "10s", "20m", "1h", "2d"] {
            assert_eq!(text.parse::<Period>().unwrap().to_string(), text);
        }
        for text in ["512B", "64KiB", "32MiB", "1GiB"] {
            assert_eq!(text.parse::<Size>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn a_period_without_unit_and_a_size_with_a_wrong_one_are_errors() {
        assert!("10".parse::<Period>().is_err());
        assert!("10 minutes".parse::<Period>().is_err());
        assert!("3XB".parse::<Size>().is_err());
        assert!("99999999999999999999d".parse::<Period>().is_err());
    }

    #[test]
    fn a_secret_is_never_printed() {
        let secret = Secret::new("sk-very-secret");
        assert_eq!(format!("{secret} {secret:?} {:?}", SecretSource::Plain(secret.clone())), "*** *** ***");
    }

    struct Fake;
    impl World for Fake {
        fn env(&self, name: &str) -> Option<String> {
            match name {
                "EMPTY" => Some(String::new()),
                "CREDENTIALS_DIRECTORY" => Some("/run/cred".into()),
                _ => None,
            }
        }
        fn read(&self, path: &str) -> std::io::Result<String> {
            if path == "/run/cred/key" { Ok("abc\n".into()) } else { Err(std::io::ErrorKind::NotFound.into()) }
        }
    }

    #[test]
    fn secrets_come_from_files_and_credentials_and_are_never_empty() {
        assert_eq!(SecretSource::Credential("key".into()).resolve(&Fake).unwrap().expose(), "abc");
        assert!(SecretSource::Env("EMPTY".into()).resolve(&Fake).is_err());
        assert!(SecretSource::Env("MISSING".into()).resolve(&Fake).unwrap_err().contains("MISSING"));
        assert!(SecretSource::File("/nowhere".into()).resolve(&Fake).is_err());
    }
}
