//! The `tollgate-load` command.
fn main() {}
