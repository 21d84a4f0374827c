//! Which node of an upstream takes a call. Policies are pure: candidates, the call's marks and a random number in, an index out.

pub mod least_request;
pub mod prefix_hash;
pub mod round_robin;
pub mod session;

/// How an upstream chooses among its nodes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Policy {
    /// The node with the fewest calls in flight relative to its weight.
    LeastRequest,
    /// One after the other, by weight.
    RoundRobin,
    /// A stable node per conversation, bounded by load: `load_factor` times the mean at most.
    PrefixHash {
        /// Bound on a node's load relative to the mean, 1.25 by default.
        load_factor: f64,
    },
    /// A stable node per session mark (header, `prompt_cache_key`, `user`).
    Session {
        /// Bound as above.
        load_factor: f64,
    },
}

impl Policy {
    /// Its word in the configuration.
    pub const fn name(self) -> &'static str {
        match self {
            Self::LeastRequest => "least_request",
            Self::RoundRobin => "round_robin",
            Self::PrefixHash { .. } => "prefix_hash",
            Self::Session { .. } => "session",
        }
    }
}

/// A node that may take the call, as a policy sees it. Nodes that are down, full or already tried are not candidates.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Candidate {
    /// Calls in flight on it.
    pub inflight: u32,
    /// Its weight, at least 1.
    pub weight: u32,
    /// Stable hash of its name.
    pub seed: u64,
}

impl Candidate {
    /// Load that the node would have with one call more, per weight.
    pub fn load(&self) -> f64 {
        (f64::from(self.inflight) + 1.0) / f64::from(self.weight.max(1))
    }
}

/// What a policy may look at of the call.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Marks {
    /// Hash over the first blocks of the prompt.
    pub anchor: u64,
    /// Hash of the session mark, if the call carries one.
    pub session: Option<u64>,
    /// A fresh random number, to break ties.
    pub random: u64,
    /// Which turn of the upstream the call has; the same for all its attempts, so that retries skip nobody else's turn.
    pub turn: usize,
}

/// The index of the candidate that takes the call; `None` only if there is no candidate.
pub fn pick(policy: Policy, candidates: &[Candidate], marks: Marks) -> Option<usize> {
    match policy {
        Policy::LeastRequest => least_request::pick(candidates, marks.random),
        Policy::RoundRobin => round_robin::pick(candidates, marks.turn),
        Policy::PrefixHash { load_factor } => prefix_hash::pick(candidates, marks.anchor, load_factor),
        Policy::Session { load_factor } => session::pick(candidates, marks, load_factor),
    }
}

/// The hash of a session mark, a node's name or another text that decides about a place.
pub fn session_mark(text: &str) -> u64 {
    xxhash_rust::xxh3::xxh3_64(text.as_bytes())
}

/// Mixes two hashes into one (the finaliser of MurmurHash3 over their xor and product).
pub(crate) const fn mix(a: u64, b: u64) -> u64 {
    let mut h = a ^ b.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    h = (h ^ (h >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    h = (h ^ (h >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    h ^ (h >> 33)
}
