//! Keys as their operators and their users know them: made, listed, revoked, looked at, by command and by admin port.

use std::process::Output;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::harness::client::at_once;
use crate::harness::gateway::finish;
use crate::harness::redis::Redis;
use crate::harness::{
    ALICE, Conf, Gateway, RawNode, Refused, WENDY, chat, completion, eventually, node, sha256, tollgate,
};

const PATH: &str = "/v1/chat/completions";

fn conf(redis: &Redis, node: &str) -> Conf {
    Conf::serving("qwen", &[node])
        .also("auth: { redis_keys: true }")
        .also(&format!("store: {{ redis: {{ url: \"{}\", timeout: 2s, when_down: closed }} }}", redis.url()))
}

/// A command with its answer.
struct Said {
    out: String,
    err: String,
    code: i32,
}

impl Said {
    fn json(&self) -> Value {
        assert_eq!(self.code, 0, "{}", self.err);
        serde_json::from_str(&self.out).unwrap_or_else(|_| panic!("no JSON: {}", self.out))
    }

    /// One line that says why not.
    fn failed(&self) -> &str {
        assert_eq!((self.code, self.out.as_str()), (1, ""), "{}", self.err);
        assert_eq!(self.err.lines().count(), 1, "{}", self.err);
        &self.err
    }
}

async fn say(words: &[&str], env: &[(&str, &str)]) -> Said {
    let mut command = tollgate(words);
    command.env_remove("TOLLGATE_ADMIN_TOKEN").envs(env.iter().copied());
    let Output { status, stdout, stderr } = finish(command).await;
    let text = |bytes| String::from_utf8(bytes).expect("UTF-8");
    Said { out: text(stdout), err: text(stderr), code: status.code().expect("an exit code") }
}

/// `tollgate keys` with this configuration.
async fn keys(conf: &Conf, words: &[&str]) -> Said {
    let home = TempDir::new().expect("a temporary directory");
    let file = home.path().join("tollgate.yaml");
    std::fs::write(&file, conf.to_string()).expect("a file");
    let file = file.to_str().expect("UTF-8").to_owned();
    say(&[&["keys"], words, &["-c", &file]].concat(), &[]).await
}

fn secret(made: &Value) -> String {
    made["key"].as_str().expect("the key").to_owned()
}

async fn status(gw: &Gateway, key: &str) -> u16 {
    gw.post(PATH).key(key).json(&chat("hi")).send().await.status()
}

/// Both know the key; then it is void in both within a second.
async fn void_within_a_second(gates: &[&Gateway], key: &str, since: Instant) {
    for gw in gates {
        eventually("the key to be void", || async { status(gw, key).await == 401 }).await;
    }
    assert!(since.elapsed() < Duration::from_secs(1), "{:?}", since.elapsed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_that_is_rotated_or_revoked_is_void_in_all_gateways_within_a_second() {
    let (redis, near) = (Redis::start(), node("qwen").await);
    let conf = conf(&redis, &near.url());
    let (a, b) = (Gateway::with(&conf).await, Gateway::with(&conf).await);
    let json = ["--format", "json"];
    for by_port in [false, true] {
        let made = if by_port {
            let wanted = json!({ "id": "dora", "tier": "wide" });
            let answer = a.admin("POST", "/api/keys").json(&wanted).send().await.expect(201);
            assert_eq!(answer.header("cache-control"), "no-store");
            answer.json()
        } else {
            keys(&conf, &[&["create", "--id", "dora", "--tier", "wide"][..], &json].concat()).await.json()
        };
        assert_eq!(made["id"], "dora");
        let first = secret(&made);
        for gw in [&a, &b] {
            assert_eq!(status(gw, &first).await, 200);
        }
        let rotated = if by_port {
            b.admin("POST", "/api/keys/dora/rotate").send().await.expect(200).json()
        } else {
            keys(&conf, &[&["rotate", "dora"][..], &json].concat()).await.json()
        };
        let (second, begin) = (secret(&rotated), Instant::now());
        assert_ne!(first, second);
        void_within_a_second(&[&a, &b], &first, begin).await;
        for gw in [&a, &b] {
            assert_eq!(status(gw, &second).await, 200);
        }
        if by_port {
            assert_eq!(b.admin("DELETE", "/api/keys/dora").send().await.status(), 204);
        } else {
            let revoked = keys(&conf, &[&["revoke", "dora"][..], &json].concat()).await.json();
            assert_eq!(revoked, json!({ "id": "dora", "revoked": true }));
        }
        void_within_a_second(&[&a, &b], &second, Instant::now()).await;
        // Nothing is left of it.
        assert_eq!(
            (redis.command(&["EXISTS", "tg:ids"]), redis.command(&["HLEN", "tg:ids"])),
            ("0".into(), "0".into())
        );
        assert_eq!(redis.command(&["EXISTS", &format!("tg:key:{}", sha256(second.as_bytes()))]), "0");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_who_rotate_a_key_at_once_leave_one_key_that_works() {
    let (redis, near) = (Redis::start(), node("qwen").await);
    let gw = Gateway::with(&conf(&redis, &near.url())).await;
    gw.admin("POST", "/api/keys").json(&json!({ "id": "dora", "tier": "wide" })).send().await.expect(201);
    let rotate = |_| gw.admin("POST", "/api/keys/dora/rotate").send();
    let made = at_once(8, (0..8).map(rotate)).await;
    let secrets: Vec<String> = made.into_iter().map(|answer| secret(&answer.expect(200).json())).collect();
    let mut work = 0;
    for key in &secrets {
        work += u32::from(status(&gw, key).await == 200);
    }
    assert_eq!(work, 1);
    assert_eq!(redis.command(&["EVAL", "return #redis.call('KEYS', 'tg:key:*')", "0"]), "1");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_missed_the_news_asks_again_as_soon_as_it_hears_again() {
    let (redis, near) = (Redis::start(), node("qwen").await);
    let conf = conf(&redis, &near.url());
    let gw = Gateway::with(&conf).await;
    let key = secret(&keys(&conf, &["create", "--tier", "wide", "--format", "json"]).await.json());
    assert_eq!(status(&gw, &key).await, 200);
    // Gone without a word, as if the word had been lost.
    assert_eq!(redis.command(&["DEL", &format!("tg:key:{}", sha256(key.as_bytes()))]), "1");
    assert_eq!(status(&gw, &key).await, 200, "it is believed for a while");
    let begin = Instant::now();
    assert_eq!(redis.command(&["CLIENT", "KILL", "TYPE", "pubsub"]), "1");
    eventually("the key to be void", || async { status(&gw, &key).await == 401 }).await;
    assert!(begin.elapsed() < Duration::from_secs(5), "{:?}", begin.elapsed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_admin_port_lists_all_keys_and_never_shows_one() {
    let (redis, near) = (Redis::start(), node("qwen").await);
    let gw = Gateway::with(&conf(&redis, &near.url())).await;
    let wanted = json!({
        "id": "team/dora", "tier": "free", "models": ["chat"], "routes": ["llm"], "expires": "2099-01-01T00:00:00Z",
        "limits": { "requests_per_minute": 5, "concurrency": { "limit": 2, "shadow": true } }, "zone": "Asia/Kolkata",
    });
    let key = secret(&gw.admin("POST", "/api/keys").json(&wanted).send().await.expect(201).json());
    redis.command(&["HSET", "tg:ids", "broken", "00"]);
    let answer = gw.admin("GET", "/api/keys").send().await.expect(200);
    for hidden in [key.as_str(), &sha256(key.as_bytes()), ALICE, &sha256(ALICE.as_bytes())] {
        assert!(!answer.text().contains(hidden), "{}", answer.text());
    }
    let listed = answer.json()["keys"].clone();
    let row = |id: &str| listed.as_array().expect("keys").iter().find(|row| row["id"] == id).expect("the key").clone();
    assert_eq!(
        row("alice"),
        json!({
            "id": "alice", "tier": "free", "where": "file", "models": null, "routes": null, "expires": null, "zone": "UTC",
            "limits": { "requests_per_minute": 60, "requests_per_hour": 1000, "tokens_per_day": 100_000 }, "problem": null,
        })
    );
    assert_eq!(
        row("team/dora"),
        json!({
            "id": "team/dora", "tier": "free", "where": "redis", "models": ["chat"], "routes": ["llm"],
            "expires": "2099-01-01T00:00:00Z", "zone": "Asia/Kolkata",
            "limits": {
                "requests_per_minute": 5, "requests_per_hour": 1000, "tokens_per_day": 100_000,
                "concurrency": { "limit": 2, "shadow": true },
            },
            "problem": null,
        })
    );
    assert_eq!(row("broken")["problem"], "it has no id");
    // An id with a slash is one part of a path all the same.
    assert_eq!(gw.admin("GET", "/api/quota/team%2Fdora").send().await.expect(200).json()["key_id"], "team/dora");
    assert_eq!(gw.admin("DELETE", "/api/keys/team%2Fdora").send().await.status(), 204);
    assert_eq!(status(&gw, &key).await, 401);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_admin_port_refuses_each_mistake_with_its_own_words() {
    let (redis, near) = (Redis::start(), node("qwen").await);
    let gw = Gateway::with(&conf(&redis, &near.url())).await;
    gw.admin("POST", "/api/keys").json(&json!({ "id": "dora" })).send().await.expect(201);
    for (wanted, status, code, words) in [
        (json!({ "id": "dora" }), 409, "key_exists", "`dora`"),
        (json!({ "id": "alice" }), 409, "key_exists", "`alice`"),
        (json!({ "id": "a b" }), 400, "invalid_request", "is not a name"),
        (json!({ "tier": "fre" }), 400, "invalid_request", "did you mean `free`?"),
        (json!({ "models": ["chet"] }), 400, "invalid_request", "did you mean `chat`?"),
        (json!({ "zone": "Europe/Berlim" }), 400, "invalid_request", "did you mean `Europe/Berlin`?"),
        (json!({ "expires": "2020-01-01T00:00:00Z" }), 400, "invalid_request", "is over"),
        (json!({ "limits": { "requests": 1 } }), 400, "invalid_request", "unknown field"),
        (json!({ "key": "my-own-key" }), 400, "invalid_request", "unknown field"),
        (json!([]), 400, "invalid_request", "invalid"),
    ] {
        let answer = gw.admin("POST", "/api/keys").json(&wanted).send().await;
        assert_eq!(answer.refusal(), (status, code.into()), "{wanted}: {}", answer.text());
        assert!(answer.text().contains(words), "{wanted}: {}", answer.text());
    }
    let broken = gw.admin("POST", "/api/keys").json_text("{").send().await;
    assert_eq!(broken.refusal(), (400, "invalid_json".into()));
    let form = gw.admin("POST", "/api/keys").header("content-type", "text/plain").bytes("{}").send().await;
    assert_eq!(form.refusal(), (415, "unsupported_media_type".into()));
    let huge = gw.admin("POST", "/api/keys").json_text(vec![b' '; 3 << 20]).send().await;
    assert_eq!(huge.refusal(), (413, "invalid_request".into()));
    for (method, path, status, code) in [
        ("DELETE", "/api/keys/nobody", 404, "not_found"),
        ("POST", "/api/keys/nobody/rotate", 404, "not_found"),
        ("DELETE", "/api/keys/alice", 409, "key_in_configuration"),
        ("POST", "/api/keys/alice/rotate", 409, "key_in_configuration"),
        ("PUT", "/api/keys", 405, "method_not_allowed"),
        ("GET", "/api/keys/dora", 405, "method_not_allowed"),
    ] {
        let answer = gw.admin(method, path).send().await;
        assert_eq!(answer.refusal(), (status, code.into()), "{method} {path}");
    }
    // Only the one that was made is there.
    assert_eq!(redis.command(&["HLEN", "tg:ids"]), "1");

    redis.signal("STOP");
    for (method, path) in [("GET", "/api/keys"), ("DELETE", "/api/keys/dora"), ("GET", "/api/quota/dora")] {
        let begin = Instant::now();
        let answer = gw.admin(method, path).send().await;
        assert_eq!(answer.refusal(), (503, "store_unavailable".into()), "{method} {path}: {}", answer.text());
        assert!(begin.elapsed() < Duration::from_secs(3), "{:?}", begin.elapsed());
    }
    redis.signal("CONT");
}

#[tokio::test]
async fn without_redis_keys_stand_in_the_file_and_nowhere_else() {
    let conf = Conf::new().server("admin: { bind: \"127.0.0.1:0\", token: admin-secret }");
    let gw = Gateway::with(&conf).await;
    for (method, path) in [("GET", "/api/keys"), ("POST", "/api/keys"), ("DELETE", "/api/keys/alice")] {
        assert_eq!(gw.admin(method, path).json(&json!({})).send().await.refusal(), (401, "invalid_token".into()));
    }
    let listed = gw.admin("GET", "/api/keys").key("admin-secret").send().await.expect(200).json();
    let ids: Vec<&str> = listed["keys"].as_array().expect("keys").iter().filter_map(|key| key["id"].as_str()).collect();
    assert_eq!(ids, ["alice", "wendy"]);
    let made = gw.admin("POST", "/api/keys").key("admin-secret").json(&json!({ "id": "dora" })).send().await;
    assert_eq!(made.refusal(), (409, "no_key_store".into()));
    assert!(made.text().contains("store.redis"), "{}", made.text());
    let gone = gw.admin("DELETE", "/api/keys/dora").key("admin-secret").send().await;
    assert_eq!(gone.refusal(), (409, "no_key_store".into()));
    assert!(keys(&conf, &["list"]).await.failed().contains("store.redis"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_keys_command_says_what_it_did_and_why_not() {
    let (redis, near) = (Redis::start(), node("qwen").await);
    // Secrets of upstreams are not the operator's: the command does not ask for them.
    let conf = conf(&redis, &near.url()).upstream("far", &["https://llm.example"], "credentials: [{ env: NOT_SET }]");
    assert_eq!(keys(&conf, &["list"]).await.out, "there is no key in Redis\n");
    let made = keys(&conf, &["create", "--id", "dora", "--tier", "free", "--zone", "Europe/Berlin"]).await;
    let lines: Vec<&str> = made.out.lines().collect();
    assert!(lines[0] == "dora" && lines[1].starts_with("tg-") && lines[2].contains("shown once"), "{}", made.out);
    let listed = keys(&conf, &["list"]).await;
    assert!(listed.out.contains("Europe/Berlin") && listed.out.contains("requests_per_minute=60"), "{}", listed.out);
    assert!(!listed.out.contains(lines[1]) && listed.out.lines().count() == 2, "{}", listed.out);
    let row = keys(&conf, &["list", "--format", "json"]).await.json()["keys"][0].clone();
    assert_eq!((&row["id"], &row["where"], &row["zone"]), (&json!("dora"), &json!("redis"), &json!("Europe/Berlin")));
    for (words, why) in [
        (&["create", "--id", "dora"][..], "there is a key `dora` already"),
        (&["create", "--id", "alice"], "there is a key `alice` already"),
        (&["create", "--tier", "fre"], "did you mean `free`?"),
        (&["create", "--zone", "Berlin"], "did you mean `Europe/Berlin`?"),
        (&["create", "--limit", "requests_per_minute"], "is not like NAME=NUMBER"),
        (&["create", "--limit", "requests_per_minit=5"], "requests_per_minute"),
        (&["create", "--routes", "lm"], "did you mean `llm`?"),
        (&["create", "--expires", "tomorrow"], "2027-01-01T00:00:00Z"),
        (&["revoke", "nobody"], "there is no key `nobody`"),
        (&["rotate", "nobody"], "there is no key `nobody`"),
        (&["revoke", "alice"], "stands in the configuration"),
    ] {
        let said = keys(&conf, words).await;
        assert!(said.failed().contains(why), "{words:?}: {}", said.err);
    }
    assert_eq!(keys(&conf, &["revoke"]).await.code, 2);
    let gone = Conf::new().also("store: { redis: { url: \"redis+unix:///nowhere.sock\" } }");
    let said = keys(&gone, &["list"]).await;
    assert_eq!(said.code, 1);
    assert!(said.err.contains("Redis does not answer"), "{}", said.err);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn quota_is_shown_and_given_back_by_command() {
    let near = node("qwen").await;
    let held = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let port = held.local_addr().expect("its address").port();
    drop(held);
    let home = TempDir::new().expect("a temporary directory");
    let file = home.path().join("gate.yaml");
    let conf = Conf::serving("qwen", &[near.url()])
        .key("{ id: \"team/bob\", key: bob-secret-key, limits: { requests_per_minute: { limit: 9, shadow: true } } }")
        .server(&format!("admin: {{ bind: \"127.0.0.1:{port}\", token: {{ env: TOKEN_OF_TEST }} }}"));
    std::fs::write(&file, conf.to_string()).expect("a file");
    let gw = Gateway::with_env(&conf, &[("TOKEN_OF_TEST", "admin-secret")]).await;
    for key in [ALICE, ALICE, "bob-secret-key"] {
        gw.post(PATH).key(key).json(&chat("hi")).send().await.expect(200);
    }
    let (file, url) = (file.to_str().expect("UTF-8"), gw.admin_url());
    let token_file = home.path().join("token");
    std::fs::write(&token_file, "admin-secret\n").expect("a file");
    let token_file = token_file.to_str().expect("UTF-8");
    let by_file = |words: &[&'static str]| [words, &["-c", file]].concat();
    let env = [("TOKEN_OF_TEST", "admin-secret")];

    let shown = say(&by_file(&["quota", "show", "alice"]), &env).await;
    assert_eq!(shown.code, 0, "{}", shown.err);
    assert!(shown.out.starts_with("alice, tier free\nDIMENSION"), "{}", shown.out);
    let mut rows = shown.out.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    assert!(rows.any(|row| row.starts_with(&["requests_per_minute", "60", "2", "0", "58"])), "{}", shown.out);
    assert!(!shown.out.contains('\x1b'), "no colour");
    let bob = say(&by_file(&["quota", "show", "team/bob"]), &env).await;
    assert!(bob.out.contains("no tier") && bob.out.contains("requests_per_minute (shadow)"), "{}", bob.out);

    // The same by address, with the token from the environment or from a file, as JSON.
    let by_address = say(
        &["quota", "show", "alice", "--admin", &url, "--format", "json"],
        &[("TOLLGATE_ADMIN_TOKEN", "admin-secret")],
    )
    .await;
    let body = by_address.json();
    assert_eq!((&body["key_id"], &body["limits"][0]["used"]), (&json!("alice"), &json!(2)));
    let reset =
        say(&["quota", "reset", "alice", "--admin", &url, "--token-file", token_file, "--format", "json"], &[]).await;
    assert_eq!(reset.json(), json!({ "key_id": "alice", "reset": true }));
    let body = say(&by_file(&["quota", "show", "alice", "--format", "json"]), &env).await.json();
    assert_eq!(body["limits"][0]["used"], 0);
    let reset = say(&by_file(&["quota", "reset", "team/bob"]), &env).await;
    assert_eq!((reset.code, reset.out.as_str()), (0, "team/bob: what it used is forgotten\n"), "{}", reset.err);

    // What goes wrong is one line.
    let unknown = say(&by_file(&["quota", "show", "nobody"]), &env).await;
    assert!(unknown.failed().contains("knows no key `nobody`"), "{}", unknown.err);
    let wrong = say(&["quota", "show", "alice", "--admin", &url], &[("TOLLGATE_ADMIN_TOKEN", "wrong-secret")]).await;
    assert!(wrong.failed().contains("does not accept this admin token"), "{}", wrong.err);
    assert!(!wrong.err.contains("wrong-secret"), "{}", wrong.err);
    let none = say(&["quota", "show", "alice", "--admin", &url], &[]).await;
    assert!(none.failed().contains("TOLLGATE_ADMIN_TOKEN"), "{}", none.err);
    let unset = say(&by_file(&["quota", "show", "alice"]), &[]).await;
    assert!(unset.failed().contains("server.admin.token") && unset.err.contains("TOKEN_OF_TEST"), "{}", unset.err);
    let nobody = Refused::new();
    let away = say(&["quota", "reset", "alice", "--admin", &nobody.url()], &[]).await;
    assert!(away.failed().contains("there is no gateway at 127.0.0.1:"), "{}", away.err);
    let silly = say(&["quota", "show", "alice", "--admin", "https://127.0.0.1:1"], &[]).await;
    assert!(silly.failed().contains("plain HTTP"), "{}", silly.err);
    let missing = say(&["quota", "show", "alice", "-c", "/nowhere.yaml"], &[]).await;
    assert!(missing.code == 1 && missing.err.contains("there is no such file"), "{}", missing.err);
    for usage in
        [&["quota"][..], &["quota", "show"], &["quota", "show", "a", "-c", file, "--admin", &url], &["quota", "x"]]
    {
        assert_eq!(say(usage, &env).await.code, 2, "{usage:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_user_hash_is_only_read_and_its_tier_must_be_one_of_the_configuration() {
    let (redis, near) = (Redis::start(), node("qwen").await);
    let conf = conf(&redis, &near.url());
    let gw = Gateway::with(&conf).await;
    redis.command(&["HSET", "user:sk-old", "user_id", "u-17", "tier", "wide"]);
    redis.command(&["HSET", "user:sk-gold", "user_id", "u-18", "tier", "gold"]);
    assert_eq!(status(&gw, "sk-old").await, 200);
    // A tier that is not configured would be no limit at all: the key is none, and the log says why.
    assert_eq!(status(&gw, "sk-gold").await, 401);
    let told = |gw: &Gateway| gw.output().lines().filter(|line| line.contains("there is no tier `gold`")).count();
    eventually("the log to say why", || async { told(&gw) > 0 }).await;
    for _ in 0..50 {
        assert_eq!(status(&gw, "sk-gold").await, 401);
    }
    assert!(told(&gw) <= 3 && gw.output().contains("u-18") && !gw.output().contains("sk-gold"), "{}", gw.output());
    redis.command(&["HSET", "user:sk-gold", "tier", "wide"]);
    eventually("the mended key to work", || async { status(&gw, "sk-gold").await == 200 }).await;

    // Its quota is known by its id while it is in use; it is not ours to change.
    let shown = say(&["quota", "show", "u-17", "--admin", &gw.admin_url(), "--format", "json"], &[]).await.json();
    assert_eq!((&shown["tier"], &shown["limits"][0]["used"]), (&json!("wide"), &json!(1)));
    assert!(keys(&conf, &["revoke", "u-17"]).await.failed().contains("there is no key `u-17`"));
    assert_eq!(redis.command(&["HLEN", "user:sk-old"]), "2");
    assert_eq!(redis.command(&["EVAL", "return #redis.call('KEYS', 'tg:key:*')", "0"]), "0");
    assert_eq!(redis.command(&["TTL", "user:sk-old"]), "-1");
}

/// Seconds until the next midnight of a place so many hours east.
fn to_midnight(hours: i64) -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs();
    86_400 - (i64::try_from(now).expect("fits") + hours * 3_600).rem_euclid(86_400)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_day_ends_at_the_midnight_of_the_keys_zone_in_memory_and_in_redis() {
    let (redis, near) = (Redis::start(), node("qwen").await);
    let zones = |conf: Conf| {
        conf.key("{ id: kiri, key: kiri-secret-key, tier: free, zone: Pacific/Kiritimati }")
            .key("{ id: mid, key: mid-secret-key, tier: free, zone: Pacific/Midway }")
            .key("{ id: fix, key: fix-secret-key, tier: free, utc_offset: \"+05:00\" }")
    };
    let shared = zones(conf(&redis, &near.url()));
    let alone = Gateway::with(&zones(Conf::serving("qwen", &[near.url()]))).await;
    let together = Gateway::with(&shared).await;
    let made = keys(&shared, &["create", "--tier", "free", "--zone", "Asia/Tokyo", "--format", "json"]).await.json();
    let tokyo = secret(&made);
    let mut asked = vec![(&together, tokyo.as_str(), 9)];
    for gw in [&alone, &together] {
        asked.extend([
            (gw, "kiri-secret-key", 14),
            (gw, "mid-secret-key", -11),
            (gw, "fix-secret-key", 5),
            (gw, ALICE, 0),
        ]);
    }
    for (gw, key, hours) in asked {
        assert_eq!(status(gw, key).await, 200);
        let quota = gw.get("/v1/quota").key(key).send().await.expect(200).json();
        let day = quota["limits"].as_array().expect("limits").iter().find(|row| row["dimension"] == "tokens_per_day");
        let left = day.expect("the day")["resets_in"].as_i64().expect("seconds");
        // The midnight itself may pass between the two.
        let off = (left - to_midnight(hours)).rem_euclid(86_400);
        assert!(off <= 30 || off >= 86_370, "{key}: {left} s, {off} s off");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_1001st_request_of_the_free_tiers_hour_is_refused() {
    let near = node("qwen").await;
    // The minute is widened, so that the hour can be used up within the test.
    let conf = Conf::serving("qwen", &[near.url()])
        .key("{ id: fred, key: fred-secret-key, tier: free, limits: { requests_per_minute: 5000, tokens_per_day: 100_000_000 } }");
    let gw = Gateway::with(&conf).await;
    let one = |_| gw.post(PATH).key("fred-secret-key").json(&chat("hi")).send();
    let answers = at_once(20, (0..1_020).map(one)).await;
    assert_eq!(answers.iter().filter(|answer| answer.status() == 200).count(), 1_000);
    assert_eq!(near.requests().len(), 1_000);
    let refused = gw.post(PATH).key("fred-secret-key").json(&chat("hi")).send().await;
    assert_eq!(refused.refusal(), (429, "rate_limit_exceeded".into()));
    assert!(refused.text().contains("hour"), "{}", refused.text());
    assert_eq!(
        (refused.number("x-ratelimit-limit-requests"), refused.number("x-ratelimit-remaining-requests")),
        (1000.0, 0.0)
    );
    let wait = refused.number("retry-after");
    assert!((3_500.0..=3_600.0).contains(&wait), "{wait}");
    gw.post(PATH).key(WENDY).json(&chat("hi")).send().await.expect(200);
}

#[tokio::test]
async fn the_token_that_exceeds_the_free_tiers_day_is_refused_for_the_day() {
    let near = RawNode::start().await;
    let gw = Gateway::with(&Conf::serving("qwen", &[near.url()])).await;
    let asked = tokio::spawn(gw.post(PATH).key(ALICE).json(&chat("hi")).send());
    near.call().await.json("200 OK", &completion("hello", 60_000, 39_999)).await;
    asked.await.expect("a task").expect(200);
    eventually("the tokens to be settled", || async {
        let quota = gw.get("/v1/quota").key(ALICE).send().await.expect(200).json();
        quota["limits"].as_array().expect("limits").iter().any(|row| row["used"] == 99_999 && row["remaining"] == 1)
    })
    .await;
    let refused = gw.post(PATH).key(ALICE).json(&chat("hi")).send().await;
    assert_eq!(refused.refusal(), (429, "quota_exceeded".into()));
    assert_eq!(refused.header("x-should-retry"), "false");
    assert_eq!(
        (refused.number("x-ratelimit-limit-tokens"), refused.number("x-ratelimit-remaining-tokens")),
        (100_000.0, 1.0)
    );
    let off = refused.number("retry-after") as i64 - to_midnight(0);
    assert!(off.abs() <= 30 || off.abs() >= 86_370, "until midnight: {off}");
}
