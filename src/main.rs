//! Tollgate: an AI gateway on Pingora.
fn main() {}
