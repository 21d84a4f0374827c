//! The node's endpoints.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use futures::StreamExt;
use http::header::{CONTENT_LENGTH, HeaderMap, HeaderValue};
use http::request::Parts;
use http::{Method, Request, Response, StatusCode};
use hyper::body::Incoming;
use parking_lot::Mutex;
use serde_json::{Value, json};

use super::ask::{Ask, Kind};
use super::canned::Canned;
use super::engine::{Engine, Prompt, Run};
use super::fail::Refusal;
use super::fault::{Fault, Plan};
use super::script::Script;
use super::vectors::{Computed, Embeddings, Rerank};
use super::words::Numbers;
use super::{NodeConfig, metrics};
use crate::record::{CallGuard, Ending, Journal};
use crate::serve::{App, Peer, Reply};
use crate::talk::talk;

/// The media type of event streams, as the simulators send it.
pub(crate) const EVENTS: &str = "text/event-stream; charset=utf-8";

pub(crate) struct NodeApp {
    pub(crate) config: NodeConfig,
    pub(crate) engine: Arc<Engine>,
    pub(crate) journal: Arc<Journal>,
    pub(crate) fault: Mutex<Option<Fault>>,
    pub(crate) next_faults: Mutex<VecDeque<Fault>>,
    pub(crate) canned: Option<Canned>,
    pub(crate) ids: Mutex<Numbers>,
}

/// A request with what it takes to answer it.
struct Visit {
    call: CallGuard,
    peer: Peer,
    plan: Plan,
}

impl App for NodeApp {
    async fn answer(self: Arc<Self>, request: Request<Incoming>, peer: Peer) -> Response<Reply> {
        let (head, body) = request.into_parts();
        if let Some(canned) = self.canned.as_ref().filter(|_| head.method == Method::POST) {
            self.journal.count();
            return canned.answer(body).await;
        }
        let mut call = self.journal.open(&head, peer.connection);
        let Some(body) = call.read(body).await else {
            // The peer is gone; nobody reads this.
            call.finish(Ending::Abandoned);
            return Refusal::invalid("The body ended early.", None).answer(call);
        };
        match self.plan(&head) {
            Ok(plan) => self.route(&head, &body, Visit { call, peer, plan }).await,
            Err(refusal) => refusal.answer(call),
        }
    }
}

impl NodeApp {
    /// What the node-wide fault and the header ask for. Node-wide faults touch calls, never probes.
    fn plan(&self, head: &Parts) -> Result<Plan, Refusal> {
        let mut plan = Plan::default();
        if head.method == Method::POST {
            self.next_faults
                .lock()
                .pop_front()
                .iter()
                .chain(self.fault.lock().as_ref())
                .for_each(|fault| plan.add(fault));
        }
        asked_by_header(&head.headers, &mut plan).map_err(|error| Refusal::invalid(&error, None))?;
        Ok(plan)
    }

    async fn route(&self, head: &Parts, body: &Bytes, mut visit: Visit) -> Response<Reply> {
        let path = head.uri.path();
        if head.method == Method::GET {
            visit = match early(visit).await {
                Ok(visit) => visit,
                Err(answer) => return answer,
            };
            return self.get(path, visit.call);
        }
        if head.method != Method::POST {
            return Refusal::not_found().answer(visit.call);
        }
        match path {
            "/v1/chat/completions" => self.complete(Kind::Chat, body, visit).await,
            "/v1/completions" => self.complete(Kind::Text, body, visit).await,
            "/v1/embeddings" => self.embed(body, visit).await,
            "/v1/rerank" | "/v2/rerank" | "/rerank" => self.rerank(body, visit).await,
            _ => Refusal::not_found().answer(visit.call),
        }
    }

    fn get(&self, path: &str, call: CallGuard) -> Response<Reply> {
        match path {
            "/health" => Reply::new(StatusCode::OK, "text/plain", Bytes::new(), call),
            "/metrics" => {
                let text = metrics::text(&self.config, &self.engine);
                Reply::new(StatusCode::OK, "text/plain; version=0.0.4; charset=utf-8", text, call)
            }
            "/v1/models" => {
                let data: Vec<Value> = self.config.models.iter().map(|model| model_row(model)).collect();
                Reply::json(StatusCode::OK, &json!({"object": "list", "data": data}), call)
            }
            _ => match path.strip_prefix("/v1/models/") {
                Some(model) if self.config.models.iter().any(|known| known == model) => {
                    Reply::json(StatusCode::OK, &model_row(model), call)
                }
                Some(model) => Refusal::unknown_model(model).answer(call),
                None => Refusal::not_found().answer(call),
            },
        }
    }

    /// Takes a fault off the model's name (`sim+429`) and checks what is left.
    fn admit(&self, model: &str, plan: &mut Plan) -> Result<(), Refusal> {
        let known = |name: &str| self.config.models.is_empty() || self.config.models.iter().any(|known| known == name);
        match model.split_once('+') {
            Some((base, fault)) if known(base) => {
                let fault: Fault =
                    fault.parse().map_err(|error| Refusal::invalid(&format!("{error}"), Some("model")))?;
                plan.add(&fault);
                Ok(())
            }
            _ if known(model) => Ok(()),
            _ => Err(Refusal::unknown_model(model)),
        }
    }

    async fn complete(&self, kind: Kind, body: &[u8], mut visit: Visit) -> Response<Reply> {
        let mut ask = match Ask::read(kind, body, &self.config)
            .and_then(|ask| self.admit(&ask.model, &mut visit.plan).map(|()| ask))
        {
            Ok(ask) => ask,
            Err(refusal) => return refusal.answer(visit.call),
        };
        if ask.continues && visit.plan.no_continue {
            let message = "`continue_final_message` is not supported by this model.";
            return Refusal::invalid(message, Some("continue_final_message")).answer(visit.call);
        }
        // Without a stream there is no first event: the error is the body.
        visit.plan.error_body |= visit.plan.error_event && !ask.stream;
        let Visit { call, peer, plan } = match early(visit).await {
            Ok(visit) => visit,
            Err(answer) => return answer,
        };
        let tokens = (self.config.count)(&ask.prompt).max(1);
        call.edit(|row| row.prompt_tokens = tokens as u64);
        let Some(seat) = self.engine.enter(tokens, ask.most_output) else { return Refusal::full().answer(call) };
        let answer = ask.choices.first().map(|tokens| tokens.concat()).unwrap_or_default();
        let run = Run::on_engine(seat, Prompt { text: std::mem::take(&mut ask.prompt), tokens, answer });
        let script = Script {
            id: self.id(if kind == Kind::Chat { "chatcmpl-" } else { "cmpl-" }),
            created: now(),
            fingerprint: format!("sim-{}", self.config.name),
            prompt_tokens: tokens,
            cached: run.cached(),
            ask,
            plan,
        };
        if script.ask.stream {
            return Reply::stream(EVENTS, talk(call, peer, run, Arc::new(script).stream()));
        }
        plain(script, run, call, peer).await
    }

    async fn embed(&self, body: &[u8], visit: Visit) -> Response<Reply> {
        match serde_json::from_slice::<Embeddings>(body) {
            Ok(asked) => self.compute(&asked.model, visit, || asked.answer()).await,
            Err(error) => Refusal::invalid(&error.to_string(), None).answer(visit.call),
        }
    }

    async fn rerank(&self, body: &[u8], visit: Visit) -> Response<Reply> {
        match serde_json::from_slice::<Rerank>(body) {
            Ok(asked) => self.compute(&asked.model, visit, || asked.answer(&self.id("rerank-"))).await,
            Err(error) => Refusal::invalid(&error.to_string(), None).answer(visit.call),
        }
    }

    async fn compute(
        &self,
        model: &str,
        mut visit: Visit,
        answer: impl FnOnce() -> Result<Computed, Refusal>,
    ) -> Response<Reply> {
        let computed = match self.admit(model, &mut visit.plan).and_then(|()| answer()) {
            Ok(computed) => computed,
            Err(refusal) => return refusal.answer(visit.call),
        };
        let Visit { call, peer, plan } = match early(visit).await {
            Ok(visit) => visit,
            Err(answer) => return answer,
        };
        call.edit(|row| row.prompt_tokens = computed.tokens as u64);
        let Some(seat) = self.engine.enter(computed.tokens, 0) else { return Refusal::full().answer(call) };
        let prompt = Prompt { text: String::new(), tokens: computed.tokens, answer: String::new() };
        let mut run = Run::on_engine(seat, prompt);
        run.prefill().await;
        run.finished(false);
        let mut body = computed.body;
        if let Some(fields) = body.as_object_mut() {
            if plan.no_usage {
                fields.remove("usage");
            }
            if plan.usage_zero {
                fields.insert("usage".to_owned(), json!({"prompt_tokens": 0, "total_tokens": 0}));
            }
        }
        send_plain(body.to_string().into_bytes(), &plan, call, peer)
    }

    fn id(&self, prefix: &str) -> String {
        let mut ids = self.ids.lock();
        format!("{prefix}{:016x}{:016x}", ids.next(), ids.next())
    }
}

/// Reads the header `x-sim-fault`.
pub(crate) fn asked_by_header(headers: &HeaderMap, plan: &mut Plan) -> Result<(), String> {
    for value in headers.get_all("x-sim-fault") {
        let text = value.to_str().map_err(|_| "x-sim-fault is not plain ASCII.".to_owned())?;
        plan.add(&text.parse::<Fault>().map_err(|error| error.to_string())?);
    }
    Ok(())
}

/// The faults that act before there is an answer.
async fn early(mut visit: Visit) -> Result<Visit, Response<Reply>> {
    let plan = &visit.plan;
    if plan.refuse {
        visit.peer.hang_up(&mut visit.call).await;
    }
    if let Some(pause) = plan.slow_header {
        tokio::time::sleep(pause).await;
    }
    let refusal = match plan.status {
        Some((status, retry_after)) => Some(Refusal::status(status, retry_after)),
        None if plan.context_length => Some(Refusal::context_length()),
        None if plan.content_filter => Some(Refusal::content_filter()),
        None => None,
    };
    if let Some(refusal) = refusal {
        let mut answer = refusal.answer(visit.call);
        answer.headers_mut().extend(visit.plan.headers);
        return Err(answer);
    }
    if plan.error_body {
        return Err(Reply::json(StatusCode::OK, &Refusal::status(500, None).body(), visit.call));
    }
    Ok(visit)
}

/// The answer in one piece, after the time the engine takes.
async fn plain(script: Script, mut run: Run, call: CallGuard, peer: Peer) -> Response<Reply> {
    if let Some(pause) = script.plan.slow_token {
        tokio::time::sleep(pause).await;
    }
    let cached = run.prefill().await;
    call.edit(|row| row.cached_tokens = cached);
    for step in 1..=script.steps() {
        run.step().await;
        let made = (script.made(step) - script.made(step - 1)) as u64;
        run.made(made);
        call.generated(made);
    }
    run.finished(script.cut_short());
    send_plain(script.whole(), &script.plan, call, peer)
}

fn send_plain(body: Vec<u8>, plan: &Plan, mut call: CallGuard, peer: Peer) -> Response<Reply> {
    if plan.cut.is_none() && plan.stall.is_none() {
        return Reply::new(StatusCode::OK, "application/json", body, call);
    }
    let length = body.len();
    let half = Bytes::from(body).slice(..length / 2);
    let cut = plan.cut.is_some();
    // What is missing never comes: the connection is closed, or stays silent until the peer leaves.
    let rest = futures::stream::once(async move {
        tokio::time::sleep(std::time::Duration::from_millis(3)).await;
        if cut {
            peer.hang_up(&mut call).await;
        }
        std::future::pending::<()>().await;
        drop(call);
        Bytes::new()
    });
    let mut response = Reply::stream("application/json", futures::stream::once(async { half }).chain(rest).boxed());
    response.headers_mut().insert(CONTENT_LENGTH, HeaderValue::from(length));
    response
}

fn model_row(model: &str) -> Value {
    json!({"id": model, "object": "model", "created": now(), "owned_by": "sim", "root": model, "parent": null,
        "max_model_len": 131_072})
}

pub(crate) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
