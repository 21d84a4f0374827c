//! A streamed answer: steps, taken one after another at the pace of the node.

use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::{self, BoxStream};

use crate::node::Run;
use crate::record::{CallGuard, Ending};
use crate::serve::Peer;

/// One step of a streamed answer.
pub(crate) enum Step {
    /// Bytes to send, and whether they are a generated token.
    Send { bytes: Bytes, token: bool },
    /// The time one token takes, for all choices together.
    Decode,
    /// A pause.
    Wait(Duration),
    /// Queueing and prefill.
    Prefill,
    /// All tokens are made; whether there would have been more.
    Finished { cut_short: bool },
    /// Silence until the peer leaves.
    Stall,
    /// The connection is closed as it stands.
    Cut,
}

impl Step {
    pub(crate) fn event(bytes: impl Into<Bytes>) -> Self {
        Self::Send { bytes: bytes.into(), token: false }
    }

    pub(crate) fn token(bytes: impl Into<Bytes>) -> Self {
        Self::Send { bytes: bytes.into(), token: true }
    }
}

/// Time that bytes need to leave for the peer before a connection is closed under them.
const FLUSH: Duration = Duration::from_millis(3);

struct Talk {
    call: CallGuard,
    peer: Peer,
    run: Run,
    steps: Box<dyn Iterator<Item = Step> + Send>,
}

impl Talk {
    async fn next(mut self) -> Option<(Bytes, Self)> {
        loop {
            let Some(step) = self.steps.next() else {
                self.call.finish(Ending::Complete);
                return None;
            };
            match step {
                Step::Send { bytes, token } => {
                    if token {
                        self.run.made(1);
                        self.call.generated(1);
                    }
                    // Each event leaves on its own, as from an engine that makes one token at a time.
                    tokio::task::yield_now().await;
                    return Some((bytes, self));
                }
                Step::Decode => self.run.step().await,
                Step::Finished { cut_short } => self.run.finished(cut_short),
                Step::Wait(pause) => tokio::time::sleep(pause).await,
                Step::Prefill => {
                    let cached = self.run.prefill().await;
                    self.call.edit(|row| row.cached_tokens = cached);
                }
                Step::Stall => std::future::pending().await,
                Step::Cut => {
                    tokio::time::sleep(FLUSH).await;
                    self.peer.hang_up(&mut self.call).await
                }
            }
        }
    }
}

/// The body that takes the steps; dropped before the last one, the call counts as abandoned.
pub(crate) fn talk(
    call: CallGuard,
    peer: Peer,
    run: Run,
    steps: impl Iterator<Item = Step> + Send + 'static,
) -> BoxStream<'static, Bytes> {
    stream::unfold(Talk { call, peer, run, steps: Box::new(steps) }, Talk::next).boxed()
}
