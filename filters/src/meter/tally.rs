//! What an answer used, added up from what its events say and from our own count of its text.

use super::estimate::TextSize;
use super::kept::{Kept, Uncovered};
use crate::dialect::{Counts, Found, Reading, StreamError};
use crate::usage::{Usage, UsageSource};

#[derive(Debug, Default)]
pub(super) struct Tally {
    /// The text that passed.
    text: TextSize,
    /// The text that passed since the last statement that covered all before it.
    kept: Kept,
    /// What that statement said of the output, and our estimate of the text at that moment.
    base: (u64, u64),
    /// A better count of the text since.
    exact: Option<u64>,
    /// Usage of the call as a whole, as stated last.
    stated: Option<Counts>,
    /// Whether `stated` covers all output up to here.
    covers: bool,
    /// Whether usage was stated in an event of its own, behind the end of the answer.
    after_end: bool,
    /// The answer is one document, whose usage covers all of it wherever it stands.
    document: bool,
    /// Steps of a run, summed.
    steps: Counts,
    /// A run's sum.
    total: Option<u64>,
    /// A run that used no model.
    free: bool,
    /// How many answers have ended with a reason.
    pub(super) finished: u32,
    pub(super) error: Option<StreamError>,
}

impl Tally {
    pub(super) fn new(document: bool) -> Self {
        Self { document, ..Self::default() }
    }

    pub(super) fn add(&mut self, reading: &Reading<'_>) {
        if !reading.texts.is_empty() && !self.document {
            // What comes behind a statement is not in it; the next statement will cover it.
            self.covers = false;
        }
        for raw in &reading.texts {
            self.text.feed_value(raw, |piece| self.kept.push(piece));
        }
        match reading.found {
            Some(Found::Whole(counts)) => {
                self.stated.get_or_insert_default().update(counts);
                self.covers = true;
                self.after_end |= self.finished > 0 && reading.finished == 0;
                if let Some(output) = counts.output.filter(|output| *output > 0) {
                    self.base = (output, self.text.tokens());
                    self.kept.clear();
                }
            }
            Some(Found::Begun(counts)) => self.stated.get_or_insert_default().update(counts),
            Some(Found::Step(counts)) => {
                let sum =
                    |sum: Option<u64>, step: Option<u64>| Some(sum.unwrap_or(0).saturating_add(step.unwrap_or(0)));
                self.steps.input = sum(self.steps.input, counts.input);
                self.steps.output = sum(self.steps.output, counts.output);
            }
            Some(Found::Total(total)) => self.total = Some(total),
            Some(Found::Free) => self.free = true,
            None => {}
        }
        self.finished = self.finished.saturating_add(reading.finished);
        if self.error.is_none() {
            self.error.clone_from(&reading.error);
        }
    }

    /// Whether a document has stated what it used, output included.
    pub(super) fn is_stated(&self) -> bool {
        self.document && self.covers && self.stated.is_some_and(|counts| counts.output.is_some_and(|n| n > 0))
    }

    /// Whether the usage of the call as a whole was stated, and nothing came since.
    pub(super) fn is_covered(&self) -> bool {
        self.covers && self.finished > 0 && self.after_end
    }

    pub(super) fn usage(&self, prompt_estimate: u64) -> Usage {
        if self.free {
            return Usage { source: UsageSource::Upstream, ..Usage::default() };
        }
        let counted = self.counted();
        // All zeros beside a text is what a stopped Dify run states: no statement.
        let honest = |counts: &Counts| !(counts.is_zero() && counted > 0);
        if let Some(counts) = self.stated.filter(honest) {
            return self.by_statement(counts, counted, prompt_estimate);
        }
        if let Some(usage) = self.by_run(counted) {
            return usage;
        }
        let source = if counted > 0 { UsageSource::Counted } else { UsageSource::Estimated };
        Usage { input: prompt_estimate, cached_input: 0, output: counted, source }
    }

    fn by_statement(&self, counts: Counts, counted: u64, prompt_estimate: u64) -> Usage {
        let rest = || Some(counts.total?.saturating_sub(counts.input?));
        let stated = counts.output.or_else(rest);
        // Text that came since the statement is not in it, and an answer with text has no 0 tokens: then our count is the truer.
        let trusted = stated.filter(|output| self.covers && (*output > 0 || counted == 0));
        let output = trusted.unwrap_or_else(|| counted.max(stated.unwrap_or(0)));
        let input = counts.input.or_else(|| Some(counts.total?.saturating_sub(output)));
        // Only a sum was stated, as reranking has it: all of it is known, if not how it splits.
        let whole = trusted.is_some() || (self.covers && counts.total.is_some());
        let source = if whole && input.is_some() { UsageSource::Upstream } else { UsageSource::Counted };
        let input = input.unwrap_or(prompt_estimate);
        Usage { input, cached_input: counts.cached.unwrap_or(0).min(input), output, source }
    }

    /// A run states its sum, and the split with each step. A sum that is larger than its steps covers steps that are not shown; one
    /// that is smaller is that of a run which was stopped.
    fn by_run(&self, counted: u64) -> Option<Usage> {
        let split =
            Usage { input: self.steps.input.unwrap_or(0), output: self.steps.output.unwrap_or(0), ..Usage::default() };
        let total = self.total.unwrap_or(0).max(split.total());
        if total == 0 && (counted > 0 || self.total.is_none()) {
            return None;
        }
        let rest = total - split.total();
        let output = if split.total() > 0 { 0 } else { counted.min(rest) };
        Some(Usage {
            input: split.input + rest - output,
            cached_input: 0,
            output: split.output + output,
            source: if self.total.is_some_and(|stated| stated > 0) {
                UsageSource::Upstream
            } else {
                UsageSource::Counted
            },
        })
    }

    pub(super) fn output(&self) -> u64 {
        let stated = self.stated.and_then(|counts| counts.output).unwrap_or(0);
        if self.covers && stated > 0 {
            return stated;
        }
        stated.max(self.steps.output.unwrap_or(0)).max(self.counted())
    }

    /// Output by our own count: what was stated last, and the text since.
    fn counted(&self) -> u64 {
        self.base.0.saturating_add(self.exact.unwrap_or_else(|| self.since()))
    }

    /// The estimate of the text since the last statement.
    fn since(&self) -> u64 {
        self.text.tokens().saturating_sub(self.base.1)
    }

    /// The estimate of all text, whatever was stated.
    pub(super) fn estimated(&self) -> u64 {
        self.text.tokens()
    }

    pub(super) fn states_input(&self) -> bool {
        self.free || self.total.is_some() || self.stated.is_some_and(|counts| counts.input.is_some_and(|n| n > 0))
    }

    /// Takes out the text that is to be counted better, if there is any.
    pub(super) fn uncovered(&mut self) -> Option<Uncovered> {
        let all = self.since();
        (all > 0 && self.exact.is_none()).then(|| Uncovered::new(std::mem::take(&mut self.kept), all))
    }

    /// A better count of what [`uncovered`](Self::uncovered) gave.
    pub(super) fn recount(&mut self, tokens: u64) {
        self.exact = Some(tokens);
    }
}
