//! `store:` — where counters and keys live.

use schemars::JsonSchema;
use serde::Deserialize;
use tollgate_filters::config::{Period, SecretSource};
pub(crate) use tollgate_filters::limit::WhenDown;

/// Where counters and keys live. Without `redis`: in memory, one process.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Store {
    /// Counters and keys shared by several gateways.
    pub redis: Option<Redis>,
    /// Number of gateways, used by `share` before they have seen each other. Default 1.
    pub replicas: u32,
}

impl Default for Store {
    fn default() -> Self {
        Self { redis: None, replicas: 1 }
    }
}

/// Counters and keys in Redis.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Redis {
    /// redis://, rediss:// or unix:// address.
    pub url: SecretSource,
    /// Longest wait for an answer. Default 5ms.
    #[serde(default = "timeout")]
    pub timeout: Period,
    /// What happens to calls while Redis is away: `share` (default), `open` or `closed`. Route and tier may override.
    #[serde(default)]
    pub when_down: WhenDown,
}

const fn timeout() -> Period {
    Period::millis(5)
}
