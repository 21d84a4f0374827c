//! Bad configurations and what is said about them.

use super::*;

/// Something that the cases below can refer to, in three lines.
const BASE: &str =
    "upstreams: { a: { nodes: ['http://127.0.0.1:1'] }, web: { dialect: none, nodes: ['http://127.0.0.1:2'] } }
models: { m: { targets: [{ upstream: a }], aliases: [gpt] } }
tiers: { free: { requests_per_minute: 1 } }
";

/// The problems of a text, one a line: `line:column message | hint`, warnings marked. Left out are that there are no routes,
/// and what has no engine yet: [`unsupported`] is about that.
fn said(text: &str) -> String {
    let problems = match load_text("t.yaml", text, &Supplied) {
        Ok(loaded) => loaded.warnings,
        Err(problems) => problems.0,
    };
    let line = |problem: &Problem| {
        let mark = if problem.severity == Severity::Warning { "warning: " } else { "" };
        let hint = problem.hint.as_ref().map(|hint| format!(" | {hint}")).unwrap_or_default();
        format!("{}:{} {mark}{}{hint}", problem.line, problem.column, problem.message)
    };
    let kept =
        |problem: &&Problem| !problem.message.starts_with("no routes: every request") && !unsupported::is_lack(problem);
    problems.iter().filter(kept).map(line).collect::<Vec<_>>().join("\n")
}

#[track_caller]
fn complains(text: &str, expected: &str) {
    pretty(&said(text), expected);
}

/// As [`complains`], of a text after [`BASE`]: its first line is line 4.
#[track_caller]
fn complains_after_base(text: &str, expected: &str) {
    pretty(&said(&format!("{BASE}{text}")), expected);
}

#[track_caller]
fn pretty(said: &str, expected: &str) {
    assert!(said == expected, "said:\n{said}\n\nexpected:\n{expected}");
}

#[test]
fn an_open_bracket_is_shown_where_it_opens() {
    complains(r##"a: [1, 2"##, r##"1:4 unclosed bracket '['"##);
}

#[test]
fn a_map_inside_a_value_is_a_syntax_error() {
    complains(r##"a: b: c"##, r##"1:5 mapping values are not allowed in this context"##);
}

#[test]
fn a_tab_is_named_as_the_culprit() {
    complains(
        r##"server:
	drain: 1s"##,
        r##"2:2 tabs disallowed within this context (block indentation) | YAML is indented with spaces, never with tabs"##,
    );
}

#[test]
fn a_list_is_not_a_configuration() {
    complains(
        r##"- a
- b"##,
        r##"1:1 expected settings, as `key: value`, found a list"##,
    );
}

#[test]
fn a_text_is_not_a_configuration() {
    complains(r##"just text"##, r##"1:1 expected settings, as `key: value`, found "just text""##);
}

#[test]
fn every_unknown_section_is_reported_at_once() {
    complains(
        r##"servr: {}
serve: {}
upstrems: {}
xyz: 1"##,
        r##"1:1 unknown key `servr` | did you mean `server`?
2:1 unknown key `serve` | did you mean `server`?
3:1 unknown key `upstrems` | did you mean `upstreams`?
4:1 unknown key `xyz` | known here: `include`, `server`, `store`, `auth`, `tiers`, `keys`, `limits`, `upstreams`, `models`, `routes`, `alerts`"##,
    );
}

#[test]
fn values_of_a_wrong_kind_say_what_was_expected() {
    complains(
        r##"server: { drain: 10, threads: yes, listen: 5, limits: { connections: many, header_bytes: 3XB } }"##,
        r##"1:18 "10" is not a period; write a whole number and a unit, like 500ms, 10s, 5m, 1h or 2d
1:31 expected auto or a number of threads, found "yes"
1:44 expected a list, found `5`
1:70 expected a whole number, not negative, found "many"
1:90 "3XB" is not a size; write a whole number and a unit, like 512B, 64KiB, 32MiB or 1GiB"##,
    );
}

#[test]
fn duplicate_keys_are_all_reported() {
    complains(
        r##"server: { drain: 1s, drain: 2s }
limits: {}
limits: {}"##,
        r##"1:22 duplicate key `drain` | it is already set at line 1, column 11
3:1 duplicate key `limits` | it is already set at line 2, column 1"##,
    );
}

#[test]
fn a_key_without_value_is_no_silent_default() {
    complains(
        r##"server:
  drain:"##,
        r##"2:3 `drain` has no value | give it one, or leave the key out to get the default"##,
    );
}

#[test]
fn a_listener_needs_an_address_and_both_tls_files() {
    complains(
        r##"server: { listen: [{ bind: localhost:80 }, { tls: { cert: a } }], trusted_proxies: [10.0.0.0/40] }"##,
        r##"1:28 "localhost:80" is not an IP address and port; write them like 127.0.0.1:8080, 0.0.0.0:8080 or [::]:8080
1:44 `bind` is missing
1:46 `key` is missing
1:85 "10.0.0.0/40" is not a network; write an address and the length of its prefix, like 10.0.0.0/8"##,
    );
}

#[test]
fn two_listeners_on_one_address_are_refused() {
    complains(
        r##"server: { listen: [{ bind: 127.0.0.1:9180 }, { bind: 0.0.0.0:80 }, { bind: 127.0.0.1:80 }] }"##,
        r##"1:28 127.0.0.1:9180 is already taken by 127.0.0.1:9180 | every listener needs an address of its own
1:76 127.0.0.1:80 is already taken by 0.0.0.0:80 | every listener needs an address of its own"##,
    );
}

#[test]
fn an_open_admin_port_needs_a_token() {
    complains(
        r##"server: { admin: { bind: 0.0.0.0:9180 } }"##,
        r##"1:26 the admin port on 0.0.0.0:9180 needs a token | add `token: { env: TOLLGATE_ADMIN_TOKEN }`, or bind it to 127.0.0.1"##,
    );
}

#[test]
fn missing_variables_and_files_are_named() {
    complains(
        r##"server: { admin: { token: { env: MISSING }, metrics: token }, listen: [{ bind: 127.0.0.1:1, tls: { cert: /missing/c, key: /missing/k } }] }"##,
        r##"1:20 environment variable MISSING is not set
1:106 cannot read /missing/c: entity not found
1:123 cannot read /missing/k: entity not found"##,
    );
}

#[test]
fn limits_of_the_process_are_in_range() {
    complains(
        r##"server: { admin: { metrics: token }, listen: [], limits: { connections: 0, header_timeout: 0s, header_bytes: 1B, buffered_bytes: 1MiB } }"##,
        r##"1:29 there is no token to ask for | add `token:`
1:38 no data port | add `- bind: 127.0.0.1:8080`
1:73 0 is too small | the least is 1
1:92 a period of zero | the least is 1ms
1:110 too small for any request | the least is 1KiB
1:130 less than one body (32MiB) | raise it, or lower body_bytes"##,
    );
}

#[test]
fn a_bad_store_is_refused_and_its_password_never_shown() {
    complains(
        r##"store: { redis: { url: 'http://user:password@x', timeout: 0ms, when_down: shar }, replicas: 0 }
auth: { redis_keys: true }"##,
        r##"1:24 not the address of a Redis: its scheme is none of redis, rediss, unix, redis+sentinel, rediss+sentinel | redis://, rediss:// or unix://; with Sentinels redis+sentinel://HOST,HOST/MASTER
1:24 warning: a secret in plain text | write {env: NAME}, {file: PATH} or {credential: NAME}
1:59 a period of zero | the least is 1ms
1:75 `shar` is not known here | did you mean `share`?
1:93 0 is too small | the least is 1"##,
    );
}

#[test]
fn sentinels_need_a_master_and_certificates_an_address_for_tls() {
    complains(
        r##"store: { redis: { url: 'redis+sentinel://u:password@a,b' } }"##,
        r##"1:24 not the address of a Redis: behind the Sentinels it needs the master's name: redis+sentinel://host,host/MASTER | redis://, rediss:// or unix://; with Sentinels redis+sentinel://HOST,HOST/MASTER
1:24 warning: a secret in plain text | write {env: NAME}, {file: PATH} or {credential: NAME}"##,
    );
    complains(
        r##"store: { redis: { url: 'redis://a', ca: /missing/ca.pem } }"##,
        r##"1:41 the address is not one for TLS | write rediss:// or rediss+sentinel://, or leave it out"##,
    );
    complains(
        r##"store: { redis: { url: 'rediss://a', cert: /missing/me.pem } }"##,
        r##"1:44 it needs `key` beside it"##,
    );
}

#[test]
fn jwt_and_redis_keys_need_what_they_refer_to() {
    complains(
        r##"auth: { redis_keys: true, sources: [], jwt: [{ issuer: '', audience: t, algorithms: [none], jwks: { file: /missing/jwks.json }, tier: gold }] }"##,
        r##"1:21 redis_keys needs `store.redis` | add `store: { redis: { url: { env: REDIS_URL } } }`
1:27 no caller could present a key | leave it out for the default
1:56 `issuer` is empty
1:86 `none` is not known here | known here: `RS256`, `RS384`, `RS512`, `PS256`, `PS384`, `PS512`, `ES256`, `ES384`, `EdDSA`
1:107 cannot read /missing/jwks.json: entity not found
1:135 there is no tier `gold` | there is no tier at all"##,
    );
}

#[test]
fn old_booleans_are_refused_with_the_new_word() {
    complains(r##"auth: { redis_keys: yes }"##, r##"1:21 expected true or false, found "yes" | write true"##);
}

#[test]
fn tiers_know_their_dimensions() {
    complains(
        r##"tiers: { free: { requests_per_minut: 1 }, 'bad name': {}, paid: { tokens_per_day: 0, concurrency: -1, requests_per_hour: { limit: 5, shadw: true } } }"##,
        r##"1:18 unknown key `requests_per_minut` | did you mean `requests_per_minute`?
1:43 "bad name" is not a name for a tier | letters, digits and . _ : / - after a letter or digit, at most 128
1:83 a limit of 0 refuses every call | the least is 1; leave the row out for no limit
1:99 a limit is never negative
1:134 unknown key `shadw` | did you mean `shadow`?"##,
    );
}

#[test]
fn secrets_that_cannot_be_had_are_errors_and_plain_ones_warnings() {
    complains_after_base(
        r##"keys:
  - { id: a, key: { env: MISSING } }
  - { id: b, key: { env: EMPTY } }
  - { id: c, key: '' }
  - { id: d, key: { file: /missing/key } }
  - { id: e, key: { envv: X } }
  - { id: f, key: { env: X, file: Y } }
  - { id: g, key: 12345 }
  - { id: h, key: plain-secret-text }"##,
        r##"5:14 environment variable MISSING is not set
6:14 the secret {env: EMPTY} is empty
7:19 the secret is empty | write {env: NAME}, {file: PATH} or {credential: NAME}
8:14 cannot read /missing/key: entity not found
9:14 a secret needs one of: env, file, credential
9:21 unknown key `envv` | did you mean `env`?
10:14 a secret has just one of: env, file, credential
11:19 expected a secret as text; put it in quotes
12:19 warning: a secret in plain text | write {env: NAME}, {file: PATH} or {credential: NAME}"##,
    );
}

#[test]
fn keys_are_checked_against_everything_they_refer_to() {
    complains_after_base(
        r##"keys:
  - { id: a, sha256: abc }
  - { id: a, key: { env: A }, sha256: 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08 }
  - { id: c, tier: fre, models: [mm, gpt], routes: [r] }
  - { id: d, key: { env: A }, models: [], expires: 2020-01-01 }
  - { id: e, key: { env: A }, expires: soon, utc_offset: Berlin }
  - { key: { env: B } }
  - { id: 'a b', key: { file: /etc/x y } }
  - { id: f, zone: Europe/Berlim, sha256: 1111111111111111111111111111111111111111111111111111111111111111 }
  - { id: g, zone: berlin, utc_offset: "+01:00", sha256: 2222222222222222222222222222222222222222222222222222222222222222 }
  - { id: h, zone: moon, sha256: 3333333333333333333333333333333333333333333333333333333333333333 }"##,
        r##"5:22 not a SHA-256: it has 64 hex digits | printf %s KEY | sha256sum
6:11 duplicate key id `a` | it is already the id of the key at line 5
6:39 both `key` and `sha256` | keep one of them
7:11 the key `c` has neither `key` nor `sha256` | add `key: { env: NAME }`, or `sha256:` with the hash of the key
7:20 there is no tier `fre` | did you mean `free`?
7:34 there is no model `mm` | known here: `m`
7:38 `gpt` is an alias of the model `m` | write `m`, it covers all its aliases
7:53 there is no route `r` | there is no route at all
8:31 the list is empty | leave it out, or write "*" for all
8:52 warning: the key `d` has expired | remove it, or move the date
9:14 two keys have the same secret | the other one is at line 8
9:40 "soon" is not a moment; write it like 2027-01-01T00:00:00Z
9:58 "Berlin" is not a distance from UTC; write it like +08:00 or -05:30
10:5 `id` is missing
11:11 "a b" is not a name for a key | letters, digits and . _ : / - after a letter or digit, at most 128
11:18 no client could send this key in a header | a key is of visible ASCII characters without spaces
12:20 there is no zone `Europe/Berlim` | did you mean `Europe/Berlin`?
13:20 there is no zone `berlin` | did you mean `Europe/Berlin`?
13:40 both `zone` and `utc_offset` | keep `zone`; it knows when the clocks are changed
14:20 there is no zone `moon` | names are those of the tz database, like `Europe/Berlin`"##,
    );
}

#[test]
fn upstreams_are_checked_key_by_key() {
    complains(
        r##"upstreams:
  a: {}
  b: { nodes: [] }
  c: { nodes: [ftp://x, 'http://', 'http://u:secret@h', { url: 'http://h', wieght: 2 }, { url: 'http://h:80', weight: 0 }, 'http://h'] }
  d: { nodes: ['http://h'], dialect: opnai, balance: { prefix_hash: { load_factor: 0.5 } }, engine: vlm }
  e: { nodes: ['http://h'], balance: prefix-hash, health: { path: health, every: 0s, healthy_after: 0 }, eject: { max_ratio: 2, after: 0 } }
  f: { nodes: ['http://h'], timeouts: { first_tokn: 30s, connect: 0s, total: 10s }, pool: { queue: {}, concurrency: 0 } }
  g: { nodes: ['http://h'], credentials: [{ env: MISSING }, ''], cooldown: 0s, budget: { pace_above: 2 } }
  h: { discover: { dns: qwen }, eject: on }"##,
        r##"2:3 the upstream `a` has no nodes | add `nodes: [http://HOST:PORT]` or `discover: { dns: HOST:PORT }`
3:8 the upstream `b` has no nodes | add `nodes: [http://HOST:PORT]` or `discover: { dns: HOST:PORT }`
4:16 "ftp://x" is not the address of a node: it starts with neither http:// nor https://; write it like http://10.0.0.1:8000
4:25 "http://" is not the address of a node: its host or port is not valid; write it like http://10.0.0.1:8000
4:36 the address of a node has no user name or password; use `credentials`
4:76 unknown key `wieght` | did you mean `weight`?
4:89 the node http://h:80 is listed twice | the first is at line 4; use `weight` to give a node more
4:119 0 is too small | the least is 1
4:124 the node http://h:80 is listed twice | the first is at line 4; use `weight` to give a node more
5:38 `opnai` is not known here | did you mean `openai`?
5:84 0.5 is out of range | it is at least 1
5:101 `vlm` is not known here | did you mean `vllm`?
6:38 `prefix-hash` is not known here | did you mean `prefix_hash`?
6:67 a path starts with / | write /health
6:82 a period of zero | the least is 1ms
6:101 0 is too small | the least is 1
6:126 2 is out of range | it is from 0 to 1
6:136 0 is too small | the least is 1
7:41 unknown key `first_tokn` | did you mean `first_token`?
7:67 a period of zero | the least is 1ms
7:117 0 is too small | the least is 1
8:43 environment variable MISSING is not set
8:61 the secret is empty | write {env: NAME}, {file: PATH} or {credential: NAME}
8:76 a period of zero | the least is 1ms
8:80 a budget without a number | add requests_per_minute or tokens_per_minute
8:102 2 is out of range | it is from 0 to 1
9:25 "qwen" is not a host name and port; write them like qwen.internal:8000
9:40 expected settings in { } or off, found "on""##,
    );
}

#[test]
fn models_are_checked_against_upstreams_and_each_other() {
    complains(
        r##"upstreams: { a: { nodes: ['http://127.0.0.1:1'] }, web: { dialect: none, nodes: ['http://127.0.0.1:2'] } }
models:
  m:
    targets: [{ upstream: b }, { upstream: web }, { upstream: a, on: [] }, { upstream: a, on: [430, 5xx, 429] }, { upstream: a, on: [context_length] }, {}]
    retry: { attempts: 0, budget: 2, jitter: on }
    price: { input: -1, output: 1, currency: dollars, per: 0 }
    aliases: [x, n, x]
    resume: maybe
  n: { targets: [] }
  o: { targets: [{ upstream: a }], resume: continue, limits: { tokens_per_minute: 0 }, aliases: [x] }
  p: {}"##,
        r##"4:27 there is no upstream `b` | known here: `a`, `web`
4:44 the upstream `web` speaks no dialect, so it cannot serve a model | set the upstream's `dialect`
4:66 the target would never be tried | leave it out for the default: connect, timeout, 429, 5xx, first_token, auth
4:96 `430` is not known here | known here: `connect`, `timeout`, `429`, `5xx`, `first_token`, `auth`, `context_length`, `content_filter`
4:129 warning: context_length goes only to a target with `larger_context` | add `larger_context: true` if it takes longer prompts
4:153 `upstream` is missing
5:24 0 is too small | the least is 1
5:35 2 is out of range | it is from 0 to 1
5:46 expected true or false, found "on" | write true
6:21 -1 is out of range | it is at least 0
6:46 "dollars" is not a currency | three capital letters, like USD
6:60 0 is too small | the least is 1
7:18 `n` is already the name of a model
7:21 duplicate alias `x` | it is already an alias of `m` at line 7
8:13 `maybe` is not known here | known here: `off`, `continue`, `replay`
9:8 the model `n` has no targets | add `targets: [{ upstream: NAME }]`
10:44 warning: no target of `o` can go on with a broken answer | set `continues: true` on targets whose engine can
10:83 a limit of 0 refuses every call | the least is 1; leave the row out for no limit
10:98 duplicate alias `x` | it is already an alias of `m` at line 7
11:3 `targets` is missing"##,
    );
}

#[test]
fn routes_have_one_lane_and_sane_conditions() {
    complains_after_base(
        r##"routes:
  - { name: a, match: { path: v1, method: post, host: 'http://x' } }
  - { name: a, match: { path: /x, prefix: /y }, call: { models: "*" }, pass: { upstream: b } }
  - { name: c, match: {}, pass: { upstream: web } }
  - { name: d, match: { path: [], method: [] }, call: {} }
  - { name: e, match: { path: '/x/a*', header: { 'x y': z } }, call: { models: [mm], upstream: web } }
  - { name: f, match: { prefix: /x/* }, call: { upstream: web } }"##,
        r##"5:13 the route `a` has neither `call` nor `pass` | add `call: { models: "*" }` or `pass: { upstream: NAME }`
5:31 "v1" does not start with / | write /v1
5:43 "post" is not a method | did you mean `POST`?
5:55 "http://x" is not a host name | a name without scheme and port, like example.org or *.example.org
6:13 duplicate route name `a` | it is already the name of the route at line 5
6:43 both `path` and `prefix` | make two routes of it
6:72 the route `a` has both `call` and `pass` | keep one of them
7:16 an empty match | write `prefix: /` to match every request
8:13 the route `d` is never reached | `c` (line 7) takes all it matches: the first match wins, so put it before
8:25 the list is empty | leave it out to match all
8:35 the list is empty | leave it out to match all
8:49 a call goes to `models` or to an `upstream` | write `call: { models: "*" }` or `call: { upstream: NAME }`
9:13 the route `e` is never reached | `c` (line 7) takes all it matches: the first match wins, so put it before
9:31 `*` inside a segment | `*` stands for one whole segment, like /v1/apps/*/run
9:57 "x y" is not the name of a header | like x-app-id
9:96 both `models` and `upstream` | keep one of them
10:13 the route `f` is never reached | `c` (line 7) takes all it matches: the first match wins, so put it before
10:33 `*` in a prefix | write "/x/": a prefix takes everything below it
10:59 the upstream `web` speaks no dialect, so its calls cannot be metered | use `pass`, or set the upstream's `dialect`"##,
    );
}

#[test]
fn filters_are_checked_and_unreachable_routes_found() {
    complains_after_base(
        r##"routes:
  - { name: a, match: { path: /v1/x }, call: { models: "*" }, filters: { auth: true, cors: { origins: ["*"], credentials: true, methods: [PATCH] }, cach: {}, cache: { ttl: 0s } } }
  - { name: b, match: { prefix: /v1/ }, pass: { upstream: web, websockets: true } }
  - { name: c, match: { path: [/v1/x, /v1/y] }, pass: { upstream: web } }
  - { name: d, match: { path: [/v1/z] }, pass: web }
  - { name: e, match: { path: /e }, call: { models: "*" }, body_bytes: 1QB, dialect: openia, on_abort: continue, limits: { requests_per_minute: 0 } }"##,
        r##"5:80 expected settings in { } or off, found `true`
5:123 origins: ["*"] with credentials: true would let every page act for its visitor | name the origins one by one
5:149 unknown key `cach` | did you mean `cache`?
5:173 a period of zero | the least is 1ms
6:64 unknown key `websockets` | did you mean `websocket`?
7:13 the route `c` is never reached | `a` (line 5) and `b` (line 6) take all it matches: the first match wins, so put it before
8:13 the route `d` is never reached | `b` (line 6) takes all it matches: the first match wins, so put it before
8:48 expected settings, as `key: value`, found "web"
9:72 "1QB" is not a size; write a whole number and a unit, like 512B, 64KiB, 32MiB or 1GiB
9:86 `openia` is not known here | did you mean `openai`?
9:104 `continue` is not known here | known here: `cancel`, `drain`
9:145 a limit of 0 refuses every call | the least is 1; leave the row out for no limit"##,
    );
}

#[test]
fn a_section_of_the_wrong_kind_brings_no_further_complaints() {
    complains(
        r##"upstreams: [a, b]
models: { m: { targets: [{ upstream: a }] } }
routes: { name: x }"##,
        r##"1:1 expected a map of names to settings, found a list
3:1 expected a list, found a map"##,
    );
}

#[test]
fn an_upstream_that_nothing_uses_is_warned_of() {
    complains_after_base(
        r##"routes: [{ name: r, match: { prefix: / }, pass: { upstream: a } }]"##,
        r##"1:52 warning: nothing uses the upstream `web` | name it in a model's targets or in a route"##,
    );
}

#[test]
fn numbers_and_lists_in_the_wrong_place_are_refused() {
    complains(
        r##"server:
  admin: [127.0.0.1:1]
  threads: 0
  limits: { connections: -5 }
store: { replicas: 5_000_000_000 }"##,
        r##"2:3 expected settings, as `key: value`, found a list
3:12 0 threads; the number is from 1 to 1024
4:26 expected a whole number, not negative, found `-5`
5:20 5000000000 is too large"##,
    );
}

#[test]
fn a_second_document_is_refused() {
    complains(
        r##"limits: {}
---
limits: {}"##,
        r##"3:1 a second YAML document | a configuration is one document; `include:` adds further files"##,
    );
}

#[test]
fn a_problem_is_shown_with_file_place_line_caret_and_hint() {
    let problems = load_text(
        "conf/t.yaml",
        "upstreams:\n  a:\n    nodes: ['http://h']\n    timeouts:\n      first_tokn: 30s\n",
        &Bare,
    );
    let shown = problems.unwrap_err().errors().map(ToString::to_string).collect::<String>();
    assert_eq!(
        shown,
        "conf/t.yaml:5:7: error: unknown key `first_tokn`\n  5 |       first_tokn: 30s\n    |       ^^^^^^^^^^\n  \
         hint: did you mean `first_token`?\n"
    );
}

#[test]
fn no_problem_shows_a_secret() {
    let text = "server: { admin: { token: hidden-1, metric: open } }\nstore: { redis: { url: 'redis://u:hidden-2@h', x: 1 } }\n\
                keys:\n  - { id: a, key: hidden-3, x: 1 }\n  - { id: b, key: [hidden-4] }\n  - id: c\n    key: \"hidden-5\n      hidden-6\"\n    \
                y: 1\nupstreams: { a: { nodes: ['http://u:hidden-7@h'], credentials: [hidden-8], x: 1 } }\n";
    let problems = load_text("t.yaml", text, &Bare).unwrap_err();
    assert!(problems.errors().count() >= 6, "{problems}");
    let shown = format!("{problems}{}", serde_json::to_string(&problems.0).unwrap());
    // A list is no secret, and only what is one can be known for it.
    assert!(!shown.replace("hidden-4", "").contains("hidden"), "{problems}");
}

#[test]
fn a_text_with_byte_order_mark_and_windows_line_ends_has_the_right_places() {
    complains(
        "\u{feff}servr: {}\r\nstore: { replicas: 0 }\r\n",
        "1:1 unknown key `servr` | did you mean `server`?\n2:20 0 is too small | the least is 1",
    );
}

#[test]
fn an_empty_text_is_a_configuration_that_does_nothing() {
    for text in ["", "\n# nothing\n", "---\n", "---\n# nothing\n"] {
        let loaded = load_text("t.yaml", text, &Bare).unwrap_or_else(|problems| panic!("{text:?}: {problems}"));
        assert_eq!(loaded.warnings.len(), 1, "{text:?}");
    }
}

#[test]
fn what_an_alias_brings_along_is_shown_where_the_alias_stands() {
    let text = "upstreams:\n  a: &a { nodes: ['http://h'], engin: vllm }\n  b: *a\n  c: { <<: *a, engine: vlm }\n";
    let hint = "unknown key `engin` | did you mean `engine`?";
    complains(
        text,
        &format!("2:32 {hint}\n3:6 {hint}\n4:12 {hint}\n4:24 `vlm` is not known here | did you mean `vllm`?"),
    );
}

#[test]
fn more_than_a_hundred_errors_are_not_listed() {
    let text: String = (0..500).map(|n| format!("unknown_{n}: 1\n")).collect();
    let problems = load_text("t.yaml", &text, &Bare).unwrap_err();
    assert_eq!(problems.errors().count(), 100);
    assert!(problems.0.last().unwrap().hint.as_ref().unwrap().ends_with("there are more; mend these first"));
}

#[test]
fn a_file_that_is_not_text_or_not_there_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("t.yaml");
    let message = |path: &Path| load(path, &Bare).unwrap_err().0.remove(0).message;
    assert_eq!(message(&path), "there is no such file");
    std::fs::write(&path, b"\xff\xfe").unwrap();
    assert_eq!(message(&path), "it is not UTF-8 text");
}

#[test]
fn a_truncated_configuration_never_panics() {
    let text = std::fs::read_to_string(conf().join("full.yaml")).unwrap();
    let mut refused = 0;
    for end in (0..text.len()).step_by(37).filter(|end| text.is_char_boundary(*end)) {
        refused += usize::from(load_text("t.yaml", text.get(..end).unwrap(), &Supplied).is_err());
    }
    assert!(refused > 50, "{refused}");
}
