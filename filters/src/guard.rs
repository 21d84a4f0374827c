//! What a call may ask for: the models of the key.

use schemars::JsonSchema;
use serde::Deserialize;

use crate::config::ConfigError;
use crate::error::{GatewayError, Result};
use crate::exchange::Exchange;
use crate::filter::{Deps, Filter, Flow};

/// Settings of the filter; there are none yet.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct GuardConfig {}

/// Refuses models that the key may not use.
#[derive(Debug)]
pub struct Guard;

impl Filter for Guard {
    const NAME: &'static str = "guard";
    type Config = GuardConfig;

    fn build(_: &Self::Config, _: &str, _: &Deps) -> Result<Self, ConfigError> {
        Ok(Self)
    }

    async fn request(&self, exchange: &mut Exchange) -> Result<Flow> {
        if let (Some(caller), Some(model)) = (&exchange.arrival.caller, &exchange.model)
            && !caller.may_use_model(&model.name)
        {
            return Err(GatewayError::ModelNotAllowed(model.name.to_string()));
        }
        Ok(Flow::Next)
    }
}
