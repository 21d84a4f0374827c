//! Keys kept in Redis: looked up when they are first seen, believed for a while, given up as soon as they are revoked.
//!
//! A key is the hash `tg:key:<SHA-256 of the key>` with the fields `id`, `tier`, `models`, `routes`, `expires`, `limits`
//! (lists and limits as JSON, the time in seconds since the epoch); `tg:ids` finds it by its id. The hashes `user:<key>` with
//! `user_id` and `tier` of older gateways are read as well, and never written. Whoever changes a key publishes its hash.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use super::{Caller, KeyHash, hash_key};
use crate::config::Secret;
use crate::error::{GatewayError, Result};
use crate::limit::Limits;
use crate::store::{Address, Connection, is_useless};
use arc_swap::ArcSwapOption;
use futures::StreamExt;
use parking_lot::Mutex;
use redis::aio::PubSub;

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
}

impl Record {
    /// The limits of its own.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn own_limits(&self) -> std::result::Result<Limits, String> {
        let text = self.limits.as_deref().unwrap_or("{}");
        serde_json::from_str(text).map_err(|error| error.to_string())
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
}

impl std::fmt::Debug for Keyring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Keyring").finish_non_exhaustive()
    }
}

impl Keyring {
    /// Connects, and listens for revocations from then on. Must be called in the tokio runtime that is to do so.
    pub async fn start(address: &Address, budget: Duration) -> Arc<Self> {
        let (address, connection) = (address.clone(), ArcSwapOption::empty());
        let keyring = Arc::new(Self { address, connection, budget, seen: Mutex::default() });
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
        if seen.len() < MOST {
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
            None => (age < UNKNOWN && known.record.is_none()).then_some(Err(GatewayError::InvalidApiKey)),
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

    async fn ask<T: redis::FromRedisValue>(&self, command: &redis::Cmd) -> std::result::Result<T, String> {
        let connection = self.connection.load_full().ok_or("Redis cannot be reached")?;
        let answer = command.query_async(&mut connection.commands()).await;
        answer.inspect_err(|error| self.given_up(&connection, error)).map_err(|error| error.to_string())
    }

    /// Keeps a new key under an id that no other has, and gives the key itself; it is kept nowhere.
    ///
    /// # Errors
    /// An id that is taken, limits that are none, a store that does not answer; in words.
    pub async fn create(&self, record: &Record) -> std::result::Result<Secret, String> {
        record.own_limits()?;
        let secret = fresh();
        let hash = hash_key(secret.expose().as_bytes());
        if !self.ask::<bool>(redis::cmd("HSETNX").arg(IDS).arg(&record.id).arg(hex(&hash))).await? {
            return Err(format!("there is a key `{}` already", record.id));
        }
        self.write(&hash, record).await?;
        Ok(secret)
    }

    async fn write(&self, hash: &KeyHash, record: &Record) -> std::result::Result<(), String> {
        self.ask::<()>(redis::cmd("HSET").arg(place(hash)).arg(record.fields())).await?;
        self.tell(&hex(hash)).await
    }

    async fn tell(&self, hash: &str) -> std::result::Result<(), String> {
        self.ask::<()>(redis::cmd("PUBLISH").arg(NEWS).arg(hash)).await
    }

    /// All keys, by id.
    ///
    /// # Errors
    /// A store that does not answer; in words.
    pub async fn list(&self) -> std::result::Result<Vec<Record>, String> {
        let ids: BTreeMap<String, String> = self.ask(redis::cmd("HGETALL").arg(IDS)).await?;
        let mut all = Vec::with_capacity(ids.len());
        for hash in ids.values() {
            let fields: BTreeMap<String, String> =
                self.ask(redis::cmd("HGETALL").arg(format!("tg:key:{hash}"))).await?;
            all.extend(Record::read(fields).ok());
        }
        Ok(all)
    }

    /// The key of that id.
    ///
    /// # Errors
    /// That there is none; a store that does not answer; in words.
    pub async fn get(&self, id: &str) -> std::result::Result<Record, String> {
        let hash = self.hash_of(id).await?;
        let fields = self.ask(redis::cmd("HGETALL").arg(format!("tg:key:{hash}"))).await?;
        Record::read(fields).map_err(|why| format!("the key `{id}` cannot be read: {why}"))
    }

    async fn hash_of(&self, id: &str) -> std::result::Result<String, String> {
        let hash: Option<String> = self.ask(redis::cmd("HGET").arg(IDS).arg(id)).await?;
        hash.ok_or_else(|| format!("there is no key `{id}` in Redis"))
    }

    /// Makes a key void at once, in all gateways.
    ///
    /// # Errors
    /// That there is none; a store that does not answer; in words.
    pub async fn revoke(&self, id: &str) -> std::result::Result<(), String> {
        let hash = self.hash_of(id).await?;
        self.ask::<()>(redis::cmd("DEL").arg(format!("tg:key:{hash}"))).await?;
        self.ask::<()>(redis::cmd("HDEL").arg(IDS).arg(id)).await?;
        self.tell(&hash).await
    }

    /// Puts a new key in the place of the one of that id, which is void at once. What it may and has used stays.
    ///
    /// # Errors
    /// That there is none; a store that does not answer; in words.
    pub async fn rotate(&self, id: &str) -> std::result::Result<Secret, String> {
        let (old, record) = (self.hash_of(id).await?, self.get(id).await?);
        let secret = fresh();
        let hash = hash_key(secret.expose().as_bytes());
        self.write(&hash, &record).await?;
        self.ask::<()>(redis::cmd("HSET").arg(IDS).arg(id).arg(hex(&hash))).await?;
        self.ask::<()>(redis::cmd("DEL").arg(format!("tg:key:{old}"))).await?;
        self.tell(&old).await?;
        Ok(secret)
    }

    fn forget(&self, hash: &str) {
        self.seen.lock().retain(|known, _| hex(known) != hash);
    }

    /// Asks for everything anew: something may have been revoked unheard.
    fn doubt(&self) {
        let long_ago = Instant::now().checked_sub(BELIEVED);
        for known in self.seen.lock().values_mut() {
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
