//! The call lane: one parsed call, one reservation, attempt after attempt until an answer stands.

use std::sync::Arc;

use bytes::Bytes;
use pingora_core::protocols::http::ServerSession;
use smallvec::SmallVec;
use tokio::time::Instant;
use tollgate_filters::balance::{self, Candidate, Marks};
use tollgate_filters::call::{Call, CallKind};
use tollgate_filters::dialect::Dialect;
use tollgate_filters::error::{GatewayError, Result, Unavailable};
use tollgate_filters::filter::Flow;
use tollgate_filters::metrics::Attempted;
use tollgate_filters::model::{Model, Target};
use tollgate_filters::retry::{Class, Failure};
use tollgate_filters::upstream::{InFlight, Node, Upstream};
use tollgate_filters::usage::{Usage, UsageSource};

use super::attempt::{self, Dispatch, End};
use super::leave::Client;
use super::{Ctx, body, relay, reply};
use crate::gateway::ByteShare;
use crate::runtime::Callee;

/// Bodies from this size on are parsed away from the I/O threads.
const LARGE_BODY: usize = 1 << 20;

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// An answer was sent whole.
    Answered,
    /// The client left before the end.
    ClientGone,
    /// The answer broke off after its beginning had been sent.
    BrokenOff,
}

/// Serves a call from its body to the end of its answer.
pub(crate) async fn serve(client: &mut ServerSession, ctx: &mut Ctx, callee: &Callee) -> Outcome {
    let mut share = ctx.gateway.buffered.share();
    let body = match read_body(client, ctx, &mut share).await {
        Ok(Some(body)) => body,
        Ok(None) => return Outcome::ClientGone,
        Err(error) => {
            // Telling the refusal may take a while; what was read is given back before.
            drop(share);
            return refuse(client, ctx, &error).await;
        }
    };
    ctx.exchange.tally.bytes_in = body.len() as u64;
    match admit(client, ctx, callee, &body).await {
        Ok(Flow::Next) => {}
        Ok(Flow::Answer(answer)) => return sent(reply::send(client, ctx, *answer).await),
        Err(error) => return refuse(client, ctx, &error).await,
    }
    attempts(client, ctx, body, share).await
}

async fn refuse(client: &mut ServerSession, ctx: &mut Ctx, error: &GatewayError) -> Outcome {
    sent(reply::refuse(client, ctx, error).await)
}

fn sent(result: pingora_core::Result<()>) -> Outcome {
    if result.is_ok() { Outcome::Answered } else { Outcome::ClientGone }
}

async fn read_body(client: &mut ServerSession, ctx: &Ctx, share: &mut ByteShare) -> Result<Option<Bytes>> {
    body::check_headers(&client.req_header().headers)?;
    let cap = ctx.route.as_ref().and_then(|r| r.body_bytes).unwrap_or(ctx.runtime.body_bytes);
    body::read(client, cap, share).await
}

/// Parses the call, finds its model and runs it through the filters.
async fn admit(client: &ServerSession, ctx: &mut Ctx, callee: &Callee, body: &Bytes) -> Result<Flow> {
    let Some(route) = ctx.route.clone() else { return Err(GatewayError::Internal) };
    let kind = CallKind::of(route.dialect, client.req_header().uri.path());
    let call = parse(kind, route.dialect, body).await?;
    let model = match callee {
        Callee::Upstream(model) => Arc::clone(model),
        Callee::Models(allowed) => {
            let asked = call.model.as_deref().unwrap_or_default();
            let found = ctx.runtime.models.get(asked).filter(|model| allowed.allows(&model.name));
            Arc::clone(found.ok_or_else(|| GatewayError::ModelNotFound(asked.to_owned()))?)
        }
    };
    ctx.exchange.call = Some(call);
    ctx.exchange.model = Some(model);
    ctx.exchange.body = body.clone();
    let admitted = route.chain.request(&mut ctx.exchange).await;
    ctx.exchange.body = Bytes::new();
    admitted
}

async fn parse(kind: CallKind, dialect: Dialect, body: &Bytes) -> Result<Call> {
    if body.len() < LARGE_BODY {
        return Call::parse(kind, dialect, body);
    }
    let body = body.clone();
    tokio::task::spawn_blocking(move || Call::parse(kind, dialect, &body)).await.map_err(|_| GatewayError::Internal)?
}

/// A node that takes the next attempt.
struct Chosen {
    index: usize,
    target: Target,
    node: Arc<Node>,
    guard: InFlight,
}

/// A node that was asked, and for which target.
struct Tried {
    target: usize,
    node: Arc<Node>,
    /// It did not answer at all: it is not asked for another target either.
    silent: bool,
}

/// Which nodes were tried, and what came of the last one.
struct Course {
    model: Arc<Model>,
    tried: SmallVec<[Tried; 4]>,
    last: Option<Failure>,
    attempts: u32,
}

impl Course {
    /// The next node: those not tried yet of each target in turn. A target goes on to its other nodes whatever
    /// happened; `on` decides whether the next target follows.
    fn next(&self, marks: Marks) -> Option<Chosen> {
        let current = self.tried.last().map_or(0, |tried| tried.target);
        let may_follow = |target: &Target| self.last.as_ref().is_none_or(|failure| target.on.contains(&failure.class));
        let targets = self.model.targets.iter().enumerate().skip(current);
        targets
            .filter(|(index, target)| *index == current || may_follow(target))
            .find_map(|(index, _)| self.pick(index, marks))
    }

    fn was_tried(&self, target: usize, node: &Arc<Node>) -> bool {
        self.tried.iter().any(|tried| Arc::ptr_eq(&tried.node, node) && (tried.target == target || tried.silent))
    }

    fn pick(&self, index: usize, marks: Marks) -> Option<Chosen> {
        let target = self.model.targets.get(index)?;
        let upstream = &target.upstream;
        let mut nodes: SmallVec<[&Arc<Node>; 16]> =
            upstream.nodes.iter().filter(|n| n.weight > 0 && !self.was_tried(index, n)).collect();
        while !nodes.is_empty() {
            let candidates: SmallVec<[Candidate; 16]> = nodes
                .iter()
                .map(|n| Candidate { inflight: n.state.inflight(), weight: n.weight, seed: n.seed })
                .collect();
            let chosen = balance::pick(upstream.policy, &candidates, marks)?;
            let node = Arc::clone(nodes.get(chosen)?);
            if let Some(guard) = node.state.try_enter(upstream.pool.concurrency) {
                return Some(Chosen { index, target: target.clone(), node, guard });
            }
            nodes.remove(chosen);
        }
        None
    }
}

async fn attempts(client: &mut ServerSession, ctx: &mut Ctx, body: Bytes, share: ByteShare) -> Outcome {
    let Some(model) = ctx.exchange.model.clone() else { return refuse(client, ctx, &GatewayError::Internal).await };
    let retry = model.retry;
    let mut course = Course { model, tried: SmallVec::new(), last: None, attempts: 0 };
    let mut request = Dispatch::new(client, ctx, body, share);
    let mut watched = Client::new(client, ctx);
    let marks = marks(ctx);
    while course.attempts < retry.attempts {
        let Some(chosen) = course.next(marks) else { break };
        course.attempts += 1;
        note(ctx, &course, &chosen);
        let Chosen { index, target, node, guard } = chosen;
        let began = Instant::now();
        let gateway = Arc::clone(&ctx.gateway);
        let ended = tokio::select! {
            biased;
            ended = attempt::run(&mut watched, ctx, &mut request, (&target, &node), guard) => ended,
            () = gateway.cut.wait() => {
                ctx.exchange.tally.upstream_time += began.elapsed();
                observe_attempt(ctx, &target.upstream, &node, Attempted::Aborted);
                return refuse(watched.session(), ctx, &GatewayError::Unavailable(Unavailable::Draining)).await;
            }
        };
        match ended {
            Ok(answer) => {
                let refused = answer.status.is_client_error();
                let outcome = if refused { Attempted::ClientError } else { Attempted::Ok };
                observe_attempt(ctx, &target.upstream, &node, outcome);
                // Nothing is sent again from here on: a large body is not held while the answer streams.
                let prompt = request.prompt().filter(|_| !answer.meter.states_input());
                return relay::run(watched, ctx, answer, prompt).await;
            }
            Err(End::ClientGone) => {
                observe_attempt(ctx, &target.upstream, &node, Attempted::Aborted);
                ctx.exchange.tally.upstream_time += began.elapsed();
                note_prompt(ctx, request.body()).await;
                return Outcome::ClientGone;
            }
            Err(End::Failed(failure)) => {
                if let Some(reservation) = &mut ctx.exchange.reservation {
                    reservation.failed();
                }
                ctx.exchange.tally.dispatched = false;
                ctx.exchange.tally.upstream_time += began.elapsed();
                observe_attempt(ctx, &target.upstream, &node, failure.class.into());
                node.state.failed();
                tracing::info!(
                    request_id = ctx.exchange.arrival.request_id.as_str(), upstream = &*target.upstream.name, node = &*node.name,
                    class = failure.class.as_str(), detail = %failure.detail, "attempt failed"
                );
                let final_word = !may_try_elsewhere(&target.upstream, &failure);
                let silent = matches!(failure.class, Class::Connect | Class::Timeout | Class::FirstToken);
                course.tried.push(Tried { target: index, node, silent });
                course.last = Some(failure);
                if final_word || watched.is_gone() {
                    break;
                }
            }
        }
    }
    if watched.is_gone() {
        return Outcome::ClientGone;
    }
    let error = course.last.map_or(GatewayError::Unavailable(Unavailable::NoHealthyUpstream), Failure::into_error);
    refuse(watched.session(), ctx, &error).await
}

/// A call that was sent costs its prompt, even if its client did not wait for a token.
async fn note_prompt(ctx: &mut Ctx, body: &Bytes) {
    if ctx.exchange.tally.dispatched && ctx.exchange.tally.usage.is_none() {
        ctx.exchange.count_prompt(body).await;
        let input = ctx.exchange.prompt_tokens();
        let source = if ctx.exchange.prompt_counted.is_some() { UsageSource::Counted } else { UsageSource::Estimated };
        ctx.exchange.tally.usage = Some(Usage { input, source, ..Usage::default() });
    }
}

/// A Dify run must not start twice: it is tried elsewhere only if it surely did not start.
fn may_try_elsewhere(upstream: &Upstream, failure: &Failure) -> bool {
    upstream.dialect != Dialect::Dify || failure.unprocessed
}

fn marks(ctx: &Ctx) -> Marks {
    let call = ctx.exchange.call.as_ref();
    let session = call.and_then(|c| c.user.as_deref()).map(tollgate_filters::balance::session_mark);
    let turn = ctx.exchange.model.as_ref().and_then(|m| m.targets.first()).map_or(0, |t| t.upstream.next_turn());
    Marks { anchor: call.map_or(0, |c| c.anchor), session, random: rand::random(), turn }
}

fn note(ctx: &mut Ctx, course: &Course, chosen: &Chosen) {
    let tally = &mut ctx.exchange.tally;
    if let (Some(failure), Some(from)) = (&course.last, &tally.upstream)
        && **from != *chosen.target.upstream.name
    {
        ctx.gateway.metrics.fallback(&course.model.name, from, &chosen.target.upstream.name, failure.class.into());
    }
    tally.attempts = course.attempts;
    tally.upstream = Some(Arc::clone(&chosen.target.upstream.name));
    tally.node = Some(Arc::clone(&chosen.node.name));
    ctx.exchange.target = Some(chosen.target.clone());
    tally.target_model = Some(Arc::clone(&chosen.target.model));
}

fn observe_attempt(ctx: &Ctx, upstream: &Upstream, node: &Node, outcome: Attempted) {
    if let Some(handles) = ctx.runtime.node(&upstream.name, &node.name) {
        handles.attempted(outcome);
    }
}
