//! The pass lane: streamed both ways, websocket where the route says so.

use bytes::Bytes;
use serde_json::Value;

use crate::harness::client::fed;
use crate::harness::{ALICE, Conf, Gateway, RawNode, Refused, Rng, Upcall, named, sha256};

/// A gateway with one pass route for everything.
async fn gateway(url: &str, pass: &str, more: &str) -> Gateway {
    let route = format!(
        "{{ name: web, match: {{ prefix: / }}, pass: {{ upstream: web{pass} }}, filters: {{ auth: off }}{more} }}"
    );
    Gateway::with(&Conf::new().upstream("web", &[url], "dialect: none").route(&route)).await
}

#[tokio::test]
async fn an_upload_reaches_the_node_while_it_is_still_being_sent() {
    let near = RawNode::before_bodies().await;
    let gw = gateway(&near.url(), "", "").await;
    for http2 in [false, true] {
        let (feed, pieces) = fed();
        let mut request = gw.post("/upload").header("content-type", "text/plain").pieces(pieces);
        if http2 {
            request = request.http2();
        }
        let asked = tokio::spawn(request.send());
        feed.send(Bytes::from("first piece")).expect("taken");
        let mut call = near.call().await;
        call.body_until("first piece").await;
        feed.send(Bytes::from("second piece")).expect("taken");
        call.body_until("second piece").await;
        drop(feed);
        assert_eq!(call.body().await.text(), "first piecesecond piece");
        call.json("201 Created", "{}").await;
        assert_eq!(asked.await.expect("a task").status(), 201, "http2 {http2}");
    }
}

#[tokio::test]
async fn a_download_reaches_the_client_while_it_is_still_being_sent() {
    let near = RawNode::start().await;
    let gw = gateway(&near.url(), "", "").await;
    for http2 in [false, true] {
        let mut request = gw.get("/download");
        if http2 {
            request = request.http2();
        }
        let asked = tokio::spawn(request.open());
        let mut call = near.call().await;
        call.write("HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ntransfer-encoding: chunked\r\n\r\n").await;
        call.chunk("first").await;
        let mut reply = asked.await.expect("a task");
        assert_eq!(reply.piece().await.expect("a piece").expect("whole"), "first");
        call.chunk("second").await;
        assert_eq!(reply.piece().await.expect("a piece").expect("whole"), "second");
        call.last_chunk().await;
        assert!(reply.piece().await.is_none());
        assert!(reply.clean());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn large_bodies_pass_whole_in_both_directions() {
    let near = RawNode::answering(|mut call: Upcall| async move {
        let body = std::mem::take(&mut call.request.body);
        call.write(format!("HTTP/1.1 200 OK\r\nx-sha256: {}\r\ncontent-length: {}\r\n\r\n", sha256(&body), body.len()))
            .await;
        call.write(body).await;
        Some(call)
    })
    .await;
    let gw = gateway(&near.url(), "", "").await;
    let mut rng = Rng::new(40);
    let body: Bytes = std::iter::repeat_with(|| rng.next().to_le_bytes()).take(5 * 1024 * 1024).flatten().collect();
    let hash = sha256(&body);
    for http2 in [false, true] {
        // 40 MiB is more than a call may have: a pass route is not bound by that.
        let mut request = gw.post("/files").bytes(body.clone());
        if http2 {
            request = request.http2();
        }
        let answer = request.send().await.expect(200);
        assert_eq!(answer.header("x-sha256"), hash);
        assert_eq!(sha256(answer.body()), hash);
    }
}

#[tokio::test]
async fn body_bytes_binds_a_pass_route_that_says_so() {
    let near = named("web").await;
    let gw = gateway(&near.url(), "", ", body_bytes: 1KiB").await;
    gw.post("/x").bytes(vec![b'x'; 1024]).send().await.expect(200);
    let answer = gw.post("/x").bytes(vec![b'x'; 1025]).send().await;
    assert_eq!(answer.refusal(), (413, "body_too_large".into()));
}

const HANDSHAKE: &str = "GET /socket?room=1 HTTP/1.1\r\nhost: gw.example\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\
                         sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";

#[tokio::test]
async fn a_websocket_passes_where_the_route_allows_it() {
    let near = RawNode::before_bodies().await;
    let gw = gateway(&near.url(), ", websocket: true", "").await;
    let mut client = gw.raw().await;
    client.write(HANDSHAKE).await;
    let mut call = near.call().await;
    assert_eq!(call.request.target(), "/socket?room=1");
    assert_eq!(call.request.header("upgrade"), "websocket");
    assert_eq!(call.request.header("sec-websocket-key"), "dGhlIHNhbXBsZSBub25jZQ==");
    call.write(
        "HTTP/1.1 101 Switching Protocols\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\
         sec-websocket-accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\nhello first",
    )
    .await;
    let opened = client.read_until("hello first").await;
    assert!(opened.starts_with("HTTP/1.1 101"), "{opened}");
    assert!(opened.to_lowercase().contains("sec-websocket-accept: s3pplmbitxaq9kygzzhzrbk+xoo="), "{opened}");
    let echo = tokio::spawn(call.echo());
    for turn in 0..20 {
        let frame = format!("\u{1}frame {turn} end;");
        client.write(&frame).await;
        assert_eq!(client.read_until("end;").await, frame);
    }
    drop(client);
    crate::harness::in_time("the node to see the end", echo).await.expect("a task");
}

#[tokio::test]
async fn a_websocket_is_refused_where_the_route_does_not_allow_it() {
    let near = RawNode::before_bodies().await;
    let gw = gateway(&near.url(), "", "").await;
    let answer = gw.raw().await.ask(HANDSHAKE).await;
    assert_eq!(answer.status(), 400);
    assert!(answer.text().contains("upgrade_not_allowed"), "{}", answer.text());
    assert!(!near.called_within(std::time::Duration::from_millis(100)).await, "it reached the node");
}

#[tokio::test]
async fn the_host_is_the_nodes_own_unless_it_is_to_be_preserved() {
    let near = named("web").await;
    let gw = gateway(&near.url(), "", "").await;
    let answer = gw.get("/x").header("host", "gw.example").send().await.expect(200);
    assert_eq!(answer.json()["host"], near.addr().to_string());
    let gw = gateway(&near.url(), ", preserve_host: true", "").await;
    let answer = gw.get("/x").header("host", "gw.example").send().await.expect(200);
    assert_eq!(answer.json()["host"], "gw.example");
}

#[tokio::test]
async fn the_node_learns_where_the_request_came_from() {
    let near = RawNode::start().await;
    let gw = gateway(&near.url(), "", "").await;
    let request = gw
        .get("/x")
        .header("host", "gw.example")
        .header("x-forwarded-for", "6.6.6.6")
        .header("x-forwarded-proto", "https")
        .header("x-forwarded-host", "forged.example")
        .header("x-real-ip", "6.6.6.6")
        .header("x-user-id", "root")
        .header("x-tollgate-model", "forged")
        .header("accept-encoding", "gzip")
        .header("cookie", "a=1; b=2");
    let asked = tokio::spawn(request.send());
    let mut call = near.call().await;
    let seen = &call.request;
    assert_eq!(seen.header("x-forwarded-for"), "127.0.0.1");
    assert_eq!(seen.header("x-forwarded-proto"), "http");
    assert_eq!(seen.header("x-forwarded-host"), "gw.example");
    assert_eq!(seen.header("x-real-ip"), "127.0.0.1");
    assert!(!seen.header("x-request-id").is_empty());
    assert_eq!((seen.header("accept-encoding"), seen.header("cookie")), ("gzip".into(), "a=1; b=2".into()));
    for gone in ["x-user-id", "x-tollgate-model"] {
        assert!(!seen.has(gone), "{gone} reached the node");
    }
    call.json("200 OK", "{}").await;
    asked.await.expect("a task").expect(200);
}

#[tokio::test]
async fn a_trusted_proxy_in_front_of_us_is_believed() {
    let near = RawNode::start().await;
    let conf = Conf::new()
        .server("trusted_proxies: [127.0.0.0/8]")
        .upstream("web", &[near.url()], "dialect: none")
        .route("{ name: web, match: { prefix: / }, pass: { upstream: web }, filters: { auth: off } }");
    let gw = Gateway::with(&conf).await;
    let request = gw
        .get("/x")
        .header("x-forwarded-for", "203.0.113.7")
        .header("x-forwarded-proto", "https")
        .header("x-forwarded-host", "chat.example");
    let asked = tokio::spawn(request.send());
    let mut call = near.call().await;
    assert!(call.request.header("x-forwarded-for").starts_with("203.0.113.7"), "{:?}", call.request.headers);
    assert_eq!(call.request.header("x-real-ip"), "203.0.113.7");
    assert_eq!(call.request.header("x-forwarded-proto"), "https");
    assert_eq!(call.request.header("x-forwarded-host"), "chat.example");
    call.json("200 OK", "{}").await;
    let answer = asked.await.expect("a task").expect(200);
    assert_eq!(gw.logged(answer.header("x-request-id")).await["client_ip"], "203.0.113.7");
}

#[tokio::test]
async fn what_the_node_answers_is_passed_on_as_it_is() {
    let near = RawNode::start().await;
    let gw = gateway(&near.url(), "", "").await;
    for (head, body, status) in [
        (
            "HTTP/1.1 302 Found\r\nlocation: /signin\r\nset-cookie: a=1\r\nset-cookie: b=2\r\ncontent-length: 0\r\n\r\n",
            "",
            302,
        ),
        ("HTTP/1.1 404 Not Found\r\ncontent-type: text/html\r\ncontent-length: 4\r\n\r\n", "gone", 404),
        ("HTTP/1.1 500 Oops\r\ncontent-type: text/html\r\ncontent-length: 4\r\n\r\n", "oops", 500),
        ("HTTP/1.1 204 No Content\r\n\r\n", "", 204),
        ("HTTP/1.1 304 Not Modified\r\netag: \"x\"\r\n\r\n", "", 304),
    ] {
        let asked = tokio::spawn(gw.get("/x").send());
        near.call().await.write(format!("{head}{body}")).await;
        let answer = asked.await.expect("a task");
        assert_eq!((answer.status(), answer.text().as_str()), (status, body));
        assert!(answer.clean());
    }
    let asked = tokio::spawn(gw.request("HEAD", "/x").send());
    let mut call = near.call().await;
    assert!(call.request.line.starts_with("HEAD "));
    call.write("HTTP/1.1 200 OK\r\ncontent-length: 500\r\n\r\n").await;
    let answer = asked.await.expect("a task").expect(200);
    assert_eq!((answer.header("content-length"), answer.body().len()), ("500", 0));
}

#[tokio::test]
async fn a_node_that_cannot_be_reached_is_502() {
    let closed = Refused::new();
    let gw = gateway(&closed.url(), "", "").await;
    let answer = gw.get("/x").send().await;
    assert_eq!(answer.refusal(), (502, "upstream_unreachable".into()));
    assert_eq!(gw.get("/health").send().await.status(), 200);
}

#[tokio::test]
async fn a_download_that_breaks_off_has_no_good_end() {
    let near = RawNode::start().await;
    let gw = gateway(&near.url(), "", "").await;
    for http2 in [false, true] {
        let mut request = gw.get("/x");
        if http2 {
            request = request.http2();
        }
        let asked = tokio::spawn(request.send());
        let mut call = near.call().await;
        call.write("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n").await;
        call.chunk("half").await;
        drop(call);
        let answer = asked.await.expect("a task");
        assert!(!answer.clean(), "http2 {http2}: {}", answer.text());
    }
}

#[tokio::test]
async fn a_client_that_leaves_ends_the_download() {
    let near = RawNode::start().await;
    let gw = gateway(&near.url(), "", "").await;
    let asked = tokio::spawn(gw.get("/x").open());
    let mut call = near.call().await;
    call.write("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n").await;
    call.chunk("first").await;
    let mut reply = asked.await.expect("a task");
    assert!(reply.piece().await.is_some());
    reply.leave();
    call.closed().await;
}

#[tokio::test]
async fn a_pass_route_may_ask_for_a_key() {
    let near = named("web").await;
    let conf = Conf::new()
        .upstream("web", &[near.url()], "dialect: none")
        .route("{ name: web, match: { prefix: / }, pass: { upstream: web } }");
    let gw = Gateway::with(&conf).await;
    assert_eq!(gw.get("/x").send().await.refusal(), (401, "missing_api_key".into()));
    assert_eq!(gw.get("/x").key("wrong").send().await.refusal(), (401, "invalid_api_key".into()));
    let answer: Value = gw.get("/x").key(ALICE).send().await.expect(200).json();
    assert_eq!(answer["node"], "web");
}
