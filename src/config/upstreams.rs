//! `upstreams:` — sets of nodes and how to treat them.

use std::fmt;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, de};
use tollgate_filters::config::{Period, Secret, SecretSource};
use tollgate_filters::dialect::Dialect;

use super::address::{HostPort, NodeUrl};
use super::words::Toggle;

/// A set of nodes that serve the same.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Upstream {
    /// What the nodes speak. Default `openai`.
    pub dialect: Dialect,
    /// How a node is chosen. Default `prefix`.
    pub balance: Balance,
    /// The nodes, as URL or `{ url, weight }`. An https node is verified against its host name; a path prefix is allowed.
    pub nodes: Vec<Node>,
    /// Further nodes from DNS.
    pub discover: Option<Discover>,
    /// Active probes. Default: none.
    pub health: Option<Health>,
    /// Taking nodes out by their failures in real traffic. Default: on with its defaults; `off` turns it off.
    pub eject: Toggle<Eject>,
    /// Which names of /metrics to poll for load; `vllm` is also asked for usage with every event of a stream. Default `none`.
    pub engine: Engine,
    /// Time limits of one attempt, from its dispatch.
    pub timeouts: Timeouts,
    /// Connections, calls in flight and waiting calls, per node.
    pub pool: Pool,
    /// API keys of the provider, used in turn; 429 or 401 cools one down.
    pub credentials: Vec<Credential>,
    /// Rest of a credential after 429 or 401, at least; a longer Retry-After wins. Default 60s.
    #[schemars(with = "Period")]
    pub cooldown: Cooldown,
    /// What the provider grants us.
    pub budget: Option<Budget>,
}

/// How a node of an upstream is chosen.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) enum Balance {
    /// By cost, with an index of prompt prefixes per node.
    #[default]
    Prefix,
    /// By a hash of the prompt's beginning, stateless; a node with more than `load_factor` times the mean load is passed over.
    PrefixHash {
        /// At least 1.0. Default 1.25.
        load_factor: f64,
    },
    /// The least loaded of two.
    LeastRequest,
    /// In turn, by weight.
    RoundRobin,
    /// The same conversation or user on the same node.
    Session,
}

/// `load_factor` of `prefix_hash` where none is given.
pub(crate) const LOAD_FACTOR: f64 = 1.25;

impl<'de> Deserialize<'de> for Balance {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        const NAMES: &[&str] = &["prefix", "prefix_hash", "least_request", "round_robin", "session"];
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields, default)]
        struct PrefixHash {
            load_factor: f64,
        }
        impl Default for PrefixHash {
            fn default() -> Self {
                Self { load_factor: LOAD_FACTOR }
            }
        }
        struct Visitor;
        impl<'de> de::Visitor<'de> for Visitor {
            type Value = Balance;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a balancing policy, like prefix or { prefix_hash: { load_factor: 1.25 } }")
            }

            fn visit_str<E: de::Error>(self, name: &str) -> Result<Balance, E> {
                match name {
                    "prefix" => Ok(Balance::Prefix),
                    "prefix_hash" => Ok(Balance::PrefixHash { load_factor: LOAD_FACTOR }),
                    "least_request" => Ok(Balance::LeastRequest),
                    "round_robin" => Ok(Balance::RoundRobin),
                    "session" => Ok(Balance::Session),
                    other => Err(E::unknown_variant(other, NAMES)),
                }
            }

            fn visit_map<A: de::MapAccess<'de>>(self, map: A) -> Result<Balance, A::Error> {
                #[derive(Deserialize)]
                #[serde(deny_unknown_fields)]
                struct Settings {
                    prefix_hash: PrefixHash,
                }
                let settings = Settings::deserialize(de::value::MapAccessDeserializer::new(map))?;
                Ok(Balance::PrefixHash { load_factor: settings.prefix_hash.load_factor })
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

impl JsonSchema for Balance {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Balance".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "description": "How a node is chosen",
            "anyOf": [
                { "enum": ["prefix", "prefix_hash", "least_request", "round_robin", "session"] },
                {
                    "type": "object", "required": ["prefix_hash"], "additionalProperties": false,
                    "properties": { "prefix_hash": {
                        "type": "object", "additionalProperties": false,
                        "properties": { "load_factor": {
                            "type": "number", "minimum": 1, "default": LOAD_FACTOR,
                            "description": "A node with more than this many times the mean load is passed over"
                        } }
                    } }
                }
            ]
        })
    }
}

/// One node: where it is and how much of the traffic it gets.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Node {
    /// Its address.
    pub url: NodeUrl,
    /// Its share relative to the other nodes. Default 1.
    pub weight: u32,
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl<'de> de::Visitor<'de> for Visitor {
            type Value = Node;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a node, like http://10.0.0.1:8000 or { url: http://10.0.0.1:8000, weight: 2 }")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Node, E> {
                text.parse().map(|url| Node { url, weight: 1 }).map_err(E::custom)
            }

            fn visit_map<A: de::MapAccess<'de>>(self, map: A) -> Result<Node, A::Error> {
                #[derive(Deserialize)]
                #[serde(deny_unknown_fields)]
                struct Full {
                    url: NodeUrl,
                    #[serde(default = "one")]
                    weight: u32,
                }
                const fn one() -> u32 {
                    1
                }
                let full = Full::deserialize(de::value::MapAccessDeserializer::new(map))?;
                Ok(Node { url: full.url, weight: full.weight })
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

impl JsonSchema for Node {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Node".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let url = generator.subschema_for::<NodeUrl>();
        json_schema!({
            "description": "A node: its URL, or { url, weight }",
            "anyOf": [
                url,
                {
                    "type": "object", "required": ["url"], "additionalProperties": false,
                    "properties": {
                        "url": url,
                        "weight": { "type": "integer", "minimum": 1, "default": 1, "description": "Share relative to the other nodes" }
                    }
                }
            ]
        })
    }
}

/// An API key of the provider and its share of the calls.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Credential {
    /// The key itself.
    pub secret: SecretSource,
    /// Its share relative to the other credentials. Default 1.
    pub weight: u32,
}

impl<'de> Deserialize<'de> for Credential {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        const NAMES: &[&str] = &["env", "file", "credential", "weight"];
        struct Visitor;
        impl<'de> de::Visitor<'de> for Visitor {
            type Value = Credential;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(
                    "a secret: {env: NAME}, {file: PATH}, {credential: NAME} or plain text; with weight: N its share",
                )
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Credential, E> {
                Ok(Credential { secret: SecretSource::Plain(Secret::new(text)), weight: 1 })
            }

            fn visit_map<A: de::MapAccess<'de>>(self, mut map: A) -> Result<Credential, A::Error> {
                let (mut secret, mut weight) = (None, 1);
                while let Some(name) = map.next_key::<String>()? {
                    let source = match name.as_str() {
                        "weight" => {
                            weight = map.next_value()?;
                            continue;
                        }
                        "env" => SecretSource::Env(map.next_value()?),
                        "file" => SecretSource::File(map.next_value()?),
                        "credential" => SecretSource::Credential(map.next_value()?),
                        other => return Err(de::Error::unknown_field(other, NAMES)),
                    };
                    if secret.replace(source).is_some() {
                        return Err(de::Error::custom("a secret has just one of: env, file, credential"));
                    }
                }
                let secret = secret.ok_or_else(|| de::Error::custom("a secret needs one of: env, file, credential"))?;
                Ok(Credential { secret, weight })
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

impl JsonSchema for Credential {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Credential".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        let one = |name: &str, text: &str| {
            json_schema!({
                "type": "object", "required": [name], "additionalProperties": false,
                "properties": {
                    (name): { "type": "string", "description": text },
                    "weight": { "type": "integer", "minimum": 1, "default": 1, "description": "Share relative to the other credentials" }
                }
            })
        };
        json_schema!({
            "description": "A secret and its share of the calls: {env: NAME, weight: 3}, {file: PATH}, {credential: NAME}, or plain text (warned of)",
            "anyOf": [
                one("env", "name of an environment variable"),
                one("file", "path of a file"),
                one("credential", "name of a systemd credential"),
                { "type": "string" }
            ]
        })
    }
}

/// Nodes from DNS.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Discover {
    /// Host name and port; every address it resolves to is a node.
    #[expect(dead_code, reason = "discovery is not there yet, which the check says")]
    pub dns: HostPort,
    /// How often it is asked. Default 10s.
    #[serde(default = "ten_seconds")]
    pub every: Period,
}

const fn ten_seconds() -> Period {
    Period::secs(10)
}

/// Active probes of every node.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Health {
    /// Path that answers 2xx while the node is well. Default /health.
    pub path: String,
    /// Time between probes. Default 5s.
    pub every: Period,
    /// Longest wait for an answer. Default 1s.
    pub timeout: Period,
    /// Failures in a row that take a node out. Default 3.
    pub unhealthy_after: u32,
    /// Successes in a row that bring it back. Default 2.
    pub healthy_after: u32,
}

impl Default for Health {
    fn default() -> Self {
        Self {
            path: "/health".to_owned(),
            every: Period::secs(5),
            timeout: Period::secs(1),
            unhealthy_after: 3,
            healthy_after: 2,
        }
    }
}

/// Taking nodes out by their failures in real traffic.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Eject {
    /// Failures in a row. Default 5.
    pub after: u32,
    /// Time out of service. Default 10s.
    #[serde(rename = "for")]
    pub period: Period,
    /// Share of the nodes that may be out at one time, above 0 and at most 1. Default 0.5.
    pub max_ratio: f64,
}

impl Default for Eject {
    fn default() -> Self {
        Self { after: 5, period: Period::secs(10), max_ratio: 0.5 }
    }
}

/// Which inference engine a node runs, for its names of /metrics.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Engine {
    /// vLLM.
    Vllm,
    /// SGLang.
    Sglang,
    /// llama.cpp's server.
    Llamacpp,
    /// Unknown: /metrics is not polled.
    #[default]
    None,
}

/// Time limits of one attempt, from its dispatch.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Timeouts {
    /// To connect, TLS included. Default 2s.
    pub connect: Period,
    /// To the first byte of a stream's answer. Default 30s.
    pub first_byte: Period,
    /// To the first token of a stream. Default 30s.
    pub first_token: Period,
    /// Between two tokens of a stream. Default 30s.
    pub between_tokens: Period,
    /// For the whole attempt. Default 20m.
    pub total: Period,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            connect: Period::secs(2),
            first_byte: Period::secs(30),
            first_token: Period::secs(30),
            between_tokens: Period::secs(30),
            total: Period::secs(20 * 60),
        }
    }
}

/// Connections, calls in flight and waiting calls, per node.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Pool {
    /// Idle connections kept. Default 128.
    pub size: usize,
    /// How long an idle connection is kept. Default 60s.
    pub idle: Period,
    /// Calls in flight. Default: no limit.
    pub concurrency: Option<u32>,
    /// Where calls wait while all nodes are at `concurrency`. Default: none, they are refused at once.
    pub queue: Option<Queue>,
}

impl Default for Pool {
    fn default() -> Self {
        Self { size: 128, idle: Period::secs(60), concurrency: None, queue: None }
    }
}

/// Where calls wait for a node.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Queue {
    /// Waiting calls per node. Default 256.
    pub size: usize,
    /// Longest wait. Default 5s.
    pub wait: Period,
}

impl Default for Queue {
    fn default() -> Self {
        Self { size: 256, wait: Period::secs(5) }
    }
}

/// Rest of a credential.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub(crate) struct Cooldown(pub Period);

impl Default for Cooldown {
    fn default() -> Self {
        Self(Period::secs(60))
    }
}

/// What the provider grants us.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Budget {
    /// Requests in a minute.
    pub requests_per_minute: Option<u64>,
    /// Tokens in a minute.
    pub tokens_per_minute: Option<u64>,
    /// Share of the budget above which calls are spread over the minute, 0 to 1. Default 0.85.
    pub pace_above: f64,
}

impl Default for Budget {
    fn default() -> Self {
        Self { requests_per_minute: None, tokens_per_minute: None, pace_above: 0.85 }
    }
}
