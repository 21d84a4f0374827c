//! What a client must not see of an event, taken out of it again: usage that only we asked for, the model's name at its upstream.

use bytes::Bytes;
use smallvec::SmallVec;

use crate::dialect::Reading;
use crate::dialect::json::span;
use crate::dialect::sse::Event;
use crate::meter::UsageView;

/// A place in the data, and what is to stand there.
type Edit<'a> = ((usize, usize), &'a [u8]);

/// The event as the client is to see it: with its share of the usage, and with `name`, a JSON string, as the model. `None` if nothing
/// of it is left.
pub(super) fn shown(
    event: &Event,
    data: &Bytes,
    reading: &Reading<'_>,
    view: UsageView,
    name: Option<&Bytes>,
) -> Option<Bytes> {
    if reading.only_usage && view == UsageView::Nothing {
        return None;
    }
    let mut edits: SmallVec<[Edit<'_>; 2]> = SmallVec::new();
    let usage = reading.usage_member.and_then(|value| Some((value, span(data, value)?)));
    match (view, usage) {
        (UsageView::Nothing, Some((_, place))) => edits.extend(member(data, place).map(|place| (place, &b""[..]))),
        (UsageView::AtEnd, Some((value, place))) if !reading.only_usage && value != "null" => {
            edits.push((place, b"null"));
        }
        (UsageView::All | UsageView::AtEnd | UsageView::Nothing, _) => {}
    }
    if let (Some(name), Some(value)) = (name, reading.model)
        && value.as_bytes() != name
    {
        edits.extend(span(data, value).map(|place| (place, &**name)));
    }
    if edits.is_empty() {
        return Some(event.raw.clone());
    }
    edits.sort_unstable_by_key(|(place, _)| *place);
    Some(edit(event, data, &edits))
}

/// The event with parts of its data replaced.
fn edit(event: &Event, data: &Bytes, edits: &[Edit<'_>]) -> Bytes {
    if !event.whole {
        return rebuild(event, &splice(data, 0, edits));
    }
    // The data is a slice of the event, so its offset there is the distance of their pointers. One piece comes out: several would
    // become as many small writes.
    let offset = (data.as_ptr() as usize).saturating_sub(event.raw.as_ptr() as usize);
    splice(&event.raw, offset, edits).into()
}

/// `whole` with its parts replaced; their places count from `offset`.
fn splice(whole: &[u8], offset: usize, edits: &[Edit<'_>]) -> Vec<u8> {
    let mut out = Vec::with_capacity(whole.len() + edits.iter().map(|(_, text)| text.len()).sum::<usize>());
    let mut at = 0;
    for ((start, end), text) in edits {
        out.extend_from_slice(whole.get(at..offset + start).unwrap_or_default());
        out.extend_from_slice(text);
        at = offset + end;
    }
    out.extend_from_slice(whole.get(at..).unwrap_or_default());
    out
}

/// The member around a value: from its name to its value, with the one comma that must go with it.
fn member(data: &[u8], (start, end): (usize, usize)) -> Option<(usize, usize)> {
    let before = data.get(..start)?.trim_ascii_end().strip_suffix(b":")?.trim_ascii_end().strip_suffix(b"\"")?;
    let name = memchr::memrchr(b'"', before)?;
    let before = data.get(..name)?.trim_ascii_end();
    if before.ends_with(b",") {
        return Some((before.len() - 1, end));
    }
    let after = data.get(end..)?;
    let space = after.len() - after.trim_ascii_start().len();
    let comma = usize::from(after.get(space) == Some(&b','));
    Some((name, if comma == 1 { end + space + 1 } else { end }))
}

/// An event whose data stands in several lines, written anew with other data.
pub(super) fn rebuild(event: &Event, data: &[u8]) -> Bytes {
    let mut text = Vec::with_capacity(event.raw.len() + 8);
    for line in event.raw.split(|byte| matches!(byte, b'\n' | b'\r')) {
        if !line.is_empty() && !line.starts_with(b"data") {
            text.extend_from_slice(line);
            text.push(b'\n');
        }
    }
    for line in data.split(|byte| *byte == b'\n') {
        text.extend_from_slice(b"data: ");
        text.extend_from_slice(line);
        text.push(b'\n');
    }
    text.push(b'\n');
    text.into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dialect::openai::read_event;
    use crate::dialect::sse::Splitter;

    fn hidden(text: &str) -> String {
        seen(text, UsageView::Nothing, None)
    }

    fn seen(text: &str, view: UsageView, name: Option<&'static str>) -> String {
        let name = name.map(|name| Bytes::from_static(name.as_bytes()));
        let mut splitter = Splitter::default();
        splitter.push(Bytes::copy_from_slice(text.as_bytes()));
        let mut out = Vec::new();
        while let Some(event) = splitter.next().unwrap() {
            match &event.data {
                Some(data) => {
                    let reading = read_event(&event, std::str::from_utf8(data).unwrap());
                    out.extend(shown(&event, data, &reading, view, name.as_ref()));
                }
                None => out.push(event.raw),
            }
        }
        String::from_utf8(out.concat()).unwrap()
    }

    #[test]
    fn the_member_goes_with_its_comma_wherever_it_stands() {
        for (with, without) in [
            (r#"{"choices":[{}],"usage":null}"#, r#"{"choices":[{}]}"#),
            (r#"{"choices":[{}] , "usage" : null, "id":"x"}"#, r#"{"choices":[{}] , "id":"x"}"#),
            (r#"{"usage":null,"choices":[{}]}"#, r#"{"choices":[{}]}"#),
            (r#"{ "usage":null }"#, r#"{  }"#),
            (r#"{"choices":[{}],"usage":{"prompt_tokens":1,"x":"}"},"id":1}"#, r#"{"choices":[{}],"id":1}"#),
            (
                r#"{"choices":[{"usage":null}],"x":"\"usage\":null"}"#,
                r#"{"choices":[{"usage":null}],"x":"\"usage\":null"}"#,
            ),
        ] {
            let expected = format!("data: {without}\r\n\r\n");
            assert_eq!(hidden(&format!("data: {with}\r\n\r\n")), expected);
        }
    }

    #[test]
    fn the_usage_chunk_goes_wholly_and_everything_else_stays() {
        let text = ": hi\n\nid: 3\ndata: {\"choices\":[{}],\"usage\":null}\nretry: 5\n\n\
            data: {\"choices\":[],\"usage\":{\"prompt_tokens\":1}}\n\ndata: nonsense\n\n\ndata: [DONE]\n\n";
        let expected = ": hi\n\nid: 3\ndata: {\"choices\":[{}]}\nretry: 5\n\ndata: nonsense\n\n\ndata: [DONE]\n\n";
        assert_eq!(hidden(text), expected);
    }

    #[test]
    fn figures_become_null_for_a_client_that_asked_for_the_end_alone() {
        let text = "data: {\"choices\":[{}],\"usage\":{\"prompt_tokens\":1,\"completion_tokens\":2}}\n\n\
            data: {\"usage\":null,\"choices\":[{}]}\r\n\r\n: hi\n\ndata: {\"choices\":[{}],\ndata: \"usage\":{\"prompt_tokens\":1}}\n\n\
            data: {\"choices\":[],\"usage\":{\"prompt_tokens\":1}}\n\ndata: [DONE]\n\n";
        let expected = "data: {\"choices\":[{}],\"usage\":null}\n\n\
            data: {\"usage\":null,\"choices\":[{}]}\r\n\r\n: hi\n\ndata: {\"choices\":[{}],\ndata: \"usage\":null}\n\n\
            data: {\"choices\":[],\"usage\":{\"prompt_tokens\":1}}\n\ndata: [DONE]\n\n";
        assert_eq!(seen(text, UsageView::AtEnd, None), expected);
    }

    #[test]
    fn data_in_several_lines_is_written_anew() {
        let text = "event: x\ndata: {\"choices\":[{}],\ndata: \"usage\":null}\n\n";
        assert_eq!(hidden(text), "event: x\ndata: {\"choices\":[{}]}\n\n");
    }

    #[test]
    fn the_model_gets_the_name_that_was_asked_for_and_nothing_else_changes() {
        let text = "data: {\"id\":\"x\", \"model\" : \"Qwen/7B\",\"choices\":[{\"delta\":{\"content\":\"model\"}}],\"usage\":null}\r\n\r\n\
            data: {\"choices\":[],\ndata: \"model\":\"Qwen/7B\"}\n\ndata: [DONE]\n\n";
        let expected = "data: {\"id\":\"x\", \"model\" : \"chat\",\"choices\":[{\"delta\":{\"content\":\"model\"}}]}\r\n\r\n\
            data: {\"choices\":[],\ndata: \"model\":\"chat\"}\n\ndata: [DONE]\n\n";
        assert_eq!(seen(text, UsageView::Nothing, Some("\"chat\"")), expected);
        let same = text.replace("Qwen/7B", "chat");
        assert_eq!(seen(&same, UsageView::All, Some("\"chat\"")), same);
    }
}
