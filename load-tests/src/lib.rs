//! What Tollgate is tried against: a simulated LLM node, a simulated Dify app, a load generator and a CPU bench.
//!
//! * [`node`]: an OpenAI-compatible node with prefill, decode, a KV prefix cache, a queue, and faults on request.
//! * [`dify`]: a Dify app as its callers see it.
//! * [`load`]: open-loop and closed-loop load against a gateway on this machine.
//! * [`mod@bench`]: CPU time per request and per SSE chunk of a gateway process, beside a bare Pingora proxy;
//!   and of a decision of the ledger.
//!
//! The simulators are libraries so that `tollgate demo` and the black-box tests run them in their own process.

pub mod bench;
pub mod dify;
pub mod load;
pub mod node;
mod record;
mod serve;
mod talk;

pub use record::{Ending, Recorded};
