//! `models:` — what clients ask for, and where it is served.

use std::fmt;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, de};
use tollgate_filters::config::Period;
use tollgate_filters::limit::dimension::Limits;
use tollgate_filters::retry::Class;

/// A name that clients ask for, and where it is served.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Model {
    /// Where it is served, tried in this order.
    pub targets: Vec<Target>,
    /// How often and how fast a failed call is tried again.
    #[serde(default)]
    pub retry: Retry,
    /// What happens to a stream that broke after its first token. Default `off`.
    #[serde(default)]
    pub resume: Resume,
    /// Which name answers carry in `model`. Default `target`.
    #[serde(default)]
    pub report_model: ReportModel,
    /// Limits of all calls of this model together.
    #[serde(default)]
    pub limits: Limits,
    /// What tokens cost.
    #[serde(default)]
    pub price: Option<Price>,
    /// Further names for the same.
    #[serde(default)]
    pub aliases: Vec<String>,
}

/// An upstream and the model's name there.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Target {
    /// Name of an upstream.
    pub upstream: String,
    /// The model's name there. Default: the name the client asked for, an alias replaced by its model.
    #[serde(default)]
    pub model: Option<String>,
    /// Failures of the targets before it that bring a call here.
    /// Default: connect, timeout, 429, 5xx, first_token, auth.
    #[serde(default = "on")]
    pub on: Vec<Class>,
    /// This target takes longer prompts: it is tried on `context_length` if `on` names that.
    #[serde(default)]
    pub larger_context: bool,
    /// This target can go on with a broken answer (`resume: continue`).
    #[serde(default)]
    pub continues: bool,
}

fn on() -> Vec<Class> {
    Class::DEFAULT.to_vec()
}

/// How often and how fast a failed call is tried again.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Retry {
    /// Attempts of one call over all targets, the first included. Default 3.
    pub attempts: u32,
    /// Wait before a node is asked a second time, doubled for each further repetition. Default 100ms.
    pub backoff: Period,
    /// Waits vary at random. Default true.
    pub jitter: bool,
    /// Extra attempts per upstream as a share of its calls in the last 10 s; 10 in 10 s are always allowed. Default 0.2.
    pub budget: f64,
}

impl Default for Retry {
    fn default() -> Self {
        Self { attempts: 3, backoff: Period::millis(100), jitter: true, budget: 0.2 }
    }
}

/// What happens to a stream that broke after its first token.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Resume {
    /// The client gets an error event.
    #[default]
    Off,
    /// A further node goes on from the text so far.
    Continue,
    /// A further node answers again; what the client has already seen is left out.
    Replay,
}

/// Which name answers carry in `model`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum ReportModel {
    /// The name that the answering target has for it.
    #[default]
    Target,
    /// The name that the client asked for.
    Requested,
}

impl<'de> Deserialize<'de> for Resume {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = Resume;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("off, continue or replay")
            }

            fn visit_str<E: de::Error>(self, name: &str) -> Result<Resume, E> {
                match name {
                    "off" => Ok(Resume::Off),
                    "continue" => Ok(Resume::Continue),
                    "replay" => Ok(Resume::Replay),
                    other => Err(E::unknown_variant(other, &["off", "continue", "replay"])),
                }
            }

            fn visit_bool<E: de::Error>(self, on: bool) -> Result<Resume, E> {
                if on { Err(E::invalid_type(de::Unexpected::Bool(on), &self)) } else { Ok(Resume::Off) }
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

impl JsonSchema for Resume {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Resume".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "description": "What happens to a stream that broke after its first token",
            "enum": ["off", "continue", "replay", false]
        })
    }
}

/// What tokens cost.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Price {
    /// Of input tokens.
    pub input: f64,
    /// Of input tokens found in the upstream's cache. Default: as `input`.
    #[serde(default)]
    pub cached_input: Option<f64>,
    /// Of output tokens.
    pub output: f64,
    /// ISO 4217 code. Default USD.
    #[serde(default = "usd")]
    pub currency: String,
    /// Number of tokens that the prices are for. Default 1_000_000.
    #[serde(default = "million")]
    pub per: u64,
}

fn usd() -> String {
    "USD".to_owned()
}

const fn million() -> u64 {
    1_000_000
}
