//! The end of every request: filters told, metrics counted, one line logged.

use std::time::{Duration, SystemTime};

use pingora_core::protocols::http::ServerSession;
use pingora_core::{Error, ErrorSource};
use tollgate_filters::access::AccessLine;
use tollgate_filters::metrics::AbortPhase;
use tollgate_filters::usage::UsageSource;

use super::Ctx;
use super::call::Outcome;

/// Status noted for a client that left before it was answered.
const CLIENT_LEFT: u16 = 499;

/// Closes the books on a request.
pub(crate) fn finish(client: &ServerSession, ctx: &mut Ctx, error: Option<&Error>) {
    let took = ctx.started.elapsed();
    let left =
        ctx.outcome == Some(Outcome::ClientGone) || error.is_some_and(|e| *e.esource() == ErrorSource::Downstream);
    note_status(client, ctx, left);
    // What is learned from this call must not embellish its own estimate.
    let estimate = ctx.exchange.prompt_tokens();
    if let Some(route) = ctx.route.clone() {
        route.chain.logging(&mut ctx.exchange);
    }
    if left {
        ctx.gateway.metrics.client_left(phase(ctx));
    }
    if let Some(passage) = &ctx.passage {
        ctx.exchange.tally.upstream_time += passage.began().elapsed();
    }
    let overhead = took.saturating_sub(ctx.exchange.tally.upstream_time);
    count(ctx, took, overhead, estimate);
    write(ctx, took, overhead);
}

fn note_status(client: &ServerSession, ctx: &mut Ctx, left: bool) {
    let tally = &mut ctx.exchange.tally;
    if tally.status == 0 {
        tally.status = client.response_written().map_or(if left { CLIENT_LEFT } else { 500 }, |h| h.status.as_u16());
    }
}

fn phase(ctx: &Ctx) -> AbortPhase {
    let tally = &ctx.exchange.tally;
    match (tally.first_token, tally.attempts) {
        (Some(_), _) => AbortPhase::Answer,
        (None, 0) => AbortPhase::Request,
        (None, _) => AbortPhase::FirstToken,
    }
}

fn count(ctx: &Ctx, took: Duration, overhead: Duration, estimate: u64) {
    let exchange = &ctx.exchange;
    let tally = &exchange.tally;
    let model = exchange.model.as_ref().map_or("", |m| &*m.name);
    let key = exchange.arrival.caller.as_ref().map_or("", |c| &*c.id);
    let route = ctx.route.as_ref().map_or(&ctx.runtime.unmatched, |route| &route.metrics);
    let metrics = route.call(model, key);
    metrics.answered(tally.status, took);
    route.overhead(overhead);
    let upstream = tally.upstream.as_deref().unwrap_or_default();
    if let Some(after) = tally.first_token {
        metrics.first_token(upstream, after);
    }
    if let Some(usage) = &tally.usage {
        metrics.settled(usage);
        if usage.source == UsageSource::Upstream && exchange.model.as_ref().is_some_and(|model| !model.name.is_empty())
        {
            metrics.estimated(estimate, usage.input);
        }
        if let (Some(first), Some(last)) = (tally.prefill, tally.last_token)
            && usage.output > 1
        {
            let gaps = u32::try_from(usage.output - 1).unwrap_or(u32::MAX);
            metrics.per_output_token(upstream, last.saturating_sub(first) / gaps);
        }
        if let Some(price) = exchange.model.as_ref().and_then(|m| m.price.as_ref()) {
            metrics.cost(price.cost(usage), &price.currency);
        }
    }
}

fn write(ctx: &Ctx, took: Duration, overhead: Duration) {
    let exchange = &ctx.exchange;
    let (arrival, tally) = (&exchange.arrival, &exchange.tally);
    let usage = tally.usage.as_ref();
    let price = exchange.model.as_ref().and_then(|m| m.price.as_ref());
    let route = ctx.route.as_ref().filter(|r| r.is_configured());
    ctx.gateway.access.write(&AccessLine {
        ts: SystemTime::now().checked_sub(took).unwrap_or(SystemTime::UNIX_EPOCH),
        request_id: arrival.request_id.as_str(),
        trace_id: Some(arrival.trace.trace_id()),
        key: arrival.caller.as_ref().map(|c| &*c.id),
        tier: arrival.caller.as_ref().and_then(|c| c.tier.as_deref()),
        route: route.map(|r| &*r.name),
        model: exchange.model.as_ref().map(|m| &*m.name).filter(|m| !m.is_empty()),
        upstream: tally.upstream.as_deref(),
        node: tally.node.as_deref(),
        attempts: tally.attempts,
        status: Some(tally.status).filter(|s| *s != CLIENT_LEFT),
        code: tally.code,
        stream: exchange.call.as_ref().map(|c| c.stream),
        input_tokens: usage.map(|u| u.input),
        cached_tokens: usage.map(|u| u.cached_input),
        output_tokens: usage.map(|u| u.output),
        usage_source: usage.map(|u| u.source.as_str()),
        cost: usage.and_then(|u| Some(price?.cost(u))),
        ttft_ms: tally.first_token,
        duration_ms: Some(took),
        overhead_ms: Some(overhead),
        cache: exchange.call.is_some().then_some("bypass"),
        client_ip: Some(arrival.client_ip),
        bytes_in: tally.bytes_in,
        bytes_out: tally.bytes_out,
    });
}
