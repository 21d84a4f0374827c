//! What a simulator saw: one record per request, and how each ended.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use bytes::{Bytes, BytesMut};
use http::request::Parts;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use parking_lot::Mutex;
use sha2::{Digest, Sha256};

/// How a request ended, as the simulator saw it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The whole answer was handed to the connection.
    Complete,
    /// The peer went away before the answer was whole.
    Abandoned,
    /// The simulator itself broke the answer off, as a fault asked.
    Broken,
}

/// One request as it arrived.
#[derive(Clone, Debug)]
pub struct Recorded {
    /// The method, such as `POST`.
    pub method: String,
    /// Path and query as they stood in the request line.
    pub path_and_query: String,
    /// Header fields in the order of arrival, names in lower case; bytes that are not UTF-8 are replaced.
    pub headers: Vec<(String, String)>,
    /// Bytes of the body received so far.
    pub body_len: u64,
    /// SHA-256 of the body in lower-case hex; empty until the body was read whole.
    pub body_sha256: String,
    /// The body, where it is not larger than the simulator was told to keep.
    pub body: Option<Bytes>,
    /// Whether it came over HTTP/2.
    pub http2: bool,
    /// Number of the connection it came on, counted from 1.
    pub connection: u64,
    /// When its head was read.
    pub started: Instant,
    /// When and how it ended; `None` while it is being answered.
    pub ended: Option<(Instant, Ending)>,
    /// Tokens generated so far, over all choices.
    pub output_tokens: u64,
    /// Prompt tokens found in the prefix cache.
    pub cached_tokens: u64,
    /// Prompt tokens, cached ones included.
    pub prompt_tokens: u64,
}

impl Recorded {
    /// The first value of a header field; `name` in lower case.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str())
    }

    /// Whether the peer left before the answer was whole.
    pub fn abandoned(&self) -> bool {
        matches!(self.ended, Some((_, Ending::Abandoned)))
    }
}

/// The newest requests of one simulator.
pub(crate) struct Journal {
    kept: usize,
    bodies: usize,
    total: AtomicU64,
    rows: Mutex<Rows>,
}

#[derive(Default)]
struct Rows {
    first: u64,
    rows: VecDeque<Recorded>,
}

impl Rows {
    fn get(&mut self, id: u64) -> Option<&mut Recorded> {
        let at = usize::try_from(id.checked_sub(self.first)?).ok()?;
        self.rows.get_mut(at)
    }
}

impl Journal {
    /// Keeps the newest `kept` requests, with bodies of up to `bodies` bytes.
    pub(crate) fn new(kept: usize, bodies: usize) -> Arc<Self> {
        Arc::new(Self { kept, bodies, total: AtomicU64::new(0), rows: Mutex::default() })
    }

    /// Opens the record of a request whose head has been read.
    pub(crate) fn open(self: &Arc<Self>, head: &Parts, connection: u64) -> CallGuard {
        let mut rows = self.rows.lock();
        let id = self.total.fetch_add(1, Ordering::Relaxed);
        if self.kept > 0 {
            rows.rows.push_back(recorded(head, connection));
        }
        while rows.rows.len() > self.kept {
            rows.rows.pop_front();
        }
        rows.first = (id + 1).saturating_sub(rows.rows.len() as u64);
        CallGuard { journal: Arc::clone(self), id, over: false }
    }

    /// Counts a request that is not recorded.
    pub(crate) fn count(&self) {
        let mut rows = self.rows.lock();
        self.total.fetch_add(1, Ordering::Relaxed);
        rows.first += 1;
    }

    pub(crate) fn total(&self) -> u64 {
        self.total.load(Ordering::Relaxed)
    }

    pub(crate) fn all(&self) -> Vec<Recorded> {
        self.rows.lock().rows.iter().cloned().collect()
    }
}

fn recorded(head: &Parts, connection: u64) -> Recorded {
    Recorded {
        method: head.method.to_string(),
        path_and_query: head.uri.path_and_query().map(ToString::to_string).unwrap_or_default(),
        headers: head
            .headers
            .iter()
            .map(|(name, value)| (name.to_string(), String::from_utf8_lossy(value.as_bytes()).into_owned()))
            .collect(),
        body_len: 0,
        body_sha256: String::new(),
        body: None,
        http2: head.version == http::Version::HTTP_2,
        connection,
        started: Instant::now(),
        ended: None,
        output_tokens: 0,
        cached_tokens: 0,
        prompt_tokens: 0,
    }
}

/// One request being answered. Dropped before [`CallGuard::finish`], the request counts as abandoned.
pub(crate) struct CallGuard {
    journal: Arc<Journal>,
    id: u64,
    over: bool,
}

impl CallGuard {
    /// Changes the record, if it is still kept.
    pub(crate) fn edit(&self, change: impl FnOnce(&mut Recorded)) {
        if let Some(row) = self.journal.rows.lock().get(self.id) {
            change(row);
        }
    }

    /// Counts generated tokens.
    pub(crate) fn generated(&self, tokens: u64) {
        self.edit(|row| row.output_tokens += tokens);
    }

    /// Sets the ending; only the first one counts.
    pub(crate) fn finish(&mut self, ending: Ending) {
        if !std::mem::replace(&mut self.over, true) {
            self.edit(|row| row.ended = Some((Instant::now(), ending)));
        }
    }

    /// Reads the body whole, hashing it; `None` when the peer broke it off.
    pub(crate) async fn read(&self, mut body: Incoming) -> Option<Bytes> {
        let mut whole = BytesMut::new();
        let mut hash = Sha256::new();
        while let Some(frame) = body.frame().await {
            if let Ok(data) = frame.ok()?.into_data() {
                if self.journal.kept > 0 {
                    hash.update(&data);
                    self.edit(|row| row.body_len += data.len() as u64);
                }
                whole.extend_from_slice(&data);
            }
        }
        let whole = whole.freeze();
        if self.journal.kept > 0 {
            let sha256 = format!("{:x}", hash.finalize());
            let body = (whole.len() <= self.journal.bodies).then(|| whole.clone());
            self.edit(|row| {
                row.body_sha256 = sha256;
                row.body = body;
            });
        }
        Some(whole)
    }
}

impl Drop for CallGuard {
    fn drop(&mut self) {
        self.finish(Ending::Abandoned);
    }
}
