//! The engines of Tollgate: what happens to a request between its head and its last byte, without a socket in sight.
//!
//! # The life of a request
//!
//! A head arrives. [`route`] brings its path into one canonical form and finds the first route that matches. The route's
//! [`chain`] of filters runs over the head: [`cors`] answers preflights, [`auth`] finds the caller by the hash of the
//! whole key. Only then is a body read, and [`call`] takes from it what is needed (model, stream, sizes, an anchor for
//! balancing) without building a tree. The chain runs on: [`guard`] checks what may be asked, [`limit`] reserves once for
//! the whole call, whatever the number of attempts.
//!
//! Attempts follow: [`model`] lists the targets, [`balance`] picks a node of an [`upstream`], [`retry`] says what a
//! failure allows. The answer is read along by a [`meter`], which splits the event stream ([`dialect`]), sees the first
//! token, errors and usage, and forwards the very bytes that came. When all is over the reservation is settled with the
//! [`usage`], exactly once: by `settle`, or by `Drop` on every other way out.
//!
//! # Order of the modules
//!
//! Words of the configuration and errors; then the domain, from what knows least upward; then the filters; then the chain
//! that lists them. A module uses only those before it in the list below. A file named `filter.rs` in the folder of an
//! engine is the filter in front of it, and stands among the filters. A test in this file holds the code to that.

// Words
pub mod config;
pub mod error;
pub mod store;
pub mod usage;

// Domain: what a call meets
pub mod access;
pub mod balance;
pub mod dialect;
pub mod limit;
pub mod meter;
pub mod metrics;
pub mod retry;
pub mod route;
pub mod trace;
pub mod upstream;

// Domain: the call and who makes it
pub mod auth;
pub mod call;
pub mod model;

pub mod course;

pub mod exchange;

// Filters
pub mod filter;

pub mod cors;
pub mod guard;

// The chain
pub mod chain;

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    fn source() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
    }

    fn files(folder: &Path, found: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                files(&path, found);
            } else if path.extension().is_some_and(|end| end == "rs") {
                found.push(path);
            }
        }
    }

    /// The modules of this crate that a line of code names, by `crate::name`.
    fn used(line: &str) -> impl Iterator<Item = &str> {
        let code = line.split("//").next().unwrap_or_default();
        let name = |rest: &'_ str| rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(rest.len());
        code.split("crate::").skip(1).map(move |rest| &rest[..name(rest)])
    }

    #[test]
    fn a_module_uses_only_those_before_it() {
        let root = std::fs::read_to_string(source().join("lib.rs")).unwrap();
        let order: Vec<&str> =
            root.lines().filter_map(|line| line.strip_prefix("pub mod ")?.strip_suffix(';')).collect();
        let rank = |module: &str| order.iter().position(|name| *name == module);
        let chain = rank("chain").unwrap();
        assert_eq!(chain, order.len() - 1, "the chain lists all others and comes last");

        let mut all = Vec::new();
        files(&source(), &mut all);
        let mut seen = 0;
        for path in all.iter().filter(|path| !path.ends_with("src/lib.rs")) {
            let within = path.strip_prefix(source()).unwrap().with_extension("");
            let module = within.iter().next().unwrap().to_str().unwrap();
            let is_filter = within.components().count() > 1 && within.ends_with("filter");
            let own = rank(module).unwrap_or_else(|| panic!("`pub mod {module};` is missing in lib.rs"));
            let level = if is_filter { chain - 1 } else { own };
            for (number, line) in std::fs::read_to_string(path).unwrap().lines().enumerate() {
                for other in used(line) {
                    seen += 1;
                    let before = rank(other).is_none_or(|rank| rank <= level);
                    assert!(before, "{}:{}: `{module}` may not use `{other}`", path.display(), number + 1);
                }
            }
        }
        assert!(seen > 100, "the code was not read");
    }
}
