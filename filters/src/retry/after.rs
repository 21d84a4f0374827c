//! When an upstream that refused says it may be asked again.

use std::time::{Duration, SystemTime};

use http::HeaderMap;

/// Nobody is taken at his word for longer.
const LONGEST: f64 = 86_400.0;

/// `retry-after-ms`, else `retry-after` in seconds or as a date, else the reset of whichever of the provider's rates is
/// used up (`x-ratelimit-reset-*` beside a remaining 0). At most a day.
pub fn retry_after(headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok()).map(str::trim);
    if let Some(ms) = text("retry-after-ms").and_then(number) {
        return Some(seconds(ms / 1000.0));
    }
    if let Some(after) = text("retry-after") {
        return number(after).map(seconds).or_else(|| date(after, now));
    }
    let rates = ["requests", "tokens", "input-tokens", "output-tokens"];
    let resets = rates.iter().flat_map(|rate| {
        [
            (format!("x-ratelimit-remaining-{rate}"), format!("x-ratelimit-reset-{rate}")),
            (format!("anthropic-ratelimit-{rate}-remaining"), format!("anthropic-ratelimit-{rate}-reset")),
        ]
    });
    let used_up = resets.filter(|(remaining, _)| text(remaining).and_then(number).is_some_and(|left| left < 1.0));
    used_up.filter_map(|(_, reset)| text(&reset).and_then(|reset| moment(reset, now))).max()
}

fn number(text: &str) -> Option<f64> {
    text.parse::<f64>().ok().filter(|n| n.is_finite() && *n >= 0.0)
}

fn seconds(n: f64) -> Duration {
    Duration::from_secs_f64(n.clamp(0.0, LONGEST))
}

fn date(text: &str, now: SystemTime) -> Option<Duration> {
    let date = httpdate::parse_http_date(text).ok()?;
    Some(seconds(date.duration_since(now).unwrap_or_default().as_secs_f64()))
}

/// A reset as providers write it: a span like `6m0s` or `350ms`, seconds, or a point in time.
fn moment(text: &str, now: SystemTime) -> Option<Duration> {
    // So many seconds are a point in time since 1970.
    if let Some(n) = number(text) {
        let now = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        return Some(seconds(if n > 1e9 { n - now } else { n }));
    }
    span(text).map(seconds).or_else(|| {
        let point = time::OffsetDateTime::parse(text, &time::format_description::well_known::Rfc3339).ok()?;
        Some(seconds(SystemTime::from(point).duration_since(now).unwrap_or_default().as_secs_f64()))
    })
}

fn span(text: &str) -> Option<f64> {
    let mut sum = 0.0;
    let mut rest = text;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (value, unit) = rest.split_at_checked(digits)?;
        let end = unit.find(|c: char| !c.is_ascii_lowercase()).unwrap_or(unit.len());
        let (unit, tail) = unit.split_at_checked(end)?;
        let each = match unit {
            "d" => 86_400.0,
            "h" => 3_600.0,
            "m" => 60.0,
            "s" => 1.0,
            "ms" => 1e-3,
            _ => return None,
        };
        sum += number(value)? * each;
        rest = tail;
    }
    (!text.is_empty()).then_some(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(pairs: &[(&'static str, &str)]) -> Option<Duration> {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.insert(*name, value.parse().unwrap());
        }
        retry_after(&headers, SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000))
    }

    const fn ms(n: u64) -> Option<Duration> {
        Some(Duration::from_millis(n))
    }

    #[test]
    fn milliseconds_win_over_seconds_and_dates_are_read() {
        assert_eq!(after(&[("retry-after", "3"), ("retry-after-ms", "250")]), ms(250));
        assert_eq!(after(&[("retry-after", "1.5")]), ms(1500));
        assert_eq!(after(&[("retry-after", "Thu, 01 Jan 1970 00:00:00 GMT")]), ms(0));
        assert_eq!(after(&[("retry-after", "Fri, 15 Jan 2027 08:00:30 GMT")]), ms(30_000));
        assert_eq!(after(&[("retry-after", "-3")]), None);
        assert_eq!(after(&[("retry-after", "1e300")]), ms(86_400_000));
        assert_eq!(after(&[]), None);
    }

    #[test]
    fn the_reset_of_a_rate_that_is_used_up_counts_and_others_do_not() {
        let both = |requests: &'static str, tokens: &'static str| {
            after(&[
                ("x-ratelimit-remaining-requests", requests),
                ("x-ratelimit-reset-requests", "1s"),
                ("x-ratelimit-remaining-tokens", tokens),
                ("x-ratelimit-reset-tokens", "6m0.5s"),
            ])
        };
        assert_eq!(both("0", "10"), ms(1000));
        assert_eq!(both("0", "0"), ms(360_500));
        assert_eq!(both("5", "10"), None);
    }

    #[test]
    fn resets_are_read_in_every_form_that_providers_use() {
        let reset =
            |text: &str| after(&[("x-ratelimit-remaining-requests", "0"), ("x-ratelimit-reset-requests", text)]);
        assert_eq!(reset("120ms"), ms(120));
        assert_eq!(reset("23h47m"), ms(85_620_000));
        assert_eq!(reset("7"), ms(7000));
        assert_eq!(reset("1800000012"), ms(12_000));
        assert_eq!(reset("2027-01-15T08:00:09Z"), ms(9000));
        assert_eq!(reset("soon"), None);
        let theirs = [
            ("anthropic-ratelimit-tokens-remaining", "0"),
            ("anthropic-ratelimit-tokens-reset", "2027-01-15T08:00:02Z"),
        ];
        assert_eq!(after(&theirs), ms(2000));
    }
}
