//! Models: what clients ask for, and the targets that answer.

use std::sync::Arc;
use std::time::Duration;

use crate::limit::RuleSet;
use crate::meter::exact::Tokens;
use crate::meter::learned::Learned;
use crate::meter::seam::Way;
use crate::retry::Class;
use crate::upstream::Upstream;
use crate::usage::Usage;

/// A name that clients ask for, with the targets behind it in the order in which they are tried.
#[derive(Debug)]
pub struct Model {
    /// Its canonical name; aliases lead here.
    pub name: Arc<str>,
    /// Where it is answered.
    pub targets: Vec<Target>,
    /// How often and how fast attempts follow each other.
    pub retry: Retry,
    /// Limits of the model itself.
    pub rules: Arc<RuleSet>,
    /// What tokens cost, if that is known.
    pub price: Option<Price>,
    /// How a stream that broke off is finished on another node, if it is.
    pub resume: Option<Way>,
    /// Answers carry the name that the client asked for, not the target's.
    pub report_requested: bool,
}

/// An upstream, and the name that the model has there.
#[derive(Debug, Clone)]
pub struct Target {
    /// The upstream.
    pub upstream: Arc<Upstream>,
    /// The model's name there.
    pub model: Arc<str>,
    /// What must have happened before for this target to be tried.
    pub on: Vec<Class>,
    /// It takes longer prompts than the targets before it.
    pub larger_context: bool,
    /// It can go on with an answer that another node began.
    pub continues: bool,
    /// How the model cuts text into tokens.
    pub tokens: Tokens,
    /// How far its own counts lie from our estimates.
    pub learned: Arc<Learned>,
}

/// How attempts follow each other.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Retry {
    /// Attempts of one call over all its targets, the first included.
    pub attempts: u32,
    /// Wait before a node is asked a second time; doubled with each further repetition.
    pub backoff: Duration,
    /// Whether that wait is spread over its span by chance.
    pub jitter: bool,
    /// Extra attempts that an upstream may get, as a share of its calls.
    pub budget: f64,
}

impl Default for Retry {
    fn default() -> Self {
        Self { attempts: 3, backoff: Duration::from_millis(100), jitter: true, budget: 0.2 }
    }
}

/// Price of tokens.
#[derive(Debug, Clone, PartialEq)]
pub struct Price {
    /// Of `per` input tokens.
    pub input: f64,
    /// Of `per` input tokens that came from the upstream's prefix cache.
    pub cached_input: f64,
    /// Of `per` output tokens.
    pub output: f64,
    /// Currency code, a metric label.
    pub currency: Arc<str>,
    /// How many tokens the figures are for.
    pub per: f64,
}

impl Price {
    /// What a call cost, in `currency`.
    pub fn cost(&self, usage: &Usage) -> f64 {
        let fresh = usage.input.saturating_sub(usage.cached_input) as f64;
        let sum =
            fresh * self.input + usage.cached_input as f64 * self.cached_input + usage.output as f64 * self.output;
        sum / self.per
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cached_input_has_its_own_price() {
        let price = Price { input: 0.42, cached_input: 0.04, output: 1.68, currency: "USD".into(), per: 1e6 };
        let usage = Usage { input: 1_000_000, cached_input: 500_000, output: 250_000, ..Usage::default() };
        assert!((price.cost(&usage) - (0.21 + 0.02 + 0.42)).abs() < 1e-9);
    }
}
