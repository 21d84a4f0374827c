//! All credentials of a provider are limited: it sees no more than the attempts of each call, on connections it has already.

use serde_json::json;

use super::*;
use crate::harness::client::at_once;
use crate::harness::node;

async fn provider(node: &Node, more: &str) -> Gateway {
    let more = format!("credentials: [sk-a-0123456789, sk-b-0123456789, sk-c-0123456789], {more}");
    let conf = Conf::new()
        .upstream("far", &[node.url()], &more)
        .model("chat", &[("far", "qwen")], "retry: { attempts: 3, backoff: 1ms, budget: 1 }")
        .llm();
    Gateway::with(&conf).await
}

#[tokio::test]
async fn each_credential_is_refused_once_and_then_left_alone() {
    for body in both() {
        let far = node("qwen").await;
        breaks(&far, "429:retry-after=20");
        let gw = provider(&far, "cooldown: 60s").await;
        let first = ask(&gw, &body).await;
        is_error(&first, 429, "upstream_rate_limited");
        attempts_told(&first, 3);
        let keys: std::collections::BTreeSet<String> =
            far.requests().iter().map(|seen| seen.header("authorization").expect("a credential").to_owned()).collect();
        assert_eq!(keys.len(), 3, "each was tried: {keys:?}");
        let (gw, body) = (&gw, &body);
        for told in at_once(10, (0..50).map(|_| ask(gw, body))).await {
            is_error(&told, 429, "upstream_rate_limited");
            let wait = told.number("retry-after");
            assert!((1.0..=60.0).contains(&wait), "{wait}");
            assert!(told.took < SLACK);
        }
        assert_eq!(far.requests().len(), 3, "all rest");
        assert!(far.stats().total_connections < 3, "a handshake for each refusal");
        // They rest, but the node is not at fault.
        assert_eq!(gw.metric("tollgate_node_up", &[]).await, 1.0);
        assert_eq!(node_state(gw, "far", &far).await["failures"], json!(0));
        is_clean(gw).await;
    }
}

/// Credentials that hardly rest: every call may try all of them.
#[tokio::test]
async fn a_storm_costs_no_connection() {
    for body in both() {
        let far = node("qwen").await;
        breaks(&far, "429");
        let gw = provider(&far, "cooldown: 1ms").await;
        let mut attempts = 0;
        for _ in 0..20 {
            let told = ask(&gw, &body).await;
            is_error(&told, 429, "upstream_rate_limited");
            let told: usize = told.header("x-tollgate-attempts").parse().unwrap_or(0);
            assert!(told <= 3);
            attempts += told;
            // They rest for a moment all the same.
            tokio::time::sleep(ms(5)).await;
        }
        assert_eq!(far.requests().len(), attempts);
        assert!((20..=60).contains(&attempts), "{attempts}");
        // A refusal that is not read in time costs its connection, which a busy machine may bring about.
        let connections = far.stats().total_connections;
        assert!(connections <= 3, "{connections} connections for {attempts} refusals");
        let (gw, body) = (&gw, &body);
        let told = at_once(8, (0..80).map(|_| ask(gw, body))).await;
        told.iter().for_each(|told| is_error(told, 429, "upstream_rate_limited"));
        assert!(far.requests().len() - attempts <= 240);
        let connections = far.stats().total_connections;
        assert!(connections <= 9, "{connections} connections for 8 calls at a time");
        is_clean(gw).await;
    }
}
