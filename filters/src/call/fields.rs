//! The fields of a body: found in one pass, then judged one by one, so that a malformed body is told from a wrong field.

use std::borrow::Cow;
use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::value::RawValue;
use smallvec::SmallVec;

use super::prompt::Prompt;
use super::{Call, CallKind, Dialect, Spans, StreamOptions};
use crate::dialect::json::span;
use crate::error::{BadRequest, GatewayError, Result};

const MAX_FIELDS: usize = 1024;
const MAX_MODEL: usize = 256;
const MAX_N: u64 = 128;
const MAX_TOKENS: u64 = 10_000_000;
/// A longer field name is not repeated in an error.
const MAX_PARAM: usize = 64;

pub(super) fn parse(kind: CallKind, dialect: Dialect, body: &[u8]) -> Result<Call> {
    let object = object(body)?;
    let mut fields = Fields {
        call: Call {
            kind,
            dialect,
            model: None,
            stream: false,
            include_usage: None,
            continuous_usage: None,
            n: 1,
            batch: false,
            max_tokens: None,
            user: None,
            prompt: Default::default(),
            anchor: 0,
            body_len: body.len(),
            spans: Spans { end: memchr::memrchr(b'}', body).unwrap_or_default(), ..Spans::default() },
        },
        body,
        max_tokens: None,
        max_completion_tokens: None,
        messages: None,
    };
    let mut prompt = Prompt::default();
    for (name, value) in &object.members {
        fields.take(name, value)?;
        let depth = if matches!(value.get().as_bytes().first(), Some(b'{' | b'[')) {
            prompt.take_structure(name, value.get())
        } else {
            prompt.take_scalar(name, value.get());
            Ok(())
        };
        depth.map_err(|_| invalid(name, "the body nests too deep: at most 128 levels are allowed"))?;
    }
    fields.finish(prompt)
}

/// The text of a body's prompt, as far as it counts; of a body that was parsed before.
pub(super) fn text(body: &[u8]) -> Vec<u8> {
    let mut prompt = Prompt::default();
    prompt.text = Some(Vec::new());
    for (name, value) in object(body).iter().flat_map(|object| &object.members) {
        if matches!(value.get().as_bytes().first(), Some(b'{' | b'[')) {
            // It was walked before without an error.
            let _ = prompt.take_structure(name, value.get());
        } else {
            prompt.take_scalar(name, value.get());
        }
    }
    prompt.text.unwrap_or_default()
}

struct Fields<'a> {
    call: Call,
    body: &'a [u8],
    max_tokens: Option<u64>,
    max_completion_tokens: Option<u64>,
    messages: Option<&'a RawValue>,
}

impl<'a> Fields<'a> {
    fn take(&mut self, name: &str, value: &'a RawValue) -> Result<()> {
        let text = value.get();
        let dify = self.call.kind.is_dify();
        match name {
            "model" if !dify => self.model(value)?,
            "stream" if !dify => {
                self.call.stream = match text {
                    "true" => true,
                    "false" => false,
                    _ => return Err(invalid(name, "`stream` must be true or false")),
                }
            }
            "stream_options" if !dify => self.stream_options(value)?,
            "n" if !dify => self.answers(name, text)?,
            "best_of" if self.call.kind == CallKind::Completion => self.answers(name, text)?,
            "max_tokens" if !dify => self.max_tokens = limit(name, text)?,
            "max_completion_tokens" | "max_output_tokens" if !dify => self.max_completion_tokens = limit(name, text)?,
            "prompt" if self.call.kind == CallKind::Completion => self.call.batch = text.starts_with('['),
            "messages" if !dify => self.messages = Some(value),
            "response_mode" if dify => self.call.stream = text == "\"streaming\"",
            // The upstream judges what else `user` may be.
            "user" => self.call.user = serde_json::from_str::<Box<str>>(text).ok(),
            _ => {}
        }
        Ok(())
    }

    fn model(&mut self, value: &'a RawValue) -> Result<()> {
        let model: Option<Box<str>> = serde_json::from_str(value.get()).ok();
        match model {
            Some(model) if model.is_empty() => Err(invalid("model", "`model` must not be empty")),
            Some(model) if model.len() > MAX_MODEL => Err(invalid("model", "`model` is longer than 256 bytes")),
            Some(model) => {
                self.call.model = Some(model);
                self.call.spans.model = span(self.body, value.get());
                Ok(())
            }
            None => Err(invalid("model", "`model` must be a string")),
        }
    }

    fn stream_options(&mut self, value: &'a RawValue) -> Result<()> {
        let Some((start, end)) = span(self.body, value.get()) else { return Ok(()) };
        if value.get() == "null" {
            self.call.spans.stream_options = StreamOptions::Null((start, end));
            return Ok(());
        }
        if !value.get().starts_with('{') {
            return Err(invalid("stream_options", "`stream_options` must be an object"));
        }
        let options = object(value.get().as_bytes()).map_err(|error| match error {
            GatewayError::BadRequest { code, param, message } => {
                let param =
                    param.map_or(Cow::Borrowed("stream_options"), |name| format!("stream_options.{name}").into());
                GatewayError::BadRequest { code, param: Some(param), message }
            }
            other => other,
        })?;
        let option = |wanted: &str| options.members.iter().find(|(name, _)| name == wanted).map(|(_, value)| *value);
        let include = option("include_usage");
        if let Some(include) = include {
            self.call.include_usage = match include.get() {
                "true" => Some(true),
                "false" => Some(false),
                "null" => None,
                _ => return Err(invalid("stream_options.include_usage", "`include_usage` must be true or false")),
            };
        }
        let continuous = option("continuous_usage_stats");
        self.call.continuous_usage = continuous.and_then(|value| match value.get() {
            "false" => Some(false),
            "null" => None,
            // Whatever else stands there is between the client and the upstream.
            _ => Some(true),
        });
        let place = |value: Option<&'a RawValue>| value.and_then(|value| span(self.body, value.get()));
        self.call.spans.stream_options = StreamOptions::Object {
            inside: start + 1,
            empty: options.members.is_empty(),
            include: place(include),
            continuous: place(continuous),
        };
        Ok(())
    }

    fn answers(&mut self, name: &str, text: &str) -> Result<()> {
        if text == "null" {
            return Ok(());
        }
        let count = text.parse::<u64>().ok().filter(|count| (1..=MAX_N).contains(count));
        let count = count.and_then(|count| u32::try_from(count).ok());
        let count = count.ok_or_else(|| invalid(name, format!("`{name}` must be an integer from 1 to {MAX_N}")))?;
        self.call.n = self.call.n.max(count);
        Ok(())
    }

    fn finish(self, prompt: Prompt<'a>) -> Result<Call> {
        let mut call = self.call;
        let kind = call.kind;
        if kind.needs_model() && call.model.is_none() {
            return Err(invalid("model", "`model` is missing"));
        }
        if matches!(kind, CallKind::Chat | CallKind::Messages) {
            let list = self.messages.map(RawValue::get).and_then(|list| list.strip_prefix('['));
            if list.is_none_or(|list| list.trim_ascii_start().starts_with(']')) {
                return Err(invalid("messages", "`messages` must be an array with at least one message"));
            }
        }
        call.max_tokens = self.max_completion_tokens.or(self.max_tokens);
        call.anchor = prompt.anchor();
        call.prompt = prompt.size;
        Ok(call)
    }
}

fn limit(name: &str, text: &str) -> Result<Option<u64>> {
    if text == "null" {
        return Ok(None);
    }
    let count = text.parse::<u64>().ok().filter(|count| *count <= MAX_TOKENS);
    count.map(Some).ok_or_else(|| invalid(name, format!("`{name}` must be an integer from 0 to {MAX_TOKENS}")))
}

fn invalid(name: &str, message: impl Into<String>) -> GatewayError {
    at_field(BadRequest::InvalidRequest, name, message)
}

fn at_field(code: BadRequest, name: &str, message: impl Into<String>) -> GatewayError {
    if name.len() > MAX_PARAM {
        return GatewayError::bad(code, message);
    }
    GatewayError::bad_field(code, name.to_owned(), message)
}

/// The members of an object, each name once.
struct Object<'a> {
    members: SmallVec<[(Cow<'a, str>, &'a RawValue); 24]>,
}

/// Takes an object apart.
fn object(text: &[u8]) -> Result<Object<'_>> {
    let mut deserializer = serde_json::Deserializer::from_slice(text);
    let is_object = text.trim_ascii_start().first() == Some(&b'{');
    if !is_object {
        // What is no JSON at all shall be told from what is no object.
        let checked = serde_json::from_slice::<IgnoredAny>(text).map_err(|error| malformed(text, &error));
        let not_text = std::str::from_utf8(text).err().map(|error| not_utf8(error.valid_up_to()));
        return Err(match (checked, not_text) {
            (Err(error), _) => error,
            (Ok(_), Some(error)) => error,
            (Ok(_), None) => GatewayError::bad(BadRequest::InvalidRequest, "the body must be a JSON object"),
        });
    }
    let found = deserializer.deserialize_map(Members::default()).map_err(|error| malformed(text, &error))?;
    deserializer.end().map_err(|error| malformed(text, &error))?;
    if found.too_many {
        return Err(GatewayError::bad(BadRequest::InvalidRequest, format!("more than {MAX_FIELDS} fields")));
    }
    if let Some(name) = found.twice {
        let shown = if name.len() > MAX_PARAM { "a field" } else { &name };
        return Err(at_field(BadRequest::DuplicateField, &name, format!("`{shown}` occurs twice")));
    }
    Ok(Object { members: found.members })
}

#[derive(Default)]
struct Members<'a> {
    members: SmallVec<[(Cow<'a, str>, &'a RawValue); 24]>,
    twice: Option<String>,
    too_many: bool,
}

/// A name that borrows where it can.
#[derive(Deserialize)]
struct Name<'a>(#[serde(borrow)] Cow<'a, str>);

impl<'de> Visitor<'de> for Members<'de> {
    type Value = Self;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<Self, A::Error> {
        while let Some(Name(name)) = map.next_key()? {
            let value = map.next_value::<&'de RawValue>()?;
            if self.members.len() == MAX_FIELDS {
                // Read on all the same: the body may yet turn out to be no JSON, and that is the better answer.
                self.too_many = true;
            } else if self.members.iter().any(|(known, _)| *known == name) {
                self.twice.get_or_insert_with(|| name.into_owned());
            } else {
                self.members.push((name, value));
            }
        }
        Ok(self)
    }
}

fn not_utf8(offset: usize) -> GatewayError {
    GatewayError::bad(BadRequest::InvalidJson, format!("the body is not valid JSON: invalid UTF-8 at byte {offset}"))
}

/// The reason and the byte offset, from an error that speaks of lines and columns.
fn malformed(text: &[u8], error: &serde_json::Error) -> GatewayError {
    if text.is_empty() {
        return GatewayError::bad(BadRequest::InvalidJson, "the body is empty; a JSON object is expected (byte 0)");
    }
    let line_start = match error.line().checked_sub(2) {
        None => 0,
        Some(nth) => memchr::memchr_iter(b'\n', text).nth(nth).map_or(0, |at| at + 1),
    };
    let offset = if error.is_eof() { text.len() } else { (line_start + error.column()).saturating_sub(1) };
    let reason = error.to_string();
    let reason = reason.split(" at line ").next().unwrap_or_default();
    // A word that is none is at fault from its first letter on.
    let word = text.get(..offset).unwrap_or_default().iter().rev().take_while(|b| b.is_ascii_alphabetic()).count();
    let offset = if reason == "expected ident" { offset - word } else { offset };
    if let Err(error) = std::str::from_utf8(text)
        && error.valid_up_to() <= offset
    {
        return not_utf8(error.valid_up_to());
    }
    if text.starts_with(b"\xEF\xBB\xBF") {
        let message = "the body is not valid JSON: it begins with a byte order mark at byte 0";
        return GatewayError::bad(BadRequest::InvalidJson, message);
    }
    GatewayError::bad(BadRequest::InvalidJson, format!("the body is not valid JSON: {reason} at byte {offset}"))
}
