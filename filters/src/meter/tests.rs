use proptest::prelude::*;
use proptest::test_runner::{RngAlgorithm, TestRng};

use super::*;
use crate::meter::estimate::cpu_seconds;
use crate::usage::UsageSource;

/// A stream of a vLLM-like server that was asked for usage.
const CHAT: &str = concat!(
    "data: {\"id\":\"c\",\"choices\":[{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":\"\"}}],\"usage\":null}\n\n",
    ": keep-alive\n\n",
    "data: {\"id\":\"c\",\"choices\":[{\"index\":0,\"delta\":{\"content\":\"Hello\"}}],\"usage\":null}\n\n",
    "data: {\"id\":\"c\",\"usage\":null,\"choices\":[{\"index\":0,\"delta\":{\"content\":\" wörld, 你好\"}}]}\n\n",
    "data: {\"id\":\"c\",\"choices\":[{\"index\":0,\"delta\":{},\"finish_reason\":\"stop\"}],\"usage\":null}\n\n",
    "data: {\"id\":\"c\",\"choices\":[],\"usage\":{\"prompt_tokens\":11,\"completion_tokens\":7,\"total_tokens\":18,",
    "\"prompt_tokens_details\":{\"cached_tokens\":8}}}\n\n",
    "data: [DONE]\n\n",
);
/// What a client sees of it that did not ask.
const CHAT_WITHOUT_USAGE: &str = concat!(
    "data: {\"id\":\"c\",\"choices\":[{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":\"\"}}]}\n\n",
    ": keep-alive\n\n",
    "data: {\"id\":\"c\",\"choices\":[{\"index\":0,\"delta\":{\"content\":\"Hello\"}}]}\n\n",
    "data: {\"id\":\"c\",\"choices\":[{\"index\":0,\"delta\":{\"content\":\" wörld, 你好\"}}]}\n\n",
    "data: {\"id\":\"c\",\"choices\":[{\"index\":0,\"delta\":{},\"finish_reason\":\"stop\"}]}\n\n",
    "data: [DONE]\n\n",
);

/// Everything that a meter said of a body.
#[derive(Debug, Default, PartialEq)]
struct Whole {
    forward: Vec<u8>,
    token: bool,
    progress: bool,
    error: Option<StreamError>,
    done: bool,
    malformed: bool,
    usage: Usage,
}

fn run(mut meter: Meter, chunks: &[&[u8]]) -> Whole {
    let mut whole = Whole::default();
    let mut add = |seen: Seen| {
        whole.forward.extend(seen.forward.concat());
        whole.token |= seen.token;
        whole.progress |= seen.progress;
        whole.error = whole.error.take().or(seen.error);
        whole.malformed |= seen.malformed;
    };
    for chunk in chunks {
        add(meter.feed(Bytes::copy_from_slice(chunk)).unwrap());
    }
    add(meter.finish());
    whole.done = meter.done();
    whole.usage = meter.usage(100);
    assert_eq!(meter.tokens_seen(), whole.token);
    whole
}

fn chat(hide: bool) -> Meter {
    Meter::stream(Dialect::Openai, CallKind::Chat, if hide { UsageView::Nothing } else { UsageView::All })
}

fn chat_of(text: &str) -> Whole {
    run(chat(false), &[text.as_bytes()])
}

fn plain(dialect: Dialect, kind: CallKind, text: &str) -> Whole {
    let whole = run(Meter::plain(dialect, kind), &[text.as_bytes()]);
    assert_eq!(whole.forward, text.as_bytes());
    whole
}

const fn usage(input: u64, cached_input: u64, output: u64, source: UsageSource) -> Usage {
    Usage { input, cached_input, output, source }
}

#[test]
fn a_chat_stream_passes_untouched_and_its_usage_is_read() {
    let whole = chat_of(CHAT);
    assert_eq!(whole.forward, CHAT.as_bytes());
    assert_eq!(whole.usage, usage(11, 8, 7, UsageSource::Upstream));
    assert!(whole.token && whole.done && !whole.malformed && whole.error.is_none());
}

#[test]
fn usage_that_was_not_asked_for_leaves_no_trace() {
    let whole = run(chat(true), &[CHAT.as_bytes()]);
    assert_eq!(String::from_utf8(whole.forward).unwrap(), CHAT_WITHOUT_USAGE);
    assert_eq!(whole.usage, usage(11, 8, 7, UsageSource::Upstream));
}

#[test]
fn the_whole_events_of_a_chunk_go_on_as_one_slice_of_it() {
    for hide in [false, true] {
        let mut meter = chat(hide);
        let begun = "data: {\"choi";
        let text = format!("{}{begun}", CHAT_WITHOUT_USAGE.strip_suffix("data: [DONE]\n\n").unwrap());
        let chunk = Bytes::from(text.clone());
        let seen = meter.feed(chunk.clone()).unwrap();
        assert_eq!(seen.forward.len(), 1);
        assert_eq!(seen.forward[0].as_ptr(), chunk.as_ptr());
        assert_eq!(seen.forward[0], text.as_bytes()[..text.len() - begun.len()]);
        assert!(meter.finish().forward.is_empty(), "an event that is cut off is not sent on");
    }
}

#[test]
fn an_event_that_only_lacks_its_blank_line_is_completed() {
    let event = "data: {\"choices\":[{\"delta\":{\"content\":\"a\"}}]}\n\n";
    for (tail, shown) in [
        ("data: [DONE]", "data: [DONE]\n\n"),
        ("data: [DONE]\n", "data: [DONE]\n\n"),
        ("data: [DONE]\r", "data: [DONE]\r\n"),
        ("data: {\"choices\":[]}\r\n\r", "data: {\"choices\":[]}\r\n\r"),
        ("data: {\"choices\":[]", ""),
        (": pi", ""),
        ("data", ""),
    ] {
        let whole = chat_of(&format!("{event}{tail}"));
        assert_eq!(String::from_utf8(whole.forward).unwrap(), format!("{event}{shown}"), "{tail:?}");
    }
}

#[test]
fn an_event_that_is_no_json_is_left_out_and_what_is_only_strange_passes() {
    let event = "data: {\"choices\":[{\"delta\":{\"content\":\"a\"}}]}\n\n";
    let strange = "data: {\"new\":{}}\n\ndata: [1]\n\ndata: \"x\"\n\n: comment\n\nevent: ping\n\n";
    let text = format!("{event}data: {{\"choices\":[{{\"del\n\n{strange}data: <html>\n\n{event}");
    let skipped = chat_of(&text);
    assert_eq!(String::from_utf8(skipped.forward).unwrap(), format!("{event}{strange}{event}"));
    let mut meter = chat(false).on_malformed(OnMalformed::End);
    let seen = meter.feed(Bytes::from(text)).unwrap();
    assert_eq!((seen.stop, seen.forward.concat()), (Some(Stop::Garbled), event.as_bytes().to_vec()));
    assert!(meter.feed(Bytes::from(event)).unwrap().forward.is_empty(), "nothing follows");
}

#[test]
fn a_failure_of_the_upstream_is_not_shown_and_a_refusal_of_the_request_is() {
    let event = "data: {\"choices\":[{\"delta\":{\"content\":\"a\"}}]}\n\n";
    for (status, stop) in [(500, Stop::Failed), (429, Stop::Failed), (400, Stop::Refused)] {
        let error = format!("data: {{\"error\":{{\"message\":\"no\",\"code\":{status}}}}}\n\n");
        let mut meter = chat(false);
        let seen = meter.feed(Bytes::from(format!("{event}{error}{event}data: [DONE]\n\n"))).unwrap();
        assert_eq!(seen.stop, Some(stop), "{status}");
        let shown = if stop == Stop::Refused { format!("{event}{error}") } else { event.to_owned() };
        assert_eq!(String::from_utf8(seen.forward.concat()).unwrap(), shown);
        assert!(!seen.done && seen.error.is_some());
    }
}

#[test]
fn a_stream_is_complete_once_every_answer_has_ended() {
    let end =
        |index| format!("data: {{\"choices\":[{{\"index\":{index},\"delta\":{{}},\"finish_reason\":\"stop\"}}]}}\n\n");
    let mut meter = chat(false).answers(2);
    meter.feed(Bytes::from(end(0))).unwrap();
    assert!(!meter.done());
    meter.feed(Bytes::from(end(1))).unwrap();
    assert!(meter.done() && !meter.is_stated());
    let usage = "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":1,\"completion_tokens\":2}}\n\n";
    meter.feed(Bytes::from(usage)).unwrap();
    assert!(meter.is_stated());
    assert_eq!(meter.last_event().unwrap(), "data: [DONE]\n\n");
    let shown = meter.feed(Bytes::from("data: [DONE]\n\ndata: [DONE]\n\n")).unwrap().forward.concat();
    assert_eq!((shown, meter.last_event()), (b"data: [DONE]\n\n".to_vec(), None));
    let mut unknown = chat(false).answers(0);
    unknown.feed(Bytes::from(end(0))).unwrap();
    assert!(!unknown.done() && unknown.ended_well());
}

#[test]
fn the_first_token_is_told_in_the_chunk_that_has_it() {
    let mut meter = chat(false);
    let mut tokens = Vec::new();
    for event in CHAT.split_inclusive("\n\n") {
        tokens.push(meter.feed(Bytes::from_static(event.as_bytes())).unwrap().token);
    }
    assert_eq!(tokens, [false, false, true, true, false, false, false]);
}

#[test]
fn without_usage_the_text_is_counted() {
    let text = CHAT_WITHOUT_USAGE;
    let whole = chat_of(text);
    let mut counted = estimate::TextSize::default();
    counted.feed("Hello wörld, 你好".as_bytes());
    assert_eq!(whole.usage, usage(100, 0, counted.tokens(), UsageSource::Counted));
    assert!((5..12).contains(&whole.usage.output));
    let nothing = chat_of(": ping\n\n");
    assert_eq!(nothing.usage, usage(100, 0, 0, UsageSource::Estimated));
    assert!(!nothing.token && !nothing.done);
}

#[test]
fn usage_stated_with_every_chunk_survives_a_broken_stream() {
    let text = "data: {\"choices\":[{\"delta\":{\"content\":\"a\"}}],\"usage\":{\"prompt_tokens\":11,\"completion_tokens\":1}}\n\n\
        data: {\"choices\":[{\"delta\":{\"content\":\"b\"}}],\"usage\":{\"prompt_tokens\":11,\"completion_tokens\":2}}\n\n";
    let whole = chat_of(text);
    assert_eq!(whole.usage, usage(11, 0, 2, UsageSource::Upstream));
    assert!(!whole.done);
}

#[test]
fn text_behind_the_last_statement_of_usage_is_counted() {
    let text = "data: {\"choices\":[{\"delta\":{\"content\":\"a\"}}],\"usage\":{\"prompt_tokens\":11,\"completion_tokens\":1,\"total_tokens\":12}}\n\n\
        data: {\"choices\":[{\"delta\":{\"content\":\" one two three\"}}]}\n\n";
    let whole = chat_of(text);
    // The one that was stated, and three since.
    assert_eq!(whole.usage, usage(11, 0, 4, UsageSource::Counted));
    let zero = "data: {\"choices\":[{\"delta\":{\"content\":\"one\"}}],\"usage\":{\"prompt_tokens\":11,\"completion_tokens\":0}}\n\n";
    assert_eq!(chat_of(zero).usage, usage(11, 0, 2, UsageSource::Counted));
}

#[test]
fn the_running_count_is_ours_until_the_upstream_states_its_own() {
    let mut meter = chat(true);
    let mut counts = Vec::new();
    for event in CHAT.split_inclusive("\n\n") {
        meter.feed(Bytes::from_static(event.as_bytes())).unwrap();
        counts.push(meter.output_tokens_so_far());
    }
    assert_eq!(counts, [0, 0, 2, 6, 6, 7, 7]);
}

#[test]
fn a_malformed_first_event_is_told_a_later_one_is_not() {
    assert!(chat_of("data: {\"choices\":[{\"del\n\n").malformed);
    assert!(chat_of(": x\n\ndata: <html>\n\n").malformed);
    assert!(chat_of("data: \u{0}\n\n").malformed);
    let later = chat_of("data: {\"choices\":[]}\n\ndata: {{\n\n");
    assert!(!later.malformed);
    assert!(run(chat(false), &[b"data: {\"a\":\"\xff\"}\n\n"]).malformed);
}

#[test]
fn an_error_event_is_told_and_is_no_token() {
    let whole = chat_of("data: {\"error\":{\"message\":\"full\",\"type\":\"server_error\",\"code\":503}}\n\n");
    let error = whole.error.unwrap();
    assert_eq!((error.status, &*error.message), (Some(503), "full"));
    assert!(!whole.token && !whole.done);
}

#[test]
fn a_stream_without_line_ends_is_given_up() {
    let mut meter = chat(true);
    let chunk = Bytes::from(vec![b'x'; 1 << 20]);
    let fed = (0..5).try_for_each(|_| meter.feed(chunk.clone()).map(|_| ()));
    assert_eq!(fed, Err(MeterError::TooLong(TooLong::Line)));
}

const ANTHROPIC: &str = concat!(
    "event: message_start\ndata: {\"type\":\"message_start\",\"message\":{\"usage\":{\"input_tokens\":10,",
    "\"cache_read_input_tokens\":30,\"cache_creation_input_tokens\":20,\"output_tokens\":1}}}\n\n",
    "event: ping\ndata: {\"type\":\"ping\"}\n\n",
    "event: content_block_delta\ndata: {\"type\":\"content_block_delta\",\"delta\":{\"type\":\"text_delta\",\"text\":\"Hello there\"}}\n\n",
    "event: message_delta\ndata: {\"type\":\"message_delta\",\"delta\":{\"stop_reason\":\"end_turn\"},\"usage\":{\"output_tokens\":15}}\n\n",
    "event: message_stop\ndata: {\"type\":\"message_stop\"}\n\n",
);

#[test]
fn anthropic_states_input_first_and_output_last() {
    let meter = || Meter::stream(Dialect::Anthropic, CallKind::Messages, UsageView::Nothing);
    let whole = run(meter(), &[ANTHROPIC.as_bytes()]);
    assert_eq!(whole.forward, ANTHROPIC.as_bytes());
    assert_eq!(whole.usage, usage(60, 30, 15, UsageSource::Upstream));
    assert!(whole.done && whole.token);
    let cut = ANTHROPIC.find("event: message_delta").unwrap();
    let broken = run(meter(), &[&ANTHROPIC.as_bytes()[..cut]]);
    assert_eq!(broken.usage, usage(60, 30, 3, UsageSource::Counted));
    assert!(!broken.done);
}

#[test]
fn a_dify_chatflow_is_not_counted_twice() {
    let text = concat!(
        "event: ping\n\n",
        "data: {\"event\":\"workflow_started\",\"data\":{\"id\":\"r\"}}\n\n",
        "data: {\"event\":\"message\",\"answer\":\"Hello\"}\n\n",
        "data: {\"event\":\"node_finished\",\"data\":{\"outputs\":{\"usage\":{\"prompt_tokens\":11,\"completion_tokens\":7}}}}\n\n",
        "data: {\"event\":\"message_end\",\"metadata\":{\"usage\":{\"prompt_tokens\":11,\"completion_tokens\":7,\"total_tokens\":18}}}\n\n",
        "data: {\"event\":\"workflow_finished\",\"data\":{\"status\":\"succeeded\",\"total_tokens\":18,\"outputs\":{}}}\n\n",
    );
    let whole = run(Meter::stream(Dialect::Dify, CallKind::DifyChat, UsageView::Nothing), &[text.as_bytes()]);
    assert_eq!(whole.usage, usage(11, 0, 7, UsageSource::Upstream));
    assert!(whole.token && whole.done && whole.error.is_none());
    assert_eq!(whole.forward, text.as_bytes());
}

fn workflow(events: &[&str]) -> Whole {
    let text: String = events.iter().map(|event| format!("data: {event}\n\n")).collect();
    run(Meter::stream(Dialect::Dify, CallKind::DifyWorkflow, UsageView::All), &[text.as_bytes()])
}

#[test]
fn a_dify_workflow_is_split_by_its_nodes_as_far_as_they_say() {
    let node = r#"{"event":"node_finished","data":{"outputs":{"usage":{"prompt_tokens":11,"completion_tokens":7}}}}"#;
    let end = r#"{"event":"workflow_finished","data":{"status":"succeeded","total_tokens":40}}"#;
    assert_eq!(workflow(&[node, node, end]).usage, usage(26, 0, 14, UsageSource::Upstream));
    let chunk = r#"{"event":"text_chunk","data":{"text":"one two"}}"#;
    assert_eq!(workflow(&[chunk, end]).usage, usage(37, 0, 3, UsageSource::Upstream));
    assert_eq!(workflow(&[node]).usage, usage(11, 0, 7, UsageSource::Counted));
}

#[test]
fn a_stopped_dify_run_is_charged_what_it_said_before() {
    let chunk = r#"{"event":"text_chunk","data":{"text":"one two"}}"#;
    let stopped =
        r#"{"event":"workflow_finished","data":{"status":"stopped","error":"Stopped by user.","total_tokens":0}}"#;
    let whole = workflow(&[chunk, stopped]);
    assert_eq!(whole.usage, usage(100, 0, 3, UsageSource::Counted));
    assert!(whole.done && whole.error.is_none());
    let message = r#"{"event":"message","answer":"one two"}"#;
    let end =
        r#"{"event":"message_end","metadata":{"usage":{"prompt_tokens":0,"completion_tokens":0,"total_tokens":0}}}"#;
    assert_eq!(workflow(&[message, end]).usage, usage(100, 0, 3, UsageSource::Counted));
}

#[test]
fn a_dify_workflow_without_a_model_costs_nothing() {
    let chunk = r#"{"event":"text_chunk","data":{"text":"echo"}}"#;
    let end = r#"{"event":"workflow_finished","data":{"status":"succeeded","total_tokens":0}}"#;
    assert_eq!(workflow(&[chunk, end]).usage, usage(0, 0, 0, UsageSource::Upstream));
    let blocking =
        r#"{"answer": "echo", "metadata": {"usage": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}}}"#;
    assert_eq!(plain(Dialect::Dify, CallKind::DifyChat, blocking).usage, usage(0, 0, 0, UsageSource::Upstream));
}

#[test]
fn plain_answers_state_their_usage() {
    let chat = r#"{"choices":[{"message":{"content":"Hi"}}],"usage":{"prompt_tokens":11,"completion_tokens":7,"total_tokens":18}}"#;
    let whole = plain(Dialect::Openai, CallKind::Chat, chat);
    assert_eq!(whole.usage, usage(11, 0, 7, UsageSource::Upstream));
    assert!(whole.token && whole.done);
    let first = r#"{"usage":{"prompt_tokens":11,"completion_tokens":7,"total_tokens":18},"choices":[{"message":{"content":"Hi"}}]}"#;
    assert_eq!(plain(Dialect::Openai, CallKind::Chat, first).usage, usage(11, 0, 7, UsageSource::Upstream));
    let embedding = r#"{"data":[{"embedding":[0.1,0.2]}],"usage":{"prompt_tokens":5,"total_tokens":5}}"#;
    assert_eq!(plain(Dialect::Openai, CallKind::Embedding, embedding).usage, usage(5, 0, 0, UsageSource::Upstream));
    let rerank = r#"{"results":[],"usage":{"total_tokens":9}}"#;
    assert_eq!(plain(Dialect::Openai, CallKind::Rerank, rerank).usage, usage(9, 0, 0, UsageSource::Upstream));
    let anthropic = r#"{"content":[{"type":"text","text":"Hi"}],"usage":{"input_tokens":3,"output_tokens":2}}"#;
    assert_eq!(plain(Dialect::Anthropic, CallKind::Messages, anthropic).usage, usage(3, 0, 2, UsageSource::Upstream));
    let dify =
        r#"{"event": "message", "answer": "Hi", "metadata": {"usage": {"prompt_tokens": 11, "completion_tokens": 7}}}"#;
    assert_eq!(plain(Dialect::Dify, CallKind::DifyChat, dify).usage, usage(11, 0, 7, UsageSource::Upstream));
    let run = r#"{"data": {"status": "succeeded", "outputs": {"text": "one two"}, "total_tokens": 18}}"#;
    assert_eq!(plain(Dialect::Dify, CallKind::DifyWorkflow, run).usage, usage(15, 0, 3, UsageSource::Upstream));
}

#[test]
fn usage_means_the_same_in_every_dialect() {
    // 60 of prompt, 30 of them cached; 15 of output, 9 of them reasoning that nobody sees.
    let chat = "data: {\"choices\":[{\"delta\":{\"content\":\"Hi\"}}]}\n\ndata: {\"choices\":[],\"usage\":{\"prompt_tokens\":60,\
        \"completion_tokens\":15,\"total_tokens\":75,\"prompt_tokens_details\":{\"cached_tokens\":30},\
        \"completion_tokens_details\":{\"reasoning_tokens\":9}}}\n\ndata: [DONE]\n\n";
    let completion = "data: {\"choices\":[{\"text\":\"Hi\",\"finish_reason\":\"stop\"}]}\n\ndata: {\"choices\":[],\"usage\":{\"prompt_tokens\":60,\
        \"completion_tokens\":15,\"prompt_tokens_details\":{\"cached_tokens\":30}}}\n\ndata: [DONE]\n\n";
    let responses = "event: response.created\ndata: {\"type\":\"response.created\",\"response\":{\"usage\":null}}\n\n\
        event: response.output_text.delta\ndata: {\"type\":\"response.output_text.delta\",\"delta\":\"Hi\"}\n\n\
        event: response.completed\ndata: {\"type\":\"response.completed\",\"response\":{\"status\":\"completed\",\"usage\":{\
        \"input_tokens\":60,\"input_tokens_details\":{\"cached_tokens\":30},\"output_tokens\":15,\
        \"output_tokens_details\":{\"reasoning_tokens\":9},\"total_tokens\":75}}}\n\n";
    let same = usage(60, 30, 15, UsageSource::Upstream);
    for (dialect, kind, text) in [
        (Dialect::Openai, CallKind::Chat, chat),
        (Dialect::Openai, CallKind::Completion, completion),
        (Dialect::Openai, CallKind::Responses, responses),
        (Dialect::Anthropic, CallKind::Messages, ANTHROPIC),
    ] {
        let whole = run(Meter::stream(dialect, kind, UsageView::All), &[text.as_bytes()]);
        assert_eq!((whole.usage, whole.done), (same, true), "{kind:?}");
    }
    for (dialect, kind, text) in [
        (
            Dialect::Openai,
            CallKind::Responses,
            r#"{"output":[{"content":[{"type":"output_text","text":"Hi"}]}],"usage":{"input_tokens":60,"input_tokens_details":{"cached_tokens":30},"output_tokens":15,"output_tokens_details":{"reasoning_tokens":9}}}"#,
        ),
        (
            Dialect::Anthropic,
            CallKind::Messages,
            r#"{"content":[{"type":"text","text":"Hi"}],"usage":{"input_tokens":10,"cache_creation_input_tokens":20,"cache_read_input_tokens":30,"output_tokens":15}}"#,
        ),
    ] {
        assert_eq!(plain(dialect, kind, text).usage, same, "{kind:?}");
    }
}

#[test]
fn a_responses_stream_that_is_cut_is_counted() {
    let text =
        "event: response.output_text.delta\ndata: {\"type\":\"response.output_text.delta\",\"delta\":\"one two\"}\n\n";
    let whole = run(Meter::stream(Dialect::Openai, CallKind::Responses, UsageView::All), &[text.as_bytes()]);
    assert_eq!(whole.usage, usage(100, 0, 3, UsageSource::Counted));
}

#[tokio::test]
#[cfg(feature = "exact-tokens")]
async fn what_no_statement_covers_is_counted_exactly_at_the_end() {
    use super::exact::Tokens;
    let said = "data: {\"choices\":[{\"delta\":{\"content\":\"the gate\"}}],\"usage\":{\"prompt_tokens\":11,\"completion_tokens\":2}}\n\n";
    let unsaid = "data: {\"choices\":[{\"delta\":{\"content\":\" is \\u0061t the end of the long road\"}}]}\n\n";
    let mut meter = chat(false);
    meter.feed(Bytes::from_static(said.as_bytes())).unwrap();
    assert!(meter.uncovered().is_none() && meter.states_input());
    meter.feed(Bytes::from_static(unsaid.as_bytes())).unwrap();
    let tokens = meter.uncovered().unwrap().tokens(Tokens::of("gpt-4o"), None).await;
    meter.recount(tokens);
    assert_eq!(meter.usage(100), usage(11, 0, 2 + 8, UsageSource::Counted));
    let mut silent = chat(false);
    silent.feed(Bytes::from_static(unsaid.as_bytes())).unwrap();
    let tokens = silent.uncovered().unwrap().tokens(Tokens::of("gpt-4o"), None).await;
    silent.recount(tokens);
    assert_eq!((silent.usage(100), silent.states_input()), (usage(100, 0, 8, UsageSource::Counted), false));
}

#[test]
fn plain_answers_without_usage_are_counted() {
    let chat = r#"{"choices":[{"message":{"role":"assistant","content":"one two"}},{"message":{"content":" three"}}]}"#;
    assert_eq!(plain(Dialect::Openai, CallKind::Chat, chat).usage, usage(100, 0, 4, UsageSource::Counted));
    let embedding = r#"{"data":[{"embedding":[0.1,0.2]}]}"#;
    assert_eq!(plain(Dialect::Openai, CallKind::Embedding, embedding).usage, usage(100, 0, 0, UsageSource::Estimated));
}

#[test]
fn an_error_body_of_status_200_is_told() {
    let whole = plain(Dialect::Openai, CallKind::Chat, r#"{"error":{"message":"no","type":"rate_limit_error"}}"#);
    assert_eq!(whole.error.unwrap().status, Some(429));
    assert!(!whole.token);
    let null =
        plain(Dialect::Openai, CallKind::Responses, r#"{"error":null,"usage":{"input_tokens":1,"output_tokens":2}}"#);
    assert_eq!(null.error, None);
    assert_eq!(null.usage, usage(1, 0, 2, UsageSource::Upstream));
    let failed = r#"{"task_id": "t", "data": {"status": "failed", "error": "boom", "total_tokens": 0}}"#;
    assert_eq!(&*plain(Dialect::Dify, CallKind::DifyWorkflow, failed).error.unwrap().message, "boom");
}

#[test]
fn a_plain_answer_that_is_cut_off_or_no_object_is_malformed() {
    for text in ["{\"choices\":[", "<html></html>", "[]"] {
        let whole = plain(Dialect::Openai, CallKind::Chat, text);
        assert!(whole.malformed && !whole.done, "{text}");
    }
    assert!(!plain(Dialect::Openai, CallKind::Other, "ID3 sound").malformed);
}

#[test]
fn what_is_not_understood_passes() {
    for dialect in [Dialect::None, Dialect::Gemini] {
        let whole = run(Meter::stream(dialect, CallKind::Other, UsageView::Nothing), &[b"any", b"thing"]);
        assert_eq!(whole.forward, b"anything");
        assert!(whole.token && whole.done && !whole.malformed);
        assert_eq!(whole.usage, usage(100, 0, 0, UsageSource::Estimated));
    }
}

fn split<'t>(text: &'t [u8], cuts: &mut [usize]) -> Vec<&'t [u8]> {
    cuts.sort_unstable();
    let mut from = 0;
    let mut chunks = Vec::new();
    for cut in cuts.iter().copied().chain([text.len()]) {
        chunks.push(&text[from..cut]);
        from = cut;
    }
    chunks
}

/// Runs 10,000 splits of a text, always the same ones.
fn every_split(text: &[u8], check: impl Fn(&[&[u8]])) {
    let mut rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    for _ in 0..10_000 {
        let mut cuts: Vec<usize> = (0..rng.random_range(0..12)).map(|_| rng.random_range(0..=text.len())).collect();
        check(&split(text, &mut cuts));
    }
}

#[test]
fn ten_thousand_splits_pass_byte_for_byte_when_nothing_is_hidden() {
    let whole = chat_of(CHAT);
    every_split(CHAT.as_bytes(), |chunks| {
        let pieces = run(chat(false), chunks);
        assert_eq!(pieces, whole);
        assert_eq!(pieces.forward, CHAT.as_bytes());
    });
}

#[test]
fn ten_thousand_splits_give_the_same_bytes_when_usage_is_hidden() {
    for text in [CHAT.to_owned(), CHAT.replace('\n', "\r\n")] {
        let whole = run(chat(true), &[text.as_bytes()]);
        assert!(!String::from_utf8_lossy(&whole.forward).contains("usage"));
        every_split(text.as_bytes(), |chunks| assert_eq!(run(chat(true), chunks), whole));
    }
}

/// What a client gets of a stream are its whole and valid events, however the bytes are cut and wherever they end.
#[test]
fn any_chunking_of_any_beginning_gives_the_whole_valid_events() {
    let garbage = ["data: {\"choices\":[{\"del\n\n", "data: nope\r\n\r\n"];
    let events: Vec<String> = CHAT
        .split_inclusive("\n\n")
        .enumerate()
        .flat_map(|(turn, event)| match turn {
            2 | 4 => vec![garbage[turn / 2 - 1].to_owned(), event.replace('\n', "\r\n")],
            _ => vec![event.to_owned()],
        })
        .collect();
    let text = events.concat();
    let mut rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    for _ in 0..2_000 {
        let end = rng.random_range(1..=text.len());
        let mut expected = String::new();
        let mut at = 0;
        for event in &events {
            at += event.len();
            let valid = !garbage.contains(&event.as_str());
            // The line feed behind a carriage return is not waited for at the very end.
            if valid && at <= end {
                expected.push_str(event);
            }
        }
        let mut meter = chat(false);
        let mut cuts: Vec<usize> = (0..rng.random_range(0..30)).map(|_| rng.random_range(0..=end)).collect();
        let mut got = Vec::new();
        for chunk in split(&text.as_bytes()[..end], &mut cuts) {
            got.extend(meter.feed(Bytes::copy_from_slice(chunk)).unwrap().forward.concat());
        }
        assert_eq!(String::from_utf8(got).unwrap(), expected, "cut at {end}: {cuts:?}");
    }
}

#[test]
#[ignore = "a measurement, to be run in release"]
fn speed_of_the_meter() {
    let chunk = Bytes::from_static(
        b"data: {\"id\":\"chatcmpl-0123456789\",\"object\":\"chat.completion.chunk\",\"created\":1795220241,\"model\":\"mock-chat\",\
        \"choices\":[{\"index\":0,\"delta\":{\"content\":\" token\"},\"logprobs\":null,\"finish_reason\":null}],\"usage\":null}\n\n",
    );
    for hide in [false, true] {
        let mut meter = chat(hide);
        let start = cpu_seconds();
        let count = 1_000_000;
        for _ in 0..count {
            assert!(meter.feed(chunk.clone()).unwrap().token);
        }
        println!("hide {hide}: {} ns per chunk", ((cpu_seconds() - start) * 1e9) as u64 / count);
    }
    let answer = format!(
        "{{\"data\":[{{\"embedding\":[{}]}}],\"usage\":{{\"prompt_tokens\":5}}}}",
        "-0.012345,".repeat(3 << 20)
    );
    let mut meter = Meter::plain(Dialect::Openai, CallKind::Embedding);
    let bytes = Bytes::from(answer);
    let start = cpu_seconds();
    for at in (0..bytes.len()).step_by(16384) {
        meter.feed(bytes.slice(at..(at + 16384).min(bytes.len()))).unwrap();
    }
    println!("plain: {:.0} MB/s", bytes.len() as f64 / (cpu_seconds() - start) / 1e6);
    assert_eq!(meter.usage(0).input, 5);
}
