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
use crate::usage::UsageSource;

/// So many calls like this one before a limit, vocabularies are made ready.
const EARLY: u64 = 16;

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
        let prompt = exchange.prompt_tokens();
        if !call.kind.generates() {
            return Estimate { prompt, completion: 0, guessed: false };
        }
        let guess = || {
            let (key, model) = names(exchange);
            self.ledger.guesses().get(key, model)
        };
        let completion = call.max_tokens.unwrap_or_else(guess).saturating_mul(u64::from(call.n));
        Estimate { prompt, completion, guessed: call.max_tokens.is_none() }
    }

    /// Counts the prompt exactly if its estimate lies so near the limit that its error decides.
    async fn sharpen(&self, exchange: &mut Exchange, plan: &Plan, estimate: Estimate) -> Estimate {
        let Some(room) = self.ledger.room(plan) else { return estimate };
        let Some(vocabulary) = exchange.vocabulary() else { return estimate };
        let all = estimate.prompt.saturating_add(estimate.completion);
        if all >= room / EARLY {
            // The limit comes near: one of the next calls may have to be counted.
            vocabulary.warm();
        }
        if !is_near(all, room) || !vocabulary.is_ready() {
            return estimate;
        }
        let body = exchange.body.clone();
        exchange.count_prompt(&body).await;
        Estimate { prompt: exchange.prompt_counted.unwrap_or(estimate.prompt), ..estimate }
    }

    fn learn(&self, exchange: &Exchange) {
        let (Some(call), Some(usage)) = (&exchange.call, &exchange.tally.usage) else { return };
        let (estimated, whole) = exchange.tally.output;
        if let Some(target) = exchange.target.as_ref().filter(|_| usage.source == UsageSource::Upstream) {
            if call.prompt.is_text() {
                target.learned.input.observe(call.prompt_tokens(), usage.input);
            }
            if whole {
                target.learned.output.observe(estimated, usage.output);
            }
        }
        // An answer that was cut tells nothing of how long answers are.
        if whole && usage.output > 0 {
            let (key, model) = names(exchange);
            self.ledger.guesses().observe(key, model, usage.output.div_ceil(u64::from(call.n.max(1))));
        }
    }
}

/// Whether the two lie within 15 % of each other: the error that an estimate may well have.
const fn is_near(tokens: u64, room: u64) -> bool {
    let larger = if tokens > room { tokens } else { room };
    tokens.abs_diff(room) <= larger / 100 * 15 + larger % 100 * 15 / 100
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
        let estimate = self.estimate(exchange);
        let estimate = self.sharpen(exchange, &plan, estimate).await;
        match self.ledger.reserve(&plan, estimate).await? {
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
        self.learn(exchange);
        let Some(reservation) = exchange.reservation.take() else { return };
        match &exchange.tally.usage {
            Some(usage) => reservation.settle(usage),
            None => reservation.release(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn near_is_within_15_percent_on_either_side() {
        for (tokens, room, near) in [
            (85, 100, true),
            (84, 100, false),
            (100, 85, true),
            (100, 84, false),
            (0, 0, true),
            (1, 0, false),
            (7, 8, true),
        ] {
            assert_eq!(is_near(tokens, room), near, "{tokens} of {room}");
        }
        assert!(is_near(u64::MAX, u64::MAX) && !is_near(0, u64::MAX));
    }
}
