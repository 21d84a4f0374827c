//! `alerts:` — what is told to whom when it happens.

use std::fmt;

use http::Uri;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, de};
use tollgate_filters::config::{Period, SecretSource};

/// An event and who is told of it.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Alert {
    /// The event: `node_down`, `{ upstream_limited_for: 5m }` or `{ budget_spent: 0.9 }`.
    pub when: When,
    /// Where a POST goes, http or https.
    pub webhook: String,
    /// Signs the body: `x-tollgate-signature: sha256=` and the HMAC-SHA256 in hex.
    pub secret: SecretSource,
}

impl Alert {
    /// The webhook, if it is an address that can be posted to.
    pub(crate) fn address(&self) -> Option<Uri> {
        let uri: Uri = self.webhook.parse().ok()?;
        let scheme = matches!(uri.scheme_str(), Some("http" | "https"));
        let host = uri.host().is_some_and(|host| !host.is_empty());
        let bare = uri.authority().is_some_and(|authority| !authority.as_str().contains('@'));
        (scheme && host && bare).then_some(uri)
    }
}

/// What is told.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum When {
    /// An upstream has had nothing but rate limits for so long.
    UpstreamLimitedFor(Period),
    /// A node was taken out.
    NodeDown,
    /// A key has used this share of its tokens of a day or a month.
    BudgetSpent(f64),
}

const NAMES: &[&str] = &["upstream_limited_for", "node_down", "budget_spent"];

impl<'de> Deserialize<'de> for When {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl<'de> de::Visitor<'de> for Visitor {
            type Value = When;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an event: node_down, { upstream_limited_for: 5m } or { budget_spent: 0.9 }")
            }

            fn visit_str<E: de::Error>(self, name: &str) -> Result<When, E> {
                match name {
                    "node_down" => Ok(When::NodeDown),
                    "upstream_limited_for" => Err(E::custom("it needs a time, like { upstream_limited_for: 5m }")),
                    "budget_spent" => Err(E::custom("it needs a share, like { budget_spent: 0.9 }")),
                    other => Err(E::unknown_variant(other, NAMES)),
                }
            }

            fn visit_map<A: de::MapAccess<'de>>(self, mut map: A) -> Result<When, A::Error> {
                let Some(name) = map.next_key::<String>()? else {
                    return Err(de::Error::custom(
                        "an event needs one of: upstream_limited_for, node_down, budget_spent",
                    ));
                };
                let when = match name.as_str() {
                    "upstream_limited_for" => When::UpstreamLimitedFor(map.next_value()?),
                    "budget_spent" => When::BudgetSpent(map.next_value()?),
                    "node_down" => return Err(de::Error::custom("node_down stands alone, as `when: node_down`")),
                    other => return Err(de::Error::unknown_field(other, NAMES)),
                };
                if map.next_key::<String>()?.is_some() {
                    return Err(de::Error::custom("an alert has just one event; write a further alert"));
                }
                Ok(when)
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

impl JsonSchema for When {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "When".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let period = generator.subschema_for::<Period>();
        json_schema!({
            "description": "An event",
            "anyOf": [
                { "const": "node_down", "description": "A node was taken out" },
                {
                    "type": "object", "required": ["upstream_limited_for"], "additionalProperties": false,
                    "description": "An upstream has had nothing but rate limits for so long",
                    "properties": { "upstream_limited_for": period }
                },
                {
                    "type": "object", "required": ["budget_spent"], "additionalProperties": false,
                    "description": "A key has used this share of its tokens of a day or a month",
                    "properties": { "budget_spent": { "type": "number", "exclusiveMinimum": 0, "maximum": 1 } }
                }
            ]
        })
    }
}
