//! Exact counts, by the byte pair vocabularies of OpenAI's models, for the few texts where the estimate is not good enough: a prompt near
//! the limit, and an answer whose upstream did not say what it cost.
//!
//! A vocabulary takes some 90 ms and 40 MB to set up. That happens once, away from the threads that serve, and not before somebody
//! needs it. Counting takes about 70 µs per kilobyte, so it has no place beside the relaying of a stream either.
//! Without the cargo feature `exact-tokens` there are no vocabularies, and the estimate is all there is.

/// The longest text that is worth an exact count before a call, in bytes.
pub const LONGEST: usize = 64 * 1024;
/// A text of so many bytes is counted in less time than it takes to hand it to another thread.
const SHORT: usize = 512;

/// How a model cuts text into tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Vocabulary {
    /// GPT-4o and what came after it; also the nearest that there is for every other model.
    O200k,
    /// GPT-4, GPT-3.5 and the embedding models of their time.
    Cl100k,
}

/// The vocabulary of a model, and whether it is the model's own or only like it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tokens {
    /// Which vocabulary.
    pub vocabulary: Vocabulary,
    /// Whether it is known to be the model's own.
    pub own: bool,
}

impl Tokens {
    /// By the model's name at its upstream: `gpt-4o-mini`, `openai/gpt-4.1`, `ft:gpt-3.5-turbo:acme`.
    pub fn of(model: &str) -> Self {
        let name = model.rsplit('/').next().unwrap_or_default().to_ascii_lowercase();
        let name = name.strip_prefix("ft:").unwrap_or(&name);
        let name = name.split([':', '@']).next().unwrap_or_default();
        let begins = |heads: &[&str]| heads.iter().any(|head| name.starts_with(head));
        let reasoning = name.strip_prefix('o').is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()));
        if name == "gpt-4" || begins(&["gpt-4-", "gpt-3.5", "gpt-35", "text-embedding-"]) {
            return Self { vocabulary: Vocabulary::Cl100k, own: true };
        }
        let own = reasoning || begins(&["gpt-4o", "gpt-4.1", "gpt-4.5", "gpt-5", "gpt-oss", "chatgpt-4o"]);
        Self { vocabulary: Vocabulary::O200k, own }
    }
}

impl Vocabulary {
    /// Whether it can be used without waiting.
    pub fn is_ready(self) -> bool {
        tables::ready(self)
    }

    /// Sets it up in the background, if nobody has yet.
    pub fn warm(self) {
        tables::warm(self);
    }

    /// Tokens of a text; pieces with a zero byte between them are counted apart. Waits for the vocabulary, so it is not for a thread
    /// that serves. `None` without the feature `exact-tokens`.
    pub fn count(self, text: &[u8]) -> Option<u64> {
        tables::count(self, text)
    }

    /// The same without keeping a thread that serves: short texts are counted in place, others on a thread made for waiting.
    pub async fn count_apart(self, text: Vec<u8>) -> Option<u64> {
        if !cfg!(feature = "exact-tokens") || (self.is_ready() && text.len() <= SHORT) {
            return self.count(&text);
        }
        tokio::task::spawn_blocking(move || self.count(&text)).await.ok().flatten()
    }
}

#[cfg(feature = "exact-tokens")]
mod tables {
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicBool, Ordering};

    use bpe_openai::Tokenizer;

    use super::Vocabulary;

    struct Table {
        made: OnceLock<&'static Tokenizer>,
        begun: AtomicBool,
    }

    impl Table {
        const fn new() -> Self {
            Self { made: OnceLock::new(), begun: AtomicBool::new(false) }
        }
    }

    static O200K: Table = Table::new();
    static CL100K: Table = Table::new();

    fn table(vocabulary: Vocabulary) -> &'static Table {
        match vocabulary {
            Vocabulary::O200k => &O200K,
            Vocabulary::Cl100k => &CL100K,
        }
    }

    fn made(vocabulary: Vocabulary) -> &'static Tokenizer {
        table(vocabulary).made.get_or_init(|| match vocabulary {
            Vocabulary::O200k => bpe_openai::o200k_base(),
            Vocabulary::Cl100k => bpe_openai::cl100k_base(),
        })
    }

    pub(super) fn ready(vocabulary: Vocabulary) -> bool {
        table(vocabulary).made.get().is_some()
    }

    pub(super) fn warm(vocabulary: Vocabulary) {
        if !ready(vocabulary) && !table(vocabulary).begun.swap(true, Ordering::Relaxed) {
            let making = std::thread::Builder::new().name("vocabulary".to_owned()).spawn(move || made(vocabulary));
            if let Err(error) = making {
                tracing::warn!(%error, "no thread to set up a vocabulary; tokens near a limit are estimated");
            }
        }
    }

    pub(super) fn count(vocabulary: Vocabulary, text: &[u8]) -> Option<u64> {
        let tokens = made(vocabulary);
        let pieces = text.split(|byte| *byte == 0).filter(|piece| !piece.is_empty());
        Some(pieces.map(|piece| tokens.count(&*String::from_utf8_lossy(piece)) as u64).sum())
    }
}

#[cfg(not(feature = "exact-tokens"))]
mod tables {
    use super::Vocabulary;

    pub(super) fn ready(_: Vocabulary) -> bool {
        false
    }

    pub(super) fn warm(_: Vocabulary) {}

    pub(super) fn count(_: Vocabulary, _: &[u8]) -> Option<u64> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_is_known_by_its_name() {
        use Vocabulary::{Cl100k, O200k};
        for (name, vocabulary, own) in [
            ("gpt-4", Cl100k, true),
            ("gpt-4-turbo-2024-04-09", Cl100k, true),
            ("openai/gpt-3.5-turbo", Cl100k, true),
            ("ft:gpt-3.5-turbo:acme::1", Cl100k, true),
            ("text-embedding-3-small", Cl100k, true),
            ("gpt-4o-mini", O200k, true),
            ("GPT-4.1", O200k, true),
            ("gpt-5", O200k, true),
            ("o3-mini", O200k, true),
            ("ft:gpt-4o:acme", O200k, true),
            ("openchat", O200k, false),
            ("Qwen/Qwen2.5-72B-Instruct", O200k, false),
            ("", O200k, false),
        ] {
            assert_eq!(Tokens::of(name), Tokens { vocabulary, own }, "{name}");
        }
    }

    #[test]
    #[cfg(feature = "exact-tokens")]
    fn texts_are_counted_as_openai_counts_them() {
        // Figures of OpenAI's own tokenizer.
        assert_eq!(Vocabulary::O200k.count(b"tiktoken is great!"), Some(6));
        assert_eq!(Vocabulary::Cl100k.count(b"tiktoken is great!"), Some(6));
        assert_eq!(Vocabulary::O200k.count("你好，世界".as_bytes()), Some(3));
        assert_eq!(Vocabulary::O200k.count(b""), Some(0));
        assert_eq!(Vocabulary::O200k.count(b"hello\0hello\0"), Some(2), "pieces are apart");
        assert_eq!(Vocabulary::O200k.count(b"\xFF\xFE"), Vocabulary::O200k.count("\u{FFFD}\u{FFFD}".as_bytes()));
        assert!(Vocabulary::O200k.is_ready());
    }

    #[tokio::test]
    async fn a_count_apart_is_the_same_count() {
        let long = b"one two three ".repeat(500);
        let whole = Vocabulary::O200k.count(&long);
        assert_eq!(Vocabulary::O200k.count_apart(long).await, whole);
        assert_eq!(Vocabulary::O200k.count_apart(b"one".to_vec()).await, Vocabulary::O200k.count(b"one"));
    }
}
