//! An answer written out: as one JSON document or as the events of a stream.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;
use serde_json::{Value, json};

use super::ask::{Ask, Kind};
use super::fail::Refusal;
use super::fault::Plan;
use crate::talk::Step;

/// Everything the bytes of an answer depend on.
pub(crate) struct Script {
    pub(crate) id: String,
    pub(crate) created: u64,
    pub(crate) fingerprint: String,
    pub(crate) ask: Ask,
    pub(crate) plan: Plan,
    pub(crate) prompt_tokens: usize,
    /// Set once prefill is over.
    pub(crate) cached: Arc<AtomicU64>,
}

#[derive(Serialize)]
struct Answer<'a, C> {
    id: &'a str,
    object: &'a str,
    created: u64,
    model: &'a str,
    system_fingerprint: &'a str,
    choices: Vec<C>,
    // Absent, null or given.
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<Usage>>,
}

#[derive(Serialize)]
struct Usage {
    prompt_tokens: u64,
    completion_tokens: u64,
    total_tokens: u64,
    prompt_tokens_details: Details,
}

#[derive(Serialize)]
struct Details {
    cached_tokens: u64,
}

/// One choice of a chunk or of a whole answer; which of `delta`, `message` and `text` is there makes the shape.
#[derive(Serialize, Default)]
struct Choice<'a> {
    index: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    delta: Option<Delta<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    message: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    text: Option<&'a str>,
    logprobs: Option<()>,
    finish_reason: Option<&'a str>,
}

#[derive(Serialize, Default)]
struct Delta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tool_calls: Option<Value>,
}

impl Script {
    /// Tokens of the longest choice.
    pub(crate) fn steps(&self) -> usize {
        if self.plan.empty { 0 } else { self.ask.choices.iter().map(Vec::len).max().unwrap_or(0) }
    }

    /// Tokens made once `step` tokens of every choice were.
    pub(crate) fn made(&self, step: usize) -> usize {
        if self.plan.empty { 0 } else { self.ask.choices.iter().map(|choice| choice.len().min(step)).sum() }
    }

    pub(crate) fn cut_short(&self) -> bool {
        self.ask.finish == "length"
    }

    fn usage(&self, step: usize) -> Usage {
        let made = self.made(step) as u64;
        let (prompt_tokens, completion_tokens, cached_tokens) = if self.plan.usage_zero {
            (0, 0, 0)
        } else {
            (self.prompt_tokens as u64, made, self.cached.load(Ordering::Relaxed))
        };
        Usage {
            prompt_tokens,
            completion_tokens,
            total_tokens: prompt_tokens + completion_tokens,
            prompt_tokens_details: Details { cached_tokens },
        }
    }

    fn document(&self, object: &str, choices: Vec<Choice<'_>>, usage: Option<Option<Usage>>) -> Vec<u8> {
        let answer = Answer {
            id: &self.id,
            object,
            created: self.created,
            model: &self.ask.model,
            system_fingerprint: &self.fingerprint,
            choices,
            usage,
        };
        // Only maps with keys that are not strings fail, and there are none.
        serde_json::to_vec(&answer).unwrap_or_default()
    }

    /// The answer as one JSON document.
    pub(crate) fn whole(&self) -> Vec<u8> {
        let choices = self.ask.choices.iter().enumerate().map(|(index, tokens)| {
            let text = if self.plan.empty { String::new() } else { tokens.concat() };
            (index, text)
        });
        let texts: Vec<(usize, String)> = choices.collect();
        let choices = texts
            .iter()
            .map(|(index, text)| {
                let base = Choice { index: *index, finish_reason: Some(self.ask.finish), ..Choice::default() };
                match self.ask.kind {
                    Kind::Text => Choice { text: Some(text), ..base },
                    Kind::Chat => Choice { message: Some(self.message(*index, text)), ..base },
                }
            })
            .collect();
        let object = match self.ask.kind {
            Kind::Chat => "chat.completion",
            Kind::Text => "text_completion",
        };
        let usage = if self.plan.no_usage { None } else { Some(Some(self.usage(usize::MAX))) };
        let mut body = self.document(object, choices, usage);
        if self.plan.malformed {
            body.truncate(body.len() / 2);
        }
        body
    }

    fn message(&self, index: usize, text: &str) -> Value {
        match &self.ask.tool {
            Some(tool) => json!({"role": "assistant", "content": null, "refusal": null, "tool_calls": [
                {"id": self.call_id(index), "type": "function", "function": {"name": tool.name, "arguments": text}}
            ]}),
            None => json!({"role": "assistant", "content": text, "refusal": null}),
        }
    }

    fn call_id(&self, index: usize) -> String {
        let id = self.ask.tool.as_ref().map_or("", |tool| tool.id.as_str());
        if index == 0 { id.to_owned() } else { format!("{id}_{index}") }
    }

    fn chunk(&self, choices: Vec<Choice<'_>>, step: usize) -> Vec<u8> {
        let object = match self.ask.kind {
            Kind::Chat => "chat.completion.chunk",
            Kind::Text => "text_completion",
        };
        let usage = match (self.ask.include_usage && !self.plan.no_usage, self.ask.continuous_usage) {
            (false, _) => None,
            (true, true) => Some(Some(self.usage(step))),
            (true, false) => Some(None),
        };
        self.plan.event(&self.document(object, choices, usage))
    }

    fn delta(&self, index: usize, delta: Delta<'_>) -> Vec<u8> {
        self.chunk(vec![Choice { index, delta: Some(delta), ..Choice::default() }], 0)
    }

    /// The answer as the steps of a stream.
    pub(crate) fn stream(self: Arc<Self>) -> impl Iterator<Item = Step> + Send + 'static {
        let last = self.steps();
        let opening = self.opening();
        let over = self.plan.error_event || self.plan.empty;
        let rest = (0..=last).take_while(move |_| !over).flat_map(move |step| self.at(step, last));
        opening.into_iter().chain(rest)
    }

    fn opening(&self) -> Vec<Step> {
        let mut steps = Vec::new();
        if self.plan.error_event {
            let error = Refusal::status(500, None).body().to_string();
            steps.extend([Step::event(self.plan.event(error.as_bytes())), Step::event(self.plan.event(b"[DONE]"))]);
            return steps;
        }
        // With a late first token the role chunk comes at once, else when prefill has made the first token.
        if self.plan.slow_token.is_none() {
            steps.push(Step::Prefill);
        }
        if self.plan.malformed {
            steps.push(Step::event(self.plan.event(br#"{"id":"chatcmpl-broken","choices":[{"index":0,"delta":"#)));
        }
        if self.ask.kind == Kind::Chat {
            for index in 0..self.ask.choices.len() {
                let opening = Delta { role: Some("assistant"), content: Some(""), ..Delta::default() };
                steps.push(Step::event(self.delta(index, opening)));
            }
        }
        if let Some(pause) = self.plan.slow_token {
            steps.extend([Step::Wait(pause), Step::Prefill]);
        }
        if let Some(tool) = self.ask.tool.as_ref().filter(|_| !self.plan.empty) {
            for index in 0..self.ask.choices.len() {
                let call = json!([{"index": 0, "id": self.call_id(index), "type": "function",
                    "function": {"name": tool.name, "arguments": ""}}]);
                steps.push(Step::event(self.delta(index, Delta { tool_calls: Some(call), ..Delta::default() })));
            }
        }
        steps
    }

    fn at(&self, step: usize, last: usize) -> Vec<Step> {
        if self.plan.cut == Some(step) || (step == last && self.plan.cut.is_some()) {
            return vec![Step::Cut];
        }
        if self.plan.stall == Some(step) || (step == last && self.plan.stall.is_some()) {
            return vec![Step::Stall];
        }
        let failing = self.plan.error_after.map(|after| after.min(last));
        if failing.is_some_and(|after| step >= after) {
            let error = Refusal::status(500, None).body().to_string();
            let event = Step::event(self.plan.event(error.as_bytes()));
            return if failing == Some(step) { vec![event] } else { Vec::new() };
        }
        let mut steps = Vec::new();
        if self.plan.garbage.map(|after| after.min(last)) == Some(step) {
            steps.push(Step::event(self.plan.event(br#"{"id":"chatcmpl-broken","choices":[{"index":0,"delta":"#)));
        }
        if step == last {
            steps.extend(self.ending());
            return steps;
        }
        steps.push(Step::Decode);
        for (index, tokens) in self.ask.choices.iter().enumerate() {
            if let Some(token) = tokens.get(step) {
                let base = Choice { index, ..Choice::default() };
                let choice = match self.ask.kind {
                    Kind::Text => Choice { text: Some(token), ..base },
                    Kind::Chat => Choice { delta: Some(self.token(token)), ..base },
                };
                steps.push(Step::token(self.chunk(vec![choice], step + 1)));
            }
        }
        steps
    }

    fn token<'a>(&self, text: &'a str) -> Delta<'a> {
        match self.ask.tool {
            Some(_) => {
                let calls = json!([{"index": 0, "function": {"arguments": text}}]);
                Delta { tool_calls: Some(calls), ..Delta::default() }
            }
            None => Delta { content: Some(text), ..Delta::default() },
        }
    }

    fn ending(&self) -> Vec<Step> {
        let mut steps = vec![Step::Finished { cut_short: self.cut_short() }];
        for index in 0..self.ask.choices.len() {
            let base = Choice { index, finish_reason: Some(self.ask.finish), ..Choice::default() };
            let choice = match self.ask.kind {
                Kind::Text => Choice { text: Some(""), ..base },
                Kind::Chat => Choice { delta: Some(Delta::default()), ..base },
            };
            steps.push(Step::event(self.chunk(vec![choice], usize::MAX)));
        }
        if let Some(pause) = self.plan.slow_usage {
            steps.push(Step::Wait(pause));
        }
        if self.ask.include_usage && !self.plan.no_usage {
            let object = if self.ask.kind == Kind::Chat { "chat.completion.chunk" } else { "text_completion" };
            let chunk = self.document(object, Vec::new(), Some(Some(self.usage(usize::MAX))));
            steps.push(Step::event(self.plan.event(&chunk)));
        }
        if self.plan.open_end {
            steps.push(Step::Stall);
        } else if !self.plan.no_done {
            steps.push(Step::event(self.plan.event(b"[DONE]")));
        }
        steps
    }
}
