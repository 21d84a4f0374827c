//! The seam between an answer that broke off and another node's answer that goes on from there: the client sees one answer.
//!
//! While an answer streams, what the client got of it is remembered. Once it has broken, the events of the next answer are rewritten to
//! fit: its id and its name of the model are those of the first, its opening is left out, its usage is the sum, and where it begins anew
//! the part that the client has is compared and left out.

use bytes::Bytes;

use super::UsageView;
use super::tally::Tally;
use crate::dialect::json::Object;
use crate::dialect::piece::{self, Part, Piece};
use crate::dialect::{Dialect, Reading};
use crate::usage::{Usage, UsageSource};

/// The most text of one answer that is remembered, in bytes. A longer answer is not gone on with.
const MOST: usize = 256 * 1024;

/// How another node comes to the rest of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// It gets the text so far and goes on.
    Continue,
    /// It gets the same call and answers anew.
    Replay,
}

/// Members by which clients tell that chunks belong to one answer.
const HEAD: [&str; 4] = ["id", "created", "model", "system_fingerprint"];

/// What a client got of an answer, and how the answer at hand is joined to it.
#[derive(Debug, Clone)]
pub struct Seam {
    way: Way,
    /// What HEAD names, as the first answer said it, as JSON.
    head: [Option<String>; 4],
    /// What came, by kind of text.
    told: [String; Part::KINDS],
    /// Nothing came that cannot be gone on with.
    whole: bool,
    /// Set once the first answer has broken off.
    before: Option<Before>,
}

/// What the answers before the one at hand came to.
#[derive(Debug, Clone, Copy)]
struct Before {
    usage: Usage,
    states_input: bool,
    estimated: u64,
    /// How much of each kind of text the answer at hand has repeated.
    repeated: [usize; Part::KINDS],
}

/// What the client is to see of an event.
pub(super) enum Joined {
    /// The event.
    AsItIs,
    /// The event with other data.
    Anew(String),
    /// Nothing.
    Nothing,
    /// The answer does not fit to what the client has got.
    Apart,
}

impl Seam {
    /// For an answer that may have to be gone on with.
    pub fn new(way: Way) -> Self {
        Self { way, head: Default::default(), told: Default::default(), whole: true, before: None }
    }

    /// How it is gone on with.
    pub const fn way(&self) -> Way {
        self.way
    }

    /// The answer's text so far.
    pub fn text(&self) -> &str {
        let [text, ..] = &self.told;
        text
    }

    /// What the answers so far used.
    pub fn used(&self) -> Usage {
        self.before.map(|before| before.usage).unwrap_or_default()
    }

    /// Whether what came can be gone on with.
    pub(super) fn is_whole(&self) -> bool {
        // What a model thought cannot be handed over.
        let [_, thoughts @ ..] = &self.told;
        self.whole && (self.way == Way::Replay || thoughts.iter().all(String::is_empty))
    }

    /// The seam for the next answer, as this one has broken off.
    pub(super) fn broken_off(&self, tally: &Tally, prompt_estimate: u64) -> Self {
        let before = Before {
            usage: self.usage(tally, prompt_estimate),
            states_input: tally.states_input() || self.states_input(),
            estimated: match self.way {
                Way::Continue => self.estimated() + tally.estimated(),
                Way::Replay => 0,
            },
            repeated: [0; Part::KINDS],
        };
        Self { before: Some(before), ..self.clone() }
    }

    pub(super) fn states_input(&self) -> bool {
        self.before.is_some_and(|before| before.states_input)
    }

    pub(super) fn estimated(&self) -> u64 {
        self.before.map_or(0, |before| before.estimated)
    }

    /// What the client got in all, from what the answer at hand used.
    pub(super) fn usage(&self, tally: &Tally, prompt_estimate: u64) -> Usage {
        let Some(before) = self.before else { return tally.usage(prompt_estimate) };
        let own = tally.usage(prompt_estimate);
        let first = before.usage;
        if self.way == Way::Replay {
            // The new answer holds all that the client has, or not yet.
            return if own.output >= first.output { own } else { first };
        }
        let source = match (first.source, own.source) {
            (UsageSource::Upstream, UsageSource::Upstream) => UsageSource::Upstream,
            (UsageSource::Estimated, UsageSource::Estimated) => UsageSource::Estimated,
            _ => UsageSource::Counted,
        };
        // The prompt of a node that goes on holds what came before: it is counted once.
        let (input, cached) = match (before.states_input, tally.states_input()) {
            (true, _) => (first.input, first.cached_input),
            (false, true) => (own.input.saturating_sub(first.output), own.cached_input),
            (false, false) => (prompt_estimate, 0),
        };
        let output = first.output.saturating_add(own.output);
        Usage { input, cached_input: cached.min(input), output, source }
    }

    /// Takes note of an event, and says what the client is to see of it. `tally` has added it up already.
    pub(super) fn join(
        &mut self,
        data: &str,
        reading: &Reading<'_>,
        dialect: Dialect,
        (view, name): (UsageView, Option<&Bytes>),
        tally: &Tally,
    ) -> Joined {
        if self.before.is_none() {
            self.remember(piece::read(dialect, data), name);
            return Joined::AsItIs;
        }
        if reading.done || reading.error.is_some() || data.trim_ascii().is_empty() {
            let short = self.way == Way::Replay && reading.error.is_none() && !self.has_repeated_all();
            return if short { Joined::Apart } else { Joined::AsItIs };
        }
        let Some(mut event) = Object::parse(data) else { return Joined::AsItIs };
        match dialect {
            Dialect::Anthropic => self.join_block(data, &mut event, tally),
            Dialect::Openai | Dialect::Gemini | Dialect::Dify | Dialect::None => {
                self.join_chunk(&mut event, reading, view, tally)
            }
        }
    }

    fn remember(&mut self, piece: Piece<'_>, name: Option<&Bytes>) {
        for (known, new) in self.head.iter_mut().zip(piece.head) {
            if known.is_none() {
                *known = new.map(str::to_owned);
            }
        }
        if let (Some(name), [_, _, model, _]) = (name, &mut self.head)
            && model.is_some()
        {
            *model = String::from_utf8(name.to_vec()).ok();
        }
        self.whole &= !piece.other;
        for (part, text) in piece.texts {
            self.tell(part, &text);
        }
    }

    fn tell(&mut self, part: Part, text: &str) {
        let told: usize = self.told.iter().map(String::len).sum();
        if told + text.len() > MOST {
            self.whole = false;
        }
        if let Some(all) = self.told.get_mut(part.place()).filter(|_| self.whole) {
            all.push_str(text);
        }
    }

    /// A chunk of a chat or a completion.
    fn join_chunk(&mut self, event: &mut Object, reading: &Reading<'_>, view: UsageView, tally: &Tally) -> Joined {
        for (name, known) in HEAD.iter().zip(&self.head) {
            if let Some(known) = known.as_ref().filter(|_| event.get(name).is_some()) {
                event.set(name, known.clone());
            }
        }
        if let Some(usage) = event.get("usage").map(str::to_owned) {
            match view {
                UsageView::Nothing if reading.only_usage => return Joined::Nothing,
                UsageView::Nothing => event.remove("usage"),
                UsageView::AtEnd if !reading.only_usage => event.set("usage", "null".to_owned()),
                UsageView::AtEnd | UsageView::All if usage == "null" => {}
                UsageView::AtEnd | UsageView::All => event.set("usage", self.stated(tally)),
            }
        }
        let choices = event.get("choices").and_then(Object::parse_all).unwrap_or_default();
        let Ok([mut choice]) = <[Object; 1]>::try_from(choices) else { return Joined::Anew(event.to_string()) };
        let mut delta = choice.get("delta").and_then(Object::parse);
        if let Some(delta) = &mut delta {
            delta.remove("role");
        }
        let texts = delta.as_mut().unwrap_or(&mut choice);
        let Ok(left) = self.join_texts(texts) else { return Joined::Apart };
        let left = left || delta.as_ref().is_some_and(Object::says_something);
        if let Some(delta) = delta {
            choice.set("delta", delta.to_string());
        }
        if reading.finished > 0 && self.way == Way::Replay && !self.has_repeated_all() {
            return Joined::Apart;
        }
        if !left && reading.finished == 0 {
            return Joined::Nothing;
        }
        event.set("choices", format!("[{choice}]"));
        Joined::Anew(event.to_string())
    }

    /// Takes from the texts of a chunk what the client has; whether any text is left.
    fn join_texts(&mut self, texts: &mut Object) -> Result<bool, Differs> {
        let mut left = false;
        for part in Part::ALL {
            let Some(text) = texts.get(part.name()).and_then(|raw| serde_json::from_str::<String>(raw).ok()) else {
                continue;
            };
            let new = self.join_text(part, &text)?;
            left |= !new.is_empty();
            if new.len() != text.len() {
                texts.set(part.name(), serde_json::Value::from(new).to_string());
            }
        }
        // A tool that is called now could not be handed over a second time.
        let other = ["tool_calls", "function_call", "audio", "refusal"].iter().any(|name| texts.speaks(name));
        self.whole &= !other;
        if other && self.way == Way::Replay && !self.has_repeated_all() {
            return Err(Differs);
        }
        Ok(left || other)
    }

    /// What of a text is new to the client.
    fn join_text<'t>(&mut self, part: Part, text: &'t str) -> Result<&'t str, Differs> {
        let new = match (self.way, &mut self.before) {
            (Way::Replay, Some(before)) => {
                let told = self.told.get(part.place()).map_or("", String::as_str);
                let repeated = before.repeated.get_mut(part.place()).ok_or(Differs)?;
                let due = told.get(*repeated..).unwrap_or_default();
                let new = match text.strip_prefix(due) {
                    Some(new) => new,
                    None if due.starts_with(text) => "",
                    None => return Err(Differs),
                };
                *repeated += text.len() - new.len();
                new
            }
            (Way::Continue | Way::Replay, _) => text,
        };
        self.tell(part, new);
        if let Some(before) = &mut self.before
            && let Some(repeated) = before.repeated.get_mut(part.place())
        {
            *repeated += new.len();
        }
        Ok(new)
    }

    fn has_repeated_all(&self) -> bool {
        let Some(before) = &self.before else { return true };
        !self.whole || before.repeated.iter().zip(&self.told).all(|(repeated, told)| *repeated >= told.len())
    }

    /// An event of a message in blocks.
    fn join_block(&mut self, data: &str, event: &mut Object, tally: &Tally) -> Joined {
        let piece = piece::read(Dialect::Anthropic, data);
        let has_text = self.told.iter().any(|told| !told.is_empty());
        match event.get("type").unwrap_or_default() {
            "\"message_start\"" => Joined::Nothing,
            // The first block is open since the first answer.
            "\"content_block_start\"" if event.get("index") == Some("0") && has_text => Joined::Nothing,
            "\"content_block_delta\"" => {
                let Some(mut delta) = event.get("delta").and_then(Object::parse) else { return Joined::AsItIs };
                self.whole &= !piece.other;
                for (part, text) in piece.texts {
                    let Ok(new) = self.join_text(part, &text) else { return Joined::Apart };
                    if new.is_empty() {
                        return Joined::Nothing;
                    }
                    delta.set("text", serde_json::Value::from(new).to_string());
                }
                event.set("delta", delta.to_string());
                Joined::Anew(event.to_string())
            }
            "\"content_block_stop\"" if self.way == Way::Replay && !self.has_repeated_all() => Joined::Apart,
            "\"message_delta\"" => {
                let Some(mut usage) = event.get("usage").and_then(Object::parse) else { return Joined::AsItIs };
                usage.set("output_tokens", self.usage(tally, 0).output.to_string());
                for input in ["input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens"] {
                    // The first answer has stated them in its opening.
                    usage.remove(input);
                }
                event.set("usage", usage.to_string());
                Joined::Anew(event.to_string())
            }
            _ => {
                self.whole &= !piece.other;
                Joined::AsItIs
            }
        }
    }

    /// The usage of all, as a chat states it.
    fn stated(&self, tally: &Tally) -> String {
        let usage = self.usage(tally, 0);
        let total = usage.total();
        serde_json::json!({
            "prompt_tokens": usage.input, "completion_tokens": usage.output, "total_tokens": total,
            "prompt_tokens_details": { "cached_tokens": usage.cached_input },
        })
        .to_string()
    }
}

/// The new answer is another one.
struct Differs;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dialect::CallKind;
    use crate::meter::{Meter, Stop};

    fn block(text: &str) -> String {
        let data = serde_json::json!({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": text}});
        format!("event: content_block_delta\ndata: {data}\n\n")
    }

    fn opening(id: &str, input: u64) -> String {
        format!(
            "event: message_start\ndata: {{\"type\":\"message_start\",\"message\":{{\"id\":\"{id}\",\"usage\":{{\"input_tokens\":{input},\"output_tokens\":1}}}}}}\n\n\
             event: content_block_start\ndata: {{\"type\":\"content_block_start\",\"index\":0,\"content_block\":{{\"type\":\"text\",\"text\":\"\"}}}}\n\n"
        )
    }

    fn ending(output: u64) -> String {
        format!(
            "event: content_block_stop\ndata: {{\"type\":\"content_block_stop\",\"index\":0}}\n\n\
             event: message_delta\ndata: {{\"type\":\"message_delta\",\"delta\":{{\"stop_reason\":\"end_turn\"}},\"usage\":{{\"output_tokens\":{output}}}}}\n\n\
             event: message_stop\ndata: {{\"type\":\"message_stop\"}}\n\n"
        )
    }

    fn messages(seam: Seam) -> Meter {
        Meter::stream(Dialect::Anthropic, CallKind::Messages, UsageView::All).joined(seam)
    }

    fn fed(meter: &mut Meter, text: &str) -> (String, Option<Stop>) {
        let seen = meter.feed(Bytes::copy_from_slice(text.as_bytes())).unwrap();
        (String::from_utf8(seen.forward.concat()).unwrap(), seen.stop)
    }

    fn broken(way: Way) -> Seam {
        let mut first = messages(Seam::new(way));
        let begun = format!("{}{}{}", opening("a", 10), block("one"), block(" two"));
        assert_eq!(fed(&mut first, &begun), (begun, None));
        first.break_off(99).unwrap()
    }

    #[test]
    fn a_message_is_gone_on_with_in_the_block_that_is_open() {
        let seam = broken(Way::Continue);
        assert_eq!(seam.text(), "one two");
        let said = seam.used().output;
        let mut second = messages(seam);
        let (shown, stop) = fed(&mut second, &format!("{}{}{}", opening("b", 12), block(" three"), ending(5)));
        assert_eq!((shown, stop), (format!("{}{}", block(" three"), ending(5 + said)), None));
        let usage = second.usage(99);
        assert_eq!((usage.input, usage.output), (10, 5 + said));
    }

    #[test]
    fn a_replayed_message_is_shown_from_where_it_is_new() {
        let mut second = messages(broken(Way::Replay));
        let text = format!("{}{}{}{}", opening("b", 10), block("o"), block("ne two th"), block("ree"));
        let (shown, stop) = fed(&mut second, &format!("{text}{}", ending(7)));
        assert_eq!((shown, stop), (format!("{}{}{}", block(" th"), block("ree"), ending(7)), None));
        assert_eq!((second.usage(99).input, second.usage(99).output), (10, 7));
        for other in [block("other"), format!("{}{}", block("one"), ending(1))] {
            let mut second = messages(broken(Way::Replay));
            assert_eq!(fed(&mut second, &format!("{}{other}", opening("b", 10))), (String::new(), Some(Stop::Apart)));
        }
    }

    fn chunk(delta: &str) -> String {
        format!("data: {{\"id\":\"x\",\"choices\":[{{\"index\":0,\"delta\":{delta}}}]}}\n\n")
    }

    #[test]
    fn an_answer_may_break_more_than_once() {
        let chat = |seam| Meter::stream(Dialect::Openai, CallKind::Chat, UsageView::Nothing).joined(seam);
        let mut seam = Seam::new(Way::Continue);
        for turn in 0..3 {
            let mut meter = chat(seam);
            let role = chunk("{\"role\":\"assistant\",\"content\":\"\"}");
            let word = chunk(&format!("{{\"content\":\"word{turn} \"}}"));
            let (shown, _) = fed(&mut meter, &format!("{role}{word}"));
            assert_eq!(shown, if turn == 0 { format!("{role}{word}") } else { word });
            seam = meter.break_off(7).unwrap();
        }
        assert_eq!(seam.text(), "word0 word1 word2 ");
        assert_eq!(seam.used().input, 7);
        assert!(seam.used().output >= 6, "{:?}", seam.used());
    }

    #[test]
    fn thoughts_tools_and_very_long_answers_are_not_gone_on_with() {
        let long = format!("{{\"content\":\"{}\"}}", "x".repeat(MOST + 1));
        for (delta, continued, replayed) in [
            ("{\"content\":\"a\"}", true, true),
            ("{\"reasoning_content\":\"a\"}", false, true),
            ("{\"tool_calls\":[{\"index\":0}]}", false, false),
            ("{\"refusal\":\"no\"}", false, false),
            (long.as_str(), false, false),
        ] {
            for (way, possible) in [(Way::Continue, continued), (Way::Replay, replayed)] {
                let mut meter = Meter::stream(Dialect::Openai, CallKind::Chat, UsageView::All).joined(Seam::new(way));
                fed(&mut meter, &chunk(delta));
                assert_eq!(meter.break_off(1).is_some(), possible, "{way:?}");
            }
        }
    }
}
