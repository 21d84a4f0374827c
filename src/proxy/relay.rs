//! The answer from its first useful event to its end: relayed as it comes, read along, cut at its deadlines.

use bytes::Bytes;
use http::header::{self, HeaderName};
use http::{HeaderMap, Version};
use pingora_http::ResponseHeader;
use std::time::Duration;
use tokio::time::{Instant, sleep_until};
use tollgate_filters::dialect;
use tollgate_filters::error::{GatewayError, Unavailable};
use tollgate_filters::meter::Meter;

use super::attempt::{Answer, Prompt};
use super::call::Outcome;
use super::leave::{Client, Gone};
use super::upstream::{HOP_BY_HOP, is_nominated, nominated};
use super::{Ctx, reply};

/// After the terminal event, the upstream has this long to end the body, else its connection is given up.
const LAST_CHUNK: Duration = Duration::from_secs(5);

/// Reads that may follow once the client has left, if nothing has to be waited for.
const CAUGHT_UP: usize = 256;

/// Headers of an upstream's answer that are its own business and not our client's.
const WITHHELD: [HeaderName; 3] = [header::SET_COOKIE, header::SERVER, HeaderName::from_static("x-request-id")];

/// Shows the answer to the client and relays it to its end.
///
/// `prompt` is what to count the prompt by, should the upstream not state what it cost.
pub(crate) async fn run(
    mut client: Client<'_>,
    ctx: &mut Ctx,
    mut answer: Box<Answer>,
    prompt: Option<Prompt>,
) -> Outcome {
    if !client.is_gone() {
        note_first_token(ctx, &answer);
    }
    let began = answer.dispatched;
    let _open = answer.stream.then(|| ctx.gateway.metrics.open_stream());
    let client = &mut client;
    let outcome = match begin(client, ctx, &mut answer).await {
        Ok(()) => follow(client, ctx, &mut answer).await,
        Err(Unsent::Gone(Gone)) => Outcome::ClientGone,
        Err(Unsent::Defect(error)) => {
            tracing::error!(%error, "an answer's header cannot be written");
            Outcome::BrokenOff
        }
    };
    let tally = &mut ctx.exchange.tally;
    tally.upstream_time += began.elapsed();
    if answer.status.is_success() {
        tally.last_token = answer.stream.then(|| answer.last_token.duration_since(began));
    } else if let Some(reservation) = &mut ctx.exchange.reservation {
        reservation.failed();
    }
    let charged = answer.status.is_success();
    let Answer { mut up, peer, idle, guard, mut meter, ended, .. } = *answer;
    drop(guard);
    // An upstream that did not end its body in time keeps it to itself: its connection is closed.
    if ended && outcome != Outcome::BrokenOff && up.response_done() {
        ctx.gateway.connector.release_http_session(up, &peer, Some(idle)).await;
    } else {
        drop(up);
    }
    if charged {
        settle(ctx, &mut meter, prompt).await;
    }
    outcome
}

/// What the answer cost, to the best of what can be known.
async fn settle(ctx: &mut Ctx, meter: &mut Meter, prompt: Option<Prompt>) {
    if let Some(prompt) = prompt.filter(|_| !meter.states_input()) {
        ctx.exchange.count_prompt(&prompt.body).await;
    }
    if let (Some(uncovered), Some(target)) = (meter.uncovered(), &ctx.exchange.target) {
        let tokens = uncovered.tokens(target.tokens, Some(&target.learned.output)).await;
        meter.recount(tokens);
    }
    let usage = meter.usage(ctx.exchange.prompt_tokens());
    let tally = &mut ctx.exchange.tally;
    tally.usage = Some(usage);
    tally.output = (meter.estimated_output(), meter.done());
}

fn note_first_token(ctx: &mut Ctx, answer: &Answer) {
    if answer.stream {
        ctx.exchange.tally.first_token = Some(ctx.started.elapsed());
        ctx.exchange.tally.prefill = Some(answer.last_token.duration_since(answer.dispatched));
    }
}

/// Why an answer's beginning was not sent.
enum Unsent {
    Gone(Gone),
    Defect(Box<pingora_core::Error>),
}

/// Sends the header and what was held back.
async fn begin(client: &mut Client<'_>, ctx: &mut Ctx, answer: &mut Answer) -> Result<(), Unsent> {
    if !client.is_gone() {
        let version = client.session().req_header().version;
        let mut head = client_head(answer, version).map_err(Unsent::Defect)?;
        reply::decorate(&mut head, ctx).map_err(Unsent::Defect)?;
        ctx.exchange.tally.status = head.status.as_u16();
        if client.session().write_response_header(Box::new(head)).await.is_err() {
            client.note_left();
        }
    }
    for bytes in std::mem::take(&mut answer.held) {
        forward(client, ctx, bytes).await.map_err(Unsent::Gone)?;
    }
    settle_progress(ctx, answer);
    Ok(())
}

fn client_head(answer: &Answer, version: Version) -> pingora_core::Result<ResponseHeader> {
    let none = HeaderMap::new();
    let theirs = answer.up.response_header().map_or(&none, |head| &head.headers);
    let mut head = ResponseHeader::build_no_case(answer.status, Some(theirs.len() + 16))?;
    let nominated = nominated(theirs);
    for (name, value) in theirs {
        let own = name.as_str().starts_with("x-ratelimit-")
            || name.as_str().starts_with("x-tollgate-")
            || name.as_str().starts_with("ratelimit");
        // A stream may lose events on its way, and an error its echo of our key: their length is not the upstream's.
        let length = (answer.stream || answer.ended) && *name == header::CONTENT_LENGTH;
        if !own && !length && !HOP_BY_HOP.contains(name) && !WITHHELD.contains(name) && !is_nominated(&nominated, name)
        {
            head.append_header(name, value)?;
        }
    }
    if !head.headers.contains_key(header::CONTENT_LENGTH) {
        if answer.ended {
            head.insert_header(header::CONTENT_LENGTH, answer.held.iter().map(Bytes::len).sum::<usize>())?;
        } else if version == Version::HTTP_11 {
            // An HTTP/1.0 client takes the end of the connection as the end of the body.
            head.insert_header(header::TRANSFER_ENCODING, "chunked")?;
        }
    }
    if answer.stream {
        // A proxy in front that gathers responses would undo the streaming.
        head.insert_header("x-accel-buffering", "no")?;
    }
    Ok(head)
}

async fn forward(client: &mut Client<'_>, ctx: &mut Ctx, bytes: Bytes) -> Result<(), Gone> {
    if bytes.is_empty() {
        return Ok(());
    }
    if !client.is_gone() {
        ctx.exchange.tally.bytes_out += bytes.len() as u64;
    }
    client.write(bytes, false).await
}

fn settle_progress(ctx: &mut Ctx, answer: &Answer) {
    if let Some(reservation) = &mut ctx.exchange.reservation
        && answer.meter.tokens_seen()
    {
        reservation.progress(&answer.meter.usage(0));
    }
}

/// What came next.
enum Event {
    Chunk(Bytes),
    End,
    Broken(String),
    ClientGone,
    Late(GatewayError),
}

/// Relays until the body ends, breaks, or the client leaves.
async fn follow(client: &mut Client<'_>, ctx: &mut Ctx, answer: &mut Answer) -> Outcome {
    let total = answer.dispatched + answer.timeouts.total;
    let timer = sleep_until(total);
    tokio::pin!(timer);
    let gateway = std::sync::Arc::clone(&ctx.gateway);
    let cut = gateway.cut.wait();
    tokio::pin!(cut);
    while !answer.ended {
        let deadline = due(answer, total);
        // The timer is only moved when it fires early: tokens come far more often than deadlines.
        if timer.deadline() > deadline {
            timer.as_mut().reset(deadline);
        }
        let event = tokio::select! {
            biased;
            read = answer.up.read_response_body() => match read {
                Ok(Some(chunk)) => Event::Chunk(chunk),
                Ok(None) => Event::End,
                Err(error) => Event::Broken(error.etype().as_str().to_owned()),
            },
            Gone = client.leaves() => Event::ClientGone,
            () = &mut cut => Event::Late(GatewayError::Unavailable(Unavailable::Draining)),
            () = &mut timer => {
                let now = Instant::now();
                let deadline = due(answer, total);
                if now < deadline {
                    timer.as_mut().reset(deadline);
                    continue;
                }
                if answer.meter.done() { Event::End } else { Event::Late(GatewayError::UpstreamTimeout) }
            }
        };
        match step(client, ctx, answer, event).await {
            Some(outcome) => return outcome,
            None => continue,
        }
    }
    match client.write(Bytes::new(), true).await {
        Ok(()) if !client.is_gone() => Outcome::Answered,
        Ok(()) | Err(Gone) => Outcome::ClientGone,
    }
}

fn due(answer: &Answer, total: Instant) -> Instant {
    if !answer.stream {
        return total;
    }
    let patience = answer.timeouts.between_tokens;
    let patience = if answer.meter.done() { patience.min(LAST_CHUNK) } else { patience };
    total.min(answer.last_token + patience)
}

/// Takes one event further; `Some` ends the relay.
async fn step(client: &mut Client<'_>, ctx: &mut Ctx, answer: &mut Answer, event: Event) -> Option<Outcome> {
    let seen = match event {
        Event::Chunk(chunk) => match answer.meter.feed(chunk) {
            Ok(seen) => seen,
            Err(error) => return Some(break_off(client, ctx, GatewayError::UpstreamError, &error.to_string()).await),
        },
        Event::End => {
            answer.ended = true;
            let rest = answer.meter.finish();
            if answer.stream && !answer.meter.done() {
                for bytes in rest.forward {
                    forward(client, ctx, bytes).await.ok();
                }
                return Some(
                    break_off(client, ctx, GatewayError::UpstreamError, "the stream ended without its terminal event")
                        .await,
                );
            }
            rest
        }
        Event::Broken(detail) => return Some(break_off(client, ctx, GatewayError::UpstreamError, &detail).await),
        Event::Late(error) => {
            let ours = matches!(error, GatewayError::Unavailable(Unavailable::Draining));
            let outcome = break_off(client, ctx, error, "cut at a deadline").await;
            return Some(if ours { Outcome::CutOff } else { outcome });
        }
        Event::ClientGone => {
            catch_up(answer).await;
            return Some(Outcome::ClientGone);
        }
    };
    if seen.token || seen.done {
        answer.last_token = Instant::now();
    }
    let error = seen.error.is_some();
    if error {
        ctx.exchange.tally.code = Some("upstream_error");
    }
    for bytes in seen.forward {
        let bytes = match &answer.credential {
            Some(credential) if error => credential.mask(bytes),
            _ => bytes,
        };
        if forward(client, ctx, bytes).await.is_err() {
            catch_up(answer).await;
            return Some(Outcome::ClientGone);
        }
    }
    settle_progress(ctx, answer);
    None
}

/// Reads what the node has produced already, without waiting for more: it is charged, seen by the client or not.
async fn catch_up(answer: &mut Answer) {
    for _ in 0..CAUGHT_UP {
        let chunk = tokio::select! {
            biased;
            read = answer.up.read_response_body() => read,
            () = std::future::ready(()) => return,
        };
        let Ok(Some(chunk)) = chunk else { return };
        if answer.meter.feed(chunk).is_err() {
            return;
        }
    }
}

/// Tells the client of an answer that cannot go on: an error event, where it is a stream, and an unclean end.
async fn break_off(client: &mut Client<'_>, ctx: &mut Ctx, error: GatewayError, detail: &str) -> Outcome {
    let request_id = ctx.exchange.arrival.request_id.clone();
    tracing::info!(
        request_id = request_id.as_str(),
        upstream = ctx.exchange.tally.upstream.as_deref(),
        detail,
        "answer broke off"
    );
    ctx.exchange.tally.code = Some(error.face().code);
    if client.is_gone() {
        return Outcome::ClientGone;
    }
    let is_stream =
        client.session().response_written().is_some_and(|h| !h.headers.contains_key(header::CONTENT_LENGTH));
    if is_stream && ctx.exchange.tally.first_token.is_some() {
        let event = dialect::error_event(ctx.exchange.arrival.dialect, &error, request_id.as_str());
        let _ = forward(client, ctx, event).await;
    }
    Outcome::BrokenOff
}
