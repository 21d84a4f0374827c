//! Checks of `auth:`, `tiers:` and `keys:`.

use std::collections::HashMap;

use sha2::{Digest, Sha256};
use time::OffsetDateTime;

use super::{At, Check};
use crate::config::{Allowed, Key, zone_hint};

impl Check<'_> {
    pub(super) fn auth(&mut self) {
        let auth = &self.document.auth;
        let at = At::root().key("auth");
        if auth.sources.is_empty() {
            self.error(
                &at.key("sources"),
                "no caller could present a key",
                Some("leave it out for the default".to_owned()),
            );
        }
        let redis = At::root().key("store").key("redis");
        if auth.redis_keys && self.document.store.redis.is_none() && !self.places.lost(&redis) {
            let hint = "add `store: { redis: { url: { env: REDIS_URL } } }`";
            self.error(&at.key("redis_keys"), "redis_keys needs `store.redis`", Some(hint.to_owned()));
        }
        for (index, jwt) in auth.jwt.iter().enumerate() {
            let at = at.key("jwt").item(index);
            for (key, text) in [("issuer", &jwt.issuer), ("audience", &jwt.audience), ("id_claim", &jwt.id_claim)] {
                if text.is_empty() {
                    self.error(&at.key(key), format!("`{key}` is empty"), None);
                }
            }
            if jwt.algorithms.is_empty() {
                self.error(&at.key("algorithms"), "no algorithm is accepted", Some("write [RS256]".to_owned()));
            }
            self.readable(&at.key("jwks").key("file"), &jwt.jwks.file);
            if let Some(tier) = &jwt.tier {
                self.known(&at.key("tier"), tier, &self.names.tiers, "tier");
            }
        }
    }

    pub(super) fn tiers(&mut self) {
        for (name, tier) in &self.document.tiers {
            let at = At::root().key("tiers").key(name);
            self.name(&at, name, "a tier");
            self.limits(&at, &tier.limits);
        }
    }

    pub(super) fn keys(&mut self) {
        let mut ids: HashMap<&str, At> = HashMap::new();
        let mut hashes: HashMap<String, At> = HashMap::new();
        for (index, key) in self.document.keys.iter().enumerate() {
            let at = At::root().key("keys").item(index);
            self.name(&at.key("id"), &key.id, "a key");
            if let Some(first) = ids.get(key.id.as_str()) {
                let hint = format!("it is already the id of the key at {}", self.places.whereabouts(first, &at));
                self.error(&at.key("id"), format!("duplicate key id `{}`", key.id), Some(hint));
            } else {
                ids.insert(&key.id, at.key("id"));
            }
            if let Some((hash, here)) = self.key_hash(&at, key) {
                if let Some(first) = hashes.get(&hash) {
                    let hint = format!("the other one is at {}", self.places.whereabouts(first, &at));
                    self.error(&here, "two keys have the same secret", Some(hint));
                } else {
                    hashes.insert(hash, here);
                }
            }
            self.key(&at, key);
        }
    }

    fn key(&mut self, at: &At, key: &Key) {
        if let Some(tier) = &key.tier {
            self.known(&at.key("tier"), tier, &self.names.tiers, "tier");
        }
        self.model_names(&at.key("models"), &key.models);
        if let Allowed::These(routes) = &key.routes {
            self.empty_list(&at.key("routes"), routes, "leave it out, or write \"*\" for all");
            for (index, route) in routes.iter().enumerate() {
                let at = self.places.listed(&at.key("routes"), index);
                self.known(&at, route, &self.names.routes, "route");
            }
        }
        if key.expires.is_some_and(|moment| moment.0 <= OffsetDateTime::now_utc()) {
            self.warn(&at.key("expires"), format!("the key `{}` has expired", key.id), "remove it, or move the date");
        }
        self.limits(&at.key("limits"), &key.limits);
        if key.zone.is_some() && key.utc_offset.is_some() {
            let hint = "keep `zone`; it knows when the clocks are changed";
            self.error(&at.key("utc_offset"), "both `zone` and `utc_offset`", Some(hint.to_owned()));
        }
        if let (Some(name), None) = (&key.zone, key.zone()) {
            self.error(&at.key("zone"), format!("there is no zone `{name}`"), Some(zone_hint(name)));
        }
    }

    /// The SHA-256 of a key, in hex, and where the key stands.
    fn key_hash(&mut self, at: &At, key: &Key) -> Option<(String, At)> {
        match (&key.key, &key.sha256) {
            (Some(source), None) => {
                let here = at.key("key");
                let secret = self.secret(&here, source)?;
                if !secret.expose().bytes().all(|byte| byte.is_ascii_graphic()) {
                    let hint = "a key is of visible ASCII characters without spaces";
                    self.error(&here, "no client could send this key in a header", Some(hint.to_owned()));
                }
                let hash = Sha256::digest(secret.expose().as_bytes());
                Some((hash.iter().map(|byte| format!("{byte:02x}")).collect(), here))
            }
            (None, Some(hash)) => {
                let here = at.key("sha256");
                if hash.len() == 64 && hash.bytes().all(|byte| byte.is_ascii_hexdigit()) {
                    return Some((hash.to_ascii_lowercase(), here));
                }
                let hint = "printf %s KEY | sha256sum";
                self.error(&here, "not a SHA-256: it has 64 hex digits", Some(hint.to_owned()));
                None
            }
            (Some(_), Some(_)) => {
                self.error(&at.key("sha256"), "both `key` and `sha256`", Some("keep one of them".to_owned()));
                None
            }
            (None, None) => {
                if self.places.lost(&at.key("key")) || self.places.lost(&at.key("sha256")) {
                    return None;
                }
                let hint = "add `key: { env: NAME }`, or `sha256:` with the hash of the key";
                self.error(
                    &at.key("id"),
                    format!("the key `{}` has neither `key` nor `sha256`", key.id),
                    Some(hint.into()),
                );
                None
            }
        }
    }
}
