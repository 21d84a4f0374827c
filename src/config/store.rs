//! `store:` — where counters and keys live.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::Deserialize;
use tollgate_filters::config::{Period, SecretSource, World};
pub(crate) use tollgate_filters::limit::WhenDown;
use tollgate_filters::store::{Address, Tls};

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
    /// redis://, rediss:// or unix:// address; with Sentinels redis+sentinel://HOST,HOST/MASTER or rediss+sentinel://.
    pub url: SecretSource,
    /// Path of certificates, PEM, that are trusted beside the system's authorities. Only with rediss.
    #[serde(default)]
    pub ca: Option<PathBuf>,
    /// Path of the certificate chain to show to the server, PEM; needs `key`.
    #[serde(default)]
    pub cert: Option<PathBuf>,
    /// Path of the private key of `cert`, PEM.
    #[serde(default)]
    pub key: Option<PathBuf>,
    /// Longest wait for an answer. Default 5ms.
    #[serde(default = "timeout")]
    pub timeout: Period,
    /// What happens to calls while Redis is away: `share` (default), `open` or `closed`. Route and tier may override.
    #[serde(default)]
    pub when_down: WhenDown,
}

impl Redis {
    /// The address, with all that is needed to connect.
    ///
    /// # Errors
    /// Which setting is wrong, and how; never what it says.
    pub(crate) fn address(&self, world: &dyn World) -> Result<Address, String> {
        let url = self.url.resolve(world).map_err(|why| format!("store.redis.url: {why}"))?;
        let address = Address::parse(url.expose()).map_err(|why| format!("store.redis.url: {why}"))?;
        match address.is_secure() {
            true => Ok(address.with_tls(self.tls(world).map_err(|why| format!("store.redis: {why}"))?)),
            false => Ok(address),
        }
    }

    /// The certificates to connect with.
    ///
    /// # Errors
    /// Which file cannot be read, or is none of its kind.
    pub(crate) fn tls(&self, world: &dyn World) -> Result<Tls, String> {
        let read = |path: &Option<PathBuf>| -> Result<Option<String>, String> {
            let Some(path) = path else { return Ok(None) };
            let name = path.display().to_string();
            world.read(&name).map(Some).map_err(|error| format!("cannot read {name}: {error}"))
        };
        let (ca, cert, key) = (read(&self.ca)?, read(&self.cert)?, read(&self.key)?);
        Tls::new(ca.as_deref(), cert.as_deref().zip(key.as_deref()))
    }
}

const fn timeout() -> Period {
    Period::millis(5)
}
