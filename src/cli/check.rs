//! `tollgate check`: every problem of a configuration at once.

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, ValueEnum};
use serde_json::json;
use tollgate_filters::config::World;

use crate::config::{self, Document, Loaded, Problem, Problems};

/// Check a configuration: all errors at once, each with its place and a hint.
#[derive(Debug, Args)]
pub(crate) struct CheckArgs {
    /// The configuration. Default: ./conf/tollgate.yaml, then /etc/tollgate/tollgate.yaml.
    #[arg(short, long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// How to print the result.
    #[arg(long, value_enum, default_value_t = Format::Text)]
    pub format: Format,
}

/// How a listing is printed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// For people.
    #[default]
    Text,
    /// For programs.
    Json,
}

/// Loads the file named, or the one at the default place.
///
/// # Errors
/// Every problem of the configuration, or that there is none.
pub(crate) fn load(path: Option<&PathBuf>, world: &dyn World) -> Result<Loaded, Problems> {
    match path.cloned().or_else(config::default_path) {
        Some(path) => config::load(&path, world),
        None => Err(nowhere()),
    }
}

/// The document of the file named, or of the one at the default place, for a command about a gateway that runs already.
///
/// # Errors
/// What cannot be understood of it, or that there is none.
pub(crate) fn look(path: Option<&PathBuf>, world: &dyn World) -> Result<Document, Problems> {
    match path.cloned().or_else(config::default_path) {
        Some(path) => config::look(&path, world),
        None => Err(nowhere()),
    }
}

fn nowhere() -> Problems {
    let mut problem = Problem::of_file("conf/tollgate.yaml", "there is no such file");
    problem.hint = Some("name one with -c FILE, or put it there or at /etc/tollgate/tollgate.yaml".to_owned());
    Problems(vec![problem])
}

/// The same as [`load`] for a command that cannot go on without it: the problems are told on `err`, and `None` is left.
///
/// # Errors
/// When the problems cannot be written.
pub(crate) fn load_or_tell(
    path: Option<&PathBuf>,
    world: &dyn World,
    err: &mut dyn Write,
) -> io::Result<Option<Loaded>> {
    match load(path, world) {
        Ok(loaded) => Ok(Some(loaded)),
        Err(problems) => write!(err, "{problems}").map(|()| None),
    }
}

/// Runs the check; the result goes to `out`, in text problems go to `err`. Exit code 0: may be used; 1: refused.
///
/// # Errors
/// When the result cannot be written.
pub(crate) fn run(
    args: &CheckArgs,
    world: &dyn World,
    out: &mut dyn Write,
    err: &mut dyn Write,
) -> io::Result<ExitCode> {
    let result = load(args.config.as_ref(), world);
    let code = if result.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    match args.format {
        Format::Json => json_report(&result, out)?,
        Format::Text => text_report(&result, out, err)?,
    }
    Ok(code)
}

fn json_report(result: &Result<Loaded, Problems>, out: &mut dyn Write) -> io::Result<()> {
    let (errors, warnings): (Vec<&Problem>, Vec<&Problem>) = match result {
        Ok(loaded) => (Vec::new(), loaded.warnings.iter().collect()),
        Err(problems) => (problems.errors().collect(), problems.warnings().collect()),
    };
    let report = json!({ "ok": result.is_ok(), "errors": errors, "warnings": warnings });
    serde_json::to_writer_pretty(&mut *out, &report)?;
    writeln!(out)
}

fn text_report(result: &Result<Loaded, Problems>, out: &mut dyn Write, err: &mut dyn Write) -> io::Result<()> {
    match result {
        Ok(loaded) => {
            for warning in &loaded.warnings {
                writeln!(err, "{warning}")?;
            }
            let document = &loaded.document;
            let name = loaded.files.first().map(|path| path.display().to_string()).unwrap_or_default();
            writeln!(
                out,
                "{name}: ok, {}, {}, {}, {}{}",
                count(document.routes.len(), "route"),
                count(document.models.len(), "model"),
                count(document.upstreams.len(), "upstream"),
                count(document.keys.len(), "key"),
                if loaded.warnings.is_empty() {
                    String::new()
                } else {
                    format!("; {}", count(loaded.warnings.len(), "warning"))
                },
            )
        }
        Err(problems) => {
            write!(err, "{problems}")?;
            let errors = count(problems.errors().count(), "error");
            let warnings = problems.warnings().count();
            let more = if warnings == 0 { String::new() } else { format!(", {}", count(warnings, "warning")) };
            writeln!(err, "{errors}{more}")
        }
    }
}

fn count(number: usize, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;
    use tollgate_filters::config::Process;

    fn check(text: &str, format: Format) -> (String, String, bool) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.yaml");
        std::fs::write(&path, text).unwrap();
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let args = CheckArgs { config: Some(path), format };
        let code = run(&args, &Process, &mut out, &mut err).unwrap();
        (String::from_utf8(out).unwrap(), String::from_utf8(err).unwrap(), code == ExitCode::SUCCESS)
    }

    #[test]
    fn a_good_file_is_summed_up_in_one_line() {
        let (out, err, ok) = check(
            "upstreams: { a: { nodes: ['http://127.0.0.1:1'] } }\nroutes: [{ name: r, match: { prefix: / }, pass: { upstream: a } }]",
            Format::Text,
        );
        assert!(ok && err.is_empty(), "{err}");
        assert!(out.ends_with("t.yaml: ok, 1 route, 0 models, 1 upstream, 0 keys\n"), "{out}");
    }

    #[test]
    fn a_bad_file_fails_and_the_count_stands_last() {
        let (out, err, ok) = check("rotes: []\nstor: {}", Format::Text);
        assert!(!ok && out.is_empty());
        assert!(err.contains("t.yaml:1:1: error: unknown key `rotes`\n"), "{err}");
        assert!(err.contains("  hint: did you mean `routes`?\n"), "{err}");
        assert!(err.contains("t.yaml:2:1: error: unknown key `stor`\n"), "{err}");
        assert!(err.ends_with("2 errors, 1 warning\n"), "{err}");
    }

    #[test]
    fn the_json_report_has_every_problem_with_its_place() {
        let (out, err, ok) = check("server: { drain: soon }", Format::Json);
        assert!(!ok && err.is_empty());
        let report: serde_json::Value = serde_json::from_str(&out).unwrap();
        assert_eq!(report["ok"], false);
        let error = &report["errors"][0];
        assert_eq!((&error["line"], &error["column"], &error["path"]), (&1.into(), &18.into(), &"server.drain".into()));
        assert_eq!(report["warnings"].as_array().unwrap().len(), 1);
    }

    #[test]
    fn a_missing_file_is_an_error_that_names_it() {
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let args = CheckArgs { config: Some("/nowhere/t.yaml".into()), format: Format::Text };
        let code = run(&args, &Process, &mut out, &mut err).unwrap();
        assert_eq!(code, ExitCode::FAILURE);
        assert_eq!(String::from_utf8(err).unwrap(), "/nowhere/t.yaml: error: there is no such file\n\n1 error\n");
    }
}
