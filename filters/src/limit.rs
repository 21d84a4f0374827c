//! Limits: what a key, a route, a model and the whole gateway may use.

pub mod dimension;
