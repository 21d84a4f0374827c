//! Session: a stable node per session mark; a call without one goes where there is least to do.

use super::{Candidate, Marks, least_request, prefix_hash};

/// The node of the session, or the least loaded one.
pub fn pick(candidates: &[Candidate], marks: Marks, load_factor: f64) -> Option<usize> {
    match marks.session {
        Some(key) => prefix_hash::pick(candidates, key, load_factor),
        None => least_request::pick(candidates, marks.random),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_stays_and_a_call_without_one_takes_the_emptiest_node() {
        let nodes = [(1, 4), (2, 4), (3, 3)].map(|(seed, inflight)| Candidate { inflight, weight: 1, seed });
        let with = |session, random| pick(&nodes, Marks { session, random, ..Marks::default() }, 1.25);
        assert_eq!(with(Some(5), 1), with(Some(5), 2));
        assert_eq!(with(None, 1), Some(2));
    }
}
