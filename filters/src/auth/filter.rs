//! The filter in front of the keys: no caller, no call.

use std::sync::Arc;

use schemars::JsonSchema;
use serde::Deserialize;

use super::Keys;
use crate::config::ConfigError;
use crate::error::{GatewayError, Result};
use crate::exchange::Arrival;
use crate::filter::{Deps, Filter, Flow};

/// Settings of the filter; there are none yet.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AuthConfig {}

/// Demands a valid key that may use the route.
#[derive(Debug)]
pub struct Auth {
    keys: Arc<Keys>,
}

impl Filter for Auth {
    const NAME: &'static str = "auth";
    type Config = AuthConfig;

    fn build(_: &Self::Config, _: &str, deps: &Deps) -> Result<Self, ConfigError> {
        Ok(Self { keys: Arc::clone(&deps.keys) })
    }

    async fn arrive(&self, head: &http::request::Parts, arrival: &mut Arrival) -> Result<Flow> {
        let query = head.uri.query().unwrap_or_default();
        let caller = self.keys.find(&head.headers, query, arrival.unix_seconds).await?;
        if !caller.may_use_route(&arrival.route) {
            return Err(GatewayError::RouteNotAllowed);
        }
        arrival.caller = Some(caller);
        Ok(Flow::Next)
    }
}
