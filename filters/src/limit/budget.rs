//! What the provider of an upstream grants: drawn before every attempt, corrected when it is known what was used. Several
//! gateways on one Redis share one grant; while it is away each takes its part of what was left.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

use super::Ledger;
use super::bucket::{Bucket, Draw, Grant};

/// The grant of an upstream and what is left of it.
#[derive(Debug)]
pub struct Budget {
    name: Arc<str>,
    grant: Grant,
    /// Longest delay of a call.
    wait: Duration,
    state: Arc<Mutex<State>>,
}

#[derive(Debug)]
struct State {
    bucket: Bucket,
    /// Requests and tokens to be given back in the store with the next draw.
    back: (i64, i64),
}

/// What an attempt drew; to be told what became of it. Dropped as it is, the estimate stays drawn.
#[derive(Debug)]
#[must_use]
pub struct Drawn {
    budget: Arc<Budget>,
    tokens: i64,
    shared: bool,
    /// After which time the attempt may be made.
    pub delay: Duration,
}

impl Drawn {
    /// The attempt was not made: all of it is given back.
    pub fn unsent(self) {
        self.budget.give(1, self.tokens, self.shared);
    }

    /// The attempt used so many tokens.
    pub fn used(self, tokens: u64) {
        self.budget.give(0, self.tokens.saturating_sub(signed(tokens)), self.shared);
    }
}

impl Budget {
    /// The budget of the upstream of that name; what is known of it from the configuration before is kept.
    pub fn new(name: Arc<str>, grant: Grant, wait: Duration, before: Option<&Self>) -> Self {
        let state = || Arc::new(Mutex::new(State { bucket: Bucket::full(grant, 0), back: (0, 0) }));
        Self { name, grant, wait, state: before.map_or_else(state, |before| Arc::clone(&before.state)) }
    }

    /// Draws one request and so many tokens; `now` counts from the start of the process. One question to the store, where
    /// there is one.
    ///
    /// # Errors
    /// Nothing was drawn: the delay would be longer than a call waits. When it would go out.
    pub async fn draw(self: &Arc<Self>, ledger: &Ledger, tokens: u64, now: Duration) -> Result<Drawn, Duration> {
        let draw = Draw { requests: 1, tokens, wait: self.wait, ..Draw::default() };
        let (granted, delay) = self.ask(ledger, draw, now).await;
        if !granted {
            return Err(delay);
        }
        Ok(Drawn { budget: Arc::clone(self), tokens: signed(tokens), shared: ledger.is_shared(), delay })
    }

    /// Tells the store what was given back since the last draw.
    pub async fn flush(&self, ledger: &Ledger, now: Duration) {
        if ledger.is_shared() && self.state.lock().back != (0, 0) {
            let _ = self.ask(ledger, Draw::default(), now).await;
        }
    }

    async fn ask(&self, ledger: &Ledger, draw: Draw, now: Duration) -> (bool, Duration) {
        let now = i64::try_from(now.as_millis()).unwrap_or(i64::MAX);
        if ledger.is_shared() {
            let back = std::mem::take(&mut self.state.lock().back);
            let asked = Draw { back_requests: back.0, back_tokens: back.1, ..draw };
            let (drawn, bucket) = match ledger.draw(&self.name, self.grant, &asked, now).await {
                Some(answer) => answer,
                None => return self.alone(ledger, draw, back, now),
            };
            self.state.lock().bucket = bucket;
            return (drawn.granted, drawn.delay);
        }
        let drawn = self.state.lock().bucket.draw(self.grant, &draw, now);
        (drawn.granted, drawn.delay)
    }

    /// Without the store: from this gateway's part. What is used is told later.
    fn alone(&self, ledger: &Ledger, draw: Draw, back: (i64, i64), now: i64) -> (bool, Duration) {
        let mut state = self.state.lock();
        state.back = (state.back.0.saturating_add(back.0), state.back.1.saturating_add(back.1));
        let drawn = state.bucket.draw(self.grant.part(ledger.gateways()), &draw, now);
        if drawn.granted {
            state.back.0 = state.back.0.saturating_sub(signed(draw.requests));
            state.back.1 = state.back.1.saturating_sub(signed(draw.tokens));
        }
        (drawn.granted, drawn.delay)
    }

    fn give(&self, requests: i64, tokens: i64, shared: bool) {
        let mut state = self.state.lock();
        state.bucket.give(self.grant, requests, tokens);
        if shared {
            state.back = (state.back.0.saturating_add(requests), state.back.1.saturating_add(tokens));
        }
    }
}

fn signed(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests;
