//! The command line: what it says, and how it exits.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;
use tempfile::TempDir;

use crate::harness::gateway::finish;
use crate::harness::{Conf, Gateway, eventually, tollgate};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).to_owned()
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// Runs `tollgate check` on this text; gives the output and the exit code.
async fn check(config: &str, more: &[&str]) -> (Output, i32) {
    let home = TempDir::new().expect("a directory");
    let file = home.path().join("gate.yaml");
    std::fs::write(&file, config).expect("written");
    let mut command = tollgate(&["check", "-c", file.to_str().expect("UTF-8")]);
    command.args(more).current_dir(home.path());
    let output = finish(command).await;
    let code = output.status.code().expect("an exit code");
    (output, code)
}

fn good() -> String {
    Conf::serving("qwen", &["http://127.0.0.1:9"]).to_string()
}

#[tokio::test]
async fn check_accepts_a_good_file_with_0() {
    let (output, code) = check(&good(), &[]).await;
    assert_eq!(code, 0, "{}", text(&output));
}

#[tokio::test]
async fn check_accepts_every_file_in_conf() {
    let mut seen = 0;
    for entry in std::fs::read_dir(root().join("conf")).expect("a folder conf/") {
        let path = entry.expect("an entry").path();
        if path.extension().is_none_or(|kind| kind != "yaml") {
            continue;
        }
        seen += 1;
        let config = std::fs::read_to_string(&path).expect("readable");
        // Secrets by environment: whatever the file names is set.
        let names: Vec<String> = config
            .match_indices("env:")
            .filter_map(|(at, _)| config[at + 4..].trim_start().split([' ', '}', ',', '\n']).next().map(str::to_owned))
            .collect();
        let mut command = tollgate(&["check", "-c", path.to_str().expect("UTF-8")]);
        command.current_dir(root()).envs(names.iter().map(|name| (name.as_str(), "redis://127.0.0.1:6379")));
        let output = finish(command).await;
        let said = text(&output);
        // A file that only a deployment brings (a certificate, say) is missing here; nothing else may be wrong.
        let errors: Vec<&str> = said.lines().filter(|line| line.contains(": error: ")).collect();
        let missing = |line: &&str| line.contains("cannot read") || line.contains("CREDENTIALS_DIRECTORY");
        assert!(errors.iter().all(missing), "{}: {said}", path.display());
        assert!(output.status.success() || !errors.is_empty(), "{}: {said}", path.display());
    }
    assert!(seen >= 3, "tollgate.yaml, full.yaml and demo.yaml at least");
}

#[tokio::test]
async fn check_names_place_and_hint_of_an_unknown_key() {
    let config = good().replace("requests_per_minute: 60,", "requests_per_minit: 60,");
    let line = 1 + config.lines().position(|line| line.contains("requests_per_minit")).expect("a line");
    let column = 1 + config.lines().nth(line - 1).and_then(|line| line.find("requests_per_minit")).expect("a column");
    let (output, code) = check(&config, &[]).await;
    let said = text(&output);
    assert_eq!(code, 1, "{said}");
    assert!(said.contains(&format!("gate.yaml:{line}:{column}")), "no gate.yaml:{line}:{column} in {said}");
    assert!(said.contains("did you mean") && said.contains("requests_per_minute"), "{said}");
    assert!(said.contains("free: { requests_per_minit"), "the line itself is shown: {said}");
}

#[tokio::test]
async fn check_tells_all_errors_at_once() {
    let config = Conf::new()
        .upstream("near", &["http://127.0.0.1:9"], "")
        .model("chat", &[("neer", "qwen")], "")
        .key("{ id: bob, key: bob-secret-key, tier: gold }")
        .key("{ id: carol, key: \"\", tier: free }")
        .key("{ id: alice, key: another-secret-key, tier: free }")
        .route("{ name: one, match: { prefix: / }, pass: { upstream: nowhere } }")
        .route("{ name: two, match: { path: /x }, call: { models: \"*\" } }")
        .route("{ name: two, match: { path: /y }, colour: red }")
        .to_string();
    let (output, code) = check(&config, &["--format", "json"]).await;
    assert_eq!(code, 1, "{}", text(&output));
    let said: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("no JSON: {}", text(&output)));
    let said = said.to_string();
    for word in ["neer", "gold", "carol", "nowhere", "colour", "alice"] {
        assert!(said.contains(word), "nothing said of {word}: {said}");
    }
    for field in ["\"file\"", "\"line\"", "\"column\"", "\"message\""] {
        assert!(said.contains(field), "{field} is missing: {said}");
    }
    assert!(!said.contains("another-secret-key"), "a secret was shown");
}

#[tokio::test]
async fn check_refuses_each_kind_of_mistake() {
    for (what, config) in [
        (
            "a duplicate key",
            good().replace("models:\n", "models:\n  chat: { targets: [{ upstream: near, model: x }] }\n"),
        ),
        ("an unknown section", format!("{}\nlimitz: {{}}\n", good())),
        ("a word where a number belongs", good().replace("requests_per_minute: 60,", "requests_per_minute: many,")),
        ("a negative limit", good().replace("requests_per_minute: 60,", "requests_per_minute: -1,")),
        ("broken YAML", good().replace("tiers:", "tiers: [")),
        (
            "an open admin port without token",
            good().replace("admin: { bind: \"127.0.0.1:0\" }", "admin: { bind: \"0.0.0.0:0\" }"),
        ),
        (
            "an environment variable that is not set",
            good().replace("key: alice-secret-key", "key: { env: NO_SUCH_VARIABLE }"),
        ),
        (
            "a route that an earlier one hides",
            format!(
                "{}  - {{ name: late, match: {{ path: /v1/completions, method: [POST] }}, call: {{ models: \"*\" }} }}\n",
                good()
            ),
        ),
    ] {
        let (output, code) = check(&config, &[]).await;
        let said = text(&output);
        assert_eq!(code, 1, "{what} was accepted:\n{said}");
        assert!(said.contains("gate.yaml"), "{what}: no place in {said}");
    }
}

#[tokio::test]
async fn check_of_a_file_that_is_not_there_says_so() {
    let output = finish(tollgate(&["check", "-c", "/nonexistent/tollgate.yaml"])).await;
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output).contains("/nonexistent/tollgate.yaml"), "{}", text(&output));
}

#[tokio::test]
async fn run_refuses_a_bad_file_with_the_same_words() {
    let home = TempDir::new().expect("a directory");
    let file = home.path().join("gate.yaml");
    std::fs::write(&file, good().replace("tier: free", "tier: gold")).expect("written");
    let output = finish(tollgate(&["run", "-c", file.to_str().expect("UTF-8")])).await;
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output).contains("gold") && text(&output).contains("gate.yaml:"), "{}", text(&output));
}

#[tokio::test]
async fn run_on_an_address_in_use_says_so_and_exits_with_1() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let home = TempDir::new().expect("a directory");
    let file = home.path().join("gate.yaml");
    let addr = taken.local_addr().expect("an address").to_string();
    let conf = Conf::new().server(&format!("listen: [{{ bind: \"{addr}\" }}]"));
    std::fs::write(&file, conf.to_string()).expect("written");
    let output = finish(tollgate(&["run", "-c", file.to_str().expect("UTF-8")])).await;
    assert_eq!(output.status.code(), Some(1), "{}", text(&output));
    assert!(text(&output).contains(&addr), "{}", text(&output));
}

#[tokio::test]
async fn several_listeners_serve_the_same() {
    let conf = Conf::new().server("listen: [{ bind: \"127.0.0.1:0\" }, { bind: \"127.0.0.1:0\" }]");
    let gw = Gateway::with(&conf).await;
    assert_eq!(gw.addrs().len(), 2);
    for addr in gw.addrs() {
        crate::harness::client::Request::new(*addr, "GET", "/health").send().await.expect(200);
    }
}

#[tokio::test]
async fn the_schema_is_the_one_checked_in() {
    let output = finish(tollgate(&["schema"])).await;
    assert!(output.status.success(), "{}", text(&output));
    let printed: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let file = std::fs::read(root().join("conf/schema.json")).expect("conf/schema.json");
    let kept: Value = serde_json::from_slice(&file).expect("JSON");
    assert!(printed == kept, "conf/schema.json is old: write it anew with `tollgate schema > conf/schema.json`");
    assert!(printed["properties"]["routes"].is_object());
}

#[tokio::test]
async fn the_version_is_told() {
    let output = finish(tollgate(&["--version"])).await;
    assert!(output.status.success());
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), concat!("tollgate ", env!("CARGO_PKG_VERSION")));
}

#[tokio::test]
async fn wrong_usage_exits_with_2() {
    for args in [&["fly"][..], &["run", "--no-such-flag"], &["check", "--format", "poem"], &[]] {
        let output = finish(tollgate(args)).await;
        assert_eq!(output.status.code(), Some(2), "{args:?}: {}", text(&output));
    }
}

/// The first curl command that the demo prints, over however many lines.
async fn first_curl(gw: &Gateway) -> String {
    eventually("the demo to print a curl line", || async { gw.stdout().contains("curl ") }).await;
    let find = || {
        let stdout = gw.stdout();
        let mut lines =
            stdout.lines().skip_while(|line| !line.trim_start().trim_start_matches("$ ").starts_with("curl "));
        let mut command = String::new();
        loop {
            let line = lines.next()?;
            match line.trim_end().strip_suffix('\\') {
                Some(part) => command.push_str(part),
                None => return Some((command + line).trim().trim_start_matches("$ ").to_owned()),
            }
        }
    };
    eventually("the curl line to be whole", || async { find().is_some() }).await;
    find().expect("just seen")
}

async fn shell(command: &str) -> Output {
    let mut bash = Command::new("timeout");
    bash.args(["30", "bash", "-c", command]).env_remove("http_proxy").env_remove("HTTP_PROXY").env("no_proxy", "*");
    finish(bash).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_first_line_of_the_demo_streams_an_answer_and_a_wrong_key_does_not() {
    let gw = Gateway::demo().await;
    let curl = first_curl(&gw).await;
    assert!(curl.contains(&gw.addr().port().to_string()), "the port is the real one: {curl}");
    let output = shell(&curl).await;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{curl}\n{}", text(&output));
    assert!(said.matches("data: {").count() >= 3, "{said}");
    assert!(said.contains("data: [DONE]"), "{said}");

    let (before, rest) = curl.split_once("Bearer ").expect("the key is given as a bearer token");
    let end = rest.find(['"', '\'', ' ']).expect("the key ends");
    let wrong = format!("{before}Bearer wrong-key{} -w '\\n%{{http_code}}'", &rest[end..]);
    let output = shell(&wrong).await;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(said.lines().last(), Some("401"), "{wrong}\n{said}");
    let start = said.find('{').expect("a JSON body");
    let stop = said.rfind('}').expect("a JSON body");
    let error: Value = serde_json::from_str(&said[start..=stop]).expect("JSON");
    assert_eq!(error["error"]["code"], "invalid_api_key");
    assert_eq!(error["error"]["type"], "invalid_request_error");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_line_of_the_demo_does_what_it_says() {
    let gw = Gateway::demo().await;
    eventually("the demo to print its last line", || async { gw.stdout().contains("Ctrl-C") }).await;
    let lines: Vec<String> = gw.stdout().lines().filter(|line| line.starts_with("curl ")).map(str::to_owned).collect();
    assert!(lines.len() >= 6, "{lines:?}");
    for line in &lines {
        let output = shell(&format!("{line} --fail -s")).await;
        assert!(output.status.success(), "{line}\n{}", text(&output));
        if line.contains("shaky") {
            let said = String::from_utf8_lossy(&output.stdout).into_owned();
            assert!(said.contains("x-tollgate-attempts: 2") && said.contains("x-tollgate-upstream: qwen"), "{said}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_demo_ends_on_sigterm() {
    let mut gw = Gateway::demo().await;
    assert!(gw.runs());
    gw.terminate();
    assert_eq!(gw.exit().await.code(), Some(0));
}
