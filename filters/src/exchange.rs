//! One request on its way: what arrived, what it asks for, and what became of it. Closed structs, no type maps.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::HeaderValue;

use crate::auth::Caller;
use crate::call::Call;
use crate::dialect::Dialect;
use crate::limit::{Reservation, RuleSet, Standings};
use crate::meter::exact::{self, Vocabulary};
use crate::model::{Model, Target};
use crate::trace::{RequestId, TraceContext};
use crate::usage::Usage;

/// What is known from the head of a request.
#[derive(Debug)]
pub struct Arrival {
    /// Name of the route.
    pub route: Arc<str>,
    /// Limits of the route.
    pub route_rules: Arc<RuleSet>,
    /// In which dialect errors are told.
    pub dialect: Dialect,
    /// The client's id of the request if it is sane, else ours.
    pub request_id: RequestId,
    /// Trace context toward upstreams.
    pub trace: TraceContext,
    /// The client's address, from `X-Forwarded-For` only if the peer is trusted.
    pub client_ip: IpAddr,
    /// Wall clock at arrival, seconds since the epoch.
    pub unix_seconds: u64,
    /// Origin of a browser's request, where the route answers those.
    pub origin: Option<HeaderValue>,
    /// Whether it is a browser's preflight, which has been answered.
    pub preflight: bool,
    /// Who calls, once that is known.
    pub caller: Option<Arc<Caller>>,
}

/// A request and its fate.
#[derive(Debug)]
pub struct Exchange {
    /// Its head.
    pub arrival: Arrival,
    /// The parsed call; `None` in the pass lane.
    pub call: Option<Call>,
    /// Its body, while it is being admitted.
    pub body: Bytes,
    /// Tokens of the prompt by an exact count, where one was needed.
    pub prompt_counted: Option<u64>,
    /// The target of the last attempt.
    pub target: Option<Target>,
    /// The model that was asked for.
    pub model: Option<Arc<Model>>,
    /// What was set aside for the call, until it is settled.
    pub reservation: Option<Reservation>,
    /// Where the limits stood when they refused the call.
    pub refused: Option<Standings>,
    /// What became of it.
    pub tally: Tally,
}

/// What became of a request, for headers, metrics and the access log.
#[derive(Debug, Default)]
pub struct Tally {
    /// Attempts made.
    pub attempts: u32,
    /// Whether anything was sent to an upstream.
    pub dispatched: bool,
    /// Upstream of the last attempt.
    pub upstream: Option<Arc<str>>,
    /// Node of the last attempt.
    pub node: Option<Arc<str>>,
    /// The model's name at the target of the last attempt.
    pub target_model: Option<Arc<str>>,
    /// What was consumed.
    pub usage: Option<Usage>,
    /// The estimate of the whole output, and whether the answer came to its proper end.
    pub output: (u64, bool),
    /// From arrival to the first token.
    pub first_token: Option<Duration>,
    /// From the dispatch of the answering attempt to its last token, of a stream.
    pub last_token: Option<Duration>,
    /// From the dispatch of the answering attempt to its first token, of a stream.
    pub prefill: Option<Duration>,
    /// Time that passed in upstreams.
    pub upstream_time: Duration,
    /// Status sent.
    pub status: u16,
    /// Whether the connection must not serve another request.
    pub close: bool,
    /// Code word of the error, if one was told.
    pub code: Option<&'static str>,
    /// Body bytes from the client.
    pub bytes_in: u64,
    /// Body bytes to the client.
    pub bytes_out: u64,
}

impl Exchange {
    /// A request that has just arrived.
    pub fn new(arrival: Arrival) -> Self {
        Self {
            arrival,
            call: None,
            body: Bytes::new(),
            prompt_counted: None,
            target: None,
            model: None,
            reservation: None,
            refused: None,
            tally: Tally::default(),
        }
    }

    /// Where the call is answered: the target of the last attempt, before the first one the target it will begin with.
    pub fn target(&self) -> Option<&Target> {
        self.target.as_ref().or_else(|| self.model.as_ref()?.targets.first())
    }

    /// The vocabulary that may count better than the estimate does: the model's own, or any while nothing was learned of the model.
    pub fn vocabulary(&self) -> Option<Vocabulary> {
        let target = self.target()?;
        let better = target.tokens.own || target.learned.input.known().is_none();
        better.then_some(target.tokens.vocabulary)
    }

    /// Counts the prompt in `body`, which is the call's, where that is better than the estimate. A body that is too long stays estimated.
    pub async fn count_prompt(&mut self, body: &[u8]) {
        let Some(vocabulary) = self.vocabulary().filter(|_| self.prompt_counted.is_none()) else { return };
        let Some(call) = self.call.as_ref().filter(|_| !body.is_empty() && body.len() <= exact::LONGEST) else {
            return;
        };
        let counted = vocabulary.count_apart(call.prompt_text(body)).await;
        self.prompt_counted = counted.map(|text| call.prompt.with_text(text));
    }

    /// Tokens of the prompt as far as we can tell: counted, or estimated and corrected by what was learned of the model.
    pub fn prompt_tokens(&self) -> u64 {
        let Some(call) = &self.call else { return 0 };
        if let Some(counted) = self.prompt_counted {
            return counted;
        }
        let estimate = call.prompt_tokens();
        match self.target() {
            Some(target) if call.prompt.is_text() => target.learned.input.correct(estimate),
            Some(_) | None => estimate,
        }
    }
}
