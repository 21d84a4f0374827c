use std::collections::{BTreeMap, BTreeSet, HashSet};

use super::*;
use crate::usage::{Usage, UsageSource};

/// The contract with the users, word for word.
const CONTRACT: &str = "tollgate_requests_total{route,model,key,code} · tollgate_request_duration_seconds{route,model} · \
    tollgate_overhead_seconds{route} · tollgate_time_to_first_token_seconds{route,model,upstream} · \
    tollgate_time_per_output_token_seconds{model,upstream} · tollgate_tokens_total{route,model,key,kind} · \
    tollgate_tokens_estimated_total{model,reason} · tollgate_estimate_error_ratio{model} · tollgate_cost_total{model,key,currency} · \
    tollgate_attempts_total{upstream,node,outcome} · tollgate_fallbacks_total{model,from,to,reason} · \
    tollgate_limit_decisions_total{scope,dimension,decision} · tollgate_reservations_inflight · \
    tollgate_node_inflight{upstream,node} · tollgate_node_up{upstream,node} · tollgate_node_ejections_total{upstream,node} · \
    tollgate_queue_waiting{upstream} · tollgate_queue_wait_seconds{upstream} · tollgate_paced_seconds{upstream} · tollgate_alerts_total{result} · \
    tollgate_prefix_hits_total{upstream,node} · tollgate_cache_total{route,result} · tollgate_store_up · \
    tollgate_store_duration_seconds{op} · tollgate_config_generation · tollgate_config_reloads_total{result} · \
    tollgate_config_last_reload_success · tollgate_streams_open · tollgate_client_aborts_total{phase} · \
    tollgate_build_info{version} · tollgate_access_log_dropped_total · tollgate_tokens_lost_total · \
    tollgate_limit_refusals_repeated_total · tollgate_resumes_total{model,result}";

fn contract() -> BTreeMap<String, BTreeSet<String>> {
    CONTRACT
        .split('·')
        .map(|entry| {
            let (name, labels) = entry.trim().split_once('{').unwrap_or((entry.trim(), ""));
            let labels = labels.trim_end_matches('}').split(',').filter(|label| !label.is_empty());
            (name.to_owned(), labels.map(str::to_owned).collect())
        })
        .collect()
}

/// Touches every metric once.
fn exercised() -> Metrics {
    let metrics = Metrics::new("1.2.3").unwrap();
    let route = metrics.route("llm");
    let call = route.call("chat", "alice");
    call.answered(200, Duration::from_millis(12));
    call.settled(&Usage { input: 10, cached_input: 4, output: 7, source: UsageSource::Counted });
    call.estimated(90, 100);
    call.cost(0.25, "USD");
    call.first_token("qwen", Duration::from_millis(40));
    call.per_output_token("qwen", Duration::from_millis(9));
    route.overhead(Duration::from_micros(80));
    route.cache("miss");
    let node = metrics.node("qwen", "http://10.0.0.1:8000");
    node.attempted(Attempted::Ok);
    node.set_inflight(3);
    node.set_up(true);
    node.ejected();
    node.prefix_hit();
    metrics.fallback("chat", "qwen", "openai", Attempted::ServerError);
    metrics.resumed("chat", Resumed::Resumed);
    metrics.limit_decision("key", Dimension::RequestsPerMinute, Decision::Refused);
    metrics.set_reservations(2);
    metrics.set_queue_waiting("near", 1);
    metrics.queue_waited("near", Duration::ZERO);
    metrics.paced("near", Duration::ZERO);
    metrics.alert("sent");
    metrics.set_store_up(true);
    metrics.store_took("reserve", Duration::from_micros(300));
    metrics.set_generation(4);
    metrics.reloaded(true);
    metrics.client_left(AbortPhase::Answer);
    metrics.set_access_dropped(5);
    metrics.set_tokens_lost(7);
    metrics.refused_again();
    metrics
}

/// Splits `name{a="b",c="d"} 1` into its parts.
fn sample(line: &str) -> (String, Vec<(String, String)>, f64) {
    let (series, value) = line.rsplit_once(' ').expect("a value");
    let value: f64 = value.parse().expect("a number");
    let Some((name, rest)) = series.split_once('{') else { return (series.to_owned(), Vec::new(), value) };
    let mut rest = rest.strip_suffix('}').expect("closed labels");
    let mut labels = Vec::new();
    while !rest.is_empty() {
        let (label, tail) = rest.split_once("=\"").expect("a label value in quotes");
        let mut escaped = false;
        let end = tail
            .find(|c| {
                let found = c == '"' && !escaped;
                escaped = c == '\\' && !escaped;
                found
            })
            .expect("a closed label value");
        labels.push((label.trim_start_matches(',').to_owned(), tail[..end].to_owned()));
        rest = &tail[end + 1..];
    }
    (name.to_owned(), labels, value)
}

/// Checks that `text` is a valid exposition, and gives the label names of each family.
fn check(text: &str) -> BTreeMap<String, BTreeSet<String>> {
    let mut families: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    let (mut helped, mut series, mut current, mut kind) = (String::new(), HashSet::new(), String::new(), String::new());
    for line in text.lines() {
        if let Some(help) = line.strip_prefix("# HELP ") {
            let (name, help) = help.split_once(' ').expect("a help text");
            assert!(!help.trim().is_empty() && !families.contains_key(name), "{line}");
            helped = name.to_owned();
        } else if let Some(typed) = line.strip_prefix("# TYPE ") {
            let (name, of) = typed.split_once(' ').expect("a type");
            assert_eq!(name, helped, "TYPE follows HELP");
            assert!(["counter", "gauge", "histogram"].contains(&of), "{line}");
            assert_eq!(of == "counter", name.ends_with("_total"), "{line}");
            assert!(families.insert(name.to_owned(), BTreeSet::new()).is_none(), "{name} is there twice");
            (current, kind) = (name.to_owned(), of.to_owned());
        } else {
            let (name, labels, value) = sample(line);
            let suffix = name.strip_prefix(&current).expect("a sample below its own TYPE");
            assert!(value.is_finite() && (kind == "gauge" || value >= 0.0), "{line}");
            assert!(
                if kind == "histogram" { ["_bucket", "_sum", "_count"].contains(&suffix) } else { suffix.is_empty() },
                "{line}"
            );
            assert!(series.insert(line.rsplit_once(' ').unwrap().0.to_owned()), "twice: {line}");
            let names = labels.into_iter().map(|(label, _)| label).filter(|label| label != "le");
            families.get_mut(&current).unwrap().extend(names);
        }
    }
    families
}

#[test]
fn every_metric_of_the_contract_is_there_with_exactly_its_labels() {
    let listed: BTreeMap<String, BTreeSet<String>> = LIST
        .iter()
        .map(|(name, labels, _)| ((*name).to_owned(), labels.iter().map(|&l| l.to_owned()).collect()))
        .collect();
    assert_eq!(listed, contract());
    assert_eq!(check(&exercised().render()), contract());
}

#[test]
fn a_label_value_with_quotes_and_line_breaks_keeps_the_exposition_valid() {
    let metrics = Metrics::new("1").unwrap();
    metrics.route("a\"b\\c\nd").call("m", "k").answered(200, Duration::ZERO);
    check(&metrics.render());
    assert!(metrics.render().contains(r#"route="a\"b\\c\nd",model="m",key="k",code="200"} 1"#));
}

#[test]
fn requests_are_counted_by_route_model_key_and_status() {
    let metrics = Metrics::new("1").unwrap();
    let call = metrics.route("llm").call("chat", "alice");
    call.answered(200, Duration::from_millis(1));
    call.answered(429, Duration::from_millis(1));
    metrics.route("llm").call("chat", "alice").answered(200, Duration::from_millis(1));
    metrics.route("llm").call("", "").answered(700, Duration::from_millis(1));
    let text = metrics.render();
    assert!(text.contains(r#"tollgate_requests_total{route="llm",model="chat",key="alice",code="200"} 2"#), "{text}");
    assert!(text.contains(r#"tollgate_requests_total{route="llm",model="chat",key="alice",code="429"} 1"#));
    assert!(text.contains(r#"tollgate_requests_total{route="llm",model="-",key="-",code="other"} 1"#));
    assert!(text.contains(r#"tollgate_request_duration_seconds_count{route="llm",model="chat"} 3"#));
}

#[test]
fn keys_beyond_the_cap_share_one_series_and_lose_no_count() {
    let metrics = Metrics::with_key_cap("1", 2).unwrap();
    let route = metrics.route("llm");
    for key in ["a", "b", "c", "d", "a", "c"] {
        route.call("chat", key).answered(200, Duration::ZERO);
    }
    let text = metrics.render();
    for (key, count) in [("a", 2), ("b", 1), ("other", 3)] {
        let line = format!(r#"{{route="llm",model="chat",key="{key}",code="200"}} {count}"#);
        assert!(text.contains(&line), "{line} is not in {text}");
    }
    assert!(!text.contains(r#"key="c""#));
}

#[test]
fn only_tokens_that_the_upstream_did_not_tell_count_as_estimated() {
    let metrics = Metrics::new("1").unwrap();
    let call = metrics.route("llm").call("chat", "alice");
    call.settled(&Usage { input: 10, cached_input: 4, output: 7, source: UsageSource::Upstream });
    assert!(!metrics.render().contains("tollgate_tokens_estimated_total"));
    call.settled(&Usage { input: 1, cached_input: 0, output: 2, source: UsageSource::Estimated });
    let text = metrics.render();
    assert!(text.contains(r#"tollgate_tokens_estimated_total{model="chat",reason="estimated"} 3"#), "{text}");
    for (kind, tokens) in [("input", 11), ("output", 9), ("cached", 4)] {
        assert!(text.contains(&format!(r#"{{route="llm",model="chat",key="alice",kind="{kind}"}} {tokens}"#)));
    }
}

#[test]
fn an_impossible_cost_is_ignored() {
    let metrics = Metrics::new("1").unwrap();
    let call = metrics.route("llm").call("chat", "alice");
    for amount in [f64::NAN, -1.0, f64::INFINITY, 0.5] {
        call.cost(amount, "EUR");
    }
    assert!(metrics.render().contains(r#"tollgate_cost_total{model="chat",key="alice",currency="EUR"} 0.5"#));
}

#[test]
fn a_stream_is_open_until_it_is_dropped() {
    let metrics = Metrics::new("1").unwrap();
    let open = [metrics.open_stream(), metrics.open_stream()];
    assert!(metrics.render().contains("tollgate_streams_open 2"));
    drop(open);
    assert!(metrics.render().contains("tollgate_streams_open 0"));
}

#[test]
fn gauges_of_removed_nodes_vanish_and_their_counters_stay() {
    let metrics = Metrics::new("1").unwrap();
    for node in ["a:1", "b:1"] {
        metrics.node("qwen", node).attempted(Attempted::Connect);
    }
    metrics.retain_nodes(|_, node| node == "b:1");
    let text = metrics.render();
    assert!(!text.contains(r#"tollgate_node_up{upstream="qwen",node="a:1"}"#));
    assert!(text.contains(r#"tollgate_node_up{upstream="qwen",node="b:1"}"#));
    assert!(text.contains(r#"tollgate_attempts_total{upstream="qwen",node="a:1",outcome="connect"} 1"#));
}

#[test]
fn dropped_access_lines_are_told_as_a_total() {
    let metrics = Metrics::new("1").unwrap();
    for total in [3, 3, 7, 2] {
        metrics.set_access_dropped(total);
    }
    assert!(metrics.render().contains("tollgate_access_log_dropped_total 7"));
}

#[test]
fn a_failed_reload_shows_until_one_succeeds() {
    let metrics = Metrics::new("1").unwrap();
    metrics.reloaded(false);
    assert!(metrics.render().contains("tollgate_config_last_reload_success 0"));
    metrics.reloaded(true);
    let text = metrics.render();
    assert!(text.contains("tollgate_config_last_reload_success 1"));
    assert!(text.contains(r#"tollgate_config_reloads_total{result="failure"} 1"#));
}
