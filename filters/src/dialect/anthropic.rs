//! What the events and answers of Anthropic's Messages API mean.

use serde::Deserialize;
use serde_json::value::RawValue;

use super::json::{is_blank, number};
use super::openai;
use super::reading::{Counts, Found, Reading};
use super::sse::Event;

/// Reads one event of a stream; `data` is the event's data as text.
pub fn read_event<'a>(_event: &Event, data: &'a str) -> Reading<'a> {
    if data.trim_ascii().is_empty() {
        return Reading::default();
    }
    let Ok(body) = serde_json::from_str::<Body<'a>>(data) else { return Reading::malformed(data) };
    let mut reading = Reading::default();
    match body.kind {
        Kind::MessageStart => {
            if let Some(message) = body.message {
                reading.found = usage(message.usage).map(Found::Begun);
                reading.model = message.model.map(RawValue::get);
            }
        }
        Kind::ContentBlockStart => {
            if let Some(block) = body.content_block {
                // A tool is named here; the block of a text only begins, mostly empty.
                reading.token = block.name.is_some();
                reading.texts.extend(block.name.map(RawValue::get));
                add(&mut reading, [block.text, block.thinking, block.data]);
            }
        }
        Kind::ContentBlockDelta => {
            if let Some(delta) = body.delta {
                add(&mut reading, [delta.text, delta.thinking, delta.partial_json]);
            }
        }
        Kind::MessageDelta => {
            reading.found = usage(body.usage).map(Found::Whole);
            let stopped = body.delta.and_then(|delta| delta.stop_reason).is_some_and(|reason| !is_blank(reason));
            reading.finished = u32::from(stopped);
        }
        Kind::MessageStop => reading.done = true,
        Kind::Error => reading.error = openai::error(body.error).or_else(|| Some(Default::default())),
        Kind::Other => {}
    }
    reading
}

/// Reads the top-level members of a plain answer.
pub fn read_member<'a>(name: &str, raw: &'a str, into: &mut Reading<'a>) {
    let Ok(value) = serde_json::from_str::<&'a RawValue>(raw) else { return };
    match name {
        "usage" => into.found = usage(Some(value)).map(Found::Whole),
        "error" => into.error = openai::error(Some(value)),
        "content" => into.texts.push(raw),
        _ => {}
    }
}

/// The members of a plain answer that [`read_member`] understands.
pub const MEMBERS: &[&str] = &["usage", "error", "content"];

fn add<'a>(reading: &mut Reading<'a>, raws: [Option<&'a RawValue>; 3]) {
    for raw in raws.into_iter().flatten().filter(|raw| !is_blank(raw)) {
        reading.token = true;
        reading.texts.push(raw.get());
    }
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "snake_case")]
enum Kind {
    MessageStart,
    ContentBlockStart,
    ContentBlockDelta,
    MessageDelta,
    MessageStop,
    Error,
    #[default]
    #[serde(other)]
    Other,
}

#[derive(Deserialize)]
struct Body<'a> {
    #[serde(rename = "type", default)]
    kind: Kind,
    #[serde(borrow)]
    message: Option<Message<'a>>,
    #[serde(borrow)]
    content_block: Option<Block<'a>>,
    #[serde(borrow)]
    delta: Option<Delta<'a>>,
    #[serde(borrow)]
    usage: Option<&'a RawValue>,
    #[serde(borrow)]
    error: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Message<'a> {
    #[serde(borrow)]
    model: Option<&'a RawValue>,
    #[serde(borrow)]
    usage: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Block<'a> {
    #[serde(borrow)]
    name: Option<&'a RawValue>,
    #[serde(borrow)]
    text: Option<&'a RawValue>,
    #[serde(borrow)]
    thinking: Option<&'a RawValue>,
    /// Redacted thinking.
    #[serde(borrow)]
    data: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Delta<'a> {
    #[serde(borrow)]
    text: Option<&'a RawValue>,
    #[serde(borrow)]
    thinking: Option<&'a RawValue>,
    #[serde(borrow)]
    partial_json: Option<&'a RawValue>,
    #[serde(borrow)]
    stop_reason: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct UsageBody<'a> {
    #[serde(borrow)]
    input_tokens: Option<&'a RawValue>,
    #[serde(borrow)]
    cache_read_input_tokens: Option<&'a RawValue>,
    #[serde(borrow)]
    cache_creation_input_tokens: Option<&'a RawValue>,
    #[serde(borrow)]
    output_tokens: Option<&'a RawValue>,
}

/// Anthropic's `input_tokens` leaves out what was read from or written to the cache; ours includes both.
fn usage(raw: Option<&RawValue>) -> Option<Counts> {
    let body: UsageBody<'_> = serde_json::from_str(raw?.get()).ok()?;
    let cached = number(body.cache_read_input_tokens);
    let parts = [number(body.input_tokens), cached, number(body.cache_creation_input_tokens)];
    let input = parts.into_iter().flatten().fold(0, u64::saturating_add);
    // A delta that repeats the input as 0 knows nothing of it.
    let input = (input > 0).then_some(input);
    Some(Counts { input, cached: cached.filter(|_| input.is_some()), output: number(body.output_tokens), total: None })
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    fn read(data: &str) -> Reading<'_> {
        read_event(&Event { raw: Bytes::new(), name: None, data: None, whole: true }, data)
    }

    #[test]
    fn the_cache_is_part_of_the_input() {
        let data = r#"{"type":"message_start","message":{"id":"m","usage":{"input_tokens":10,"cache_creation_input_tokens":20,"cache_read_input_tokens":30,"output_tokens":1}}}"#;
        let counts = Counts { input: Some(60), cached: Some(30), output: Some(1), total: None };
        assert_eq!(read(data).found, Some(Found::Begun(counts)));
        let data = r#"{"type":"message_delta","delta":{"stop_reason":"end_turn"},"usage":{"output_tokens":15}}"#;
        let reading = read(data);
        assert_eq!(reading.found, Some(Found::Whole(Counts { output: Some(15), ..Counts::default() })));
        assert!(reading.finished == 1 && !reading.token);
    }

    #[test]
    fn text_thinking_and_tool_input_are_tokens_the_frame_is_not() {
        for (data, token) in [
            (r#"{"type":"ping"}"#, false),
            (r#"{"type":"content_block_start","index":0,"content_block":{"type":"text","text":""}}"#, false),
            (
                r#"{"type":"content_block_start","index":0,"content_block":{"type":"tool_use","id":"t","name":"f","input":{}}}"#,
                true,
            ),
            (r#"{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"Hi"}}"#, true),
            (r#"{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":""}}"#, false),
            (r#"{"type":"content_block_delta","index":0,"delta":{"type":"thinking_delta","thinking":"hm"}}"#, true),
            (r#"{"type":"content_block_delta","index":0,"delta":{"type":"signature_delta","signature":"x"}}"#, false),
            (
                r#"{"type":"content_block_delta","index":1,"delta":{"type":"input_json_delta","partial_json":"{"}}"#,
                true,
            ),
            (r#"{"type":"content_block_stop","index":0}"#, false),
            (r#"{"type":"something_new","x":1}"#, false),
        ] {
            let reading = read(data);
            assert_eq!((reading.token, reading.malformed), (token, false), "{data}");
        }
    }

    #[test]
    fn the_end_and_errors_are_seen() {
        assert!(read(r#"{"type":"message_stop"}"#).done);
        let error =
            read(r#"{"type":"error","error":{"type":"overloaded_error","message":"Overloaded"}}"#).error.unwrap();
        assert_eq!(
            (error.status, error.code.as_deref(), &*error.message),
            (Some(503), Some("overloaded_error"), "Overloaded")
        );
        assert!(read(r#"{"type":"error"}"#).error.is_some());
        assert!(read("{").malformed);
    }
}
