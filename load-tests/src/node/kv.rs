//! The KV prefix cache: blocks of prompt text named by the hash of everything before them, the least recent leaving first.

use std::collections::{BTreeMap, HashMap};

use xxhash_rust::xxh3::xxh3_64_with_seed;

/// Bytes of text that count as one token.
pub(crate) const BYTES_PER_TOKEN: usize = 4;

/// Tokens of a text: its bytes by four, rounded up.
pub(crate) fn tokens_of(bytes: usize) -> usize {
    bytes.div_ceil(BYTES_PER_TOKEN)
}

/// The names of the whole blocks of a text, each covering all text up to its own end.
pub(crate) fn chain(text: &[u8], block_tokens: usize) -> Vec<u64> {
    let size = block_tokens.max(1).saturating_mul(BYTES_PER_TOKEN);
    let mut name = 0;
    text.chunks_exact(size)
        .map(|block| {
            name = xxh3_64_with_seed(block, name);
            name
        })
        .collect()
}

/// Blocks held by a node.
#[derive(Debug)]
pub(crate) struct PrefixCache {
    capacity: usize,
    clock: u64,
    used: HashMap<u64, u64>,
    by_age: BTreeMap<u64, u64>,
}

impl PrefixCache {
    pub(crate) fn new(capacity: usize) -> Self {
        Self { capacity, clock: 0, used: HashMap::new(), by_age: BTreeMap::new() }
    }

    /// How many leading blocks of a chain are held; they become the most recent.
    pub(crate) fn find(&mut self, chain: &[u64]) -> usize {
        let held = chain.iter().take_while(|name| self.used.contains_key(name)).count();
        self.touch(chain.iter().take(held));
        held
    }

    /// Holds the blocks of a chain, as many from its start as fit.
    pub(crate) fn insert(&mut self, chain: &[u64]) {
        self.touch(chain.iter().take(self.capacity));
        while self.used.len() > self.capacity {
            if let Some((_, name)) = self.by_age.pop_first() {
                self.used.remove(&name);
            }
        }
    }

    // The end of a chain is marked as older than its start: a prefix is worth more than what follows it.
    fn touch<'a>(&mut self, names: impl DoubleEndedIterator<Item = &'a u64>) {
        for name in names.rev() {
            self.clock += 1;
            if let Some(before) = self.used.insert(*name, self.clock) {
                self.by_age.remove(&before);
            }
            self.by_age.insert(self.clock, *name);
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.used.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_share_the_blocks_of_their_common_prefix_only() {
        let a = chain(&[b'a'; 64], 4);
        let mut text = [b'a'; 64];
        text[40] = b'b';
        let b = chain(&text, 4);
        assert_eq!(a.len(), 4);
        assert_eq!(a[..2], b[..2]);
        assert_ne!(a[2], b[2]);
        assert_ne!(a[3], b[3], "a block after the difference has another name though its own text is the same");
    }

    #[test]
    fn the_least_recent_chain_leaves_first() {
        let mut cache = PrefixCache::new(4);
        cache.insert(&[1, 2]);
        cache.insert(&[3, 4]);
        assert_eq!(cache.find(&[1, 2]), 2);
        cache.insert(&[5]);
        assert_eq!(cache.find(&[1, 2]), 2);
        assert_eq!(cache.find(&[3, 4]), 1, "the end of the older chain left");
        assert_eq!(cache.len(), 4);
    }

    #[test]
    fn a_chain_larger_than_the_cache_keeps_its_start() {
        let mut cache = PrefixCache::new(3);
        cache.insert(&[1, 2, 3, 4, 5]);
        assert_eq!(cache.find(&[1, 2, 3, 4, 5]), 3);
    }

    #[test]
    fn a_cache_of_nothing_holds_nothing() {
        let mut cache = PrefixCache::new(0);
        cache.insert(&[1]);
        assert_eq!((cache.find(&[1]), cache.len()), (0, 0));
    }
}
