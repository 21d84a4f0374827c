//! Whether earlier routes take everything a later one matches.

use std::collections::{BTreeMap, BTreeSet};

use crate::config::{Match, Route};

/// One path condition of a route.
#[derive(Clone, Copy)]
enum Pattern<'a> {
    Any,
    Path(&'a str),
    Prefix(&'a str),
}

fn patterns(matching: &Match) -> Vec<Pattern<'_>> {
    if matching.path.is_empty() && matching.prefix.is_empty() {
        return vec![Pattern::Any];
    }
    let paths = matching.path.iter().map(|path| Pattern::Path(path));
    paths.chain(matching.prefix.iter().map(|prefix| Pattern::Prefix(prefix))).collect()
}

/// The routes among `earlier` that together leave nothing for `route`; none if something is left, as far as can be told.
pub(super) fn shadowed_by(route: &Route, earlier: &[Route]) -> Option<BTreeSet<usize>> {
    let wide: Vec<(usize, &Route)> =
        earlier.iter().enumerate().filter(|(_, first)| conditions_cover(&first.matching, &route.matching)).collect();
    let taker = |pattern: &Pattern<'_>| {
        let takes = |first: &Route| patterns(&first.matching).iter().any(|wider| covers(*wider, *pattern));
        wide.iter().find(|(_, first)| takes(first)).map(|(index, _)| *index)
    };
    patterns(&route.matching).iter().map(taker).collect()
}

/// Whether every condition of `wide` but the path holds wherever those of `narrow` do.
fn conditions_cover(wide: &Match, narrow: &Match) -> bool {
    let methods = wide.method.is_empty()
        || !narrow.method.is_empty() && narrow.method.iter().all(|method| wide.method.contains(method));
    let hosts = wide.host.is_empty()
        || !narrow.host.is_empty()
            && narrow.host.iter().all(|host| wide.host.iter().any(|wider| host_covers(wider, host)));
    methods && hosts && lower(&wide.header).is_subset(&lower(&narrow.header)) && {
        wide.query.iter().all(|(name, value)| narrow.query.get(name) == Some(value))
    }
}

fn lower(headers: &BTreeMap<String, String>) -> BTreeSet<(String, &String)> {
    headers.iter().map(|(name, value)| (name.to_ascii_lowercase(), value)).collect()
}

fn host_covers(wide: &str, narrow: &str) -> bool {
    let (wide, narrow) = (wide.to_ascii_lowercase(), narrow.to_ascii_lowercase());
    wide == narrow || wide.strip_prefix('*').is_some_and(|end| narrow.trim_start_matches('*').ends_with(end))
}

fn covers(wide: Pattern<'_>, narrow: Pattern<'_>) -> bool {
    match (wide, narrow) {
        (Pattern::Any, _) | (Pattern::Prefix("/"), _) => true,
        (Pattern::Prefix(wide), Pattern::Path(narrow)) => prefix_covers(wide, narrow),
        // `/v1` also takes the path /v1 itself, which a prefix `/v1/` may not.
        (Pattern::Prefix(wide), Pattern::Prefix(narrow)) => prefix_covers(wide, narrow),
        (Pattern::Path(wide), Pattern::Path(narrow)) => {
            let segments = |path: &str| path.split('/').map(str::to_owned).collect::<Vec<_>>();
            let (wide, narrow) = (segments(wide), segments(narrow));
            wide.len() == narrow.len() && wide.iter().zip(&narrow).all(|(wide, narrow)| wide == "*" || wide == narrow)
        }
        (Pattern::Path(_), Pattern::Prefix(_) | Pattern::Any) | (Pattern::Prefix(_), Pattern::Any) => false,
    }
}

fn prefix_covers(wide: &str, narrow: &str) -> bool {
    narrow == wide || narrow.strip_prefix(wide.trim_end_matches('/')).is_some_and(|rest| rest.starts_with('/'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn takes(earlier: &[&str], later: &str) -> bool {
        let route = |text: &str| -> Route { serde_yaml::from_str(&format!("{{ name: r, match: {text} }}")).unwrap() };
        let earlier: Vec<Route> = earlier.iter().map(|text| route(text)).collect();
        shadowed_by(&route(later), &earlier).is_some()
    }

    #[test]
    fn a_wider_path_takes_a_narrower_one() {
        assert!(takes(&["{prefix: /}"], "{path: /a}"));
        assert!(takes(&["{prefix: /v1/}"], "{path: [/v1/a, /v1/b]}"));
        assert!(takes(&["{prefix: /v1/}"], "{prefix: /v1/chat}"));
        assert!(takes(&["{path: /apps/*/run}"], "{path: /apps/one/run}"));
        assert!(takes(&["{path: /a}", "{path: [/b, /c]}"], "{path: [/a, /b]}"));
        assert!(takes(&["{host: a.org}"], "{host: a.org, path: /x}"));
        assert!(takes(&["{prefix: /, host: '*.a.org'}"], "{prefix: /x, host: [b.a.org, '*.c.a.org']}"));
    }

    #[test]
    fn a_route_that_still_gets_something_is_not_taken() {
        assert!(!takes(&["{prefix: /v1/}"], "{prefix: /}"));
        assert!(!takes(&["{prefix: /v1}"], "{path: /v1x}"));
        assert!(!takes(&["{path: /a}"], "{path: [/a, /b]}"));
        assert!(!takes(&["{path: /apps/one/run}"], "{path: /apps/*/run}"));
        assert!(!takes(&["{prefix: /, method: POST}"], "{path: /a}"));
        assert!(!takes(&["{prefix: /, method: POST}"], "{path: /a, method: [POST, GET]}"));
        assert!(!takes(&["{prefix: /, host: a.org}"], "{path: /a, host: b.org}"));
        assert!(!takes(&["{prefix: /, header: {x: '1'}}"], "{path: /a, header: {x: '2'}}"));
        assert!(!takes(&["{prefix: /, query: {x: '1'}}"], "{path: /a}"));
    }

    #[test]
    fn conditions_beside_the_path_are_compared_as_they_are_matched() {
        assert!(takes(&["{prefix: /, header: {X-App: '1'}}"], "{path: /a, header: {x-app: '1', y: '2'}}"));
        assert!(takes(&["{prefix: /, method: [POST, GET]}"], "{path: /a, method: GET}"));
    }
}
