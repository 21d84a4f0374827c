//! The two places of a body that the gateway may change, spliced; the rest is copied as it is.

use std::borrow::Cow;

use bytes::{Bytes, BytesMut};
use smallvec::SmallVec;

use super::{AskUsage, Call, Span, StreamOptions};

type Edits<'a> = SmallVec<[(Span, Cow<'a, [u8]>); 4]>;

const INCLUDE: &str = r#""include_usage":true"#;
const CONTINUOUS: &str = r#""continuous_usage_stats":true"#;

pub(super) fn rewrite(call: &Call, body: &Bytes, model: Option<&str>, ask: AskUsage) -> Bytes {
    let changed = model.filter(|model| Some(*model) != call.model.as_deref());
    let quoted = changed.and_then(|model| serde_json::to_vec(model).ok());
    let mut edits = Edits::new();
    if let (Some(place), Some(name)) = (call.spans.model, quoted) {
        edits.push((place, name.into()));
    }
    if call.may_ask() && ask != AskUsage::Nothing {
        let include = call.include_usage != Some(true);
        let continuous = ask == AskUsage::Always && call.continuous_usage != Some(true);
        if include || continuous {
            ask_for(call, include, continuous, &mut edits);
        }
    }
    if edits.is_empty() {
        return body.clone();
    }
    edits.sort_unstable_by_key(|(place, _)| *place);
    splice(body, &edits)
}

/// Writes the wishes, each where the client wrote it otherwise, else at the beginning of the options.
fn ask_for<'a>(call: &Call, include: bool, continuous: bool, edits: &mut Edits<'a>) {
    let wishes = |include: bool, continuous: bool| match (include, continuous) {
        (true, true) => Cow::Owned(format!("{INCLUDE},{CONTINUOUS}")),
        (true, false) => Cow::Borrowed(INCLUDE),
        (false, true) => Cow::Borrowed(CONTINUOUS),
        (false, false) => Cow::Borrowed(""),
    };
    let whole = || format!("{{{}}}", wishes(include, continuous));
    let end = call.spans.end;
    match call.spans.stream_options {
        // A streamed call has at least the field `stream`, so a comma is always right.
        StreamOptions::Absent => {
            edits.push(((end, end), format!(r#","stream_options":{}"#, whole()).into_bytes().into()));
        }
        StreamOptions::Null(place) => edits.push((place, whole().into_bytes().into())),
        StreamOptions::Object { inside, empty, include: included, continuous: continued } => {
            for (wish, place) in [(include, included), (continuous, continued)] {
                if let Some(place) = place.filter(|_| wish) {
                    edits.push((place, Cow::Borrowed(b"true")));
                }
            }
            let new = wishes(include && included.is_none(), continuous && continued.is_none());
            if !new.is_empty() {
                let comma = if empty { "" } else { "," };
                edits.push(((inside, inside), format!("{new}{comma}").into_bytes().into()));
            }
        }
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
