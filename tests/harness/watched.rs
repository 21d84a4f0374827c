//! What the scripts of a redis-server write, seen as it happens.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

/// When each lease was given by the server's clock, in microseconds, and what was said of it when it was written.
#[derive(Default)]
struct Given {
    at: HashMap<String, u64>,
    text: HashMap<String, String>,
}

/// What a server's scripts write, as it tells whoever asks to watch.
#[derive(Clone, Default)]
pub(crate) struct Watched(Arc<Mutex<Given>>);

impl Watched {
    /// When leases of calls of this key were given, in order.
    pub(crate) fn admissions(&self, key: &str) -> Vec<u64> {
        let given = self.0.lock().expect("leases");
        let scope = format!("tg:{{tg}}:s:k:{key}");
        let of_key = |id: &&String| given.text.get(*id).is_some_and(|text| text.contains(&scope));
        let mut times: Vec<u64> = given.at.keys().filter(of_key).map(|id| given.at[id]).collect();
        times.sort_unstable();
        times
    }

    /// Takes in one line of what the server tells.
    pub(crate) fn line(&self, line: &str) {
        let Some((head, command)) = line.split_once(" lua] ") else { return };
        let words: Vec<&str> = command.splitn(4, ' ').map(|word| word.trim_matches('"')).collect();
        let mut given = self.0.lock().expect("leases");
        match words.as_slice() {
            // Only the first: later ones renew it, or bury it.
            ["ZADD", "tg:{tg}:z", expiry, id] => {
                // The server tells when it wrote; the expiry is exact, and lies whole seconds after the admission.
                let expiry: u64 = expiry.parse().expect("a time");
                let stamp = head.split(' ').next().unwrap_or_default().replace('.', "");
                let ttl = expiry.saturating_sub(stamp.parse().expect("a time"));
                given.at.entry((*id).to_owned()).or_insert(expiry - (ttl + 500_000) / 1_000_000 * 1_000_000);
            }
            ["HSET", "tg:{tg}:l", id, text] => {
                given.text.entry((*id).to_owned()).or_insert_with(|| (*text).to_owned());
            }
            _ => {}
        }
    }
}
