//! The engines of Tollgate.

pub mod access;
pub mod config;
pub mod cors;
pub mod error;
pub mod limit;
pub mod metrics;
pub mod trace;
pub mod usage;
