//! Subcommands, one file each.

mod admin_port;
pub(crate) mod check;
pub(crate) mod completions;
pub(crate) mod demo;
pub(crate) mod explain;
pub(crate) mod keys;
pub(crate) mod quota;
pub(crate) mod run;
pub(crate) mod schema;
mod table;
