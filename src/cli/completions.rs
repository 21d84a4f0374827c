//! `tollgate completions` and `tollgate man`: what a shell and a manual page need, made from the commands themselves.

use std::io::{self, Write};
use std::process::ExitCode;

use clap::{Args, CommandFactory};
use clap_complete::Shell;

/// Print the completions of a shell.
#[derive(Debug, Args)]
pub(crate) struct CompletionsArgs {
    /// The shell.
    #[arg(value_enum)]
    shell: Shell,
}

/// Print the manual page.
#[derive(Debug, Args)]
pub(crate) struct ManArgs {}

/// Prints completions.
///
/// # Errors
/// When they cannot be written.
pub(crate) fn run<C: CommandFactory>(args: &CompletionsArgs, out: &mut dyn Write) -> io::Result<ExitCode> {
    // The generator panics when it cannot write, so it writes into memory.
    let mut text = Vec::new();
    clap_complete::generate(args.shell, &mut C::command(), "tollgate", &mut text);
    out.write_all(&text)?;
    Ok(ExitCode::SUCCESS)
}

/// Prints the manual page.
///
/// # Errors
/// When it cannot be written.
pub(crate) fn man<C: CommandFactory>(_: &ManArgs, out: &mut dyn Write) -> io::Result<ExitCode> {
    clap_mangen::Man::new(C::command()).render(out)?;
    Ok(ExitCode::SUCCESS)
}
