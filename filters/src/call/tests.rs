use proptest::prelude::*;
use serde_json::{Map, Value, json};

use super::*;
use crate::error::GatewayError;
use crate::meter::estimate::cpu_seconds;

fn chat(body: &str) -> Result<Call> {
    Call::parse(CallKind::Chat, Dialect::Openai, body.as_bytes())
}

/// Code, param and message of the refusal.
#[track_caller]
fn refusal(kind: CallKind, body: &[u8]) -> (&'static str, Option<String>, String) {
    let dialect = if kind.is_dify() { Dialect::Dify } else { Dialect::Openai };
    let error = match Call::parse(kind, dialect, body) {
        Ok(call) => panic!("accepted: {call:?}"),
        Err(error) => error,
    };
    assert!(matches!(error, GatewayError::BadRequest { .. }));
    (error.face().code, error.param().map(str::to_owned), error.to_string())
}

#[test]
fn the_fields_of_a_chat_call_are_read() {
    let call = chat(
        r#" {"model":"gpt-\u0034o","messages":[{"role":"system","content":"Be brief."},{"role":"user","content":"Hello"}],
        "stream" : true, "stream_options":{"include_usage":false},"n":2,"max_tokens":10,"max_completion_tokens":20,
        "user":"u1","unknown":[1e400,123456789012345678901234567890],"temperature":null} "#,
    )
    .unwrap();
    assert_eq!(call.model.as_deref(), Some("gpt-4o"));
    assert!(call.stream);
    assert_eq!(call.include_usage, Some(false));
    assert_eq!((call.n, call.max_tokens), (2, Some(20)));
    assert_eq!(call.user.as_deref(), Some("u1"));
    assert_eq!(call.prompt.messages, 2);
    // `Be brief.Hello` and 3 for each message and the answer.
    assert_eq!(call.prompt.tokens(), 4 + 9);
    assert!(call.hides_usage());
}

#[test]
fn what_is_not_json_is_refused_with_the_byte() {
    for (body, offset) in [
        (&b""[..], 0),
        // A word that is none is at fault from its first letter on.
        (b"nope", 0),
        (b"{\"model\":\"m\",", 13),
        (b"{\"model\":\"m\"", 12),
        (b"\xEF\xBB\xBF{\"model\":\"m\"}", 0),
        (b"{\"model\":NaN}", 9),
        (b"{\"model\":\"m\"} x", 14),
        (b"{\"model\":\"m\"}{}", 13),
        (b"{\"model\":\"\xff\"}", 10),
        (b"{\"model\":\"m\",\n\n\"a\":\n+1}", 20),
        (b"{'model':'m'}", 1),
        // The parser tells of the last byte before a control character.
        (b"{\"a\":\"line\nbreak\"}", 9),
        (b"[1,2", 4),
        (b"\"\xff\"", 1),
        (b"{\"a\":01}", 6),
    ] {
        let (code, _, message) = refusal(CallKind::Chat, body);
        let shown = String::from_utf8_lossy(body);
        assert_eq!(code, "invalid_json", "{shown}");
        let expected = format!("byte {offset}");
        assert!(message.trim_end_matches(')').ends_with(&expected), "{shown}: {message}, not {expected}");
    }
}

#[test]
fn json_that_is_no_object_is_an_invalid_request() {
    for body in ["[]", "null", "\"x\"", "5", " true "] {
        assert_eq!(refusal(CallKind::Chat, body.as_bytes()).0, "invalid_request", "{body}");
    }
}

#[test]
fn a_field_may_occur_once_in_its_exact_case() {
    for (body, param) in [
        (r#"{"model":"a","model":"a"}"#, "model"),
        (r#"{"model":"a","mod\u0065l":"b"}"#, "model"),
        (r#"{"model":"a","x":1,"x":2}"#, "x"),
        (
            r#"{"model":"a","stream_options":{"include_usage":true,"include_usage":false}}"#,
            "stream_options.include_usage",
        ),
    ] {
        let (code, found, _) = refusal(CallKind::Chat, body.as_bytes());
        assert_eq!((code, found.as_deref()), ("duplicate_field", Some(param)), "{body}");
    }
    let call = chat(r#"{"Model":"a","model":"b","messages":[{}]}"#).unwrap();
    assert_eq!(call.model.as_deref(), Some("b"));
}

#[test]
fn wrong_fields_are_refused_by_name() {
    let long = "m".repeat(257);
    let cases = [
        (json!({}), "model"),
        (json!({"model": ""}), "model"),
        (json!({"model": 5}), "model"),
        (json!({"model": null}), "model"),
        (json!({"model": long}), "model"),
        (json!({"stream": "yes"}), "stream"),
        (json!({"stream": 1}), "stream"),
        (json!({"stream": null}), "stream"),
        (json!({"n": 0}), "n"),
        (json!({"n": -1}), "n"),
        (json!({"n": 129}), "n"),
        (json!({"n": 1.5}), "n"),
        (json!({"n": "1"}), "n"),
        (json!({"max_tokens": -1}), "max_tokens"),
        (json!({"max_tokens": "5"}), "max_tokens"),
        (json!({"max_tokens": 5.5}), "max_tokens"),
        (json!({"max_completion_tokens": 10_000_001}), "max_completion_tokens"),
        (json!({"stream_options": []}), "stream_options"),
        (json!({"stream_options": true}), "stream_options"),
        (json!({"stream_options": {"include_usage": 1}}), "stream_options.include_usage"),
        (json!({"model": "m"}), "messages"),
        (json!({"model": "m", "messages": []}), "messages"),
        (json!({"model": "m", "messages": null}), "messages"),
        (json!({"model": "m", "messages": {"role": "user"}}), "messages"),
    ];
    for (body, param) in cases {
        let (code, found, message) = refusal(CallKind::Chat, body.to_string().as_bytes());
        assert_eq!((code, found.as_deref()), ("invalid_request", Some(param)), "{body}: {message}");
    }
    assert_eq!(refusal(CallKind::Completion, br#"{"model":"m","best_of":0}"#).1.as_deref(), Some("best_of"));
    assert_eq!(refusal(CallKind::Chat, br#"{"model":"m","messages":[ ]}"#).1.as_deref(), Some("messages"));
}

#[test]
fn null_is_absent_for_optional_fields_and_contents_are_left_to_the_upstream() {
    let body =
        r#"{"model":"m","messages":[5,{"role":7}],"n":null,"max_tokens":null,"stream_options":null,"user":null}"#;
    let call = chat(body).unwrap();
    assert_eq!((call.n, call.max_tokens, call.user, call.include_usage), (1, None, None, None));
}

#[test]
fn nesting_is_allowed_to_128_levels_everywhere() {
    for field in ["messages", "tools", "anything", "inputs", "stream_options\":{\"x"] {
        let body = |levels: usize| {
            let close = if field.starts_with("stream") { "}" } else { "" };
            let (open, end) = ("[".repeat(levels), "]".repeat(levels));
            format!(r#"{{"model":"m","messages":[1],"{field}":{open}{end}{close}}}"#)
                .replace(r#""messages":[1],"messages""#, r#""messages""#)
        };
        let most = 127 - usize::from(field.starts_with("stream"));
        assert!(chat(&body(most)).is_ok(), "{field}");
        assert_eq!(refusal(CallKind::Chat, body(most + 1).as_bytes()).0, "invalid_request", "{field}");
        assert_eq!(refusal(CallKind::Chat, body(100_000).as_bytes()).0, "invalid_request", "{field}");
    }
}

#[test]
fn a_body_of_very_many_fields_is_refused_at_once() {
    let fields: Vec<String> = (0..200_000).map(|field| format!("\"f{field}\":1")).collect();
    let (code, _, message) = refusal(CallKind::Other, format!("{{{}}}", fields.join(",")).as_bytes());
    assert_eq!(code, "invalid_request");
    assert!(message.contains("1024"), "{message}");
}

#[test]
fn dify_calls_need_no_model_and_stream_by_response_mode() {
    let parse = |kind, body: &str| Call::parse(kind, Dialect::Dify, body.as_bytes()).unwrap();
    let body =
        r#"{"inputs":{"url":"one two"},"query":"three","response_mode":"streaming","user":"u","stream":"x","model":5}"#;
    let call = parse(CallKind::DifyChat, body);
    assert!(call.stream && !call.hides_usage());
    assert_eq!((call.user.as_deref(), call.model.as_deref()), (Some("u"), None));
    assert_eq!(call.prompt.tokens(), 4);
    assert!(!parse(CallKind::DifyWorkflow, r#"{"inputs":{},"response_mode":"blocking"}"#).stream);
    let bytes = Bytes::from(body);
    assert_eq!(call.rewrite(&bytes, Some("x"), AskUsage::AtEnd), bytes);
}

#[test]
fn media_are_counted_apiece_and_not_by_their_bytes() {
    let image = "A".repeat(100_000);
    let body = json!({"model": "m", "messages": [{"role": "user", "content": [
        {"type": "text", "text": "What is this"},
        {"type": "image_url", "image_url": {"url": format!("data:image/png;base64,{image}")}},
        {"type": "input_audio", "input_audio": {"data": image, "format": "wav"}},
    ]}]});
    let call = chat(&body.to_string()).unwrap();
    assert_eq!(call.prompt.media, 2);
    assert_eq!(call.prompt.tokens(), 4 + 6 + 2 * 800);
}

#[test]
fn a_prompt_of_token_ids_has_as_many_tokens() {
    let call = Call::parse(CallKind::Embedding, Dialect::Openai, br#"{"model":"m","input":[[1,2,3],[4,55]]}"#).unwrap();
    assert_eq!(call.prompt.tokens(), 5);
}

#[test]
fn tools_and_escaped_text_are_part_of_the_prompt() {
    let plain = chat(r#"{"model":"m","messages":[{"role":"user","content":"你好吗"}]}"#).unwrap();
    let escaped = chat(r#"{"model":"m","messages":[{"role":"user","content":"\u4f60\u597d\u5417"}]}"#).unwrap();
    assert_eq!(plain.prompt.tokens(), escaped.prompt.tokens());
    let tools =
        chat(r#"{"model":"m","messages":[{"role":"user","content":"你好吗"}],"tools":[{"type":"function"}]}"#).unwrap();
    assert!(tools.prompt.tokens() > plain.prompt.tokens());
}

fn anchor(body: Value) -> u64 {
    chat(&body.to_string()).unwrap().anchor
}

#[test]
fn the_turns_of_a_conversation_have_one_anchor() {
    let (system, first) = (json!({"role": "system", "content": "s"}), json!({"role": "user", "content": "a"}));
    let one = anchor(json!({"model": "m", "messages": [system, first]}));
    let more = json!([system, first, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]);
    assert_eq!(one, anchor(json!({"model": "other", "temperature": 1, "messages": more})));
    assert_ne!(one, anchor(json!({"model": "m", "messages": [system, {"role": "user", "content": "b"}]})));
    assert_ne!(one, anchor(json!({"model": "m", "messages": [system, first], "tools": [{"type": "function"}]})));
    // Other gateways, and this one after an upgrade, must agree.
    assert_eq!(
        chat(r#"{"model":"m","messages":[{"role":"user","content":"a"}]}"#).unwrap().anchor,
        4_233_686_934_235_375_463
    );
}

#[test]
fn a_completion_is_anchored_by_the_first_kibibyte_of_its_prompt() {
    let of = |prompt: &str| {
        let body = json!({"model": "m", "prompt": prompt}).to_string();
        Call::parse(CallKind::Completion, Dialect::Openai, body.as_bytes()).unwrap().anchor
    };
    let head = "文".repeat(400);
    assert_eq!(of(&format!("{head}a")), of(&format!("{head}b")));
    assert_ne!(of("a"), of("b"));
}

fn rewritten(body: &str, model: Option<&str>) -> String {
    let call = Call::parse(CallKind::Completion, Dialect::Openai, body.as_bytes()).unwrap();
    String::from_utf8(call.rewrite(&Bytes::copy_from_slice(body.as_bytes()), model, AskUsage::AtEnd).to_vec()).unwrap()
}

#[test]
fn only_the_model_and_the_wish_for_usage_are_written() {
    for (body, expected) in [
        (
            r#" {"model" : "m" ,"stream":true } "#,
            r#" {"model" : "a\"b" ,"stream":true ,"stream_options":{"include_usage":true}} "#,
        ),
        (
            r#"{"model":"m","stream":true,"stream_options":{}}"#,
            r#"{"model":"a\"b","stream":true,"stream_options":{"include_usage":true}}"#,
        ),
        (
            r#"{"stream_options":{ "x":1},"stream":true,"model":"m"}"#,
            r#"{"stream_options":{"include_usage":true, "x":1},"stream":true,"model":"a\"b"}"#,
        ),
        (
            r#"{"stream_options":{"include_usage": false},"stream":true,"model":"m"}"#,
            r#"{"stream_options":{"include_usage": true},"stream":true,"model":"a\"b"}"#,
        ),
        (
            r#"{"stream_options":{"include_usage":null},"stream":true,"model":"m"}"#,
            r#"{"stream_options":{"include_usage":true},"stream":true,"model":"a\"b"}"#,
        ),
        (
            r#"{"stream_options": null,"stream":true,"model":"m"}"#,
            r#"{"stream_options": {"include_usage":true},"stream":true,"model":"a\"b"}"#,
        ),
        (r#"{"model":"m","stream":false}"#, r#"{"model":"a\"b","stream":false}"#),
    ] {
        assert_eq!(rewritten(body, Some("a\"b")), expected);
    }
}

#[test]
fn usage_with_every_event_is_asked_for_and_shown_only_to_who_asked() {
    for (options, written, view) in [
        ("", r#","stream_options":{"include_usage":true,"continuous_usage_stats":true}"#, UsageView::Nothing),
        (
            r#","stream_options":null"#,
            r#","stream_options":{"include_usage":true,"continuous_usage_stats":true}"#,
            UsageView::Nothing,
        ),
        (
            r#","stream_options":{}"#,
            r#","stream_options":{"include_usage":true,"continuous_usage_stats":true}"#,
            UsageView::Nothing,
        ),
        (
            r#","stream_options":{"include_usage":false,"x":1}"#,
            r#","stream_options":{"continuous_usage_stats":true,"include_usage":true,"x":1}"#,
            UsageView::Nothing,
        ),
        (
            r#","stream_options":{"include_usage":true}"#,
            r#","stream_options":{"continuous_usage_stats":true,"include_usage":true}"#,
            UsageView::AtEnd,
        ),
        (
            r#","stream_options":{"continuous_usage_stats":false,"include_usage":true}"#,
            r#","stream_options":{"continuous_usage_stats":true,"include_usage":true}"#,
            UsageView::AtEnd,
        ),
        (
            r#","stream_options":{"continuous_usage_stats":true,"include_usage":true}"#,
            r#","stream_options":{"continuous_usage_stats":true,"include_usage":true}"#,
            UsageView::All,
        ),
        (
            r#","stream_options":{"continuous_usage_stats":true}"#,
            r#","stream_options":{"include_usage":true,"continuous_usage_stats":true}"#,
            UsageView::Nothing,
        ),
    ] {
        let body = format!(r#"{{"model":"m","stream":true{options}}}"#);
        let call = Call::parse(CallKind::Completion, Dialect::Openai, body.as_bytes()).unwrap();
        let out = call.rewrite(&Bytes::from(body), None, AskUsage::Always);
        assert_eq!(std::str::from_utf8(&out).unwrap(), format!(r#"{{"model":"m","stream":true{written}}}"#));
        assert_eq!(call.usage_view(AskUsage::Always), view, "{options}");
    }
}

#[test]
fn the_text_of_a_prompt_is_what_its_estimate_counts() {
    let body = r#"{"model":"m","messages":[{"role":"user","content":"one\ntwo"},{"role":"user","content":[{"type":"text","text":"thr\u00e9e"},{"type":"image_url","image_url":{"url":"http://x"}}]}],"tools":[{"a":1}]}"#;
    let call = chat(body).unwrap();
    let text = String::from_utf8(call.prompt_text(body.as_bytes())).unwrap();
    assert_eq!(text, "one\ntwo\0thr\u{e9}e\0[{\"a\":1}]\0");
    assert!(!call.prompt.is_text() && call.prompt.with_text(7) == 7 + call.prompt.with_text(0));
}

#[test]
fn a_body_that_needs_no_change_is_the_same_body() {
    for body in [
        r#"{"model":"m","stream":true,"stream_options":{"include_usage":true},"messages":[1]}"#,
        r#"{"model":"m","messages":[1]}"#,
    ] {
        let bytes = Bytes::from(body);
        let call = chat(body).unwrap();
        assert_eq!(call.rewrite(&bytes, Some("m"), AskUsage::AtEnd).as_ptr(), bytes.as_ptr());
        assert_eq!(call.rewrite(&bytes, None, AskUsage::Nothing).as_ptr(), bytes.as_ptr());
        assert!(!call.hides_usage());
    }
    let embedding = Call::parse(CallKind::Embedding, Dialect::Openai, br#"{"model":"m","stream":true}"#).unwrap();
    assert!(!embedding.hides_usage());
}

fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        "[a-z\"\\\\{}:,\n 中😀]{0,12}".prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 24, 5, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
            prop::collection::btree_map("[a-z\"]{0,6}", inner, 0..5)
                .prop_map(|members| Value::Object(members.into_iter().collect())),
        ]
    })
}

fn any_stream_options() -> impl Strategy<Value = Option<Value>> {
    let include = prop_oneof![Just(None), Just(Some(Value::Null)), any::<bool>().prop_map(|wish| Some(wish.into()))];
    let object = (include, prop::option::of(any_json())).prop_map(|(include, other)| {
        let mut object = Map::new();
        object.extend(include.map(|include| ("include_usage".to_owned(), include)));
        object.extend(other.map(|other| ("other".to_owned(), other)));
        Some(Value::Object(object))
    });
    prop_oneof![Just(None), Just(Some(Value::Null)), object]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1_000))]

    #[test]
    fn a_rewrite_is_the_edit_of_the_tree_and_nothing_else(
        mut members in prop::collection::btree_map("[a-zA-Z\"\\\\ é]{1,8}", any_json(), 0..6),
        model in "[a-z/\"\\\\中]{1,20}",
        new in "[a-z/\"\\\\中]{1,20}",
        stream in any::<bool>(),
        options in any_stream_options(),
        pretty in any::<bool>(),
    ) {
        for read in ["model", "stream", "n", "user", "prompt", "best_of"] {
            members.remove(read);
        }
        let mut body: Map<String, Value> = members.into_iter().collect();
        body.insert("model".into(), model.into());
        body.insert("stream".into(), stream.into());
        body.extend(options.map(|options| ("stream_options".to_owned(), options)));
        let text = if pretty { serde_json::to_vec_pretty(&body).unwrap() } else { serde_json::to_vec(&body).unwrap() };
        let text = Bytes::from(text);
        let call = Call::parse(CallKind::Completion, Dialect::Openai, &text).unwrap();
        let out = call.rewrite(&text, Some(&new), AskUsage::AtEnd);

        let mut expected = body.clone();
        expected.insert("model".into(), new.clone().into());
        if stream {
            let options = expected.entry("stream_options").or_insert(Value::Null);
            if options.is_null() {
                *options = json!({});
            }
            options["include_usage"] = true.into();
        }
        prop_assert_eq!(serde_json::from_slice::<Value>(&out).unwrap(), Value::Object(expected));

        // A second reading sees nothing left to do, and writing the old name back gives the old bytes where usage was not asked.
        let again = Call::parse(CallKind::Completion, Dialect::Openai, &out).unwrap();
        prop_assert_eq!(again.rewrite(&out, Some(&new), AskUsage::AtEnd), out);
        let renamed = call.rewrite(&text, Some(&new), AskUsage::Nothing);
        let again = Call::parse(CallKind::Completion, Dialect::Openai, &renamed).unwrap();
        prop_assert_eq!(again.rewrite(&renamed, call.model.as_deref(), AskUsage::Nothing), text);
    }

    #[test]
    fn no_bytes_make_it_panic(body in prop::collection::vec(any::<u8>(), 0..64), cut in 0usize..120) {
        let _ = Call::parse(CallKind::Chat, Dialect::Openai, &body);
        let good = br#"{"model":"m","messages":[{"role":"user","content":"\ud83d\u"}],"stream_options":{"include_usage":true},"n":1}"#;
        let mut text = good[..cut.min(good.len())].to_vec();
        text.extend(&body);
        let _ = Call::parse(CallKind::Chat, Dialect::Openai, &text);
    }
}

#[test]
#[ignore = "a measurement, to be run in release"]
fn speed_of_a_32_mib_body() {
    let sentence =
        "The gateway reads the body of a call only as far as it must, and estimates what the prompt will cost.\n";
    let chinese = "网关只读取必要的请求内容，估算提示词的成本。";
    let image = "iVBORw0KGgo".repeat(3 << 20);
    let bodies = [
        (
            "english",
            json!({"model": "m", "messages": [{"role": "user", "content": sentence.repeat((32 << 20) / sentence.len())}]}),
        ),
        (
            "chinese",
            json!({"model": "m", "messages": [{"role": "user", "content": chinese.repeat((32 << 20) / chinese.len())}]}),
        ),
        (
            "image",
            json!({"model": "m", "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": image}}]}]}),
        ),
        (
            "small messages",
            json!({"model": "m", "messages": vec![json!({"role": "user", "content": sentence}); 230_000]}),
        ),
        ("token ids", json!({"model": "m", "prompt": vec![12345; 5 << 20]})),
    ];
    for (name, body) in bodies {
        let text = Bytes::from(body.to_string());
        let kind = if name == "token ids" { CallKind::Completion } else { CallKind::Chat };
        let start = cpu_seconds();
        let call = Call::parse(kind, Dialect::Openai, &text).unwrap();
        let speed = text.len() as f64 / (cpu_seconds() - start) / 1e6;
        let start = cpu_seconds();
        let out = call.rewrite(&text, Some("other"), AskUsage::AtEnd);
        let copy = out.len() as f64 / (cpu_seconds() - start) / 1e6;
        println!("{name}: parse {speed:.0} MB/s, rewrite {copy:.0} MB/s, {} tokens", call.prompt.tokens());
    }
}
