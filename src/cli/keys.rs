//! `tollgate keys`: keys that are kept in Redis, for all gateways at once.

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::{Args, Subcommand};
use serde_json::{Map, Value, json};
use tollgate_filters::auth::keyring::{KeyError, Keyring};
use tollgate_filters::config::World;

use crate::cli::check::{self, Format};
use crate::cli::table;
use crate::config::Document;
use crate::keys::{self, KeyState, Made, Names, NewKey, Row};
use crate::runtime;

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
    /// Where its days and months begin, like Europe/Berlin. Default: UTC.
    #[arg(long)]
    zone: Option<String>,
}

impl Create {
    fn wanted(&self) -> Result<NewKey, String> {
        let mut limits = Map::new();
        for limit in &self.limits {
            let (name, number) = limit.split_once('=').ok_or_else(|| format!("{limit:?} is not like NAME=NUMBER"))?;
            let number: u64 = number.parse().map_err(|_| format!("{number:?} is not a whole number"))?;
            if limits.insert(name.to_owned(), number.into()).is_some() {
                return Err(format!("the limit `{name}` is given twice"));
            }
        }
        Ok(NewKey {
            id: self.id.clone(),
            tier: self.tier.clone(),
            models: self.models.clone(),
            routes: self.routes.clone(),
            expires: self.expires.clone(),
            limits: serde_json::from_value(limits.into()).map_err(|error| error.to_string())?,
            zone: self.zone.clone(),
        })
    }
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
    let document = match check::look(args.config.as_ref(), world) {
        Ok(document) => document,
        Err(problems) => return write!(err, "{problems}").map(|()| ExitCode::FAILURE),
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    match runtime.block_on(act(&args.act, &document, world)) {
        Ok(done) => {
            if !document.auth.redis_keys {
                writeln!(
                    err,
                    "tollgate: no gateway looks for keys in Redis: the configuration lacks `auth.redis_keys: true`"
                )?;
            }
            match args.format {
                Format::Json => writeln!(out, "{}", done.json()?)?,
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
    Shown(Made),
    Listed(Vec<KeyState>),
    Revoked(String),
}

async fn act(act: &Act, document: &Document, world: &dyn World) -> Result<Done, String> {
    // What is wrong with the words is told first: it needs nobody to be asked.
    let wanted = if let Act::Create(create) = act { Some(create.wanted()?) } else { None };
    let redis =
        document.store.redis.as_ref().ok_or("keys are kept in Redis, and the configuration has no `store.redis`")?;
    let keyring: Arc<Keyring> = Keyring::start(&redis.address(world)?, PATIENCE).await;
    let elsewhere = runtime::elsewhere(document, Arc::clone(&keyring), 0);
    let done = match act {
        Act::Create(_) => {
            keys::create(&wanted.unwrap_or_default(), &Names::of(document), &elsewhere).await.map(Done::Shown)
        }
        Act::List => keys::stored(&elsewhere).await.map(Done::Listed),
        Act::Revoke { id } => keyring.revoke(id).await.map(|()| Done::Revoked(id.clone())),
        Act::Rotate { id } => keyring.rotate(id).await.map(|key| Done::Shown(Made::new(id.clone(), &key))),
    };
    done.map_err(|error| match error {
        KeyError::Unknown(id) if document.keys.iter().any(|key| key.id == id) => {
            format!("the key `{id}` stands in the configuration: change it there")
        }
        error => error.to_string(),
    })
}

impl Done {
    fn json(&self) -> serde_json::Result<Value> {
        match self {
            Self::Shown(made) => serde_json::to_value(made),
            Self::Revoked(id) => Ok(json!({ "id": id, "revoked": true })),
            Self::Listed(keys) => Ok(json!({ "keys": serde_json::to_value(keys)? })),
        }
    }

    fn text(&self, out: &mut dyn Write) -> io::Result<()> {
        match self {
            Self::Shown(Made { id, key }) => {
                writeln!(out, "{id}\n{key}\nThis key is shown once and kept nowhere; only its hash is.")
            }
            Self::Revoked(id) => writeln!(out, "{id} is revoked"),
            Self::Listed(keys) if keys.is_empty() => writeln!(out, "there is no key in Redis"),
            Self::Listed(keys) => {
                let head = ["ID", "TIER", "EXPIRES", "ZONE", "MODELS", "ROUTES", "LIMITS"].map(str::to_owned);
                let rows: Vec<_> = std::iter::once(head).chain(keys.iter().map(row)).collect();
                table::write(out, &rows)
            }
        }
    }
}

fn row(key: &KeyState) -> [String; 7] {
    let list = |names: Option<&Vec<String>>| names.map_or_else(|| "all".to_owned(), |names| names.join(","));
    let limit = |(name, row): (&&str, &Row)| match row {
        Row::Holds(limit) => format!("{name}={limit}"),
        Row::Watched { limit, .. } => format!("{name}={limit} (shadow)"),
    };
    let limits = match &key.problem {
        Some(problem) => format!("does not work: {problem}"),
        None if key.limits.is_empty() => "none".to_owned(),
        None => key.limits.iter().map(limit).collect::<Vec<_>>().join(" "),
    };
    [
        key.id.clone(),
        key.tier.clone().unwrap_or_else(|| "-".to_owned()),
        key.expires.clone().unwrap_or_else(|| "never".to_owned()),
        key.zone.clone(),
        list(key.models.as_ref()),
        list(key.routes.as_ref()),
        limits,
    ]
}
