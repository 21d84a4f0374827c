//! Large prompts reach a later node whole after earlier ones failed.

use bytes::Bytes;

use crate::harness::{Conf, Gateway, Refused, Rng, WENDY, chat, eventually, fault, node, sha256};

const PATH: &str = "/v1/chat/completions";
const MIB: usize = 1024 * 1024;

#[derive(Debug, Clone, Copy)]
enum Framing {
    Length,
    Chunked,
    Http2Length,
    Http2Open,
}

impl Framing {
    const ALL: [Self; 4] = [Self::Length, Self::Chunked, Self::Http2Length, Self::Http2Open];
}

/// A chat request of about that many bytes that does not compress into a pattern.
fn prompt(bytes: usize) -> Bytes {
    let mut rng = Rng::new(bytes as u64);
    let mut text = String::with_capacity(bytes + 32);
    while text.len() < bytes {
        text.push_str(&format!("{:x} ", rng.next()));
    }
    Bytes::from(chat(&text).to_string())
}

fn request(gw: &Gateway, body: &Bytes, framing: Framing) -> crate::harness::client::Request {
    let request = gw.post(PATH).key(WENDY);
    match framing {
        Framing::Length => request.json_text(body.clone()),
        Framing::Chunked => request.json_in_pieces(body, 100_000),
        Framing::Http2Length => request.json_text(body.clone()).http2(),
        Framing::Http2Open => request.json_in_pieces(body, 100_000).http2(),
    }
}

/// First a node that refuses connections, then one that answers 503, then a good one: all under the client's own name
/// for the model, so that not a byte changes.
async fn reaches_the_third_whole(size: usize) {
    let (refused, sick, good) = (Refused::new(), node("chat").await, node("chat").await);
    sick.set_fault(Some(fault("503")));
    let conf = Conf::new()
        .upstream("refused", &[refused.url()], "")
        .upstream("sick", &[sick.url()], "")
        .upstream("good", &[good.url()], "")
        .model(
            "chat",
            &[("refused", "chat"), ("sick", "chat"), ("good", "chat")],
            "retry: { attempts: 3, backoff: 1ms }",
        )
        .llm();
    let gw = Gateway::with(&conf).await;
    let body = prompt(size);
    let hash = sha256(&body);
    for framing in Framing::ALL {
        let answer = request(&gw, &body, framing).send().await.expect(200);
        assert_eq!(answer.header("x-tollgate-attempts"), "3", "{framing:?}");
        assert_eq!(answer.header("x-tollgate-upstream"), "good", "{framing:?}");
        for node in [&sick, &good] {
            let seen = node.requests().pop().expect("a request");
            assert_eq!((seen.body_len, seen.body_sha256), (body.len() as u64, hash.clone()), "{framing:?}");
        }
    }
    assert_eq!(good.requests().len(), Framing::ALL.len());
    gw.settles("tollgate_reservations_inflight", &[], 0.0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_prompt_of_1_mib_reaches_the_third_node_whole() {
    reaches_the_third_whole(MIB).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_prompt_of_20_mib_reaches_the_third_node_whole() {
    reaches_the_third_whole(20 * MIB).await;
}

/// The same among the nodes of one upstream: whichever is tried first, the body arrives whole at the one that answers.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_prompt_survives_the_failing_nodes_of_one_upstream() {
    let (refused, sick, good) = (Refused::new(), node("chat").await, node("chat").await);
    sick.set_fault(Some(fault("503")));
    let conf = Conf::new()
        .upstream("all", &[refused.url(), sick.url(), good.url()], "balance: round_robin, eject: { after: 1000 }")
        .model("chat", &[("all", "chat")], "retry: { attempts: 3, backoff: 1ms }")
        .llm();
    let gw = Gateway::with(&conf).await;
    let body = prompt(MIB);
    let hash = sha256(&body);
    let mut most = 0.0_f64;
    for turn in 0..9 {
        let answer = request(&gw, &body, Framing::ALL[turn % 4]).send().await.expect(200);
        most = most.max(answer.number("x-tollgate-attempts"));
        assert_eq!(good.requests().pop().expect("a request").body_sha256, hash);
    }
    assert!(most >= 2.0, "no call had to try another node");
    assert_eq!(good.requests().len(), 9);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_prompt_is_rewritten_in_its_model_name_only() {
    let good = node("Qwen/Qwen2.5-72B-Instruct").await;
    let gw = Gateway::with(&Conf::serving("Qwen/Qwen2.5-72B-Instruct", &[good.url()])).await;
    let body = prompt(4 * MIB);
    let text = String::from_utf8(body.to_vec()).expect("UTF-8");
    let rewritten = text.replacen("\"model\":\"chat\"", "\"model\":\"Qwen/Qwen2.5-72B-Instruct\"", 1);
    request(&gw, &body, Framing::Chunked).send().await.expect(200);
    assert_eq!(good.requests()[0].body_sha256, sha256(rewritten.as_bytes()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_prompt_that_stops_half_way_frees_what_it_held() {
    let good = node("chat").await;
    let gw = Gateway::with(&Conf::serving("chat", &[good.url()])).await;
    let body = prompt(MIB);
    let mut client = gw.raw().await;
    client
        .write(format!(
            "POST {PATH} HTTP/1.1\r\nhost: gw\r\nauthorization: Bearer {WENDY}\r\ncontent-type: application/json\r\n\
             content-length: {}\r\n\r\n",
            body.len()
        ))
        .await;
    client.write(&body[..MIB / 2]).await;
    drop(client);
    gw.settles("tollgate_reservations_inflight", &[], 0.0).await;
    request(&gw, &body, Framing::Length).send().await.expect(200);
    assert_eq!(good.requests().len(), 1, "half a body is no call");
}

/// All buffered bodies together are bound; what is over is refused and may come again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bodies_over_the_common_budget_are_refused_until_others_are_gone() {
    let good = node("chat").await;
    let gw = Gateway::with(
        &Conf::serving("chat", &[good.url()]).server("limits: { body_bytes: 1000KiB, buffered_bytes: 1MiB }"),
    )
    .await;
    let body = prompt(MIB - 150_000);
    let mut client = gw.raw().await;
    client
        .write(format!(
            "POST {PATH} HTTP/1.1\r\nhost: gw\r\nauthorization: Bearer {WENDY}\r\ncontent-type: application/json\r\n\
             content-length: {}\r\n\r\n",
            body.len()
        ))
        .await;
    client.write(&body[..body.len() - 10]).await;
    eventually("the first body to lie in the gateway", || async {
        let status = gw.admin("GET", "/api/status").send().await.expect(200).json();
        status["buffered_bytes"].as_u64() == Some(body.len() as u64 - 10)
    })
    .await;
    let answer = request(&gw, &body, Framing::Chunked).send().await;
    assert_eq!(answer.refusal(), (503, "overloaded".into()));
    assert!(answer.number("retry-after") >= 1.0);
    assert_eq!(client.ask(&body[body.len() - 10..]).await.status(), 200, "the first one is not harmed");
    request(&gw, &body, Framing::Chunked).send().await.expect(200);
}
