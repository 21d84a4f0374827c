//! Least request: the node with the fewest calls in flight per weight; ties are broken at random, so that several
//! gateways with the same view do not herd onto one node.

use super::{Candidate, mix};

/// The least loaded candidate.
pub fn pick(candidates: &[Candidate], random: u64) -> Option<usize> {
    let order = |c: &Candidate| mix(c.seed, random);
    candidates
        .iter()
        .enumerate()
        .min_by(|(_, a), (_, b)| a.load().total_cmp(&b.load()).then_with(|| order(a).cmp(&order(b))))
        .map(|(index, _)| index)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(seed: u64, inflight: u32, weight: u32) -> Candidate {
        Candidate { inflight, weight, seed }
    }

    #[test]
    fn the_emptiest_node_takes_the_call() {
        assert_eq!(pick(&[node(1, 3, 1), node(2, 1, 1), node(3, 2, 1)], 7), Some(1));
        assert_eq!(pick(&[], 7), None);
    }

    #[test]
    fn weight_counts_as_capacity() {
        assert_eq!(pick(&[node(1, 1, 1), node(2, 2, 4)], 7), Some(1));
    }

    #[test]
    fn ties_are_spread_over_all_nodes() {
        let nodes = [node(1, 0, 1), node(2, 0, 1), node(3, 0, 1)];
        let mut hits = [0u32; 3];
        for random in 0..3000 {
            hits[pick(&nodes, random).unwrap()] += 1;
        }
        assert!(hits.iter().all(|&n| n > 850), "{hits:?}");
    }
}
