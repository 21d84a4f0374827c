//! What the events and answers of Dify's service API mean.
//!
//! The status of a Dify answer is not its outcome: a stream is 200 whatever happens, and a blocking workflow is 200 with a status of
//! its own inside. Usage stands in `message_end`; a workflow only gives a sum, and the split with each of its model nodes.

use serde::Deserialize;
use serde_json::value::RawValue;

use super::json::{is_blank, number, string};
use super::reading::{Counts, Found, Reading, StreamError};
use super::sse::Event;

/// Reads one event of a stream; `data` is the event's data as text. A ping has no data and is never asked about.
pub fn read_event<'a>(_event: &Event, data: &'a str) -> Reading<'a> {
    if data.trim_ascii().is_empty() {
        return Reading::default();
    }
    let Ok(body) = serde_json::from_str::<Body<'a>>(data) else { return Reading::malformed(data) };
    let mut reading = Reading { progress: true, ..Reading::default() };
    match body.event {
        Kind::Message | Kind::AgentMessage | Kind::MessageReplace => add(&mut reading, body.answer),
        // It repeats what the agent's messages said or will say: output, but not to be counted.
        Kind::AgentThought => {
            reading.token = [body.thought, body.tool].into_iter().flatten().any(|raw| !is_blank(raw));
        }
        Kind::TextChunk => add(&mut reading, body.data.and_then(|data| data.text)),
        Kind::TtsMessage => reading.token = body.audio.is_some_and(|audio| !is_blank(audio)),
        Kind::NodeFinished => {
            let outputs = body.data.and_then(|data| data.outputs).filter(|outputs| outputs.get().contains("\"usage\""));
            let outputs = outputs.and_then(|outputs| serde_json::from_str::<Outputs<'a>>(outputs.get()).ok());
            reading.found = outputs.and_then(|outputs| usage(outputs.usage)).map(Found::Step);
        }
        Kind::MessageEnd => {
            // A chatflow's stream goes on with `workflow_finished`, but the answer is complete.
            reading.done = true;
            reading.finished = 1;
            reading.found = body.metadata.and_then(metadata_usage);
        }
        Kind::WorkflowFinished | Kind::WorkflowPaused => {
            reading.done = true;
            reading.finished = 1;
            if let Some(data) = body.data {
                reading.found = data.total();
                reading.error = data.failure();
            }
        }
        Kind::Error => {
            reading.progress = false;
            reading.done = true;
            reading.error = Some(StreamError::new(number(body.status), string(body.code), string(body.message)));
        }
        Kind::Ping => reading.progress = false,
        Kind::Other => {}
    }
    reading
}

/// Reads the top-level members of a blocking answer.
pub fn read_member<'a>(name: &str, raw: &'a str, into: &mut Reading<'a>) {
    match name {
        "metadata" => {
            // A blocking run cannot be stopped half-way, so zeros are the truth.
            into.found = match serde_json::from_str(raw).ok().and_then(metadata_usage) {
                Some(Found::Whole(counts)) if counts.is_zero() => Some(Found::Free),
                found => found,
            };
        }
        "answer" => into.texts.push(raw),
        "data" => {
            let Ok(data) = serde_json::from_str::<Data<'a>>(raw) else { return };
            into.found = data.total();
            into.error = data.failure();
            into.texts.extend(data.outputs.filter(|outputs| !is_blank(outputs)).map(RawValue::get));
        }
        _ => {}
    }
}

/// The members of a blocking answer that [`read_member`] understands.
pub const MEMBERS: &[&str] = &["metadata", "answer", "data"];

fn add<'a>(reading: &mut Reading<'a>, raw: Option<&'a RawValue>) {
    if let Some(raw) = raw.filter(|raw| !is_blank(raw)) {
        reading.token = true;
        reading.texts.push(raw.get());
    }
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "snake_case")]
enum Kind {
    Message,
    AgentMessage,
    MessageReplace,
    AgentThought,
    TextChunk,
    TtsMessage,
    NodeFinished,
    MessageEnd,
    WorkflowFinished,
    WorkflowPaused,
    Error,
    Ping,
    #[default]
    #[serde(other)]
    Other,
}

#[derive(Deserialize)]
struct Body<'a> {
    #[serde(default)]
    event: Kind,
    #[serde(borrow)]
    answer: Option<&'a RawValue>,
    #[serde(borrow)]
    thought: Option<&'a RawValue>,
    #[serde(borrow)]
    tool: Option<&'a RawValue>,
    #[serde(borrow)]
    audio: Option<&'a RawValue>,
    #[serde(borrow)]
    metadata: Option<&'a RawValue>,
    #[serde(borrow)]
    data: Option<Data<'a>>,
    #[serde(borrow)]
    code: Option<&'a RawValue>,
    #[serde(borrow)]
    message: Option<&'a RawValue>,
    #[serde(borrow)]
    status: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Data<'a> {
    #[serde(borrow)]
    text: Option<&'a RawValue>,
    #[serde(borrow)]
    outputs: Option<&'a RawValue>,
    #[serde(borrow)]
    status: Option<&'a RawValue>,
    #[serde(borrow)]
    error: Option<&'a RawValue>,
    #[serde(borrow)]
    total_tokens: Option<&'a RawValue>,
}

impl Data<'_> {
    /// A run that was stopped or failed states 0 though its model had begun; one that succeeded means it.
    fn total(&self) -> Option<Found> {
        let total = number(self.total_tokens)?;
        let succeeded = self.status.is_some_and(|status| status.get() == "\"succeeded\"");
        Some(if total == 0 && succeeded { Found::Free } else { Found::Total(total) })
    }

    /// A run that failed; one that was stopped or succeeded in part did as it was told.
    fn failure(&self) -> Option<StreamError> {
        let status = self.status.filter(|status| status.get() == "\"failed\"")?;
        Some(StreamError::new(None, string(Some(status)), string(self.error)))
    }
}

#[derive(Deserialize)]
struct Outputs<'a> {
    #[serde(borrow)]
    usage: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct UsageBody<'a> {
    #[serde(borrow)]
    prompt_tokens: Option<&'a RawValue>,
    #[serde(borrow)]
    completion_tokens: Option<&'a RawValue>,
    #[serde(borrow)]
    total_tokens: Option<&'a RawValue>,
}

fn metadata_usage(metadata: &RawValue) -> Option<Found> {
    let metadata: Outputs<'_> = serde_json::from_str(metadata.get()).ok()?;
    usage(metadata.usage).map(Found::Whole)
}

fn usage(raw: Option<&RawValue>) -> Option<Counts> {
    let body: UsageBody<'_> = serde_json::from_str(raw?.get()).ok()?;
    let counts = Counts {
        input: number(body.prompt_tokens),
        cached: None,
        output: number(body.completion_tokens),
        total: number(body.total_tokens),
    };
    (counts != Counts::default()).then_some(counts)
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    fn read(data: &str) -> Reading<'_> {
        read_event(&Event { raw: Bytes::new(), name: None, data: None, whole: true }, data)
    }

    const COUNTS: Counts = Counts { input: Some(11), cached: None, output: Some(7), total: Some(18) };

    #[test]
    fn usage_is_found_where_dify_puts_it() {
        let end = r#"{"event":"message_end","task_id":"t","metadata":{"usage":{"prompt_tokens":11,"prompt_price":"0E-7","completion_tokens":7,"total_tokens":18,"latency":0.5}},"files":null}"#;
        assert_eq!(read(end).found, Some(Found::Whole(COUNTS)));
        let node = r#"{"event":"node_finished","data":{"node_type":"llm","outputs":{"text":"x","usage":{"prompt_tokens":11,"completion_tokens":7,"total_tokens":18}},"error":null}}"#;
        assert_eq!(read(node).found, Some(Found::Step(COUNTS)));
        let finished = r#"{"event":"workflow_finished","data":{"status":"succeeded","total_tokens":18,"error":null,"outputs":{}}}"#;
        let reading = read(finished);
        assert_eq!(reading.found, Some(Found::Total(18)));
        assert!(reading.done && reading.error.is_none());
        let free = r#"{"event":"workflow_finished","data":{"status":"succeeded","total_tokens":0}}"#;
        assert_eq!(read(free).found, Some(Found::Free));
        let stopped = r#"{"event":"workflow_finished","data":{"status":"stopped","total_tokens":0}}"#;
        assert_eq!(read(stopped).found, Some(Found::Total(0)));
    }

    #[test]
    fn output_is_told_from_progress_and_from_nothing() {
        for (data, token, progress) in [
            (r#"{"event":"workflow_started","data":{"inputs":{"q":"x"}}}"#, false, true),
            (r#"{"event":"node_started","data":{"inputs":null}}"#, false, true),
            (r#"{"event":"message","answer":"Hello"}"#, true, true),
            (r#"{"event":"message","answer":""}"#, false, true),
            (r#"{"event":"agent_thought","thought":"","tool":""}"#, false, true),
            (r#"{"event":"agent_thought","thought":"","tool":"clock"}"#, true, true),
            (r#"{"event":"text_chunk","data":{"text":"Hi"}}"#, true, true),
            (r#"{"event":"ping"}"#, false, false),
            (r#"{"event":"error","code":"invalid_param","status":400,"message":"x"}"#, false, false),
        ] {
            let reading = read(data);
            assert_eq!((reading.token, reading.progress, reading.malformed), (token, progress, false), "{data}");
        }
    }

    #[test]
    fn failures_are_seen_in_events_and_in_blocking_answers_of_status_200() {
        let error = read(r#"{"event":"error","code":"invalid_param","status":400,"message":"boom"}"#).error.unwrap();
        assert_eq!((error.status, error.code.as_deref(), &*error.message), (Some(400), Some("invalid_param"), "boom"));
        let failed = r#"{"event":"workflow_finished","data":{"status":"failed","error":"boom","total_tokens":0}}"#;
        assert_eq!(&*read(failed).error.unwrap().message, "boom");
        let mut reading = Reading::default();
        read_member("data", r#"{"status":"failed","error":"boom","outputs":{},"total_tokens":3}"#, &mut reading);
        assert_eq!(&*reading.error.unwrap().message, "boom");
        assert_eq!(reading.found, Some(Found::Total(3)));
        let stopped =
            r#"{"event":"workflow_finished","data":{"status":"stopped","error":"Stopped by user.","total_tokens":0}}"#;
        assert!(read(stopped).error.is_none());
    }
}
