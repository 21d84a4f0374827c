//! The languages that callers and upstreams speak: what a path, an event and an answer mean in each, and how an error is said.
//!
//! Both sides of a call speak the same dialect, so bytes pass untouched; this module only reads along. It knows nothing of the call or
//! of money: it says what one event holds, [`crate::meter`] adds up.

pub mod anthropic;
pub mod dify;
mod errors;
pub(crate) mod json;
pub mod openai;
pub(crate) mod piece;
pub mod reading;
pub mod sse;

use std::fmt;

use schemars::JsonSchema;
use serde::Deserialize;

pub use errors::{error_body, error_event};
pub use reading::{Counts, Found, Reading, StreamError};

/// The language of a route and of its upstreams.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Dialect {
    /// OpenAI's API, as vLLM, SGLang and llama.cpp speak it too.
    #[default]
    Openai,
    /// Anthropic's Messages API.
    Anthropic,
    /// Google's Gemini API.
    Gemini,
    /// Dify's service API.
    Dify,
    /// Nothing to be understood: bytes.
    None,
}

impl Dialect {
    /// The word used in the configuration and in logs.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Openai => "openai",
            Self::Anthropic => "anthropic",
            Self::Gemini => "gemini",
            Self::Dify => "dify",
            Self::None => "none",
        }
    }
}

impl fmt::Display for Dialect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What kind of call a path is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CallKind {
    /// `/chat/completions`.
    Chat,
    /// `/completions`.
    Completion,
    /// `/embeddings`.
    Embedding,
    /// `/rerank`.
    Rerank,
    /// OpenAI's `/responses`.
    Responses,
    /// Anthropic's `/messages`.
    Messages,
    /// Dify's `/chat-messages`: chat, agent and chatflow apps.
    DifyChat,
    /// Dify's `/completion-messages`.
    DifyCompletion,
    /// Dify's `/workflows/run`, also of one version.
    DifyWorkflow,
    /// Anything else: only what every call has is read.
    Other,
}

impl CallKind {
    /// The kind of call that `path` (canonical, without the query) is in a dialect.
    pub fn of(dialect: Dialect, path: &str) -> Self {
        let path = path.trim_end_matches('/');
        let ends = |tail: &str| path.ends_with(tail);
        match dialect {
            Dialect::Openai if ends("/chat/completions") => Self::Chat,
            Dialect::Openai if ends("/completions") => Self::Completion,
            Dialect::Openai if ends("/embeddings") => Self::Embedding,
            Dialect::Openai if ends("/rerank") => Self::Rerank,
            Dialect::Openai if ends("/responses") => Self::Responses,
            Dialect::Anthropic if ends("/messages") => Self::Messages,
            Dialect::Dify if ends("/chat-messages") => Self::DifyChat,
            Dialect::Dify if ends("/completion-messages") => Self::DifyCompletion,
            Dialect::Dify if ends("/run") && path.contains("/workflows/") => Self::DifyWorkflow,
            Dialect::Openai | Dialect::Anthropic | Dialect::Gemini | Dialect::Dify | Dialect::None => Self::Other,
        }
    }

    /// Whether the body must name a model.
    pub const fn needs_model(self) -> bool {
        match self {
            Self::Chat | Self::Completion | Self::Embedding | Self::Rerank | Self::Responses | Self::Messages => true,
            Self::DifyChat | Self::DifyCompletion | Self::DifyWorkflow | Self::Other => false,
        }
    }

    /// Whether the answer is generated text, so that its length has to be guessed beforehand.
    pub const fn generates(self) -> bool {
        match self {
            Self::Chat | Self::Completion | Self::Responses | Self::Messages => true,
            Self::DifyChat | Self::DifyCompletion | Self::DifyWorkflow => true,
            Self::Embedding | Self::Rerank | Self::Other => false,
        }
    }

    /// Whether usage on a stream has to be asked for with `stream_options`.
    pub const fn takes_stream_options(self) -> bool {
        matches!(self, Self::Chat | Self::Completion)
    }

    /// Whether it is a run of a Dify app.
    pub const fn is_dify(self) -> bool {
        matches!(self, Self::DifyChat | Self::DifyCompletion | Self::DifyWorkflow)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_says_the_kind_of_call_in_its_dialect() {
        let cases = [
            (Dialect::Openai, "/v1/chat/completions", CallKind::Chat),
            (Dialect::Openai, "/v1/chat/completions/", CallKind::Chat),
            (Dialect::Openai, "/v1/completions", CallKind::Completion),
            (Dialect::Openai, "/v1/embeddings", CallKind::Embedding),
            (Dialect::Openai, "/v1/rerank", CallKind::Rerank),
            (Dialect::Openai, "/v1/responses", CallKind::Responses),
            (Dialect::Openai, "/v1/audio/speech", CallKind::Other),
            (Dialect::Anthropic, "/v1/messages", CallKind::Messages),
            (Dialect::Anthropic, "/v1/messages/count_tokens", CallKind::Other),
            (Dialect::Dify, "/v1/chat-messages", CallKind::DifyChat),
            (Dialect::Dify, "/v1/completion-messages", CallKind::DifyCompletion),
            (Dialect::Dify, "/v1/workflows/run", CallKind::DifyWorkflow),
            (Dialect::Dify, "/v1/workflows/6d319903/run", CallKind::DifyWorkflow),
            (Dialect::Dify, "/v1/messages", CallKind::Other),
            (Dialect::None, "/v1/chat/completions", CallKind::Other),
        ];
        for (dialect, path, kind) in cases {
            assert_eq!(CallKind::of(dialect, path), kind, "{dialect} {path}");
        }
    }

    #[test]
    fn a_dialect_is_written_as_it_is_read() {
        for dialect in [Dialect::Openai, Dialect::Anthropic, Dialect::Gemini, Dialect::Dify, Dialect::None] {
            let read: Dialect = serde_json::from_str(&format!("\"{dialect}\"")).unwrap();
            assert_eq!(read, dialect);
        }
        assert!(serde_json::from_str::<Dialect>("\"OpenAI\"").is_err());
    }
}
