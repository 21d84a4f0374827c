//! Tollgate: an AI gateway on Pingora. The whole program on one page.

mod admin;
mod alerts;
mod cli;
mod config;
mod gateway;
mod keys;
mod listen;
mod proxy;
mod runtime;
mod server;

use std::io::{self, Write};
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tollgate_filters::config::Process;

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// An AI gateway: quotas that hold, calls that survive, nodes used well.
#[derive(Debug, Parser)]
#[command(name = "tollgate", version, propagate_version = true, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Run(cli::run::RunArgs),
    Demo(cli::demo::DemoArgs),
    Check(cli::check::CheckArgs),
    Explain(cli::explain::ExplainArgs),
    Schema(cli::schema::SchemaArgs),
    Keys(cli::keys::KeysArgs),
    Quota(cli::quota::QuotaArgs),
    Completions(cli::completions::CompletionsArgs),
    Man(cli::completions::ManArgs),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let (mut out, mut err) = (io::stdout(), io::stderr());
    let result = match cli.command {
        Command::Run(args) => cli::run::run(&args),
        Command::Demo(args) => cli::demo::run(&args),
        Command::Check(args) => cli::check::run(&args, &Process, &mut out, &mut err),
        Command::Explain(args) => cli::explain::run(&args, &Process, &mut out, &mut err),
        Command::Schema(args) => cli::schema::run(&args, &mut out),
        Command::Keys(args) => cli::keys::run(&args, &Process, &mut out, &mut err),
        Command::Quota(args) => cli::quota::run(&args, &Process, &mut out, &mut err),
        Command::Completions(args) => cli::completions::run::<Cli>(&args, &mut out),
        Command::Man(args) => cli::completions::man::<Cli>(&args, &mut out),
    };
    match result {
        Ok(code) => code,
        // Whoever reads our output may stop reading: that is no failure of ours.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(err, "tollgate: {error}");
            ExitCode::FAILURE
        }
    }
}
