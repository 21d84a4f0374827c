//! What one event or one answer says, whatever the dialect.

use serde::de::IgnoredAny;
use smallvec::SmallVec;

/// What was read in one event or in one whole answer.
#[derive(Debug, Default)]
pub struct Reading<'a> {
    /// It holds output: text, reasoning, a tool call, a refusal. A role, a ping or an empty delta is none.
    pub token: bool,
    /// It shows that a run has begun that must not be begun again elsewhere, though there is no output yet (Dify).
    pub progress: bool,
    /// The output as raw JSON values (strings with their quotes, or whole structures), for our own count.
    pub texts: SmallVec<[&'a str; 2]>,
    /// Usage that it states.
    pub found: Option<Found>,
    /// A failure that it states.
    pub error: Option<StreamError>,
    /// It is the last event that the dialect knows.
    pub done: bool,
    /// How many answers the model ended here, saying why it stopped: they are complete even if no last event follows.
    pub finished: u32,
    /// It is not what the dialect allows: not JSON, or not an object.
    pub malformed: bool,
    /// It is not even JSON, so nobody can read it.
    pub garbled: bool,
    /// It carries usage and nothing else.
    pub only_usage: bool,
    /// The raw value of its `usage` member, where one can be cut out.
    pub usage_member: Option<&'a str>,
    /// The raw value of the member that names the model.
    pub model: Option<&'a str>,
}

impl Reading<'_> {
    /// The reading of an event that could not be read.
    pub fn malformed(data: &str) -> Self {
        let garbled = serde_json::from_str::<IgnoredAny>(data).is_err();
        Self { malformed: true, garbled, ..Self::default() }
    }
}

/// Figures as an upstream states them; what it does not state is `None`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    /// Prompt tokens, cached ones included.
    pub input: Option<u64>,
    /// Prompt tokens from the upstream's cache.
    pub cached: Option<u64>,
    /// Output tokens.
    pub output: Option<u64>,
    /// Both together.
    pub total: Option<u64>,
}

impl Counts {
    /// Takes over what the newer figures state.
    pub fn update(&mut self, newer: Self) {
        self.input = newer.input.or(self.input);
        self.cached = newer.cached.or(self.cached);
        self.output = newer.output.or(self.output);
        self.total = newer.total.or(self.total);
    }

    /// Whether it states nothing, or only zeros.
    pub fn is_zero(&self) -> bool {
        [self.input, self.output, self.total].into_iter().flatten().all(|figure| figure == 0)
    }
}

/// Usage, and what its figures cover.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// The call up to here; a later statement replaces it.
    Whole(Counts),
    /// The beginning only: more output follows.
    Begun(Counts),
    /// One step of a run; steps add up.
    Step(Counts),
    /// A run, as one sum.
    Total(u64),
    /// A run that succeeded without a model: its zeros are true, whatever text it gave.
    Free,
}

/// A failure that an upstream states inside an answer of status 200.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct StreamError {
    /// The status that it would have had, if it says so.
    pub status: Option<u16>,
    /// Its code or type word.
    pub code: Option<Box<str>>,
    /// Its message: for the log, never for the client of another upstream.
    pub message: Box<str>,
}

impl StreamError {
    /// The longest message that is kept, in bytes.
    const MAX_MESSAGE: usize = 1024;

    /// A failure; the message is cut to what a log line can bear.
    pub fn new(status: Option<u64>, code: Option<String>, message: Option<String>) -> Self {
        let mut message = message.unwrap_or_default();
        if message.len() > Self::MAX_MESSAGE {
            let cut = (0..=Self::MAX_MESSAGE).rev().find(|at| message.is_char_boundary(*at)).unwrap_or(0);
            message.truncate(cut);
        }
        let status = status.and_then(|status| u16::try_from(status).ok()).filter(|status| (400..600).contains(status));
        Self { status, code: code.map(Into::into), message: message.into() }
    }
}
