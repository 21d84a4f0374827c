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
    let Some((start, end)) = cut else {
        out.push(event.raw.clone());
        return;
    };
    let head = data.get(..start).unwrap_or_default();
    let tail = data.get(end..).unwrap_or_default();
    if !event.whole {
        out.push(rebuild(event, &[head, tail].concat()));
        return;
    }
    // The data is a slice of the event, so its offset there is the distance of their pointers.
    let offset = (data.as_ptr() as usize).saturating_sub(event.raw.as_ptr() as usize);
    // One piece: two would become two small writes.
    let mut text = Vec::with_capacity(event.raw.len());
    text.extend_from_slice(event.raw.get(..offset + start).unwrap_or_default());
    text.extend_from_slice(event.raw.get(offset + end..).unwrap_or_default());
    out.push(text.into());
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

    fn hidden(text: &str) -> String {
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
    fn data_in_several_lines_is_written_anew() {
        let text = "event: x\ndata: {\"choices\":[{}],\ndata: \"usage\":null}\n\n";
        assert_eq!(hidden(text), "event: x\ndata: {\"choices\":[{}]}\n\n");
    }
}
