use super::*;

#[test]
fn a_guard_counts_in_and_out_on_every_path() {
    let state = Arc::new(NodeState::default());
    let queue = Arc::<Queue>::default();
    let guard = state.enter(&queue);
    assert_eq!(state.inflight(), 1);
    let inner = Arc::clone(&state);
    let panicked = std::thread::spawn(move || {
        let _guard = inner.enter(&queue);
        panic!("a call that dies");
    });
    assert!(panicked.join().is_err());
    assert_eq!(state.inflight(), 1);
    drop(guard);
    assert_eq!((state.inflight(), state.attempts()), (0, 2));
}

fn credential(label: &str) -> Credential {
    Credential { label: label.into(), secret: Secret::new("sk-far"), weight: 1, state: Arc::default() }
}

fn node(name: &str) -> Arc<Node> {
    Arc::new(Node {
        name: name.into(),
        host: name.into(),
        port: 80,
        tls: false,
        authority: name.into(),
        prefix: "".into(),
        weight: 1,
        seed: 1,
        addresses: ArcSwap::from_pointee(Vec::new()),
        state: Arc::default(),
    })
}

const SECOND: Duration = Duration::from_secs(1);

fn upstream(nodes: usize, credentials: usize) -> Upstream {
    Upstream {
        name: "far".into(),
        dialect: Dialect::Openai,
        continuous_usage: false,
        policy: Policy::LeastRequest,
        nodes: (0..nodes).map(|n| node(&format!("node-{n}"))).collect(),
        credentials: (0..credentials).map(|n| credential(&format!("far#{n}"))).collect(),
        timeouts: Timeouts {
            connect: SECOND,
            first_byte: SECOND,
            first_token: SECOND,
            between_tokens: SECOND,
            total: SECOND,
        },
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

fn used(upstream: &Upstream, now: Duration) -> Option<String> {
    match upstream.key(now) {
        Key::Use(credential, _) => Some(credential.label.to_string()),
        Key::None | Key::Resting(_) => None,
    }
}

fn fails(upstream: &Upstream, node: usize, times: usize, now: Duration) -> bool {
    let failure = Failure::new(Class::ServerError, "status 500");
    (0..times).map(|_| upstream.failed(&upstream.nodes[node], None, &failure, now)).last().unwrap()
}

#[test]
fn credentials_take_turns_by_weight() {
    let mut far = upstream(1, 2);
    far.credentials[1].weight = 3;
    let mut second = 0;
    for _ in 0..40 {
        second += usize::from(used(&far, SECOND).unwrap() == "far#1");
    }
    assert_eq!(second, 30);
    assert!(matches!(upstream(1, 0).key(SECOND), Key::None));
}

#[test]
fn a_credential_that_was_limited_rests_at_least_its_cooldown_and_as_long_as_it_was_told() {
    let far = upstream(1, 2);
    let limited = |after| Failure { retry_after: after, ..Failure::new(Class::RateLimited, "status 429") };
    far.failed(&far.nodes[0], Some(&far.credentials[0]), &limited(Some(SECOND)), SECOND);
    assert!((0..4).all(|_| used(&far, 60 * SECOND).unwrap() == "far#1"));
    far.failed(&far.nodes[0], Some(&far.credentials[1]), &limited(Some(90 * SECOND)), SECOND);
    assert!(matches!(far.key(2 * SECOND), Key::Resting(until) if until == 61 * SECOND));
    // Its rest over, one call tries it; a success sets it free.
    let Key::Use(first, Some(probe)) = far.key(61 * SECOND) else { panic!("one may try") };
    assert_eq!(&*first.label, "far#0");
    assert!(matches!(far.key(61 * SECOND), Key::Resting(_)));
    far.succeeded(&far.nodes[0], Some(&first));
    drop(probe);
    assert!(matches!(far.key(61 * SECOND), Key::Use(_, None)));
    assert_eq!(far.nodes[0].state.failures(), 0, "the node is not at fault");
}

#[test]
fn a_node_is_taken_out_after_failures_in_a_row_and_a_success_starts_the_count_anew() {
    let own = upstream(3, 0);
    assert!(!fails(&own, 0, 2, SECOND));
    own.succeeded(&own.nodes[0], None);
    assert!(!fails(&own, 0, 2, SECOND));
    assert!(fails(&own, 0, 1, SECOND));
    assert_eq!(own.nodes[0].state.admits(2 * SECOND), Admits::NotBefore(11 * SECOND));
    // The one call that tries fails: it rests once more, which is no further ejection.
    let probe = own.nodes[0].state.probe(11 * SECOND).unwrap();
    assert!(!fails(&own, 0, 1, 11 * SECOND));
    drop(probe);
    assert_eq!(own.nodes[0].state.admits(12 * SECOND), Admits::NotBefore(21 * SECOND));
    assert!(own.succeeded(&own.nodes[0], None));
    assert_eq!(own.nodes[0].state.admits(12 * SECOND), Admits::Freely);
}

#[test]
fn a_node_whose_answers_break_off_is_taken_out_though_they_began_well() {
    let own = upstream(2, 0);
    let begun_and_broken = |now| {
        own.succeeded(&own.nodes[0], None);
        own.broke_off(&own.nodes[0], now)
    };
    assert!(!begun_and_broken(SECOND) && !begun_and_broken(SECOND));
    own.finished(&own.nodes[0]);
    assert!(!begun_and_broken(SECOND) && !begun_and_broken(SECOND) && begun_and_broken(SECOND));
    // Its rest over it begins well again, and breaks off: that is enough until an answer was whole.
    assert!(begun_and_broken(20 * SECOND));
    assert_eq!(own.nodes[0].state.failures(), 6);
}

#[test]
fn no_more_nodes_are_out_than_the_ratio_allows() {
    let own = upstream(4, 0);
    assert!(fails(&own, 0, 3, SECOND) && fails(&own, 1, 3, SECOND));
    assert!(!fails(&own, 2, 9, SECOND));
    let alone = upstream(1, 0);
    assert!(fails(&alone, 0, 3, SECOND));
}

#[test]
fn a_node_of_ours_rests_as_long_as_it_asks_within_reason() {
    let own = upstream(2, 0);
    let limited = |after| Failure { retry_after: after, ..Failure::new(Class::RateLimited, "status 429") };
    own.failed(&own.nodes[0], None, &limited(None), SECOND);
    assert_eq!(own.nodes[0].state.admits(SECOND), Admits::Freely);
    own.failed(&own.nodes[0], None, &limited(Some(SECOND)), SECOND);
    assert_eq!(own.nodes[0].state.admits(SECOND), Admits::NotBefore(2 * SECOND));
    own.failed(&own.nodes[0], None, &limited(Some(3600 * SECOND)), SECOND);
    assert_eq!(own.nodes[0].state.admits(SECOND), Admits::NotBefore(61 * SECOND));
}

#[test]
fn a_node_of_ours_that_keeps_saying_429_rests_for_a_moment_while_there_are_others() {
    let own = upstream(2, 0);
    let limited = |node: usize, now| own.failed(&own.nodes[node], None, &Failure::new(Class::RateLimited, ""), now);
    assert!(!limited(0, SECOND) && !limited(0, SECOND));
    own.succeeded(&own.nodes[0], None);
    assert!(!limited(0, SECOND) && !limited(0, SECOND));
    assert_eq!(own.nodes[0].state.admits(SECOND), Admits::Freely);
    assert!(!limited(0, SECOND));
    assert_eq!(own.nodes[0].state.admits(SECOND), Admits::NotBefore(2 * SECOND));
    assert!((0..9).all(|_| !limited(1, SECOND)));
    assert_eq!(own.nodes[1].state.admits(SECOND), Admits::Freely, "no other is left");
    assert_eq!(own.nodes[0].state.failures() + own.nodes[1].state.failures(), 0);
}

#[test]
fn an_echoed_key_is_masked_everywhere() {
    let key = credential("far#0");
    let masked = key.mask(Bytes::from_static(b"bad key sk-far, really sk-far!"));
    assert_eq!(masked, "bad key ***, really ***!");
    let clean = Bytes::from_static(b"nothing here");
    assert_eq!(key.mask(clean.clone()).as_ptr(), clean.as_ptr(), "what needs no masking is not copied");
}

#[test]
fn a_full_node_takes_no_further_call() {
    let state = Arc::new(NodeState::default());
    let queue = Arc::default();
    let first = state.try_enter(Some(1), &queue);
    assert!(first.is_some() && state.try_enter(Some(1), &queue).is_none());
    drop(first);
    assert!(state.try_enter(Some(1), &queue).is_some());
}
