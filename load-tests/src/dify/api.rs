//! The app's endpoints.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::stream::BoxStream;
use futures::{StreamExt, stream};
use http::header::{AUTHORIZATION, HeaderMap, HeaderValue, RETRY_AFTER, WWW_AUTHENTICATE};
use http::{Method, Request, Response, StatusCode};
use hyper::body::Incoming;
use parking_lot::Mutex;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use xxhash_rust::xxh3::xxh3_64;

use super::DifyConfig;
use super::events::{AppRun, Mode, ping};
use crate::node::{EVENTS, Fault, Numbers, Plan, Run, asked_by_header, now, tokens_of, words};
use crate::record::{CallGuard, Ending, Journal};
use crate::serve::{self, Peer, Reply};
use crate::talk::talk;

pub(crate) struct App {
    pub(crate) config: DifyConfig,
    pub(crate) journal: Arc<Journal>,
    pub(crate) fault: Mutex<Option<Fault>>,
    pub(crate) ids: Mutex<Numbers>,
}

#[derive(Deserialize)]
struct Body {
    #[serde(default)]
    inputs: Map<String, Value>,
    query: Option<String>,
    response_mode: Option<String>,
    conversation_id: Option<String>,
    user: Option<String>,
}

/// An error as Dify writes it.
struct Refusal(u16, &'static str, String);

impl Refusal {
    fn param(message: impl Into<String>) -> Self {
        Self(400, "invalid_param", message.into())
    }

    fn answer(&self, call: CallGuard) -> Response<Reply> {
        let status = StatusCode::from_u16(self.0).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = Reply::json(status, &json!({"code": self.1, "message": self.2, "status": self.0}), call);
        if status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer realm=\"api\""));
        }
        response
    }
}

impl serve::App for App {
    async fn answer(self: Arc<Self>, request: Request<Incoming>, peer: Peer) -> Response<Reply> {
        let (head, body) = request.into_parts();
        let mut call = self.journal.open(&head, peer.connection);
        let Some(body) = call.read(body).await else {
            call.finish(Ending::Abandoned);
            return Refusal::param("The body ended early.").answer(call);
        };
        if !self.known(&head.headers) {
            return Refusal(401, "unauthorized", "Access token is invalid".to_owned()).answer(call);
        }
        let mode = match (head.method.clone(), head.uri.path()) {
            (Method::GET, path) => return self.get(path, call),
            (Method::POST, "/v1/chat-messages") => Mode::Chat,
            (Method::POST, "/v1/completion-messages") => Mode::Completion,
            (Method::POST, "/v1/workflows/run") => Mode::Workflow,
            (Method::POST, path) if path.ends_with("/stop") => {
                return Reply::json(StatusCode::OK, &json!({"result": "success"}), call);
            }
            _ => return not_found().answer(call),
        };
        let mut plan = Plan::default();
        if let Some(fault) = self.fault.lock().as_ref() {
            plan.add(fault);
        }
        match asked_by_header(&head.headers, &mut plan).map_err(Refusal::param).and_then(|()| read(mode, &body)) {
            Ok(body) => self.run(mode, body, plan, call, peer).await,
            Err(refusal) => refusal.answer(call),
        }
    }
}

fn not_found() -> Refusal {
    Refusal(404, "not_found", "No such path, or not with this method.".to_owned())
}

fn read(mode: Mode, body: &[u8]) -> Result<Body, Refusal> {
    let body: Body = serde_json::from_slice(body).map_err(|error| Refusal::param(error.to_string()))?;
    if body.user.as_deref().unwrap_or_default().is_empty() {
        return Err(Refusal::param("Arg user must be provided."));
    }
    if mode == Mode::Chat && body.query.is_none() {
        return Err(Refusal::param("query is required."));
    }
    if !matches!(body.response_mode.as_deref(), None | Some("blocking" | "streaming")) {
        return Err(Refusal::param("response_mode must be blocking or streaming."));
    }
    Ok(body)
}

impl App {
    fn known(&self, headers: &HeaderMap) -> bool {
        let key = headers.get(AUTHORIZATION).and_then(|value| value.to_str().ok()?.strip_prefix("Bearer "));
        key.is_some_and(|key| match self.config.keys.is_empty() {
            true => key.starts_with("app-"),
            false => self.config.keys.iter().any(|known| known == key),
        })
    }

    fn get(&self, path: &str, call: CallGuard) -> Response<Reply> {
        let body = match path {
            "/v1/parameters" => json!({
                "opening_statement": "", "suggested_questions": [],
                "suggested_questions_after_answer": {"enabled": false}, "speech_to_text": {"enabled": false},
                "text_to_speech": {"enabled": false}, "retriever_resource": {"enabled": false},
                "annotation_reply": {"enabled": false}, "more_like_this": {"enabled": false}, "user_input_form": [],
                "sensitive_word_avoidance": {"enabled": false}, "file_upload": {"enabled": false},
                "system_parameters": {"file_size_limit": 15, "image_file_size_limit": 10},
            }),
            "/v1/info" => {
                json!({"name": self.config.name, "description": "A simulated app.", "tags": [], "mode": "chat",
                "author_name": "simulator"})
            }
            "/v1/meta" => json!({"tool_icons": {}}),
            _ => return not_found().answer(call),
        };
        Reply::json(StatusCode::OK, &body, call)
    }

    async fn run(&self, mode: Mode, body: Body, plan: Plan, mut call: CallGuard, peer: Peer) -> Response<Reply> {
        if plan.refuse {
            peer.hang_up(&mut call).await;
        }
        if let Some(pause) = plan.slow_header {
            tokio::time::sleep(pause).await;
        }
        if let Some((status, retry_after)) = plan.status {
            let code = if status == 429 { "too_many_requests" } else { "internal_server_error" };
            let mut response = Refusal(status, code, "Simulated fault.".to_owned()).answer(call);
            if let Some(after) = retry_after {
                response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(after));
            }
            return response;
        }
        let streaming = body.response_mode.as_deref() == Some("streaming");
        let run = self.app_run(mode, body, plan);
        call.edit(|row| row.prompt_tokens = run.prompt_tokens as u64);
        let mut pace = Run::fixed(self.config.per_token);
        if streaming {
            let crlf = ping(&run.plan);
            let events = talk(call, peer, pace, run.stream());
            return Reply::stream(EVENTS, with_pings(events, self.config.ping_every, crlf));
        }
        if run.plan.error_event {
            return Refusal(400, "completion_request_error", "Simulated fault.".to_owned()).answer(call);
        }
        if let Some(pause) = run.plan.slow_token {
            tokio::time::sleep(pause).await;
        }
        for _ in &run.tokens {
            pace.step().await;
            call.generated(1);
        }
        if run.plan.stall.is_some() {
            std::future::pending::<()>().await;
        }
        if run.plan.cut.is_some() {
            peer.hang_up(&mut call).await;
        }
        Reply::json(StatusCode::OK, &run.whole(), call)
    }

    fn app_run(&self, mode: Mode, body: Body, plan: Plan) -> AppRun {
        let inputs = Value::Object(body.inputs.clone()).to_string();
        let query = [inputs.as_str(), body.query.as_deref().unwrap_or_default()].concat();
        let conversation = body.conversation_id.filter(|id| !id.is_empty());
        AppRun {
            mode,
            plan,
            created: now(),
            task: self.uuid(),
            id: self.uuid(),
            conversation: conversation.unwrap_or_else(|| self.uuid()),
            user: body.user.unwrap_or_default(),
            inputs: body.inputs,
            prompt_tokens: tokens_of(query.len()),
            tokens: words(xxh3_64(query.as_bytes()), self.config.answer_tokens),
            seconds: self.config.per_token.as_secs_f64() * self.config.answer_tokens as f64,
        }
    }

    // In the form of a random UUID (version 4).
    fn uuid(&self) -> String {
        let mut ids = self.ids.lock();
        let (a, b) = (ids.next(), ids.next());
        format!(
            "{:08x}-{:04x}-4{:03x}-a{:03x}-{:012x}",
            a >> 32,
            (a >> 16) & 0xffff,
            a & 0xfff,
            b >> 52,
            b & 0xffff_ffff_ffff
        )
    }
}

/// Puts a ping into every silence of a stream that lasts so long.
fn with_pings(events: BoxStream<'static, Bytes>, every: Duration, ping: &'static [u8]) -> BoxStream<'static, Bytes> {
    let every = every.max(Duration::from_millis(1));
    stream::unfold(events, move |mut events| async move {
        match tokio::time::timeout(every, events.next()).await {
            Ok(next) => next.map(|bytes| (bytes, events)),
            Err(_) => Some((Bytes::from_static(ping), events)),
        }
    })
    .boxed()
}
