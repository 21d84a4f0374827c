//! The engine of a node: a queue, a prefill that one request has at a time, decoding that slows as more run.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::NodeConfig;
use super::kv::{PrefixCache, chain};

/// What the engine has counted since its start, in tokens and requests.
#[derive(Default)]
pub(crate) struct Counters {
    pub(crate) queries: AtomicU64,
    pub(crate) hits: AtomicU64,
    pub(crate) prompt: AtomicU64,
    pub(crate) output: AtomicU64,
    pub(crate) stopped: AtomicU64,
    pub(crate) cut_short: AtomicU64,
}

pub(crate) struct Engine {
    prefill_tokens_per_second: f64,
    decode: Duration,
    decode_per_running: Duration,
    block_tokens: usize,
    blocks: usize,
    max_running: usize,
    queue: usize,
    pub(crate) counters: Counters,
    prefill: tokio::sync::Mutex<()>,
    state: Mutex<State>,
}

struct State {
    running: usize,
    running_blocks: usize,
    last: u64,
    waiting: VecDeque<Waiting>,
    cache: PrefixCache,
}

struct Waiting {
    id: u64,
    blocks: usize,
    go: oneshot::Sender<()>,
}

/// What the engine is doing.
pub(crate) struct Load {
    pub(crate) running: usize,
    pub(crate) waiting: usize,
    pub(crate) kv_usage: f64,
    pub(crate) cached_blocks: usize,
}

impl Engine {
    pub(crate) fn new(config: &NodeConfig) -> Self {
        Self {
            prefill_tokens_per_second: config.prefill_tokens_per_second,
            decode: config.decode,
            decode_per_running: config.decode_per_running,
            block_tokens: config.block_tokens.max(1),
            blocks: config.kv_blocks,
            max_running: config.max_running.max(1),
            queue: config.queue,
            counters: Counters::default(),
            prefill: tokio::sync::Mutex::default(),
            state: Mutex::new(State {
                running: 0,
                running_blocks: 0,
                last: 0,
                waiting: VecDeque::new(),
                cache: PrefixCache::new(config.kv_blocks),
            }),
        }
    }

    pub(crate) fn load(&self) -> Load {
        let state = self.state.lock();
        Load {
            running: state.running,
            waiting: state.waiting.len(),
            kv_usage: (state.running_blocks as f64 / self.blocks.max(1) as f64).min(1.0),
            cached_blocks: state.cache.len(),
        }
    }

    /// Takes a place for a request, at once or in the queue; `None` when the queue is full.
    pub(crate) fn enter(self: &Arc<Self>, prompt_tokens: usize, max_output: usize) -> Option<Seat> {
        let blocks = (prompt_tokens + max_output).div_ceil(self.block_tokens);
        let mut state = self.state.lock();
        let state = &mut *state;
        state.last += 1;
        let id = state.last;
        let go = if state.waiting.is_empty() && self.fits(state, blocks) {
            state.running += 1;
            state.running_blocks += blocks;
            None
        } else {
            if state.waiting.len() >= self.queue {
                return None;
            }
            let (go, wait) = oneshot::channel();
            state.waiting.push_back(Waiting { id, blocks, go });
            Some(wait)
        };
        Some(Seat { engine: Arc::clone(self), id, blocks, go })
    }

    // One request alone runs whatever its size.
    fn fits(&self, state: &State, blocks: usize) -> bool {
        state.running == 0 || (state.running < self.max_running && state.running_blocks + blocks <= self.blocks)
    }

    fn advance(&self, state: &mut State) {
        while let Some(next) = state.waiting.front() {
            if !self.fits(state, next.blocks) {
                return;
            }
            if let Some(next) = state.waiting.pop_front() {
                state.running += 1;
                state.running_blocks += next.blocks;
                // Its seat takes itself out of the queue before it goes, so somebody listens.
                let _ = next.go.send(());
            }
        }
    }
}

/// A request's place in the engine, in the queue or running; freed on drop.
pub(crate) struct Seat {
    engine: Arc<Engine>,
    id: u64,
    blocks: usize,
    go: Option<oneshot::Receiver<()>>,
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut state = self.engine.state.lock();
        if let Some(at) = state.waiting.iter().position(|waiting| waiting.id == self.id) {
            state.waiting.remove(at);
        } else {
            state.running -= 1;
            state.running_blocks -= self.blocks;
        }
        self.engine.advance(&mut state);
    }
}

/// The text of a request as the engine sees it.
pub(crate) struct Prompt {
    pub(crate) text: String,
    pub(crate) tokens: usize,
    /// What the answer will be; its blocks are cached too, so that the next turn of a conversation finds them.
    pub(crate) answer: String,
}

/// A request on its way through a simulator: it waits as long as the work would take.
pub(crate) struct Run {
    pace: Pace,
    cached: Arc<AtomicU64>,
    due: Option<Instant>,
}

enum Pace {
    Engine { seat: Seat, prompt: Prompt },
    Fixed(Duration),
}

impl Run {
    pub(crate) fn on_engine(seat: Seat, prompt: Prompt) -> Self {
        Self { pace: Pace::Engine { seat, prompt }, cached: Arc::default(), due: None }
    }

    /// A request with a fixed time per token and nothing else.
    pub(crate) fn fixed(per_token: Duration) -> Self {
        Self { pace: Pace::Fixed(per_token), cached: Arc::default(), due: None }
    }

    /// Where the cached tokens will stand once prefill is over.
    pub(crate) fn cached(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.cached)
    }

    /// Waits for a place, then for the prefill of what the cache does not hold; gives the cached prompt tokens.
    pub(crate) async fn prefill(&mut self) -> u64 {
        let Pace::Engine { seat, prompt } = &mut self.pace else { return 0 };
        if let Some(go) = seat.go.take() {
            // The sender lives in the queue, which outlives this seat.
            let _ = go.await;
        }
        let engine = &seat.engine;
        let turn = engine.prefill.lock().await;
        let blocks = chain(prompt.text.as_bytes(), engine.block_tokens);
        let held = engine.state.lock().cache.find(&blocks);
        let mut cached = held * engine.block_tokens;
        if cached >= prompt.tokens {
            // Something must be computed for the first token to come out.
            cached = prompt.tokens.saturating_sub(engine.block_tokens);
        }
        let fresh = prompt.tokens - cached;
        let rate = engine.prefill_tokens_per_second;
        if rate > 0.0 && rate.is_finite() {
            tokio::time::sleep(Duration::try_from_secs_f64(fresh as f64 / rate).unwrap_or(Duration::MAX)).await;
        }
        engine.state.lock().cache.insert(&blocks);
        drop(turn);
        let counters = &engine.counters;
        counters.queries.fetch_add(prompt.tokens as u64, Ordering::Relaxed);
        counters.hits.fetch_add(cached as u64, Ordering::Relaxed);
        counters.prompt.fetch_add(prompt.tokens as u64, Ordering::Relaxed);
        self.cached.store(cached as u64, Ordering::Relaxed);
        cached as u64
    }

    /// Waits for one more token of every choice.
    pub(crate) async fn step(&mut self) {
        let step = match &self.pace {
            Pace::Fixed(step) => *step,
            Pace::Engine { seat, .. } => {
                let others = seat.engine.load().running.saturating_sub(1);
                seat.engine.decode + seat.engine.decode_per_running * u32::try_from(others).unwrap_or(u32::MAX)
            }
        };
        if step.is_zero() {
            return;
        }
        // Due times add up, so a timer that is coarser than a step does not slow the whole down. Time spent
        // blocked by the peer is not caught up with.
        let now = Instant::now();
        let due = self.due.map_or(now, |due| due.max(now.checked_sub(Duration::from_millis(5)).unwrap_or(now))) + step;
        self.due = Some(due);
        tokio::time::sleep_until(due).await;
    }

    /// Counts one token of one choice.
    pub(crate) fn made(&self, tokens: u64) {
        if let Pace::Engine { seat, .. } = &self.pace {
            seat.engine.counters.output.fetch_add(tokens, Ordering::Relaxed);
        }
    }

    /// Counts the end of the answer and caches its text.
    pub(crate) fn finished(&self, cut_short: bool) {
        let Pace::Engine { seat, prompt } = &self.pace else { return };
        let counters = &seat.engine.counters;
        let counter = if cut_short { &counters.cut_short } else { &counters.stopped };
        counter.fetch_add(1, Ordering::Relaxed);
        let whole = [prompt.text.as_str(), prompt.answer.as_str()].concat();
        let blocks = chain(whole.as_bytes(), seat.engine.block_tokens);
        seat.engine.state.lock().cache.insert(&blocks);
    }
}
