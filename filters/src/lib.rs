//! The engines of Tollgate.

pub mod config;
pub mod error;
pub mod limit;
pub mod usage;
