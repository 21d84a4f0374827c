//! The official OpenAI Python SDK, unmodified, against the gateway. Each test runs one script of `tests/sdk/`, which says
//! `ok` as its last word when all its assertions held.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::harness::gateway::finish;
use crate::harness::{ALICE, Conf, Gateway, WENDY, eventually, node_with};

/// The interpreter of the virtual environment with the SDK in it.
fn python() -> PathBuf {
    let path = std::env::var_os("TOLLGATE_TEST_PYTHON")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join(".venv/bin/python"), PathBuf::from);
    assert!(path.exists(), "no Python with the OpenAI SDK at {}: run `make test`, which makes one", path.display());
    path
}

async fn run(script: &str, gw: &Gateway) {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/sdk").join(script);
    let mut command = Command::new("timeout");
    command.arg("60").arg(python()).arg("-B").arg(file);
    command
        .env("TOLLGATE_URL", gw.url())
        .env("TOLLGATE_KEY", WENDY)
        .env("TOLLGATE_FREE_KEY", ALICE)
        .env("NO_PROXY", "*");
    for name in [
        "OPENAI_API_KEY",
        "OPENAI_BASE_URL",
        "http_proxy",
        "HTTP_PROXY",
        "https_proxy",
        "HTTPS_PROXY",
        "ALL_PROXY",
        "all_proxy",
    ] {
        command.env_remove(name);
    }
    let output = tokio::task::spawn_blocking(move || command.output()).await.expect("a task").expect("the script runs");
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(
        output.status.success() && stdout.trim_end().ends_with("ok"),
        "{script}: {}\n{stdout}\n{stderr}",
        output.status
    );
}

/// A gateway with models `chat` and `embed` on one node of human speed.
async fn gateway() -> (tollgate_load::node::Node, Gateway) {
    let near = node_with("qwen", |config| config.decode = Duration::from_millis(5)).await;
    let conf = Conf::new()
        .upstream("near", &[near.url()], "")
        .model("chat", &[("near", "qwen")], "aliases: [gpt-4o-mini]")
        .model("embed", &[("near", "qwen")], "")
        .llm();
    let gw = Gateway::with(&conf).await;
    (near, gw)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_sdk_completes_a_chat() {
    let (_near, gw) = gateway().await;
    run("chat.py", &gw).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_sdk_streams_a_chat_with_and_without_usage() {
    let (_near, gw) = gateway().await;
    run("stream.py", &gw).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_sdk_calls_tools() {
    let (_near, gw) = gateway().await;
    run("tools.py", &gw).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_sdk_makes_embeddings() {
    let (_near, gw) = gateway().await;
    run("embeddings.py", &gw).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_sdk_lists_models() {
    let (_near, gw) = gateway().await;
    run("models.py", &gw).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_sdk_raises_its_own_errors() {
    let (_near, gw) = gateway().await;
    run("errors.py", &gw).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_sdk_gives_a_stream_up_and_the_node_sees_it() {
    let (near, gw) = gateway().await;
    run("cancel.py", &gw).await;
    eventually("the node to see every stream end", || async {
        let requests = near.requests();
        !requests.is_empty() && requests.iter().all(|seen| seen.ended.is_some())
    })
    .await;
    let abandoned = near.requests().iter().filter(|seen| seen.abandoned()).count();
    assert_eq!(abandoned, 2, "one sync and one async stream");
    gw.settles("tollgate_reservations_inflight", &[], 0.0).await;
}

#[tokio::test]
async fn the_scripts_are_all_run() {
    let mut scripts: Vec<String> = std::fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/sdk"))
        .expect("tests/sdk")
        .filter_map(|entry| entry.expect("an entry").file_name().into_string().ok())
        .filter(|name| name.ends_with(".py"))
        .collect();
    scripts.sort();
    let known =
        ["cancel.py", "chat.py", "embeddings.py", "errors.py", "gateway.py", "models.py", "stream.py", "tools.py"];
    assert_eq!(scripts, known);
    let mut version = Command::new(python());
    version.args(["-c", "import openai; print(openai.__version__)"]);
    let output = finish(version).await;
    assert!(output.status.success(), "the SDK is not installed: {}", String::from_utf8_lossy(&output.stderr));
}
