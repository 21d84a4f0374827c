//! A stream on its way through the meter: whole events only, each seen by the client as it may see it.
//!
//! What came in one chunk and goes on untouched stays one slice of it: nothing is copied, and no write is split.

use bytes::Bytes;
use smallvec::SmallVec;

use super::hide;
use super::seam::{Joined, Seam};
use super::tally::Tally;
use super::{Seen, Stop, UsageView};
use crate::dialect::sse::{Event, Splitter, TooLong};
use crate::dialect::{CallKind, Dialect, Reading, anthropic, dify, openai};

/// What becomes of an event that is no JSON, inside a stream that goes on well.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnMalformed {
    /// It is left out.
    #[default]
    Skip,
    /// The stream ends there with an error.
    End,
}

/// The events of one answer.
#[derive(Debug)]
pub(super) struct Events {
    splitter: Splitter,
    pub(super) view: UsageView,
    pub(super) on_malformed: OnMalformed,
    /// What the client is to read as the model's name, as JSON.
    pub(super) name: Option<Bytes>,
    /// Remembers what the client got, or joins this answer to what it got of another.
    pub(super) seam: Option<Box<Seam>>,
    /// No event with data has come yet.
    first: bool,
    /// Nothing that follows is for the client.
    over: bool,
}

impl Events {
    pub(super) fn new(view: UsageView) -> Self {
        Self {
            splitter: Splitter::default(),
            view,
            on_malformed: OnMalformed::Skip,
            name: None,
            seam: None,
            first: true,
            over: false,
        }
    }

    /// Takes a chunk.
    pub(super) fn feed(
        &mut self,
        chunk: Bytes,
        spoken: (Dialect, CallKind),
        tally: &mut Tally,
        seen: &mut Seen,
    ) -> Result<(), TooLong> {
        if self.over {
            return Ok(());
        }
        let mut pieces = Pieces::of(chunk.clone());
        self.splitter.push(chunk);
        while let Some(event) = self.splitter.next()? {
            if let Some(shown) = self.event(&event, spoken, tally, seen) {
                pieces.push(shown, &mut seen.forward);
            }
            if self.over {
                break;
            }
        }
        pieces.finish(&mut seen.forward);
        Ok(())
    }

    /// The body has ended: an event that only lacks its blank line is completed, any other rest is dropped.
    pub(super) fn finish(&mut self, spoken: (Dialect, CallKind), tally: &mut Tally, seen: &mut Seen) {
        let Some(event) = self.splitter.finish().filter(|_| !self.over) else { return };
        let whole = event.raw.ends_with(b"\r\r") || event.raw.ends_with(b"\n\r");
        let readable = event.data.as_deref().is_some_and(|data| !data.trim_ascii().is_empty());
        if !whole && !readable {
            return;
        }
        // The answer is cut off here, which is worse than one event that is garbled.
        self.on_malformed = OnMalformed::Skip;
        let Some(shown) = self.event(&event, spoken, tally, seen) else { return };
        if whole || shown.ends_with(b"\n\n") {
            seen.forward.push(shown);
        } else {
            let end: &[u8] = if shown.ends_with(b"\n") || shown.ends_with(b"\r") { b"\n" } else { b"\n\n" };
            seen.forward.push([&shown, end].concat().into());
        }
    }

    /// Reads an event and gives what the client is to see of it.
    fn event(
        &mut self,
        event: &Event,
        (dialect, kind): (Dialect, CallKind),
        tally: &mut Tally,
        seen: &mut Seen,
    ) -> Option<Bytes> {
        let Some(data) = &event.data else { return Some(event.raw.clone()) };
        let text = std::str::from_utf8(data);
        let reading = match text {
            Ok(data) => match dialect {
                Dialect::Anthropic => anthropic::read_event(event, data),
                Dialect::Dify => dify::read_event(event, data),
                Dialect::Openai | Dialect::Gemini | Dialect::None => openai::read_event(event, data),
            },
            Err(_) => Reading { malformed: true, garbled: true, ..Reading::default() },
        };
        let first = std::mem::replace(&mut self.first, false);
        if kind != CallKind::Other {
            seen.malformed |= first && reading.malformed;
            if reading.garbled {
                seen.garbled += 1;
                if self.on_malformed == OnMalformed::End {
                    self.stop(Stop::Garbled, seen);
                }
                return None;
            }
        }
        seen.token |= reading.token;
        seen.progress |= reading.progress;
        seen.done |= reading.done;
        tally.add(&reading);
        let shown = match &mut self.seam {
            Some(seam) => {
                let view = (self.view, self.name.as_ref());
                match seam.join(text.unwrap_or_default(), &reading, dialect, view, tally) {
                    Joined::AsItIs => hide::shown(event, data, &reading, self.view, self.name.as_ref()),
                    Joined::Anew(data) => Some(hide::rebuild(event, data.as_bytes())),
                    Joined::Nothing => None,
                    Joined::Apart => {
                        self.stop(Stop::Apart, seen);
                        return None;
                    }
                }
            }
            None => hide::shown(event, data, &reading, self.view, self.name.as_ref()),
        };
        let shown = self.end(shown, &reading, (dialect, kind), seen);
        seen.error = seen.error.take().or(reading.error);
        shown
    }

    /// What ends a stream: its last event, and a failure that the upstream states where a dialect has no event for that.
    fn end(
        &mut self,
        shown: Option<Bytes>,
        reading: &Reading<'_>,
        (dialect, kind): (Dialect, CallKind),
        seen: &mut Seen,
    ) -> Option<Bytes> {
        let plain = matches!(kind, CallKind::Chat | CallKind::Completion | CallKind::Messages);
        match &reading.error {
            Some(error) if !reading.done && matches!(dialect, Dialect::Openai | Dialect::Anthropic) => {
                // What the provider says of the client's own request is the client's business; the rest is ours to tell.
                let theirs = error.status.is_some_and(|status| matches!(status, 400 | 404 | 413 | 422));
                self.stop(if theirs { Stop::Refused } else { Stop::Failed }, seen);
                shown.filter(|_| theirs)
            }
            _ => {
                // There is one last event, whatever follows it.
                self.over |= reading.done && plain;
                shown
            }
        }
    }

    fn stop(&mut self, why: Stop, seen: &mut Seen) {
        self.over = true;
        seen.stop = Some(why);
    }
}

/// Joins neighbouring slices of a chunk again.
struct Pieces {
    chunk: Bytes,
    run: Option<(usize, usize)>,
}

impl Pieces {
    const fn of(chunk: Bytes) -> Self {
        Self { chunk, run: None }
    }

    fn push(&mut self, piece: Bytes, out: &mut SmallVec<[Bytes; 2]>) {
        let offset = (piece.as_ptr() as usize).wrapping_sub(self.chunk.as_ptr() as usize);
        // The chunk is alive, so memory within it can only be its own.
        let place = (offset < self.chunk.len()).then(|| (offset, offset + piece.len()));
        match (self.run, place) {
            (Some((from, to)), Some((start, end))) if start == to => self.run = Some((from, end)),
            (_, Some(place)) => {
                self.flush(out);
                self.run = Some(place);
            }
            (_, None) => {
                self.flush(out);
                out.push(piece);
            }
        }
    }

    fn flush(&mut self, out: &mut SmallVec<[Bytes; 2]>) {
        if let Some((from, to)) = self.run.take() {
            out.push(self.chunk.slice(from..to.min(self.chunk.len())));
        }
    }

    fn finish(mut self, out: &mut SmallVec<[Bytes; 2]>) {
        if self.run == Some((0, self.chunk.len())) {
            out.push(self.chunk);
        } else {
            self.flush(out);
        }
    }
}
