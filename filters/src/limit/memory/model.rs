//! The stores against a naive model: an append-only log of every charge, summed anew for every question.

use std::collections::BTreeMap;
use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::limit::dimension::{Dimension, Limit, Limits};
use crate::limit::rule::{Rule, RuleSet, Scope};
use crate::limit::zone::Zone;

mod subject;

pub(in crate::limit) use subject::Subject;

const SECOND: u64 = 1_000_000;
const TTL: u64 = 55 * SECOND;

fn limit(limit: u64) -> Option<Limit> {
    Some(Limit { limit, shadow: false })
}

fn shadow(limit: u64) -> Option<Limit> {
    Some(Limit { limit, shadow: true })
}

/// Where the days of a key begin; of other scopes they are those of UTC.
fn zone(key: &str) -> &'static str {
    match key {
        "b" => "Europe/Berlin",
        "c" => "Africa/Cairo",
        _ => "UTC",
    }
}

/// Evenings before the end of a month: an ordinary one, one on whose morning Berlin's clocks go forward, and one after
/// which Cairo's midnight comes twice.
pub(in crate::limit) fn starts() -> impl Strategy<Value = u64> {
    let days = ["2026-11-27T20:00:00Z", "2026-03-28T20:00:00Z", "2026-10-28T20:00:00Z"];
    let second = |text: &str| u64::try_from(text.parse::<jiff::Timestamp>().unwrap().as_second()).unwrap();
    prop::sample::select(days.map(|day| second(day) * SECOND).to_vec())
}

/// Six plans over three keys, two models, one route and the whole gateway; limits so small that each binds at times.
fn plans() -> Vec<Plan> {
    let key = Limits {
        requests_per_second: limit(3),
        requests_per_minute: limit(11),
        requests_per_day: limit(40),
        tokens_per_minute: limit(900),
        tokens_per_day: limit(2_500),
        concurrency: limit(4),
        ..Limits::default()
    };
    let model = Limits {
        tokens_per_hour: limit(3_000),
        tokens_per_minute: shadow(400),
        concurrency: limit(5),
        ..Limits::default()
    };
    let route = Limits { requests_per_hour: limit(60), requests_per_second: shadow(1), ..Limits::default() };
    let global = Limits { requests_per_second: limit(4), tokens_per_month: limit(20_000), ..Limits::default() };
    let set = |scope, name: &str, limits| Arc::new(RuleSet::new(scope, name, limits));
    let (global, route) = (set(Scope::Global, "", &global), set(Scope::Route, "a", &route));
    let models = [set(Scope::Model, "a", &model), set(Scope::Model, "b", &model)];
    ["a", "b", "c"]
        .iter()
        .map(|name| Arc::new(RuleSet::new(Scope::Key, name, &key).in_zone(Zone::named(zone(name)).unwrap())))
        .flat_map(|key| models.clone().map(|model| [&global, &route, &key, &model].into_iter().collect()))
        .collect()
}

#[derive(Debug, Clone)]
pub(in crate::limit) enum Step {
    Reserve {
        plan: usize,
        prompt: u64,
        completion: u64,
        guessed: bool,
    },
    Settle {
        lease: usize,
        tokens: u64,
    },
    Renew {
        lease: usize,
        progress: u64,
    },
    Advance(u64),
    /// The clock of one caller lies behind.
    Behind(u64),
    Sweep,
}

pub(in crate::limit) fn steps(overrun: bool) -> impl Strategy<Value = Vec<Step>> {
    let tokens = if overrun { 0..700u64 } else { 0..1u64 };
    let step = prop_oneof![
        6 => (0..6usize, 0..250u64, 0..300u64, any::<bool>()).prop_map(|(plan, prompt, completion, guessed)| {
            Step::Reserve { plan, prompt, completion, guessed }
        }),
        4 => (0..64usize, tokens.clone()).prop_map(|(lease, tokens)| Step::Settle { lease, tokens }),
        1 => (0..64usize, tokens).prop_map(|(lease, progress)| Step::Renew { lease, progress }),
        4 => (0..SECOND).prop_map(Step::Advance),
        2 => (0..40 * SECOND).prop_map(Step::Advance),
        1 => (0..30 * 3_600 * SECOND).prop_map(Step::Advance),
        1 => (0..5 * SECOND).prop_map(Step::Behind),
        2 => Just(Step::Sweep),
    ];
    prop::collection::vec(step, 1..250)
}

type Place = (Scope, String, Dimension);

#[derive(Debug)]
struct Open {
    plan: usize,
    admitted: u64,
    estimate: u64,
    charge: u64,
    expires: u64,
    expired: bool,
}

/// Everything that ever happened, in the order in which it did.
#[derive(Debug, Default)]
struct Model {
    now: u64,
    rolling: BTreeMap<Place, Vec<(u64, i128)>>,
    calendar: BTreeMap<Place, Vec<(u64, i128, i128)>>,
    live: BTreeMap<Place, i128>,
    leases: BTreeMap<u64, Open>,
}

fn place(set: &RuleSet, rule: &Rule) -> Place {
    (set.id().scope(), set.id().name().to_owned(), rule.dimension)
}

fn span(dimension: Dimension) -> u64 {
    match dimension.window() {
        Window::Rolling(secs) => u64::from(secs) * SECOND,
        Window::Day | Window::Month | Window::Live => panic!("not rolling"),
    }
}

/// A twentieth of the window, by its number: what lies in one counts until the last of it is as old as the window.
fn bucket(dimension: Dimension, at: u64) -> u64 {
    at * 20 / span(dimension)
}

/// First and last second of the calendar period, by an independent calendar.
fn period((scope, name, dimension): &Place, now: u64) -> (u64, u64) {
    let zone = if *scope == Scope::Key { zone(name) } else { "UTC" };
    let zone = jiff::tz::TimeZoneDatabase::bundled().get(zone).unwrap();
    let today = jiff::Timestamp::from_microsecond(now.try_into().unwrap()).unwrap().to_zoned(zone.clone()).date();
    let (first, next) = if dimension.window() == Window::Day {
        (today, today.tomorrow().unwrap())
    } else {
        (today.first_of_month(), today.last_of_month().tomorrow().unwrap())
    };
    let instant = |date: jiff::civil::Date| {
        let begin = date.at(12, 0, 0, 0).to_zoned(zone.clone()).unwrap().start_of_day().unwrap();
        u64::try_from(begin.timestamp().as_microsecond()).unwrap()
    };
    (instant(first), instant(next))
}

impl Model {
    /// When what lies in the bucket of `at` stops counting; 0 if there is nothing.
    fn end(&self, place: &Place, at: u64) -> u64 {
        let log = self.rolling.get(place).map_or(&[][..], |log| log);
        let same = log.iter().filter(|(other, _)| bucket(place.2, *other) == bucket(place.2, at));
        same.map(|(other, _)| other + span(place.2)).max().unwrap_or(0)
    }

    fn used(&self, place: &Place, now: u64) -> (i128, i128) {
        match place.2.window() {
            Window::Rolling(_) => {
                let log = self.rolling.get(place).map_or(&[][..], |log| log);
                (log.iter().filter(|(at, _)| self.end(place, *at) > now).map(|(_, n)| n).sum(), 0)
            }
            Window::Day | Window::Month => {
                let (start, _) = period(place, now);
                let log = self.calendar.get(place).map_or(&[][..], |log| log);
                let of_period = || log.iter().filter(|(of, ..)| *of == start);
                (of_period().map(|(_, used, _)| used).sum(), of_period().map(|(.., held)| held).sum())
            }
            Window::Live => (self.live.get(place).copied().unwrap_or(0), 0),
        }
    }

    fn verdict(&self, place: &Place, n: u64, limit: u64) -> Verdict {
        let (used, held) = self.used(place, self.now);
        let room = i128::from(limit) - i128::from(n);
        if room < 0 {
            return Verdict::Never;
        }
        if used + held <= room {
            return Verdict::Fits;
        }
        match place.2.window() {
            Window::Live => Verdict::Wait(SECOND),
            Window::Day | Window::Month => Verdict::Wait(period(place, self.now).1 - self.now),
            Window::Rolling(_) => {
                let mut ends: Vec<u64> = self.rolling[place].iter().map(|(at, _)| self.end(place, *at)).collect();
                ends.sort_unstable();
                let end = ends.into_iter().filter(|end| *end > self.now).find(|end| self.used(place, *end).0 <= room);
                Verdict::Wait(end.unwrap() - self.now)
            }
        }
    }

    fn binding(&self, plan: &Plan, tokens: u64) -> Option<(Place, Verdict)> {
        let mut binding: Option<(Place, Verdict)> = None;
        for (set, rule) in plan.rules().filter(|(_, rule)| !rule.shadow) {
            let n = if rule.dimension.unit() == Unit::Tokens { tokens } else { 1 };
            let verdict = self.verdict(&place(set, rule), n, rule.limit);
            if verdict != Verdict::Fits && binding.as_ref().is_none_or(|(_, worst)| verdict > *worst) {
                binding = Some((place(set, rule), verdict));
            }
        }
        binding
    }

    fn admit(&mut self, id: u64, index: usize, plan: &Plan, tokens: u64, prompt: u64) {
        let now = self.now;
        for (set, rule) in plan.rules() {
            let place = place(set, rule);
            let is_tokens = rule.dimension.unit() == Unit::Tokens;
            let n = if is_tokens { i128::from(tokens) } else { 1 };
            match rule.dimension.window() {
                Window::Rolling(_) => self.rolling.entry(place).or_default().push((now, n)),
                Window::Day | Window::Month => {
                    let start = period(&place, now).0;
                    let (used, held) = if is_tokens { (0, n) } else { (n, 0) };
                    self.calendar.entry(place).or_default().push((start, used, held));
                }
                Window::Live => *self.live.entry(place).or_default() += 1,
            }
        }
        let open =
            Open { plan: index, admitted: now, estimate: tokens, charge: prompt, expires: now + TTL, expired: false };
        self.leases.insert(id, open);
    }

    fn charge(&mut self, plan: &Plan, lease: &Open, tokens: u64) {
        let charged = i128::from(if lease.expired { lease.charge } else { lease.estimate });
        let tokens = i128::from(tokens);
        for (set, rule) in plan.rules() {
            let place = place(set, rule);
            match (rule.dimension.window(), rule.dimension.unit()) {
                (Window::Live, _) if !lease.expired => *self.live.get_mut(&place).unwrap() -= 1,
                (Window::Rolling(_), Unit::Tokens) => {
                    let counts = self.end(&place, lease.admitted) > self.now;
                    let log = self.rolling.get_mut(&place).unwrap();
                    if counts {
                        log.push((lease.admitted, tokens - charged));
                    } else if tokens > charged {
                        log.push((self.now, tokens - charged));
                    }
                }
                (Window::Day | Window::Month, Unit::Tokens) => {
                    let start = period(&place, lease.admitted).0;
                    let log = self.calendar.get_mut(&place).unwrap();
                    log.push(if lease.expired { (start, tokens - charged, 0) } else { (start, tokens, -charged) });
                }
                (Window::Live, _) | (_, Unit::Requests) => {}
            }
        }
    }

    fn sweep(&mut self, plans: &[Plan]) {
        let due: Vec<u64> = self.leases.iter().filter(|(_, l)| l.expires <= self.now).map(|(id, _)| *id).collect();
        for id in due {
            let mut lease = self.leases.remove(&id).unwrap();
            if !lease.expired {
                self.charge(&plans[lease.plan], &lease, lease.charge);
                lease.expired = true;
                lease.expires = self.now + 3_600 * SECOND;
                self.leases.insert(id, lease);
            }
        }
    }
}

/// What a call reserves: what it asks for, but of a guess never more than fits into the tightest limit that binds.
fn reserved(plan: &Plan, estimate: Estimate) -> u64 {
    let prompt = estimate.prompt.max(1);
    let fits = |tokens: &u64| {
        let mut binding = plan.rules().filter(|(_, rule)| !rule.shadow && rule.dimension.unit() == Unit::Tokens);
        binding.all(|(_, rule)| *tokens <= rule.limit)
    };
    let all = prompt + estimate.completion;
    if !estimate.guessed { all } else { (prompt..=all).rev().find(fits).unwrap_or(prompt) }
}

struct Run {
    plans: Vec<Plan>,
    store: MemoryStore,
    model: Model,
    ids: Vec<u64>,
    charges: Vec<Charge>,
}

/// What an admission charged to one rule, and later what the call really used.
struct Charge {
    id: u64,
    at: u64,
    place: Place,
    n: u64,
    limit: u64,
}

impl Run {
    fn new(start: u64) -> Self {
        let store = MemoryStore::new(Some(Duration::from_micros(TTL)));
        let model = Model { now: start, ..Model::default() };
        Self { plans: plans(), store, model, ids: vec![], charges: vec![] }
    }

    fn now(&self) -> Instant64 {
        Instant64(self.model.now)
    }

    fn reserve(&mut self, index: usize, estimate: Estimate) -> Result<(), TestCaseError> {
        let plan = self.plans[index].clone();
        let tokens = reserved(&plan, estimate);
        let expected = self.model.binding(&plan, tokens);
        match self.store.reserve(&plan, estimate, self.now()) {
            Verdicts::Admitted { id, reserved, .. } => {
                prop_assert_eq!(expected, None);
                prop_assert_eq!(reserved, tokens);
                for (set, rule) in plan.rules().filter(|(_, rule)| !rule.shadow) {
                    let n = if rule.dimension.unit() == Unit::Tokens { tokens } else { 1 };
                    let charge = Charge { id: id.0, at: self.model.now, place: place(set, rule), n, limit: rule.limit };
                    self.charges.push(charge);
                }
                self.model.admit(id.0, index, &plan, tokens, estimate.prompt.min(tokens));
                self.ids.push(id.0);
            }
            Verdicts::Refused { refusal, standings } => {
                let ((scope, name, dimension), verdict) = expected.unwrap();
                prop_assert_eq!(refusal.scope, ScopeId::new(scope, &name).label());
                prop_assert_eq!(refusal.dimension, dimension.name());
                prop_assert_eq!(standings.binding().unwrap().rule().dimension, dimension);
                if let (Some(wait), Window::Rolling(secs)) = (refusal.wait, dimension.window()) {
                    prop_assert!(wait <= Duration::from_secs(secs.into()));
                }
                let wait = refusal.wait.map_or(Verdict::Never, |w| Verdict::Wait(w.as_micros().try_into().unwrap()));
                prop_assert_eq!(wait, verdict);
            }
        }
        Ok(())
    }

    fn settle(&mut self, at: usize, tokens: u64) -> Result<(), TestCaseError> {
        let Some(id) = self.ids.get(at % self.ids.len().max(1)).copied() else { return Ok(()) };
        let expected = match self.model.leases.remove(&id) {
            Some(lease) => {
                let plan = self.plans[lease.plan].clone();
                self.model.charge(&plan, &lease, tokens);
                Settled::Done
            }
            None => Settled::Duplicate,
        };
        prop_assert_eq!(self.store.settle(LeaseId(id), tokens, self.now()), expected);
        Ok(())
    }

    fn renew(&mut self, at: usize, progress: u64) -> Result<(), TestCaseError> {
        let Some(id) = self.ids.get(at % self.ids.len().max(1)).copied() else { return Ok(()) };
        let now = self.model.now;
        let expected = match self.model.leases.get_mut(&id) {
            Some(lease) if lease.expired => Renewed::Expired,
            Some(lease) => {
                lease.charge = lease.charge.max(progress);
                lease.expires = now + TTL;
                Renewed::Done
            }
            None => Renewed::Unknown,
        };
        prop_assert_eq!(self.store.renew(LeaseId(id), progress, self.now()), expected);
        Ok(())
    }

    /// Every counter of every scope says what the log says; asked with a clock that may lie behind.
    fn compare(&self, behind: u64) -> Result<(), TestCaseError> {
        for plan in &self.plans {
            let standings = self.store.query(plan, Instant64(self.model.now - behind));
            for (standing, (set, rule)) in standings.iter().zip(plan.rules()) {
                let found = (i128::from(standing.used()), i128::from(standing.held()));
                prop_assert_eq!(found, self.model.used(&place(set, rule), self.model.now), "{:?}", place(set, rule));
            }
        }
        let open = self.model.leases.values().filter(|lease| !lease.expired).count();
        prop_assert_eq!(self.store.open(), open);
        Ok(())
    }

    fn step(&mut self, step: Step) -> Result<(), TestCaseError> {
        match step {
            Step::Reserve { plan, prompt, completion, guessed } => {
                self.reserve(plan, Estimate { prompt, completion, guessed })?;
            }
            Step::Settle { lease, tokens } => self.settle(lease, tokens)?,
            Step::Renew { lease, progress } => self.renew(lease, progress)?,
            Step::Advance(micros) => {
                self.model.now += micros;
                // The store learns of the time by any call.
                self.store.query(&self.plans[0], self.now());
            }
            Step::Behind(micros) => return self.compare(micros),
            Step::Sweep => {
                let plans = self.plans.clone();
                self.model.sweep(&plans);
                self.store.sweep(self.now());
            }
        }
        self.compare(0)
    }

    /// In no trailing window, wherever it begins, was more used than the limit.
    fn assert_trailing_windows(&self) -> Result<(), TestCaseError> {
        for last in &self.charges {
            let Window::Rolling(secs) = last.place.2.window() else { continue };
            let begin = last.at.saturating_sub(u64::from(secs) * SECOND);
            let within = |charge: &&Charge| charge.place == last.place && charge.at > begin && charge.at <= last.at;
            let sum: u64 = self.charges.iter().filter(within).map(|charge| charge.n).sum();
            prop_assert!(sum <= last.limit, "{:?} at {}", last.place, last.at);
        }
        Ok(())
    }
}

/// Every figure of an answer.
fn figures(standings: &Standings) -> Vec<(u64, u64, Duration, Duration, bool)> {
    standings.iter().map(|s| (s.used(), s.held(), s.more_in(), s.resets_in(), s.over())).collect()
}

fn told(verdicts: &Verdicts) -> String {
    match verdicts {
        Verdicts::Admitted { id, reserved, standings } => {
            format!("admitted as {id:?} with {reserved}: {:?}", figures(standings))
        }
        Verdicts::Refused { refusal, standings } => {
            let binding = standings.binding().map(|binding| (binding.scope().label(), binding.rule().dimension));
            format!("refused by {refusal:?} at {binding:?}: {:?}", figures(standings))
        }
    }
}

/// Runs the same steps through the memory and another store, and wants the same answers, to the last figure.
pub(in crate::limit) fn both_answer_alike(
    other: &impl Subject,
    start: u64,
    steps: Vec<Step>,
) -> Result<(), TestCaseError> {
    let mut run = Run::new(start);
    prop_assert_eq!(other.ttl(), TTL);
    let plans = plans();
    let mut reset = false;
    for (turn, step) in steps.into_iter().enumerate() {
        let now = run.now();
        match &step {
            Step::Reserve { plan, prompt, completion, guessed } => {
                let estimate = Estimate { prompt: *prompt, completion: *completion, guessed: *guessed };
                let (here, there) =
                    (run.store.reserve(&plans[*plan], estimate, now), other.reserve(&plans[*plan], estimate, now));
                // Leases are numbered alike, so the answers are alike to the letter.
                prop_assert_eq!(told(&here), told(&there));
                if let Verdicts::Admitted { id, .. } = here {
                    run.ids.push(id.0);
                }
            }
            Step::Settle { lease, tokens } => {
                let Some(id) = run.ids.get(lease % run.ids.len().max(1)).copied() else { continue };
                let here = run.store.settle(LeaseId(id), *tokens, now);
                prop_assert_eq!(here, other.settle(LeaseId(id), *tokens, now));
            }
            Step::Renew { lease, progress } => {
                let Some(id) = run.ids.get(lease % run.ids.len().max(1)).copied() else { continue };
                let here = run.store.renew(LeaseId(id), *progress, now);
                prop_assert_eq!(here, other.renew(LeaseId(id), *progress, now));
            }
            Step::Advance(micros) => run.model.now += micros,
            Step::Behind(_) => {}
            Step::Sweep => {
                run.store.sweep(now);
                other.sweep(now);
            }
        }
        // Now and then a reset; the log knows none, so it is not asked here.
        if turn % 37 == 36 && !reset {
            let id = plans[turn % plans.len()].sets()[2].id().clone();
            run.store.reset(&id, run.now());
            other.reset(&id, run.now());
            run.model.now += 1;
            reset = true;
        }
        let plan = &plans[turn % plans.len()];
        let (here, there) = (run.store.query(plan, run.now()), other.query(plan, run.now()));
        prop_assert_eq!(figures(&here), figures(&there));
    }
    Ok(())
}

pub(in crate::limit) fn cases(n: u32) -> ProptestConfig {
    ProptestConfig { cases: n, failure_persistence: None, ..ProptestConfig::default() }
}

proptest! {
    #![proptest_config(cases(256))]

    #[test]
    fn the_store_answers_as_the_log_does(start in starts(), steps in steps(true)) {
        let mut run = Run::new(start);
        for step in steps {
            run.step(step)?;
        }
        // Everything settled and long ago: nothing is left, and nothing was lost on the way.
        for at in 0..run.ids.len() {
            run.settle(at, 5)?;
        }
        prop_assert_eq!(run.store.open(), 0);
        run.model.now += 40 * 86_400 * SECOND;
        run.compare(0)?;
        (0..16).for_each(|_| run.store.sweep(run.now()));
        prop_assert_eq!(run.store.scopes(), 0);
        run.compare(0)?;
    }

    #[test]
    fn no_trailing_window_ever_holds_more_than_its_limit(start in starts(), steps in steps(true)) {
        let mut run = Run::new(start);
        for step in steps {
            match step {
                // What was reserved bounds what is used; what an upstream takes beyond is the other test's subject.
                Step::Settle { lease, tokens } => {
                    let id = run.ids.get(lease % run.ids.len().max(1)).copied();
                    let Some(id) = id.filter(|id| run.model.leases.contains_key(id)) else { continue };
                    let used = tokens.min(run.model.leases[&id].estimate);
                    run.settle(lease, used)?;
                    let charges = run.charges.iter_mut().filter(|charge| charge.id == id);
                    charges.filter(|charge| charge.place.2.unit() == Unit::Tokens).for_each(|charge| charge.n = used);
                }
                Step::Renew { .. } | Step::Sweep => {}
                other => run.step(other)?,
            }
        }
        run.assert_trailing_windows()?;
    }

    #[test]
    fn used_and_held_together_are_what_was_settled_and_what_is_open(
        calls in prop::collection::vec((1..200u64, 0..200u64, prop::option::of(0..400u64)), 1..60),
    ) {
        let limits = Limits { tokens_per_day: limit(u64::MAX), concurrency: limit(u64::MAX), ..Limits::default() };
        let plan: Plan = [&Arc::new(RuleSet::new(Scope::Key, "a", &limits))].into_iter().collect();
        let store = MemoryStore::new(None);
        let now = Instant64::from_secs(1_000_000_000);
        let (mut settled, mut open, mut live) = (0, 0, 0);
        for (prompt, completion, actual) in calls {
            let Verdicts::Admitted { id, reserved, .. } = store.reserve(&plan, Estimate { prompt, completion, guessed: false }, now)
            else { panic!("refused") };
            match actual {
                Some(actual) => {
                    prop_assert_eq!(store.settle(id, actual, now), Settled::Done);
                    prop_assert_eq!(store.settle(id, actual, now), Settled::Duplicate);
                    settled += actual;
                }
                None => {
                    open += reserved;
                    live += 1;
                }
            }
        }
        let standings = store.query(&plan, now);
        let found: Vec<_> = standings.iter().map(|standing| (standing.used(), standing.held())).collect();
        prop_assert_eq!(found, vec![(settled, open), (live, 0)]);
    }
}
