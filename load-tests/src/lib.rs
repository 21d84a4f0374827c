//! Node simulator and load generator for Tollgate.
