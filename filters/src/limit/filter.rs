//! The filter in front of the ledger: one reservation for the whole call, before any attempt, settled when all is over.

use std::sync::Arc;

use pingora_http::ResponseHeader;
use schemars::JsonSchema;
use serde::Deserialize;

use super::headers::standing_headers;
use super::{Decision, Estimate, Ledger, Plan, RuleSet, Standings};
use crate::config::ConfigError;
use crate::error::{GatewayError, Result};
use crate::exchange::Exchange;
use crate::filter::{Deps, Filter, Flow};
use crate::metrics::{self, Metrics};

/// Settings of the filter; there are none yet.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LimitConfig {}

/// Reserves before the first attempt and settles after the last.
#[derive(Debug)]
pub struct Limit {
    ledger: Ledger,
    global: Arc<RuleSet>,
    metrics: Arc<Metrics>,
}

impl Limit {
    fn observe(&self, standings: &Standings, refused: bool) {
        for standing in standings.iter() {
            let decision = match (standing.over(), standing.rule().shadow) {
                (true, true) => metrics::Decision::Shadow,
                (true, false) => metrics::Decision::Refused,
                // A refused call counts nowhere: only the rules that refused have decided anything.
                (false, _) if refused => continue,
                (false, _) => metrics::Decision::Ok,
            };
            self.metrics.limit_decision(standing.scope().scope().word(), standing.rule().dimension, decision);
        }
    }

    fn estimate(&self, exchange: &Exchange) -> Estimate {
        let Some(call) = &exchange.call else { return Estimate::default() };
        if !call.kind.generates() {
            return Estimate { prompt: call.prompt_tokens(), completion: 0, guessed: false };
        }
        let guess = || {
            let (key, model) = names(exchange);
            self.ledger.guesses().get(key, model)
        };
        let completion = call.max_tokens.unwrap_or_else(guess).saturating_mul(u64::from(call.n));
        Estimate { prompt: call.prompt_tokens(), completion, guessed: call.max_tokens.is_none() }
    }
}

/// Under which names the length of answers is learned.
fn names(exchange: &Exchange) -> (&str, &str) {
    let key = exchange.arrival.caller.as_ref().map_or("", |caller| &*caller.id);
    let model = exchange.model.as_ref().map_or("", |model| &*model.name);
    (key, model)
}

impl Filter for Limit {
    const NAME: &'static str = "limit";
    type Config = LimitConfig;

    fn build(_: &Self::Config, _: &str, deps: &Deps) -> Result<Self, ConfigError> {
        Ok(Self { ledger: deps.ledger.clone(), global: Arc::clone(&deps.global), metrics: Arc::clone(&deps.metrics) })
    }

    async fn request(&self, exchange: &mut Exchange) -> Result<Flow> {
        let mut plan = Plan::new();
        if let Some(caller) = &exchange.arrival.caller {
            plan.add(&caller.rules);
        }
        plan.add(&exchange.arrival.route_rules);
        if let Some(model) = &exchange.model {
            plan.add(&model.rules);
        }
        plan.add(&self.global);
        match self.ledger.reserve(&plan, self.estimate(exchange)).await? {
            Decision::Admitted(reservation) => {
                self.observe(reservation.standings(), false);
                exchange.reservation = Some(reservation);
                Ok(Flow::Next)
            }
            Decision::Refused(refusal, standings) => {
                self.observe(&standings, true);
                exchange.refused = Some(standings);
                Err(GatewayError::Limited(Box::new(refusal)))
            }
        }
    }

    fn response(&self, head: &mut ResponseHeader, exchange: &Exchange) -> Result<()> {
        let standings = exchange.refused.as_ref().or_else(|| exchange.reservation.as_ref().map(|r| r.standings()));
        let Some(standings) = standings else { return Ok(()) };
        for (name, value) in standing_headers(standings) {
            head.insert_header(name, value).map_err(|_| GatewayError::Internal)?;
        }
        Ok(())
    }

    fn logging(&self, exchange: &mut Exchange) {
        let Some(reservation) = exchange.reservation.take() else { return };
        let Some(usage) = &exchange.tally.usage else { return reservation.release() };
        reservation.settle(usage);
        if usage.output > 0 {
            let (key, model) = names(exchange);
            self.ledger.guesses().observe(key, model, usage.output);
        }
    }
}
