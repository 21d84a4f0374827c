//! One attempt of a call on one node, up to the point where its answer may be shown to the client: the header is held
//! until the first useful event, so that a failure before it costs the client nothing but time.

use std::future::Future;
use std::pin::Pin;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http::StatusCode;
use http::header::CONTENT_TYPE;
use pingora_core::protocols::http::ServerSession;
use pingora_core::protocols::http::client::HttpSession;
use pingora_core::upstreams::peer::HttpPeer;
use pingora_http::{RequestHeader, ResponseHeader};
use smallvec::SmallVec;
use tokio::time::{Instant, Sleep, sleep_until};
use tollgate_filters::call::{AskUsage, CallKind};
use tollgate_filters::meter::{Meter, exact};
use tollgate_filters::model::Target;
use tollgate_filters::retry::{Class, Failure, class_of_refusal, class_of_status, retry_after};
use tollgate_filters::upstream::{Credential, InFlight, Node, Timeouts};

use super::leave::Client;
use super::upstream::{self, Forwarded};
use super::{Ctx, pass};
use crate::gateway::ByteShare;

/// Most of a plain answer that is held back to see whether it is whole and no error.
const HELD_BYTES: usize = 64 * 1024;
/// Most of an error's body that is held to mask a credential in it.
const MASKED_BYTES: usize = 1 << 20;
/// Most of a refusal's body that is read to keep its connection.
const DRAINED_BYTES: usize = 64 * 1024;
/// Time for that.
const DRAIN_TIME: Duration = Duration::from_millis(200);

/// Why an attempt brought no answer.
#[derive(Debug)]
pub(crate) enum End {
    /// The node failed.
    Failed(Failure),
    /// The client left meanwhile.
    ClientGone,
}

/// What all attempts of a call send: the body as the client wrote it, and its last rewritten form.
pub(crate) struct Dispatch {
    body: Bytes,
    rewritten: Option<(std::sync::Arc<str>, AskUsage, Bytes)>,
    forwarded: Forwarded,
    _share: ByteShare,
}

impl Dispatch {
    /// Prepares the attempts of a call.
    pub(crate) fn new(client: &ServerSession, ctx: &Ctx, body: Bytes, share: ByteShare) -> Self {
        Self { body, rewritten: None, forwarded: pass::forwarded(client, ctx), _share: share }
    }

    /// The body as the client wrote it.
    pub(crate) fn body(&self) -> &Bytes {
        &self.body
    }

    /// What may still be needed to count the prompt, once nothing is sent again.
    pub(crate) fn prompt(self) -> Option<Prompt> {
        (self.body.len() <= exact::LONGEST).then_some(Prompt { body: self.body, _share: self._share })
    }

    /// The body for a target: the model's name there, and the usage asked for.
    fn body_for(&mut self, ctx: &Ctx, target: &Target) -> Bytes {
        let ask = asked(target);
        if let Some((model, asked, body)) = &self.rewritten
            && *model == target.model
            && *asked == ask
        {
            return body.clone();
        }
        let Some(call) = &ctx.exchange.call else { return self.body.clone() };
        let model = if target.model.is_empty() { None } else { Some(&*target.model) };
        let body = call.rewrite(&self.body, model, ask);
        self.rewritten = Some((std::sync::Arc::clone(&target.model), ask, body.clone()));
        body
    }
}

/// A body that is kept while its answer streams, in case the upstream does not say what the prompt cost.
pub(crate) struct Prompt {
    /// The body as the client wrote it.
    pub(crate) body: Bytes,
    _share: ByteShare,
}

/// What the nodes of a target are asked to tell of the usage of a stream.
fn asked(target: &Target) -> AskUsage {
    if target.upstream.continuous_usage { AskUsage::Always } else { AskUsage::AtEnd }
}

/// An answer that may be shown, with its beginning.
pub(crate) struct Answer {
    /// The upstream's side.
    pub up: HttpSession,
    /// Under which its connection goes back into the pool.
    pub peer: HttpPeer,
    /// Its status.
    pub status: StatusCode,
    /// Body bytes held back so far, ready to forward.
    pub held: SmallVec<[Bytes; 4]>,
    /// Whether the body has ended already.
    pub ended: bool,
    /// Reads along.
    pub meter: Meter,
    /// Whether it is a stream of events.
    pub stream: bool,
    /// When the attempt was dispatched.
    pub dispatched: Instant,
    /// When the last token came.
    pub last_token: Instant,
    /// Deadlines.
    pub timeouts: Timeouts,
    /// How long the connection may idle in the pool.
    pub idle: Duration,
    /// Counts the call on the node until it is dropped.
    pub guard: Option<InFlight>,
    /// What the answer is, if it is a refusal that another target may not share.
    pub refusal: Option<Class>,
    /// What the upstream knows of us and must not be shown.
    pub credential: Option<Credential>,
}

/// Makes one attempt.
///
/// # Errors
/// The failure of the node, or that the client left.
pub(crate) async fn run(
    client: &mut Client<'_>,
    ctx: &mut Ctx,
    request: &mut Dispatch,
    (target, node, credential): (&Target, &Node, Option<&Credential>),
    guard: InFlight,
) -> Result<Box<Answer>, End> {
    let upstream = &*target.upstream;
    let body = request.body_for(ctx, target);
    let dispatched = Instant::now();
    let timeouts = upstream.timeouts;
    let wants_stream = ctx.exchange.call.as_ref().is_some_and(|c| c.stream);
    let patience = if wants_stream { timeouts.first_byte.min(timeouts.total) } else { timeouts.total };
    let mut fresh = false;
    let timer = sleep_until(dispatched + timeouts.connect);
    tokio::pin!(timer);
    let (up, peer) = loop {
        let toward = (upstream, node, credential);
        let head =
            upstream::call_head(client.session().req_header(), &ctx.exchange, toward, &request.forwarded, body.len())
                .map_err(|e| failed(Class::ServerError, e.to_string()))?;
        let peer = upstream::peer(node, upstream, fresh).map_err(End::Failed)?;
        // Connecting is short and its future large: boxed, it does not weigh on the stream that follows.
        let connecting = Box::pin(ctx.gateway.connector.get_http_session(&peer));
        let connected =
            race(client, timer.as_mut(), dispatched + timeouts.connect + Duration::from_millis(100), connecting).await;
        let (mut up, reused) = match connected {
            Ok(Ok(pair)) => pair,
            Ok(Err(error)) => return Err(End::Failed(upstream::failure(&error))),
            Err(Cut::Deadline) => {
                return Err(End::Failed(Failure {
                    unprocessed: true,
                    ..Failure::silent(Class::Connect, "connect timeout")
                }));
            }
            Err(Cut::ClientGone) => return Err(End::ClientGone),
        };
        if client.is_gone() {
            // Nothing was sent: there is nothing to read on.
            return Err(End::ClientGone);
        }
        if let Some(reservation) = &mut ctx.exchange.reservation {
            reservation.dispatched();
        }
        ctx.exchange.tally.dispatched = true;
        match race(client, timer.as_mut(), dispatched + patience, exchange_heads(&mut up, head, body.clone())).await {
            // A connection that was made fresh goes into the pool like any other.
            Ok(Ok(())) if fresh => break (up, upstream::peer(node, upstream, false).map_err(End::Failed)?),
            Ok(Ok(())) => break (up, peer),
            // The node had closed the pooled connection before it saw the request: that is no attempt yet.
            Ok(Err(error)) if reused && !fresh && upstream::is_stale(&error) => fresh = true,
            Ok(Err(error)) => return Err(End::Failed(upstream::failure(&error))),
            Err(Cut::Deadline) => return Err(silent(Class::Timeout, "no response header in time")),
            Err(Cut::ClientGone) => return Err(End::ClientGone),
        }
    };
    let Some(response) = up.response_header() else {
        return Err(failed(Class::ServerError, "no response header"));
    };
    if let Some(failure) = refusal(response, !upstream.is_own()) {
        drain(ctx, up, &peer, upstream.pool.idle).await;
        return Err(End::Failed(failure));
    }
    let status = response.status;
    let stream = status.is_success() && is_event_stream(response);
    let mut answer = Box::new(Answer {
        meter: meter(ctx, target, stream),
        up,
        peer,
        status,
        held: SmallVec::new(),
        ended: false,
        stream,
        dispatched,
        last_token: dispatched,
        timeouts,
        idle: upstream.pool.idle,
        guard: Some(guard),
        refusal: None,
        credential: credential.cloned(),
    });
    if let Err(end) = hold(client, timer, &mut answer).await {
        if matches!(end, End::ClientGone) && answer.status.is_success() && answer.meter.states_input() {
            // Nothing was shown yet, but the node may have said what the prompt cost.
            ctx.exchange.tally.usage = Some(answer.meter.usage(ctx.exchange.prompt_tokens()));
        }
        return Err(end);
    }
    mask(&mut answer);
    if answer.status.is_client_error() && answer.ended {
        let body: Vec<u8> = answer.held.iter().flat_map(|part| part.iter().copied()).collect();
        answer.refusal = class_of_refusal(answer.status.as_u16(), &body);
    }
    Ok(answer)
}

fn failed(class: Class, detail: impl Into<String>) -> End {
    End::Failed(Failure::new(class, detail))
}

fn silent(class: Class, detail: impl Into<String>) -> End {
    End::Failed(Failure::silent(class, detail))
}

fn meter(ctx: &Ctx, target: &Target, stream: bool) -> Meter {
    let call = ctx.exchange.call.as_ref();
    let kind = call.map_or(CallKind::Other, |c| c.kind);
    let dialect = target.upstream.dialect;
    // The usage that only we asked for is taken out of what the client sees.
    let view = call.map(|call| call.usage_view(asked(target))).unwrap_or_default();
    if stream { Meter::stream(dialect, kind, view) } else { Meter::plain(dialect, kind) }
}

/// Sends the request and reads the response header, informational ones aside.
async fn exchange_heads(up: &mut HttpSession, head: RequestHeader, body: Bytes) -> pingora_core::Result<()> {
    up.write_request_header(Box::new(head)).await?;
    up.write_request_body(body, true).await?;
    up.finish_request_body().await?;
    loop {
        up.read_response_header().await?;
        match up.response_header() {
            Some(head) if head.status.is_informational() && head.status != StatusCode::SWITCHING_PROTOCOLS => {}
            _ => return Ok(()),
        }
    }
}

/// The failure that a response header stands for, if it is the upstream's fault and not the client's business.
fn refusal(head: &ResponseHeader, with_credential: bool) -> Option<Failure> {
    let status = head.status.as_u16();
    if status == 101 || head.status.is_redirection() {
        return Some(Failure::new(Class::ServerError, format!("unexpected status {status}")));
    }
    let class = class_of_status(status, with_credential)?;
    let retry_after = retry_after(&head.headers, SystemTime::now());
    Some(Failure { retry_after, ..Failure::new(class, format!("status {status}")) })
}

fn is_event_stream(head: &ResponseHeader) -> bool {
    head.headers
        .get(CONTENT_TYPE)
        .is_some_and(|v| v.as_bytes().get(..17).is_some_and(|t| t.eq_ignore_ascii_case(b"text/event-stream")))
}

/// Reads what a refusal says, in bounds, so that its connection can be used again.
async fn drain(ctx: &Ctx, mut up: HttpSession, peer: &HttpPeer, idle: Duration) {
    let mut left = DRAINED_BYTES;
    let drained = async {
        while let Ok(chunk) = up.read_response_body().await {
            match chunk {
                None => return true,
                Some(chunk) if chunk.len() <= left => left -= chunk.len(),
                Some(_) => return false,
            }
        }
        false
    };
    if matches!(tokio::time::timeout(DRAIN_TIME, drained).await, Ok(true)) {
        ctx.gateway.connector.release_http_session(up, peer, Some(idle)).await;
    }
}

/// Holds the answer back until it is clear that it is one.
async fn hold(client: &mut Client<'_>, mut timer: Pin<&mut Sleep>, answer: &mut Answer) -> Result<(), End> {
    let timeouts = answer.timeouts;
    let patience = if answer.stream { timeouts.first_token.min(timeouts.total) } else { timeouts.total };
    let deadline = answer.dispatched + patience;
    let mut held_bytes = 0;
    loop {
        let chunk = match race(client, timer.as_mut(), deadline, answer.up.read_response_body()).await {
            Ok(Ok(chunk)) => chunk,
            Ok(Err(error)) => {
                return Err(failed(Class::ServerError, format!("broken off: {}", error.etype().as_str())));
            }
            Err(Cut::Deadline) if answer.stream => return Err(silent(Class::FirstToken, "no token in time")),
            Err(Cut::Deadline) => return Err(silent(Class::Timeout, "no answer in time")),
            Err(Cut::ClientGone) => return Err(End::ClientGone),
        };
        answer.ended = chunk.is_none();
        let seen = match chunk {
            Some(chunk) => answer.meter.feed(chunk).map_err(|e| failed(Class::ServerError, e.to_string()))?,
            None => answer.meter.finish(),
        };
        held_bytes += seen.forward.iter().map(Bytes::len).sum::<usize>();
        answer.held.extend(seen.forward);
        if answer.status.is_success() {
            if seen.error.is_some() {
                return Err(failed(Class::ServerError, "an error in place of an answer"));
            }
            // Of a plain answer nothing was shown yet, whatever tokens it had.
            if seen.malformed && (!answer.stream || !answer.meter.tokens_seen()) {
                let what = if answer.stream { "the first event is malformed" } else { "the answer is malformed" };
                return Err(failed(Class::ServerError, what));
            }
        }
        if answer.stream {
            if seen.token || seen.progress {
                answer.last_token = Instant::now();
                return Ok(());
            }
            if answer.ended {
                return Err(failed(Class::FirstToken, "the stream ended before its first token"));
            }
        } else if answer.ended {
            return Ok(());
        } else if held_bytes > HELD_BYTES {
            match (&answer.credential, answer.status.is_success()) {
                // An error that may echo our credential is masked whole.
                (Some(_), false) if held_bytes > MASKED_BYTES => {
                    return Err(failed(Class::ServerError, "an endless error"));
                }
                (Some(_), false) => {}
                (None, _) | (_, true) => return Ok(()),
            }
        }
    }
}

/// Takes our credential out of an error that echoes it.
fn mask(answer: &mut Answer) {
    let Some(credential) = answer.credential.as_ref().filter(|_| !answer.status.is_success()) else { return };
    let whole: Vec<u8> = answer.held.iter().flat_map(|b| b.iter().copied()).collect();
    answer.held = std::iter::once(credential.mask(whole.into())).collect();
}

/// Why waiting was cut short.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cut {
    Deadline,
    ClientGone,
}

/// Waits for `work`, but not beyond the deadline and not once the client has left. The timer is shared by all waits of
/// an attempt: moving it to a later time is cheap, making a new one is not.
async fn race<T>(
    client: &mut Client<'_>,
    mut timer: Pin<&mut Sleep>,
    deadline: Instant,
    work: impl Future<Output = T>,
) -> Result<T, Cut> {
    if timer.deadline() != deadline {
        timer.as_mut().reset(deadline);
    }
    tokio::select! {
        biased;
        done = work => Ok(done),
        _ = client.leaves() => Err(Cut::ClientGone),
        () = timer => Err(Cut::Deadline),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(status: u16, pairs: &[(&'static str, &str)]) -> ResponseHeader {
        let mut head = ResponseHeader::build(status, None).unwrap();
        for (name, value) in pairs {
            head.insert_header(*name, *value).unwrap();
        }
        head
    }

    #[test]
    fn redirects_and_upgrades_of_an_upstream_are_failures_and_a_400_is_not() {
        assert!(refusal(&head(302, &[]), false).is_some());
        assert!(refusal(&head(101, &[]), false).is_some());
        assert_eq!(
            refusal(&head(429, &[("retry-after", "2")]), false).unwrap().retry_after,
            Some(Duration::from_secs(2))
        );
        assert!(refusal(&head(400, &[]), true).is_none());
    }

    #[test]
    fn an_event_stream_is_known_by_its_type() {
        assert!(is_event_stream(&head(200, &[("content-type", "text/event-stream; charset=utf-8")])));
        assert!(!is_event_stream(&head(200, &[("content-type", "application/json")])));
    }
}
