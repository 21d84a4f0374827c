//! An upstream that answers 429.

use std::time::Instant;

use super::*;
use crate::harness::node;

/// One node that limits once, and what the wait for it was.
async fn once(answer: &str, wait: Duration) {
    for body in both() {
        let near = node("qwen").await;
        breaks_once(&near, answer);
        let gw = gateway(&[&near], CALM).await;
        let since = Instant::now();
        let told = ask(&gw, &body).await;
        is_whole(&told, &body);
        attempts_told(&told, 2);
        assert!(told.took + ms(20) >= wait, "took {:?}", told.took);
        are_about(&gaps(&seen(&near, since)), &[wait]);
        is_clean(&gw).await;
    }
}

/// One node that always limits: the waits between the attempts, and what the client is told.
async fn for_ever(answer: &str, waits: &[Duration], told: &str) {
    for body in both() {
        let near = node("qwen").await;
        breaks(&near, answer);
        let gw = gateway(&[&near], CALM).await;
        let since = Instant::now();
        let refused = ask(&gw, &body).await;
        is_error(&refused, 429, "upstream_rate_limited");
        attempts_told(&refused, waits.len() + 1);
        assert_eq!(refused.header("retry-after"), told, "{answer}");
        assert!(refused.took <= waits.iter().sum::<Duration>() + SLACK, "took {:?}", refused.took);
        are_about(&gaps(&seen(&near, since)), waits);
        assert!(near.stats().total_connections <= waits.len().max(1) as u64, "each refusal costs a connection");
        is_clean(&gw).await;
    }
}

#[tokio::test]
async fn a_short_retry_after_is_waited_for_where_there_is_nothing_else() {
    once("429:retry-after=1", ms(1000)).await;
}

#[tokio::test]
async fn a_short_retry_after_for_ever_ends_with_the_attempts() {
    for_ever("429:retry-after=1", &[ms(1000), ms(1000)], "1").await;
}

#[tokio::test]
async fn a_long_retry_after_is_told_and_not_waited_for() {
    for_ever("429:retry-after=30", &[], "30").await;
}

#[tokio::test]
async fn retry_after_in_milliseconds_is_waited_for_exactly() {
    once("429:retry-after=9,header:retry-after-ms=250", ms(250)).await;
    for_ever("429,header:retry-after-ms=2500", &[], "3").await;
}

#[tokio::test]
async fn the_reset_of_a_rate_that_is_used_up_is_waited_for() {
    let used_up = "header:x-ratelimit-remaining-requests=0,header:x-ratelimit-reset-requests";
    once(&format!("429,{used_up}=350ms"), ms(350)).await;
    for_ever(&format!("429,{used_up}=1m5s"), &[], "65").await;
}

#[tokio::test]
async fn without_a_time_the_backoff_is_waited_for() {
    once("429", Duration::ZERO).await;
    for body in both() {
        let near = node("qwen").await;
        breaks(&near, "429");
        let gw = gateway(&[&near], CALM).await;
        let since = Instant::now();
        let refused = ask(&gw, &body).await;
        is_error(&refused, 429, "upstream_rate_limited");
        attempts_told(&refused, 3);
        are_about(&gaps(&seen(&near, since)), &[Duration::ZERO, Duration::ZERO]);
        assert!(near.stats().total_connections < 3, "each refusal costs a connection");
        is_clean(&gw).await;
    }
}

/// However short the wait would be: another node is asked at once, and the one that limited is left alone for its time.
#[tokio::test]
async fn where_there_is_another_node_nothing_is_waited_for() {
    for body in both() {
        let (one, two) = (node("qwen").await, node("qwen").await);
        breaks(&one, "429:retry-after=1");
        let gw = gateway(&[&one, &two], CALM).await;
        let since = Instant::now();
        for _ in 0..4 {
            let told = ask(&gw, &body).await;
            is_whole(&told, &body);
            assert!(told.took < SLACK, "took {:?}", told.took);
        }
        assert!(since.elapsed() < ms(1000), "too slow to tell anything");
        assert_eq!((one.requests().len(), two.requests().len()), (1, 4));
        // Its rest over, one call tries it.
        one.set_fault(None);
        tokio::time::sleep_until((since + ms(2100)).into()).await;
        for _ in 0..4 {
            is_whole(&ask(&gw, &body).await, &body);
        }
        assert_eq!((one.requests().len(), two.requests().len()), (3, 6));
    }
}

/// A target that takes calls after 429 comes before any wait; and the soonest of several times is told.
#[tokio::test]
async fn the_next_target_comes_before_a_wait() {
    for body in both() {
        let (near, far) = (node("small").await, node("large").await);
        breaks(&near, "429:retry-after=1");
        let conf = Conf::new()
            .upstream("near", &[near.url()], CALM)
            .upstream("far", &[far.url()], CALM)
            .model("chat", &[("near", "small"), ("far", "large")], RETRY)
            .llm();
        let gw = Gateway::with(&conf).await;
        let told = ask(&gw, &body).await;
        is_whole(&told, &body);
        assert!(told.took < SLACK);
        assert_eq!((near.requests().len(), far.requests().len()), (1, 1));
        breaks(&far, "429:retry-after=40");
        tokio::time::sleep(ms(1100)).await;
        breaks(&near, "429:retry-after=50");
        let refused = ask(&gw, &body).await;
        is_error(&refused, 429, "upstream_rate_limited");
        assert_eq!(refused.header("retry-after"), "40");
        assert_eq!((near.requests().len(), far.requests().len()), (2, 2));
    }
}
