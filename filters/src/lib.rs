//! The engines of Tollgate.

pub mod config;
pub mod error;
pub mod usage;
pub mod route;
pub mod balance;
pub mod upstream;
pub mod retry;
pub mod limit;
