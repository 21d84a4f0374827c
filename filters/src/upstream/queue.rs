//! Where calls wait while every node of an upstream is full: bounded, fair between keys, in order within a key.
//!
//! A slot that becomes free is handed to the next in line, so that nobody who comes later can take it. Free slots and
//! waiting calls that would take them never exist side by side: whoever joins looks once more under the same lock under
//! which slots are freed.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use smallvec::SmallVec;
use tokio::sync::oneshot;

use super::{InFlight, NodeState};
use crate::retry::Admits;

/// Keys without a waiting call whose turn is remembered while others wait.
const REMEMBERED: usize = 1_024;

/// The calls that wait for a node of an upstream. It outlives a configuration.
#[derive(Debug, Default)]
pub struct Queue {
    /// Most calls that wait; 0 is no queue.
    size: AtomicUsize,
    /// Longest wait in microseconds.
    wait: AtomicU64,
    /// Calls at the same time on one node; 0 is unlimited.
    most: AtomicU32,
    waiting: AtomicUsize,
    lines: Mutex<Lines>,
}

#[derive(Debug, Default)]
struct Lines {
    by_key: HashMap<Arc<str>, Line>,
    /// Counts what was handed out, and who came.
    turn: u64,
}

/// The calls of one key.
#[derive(Debug, Default)]
struct Line {
    calls: VecDeque<Waiter>,
    /// When the key was served last, in turns; 0 is not since somebody began to wait.
    served: u64,
    /// When its first call came, in turns.
    came: u64,
}

#[derive(Debug)]
struct Waiter {
    number: u64,
    /// Nodes that would do.
    nodes: SmallVec<[Arc<NodeState>; 4]>,
    slot: oneshot::Sender<InFlight>,
}

impl Waiter {
    fn takes(&self, node: &Arc<NodeState>) -> bool {
        self.nodes.iter().any(|fit| Arc::ptr_eq(fit, node))
    }
}

/// What joining led to.
#[derive(Debug)]
pub enum Joined {
    /// A slot was free after all.
    Slot(InFlight),
    /// A place in the queue.
    Waits(Ticket),
    /// As many wait as may.
    Full,
}

/// A place in the queue. Dropping it leaves the queue; a slot that was handed over meanwhile goes on to the next in line.
#[derive(Debug)]
pub struct Ticket {
    queue: Arc<Queue>,
    key: Arc<str>,
    number: u64,
    slot: oneshot::Receiver<InFlight>,
}

impl Ticket {
    /// Waits for a slot; `None` if there is no more hope for one. May be dropped and called again.
    pub async fn slot(&mut self) -> Option<InFlight> {
        (&mut self.slot).await.ok()
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut lines = self.queue.lines.lock();
        if lines.leave(&self.key, self.number).is_some() {
            self.queue.waiting.fetch_sub(1, Ordering::Relaxed);
        }
        lines.forget(&self.queue.waiting);
    }
}

impl Queue {
    /// Takes the settings of a configuration: calls that may wait in all, how long, and the slots of a node.
    pub fn set(&self, size: usize, wait: Duration, most: Option<u32>) {
        self.size.store(size, Ordering::Relaxed);
        self.wait.store(u64::try_from(wait.as_micros()).unwrap_or(u64::MAX), Ordering::Relaxed);
        self.most.store(most.unwrap_or(0), Ordering::Relaxed);
    }

    /// Calls that wait now.
    pub fn waiting(&self) -> usize {
        self.waiting.load(Ordering::Relaxed)
    }

    /// Most calls that may wait; 0 is no queue.
    pub fn size(&self) -> usize {
        self.size.load(Ordering::Relaxed)
    }

    /// Longest wait of a call.
    pub fn wait(&self) -> Duration {
        Duration::from_micros(self.wait.load(Ordering::Relaxed))
    }

    /// Whether slots are counted at all.
    pub(super) fn is_used(&self) -> bool {
        self.most.load(Ordering::Relaxed) > 0
    }

    fn may_enter(&self, inflight: u32) -> bool {
        let most = self.most.load(Ordering::Relaxed);
        most == 0 || inflight < most
    }

    /// Takes a place in the line of `key` for a slot of any of these nodes.
    pub fn join(self: &Arc<Self>, key: &Arc<str>, nodes: SmallVec<[Arc<NodeState>; 4]>) -> Joined {
        let mut lines = self.lines.lock();
        let most = Some(self.most.load(Ordering::Relaxed)).filter(|most| *most > 0);
        for node in nodes.iter().filter(|node| !node.rests()) {
            if let Some(slot) = node.try_enter(most, self) {
                return Joined::Slot(slot);
            }
        }
        if self.waiting.load(Ordering::Relaxed) >= self.size() {
            return Joined::Full;
        }
        let (slot, receiver) = oneshot::channel();
        lines.turn += 1;
        let number = lines.turn;
        let line = lines.by_key.entry(Arc::clone(key)).or_default();
        if line.calls.is_empty() {
            line.came = number;
        }
        line.calls.push_back(Waiter { number, nodes, slot });
        self.waiting.fetch_add(1, Ordering::Relaxed);
        drop(lines);
        Joined::Waits(Ticket { queue: Arc::clone(self), key: Arc::clone(key), number, slot: receiver })
    }

    /// A slot of a node is free: the next in line gets it, or nobody.
    pub(super) fn free(self: &Arc<Self>, node: &Arc<NodeState>) {
        loop {
            let mut lines = self.lines.lock();
            // The slot that is handed on is still counted.
            let others = node.inflight().saturating_sub(1);
            let next = if self.may_enter(others) && !node.rests() { lines.next(node) } else { None };
            let Some(waiter) = next else {
                node.inflight.fetch_sub(1, Ordering::Relaxed);
                return;
            };
            self.waiting.fetch_sub(1, Ordering::Relaxed);
            drop(lines);
            if self.hand(waiter, node) {
                return;
            }
        }
    }

    /// A node has become usable, or may take more: those in line get its free slots.
    pub fn fill(self: &Arc<Self>, node: &Arc<NodeState>) {
        while self.waiting() > 0 {
            let mut lines = self.lines.lock();
            if node.rests() || !self.may_enter(node.inflight()) {
                return;
            }
            let Some(waiter) = lines.next(node) else { return };
            self.waiting.fetch_sub(1, Ordering::Relaxed);
            node.inflight.fetch_add(1, Ordering::Relaxed);
            drop(lines);
            if !self.hand(waiter, node) {
                self.free(node);
            }
        }
    }

    /// Gives a counted slot away; false if the waiter has left.
    fn hand(self: &Arc<Self>, waiter: Waiter, node: &Arc<NodeState>) -> bool {
        match waiter.slot.send(InFlight::counted(node, Some(self))) {
            Ok(()) => {
                node.attempts.fetch_add(1, Ordering::Relaxed);
                true
            }
            Err(slot) => {
                slot.disarm();
                false
            }
        }
    }
}

impl Lines {
    /// Takes out the call whose turn it is for a slot of that node: of the key that was served the longest ago; among
    /// keys that were not served yet, of the one that asks for less.
    fn next(&mut self, node: &Arc<NodeState>) -> Option<Waiter> {
        let fit = |line: &Line| line.calls.iter().position(|call| call.takes(node));
        let turn_of = |line: &Line| (line.served, line.calls.len(), line.came);
        let turns = self.by_key.iter().filter_map(|(key, line)| Some((turn_of(line), fit(line)?, key)));
        let (_, at, key) = turns.min_by_key(|(turn, _, _)| *turn)?;
        let key = Arc::clone(key);
        self.turn += 1;
        let turn = self.turn;
        let line = self.by_key.get_mut(&key)?;
        line.served = turn;
        line.calls.remove(at)
    }

    fn leave(&mut self, key: &Arc<str>, number: u64) -> Option<Waiter> {
        let calls = &mut self.by_key.get_mut(key)?.calls;
        let at = calls.iter().position(|call| call.number == number)?;
        calls.remove(at)
    }

    /// Who has no call waiting is remembered only as long as that matters.
    fn forget(&mut self, waiting: &AtomicUsize) {
        if waiting.load(Ordering::Relaxed) == 0 {
            self.by_key.clear();
        } else if self.by_key.len() > REMEMBERED {
            self.by_key.retain(|_, line| !line.calls.is_empty());
        }
    }
}

impl NodeState {
    /// Whether it is out of use, or is yet to be tried after a rest.
    fn rests(&self) -> bool {
        // A rest that is not over for good says so at any time.
        self.admits(Duration::ZERO) != Admits::Freely
    }
}

#[cfg(test)]
mod tests;
