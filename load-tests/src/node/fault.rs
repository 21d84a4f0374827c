//! Faults a simulator shows on request, and the words that ask for them.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use http::header::{HeaderName, HeaderValue};

/// A fault, as a header `x-sim-fault`, a suffix of the model's name (`sim+429`) or [`super::Node::set_fault`] asks for it.
/// Several are written with commas between: `slow_header:50,cut:3`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// `refuse`: the connection is closed without an answer.
    Refuse,
    /// `429`, `429:retry-after=2`, any status from 400 to 599: an error answer, with Retry-After in seconds where asked.
    Status(u16, Option<u32>),
    /// `context_length`: 400 with the code `context_length_exceeded`.
    ContextLength,
    /// `content_filter`: 400 with the code `content_filter`.
    ContentFilter,
    /// `header:NAME=VALUE`: a header of the error answer that another fault asks for.
    Header(HeaderName, HeaderValue),
    /// `slow_header:MS`: the header comes so much later.
    SlowHeader(Duration),
    /// `slow_token:MS`: header and role chunk come at once, the first token so much later.
    SlowToken(Duration),
    /// `slow_usage:MS`: a stream pauses so long between its last token and its usage.
    SlowUsage(Duration),
    /// `cut:N`: the connection is closed after N content chunks; the body is not terminated. A plain answer is cut in its half.
    Cut(usize),
    /// `stall:N`: silence after N content chunks. A plain answer never comes.
    Stall(usize),
    /// `error_after:N`: an error event after N content chunks, and the end.
    ErrorAfter(usize),
    /// `garbage:N`: an event that is no JSON behind N content chunks; the stream goes on.
    Garbage(usize),
    /// `no_done`: a stream ends without `[DONE]`.
    NoDone,
    /// `open_end`: after its usage a stream is silent: no `[DONE]`, no end.
    OpenEnd,
    /// `no_continue`: `continue_final_message` is refused with 400.
    NoContinue,
    /// `no_usage`: the answer says nothing about usage, whatever was asked.
    NoUsage,
    /// `usage_zero`: usage is there, and all zero.
    UsageZero,
    /// `malformed`: the first event is broken JSON; a plain answer is.
    Malformed,
    /// `error_event`: status 200, and the first event is an error.
    ErrorEvent,
    /// `error_body`: status 200 with an error as a plain JSON body.
    ErrorBody,
    /// `empty`: a stream ends after its role chunk; a plain answer has no text.
    Empty,
    /// `crlf`: lines of the stream end in CR LF.
    Crlf,
    /// `comments`: a comment line between events.
    Comments,
    /// Several at once.
    All(Vec<Fault>),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refuse => f.write_str("refuse"),
            Self::Status(status, None) => write!(f, "{status}"),
            Self::Status(status, Some(after)) => write!(f, "{status}:retry-after={after}"),
            Self::ContextLength => f.write_str("context_length"),
            Self::ContentFilter => f.write_str("content_filter"),
            Self::Header(name, value) => write!(f, "header:{name}={}", value.to_str().unwrap_or_default()),
            Self::SlowHeader(by) => write!(f, "slow_header:{}", by.as_millis()),
            Self::SlowToken(by) => write!(f, "slow_token:{}", by.as_millis()),
            Self::SlowUsage(by) => write!(f, "slow_usage:{}", by.as_millis()),
            Self::Cut(after) => write!(f, "cut:{after}"),
            Self::Stall(after) => write!(f, "stall:{after}"),
            Self::ErrorAfter(after) => write!(f, "error_after:{after}"),
            Self::Garbage(after) => write!(f, "garbage:{after}"),
            Self::NoDone => f.write_str("no_done"),
            Self::OpenEnd => f.write_str("open_end"),
            Self::NoContinue => f.write_str("no_continue"),
            Self::NoUsage => f.write_str("no_usage"),
            Self::UsageZero => f.write_str("usage_zero"),
            Self::Malformed => f.write_str("malformed"),
            Self::ErrorEvent => f.write_str("error_event"),
            Self::ErrorBody => f.write_str("error_body"),
            Self::Empty => f.write_str("empty"),
            Self::Crlf => f.write_str("crlf"),
            Self::Comments => f.write_str("comments"),
            Self::All(faults) => {
                for (at, fault) in faults.iter().enumerate() {
                    write!(f, "{}{fault}", if at > 0 { "," } else { "" })?;
                }
                Ok(())
            }
        }
    }
}

/// A word that is no fault.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnknownFault(String);

impl fmt::Display for UnknownFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "no such fault: `{}` (known: refuse, 400..599[:retry-after=SECONDS], context_length, content_filter, \
             header:NAME=VALUE, slow_header:MS, \
             slow_token:MS, slow_usage:MS, cut:N, stall:N, error_after:N, garbage:N, no_done, \
             open_end, no_continue, no_usage, usage_zero, malformed, error_event, error_body, empty, crlf, comments)",
            self.0
        )
    }
}

impl std::error::Error for UnknownFault {}

impl FromStr for Fault {
    type Err = UnknownFault;

    fn from_str(text: &str) -> Result<Self, UnknownFault> {
        if text.contains(',') {
            return text.split(',').map(|word| word.trim().parse()).collect::<Result<_, _>>().map(Self::All);
        }
        one(text.trim()).ok_or_else(|| UnknownFault(text.to_owned()))
    }
}

fn one(text: &str) -> Option<Fault> {
    let (word, value) = match text.split_once(':') {
        Some((word, value)) => (word, Some(value)),
        None => (text, None),
    };
    let number = || value?.parse::<usize>().ok();
    let pause = || Some(Duration::from_millis(value?.parse().ok()?));
    if let Ok(status) = word.parse::<u16>() {
        let after = match value {
            Some(value) => Some(value.strip_prefix("retry-after=")?.parse().ok()?),
            None => None,
        };
        return (400..600).contains(&status).then_some(Fault::Status(status, after));
    }
    match word {
        "header" => {
            let (name, value) = value?.split_once('=')?;
            return Some(Fault::Header(name.parse().ok()?, value.parse().ok()?));
        }
        "slow_header" => return Some(Fault::SlowHeader(pause()?)),
        "slow_token" => return Some(Fault::SlowToken(pause()?)),
        "slow_usage" => return Some(Fault::SlowUsage(pause()?)),
        "cut" => return Some(Fault::Cut(number()?)),
        "stall" => return Some(Fault::Stall(number()?)),
        "error_after" => return Some(Fault::ErrorAfter(number()?)),
        "garbage" => return Some(Fault::Garbage(number()?)),
        _ => {}
    }
    let fault = match word {
        "refuse" => Fault::Refuse,
        "context_length" => Fault::ContextLength,
        "no_done" => Fault::NoDone,
        "open_end" => Fault::OpenEnd,
        "no_continue" => Fault::NoContinue,
        "content_filter" => Fault::ContentFilter,
        "no_usage" => Fault::NoUsage,
        "usage_zero" => Fault::UsageZero,
        "malformed" => Fault::Malformed,
        "error_event" => Fault::ErrorEvent,
        "error_body" => Fault::ErrorBody,
        "empty" => Fault::Empty,
        "crlf" => Fault::Crlf,
        "comments" => Fault::Comments,
        _ => return None,
    };
    value.is_none().then_some(fault)
}

/// The faults of one request, sorted by where they act.
#[derive(Clone, Debug, Default)]
pub(crate) struct Plan {
    pub(crate) refuse: bool,
    pub(crate) status: Option<(u16, Option<u32>)>,
    pub(crate) context_length: bool,
    pub(crate) content_filter: bool,
    pub(crate) headers: Vec<(HeaderName, HeaderValue)>,
    pub(crate) slow_header: Option<Duration>,
    pub(crate) slow_token: Option<Duration>,
    pub(crate) slow_usage: Option<Duration>,
    pub(crate) cut: Option<usize>,
    pub(crate) stall: Option<usize>,
    pub(crate) error_after: Option<usize>,
    pub(crate) garbage: Option<usize>,
    pub(crate) no_done: bool,
    pub(crate) open_end: bool,
    pub(crate) no_continue: bool,
    pub(crate) no_usage: bool,
    pub(crate) usage_zero: bool,
    pub(crate) malformed: bool,
    pub(crate) error_event: bool,
    pub(crate) error_body: bool,
    pub(crate) empty: bool,
    pub(crate) crlf: bool,
    pub(crate) comments: bool,
}

impl Plan {
    pub(crate) fn add(&mut self, fault: &Fault) {
        match fault {
            Fault::Refuse => self.refuse = true,
            Fault::Status(status, after) => self.status = Some((*status, *after)),
            Fault::ContextLength => self.context_length = true,
            Fault::ContentFilter => self.content_filter = true,
            Fault::Header(name, value) => self.headers.push((name.clone(), value.clone())),
            Fault::SlowHeader(by) => self.slow_header = Some(*by),
            Fault::SlowToken(by) => self.slow_token = Some(*by),
            Fault::SlowUsage(by) => self.slow_usage = Some(*by),
            Fault::Cut(after) => self.cut = Some(*after),
            Fault::Stall(after) => self.stall = Some(*after),
            Fault::ErrorAfter(after) => self.error_after = Some(*after),
            Fault::Garbage(after) => self.garbage = Some(*after),
            Fault::NoDone => self.no_done = true,
            Fault::OpenEnd => self.open_end = true,
            Fault::NoContinue => self.no_continue = true,
            Fault::NoUsage => self.no_usage = true,
            Fault::UsageZero => self.usage_zero = true,
            Fault::Malformed => self.malformed = true,
            Fault::ErrorEvent => self.error_event = true,
            Fault::ErrorBody => self.error_body = true,
            Fault::Empty => self.empty = true,
            Fault::Crlf => self.crlf = true,
            Fault::Comments => self.comments = true,
            Fault::All(faults) => faults.iter().for_each(|fault| self.add(fault)),
        }
    }

    /// An SSE event with a data line, in the line ends of the plan.
    pub(crate) fn event(&self, data: &[u8]) -> Vec<u8> {
        let end: &[u8] = if self.crlf { b"\r\n" } else { b"\n" };
        let mut event = Vec::with_capacity(data.len() + 24);
        if self.comments {
            event.extend_from_slice(b": ping");
            event.extend_from_slice(end);
            event.extend_from_slice(end);
        }
        event.extend_from_slice(b"data: ");
        event.extend_from_slice(data);
        event.extend_from_slice(end);
        event.extend_from_slice(end);
        event
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_fault_is_read_as_it_is_written() {
        for text in [
            "refuse",
            "429",
            "429:retry-after=2",
            "500",
            "503",
            "400",
            "context_length",
            "content_filter",
            "429,header:retry-after-ms=250",
            "slow_header:250",
            "slow_token:100",
            "slow_usage:100",
            "cut:3",
            "stall:0",
            "error_after:3",
            "garbage:2",
            "no_done",
            "open_end",
            "no_continue",
            "no_usage",
            "usage_zero",
            "malformed",
            "error_event",
            "error_body",
            "empty",
            "crlf",
            "comments",
            "crlf,comments,cut:2",
        ] {
            assert_eq!(text.parse::<Fault>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn words_that_are_no_fault_are_named_in_the_error() {
        for text in ["", "cut", "cut:x", "200", "429:2", "header:x", "crlf:1", "nonsense", "crlf,,cut:1"] {
            let error = text.parse::<Fault>().unwrap_err().to_string();
            assert!(error.contains("no such fault"), "{text}: {error}");
        }
    }

    #[test]
    fn composed_faults_all_take_part() {
        let mut plan = Plan::default();
        plan.add(&"crlf,cut:2".parse().unwrap());
        assert_eq!((plan.crlf, plan.cut), (true, Some(2)));
        assert_eq!(plan.event(b"x"), b"data: x\r\n\r\n");
    }
}
