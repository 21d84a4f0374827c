//! Round robin by weight: a turn counter walks through as many places as the weights add up to.

use super::Candidate;

/// The candidate whose turn it is.
pub fn pick(candidates: &[Candidate], turn: usize) -> Option<usize> {
    let total: usize = candidates.iter().map(|c| c.weight.max(1) as usize).sum();
    let mut place = turn.checked_rem(total)?;
    // Interleaved: each pass over the nodes gives one place to every node that has weight left.
    for round in 0.. {
        for (index, candidate) in candidates.iter().enumerate() {
            if candidate.weight.max(1) as usize > round {
                if place == 0 {
                    return Some(index);
                }
                place -= 1;
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_share_the_turns_and_interleave() {
        let nodes = [1, 3].map(|weight| Candidate { inflight: 0, weight, seed: 0 });
        let picks: Vec<_> = (0..8).filter_map(|turn| pick(&nodes, turn)).collect();
        assert_eq!(picks, [0, 1, 1, 1, 0, 1, 1, 1]);
        assert_eq!(pick(&[], 3), None);
    }
}
