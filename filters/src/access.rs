//! The access log: one JSON line for each request, on stdout or in a file.
//!
//! A request never waits for its line. It writes into a buffer in memory, and one thread carries the buffer out; when the reader
//! is so slow that the buffer is full, the line is dropped and counted. [`AccessLine`] has no field for a prompt or a key's
//! secret, so neither can be logged.

use std::cell::RefCell;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, SystemTime};

use parking_lot::{Condvar, Mutex};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize, Serializer};
use time::OffsetDateTime;

/// What is told of one request. Every field is in every line, `null` where it is not known or does not apply.
#[derive(Debug, Clone, Serialize)]
pub struct AccessLine<'a> {
    /// When the request's head was read; RFC 3339 in UTC with milliseconds.
    #[serde(serialize_with = "timestamp")]
    pub ts: SystemTime,
    /// The value of `x-request-id`.
    pub request_id: &'a str,
    /// The id of the trace, 32 digits.
    pub trace_id: Option<&'a str>,
    /// The id of the caller's key; never the key.
    pub key: Option<&'a str>,
    /// The key's tier.
    pub tier: Option<&'a str>,
    /// The route that matched.
    pub route: Option<&'a str>,
    /// The model by its configured name.
    pub model: Option<&'a str>,
    /// The upstream of the last attempt.
    pub upstream: Option<&'a str>,
    /// The node of the last attempt.
    pub node: Option<&'a str>,
    /// How many attempts were made.
    pub attempts: u32,
    /// The HTTP status sent; `null` if the client left before.
    pub status: Option<u16>,
    /// The code word of our own error, if the answer was one.
    pub code: Option<&'a str>,
    /// Whether the answer was a stream.
    pub stream: Option<bool>,
    /// Prompt tokens settled, cached ones included.
    pub input_tokens: Option<u64>,
    /// Prompt tokens from the upstream's cache.
    pub cached_tokens: Option<u64>,
    /// Completion tokens settled.
    pub output_tokens: Option<u64>,
    /// Where the tokens are known from: `upstream`, `counted` or `estimated`.
    pub usage_source: Option<&'a str>,
    /// Cost by the model's price, in its currency.
    pub cost: Option<f64>,
    /// Time to the first token, in milliseconds with three decimals, like the other times.
    #[serde(serialize_with = "milliseconds")]
    pub ttft_ms: Option<Duration>,
    /// Time from the head to the end of the answer.
    #[serde(serialize_with = "milliseconds")]
    pub duration_ms: Option<Duration>,
    /// The part of it that was spent in the gateway itself.
    #[serde(serialize_with = "milliseconds")]
    pub overhead_ms: Option<Duration>,
    /// `hit`, `miss` or `bypass`.
    pub cache: Option<&'a str>,
    /// The client's address, as far as trusted proxies tell it.
    pub client_ip: Option<IpAddr>,
    /// Bytes of the request's body.
    pub bytes_in: u64,
    /// Bytes of the answer's body.
    pub bytes_out: u64,
}

impl AccessLine<'_> {
    /// Appends the line and its line break to `out`.
    ///
    /// # Errors
    /// Does not happen with these fields; whatever was appended by then has to be thrown away.
    pub fn write_to(&self, out: &mut Vec<u8>) -> serde_json::Result<()> {
        serde_json::to_writer(&mut *out, self)?;
        out.push(b'\n');
        Ok(())
    }
}

fn timestamp<S: Serializer>(ts: &SystemTime, serializer: S) -> Result<S::Ok, S::Error> {
    let t = OffsetDateTime::from(*ts);
    let (year, month, day) = (t.year(), u8::from(t.month()), t.day());
    let (hour, minute, second, milli) = (t.hour(), t.minute(), t.second(), t.millisecond());
    serializer.collect_str(&format_args!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{milli:03}Z"))
}

#[allow(clippy::ref_option, reason = "serde calls it so")]
fn milliseconds<S: Serializer>(time: &Option<Duration>, serializer: S) -> Result<S::Ok, S::Error> {
    match time {
        Some(time) => serializer.serialize_f64(time.as_micros() as f64 / 1000.0),
        None => serializer.serialize_none(),
    }
}

/// Where the access log goes: `stdout`, `off`, or `{ file: PATH }`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum AccessSink {
    /// The process's standard output.
    #[default]
    Stdout,
    /// A file that is appended to, and opened anew on [`AccessLog::reopen`].
    File(PathBuf),
    /// Nowhere.
    Off,
}

/// Where the writer thread writes.
enum Out {
    Stream(Box<dyn Write + Send>),
    File { path: PathBuf, file: File },
}

impl Out {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Stream(stream) => stream.write(bytes),
            Self::File { file, .. } => file.write(bytes),
        }
    }

    /// Opens a file under its path again. If that fails, the old one goes on being used: a line in the wrong file beats none.
    fn reopen(&mut self) {
        if let Self::File { path, file } = self {
            match open(path) {
                Ok(new) => *file = new,
                Err(error) => tracing::warn!(path = %path.display(), %error, "access log cannot be reopened"),
            }
        }
    }
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).mode(0o640).open(path)
}

/// How long the writer thread rests after a batch.
const PAUSE: Duration = Duration::from_millis(20);

/// Bytes of finished lines that may wait for the writer thread.
pub const WAITING_BYTES: usize = 4 << 20;

#[derive(Default)]
struct State {
    lines: Vec<u8>,
    reopen: bool,
    /// No line is taken any more; what waits is still written.
    closed: bool,
    /// The thread has nothing to do and waits to be woken.
    idle: bool,
    /// The thread has ended.
    ended: bool,
}

struct Shared {
    capacity: usize,
    state: Mutex<State>,
    wake: Condvar,
    ended: Condvar,
    dropped: AtomicU64,
}

/// The log itself: shared by all requests of the process.
pub struct AccessLog(Option<Arc<Shared>>);

thread_local! {
    // A line is put together outside the lock, in a buffer that each thread uses again and again.
    static SCRATCH: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

impl AccessLog {
    /// Opens the log and starts its thread.
    ///
    /// # Errors
    /// The file cannot be opened, or no thread can be started.
    pub fn open(sink: &AccessSink) -> io::Result<Self> {
        let out = match sink {
            AccessSink::Off => return Ok(Self(None)),
            // A handle of our own: a full pipe must not hold the lock of the process's stdout.
            AccessSink::Stdout => Out::Stream(Box::new(File::from(io::stdout().as_fd().try_clone_to_owned()?))),
            AccessSink::File(path) => Out::File { path: path.clone(), file: open(path)? },
        };
        Self::start(out, WAITING_BYTES)
    }

    fn start(out: Out, capacity: usize) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            capacity,
            state: Mutex::new(State::default()),
            wake: Condvar::new(),
            ended: Condvar::new(),
            dropped: AtomicU64::new(0),
        });
        let theirs = Arc::clone(&shared);
        thread::Builder::new().name("access-log".into()).spawn(move || theirs.carry(out))?;
        Ok(Self(Some(shared)))
    }

    /// Takes a line. Never waits for the reader of the log: a line that finds the buffer full, or the log closed, is dropped
    /// and counted.
    pub fn write(&self, line: &AccessLine<'_>) {
        let Some(shared) = &self.0 else { return };
        SCRATCH.with_borrow_mut(|scratch| {
            scratch.clear();
            let taken = line.write_to(scratch).is_ok() && shared.take(scratch);
            if !taken {
                shared.dropped.fetch_add(1, Ordering::Relaxed);
            }
        });
    }

    /// Lines dropped since the start: the reader was too slow, or writing failed.
    pub fn dropped(&self) -> u64 {
        self.0.as_ref().map_or(0, |shared| shared.dropped.load(Ordering::Relaxed))
    }

    /// Opens the file anew before the next line, after it was renamed. Does not wait, and does nothing to stdout.
    pub fn reopen(&self) {
        self.signal(|state| state.reopen = true);
    }

    /// Takes no more lines and waits, at most that long, until the waiting ones are written. False if time ran out.
    ///
    /// It blocks its thread: on an async runtime, call it from a blocking one.
    pub fn close(&self, timeout: Duration) -> bool {
        let Some(shared) = &self.0 else { return true };
        self.signal(|state| state.closed = true);
        let mut state = shared.state.lock();
        shared.ended.wait_while_for(&mut state, |state| !state.ended, timeout);
        state.ended
    }

    fn signal(&self, change: impl FnOnce(&mut State)) {
        if let Some(shared) = &self.0 {
            change(&mut shared.state.lock());
            shared.wake.notify_one();
        }
    }
}

impl Drop for AccessLog {
    fn drop(&mut self) {
        self.signal(|state| state.closed = true);
    }
}

impl Shared {
    fn take(&self, line: &[u8]) -> bool {
        let mut state = self.state.lock();
        if state.closed || state.lines.len() + line.len() > self.capacity {
            return false;
        }
        state.lines.extend_from_slice(line);
        let wake = std::mem::take(&mut state.idle);
        drop(state);
        if wake {
            self.wake.notify_one();
        }
        true
    }

    /// The writer thread: swaps the full buffer for an empty one and writes it, until the log is closed.
    fn carry(&self, mut out: Out) {
        let mut batch = Vec::new();
        let mut torn = false;
        loop {
            let mut state = self.state.lock();
            while state.lines.is_empty() && !state.reopen && !state.closed {
                state.idle = true;
                self.wake.wait(&mut state);
                state.idle = false;
            }
            std::mem::swap(&mut state.lines, &mut batch);
            let (reopen, last) = (std::mem::take(&mut state.reopen), state.closed);
            drop(state);
            // Lines that were finished before the rename belong to either file; the new one is simplest.
            if reopen {
                out.reopen();
            }
            // The rest of a line that failed halfway is lost; the next line shall not grow onto its beginning.
            if torn && !batch.is_empty() {
                batch.insert(0, b'\n');
            }
            torn = self.write_all(&mut out, &batch, torn);
            batch.clear();
            if !last {
                // A pause after each batch: under load one write carries many lines, and no request wakes this thread.
                let mut state = self.state.lock();
                if !state.reopen && !state.closed {
                    self.wake.wait_for(&mut state, PAUSE);
                }
            }
            if last {
                self.state.lock().ended = true;
                self.ended.notify_all();
                return;
            }
        }
    }

    /// Writes a batch, and counts the lines that were not written whole. True if the output ends in the middle of a line;
    /// `torn` says whether it did before.
    fn write_all(&self, out: &mut Out, batch: &[u8], torn: bool) -> bool {
        let mut rest = batch;
        while !rest.is_empty() {
            match out.write(rest) {
                Ok(written @ 1..) => rest = rest.get(written..).unwrap_or_default(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Another program may have made the descriptor non-blocking, as it shares it with us.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => thread::sleep(Duration::from_millis(5)),
                Ok(_) | Err(_) => {
                    let untouched = rest.len() == batch.len();
                    // The break that mends a torn line is not a line.
                    let mending = u64::from(torn && untouched);
                    let lines = memchr::memchr_iter(b'\n', rest).count() as u64;
                    self.dropped.fetch_add(lines.saturating_sub(mending), Ordering::Relaxed);
                    let written = batch.get(..batch.len() - rest.len()).unwrap_or_default();
                    return if untouched { torn } else { !written.ends_with(b"\n") };
                }
            }
        }
        torn && batch.is_empty()
    }
}

#[cfg(test)]
mod tests;
