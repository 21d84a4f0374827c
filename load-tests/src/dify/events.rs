//! The answers of an app, as one JSON document or as the events of a stream.

use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::node::Plan;
use crate::talk::Step;

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    Chat,
    Completion,
    Workflow,
}

/// One run of an app, with everything its answer depends on.
pub(crate) struct AppRun {
    pub(crate) mode: Mode,
    pub(crate) plan: Plan,
    pub(crate) created: u64,
    pub(crate) task: String,
    /// The id of the message, or of the workflow run.
    pub(crate) id: String,
    pub(crate) conversation: String,
    pub(crate) user: String,
    pub(crate) inputs: Map<String, Value>,
    pub(crate) prompt_tokens: usize,
    pub(crate) tokens: Vec<&'static str>,
    pub(crate) seconds: f64,
}

// The fields stand in the order in which Dify writes them.
#[derive(Serialize)]
struct Event<'a> {
    event: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    conversation_id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    message_id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    created_at: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    workflow_run_id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    task_id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<&'a str>,
    #[serde(flatten)]
    rest: Value,
}

impl AppRun {
    fn text(&self) -> String {
        self.tokens.concat()
    }

    fn usage(&self) -> Value {
        let (prompt, completion) = if self.plan.usage_zero { (0, 0) } else { (self.prompt_tokens, self.tokens.len()) };
        json!({
            "prompt_tokens": prompt, "prompt_unit_price": "0", "prompt_price_unit": "0", "prompt_price": "0E-7",
            "completion_tokens": completion, "completion_unit_price": "0", "completion_price_unit": "0",
            "completion_price": "0E-7", "total_tokens": prompt + completion, "total_price": "0E-7", "currency": "USD",
            "latency": self.seconds, "time_to_first_token": null, "time_to_generate": null,
        })
    }

    fn total_tokens(&self) -> usize {
        if self.plan.usage_zero || self.plan.no_usage { 0 } else { self.prompt_tokens + self.tokens.len() }
    }

    fn metadata(&self) -> Value {
        let mut metadata = json!({"annotation_reply": null, "retriever_resources": []});
        if let Some(fields) = metadata.as_object_mut().filter(|_| !self.plan.no_usage) {
            fields.insert("usage".to_owned(), self.usage());
        }
        metadata
    }

    fn event(&self, event: &str, rest: Value) -> Vec<u8> {
        let message = self.mode != Mode::Workflow;
        let event = Event {
            event,
            conversation_id: (self.mode == Mode::Chat).then_some(self.conversation.as_str()),
            message_id: message.then_some(self.id.as_str()),
            created_at: message.then_some(self.created),
            workflow_run_id: (!message).then_some(self.id.as_str()),
            task_id: (event != "error").then_some(self.task.as_str()),
            id: (message && event != "error").then_some(self.id.as_str()),
            rest,
        };
        // Only maps with keys that are not strings fail, and there are none.
        self.plan.event(&serde_json::to_vec(&event).unwrap_or_default())
    }

    /// The answer of a blocking run.
    pub(crate) fn whole(&self) -> Value {
        let mode = match self.mode {
            Mode::Chat => "chat",
            Mode::Completion => "completion",
            Mode::Workflow => {
                let mut data = self.finished();
                if let Some(fields) = data.as_object_mut() {
                    fields.retain(|name, _| !matches!(name.as_str(), "created_by" | "exceptions_count" | "files"));
                }
                return json!({"task_id": self.task, "workflow_run_id": self.id, "data": data});
            }
        };
        let mut answer = json!({
            "event": "message", "task_id": self.task, "id": self.id, "message_id": self.id, "mode": mode,
            "answer": self.text(), "metadata": self.metadata(), "created_at": self.created,
        });
        if let Some(fields) = answer.as_object_mut().filter(|_| self.mode == Mode::Chat) {
            fields.insert("conversation_id".to_owned(), json!(self.conversation));
        }
        answer
    }

    fn finished(&self) -> Value {
        json!({
            "id": self.id, "workflow_id": WORKFLOW, "status": "succeeded", "outputs": {"text": self.text()}, "error": null,
            "elapsed_time": self.seconds, "total_tokens": self.total_tokens(), "total_steps": 3,
            "created_by": {"id": END_USER, "user": self.user}, "created_at": self.created, "finished_at": self.created,
            "exceptions_count": 0, "files": [],
        })
    }

    fn node(&self, event: &str, kind: &str, outputs: Option<Value>) -> Step {
        let mut data = json!({
            "id": format!("{}-{kind}", self.id), "node_id": kind, "node_type": kind, "title": kind, "index": 1,
            "predecessor_node_id": null, "inputs": null, "created_at": self.created, "iteration_id": null, "loop_id": null,
        });
        if let (Some(fields), Some(outputs)) = (data.as_object_mut(), outputs) {
            let process = match kind {
                "llm" if !self.plan.no_usage => json!({"model_mode": "chat", "usage": self.usage()}),
                _ => json!({}),
            };
            for (name, value) in [
                ("process_data", process),
                ("outputs", outputs),
                ("status", json!("succeeded")),
                ("error", Value::Null),
                ("elapsed_time", json!(self.seconds)),
                ("finished_at", json!(self.created)),
                ("files", json!([])),
            ] {
                fields.insert(name.to_owned(), value);
            }
        }
        Step::event(self.event(event, json!({"data": data})))
    }

    fn opening(&self) -> Vec<Step> {
        let mut steps = Vec::new();
        if self.mode == Mode::Workflow {
            steps.push(Step::event(ping(&self.plan)));
            let data = json!({"id": self.id, "workflow_id": WORKFLOW, "inputs": self.inputs, "created_at": self.created,
                "reason": "initial"});
            steps.push(Step::event(self.event("workflow_started", json!({"data": data}))));
            steps.push(self.node("node_started", "start", None));
            steps.push(self.node("node_finished", "start", Some(json!(self.inputs))));
            steps.push(self.node("node_started", "llm", None));
        }
        if self.plan.error_event {
            let rest = json!({"code": "completion_request_error", "status": 400, "message": "Simulated fault."});
            steps.push(Step::event(self.event("error", rest)));
        }
        if let Some(pause) = self.plan.slow_token {
            steps.push(Step::Wait(pause));
        }
        steps
    }

    fn ending(&self) -> Vec<Step> {
        match self.mode {
            Mode::Chat | Mode::Completion => {
                let rest = json!({"metadata": self.metadata(), "files": null});
                vec![Step::event(self.event("message_end", rest))]
            }
            Mode::Workflow => {
                let text = json!({"text": self.text()});
                vec![
                    self.node("node_finished", "llm", Some(text.clone())),
                    self.node("node_started", "end", None),
                    self.node("node_finished", "end", Some(text)),
                    Step::event(self.event("workflow_finished", json!({"data": self.finished()}))),
                ]
            }
        }
    }

    fn at(&self, step: usize) -> Vec<Step> {
        let last = step == self.tokens.len();
        if self.plan.cut == Some(step) || (last && self.plan.cut.is_some()) {
            return vec![Step::Cut];
        }
        if self.plan.stall == Some(step) || (last && self.plan.stall.is_some()) {
            return vec![Step::Stall];
        }
        let Some(token) = self.tokens.get(step) else { return self.ending() };
        let event = match self.mode {
            Mode::Workflow => {
                let data = json!({"text": token, "from_variable_selector": ["llm", "text"]});
                self.event("text_chunk", json!({"data": data}))
            }
            _ => self.event("message", json!({"answer": token, "from_variable_selector": null})),
        };
        vec![Step::Decode, Step::token(event)]
    }

    /// The answer as the steps of a stream.
    pub(crate) fn stream(self) -> impl Iterator<Item = Step> + Send + 'static {
        let over = self.plan.error_event;
        let rest = (0..=self.tokens.len()).take_while(move |_| !over);
        self.opening().into_iter().chain(rest.flat_map(move |step| self.at(step)))
    }
}

const WORKFLOW: &str = "5f0c2a52-6f0e-4a1e-9d39-1f6a3e0f7b11";
const END_USER: &str = "c2b7f0d4-8b1d-4f7e-a7a5-0a4d3b8e6c22";

/// The ping event: a name and no data.
pub(crate) fn ping(plan: &Plan) -> &'static [u8] {
    if plan.crlf { b"event: ping\r\n\r\n" } else { b"event: ping\n\n" }
}
