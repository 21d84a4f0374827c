//! A splitter of server-sent events that loses nothing: the raw bytes of its events, joined, are the input.
//!
//! Any chunking, LF, CRLF and CR as line ends, comments, several data lines. An event that lies inside one chunk is a slice of it;
//! only an event that is cut by a chunk border is copied.

use bytes::Bytes;
use memchr::memchr2;

/// Longest line in bytes.
pub const MAX_LINE: usize = 4 << 20;
/// Longest event in bytes.
pub const MAX_EVENT: usize = 8 << 20;

/// A line or an event is longer than any honest one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TooLong {
    /// A line exceeds [`MAX_LINE`].
    #[error("a line of the event stream is longer than {MAX_LINE} bytes")]
    Line,
    /// An event exceeds [`MAX_EVENT`].
    #[error("an event of the stream is longer than {MAX_EVENT} bytes")]
    Event,
}

/// One event, or one block without fields (comments, stray blank lines).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// Its bytes as they came, with the blank line that ends it.
    pub raw: Bytes,
    /// Value of its last `event` line.
    pub name: Option<Bytes>,
    /// Its data lines, joined by LF; `None` if it has none.
    pub data: Option<Bytes>,
    /// Whether `data` is one slice of `raw` (else it was joined from several lines).
    pub whole: bool,
}

/// Cuts a byte stream into events: [`push`](Self::push) a chunk, take events with [`next`](Self::next) until `None`.
#[derive(Debug, Default)]
pub struct Splitter {
    /// What is left of the last chunk.
    rest: Bytes,
    /// The begun event from earlier chunks.
    carry: Vec<u8>,
    /// Bytes of the current line so far, its end not counted.
    line: usize,
    /// The last byte was a CR; whether the line it ended was blank. An LF that follows belongs to it.
    after_cr: Option<bool>,
    /// Whether an event was given out: a byte order mark may only stand before the first.
    begun: bool,
}

impl Splitter {
    /// Gives it the next chunk. All events of the chunk before must have been taken.
    pub fn push(&mut self, chunk: Bytes) {
        debug_assert!(self.rest.is_empty());
        self.rest = chunk;
    }

    /// The next whole event; `None` when a further chunk is needed.
    ///
    /// # Errors
    /// If a line or an event grows too long. The splitter is of no use after that.
    #[expect(clippy::should_implement_trait, reason = "an iterator would promise that None is the end")]
    pub fn next(&mut self) -> Result<Option<Event>, TooLong> {
        let end = self.scan()?;
        let Some(end) = end else {
            self.carry.extend_from_slice(&self.rest);
            self.rest = Bytes::new();
            return Ok(None);
        };
        let tail = self.rest.split_to(end);
        let raw = if self.carry.is_empty() {
            tail
        } else {
            let mut carry = std::mem::take(&mut self.carry);
            carry.extend_from_slice(&tail);
            carry.into()
        };
        Ok(Some(self.event(raw)))
    }

    /// The stream ended: what was begun, as an event without its blank line.
    pub fn finish(&mut self) -> Option<Event> {
        let mut carry = std::mem::take(&mut self.carry);
        carry.extend_from_slice(&self.rest);
        self.rest = Bytes::new();
        self.line = 0;
        self.after_cr = None;
        (!carry.is_empty()).then(|| self.event(carry.into()))
    }

    /// Bytes of an event that is not whole yet.
    pub fn held(&self) -> usize {
        self.carry.len()
    }

    fn event(&mut self, raw: Bytes) -> Event {
        let first = !std::mem::replace(&mut self.begun, true);
        parse(raw, first)
    }

    /// Where in `rest` the event ends.
    fn scan(&mut self) -> Result<Option<usize>, TooLong> {
        let mut at = 0;
        loop {
            if let Some(blank) = self.after_cr {
                let Some(byte) = self.rest.get(at) else { break };
                self.after_cr = None;
                at += usize::from(*byte == b'\n');
                if blank {
                    return self.within(at).map(Some);
                }
            }
            let found = self.rest.get(at..).and_then(|rest| memchr2(b'\n', b'\r', rest));
            let length = found.unwrap_or(self.rest.len() - at);
            self.line += length;
            if self.line > MAX_LINE {
                return Err(TooLong::Line);
            }
            if found.is_none() {
                break;
            }
            let blank = self.line == 0;
            self.line = 0;
            at += length + 1;
            if self.rest.get(at - 1) == Some(&b'\r') {
                self.after_cr = Some(blank);
            } else if blank {
                return self.within(at).map(Some);
            }
        }
        self.within(self.rest.len()).map(|_| None)
    }

    fn within(&self, end: usize) -> Result<usize, TooLong> {
        if self.carry.len() + end > MAX_EVENT { Err(TooLong::Event) } else { Ok(end) }
    }
}

const BOM: &[u8] = b"\xEF\xBB\xBF";

fn parse(raw: Bytes, first: bool) -> Event {
    let (mut name, mut data, mut joined) = (None, None::<(usize, usize)>, None::<Vec<u8>>);
    let mut at = if first && raw.starts_with(BOM) { BOM.len() } else { 0 };
    while let Some(rest) = raw.get(at..).filter(|rest| !rest.is_empty()) {
        let length = memchr2(b'\n', b'\r', rest).unwrap_or(rest.len());
        let line = rest.get(..length).unwrap_or_default();
        let colon = memchr::memchr(b':', line).unwrap_or(length);
        let field = line.get(..colon).unwrap_or_default();
        // One space behind the colon belongs to the colon.
        let skip = colon + 1 + usize::from(line.get(colon + 1) == Some(&b' '));
        let value = (at + skip.min(length), at + length);
        match field {
            b"data" => match (data, &mut joined) {
                (None, _) => data = Some(value),
                (Some(before), None) => {
                    let mut text = raw.get(before.0..before.1).unwrap_or_default().to_vec();
                    text.push(b'\n');
                    text.extend_from_slice(raw.get(value.0..value.1).unwrap_or_default());
                    joined = Some(text);
                }
                (Some(_), Some(text)) => {
                    text.push(b'\n');
                    text.extend_from_slice(raw.get(value.0..value.1).unwrap_or_default());
                }
            },
            b"event" => name = Some(raw.slice(value.0..value.1)),
            // Not of the standard: older llama.cpp servers report a failure so.
            b"error" if value.0 < value.1 => {
                name = Some(Bytes::from_static(b"error"));
                data = Some(value);
            }
            _ => {}
        }
        at += length + 1;
    }
    let whole = joined.is_none();
    let data = joined.map(Bytes::from).or_else(|| data.map(|(start, end)| raw.slice(start..end)));
    Event { raw, name, data, whole }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn split(chunks: &[&[u8]]) -> Vec<Event> {
        let mut splitter = Splitter::default();
        let mut events = Vec::new();
        for chunk in chunks {
            splitter.push(Bytes::copy_from_slice(chunk));
            while let Some(event) = splitter.next().unwrap() {
                events.push(event);
            }
        }
        events.extend(splitter.finish());
        events
    }

    fn datas(text: &str) -> Vec<Option<String>> {
        let own = |data: Bytes| String::from_utf8(data.to_vec()).unwrap();
        split(&[text.as_bytes()]).into_iter().map(|event| event.data.map(own)).collect()
    }

    fn some(text: &str) -> Option<String> {
        Some(text.to_owned())
    }

    #[test]
    fn every_kind_of_line_end_ends_a_line() {
        for end in ["\n", "\r\n", "\r"] {
            let text = "event: a\ndata: 1\n\ndata:2\n\n".replace('\n', end);
            let events = split(&[text.as_bytes()]);
            assert_eq!(events.len(), 2, "{end:?}");
            assert_eq!(events[0].name.as_deref(), Some(&b"a"[..]));
            assert_eq!(events[0].data.as_deref(), Some(&b"1"[..]));
            assert_eq!(events[1].data.as_deref(), Some(&b"2"[..]));
            assert!(events[1].raw.ends_with(format!("{end}{end}").as_bytes()));
        }
    }

    #[test]
    fn data_lines_are_joined_comments_and_unknown_fields_are_not_data() {
        assert_eq!(datas("data: a\n: x\ndata: b\nid: 7\nretry: 1\n\n"), [some("a\nb")]);
        assert_eq!(datas(": ping\n\nevent: ping\n\ndata\n\n"), [None, None, some("")]);
        assert_eq!(datas("data:  two spaces\ndatax: no\n\n"), [some(" two spaces")]);
        assert_eq!(datas("data: 1\ndata: 2\ndata: 3\n\n"), [some("1\n2\n3")]);
    }

    #[test]
    fn a_byte_order_mark_is_skipped_at_the_start_only() {
        assert_eq!(datas("\u{FEFF}data: 1\n\n\u{FEFF}data: 2\n\n"), [some("1"), None]);
    }

    #[test]
    fn an_event_without_its_blank_line_is_given_at_the_end() {
        assert_eq!(datas("data: 1\n\ndata: 2"), [some("1"), some("2")]);
        assert_eq!(datas("data: 1\r"), [some("1")]);
        assert_eq!(datas(""), []);
    }

    #[test]
    fn an_error_field_of_an_old_llama_server_is_read_as_an_error() {
        let events = split(&[b"error: {\"code\":500}\n\n"]);
        assert_eq!(events[0].name.as_deref(), Some(&b"error"[..]));
        assert_eq!(events[0].data.as_deref(), Some(&b"{\"code\":500}"[..]));
    }

    #[test]
    fn an_event_inside_one_chunk_is_not_copied() {
        let chunk = Bytes::from_static(b"data: 1\n\ndata: 2\n\n");
        let mut splitter = Splitter::default();
        splitter.push(chunk.clone());
        let first = splitter.next().unwrap().unwrap();
        let second = splitter.next().unwrap().unwrap();
        assert_eq!(first.raw.as_ptr(), chunk.as_ptr());
        assert_eq!(second.data.unwrap().as_ptr(), chunk[15..].as_ptr());
    }

    #[test]
    fn a_line_or_an_event_without_end_is_refused() {
        let feed = |chunk: Bytes, times: usize| {
            let mut splitter = Splitter::default();
            for _ in 0..times {
                splitter.push(chunk.clone());
                while splitter.next()?.is_some() {}
            }
            Ok(())
        };
        let mebibyte = Bytes::from(vec![b'x'; 1 << 20]);
        assert_eq!(feed(mebibyte.clone(), 4), Ok(()));
        assert_eq!(feed(mebibyte, 5), Err(TooLong::Line));
        let lines = Bytes::from("data: x\n".repeat(1 << 17));
        assert_eq!(feed(lines.clone(), 8), Ok(()));
        assert_eq!(feed(lines, 9), Err(TooLong::Event));
    }

    /// Text made of what matters to the splitter.
    fn stream() -> impl Strategy<Value = Vec<u8>> {
        let piece = prop::sample::select(vec![
            "\n",
            "\r",
            "\r\n",
            "\n\n",
            "data: ",
            "data:",
            "event: ",
            ": ",
            "id: 1",
            "x",
            "{\"a\":1}",
            "\u{FEFF}",
            "数据",
            "[DONE]",
        ]);
        prop::collection::vec(piece, 0..60).prop_map(|pieces| pieces.concat().into_bytes())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2_000))]

        #[test]
        fn any_split_gives_the_same_events_and_loses_no_byte(text in stream(), cuts in prop::collection::vec(0usize..400, 0..12)) {
            let whole = split(&[&text]);
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut % (text.len() + 1)).collect();
            cuts.sort_unstable();
            let mut chunks = Vec::new();
            let mut from = 0;
            for cut in cuts {
                chunks.push(&text[from..cut]);
                from = cut;
            }
            chunks.push(&text[from..]);
            let pieces = split(&chunks);
            prop_assert_eq!(&whole, &pieces);
            let joined: Vec<u8> = pieces.iter().flat_map(|event| event.raw.to_vec()).collect();
            prop_assert_eq!(joined, text);
        }
    }
}
