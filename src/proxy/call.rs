//! The call lane: one parsed call, one reservation, attempt after attempt until an answer stands.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use pingora_core::protocols::http::ServerSession;
use tokio::time::Instant;
use tollgate_filters::balance::Marks;
use tollgate_filters::call::{Call, CallKind};
use tollgate_filters::course::{Chosen, Course, Step};
use tollgate_filters::dialect::Dialect;
use tollgate_filters::error::{GatewayError, Result, Unavailable};
use tollgate_filters::filter::Flow;
use tollgate_filters::limit::budget::Drawn;
use tollgate_filters::metrics::Attempted;
use tollgate_filters::model::Target;
use tollgate_filters::retry::{Class, Failure};
use tollgate_filters::upstream::{Credential, Node, Upstream};
use tollgate_filters::usage::{Usage, UsageSource};

use super::attempt::{self, Answer, Dispatch, End, Prompt};
use super::leave::Client;
use super::resume::Resume;
use super::{Ctx, body, relay, reply, wait};
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
    /// The answer broke off after its beginning had been sent, by the upstream's fault.
    BrokenOff,
    /// We cut the answer as the process ends.
    CutOff,
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
    let admitted = admit(client, ctx, callee, &body).await;
    let standings = ctx.exchange.refused.as_ref().or_else(|| ctx.exchange.reservation.as_ref().map(|r| r.standings()));
    if let Some(standings) = standings {
        ctx.gateway.alerts.saw(standings);
    }
    match admitted {
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

/// How an attempt, or a wait between two, ended the call without an answer of an upstream.
pub(super) enum Stop {
    /// Nothing more to try; this is what the client gets.
    Refuse(GatewayError),
    /// The client left.
    ClientGone,
}

/// An answer to relay, and where it comes from.
struct Won {
    answer: Box<Answer>,
    from: Source,
    /// What was drawn of its provider's grant.
    drawn: Option<Drawn>,
}

/// Where an answer comes from.
pub(crate) struct Source {
    /// Place of the target in the model.
    pub(super) index: usize,
    /// The target.
    pub(super) target: Target,
    /// The node.
    pub(super) node: Arc<Node>,
    /// The credential, where the upstream has any.
    pub(super) credential: Option<Credential>,
    /// That the answer broke off was no fault of the node.
    pub(super) blameless: bool,
    /// Its failure has been told to all who must know.
    pub(super) noted: bool,
}

async fn attempts(client: &mut ServerSession, ctx: &mut Ctx, body: Bytes, share: ByteShare) -> Outcome {
    let Some(model) = ctx.exchange.model.clone() else { return refuse(client, ctx, &GatewayError::Internal).await };
    let key = ctx.exchange.arrival.caller.as_ref().map(|caller| Arc::clone(&caller.id));
    let mut course = Course::new(model, ctx.gateway.now()).of(key);
    let mut request = Dispatch::new(client, ctx, body, share);
    let mut watched = Client::new(client, ctx);
    let won = win(&mut watched, ctx, &mut course, &mut request).await;
    match won {
        Ok(won) => {
            let (resume, prompt) = match Resume::of(ctx, course, request, &won.answer) {
                Ok(resume) => (Some(resume), None),
                // Nothing is sent again from here on: a large body is not held while the answer streams.
                Err(request) => (None, request.prompt().filter(|_| !won.answer.meter.states_input())),
            };
            relay_on(watched, ctx, won, prompt, resume).await
        }
        Err(Stop::ClientGone) => {
            note_prompt(ctx, request.body()).await;
            Outcome::ClientGone
        }
        Err(Stop::Refuse(_)) if watched.is_gone() => Outcome::ClientGone,
        Err(Stop::Refuse(error)) => {
            // Telling the refusal may take a while; the body is not needed for that.
            drop(request);
            refuse(watched.session(), ctx, &error).await
        }
    }
}

/// Attempt after attempt until one brings an answer.
async fn win(
    client: &mut Client<'_>,
    ctx: &mut Ctx,
    course: &mut Course,
    request: &mut Dispatch,
) -> std::result::Result<Won, Stop> {
    let marks = marks(ctx);
    // A refusal that a further target might not share; it is passed on if that target fails too.
    let mut kept: Option<Won> = None;
    loop {
        let chosen = match course.next(ctx.gateway.now(), marks, rand::random()) {
            Step::Attempt(chosen) => *chosen,
            Step::Wait(wait) => {
                wait::pause(client, ctx, wait).await?;
                continue;
            }
            Step::Queue(place) => {
                wait::in_line(client, ctx, course, place).await?;
                continue;
            }
            Step::Over(error) => return kept.map(|first| stands(ctx, first)).ok_or(Stop::Refuse(error)),
        };
        let drawn = match wait::for_grant(client, ctx, course, &chosen).await? {
            Ok(drawn) => drawn,
            Err(wait::Withheld) => continue,
        };
        note(ctx, course, &chosen);
        let Chosen { index, target, node, credential, guard, probes } = chosen;
        let began = Instant::now();
        let gateway = Arc::clone(&ctx.gateway);
        let toward = (&target, &*node, credential.as_ref());
        let ended = tokio::select! {
            biased;
            ended = attempt::run(client, ctx, request, toward, guard) => ended,
            () = gateway.cut.wait() => {
                ctx.exchange.tally.upstream_time += began.elapsed();
                observe_attempt(ctx, &target.upstream, &node, Attempted::Aborted);
                return Err(Stop::Refuse(GatewayError::Unavailable(Unavailable::Draining)));
            }
        };
        match ended {
            Ok(mut answer) => match answer.refusal.filter(|class| course.has_taker(index, *class)) {
                None => {
                    target.upstream.succeeded(&node, credential.as_ref());
                    // A further target that refuses as well has nothing to add to the first refusal.
                    if let Some(first) = kept.take_if(|_| answer.status.is_client_error()) {
                        unspent(ctx, began);
                        let outcome = answer.refusal.map_or(Attempted::ClientError, Attempted::from);
                        observe_attempt(ctx, &target.upstream, &node, outcome);
                        return Ok(stands(ctx, first));
                    }
                    return Ok(Won {
                        answer,
                        drawn,
                        from: Source { index, target, node, credential, blameless: false, noted: false },
                    });
                }
                Some(class) => {
                    unspent(ctx, began);
                    answer.guard = None;
                    observe_attempt(ctx, &target.upstream, &node, class.into());
                    let failure = Failure::new(class, "refused; a further target may take it");
                    course.failed(index, &node, credential.as_ref(), failure);
                    if let Some(drawn) = drawn {
                        drawn.used(0);
                    }
                    let from = Source { index, target, node, credential, blameless: false, noted: false };
                    kept.get_or_insert(Won { answer, from, drawn: None });
                }
            },
            Err(End::ClientGone) => {
                observe_attempt(ctx, &target.upstream, &node, Attempted::Aborted);
                ctx.exchange.tally.upstream_time += began.elapsed();
                if let Some(drawn) = drawn.filter(|_| !ctx.exchange.tally.dispatched) {
                    drawn.unsent();
                }
                return Err(Stop::ClientGone);
            }
            Err(End::Failed(failure)) => {
                unspent(ctx, began);
                undrawn(drawn, &failure);
                let outcome = failure.class.into();
                note_failure(ctx, (&target, &node, credential.as_ref()), &failure, outcome, began.elapsed());
                course.failed(index, &node, credential.as_ref(), failure);
            }
        }
        drop(probes);
    }
}

/// The refusal that was kept is the answer after all, and is told as the one of its own target.
fn stands(ctx: &mut Ctx, first: Won) -> Won {
    told_as(ctx, &first.from.target, &first.from.node);
    first
}

/// Gives back what a failed attempt had drawn of its provider's grant: all of it, if the provider never saw the request.
pub(super) fn undrawn(drawn: Option<Drawn>, failure: &Failure) {
    match drawn {
        Some(drawn) if failure.unprocessed => drawn.unsent(),
        Some(drawn) => drawn.used(0),
        None => {}
    }
}

/// The attempt cost no tokens.
fn unspent(ctx: &mut Ctx, began: Instant) {
    if let Some(reservation) = &mut ctx.exchange.reservation {
        reservation.failed();
    }
    ctx.exchange.tally.dispatched = false;
    ctx.exchange.tally.upstream_time += began.elapsed();
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

/// Shows the answer; what becomes of it after its first token still tells of the node.
async fn relay_on(
    client: Client<'_>,
    ctx: &mut Ctx,
    won: Won,
    prompt: Option<Prompt>,
    resume: Option<Resume>,
) -> Outcome {
    let Won { answer, mut from, drawn } = won;
    let refused = answer.status.is_client_error();
    let began = answer.dispatched;
    let outcome = relay::run(client, ctx, answer, &mut from, (prompt, resume)).await;
    if let Some(drawn) = drawn {
        match &ctx.exchange.tally.usage {
            Some(usage) => drawn.used(usage.total()),
            None if refused => drawn.used(0),
            // What was drawn is the best guess there is.
            None => drop(drawn),
        }
    }
    let Source { target, node, credential, blameless, noted, .. } = from;
    match outcome {
        _ if noted => {}
        Outcome::BrokenOff if blameless => observe_attempt(ctx, &target.upstream, &node, Attempted::ClientError),
        Outcome::BrokenOff => {
            let failure = Failure::new(Class::ServerError, "broken off after its first token");
            note_failure(ctx, (&target, &node, credential.as_ref()), &failure, Attempted::Broken, began.elapsed());
        }
        Outcome::Answered if refused => observe_attempt(ctx, &target.upstream, &node, Attempted::ClientError),
        Outcome::Answered => {
            target.upstream.finished(&node);
            observe_attempt(ctx, &target.upstream, &node, Attempted::Ok);
        }
        Outcome::ClientGone | Outcome::CutOff => {
            observe_attempt(ctx, &target.upstream, &node, Attempted::Aborted);
        }
    }
    tracing::debug!(
        request_id = ctx.exchange.arrival.request_id.as_str(), upstream = &*target.upstream.name, node = &*node.name,
        credential = credential.as_ref().map(|c| &*c.label), ended = ?outcome, took_ms = began.elapsed().as_millis(), "attempt answered"
    );
    outcome
}

/// Tells all who must know that an attempt failed.
pub(super) fn note_failure(
    ctx: &Ctx,
    toward: (&Target, &Node, Option<&Credential>),
    failure: &Failure,
    outcome: Attempted,
    took: Duration,
) {
    let (target, node, credential) = toward;
    let upstream = &*target.upstream;
    let now = ctx.gateway.now();
    let out = match outcome {
        Attempted::Broken => upstream.broke_off(node, now),
        _ => upstream.failed(node, credential, failure, now),
    };
    observe_attempt(ctx, upstream, node, outcome);
    tracing::info!(
        request_id = ctx.exchange.arrival.request_id.as_str(), upstream = &*upstream.name, node = &*node.name,
        credential = credential.map(|c| &*c.label), class = failure.class.as_str(), detail = %failure.detail,
        took_ms = took.as_millis(), "attempt failed"
    );
    ejected(ctx, upstream, node, out);
}

/// Tells of a node that was taken out just now.
fn ejected(ctx: &Ctx, upstream: &Upstream, node: &Node, out: bool) {
    if !out {
        return;
    }
    tracing::warn!(upstream = &*upstream.name, node = &*node.name, "node taken out: its attempts fail");
    if let Some(handles) = ctx.runtime.node(&upstream.name, &node.name) {
        handles.ejected();
    }
}

pub(super) fn marks(ctx: &Ctx) -> Marks {
    let call = ctx.exchange.call.as_ref();
    let session = call.and_then(|c| c.user.as_deref()).map(tollgate_filters::balance::session_mark);
    let turn = ctx.exchange.model.as_ref().and_then(|m| m.targets.first()).map_or(0, |t| t.upstream.next_turn());
    Marks { anchor: call.map_or(0, |c| c.anchor), session, random: rand::random(), turn }
}

pub(super) fn note(ctx: &mut Ctx, course: &Course, chosen: &Chosen) {
    let tally = &mut ctx.exchange.tally;
    if let (Some(failure), Some(from)) = (course.last(), &tally.upstream)
        && **from != *chosen.target.upstream.name
    {
        ctx.gateway.metrics.fallback(&course.model().name, from, &chosen.target.upstream.name, failure.class.into());
    }
    tally.attempts = course.attempts();
    told_as(ctx, &chosen.target, &chosen.node);
}

/// Headers and log tell the answer as one of this target and node.
fn told_as(ctx: &mut Ctx, target: &Target, node: &Node) {
    let tally = &mut ctx.exchange.tally;
    tally.upstream = Some(Arc::clone(&target.upstream.name));
    tally.node = Some(Arc::clone(&node.name));
    tally.target_model = Some(Arc::clone(&target.model));
    ctx.exchange.target = Some(target.clone());
}

pub(super) fn observe_attempt(ctx: &Ctx, upstream: &Upstream, node: &Node, outcome: Attempted) {
    if let Some(handles) = ctx.runtime.node(&upstream.name, &node.name) {
        handles.attempted(outcome);
    }
}
