//! Prefix hash: rendezvous hashing of the conversation's anchor with a bounded load. Stateless, so several gateways
//! agree without talking to each other, and a node that goes away moves only its own share.

use super::{Candidate, mix};

/// The best-ranked candidate for `key` whose load stays within `load_factor` times the mean.
pub fn pick(candidates: &[Candidate], key: u64, load_factor: f64) -> Option<usize> {
    let weight: f64 = candidates.iter().map(|c| f64::from(c.weight.max(1))).sum();
    let inflight: f64 = candidates.iter().map(|c| f64::from(c.inflight)).sum();
    // Bounded loads (Mirrokni, Thorup, Zadimoghaddam): no node above ceil(factor x mean), the new call included.
    let bound = |c: &Candidate| (load_factor * (inflight + 1.0) * f64::from(c.weight.max(1)) / weight).ceil();
    let ranked = |within: bool| {
        candidates
            .iter()
            .enumerate()
            .filter(|(_, c)| !within || f64::from(c.inflight) + 1.0 <= bound(c))
            .max_by(|(_, a), (_, b)| score(a, key).total_cmp(&score(b, key)))
            .map(|(index, _)| index)
    };
    ranked(true).or_else(|| ranked(false))
}

/// Weighted rendezvous score: `-weight / ln(u)` with `u` uniform in (0, 1) from the hash of node and key.
fn score(candidate: &Candidate, key: u64) -> f64 {
    let bits = mix(candidate.seed, key) >> 11;
    let u = (bits as f64 + 0.5) / (1u64 << 53) as f64;
    -f64::from(candidate.weight.max(1)) / u.ln()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nodes(n: u64) -> Vec<Candidate> {
        (1..=n).map(|i| Candidate { inflight: 0, weight: 1, seed: mix(i, 99) }).collect()
    }

    #[test]
    fn the_same_prompt_goes_to_the_same_node_whatever_the_order_of_nodes() {
        let forward = nodes(5);
        let mut backward = forward.clone();
        backward.reverse();
        for key in 0..200 {
            let a = forward[pick(&forward, key, 1.25).unwrap()].seed;
            let b = backward[pick(&backward, key, 1.25).unwrap()].seed;
            assert_eq!(a, b);
        }
    }

    #[test]
    fn a_lost_node_moves_only_its_own_share_and_spreads_it() {
        let all = nodes(5);
        let left: Vec<_> = all.iter().copied().filter(|c| c.seed != all[2].seed).collect();
        let mut moved_to = std::collections::HashMap::new();
        for key in 0..5000 {
            let before = all[pick(&all, key, 1.25).unwrap()].seed;
            let after = left[pick(&left, key, 1.25).unwrap()].seed;
            if before == all[2].seed {
                *moved_to.entry(after).or_insert(0) += 1;
            } else {
                assert_eq!(before, after);
            }
        }
        assert_eq!(moved_to.len(), 4, "a dead node's traffic spreads over all survivors");
    }

    #[test]
    fn weights_share_the_keys() {
        let mut pair = nodes(2);
        pair[1].weight = 3;
        let second = (0..8000).filter(|&key| pick(&pair, key, 1.25) == Some(1)).count();
        assert!((5700..6300).contains(&second), "{second}");
    }

    #[test]
    fn a_node_above_the_bound_passes_the_call_on() {
        let mut three = nodes(3);
        let home = pick(&three, 42, 1.25).unwrap();
        three[home].inflight = 10;
        assert_ne!(pick(&three, 42, 1.25), Some(home));
        three.iter_mut().for_each(|c| c.inflight = 10);
        assert_eq!(pick(&three, 42, 1.25), Some(home), "evenly loaded nodes keep their conversations");
    }
}
