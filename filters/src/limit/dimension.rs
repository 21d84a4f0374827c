//! What can be limited, and how a limit is written in the configuration.

use std::borrow::Cow;
use std::fmt;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, de};

/// Unit that a dimension counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Unit {
    /// Calls.
    Requests,
    /// Input and output tokens together.
    Tokens,
}

/// Over what time a dimension counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Window {
    /// A rolling window of that many seconds: never more than the limit in any trailing window.
    Rolling(u32),
    /// A calendar day.
    Day,
    /// A calendar month.
    Month,
    /// No window: calls that are live at the same time.
    Live,
}

macro_rules! dimensions {
    ($($variant:ident $field:ident $unit:ident $window:expr;)*) => {
        /// What a limit counts.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Dimension { $(#[doc = concat!("`", stringify!($field), "`")] $variant,)* }

        impl Dimension {
            /// Every dimension, in the order in which headers and `/v1/quota` list them.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// Its name in configuration, headers, metrics and `/v1/quota`.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => stringify!($field),)* }
            }

            /// What it counts.
            pub const fn unit(self) -> Unit {
                match self { $(Self::$variant => Unit::$unit,)* }
            }

            /// Over what time.
            pub const fn window(self) -> Window {
                match self { $(Self::$variant => $window,)* }
            }
        }

        /// The limits of one scope, as written under `tiers.*`, `keys[].limits`, `limits.*` and `routes[].limits`.
        #[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize, JsonSchema)]
        #[serde(deny_unknown_fields, default)]
        pub struct Limits {
            $(
                #[doc = concat!("Limit of `", stringify!($field), "`.")]
                pub $field: Option<Limit>,
            )*
        }

        impl Limits {
            /// The limits that are set, in the order of [`Dimension::ALL`].
            pub fn rows(&self) -> impl Iterator<Item = (Dimension, Limit)> + '_ {
                [$((Dimension::$variant, self.$field),)*].into_iter().filter_map(|(d, l)| Some((d, l?)))
            }

            /// These limits with the rows of `over` put in their place.
            #[must_use]
            pub fn overridden(&self, over: &Self) -> Self {
                Self { $($field: over.$field.or(self.$field),)* }
            }
        }
    };
}

dimensions! {
    RequestsPerSecond requests_per_second Requests Window::Rolling(1);
    RequestsPerMinute requests_per_minute Requests Window::Rolling(60);
    RequestsPerHour requests_per_hour Requests Window::Rolling(3600);
    RequestsPerDay requests_per_day Requests Window::Day;
    TokensPerMinute tokens_per_minute Tokens Window::Rolling(60);
    TokensPerHour tokens_per_hour Tokens Window::Rolling(3600);
    TokensPerDay tokens_per_day Tokens Window::Day;
    TokensPerMonth tokens_per_month Tokens Window::Month;
    Concurrency concurrency Requests Window::Live;
}

/// One limit: a number, or `{ limit: 100, shadow: true }` to count and report without ever refusing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limit {
    /// The most that is admitted.
    pub limit: u64,
    /// Counted and reported, never refused.
    pub shadow: bool,
}

impl<'de> Deserialize<'de> for Limit {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl<'de> de::Visitor<'de> for Visitor {
            type Value = Limit;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a whole number, or { limit: NUMBER, shadow: true }")
            }

            fn visit_u64<E: de::Error>(self, limit: u64) -> Result<Limit, E> {
                Ok(Limit { limit, shadow: false })
            }

            fn visit_i64<E: de::Error>(self, limit: i64) -> Result<Limit, E> {
                u64::try_from(limit)
                    .map(|limit| Limit { limit, shadow: false })
                    .map_err(|_| E::custom("a limit is never negative"))
            }

            fn visit_map<A: de::MapAccess<'de>>(self, map: A) -> Result<Limit, A::Error> {
                #[derive(Deserialize)]
                #[serde(deny_unknown_fields)]
                struct Full {
                    limit: u64,
                    #[serde(default)]
                    shadow: bool,
                }
                let full = Full::deserialize(de::value::MapAccessDeserializer::new(map))?;
                Ok(Limit { limit: full.limit, shadow: full.shadow })
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

impl JsonSchema for Limit {
    fn schema_name() -> Cow<'static, str> {
        "Limit".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "description": "A limit: a whole number, or {limit, shadow: true} to count without refusing",
            "anyOf": [
                { "type": "integer", "minimum": 0 },
                {
                    "type": "object",
                    "properties": { "limit": { "type": "integer", "minimum": 0 }, "shadow": { "type": "boolean" } },
                    "required": ["limit"], "additionalProperties": false
                }
            ]
        })
    }
}
