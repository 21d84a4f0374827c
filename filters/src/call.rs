//! What a client asked: the few fields of a JSON body that the gateway needs, read in one pass without a tree, and the body rewritten
//! where it must be and nowhere else.

mod fields;
mod prompt;
mod resume;
mod rewrite;

use bytes::Bytes;

pub use crate::dialect::{CallKind, Dialect};
use crate::error::Result;
use crate::meter::UsageView;
pub use crate::meter::estimate::PromptSize;
use crate::meter::seam::Way;

/// A place in the body: offsets of its first byte and of the one behind its last.
type Span = (usize, usize);

/// One call as its body states it.
#[derive(Debug, Clone)]
pub struct Call {
    /// What kind of call it is.
    pub kind: CallKind,
    /// The dialect that the body is in.
    pub dialect: Dialect,
    /// The model asked for, if the body names one.
    pub model: Option<Box<str>>,
    /// Whether the answer is to be a stream.
    pub stream: bool,
    /// `stream_options.include_usage` as the client wrote it.
    pub include_usage: Option<bool>,
    /// `stream_options.continuous_usage_stats` as the client wrote it, a word of vLLM.
    pub continuous_usage: Option<bool>,
    /// How many answers are asked for (`n`, or `best_of` if larger).
    pub n: u32,
    /// Whether there may be more prompts than one, each with answers of its own.
    pub batch: bool,
    /// The most output tokens of one answer, if the client limits them.
    pub max_tokens: Option<u64>,
    /// Whom the client says it asks for.
    pub user: Option<Box<str>>,
    /// The prompt's size, for the estimate.
    pub prompt: PromptSize,
    /// A hash of how the prompt begins (tools, system, first user message): equal for the turns of one conversation.
    pub anchor: u64,
    /// Length of the body in bytes.
    pub body_len: usize,
    spans: Spans,
}

/// Where the fields that may be rewritten stand.
#[derive(Debug, Clone, Copy, Default)]
struct Spans {
    /// The value of `model`, with its quotes.
    model: Option<Span>,
    stream_options: StreamOptions,
    /// The brace that ends the body.
    end: usize,
}

#[derive(Debug, Clone, Copy, Default)]
enum StreamOptions {
    /// There are none.
    #[default]
    Absent,
    /// They are null.
    Null(Span),
    /// An object.
    Object {
        /// Where to insert.
        inside: usize,
        /// Whether there is nothing in it, so that no comma must follow.
        empty: bool,
        /// The value of `include_usage`.
        include: Option<Span>,
        /// The value of `continuous_usage_stats`.
        continuous: Option<Span>,
    },
}

/// What an upstream is asked to tell of the usage of a stream, beyond what the client asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AskUsage {
    /// Nothing.
    Nothing,
    /// The usage, in the last event.
    AtEnd,
    /// The usage so far in every event, so that a stream that is cut has true figures too. vLLM does that.
    Always,
}

impl Call {
    /// Reads a body.
    ///
    /// # Errors
    /// `invalid_json` with the byte offset, `duplicate_field`, or `invalid_request`, with the field at fault.
    pub fn parse(kind: CallKind, dialect: Dialect, body: &[u8]) -> Result<Self> {
        fields::parse(kind, dialect, body)
    }

    /// The body with another model name and, for a stream, with its usage asked for. Every other byte stays; if nothing changes it is
    /// the same body, not a copy. `body` must be the one that was parsed.
    pub fn rewrite(&self, body: &Bytes, model: Option<&str>, ask: AskUsage) -> Bytes {
        rewrite::rewrite(self, body, model, ask)
    }

    /// How many answers there will be, 0 if that is not known.
    pub const fn answers(&self) -> u32 {
        if self.batch { 0 } else { self.n }
    }

    /// Whether another node may finish a stream of it that broke off: one answer, of a kind that is understood.
    pub const fn may_resume(&self, way: Way) -> bool {
        let kind = match way {
            Way::Continue => matches!(self.kind, CallKind::Chat | CallKind::Messages),
            Way::Replay => matches!(self.kind, CallKind::Chat | CallKind::Messages | CallKind::Completion),
        };
        self.stream && kind && self.n == 1 && !self.batch
    }

    /// The body that makes another node go on from `text`, of `produced` tokens; `None` if this call binds the form of its whole answer.
    /// `body` must be the one that was parsed, or a rewritten form of it.
    pub fn go_on(&self, body: &[u8], text: &str, produced: u64) -> Option<Bytes> {
        resume::go_on(self, body, text, produced)
    }

    /// Tokens of the prompt, by estimate.
    pub fn prompt_tokens(&self) -> u64 {
        self.prompt.tokens()
    }

    /// The prompt's text as far as it counts, pieces with a zero byte between them. `body` must be the one that was parsed.
    pub fn prompt_text(&self, body: &[u8]) -> Vec<u8> {
        fields::text(body)
    }

    /// Whether this is a stream whose usage can be asked for.
    fn may_ask(&self) -> bool {
        self.stream && self.kind.takes_stream_options()
    }

    /// Whether [`rewrite`](Self::rewrite) makes the upstream state usage that the client did not ask for.
    pub fn hides_usage(&self) -> bool {
        self.may_ask() && self.include_usage != Some(true)
    }

    /// What the client must see of the usage of an answer to [`rewrite`](Self::rewrite) with the same `ask`: what it asked for.
    pub fn usage_view(&self, ask: AskUsage) -> UsageView {
        match ask {
            AskUsage::Nothing => UsageView::All,
            AskUsage::AtEnd | AskUsage::Always if self.hides_usage() => UsageView::Nothing,
            AskUsage::Always if self.may_ask() && self.continuous_usage != Some(true) => UsageView::AtEnd,
            AskUsage::AtEnd | AskUsage::Always => UsageView::All,
        }
    }
}

#[cfg(test)]
mod tests;
