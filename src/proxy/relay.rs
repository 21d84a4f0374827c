//! The answer from its first useful event to its end: relayed as it comes, read along, cut at its deadlines.

use bytes::Bytes;
use http::header::{self, HeaderName};
use http::{HeaderMap, Version};
use pingora_http::ResponseHeader;
use std::time::Duration;
use tokio::time::{Instant, sleep_until};
use tollgate_filters::dialect;
use tollgate_filters::error::{GatewayError, Unavailable};
use tollgate_filters::meter::{Meter, Seen, Stop};
use tollgate_filters::retry::{Class, Failure};

use super::attempt::{Answer, Prompt, reported};
use super::call::{Outcome, Source};
use super::leave::{Client, Gone};
use super::resume::{self, Rest, Resume};
use super::upstream::{HOP_BY_HOP, is_nominated, nominated};
use super::{Ctx, reply};

/// After the answers have ended, the upstream has this long to state the usage and to end the body.
const LAST_EVENT: Duration = Duration::from_secs(1);
/// The same, if the usage is there and only the last event is missing.
const LAST_WORD: Duration = Duration::from_millis(250);

/// Reads that may follow once the client has left, if nothing has to be waited for.
const CAUGHT_UP: usize = 256;

/// Headers of an upstream's answer that are its own business and not our client's.
const WITHHELD: [HeaderName; 3] = [header::SET_COOKIE, header::SERVER, HeaderName::from_static("x-request-id")];

/// Shows the answer to the client and relays it to its end.
///
/// `prompt` is what to count the prompt by, should the upstream not state what it cost; `resume` finishes a stream that breaks.
pub(crate) async fn run(
    mut client: Client<'_>,
    ctx: &mut Ctx,
    mut answer: Box<Answer>,
    from: &mut Source,
    (prompt, mut resume): (Option<Prompt>, Option<Resume>),
) -> Outcome {
    if !client.is_gone() {
        note_first_token(ctx, &answer);
    }
    let began = answer.dispatched;
    let _open = answer.stream.then(|| ctx.gateway.metrics.open_stream());
    let client = &mut client;
    let outcome = match begin(client, ctx, &mut answer).await {
        Ok(()) => to_its_end(client, ctx, &mut answer, from, resume.as_mut()).await,
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
        let prompt = prompt.or_else(|| resume.and_then(Resume::prompt));
        settle(ctx, &mut meter, prompt).await;
    }
    outcome
}

/// Relays an answer, and if it breaks off what finishes it, as long as there is something.
async fn to_its_end(
    client: &mut Client<'_>,
    ctx: &mut Ctx,
    answer: &mut Box<Answer>,
    from: &mut Source,
    mut resume: Option<&mut Resume>,
) -> Outcome {
    loop {
        let broken = match follow(client, ctx, answer).await {
            Ended::Over(outcome) => return outcome,
            Ended::Broken(broken) => broken,
        };
        from.blameless = broken.blameless;
        let resume = resume.as_deref_mut().filter(|_| broken.may_resume && !client.is_gone());
        let Some(resume) = resume else { return break_off(client, ctx, broken).await };
        let failure = broken.failure.clone();
        match resume.rest(client, ctx, answer, from, failure).await {
            Rest::Answer(rest) => *answer = rest,
            Rest::Nothing => return break_off(client, ctx, broken).await,
            Rest::ClientGone => return Outcome::ClientGone,
            Rest::CutOff => {
                let error = GatewayError::Unavailable(Unavailable::Draining);
                break_off(client, ctx, Broken { error, ..broken }).await;
                return Outcome::CutOff;
            }
        }
        if show_held(client, ctx, answer).await.is_err() {
            return Outcome::ClientGone;
        }
    }
}

/// What the answer cost, to the best of what can be known.
async fn settle(ctx: &mut Ctx, meter: &mut Meter, prompt: Option<Prompt>) {
    if let Some(prompt) = prompt.filter(|_| !meter.states_input()) {
        ctx.exchange.count_prompt(&prompt.body).await;
    }
    resume::recount(ctx, meter).await;
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
        let renamed = reported(ctx).is_some();
        let mut head = client_head(answer, version, renamed).map_err(Unsent::Defect)?;
        reply::decorate(&mut head, ctx).map_err(Unsent::Defect)?;
        ctx.exchange.tally.status = head.status.as_u16();
        if client.session().write_response_header(Box::new(head)).await.is_err() {
            client.note_left();
        }
    }
    show_held(client, ctx, answer).await.map_err(Unsent::Gone)
}

/// Sends what was held back.
async fn show_held(client: &mut Client<'_>, ctx: &mut Ctx, answer: &mut Answer) -> Result<(), Gone> {
    for bytes in std::mem::take(&mut answer.held) {
        forward(client, ctx, bytes).await?;
    }
    settle_progress(ctx, answer);
    Ok(())
}

fn client_head(answer: &Answer, version: Version, renamed: bool) -> pingora_core::Result<ResponseHeader> {
    let none = HeaderMap::new();
    let theirs = answer.up.response_header().map_or(&none, |head| &head.headers);
    let mut head = ResponseHeader::build_no_case(answer.status, Some(theirs.len() + 16))?;
    let nominated = nominated(theirs);
    for (name, value) in theirs {
        let own = name.as_str().starts_with("x-ratelimit-")
            || name.as_str().starts_with("x-tollgate-")
            || name.as_str().starts_with("ratelimit");
        // A stream may lose events on its way, an error its echo of our key, any answer its model's name: their length is not the
        // upstream's.
        let length = (answer.stream || answer.ended || renamed) && *name == header::CONTENT_LENGTH;
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
    /// Nothing came in time.
    Late,
    /// The process ends.
    Cut,
}

/// How the relaying of one upstream's answer ended.
enum Ended {
    /// The answer is over.
    Over(Outcome),
    /// It broke off.
    Broken(Broken),
}

/// Why an answer broke off.
struct Broken {
    /// What the client is told.
    error: GatewayError,
    /// What is noted of the node.
    failure: Failure,
    /// Another node may finish it.
    may_resume: bool,
    /// The client has been told already.
    told: bool,
    /// It is no fault of the node.
    blameless: bool,
}

impl Broken {
    fn by(failure: Failure) -> Self {
        let error = GatewayError::UpstreamError;
        Self { error, failure, may_resume: true, told: false, blameless: false }
    }

    fn at(detail: &str) -> Self {
        Self::by(Failure::new(Class::ServerError, detail))
    }

    fn stalled() -> Self {
        let failure = Failure::silent(Class::Timeout, "cut at a deadline");
        Self { error: GatewayError::UpstreamTimeout, ..Self::by(failure) }
    }

    fn stopped(stop: Stop) -> Self {
        let broken = Self::at(stop.as_str());
        match stop {
            Stop::Failed | Stop::Garbled => broken,
            Stop::Refused => Self { may_resume: false, told: true, blameless: true, ..broken },
            Stop::Apart => Self { may_resume: false, blameless: true, ..broken },
        }
    }
}

/// Relays until the body ends, breaks, or the client leaves.
async fn follow(client: &mut Client<'_>, ctx: &mut Ctx, answer: &mut Answer) -> Ended {
    if let Some(stop) = answer.stop {
        return Ended::Broken(Broken::stopped(stop));
    }
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
            () = &mut cut => Event::Cut,
            () = &mut timer => {
                let now = Instant::now();
                let deadline = due(answer, total);
                if now < deadline {
                    timer.as_mut().reset(deadline);
                    continue;
                }
                if answer.meter.done() { Event::End } else { Event::Late }
            }
        };
        match step(client, ctx, answer, event).await {
            Some(ended) => return ended,
            None => continue,
        }
    }
    if let Some(last) = answer.meter.last_event().filter(|_| answer.stream)
        && forward(client, ctx, last).await.is_err()
    {
        return Ended::Over(Outcome::ClientGone);
    }
    Ended::Over(match client.write(Bytes::new(), true).await {
        Ok(()) if !client.is_gone() => Outcome::Answered,
        Ok(()) | Err(Gone) => Outcome::ClientGone,
    })
}

fn due(answer: &Answer, total: Instant) -> Instant {
    if !answer.stream {
        return total;
    }
    let patience = answer.timeouts.between_tokens;
    let patience = match (answer.meter.done(), answer.meter.is_stated()) {
        (true, true) => patience.min(LAST_WORD),
        (true, false) => patience.min(LAST_EVENT),
        (false, _) => patience,
    };
    total.min(answer.quiet_since + patience)
}

/// Takes one event further; `Some` ends the relay.
async fn step(client: &mut Client<'_>, ctx: &mut Ctx, answer: &mut Answer, event: Event) -> Option<Ended> {
    let before = (answer.meter.done(), answer.meter.is_stated());
    let seen = match event {
        Event::Chunk(chunk) => match answer.meter.feed(chunk) {
            Ok(seen) => seen,
            Err(error) => return Some(Ended::Broken(Broken::at(&error.to_string()))),
        },
        Event::End => {
            answer.ended = true;
            answer.meter.finish()
        }
        // A stream that said why it ends is whole, however its connection ends.
        Event::Broken(_) if answer.stream && answer.meter.done() => {
            answer.ended = true;
            return None;
        }
        Event::Broken(detail) => return Some(Ended::Broken(Broken::at(&detail))),
        Event::Late => return Some(Ended::Broken(Broken::stalled())),
        Event::Cut => {
            let error = GatewayError::Unavailable(Unavailable::Draining);
            break_off(client, ctx, Broken { error, ..Broken::at("the process ends") }).await;
            return Some(Ended::Over(Outcome::CutOff));
        }
        Event::ClientGone => {
            catch_up(answer).await;
            return Some(Ended::Over(Outcome::ClientGone));
        }
    };
    note_progress(ctx, answer, &seen, before);
    let error = seen.error.is_some();
    for bytes in seen.forward {
        let bytes = match &answer.credential {
            Some(credential) if error => credential.mask(bytes),
            _ => bytes,
        };
        if forward(client, ctx, bytes).await.is_err() {
            catch_up(answer).await;
            return Some(Ended::Over(Outcome::ClientGone));
        }
    }
    settle_progress(ctx, answer);
    if let Some(stop) = seen.stop {
        return Some(Ended::Broken(Broken::stopped(stop)));
    }
    if answer.ended && answer.stream && !answer.meter.ended_well() {
        return Some(Ended::Broken(Broken::at("the stream ended without its terminal event")));
    }
    None
}

fn note_progress(ctx: &mut Ctx, answer: &mut Answer, seen: &Seen, before: (bool, bool)) {
    let now = Instant::now();
    if seen.token || seen.done {
        answer.last_token = now;
    }
    if seen.token || seen.done || before != (answer.meter.done(), answer.meter.is_stated()) {
        answer.quiet_since = now;
    }
    if seen.error.is_some() && seen.stop.is_none() {
        ctx.exchange.tally.code = Some("upstream_error");
    }
    if seen.garbled > 0 {
        let upstream = ctx.exchange.tally.upstream.as_deref();
        let request_id = ctx.exchange.arrival.request_id.as_str();
        tracing::info!(request_id, upstream, events = seen.garbled, "events that are no JSON were left out");
    }
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
async fn break_off(client: &mut Client<'_>, ctx: &mut Ctx, broken: Broken) -> Outcome {
    let request_id = ctx.exchange.arrival.request_id.clone();
    tracing::info!(
        request_id = request_id.as_str(),
        upstream = ctx.exchange.tally.upstream.as_deref(),
        detail = &*broken.failure.detail,
        "answer broke off"
    );
    ctx.exchange.tally.code = Some(broken.error.face().code);
    if client.is_gone() {
        return Outcome::ClientGone;
    }
    let is_stream =
        client.session().response_written().is_some_and(|h| !h.headers.contains_key(header::CONTENT_LENGTH));
    if is_stream && !broken.told && ctx.exchange.tally.first_token.is_some() {
        let event = dialect::error_event(ctx.exchange.arrival.dialect, &broken.error, request_id.as_str());
        let _ = forward(client, ctx, event).await;
    }
    Outcome::BrokenOff
}
