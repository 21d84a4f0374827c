//! Who calls: the API key of a request, looked up by the SHA-256 of the whole key. Works on the head alone, so that a
//! stranger's body is never read.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use http::HeaderMap;
use http::header::{AUTHORIZATION, HeaderName};
use schemars::JsonSchema;
use serde::Deserialize;
use sha2::{Digest, Sha256};

use crate::error::{BadRequest, GatewayError, Result};
use crate::limit::{Limits, RuleSet, Scope, WhenDown};

mod filter;
pub mod keyring;

pub use filter::{Auth, AuthConfig};

use keyring::{Keyring, Record};

/// A place in a request where a key may stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Source {
    /// `Authorization: Bearer KEY`.
    Bearer,
    /// `x-api-key: KEY`, as Anthropic's clients send it.
    XApiKey,
    /// `api-key: KEY`, as Azure's clients send it.
    ApiKey,
    /// `?api_key=KEY`; must be asked for, as URLs end up in logs.
    Query,
}

/// Headers in which clients send keys; none of them is ever passed to an LLM upstream.
pub const KEY_HEADERS: [HeaderName; 3] =
    [AUTHORIZATION, HeaderName::from_static("x-api-key"), HeaderName::from_static("api-key")];

/// Query parameter in which a key may be sent where that is asked for.
pub const KEY_PARAMETER: &str = "api_key";

/// Query parameters in which clients try to send keys.
const KEY_PARAMETERS: [&str; 4] = ["api_key", "api-key", "apikey", "key"];

/// SHA-256 of a whole key.
pub type KeyHash = [u8; 32];

/// Hashes a whole key.
pub fn hash_key(key: &[u8]) -> KeyHash {
    Sha256::digest(key).into()
}

/// The identity behind a valid key.
#[derive(Debug)]
pub struct Caller {
    /// The key's id: the name of the caller in logs, metrics and toward own nodes.
    pub id: Arc<str>,
    /// Its tier.
    pub tier: Option<Arc<str>>,
    /// Models that it may ask for; `None` is all.
    pub models: Option<HashSet<Box<str>>>,
    /// Routes that it may use; `None` is all.
    pub routes: Option<HashSet<Box<str>>>,
    /// Seconds since the epoch from which on the key is void.
    pub expires: Option<u64>,
    /// Limits of the key: its tier's, with its own put in their place.
    pub rules: Arc<RuleSet>,
}

impl Caller {
    /// Whether the key may ask for the model of this (canonical) name.
    pub fn may_use_model(&self, model: &str) -> bool {
        self.models.as_ref().is_none_or(|models| models.contains(model))
    }

    /// Whether the key may use the route.
    pub fn may_use_route(&self, route: &str) -> bool {
        self.routes.as_ref().is_none_or(|routes| routes.contains(route))
    }
}

/// All keys of a configuration.
#[derive(Debug, Default)]
pub struct Keys {
    by_hash: HashMap<KeyHash, Arc<Caller>>,
    sources: Vec<Source>,
    elsewhere: Option<Elsewhere>,
}

/// Keys that are not in the configuration, and the tiers that they may be of.
#[derive(Debug)]
pub struct Elsewhere {
    /// Where they are looked up.
    pub keyring: Arc<Keyring>,
    /// The limits of each tier, and what happens to its calls while the store is away.
    pub tiers: HashMap<String, (Limits, Option<WhenDown>)>,
    /// The number of the configuration.
    pub generation: u64,
}

impl Elsewhere {
    /// The caller of a record.
    ///
    /// # Errors
    /// A tier that the configuration does not have, limits or a zone that are none.
    pub fn caller(&self, record: &Record) -> std::result::Result<Caller, String> {
        let tier = match &record.tier {
            Some(name) => Some(self.tiers.get(name).ok_or_else(|| format!("there is no tier `{name}`"))?),
            None => None,
        };
        let limits = tier.map(|(limits, _)| limits.clone()).unwrap_or_default().overridden(&record.own_limits()?);
        let names = |names: &Vec<String>| names.iter().map(|name| name.as_str().into()).collect();
        let rules = RuleSet::new(Scope::Key, &record.id, &limits)
            .in_zone(record.own_zone()?)
            .when_down(tier.and_then(|(_, policy)| *policy));
        Ok(Caller {
            id: record.id.as_str().into(),
            tier: record.tier.as_deref().map(Into::into),
            models: record.models.as_ref().map(names),
            routes: record.routes.as_ref().map(names),
            expires: record.expires,
            rules: Arc::new(rules),
        })
    }
}

impl Keys {
    /// Keys by hash, and the places of a request where one is looked for, in order.
    pub fn new(keys: impl IntoIterator<Item = (KeyHash, Arc<Caller>)>, sources: Vec<Source>) -> Self {
        Self { by_hash: keys.into_iter().collect(), sources, elsewhere: None }
    }

    /// Also with keys that are looked up elsewhere; those of the configuration come first.
    #[must_use]
    pub fn and(self, elsewhere: Option<Elsewhere>) -> Self {
        Self { elsewhere, ..self }
    }

    /// Where else keys are looked up.
    pub fn elsewhere(&self) -> Option<&Elsewhere> {
        self.elsewhere.as_ref()
    }

    /// Like [`Keys::identify`], but also looks where it may have to wait.
    ///
    /// # Errors
    /// As [`Keys::identify`]; `store_unavailable` if the key is not in the configuration and nobody can be asked.
    pub async fn find(&self, headers: &HeaderMap, query: &str, now: u64) -> Result<Arc<Caller>> {
        let found = self.identify(headers, query, now);
        let (Err(GatewayError::InvalidApiKey), Some(elsewhere)) = (&found, &self.elsewhere) else { return found };
        let key = self.presented(headers, query)?.ok_or(GatewayError::MissingApiKey)?;
        if self.by_hash.contains_key(&hash_key(key)) {
            return found;
        }
        let make = |record: &Record| elsewhere.caller(record);
        let caller = elsewhere.keyring.find(key, elsewhere.generation, make).await?;
        if caller.expires.is_some_and(|expires| expires <= now) {
            return Err(GatewayError::InvalidApiKey);
        }
        Ok(caller)
    }

    /// How many keys there are.
    pub fn len(&self) -> usize {
        self.by_hash.len()
    }

    /// Whether there is no key at all.
    pub fn is_empty(&self) -> bool {
        self.by_hash.is_empty()
    }

    /// All callers.
    pub fn callers(&self) -> impl Iterator<Item = &Arc<Caller>> {
        self.by_hash.values()
    }

    /// Who presents this request; `now` in seconds since the epoch.
    ///
    /// # Errors
    /// `missing_api_key`, `invalid_api_key` (unknown and expired alike), `key_in_query`.
    pub fn identify(&self, headers: &HeaderMap, query: &str, now: u64) -> Result<Arc<Caller>> {
        let key = self.presented(headers, query)?.ok_or(GatewayError::MissingApiKey)?;
        // One look-up whatever the outcome: unknown and expired keys take the same time and get the same answer.
        let caller = self.by_hash.get(&hash_key(key)).ok_or(GatewayError::InvalidApiKey)?;
        if caller.expires.is_some_and(|expires| expires <= now) {
            return Err(GatewayError::InvalidApiKey);
        }
        Ok(Arc::clone(caller))
    }

    fn presented<'a>(&self, headers: &'a HeaderMap, query: &'a str) -> Result<Option<&'a [u8]>> {
        for source in &self.sources {
            let found = match source {
                Source::Bearer => one(headers, &AUTHORIZATION)?.map(bearer).transpose()?,
                Source::XApiKey => one(headers, &HeaderName::from_static("x-api-key"))?,
                Source::ApiKey => one(headers, &HeaderName::from_static("api-key"))?,
                Source::Query => parameter(query, &[KEY_PARAMETER]).map(str::as_bytes),
            };
            if found.is_some() {
                return Ok(found);
            }
        }
        if !self.sources.contains(&Source::Query) && parameter(query, &KEY_PARAMETERS).is_some() {
            let message = "a key must not be sent in the query string; send it as `Authorization: Bearer KEY`";
            return Err(GatewayError::bad(BadRequest::KeyInQuery, message));
        }
        Ok(None)
    }
}

/// The one value of a header; a doubled one is never trusted.
fn one<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Result<Option<&'a [u8]>> {
    let mut values = headers.get_all(name).iter();
    let first = values.next();
    if values.next().is_some() {
        return Err(GatewayError::InvalidApiKey);
    }
    Ok(first.map(|value| value.as_bytes().trim_ascii()).filter(|value| !value.is_empty()))
}

fn bearer(value: &[u8]) -> Result<&[u8]> {
    match value.split_at_checked(7) {
        Some((scheme, key)) if scheme.eq_ignore_ascii_case(b"bearer ") => Ok(key.trim_ascii()),
        _ => Err(GatewayError::InvalidApiKey),
    }
}

fn parameter<'a>(query: &'a str, names: &[&str]) -> Option<&'a str> {
    query
        .split('&')
        .filter_map(|pair| pair.split_once('='))
        .find(|(name, value)| names.contains(name) && !value.is_empty())
        .map(|(_, value)| value)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys() -> Keys {
        let caller = |id: &str, expires| {
            Arc::new(Caller {
                id: id.into(),
                tier: None,
                models: None,
                routes: None,
                expires,
                rules: Arc::new(RuleSet::new(crate::limit::Scope::Key, id, &crate::limit::Limits::default())),
            })
        };
        let long = "k".repeat(20);
        Keys::new(
            [
                (hash_key(b"alice-key"), caller("alice", None)),
                (hash_key(b"old-key"), caller("old", Some(1000))),
                (hash_key(format!("{long}-one").as_bytes()), caller("one", None)),
            ],
            vec![Source::Bearer, Source::XApiKey, Source::ApiKey],
        )
    }

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        let mut map = HeaderMap::new();
        for (name, value) in pairs {
            map.append(*name, value.parse().unwrap());
        }
        map
    }

    fn who(pairs: &[(&'static str, &str)], query: &str) -> std::result::Result<String, &'static str> {
        keys().identify(&headers(pairs), query, 1000).map(|c| c.id.to_string()).map_err(|e| e.face().code)
    }

    #[test]
    fn a_key_is_found_in_each_of_its_places() {
        for pairs in [
            [("authorization", "Bearer alice-key")],
            [("authorization", "bearer alice-key")],
            [("x-api-key", "alice-key")],
            [("api-key", "alice-key")],
        ] {
            assert_eq!(who(&pairs, ""), Ok("alice".into()));
        }
    }

    #[test]
    fn missing_unknown_expired_and_doubled_keys_are_refused() {
        assert_eq!(who(&[], ""), Err("missing_api_key"));
        assert_eq!(who(&[("authorization", "")], ""), Err("missing_api_key"));
        assert_eq!(who(&[("authorization", "Bearer nobody")], ""), Err("invalid_api_key"));
        assert_eq!(who(&[("authorization", "Basic alice-key")], ""), Err("invalid_api_key"));
        assert_eq!(who(&[("authorization", "Bearer old-key")], ""), Err("invalid_api_key"));
        let double = [("authorization", "Bearer alice-key"), ("authorization", "Bearer nobody")];
        assert_eq!(who(&double, ""), Err("invalid_api_key"));
    }

    #[test]
    fn the_whole_key_counts_not_its_beginning() {
        assert_eq!(who(&[("x-api-key", &format!("{}-two", "k".repeat(20)))], ""), Err("invalid_api_key"));
        assert_eq!(who(&[("x-api-key", &format!("{}-one", "k".repeat(20)))], ""), Ok("one".into()));
    }

    #[test]
    fn a_key_in_the_query_is_refused_unless_asked_for() {
        assert_eq!(who(&[], "api_key=alice-key"), Err("key_in_query"));
        assert_eq!(
            who(&[("x-api-key", "alice-key")], "key=f5"),
            Ok("alice".into()),
            "a real key wins over a stray parameter"
        );
        let asked = Keys { sources: vec![Source::Query], ..keys() };
        assert_eq!(&*asked.identify(&HeaderMap::new(), "x=1&api_key=alice-key", 0).unwrap().id, "alice");
    }
}
