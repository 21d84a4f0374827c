use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use super::*;
use crate::limit::clock::ManualClock;
use crate::limit::dimension::{Limit, Limits};
use crate::limit::rule::{RuleSet, Scope};
use crate::usage::UsageSource;

/// In memory nothing waits, so that one poll is enough.
fn ready<T>(future: impl Future<Output = T>) -> T {
    match std::pin::pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(value) => value,
        Poll::Pending => panic!("the ledger in memory waited"),
    }
}

fn ledger() -> (Ledger, Arc<ManualClock>, Plan) {
    let limit = |limit| Some(Limit { limit, shadow: false });
    let limits = Limits {
        requests_per_minute: limit(60),
        tokens_per_day: limit(1_000),
        concurrency: limit(2),
        ..Limits::default()
    };
    let clock = Arc::new(ManualClock::at(Instant64::from_secs(20_000 * 86_400 + 43_200)));
    let plan = [&Arc::new(RuleSet::new(Scope::Key, "alice", &limits))].into_iter().collect();
    (Ledger::with_clock(Arc::clone(&clock) as Arc<dyn Clock>), clock, plan)
}

fn reserve(ledger: &Ledger, plan: &Plan) -> Reservation {
    match ready(ledger.reserve(plan, Estimate { prompt: 100, completion: 300, guessed: false })).unwrap() {
        Decision::Admitted(reservation) => reservation,
        Decision::Refused(refusal, _) => panic!("refused: {refusal:?}"),
    }
}

fn usage(input: u64, output: u64) -> Usage {
    Usage { input, output, source: UsageSource::Upstream, ..Usage::default() }
}

/// Requests used, tokens used, tokens held, live calls.
fn state(ledger: &Ledger, plan: &Plan) -> [u64; 4] {
    let standings = ready(ledger.query(plan)).unwrap();
    let rows: Vec<_> = standings.iter().map(|s| (s.used(), s.held())).collect();
    [rows[0].0, rows[1].0, rows[1].1, rows[2].0]
}

#[test]
fn a_settled_call_is_charged_what_it_used() {
    let (ledger, _, plan) = ledger();
    let mut reservation = reserve(&ledger, &plan);
    assert_eq!(state(&ledger, &plan), [1, 0, 400, 1]);
    assert_eq!(ledger.inflight(), 1);
    reservation.dispatched();
    reservation.progress(&usage(0, 17));
    reservation.settle(&usage(90, 20));
    assert_eq!(state(&ledger, &plan), [1, 110, 0, 0]);
    assert_eq!(ledger.inflight(), 0);
}

#[test]
fn a_dropped_call_is_charged_what_is_known_of_it() {
    type Act = fn(&mut Reservation);
    let cases: [(&str, Act, u64); 8] = [
        ("never sent", |_| {}, 0),
        ("sent, no token yet", |r| r.dispatched(), 100),
        (
            "failed before the first byte",
            |r| {
                r.dispatched();
                r.failed();
            },
            0,
        ),
        (
            "failed, then sent elsewhere",
            |r| {
                r.dispatched();
                r.failed();
                r.dispatched();
            },
            100,
        ),
        (
            "broke after tokens",
            |r| {
                r.dispatched();
                r.progress(&usage(0, 7));
                r.failed();
            },
            107,
        ),
        (
            "cut with the prompt known",
            |r| {
                r.dispatched();
                r.progress(&usage(80, 7));
            },
            87,
        ),
        (
            "progress never goes down",
            |r| {
                r.progress(&usage(80, 70));
                r.progress(&usage(80, 7));
            },
            150,
        ),
        (
            "seen tokens outlast a new attempt",
            |r| {
                r.progress(&usage(80, 70));
                r.dispatched();
            },
            150,
        ),
    ];
    for (what, act, charged) in cases {
        let (ledger, _, plan) = ledger();
        let mut reservation = reserve(&ledger, &plan);
        act(&mut reservation);
        drop(reservation);
        assert_eq!(state(&ledger, &plan), [1, charged, 0, 0], "{what}");
        assert_eq!(ledger.inflight(), 0, "{what}");
    }
}

#[test]
fn a_cache_hit_is_a_request_without_tokens() {
    let (ledger, _, plan) = ledger();
    reserve(&ledger, &plan).settle(&Usage::default());
    assert_eq!(state(&ledger, &plan), [1, 0, 0, 0]);
}

#[test]
fn a_panic_settles_and_frees_the_slot() {
    let (ledger, _, plan) = ledger();
    let mut reservation = reserve(&ledger, &plan);
    reservation.dispatched();
    let panicked = std::thread::spawn(move || {
        let _held = reservation;
        std::panic::resume_unwind(Box::new("a filter broke"));
    });
    assert!(panicked.join().is_err());
    assert_eq!(state(&ledger, &plan), [1, 100, 0, 0]);
}

#[test]
fn a_cancelled_task_settles_and_frees_the_slot() {
    let (ledger, _, plan) = ledger();
    let mut reservation = reserve(&ledger, &plan);
    let mut task = Box::pin(async move {
        reservation.dispatched();
        std::future::pending::<()>().await;
        reservation.release();
    });
    assert!(task.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
    assert_eq!(ledger.inflight(), 1);
    drop(task);
    assert_eq!(state(&ledger, &plan), [1, 100, 0, 0]);
}

#[test]
fn slots_come_back_however_calls_end_a_thousand_times() {
    let (ledger, clock, plan) = ledger();
    for n in 0..1_000u64 {
        clock.advance(Duration::from_secs(2));
        let mut reservation = reserve(&ledger, &plan);
        match n % 4 {
            0 => reservation.dispatched(),
            1 => reservation.settle(&usage(0, 0)),
            2 => reservation.failed(),
            _ => reservation.release(),
        }
        ready(ledger.reset(&ScopeId::new(Scope::Key, "alice"))).unwrap();
    }
    assert_eq!(state(&ledger, &plan)[2..], [0, 0]);
    assert_eq!((ledger.inflight(), ledger.lost_tokens()), (0, 0));
}

#[test]
fn a_long_stream_keeps_its_slot_while_it_lives() {
    let (ledger, clock, plan) = ledger();
    let long = reserve(&ledger, &plan);
    let _second = reserve(&ledger, &plan);
    for _ in 0..600 {
        clock.advance(Duration::from_secs(1));
        ledger.sweep();
    }
    assert_eq!(ledger.inflight(), 2);
    let decision = ready(ledger.reserve(&plan, Estimate::default())).unwrap();
    let Decision::Refused(refusal, standings) = decision else { panic!("a third slot of two") };
    assert_eq!((refusal.scope.as_str(), refusal.dimension), ("key", "concurrency"));
    assert_eq!(standings.binding().unwrap().used(), 2);
    drop(long);
    drop(reserve(&ledger, &plan));
}

#[test]
fn without_rules_everything_is_admitted_and_still_counted_as_open() {
    let (ledger, _, _) = ledger();
    let reservation = reserve(&ledger, &Plan::new());
    assert_eq!(ledger.inflight(), 1);
    reservation.settle(&usage(5, 5));
    assert_eq!(ledger.inflight(), 0);
}

#[test]
fn a_reservation_stays_small_enough_to_lie_in_the_state_of_a_request() {
    assert!(size_of::<Reservation>() <= 416, "{}", size_of::<Reservation>());
    assert!(size_of::<Decision>() <= 480, "{}", size_of::<Decision>());
}
