//! `tiers:`, `keys:` and `limits:` — who may call, and how much.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, de};
use tollgate_filters::config::SecretSource;
use tollgate_filters::limit::Zone;
use tollgate_filters::limit::dimension::Limits;

use super::problem::closest;
use super::store::WhenDown;
use super::words::{Allowed, Timestamp, UtcOffset};

/// A set of limits that keys refer to by name.
#[derive(Debug, Clone, Default)]
pub(crate) struct Tier {
    /// The rows.
    pub limits: Limits,
    /// What happens to calls of this tier while Redis is away. Default: as `store.redis.when_down`.
    pub when_down: Option<WhenDown>,
}

/// One key of a caller.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Key {
    /// Name of the key in logs, metrics and quotas; never secret.
    pub id: String,
    /// The key itself. Either this or `sha256`.
    #[serde(default)]
    pub key: Option<SecretSource>,
    /// SHA-256 of the whole key, 64 hex digits. Either this or `key`.
    #[serde(default)]
    pub sha256: Option<String>,
    /// Name of a tier. Absent: only `limits` below hold.
    #[serde(default)]
    pub tier: Option<String>,
    /// Models the key may ask for. Default: all.
    #[serde(default)]
    pub models: Allowed,
    /// Routes the key may use. Default: all.
    #[serde(default)]
    pub routes: Allowed,
    /// When the key stops working, RFC 3339. Default: never.
    #[serde(default)]
    pub expires: Option<Timestamp>,
    /// Limits that take the place of the tier's rows.
    #[serde(default)]
    pub limits: Limits,
    /// Where this key's days and months begin: a zone of the tz database, like `Europe/Berlin`. Default: UTC.
    #[serde(default)]
    pub zone: Option<String>,
    /// The same as a distance from UTC that never changes, like `+08:00`.
    #[serde(default)]
    pub utc_offset: Option<UtcOffset>,
}

impl Key {
    /// Where its days begin, as far as that is known.
    pub(crate) fn zone(&self) -> Option<Zone> {
        match (&self.zone, self.utc_offset) {
            (Some(name), _) => Zone::named(name),
            (None, offset) => Some(offset.map_or(Zone::UTC, |offset| Zone::Fixed(offset.0))),
        }
    }
}

/// Which zone may have been meant; `Berlin` is `Europe/Berlin`.
pub(crate) fn zone_hint(name: &str) -> String {
    let names = Zone::names();
    let place =
        names.iter().find(|known| known.rsplit('/').next().is_some_and(|place| place.eq_ignore_ascii_case(name)));
    match place.map(String::as_str).or_else(|| closest(name, names.iter().map(String::as_str))) {
        Some(close) => format!("did you mean `{close}`?"),
        None => "names are those of the tz database, like `Europe/Berlin`".to_owned(),
    }
}

/// Limits above the key.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct ScopeLimits {
    /// All calls together.
    pub global: Limits,
}

impl<'de> Deserialize<'de> for Tier {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl<'de> de::Visitor<'de> for Visitor {
            type Value = Tier;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("limits, like { requests_per_minute: 60 }")
            }

            fn visit_map<A: de::MapAccess<'de>>(self, map: A) -> Result<Tier, A::Error> {
                let mut when_down = None;
                let rows = Rows { map, when_down: &mut when_down };
                let limits = Limits::deserialize(de::value::MapAccessDeserializer::new(rows))?;
                Ok(Tier { limits, when_down })
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

/// The entries of a tier without `when_down`, which is taken out on the way.
struct Rows<'a, A> {
    map: A,
    when_down: &'a mut Option<WhenDown>,
}

impl<'de, A: de::MapAccess<'de>> de::MapAccess<'de> for Rows<'_, A> {
    type Error = A::Error;

    fn next_key_seed<K: de::DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, A::Error> {
        // The seed decides what a key is and cannot be used twice, so the key is read as text first.
        while let Some(name) = self.map.next_key::<String>()? {
            if name == "when_down" {
                *self.when_down = Some(self.map.next_value()?);
            } else {
                return seed.deserialize(de::value::StringDeserializer::new(name)).map(Some);
            }
        }
        Ok(None)
    }

    fn next_value_seed<V: de::DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, A::Error> {
        self.map.next_value_seed(seed)
    }
}

impl JsonSchema for Tier {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Tier".into()
    }

    fn json_schema(generator: &mut schemars::SchemaGenerator) -> schemars::Schema {
        let mut schema = Limits::json_schema(generator);
        let when_down = generator.subschema_for::<Option<WhenDown>>();
        schema.insert("description".into(), "A set of limits that keys refer to by name".into());
        if let Some(properties) = schema.get_mut("properties").and_then(|p| p.as_object_mut()) {
            properties.insert("when_down".into(), when_down.into());
        }
        schema
    }
}
