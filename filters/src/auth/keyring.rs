//! Keys kept in Redis: looked up when they are first seen, believed for a while, given up as soon as they are revoked.
//!
//! A key is the hash `tg:key:<SHA-256 of the key>` with the fields `id`, `tier`, `models`, `routes`, `expires`, `limits`
//! `zone` (lists and limits as JSON, the time in seconds since the epoch); `tg:ids` finds it by its id. The hashes `user:<key>` with
//! `user_id` and `tier` of older gateways are read as well, and never written. Whoever changes a key publishes its hash.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use arc_swap::ArcSwapOption;
use futures::StreamExt;
use parking_lot::Mutex;
use redis::aio::PubSub;

use super::{Caller, KeyHash, hash_key};
use crate::config::Secret;
use crate::error::{GatewayError, Result};
use crate::limit::{Limits, Zone};
use crate::store::{Address, Connection, is_useless};

const IDS: &str = "tg:ids";
const NEWS: &str = "tg:keys";
/// How long a key is believed without asking again.
const BELIEVED: Duration = Duration::from_secs(30);
/// How long an unknown key is held for unknown.
const UNKNOWN: Duration = Duration::from_secs(2);
/// How long a key is believed while nobody can be asked: nobody can revoke it then either.
const AWAY: Duration = Duration::from_secs(600);
/// Keys that are remembered at most.
const MOST: usize = 65_536;
/// Keys that are listed with one question.
const AT_ONCE: usize = 500;
/// A longer key is none.
const LONGEST: usize = 512;
const PATIENCE: Duration = Duration::from_millis(250);
/// Between two looks whether the connections live, where nothing is heard.
const LOOK: Duration = Duration::from_secs(1);

/// A key as it is kept.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Record {
    /// Its id.
    pub id: String,
    /// Its tier, which the configuration has to know.
    pub tier: Option<String>,
    /// Models that it may ask for; `None` is all.
    pub models: Option<Vec<String>>,
    /// Routes that it may use; `None` is all.
    pub routes: Option<Vec<String>>,
    /// Seconds since the epoch from which on it is void.
    pub expires: Option<u64>,
    /// Limits in place of the tier's rows, as JSON.
    pub limits: Option<String>,
    /// The zone in which its days and months begin; `None` is UTC.
    pub zone: Option<String>,
}

/// Why a key was not made, found or changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// No key has this id.
    #[error("there is no key `{0}` in Redis")]
    Unknown(String),
    /// Another key has this id.
    #[error("there is a key `{0}` already")]
    Taken(String),
    /// What was asked for, or what is kept, is no key.
    #[error("{0}")]
    Unusable(String),
    /// The store cannot be asked.
    #[error("Redis does not answer: {0}")]
    Away(String),
}

type Kept<T> = std::result::Result<T, KeyError>;

// Each of these is one step, so that two who change the same key at the same time do not leave a third behind.
// KEYS the ids | ARGV the id, the channel, the hash of the new key if there is one, the fields of the record
const CREATE: &str = "if redis.call('HSETNX', KEYS[1], ARGV[1], ARGV[3]) == 0 then return 0 end
redis.call('HSET', 'tg:key:' .. ARGV[3], unpack(ARGV, 4))
redis.call('PUBLISH', ARGV[2], ARGV[3])
return 1";
const REVOKE: &str = "local hash = redis.call('HGET', KEYS[1], ARGV[1])
if not hash then return 0 end
redis.call('DEL', 'tg:key:' .. hash)
redis.call('HDEL', KEYS[1], ARGV[1])
redis.call('PUBLISH', ARGV[2], hash)
return 1";
const ROTATE: &str = "local hash = redis.call('HGET', KEYS[1], ARGV[1])
if not hash or redis.call('EXISTS', 'tg:key:' .. hash) == 0 then return 0 end
redis.call('RENAME', 'tg:key:' .. hash, 'tg:key:' .. ARGV[3])
redis.call('HSET', KEYS[1], ARGV[1], ARGV[3])
redis.call('PUBLISH', ARGV[2], hash)
return 1";

impl Record {
    /// The limits of its own.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn own_limits(&self) -> std::result::Result<Limits, String> {
        let text = self.limits.as_deref().unwrap_or("{}");
        serde_json::from_str(text).map_err(|error| error.to_string())
    }

    /// Where its days begin.
    ///
    /// # Errors
    /// A zone that nobody knows.
    pub fn own_zone(&self) -> std::result::Result<Zone, String> {
        let Some(name) = &self.zone else { return Ok(Zone::UTC) };
        Zone::named(name).ok_or_else(|| format!("there is no zone `{name}`"))
    }

    fn read(mut fields: BTreeMap<String, String>) -> std::result::Result<Self, String> {
        let list = |text: Option<String>| -> std::result::Result<Option<Vec<String>>, String> {
            text.map(|text| serde_json::from_str(&text)).transpose().map_err(|error| error.to_string())
        };
        let expires = fields.remove("expires").map(|text| text.parse::<u64>().map_err(|error| error.to_string()));
        let record = Self {
            id: fields.remove("id").filter(|id| !id.is_empty()).ok_or("it has no id")?,
            tier: fields.remove("tier"),
            models: list(fields.remove("models"))?,
            routes: list(fields.remove("routes"))?,
            expires: expires.transpose()?,
            limits: fields.remove("limits"),
            zone: fields.remove("zone"),
        };
        record.own_limits()?;
        Ok(record)
    }

    fn fields(&self) -> Vec<(&'static str, String)> {
        let list = |list: &Vec<String>| serde_json::to_string(list).unwrap_or_default();
        let all = [
            ("id", Some(self.id.clone())),
            ("tier", self.tier.clone()),
            ("models", self.models.as_ref().map(list)),
            ("routes", self.routes.as_ref().map(list)),
            ("expires", self.expires.map(|at| at.to_string())),
            ("limits", self.limits.clone()),
            ("zone", self.zone.clone()),
        ];
        all.into_iter().filter_map(|(name, value)| Some((name, value?))).collect()
    }
}

struct Seen {
    at: Instant,
    record: Option<Record>,
    /// What the configuration of that number made of it.
    made: Option<(u64, Arc<Caller>)>,
}

/// The keys of all gateways.
pub struct Keyring {
    address: Address,
    connection: ArcSwapOption<Connection>,
    budget: Duration,
    seen: Mutex<HashMap<KeyHash, Seen>>,
    /// Counts what was heard of changes; only changed under the lock of `seen`.
    heard: AtomicU64,
}

impl std::fmt::Debug for Keyring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Keyring").finish_non_exhaustive()
    }
}

impl Keyring {
    /// Connects, and listens for revocations from then on. Must be called in the tokio runtime that is to do so.
    pub async fn start(address: &Address, budget: Duration) -> Arc<Self> {
        let keyring = Arc::new(Self {
            address: address.clone(),
            connection: ArcSwapOption::empty(),
            budget,
            seen: Mutex::default(),
            heard: AtomicU64::new(0),
        });
        // Whoever writes keys wants to know why it fails; a gateway goes on trying.
        if let Err(error) = keyring.connect().await {
            tracing::warn!(%error, "the keys in Redis cannot be looked up");
        }
        tokio::spawn(listen(Arc::downgrade(&keyring)));
        keyring
    }

    async fn connect(&self) -> std::result::Result<(), String> {
        self.connection.store(Some(Arc::new(self.address.connect().await?)));
        Ok(())
    }

    /// Gives a connection up that is of no use: `listen` makes another, perhaps to another server.
    fn given_up(&self, connection: &Arc<Connection>, error: &redis::RedisError) {
        if is_useless(error) {
            self.drop_connection(connection);
        }
    }

    fn drop_connection(&self, connection: &Arc<Connection>) {
        self.connection.compare_and_swap(connection, None);
    }

    /// Who presents this key; `make` makes the caller for the configuration of that number, or says why it is none.
    ///
    /// # Errors
    /// `invalid_api_key` if it is unknown; `store_unavailable` if that cannot be found out in time.
    pub async fn find(
        &self,
        key: &[u8],
        generation: u64,
        make: impl Fn(&Record) -> std::result::Result<Caller, String>,
    ) -> Result<Arc<Caller>> {
        let Some(text) = std::str::from_utf8(key).ok().filter(|text| text.len() <= LONGEST) else {
            return Err(GatewayError::InvalidApiKey);
        };
        let hash = hash_key(key);
        if let Some(known) = self.known(&hash, generation, Instant::now(), false) {
            return known;
        }
        let heard = self.heard.load(Ordering::Acquire);
        let record = match tokio::time::timeout(self.budget, self.look_up(text, &hash)).await {
            Ok(Some(record)) => record,
            Ok(None) | Err(_) => {
                let known = self.known(&hash, generation, Instant::now(), true);
                return known.unwrap_or(Err(GatewayError::StoreUnavailable));
            }
        };
        let mut seen = self.seen.lock();
        let made = match (&record, seen.remove(&hash)) {
            // Unchanged: the same caller, with all that is known of its limits.
            (Some(record), Some(Seen { record: Some(before), made: Some((of, caller)), .. }))
                if before == *record && of == generation =>
            {
                Some(caller)
            }
            (Some(record), _) => match make(record) {
                Ok(caller) => Some(Arc::new(caller)),
                Err(why) => {
                    tracing::warn!(key = %record.id, why, "a key in Redis cannot be used");
                    None
                }
            },
            (None, _) => None,
        };
        let now = Instant::now();
        if seen.len() >= MOST {
            seen.retain(|_, known| {
                now.duration_since(known.at) < if known.made.is_some() { BELIEVED } else { UNKNOWN }
            });
        }
        // What was found may have been revoked while the answer was on its way: then it is not believed any longer.
        if seen.len() < MOST && self.heard.load(Ordering::Acquire) == heard {
            seen.insert(hash, Seen { at: now, record, made: made.clone().map(|caller| (generation, caller)) });
        }
        made.ok_or(GatewayError::InvalidApiKey)
    }

    fn known(&self, hash: &KeyHash, generation: u64, now: Instant, away: bool) -> Option<Result<Arc<Caller>>> {
        let seen = self.seen.lock();
        let known = seen.get(hash)?;
        let age = now.duration_since(known.at);
        match &known.made {
            Some((of, caller)) => {
                let fresh = age < if away { AWAY } else { BELIEVED };
                (fresh && *of == generation).then(|| Ok(Arc::clone(caller)))
            }
            None => (age < UNKNOWN).then_some(Err(GatewayError::InvalidApiKey)),
        }
    }

    /// `None` if the store cannot be asked, `Some(None)` if it does not know the key.
    async fn look_up(&self, key: &str, hash: &KeyHash) -> Option<Option<Record>> {
        let connection = self.connection.load_full()?;
        let mut both = redis::pipe();
        both.cmd("HGETALL").arg(place(hash)).cmd("HGETALL").arg(format!("user:{key}"));
        type Fields = BTreeMap<String, String>;
        let (ours, older): (Fields, Fields) = both
            .query_async(&mut connection.commands())
            .await
            .inspect_err(|error| self.given_up(&connection, error))
            .ok()?;
        if !ours.is_empty() {
            return Some(
                Record::read(ours).inspect_err(|why| tracing::warn!(why, "a key in Redis cannot be read")).ok(),
            );
        }
        let user = older.get("user_id").filter(|id| !id.is_empty()).cloned();
        // Without a tier nothing would limit it.
        Some(user.and_then(|id| Some(Record { id, tier: Some(older.get("tier")?.clone()), ..Record::default() })))
    }

    fn connection(&self) -> Kept<Arc<Connection>> {
        self.connection.load_full().ok_or_else(|| KeyError::Away("it cannot be reached".to_owned()))
    }

    async fn ask<T: redis::FromRedisValue>(&self, command: &redis::Cmd) -> Kept<T> {
        let connection = self.connection()?;
        let answer = command.query_async(&mut connection.commands()).await;
        answer.inspect_err(|error| self.given_up(&connection, error)).map_err(|error| away(&error))
    }

    /// Runs one of the scripts above for the key of that id. False if it found nothing to do.
    async fn change(&self, script: &str, id: &str, more: &[String]) -> Kept<bool> {
        self.ask(redis::cmd("EVAL").arg(script).arg(1).arg(IDS).arg(id).arg(NEWS).arg(more)).await
    }

    /// Keeps a new key under an id that no other has, and gives the key itself; it is kept nowhere.
    ///
    /// # Errors
    /// An id that is taken, limits or a zone that are none, a store that does not answer.
    pub async fn create(&self, record: &Record) -> Kept<Secret> {
        record.own_limits().map_err(KeyError::Unusable)?;
        record.own_zone().map_err(KeyError::Unusable)?;
        let secret = fresh();
        let hash = hex(&hash_key(secret.expose().as_bytes()));
        let fields = record.fields().into_iter().flat_map(|(name, value)| [name.to_owned(), value]);
        let more: Vec<String> = std::iter::once(hash).chain(fields).collect();
        if !self.change(CREATE, &record.id, &more).await? {
            return Err(KeyError::Taken(record.id.clone()));
        }
        Ok(secret)
    }

    /// All keys, by id; what is wrong with those that cannot be read.
    ///
    /// # Errors
    /// A store that does not answer.
    pub async fn list(&self) -> Kept<Vec<(String, std::result::Result<Record, String>)>> {
        let ids: BTreeMap<String, String> = self.ask(redis::cmd("HGETALL").arg(IDS)).await?;
        let ids: Vec<_> = ids.into_iter().collect();
        let mut all = Vec::with_capacity(ids.len());
        for some in ids.chunks(AT_ONCE) {
            let mut question = redis::pipe();
            some.iter().for_each(|(_, hash)| {
                question.cmd("HGETALL").arg(format!("tg:key:{hash}"));
            });
            let found = question.query_async(&mut self.connection()?.commands()).await.map_err(|error| away(&error))?;
            let found: Vec<BTreeMap<String, String>> = found;
            all.extend(some.iter().zip(found).map(|((id, _), fields)| (id.clone(), Record::read(fields))));
        }
        Ok(all)
    }

    /// The key of that id. A key of an older gateway has none in the store: it is known here while it is in use.
    ///
    /// # Errors
    /// That there is none, or one that cannot be read; a store that does not answer.
    pub async fn get(&self, id: &str) -> Kept<Record> {
        let hash: Option<String> = self.ask(redis::cmd("HGET").arg(IDS).arg(id)).await?;
        let Some(hash) = hash else {
            let seen = self.seen.lock();
            let known = seen.values().filter(|known| known.at.elapsed() < BELIEVED);
            let record = known.filter_map(|known| known.record.as_ref()).find(|record| record.id == id);
            return record.cloned().ok_or_else(|| KeyError::Unknown(id.to_owned()));
        };
        let fields = self.ask(redis::cmd("HGETALL").arg(format!("tg:key:{hash}"))).await?;
        Record::read(fields).map_err(|why| KeyError::Unusable(format!("the key `{id}` cannot be read: {why}")))
    }

    /// Makes a key void at once, in all gateways.
    ///
    /// # Errors
    /// That there is none; a store that does not answer.
    pub async fn revoke(&self, id: &str) -> Kept<()> {
        if self.change(REVOKE, id, &[]).await? { Ok(()) } else { Err(KeyError::Unknown(id.to_owned())) }
    }

    /// Puts a new key in the place of the one of that id, which is void at once. What it may and has used stays.
    ///
    /// # Errors
    /// That there is none; a store that does not answer.
    pub async fn rotate(&self, id: &str) -> Kept<Secret> {
        let secret = fresh();
        let hash = hex(&hash_key(secret.expose().as_bytes()));
        if self.change(ROTATE, id, &[hash]).await? { Ok(secret) } else { Err(KeyError::Unknown(id.to_owned())) }
    }

    fn forget(&self, hash: &str) {
        let mut seen = self.seen.lock();
        self.heard.fetch_add(1, Ordering::AcqRel);
        seen.retain(|known, _| hex(known) != hash);
    }

    /// Asks for everything anew: something may have been revoked unheard.
    fn doubt(&self) {
        let long_ago = Instant::now().checked_sub(BELIEVED);
        let mut seen = self.seen.lock();
        self.heard.fetch_add(1, Ordering::AcqRel);
        for known in seen.values_mut() {
            known.at = long_ago.unwrap_or(known.at).min(known.at);
        }
    }
}

/// Listens for revocations and keeps the connection, as long as the keyring lives.
async fn listen(keyring: Weak<Keyring>) {
    while let Some(ring) = keyring.upgrade() {
        let news = async {
            if ring.connection.load().is_none() {
                ring.connect().await?;
            }
            let mut news = ring.address.listen().await?;
            let subscribed = tokio::time::timeout(PATIENCE, news.subscribe(NEWS)).await;
            subscribed.map_err(|error| error.to_string())?.map_err(|error| error.to_string())?;
            Ok::<_, String>(news)
        };
        let news = news.await;
        if let Ok(news) = news {
            ring.doubt();
            drop(ring);
            hear(&keyring, news).await;
        }
        if let Some(ring) = keyring.upgrade() {
            ring.connection.store(None);
        }
        tokio::time::sleep(PATIENCE).await;
    }
}

fn away(error: &redis::RedisError) -> KeyError {
    KeyError::Away(error.to_string())
}

/// Hears of revocations, until one of the two connections does not answer any more.
async fn hear(keyring: &Weak<Keyring>, news: PubSub) {
    let (mut sink, mut messages) = news.split();
    loop {
        match tokio::time::timeout(LOOK, messages.next()).await {
            Ok(Some(message)) => {
                let Some(ring) = keyring.upgrade() else { return };
                ring.forget(&message.get_payload::<String>().unwrap_or_default());
            }
            // The end of the stream is the end of the connection.
            Ok(None) => return,
            Err(_) => {
                let Some(ring) = keyring.upgrade() else { return };
                let Some(connection) = ring.connection.load_full() else { return };
                drop(ring);
                let (ping, mut commands) = (redis::cmd("PING"), connection.commands());
                let looks = async { tokio::join!(sink.ping::<()>(), ping.query_async::<()>(&mut commands)) };
                match tokio::time::timeout(PATIENCE, looks).await {
                    Ok((Ok(()), Ok(()))) => {}
                    _ => return,
                }
            }
        }
    }
}

fn hex(hash: &KeyHash) -> String {
    hash.iter().fold(String::with_capacity(64), |mut text, byte| {
        // Writing into a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn place(hash: &KeyHash) -> String {
    format!("tg:key:{}", hex(hash))
}

/// A new key: 192 bits from the system's generator.
fn fresh() -> Secret {
    let random: [u8; 24] = rand::random();
    Secret::new(random.iter().fold(String::from("tg-"), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn caller(record: &Record) -> std::result::Result<Caller, String> {
        Err(format!("{} is not asked for", record.id))
    }

    async fn nowhere() -> Arc<Keyring> {
        let address = Address::parse("redis+unix:///nowhere.sock").unwrap();
        Keyring::start(&address, Duration::from_millis(50)).await
    }

    fn known(keyring: &Keyring, key: &str, at: Instant) {
        let rules = crate::limit::RuleSet::new(crate::limit::Scope::Key, "dora", &Limits::default());
        let caller =
            Caller { id: "dora".into(), tier: None, models: None, routes: None, expires: None, rules: Arc::new(rules) };
        let record = Some(Record { id: "dora".to_owned(), ..Record::default() });
        let seen = Seen { at, record, made: Some((1, Arc::new(caller))) };
        keyring.seen.lock().insert(hash_key(key.as_bytes()), seen);
    }

    #[tokio::test]
    async fn a_key_is_believed_for_thirty_seconds_and_for_longer_only_while_nobody_can_be_asked() {
        let (keyring, begin) = (nowhere().await, Instant::now());
        known(&keyring, "secret", begin);
        let hash = hash_key(b"secret");
        let known = |after: u64, generation, away| {
            let now = begin + Duration::from_secs(after);
            keyring.known(&hash, generation, now, away).map(|found| found.is_ok())
        };
        assert_eq!((known(29, 1, false), known(30, 1, false)), (Some(true), None));
        assert_eq!((known(599, 1, true), known(600, 1, true)), (Some(true), None));
        // Another configuration has other tiers: it is asked for anew.
        assert_eq!(known(0, 2, false), None);
    }

    #[tokio::test]
    async fn what_was_revoked_or_may_have_been_is_not_believed() {
        let (keyring, begin) = (nowhere().await, Instant::now());
        known(&keyring, "secret", begin);
        known(&keyring, "other", begin);
        keyring.forget(&hex(&hash_key(b"secret")));
        assert!(keyring.known(&hash_key(b"secret"), 1, begin, true).is_none());
        assert!(keyring.known(&hash_key(b"other"), 1, begin, false).is_some());
        keyring.doubt();
        assert!(keyring.known(&hash_key(b"other"), 1, Instant::now(), false).is_none());
        // It is asked for; as nobody answers, it is believed after all.
        assert_eq!(&*keyring.find(b"other", 1, caller).await.unwrap().id, "dora");
        assert!(matches!(keyring.find(b"secret", 1, caller).await, Err(GatewayError::StoreUnavailable)));
    }
}
