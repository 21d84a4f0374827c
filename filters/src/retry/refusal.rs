//! What a provider's 400 means: mostly the client's own business, but a prompt that is too long may fit elsewhere, and a
//! content filter may be another provider's choice.

use serde::Deserialize;

use super::Class;

/// Codes by which providers name a prompt that is too long.
const TOO_LONG: &[&str] =
    &["context_length_exceeded", "context_window_exceeded", "string_above_max_length", "exceed_context_size_error"];
/// Words of those who only say it in their message (vLLM, SGLang, llama.cpp, Anthropic).
const TOO_LONG_WORDS: &[&str] = &[
    "maximum context length",
    "context length exceeded",
    "longer than the model's context",
    "longer than the maximum model length",
    "exceeds the available context size",
    "exceeds the model's maximum context",
    "prompt is too long",
    "input is too long",
];
/// Codes by which providers name a refusal of their content filter.
const FILTERED: &[&str] =
    &["content_filter", "content_policy_violation", "responsibleaipolicyviolation", "data_inspection_failed"];

/// The class of an answer with this status and body, if it is one that another target may take.
pub fn class_of_refusal(status: u16, body: &[u8]) -> Option<Class> {
    if !matches!(status, 400 | 403 | 413 | 422) {
        return None;
    }
    let said = serde_json::from_slice::<Said>(body).ok()?;
    let inner = said.error.unwrap_or_default();
    let code = inner.code.or(said.code).and_then(Word::text).unwrap_or_default().to_ascii_lowercase();
    let kind = inner.kind.and_then(Word::text).unwrap_or_default().to_ascii_lowercase();
    let message = inner.message.or(said.message).and_then(Word::text).unwrap_or_default().to_ascii_lowercase();
    let named = |words: &[&str]| words.contains(&&*code) || words.contains(&&*kind);
    if named(FILTERED) {
        return Some(Class::ContentFilter);
    }
    let too_long = named(TOO_LONG) || TOO_LONG_WORDS.iter().any(|words| message.contains(words));
    (too_long && status != 403).then_some(Class::ContextLength)
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Said {
    error: Option<Inner>,
    code: Option<Word>,
    message: Option<Word>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Inner {
    code: Option<Word>,
    #[serde(rename = "type")]
    kind: Option<Word>,
    message: Option<Word>,
}

/// A word, or whatever else stands in its place.
#[derive(Deserialize)]
#[serde(untagged)]
enum Word {
    Text(String),
    Other(serde::de::IgnoredAny),
}

impl Word {
    fn text(self) -> Option<String> {
        match self {
            Self::Text(text) => Some(text),
            Self::Other(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn class(status: u16, body: &str) -> Option<Class> {
        class_of_refusal(status, body.as_bytes())
    }

    #[test]
    fn a_prompt_that_is_too_long_is_known_by_code_or_words() {
        let bodies = [
            r#"{"error":{"message":"too many","type":"invalid_request_error","code":"context_length_exceeded"}}"#,
            r#"{"object":"error","message":"This model's maximum context length is 4096 tokens.","code":400}"#,
            r#"{"error":{"code":400,"type":"exceed_context_size_error","message":"the request"}}"#,
            r#"{"type":"error","error":{"type":"invalid_request_error","message":"prompt is too long: 250000 tokens"}}"#,
        ];
        for body in bodies {
            assert_eq!(class(400, body), Some(Class::ContextLength), "{body}");
        }
    }

    #[test]
    fn a_content_filter_is_known_by_its_code() {
        assert_eq!(class(400, r#"{"error":{"code":"content_filter","message":"no"}}"#), Some(Class::ContentFilter));
        assert_eq!(
            class(400, r#"{"error":{"code":"x","type":"content_policy_violation"}}"#),
            Some(Class::ContentFilter)
        );
    }

    #[test]
    fn any_other_mistake_is_the_clients() {
        for body in
            ["", "no json", "[1]", r#"{"error":"text"}"#, r#"{"error":{"code":"invalid_api_key","message":null}}"#]
        {
            assert_eq!(class(400, body), None, "{body}");
        }
        let said = r#"{"error":{"code":"context_length_exceeded"}}"#;
        assert_eq!(class(200, said), None);
        assert_eq!(class(500, said), None);
    }
}
