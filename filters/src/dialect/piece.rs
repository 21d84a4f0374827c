//! The text that one event adds to an answer, taken apart so that another node can go on with it.

use std::borrow::Cow;

use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::value::RawValue;
use smallvec::SmallVec;

use super::Dialect;
use super::json::is_blank;

/// The kinds of text that an answer may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    /// The answer itself in a chat.
    Content,
    /// What the model thinks before it answers.
    ReasoningContent,
    /// The same by another name; some servers send both.
    Reasoning,
    /// The answer itself in a completion.
    Text,
}

impl Part {
    /// How many places the kinds of text take: the answer itself has one, whatever its name.
    pub(crate) const KINDS: usize = 3;
    /// All.
    pub(crate) const ALL: [Self; 4] = [Self::Content, Self::ReasoningContent, Self::Reasoning, Self::Text];

    /// Its member of a chunk.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Content => "content",
            Self::ReasoningContent => "reasoning_content",
            Self::Reasoning => "reasoning",
            Self::Text => "text",
        }
    }

    /// Its place among the texts of an answer.
    pub(crate) const fn place(self) -> usize {
        match self {
            Self::Content | Self::Text => 0,
            Self::ReasoningContent => 1,
            Self::Reasoning => 2,
        }
    }
}

/// What an event adds.
#[derive(Debug, Default)]
pub(crate) struct Piece<'a> {
    /// `id`, `created`, `model` and `system_fingerprint`, as JSON.
    pub(crate) head: [Option<&'a str>; 4],
    /// Text.
    pub(crate) texts: SmallVec<[(Part, Cow<'a, str>); 2]>,
    /// It adds what is not text, or not of the one answer.
    pub(crate) other: bool,
}

/// Takes an event apart; what has no text gives nothing.
pub(crate) fn read(dialect: Dialect, data: &str) -> Piece<'_> {
    match dialect {
        Dialect::Anthropic => serde_json::from_str::<Block<'_>>(data).map(Block::read).unwrap_or_default(),
        Dialect::Openai | Dialect::Gemini | Dialect::Dify | Dialect::None => {
            serde_json::from_str::<Chunk<'_>>(data).map(Chunk::read).unwrap_or_default()
        }
    }
}

#[derive(Deserialize)]
struct Chunk<'a> {
    #[serde(borrow)]
    id: Option<&'a RawValue>,
    #[serde(borrow)]
    created: Option<&'a RawValue>,
    #[serde(borrow)]
    model: Option<&'a RawValue>,
    #[serde(borrow)]
    system_fingerprint: Option<&'a RawValue>,
    #[serde(borrow)]
    choices: Option<Vec<Choice<'a>>>,
}

#[derive(Deserialize)]
struct Choice<'a> {
    index: Option<u64>,
    #[serde(borrow)]
    text: Option<&'a RawValue>,
    #[serde(borrow)]
    delta: Option<Delta<'a>>,
}

#[derive(Deserialize)]
struct Delta<'a> {
    #[serde(borrow)]
    content: Option<&'a RawValue>,
    #[serde(borrow)]
    reasoning_content: Option<&'a RawValue>,
    #[serde(borrow)]
    reasoning: Option<&'a RawValue>,
    #[serde(borrow)]
    refusal: Option<&'a RawValue>,
    #[serde(borrow)]
    tool_calls: Option<&'a RawValue>,
    #[serde(borrow)]
    function_call: Option<&'a RawValue>,
    #[serde(borrow)]
    audio: Option<&'a RawValue>,
}

impl<'a> Chunk<'a> {
    fn read(self) -> Piece<'a> {
        let head = [self.id, self.created, self.model, self.system_fingerprint];
        let mut piece = Piece { head: head.map(|raw| raw.map(RawValue::get)), ..Piece::default() };
        let choices = self.choices.unwrap_or_default();
        piece.other = choices.len() > 1;
        for choice in choices {
            piece.other |= choice.index.is_some_and(|index| index > 0);
            piece.add(Part::Text, choice.text);
            let Some(delta) = choice.delta else { continue };
            piece.add(Part::Content, delta.content);
            piece.add(Part::ReasoningContent, delta.reasoning_content);
            piece.add(Part::Reasoning, delta.reasoning);
            let others = [delta.refusal, delta.tool_calls, delta.function_call, delta.audio];
            piece.other |= others.into_iter().flatten().any(|raw| !is_blank(raw));
        }
        piece
    }
}

impl<'a> Piece<'a> {
    fn add(&mut self, part: Part, raw: Option<&'a RawValue>) {
        #[derive(Deserialize)]
        struct Text<'a>(#[serde(borrow)] Cow<'a, str>);
        let Some(raw) = raw.filter(|raw| !is_blank(raw)) else { return };
        match serde_json::from_str::<Text<'a>>(raw.get()) {
            Ok(Text(text)) => self.texts.push((part, text)),
            Err(_) => self.other = true,
        }
    }
}

/// An event of a message in blocks.
#[derive(Deserialize)]
struct Block<'a> {
    #[serde(rename = "type", borrow)]
    kind: Option<Cow<'a, str>>,
    index: Option<u64>,
    #[serde(borrow)]
    delta: Option<BlockDelta<'a>>,
    #[serde(borrow)]
    content_block: Option<BlockStart<'a>>,
}

#[derive(Deserialize)]
struct BlockDelta<'a> {
    #[serde(borrow)]
    text: Option<&'a RawValue>,
    partial_json: Option<IgnoredAny>,
    thinking: Option<IgnoredAny>,
    signature: Option<IgnoredAny>,
}

#[derive(Deserialize)]
struct BlockStart<'a> {
    #[serde(rename = "type", borrow)]
    kind: Option<Cow<'a, str>>,
    #[serde(borrow)]
    text: Option<&'a RawValue>,
}

impl<'a> Block<'a> {
    fn read(self) -> Piece<'a> {
        let mut piece = Piece { other: self.index.is_some_and(|index| index > 0), ..Piece::default() };
        // A block that was closed cannot be written into any more.
        piece.other |= self.kind.as_deref() == Some("content_block_stop");
        if let Some(block) = self.content_block {
            piece.other |= block.kind.as_deref() != Some("text");
            piece.add(Part::Content, block.text);
        }
        if let Some(delta) = self.delta {
            piece.other |= delta.partial_json.is_some() || delta.thinking.is_some() || delta.signature.is_some();
            piece.add(Part::Content, delta.text);
        }
        piece
    }
}
