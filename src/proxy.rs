//! The data port as Pingora sees it. Every hook is a few lines: what happens is in the modules, in the order of a
//! request's way.
//!
//! - `intake` the head: strict checks, canonical path, route, the filters that work on the head alone
//! - `own` what the gateway answers itself
//! - `body`, `call`, `attempt`, `relay` the call lane, answered from `request_filter` by our own loop; `leave` what it means there
//!   that a client leaves
//! - `pass` the pass lane, Pingora's stock loop
//! - `upstream` heads and errors toward nodes; `reply` our own answers; `record` log and metrics

pub(crate) mod attempt;
pub(crate) mod body;
pub(crate) mod call;
pub(crate) mod intake;
pub(crate) mod leave;
pub(crate) mod own;
pub(crate) mod pass;
pub(crate) mod record;
pub(crate) mod relay;
pub(crate) mod reply;
pub(crate) mod resume;
pub(crate) mod upstream;
mod wait;

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use pingora_core::upstreams::peer::HttpPeer;
use pingora_core::{Error, ErrorSource, ErrorType};
use pingora_http::{RequestHeader, ResponseHeader};
use pingora_proxy::{FailToProxy, ProxyHttp, Session};
use tokio::time::sleep;
use tollgate_filters::exchange::Exchange;
use tollgate_filters::filter::Flow;

use crate::gateway::{Gateway, Open};
use crate::listen::client_io;
use crate::runtime::{Lane, Route, Runtime};
use call::Outcome;

/// A client that takes no byte for so long is given up.
const WRITE_TIMEOUT: Duration = Duration::from_secs(60);

/// Time for the frames before an HTTP/2 reset to go out.
const H2_LAST_WORDS: Duration = Duration::from_millis(20);

/// The data port.
pub(crate) struct Proxy {
    /// What all requests share.
    pub gateway: Arc<Gateway>,
}

/// One request on its way through Pingora's hooks.
pub(crate) struct Ctx {
    /// What all requests share.
    pub gateway: Arc<Gateway>,
    /// The configuration that this request began with, and ends with.
    pub runtime: Arc<Runtime>,
    /// The route, once it is known.
    pub route: Option<Arc<Route>>,
    /// The request itself.
    pub exchange: Exchange,
    /// When it arrived.
    pub started: Instant,
    /// How it ended, in the call lane.
    pub outcome: Option<Outcome>,
    /// State of the pass lane.
    pub passage: Option<pass::Passage>,
    _open: Open,
}

#[async_trait]
impl ProxyHttp for Proxy {
    type CTX = Option<Box<Ctx>>;

    fn new_ctx(&self) -> Self::CTX {
        None
    }

    async fn early_request_filter(&self, session: &mut Session, ctx: &mut Self::CTX) -> pingora_core::Result<()> {
        client_io::header_arrived();
        session.set_write_timeout(Some(WRITE_TIMEOUT));
        let runtime = self.gateway.live.load_full();
        let exchange = intake::arrival(session.as_downstream(), &runtime);
        *ctx = Some(Box::new(Ctx {
            gateway: Arc::clone(&self.gateway),
            runtime,
            route: None,
            exchange,
            started: Instant::now(),
            outcome: None,
            passage: None,
            _open: self.gateway.enter(),
        }));
        Ok(())
    }

    async fn request_filter(&self, session: &mut Session, ctx: &mut Self::CTX) -> pingora_core::Result<bool> {
        let ctx = known(ctx)?;
        let client = session.as_downstream_mut();
        let next = match intake::arrive(client, ctx).await {
            Ok(Flow::Next) => ctx.route.clone(),
            Ok(Flow::Answer(answer)) => return reply::send(client, ctx, *answer).await.map(|()| true),
            Err(error) => return reply::refuse(client, ctx, &error).await.map(|()| true),
        };
        let Some(route) = next else { return Err(unset()) };
        match &route.lane {
            Lane::Own => match own::answer(client.req_header(), ctx).await {
                Ok(answer) => reply::send(client, ctx, answer).await.map(|()| true),
                Err(error) => reply::refuse(client, ctx, &error).await.map(|()| true),
            },
            Lane::Call(callee) => {
                let outcome = call::serve(client, ctx, callee).await;
                ctx.outcome = Some(outcome);
                match outcome {
                    Outcome::Answered => Ok(true),
                    Outcome::ClientGone => Err(Error::new_down(ErrorType::ConnectionClosed)),
                    Outcome::BrokenOff | Outcome::CutOff => Err(Error::new_up(ErrorType::ConnectionClosed)),
                }
            }
            Lane::Pass(lane) => pass::begin(client, ctx, lane).await,
        }
    }

    async fn upstream_peer(&self, _: &mut Session, ctx: &mut Self::CTX) -> pingora_core::Result<Box<HttpPeer>> {
        pass::peer(known(ctx)?)
    }

    async fn request_body_filter(
        &self,
        _: &mut Session,
        body: &mut Option<bytes::Bytes>,
        _: bool,
        ctx: &mut Self::CTX,
    ) -> pingora_core::Result<()> {
        pass::request_body(known(ctx)?, body.as_ref())
    }

    async fn upstream_request_filter(
        &self,
        session: &mut Session,
        head: &mut RequestHeader,
        ctx: &mut Self::CTX,
    ) -> pingora_core::Result<()> {
        pass::upstream_request(session.as_downstream(), head, known(ctx)?)
    }

    async fn response_filter(
        &self,
        _: &mut Session,
        head: &mut ResponseHeader,
        ctx: &mut Self::CTX,
    ) -> pingora_core::Result<()> {
        pass::response(head, known(ctx)?)
    }

    fn response_body_filter(
        &self,
        _: &mut Session,
        body: &mut Option<bytes::Bytes>,
        _: bool,
        ctx: &mut Self::CTX,
    ) -> pingora_core::Result<Option<Duration>> {
        known(ctx)?.exchange.tally.bytes_out += body.as_ref().map_or(0, |b| b.len() as u64);
        Ok(None)
    }

    fn fail_to_connect(&self, _: &mut Session, _: &HttpPeer, ctx: &mut Self::CTX, error: Box<Error>) -> Box<Error> {
        match known(ctx) {
            Ok(ctx) => pass::connect_failed(ctx, error),
            Err(_) => error,
        }
    }

    fn error_while_proxy(
        &self,
        _: &HttpPeer,
        session: &mut Session,
        error: Box<Error>,
        _: &mut Self::CTX,
        reused: bool,
    ) -> Box<Error> {
        pass::failed(session, error, reused)
    }

    async fn fail_to_proxy(&self, session: &mut Session, error: &Error, ctx: &mut Self::CTX) -> FailToProxy {
        let client = session.as_downstream_mut();
        let lost = FailToProxy { error_code: 0, can_reuse_downstream: false };
        let Ok(ctx) = known(ctx) else { return lost };
        if client.response_written().is_some() || *error.esource() == ErrorSource::Downstream {
            // Too late for an answer, or nobody to read it: HTTP/2 gets a reset, HTTP/1 a body without its end.
            if client.is_http2() {
                // A reset takes back what was not written yet; what was said before it should arrive.
                sleep(H2_LAST_WORDS).await;
            }
            if client.is_http2() {
                // A reset takes back what was not written yet; what was said before it should arrive.
                sleep(H2_LAST_WORDS).await;
            }
            client.shutdown().await;
            return lost;
        }
        let gateway_error = pass::client_error(error, ctx);
        let told = reply::refuse(client, ctx, &gateway_error).await.is_ok();
        FailToProxy { error_code: gateway_error.face().status, can_reuse_downstream: told }
    }

    async fn logging(&self, session: &mut Session, error: Option<&Error>, ctx: &mut Self::CTX) {
        if let Some(mut ctx) = ctx.take() {
            record::finish(session.as_downstream(), &mut ctx, error);
        }
    }

    fn suppress_error_log(&self, _: &Session, _: &Self::CTX, _: &Error) -> bool {
        // The access log has a line for every request, failed ones included.
        true
    }
}

fn known(ctx: &mut Option<Box<Ctx>>) -> pingora_core::Result<&mut Ctx> {
    ctx.as_deref_mut().ok_or_else(unset)
}

fn unset() -> Box<Error> {
    Error::explain(ErrorType::InternalError, "a hook ran before the request was set up")
}
