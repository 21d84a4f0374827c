use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Barrier};

use super::*;
use crate::limit::dimension::{Limit, Limits};
use crate::limit::rule::{RuleSet, Scope};
use crate::limit::standing::Standing;

const DAY: u64 = 86_400;
/// Noon of some day.
const NOON: Instant64 = Instant64::from_secs(20_000 * DAY + DAY / 2);

fn limit(limit: u64) -> Option<Limit> {
    Some(Limit { limit, shadow: false })
}

fn plan(scopes: &[(Scope, &str, Limits)]) -> Plan {
    let sets: Vec<_> =
        scopes.iter().map(|(scope, name, limits)| Arc::new(RuleSet::new(*scope, name, limits))).collect();
    sets.iter().collect()
}

fn key(limits: Limits) -> Plan {
    plan(&[(Scope::Key, "alice", limits)])
}

fn tokens(prompt: u64, completion: u64) -> Estimate {
    Estimate { prompt, completion, guessed: false }
}

fn guess(prompt: u64, completion: u64) -> Estimate {
    Estimate { prompt, completion, guessed: true }
}

fn after(secs: u64) -> Instant64 {
    NOON.plus(Duration::from_secs(secs))
}

#[track_caller]
fn admit(store: &MemoryStore, plan: &Plan, estimate: Estimate, now: Instant64) -> LeaseId {
    match store.reserve(plan, estimate, now) {
        Verdicts::Admitted { id, .. } => id,
        Verdicts::Refused { refusal, .. } => panic!("refused: {refusal:?}"),
    }
}

#[track_caller]
fn refuse(store: &MemoryStore, plan: &Plan, estimate: Estimate, now: Instant64) -> Refusal {
    match store.reserve(plan, estimate, now) {
        Verdicts::Admitted { reserved, .. } => panic!("admitted with {reserved}"),
        Verdicts::Refused { refusal, .. } => refusal,
    }
}

/// Used and held of every rule.
fn state(store: &MemoryStore, plan: &Plan, now: Instant64) -> Vec<(u64, u64)> {
    store.query(plan, now).iter().map(|s: Standing<'_>| (s.used(), s.held())).collect()
}

/// Lets threads loose on one scope after the other, all at once on each, and says how often each round was admitted.
/// Many rounds, for a gap between deciding and charging shows only if two threads meet in it at the edge of the limit.
fn race(limits: &Limits, estimate: Estimate, threads: usize, tries: usize) -> Vec<u64> {
    const ROUNDS: usize = 300;
    let store = MemoryStore::new(None);
    let plans: Vec<_> = (0..ROUNDS).map(|n| plan(&[(Scope::Key, &n.to_string(), limits.clone())])).collect();
    let admitted: Vec<_> = plans.iter().map(|_| AtomicU64::new(0)).collect();
    let start = Barrier::new(threads);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                for (plan, admitted) in plans.iter().zip(&admitted) {
                    start.wait();
                    for _ in 0..tries {
                        let admit = matches!(store.reserve(plan, estimate, NOON), Verdicts::Admitted { .. });
                        admitted.fetch_add(u64::from(admit), Ordering::Relaxed);
                    }
                }
            });
        }
    });
    admitted.into_iter().map(AtomicU64::into_inner).collect()
}

#[test]
fn the_61st_request_of_any_minute_is_refused() {
    let plan = key(Limits { requests_per_minute: limit(60), ..Limits::default() });
    // Wherever in a bucket the minute begins, and however the requests lie in it.
    for (begin, gap) in [(0, 0), (0, 999), (1_499, 1_000), (2_999, 500), (2_950, 999)] {
        let store = MemoryStore::new(None);
        let at = |n: u64| NOON.plus(Duration::from_millis(begin + n * gap));
        for n in 0..60 {
            admit(&store, &plan, tokens(1, 0), at(n));
        }
        let last = NOON.plus(Duration::from_millis(begin + 59_999)).max(at(59));
        let refusal = refuse(&store, &plan, tokens(1, 0), last);
        assert_eq!((refusal.dimension, refusal.limit, refusal.kind), ("requests_per_minute", 60, LimitKind::Rate));
    }
}

#[test]
fn sixteen_threads_are_admitted_exactly_97_times_a_minute() {
    let limits = Limits { requests_per_minute: limit(97), ..Limits::default() };
    assert_eq!(race(&limits, tokens(1, 0), 16, 10), [97; 300]);
}

#[test]
fn concurrent_calls_cannot_pass_a_token_limit_together() {
    let minute = Limits { tokens_per_minute: limit(5_050), ..Limits::default() };
    assert_eq!(race(&minute, tokens(60, 40), 8, 20), [50; 300]);
    // Read, then add, of a day's budget let every concurrent call pass.
    let day = Limits { tokens_per_day: limit(7_777), ..Limits::default() };
    assert_eq!(race(&day, tokens(60, 40), 8, 20), [77; 300]);
}

#[test]
fn thirteen_slots_are_thirteen_slots_under_a_race_over_scopes_in_any_order() {
    let slots = || Limits { concurrency: limit(13), ..Limits::default() };
    let store = MemoryStore::new(None);
    let forth = plan(&[(Scope::Global, "", slots()), (Scope::Model, "m", slots()), (Scope::Key, "a", slots())]);
    let back = plan(&[(Scope::Key, "a", slots()), (Scope::Model, "m", slots()), (Scope::Global, "", slots())]);
    let (most, live) = (AtomicU64::new(0), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for n in 0..16 {
            let (store, live, most, plan) = (&store, &live, &most, if n % 2 == 0 { &forth } else { &back });
            scope.spawn(move || {
                for _ in 0..2_000 {
                    if let Verdicts::Admitted { id, .. } = store.reserve(plan, tokens(1, 0), NOON) {
                        most.fetch_max(live.fetch_add(1, Ordering::AcqRel) + 1, Ordering::AcqRel);
                        std::thread::yield_now();
                        live.fetch_sub(1, Ordering::AcqRel);
                        store.settle(id, 1, NOON);
                    }
                }
            });
        }
    });
    assert!(most.into_inner() <= 13);
    assert_eq!(state(&store, &forth, NOON), [(0, 0); 3]);
    (0..13).for_each(|_| assert!(matches!(store.reserve(&back, tokens(1, 0), NOON), Verdicts::Admitted { .. })));
    refuse(&store, &forth, tokens(1, 0), NOON);
}

#[test]
fn a_refusal_by_one_dimension_burns_no_other() {
    // A denied day burned the minute and the hour; a denied minute still counted.
    let limits = Limits {
        requests_per_minute: limit(5),
        requests_per_hour: limit(9),
        tokens_per_day: limit(100),
        concurrency: limit(9),
        ..Limits::default()
    };
    let plan = plan(&[(Scope::Route, "llm", limits), (Scope::Key, "alice", limits_with_room())]);
    let store = MemoryStore::new(None);
    admit(&store, &plan, tokens(90, 0), NOON);
    let before = state(&store, &plan, NOON);
    for _ in 0..50 {
        let refusal = refuse(&store, &plan, tokens(50, 0), NOON);
        assert_eq!((refusal.scope.as_str(), refusal.dimension), ("route:llm", "tokens_per_day"));
    }
    assert_eq!(state(&store, &plan, NOON), before);
}

fn limits_with_room() -> Limits {
    Limits { requests_per_minute: limit(1_000), tokens_per_minute: limit(100_000), ..Limits::default() }
}

#[test]
fn a_refusal_by_concurrency_consumes_no_request() {
    let plan = key(Limits { requests_per_minute: limit(10), concurrency: limit(1), ..Limits::default() });
    let store = MemoryStore::new(None);
    let first = admit(&store, &plan, tokens(1, 0), NOON);
    (0..20).for_each(|_| assert_eq!(refuse(&store, &plan, tokens(1, 0), NOON).kind, LimitKind::Concurrency));
    assert_eq!(state(&store, &plan, NOON), [(1, 0), (1, 0)]);
    store.settle(first, 0, NOON);
    admit(&store, &plan, tokens(1, 0), NOON);
}

#[test]
fn a_refusal_leaves_no_state_behind_for_a_scope_that_had_none() {
    let tiny = Limits { tokens_per_minute: limit(10), ..Limits::default() };
    let store = MemoryStore::new(None);
    refuse(&store, &plan(&[(Scope::Key, "a", limits_with_room()), (Scope::Model, "m", tiny)]), tokens(11, 0), NOON);
    assert_eq!(store.scopes(), 0);
}

#[test]
fn a_first_call_is_not_refused_for_the_guess_of_its_answer() {
    let plan = key(Limits { tokens_per_minute: limit(100), tokens_per_day: limit(1_000), ..Limits::default() });
    let store = MemoryStore::new(None);
    let Verdicts::Admitted { reserved, id, .. } = store.reserve(&plan, guess(20, 1_024), NOON) else {
        panic!("refused")
    };
    assert_eq!(reserved, 100);
    // What was not used is back at once.
    store.settle(id, 30, NOON);
    assert_eq!(state(&store, &plan, NOON), [(30, 0), (30, 0)]);
    admit(&store, &plan, tokens(20, 50), NOON);
}

#[test]
fn a_prompt_larger_than_the_limit_is_refused_for_good() {
    let plan = key(Limits { tokens_per_minute: limit(100), ..Limits::default() });
    let store = MemoryStore::new(None);
    assert_eq!(refuse(&store, &plan, tokens(101, 0), NOON).wait, None);
    assert_eq!(refuse(&store, &plan, tokens(u64::MAX, u64::MAX), NOON).wait, None);
    admit(&store, &plan, guess(100, u64::MAX), NOON);
}

#[test]
fn what_a_client_asks_for_is_never_clamped() {
    let plan = key(Limits { tokens_per_minute: limit(100), tokens_per_day: limit(150), ..Limits::default() });
    let store = MemoryStore::new(None);
    // More than the limit itself: for good, by the first rule that can never take it.
    let refusal = refuse(&store, &plan, tokens(20, 81), NOON);
    assert_eq!((refusal.dimension, refusal.wait), ("tokens_per_minute", None));
    assert_eq!(state(&store, &plan, NOON), [(0, 0), (0, 0)]);
    // More than what is left: for as long as it takes.
    admit(&store, &plan, tokens(20, 40), NOON);
    let refusal = refuse(&store, &plan, tokens(20, 40), NOON);
    assert_eq!((refusal.dimension, refusal.wait), ("tokens_per_minute", Some(Duration::from_secs(60))));
    let refusal = refuse(&store, &plan, tokens(20, 71), after(60));
    assert_eq!((refusal.dimension, refusal.kind), ("tokens_per_day", LimitKind::Quota));
    admit(&store, &plan, tokens(20, 70), after(60));
}

#[test]
fn the_whole_of_a_thousand_answers_is_charged_and_no_more() {
    // A correction by a share of the whole day's counter let a million tokens count as nine thousand.
    let plan = key(Limits { tokens_per_day: limit(10_000_000), ..Limits::default() });
    let store = MemoryStore::new(None);
    for n in 0..1_000 {
        let id = admit(&store, &plan, tokens(500, 612), NOON);
        store.settle(id, 900 + n % 200, NOON);
    }
    assert_eq!(state(&store, &plan, NOON), [(999_500, 0)]);
}

#[test]
fn a_settlement_after_midnight_goes_to_the_day_of_its_admission() {
    let plan = key(Limits { tokens_per_day: limit(1_000), ..Limits::default() });
    let store = MemoryStore::new(None);
    let id = admit(&store, &plan, tokens(300, 400), after(DAY / 2 - 1));
    let morning = after(DAY / 2 + 5);
    // The new day begins empty, and takes a whole day's budget.
    let whole = admit(&store, &plan, tokens(1_000, 0), morning);
    store.settle(id, 650, morning);
    assert_eq!(state(&store, &plan, morning), [(0, 1_000)]);
    store.settle(whole, 10, morning);
    assert_eq!(state(&store, &plan, morning), [(10, 0)]);
    assert_eq!(store.lost_tokens(), 0);
}

#[test]
fn a_window_ends_although_it_is_written_to_all_the_time() {
    // A time to live that every write refreshed never ended; a window anchored at its first hit ended for all at once.
    let plan = key(Limits { requests_per_minute: limit(60), ..Limits::default() });
    let store = MemoryStore::new(None);
    let mut admitted = 0;
    for n in 0..6_000 {
        let now = NOON.plus(Duration::from_millis(n * 100));
        admitted += u64::from(matches!(store.reserve(&plan, tokens(1, 0), now), Verdicts::Admitted { .. }));
    }
    // Ten minutes of a client that never stops: at worst 20/21 of the limit, and the burst at the beginning.
    assert!((571..=600).contains(&admitted), "{admitted}");
}

#[test]
fn the_same_minute_of_the_next_day_is_another_minute() {
    let plan = key(Limits { requests_per_minute: limit(1), ..Limits::default() });
    let store = MemoryStore::new(None);
    admit(&store, &plan, tokens(1, 0), NOON);
    refuse(&store, &plan, tokens(1, 0), after(1));
    admit(&store, &plan, tokens(1, 0), after(DAY));
}

#[test]
fn requests_and_tokens_of_a_minute_have_windows_of_their_own() {
    let plan = key(Limits { requests_per_minute: limit(2), tokens_per_minute: limit(100), ..Limits::default() });
    let store = MemoryStore::new(None);
    admit(&store, &plan, tokens(90, 0), NOON);
    admit(&store, &plan, tokens(10, 0), after(40));
    assert_eq!(refuse(&store, &plan, tokens(1, 0), after(50)).wait, Some(Duration::from_secs(10)));
    admit(&store, &plan, tokens(90, 0), after(60));
    assert_eq!(refuse(&store, &plan, tokens(1, 0), after(60)).dimension, "requests_per_minute");
}

#[test]
fn the_wait_is_that_of_the_rule_that_binds_and_not_a_fixed_minute() {
    let limits = Limits { requests_per_minute: limit(2), requests_per_day: limit(2), ..Limits::default() };
    let store = MemoryStore::new(None);
    let plan = key(limits);
    for _ in 0..2 {
        admit(&store, &plan, tokens(1, 0), NOON);
    }
    let refusal = refuse(&store, &plan, tokens(1, 0), NOON);
    assert_eq!((refusal.dimension, refusal.kind), ("requests_per_day", LimitKind::Quota));
    assert_eq!(refusal.wait, Some(Duration::from_secs(DAY / 2)));
}

#[test]
fn a_call_that_nobody_ends_is_charged_at_its_progress_and_its_slot_comes_back() {
    let limits = Limits { tokens_per_day: limit(1_000), concurrency: limit(1), ..Limits::default() };
    let (store, plan) = (MemoryStore::new(Some(Duration::from_secs(60))), key(limits));
    let silent = admit(&store, &plan, tokens(100, 400), NOON);
    store.sweep(after(59));
    assert_eq!(state(&store, &plan, after(59)), [(0, 500), (1, 0)]);
    assert_eq!(store.renew(silent, 230, after(59)), Renewed::Done);
    store.sweep(after(118));
    assert_eq!(store.open(), 1);
    store.sweep(after(119));
    assert_eq!(state(&store, &plan, after(119)), [(230, 0), (0, 0)]);
    assert_eq!(store.open(), 0);
    assert_eq!(store.renew(silent, 240, after(119)), Renewed::Expired);
    // The truth comes late: corrected once, and the slot is not given back twice.
    let other = admit(&store, &plan, tokens(1, 0), after(120));
    assert_eq!(store.settle(silent, 260, after(121)), Settled::Done);
    assert_eq!(state(&store, &plan, after(121)), [(260, 1), (1, 0)]);
    assert_eq!(store.settle(silent, 260, after(121)), Settled::Duplicate);
    assert_eq!(store.settle(other, 1, after(122)), Settled::Done);
}

#[test]
fn an_expired_call_is_forgotten_after_an_hour() {
    let store = MemoryStore::new(Some(Duration::from_secs(60)));
    let plan = key(Limits { tokens_per_minute: limit(1_000), ..Limits::default() });
    let id = admit(&store, &plan, tokens(100, 400), NOON);
    store.sweep(after(60));
    store.sweep(after(3_661));
    assert_eq!(store.settle(id, 10, after(3_661)), Settled::Duplicate);
}

#[test]
fn an_overrun_blocks_the_next_call_and_is_shown_as_nothing_left() {
    let plan = key(Limits { tokens_per_day: limit(1_000), ..Limits::default() });
    let store = MemoryStore::new(None);
    let id = admit(&store, &plan, tokens(100, 400), NOON);
    store.settle(id, 1_300, NOON);
    assert_eq!(store.query(&plan, NOON).iter().next().unwrap().remaining(), 0);
    assert_eq!(refuse(&store, &plan, tokens(1, 0), NOON).kind, LimitKind::Quota);
}

#[test]
fn a_shadow_rule_counts_and_never_refuses() {
    let limits = Limits {
        requests_per_minute: Some(Limit { limit: 2, shadow: true }),
        concurrency: limit(9),
        ..Limits::default()
    };
    let (store, plan) = (MemoryStore::new(None), key(limits));
    let over: Vec<_> = (0..4)
        .map(|_| match store.reserve(&plan, tokens(1, 0), NOON) {
            Verdicts::Admitted { standings, .. } => standings.iter().map(|s| s.over()).collect::<Vec<_>>(),
            Verdicts::Refused { refusal, .. } => panic!("{refusal:?}"),
        })
        .collect();
    assert_eq!(over, [[false, false], [false, false], [true, false], [true, false]]);
    assert_eq!(state(&store, &plan, NOON), [(4, 0), (4, 0)]);
}

#[test]
fn new_limits_bind_at_the_next_call_and_keep_what_was_used() {
    let store = MemoryStore::new(None);
    let with = |n| key(Limits { requests_per_minute: limit(n), ..Limits::default() });
    for _ in 0..5 {
        admit(&store, &with(5), tokens(1, 0), NOON);
    }
    refuse(&store, &with(5), tokens(1, 0), NOON);
    admit(&store, &with(6), tokens(1, 0), NOON);
    refuse(&store, &with(3), tokens(1, 0), NOON);
    assert_eq!(store.query(&with(3), NOON).iter().next().unwrap().remaining(), 0);
}

#[test]
fn a_reset_gives_all_back_and_open_calls_stay_true() {
    let limits = Limits {
        requests_per_minute: limit(2),
        tokens_per_minute: limit(1_000),
        tokens_per_day: limit(1_000),
        concurrency: limit(9),
        ..Limits::default()
    };
    let (store, plan) = (MemoryStore::new(None), key(limits));
    let open = admit(&store, &plan, tokens(100, 400), NOON);
    let done = admit(&store, &plan, tokens(100, 0), NOON);
    store.settle(done, 90, NOON);
    store.reset(&ScopeId::new(Scope::Key, "alice"), NOON);
    assert_eq!(state(&store, &plan, NOON), [(0, 0), (0, 0), (0, 500), (1, 0)]);
    let later = admit(&store, &plan, tokens(300, 0), NOON);
    // Prepaid before the reset: nothing to give back, least of all from what came after it.
    store.settle(open, 50, NOON);
    assert_eq!(state(&store, &plan, NOON), [(1, 0), (300, 0), (50, 300), (1, 0)]);
    store.settle(later, 300, NOON);
    assert_eq!(state(&store, &plan, NOON), [(1, 0), (300, 0), (350, 0), (0, 0)]);
}

#[test]
fn idle_scopes_are_dropped_and_busy_ones_are_not() {
    let limits = Limits { requests_per_hour: limit(9), tokens_per_day: limit(100), ..Limits::default() };
    let store = MemoryStore::new(None);
    let plans: Vec<_> = (0..500).map(|n| plan(&[(Scope::Key, &n.to_string(), limits.clone())])).collect();
    let leases: Vec<_> = plans.iter().map(|plan| admit(&store, plan, tokens(10, 0), NOON)).collect();
    for id in leases.iter().skip(1) {
        store.settle(*id, 5, NOON);
    }
    let sweep = |now| (0..16).for_each(|_| store.sweep(now));
    sweep(after(7_200));
    assert_eq!(store.scopes(), 500);
    sweep(after(DAY / 2));
    assert_eq!(store.scopes(), 1);
    store.settle(leases[0], 5, after(DAY / 2));
    sweep(after(DAY / 2));
    assert_eq!(store.scopes(), 0);
}

#[test]
fn a_query_consumes_nothing_and_keeps_nothing() {
    let store = MemoryStore::new(None);
    let plan = key(limits_with_room());
    assert_eq!(state(&store, &plan, NOON), [(0, 0), (0, 0)]);
    assert_eq!(store.scopes(), 0);
    admit(&store, &plan, tokens(5, 0), NOON);
    (0..100).for_each(|_| assert_eq!(state(&store, &plan, NOON), [(1, 0), (5, 0)]));
}

#[test]
fn two_keys_do_not_share_anything() {
    let limits = || Limits { requests_per_minute: limit(1), concurrency: limit(1), ..Limits::default() };
    let store = MemoryStore::new(None);
    for (scope, name) in [(Scope::Key, "a"), (Scope::Key, "b"), (Scope::Route, "a"), (Scope::Model, "a")] {
        admit(&store, &plan(&[(scope, name, limits())]), tokens(1, 0), NOON);
    }
}

/// Not a test of anything but speed: `cargo test --release -p tollgate-filters --lib -- --ignored --nocapture decisions`.
#[test]
#[ignore = "a measurement, to be run in release"]
fn decisions_per_second_over_ten_thousand_keys() {
    let limits = Limits {
        requests_per_minute: limit(1_000_000_000),
        requests_per_hour: limit(1_000_000_000),
        tokens_per_day: limit(u64::MAX),
        ..Limits::default()
    };
    let global = Arc::new(RuleSet::new(
        Scope::Global,
        "",
        &Limits { requests_per_second: limit(u64::MAX), ..Limits::default() },
    ));
    let keys: Vec<_> = (0..10_000).map(|n| Arc::new(RuleSet::new(Scope::Key, &n.to_string(), &limits))).collect();
    let clock = crate::limit::clock::SystemClock::new();
    for (what, with_global) in [("key", false), ("key and global", true)] {
        let store = MemoryStore::new(None);
        let begin = std::time::Instant::now();
        let rounds = 2_000_000u32;
        for n in 0..rounds {
            let set = &keys[n.wrapping_mul(2_654_435_761) as usize % keys.len()];
            let mut plan = Plan::new();
            plan.add(set);
            if with_global {
                plan.add(&global);
            }
            let now = crate::limit::clock::Clock::now(&clock);
            let id = admit(&store, &plan, tokens(100, 400), now);
            store.settle(id, 300, now);
        }
        let each = begin.elapsed() / rounds;
        println!("{what}: {each:?} for reserve and settle, {:.0} a second", 1.0 / each.as_secs_f64());
        assert_eq!(store.open(), 0);
    }
}
