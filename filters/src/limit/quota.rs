//! The body of `GET /v1/quota`.

use serde::Serialize;

use super::standing::Standings;

#[derive(Serialize)]
struct Body<'a> {
    key_id: &'a str,
    tier: Option<&'a str>,
    limits: Vec<Row<'a>>,
}

#[derive(Serialize)]
struct Row<'a> {
    scope: std::borrow::Cow<'a, str>,
    dimension: &'static str,
    limit: u64,
    used: u64,
    held: u64,
    remaining: u64,
    /// Seconds, rounded up.
    resets_in: u64,
    /// Present where the limit is only watched.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    shadow: bool,
}

/// What a caller may still use, as JSON. Of concurrency, the live calls count as used.
///
/// # Errors
/// Never for what is written here; the signature is that of the JSON writer.
pub fn body(key_id: &str, tier: Option<&str>, standings: &Standings) -> serde_json::Result<Vec<u8>> {
    let rows = standings.iter().map(|standing| Row {
        scope: standing.scope().label(),
        dimension: standing.rule().dimension.name(),
        limit: standing.rule().limit,
        used: standing.used(),
        held: standing.held(),
        remaining: standing.remaining(),
        resets_in: super::headers::seconds(standing.resets_in()),
        shadow: standing.rule().shadow,
    });
    serde_json::to_vec(&Body { key_id, tier, limits: rows.collect() })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::limit::clock::Instant64;
    use crate::limit::dimension::{Limit, Limits};
    use crate::limit::memory::MemoryStore;
    use crate::limit::reservation::Estimate;
    use crate::limit::rule::{Plan, RuleSet, Scope};

    #[test]
    fn the_body_is_that_of_the_contract_and_consumes_nothing() {
        let limit = |limit| Some(Limit { limit, shadow: false });
        let limits = Limits {
            requests_per_minute: limit(60),
            tokens_per_day: limit(1_000),
            concurrency: limit(2),
            ..Limits::default()
        };
        let watched = Limits { requests_per_hour: Some(Limit { limit: 5, shadow: true }), ..Limits::default() };
        let key = Arc::new(RuleSet::new(Scope::Key, "alice", &limits));
        let route = Arc::new(RuleSet::new(Scope::Route, "llm", &watched));
        let plan: Plan = [&key, &route].into_iter().collect();
        let store = MemoryStore::new(None);
        let noon = Instant64::from_secs(20_000 * 86_400 + 43_200);
        store.reserve(&plan, Estimate { prompt: 30, completion: 70, guessed: false }, noon);
        let show = || {
            let body = body("alice", Some("free"), &store.query(&plan, noon)).unwrap();
            serde_json::from_slice::<serde_json::Value>(&body).unwrap()
        };
        let row = |scope, dimension, numbers: [u64; 5]| {
            let [limit, used, held, remaining, resets_in] = numbers;
            serde_json::json!({ "scope": scope, "dimension": dimension, "limit": limit, "used": used, "held": held,
                "remaining": remaining, "resets_in": resets_in })
        };
        let mut hour = row("route:llm", "requests_per_hour", [5, 1, 0, 4, 3_600]);
        hour["shadow"] = true.into();
        let expected = serde_json::json!({ "key_id": "alice", "tier": "free", "limits": [
            row("key", "requests_per_minute", [60, 1, 0, 59, 60]),
            row("key", "tokens_per_day", [1_000, 0, 100, 900, 43_200]),
            row("key", "concurrency", [2, 1, 0, 1, 0]),
            hour,
        ] });
        assert_eq!(show(), expected);
        assert_eq!(show(), expected);
    }
}
