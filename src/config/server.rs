//! `server:` — listeners, admin port, limits of the process.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::Deserialize;
use tollgate_filters::config::{Period, SecretSource, Size};

use super::address::{Bind, Cidr};
use super::words::{AccessLog, Threads};

/// Listeners, admin port and limits of the process.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Server {
    /// Data ports. Default: 127.0.0.1:8080 without TLS.
    pub listen: Vec<Listen>,
    /// The admin port.
    pub admin: Admin,
    /// Worker threads: `auto` (one per CPU, the default) or a number.
    pub threads: Threads,
    /// How long open streams may take to finish after SIGTERM. Default 120s.
    pub drain: Period,
    /// Addresses or networks that may set X-Forwarded-* headers. Default: none.
    pub trusted_proxies: Vec<Cidr>,
    /// Limits of the process, whoever calls.
    pub limits: ServerLimits,
    /// Directory of the upgrade socket. Default: systemd's RUNTIME_DIRECTORY, else a directory of the user's own.
    pub runtime_dir: Option<PathBuf>,
    /// Where the access log goes: `stdout` (default), `off`, or the path of a file.
    pub access_log: AccessLog,
}

impl Default for Server {
    fn default() -> Self {
        Self {
            listen: vec![Listen::default()],
            admin: Admin::default(),
            threads: Threads::Auto,
            drain: Period::secs(120),
            trusted_proxies: Vec::new(),
            limits: ServerLimits::default(),
            runtime_dir: None,
            access_log: AccessLog::Stdout,
        }
    }
}

/// One data port.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Listen {
    /// IP address and port; port 0 takes a free one.
    pub bind: Bind,
    /// Certificate and key; with them the port speaks TLS (HTTP/1.1 and HTTP/2).
    #[serde(default)]
    pub tls: Option<Tls>,
}

/// Certificate and key of a TLS port.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Tls {
    /// Path of the certificate chain, PEM.
    pub cert: PathBuf,
    /// Path of the private key, PEM.
    pub key: PathBuf,
}

/// The admin port.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Admin {
    /// IP address and port. Default 127.0.0.1:9180. An address other than loopback needs a token.
    pub bind: Bind,
    /// Token asked for as `Authorization: Bearer`.
    pub token: Option<SecretSource>,
    /// Whether /metrics is `open` (default) or asks for the `token`.
    pub metrics: MetricsAccess,
}

impl Default for Admin {
    fn default() -> Self {
        Self { bind: Bind::loopback(9180), token: None, metrics: MetricsAccess::Open }
    }
}

/// Who may read /metrics.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(crate) enum MetricsAccess {
    /// Everybody who reaches the admin port.
    #[default]
    Open,
    /// Who presents the admin token.
    Token,
}

/// Limits of the process.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct ServerLimits {
    /// Client connections open at one time. Default 8000.
    pub connections: usize,
    /// Client connections open at one time from one address. Default 1000.
    pub connections_per_ip: usize,
    /// Size of one request's header. Default 64KiB.
    pub header_bytes: Size,
    /// Time for a whole header to arrive, on fresh and on reused connections. Default 10s.
    pub header_timeout: Period,
    /// Size of the body of one call. Default 32MiB. A route may lower or raise it.
    pub body_bytes: Size,
    /// Size of all buffered bodies together; beyond it calls get 503. Default 1GiB.
    pub buffered_bytes: Size,
}

impl Default for ServerLimits {
    fn default() -> Self {
        Self {
            connections: 8000,
            connections_per_ip: 1000,
            header_bytes: Size(64 << 10),
            header_timeout: Period::secs(10),
            body_bytes: Size(32 << 20),
            buffered_bytes: Size(1 << 30),
        }
    }
}
