//! The two places of a body that the gateway may change, spliced; the rest is copied as it is.

use bytes::{Bytes, BytesMut};
use smallvec::SmallVec;

use super::{Call, Span, StreamOptions};

type Edits<'a> = SmallVec<[(Span, &'a [u8]); 2]>;

pub(super) fn rewrite(call: &Call, body: &Bytes, model: Option<&str>, ask_usage: bool) -> Bytes {
    let changed = model.filter(|model| Some(*model) != call.model.as_deref());
    let quoted = changed.and_then(|model| serde_json::to_vec(model).ok());
    let mut edits = Edits::new();
    if let (Some(place), Some(name)) = (call.spans.model, &quoted) {
        edits.push((place, name));
    }
    if ask_usage && call.hides_usage() {
        edits.push(ask(call));
    }
    if edits.is_empty() {
        return body.clone();
    }
    edits.sort_unstable_by_key(|(place, _)| *place);
    splice(body, &edits)
}

fn ask(call: &Call) -> (Span, &'static [u8]) {
    let end = call.spans.end;
    match call.spans.stream_options {
        // A streamed call has at least the field `stream`, so a comma is always right.
        StreamOptions::Absent => ((end, end), br#","stream_options":{"include_usage":true}"#),
        StreamOptions::Null(place) => (place, br#"{"include_usage":true}"#),
        StreamOptions::Without(at, true) => ((at, at), br#""include_usage":true,"#),
        StreamOptions::Without(at, false) => ((at, at), br#""include_usage":true"#),
        StreamOptions::With(place) => (place, b"true"),
    }
}

fn splice(body: &Bytes, edits: &Edits<'_>) -> Bytes {
    let added: usize = edits.iter().map(|(_, text)| text.len()).sum();
    let mut out = BytesMut::with_capacity(body.len() + added);
    let mut from = 0;
    for ((start, end), text) in edits {
        out.extend_from_slice(body.get(from..*start).unwrap_or_default());
        out.extend_from_slice(text);
        from = *end;
    }
    out.extend_from_slice(body.get(from..).unwrap_or_default());
    out.freeze()
}
