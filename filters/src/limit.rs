//! Limits: what a key, a route, a model and the whole gateway may use.
//!
//! One [`Plan`] says which rules bind a call. [`Ledger::reserve`] decides all of them in one atomic step: either every
//! counter takes the call, or none changes. The [`Reservation`] that comes back is settled exactly once, by
//! [`Reservation::settle`] or, on any other way out, by its `Drop`.
//!
//! - `dimension` the words of the configuration, `rule` a scope with its limits
//! - `window`, `calendar` the pure state machines, time as an argument; `zone` where the days of a calendar begin
//! - `memory` the counters of one process, `redis` those of many; `reservation` the ledger in front of the store
//! - `bucket` token buckets of what a provider grants, `budget` how an upstream draws from it
//! - `filter` where a request meets the ledger
//! - `headers`, `quota` what a client is told; `guess` how long an answer will probably be

pub mod bucket;
pub mod budget;
mod calendar;
pub mod clock;
pub mod dimension;
pub mod filter;
pub mod guess;
pub mod headers;
pub mod memory;
pub mod quota;
mod redis;
pub mod reservation;
pub mod rule;
mod standing;
pub mod watch;
mod window;
pub mod zone;

pub use clock::{Clock, Instant64, ManualClock, SystemClock};
pub use dimension::{Dimension, Limit, Limits};
pub use redis::shared::RedisOptions;
pub use reservation::{Decision, Estimate, Ledger, Reservation};
pub use rule::{Plan, Rule, RuleSet, Scope, ScopeId, WhenDown};
pub use standing::{Standing, Standings};
pub use watch::Watch;
pub use zone::Zone;
