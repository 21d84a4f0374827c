//! The engines of Tollgate: what happens to a request between its head and its last byte, without a socket in sight.
//!
//! # The life of a request
//!
//! A head arrives. [`route`] brings its path into one canonical form and finds the first route that matches. The route's
//! [`chain`] of filters runs over the head: [`cors`] answers preflights, [`auth`] finds the caller by the hash of the
//! whole key. Only then is a body read, and [`call`] takes from it what is needed (model, stream, sizes, an anchor for
//! balancing) without building a tree. The chain runs on: [`guard`] checks what may be asked, [`limit`] reserves once for
//! the whole call, whatever the number of attempts.
//!
//! Attempts follow: [`model`] lists the targets, [`balance`] picks a node of an [`upstream`], [`retry`] says what a
//! failure allows. The answer is read along by a [`meter`], which splits the event stream ([`dialect`]), sees the first
//! token, errors and usage, and forwards the very bytes that came. When all is over the reservation is settled with the
//! [`usage`], exactly once: by `settle`, or by `Drop` on every other way out.
//!
//! # Order of the modules
//!
//! Words of the configuration and errors; then the domain; then the filters; then the chain that lists them. A module
//! uses only those before it in this list; `tests` in this file hold the code to that.

// Words
pub mod config;
pub mod error;
pub mod usage;
// Domain
pub mod access;
pub mod balance;
pub mod call;
pub mod dialect;
pub mod exchange;
pub mod keyring;
pub mod limit;
pub mod meter;
pub mod metrics;
pub mod model;
pub mod retry;
pub mod route;
pub mod trace;
pub mod upstream;
// Filters
pub mod auth;
pub mod cors;
pub mod filter;
pub mod guard;
// The chain
pub mod chain;
