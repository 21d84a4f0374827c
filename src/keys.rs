//! Keys that are kept in Redis, as the command line and the admin port make and show them.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize, de};
use serde_json::Value;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tollgate_filters::auth::keyring::{KeyError, Record};
use tollgate_filters::auth::{Caller, Elsewhere};
use tollgate_filters::config::Secret;
use tollgate_filters::limit::Limits;

use crate::config::{Document, suggest, zone_hint};
use crate::runtime::Runtime;

/// A key to be made.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct NewKey {
    /// Name of the key in logs, metrics and quotas. Default: a random one.
    pub id: Option<String>,
    /// Name of a tier. Absent: only `limits` hold.
    pub tier: Option<String>,
    /// Models that it may ask for. Default: all.
    pub models: Option<Vec<String>>,
    /// Routes that it may use. Default: all.
    pub routes: Option<Vec<String>>,
    /// When it stops working, RFC 3339. Default: never.
    pub expires: Option<String>,
    /// Limits in place of the tier's rows.
    pub limits: Limits,
    /// Where its days and months begin, like `Europe/Berlin`. Default: UTC.
    pub zone: Option<String>,
}

/// A key that was made. The key itself is shown this once and kept nowhere.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct Made {
    /// Its name.
    pub id: String,
    /// The key itself.
    pub key: String,
}

/// A key as it is listed: never the key itself, nor its hash.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct KeyState {
    /// Its name in logs, metrics and quotas.
    pub id: String,
    /// Its tier.
    pub tier: Option<String>,
    /// Where it is kept.
    pub r#where: Where,
    /// Models that it may ask for; null is all.
    pub models: Option<Vec<String>>,
    /// Routes that it may use; null is all.
    pub routes: Option<Vec<String>>,
    /// When it stops working, RFC 3339; null is never.
    pub expires: Option<String>,
    /// Where its days and months begin.
    pub zone: String,
    /// What holds for it by dimension, its tier's rows and its own; what is only watched is told as `{limit, shadow}`.
    pub limits: BTreeMap<&'static str, Row>,
    /// Why it does not work, if it does not.
    pub problem: Option<String>,
}

/// Where a key is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Where {
    /// In the configuration.
    File,
    /// In Redis.
    Redis,
}

/// One limit of a key.
#[derive(Debug, Clone, Copy, Serialize, JsonSchema)]
#[serde(untagged)]
pub(crate) enum Row {
    /// It refuses.
    Holds(u64),
    /// It is only watched.
    Watched {
        /// The most that would be admitted.
        limit: u64,
        /// Always true.
        shadow: bool,
    },
}

/// What a new key may refer to, and what it may not be called.
#[derive(Debug)]
pub(crate) struct Names {
    keys: Vec<String>,
    tiers: Vec<String>,
    models: Vec<String>,
    routes: Vec<String>,
}

impl Names {
    /// Those of a configuration.
    pub(crate) fn of(document: &Document) -> Self {
        Self {
            keys: document.keys.iter().map(|key| key.id.clone()).collect(),
            tiers: document.tiers.keys().cloned().collect(),
            models: document.models.keys().cloned().collect(),
            routes: document.routes.iter().map(|route| route.name.clone()).collect(),
        }
    }

    /// Those of a configuration at work.
    pub(crate) fn at_work(runtime: &Runtime, elsewhere: &Elsewhere) -> Self {
        let canonical = runtime.models.iter().filter(|(name, model)| ***name == *model.name);
        Self {
            keys: runtime.keys.callers().map(|caller| caller.id.to_string()).collect(),
            tiers: elsewhere.tiers.keys().cloned().collect(),
            models: canonical.map(|(name, _)| name.to_string()).collect(),
            routes: runtime.router.iter().map(|(_, route)| route.name.to_string()).collect(),
        }
    }
}

impl NewKey {
    /// Reads it from JSON.
    ///
    /// # Errors
    /// What is wrong with the text, and where.
    pub(crate) fn read(text: &[u8]) -> serde_json::Result<Self> {
        // The words of a struct could be given as a list without their names: nobody means that.
        let value: Value = serde_json::from_slice(text)?;
        if !value.is_object() || value.get("limits").is_some_and(|limits| !limits.is_object()) {
            return Err(de::Error::custom("invalid type: a key is told as an object, and its limits are another"));
        }
        serde_json::from_slice(text)
    }

    /// The record of this key; `random` names it if nobody did.
    ///
    /// # Errors
    /// `Taken` if the configuration has a key of that id; `Unusable` with what is wrong, in words.
    pub(crate) fn record(&self, names: &Names, random: u32, now: OffsetDateTime) -> Result<Record, KeyError> {
        let id = self.id.clone().unwrap_or_else(|| format!("key-{random:08x}"));
        let sane = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | ':' | '/' | '-');
        if id.is_empty() || id.len() > 128 || !id.chars().all(sane) {
            let why = format!("{id:?} is not a name for a key: letters, digits and . _ : / -, at most 128");
            return Err(KeyError::Unusable(why));
        }
        if names.keys.contains(&id) {
            return Err(KeyError::Taken(id));
        }
        self.fields(id, names, now).map_err(KeyError::Unusable)
    }

    fn fields(&self, id: String, names: &Names, now: OffsetDateTime) -> Result<Record, String> {
        if let Some(tier) = &self.tier {
            known("tier", tier, &names.tiers)?;
        }
        if let Some(zone) = self.zone.as_ref().filter(|zone| tollgate_filters::limit::Zone::named(zone).is_none()) {
            return Err(format!("there is no zone `{zone}`: {}", zone_hint(zone)));
        }
        let limits: BTreeMap<_, _> = rows(self.limits.rows().map(|(d, limit)| (d.name(), limit.limit, limit.shadow)));
        let limits = (!limits.is_empty()).then(|| serde_json::to_string(&limits));
        Ok(Record {
            id,
            tier: self.tier.clone(),
            models: allowed("model", self.models.as_ref(), &names.models)?,
            routes: allowed("route", self.routes.as_ref(), &names.routes)?,
            expires: self.expires.as_deref().map(|text| expiry(text, now)).transpose()?,
            limits: limits.transpose().map_err(|error| error.to_string())?,
            zone: self.zone.clone(),
        })
    }
}

fn known(what: &str, name: &str, names: &[String]) -> Result<(), String> {
    if names.iter().any(|known| known == name) {
        return Ok(());
    }
    let hint = suggest(name, names.iter().map(String::as_str)).unwrap_or_else(|| format!("there is no {what} at all"));
    Err(format!("there is no {what} `{name}` in the configuration: {hint}"))
}

/// A list of names that are known; `*` alone is all of them.
fn allowed(what: &str, list: Option<&Vec<String>>, names: &[String]) -> Result<Option<Vec<String>>, String> {
    let Some(list) = list.filter(|list| list.as_slice() != ["*"]) else { return Ok(None) };
    if list.is_empty() {
        return Err(format!("the list of {what}s is empty: leave it out for all"));
    }
    list.iter().try_for_each(|name| known(what, name, names))?;
    Ok(Some(list.clone()))
}

fn expiry(text: &str, now: OffsetDateTime) -> Result<u64, String> {
    let time = OffsetDateTime::parse(text, &Rfc3339)
        .map_err(|_| format!("{text:?} is not a time like 2027-01-01T00:00:00Z"))?;
    if time <= now {
        return Err(format!("{text} is over: the key would never work"));
    }
    u64::try_from(time.unix_timestamp()).map_err(|_| format!("{text} is too long ago"))
}

fn rows<'a>(rows: impl Iterator<Item = (&'a str, u64, bool)>) -> BTreeMap<&'a str, Row> {
    let row = |limit, shadow| if shadow { Row::Watched { limit, shadow } } else { Row::Holds(limit) };
    rows.map(|(name, limit, shadow)| (name, row(limit, shadow))).collect()
}

impl KeyState {
    /// A key that works.
    pub(crate) fn of(caller: &Caller, kept: Where) -> Self {
        let names = |names: &std::collections::HashSet<Box<str>>| {
            let mut names: Vec<String> = names.iter().map(ToString::to_string).collect();
            names.sort_unstable();
            names
        };
        let expires = caller.expires.and_then(|at| {
            let at = OffsetDateTime::from_unix_timestamp(i64::try_from(at).ok()?).ok()?;
            at.format(&Rfc3339).ok()
        });
        let rules = caller.rules.rules().iter();
        Self {
            id: caller.id.to_string(),
            tier: caller.tier.as_deref().map(ToOwned::to_owned),
            r#where: kept,
            models: caller.models.as_ref().map(names),
            routes: caller.routes.as_ref().map(names),
            expires,
            zone: caller.rules.zone().to_string(),
            limits: rows(rules.map(|rule| (rule.dimension.name(), rule.limit, rule.shadow))),
            problem: None,
        }
    }

    /// What is kept under an id, whether it works or not.
    fn kept(id: &str, record: Result<Record, String>, elsewhere: &Elsewhere) -> Self {
        let tier = record.as_ref().ok().and_then(|record| record.tier.clone());
        match record.and_then(|record| elsewhere.caller(&record)) {
            Ok(caller) => Self::of(&caller, Where::Redis),
            Err(problem) => Self {
                id: id.to_owned(),
                tier,
                r#where: Where::Redis,
                models: None,
                routes: None,
                expires: None,
                zone: tollgate_filters::limit::Zone::UTC.to_string(),
                limits: BTreeMap::new(),
                problem: Some(problem),
            },
        }
    }
}

/// All keys in Redis, by id.
///
/// # Errors
/// When Redis does not answer.
pub(crate) async fn stored(elsewhere: &Elsewhere) -> Result<Vec<KeyState>, KeyError> {
    let all = elsewhere.keyring.list().await?;
    Ok(all.into_iter().map(|(id, record)| KeyState::kept(&id, record, elsewhere)).collect())
}

/// Makes a key.
///
/// # Errors
/// A key that cannot be, or cannot be kept.
pub(crate) async fn create(wanted: &NewKey, names: &Names, elsewhere: &Elsewhere) -> Result<Made, KeyError> {
    let record = wanted.record(names, rand::random(), OffsetDateTime::now_utc())?;
    let key = elsewhere.keyring.create(&record).await?;
    Ok(Made::new(record.id, &key))
}

impl Made {
    pub(crate) fn new(id: String, key: &Secret) -> Self {
        Self { id, key: key.expose().to_owned() }
    }
}

#[cfg(test)]
mod tests {
    use time::macros::datetime;

    use super::*;

    fn names() -> Names {
        let list = |names: &[&str]| names.iter().map(ToString::to_string).collect();
        Names { keys: list(&["alice"]), tiers: list(&["free"]), models: list(&["chat"]), routes: list(&["llm"]) }
    }

    fn record(json: &str) -> Result<Record, KeyError> {
        let wanted = NewKey::read(json.as_bytes()).map_err(|error| KeyError::Unusable(error.to_string()))?;
        wanted.record(&names(), 0xbeef, datetime!(2026-11-21 00:00 UTC))
    }

    #[test]
    fn a_key_may_say_nothing_and_everything() {
        assert_eq!(record("{}").unwrap(), Record { id: "key-0000beef".to_owned(), ..Record::default() });
        let full = record(
            r#"{"id":"dora","tier":"free","models":["chat"],"routes":["*"],"expires":"2027-01-01T00:00:00Z",
                "limits":{"requests_per_minute":5,"concurrency":{"limit":2,"shadow":true}},"zone":"Europe/Berlin"}"#,
        );
        let full = full.unwrap();
        assert_eq!(
            (full.models, full.routes, full.expires),
            (Some(vec!["chat".to_owned()]), None, Some(1_798_761_600))
        );
        assert_eq!(full.limits.unwrap(), r#"{"concurrency":{"limit":2,"shadow":true},"requests_per_minute":5}"#);
        assert_eq!(full.zone.unwrap(), "Europe/Berlin");
    }

    #[test]
    fn each_mistake_is_told_with_what_may_have_been_meant() {
        assert_eq!(record(r#"{"id":"alice"}"#), Err(KeyError::Taken("alice".to_owned())));
        for (json, words) in [
            (r#"{"id":""}"#, "is not a name"),
            (r#"{"id":"a b"}"#, "is not a name"),
            (r#"{"tier":"fre"}"#, "did you mean `free`?"),
            (r#"{"models":["chet"]}"#, "did you mean `chat`?"),
            (r#"{"models":[]}"#, "is empty"),
            (r#"{"routes":["llm","lm"]}"#, "did you mean `llm`?"),
            (r#"{"expires":"soon"}"#, "is not a time"),
            (r#"{"expires":"2026-11-20T00:00:00Z"}"#, "is over"),
            (r#"{"zone":"berlin"}"#, "did you mean `Europe/Berlin`?"),
            (r#"{"limits":{"requests":5}}"#, "unknown field"),
            (r#"{"limits":{"requests_per_minute":-5}}"#, "never negative"),
            (r#"{"key":"my-own"}"#, "unknown field"),
            (r#"{"limits":[5]}"#, "invalid type"),
            (r#"["dora"]"#, "invalid type"),
            (r#"{"id":"a","id":"b"}"#, "duplicate field"),
        ] {
            let why = record(json).unwrap_err().to_string();
            assert!(why.contains(words), "{json}: {why}");
        }
    }
}
