//! Faults that rate limiters are known for, each with a test that says what is right instead and fails on the fault.
//!
//! | Fault | Test |
//! |---|---|
//! | The day's counter is read and then added to: calls at the same time all pass | `race::of_2000_calls_at_once_four_gateways_admit_each_limit_exactly`, filters `limit::memory::tests::concurrent_calls_cannot_pass_a_token_limit_together` |
//! | A call that the day refuses has burnt the minute and the hour | [`a_call_refused_by_one_dimension_or_scope_costs_nothing_of_any_other`] |
//! | A refused minute counts on | [`asking_again_while_the_minute_is_used_up_counts_nowhere`] |
//! | The estimate has a fraction, and the store refuses to add it | [`prompts_of_every_length_are_reserved_in_whole_tokens`] |
//! | Bytes are taken for characters; of many parts only the number counts; system, tools and images count nothing | [`the_whole_prompt_is_estimated_and_not_its_bytes_or_parts`] |
//! | Each answer corrects a share of the whole day's counter: the quota never trips | [`a_days_counter_is_the_sum_of_what_was_used_and_trips_at_the_limit`] |
//! | A crash between two commands, or a settlement after midnight, leaves a key without an end | [`no_key_of_the_ledger_stays_for_ever`], `race::over_midnight_each_day_takes_exactly_its_limit_and_pays_for_its_own_calls` |
//! | The day is that of the gateway's own time zone | [`gateways_in_different_time_zones_have_the_same_day`] |
//! | A call that crosses midnight is charged to the wrong day | `race::over_midnight_each_day_takes_exactly_its_limit_and_pays_for_its_own_calls` |
//! | `Retry-After: 60` for an hour and for a day | [`the_wait_of_an_hour_and_of_a_day_is_its_own`] |
//! | The quota endpoint and the headers tell a number written into the program, or words | [`quota_and_headers_tell_the_limits_that_are_configured`] |
//! | A connection to the store is lost with each early answer | [`refused_and_failed_calls_use_up_no_connection_to_the_store`] |
//! | The store down: all calls are refused, each after a second | `redis::while_redis_stands_still_no_call_waits_and_every_policy_holds` |
//! | Streams are never settled; a client that leaves before the usage gets its answer for nothing | [`a_client_that_leaves_just_before_the_usage_pays_for_what_it_got`], `limits::tokens_are_held_during_a_call_and_settled_to_what_the_upstream_says` |
//! | Many commands one after the other for each call; a further one for the reservation | [`a_call_asks_the_store_once_before_and_once_after`] |
//! | Calls at the same time pass a minute's tokens | `race::of_2000_calls_at_once_four_gateways_admit_each_limit_exactly` |
//! | What was counted before a refusal stays counted | [`a_call_refused_by_one_dimension_or_scope_costs_nothing_of_any_other`] |
//! | The first call is refused for the guess of its answer | [`a_first_call_that_says_no_length_is_admitted_under_a_small_limit`] |
//! | A slot is not given back after an error, a timeout, a client that left | [`a_slot_comes_back_after_errors_timeouts_and_clients_that_left`] |
//! | A call refused for want of a slot has burnt a request | [`a_call_refused_for_want_of_a_slot_costs_no_request`] |
//! | Each write gives the window a new life: it never ends | `race::over_the_edges_of_minutes_no_trailing_minute_has_more_than_the_limit`, filters `limit::memory::tests::a_window_ends_although_it_is_written_to_all_the_time` |
//! | The same minute of the next day is taken for this one | filters `limit::memory::tests::the_same_minute_of_the_next_day_is_another_minute` |
//! | The keys of one script lie in different slots of a cluster | [`all_keys_of_a_call_are_in_one_slot_of_a_cluster`] |
//! | Each process counts its own calls under way | `race::of_2000_calls_at_once_four_gateways_admit_each_limit_exactly` (13 slots) |
//! | A crash keeps slots taken for long | `crash::a_hundred_streams_of_a_killed_gateway_are_charged_once_and_free_their_slots_within_a_minute` |
//! | Two windows that share one counter | filters `limit::memory::tests::requests_and_tokens_of_a_minute_have_windows_of_their_own` |

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use crate::harness::redis::Redis;
use crate::harness::{
    Answer, Conf, Gateway, RawNode, chat, chat_stream, chunk_event, completion, eventually, fault, node, usage_event,
};

const PATH: &str = "/v1/chat/completions";
const KEY: &str = "mara-secret-key";

/// Model `chat` at this node, and a key with these limits.
fn conf(node: &str, limits: &str) -> Conf {
    Conf::new()
        .upstream("near", &[node], "timeouts: { first_byte: 300ms, first_token: 300ms, total: 2s }, eject: off")
        .model("chat", &[("near", "qwen")], "retry: { attempts: 1 }")
        .llm()
        .tier(&format!("mine: {{ {limits} }}"))
        .key("{ id: mara, key: mara-secret-key, tier: mine }")
}

fn in_redis(conf: Conf, redis: &Redis) -> Conf {
    conf.also(&format!("store: {{ redis: {{ url: \"{}\", timeout: 10s, when_down: closed }} }}", redis.url()))
}

/// The same configuration with its counters in memory, and in a Redis.
async fn both(conf: &Conf) -> [(Gateway, Option<Redis>); 2] {
    let redis = Redis::start();
    let shared = Gateway::with(&in_redis(conf.clone(), &redis)).await;
    [(Gateway::with(conf).await, None), (shared, Some(redis))]
}

async fn ask(gw: &Gateway, body: &Value) -> Answer {
    gw.post(PATH).key(KEY).json(body).send().await
}

async fn rows(gw: &Gateway) -> Vec<Value> {
    gw.get("/v1/quota").key(KEY).send().await.expect(200).json()["limits"].as_array().expect("limits").clone()
}

async fn row(gw: &Gateway, dimension: &str) -> Value {
    let rows = rows(gw).await;
    rows.into_iter().find(|row| row["dimension"] == dimension).expect("the dimension")
}

/// Used and held of each limit.
async fn state(gw: &Gateway) -> Vec<(Value, Value)> {
    rows(gw).await.into_iter().map(|row| (row["used"].clone(), row["held"].clone())).collect()
}

async fn settles(gw: &Gateway, dimension: &str, used: u64) {
    eventually(&format!("{used} of {dimension}"), || async {
        let row = row(gw, dimension).await;
        row["used"] == used && row["held"] == 0
    })
    .await;
}

/// A call answered by hand with this usage; returns when it is charged.
async fn use_up(gw: &Gateway, node: &RawNode, (input, output): (u64, u64), sum: u64) {
    let body = chat("hi");
    let (answer, ()) = tokio::join!(ask(gw, &body), async {
        node.call().await.json("200 OK", &completion("hello", input, output)).await;
    });
    answer.expect(200);
    settles(gw, "tokens_per_day", sum).await;
}

#[tokio::test]
async fn a_call_refused_by_one_dimension_or_scope_costs_nothing_of_any_other() {
    let near = RawNode::start().await;
    let conf =
        conf(&near.url(), "requests_per_minute: 50, requests_per_hour: 500, tokens_per_day: 1000, concurrency: 9")
            .also("limits: { global: { requests_per_hour: 5000, tokens_per_minute: 100_000 } }");
    for (gw, _redis) in both(&conf).await {
        use_up(&gw, &near, (600, 390), 990).await;
        let before = state(&gw).await;
        for n in 0..30 {
            // Larger each time, so that none is answered from memory of the one before.
            let mut body = chat("hi");
            body["max_tokens"] = (20 + n).into();
            assert_eq!(ask(&gw, &body).await.refusal(), (429, "quota_exceeded".into()));
        }
        assert_eq!(state(&gw).await, before);
    }
}

#[tokio::test]
async fn asking_again_while_the_minute_is_used_up_counts_nowhere() {
    let near = node("qwen").await;
    for (gw, _redis) in both(&conf(&near.url(), "requests_per_minute: 5, requests_per_hour: 20")).await {
        for n in 0..100 {
            let status = ask(&gw, &chat("hi")).await.status();
            assert_eq!(status, if n < 5 { 200 } else { 429 });
        }
        settles(&gw, "requests_per_minute", 5).await;
        settles(&gw, "requests_per_hour", 5).await;
    }
}

/// What a call holds of the day while it is under way; it is then answered with the usage (1, 1).
async fn held(gw: &Gateway, node: &RawNode, body: &Value) -> u64 {
    let (answer, held) = tokio::join!(ask(gw, body), async {
        let mut call = node.call().await;
        let held = row(gw, "tokens_per_day").await["held"].as_u64();
        call.json("200 OK", &completion("hello", 1, 1)).await;
        held
    });
    answer.expect(200);
    gw.settles("tollgate_reservations_inflight", &[], 0.0).await;
    eventually("nothing to be held", || async { row(gw, "tokens_per_day").await["held"] == 0 }).await;
    held.expect("a whole number")
}

#[tokio::test]
async fn prompts_of_every_length_are_reserved_in_whole_tokens() {
    let near = RawNode::start().await;
    for (gw, _redis) in both(&conf(&near.url(), "tokens_per_day: 1_000_000")).await {
        // The text ends within a word of up to eight letters: not one length is a round number of tokens.
        let text = "reserve prompts exactly ".repeat(20);
        let mut sum = 0;
        for length in 399..=406 {
            let held = held(&gw, &near, &chat(&text[..length])).await;
            assert!((60..200).contains(&held), "{length} bytes and 8 tokens were held as {held}");
            sum += 2;
            settles(&gw, "tokens_per_day", sum).await;
        }
    }
}

#[tokio::test]
async fn the_whole_prompt_is_estimated_and_not_its_bytes_or_parts() {
    let near = RawNode::start().await;
    let gw = Gateway::with(&conf(&near.url(), "tokens_per_day: 1_000_000")).await;
    let ask = |messages: Value, more: Value| {
        let mut body = json!({ "model": "chat", "max_tokens": 1, "messages": messages });
        if let (Some(body), Some(more)) = (body.as_object_mut(), more.as_object()) {
            body.extend(more.clone());
        }
        body
    };
    let user = |content: Value| json!([{ "role": "user", "content": content }]);
    let words = "Every word of a prompt is paid for, wherever in the prompt it stands. ".repeat(20);
    let plain = held(&gw, &near, &ask(user(words.clone().into()), json!({}))).await;
    assert!((200..450).contains(&plain), "{plain}");
    // The same text in parts.
    let (one, two) = words.split_at(words.len() / 2);
    let parts = json!([{ "type": "text", "text": one }, { "type": "text", "text": two }]);
    let parts = held(&gw, &near, &ask(user(parts), json!({}))).await;
    assert!(parts.abs_diff(plain) <= plain / 10, "{parts} in parts, {plain} in one");
    // The same again as instructions, and as the description of a tool.
    let both = json!([{ "role": "system", "content": words }, { "role": "user", "content": words }]);
    let both = held(&gw, &near, &ask(both, json!({}))).await;
    assert!(both >= 2 * plain - plain / 5, "{both} with instructions, {plain} without");
    let tool = json!({ "tools": [{ "type": "function", "function": { "name": "f", "description": words } }] });
    let tool = held(&gw, &near, &ask(user(words.clone().into()), tool)).await;
    assert!(tool >= 2 * plain - plain / 5, "{tool} with a tool, {plain} without");
    let image = json!([{ "type": "text", "text": words },
        { "type": "image_url", "image_url": { "url": "https://example.com/cat.png" } }]);
    let image = held(&gw, &near, &ask(user(image), json!({}))).await;
    assert!(image > plain + 50, "{image} with an image, {plain} without");
    // Two bytes a letter, and several letters a token.
    let russian = "Каждое слово запроса должно быть посчитано один раз. ".repeat(20);
    let tokens = held(&gw, &near, &ask(user(russian.clone().into()), json!({}))).await;
    assert!(tokens < russian.len() as u64 / 5, "{tokens} for {} bytes", russian.len());
}

#[tokio::test]
async fn a_days_counter_is_the_sum_of_what_was_used_and_trips_at_the_limit() {
    let near = RawNode::start().await;
    for (gw, _redis) in both(&conf(&near.url(), "tokens_per_day: 100_000")).await {
        for n in 1..=100 {
            use_up(&gw, &near, (400, 600), n * 1000).await;
        }
        assert_eq!(ask(&gw, &chat("hi")).await.refusal(), (429, "quota_exceeded".into()));
    }
}

#[tokio::test]
async fn no_key_of_the_ledger_stays_for_ever() {
    let (redis, near) = (Redis::start(), RawNode::start().await);
    let limits = "requests_per_minute: 50, tokens_per_day: 10_000, tokens_per_month: 100_000, concurrency: 3";
    let conf = conf(&near.url(), limits).also("limits: { global: { requests_per_second: 1000 } }");
    let gw = Gateway::with(&in_redis(conf, &redis)).await;
    let count = |what: &str| {
        let script = format!(
            "local n = 0 for _, key in ipairs(redis.call('KEYS', '*')) do if {what} then n = n + 1 end end return n"
        );
        redis.command(&["EVAL", &script, "0"]).parse::<u32>().expect("a number")
    };
    let endless = "redis.call('PTTL', key) == -1 and key ~= 'tg:{tg}:l' and key ~= 'tg:{tg}:z'";
    let far = "redis.call('PTTL', key) > 100 * 86400000";
    let body = chat("hi");
    let ((), answer) = tokio::join!(
        async {
            let mut call = near.call().await;
            assert_eq!((count(endless), count(far), count("string.find(key, ':s:')")), (0, 0, 2), "while it is open");
            call.json("200 OK", &completion("hello", 1, 1)).await;
        },
        ask(&gw, &body)
    );
    answer.expect(200);
    settles(&gw, "tokens_per_day", 2).await;
    assert_eq!((count(endless), count(far), count("string.find(key, ':s:')")), (0, 0, 2), "after it");
    // What has no end of its own is empty when no call is open.
    assert_eq!((redis.command(&["HLEN", "tg:{tg}:l"]).as_str(), redis.leases()), ("1", 0));
}

#[tokio::test]
async fn gateways_in_different_time_zones_have_the_same_day() {
    let (redis, near) = (Redis::start(), RawNode::start().await);
    let shared = in_redis(conf(&near.url(), "tokens_per_day: 10_000"), &redis);
    let alone = conf(&near.url(), "tokens_per_day: 10_000");
    let mut sum = 0;
    for zone in ["UTC", "XXX-14", "XXX+12"] {
        let gw = Gateway::with_env(&shared, &[("TZ", zone)]).await;
        sum += 30;
        use_up(&gw, &near, (10, 20), sum).await;
        let own = Gateway::with_env(&alone, &[("TZ", zone)]).await;
        use_up(&own, &near, (10, 20), 30).await;
        for gw in [gw, own] {
            let resets = row(&gw, "tokens_per_day").await["resets_in"].as_f64().expect("seconds");
            assert!((resets - to_midnight()).abs() < 5.0, "{zone}: the day ends in {resets} s, not {}", to_midnight());
        }
    }
}

/// Seconds until the next day of UTC.
fn to_midnight() -> f64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs_f64();
    86_400.0 - now % 86_400.0
}

#[tokio::test]
async fn the_wait_of_an_hour_and_of_a_day_is_its_own() {
    let near = node("qwen").await;
    for (gw, _redis) in both(&conf(&near.url(), "requests_per_minute: 100, requests_per_hour: 1")).await {
        ask(&gw, &chat("hi")).await.expect(200);
        let refused = ask(&gw, &chat("hi")).await;
        assert_eq!(refused.refusal(), (429, "rate_limit_exceeded".into()));
        let wait = refused.number("retry-after");
        assert!((3_500.0..=3_600.0).contains(&wait), "{wait}");
    }
    for (gw, _redis) in both(&conf(&near.url(), "requests_per_minute: 100, requests_per_day: 1")).await {
        ask(&gw, &chat("hi")).await.expect(200);
        let refused = ask(&gw, &chat("hi")).await;
        assert_eq!(refused.refusal(), (429, "quota_exceeded".into()));
        let wait = refused.number("retry-after");
        assert!((wait - to_midnight()).abs() < 5.0, "{wait}, and midnight is in {}", to_midnight());
    }
}

#[tokio::test]
async fn quota_and_headers_tell_the_limits_that_are_configured() {
    let near = node("qwen").await;
    for (gw, _redis) in both(&conf(&near.url(), "requests_per_hour: 321, tokens_per_day: 765_432")).await {
        let answer = ask(&gw, &chat("hi")).await.expect(200);
        assert_eq!(answer.header("x-ratelimit-limit-requests"), "321");
        assert_eq!(answer.header("x-ratelimit-limit-tokens"), "765432");
        assert_eq!(row(&gw, "requests_per_hour").await["limit"], 321);
        assert_eq!(row(&gw, "tokens_per_day").await["limit"], 765_432);
    }
}

#[tokio::test]
async fn refused_and_failed_calls_use_up_no_connection_to_the_store() {
    let (redis, near) = (Redis::start(), node("qwen").await);
    let gw = Gateway::with(&in_redis(conf(&near.url(), "requests_per_minute: 40"), &redis)).await;
    let clients = || redis.text(&["CLIENT", "LIST"]).lines().count();
    ask(&gw, &chat("hi")).await.expect(200);
    let before = clients();
    near.set_fault(Some(fault("500")));
    for n in 0..200 {
        let mut body = chat("hi");
        if n % 3 == 0 {
            body["model"] = "nothing".into();
        }
        assert!(ask(&gw, &body).await.status() >= 400);
    }
    assert!(clients() <= before, "{} connections, {before} before", clients());
}

#[tokio::test]
async fn a_client_that_leaves_just_before_the_usage_pays_for_what_it_got() {
    const WORDS: u64 = 200;
    let near = RawNode::start().await;
    for (gw, _redis) in both(&conf(&near.url(), "tokens_per_day: 100_000")).await {
        let mut body = chat_stream("hi");
        body["max_tokens"] = 5_000.into();
        let asked = tokio::spawn(gw.post(PATH).key(KEY).json(&body).open());
        let mut call = near.call().await;
        call.stream_head().await;
        for _ in 0..WORDS {
            call.chunk(chunk_event(" word")).await;
        }
        let mut reply = asked.await.expect("a task");
        for _ in 0..WORDS {
            assert!(reply.event().await.is_some());
        }
        reply.leave();
        call.closed().await;
        call.chunk(usage_event(10, WORDS)).await;
        eventually("nothing to be held", || async { row(&gw, "tokens_per_day").await["held"] == 0 }).await;
        let used = row(&gw, "tokens_per_day").await["used"].as_u64().expect("a number");
        assert!((WORDS * 95 / 100..WORDS * 3 / 2).contains(&used), "{WORDS} words were charged as {used}");
    }
}

#[tokio::test]
async fn a_call_asks_the_store_once_before_and_once_after() {
    const CALLS: u32 = 50;
    let (redis, near) = (Redis::start(), node("qwen").await);
    let limits = "requests_per_minute: 1000, requests_per_hour: 10_000, tokens_per_day: 1_000_000, concurrency: 10";
    let conf = conf(&near.url(), limits).also("limits: { global: { requests_per_second: 1000 } }");
    let gw = Gateway::with(&in_redis(conf, &redis)).await;
    ask(&gw, &chat("hi")).await.expect(200);
    // What the server counts, the command that asks it left out.
    let commands = || -> u32 {
        let text = redis.text(&["INFO", "commandstats"]);
        let of = |line: &str| line.strip_prefix("cmdstat_evalsha:calls=")?.split(',').next()?.parse().ok();
        text.lines().find_map(of).expect("scripts were run")
    };
    let others = || redis.text(&["INFO", "commandstats"]).matches("cmdstat_").count();
    gw.settles("tollgate_reservations_inflight", &[], 0.0).await;
    let (before, kinds, begin) = (commands(), others(), Instant::now());
    for _ in 0..CALLS {
        ask(&gw, &chat("hi")).await.expect(200);
    }
    let asked = gw.metric("tollgate_store_duration_seconds_count", &[("op", "reserve")]).await;
    assert!((asked - f64::from(CALLS + 1)).abs() < 1e-9, "{asked} reservations of {} calls", CALLS + 1);
    eventually("the last call to be charged", || async { redis.leases() == 0 }).await;
    // Beside them a heartbeat, a renewal and a sweep each second.
    let beats = 4 * (u32::try_from(begin.elapsed().as_secs()).expect("soon") + 2);
    let run = commands() - before;
    assert!(run <= 2 * CALLS + beats, "{run} scripts for {CALLS} calls");
    assert!(others() <= kinds + 1, "only scripts are run, and what they call");
}

#[tokio::test]
async fn a_first_call_that_says_no_length_is_admitted_under_a_small_limit() {
    let near = RawNode::start().await;
    for limits in ["tokens_per_minute: 100, tokens_per_day: 10_000", "tokens_per_day: 100"] {
        for (gw, _redis) in both(&conf(&near.url(), limits)).await {
            let mut body = chat("hi");
            body.as_object_mut().expect("an object").remove("max_tokens");
            let (answer, ()) = tokio::join!(ask(&gw, &body), async {
                near.call().await.json("200 OK", &completion("hello", 10, 20)).await;
            });
            answer.expect(200);
            settles(&gw, "tokens_per_day", 30).await;
        }
    }
}

#[tokio::test]
async fn a_slot_comes_back_after_errors_timeouts_and_clients_that_left() {
    let near = node("qwen").await;
    for (gw, _redis) in both(&conf(&near.url(), "concurrency: 1")).await {
        for turn in 0..2 {
            for name in ["500", "refuse", "429", "slow_header:3000", "slow_token:3000", "cut:3", "stall:3", "malformed"]
            {
                near.set_fault(Some(fault(name)));
                for body in [chat("hi"), chat_stream("hi")] {
                    let answer = tokio::time::timeout(Duration::from_secs(10), ask(&gw, &body)).await.expect("an end");
                    assert_ne!(answer.header("ratelimit"), "", "{name}: {}", answer.text());
                    settles(&gw, "concurrency", 0).await;
                }
            }
            // Clients that leave: before the head, and amid the stream.
            for name in ["slow_header:3000", "slow_token:3000", "stall:3"] {
                near.set_fault(Some(fault(name)));
                let left = tokio::spawn(gw.post(PATH).key(KEY).json(&chat_stream("hi")).try_open());
                eventually("its slot to be taken", || async { row(&gw, "concurrency").await["used"] == 1 }).await;
                tokio::time::sleep(Duration::from_millis(20)).await;
                left.abort();
                drop(left.await);
                settles(&gw, "concurrency", 0).await;
            }
            near.set_fault(None);
            assert_eq!(ask(&gw, &chat("hi")).await.status(), 200, "turn {turn}");
            settles(&gw, "concurrency", 0).await;
        }
        gw.settles("tollgate_reservations_inflight", &[], 0.0).await;
    }
}

#[tokio::test]
async fn a_call_refused_for_want_of_a_slot_costs_no_request() {
    let near = RawNode::start().await;
    let limits = "requests_per_minute: 10, requests_per_day: 10, tokens_per_day: 10_000, concurrency: 1";
    for (gw, _redis) in both(&conf(&near.url(), limits)).await {
        let asked = tokio::spawn(gw.post(PATH).key(KEY).json(&chat("hi")).send());
        let mut call = near.call().await;
        let before = state(&gw).await;
        for n in 0..30 {
            let mut body = chat("hi");
            body["max_tokens"] = (8 + n).into();
            assert_eq!(ask(&gw, &body).await.refusal(), (429, "concurrency_exceeded".into()));
        }
        assert_eq!(state(&gw).await, before);
        call.json("200 OK", &completion("hello", 1, 1)).await;
        asked.await.expect("a task").expect(200);
        settles(&gw, "tokens_per_day", 2).await;
        use_up(&gw, &near, (1, 1), 4).await;
        settles(&gw, "requests_per_minute", 2).await;
    }
}

#[tokio::test]
async fn all_keys_of_a_call_are_in_one_slot_of_a_cluster() {
    let near = node("qwen").await;
    // A cluster of one: it refuses scripts whose keys, declared or not, would lie on different nodes of a larger one.
    let redis = Redis::with(&["--cluster-enabled", "yes"]);
    redis.command(&["CLUSTER", "ADDSLOTSRANGE", "0", "16383"]);
    eventually("the cluster to be up", || async { redis.text(&["CLUSTER", "INFO"]).contains("cluster_state:ok") })
        .await;
    let limits = "requests_per_minute: 1000, tokens_per_day: 1_000_000, concurrency: 10";
    let conf = conf(&near.url(), limits).also("limits: { global: { requests_per_second: 1000 } }");
    let gw = Gateway::with(&in_redis(conf, &redis)).await;
    gw.settles("tollgate_store_up", &[], 1.0).await;
    for _ in 0..10 {
        ask(&gw, &chat("hi")).await.expect(200);
    }
    settles(&gw, "requests_per_minute", 10).await;
    settles(&gw, "concurrency", 0).await;
    eventually("all calls to be charged", || async { redis.leases() == 0 }).await;
    assert!(!gw.output().contains("CROSSSLOT"));
}
