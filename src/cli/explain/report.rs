//! What `explain` has found: one report, shown as text or as JSON.

use std::fmt;

use serde::Serialize;

/// What would become of a request.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    /// Name of the route that takes it; `gateway` is the gateway itself.
    pub route: Option<String>,
    /// Why it would be refused before any limit is asked, if it would.
    pub refusal: Option<Refused>,
    /// What the route means for it.
    #[serde(flatten)]
    pub found: Option<Found>,
    /// The routes before that do not match.
    pub passed_over: Vec<PassedOver>,
}

/// A refusal as the client would get it.
#[derive(Debug, Serialize)]
pub(crate) struct Refused {
    /// HTTP status.
    pub status: u16,
    /// Code word.
    pub code: &'static str,
    /// What the client is told.
    pub message: String,
}

/// What a route means for a request.
#[derive(Debug, Serialize)]
pub(crate) struct Found {
    /// `call`, `pass` or `own`.
    pub lane: &'static str,
    /// In which dialect errors are told.
    pub dialect: &'static str,
    /// Names of the filters, in their order.
    pub filters: Vec<&'static str>,
    /// The caller, where a key was given.
    pub key: Option<KeyFound>,
    /// Canonical name of the model.
    pub model: Option<String>,
    /// The limits that bind the call.
    pub limits: Vec<LimitFound>,
    /// The nodes that may answer, in the order of the targets.
    pub candidates: Vec<Candidate>,
}

/// The caller behind the key.
#[derive(Debug, Serialize)]
pub(crate) struct KeyFound {
    /// Id of the key.
    pub id: String,
    /// Its tier.
    pub tier: Option<String>,
}

/// One limit that binds the call.
#[derive(Debug, Serialize)]
pub(crate) struct LimitFound {
    /// `key`, `route:NAME`, `model:NAME` or `global`.
    pub scope: String,
    /// What is counted.
    pub dimension: &'static str,
    /// How much of it.
    pub limit: u64,
    /// Whether it is only counted, never refused.
    pub shadow: bool,
}

/// One node that may answer.
#[derive(Debug, Serialize)]
pub(crate) struct Candidate {
    /// Its upstream.
    pub upstream: String,
    /// Host and port.
    pub node: String,
    /// Its share relative to the other nodes.
    pub weight: u32,
    /// The model's name there, where the call is sent under another name than the client's.
    pub model: Option<String>,
    /// How a node of the upstream is chosen.
    pub balance: &'static str,
}

/// A route that does not match.
#[derive(Debug, Serialize)]
pub(crate) struct PassedOver {
    /// Its name.
    pub route: String,
    /// The first condition that does not hold.
    pub because: &'static str,
}

/// A line with its word in front.
fn line(f: &mut fmt::Formatter<'_>, word: &str, text: fmt::Arguments<'_>) -> fmt::Result {
    writeln!(f, "{word:<12} {text}")
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for PassedOver { route, because } in &self.passed_over {
            line(f, "passed over", format_args!("{route}: its {because} does not match"))?;
        }
        if let Some(route) = &self.route {
            line(f, "route", format_args!("{route}"))?;
        }
        if let Some(found) = &self.found {
            found.fmt(f)?;
        }
        if let Some(Refused { status, code, message }) = &self.refusal {
            line(f, "refused", format_args!("{status} {code}: {message}"))?;
        }
        Ok(())
    }
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        line(f, "lane", format_args!("{}", self.lane))?;
        line(f, "dialect", format_args!("{}", self.dialect))?;
        line(f, "filters", format_args!("{}", self.filters.join(", ")))?;
        if let Some(KeyFound { id, tier }) = &self.key {
            line(
                f,
                "key",
                format_args!("{id}, {}", tier.as_ref().map_or("no tier".to_owned(), |t| format!("tier {t}"))),
            )?;
        }
        if let Some(model) = &self.model {
            line(f, "model", format_args!("{model}"))?;
        }
        for LimitFound { scope, dimension, limit, shadow } in &self.limits {
            let shadow = if *shadow { " (shadow)" } else { "" };
            line(f, "limit", format_args!("{scope} {dimension} {limit}{shadow}"))?;
        }
        for Candidate { upstream, node, weight, model, balance } in &self.candidates {
            let model = model.as_ref().map_or(String::new(), |model| format!(" as {model}"));
            line(f, "candidate", format_args!("{upstream} {node}{model}, weight {weight}, {balance}"))?;
        }
        Ok(())
    }
}
