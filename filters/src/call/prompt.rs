//! The prompt of a call: how large it is, and how it begins.

use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::PromptSize;
use crate::dialect::json::{TooDeep, Visit, walk};
use crate::meter::estimate::decode;

/// Start of the anchor's chain; every gateway must use the same, now and later.
const ANCHOR_SEED: u64 = 0x746f_6c6c_6761_7465;
/// How much of a prompt without messages tells where it belongs.
const ANCHOR_CUT: usize = 1024;

/// What has been found of the prompt so far; the parts of the anchor in the order in which a chat template puts them.
#[derive(Default)]
pub(super) struct Prompt<'a> {
    pub(super) size: PromptSize,
    /// The text itself, where it is asked for: pieces with a zero byte between them.
    pub(super) text: Option<Vec<u8>>,
    tools: &'a [u8],
    system: &'a [u8],
    opening: &'a [u8],
}

impl<'a> Prompt<'a> {
    /// Takes in a field that is an object or an array. Every such field is walked, if only for its depth.
    pub(super) fn take_structure(&mut self, name: &str, raw: &'a str) -> Result<(), TooDeep> {
        let bytes = raw.as_bytes();
        match name {
            "messages" | "contents" | "input" | "prompt" => {
                let mut conversation = Conversation::new(&mut self.size, &mut self.text, false);
                walk(bytes, 1, &mut conversation)?;
                let cut = match conversation.opening {
                    Some(end) => end,
                    None if name == "messages" => bytes.len(),
                    None => ANCHOR_CUT,
                };
                self.opening = head(bytes, cut);
                Ok(())
            }
            "system" | "systemInstruction" => {
                self.system = bytes;
                self.walk_text(bytes, false)
            }
            "documents" | "files" => self.walk_text(bytes, false),
            // The variables of a Dify app may have any name.
            "inputs" => self.walk_text(bytes, true),
            "tools" | "functions" => {
                self.tools = bytes;
                // A schema is given to the model as text, keys and all.
                self.take_raw(bytes);
                walk(bytes, 1, &mut ())
            }
            "response_format" => {
                self.take_raw(bytes);
                walk(bytes, 1, &mut ())
            }
            _ => walk(bytes, 1, &mut ()),
        }
    }

    /// Takes in a field that is a string, a number or a word.
    pub(super) fn take_scalar(&mut self, name: &str, raw: &'a str) {
        let Some(text) = raw.strip_prefix('"').and_then(|raw| raw.strip_suffix('"')) else { return };
        let text = text.as_bytes();
        match name {
            "prompt" | "input" => self.opening = head(text, ANCHOR_CUT),
            "system" | "instructions" => self.system = text,
            "query" | "suffix" => {}
            _ => return,
        }
        count(&mut self.size, &mut self.text, text);
    }

    fn take_raw(&mut self, bytes: &[u8]) {
        self.size.text.feed(bytes);
        if let Some(kept) = &mut self.text {
            kept.extend_from_slice(bytes);
            kept.push(0);
        }
    }

    fn walk_text(&mut self, bytes: &[u8], every_key: bool) -> Result<(), TooDeep> {
        walk(bytes, 1, &mut Conversation::new(&mut self.size, &mut self.text, every_key))
    }

    /// A hash of how the prompt begins. A client that repeats the conversation with each turn repeats these bytes.
    pub(super) fn anchor(&self) -> u64 {
        [self.tools, self.system, self.opening]
            .into_iter()
            .fold(ANCHOR_SEED, |seed, part| xxh3_64_with_seed(part, seed))
    }
}

/// Takes in the text of one JSON string.
fn count(size: &mut PromptSize, kept: &mut Option<Vec<u8>>, text: &[u8]) {
    size.text.feed_string(text);
    size.text.separate();
    if let Some(kept) = kept {
        decode(text, |piece| kept.extend_from_slice(piece));
        kept.push(0);
    }
}

fn head(bytes: &[u8], most: usize) -> &[u8] {
    bytes.get(..most).unwrap_or(bytes)
}

/// Depth of a message in a list of the body: body, list, message.
const MESSAGE_DEPTH: usize = 3;

/// Reads messages, or any other structure with text.
struct Conversation<'s> {
    size: &'s mut PromptSize,
    text: &'s mut Option<Vec<u8>>,
    /// Whether strings count under every key, also those that mostly hold ids and addresses.
    every_key: bool,
    /// Whether the thing at hand is a message: it has a role.
    role: bool,
    /// Whether that role is the user's.
    user: bool,
    /// Where the first user's message ends.
    opening: Option<usize>,
}

impl<'s> Conversation<'s> {
    fn new(size: &'s mut PromptSize, text: &'s mut Option<Vec<u8>>, every_key: bool) -> Self {
        Self { size, text, every_key, role: false, user: false, opening: None }
    }

    fn count(&mut self, text: &[u8]) {
        count(self.size, self.text, text);
    }
}

impl Visit for Conversation<'_> {
    fn string(&mut self, key: &[u8], depth: usize, text: &[u8]) {
        match key {
            _ if self.every_key => self.count(text),
            b"role" if depth == MESSAGE_DEPTH => {
                self.role = true;
                self.user = text == b"user";
            }
            b"type" if is_media(text) => self.size.media += 1,
            b"type" | b"id" | b"tool_call_id" | b"tool_use_id" | b"call_id" | b"url" | b"image_url" | b"video_url"
            | b"data" | b"file_data" | b"file_id" | b"detail" | b"format" | b"media_type" | b"mime_type"
            | b"mimeType" | b"upload_file_id" | b"transfer_method" => {}
            _ => self.count(text),
        }
    }

    fn number(&mut self) {
        // Only prompts given as token ids hold numbers to speak of.
        if !self.every_key {
            self.size.ids += 1;
        }
    }

    fn close(&mut self, depth: usize, end: usize) {
        if depth == MESSAGE_DEPTH {
            self.size.messages += u64::from(self.role);
            if self.user && self.opening.is_none() {
                self.opening = Some(end);
            }
            (self.role, self.user) = (false, false);
        }
    }
}

fn is_media(kind: &[u8]) -> bool {
    matches!(
        kind,
        b"image_url"
            | b"image"
            | b"input_image"
            | b"input_audio"
            | b"audio"
            | b"video_url"
            | b"video"
            | b"file"
            | b"input_file"
            | b"document"
    )
}
