//! `tollgate run`: serve.

use std::io;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use tollgate_filters::config::Process;

use crate::cli::check;
use crate::server;

/// Serve a configuration until SIGTERM or SIGINT.
#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    /// The configuration. Default: ./conf/tollgate.yaml, then /etc/tollgate/tollgate.yaml.
    #[arg(short, long, value_name = "FILE")]
    config: Option<PathBuf>,
}

/// Serves.
///
/// # Errors
/// A listener that cannot be bound, a runtime that cannot be built.
pub(crate) fn run(args: &RunArgs) -> io::Result<ExitCode> {
    server::log_to_stderr();
    let Some(loaded) = check::load_or_tell(args.config.as_ref(), &Process, &mut io::stderr())? else {
        return Ok(ExitCode::FAILURE);
    };
    for warning in &loaded.warnings {
        tracing::warn!("{warning}");
    }
    let runtime = server::tokio_runtime(&loaded.document)?;
    runtime.block_on(async {
        let server = server::Server::start(&loaded, &Process).await?;
        server.announce();
        server.run_until_signal().await
    })?;
    Ok(ExitCode::SUCCESS)
}
