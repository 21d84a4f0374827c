//! The observer of one answer of one attempt: first token, errors, the end, and what was used.
//!
//! It stands between upstream and client. Of a stream, whole events go on as soon as they are whole, untouched but for what the client is
//! not to see: what is cut in its middle or is no JSON never reaches it. It never holds a plain answer: of that, only the few top-level
//! members that matter are copied out as they pass.

pub mod estimate;
mod events;
pub mod exact;
mod hide;
mod kept;
pub mod learned;
mod members;
pub mod seam;
mod tally;

use bytes::Bytes;
use smallvec::SmallVec;

use self::events::Events;
pub use self::events::OnMalformed;
pub use self::kept::Uncovered;
use self::members::Members;
use self::seam::Seam;
use self::tally::Tally;
use crate::dialect::sse::TooLong;
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

/// Why a stream must not go on to the client, though its upstream may send more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// The upstream stated a failure of its own, which is not shown.
    Failed,
    /// The upstream refused the client's request, and the client has been shown that.
    Refused,
    /// An event was no JSON, and that is to end the stream.
    Garbled,
    /// The answer that was to go on with another one does not fit to it.
    Apart,
}

impl Stop {
    /// For the log.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Failed => "an error event",
            Self::Refused => "a refusal as an event",
            Self::Garbled => "an event that is no JSON",
            Self::Apart => "the answer differs from the one that broke off",
        }
    }
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
    /// Events that were no JSON and are left out.
    pub garbled: u32,
    /// The stream must not go on.
    pub stop: Option<Stop>,
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
    /// How many answers there must be before it is complete without a last event; 0 if nobody knows.
    answers: u32,
}

#[derive(Debug)]
enum Body {
    /// Events.
    Stream(Events),
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
            Dialect::Openai | Dialect::Anthropic | Dialect::Dify => Body::Stream(Events::new(view)),
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
        Self { dialect, kind, body, tally, token: false, done: false, answers: 1 }
    }

    /// For a call of so many answers, 0 if that is not known. One is taken for granted.
    #[must_use]
    pub const fn answers(mut self, count: u32) -> Self {
        self.answers = count;
        self
    }

    /// What becomes of events that are no JSON.
    #[must_use]
    pub fn on_malformed(mut self, choice: OnMalformed) -> Self {
        if let Body::Stream(events) = &mut self.body {
            events.on_malformed = choice;
        }
        self
    }

    /// The client is to read this as the model's name.
    #[must_use]
    pub fn reporting(mut self, name: &str) -> Self {
        let name = Bytes::from(serde_json::Value::from(name).to_string());
        match &mut self.body {
            Body::Stream(events) => events.name = Some(name),
            Body::Plain(members) => members.rename(name),
            Body::Opaque => {}
        }
        self
    }

    /// With a memory of what the client got, or joined to what it got already.
    #[must_use]
    pub fn joined(mut self, seam: Seam) -> Self {
        if let Body::Stream(events) = &mut self.body {
            events.seam = Some(Box::new(seam));
        }
        self
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
            Body::Stream(events) => events.feed(chunk, (self.dialect, self.kind), &mut self.tally, &mut seen)?,
            Body::Plain(members) => {
                seen.forward.push(members.feed(chunk));
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
            Body::Stream(events) => events.finish((self.dialect, self.kind), &mut self.tally, &mut seen),
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
        match self.seam() {
            Some(seam) => seam.usage(&self.tally, prompt_estimate),
            None => self.tally.usage(prompt_estimate),
        }
    }

    fn seam(&self) -> Option<&Seam> {
        match &self.body {
            Body::Stream(events) => events.seam.as_deref(),
            Body::Plain(_) | Body::Opaque => None,
        }
    }

    /// What another node has to go on from, if this answer is one of those that can be gone on with.
    pub fn break_off(&self, prompt_estimate: u64) -> Option<Seam> {
        let seam = self.seam().filter(|seam| seam.is_whole())?;
        Some(seam.broken_off(&self.tally, prompt_estimate))
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
        self.tally.states_input() || self.seam().is_some_and(Seam::states_input)
    }

    /// Tokens of what [`uncovered`](Self::uncovered) gave.
    pub fn recount(&mut self, tokens: u64) {
        self.tally.recount(tokens);
    }

    /// The estimate of all output, whatever the upstream states.
    pub fn estimated_output(&self) -> u64 {
        self.tally.estimated() + self.seam().map_or(0, Seam::estimated)
    }

    /// Output tokens so far: as stated by the upstream, or by our own count of the text.
    pub fn output_tokens_so_far(&self) -> u64 {
        self.seam().map_or_else(|| self.tally.output(), |seam| seam.usage(&self.tally, 0).output)
    }

    /// Whether the answer came to its proper end: its last event, or a reason for the end of each answer.
    pub fn done(&self) -> bool {
        self.done || (self.answers > 0 && self.tally.finished >= self.answers)
    }

    /// Whether nothing but the last event is missing: all answers have ended, and the usage was stated after that.
    pub fn is_stated(&self) -> bool {
        self.done() && self.tally.is_covered()
    }

    /// The last event of a stream whose upstream came to the end of its answer without sending one.
    pub fn last_event(&self) -> Option<Bytes> {
        let Body::Stream(_) = &self.body else { return None };
        if self.done || self.tally.finished == 0 {
            return None;
        }
        match (self.dialect, self.kind) {
            (Dialect::Openai, CallKind::Chat | CallKind::Completion) => Some(Bytes::from_static(b"data: [DONE]\n\n")),
            (Dialect::Anthropic, CallKind::Messages) => {
                Some(Bytes::from_static(b"event: message_stop\ndata: {\"type\":\"message_stop\"}\n\n"))
            }
            _ => None,
        }
    }

    /// The body has ended cleanly; where nobody knows how many answers there should be, one that has ended will do.
    pub fn ended_well(&self) -> bool {
        self.done() || (self.answers == 0 && self.tally.finished > 0)
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

#[cfg(test)]
mod tests;
