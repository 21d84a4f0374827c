//! What is wrong with a configuration, and how it is shown: place, snippet, hint.

use std::fmt;

use serde::Serialize;

/// Whether a problem keeps the configuration from being used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Severity {
    /// The configuration is refused.
    Error,
    /// It works, but should be looked at.
    Warning,
}

/// One thing wrong with a configuration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Problem {
    /// Error or warning.
    pub severity: Severity,
    /// The file as it was named.
    pub file: String,
    /// Line from 1; 0 where the problem has no place in the file.
    pub line: u32,
    /// Column from 1, in characters; 0 where the problem has no place in the file.
    pub column: u32,
    /// The place in the document, like `routes[2].pass.upstream`.
    pub path: String,
    /// What is wrong.
    pub message: String,
    /// What would be right, if that can be said.
    pub hint: Option<String>,
    /// The line of the file and a caret below the place; secrets in it are masked.
    pub snippet: Option<String>,
}

impl Problem {
    /// An error of a whole file, without a place in it.
    pub(crate) fn of_file(file: &str, message: impl Into<String>) -> Self {
        Self {
            severity: Severity::Error,
            file: file.to_owned(),
            line: 0,
            column: 0,
            path: String::new(),
            message: message.into(),
            hint: None,
            snippet: None,
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = match self.severity {
            Severity::Error => "error",
            Severity::Warning => "warning",
        };
        write!(f, "{}", self.file)?;
        if self.line > 0 {
            write!(f, ":{}:{}", self.line, self.column)?;
        }
        writeln!(f, ": {word}: {}", self.message)?;
        if let Some(snippet) = &self.snippet {
            writeln!(f, "{snippet}")?;
        }
        if let Some(hint) = &self.hint {
            writeln!(f, "  hint: {hint}")?;
        }
        Ok(())
    }
}

/// Everything wrong with a configuration, errors and warnings, in the order of the text.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Problems(pub Vec<Problem>);

impl Problems {
    /// The errors among them.
    pub(crate) fn errors(&self) -> impl Iterator<Item = &Problem> {
        self.0.iter().filter(|problem| problem.severity == Severity::Error)
    }

    /// The warnings among them.
    pub(crate) fn warnings(&self) -> impl Iterator<Item = &Problem> {
        self.0.iter().filter(|problem| problem.severity == Severity::Warning)
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for problem in &self.0 {
            writeln!(f, "{problem}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Problems {}

/// The known word closest to `word`, if one is close enough to be meant.
pub(crate) fn closest<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let distance = |name: &str| strsim::damerau_levenshtein(&word.to_lowercase(), &name.to_lowercase());
    let (distance, name) =
        known.into_iter().map(|name| (distance(name), name)).min_by_key(|(distance, _)| *distance)?;
    let longest = word.chars().count().max(name.chars().count());
    (distance * 5 <= longest * 2).then_some(name)
}

/// "did you mean" with the closest of the known words, else the list of them.
pub(crate) fn suggest<'a>(word: &str, known: impl IntoIterator<Item = &'a str> + Clone) -> Option<String> {
    if let Some(name) = closest(word, known.clone()) {
        return Some(format!("did you mean `{name}`?"));
    }
    let known: Vec<String> = known.into_iter().map(|name| format!("`{name}`")).collect();
    match known.len() {
        0 => None,
        1..=20 => Some(format!("known here: {}", known.join(", "))),
        more => Some(format!("known here: {}, and {} more", known.get(..20).unwrap_or_default().join(", "), more - 20)),
    }
}

/// A line of a file with its number, and a caret below the place. Long lines are cut around it.
pub(crate) fn snippet(line: &str, number: u32, column: u32, width: u32) -> String {
    const MOST: usize = 110;
    let chars: Vec<char> = line.chars().map(|c| if c == '\t' || c.is_control() { ' ' } else { c }).collect();
    let column = (column.saturating_sub(1) as usize).min(chars.len());
    let start = if chars.len() > MOST { column.saturating_sub(MOST / 2).min(chars.len() - MOST) } else { 0 };
    let shown: String = chars.iter().skip(start).take(MOST).collect();
    let before = column - start;
    let left = shown.chars().count().saturating_sub(before).max(1);
    let carets = "^".repeat((width.max(1) as usize).min(left));
    let gutter = number.to_string();
    let blank = " ".repeat(gutter.len());
    format!("  {gutter} | {}\n  {blank} | {}{carets}", shown.trim_end(), " ".repeat(before))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_caret_stands_below_the_place_also_in_long_lines() {
        assert_eq!(snippet("a: bad", 7, 4, 3), "  7 | a: bad\n    |    ^^^");
        let long = format!("{}BAD{}", "x".repeat(300), "y".repeat(300));
        let shown = snippet(&long, 1, 301, 3);
        let (line, caret) = shown.split_once('\n').unwrap();
        assert_eq!(line.find("BAD"), caret.find("^^^"));
        assert!(line.len() < 130);
    }

    #[test]
    fn a_caret_beyond_the_end_of_the_line_does_no_harm() {
        assert_eq!(snippet("", 1, 9, 4), "  1 | \n    | ^");
    }

    #[test]
    fn only_a_close_word_is_suggested() {
        assert_eq!(closest("first_tokn", ["first_token", "total"]), Some("first_token"));
        assert_eq!(closest("xyz", ["first_token", "total"]), None);
        assert_eq!(suggest("xyz", ["a", "b"]).unwrap(), "known here: `a`, `b`");
        assert_eq!(suggest("xyz", []), None);
    }
}
