//! What the limits tell a client in response headers.

use std::fmt::Write as _;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderName, HeaderValue};
use smallvec::SmallVec;

use super::dimension::{Unit, Window};
use super::rule::window_secs;
use super::standing::{Standing, Standings};
use crate::error::{LimitKind, Refusal};

/// Headers to set on a response.
pub type HeaderList = SmallVec<[(HeaderName, HeaderValue); 12]>;

/// From this wait on a client that retries at once, as the SDKs do, only wastes its tries.
const POINTLESS: Duration = Duration::from_secs(120);

/// The names of one unit in OpenAI's form.
struct Names {
    limit: HeaderName,
    remaining: HeaderName,
    reset: HeaderName,
}

fn names(unit: Unit) -> Names {
    let of = HeaderName::from_static;
    match unit {
        Unit::Requests => Names {
            limit: of("x-ratelimit-limit-requests"),
            remaining: of("x-ratelimit-remaining-requests"),
            reset: of("x-ratelimit-reset-requests"),
        },
        Unit::Tokens => Names {
            limit: of("x-ratelimit-limit-tokens"),
            remaining: of("x-ratelimit-remaining-tokens"),
            reset: of("x-ratelimit-reset-tokens"),
        },
    }
}

/// The headers for every answer to a limited call, streams and errors too. Shadow rules are not shown: they bind nobody.
pub fn standing_headers(standings: &Standings) -> HeaderList {
    let mut list = HeaderList::new();
    for unit in [Unit::Requests, Unit::Tokens] {
        if let Some(tightest) = tightest(standings, unit) {
            let names = names(unit);
            list.push((names.limit, HeaderValue::from(tightest.rule().limit)));
            list.push((names.remaining, HeaderValue::from(tightest.remaining())));
            push_text(&mut list, names.reset, openai_duration(tightest.resets_in()));
        }
    }
    let (policy, state) = structured(standings);
    if !policy.is_empty() {
        push_text(&mut list, HeaderName::from_static("ratelimit-policy"), policy);
        push_text(&mut list, HeaderName::from_static("ratelimit"), state);
    }
    list
}

/// The headers that a refusal has beside those of [`standing_headers`].
pub fn refusal_headers(refusal: &Refusal) -> HeaderList {
    let mut list = HeaderList::new();
    if let Some(wait) = refusal.wait {
        list.push((HeaderName::from_static("retry-after"), HeaderValue::from(seconds(wait))));
        list.push((HeaderName::from_static("retry-after-ms"), HeaderValue::from(millis(wait))));
    }
    if refusal.kind == LimitKind::Quota || refusal.wait.is_none_or(|wait| wait > POINTLESS) {
        list.push((HeaderName::from_static("x-should-retry"), HeaderValue::from_static("false")));
    }
    list
}

/// The rule that refused, else the one with the least left; of equals the one that takes longest to come back.
/// Concurrency is no rate: it shows in `RateLimit` only.
fn tightest(standings: &Standings, unit: Unit) -> Option<Standing<'_>> {
    let fits = |standing: &Standing<'_>| {
        let rule = standing.rule();
        !rule.shadow && rule.dimension.unit() == unit && rule.dimension.window() != Window::Live
    };
    standings.binding().filter(fits).or_else(|| {
        let rank = |standing: &Standing<'_>| (standing.remaining(), std::cmp::Reverse(standing.resets_in()));
        standings.iter().filter(fits).min_by_key(rank)
    })
}

/// `RateLimit-Policy` and `RateLimit` as structured-field lists.
fn structured(standings: &Standings) -> (String, String) {
    let mut policy = String::with_capacity(160);
    let mut state = String::with_capacity(160);
    for standing in standings.iter().filter(|standing| !standing.rule().shadow) {
        let rule = standing.rule();
        if !policy.is_empty() {
            policy.push_str(", ");
            state.push_str(", ");
        }
        policy.push_str(rule.policy());
        state.push_str(rule.policy());
        // Writing into a String cannot fail.
        let _ = write!(policy, ";q={}", integer(rule.limit));
        if let Some(secs) = window_secs(rule.dimension.window()) {
            let _ = write!(policy, ";w={secs}");
        }
        if rule.dimension.window() == Window::Live {
            policy.push_str(";qu=\"concurrent-requests\"");
        }
        let _ = write!(state, ";r={}", integer(standing.remaining()));
        let more = standing.more_in();
        if !more.is_zero() {
            let _ = write!(state, ";t={}", seconds(more));
        }
    }
    (policy, state)
}

/// The largest integer that a structured field can hold.
const SF_MAX: u64 = 999_999_999_999_999;

fn integer(n: u64) -> u64 {
    n.min(SF_MAX)
}

/// Whole seconds, rounded up: a client that waits so long is never too early.
pub(super) fn seconds(span: Duration) -> u64 {
    span.as_secs().saturating_add(u64::from(span.subsec_nanos() > 0))
}

fn millis(span: Duration) -> u64 {
    u64::try_from(span.as_nanos().div_ceil(1_000_000)).unwrap_or(u64::MAX)
}

/// A duration as OpenAI writes it: `6m0s`, `1s`, `1.5s`, `12ms`, `23h47m0s`.
fn openai_duration(span: Duration) -> String {
    let ms = millis(span);
    let mut text = String::with_capacity(16);
    if (1..1_000).contains(&ms) {
        let _ = write!(text, "{ms}ms");
        return text;
    }
    let (hours, minutes) = (ms / 3_600_000, ms / 60_000 % 60);
    if hours > 0 {
        let _ = write!(text, "{hours}h");
    }
    if hours > 0 || minutes > 0 {
        let _ = write!(text, "{minutes}m");
    }
    let _ = write!(text, "{}", ms / 1_000 % 60);
    let fraction = ms % 1_000;
    if fraction > 0 {
        let _ = write!(text, ".{fraction:03}");
        text.truncate(text.trim_end_matches('0').len());
    }
    text.push('s');
    text
}

fn push_text(list: &mut HeaderList, name: HeaderName, text: String) {
    if let Ok(value) = HeaderValue::from_maybe_shared(Bytes::from(text)) {
        list.push((name, value));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::error::GatewayError;
    use crate::limit::clock::Instant64;
    use crate::limit::dimension::{Limit, Limits};
    use crate::limit::memory::{MemoryStore, Verdicts};
    use crate::limit::reservation::Estimate;
    use crate::limit::rule::{Plan, RuleSet, Scope};

    fn text(list: &HeaderList) -> Vec<String> {
        list.iter().map(|(name, value)| format!("{name}: {}", value.to_str().unwrap())).collect()
    }

    fn limit(limit: u64) -> Option<Limit> {
        Some(Limit { limit, shadow: false })
    }

    #[test]
    fn durations_are_written_as_openai_writes_them() {
        let show = |ms| openai_duration(Duration::from_millis(ms));
        let expected = [
            (0, "0s"),
            (12, "12ms"),
            (999, "999ms"),
            (1_000, "1s"),
            (1_500, "1.5s"),
            (7_660, "7.66s"),
            (10_000, "10s"),
            (60_000, "1m0s"),
            (360_000, "6m0s"),
            (85_620_000, "23h47m0s"),
            (3_600_000 * 700, "700h0m0s"),
        ];
        for (ms, text) in expected {
            assert_eq!(show(ms), text);
        }
        assert_eq!(openai_duration(Duration::from_micros(1)), "1ms");
        assert_eq!(openai_duration(Duration::from_micros(999_001)), "1s");
    }

    #[test]
    fn an_admitted_call_shows_the_tightest_rule_of_each_unit() {
        let key = Limits {
            requests_per_minute: limit(60),
            requests_per_hour: limit(1_000),
            tokens_per_day: limit(100_000),
            tokens_per_month: limit(200_000),
            concurrency: limit(4),
            ..Limits::default()
        };
        let route = Limits {
            requests_per_second: limit(40),
            requests_per_day: Some(Limit { limit: 2, shadow: true }),
            ..Limits::default()
        };
        let key = Arc::new(RuleSet::new(Scope::Key, "alice", &key));
        let route = Arc::new(RuleSet::new(Scope::Route, "llm", &route));
        let plan: Plan = [&key, &route].into_iter().collect();
        let store = MemoryStore::new(None);
        let noon = Instant64::from_secs(20_000 * 86_400 + 43_200);
        let Verdicts::Admitted { standings, .. } =
            store.reserve(&plan, Estimate { prompt: 40, completion: 60, guessed: false }, noon)
        else {
            panic!("refused")
        };
        assert_eq!(
            text(&standing_headers(&standings)),
            [
                "x-ratelimit-limit-requests: 40",
                "x-ratelimit-remaining-requests: 39",
                "x-ratelimit-reset-requests: 1s",
                "x-ratelimit-limit-tokens: 100000",
                "x-ratelimit-remaining-tokens: 99900",
                "x-ratelimit-reset-tokens: 12h0m0s",
                "ratelimit-policy: \"requests_per_minute\";q=60;w=60, \"requests_per_hour\";q=1000;w=3600, \
                 \"tokens_per_day\";q=100000;w=86400, \"tokens_per_month\";q=200000, \
                 \"concurrency\";q=4;qu=\"concurrent-requests\", \"route:llm:requests_per_second\";q=40;w=1",
                "ratelimit: \"requests_per_minute\";r=59;t=60, \"requests_per_hour\";r=999;t=3600, \
                 \"tokens_per_day\";r=99900;t=43200, \"tokens_per_month\";r=199900;t=2376000, \
                 \"concurrency\";r=3, \"route:llm:requests_per_second\";r=39;t=1",
            ]
        );
    }

    fn refuse(limits: &Limits, prompt: u64, tries: usize) -> (Refusal, Standings) {
        let plan: Plan = [&Arc::new(RuleSet::new(Scope::Key, "alice", limits))].into_iter().collect();
        let store = MemoryStore::new(None);
        let noon = Instant64::from_secs(20_000 * 86_400 + 43_200);
        for _ in 0..tries {
            let estimate = Estimate { prompt, completion: 0, guessed: false };
            if let Verdicts::Refused { refusal, standings } = store.reserve(&plan, estimate, noon) {
                return (refusal, standings);
            }
        }
        panic!("never refused")
    }

    #[test]
    fn a_rate_refusal_says_how_long_to_wait_and_may_be_retried() {
        let limits = Limits { requests_per_minute: limit(2), requests_per_hour: limit(2_000), ..Limits::default() };
        let (refusal, standings) = refuse(&limits, 1, 3);
        assert_eq!(text(&refusal_headers(&refusal)), ["retry-after: 60", "retry-after-ms: 60000"]);
        let shown = text(&standing_headers(&standings));
        assert_eq!(shown[..2], ["x-ratelimit-limit-requests: 2", "x-ratelimit-remaining-requests: 0"]);
    }

    #[test]
    fn a_used_up_day_tells_the_client_not_to_retry() {
        let limits = Limits { tokens_per_minute: limit(10_000), tokens_per_day: limit(150), ..Limits::default() };
        let (refusal, standings) = refuse(&limits, 100, 2);
        assert_eq!(
            text(&refusal_headers(&refusal)),
            ["retry-after: 43200", "retry-after-ms: 43200000", "x-should-retry: false"]
        );
        // The rule that refused is shown although it has something left.
        let shown = text(&standing_headers(&standings));
        assert_eq!(shown[..2], ["x-ratelimit-limit-tokens: 150", "x-ratelimit-remaining-tokens: 50"]);
    }

    #[test]
    fn a_call_that_can_never_be_admitted_has_no_retry_after() {
        let limits = Limits { tokens_per_minute: limit(50), ..Limits::default() };
        let (refusal, _) = refuse(&limits, 100, 1);
        assert_eq!(text(&refusal_headers(&refusal)), ["x-should-retry: false"]);
    }

    #[test]
    fn a_call_that_asks_for_more_than_its_day_is_refused_for_good_as_a_quota() {
        let limits = Limits { tokens_per_day: limit(150), ..Limits::default() };
        let plan: Plan = [&Arc::new(RuleSet::new(Scope::Key, "alice", &limits))].into_iter().collect();
        let estimate = Estimate { prompt: 10, completion: 141, guessed: false };
        let Verdicts::Refused { refusal, .. } = MemoryStore::new(None).reserve(&plan, estimate, Instant64(0)) else {
            panic!("admitted")
        };
        assert_eq!(text(&refusal_headers(&refusal)), ["x-should-retry: false"]);
        assert_eq!(GatewayError::Limited(Box::new(refusal)).face().code, "quota_exceeded");
    }

    #[test]
    fn a_full_house_asks_to_come_back_in_a_second() {
        let (refusal, standings) = refuse(&Limits { concurrency: limit(1), ..Limits::default() }, 1, 2);
        assert_eq!(text(&refusal_headers(&refusal)), ["retry-after: 1", "retry-after-ms: 1000"]);
        assert_eq!(
            text(&standing_headers(&standings)),
            ["ratelimit-policy: \"concurrency\";q=1;qu=\"concurrent-requests\"", "ratelimit: \"concurrency\";r=0"]
        );
    }

    #[test]
    fn a_call_without_limits_has_no_headers() {
        let store = MemoryStore::new(None);
        assert!(standing_headers(&store.query(&Plan::new(), Instant64(0))).is_empty());
    }
}
