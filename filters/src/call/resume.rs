//! The call that makes another node go on with an answer that broke off.

use bytes::Bytes;

use super::Call;
use crate::dialect::json::Object;
use crate::dialect::{CallKind, Dialect};

/// Wishes that bind the form of an answer: a node would apply them to the rest as if it were the whole.
const FORMS: [&str; 10] = [
    "response_format",
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "grammar",
    "json_schema",
    "echo",
    "continue_final_message",
];

/// The body with the answer so far as its last message, and no more tokens asked for than are left; `None` where the call is not one
/// that can be gone on with.
pub(super) fn go_on(call: &Call, body: &[u8], text: &str, produced: u64) -> Option<Bytes> {
    let mut body = Object::parse(std::str::from_utf8(body).ok()?)?;
    if FORMS.iter().any(|name| body.speaks(name) && !is_plain_text(&body, name)) {
        return None;
    }
    let messages = body.get("messages")?.trim_ascii().strip_suffix(']')?.trim_ascii_end();
    let said = serde_json::Value::from(text);
    let message = format!(r#"{messages},{{"role":"assistant","content":{said}}}]"#);
    body.set("messages", message);
    match (call.dialect, call.kind) {
        (Dialect::Openai, CallKind::Chat) => {
            body.set("continue_final_message", "true".to_owned());
            body.set("add_generation_prompt", "false".to_owned());
        }
        (Dialect::Anthropic, CallKind::Messages) => {}
        _ => return None,
    }
    for name in ["max_tokens", "max_completion_tokens"] {
        if let Some(most) = body.get(name).and_then(|raw| raw.parse::<u64>().ok()) {
            body.set(name, most.saturating_sub(produced).max(1).to_string());
        }
    }
    if let Some(least) = body.get("min_tokens").and_then(|raw| raw.parse::<u64>().ok()) {
        body.set("min_tokens", least.saturating_sub(produced).to_string());
    }
    Some(body.to_string().into())
}

fn is_plain_text(body: &Object, name: &str) -> bool {
    let format = body.get(name).filter(|_| name == "response_format").and_then(Object::parse);
    format.is_some_and(|format| format.get("type") == Some(r#""text""#))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn go_on_with(body: &str, text: &str, produced: u64) -> Option<String> {
        let call = Call::parse(CallKind::Chat, Dialect::Openai, body.as_bytes()).unwrap();
        let body = call.go_on(body.as_bytes(), text, produced)?;
        Some(String::from_utf8(body.to_vec()).unwrap())
    }

    #[test]
    fn the_answer_so_far_becomes_the_last_message() {
        let body =
            r#"{"model":"m","stream":true,"messages":[{"role":"user","content":"hi"} ], "max_tokens":60,"x":[1.0]}"#;
        let expected = r#"{"model":"m","stream":true,"messages":[{"role":"user","content":"hi"},{"role":"assistant","content":"A \"b\"\n"}],"max_tokens":20,"x":[1.0],"continue_final_message":true,"add_generation_prompt":false}"#;
        assert_eq!(go_on_with(body, "A \"b\"\n", 40).unwrap(), expected);
    }

    #[test]
    fn at_least_one_token_is_asked_for() {
        let body = r#"{"model":"m","messages":[1],"max_tokens":60,"max_completion_tokens":8,"min_tokens":7}"#;
        let body = go_on_with(body, "x", 40).unwrap();
        assert!(body.contains(r#""max_tokens":20,"max_completion_tokens":1,"min_tokens":0"#), "{body}");
    }

    #[test]
    fn a_message_of_anthropics_is_prefilled() {
        let body = r#"{"model":"m","max_tokens":60,"messages":[{"role":"user","content":"hi"}]}"#;
        let call = Call::parse(CallKind::Messages, Dialect::Anthropic, body.as_bytes()).unwrap();
        let body = String::from_utf8(call.go_on(body.as_bytes(), "so", 5).unwrap().to_vec()).unwrap();
        assert_eq!(
            body,
            r#"{"model":"m","max_tokens":55,"messages":[{"role":"user","content":"hi"},{"role":"assistant","content":"so"}]}"#
        );
    }

    #[test]
    fn what_binds_the_form_of_the_whole_cannot_be_gone_on_with() {
        for (wish, possible) in [
            (r#""response_format":{"type":"json_object"}"#, false),
            (r#""response_format":{"type":"text"}"#, true),
            (r#""response_format":null"#, true),
            (r#""guided_regex":"a+""#, false),
            (r#""continue_final_message":true"#, false),
            (r#""continue_final_message":false"#, true),
        ] {
            let body = format!(r#"{{"model":"m","messages":[1],{wish}}}"#);
            assert_eq!(go_on_with(&body, "x", 1).is_some(), possible, "{wish}");
        }
    }
}
