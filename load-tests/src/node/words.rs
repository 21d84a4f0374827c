//! Text that looks like an answer and depends on nothing but its seed.

const WORDS: [&str; 64] = [
    " the",
    " gateway",
    " holds",
    " every",
    " call",
    " until",
    " a",
    " node",
    " is",
    " free",
    " and",
    " then",
    " lets",
    " it",
    " through",
    " with",
    " its",
    " own",
    " count",
    " of",
    " tokens",
    " so",
    " that",
    " no",
    " caller",
    " takes",
    " more",
    " than",
    " was",
    " granted",
    " while",
    " others",
    " wait",
    " for",
    " their",
    " turn",
    " in",
    " line",
    " as",
    " at",
    " an",
    " old",
    " toll",
    " bar",
    " on",
    " road",
    " where",
    " each",
    " cart",
    " pays",
    " by",
    " weight",
    " at",
    " once",
    " café",
    " naïve",
    " größer",
    " 東京",
    ",",
    ",",
    ".",
    ";",
    " two",
    " three",
];

/// A small generator of numbers (splitmix64): the same seed gives the same numbers for ever.
#[derive(Clone)]
pub(crate) struct Numbers(u64);

impl Numbers {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

/// Tokens of an answer, one word or sign each.
pub(crate) fn answer(seed: u64, tokens: usize) -> Vec<&'static str> {
    let mut numbers = Numbers::new(seed);
    (0..tokens)
        .map(|at| {
            let word = WORDS.get((numbers.next() % WORDS.len() as u64) as usize).copied().unwrap_or(" the");
            if at == 0 { word.trim_start_matches([' ', ',', '.', ';']) } else { word }
        })
        .map(|word| if word.is_empty() { "Well" } else { word })
        .collect()
}

/// How many tokens a beginning of an answer has; `None` if the answer does not begin so, or not with whole tokens.
pub(crate) fn tokens_in(seed: u64, begun: &str) -> Option<usize> {
    let mut left = begun;
    // No token is shorter than a byte.
    let all = answer(seed, begun.len());
    let count = all.iter().take_while(|token| left.strip_prefix(**token).map(|rest| left = rest).is_some()).count();
    left.is_empty().then_some(count)
}

/// Ends the answer before the first of the stop texts; true if there was one.
pub(crate) fn stop_at(tokens: &mut Vec<&'static str>, stops: &[String]) -> bool {
    let text = tokens.concat();
    let Some(end) = stops.iter().filter(|stop| !stop.is_empty()).filter_map(|stop| text.find(stop.as_str())).min()
    else {
        return false;
    };
    let mut left = end;
    tokens.retain_mut(|token| {
        let keep = left.min(token.len());
        left -= keep;
        *token = token.get(..keep).unwrap_or(token);
        keep > 0
    });
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_gives_the_same_answer_and_a_longer_one_starts_with_the_shorter() {
        assert_eq!(answer(7, 50), answer(7, 50));
        assert_eq!(answer(7, 50)[..20], answer(7, 20));
        assert_ne!(answer(7, 50), answer(8, 50));
        assert!(answer(7, 200).iter().all(|token| !token.is_empty()));
    }

    #[test]
    fn the_beginning_of_an_answer_is_known_again() {
        assert_eq!(tokens_in(7, &answer(7, 20).concat()), Some(20));
        assert_eq!(tokens_in(7, ""), Some(0));
        assert_eq!(tokens_in(7, "something else"), None);
    }

    #[test]
    fn an_answer_ends_before_the_stop_text() {
        let mut tokens = vec!["one", " two", " three", " four"];
        assert!(stop_at(&mut tokens, &["hree".to_owned(), "four".to_owned()]));
        assert_eq!(tokens, ["one", " two", " t"]);
        assert!(!stop_at(&mut tokens, &["zzz".to_owned(), String::new()]));
    }
}
