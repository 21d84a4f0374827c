//! The client of a call, watched while an upstream works for it: whether it is still there, and what its leaving means.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use pingora_core::protocols::http::ServerSession;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant, sleep_until};

use super::Ctx;
use crate::gateway::Gateway;
use crate::runtime::OnAbort;

/// A client, and what becomes of the work for it once it has left.
pub(crate) struct Client<'c> {
    session: &'c mut ServerSession,
    gateway: Arc<Gateway>,
    on_abort: OnAbort,
    left: Option<Left>,
}

/// A client that is gone.
struct Left {
    /// Until when its answer is read on, and the right to do so.
    drain: Option<(Instant, OwnedSemaphorePermit)>,
}

impl<'c> Client<'c> {
    /// Watches the client of a call.
    pub(crate) fn new(session: &'c mut ServerSession, ctx: &Ctx) -> Self {
        let on_abort = ctx.route.as_ref().map_or(OnAbort::Cancel, |route| route.on_abort);
        Self { session, gateway: Arc::clone(&ctx.gateway), on_abort, left: None }
    }

    /// Its connection, for what is not the body of an answer.
    pub(crate) fn session(&mut self) -> &mut ServerSession {
        self.session
    }

    /// Whether it has left.
    pub(crate) const fn is_gone(&self) -> bool {
        self.left.is_some()
    }

    /// Sends a piece of the answer; to a client that left while its answer is still read, nothing is sent.
    ///
    /// # Errors
    /// The client is gone, and the work for it is to end.
    pub(crate) async fn write(&mut self, bytes: Bytes, end: bool) -> Result<(), Gone> {
        if self.left.is_none() && self.session.write_response_body(bytes, end).await.is_err() {
            self.note_left();
        }
        match &self.left {
            Some(Left { drain: None }) => Err(Gone),
            Some(Left { drain: Some(_) }) | None => Ok(()),
        }
    }

    /// Notes that it left, if that was not known yet.
    pub(crate) fn note_left(&mut self) {
        if self.left.is_none() {
            self.left = Some(Left { drain: self.drain() });
        }
    }

    /// Until when its answer may be read on: not at all if the route does not want it, too many are read on already, or the
    /// gateway is about to end.
    fn drain(&self) -> Option<(Instant, OwnedSemaphorePermit)> {
        let OnAbort::Drain(at_most) = self.on_abort else { return None };
        if self.gateway.is_draining() {
            return None;
        }
        let permit = Arc::clone(&self.gateway.drains).try_acquire_owned().ok()?;
        Some((Instant::now() + at_most.min(Duration::from_secs(24 * 3600)), permit))
    }

    /// Waits until the work for it is to end because it has left: at once, or after the time that its answer is read on. To be
    /// raced against that work, again and again.
    pub(crate) async fn leaves(&mut self) -> Gone {
        if self.left.is_none() {
            // Whatever comes now, the body was read before: either the client is gone or it breaks the protocol.
            let _ = self.session.read_body_or_idle(true).await;
            self.note_left();
        }
        if let Some(Left { drain: Some((until, _)) }) = &self.left {
            let until = *until;
            tokio::select! {
                () = sleep_until(until) => {}
                () = self.gateway.leaving.wait() => {}
            }
        }
        Gone
    }
}

/// The client is gone, and nobody wants the rest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Gone;
