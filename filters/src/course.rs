//! Which attempt comes next: targets in order, nodes by balance, credentials in turn; what rests is passed over, what is
//! silent is not asked twice, and no upstream gets more extra attempts than its budget allows. Pure but for the places that
//! it takes: time and chance come in as arguments.

use std::sync::Arc;
use std::time::Duration;

use smallvec::SmallVec;

use crate::balance::{self, Candidate, Marks};
use crate::dialect::Dialect;
use crate::error::{GatewayError, Unavailable};
use crate::model::{Model, Target};
use crate::retry::{Admits, Class, Failure, Probe, backoff};
use crate::upstream::{Credential, InFlight, Joined, Key, Node, Ticket, Upstream};

/// A rate limit is waited for if it ends within this and there is nothing else to go to.
const SHORT: Duration = Duration::from_secs(2);

/// An attempt to make. Its places are held until it is dropped.
#[derive(Debug)]
pub struct Chosen {
    /// Place of the target in the model.
    pub index: usize,
    /// The target.
    pub target: Target,
    /// The node.
    pub node: Arc<Node>,
    /// The credential, where the upstream has any.
    pub credential: Option<Credential>,
    /// Counts the call on the node.
    pub guard: InFlight,
    /// Places of the one call that tries after a rest; to be dropped once it is known what came of it.
    pub probes: SmallVec<[Probe; 2]>,
}

/// What comes next.
#[derive(Debug)]
pub enum Step {
    /// Make this attempt.
    Attempt(Box<Chosen>),
    /// Ask again after that time.
    Wait(Duration),
    /// Wait for a slot, then tell [`Course::waited`] and ask again.
    Queue(Box<Place>),
    /// There is no further attempt: this is the client's answer.
    Over(GatewayError),
}

/// A place in the queue of an upstream. Dropping it leaves the queue.
#[derive(Debug)]
pub struct Place {
    index: usize,
    ticket: Ticket,
    /// The upstream that is waited for.
    pub upstream: Arc<str>,
    /// Since when.
    pub since: Duration,
    /// When to ask again if there was no slot until then.
    pub until: Duration,
    /// Whether the call's patience ends then.
    pub last: bool,
}

impl Place {
    /// Waits for a slot; `None` if there is no more hope for one. May be dropped and called again.
    pub async fn slot(&mut self) -> Option<InFlight> {
        self.ticket.slot().await
    }
}

/// A node that was asked, and for which target.
#[derive(Debug)]
struct Tried {
    target: usize,
    node: Arc<Node>,
    class: Class,
    /// It is not asked for another target either.
    silent: bool,
    /// Not the node was at fault but the credential: another one may be tried there.
    by_credential: bool,
    retry_after: Option<Duration>,
    /// How often.
    times: u32,
}

/// Why a target was passed over without an attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Passed {
    /// All its nodes were tried, or it has none.
    Exhausted,
    /// What it has of nodes or credentials rests until then because of a rate limit.
    Limited(Duration),
    /// Its credentials were refused.
    Refused,
    /// Its nodes are taken out.
    Out,
    /// Its nodes have as many calls as they may.
    Full,
    /// It has had its extra attempts.
    Spent,
}

/// The attempts of one call.
#[derive(Debug)]
pub struct Course {
    model: Arc<Model>,
    tried: SmallVec<[Tried; 4]>,
    last: Option<Failure>,
    attempts: u32,
    repeats: u32,
    /// Which of `tried` is asked again, now that the wait for it is over.
    again: Option<usize>,
    /// No wait goes beyond this.
    deadline: Duration,
    /// Only targets that can go on with an answer are asked.
    continuing: bool,
    /// Whose call it is, for the order in a queue.
    key: Option<Arc<str>>,
    /// Until when the call waits for nodes of a target.
    patience: SmallVec<[(usize, Duration); 2]>,
    /// A place that is kept while something else is looked at.
    place: Option<Box<Place>>,
    /// A slot of a target that was waited for.
    slot: Option<(usize, InFlight)>,
    /// Targets that may not be asked before that time, as their provider's grant is used up.
    withheld: SmallVec<[(usize, Duration); 2]>,
}

impl Course {
    /// The course of a call that begins at `now`.
    pub fn new(model: Arc<Model>, now: Duration) -> Self {
        let longest = model.targets.iter().map(|target| target.upstream.timeouts.total).max().unwrap_or_default();
        let deadline = now.saturating_add(longest);
        Self {
            model,
            tried: SmallVec::new(),
            last: None,
            attempts: 0,
            repeats: 0,
            again: None,
            deadline,
            continuing: false,
            key: None,
            patience: SmallVec::new(),
            place: None,
            slot: None,
            withheld: SmallVec::new(),
        }
    }

    /// The same for a call of that key.
    #[must_use]
    pub fn of(self, key: Option<Arc<str>>) -> Self {
        Self { key, ..self }
    }

    /// Attempts made so far.
    pub const fn attempts(&self) -> u32 {
        self.attempts
    }

    /// What came of the last attempt.
    pub const fn last(&self) -> Option<&Failure> {
        self.last.as_ref()
    }

    /// The model that was asked for.
    pub const fn model(&self) -> &Arc<Model> {
        &self.model
    }

    /// From now on, only targets come next that can go on with an answer that another node began.
    pub const fn go_on(&mut self) {
        self.continuing = true;
    }

    fn may_ask_for_rest(&self, index: usize) -> bool {
        !self.continuing || self.model.targets.get(index).is_some_and(|target| target.continues)
    }

    /// What comes next. `random` lies in 0..1.
    pub fn next(&mut self, now: Duration, marks: Marks, random: f64) -> Step {
        if self.attempts >= self.model.retry.attempts || self.is_final() {
            return Step::Over(self.error(now, None));
        }
        if let Some((index, slot)) = self.slot.take()
            && let Ok(chosen) = self.seat(index, slot, now)
        {
            return self.attempt(chosen);
        }
        let mut passed: SmallVec<[Passed; 4]> = SmallVec::new();
        let mut out: SmallVec<[usize; 4]> = SmallVec::new();
        let current = self.tried.last().map_or(0, |tried| tried.target);
        for index in current..self.model.targets.len() {
            if !self.may_ask_for_rest(index) || (index != current && !self.may_follow(index, &passed)) {
                continue;
            }
            match self.pick(index, now, marks, false) {
                Ok(chosen) => return self.attempt(chosen),
                Err(Passed::Out) => out.push(index),
                Err(Passed::Full) => match self.line_up(index, now) {
                    Ok(step) => return step,
                    Err(reason) => passed.push(reason),
                },
                Err(reason) => passed.push(reason),
            }
        }
        // All that is left is out: better one of those than nothing.
        for index in out {
            match self.pick(index, now, marks, true) {
                Ok(chosen) => return self.attempt(chosen),
                Err(reason) => passed.push(reason),
            }
        }
        if let Some(place) = self.again.take() {
            return match self.ask_again(place, now) {
                Ok(chosen) => self.attempt(chosen),
                Err(reason) => {
                    passed.push(reason);
                    Step::Over(self.error(now, Some(&passed)))
                }
            };
        }
        match self.repeat(now, random) {
            Some((place, wait)) => {
                self.again = Some(place);
                self.repeats += 1;
                Step::Wait(wait)
            }
            None => Step::Over(self.error(now, Some(&passed))),
        }
    }

    /// Notes what came of the wait that [`Step::Queue`] asked for.
    pub fn waited(&mut self, place: Box<Place>, slot: Option<InFlight>) {
        match slot {
            Some(slot) => self.slot = Some((place.index, slot)),
            None => self.place = Some(place),
        }
    }

    /// Notes that the chosen attempt was not made, as its provider has nothing left to grant before `until`.
    pub fn withheld(&mut self, index: usize, until: Duration) {
        self.attempts = self.attempts.saturating_sub(1);
        self.withheld.push((index, until));
    }

    /// Notes that the attempt failed.
    pub fn failed(&mut self, index: usize, node: &Arc<Node>, credential: Option<&Credential>, failure: Failure) {
        let by_credential = credential.is_some() && matches!(failure.class, Class::RateLimited | Class::Auth);
        let (class, silent, retry_after) = (failure.class, failure.silent, failure.retry_after);
        self.last = Some(failure);
        if let Some(known) = self.tried.iter().position(|t| t.target == index && Arc::ptr_eq(&t.node, node)) {
            // The order tells which target is the current one.
            let times = self.tried.remove(known).times + 1;
            self.tried.push(Tried {
                target: index,
                node: Arc::clone(node),
                class,
                silent,
                by_credential,
                retry_after,
                times,
            });
        } else {
            let node = Arc::clone(node);
            self.tried.push(Tried { target: index, node, class, silent, by_credential, retry_after, times: 1 });
        }
    }

    /// Whether a later target takes calls that fail with this class; for refusals that are the client's answer otherwise.
    pub fn has_taker(&self, index: usize, class: Class) -> bool {
        self.attempts < self.model.retry.attempts
            && self.model.targets.iter().skip(index + 1).any(|target| takes(target, class))
    }

    /// A place in the queue of a target whose nodes are full.
    fn line_up(&mut self, index: usize, now: Duration) -> Result<Step, Passed> {
        let upstream = &self.model.targets.get(index).ok_or(Passed::Exhausted)?.upstream;
        if upstream.queue.size() == 0 {
            return Err(Passed::Full);
        }
        let known = self.patience.iter().find(|(at, _)| *at == index).map(|(_, until)| *until);
        let patience = known.unwrap_or_else(|| now.saturating_add(upstream.queue.wait()).min(self.deadline));
        if known.is_none() {
            self.patience.push((index, patience));
        }
        let kept = self.place.take().filter(|place| place.index == index);
        if now >= patience {
            return Err(Passed::Full);
        }
        let fit = || upstream.nodes.iter().filter(|node| node.weight > 0 && !self.was_tried(index, node));
        // A node whose rest ends is worth a look: the queue hands out no slot of it before somebody has tried it.
        let rests = fit().filter_map(|node| match node.state.admits(now) {
            Admits::NotBefore(until) if until > now => Some(until),
            Admits::NotBefore(_) | Admits::OneCall | Admits::Freely => None,
        });
        let until = rests.min().unwrap_or(patience).min(patience);
        if let Some(mut place) = kept {
            (place.until, place.last) = (until, until == patience);
            return Ok(Step::Queue(place));
        }
        let key = self.key.clone().unwrap_or_else(|| "".into());
        match upstream.queue.join(&key, fit().map(|node| Arc::clone(&node.state)).collect()) {
            Joined::Slot(slot) => self.seat(index, slot, now).map(|chosen| self.attempt(chosen)),
            Joined::Waits(ticket) => {
                let upstream = Arc::clone(&upstream.name);
                Ok(Step::Queue(Box::new(Place { index, ticket, upstream, since: now, until, last: until == patience })))
            }
            Joined::Full => Err(Passed::Full),
        }
    }

    /// An attempt on the node that a slot is of.
    fn seat(&self, index: usize, slot: InFlight, now: Duration) -> Result<Box<Chosen>, Passed> {
        let target = self.model.targets.get(index).ok_or(Passed::Exhausted)?;
        let node = target.upstream.nodes.iter().find(|node| slot.is_on(node)).ok_or(Passed::Full)?;
        if node.state.admits(now) != Admits::Freely {
            return Err(Passed::Out);
        }
        self.with_key(index, node, slot, SmallVec::new(), now)
    }

    fn attempt(&mut self, chosen: Box<Chosen>) -> Step {
        self.place = None;
        self.attempts += 1;
        Step::Attempt(chosen)
    }

    /// A Dify run must not start twice: it is tried again only if it surely did not start.
    fn is_final(&self) -> bool {
        let (Some(failure), Some(tried)) = (&self.last, self.tried.last()) else { return false };
        let dialect = self.model.targets.get(tried.target).map(|target| target.upstream.dialect);
        dialect == Some(Dialect::Dify) && !failure.unprocessed
    }

    /// Whether a target may follow after what happened; where nothing was tried yet, after what the others were passed over for.
    fn may_follow(&self, index: usize, passed: &[Passed]) -> bool {
        let Some(target) = self.model.targets.get(index) else { return false };
        match &self.last {
            // What was full is no failure: who follows it need not name it.
            Some(failure) if passed.contains(&Passed::Full) => {
                takes(target, failure.class)
                    || !matches!(failure.class, Class::ContextLength | Class::ContentFilter | Class::Auth)
            }
            Some(failure) => takes(target, failure.class),
            None => passed.iter().all(|reason| match reason {
                Passed::Limited(_) => takes(target, Class::RateLimited),
                Passed::Refused => takes(target, Class::Auth),
                Passed::Out | Passed::Full | Passed::Spent | Passed::Exhausted => true,
            }),
        }
    }

    fn was_tried(&self, target: usize, node: &Arc<Node>) -> bool {
        let spent = |t: &Tried| (t.target == target && !t.by_credential) || t.silent;
        self.tried.iter().any(|tried| Arc::ptr_eq(&tried.node, node) && spent(tried))
    }

    /// Takes the places for an attempt on a node of a target that was not tried for it. `out`: nodes that are taken out count too.
    fn pick(&self, index: usize, now: Duration, marks: Marks, out: bool) -> Result<Box<Chosen>, Passed> {
        let target = self.model.targets.get(index).ok_or(Passed::Exhausted)?;
        let upstream = &target.upstream;
        if let Some((_, until)) = self.withheld.iter().find(|(at, _)| *at == index) {
            return Err(Passed::Limited(*until));
        }
        let mut nodes: SmallVec<[&Arc<Node>; 16]> = SmallVec::new();
        let mut reason = Passed::Exhausted;
        let mut full = false;
        for node in upstream.nodes.iter().filter(|node| node.weight > 0 && !self.was_tried(index, node)) {
            match (node.state.ejected.admits(now), node.state.limited.admits(now)) {
                (_, Admits::NotBefore(until)) => reason = reason.or(Passed::Limited(until)),
                (Admits::NotBefore(_), _) if !out => reason = Passed::Out,
                _ => nodes.push(node),
            }
        }
        while !nodes.is_empty() {
            let weigh =
                |node: &&Arc<Node>| Candidate { inflight: node.state.inflight(), weight: node.weight, seed: node.seed };
            let candidates: SmallVec<[Candidate; 16]> = nodes.iter().map(weigh).collect();
            let Some(at) = balance::pick(upstream.policy, &candidates, marks) else { break };
            let node = nodes.remove(at);
            // Another call may have taken the place of the one that tries since we looked.
            let probes = if node.state.admits(now) == Admits::OneCall { node.state.probe(now) } else { None };
            let resting = node.state.admits(now) != Admits::Freely;
            if probes.is_none() && resting && !out {
                reason = Passed::Out;
                continue;
            }
            let Some(guard) = upstream.enter(node) else {
                full = true;
                continue;
            };
            return self.with_key(index, node, guard, probes.unwrap_or_default(), now);
        }
        Err(if full { Passed::Full } else { reason })
    }

    fn with_key(
        &self,
        index: usize,
        node: &Arc<Node>,
        guard: InFlight,
        mut probes: SmallVec<[Probe; 2]>,
        now: Duration,
    ) -> Result<Box<Chosen>, Passed> {
        let target = self.model.targets.get(index).ok_or(Passed::Exhausted)?;
        let upstream = &target.upstream;
        let credential = match upstream.key(now) {
            Key::None => None,
            Key::Use(credential, probe) => {
                probes.extend(probe);
                Some(credential)
            }
            Key::Resting(until) => return Err(resting(upstream, until)),
        };
        if !self.may_ask(upstream, now) {
            return Err(Passed::Spent);
        }
        Ok(Box::new(Chosen { index, target: target.clone(), node: Arc::clone(node), credential, guard, probes }))
    }

    /// Counts the attempt: as the call's first at the upstream, or as an extra one.
    fn may_ask(&self, upstream: &Arc<Upstream>, now: Duration) -> bool {
        let targets = &self.model.targets;
        let known = |t: &Tried| targets.get(t.target).is_some_and(|target| Arc::ptr_eq(&target.upstream, upstream));
        if self.tried.iter().any(known) {
            return upstream.extra.take(now, self.model.retry.budget);
        }
        upstream.extra.called(now);
        true
    }

    /// Which node is asked once more, and after what wait: the one that can be asked the soonest.
    fn repeat(&self, now: Duration, random: f64) -> Option<(usize, Duration)> {
        let retry = &self.model.retry;
        let pause = backoff(retry.backoff, self.repeats, retry.jitter.then_some(random));
        let wait = |tried: &Tried| match tried.class {
            _ if tried.silent || !self.may_ask_for_rest(tried.target) => None,
            Class::Connect | Class::ServerError | Class::FirstToken | Class::RateLimited => {
                Some(tried.retry_after.unwrap_or_default().max(pause)).filter(|wait| *wait <= SHORT.max(pause))
            }
            Class::Timeout | Class::Auth | Class::ContextLength | Class::ContentFilter => None,
        };
        let waits = self.tried.iter().enumerate().filter_map(|(place, tried)| Some((place, wait(tried)?)));
        let (place, wait) = waits.min_by_key(|(place, wait)| (*wait, *place))?;
        (now + wait < self.deadline).then_some((place, wait))
    }

    /// An attempt on a node that was asked before. The call has waited as long as it was told to: rests do not bind it.
    fn ask_again(&self, place: usize, now: Duration) -> Result<Box<Chosen>, Passed> {
        let tried = self.tried.get(place).ok_or(Passed::Exhausted)?;
        let target = self.model.targets.get(tried.target).ok_or(Passed::Exhausted)?;
        let upstream = &target.upstream;
        if self.withheld.iter().any(|(at, _)| *at == tried.target) {
            return Err(Passed::Exhausted);
        }
        let guard = upstream.enter(&tried.node).ok_or(Passed::Full)?;
        let (credential, probes) = match upstream.key(now) {
            Key::None => (None, SmallVec::new()),
            Key::Use(credential, probe) => (Some(credential), probe.into_iter().collect()),
            Key::Resting(until) => {
                let rested = upstream.credentials.iter().filter(|c| !c.is_refused()).min_by_key(|c| c.rests_until(now));
                (Some(rested.ok_or(Passed::Limited(until))?.clone()), SmallVec::new())
            }
        };
        if !self.may_ask(upstream, now) {
            return Err(Passed::Spent);
        }
        let node = Arc::clone(&tried.node);
        Ok(Box::new(Chosen { index: tried.target, target: target.clone(), node, credential, guard, probes }))
    }

    /// What the client is told when no attempt is left.
    fn error(&self, now: Duration, passed: Option<&[Passed]>) -> GatewayError {
        let passed = passed.unwrap_or_default();
        let limits = passed.iter().filter_map(|reason| match reason {
            Passed::Limited(until) => Some(until.saturating_sub(now)),
            _ => None,
        });
        let told = self.tried.iter().filter(|t| t.class == Class::RateLimited).filter_map(|t| t.retry_after);
        let limited = self.tried.iter().all(|tried| tried.class == Class::RateLimited);
        let nothing_else =
            passed.iter().all(|reason| matches!(reason, Passed::Limited(_) | Passed::Exhausted | Passed::Spent));
        if limited && nothing_else && (!self.tried.is_empty() || passed.iter().any(|r| matches!(r, Passed::Limited(_))))
        {
            // A cooldown of ours may be longer than what the provider said: its word is the truer one.
            return GatewayError::UpstreamRateLimited { retry_after: told.min().or_else(|| limits.min()) };
        }
        // That nothing could be reached is only true where nothing was.
        let failed = || self.tried.iter().rev().filter(|tried| tried.class != Class::RateLimited);
        if let Some(tried) = failed().find(|tried| tried.class != Class::Connect).or_else(|| failed().next()) {
            return Failure::new(tried.class, "").into_error();
        }
        if passed.contains(&Passed::Refused) {
            return GatewayError::UpstreamError;
        }
        if passed.contains(&Passed::Full) {
            return GatewayError::Unavailable(Unavailable::Overloaded);
        }
        GatewayError::Unavailable(Unavailable::NoHealthyUpstream)
    }
}

impl Passed {
    /// The reason that says more.
    const fn or(self, other: Self) -> Self {
        match self {
            Self::Exhausted => other,
            known => known,
        }
    }
}

fn resting(upstream: &Upstream, until: Duration) -> Passed {
    if upstream.credentials.iter().all(Credential::is_refused) { Passed::Refused } else { Passed::Limited(until) }
}

/// Whether a target takes a call that failed with this class before.
fn takes(target: &Target, class: Class) -> bool {
    if class == Class::ContextLength { target.larger_context } else { target.on.contains(&class) }
}

#[cfg(test)]
mod tests;
