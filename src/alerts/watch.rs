//! What is looked at in the background, and when a change is worth telling. Pure: time comes in as an argument.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use tollgate_filters::retry::Admits;
use tollgate_filters::upstream::Upstream;

use super::Subject;
use crate::runtime::Runtime;

/// Something that holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Watched {
    since: Duration,
    fired: bool,
}

/// What is told of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Change {
    /// It has held for as long as was asked.
    Fired,
    /// It is over.
    Resolved,
}

/// Upstreams that have nothing but rate limits.
pub(super) fn limited(runtime: &Runtime, now: Duration) -> HashSet<Subject> {
    let limited = runtime.upstreams.values().filter(|upstream| is_limited(upstream, now));
    limited.map(|upstream| Subject::Upstream { upstream: Arc::clone(&upstream.name) }).collect()
}

/// No credential, or without credentials no node, that is not resting because of its rate. One that is yet to be tried
/// after its rest counts as resting.
fn is_limited(upstream: &Upstream, now: Duration) -> bool {
    if upstream.credentials.is_empty() {
        let mut nodes = upstream.nodes.iter().peekable();
        return nodes.peek().is_some() && nodes.all(|node| node.state.limited.admits(now) != Admits::Freely);
    }
    let rests = |state: &tollgate_filters::upstream::CredentialState| state.rest.admits(now) != Admits::Freely;
    upstream.credentials.iter().all(|credential| rests(&credential.state))
        && upstream.credentials.iter().any(|credential| !credential.is_refused())
}

/// Nodes that were taken out.
pub(super) fn down(runtime: &Runtime, now: Duration) -> HashSet<Subject> {
    let nodes = runtime.upstreams.values().flat_map(|upstream| upstream.nodes.iter().map(move |node| (upstream, node)));
    nodes
        .filter(|(_, node)| node.state.ejected.admits(now) != Admits::Freely)
        .map(|(upstream, node)| Subject::Node { upstream: Arc::clone(&upstream.name), node: Arc::clone(&node.name) })
        .collect()
}

/// What is to be told of a rule, and for how long it has held: once when it has held for `patience`, once when it is over.
pub(super) fn changes(
    known: &mut HashMap<(usize, Subject), Watched>,
    rule: usize,
    found: HashSet<Subject>,
    patience: Duration,
    now: Duration,
) -> Vec<(Subject, Change, Duration)> {
    let mut told = Vec::new();
    known.retain(|(of, subject), watched| {
        let holds = *of != rule || found.contains(subject);
        if !holds && watched.fired {
            told.push((subject.clone(), Change::Resolved, now.saturating_sub(watched.since)));
        }
        holds
    });
    for subject in found {
        let watched = known.entry((rule, subject.clone())).or_insert(Watched { since: now, fired: false });
        let lasted = now.saturating_sub(watched.since);
        if !watched.fired && lasted >= patience {
            watched.fired = true;
            told.push((subject, Change::Fired, lasted));
        }
    }
    told
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_change_is_told_once_when_it_has_lasted_and_once_when_it_is_over() {
        let mut known = HashMap::new();
        let it = || Subject::Upstream { upstream: "far".into() };
        let mut at = |second: u32, holds: bool| {
            let found = if holds { HashSet::from([it()]) } else { HashSet::new() };
            let told = changes(&mut known, 0, found, 5 * SECOND, second * SECOND);
            told.into_iter().map(|(_, change, lasted)| (change, lasted.as_secs())).collect::<Vec<_>>()
        };
        assert_eq!(at(1, true), []);
        assert_eq!(at(4, false), [], "it did not last");
        assert_eq!(at(5, true), []);
        assert_eq!(at(9, true), []);
        assert_eq!(at(10, true), [(Change::Fired, 5)]);
        assert_eq!(at(11, true), []);
        assert_eq!(at(15, false), [(Change::Resolved, 10)]);
        assert_eq!(at(16, false), []);
        assert_eq!(at(17, true), []);
    }

    #[test]
    fn rules_and_subjects_do_not_mix() {
        let mut known = HashMap::new();
        let node = |name: &str| Subject::Node { upstream: "far".into(), node: name.into() };
        let told = changes(&mut known, 0, HashSet::from([node("a"), node("b")]), Duration::ZERO, SECOND);
        assert_eq!(told.len(), 2);
        assert_eq!(changes(&mut known, 1, HashSet::new(), Duration::ZERO, SECOND), []);
        let told = changes(&mut known, 0, HashSet::from([node("b")]), Duration::ZERO, 2 * SECOND);
        assert_eq!(told, [(node("a"), Change::Resolved, SECOND)]);
    }
}
