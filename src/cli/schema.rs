//! `tollgate schema`: the JSON Schema of the configuration.

use std::io::{self, Write};
use std::process::ExitCode;

use clap::Args;

use crate::config::Document;

/// Print the JSON Schema of the configuration.
#[derive(Debug, Args)]
pub(crate) struct SchemaArgs {}

/// The schema as text, indented, with a line break at its end. Checked in as `conf/schema.json`.
///
/// # Errors
/// Never in practice: a schema is plain JSON.
pub(crate) fn schema() -> Result<String, serde_json::Error> {
    let mut text = serde_json::to_string_pretty(&schemars::schema_for!(Document))?;
    text.push('\n');
    Ok(text)
}

/// Prints the schema.
///
/// # Errors
/// When it cannot be written.
pub(crate) fn run(_: &SchemaArgs, out: &mut dyn Write) -> io::Result<ExitCode> {
    out.write_all(schema()?.as_bytes())?;
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_schema_checked_in_is_the_one_of_the_code() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/conf/schema.json");
        let ours = super::schema().unwrap();
        if std::env::var_os("TOLLGATE_WRITE_SCHEMA").is_some() {
            std::fs::write(path, &ours).unwrap();
        }
        let checked_in = std::fs::read_to_string(path).unwrap();
        assert!(ours == checked_in, "conf/schema.json is old; run: tollgate schema > conf/schema.json");
    }
}
