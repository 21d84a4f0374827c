//! Who wants to know how the store does.

use std::time::Duration;

/// Told by the ledger how its store does; the metrics listen.
pub trait Watch: Send + Sync + 'static {
    /// Whether the store is there from now on.
    fn set_store_up(&self, up: bool);

    /// One operation took that long, answered or not. `op` is a word of the code.
    fn store_took(&self, op: &'static str, took: Duration);

    /// A call was refused by what the store said of one like it a moment before.
    fn refused_again(&self);
}
