//! `tollgate keys`: keys that are kept in Redis, for all gateways at once.

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::{Args, Subcommand};
use serde_json::{Map, Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tollgate_filters::auth::keyring::{Keyring, Record};
use tollgate_filters::config::{Secret, World};

use crate::cli::check::{self, Format};
use crate::config::Document;

/// How long Redis may take.
const PATIENCE: Duration = Duration::from_secs(2);

/// Create, list, revoke and rotate the keys that are kept in Redis.
#[derive(Debug, Args)]
pub(crate) struct KeysArgs {
    #[command(subcommand)]
    act: Act,
    /// The configuration. Default: ./conf/tollgate.yaml, then /etc/tollgate/tollgate.yaml.
    #[arg(short, long, value_name = "FILE", global = true)]
    config: Option<PathBuf>,
    /// How to print the result.
    #[arg(long, value_enum, default_value_t = Format::Text, global = true)]
    format: Format,
}

#[derive(Debug, Subcommand)]
enum Act {
    /// Create a key; it is shown once and kept nowhere.
    Create(Create),
    /// List all keys.
    List,
    /// Make a key void, in all gateways, at once.
    Revoke {
        /// Its id.
        id: String,
    },
    /// Put a new key in the place of an old one.
    Rotate {
        /// Its id.
        id: String,
    },
}

#[derive(Debug, Args)]
struct Create {
    /// Name of the key in logs, metrics and quotas. Default: a random one.
    #[arg(long)]
    id: Option<String>,
    /// Name of a tier.
    #[arg(long)]
    tier: Option<String>,
    /// Models that it may ask for, with commas. Default: all.
    #[arg(long, value_delimiter = ',')]
    models: Option<Vec<String>>,
    /// Routes that it may use, with commas. Default: all.
    #[arg(long, value_delimiter = ',')]
    routes: Option<Vec<String>>,
    /// When it stops working, like 2027-01-01T00:00:00Z. Default: never.
    #[arg(long)]
    expires: Option<String>,
    /// A limit in place of the tier's, like requests_per_minute=5; may be given several times.
    #[arg(long = "limit", value_name = "DIMENSION=N")]
    limits: Vec<String>,
}

impl Create {
    fn record(&self, document: &Document) -> Result<Record, String> {
        let id = self.id.clone().unwrap_or_else(|| format!("key-{:08x}", rand::random::<u32>()));
        let sane = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | ':' | '/' | '-');
        if id.is_empty() || id.len() > 128 || !id.chars().all(sane) {
            return Err(format!("{id:?} is not a name for a key: letters, digits and . _ : / -, at most 128"));
        }
        if document.keys.iter().any(|key| key.id == id) {
            return Err(format!("there is a key `{id}` in the configuration already"));
        }
        if let Some(tier) = self.tier.as_ref().filter(|tier| !document.tiers.contains_key(*tier)) {
            return Err(format!("there is no tier `{tier}` in the configuration"));
        }
        let mut limits = Map::new();
        for limit in &self.limits {
            let (name, number) = limit.split_once('=').ok_or_else(|| format!("{limit:?} is not like NAME=NUMBER"))?;
            let number: u64 = number.parse().map_err(|_| format!("{number:?} is not a whole number"))?;
            limits.insert(name.to_owned(), number.into());
        }
        Ok(Record {
            id,
            tier: self.tier.clone(),
            models: self.models.clone(),
            routes: self.routes.clone(),
            expires: self.expires.as_deref().map(seconds).transpose()?,
            limits: (!limits.is_empty()).then(|| Value::from(limits).to_string()),
        })
    }
}

fn seconds(text: &str) -> Result<u64, String> {
    let time = OffsetDateTime::parse(text, &Rfc3339)
        .map_err(|_| format!("{text:?} is not a time like 2027-01-01T00:00:00Z"))?;
    u64::try_from(time.unix_timestamp()).map_err(|_| format!("{text} is too long ago"))
}

/// Does it; results go to `out`, what went wrong to `err`. Exit code 0: done; 1: not done.
///
/// # Errors
/// When the result cannot be written.
pub(crate) fn run(
    args: &KeysArgs,
    world: &dyn World,
    out: &mut dyn Write,
    err: &mut dyn Write,
) -> io::Result<ExitCode> {
    let Some(loaded) = check::load_or_tell(args.config.as_ref(), world, err)? else { return Ok(ExitCode::FAILURE) };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    match runtime.block_on(act(&args.act, &loaded.document, world)) {
        Ok(done) => {
            match args.format {
                Format::Json => writeln!(out, "{}", done.json())?,
                Format::Text => done.text(out)?,
            }
            Ok(ExitCode::SUCCESS)
        }
        Err(why) => {
            writeln!(err, "tollgate: {why}")?;
            Ok(ExitCode::FAILURE)
        }
    }
}

enum Done {
    Shown { id: String, key: Secret },
    Listed(Vec<Record>),
    Revoked(String),
}

async fn act(act: &Act, document: &Document, world: &dyn World) -> Result<Done, String> {
    let redis =
        document.store.redis.as_ref().ok_or("keys are kept in Redis, and the configuration has no `store.redis`")?;
    let keyring: Arc<Keyring> = Keyring::start(&redis.address(world)?, PATIENCE).await;
    match act {
        Act::Create(create) => {
            let record = create.record(document)?;
            let key = keyring.create(&record).await?;
            Ok(Done::Shown { id: record.id, key })
        }
        Act::List => keyring.list().await.map(Done::Listed),
        Act::Revoke { id } => keyring.revoke(id).await.map(|()| Done::Revoked(id.clone())),
        Act::Rotate { id } => keyring.rotate(id).await.map(|key| Done::Shown { id: id.clone(), key }),
    }
}

impl Done {
    fn json(&self) -> Value {
        match self {
            Self::Shown { id, key } => json!({ "id": id, "key": key.expose() }),
            Self::Revoked(id) => json!({ "id": id, "revoked": true }),
            Self::Listed(records) => {
                let row = |record: &Record| {
                    let limits: Value =
                        record.limits.as_deref().and_then(|text| serde_json::from_str(text).ok()).unwrap_or(json!({}));
                    json!({
                        "id": record.id, "tier": record.tier, "models": record.models, "routes": record.routes,
                        "expires": record.expires, "limits": limits,
                    })
                };
                json!({ "keys": records.iter().map(row).collect::<Vec<_>>() })
            }
        }
    }

    fn text(&self, out: &mut dyn Write) -> io::Result<()> {
        match self {
            Self::Shown { id, key } => {
                writeln!(out, "{id}\n{}\nThis key is shown once and kept nowhere; only its hash is.", key.expose())
            }
            Self::Revoked(id) => writeln!(out, "{id} is revoked"),
            Self::Listed(records) => records.iter().try_for_each(|record| {
                let tier = record.tier.as_deref().unwrap_or("-");
                let limits = record.limits.as_deref().unwrap_or("-");
                writeln!(out, "{}\ttier {tier}\tlimits {limits}", record.id)
            }),
        }
    }
}
