//! Usage that we asked for, taken out of a stream again: a client that did not ask sees what it would have seen.

use bytes::Bytes;
use smallvec::SmallVec;

use crate::dialect::Reading;
use crate::dialect::json::span;
use crate::dialect::sse::Event;

/// Sends on the event without its usage; an event that is nothing but usage is dropped.
pub(super) fn forward(event: &Event, data: &Bytes, reading: &Reading<'_>, out: &mut SmallVec<[Bytes; 2]>) {
    if reading.only_usage {
        return;
    }
    let cut = reading.usage_member.and_then(|value| span(data, value)).and_then(|value| member(data, value));
    match cut {
        Some(cut) => out.push(edit(event, data, cut, b"")),
        None => out.push(event.raw.clone()),
    }
}

/// Sends on the event with `null` for its usage; only an event that is nothing but usage keeps it.
pub(super) fn forward_null(event: &Event, data: &Bytes, reading: &Reading<'_>, out: &mut SmallVec<[Bytes; 2]>) {
    let stated = reading.usage_member.filter(|value| !reading.only_usage && *value != "null");
    match stated.and_then(|value| span(data, value)) {
        Some(cut) => out.push(edit(event, data, cut, b"null")),
        None => out.push(event.raw.clone()),
    }
}

/// The event with a part of its data replaced.
fn edit(event: &Event, data: &Bytes, (start, end): (usize, usize), text: &[u8]) -> Bytes {
    let head = data.get(..start).unwrap_or_default();
    let tail = data.get(end..).unwrap_or_default();
    if !event.whole {
        return rebuild(event, &[head, text, tail].concat());
    }
    // The data is a slice of the event, so its offset there is the distance of their pointers.
    let offset = (data.as_ptr() as usize).saturating_sub(event.raw.as_ptr() as usize);
    // One piece: two would become two small writes.
    let mut whole = Vec::with_capacity(event.raw.len() + text.len());
    whole.extend_from_slice(event.raw.get(..offset + start).unwrap_or_default());
    whole.extend_from_slice(text);
    whole.extend_from_slice(event.raw.get(offset + end..).unwrap_or_default());
    whole.into()
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
fn rebuild(event: &Event, data: &[u8]) -> Bytes {
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

    type Forward = fn(&Event, &Bytes, &Reading<'_>, &mut SmallVec<[Bytes; 2]>);

    fn hidden(text: &str) -> String {
        shown(text, forward)
    }

    fn shown(text: &str, forward: Forward) -> String {
        let mut splitter = Splitter::default();
        splitter.push(Bytes::copy_from_slice(text.as_bytes()));
        let mut out = SmallVec::new();
        while let Some(event) = splitter.next().unwrap() {
            match &event.data {
                Some(data) => {
                    let reading = read_event(&event, std::str::from_utf8(data).unwrap());
                    forward(&event, data, &reading, &mut out);
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
        assert_eq!(shown(text, forward_null), expected);
    }

    #[test]
    fn data_in_several_lines_is_written_anew() {
        let text = "event: x\ndata: {\"choices\":[{}],\ndata: \"usage\":null}\n\n";
        assert_eq!(hidden(text), "event: x\ndata: {\"choices\":[{}]}\n\n");
    }
}
