//! What failed attempts cost: nothing on the caller's account, and not too much at the upstream.

use serde_json::json;

use super::*;
use crate::harness::client::at_once;
use crate::harness::{ALICE, node};

async fn quota(gw: &Gateway, key: &str, dimension: &str) -> Value {
    let answer = gw.get("/v1/quota").key(key).send().await.expect(200).json();
    let rows = answer["limits"].as_array().expect("limits").clone();
    rows.into_iter().find(|row| row["scope"] == "key" && row["dimension"] == dimension).expect("the limit")
}

/// However many attempts there were, and however they failed: one call, and the tokens of the answer that was given.
#[tokio::test]
async fn a_call_is_charged_once_with_the_usage_of_the_node_that_answered() {
    for what in ["500", "429", "refuse", "slow_token:60000", "cut:0", "stall:0", "error_event", "malformed", "empty"] {
        for body in both() {
            if what == "empty" && !is_stream(&body) {
                continue;
            }
            let (near, far) = (node("small").await, node("large").await);
            breaks(&near, what);
            let conf = Conf::new()
                .upstream("near", &[near.url()], QUICK)
                .upstream("far", &[far.url()], QUICK)
                .model("chat", &[("near", "small"), ("far", "large")], RETRY)
                .llm();
            let gw = Gateway::with(&conf).await;
            let told = gw.post(PATH).key(ALICE).json(&body).send().await;
            is_whole(&told, &body);
            attempts_told(&told, 2);
            let id = told.header("x-request-id").to_owned();
            is_clean(&gw).await;
            let line = gw.logged(&id).await;
            let at_far = far.requests().pop().expect("a request");
            let charged = at_far.prompt_tokens + at_far.output_tokens;
            assert_eq!(at_far.output_tokens, 8);
            let tokens = quota(&gw, ALICE, "tokens_per_day").await;
            assert_eq!((&tokens["used"], &tokens["held"]), (&json!(charged), &json!(0)), "{what}: {tokens}");
            assert_eq!(quota(&gw, ALICE, "requests_per_minute").await["used"], 1, "{what}");
            assert_eq!((&line["attempts"], &line["upstream"]), (&json!(2), &json!("far")), "{what}: {line}");
            assert_eq!(line["node"], far.addr().to_string(), "{what}: {line}");
            assert_eq!((&line["status"], &line["usage_source"]), (&json!(200), &json!("upstream")), "{what}: {line}");
            assert_eq!(
                (&line["input_tokens"], &line["output_tokens"]),
                (&json!(at_far.prompt_tokens), &json!(at_far.output_tokens)),
                "{what}"
            );
            let attempts = [("near", 1.0), ("far", 1.0)];
            for (upstream, count) in attempts {
                gw.settles("tollgate_attempts_total", &[("upstream", upstream)], count).await;
            }
            let ok = gw.metric("tollgate_attempts_total", &[("upstream", "near"), ("outcome", "ok")]).await;
            assert_eq!(ok, 0.0, "{what}: a failed attempt counts as a success");
            gw.settles("tollgate_fallbacks_total", &[("from", "near"), ("to", "far")], 1.0).await;
            assert_eq!(gw.metric("tollgate_tokens_total", &[("kind", "output")]).await, 8.0, "{what}");
        }
    }
}

/// A call that all nodes failed costs no tokens.
#[tokio::test]
async fn a_call_without_an_answer_costs_no_tokens() {
    for what in ["500", "429", "refuse", "slow_header:60000"] {
        for body in both() {
            let near = node("qwen").await;
            breaks(&near, what);
            let gw = gateway(&[&near], QUICK).await;
            assert!(gw.post(PATH).key(ALICE).json(&body).send().await.status() >= 429);
            is_clean(&gw).await;
            let tokens = quota(&gw, ALICE, "tokens_per_day").await;
            assert_eq!((&tokens["used"], &tokens["held"]), (&json!(0), &json!(0)), "{what}: {tokens}");
        }
    }
}

/// One of two nodes fails every call and is not taken out: the repeats stay within their budget.
#[tokio::test]
async fn an_outage_is_not_multiplied() {
    let (sick, good) = (node("qwen").await, node("qwen").await);
    breaks(&sick, "503");
    let gw = gateway(&[&sick, &good], CALM).await;
    let (gw, body) = (&gw, &chat("hi"));
    let told = at_once(20, (0..200).map(|_| ask(gw, body))).await;
    let asked = sick.requests().len() + good.requests().len();
    assert!(asked <= 200 + 40 + 10, "{} extra requests", asked - 200);
    for told in &told {
        if told.status() == 200 {
            is_whole(told, body);
        } else {
            is_error(told, 502, "upstream_error");
        }
    }
    let whole = told.iter().filter(|told| told.status() == 200).count();
    assert_eq!(whole, good.requests().len());
    is_clean(gw).await;
}

/// The same with the node being taken out: nobody sees anything of it.
#[tokio::test]
async fn a_bad_node_of_two_costs_no_call() {
    for what in ["503", "refuse", "429:retry-after=1", "429"] {
        let (sick, good) = (node("qwen").await, node("qwen").await);
        breaks(&sick, what);
        let gw = gateway(&[&sick, &good], "eject: { after: 3, for: 10s }").await;
        let (gw, body) = (&gw, &chat_stream("hi"));
        let told = at_once(4, (0..200).map(|_| ask(gw, body))).await;
        told.iter().for_each(|told| is_whole(told, body));
        assert!(sick.requests().len() <= 10, "{what}: {} requests", sick.requests().len());
        assert_eq!(good.requests().len(), 200, "{what}");
    }
}

async fn pauses(more: &str) -> Vec<Vec<Duration>> {
    let mut pauses = Vec::new();
    for body in both().iter().cycle().take(4) {
        let near = node("qwen").await;
        breaks(&near, "500");
        let conf = Conf::new()
            .upstream("near", &[near.url()], CALM)
            .model("chat", &[("near", "qwen")], &format!("retry: {{ attempts: 5, backoff: 100ms{more} }}"))
            .llm();
        let gw = Gateway::with(&conf).await;
        let since = Instant::now();
        let told = ask(&gw, body).await;
        is_error(&told, 502, "upstream_error");
        attempts_told(&told, 5);
        pauses.push(gaps(&seen(&near, since)));
    }
    pauses
}

#[tokio::test]
async fn without_jitter_waits_double() {
    for waits in pauses(", jitter: false").await {
        are_about(&waits, &[ms(100), ms(200), ms(400), ms(800)]);
    }
}

/// With it they lie anywhere in that span, and not always at the same place.
#[tokio::test]
async fn jitter_spreads_waits_over_their_span() {
    let all = pauses("").await;
    for waits in &all {
        assert_eq!(waits.len(), 4);
        for (wait, span) in waits.iter().zip([100, 200, 400, 800]) {
            assert!(*wait <= ms(span) + ms(300), "{waits:?}");
        }
    }
    let sums: Vec<Duration> = all.iter().map(|waits| waits.iter().sum()).collect();
    // Without jitter each would be 1.5 s; that four random ones all are is as likely as one in many thousands.
    assert!(sums.iter().any(|sum| *sum < ms(1400)), "{sums:?}");
    assert!(sums.iter().any(|sum| *sum != sums[0]), "{sums:?}");
}
