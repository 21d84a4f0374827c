//! `routes:` — which request goes where, through which filters.

use std::collections::BTreeMap;
use std::fmt;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::Deserialize;
use serde::de::{self, Deserializer};
use tollgate_filters::auth::AuthConfig;
use tollgate_filters::config::{Period, Size};
use tollgate_filters::cors::Cors;
use tollgate_filters::dialect::Dialect;
use tollgate_filters::guard::GuardConfig;
use tollgate_filters::limit::dimension::Limits;
use tollgate_filters::limit::filter::LimitConfig;

use super::store::WhenDown;
use super::words::{Allowed, Many, Toggle};

/// Which requests go where. Just one of `call` and `pass`.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Route {
    /// Its name in logs, metrics and keys.
    pub name: String,
    /// Which requests it takes; all conditions must hold.
    #[serde(rename = "match")]
    pub matching: Match,
    /// A metered API call: the body is read and inspected, attempts may be repeated.
    #[serde(default)]
    pub call: Option<Call>,
    /// Everything else: streamed both ways as it is.
    #[serde(default)]
    pub pass: Option<Pass>,
    /// What requests go through.
    #[serde(default)]
    pub filters: Filters,
    /// Limits of all calls of this route together.
    #[serde(default)]
    pub limits: Limits,
    /// Size of the body. Default: of a call route `server.limits.body_bytes`; a pass route has no limit.
    #[serde(default)]
    pub body_bytes: Option<Size>,
    /// Dialect of our own answers and errors. Default: `dify` if the upstream speaks it, `anthropic` for /v1/messages, else `openai`.
    #[serde(default)]
    pub dialect: Option<Dialect>,
    /// What happens to calls of this route while Redis is away. Default: as the tier or `store.redis.when_down`.
    #[serde(default)]
    pub when_down: Option<WhenDown>,
    /// What happens upstream when the client leaves a call. Default `cancel`.
    #[serde(default)]
    pub on_abort: OnAbort,
    /// What happens to an event of a stream that is no JSON, while the stream goes on. Default `skip`.
    #[serde(default)]
    pub on_malformed: OnMalformed,
}

/// Which requests a route takes. All conditions must hold; a list holds if one of its members does.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Match {
    /// Whole paths; a segment `*` stands for any one segment. Not together with `prefix`.
    pub path: Many,
    /// Beginnings of paths, whole segments. Not together with `path`.
    pub prefix: Many,
    /// Methods. Default: all.
    pub method: Many,
    /// Host names without port; `*.example.org` takes every name below. Default: all.
    pub host: Many,
    /// Headers and their values.
    pub header: BTreeMap<String, String>,
    /// Query parameters and their values.
    pub query: BTreeMap<String, String>,
}

/// Where the calls of a route go. Just one of `models` and `upstream`.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Call {
    /// `"*"` or a list: the body's `model` is looked up among these.
    #[serde(default)]
    pub models: Option<Allowed>,
    /// Name of an upstream that gets the call as it is.
    #[serde(default)]
    pub upstream: Option<String>,
}

/// Where the requests of a pass route go.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Pass {
    /// Name of an upstream.
    pub upstream: String,
    /// Websocket upgrades are let through. Default false.
    #[serde(default)]
    pub websocket: bool,
    /// The node sees the client's Host instead of its own. Default false.
    #[serde(default)]
    pub preserve_host: bool,
}

/// What happens upstream when the client leaves a call.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum OnAbort {
    /// The attempt is given up at once, and what was produced is charged.
    #[default]
    Cancel,
    /// The answer is read on to its end, at most so long, and charged as its upstream says.
    Drain(Period),
}

/// What happens to an event of a stream that is no JSON.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum OnMalformed {
    /// It is left out.
    #[default]
    Skip,
    /// The stream ends there with an error event, or goes on elsewhere if the model says `resume`.
    End,
}

/// How long an answer is read on where nothing else is said.
const DRAIN: Period = Period::secs(30);

impl<'de> Deserialize<'de> for OnAbort {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl<'de> de::Visitor<'de> for Visitor {
            type Value = OnAbort;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("cancel, drain or { drain: 30s }")
            }

            fn visit_str<E: de::Error>(self, word: &str) -> Result<OnAbort, E> {
                match word {
                    "cancel" => Ok(OnAbort::Cancel),
                    "drain" => Ok(OnAbort::Drain(DRAIN)),
                    other => Err(E::unknown_variant(other, &["cancel", "drain"])),
                }
            }

            fn visit_map<A: de::MapAccess<'de>>(self, map: A) -> Result<OnAbort, A::Error> {
                #[derive(Deserialize)]
                #[serde(deny_unknown_fields)]
                struct Settings {
                    drain: Period,
                }
                let settings = Settings::deserialize(de::value::MapAccessDeserializer::new(map))?;
                Ok(OnAbort::Drain(settings.drain))
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

impl JsonSchema for OnAbort {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "OnAbort".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let period = generator.subschema_for::<Period>();
        json_schema!({
            "description": "What happens upstream when the client leaves a call",
            "anyOf": [
                { "enum": ["cancel", "drain"] },
                {
                    "type": "object", "required": ["drain"], "additionalProperties": false,
                    "properties": { "drain": period }
                }
            ]
        })
    }
}

/// What the requests of a route go through: settings, or `off`.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Filters {
    /// Only callers with a key. Default on.
    pub auth: Toggle<AuthConfig>,
    /// What a body may ask for. Default on.
    pub guard: Toggle<GuardConfig>,
    /// Limits of key, route, model and all. Default on.
    pub limit: Toggle<LimitConfig>,
    /// Answers kept for the same question. Default off.
    pub cache: Toggle<CacheFilter>,
    /// Cross-origin requests of browsers. Default off.
    pub cors: Toggle<Cors>,
}

impl Default for Filters {
    fn default() -> Self {
        Self {
            auth: Toggle::default(),
            guard: Toggle::default(),
            limit: Toggle::default(),
            cache: Toggle::Off,
            cors: Toggle::Off,
        }
    }
}

/// Settings of `cache`.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct CacheFilter {
    /// How long an answer is kept. Default 1h.
    pub ttl: Period,
}

impl Default for CacheFilter {
    fn default() -> Self {
        Self { ttl: Period::secs(3600) }
    }
}
