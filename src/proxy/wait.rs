//! Where a call waits before an attempt: between two tries, in line for a node, for its turn in what a provider grants.
//! Every wait ends when the client leaves or the gateway does.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tollgate_filters::course::{Chosen, Course, Place};
use tollgate_filters::error::{GatewayError, Unavailable};
use tollgate_filters::limit::budget::Drawn;

use super::Ctx;
use super::call::Stop;
use super::leave::Client;

/// The provider has nothing left to grant for now; the course knows.
#[derive(Debug, Clone, Copy)]
pub(super) struct Withheld;

/// Waits before a node is asked again.
pub(super) async fn pause(client: &mut Client<'_>, ctx: &mut Ctx, wait: Duration) -> Result<(), Stop> {
    let gateway = Arc::clone(&ctx.gateway);
    let began = Instant::now();
    let ended = tokio::select! {
        biased;
        _ = client.leaves() => Err(Stop::ClientGone),
        () = gateway.cut.wait() => Err(draining()),
        () = tokio::time::sleep(wait) => Ok(()),
    };
    ctx.exchange.tally.upstream_time += began.elapsed();
    ended
}

/// Waits in the queue of an upstream; the course is told what came of it. A gateway that is about to end keeps nobody
/// waiting.
pub(super) async fn in_line(
    client: &mut Client<'_>,
    ctx: &mut Ctx,
    course: &mut Course,
    mut place: Box<Place>,
) -> Result<(), Stop> {
    let gateway = Arc::clone(&ctx.gateway);
    let began = Instant::now();
    let patience = place.until.saturating_sub(gateway.now());
    let ended = tokio::select! {
        biased;
        _ = client.leaves() => Err(Stop::ClientGone),
        () = gateway.leaving.wait() => Err(draining()),
        slot = place.slot() => Ok(slot),
        () = tokio::time::sleep(patience) => Ok(None),
    };
    ctx.exchange.tally.upstream_time += began.elapsed();
    // Without a slot, the place may be kept for another look.
    if place.last || !matches!(ended, Ok(None)) {
        gateway.metrics.queue_waited(&place.upstream, gateway.now().saturating_sub(place.since));
    }
    course.waited(place, ended?);
    Ok(())
}

/// Draws the attempt from what the provider grants, and waits until it may be made. `None` where nothing is known of a grant.
pub(super) async fn for_grant(
    client: &mut Client<'_>,
    ctx: &mut Ctx,
    course: &mut Course,
    chosen: &Chosen,
) -> Result<Result<Option<Drawn>, Withheld>, Stop> {
    let upstream = &chosen.target.upstream;
    let Some(budget) = &upstream.budget else { return Ok(Ok(None)) };
    let gateway = Arc::clone(&ctx.gateway);
    let now = gateway.now();
    let drawn = match budget.draw(&gateway.ledger, tokens(ctx), now).await {
        Ok(drawn) => drawn,
        Err(room_in) => {
            course.withheld(chosen.index, now.saturating_add(room_in));
            return Ok(Err(Withheld));
        }
    };
    if !drawn.delay.is_zero() {
        gateway.metrics.paced(&upstream.name, drawn.delay);
        if let Err(stop) = pause(client, ctx, drawn.delay).await {
            drawn.unsent();
            return Err(stop);
        }
    }
    Ok(Ok(Some(drawn)))
}

/// What the call will probably use.
fn tokens(ctx: &Ctx) -> u64 {
    if let Some(reservation) = &ctx.exchange.reservation {
        return reservation.reserved();
    }
    let completion = ctx.exchange.call.as_ref().and_then(|call| Some(call.max_tokens?.saturating_mul(call.n.into())));
    ctx.exchange.prompt_tokens().saturating_add(completion.unwrap_or(0))
}

const fn draining() -> Stop {
    Stop::Refuse(GatewayError::Unavailable(Unavailable::Draining))
}
