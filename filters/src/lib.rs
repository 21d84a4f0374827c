//! The engines of Tollgate.

pub mod call;
pub mod config;
pub mod dialect;
pub mod error;
pub mod limit;
pub mod meter;
pub mod usage;
