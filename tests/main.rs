//! Black-box tests of the gateway: the real binary over real sockets, one file per subject.
//! What is tested is what a user sees.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
#![allow(clippy::large_futures, reason = "a test's future may be as large as it likes")]

mod harness;

mod admin;
mod alerts;
mod auth;
mod big_bodies;
mod budget;
mod call;
mod cancel;
mod cli;
mod crash;
mod fallback;
mod faults;
mod itself;
mod keys;
mod ledger_bugs;
mod limits;
mod models;
mod pass;
mod queue;
mod race;
mod redis;
mod redis_faults;
mod redis_places;
mod resume;
mod routing;
mod sdk;
mod stream;
mod tokens;
