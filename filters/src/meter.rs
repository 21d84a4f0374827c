//! The observer of one answer of one attempt.
pub mod estimate;
