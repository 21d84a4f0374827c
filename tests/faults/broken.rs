//! Answers that break off after their first token, and plain ones that break off at all.

use super::*;
use crate::harness::node;

fn long(stream: bool) -> Value {
    let mut body = if stream { chat_stream("hi") } else { chat("hi") };
    body["max_tokens"] = 60.into();
    body
}

/// A stream that breaks after so many tokens: the client has these, then one error event, and no end.
async fn breaks_after(what: &str, tokens: usize, code: &str, http2: bool) {
    let (sick, other) = (node("qwen").await, node("qwen").await);
    breaks(&sick, what);
    breaks(&other, what);
    let gw = gateway(&[&sick, &other], "timeouts: { between_tokens: 400ms }, eject: off").await;
    let request = gw.post(PATH).key(WENDY).json(&long(true));
    let answer = if http2 { request.http2() } else { request }.send().await.expect(200);
    assert!(!answer.clean(), "an answer that broke off must not look whole");
    attempts_told(&answer, 1);
    let events = answer.events();
    assert_eq!(events.iter().filter(|event| event.delta().is_some()).count(), tokens);
    let (last, before) = events.split_last().expect("events");
    assert_eq!(last.json()["error"]["code"], code, "{}", last.data);
    assert!(before.iter().all(|event| event.data != "[DONE]" && event.json()["error"].is_null()));
    assert_eq!(sick.requests().len() + other.requests().len(), 1, "what the client has seen is not begun anew");
    for node in [&sick, &other] {
        for seen in ended(node).await {
            let expected = if what.starts_with("cut") { Ending::Broken } else { Ending::Abandoned };
            assert_eq!(how(&seen), expected);
        }
    }
    if what.starts_with("stall") {
        are_about(&[answer.took], &[ms(400)]);
    }
    is_clean(&gw).await;
    // What was sent is charged.
    let line = gw.logged(answer.header("x-request-id")).await;
    assert_eq!((&line["output_tokens"], &line["code"]), (&tokens.into(), &code.into()), "{line}");
}

#[tokio::test]
async fn a_stream_cut_at_token_40_of_60() {
    breaks_after("cut:40", 40, "upstream_error", false).await;
    breaks_after("cut:40", 40, "upstream_error", true).await;
}

#[tokio::test]
async fn a_stream_that_stalls_after_20_tokens() {
    breaks_after("stall:20", 20, "upstream_timeout", false).await;
    breaks_after("stall:20", 20, "upstream_timeout", true).await;
}

/// Of a plain answer the client has seen nothing when it breaks: another node gives it whole.
#[tokio::test]
async fn a_plain_answer_that_breaks_off_or_stalls() {
    for (what, wait, status, code) in [("cut:40", 0, 502, "upstream_error"), ("stall:20", 700, 504, "upstream_timeout")]
    {
        let (sick, good) = (node("qwen").await, node("qwen").await);
        breaks(&sick, what);
        let gw = gateway(&[&sick, &good], QUICK).await;
        for _ in 0..2 {
            let since = std::time::Instant::now();
            let told = ask(&gw, &long(false)).await;
            is_whole(&told, &long(false));
            if let (Some(first), Some(second)) = (seen(&sick, since).first(), seen(&good, since).first()) {
                are_about(&[*second - *first], &[ms(wait)]);
            }
        }
        assert_eq!((sick.requests().len(), good.requests().len()), (1, 2), "{what}");
        breaks(&good, what);
        let refused = ask(&gw, &long(false)).await;
        is_error(&refused, status, code);
        is_clean(&gw).await;
    }
}

/// The node of an answer that broke off is at fault: after some of these it is taken out.
#[tokio::test]
async fn breaking_off_counts_against_the_node() {
    let (sick, good) = (node("qwen").await, node("qwen").await);
    breaks(&sick, "cut:3");
    let gw = gateway(&[&sick, &good], "eject: { after: 2, for: 30s }").await;
    for _ in 0..4 {
        ask(&gw, &long(true)).await.expect(200);
    }
    assert_eq!(sick.requests().len(), 2);
    for _ in 0..4 {
        assert!(ask(&gw, &long(true)).await.clean());
    }
    assert_eq!((sick.requests().len(), good.requests().len()), (2, 6));
    gw.settles("tollgate_attempts_total", &[("outcome", "broken")], 2.0).await;
    gw.settles("tollgate_node_ejections_total", &[], 1.0).await;
}
