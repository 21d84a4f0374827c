//! A stream that broke after its first token, finished on another node: the next attempts of the same call, with what the client has got
//! as their beginning.

use std::sync::Arc;

use tollgate_filters::course::{Chosen, Course, Step};
use tollgate_filters::meter::Meter;
use tollgate_filters::meter::seam::{Seam, Way};
use tollgate_filters::metrics::{Attempted, Resumed};
use tollgate_filters::retry::{Class, Failure};

use super::attempt::{self, Answer, Dispatch, End, Prompt};
use super::call::{self, Source, Stop};
use super::leave::Client;
use super::{Ctx, wait};

/// What it takes to finish a call elsewhere.
pub(crate) struct Resume {
    way: Way,
    course: Course,
    request: Dispatch,
}

/// What came of it.
pub(crate) enum Rest {
    /// An answer that goes on where the other broke off.
    Answer(Box<Answer>),
    /// There is none.
    Nothing,
    /// The client left meanwhile.
    ClientGone,
    /// The process ends.
    CutOff,
}

impl Rest {
    const fn of(stop: &Stop) -> Self {
        match stop {
            Stop::ClientGone => Self::ClientGone,
            Stop::Refuse(_) => Self::CutOff,
        }
    }
}

impl Resume {
    /// Keeps what a call was made with, if its model wants broken streams finished and this answer is such a stream.
    ///
    /// # Errors
    /// The request again, if not.
    pub(crate) fn of(ctx: &Ctx, course: Course, request: Dispatch, answer: &Answer) -> Result<Self, Box<Dispatch>> {
        let way = ctx.exchange.model.as_ref().and_then(|model| model.resume);
        let way = way.filter(|way| ctx.exchange.call.as_ref().is_some_and(|call| call.may_resume(*way)));
        match way.filter(|_| answer.stream && answer.status.is_success()) {
            Some(way) => Ok(Self { way, course, request }),
            None => Err(Box::new(request)),
        }
    }

    /// What may still be needed to count the prompt.
    pub(crate) fn prompt(self) -> Option<Prompt> {
        self.request.prompt()
    }

    /// Looks for the rest of an answer that broke off. `from` is where it came from, and then where the rest comes from.
    pub(crate) async fn rest(
        &mut self,
        client: &mut Client<'_>,
        ctx: &mut Ctx,
        broken: &mut Answer,
        from: &mut Source,
        failure: Failure,
    ) -> Rest {
        recount(ctx, &mut broken.meter).await;
        let Some(seam) = broken.meter.break_off(ctx.exchange.prompt_tokens()) else { return Rest::Nothing };
        if !self.request.resume(ctx, seam) {
            return Rest::Nothing;
        }
        if self.way == Way::Continue {
            self.course.go_on();
        }
        call::note_failure(
            ctx,
            (&from.target, &from.node, from.credential.as_ref()),
            &failure,
            Attempted::Broken,
            broken.dispatched.elapsed(),
        );
        self.course.failed(from.index, &from.node, from.credential.as_ref(), failure);
        from.noted = true;
        // Its place is free for others now.
        broken.guard = None;
        let rest = self.attempts(client, ctx, from).await;
        if let Some(model) = &ctx.exchange.model {
            let result = if matches!(rest, Rest::Answer(_)) { Resumed::Resumed } else { Resumed::Failed };
            ctx.gateway.metrics.resumed(&model.name, result);
        }
        rest
    }

    async fn attempts(&mut self, client: &mut Client<'_>, ctx: &mut Ctx, from: &mut Source) -> Rest {
        let marks = call::marks(ctx);
        loop {
            let chosen = match self.course.next(ctx.gateway.now(), marks, rand::random()) {
                Step::Attempt(chosen) => *chosen,
                Step::Wait(pause) => match wait::pause(client, ctx, pause).await {
                    Ok(()) => continue,
                    Err(stop) => return Rest::of(&stop),
                },
                Step::Queue(place) => match wait::in_line(client, ctx, &mut self.course, place).await {
                    Ok(()) => continue,
                    Err(stop) => return Rest::of(&stop),
                },
                Step::Over(_) => return Rest::Nothing,
            };
            let drawn = match wait::for_grant(client, ctx, &mut self.course, &chosen).await {
                Ok(Ok(drawn)) => drawn,
                Ok(Err(wait::Withheld)) => continue,
                Err(stop) => return Rest::of(&stop),
            };
            let before = (ctx.exchange.target.clone(), ctx.exchange.tally.target_model.clone());
            call::note(ctx, &self.course, &chosen);
            let Chosen { index, target, node, credential, guard, probes } = chosen;
            let gateway = Arc::clone(&ctx.gateway);
            let toward = (&target, &*node, credential.as_ref());
            let began = tokio::time::Instant::now();
            let ended = tokio::select! {
                biased;
                ended = Box::pin(attempt::run(client, ctx, &mut self.request, toward, guard)) => ended,
                () = gateway.cut.wait() => {
                    call::observe_attempt(ctx, &target.upstream, &node, Attempted::Aborted);
                    return Rest::CutOff;
                }
            };
            match ended {
                Ok(answer) if answer.stream => {
                    target.upstream.succeeded(&node, credential.as_ref());
                    // What the rest alone uses is not told apart: what was drawn is the best guess there is.
                    drop(drawn);
                    *from = Source { index, target, node, credential, blameless: false, noted: false };
                    return Rest::Answer(answer);
                }
                Ok(answer) => {
                    // It will not go on with another's answer: no fault of the node, and none of the client.
                    tracing::info!(
                        request_id = ctx.exchange.arrival.request_id.as_str(),
                        upstream = &*target.upstream.name,
                        node = &*node.name,
                        status = answer.status.as_u16(),
                        "the rest of an answer was refused"
                    );
                    call::observe_attempt(ctx, &target.upstream, &node, Attempted::ClientError);
                    if let Some(drawn) = drawn {
                        drawn.used(0);
                    }
                    let failure = Failure::silent(Class::ServerError, "refused to go on");
                    self.course.failed(index, &node, credential.as_ref(), failure);
                }
                Err(End::ClientGone) => {
                    call::observe_attempt(ctx, &target.upstream, &node, Attempted::Aborted);
                    return Rest::ClientGone;
                }
                Err(End::Failed(failure)) => {
                    call::undrawn(drawn, &failure);
                    let outcome = failure.class.into();
                    call::note_failure(ctx, (&target, &node, credential.as_ref()), &failure, outcome, began.elapsed());
                    self.course.failed(index, &node, credential.as_ref(), failure);
                }
            }
            // What is charged is still what the broken answer gave.
            (ctx.exchange.target, ctx.exchange.tally.target_model) = before;
            drop(probes);
        }
    }
}

/// Counts the output that its upstream has not accounted for, as well as can be.
pub(crate) async fn recount(ctx: &Ctx, meter: &mut Meter) {
    if let (Some(uncovered), Some(target)) = (meter.uncovered(), &ctx.exchange.target) {
        let tokens = uncovered.tokens(target.tokens, Some(&target.learned.output)).await;
        meter.recount(tokens);
    }
}

/// The memory of what the client gets of an answer, where it may be needed.
pub(crate) fn seam(ctx: &Ctx) -> Option<Seam> {
    let way = ctx.exchange.model.as_ref()?.resume?;
    ctx.exchange.call.as_ref().filter(|call| call.may_resume(way))?;
    Some(Seam::new(way))
}
