//! The configuration: the document as written, read from YAML and checked, every error with its place.
//!
//! [`load()`] is the way in. What the gateway makes of a document (routers, pools, balancers) is the runtime's business.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::Deserialize;

mod address;
mod alerts;
mod auth;
mod check;
mod de;
mod include;
mod keys;
mod load;
mod models;
mod place;
mod problem;
mod routes;
mod server;
mod store;
mod tree;
mod upstreams;
mod words;

pub(crate) use address::*;
pub(crate) use alerts::*;
pub(crate) use auth::*;
pub(crate) use keys::*;
#[allow(unused_imports, reason = "the names are the way in for everybody else")]
pub(crate) use load::{Loaded, default_path, load, load_text, look};
pub(crate) use models::*;
#[allow(unused_imports, reason = "the names are the way in for everybody else")]
pub(crate) use problem::{Problem, Problems, Severity, suggest};
pub(crate) use routes::*;
pub(crate) use server::*;
pub(crate) use store::*;
pub(crate) use upstreams::*;
pub(crate) use words::*;

/// Configuration of Tollgate, an AI gateway. Unknown keys, duplicate keys and duplicate ids are errors.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(title = "Tollgate configuration")]
pub(crate) struct Document {
    /// Further files, by path or by glob in the file name, relative to this file. They may hold
    /// `tiers`, `keys`, `upstreams`, `models` and `routes`; their routes come after the ones of this file, in the order of file names.
    pub include: Vec<String>,
    /// Listeners, admin port and limits of the process. Read at start only: a change needs a restart.
    pub server: Server,
    /// Where counters and keys live. Absent: in memory, one process.
    pub store: Store,
    /// How callers are recognised.
    pub auth: Auth,
    /// Sets of limits that keys refer to, by name.
    pub tiers: BTreeMap<String, Tier>,
    /// Keys of callers.
    pub keys: Vec<Key>,
    /// Limits above the key.
    pub limits: ScopeLimits,
    /// Sets of nodes, by name.
    pub upstreams: BTreeMap<String, Upstream>,
    /// What clients may ask for, by name.
    pub models: BTreeMap<String, Model>,
    /// Which request goes where. The first match wins.
    pub routes: Vec<Route>,
    /// Events that are told to a webhook. Read at start only: a change needs a restart.
    pub alerts: Vec<Alert>,
}

#[cfg(test)]
mod tests;
