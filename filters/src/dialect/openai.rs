//! What the events and answers of OpenAI's API mean, as OpenAI, vLLM, SGLang, llama.cpp and their kin send them.

use std::fmt;

use serde::Deserialize;
use serde::de::{self, Deserializer, SeqAccess, Visitor};
use serde_json::value::RawValue;
use smallvec::SmallVec;

use super::json::{is_blank, number, string};
use super::reading::{Counts, Found, Reading, StreamError};
use super::sse::Event;

/// Reads one event of a stream; `data` is the event's data as text.
pub fn read_event<'a>(event: &Event, data: &'a str) -> Reading<'a> {
    if data.trim_ascii() == "[DONE]" {
        return Reading { done: true, ..Reading::default() };
    }
    if data.trim_ascii().is_empty() {
        return Reading::default();
    }
    let Ok(chunk) = serde_json::from_str::<Chunk<'a>>(data) else { return Reading::malformed(data) };
    let named_error = event.name.as_deref() == Some(b"error");
    chunk.read(named_error.then_some(data))
}

/// Reads the top-level members of a plain answer, or of a part of it.
pub fn read_member<'a>(name: &str, raw: &'a str, into: &mut Reading<'a>) {
    let Ok(value) = serde_json::from_str::<&'a RawValue>(raw) else { return };
    match name {
        "usage" => into.found = into.found.or_else(|| usage(Some(value))),
        "timings" => into.found = into.found.or_else(|| timings(Some(value))),
        "error" => into.error = error(Some(value)),
        "choices" => {
            if let Ok(choices) = serde_json::from_str::<Choices<'a>>(raw) {
                into.texts.extend(choices.texts);
            }
        }
        "output" => into.texts.push(raw),
        _ => {}
    }
}

/// The members of a plain answer that [`read_member`] understands.
pub const MEMBERS: &[&str] = &["usage", "error", "choices", "timings", "output"];

/// One event's data: a chat or completion chunk, a `response.*` event, or an error.
#[derive(Deserialize)]
struct Chunk<'a> {
    #[serde(borrow)]
    choices: Option<Choices<'a>>,
    /// Also `Some` where it is null: a null has to be hidden like a figure.
    #[serde(borrow, default, deserialize_with = "present")]
    usage: Option<&'a RawValue>,
    #[serde(borrow)]
    timings: Option<&'a RawValue>,
    #[serde(borrow)]
    error: Option<&'a RawValue>,
    #[serde(borrow, rename = "type")]
    kind: Option<&'a RawValue>,
    #[serde(borrow)]
    delta: Option<&'a RawValue>,
    #[serde(borrow)]
    response: Option<&'a RawValue>,
    #[serde(borrow)]
    model: Option<&'a RawValue>,
}

fn present<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<&'de RawValue>, D::Error> {
    <&RawValue>::deserialize(deserializer).map(Some)
}

impl<'a> Chunk<'a> {
    /// `named_error`: the whole data, if the event's name says that it is an error.
    fn read(self, named_error: Option<&'a str>) -> Reading<'a> {
        let mut reading = Reading { error: error(self.error), ..Reading::default() };
        if reading.error.is_none() {
            reading.error = named_error.and_then(|data| error(serde_json::from_str(data).ok()));
        }
        reading.found = usage(self.usage).or_else(|| timings(self.timings));
        reading.usage_member = self.usage.map(RawValue::get);
        reading.model = self.model.map(RawValue::get);
        let choices = self.choices.unwrap_or_default();
        reading.only_usage = choices.count == 0
            && reading.error.is_none()
            && self.usage.is_some_and(|usage| !is_blank(usage))
            && self.kind.is_none();
        reading.token = choices.token;
        reading.finished = choices.finished;
        reading.texts = choices.texts;
        if let Some(kind) = self.kind.and_then(|kind| string(Some(kind))) {
            read_response_event(&kind, self.delta, self.response, &mut reading);
        }
        reading
    }
}

/// Events of the Responses API: the type says what the event is.
fn read_response_event<'a>(
    kind: &str,
    delta: Option<&'a RawValue>,
    response: Option<&'a RawValue>,
    reading: &mut Reading<'a>,
) {
    let Some(step) = kind.strip_prefix("response.") else {
        if kind == "error" && reading.error.is_none() {
            reading.error = Some(StreamError::new(None, None, None));
        }
        return;
    };
    if let Some(delta) = delta.filter(|delta| step.ends_with(".delta") && !is_blank(delta)) {
        reading.token = true;
        // Sound is output, but no text to count.
        if !step.ends_with("audio.delta") {
            reading.texts.push(delta.get());
        }
    }
    let body = response.and_then(|response| serde_json::from_str::<ResponseBody<'a>>(response.get()).ok());
    reading.model = reading.model.or_else(|| body.as_ref()?.model.map(RawValue::get));
    match step {
        "completed" | "incomplete" => {
            reading.done = true;
            reading.finished = 1;
            reading.found = usage(body.and_then(|body| body.usage)).or(reading.found);
        }
        "failed" => {
            reading.done = true;
            let failure = body.and_then(|body| error(body.error));
            reading.error = Some(failure.unwrap_or_else(|| StreamError::new(None, None, None)));
        }
        _ => {}
    }
}

#[derive(Deserialize)]
struct ResponseBody<'a> {
    #[serde(borrow)]
    model: Option<&'a RawValue>,
    #[serde(borrow)]
    usage: Option<&'a RawValue>,
    #[serde(borrow)]
    error: Option<&'a RawValue>,
}

/// What the choices of a chunk hold together; they are folded as they are read, so that nothing is allocated per choice.
#[derive(Default)]
struct Choices<'a> {
    count: usize,
    token: bool,
    finished: u32,
    texts: SmallVec<[&'a str; 2]>,
}

#[derive(Deserialize)]
struct Choice<'a> {
    #[serde(borrow)]
    delta: Option<Delta<'a>>,
    #[serde(borrow)]
    message: Option<Delta<'a>>,
    #[serde(borrow)]
    text: Option<&'a RawValue>,
    #[serde(borrow)]
    finish_reason: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Delta<'a> {
    #[serde(borrow)]
    content: Option<&'a RawValue>,
    #[serde(borrow)]
    reasoning_content: Option<&'a RawValue>,
    #[serde(borrow)]
    reasoning: Option<&'a RawValue>,
    #[serde(borrow)]
    refusal: Option<&'a RawValue>,
    #[serde(borrow)]
    tool_calls: Option<&'a RawValue>,
    #[serde(borrow)]
    function_call: Option<&'a RawValue>,
    #[serde(borrow)]
    audio: Option<&'a RawValue>,
}

impl<'a> Choices<'a> {
    fn add(&mut self, choice: Choice<'a>) {
        self.count += 1;
        self.finished += u32::from(choice.finish_reason.is_some_and(|reason| !is_blank(reason)));
        self.add_text(choice.text);
        for delta in [choice.delta, choice.message].into_iter().flatten() {
            self.add_text(delta.content);
            self.add_text(delta.reasoning_content);
            // Some servers send the same reasoning under both names.
            if delta.reasoning_content.is_none_or(is_blank) {
                self.add_text(delta.reasoning);
            }
            self.add_text(delta.refusal);
            self.add_text(delta.tool_calls);
            self.add_text(delta.function_call);
            // Sound is output, but no text to count.
            self.token |= delta.audio.is_some_and(|audio| !is_blank(audio));
        }
    }

    fn add_text(&mut self, raw: Option<&'a RawValue>) {
        if let Some(raw) = raw.filter(|raw| !is_blank(raw)) {
            self.token = true;
            self.texts.push(raw.get());
        }
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Choices<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Fold<'a>(Choices<'a>);
        impl<'de: 'a, 'a> Visitor<'de> for Fold<'a> {
            type Value = Choices<'a>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an array of choices")
            }
            fn visit_seq<A: SeqAccess<'de>>(mut self, mut seq: A) -> Result<Self::Value, A::Error> {
                while let Some(choice) = seq.next_element::<Choice<'a>>()? {
                    self.0.add(choice);
                }
                Ok(self.0)
            }
            fn visit_unit<E: de::Error>(self) -> Result<Self::Value, E> {
                Ok(self.0)
            }
        }
        deserializer.deserialize_any(Fold(Choices::default()))
    }
}

/// Usage in the words of chat, completions, embeddings, rerank and the Responses API.
#[derive(Deserialize)]
struct UsageBody<'a> {
    #[serde(borrow)]
    prompt_tokens: Option<&'a RawValue>,
    #[serde(borrow)]
    completion_tokens: Option<&'a RawValue>,
    #[serde(borrow)]
    total_tokens: Option<&'a RawValue>,
    #[serde(borrow)]
    input_tokens: Option<&'a RawValue>,
    #[serde(borrow)]
    output_tokens: Option<&'a RawValue>,
    #[serde(borrow)]
    prompt_tokens_details: Option<&'a RawValue>,
    #[serde(borrow)]
    input_tokens_details: Option<&'a RawValue>,
    /// DeepSeek's word.
    #[serde(borrow)]
    prompt_cache_hit_tokens: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Details<'a> {
    #[serde(borrow)]
    cached_tokens: Option<&'a RawValue>,
}

fn usage(raw: Option<&RawValue>) -> Option<Found> {
    let body: UsageBody<'_> = serde_json::from_str(raw?.get()).ok()?;
    let details = body.prompt_tokens_details.or(body.input_tokens_details);
    let cached = details.and_then(|details| serde_json::from_str::<Details<'_>>(details.get()).ok());
    let cached = number(cached.and_then(|details| details.cached_tokens));
    let counts = Counts {
        input: number(body.prompt_tokens.or(body.input_tokens)),
        cached: cached.or_else(|| number(body.prompt_cache_hit_tokens)),
        output: number(body.completion_tokens.or(body.output_tokens)),
        total: number(body.total_tokens),
    };
    (counts != Counts::default()).then_some(Found::Whole(counts))
}

/// llama.cpp states what it did even where nobody asked for usage: `prompt_n` leaves the cached part out.
#[derive(Deserialize)]
struct Timings<'a> {
    #[serde(borrow)]
    prompt_n: Option<&'a RawValue>,
    #[serde(borrow)]
    predicted_n: Option<&'a RawValue>,
    #[serde(borrow)]
    cache_n: Option<&'a RawValue>,
}

fn timings(raw: Option<&RawValue>) -> Option<Found> {
    let body: Timings<'_> = serde_json::from_str(raw?.get()).ok()?;
    let cached = number(body.cache_n);
    let input = number(body.prompt_n)?.saturating_add(cached.unwrap_or(0));
    Some(Found::Whole(Counts { input: Some(input), cached, output: Some(number(body.predicted_n)?), total: None }))
}

#[derive(Deserialize)]
struct ErrorBody<'a> {
    #[serde(borrow)]
    message: Option<&'a RawValue>,
    #[serde(borrow)]
    code: Option<&'a RawValue>,
    #[serde(borrow, rename = "type")]
    kind: Option<&'a RawValue>,
    #[serde(borrow)]
    status: Option<&'a RawValue>,
    #[serde(borrow)]
    error: Option<&'a RawValue>,
}

/// The `error` member of an answer: an object, or with some servers a bare string.
pub(crate) fn error(raw: Option<&RawValue>) -> Option<StreamError> {
    let raw = raw.filter(|raw| !is_blank(raw))?;
    let Ok(body) = serde_json::from_str::<ErrorBody<'_>>(raw.get()) else {
        let message = string(Some(raw)).unwrap_or_else(|| raw.get().to_owned());
        return Some(StreamError::new(None, None, Some(message)));
    };
    if body.message.is_none() && body.error.is_some_and(|inner| !is_blank(inner)) {
        // An event named `error` whose data wraps the error once more; one level only.
        if let Ok(inner) = serde_json::from_str::<ErrorBody<'_>>(body.error?.get()) {
            return Some(inner.read());
        }
    }
    Some(body.read())
}

impl ErrorBody<'_> {
    fn read(self) -> StreamError {
        let word = string(self.code).or_else(|| string(self.kind));
        let status = number(self.code).or_else(|| number(self.status)).or_else(|| status_of(word.as_deref()?));
        StreamError::new(status, word, string(self.message))
    }
}

/// The status that a code or type word stands for, where it is certain.
fn status_of(word: &str) -> Option<u64> {
    match word {
        "rate_limit_error" | "rate_limit_exceeded" | "insufficient_quota" | "requests" | "tokens" => Some(429),
        "invalid_api_key" | "authentication_error" => Some(401),
        "permission_error" => Some(403),
        "invalid_request_error" | "context_length_exceeded" | "BadRequestError" => Some(400),
        "not_found_error" | "model_not_found" | "NotFoundError" => Some(404),
        "overloaded_error" | "unavailable_error" => Some(503),
        "server_error" | "api_error" | "InternalServerError" => Some(500),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    fn read(data: &str) -> Reading<'_> {
        let event = Event { raw: Bytes::new(), name: None, data: None, whole: true };
        read_event(&event, data)
    }

    fn whole(input: u64, cached: Option<u64>, output: u64, total: Option<u64>) -> Option<Found> {
        Some(Found::Whole(Counts { input: Some(input), cached, output: Some(output), total }))
    }

    #[test]
    fn a_role_an_empty_delta_and_a_ping_are_no_tokens() {
        for data in [
            r#"{"choices":[{"index":0,"delta":{"role":"assistant"},"finish_reason":null}]}"#,
            r#"{"choices":[{"delta":{"role":"assistant","content":""}}]}"#,
            r#"{"choices":[{"delta":{"role":"assistant","content":null,"tool_calls":[],"reasoning":null}}]}"#,
            r#"{"choices":[{"delta":{},"finish_reason":"stop"}]}"#,
            r#"{"choices":[{"text":"","finish_reason":null}]}"#,
            r#"{"choices":[],"prompt_filter_results":[]}"#,
            "[DONE]",
            "",
        ] {
            let reading = read(data);
            assert!(!reading.token && !reading.malformed && reading.texts.is_empty(), "{data}");
        }
    }

    #[test]
    fn text_reasoning_refusal_and_tool_calls_are_tokens() {
        for (data, text) in [
            (r#"{"choices":[{"delta":{"content":"Hi"}}]}"#, "\"Hi\""),
            (r#"{"choices":[{"delta":{"reasoning_content":"hm"}}]}"#, "\"hm\""),
            (r#"{"choices":[{"delta":{"reasoning":"hm"}}]}"#, "\"hm\""),
            (r#"{"choices":[{"delta":{"reasoning":"hm","reasoning_content":"hm"}}]}"#, "\"hm\""),
            (r#"{"choices":[{"delta":{"refusal":"no"}}]}"#, "\"no\""),
            (r#"{"choices":[{"delta":{"tool_calls":[{"index":0}]}}]}"#, "[{\"index\":0}]"),
            (r#"{"choices":[{"text":" x"}]}"#, "\" x\""),
            (r#"{"type":"response.output_text.delta","delta":"Hi"}"#, "\"Hi\""),
        ] {
            let reading = read(data);
            assert!(reading.token, "{data}");
            assert_eq!(reading.texts.as_slice(), [text], "{data}");
        }
    }

    #[test]
    fn usage_is_read_in_every_spelling() {
        let cases = [
            (
                r#"{"choices":[],"usage":{"prompt_tokens":11,"completion_tokens":7,"total_tokens":18}}"#,
                whole(11, None, 7, Some(18)),
            ),
            (
                r#"{"choices":[],"usage":{"prompt_tokens":11,"completion_tokens":7,"prompt_tokens_details":{"cached_tokens":8}}}"#,
                whole(11, Some(8), 7, None),
            ),
            (
                r#"{"choices":[],"usage":{"prompt_tokens":11,"completion_tokens":7.0,"prompt_tokens_details":null,"prompt_cache_hit_tokens":4}}"#,
                whole(11, Some(4), 7, None),
            ),
            (
                r#"{"choices":[{"delta":{}}],"timings":{"cache_n":5,"prompt_n":6,"predicted_n":7,"predicted_ms":1.5}}"#,
                whole(11, Some(5), 7, None),
            ),
            (
                r#"{"type":"response.completed","response":{"usage":{"input_tokens":11,"output_tokens":7,"input_tokens_details":{"cached_tokens":1}}}}"#,
                whole(11, Some(1), 7, None),
            ),
            (r#"{"choices":[],"usage":null}"#, None),
            (r#"{"choices":[],"usage":"odd"}"#, None),
        ];
        for (data, found) in cases {
            assert_eq!(read(data).found, found, "{data}");
        }
    }

    #[test]
    fn only_the_chunk_without_choices_is_nothing_but_usage() {
        assert!(read(r#"{"choices":[],"usage":{"prompt_tokens":1}}"#).only_usage);
        assert!(!read(r#"{"choices":[],"usage":null}"#).only_usage);
        assert!(!read(r#"{"choices":[{"delta":{}}],"usage":{"prompt_tokens":1}}"#).only_usage);
    }

    #[test]
    fn errors_are_seen_with_their_status() {
        for (data, status, code, message) in [
            (
                r#"{"error":{"message":"slow","type":"rate_limit_error","code":null}}"#,
                Some(429),
                Some("rate_limit_error"),
                "slow",
            ),
            (
                r#"{"error":{"message":"bad","type":"BadRequestError","code":400}}"#,
                Some(400),
                Some("BadRequestError"),
                "bad",
            ),
            (r#"{"error":"out of memory"}"#, None, None, "out of memory"),
            (r#"{"error":{}, "choices":[]}"#, None, None, ""),
        ] {
            let reading = read(data);
            if data.contains("{}") {
                assert_eq!(reading.error, None);
                continue;
            }
            let error = reading.error.unwrap();
            assert_eq!((error.status, error.code.as_deref(), &*error.message), (status, code, message), "{data}");
            assert!(!reading.token);
        }
        let named = Event { raw: Bytes::new(), name: Some(Bytes::from_static(b"error")), data: None, whole: true };
        let error = read_event(&named, r#"{"code":503,"message":"loading"}"#).error.unwrap();
        assert_eq!((error.status, &*error.message), (Some(503), "loading"));
    }

    #[test]
    fn ends_are_seen() {
        assert!(read("[DONE]").done);
        assert!(read(r#"{"choices":[{"delta":{},"finish_reason":"length"}]}"#).finished == 1);
        assert!(read(r#"{"type":"response.completed","response":{}}"#).done);
        assert!(read(r#"{"type":"response.failed","response":{"error":{"message":"x"}}}"#).error.is_some());
    }

    #[test]
    fn what_is_not_an_object_is_malformed() {
        for (data, garbled) in [
            ("{", true),
            ("5", false),
            ("[1]", false),
            ("nope", true),
            (r#"{"choices":5}"#, false),
            (r#"{"a":1} {"b":2}"#, true),
        ] {
            let reading = read(data);
            assert!(reading.malformed, "{data}");
            assert_eq!(reading.garbled, garbled, "{data}");
        }
    }

    #[test]
    fn the_models_name_is_found_where_each_kind_of_event_has_it() {
        let name = Some("\"m\"");
        assert_eq!(read(r#"{"model":"m","choices":[]}"#).model, name);
        assert_eq!(read(r#"{"type":"response.created","response":{"model":"m"}}"#).model, name);
        assert_eq!(read(r#"{"choices":[{"delta":{"model":"m"}}]}"#).model, None);
    }

    #[test]
    fn each_answer_that_ends_is_counted() {
        let both = r#"{"choices":[{"index":0,"finish_reason":"stop"},{"index":1,"finish_reason":"length"}]}"#;
        assert_eq!(read(both).finished, 2);
        assert_eq!(read(r#"{"choices":[{"index":0,"finish_reason":null}]}"#).finished, 0);
    }
}
