//! Leases: what was admitted and is not settled yet.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use parking_lot::Mutex;
use smallvec::SmallVec;

use super::{LeaseId, Renewed};
use crate::limit::rule::Plan;
use crate::limit::window::Grant;

const SHARDS: usize = 64;

/// One admitted call.
#[derive(Debug)]
pub(super) struct Lease {
    pub(super) admitted: u64,
    /// What was charged or held at admission.
    pub(super) estimate: u64,
    /// What to charge if nobody settles it: the prompt, then the last known progress.
    pub(super) charge: u64,
    pub(super) expires: u64,
    /// It expired and was charged with `charge`; kept so that a late settlement corrects that.
    pub(super) expired: bool,
    pub(super) plan: Plan,
    /// One per rule of the plan, in its order.
    pub(super) grants: SmallVec<[Grant; 8]>,
}

/// Numbers are given out one after the other: their low bits choose the shard, so the table needs them spread.
#[derive(Debug, Default, Clone, Copy)]
struct Spread(u64);

impl Hasher for Spread {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.write_u64(u64::from(*byte)));
    }

    fn write_u64(&mut self, number: u64) {
        let product = (self.0 ^ number).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = product ^ (product >> 32);
    }
}

type Shard = HashMap<u64, Lease, BuildHasherDefault<Spread>>;

/// All leases, in shards by their number.
#[derive(Debug)]
pub(super) struct LeaseTable {
    shards: Box<[Mutex<Shard>]>,
}

impl LeaseTable {
    pub(super) fn new() -> Self {
        Self { shards: (0..SHARDS).map(|_| Mutex::default()).collect() }
    }

    #[allow(clippy::cast_possible_truncation, reason = "only the bits below SHARDS are wanted")]
    fn shard(&self, id: u64) -> Option<&Mutex<Shard>> {
        self.shards.get(id as usize % SHARDS)
    }

    pub(super) fn insert(&self, id: LeaseId, lease: Lease) {
        if let Some(shard) = self.shard(id.0) {
            shard.lock().insert(id.0, lease);
        }
    }

    pub(super) fn remove(&self, id: LeaseId) -> Option<Lease> {
        self.shard(id.0)?.lock().remove(&id.0)
    }

    pub(super) fn with(&self, id: LeaseId, work: impl FnOnce(&mut Lease) -> Renewed) -> Renewed {
        self.shard(id.0).and_then(|shard| shard.lock().get_mut(&id.0).map(work)).unwrap_or(Renewed::Unknown)
    }

    /// Hands every lease past its time to `work`, and keeps it if that says so.
    pub(super) fn expire(&self, now: u64, mut work: impl FnMut(&mut Lease) -> bool) {
        for shard in &self.shards {
            shard.lock().retain(|_, lease| lease.expires > now || work(lease));
        }
    }
}
