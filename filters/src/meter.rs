//! The observer of one answer of one attempt: first token, errors, the end, and what was used.
//!
//! It stands between upstream and client. Chunks go in, and come out at once and untouched, unless usage that we asked for has to be
//! hidden from a client that did not: then whole events come out, less the usage. It never holds a plain answer: of that, only the few
//! top-level members that matter are copied out as they pass.

pub mod estimate;
pub mod exact;
mod hide;
mod kept;
pub mod learned;
mod members;
mod tally;

use bytes::Bytes;
use smallvec::SmallVec;

pub use self::kept::Uncovered;
use self::members::Members;
use self::tally::Tally;
use crate::dialect::sse::{Event, Splitter, TooLong};
use crate::dialect::{CallKind, Dialect, Reading, StreamError, anthropic, dify, openai};
use crate::usage::{Usage, UsageSource};

/// Why an answer cannot be read any further.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum MeterError {
    /// A line or an event of a stream is longer than any honest one.
    #[error(transparent)]
    TooLong(#[from] TooLong),
}

/// What a client sees of the usage that its stream states.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum UsageView {
    /// Everything: it is the client's own wish, or nobody's.
    #[default]
    All,
    /// Only the statement at the end. Chunks before it have `"usage":null`, as the API promises who asks for usage.
    AtEnd,
    /// Nothing: it was asked for by us alone.
    Nothing,
}

/// What a chunk held, and what is to be sent on.
#[derive(Debug, Default)]
pub struct Seen {
    /// What the client gets, in order; maybe nothing.
    pub forward: SmallVec<[Bytes; 2]>,
    /// There was output: a token, or the body of a plain answer.
    pub token: bool,
    /// A run has begun that must not be begun again elsewhere, though without output yet (Dify).
    pub progress: bool,
    /// The first failure that the upstream stated inside its answer.
    pub error: Option<StreamError>,
    /// The answer's last event has come, or its body was whole.
    pub done: bool,
    /// The answer begins with something that its dialect does not know.
    pub malformed: bool,
}

/// Watches one answer. Feed it every chunk, then [`finish`](Self::finish); [`usage`](Self::usage) can be asked at any time.
#[derive(Debug)]
pub struct Meter {
    dialect: Dialect,
    kind: CallKind,
    body: Body,
    tally: Tally,
    token: bool,
    done: bool,
}

#[derive(Debug)]
enum Body {
    /// Events; `view` says what usage stays, `first` is over after the first event with data.
    Stream { splitter: Splitter, view: UsageView, first: bool },
    /// One JSON object.
    Plain(Members),
    /// Bytes of which nothing is known.
    Opaque,
}

impl Meter {
    /// For an answer that is an event stream. `view`: what the client is to see of the usage that was asked for.
    pub fn stream(dialect: Dialect, kind: CallKind, view: UsageView) -> Self {
        let view = if dialect == Dialect::Openai && kind.takes_stream_options() { view } else { UsageView::All };
        let body = match dialect {
            Dialect::Openai | Dialect::Anthropic | Dialect::Dify => {
                Body::Stream { splitter: Splitter::default(), view, first: true }
            }
            Dialect::Gemini | Dialect::None => Body::Opaque,
        };
        Self::new(dialect, kind, body)
    }

    /// For an answer that is one JSON document.
    pub fn plain(dialect: Dialect, kind: CallKind) -> Self {
        let body = match dialect {
            Dialect::Openai => Body::Plain(Members::new(openai::MEMBERS)),
            Dialect::Anthropic => Body::Plain(Members::new(anthropic::MEMBERS)),
            Dialect::Dify => Body::Plain(Members::new(dify::MEMBERS)),
            Dialect::Gemini | Dialect::None => Body::Opaque,
        };
        Self::new(dialect, kind, body)
    }

    fn new(dialect: Dialect, kind: CallKind, body: Body) -> Self {
        let tally = Tally::new(matches!(body, Body::Plain(_)));
        Self { dialect, kind, body, tally, token: false, done: false }
    }

    /// Takes a chunk, says what it held and what is to be sent on.
    ///
    /// # Errors
    /// If the stream holds a line or an event without a sensible end; the answer must then be ended as broken.
    pub fn feed(&mut self, chunk: Bytes) -> Result<Seen, MeterError> {
        let mut seen = Seen::default();
        if chunk.is_empty() {
            return Ok(seen);
        }
        match &mut self.body {
            Body::Stream { splitter, view, first } => {
                let view = *view;
                if view == UsageView::All {
                    seen.forward.push(chunk.clone());
                }
                splitter.push(chunk);
                while let Some(event) = splitter.next()? {
                    let mut reading = Watch { dialect: self.dialect, kind: self.kind, tally: &mut self.tally, first };
                    reading.event(&event, view, &mut seen);
                }
            }
            Body::Plain(members) => {
                members.feed(&chunk);
                seen.forward.push(chunk);
                self.read_members(&mut seen);
                seen.token = self.tally.error.is_none();
            }
            Body::Opaque => {
                seen.forward.push(chunk);
                seen.token = true;
            }
        }
        self.remember(&seen);
        Ok(seen)
    }

    /// The body has ended: what was held back, and what its last part said.
    pub fn finish(&mut self) -> Seen {
        let mut seen = Seen::default();
        match &mut self.body {
            Body::Stream { splitter, view, first } => {
                if let Some(event) = splitter.finish() {
                    let view = *view;
                    let mut reading = Watch { dialect: self.dialect, kind: self.kind, tally: &mut self.tally, first };
                    reading.event(&event, view, &mut seen);
                }
            }
            Body::Plain(members) => {
                seen.done = members.complete();
                seen.malformed = !seen.done && self.kind != CallKind::Other;
                self.read_members(&mut seen);
            }
            Body::Opaque => seen.done = true,
        }
        self.remember(&seen);
        seen
    }

    /// What was used so far. `prompt_estimate` stands in where the upstream does not state the prompt's tokens.
    pub fn usage(&self, prompt_estimate: u64) -> Usage {
        self.tally.usage(prompt_estimate)
    }

    /// The output that the upstream did not account for, to be counted better than [`usage`](Self::usage) does. To be asked once, when all
    /// is over; [`recount`](Self::recount) takes the result.
    pub fn uncovered(&mut self) -> Option<Uncovered> {
        if self.tally.usage(0).source == UsageSource::Upstream {
            return None;
        }
        self.tally.uncovered()
    }

    /// Whether the upstream has stated what the prompt cost.
    pub fn states_input(&self) -> bool {
        self.tally.states_input()
    }

    /// Tokens of what [`uncovered`](Self::uncovered) gave.
    pub fn recount(&mut self, tokens: u64) {
        self.tally.recount(tokens);
    }

    /// The estimate of all output, whatever the upstream states.
    pub fn estimated_output(&self) -> u64 {
        self.tally.estimated()
    }

    /// Output tokens so far: as stated by the upstream, or by our own count of the text.
    pub fn output_tokens_so_far(&self) -> u64 {
        self.tally.output()
    }

    /// Whether the answer came to its proper end: its last event, or a finish reason.
    pub fn done(&self) -> bool {
        self.done || self.tally.finished
    }

    /// Whether any output was seen.
    pub fn tokens_seen(&self) -> bool {
        self.token
    }

    fn remember(&mut self, seen: &Seen) {
        self.token |= seen.token;
        self.done |= seen.done;
    }

    fn read_members(&mut self, seen: &mut Seen) {
        let Body::Plain(members) = &mut self.body else { return };
        let mut taken: SmallVec<[_; 4]> = members.take().into_iter().collect();
        // With the usage at hand the text need not be counted, so the usage is read first.
        taken.sort_by_key(|(name, _)| *name != "usage");
        for (name, raw) in taken {
            if self.tally.is_stated() && name != "error" {
                continue;
            }
            let mut reading = Reading::default();
            match self.dialect {
                Dialect::Openai => openai::read_member(name, &raw, &mut reading),
                Dialect::Anthropic => anthropic::read_member(name, &raw, &mut reading),
                Dialect::Dify => dify::read_member(name, &raw, &mut reading),
                Dialect::Gemini | Dialect::None => {}
            }
            seen.error = seen.error.take().or_else(|| reading.error.clone());
            self.tally.add(&reading);
        }
    }
}

/// What is needed to read one event, borrowed from the meter.
struct Watch<'m> {
    dialect: Dialect,
    kind: CallKind,
    tally: &'m mut Tally,
    first: &'m mut bool,
}

impl Watch<'_> {
    fn event(&mut self, event: &Event, view: UsageView, seen: &mut Seen) {
        let Some(data) = &event.data else {
            if view != UsageView::All {
                seen.forward.push(event.raw.clone());
            }
            return;
        };
        let reading = match std::str::from_utf8(data) {
            Ok(data) => match self.dialect {
                Dialect::Anthropic => anthropic::read_event(event, data),
                Dialect::Dify => dify::read_event(event, data),
                Dialect::Openai | Dialect::Gemini | Dialect::None => openai::read_event(event, data),
            },
            Err(_) => Reading::malformed(),
        };
        let first = std::mem::replace(self.first, false);
        seen.malformed |= first && reading.malformed && self.kind != CallKind::Other;
        seen.token |= reading.token;
        seen.progress |= reading.progress;
        seen.done |= reading.done;
        self.tally.add(&reading);
        match view {
            UsageView::All => {}
            UsageView::AtEnd => hide::forward_null(event, data, &reading, &mut seen.forward),
            UsageView::Nothing => hide::forward(event, data, &reading, &mut seen.forward),
        }
        seen.error = seen.error.take().or(reading.error);
    }
}

#[cfg(test)]
mod tests;
