//! What a client asks of the node, read from the body of a completion request.

use std::borrow::Cow;

use serde::Deserialize;
use serde_json::{Map, Value};
use xxhash_rust::xxh3::xxh3_64;

use super::NodeConfig;
use super::fail::Refusal;
use super::words::{self, Numbers};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Chat,
    Text,
}

/// A completion request with everything its answer depends on.
#[derive(Debug)]
pub(crate) struct Ask {
    pub(crate) kind: Kind,
    pub(crate) model: String,
    pub(crate) prompt: String,
    pub(crate) stream: bool,
    pub(crate) include_usage: bool,
    pub(crate) continuous_usage: bool,
    pub(crate) tool: Option<ToolCall>,
    /// The tokens of each choice.
    pub(crate) choices: Vec<Vec<Cow<'static, str>>>,
    /// Why the answer ends, in OpenAI's words.
    pub(crate) finish: &'static str,
    pub(crate) most_output: usize,
    /// It goes on with a message that is begun.
    pub(crate) continues: bool,
}

/// A call of the client's first tool.
#[derive(Debug)]
pub(crate) struct ToolCall {
    pub(crate) id: String,
    pub(crate) name: String,
}

#[derive(Deserialize)]
struct Body {
    model: String,
    messages: Option<Vec<Message>>,
    prompt: Option<Value>,
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    max_tokens: Option<usize>,
    max_completion_tokens: Option<usize>,
    n: Option<usize>,
    stop: Option<OneOrMany>,
    tools: Option<Vec<Value>>,
    tool_choice: Option<Value>,
    continue_final_message: Option<bool>,
    add_generation_prompt: Option<bool>,
}

#[derive(Deserialize)]
struct Message {
    role: String,
    content: Option<Value>,
    tool_calls: Option<Value>,
}

#[derive(Deserialize)]
struct StreamOptions {
    include_usage: Option<bool>,
    continuous_usage_stats: Option<bool>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

impl Ask {
    pub(crate) fn read(kind: Kind, body: &[u8], config: &NodeConfig) -> Result<Self, Refusal> {
        let mut body: Body =
            serde_json::from_slice(body).map_err(|error| Refusal::invalid(&error.to_string(), None))?;
        let n = body.n.unwrap_or(1);
        if !(1..=128).contains(&n) {
            return Err(Refusal::invalid("`n` must be between 1 and 128.", Some("n")));
        }
        let stream = body.stream.unwrap_or(false);
        if body.stream_options.is_some() && !stream {
            return Err(Refusal::invalid("`stream_options` needs `stream: true`.", Some("stream_options")));
        }
        let limit = body.max_completion_tokens.or(body.max_tokens);
        if limit == Some(0) {
            return Err(Refusal::invalid("`max_tokens` must be at least 1.", Some("max_tokens")));
        }
        let begun = begun(&mut body)?;
        let mut prompt = match kind {
            Kind::Chat => chat_prompt(body.messages.as_deref(), body.tools.as_deref())?,
            Kind::Text => text_prompt(body.prompt.as_ref())?,
        };
        let seed = xxh3_64(prompt.as_bytes());
        let skip = match &begun {
            Some(begun) => words::tokens_in(seed, begun).ok_or_else(|| {
                Refusal::invalid("The final message does not begin like an answer of this model.", Some("messages"))
            })?,
            None => 0,
        };
        prompt.push_str(begun.as_deref().unwrap_or_default());
        let rest = config.answer_tokens.saturating_sub(skip);
        let length = limit.unwrap_or(rest).min(config.longest_answer);
        let mut ask = Self {
            kind,
            model: body.model,
            prompt,
            stream,
            include_usage: body.stream_options.as_ref().is_some_and(|options| options.include_usage == Some(true)),
            continuous_usage: body.stream_options.is_some_and(|options| options.continuous_usage_stats == Some(true)),
            tool: None,
            choices: Vec::with_capacity(n),
            finish: if limit == Some(length) { "length" } else { "stop" },
            most_output: length * n,
            continues: begun.is_some(),
        };
        let from_user =
            body.messages.as_ref().and_then(|messages| messages.last()).is_some_and(|last| last.role == "user");
        if let Some((call, arguments)) =
            tool_call(body.tools.as_deref(), body.tool_choice.as_ref(), seed).filter(|_| from_user)
        {
            ask.tool = Some(call);
            ask.finish = "tool_calls";
            ask.choices = vec![pieces(&arguments); n];
            return Ok(ask);
        }
        let stops = match body.stop {
            Some(OneOrMany::One(stop)) => vec![stop],
            Some(OneOrMany::Many(stops)) => stops,
            None => Vec::new(),
        };
        for choice in 0..n as u64 {
            let mut tokens = words::answer(seed.wrapping_add(choice), skip + length).split_off(skip);
            if words::stop_at(&mut tokens, &stops) {
                ask.finish = "stop";
            }
            ask.choices.push(tokens.into_iter().map(Cow::Borrowed).collect());
        }
        Ok(ask)
    }
}

/// The answer that a request wants gone on with, taken off its messages.
fn begun(body: &mut Body) -> Result<Option<String>, Refusal> {
    if body.continue_final_message != Some(true) {
        return Ok(None);
    }
    if body.add_generation_prompt != Some(false) {
        let message = "`continue_final_message` needs `add_generation_prompt: false`.";
        return Err(Refusal::invalid(message, Some("add_generation_prompt")));
    }
    let last = body.messages.as_mut().and_then(Vec::pop).filter(|last| last.role == "assistant");
    let text = last.and_then(|last| last.content).as_ref().map(text_of);
    text.map(Some).ok_or_else(|| Refusal::invalid("The final message is not one of the assistant.", Some("messages")))
}

/// The text the engine would see: tools, then each message as role and text, then the opening of the answer.
fn chat_prompt(messages: Option<&[Message]>, tools: Option<&[Value]>) -> Result<String, Refusal> {
    let messages = messages.unwrap_or_default();
    if messages.is_empty() {
        return Err(Refusal::invalid("`messages` must hold at least one message.", Some("messages")));
    }
    let mut prompt = String::new();
    for tool in tools.unwrap_or_default() {
        prompt.push_str(&tool.to_string());
        prompt.push('\n');
    }
    for message in messages {
        prompt.push_str(&message.role);
        prompt.push('\n');
        match &message.content {
            Some(Value::String(text)) => prompt.push_str(text),
            Some(Value::Array(parts)) => parts.iter().for_each(|part| match part.get("text") {
                Some(Value::String(text)) => prompt.push_str(text),
                _ => prompt.push_str(&part.to_string()),
            }),
            Some(Value::Null) | None => {}
            Some(_) => return Err(Refusal::invalid("`content` must be a text or a list of parts.", Some("messages"))),
        }
        if let Some(calls) = &message.tool_calls {
            prompt.push_str(&calls.to_string());
        }
        prompt.push('\n');
    }
    prompt.push_str("assistant\n");
    Ok(prompt)
}

fn text_prompt(prompt: Option<&Value>) -> Result<String, Refusal> {
    match prompt {
        Some(Value::String(text)) => Ok(text.clone()),
        Some(Value::Array(parts)) => Ok(parts.iter().map(text_of).collect::<Vec<_>>().join(" ")),
        _ => Err(Refusal::invalid("`prompt` must be a text or a list.", Some("prompt"))),
    }
}

/// A text as it is, anything else (token numbers) as JSON.
pub(crate) fn text_of(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), ToOwned::to_owned)
}

fn tool_call(tools: Option<&[Value]>, choice: Option<&Value>, seed: u64) -> Option<(ToolCall, String)> {
    let tools = tools?;
    let wanted = match choice {
        Some(Value::String(word)) if word == "none" => return None,
        Some(Value::Object(_)) => choice?.pointer("/function/name")?.as_str(),
        _ => None,
    };
    let functions = || tools.iter().filter_map(|tool| tool.get("function"));
    let function = match wanted {
        Some(name) => functions().find(|function| function.get("name").and_then(Value::as_str) == Some(name))?,
        None => functions().next()?,
    };
    let mut numbers = Numbers::new(seed);
    let arguments: Map<String, Value> = function
        .pointer("/parameters/properties")
        .and_then(Value::as_object)
        .into_iter()
        .flatten()
        .map(|(name, schema)| (name.clone(), value_for(schema, &mut numbers)))
        .collect();
    let name = function.get("name")?.as_str()?.to_owned();
    Some((ToolCall { id: format!("call_{:016x}", numbers.next()), name }, Value::Object(arguments).to_string()))
}

fn value_for(schema: &Value, numbers: &mut Numbers) -> Value {
    if let Some(first) = schema.get("enum").and_then(Value::as_array).and_then(|values| values.first()) {
        return first.clone();
    }
    match schema.get("type").and_then(Value::as_str) {
        Some("integer" | "number") => Value::from(numbers.next() % 100),
        Some("boolean") => Value::Bool(numbers.next().is_multiple_of(2)),
        Some("array") => Value::Array(Vec::new()),
        Some("object") => Value::Object(Map::new()),
        _ => Value::String(words::answer(numbers.next(), 2).concat()),
    }
}

// Arguments come in pieces that respect nothing, like those of an engine.
fn pieces(text: &str) -> Vec<Cow<'static, str>> {
    let chars: Vec<char> = text.chars().collect();
    chars.chunks(5).map(|piece| Cow::Owned(piece.iter().collect())).collect()
}
