//! The filter trait: what a filter may do at each point of a request's way.

use std::future::{Future, ready};
use std::sync::Arc;

use bytes::Bytes;
use http::{HeaderMap, StatusCode};
use pingora_http::ResponseHeader;
use schemars::JsonSchema;
use serde::de::DeserializeOwned;

use crate::auth::Keys;
use crate::config::ConfigError;
use crate::error::Result;
use crate::exchange::{Arrival, Exchange};
use crate::limit::{Ledger, RuleSet};
use crate::metrics::Metrics;

/// What a filter needs of the rest when it is built.
#[derive(Debug, Clone)]
pub struct Deps {
    /// All keys.
    pub keys: Arc<Keys>,
    /// The ledger.
    pub ledger: Ledger,
    /// Limits of the whole gateway.
    pub global: Arc<RuleSet>,
    /// All metrics.
    pub metrics: Arc<Metrics>,
}

/// Where a request goes after a filter.
#[derive(Debug)]
pub enum Flow {
    /// To the next filter.
    Next,
    /// Back to the client with this answer.
    Answer(Box<Reply>),
}

/// A whole answer made by the gateway itself.
#[derive(Debug, Clone)]
pub struct Reply {
    /// Status.
    pub status: StatusCode,
    /// Headers besides `content-length`.
    pub headers: HeaderMap,
    /// Body.
    pub body: Bytes,
}

/// One filter. Requests run the chain forward, responses backward; only `arrive` and `request` may wait.
pub trait Filter: Sized + Send + Sync + 'static {
    /// Key in a route's `filters:`, and its name in logs.
    const NAME: &'static str;
    /// Its settings.
    type Config: DeserializeOwned + JsonSchema;

    /// Makes the filter of one route; `path` is the place of its settings, for errors.
    ///
    /// # Errors
    /// Settings that contradict each other.
    fn build(config: &Self::Config, path: &str, deps: &Deps) -> Result<Self, ConfigError>;

    /// On the request head, before the body is read.
    fn arrive(&self, _: &http::request::Parts, _: &mut Arrival) -> impl Future<Output = Result<Flow>> + Send {
        ready(Ok(Flow::Next))
    }

    /// On the parsed call (call lane) or the whole head (pass lane), before any attempt.
    fn request(&self, _: &mut Exchange) -> impl Future<Output = Result<Flow>> + Send {
        ready(Ok(Flow::Next))
    }

    /// On every response header toward the client, errors included.
    ///
    /// # Errors
    /// None today; a header that cannot be written is a defect.
    fn response(&self, _: &mut ResponseHeader, _: &Exchange) -> Result<()> {
        Ok(())
    }

    /// Once, when everything is over.
    fn logging(&self, _: &mut Exchange) {}
}
