use std::sync::atomic::AtomicUsize;

use super::*;
use crate::balance::Policy;
use crate::config::Secret;
use crate::limit::{Limits, RuleSet, Scope};
use crate::model::Retry;
use crate::upstream::{Eject, Pool, Timeouts};

const SECOND: Duration = Duration::from_secs(1);
const PERIOD: Timeouts = Timeouts {
    connect: SECOND,
    first_byte: SECOND,
    first_token: SECOND,
    between_tokens: SECOND,
    total: Duration::from_secs(60),
};

fn node(name: String) -> Arc<Node> {
    Arc::new(Node {
        host: name.as_str().into(),
        port: 80,
        tls: false,
        authority: name.as_str().into(),
        prefix: "".into(),
        weight: 1,
        seed: balance::session_mark(&name),
        addresses: arc_swap::ArcSwap::from_pointee(Vec::new()),
        state: Arc::default(),
        name: name.into(),
    })
}

fn upstream(name: &str, nodes: usize, credentials: usize) -> Upstream {
    let credential = |n: usize| Credential {
        label: format!("{name}#{n}").into(),
        secret: Secret::new("sk"),
        weight: 1,
        state: Arc::default(),
    };
    Upstream {
        name: name.into(),
        dialect: Dialect::Openai,
        continuous_usage: false,
        policy: Policy::RoundRobin,
        nodes: (0..nodes).map(|n| node(format!("{name}-{n}"))).collect(),
        credentials: (0..credentials).map(credential).collect(),
        timeouts: PERIOD,
        pool: Pool { idle: SECOND, concurrency: None },
        eject: Some(Eject { after: 3, period: 10 * SECOND, max_ratio: 0.5 }),
        cooldown: 60 * SECOND,
        extra: Arc::default(),
        queue: Arc::default(),
        budget: None,
        turn: AtomicUsize::new(0),
        credential_turn: AtomicUsize::new(0),
    }
}

fn target(upstream: Upstream) -> Target {
    Target {
        model: "m".into(),
        upstream: Arc::new(upstream),
        on: Class::DEFAULT.to_vec(),
        tokens: crate::meter::exact::Tokens::of("m"),
        learned: Arc::default(),
        larger_context: false,
        continues: false,
    }
}

fn model(targets: Vec<Target>) -> Arc<Model> {
    Arc::new(Model {
        name: "chat".into(),
        targets,
        retry: Retry { attempts: 4, jitter: false, ..Retry::default() },
        rules: Arc::new(RuleSet::new(Scope::Model, "chat", &Limits::default())),
        price: None,
        resume: None,
        report_requested: false,
    })
}

/// Makes attempts that end as `fate` says, by node name, until one succeeds or none is left. Gives the names of the nodes
/// asked, the waits between, and the error.
fn run(
    model: &Arc<Model>,
    now: Duration,
    fate: impl Fn(&str, usize) -> Option<Failure>,
) -> (Vec<String>, Option<GatewayError>) {
    let mut course = Course::new(Arc::clone(model), now);
    let mut now = now;
    let mut seen = Vec::new();
    loop {
        match course.next(now, Marks::default(), 1.0) {
            Step::Attempt(chosen) => {
                let times = seen.iter().filter(|name| **name == *chosen.node.name).count();
                seen.push(chosen.node.name.to_string());
                let Chosen { index, target, node, credential, probes, .. } = *chosen;
                match fate(&node.name, times) {
                    Some(failure) => {
                        target.upstream.failed(&node, credential.as_ref(), &failure, now);
                        course.failed(index, &node, credential.as_ref(), failure);
                    }
                    None => {
                        target.upstream.succeeded(&node, credential.as_ref());
                        return (seen, None);
                    }
                }
                drop(probes);
            }
            Step::Queue(_) => panic!("no upstream here has a queue"),
            Step::Wait(wait) => {
                now += wait;
                seen.push(format!("{}ms", wait.as_millis()));
            }
            Step::Over(error) => return (seen, Some(error)),
        }
    }
}

fn fails(class: Class) -> Option<Failure> {
    Some(Failure::new(class, ""))
}

fn limited(after: u64) -> Option<Failure> {
    Some(Failure { retry_after: Some(Duration::from_secs(after)), ..Failure::new(Class::RateLimited, "") })
}

#[test]
fn nodes_of_a_target_then_the_next_target_then_the_same_again_after_a_wait() {
    let two = model(vec![target(upstream("a", 2, 0)), target(upstream("b", 1, 0))]);
    let (seen, error) = run(&two, SECOND, |_, _| fails(Class::ServerError));
    assert_eq!(seen, ["a-0", "a-1", "b-0", "100ms", "a-0"]);
    assert_eq!(error, Some(GatewayError::UpstreamError));
}

#[test]
fn a_node_that_stays_silent_is_not_asked_twice() {
    let one = model(vec![target(upstream("a", 1, 0))]);
    let (seen, error) = run(&one, SECOND, |_, _| Some(Failure::silent(Class::Timeout, "")));
    assert_eq!(seen, ["a-0"]);
    assert_eq!(error, Some(GatewayError::UpstreamTimeout));
    let (seen, _) = run(&one, SECOND, |_, times| if times == 0 { fails(Class::ServerError) } else { None });
    assert_eq!(seen, ["a-0", "100ms", "a-0"], "one that speaks is");
}

#[test]
fn a_target_is_tried_only_after_what_it_names() {
    let mut second = target(upstream("b", 1, 0));
    second.on = vec![Class::RateLimited];
    let two = model(vec![target(upstream("a", 1, 0)), second]);
    let (seen, _) = run(&two, SECOND, |_, _| Some(Failure::silent(Class::FirstToken, "")));
    assert_eq!(seen, ["a-0"]);
    let (seen, _) = run(&two, SECOND, |name, _| if name == "a-0" { limited(30) } else { None });
    assert_eq!(seen, ["a-0", "b-0"]);
    // The first rests now: what it said before sends the call on as well.
    let (seen, _) = run(&two, 2 * SECOND, |_, _| None);
    assert_eq!(seen, ["b-0"]);
}

#[test]
fn a_refused_credential_gives_way_to_the_next_on_the_same_node() {
    let one = model(vec![target(upstream("a", 1, 2))]);
    let (seen, error) = run(&one, SECOND, |_, times| if times == 0 { fails(Class::Auth) } else { None });
    assert_eq!((seen.len(), error), (2, None));
    let (seen, error) = run(&one, 2 * SECOND, |_, _| limited(7));
    assert_eq!(seen, ["a-0"], "the other one is still put aside");
    assert_eq!(error, Some(GatewayError::UpstreamRateLimited { retry_after: Some(7 * SECOND) }));
    // The client's next call does not reach the upstream.
    let (seen, error) = run(&one, 3 * SECOND, |_, _| None);
    assert!(seen.is_empty());
    assert_eq!(error, Some(GatewayError::UpstreamRateLimited { retry_after: Some(58 * SECOND) }));
}

#[test]
fn credentials_that_are_all_refused_are_an_error_of_the_upstream() {
    let one = model(vec![target(upstream("a", 1, 2))]);
    for calls in [2, 0] {
        let (seen, error) = run(&one, SECOND, |_, _| fails(Class::Auth));
        assert_eq!((seen.len(), error), (calls, Some(GatewayError::UpstreamError)));
    }
}

#[test]
fn a_short_rate_limit_is_waited_for_where_there_is_nothing_else() {
    let one = model(vec![target(upstream("a", 1, 1))]);
    let (seen, error) = run(&one, SECOND, |_, times| if times == 0 { limited(2) } else { None });
    assert_eq!((seen, error), (vec!["a-0".into(), "2000ms".into(), "a-0".into()], None));
    let (seen, error) = run(&one, 9 * SECOND, |_, _| limited(3));
    assert_eq!(seen, ["a-0"]);
    assert_eq!(error, Some(GatewayError::UpstreamRateLimited { retry_after: Some(3 * SECOND) }));
}

#[test]
fn a_rate_limit_that_names_no_time_is_backed_off_from() {
    let one = model(vec![target(upstream("a", 1, 0))]);
    let (seen, error) = run(&one, SECOND, |_, _| fails(Class::RateLimited));
    assert_eq!(seen, ["a-0", "100ms", "a-0", "200ms", "a-0", "400ms", "a-0"]);
    assert_eq!(error.unwrap().face().code, "upstream_rate_limited");
}

#[test]
fn extra_attempts_stay_within_the_upstreams_budget() {
    let one = model(vec![target(upstream("a", 3, 0))]);
    let mut asked = 0;
    for _ in 0..100 {
        let (seen, _) = run(&one, SECOND, |_, _| Some(Failure::silent(Class::FirstToken, "")));
        asked += seen.len();
    }
    assert_eq!(asked, 100 + 20);
}

#[test]
fn a_node_that_is_out_is_passed_over_and_tried_again_by_one_call() {
    let pair = model(vec![target(upstream("a", 2, 0))]);
    let bad = |name: &str, _: usize| if name == "a-0" { fails(Class::Connect) } else { None };
    for _ in 0..3 {
        run(&pair, SECOND, bad);
    }
    assert_eq!(run(&pair, 2 * SECOND, bad).0, ["a-1"]);
    assert_eq!(run(&pair, 11 * SECOND, bad).0, ["a-0", "a-1"], "its rest is over");
    assert_eq!(run(&pair, 12 * SECOND, bad).0, ["a-1"]);
    assert_eq!(run(&pair, 30 * SECOND, |_, _| None).0, ["a-0"]);
    assert_eq!(run(&pair, 30 * SECOND, |_, _| None).0, ["a-0"]);
}

#[test]
fn where_everything_is_out_the_first_target_is_asked_all_the_same() {
    let alone = model(vec![target(upstream("a", 1, 0))]);
    let two = model(vec![target(upstream("a", 1, 0)), target(upstream("b", 1, 0))]);
    for each in [&alone, &two] {
        for _ in 0..4 {
            run(each, SECOND, |_, _| fails(Class::ServerError));
        }
    }
    assert_eq!(run(&alone, 2 * SECOND, |_, _| None).0, ["a-0"]);
    assert_eq!(run(&two, 2 * SECOND, |_, _| None).0, ["a-0"]);
}

#[test]
fn a_lone_node_that_is_out_is_passed_over_where_there_is_a_further_target() {
    let two = model(vec![target(upstream("a", 1, 0)), target(upstream("b", 1, 0))]);
    let bad = |name: &str, _: usize| if name == "a-0" { fails(Class::ServerError) } else { None };
    for _ in 0..3 {
        assert_eq!(run(&two, SECOND, bad).0, ["a-0", "b-0"]);
    }
    assert_eq!(run(&two, SECOND, bad).0, ["b-0"]);
}

#[test]
fn a_run_of_dify_is_repeated_only_if_it_surely_did_not_begin() {
    let dify = || Upstream { dialect: Dialect::Dify, ..upstream("a", 2, 0) };
    let (seen, _) = run(&model(vec![target(dify())]), SECOND, |_, _| fails(Class::ServerError));
    assert_eq!(seen, ["a-0"]);
    let unprocessed = || Some(Failure { unprocessed: true, ..Failure::new(Class::Connect, "") });
    let (seen, _) = run(&model(vec![target(dify())]), SECOND, |_, _| unprocessed());
    assert_eq!(seen, ["a-0", "a-1", "100ms", "a-0", "200ms", "a-1"]);
}

#[test]
fn a_prompt_that_is_too_long_has_a_taker_where_a_target_takes_longer_ones() {
    let mut large = target(upstream("b", 1, 0));
    large.larger_context = true;
    let two = Course::new(model(vec![target(upstream("a", 1, 0)), large]), SECOND);
    assert!(two.has_taker(0, Class::ContextLength));
    assert!(!two.has_taker(0, Class::ContentFilter) && !two.has_taker(1, Class::ContextLength));
}

#[test]
fn full_nodes_are_told_as_overload() {
    let mut full = upstream("a", 1, 0);
    full.pool.concurrency = Some(1);
    full.queue.set(0, Duration::ZERO, Some(1));
    let guard = full.nodes[0].state.enter(&full.queue);
    let one = model(vec![target(full)]);
    let (_, error) = run(&one, SECOND, |_, _| None);
    assert_eq!(error, Some(GatewayError::Unavailable(Unavailable::Overloaded)));
    drop(guard);
    assert_eq!(run(&one, SECOND, |_, _| None).1, None);
}
