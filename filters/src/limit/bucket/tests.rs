use super::*;

const SECOND: i64 = 1_000;

const fn grant(requests: u64, pace_above: f64) -> Grant {
    Grant { requests: Some(requests), tokens: None, pace_above }
}

fn ask(wait: u64) -> Draw {
    Draw { requests: 1, wait: Duration::from_secs(wait), ..Draw::default() }
}

#[test]
fn below_the_share_calls_go_out_at_once_and_above_it_as_fast_as_the_bucket_refills() {
    let grant = grant(60, 0.9);
    let mut bucket = Bucket::full(grant, 0);
    let delays: Vec<u64> =
        (0..60).map(|_| bucket.draw(grant, &ask(5), 0)).filter(|d| d.granted).map(|d| d.delay.as_secs()).collect();
    // 54 at once, then one a second for as long as calls wait.
    assert_eq!(delays[..54], [0; 54]);
    assert_eq!(delays[54..], [1, 2, 3, 4, 5]);
    // Nothing changes by asking for more than there is; a second later there is room for one more.
    let refused = bucket.draw(grant, &ask(5), 0);
    assert_eq!(refused, Drawn { granted: false, delay: Duration::from_secs(6) });
    assert_eq!(bucket.draw(grant, &ask(5), SECOND), Drawn { granted: true, delay: Duration::from_secs(5) });
}

/// Whatever is asked and when: what goes out up to any time is no more than a minute's grant and what was refilled since.
#[test]
fn no_more_goes_out_than_the_grant() {
    for (pace, wait) in [(0.0, 60), (0.5, 5), (0.85, 5), (1.0, 5), (1.0, 0)] {
        let grant = Grant { requests: None, tokens: Some(6_000), pace_above: pace };
        let mut bucket = Bucket::full(grant, 0);
        let mut sent: Vec<(i64, i64)> = Vec::new();
        let mut random = 7_u64;
        for step in 0..3_000_i64 {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let tokens = (random >> 33) % 400;
            let now = step * 100;
            let draw = Draw { requests: 1, tokens, wait: Duration::from_secs(wait), ..Draw::default() };
            let drawn = bucket.draw(grant, &draw, now);
            if drawn.granted {
                sent.push((now + i64::try_from(drawn.delay.as_millis()).unwrap(), tokens.cast_signed()));
            }
        }
        sent.sort_unstable();
        let mut used = 0;
        for (at, tokens) in &sent {
            used += tokens;
            // A millisecond's refill may be rounded.
            assert!(used <= 6_000 + at / 10 + 1, "{pace}: {used} at {at}");
        }
        let unspread = (6_000.0 * pace) as i64;
        assert!(used >= unspread + 300 * 100 - 1_500, "{pace}: the grant is used: {used}");
    }
}

#[test]
fn requests_and_tokens_are_drawn_together_or_not_at_all() {
    let grant = Grant { requests: Some(10), tokens: Some(1_000), pace_above: 1.0 };
    let mut bucket = Bucket::full(grant, 0);
    let draw = |tokens| Draw { requests: 1, tokens, ..Draw::default() };
    assert!(bucket.draw(grant, &draw(900), 0).granted);
    let before = bucket;
    assert_eq!(bucket.draw(grant, &draw(200), 0), Drawn { granted: false, delay: Duration::from_secs(6) });
    assert_eq!(bucket, before);
    assert!(bucket.draw(grant, &draw(100), 0).granted);
}

#[test]
fn what_was_not_used_is_given_back_and_what_was_used_beyond_is_owed() {
    let grant = Grant { requests: None, tokens: Some(1_000), pace_above: 1.0 };
    let mut bucket = Bucket::full(grant, 0);
    let draw = |tokens| Draw { requests: 1, tokens, ..Draw::default() };
    assert!(bucket.draw(grant, &draw(1_000), 0).granted);
    bucket.give(grant, 0, 400);
    assert!(bucket.draw(grant, &draw(400), 0).granted);
    bucket.give(grant, 0, -500);
    assert_eq!(bucket.draw(grant, &draw(1), 0).delay, Duration::from_millis(501 * 60));
    bucket.give(grant, 0, i64::MAX);
    assert_eq!(bucket, Bucket::full(grant, 0), "never more than full");
}

#[test]
fn a_call_larger_than_the_grant_goes_out_when_the_bucket_is_full() {
    let grant = Grant { requests: None, tokens: Some(1_000), pace_above: 0.5 };
    let mut bucket = Bucket::full(grant, 0);
    let huge = Draw { requests: 1, tokens: u64::MAX, ..Draw::default() };
    assert_eq!(bucket.draw(grant, &huge, 0), Drawn { granted: true, delay: Duration::ZERO });
    assert!(!bucket.draw(grant, &huge, 59 * SECOND).granted);
    assert!(bucket.draw(grant, &huge, 60 * SECOND).granted);
}

#[test]
fn a_clock_that_steps_back_refills_nothing() {
    let grant = grant(60, 1.0);
    let mut bucket = Bucket::full(grant, 100 * SECOND);
    assert!((0..60).all(|_| bucket.draw(grant, &ask(0), 100 * SECOND).granted));
    assert!(!bucket.draw(grant, &ask(0), 40 * SECOND).granted);
    assert!(!bucket.draw(grant, &ask(0), 100 * SECOND).granted);
    assert!(bucket.draw(grant, &ask(0), 101 * SECOND).granted);
}

#[test]
fn parts_of_a_grant_add_up_to_no_more_than_it() {
    let grant = Grant { requests: Some(10), tokens: Some(2), pace_above: 1.0 };
    assert_eq!(grant.part(3).requests, Some(3));
    let none = grant.part(3);
    let mut bucket = Bucket::full(none, 0);
    let one = Draw { requests: 1, tokens: 1, wait: Duration::from_secs(5), ..Draw::default() };
    assert!(!bucket.draw(none, &one, 0).granted);
}
