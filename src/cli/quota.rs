//! `tollgate quota`: what a key has used, asked of the gateway that runs.

use std::io::{self, Write};
use std::process::ExitCode;

use clap::{Args, Subcommand};
use http::{Method, StatusCode};
use serde_json::{Value, json};
use tollgate_filters::config::World;

use crate::cli::admin_port::{AdminPort, Whom, segment};
use crate::cli::check::Format;
use crate::cli::table;

/// Show what a key has used of its limits, or give it back.
#[derive(Debug, Args)]
pub(crate) struct QuotaArgs {
    #[command(subcommand)]
    act: Act,
    #[command(flatten)]
    whom: Whom,
    /// How to print the result.
    #[arg(long, value_enum, default_value_t = Format::Text, global = true)]
    format: Format,
}

#[derive(Debug, Subcommand)]
enum Act {
    /// Show what a key has used, and what is left.
    Show {
        /// Id of the key.
        #[arg(value_name = "KEY_ID")]
        id: String,
    },
    /// Forget what a key has used. Calls that are open stay counted.
    Reset {
        /// Id of the key.
        #[arg(value_name = "KEY_ID")]
        id: String,
    },
}

/// Does it; results go to `out`, what went wrong to `err`. Exit code 0: done; 1: not done.
///
/// # Errors
/// When the result cannot be written.
pub(crate) fn run(
    args: &QuotaArgs,
    world: &dyn World,
    out: &mut dyn Write,
    err: &mut dyn Write,
) -> io::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    match AdminPort::of(&args.whom, world).and_then(|port| runtime.block_on(act(&args.act, &port))) {
        Ok(done) => {
            match args.format {
                Format::Json => writeln!(out, "{done}")?,
                Format::Text => text(&done, out)?,
            }
            Ok(ExitCode::SUCCESS)
        }
        Err(why) => {
            writeln!(err, "tollgate: {}", why.trim_end())?;
            Ok(ExitCode::FAILURE)
        }
    }
}

async fn act(act: &Act, port: &AdminPort) -> Result<Value, String> {
    let (method, id) = match act {
        Act::Show { id } => (Method::GET, id),
        Act::Reset { id } => (Method::DELETE, id),
    };
    if id.is_empty() {
        return Err("the id of the key is empty".to_owned());
    }
    let answer = port.ask(method, &format!("/api/quota/{}", segment(id))).await?;
    match (act, answer.status) {
        (Act::Show { .. }, StatusCode::OK) if answer.body.is_object() => Ok(answer.body),
        (Act::Reset { .. }, StatusCode::NO_CONTENT) => Ok(json!({ "key_id": id, "reset": true })),
        (_, StatusCode::NOT_FOUND) => Err(format!("the gateway at {} knows no key `{id}`", port.authority())),
        _ => Err(answer.failure()),
    }
}

fn text(done: &Value, out: &mut dyn Write) -> io::Result<()> {
    let word = |value: &Value, name: &str| value.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
    let number = |value: &Value, name: &str| value.get(name).map(ToString::to_string).unwrap_or_default();
    let id = word(done, "key_id");
    let Some(limits) = done.get("limits").and_then(Value::as_array) else {
        return writeln!(out, "{id}: what it used is forgotten");
    };
    match done.get("tier").and_then(Value::as_str) {
        Some(tier) => writeln!(out, "{id}, tier {tier}")?,
        None => writeln!(out, "{id}, no tier")?,
    }
    if limits.is_empty() {
        return writeln!(out, "nothing limits it");
    }
    let head = ["DIMENSION", "LIMIT", "USED", "HELD", "REMAINING", "RESETS IN"].map(str::to_owned);
    let row = |row: &Value| {
        let shadow = if row.get("shadow").is_some_and(|shadow| *shadow == true) { " (shadow)" } else { "" };
        let resets = row.get("resets_in").and_then(Value::as_u64).unwrap_or(0);
        [
            word(row, "dimension") + shadow,
            number(row, "limit"),
            number(row, "used"),
            number(row, "held"),
            number(row, "remaining"),
            period(resets),
        ]
    };
    let rows: Vec<_> = std::iter::once(head).chain(limits.iter().map(row)).collect();
    table::write(out, &rows)
}

/// Seconds as people say them.
fn period(secs: u64) -> String {
    match secs {
        0 => "-".to_owned(),
        1..60 => format!("{secs}s"),
        60..3_600 => format!("{}m {:02}s", secs / 60, secs % 60),
        3_600..86_400 => format!("{}h {:02}m", secs / 3_600, secs % 3_600 / 60),
        _ => format!("{}d {:02}h", secs / 86_400, secs % 86_400 / 3_600),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn periods_are_told_in_two_units_at_most() {
        let told = [0, 59, 60, 3_599, 3_600, 86_399, 86_400, 31 * 86_400].map(period);
        assert_eq!(told, ["-", "59s", "1m 00s", "59m 59s", "1h 00m", "23h 59m", "1d 00h", "31d 00h"]);
    }
}
