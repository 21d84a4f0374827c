//! The text of an answer that no statement of its upstream covers, kept until the end for an exact count.

use super::exact::Tokens;
use super::learned::Ratio;

/// The most that is kept of one answer. What follows is taken to be like what was kept.
const MOST: usize = 32 * 1024;

/// Text as it comes, up to a bound. Copying is all that happens beside a stream.
#[derive(Debug, Default)]
pub(super) struct Kept {
    text: Vec<u8>,
    full: bool,
}

impl Kept {
    pub(super) fn push(&mut self, piece: &[u8]) {
        if !cfg!(feature = "exact-tokens") || self.full {
            return;
        }
        if self.text.len() + piece.len() > MOST {
            self.full = true;
            return;
        }
        self.text.extend_from_slice(piece);
    }

    pub(super) fn clear(&mut self) {
        self.text.clear();
        self.full = false;
    }
}

/// Output that only we have counted, ready to be counted better.
#[derive(Debug)]
pub struct Uncovered {
    text: Vec<u8>,
    /// Tokens of the kept text by the estimate.
    kept: u64,
    /// Tokens of all of it by the estimate.
    all: u64,
}

impl Uncovered {
    pub(super) fn new(kept: Kept, all: u64) -> Self {
        let kept_tokens = if kept.full {
            let mut size = super::estimate::TextSize::default();
            size.feed(&kept.text);
            size.tokens()
        } else {
            all
        };
        Self { text: kept.text, kept: kept_tokens, all }
    }

    /// Its tokens: by the model's own vocabulary, else by what was learned of the model, else by the nearest vocabulary there is.
    pub async fn tokens(self, tokens: Tokens, learned: Option<&Ratio>) -> u64 {
        if !tokens.own
            && let Some(ratio) = learned.filter(|ratio| ratio.known().is_some())
        {
            return ratio.correct(self.all);
        }
        if self.text.is_empty() {
            return self.all;
        }
        let Some(exact) = tokens.vocabulary.count_apart(self.text).await else { return self.all };
        if self.all == self.kept {
            return exact;
        }
        let whole = u128::from(exact) * u128::from(self.all) / u128::from(self.kept.max(1));
        u64::try_from(whole).unwrap_or(u64::MAX)
    }
}

#[cfg(all(test, feature = "exact-tokens"))]
mod tests {
    use super::*;
    use crate::meter::estimate::TextSize;
    use crate::meter::exact::Vocabulary;

    fn uncovered(text: &str) -> Uncovered {
        let mut kept = Kept::default();
        let mut size = TextSize::default();
        for piece in text.as_bytes().chunks(7) {
            kept.push(piece);
            size.feed(piece);
        }
        Uncovered::new(kept, size.tokens())
    }

    #[tokio::test]
    async fn a_kept_text_is_counted_by_the_models_vocabulary() {
        let text = "Grüße aus Köln: 42 Züge, und keiner kommt pünktlich. ";
        let truth = Vocabulary::O200k.count(text.as_bytes()).unwrap();
        assert_eq!(uncovered(text).tokens(Tokens::of("gpt-4o"), None).await, truth);
    }

    #[tokio::test]
    async fn a_text_beyond_the_bound_is_projected_from_its_beginning() {
        let text = "The toll is due at the gate, and the gate counts every cart. ".repeat(3_000);
        let truth = Vocabulary::O200k.count(text.as_bytes()).unwrap() as f64;
        let kept = uncovered(&text);
        assert!(kept.text.len() <= MOST && kept.all > kept.kept);
        let counted = kept.tokens(Tokens::of("gpt-4o"), None).await as f64;
        assert!((counted / truth - 1.0).abs() < 0.01, "{counted} for {truth}");
    }

    #[tokio::test]
    async fn what_was_learned_of_a_model_beats_the_vocabulary_of_another() {
        let ratio = Ratio::default();
        (0..20).for_each(|_| ratio.observe(100, 150));
        let scan = uncovered("one two three four").all;
        assert_eq!(uncovered("one two three four").tokens(Tokens::of("qwen"), Some(&ratio)).await, ratio.correct(scan));
        assert_eq!(uncovered("one two three four").tokens(Tokens::of("gpt-4o"), Some(&ratio)).await, 4);
        assert_eq!(uncovered("one two three four").tokens(Tokens::of("qwen"), Some(&Ratio::default())).await, 4);
    }
}
