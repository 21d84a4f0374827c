//! Picks some top-level members out of a JSON object that passes by in chunks, without keeping the rest: an answer with embeddings may
//! have 30 MiB, of which the usage is a hundred bytes.

use std::mem;

use bytes::Bytes;
use memchr::memchr2;
use smallvec::SmallVec;

/// A member with a longer value is not picked.
const MAX_VALUE: usize = 1 << 20;
/// No name of interest is longer.
const MAX_NAME: usize = 32;

/// The picker. It follows brackets and strings only; it does not judge the JSON.
#[derive(Debug)]
pub(super) struct Members {
    wanted: &'static [&'static str],
    depth: usize,
    place: Place,
    /// The raw name that was read last at the top level.
    name: Vec<u8>,
    /// The value being picked, and whose it is.
    value: Vec<u8>,
    picking: Option<&'static str>,
    found: SmallVec<[(&'static str, String); 2]>,
    complete: bool,
    /// What stands in for the value of `model`, as JSON.
    name_of_model: Option<Bytes>,
    naming: Option<Naming>,
    /// Where the chunk at hand lies in memory, and the parts of that value in it.
    chunk: usize,
    cuts: SmallVec<[Cut; 1]>,
}

/// How far the value of `model` has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Naming {
    Begins,
    GoesOn,
}

/// A part of the value of `model` in the chunk at hand, and whether the value begins there.
#[derive(Debug, Clone, Copy)]
struct Cut {
    from: usize,
    to: usize,
    begins: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// Before the object, or behind it.
    Outside,
    /// At the top level, where a name may begin.
    Name,
    /// In a name of the top level; whether the last byte was a backslash.
    InName(bool),
    /// Behind a name, before its value's first byte.
    Colon,
    /// In a value, outside strings.
    Value,
    /// In a string inside a value; whether the last byte was a backslash.
    InString(bool),
    /// This is no JSON object.
    Broken,
}

impl Members {
    pub(super) fn new(wanted: &'static [&'static str]) -> Self {
        Self {
            wanted,
            depth: 0,
            place: Place::Outside,
            name: Vec::new(),
            value: Vec::new(),
            picking: None,
            found: SmallVec::new(),
            complete: false,
            name_of_model: None,
            naming: None,
            chunk: 0,
            cuts: SmallVec::new(),
        }
    }

    /// From now on, [`feed`](Self::feed) gives the object with this, a JSON value, as its `model`.
    pub(super) fn rename(&mut self, name: Bytes) {
        self.name_of_model = Some(name);
    }

    /// Whether the object has ended.
    pub(super) fn complete(&self) -> bool {
        self.complete && self.place == Place::Outside
    }

    /// What was picked since the last time.
    pub(super) fn take(&mut self) -> SmallVec<[(&'static str, String); 2]> {
        mem::take(&mut self.found)
    }

    /// Takes a chunk, and gives what is to be sent on: mostly the same.
    pub(super) fn feed(&mut self, chunk: Bytes) -> Bytes {
        self.read(&chunk);
        let (cuts, Some(name)) = (mem::take(&mut self.cuts), &self.name_of_model) else { return chunk };
        if cuts.is_empty() {
            return chunk;
        }
        let mut out = Vec::with_capacity(chunk.len() + name.len());
        let mut at = 0;
        for cut in cuts {
            out.extend_from_slice(chunk.get(at..cut.from).unwrap_or_default());
            if cut.begins {
                out.extend_from_slice(name);
            }
            at = cut.to;
        }
        out.extend_from_slice(chunk.get(at..).unwrap_or_default());
        out.into()
    }

    fn read(&mut self, chunk: &[u8]) {
        self.chunk = chunk.as_ptr() as usize;
        let mut rest = chunk;
        // Where the part of a picked value begins that lies in this chunk.
        let mut from = chunk;
        while let Some((&byte, tail)) = rest.split_first() {
            let at = rest;
            rest = tail;
            match self.place {
                Place::Broken => return,
                Place::Outside => self.outside(byte),
                Place::Name => match byte {
                    b'"' => {
                        self.name.clear();
                        self.place = Place::InName(false);
                    }
                    b'}' => self.end(),
                    _ => {}
                },
                Place::InName(escaped) => self.in_name(byte, escaped),
                Place::Colon => {
                    if !byte.is_ascii_whitespace() && byte != b':' {
                        self.begin_value();
                        from = at;
                        rest = at;
                    }
                }
                Place::Value => {
                    let top = self.depth == 1;
                    let stop = |byte: &u8| matches!(byte, b'"' | b'{' | b'}' | b'[' | b']') || (top && *byte == b',');
                    let at = at.iter().position(stop).and_then(|skip| at.get(skip..)).unwrap_or_default();
                    if let Some(byte) = at.first() {
                        self.in_value(*byte, from, at);
                    }
                    rest = at.get(1..).unwrap_or_default();
                }
                Place::InString(true) => self.place = Place::InString(false),
                Place::InString(false) => {
                    let skip = memchr2(b'"', b'\\', at).unwrap_or(at.len());
                    match at.get(skip) {
                        Some(b'"') => self.place = Place::Value,
                        Some(_) => self.place = Place::InString(true),
                        None => {}
                    }
                    rest = at.get(skip + 1..).unwrap_or_default();
                }
            }
        }
        if matches!(self.place, Place::Value | Place::InString(_)) {
            self.pick(from);
        }
    }

    fn outside(&mut self, byte: u8) {
        match byte {
            b'{' if !self.complete => {
                self.depth = 1;
                self.place = Place::Name;
            }
            _ if byte.is_ascii_whitespace() => {}
            _ => self.place = Place::Broken,
        }
    }

    fn in_name(&mut self, byte: u8, escaped: bool) {
        match byte {
            b'"' if !escaped => self.place = Place::Colon,
            _ => {
                if self.name.len() <= MAX_NAME {
                    self.name.push(byte);
                }
                self.place = Place::InName(byte == b'\\' && !escaped);
            }
        }
    }

    fn begin_value(&mut self) {
        self.place = Place::Value;
        self.value.clear();
        self.picking = self.wanted.iter().copied().find(|wanted| wanted.as_bytes() == self.name);
        let renamed = self.name_of_model.is_some() && self.name == b"model";
        self.naming = renamed.then_some(Naming::Begins);
    }

    /// `at` begins with `byte`; both it and `from` reach to the end of the chunk.
    fn in_value(&mut self, byte: u8, from: &[u8], at: &[u8]) {
        match byte {
            b'"' => self.place = Place::InString(false),
            b'{' | b'[' => self.depth += 1,
            b'}' | b']' if self.depth > 1 => self.depth -= 1,
            b',' | b'}' if self.depth == 1 => {
                self.pick(from.get(..from.len() - at.len()).unwrap_or_default());
                self.end_value();
                if byte == b'}' {
                    self.end();
                }
            }
            _ => {}
        }
    }

    fn pick(&mut self, part: &[u8]) {
        if let Some(naming) = self.naming {
            // Space behind the value stays where it is.
            let from = (part.as_ptr() as usize).saturating_sub(self.chunk);
            let to = from + part.trim_ascii_end().len();
            self.cuts.push(Cut { from, to, begins: naming == Naming::Begins });
            self.naming = Some(Naming::GoesOn);
        }
        if self.picking.is_some() {
            if self.value.len() + part.len() > MAX_VALUE {
                self.picking = None;
                self.value = Vec::new();
            } else {
                self.value.extend_from_slice(part);
            }
        }
    }

    fn end_value(&mut self) {
        self.place = Place::Name;
        self.naming = None;
        if let Some(name) = self.picking.take()
            && let Ok(value) = String::from_utf8(mem::take(&mut self.value))
        {
            self.found.push((name, value));
        }
    }

    fn end(&mut self) {
        self.depth = 0;
        self.place = Place::Outside;
        self.complete = true;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const WANTED: &[&str] = &["usage", "error"];

    fn pick(chunks: &[&[u8]]) -> (Vec<(&'static str, String)>, bool) {
        let mut members = Members::new(WANTED);
        let mut found = Vec::new();
        for chunk in chunks {
            members.feed(Bytes::copy_from_slice(chunk));
            found.extend(members.take());
        }
        (found, members.complete())
    }

    const ANSWER: &str = r#" {"id":"a\"usage\":1\\", "data":[{"usage":{"x":[1,2]},"e":[0.1,-2e5]}], "us\u0061ge":1,
        "usage" : {"prompt_tokens":3,"d":{"s":"}\"{"}} ,"error":null,"last":[]} "#;

    #[test]
    fn only_wanted_members_of_the_top_level_are_picked() {
        let (found, complete) = pick(&[ANSWER.as_bytes()]);
        assert!(complete);
        let found: Vec<_> = found.iter().map(|(name, value)| (*name, value.trim())).collect();
        assert_eq!(found, [("usage", r#"{"prompt_tokens":3,"d":{"s":"}\"{"}}"#), ("error", "null")]);
    }

    #[test]
    fn what_is_cut_off_or_no_object_is_not_complete() {
        for text in ["", "{", r#"{"usage":{"a":1}"#, "[1]", "<html>", "{} {}", r#"{"a":"}"#] {
            assert!(!pick(&[text.as_bytes()]).1, "{text}");
        }
        assert!(pick(&[b"{}"]).1);
    }

    #[test]
    fn a_huge_value_is_let_go() {
        let text = format!(r#"{{"error":"{}","usage":1}}"#, "x".repeat(MAX_VALUE));
        let (found, complete) = pick(&[text.as_bytes()]);
        assert!(complete);
        assert_eq!(found, [("usage", "1".to_owned())]);
    }

    fn renamed(chunks: &[&[u8]]) -> String {
        let mut members = Members::new(WANTED);
        members.rename(Bytes::from_static(b"\"chat\""));
        let out: Vec<Bytes> = chunks.iter().map(|chunk| members.feed(Bytes::copy_from_slice(chunk))).collect();
        assert!(members.complete());
        String::from_utf8(out.concat()).unwrap()
    }

    const NAMED: &str =
        r#"{ "id":"model", "model" : "Qwen, \"2.5\"}" ,"x":{"model":"inner"},"usage":{"model":1},"model":"m"}"#;

    #[test]
    fn only_the_model_of_the_top_level_gets_another_name() {
        let expected = NAMED.replace(r#""Qwen, \"2.5\"}""#, r#""chat""#).replace(r#""m"}"#, r#""chat"}"#);
        assert_eq!(renamed(&[NAMED.as_bytes()]), expected);
        let bytes: Vec<&[u8]> = NAMED.as_bytes().chunks(1).collect();
        let apart: serde_json::Value = serde_json::from_str(&renamed(&bytes)).unwrap();
        assert_eq!(apart, serde_json::from_str::<serde_json::Value>(&expected).unwrap());
    }

    proptest! {
        #[test]
        fn any_split_picks_the_same(cuts in prop::collection::vec(0usize..ANSWER.len(), 0..8)) {
            let mut cuts = cuts;
            cuts.sort_unstable();
            let mut chunks = Vec::new();
            let mut from = 0;
            for cut in cuts.into_iter().chain([ANSWER.len()]) {
                chunks.push(&ANSWER.as_bytes()[from..cut]);
                from = cut;
            }
            prop_assert_eq!(pick(&chunks), pick(&[ANSWER.as_bytes()]));
        }
    }
}
