//! Nodes that are taken out by their failures, tried again one call at a time, and brought back.

use std::net::SocketAddr;

use serde_json::json;
use tollgate_load::node::NodeConfig;

use super::*;
use crate::harness::client::at_once;
use crate::harness::node;

/// `near` before `far`; a node of `near` is out for a second after three failures.
async fn primary(near: &str, far: &Node) -> Gateway {
    let conf = Conf::new()
        .upstream("near", &[near], "eject: { after: 3, for: 1s }, timeouts: { connect: 500ms, first_byte: 2s }")
        .upstream("far", &[far.url()], CALM)
        .model("chat", &[("near", "qwen"), ("far", "qwen")], RETRY)
        .llm();
    Gateway::with(&conf).await
}

/// Calls one after another for so long; each must be answered whole. Who answered, and when.
async fn steady(gw: &Gateway, time: Duration) -> Vec<(Instant, String)> {
    let end = Instant::now() + time;
    let mut answered = Vec::new();
    for body in both().iter().cycle() {
        let told = ask(gw, body).await;
        is_whole(&told, body);
        answered.push((Instant::now(), told.header("x-tollgate-upstream").to_owned()));
        if Instant::now() > end {
            break;
        }
        tokio::time::sleep(ms(10)).await;
    }
    answered
}

/// The primary fails, its circuit opens, is tried, and closes soon after it is well again; no call fails meanwhile.
#[tokio::test]
async fn a_primary_that_is_down_for_a_while_and_comes_back() {
    let (near, far) = (node("qwen").await, node("qwen").await);
    let gw = primary(&near.url(), &far).await;
    assert!(steady(&gw, ms(100)).await.iter().all(|(_, by)| by == "near"));
    let up = || gw.metric("tollgate_node_up", &[("upstream", "near")]);
    assert_eq!(up().await, 1.0);
    breaks(&near, "500");
    let down = Instant::now();
    let during = steady(&gw, ms(300)).await;
    assert!(during.iter().all(|(_, by)| by == "far"));
    assert_eq!(seen(&near, down).len(), 3, "the third failure opens the circuit");
    assert_eq!(up().await, 0.0);
    let state = node_state(&gw, "near", &near).await;
    assert_eq!((&state["up"], &state["ejected"]), (&json!(false), &json!(true)), "{state}");
    assert!(state["rests_for"].as_f64().is_some_and(|left| left > 0.0 && left <= 1.0), "{state}");
    assert_eq!(gw.metric("tollgate_node_ejections_total", &[("upstream", "near")]).await, 1.0);

    // While it is down, nothing reaches it but one call a second.
    assert!(steady(&gw, ms(2900)).await.iter().all(|(_, by)| by == "far"));
    let probes = seen(&near, down).split_off(3);
    assert!((2..=3).contains(&probes.len()), "{probes:?}");
    assert!(gaps(&probes).iter().all(|gap| *gap >= ms(980)), "{probes:?}");
    assert_eq!(gw.metric("tollgate_node_ejections_total", &[("upstream", "near")]).await, 1.0, "it never came back");

    // Well again: at most a rest later it has all calls.
    near.set_fault(None);
    let healed = Instant::now();
    let after = steady(&gw, ms(2500)).await;
    let back = after.iter().position(|(_, by)| by == "near").expect("it comes back");
    assert!(after[back].0 - healed <= ms(1000) + SLACK, "{:?}", after[back].0 - healed);
    assert!(after[back..].iter().all(|(_, by)| by == "near"));
    assert_eq!(up().await, 1.0);
    let state = node_state(&gw, "near", &near).await;
    assert_eq!(
        (&state["up"], &state["ejected"], &state["rests_for"]),
        (&json!(true), &json!(false), &json!(0.0)),
        "{state}"
    );
    is_clean(&gw).await;
}

/// The same with a process that is gone: its port refuses, then it is started anew.
#[tokio::test]
async fn a_primary_that_is_gone_and_started_anew() {
    let (near, far) = (node("qwen").await, node("qwen").await);
    let addr: SocketAddr = near.addr();
    let gw = primary(&near.url(), &far).await;
    assert!(steady(&gw, ms(50)).await.iter().all(|(_, by)| by == "near"));
    near.stop().await;
    assert!(steady(&gw, ms(1500)).await.iter().all(|(_, by)| by == "far"));
    gw.settles("tollgate_node_ejections_total", &[("upstream", "near")], 1.0).await;
    let config = NodeConfig { bind: addr, models: vec!["qwen".to_owned()], ..NodeConfig::instant() };
    let near = Node::start(config).await.expect("the port is free");
    let after = steady(&gw, ms(2500)).await;
    let back = after.iter().position(|(_, by)| by == "near").expect("it comes back");
    assert!(after[back..].iter().all(|(_, by)| by == "near"));
    assert_eq!(near.requests().len(), after.len() - back);
    is_clean(&gw).await;
}

/// However many calls come when the rest is over: one of them tries.
#[tokio::test]
async fn one_call_tries_a_node_and_the_others_do_not_wait_for_it() {
    let (near, far) = (node("qwen").await, node("qwen").await);
    let gw = primary(&near.url(), &far).await;
    breaks(&near, "500");
    for _ in 0..4 {
        is_whole(&ask(&gw, &chat("hi")).await, &chat("hi"));
    }
    assert_eq!(near.requests().len(), 3);
    breaks(&near, "slow_header:800");
    tokio::time::sleep(ms(1100)).await;
    let since = Instant::now();
    let (gw, body) = (&gw, &chat("hi"));
    let told = at_once(30, (0..30).map(|_| ask(gw, body))).await;
    told.iter().for_each(|told| is_whole(told, body));
    assert_eq!(seen(&near, since).len(), 1);
    assert_eq!(told.iter().filter(|told| told.header("x-tollgate-upstream") == "near").count(), 1);
    assert!(told.iter().filter(|told| told.took < ms(700)).count() >= 25, "the others had to wait");
}

/// No more nodes are out than `max_ratio` allows, however bad all are.
#[tokio::test]
async fn not_all_nodes_are_taken_out() {
    let nodes = [node("qwen").await, node("qwen").await, node("qwen").await, node("qwen").await];
    nodes.iter().for_each(|node| breaks(node, "500"));
    let all: Vec<&Node> = nodes.iter().collect();
    let gw = gateway(&all, "eject: { after: 1, for: 30s, max_ratio: 0.5 }").await;
    for body in both().iter().cycle().take(6) {
        is_error(&ask(&gw, body).await, 502, "upstream_error");
    }
    assert_eq!(gw.metric("tollgate_node_up", &[]).await, 2.0);
    assert_eq!(gw.metric("tollgate_node_ejections_total", &[]).await, 2.0);
    let asked: usize = nodes.iter().map(|node| node.requests().len()).sum();
    nodes.iter().for_each(|node| node.set_fault(None));
    is_whole(&ask(&gw, &chat("hi")).await, &chat("hi"));
    let told: usize = nodes.iter().map(|node| node.requests().len()).sum();
    assert_eq!(told, asked + 1);
}

/// All are out, and there is nowhere else to go: better one of them than nothing, and a success brings it back.
#[tokio::test]
async fn when_all_nodes_are_out_they_are_asked_all_the_same() {
    for body in both() {
        let (one, two) = (node("qwen").await, node("qwen").await);
        [&one, &two].iter().for_each(|node| breaks(node, "500"));
        let gw = gateway(&[&one, &two], "eject: { after: 1, for: 60s, max_ratio: 1.0 }").await;
        is_error(&ask(&gw, &body).await, 502, "upstream_error");
        assert_eq!(gw.metric("tollgate_node_up", &[]).await, 0.0);
        assert!(!one.requests().is_empty() && !two.requests().is_empty());
        [&one, &two].iter().for_each(|node| node.set_fault(None));
        let since = Instant::now();
        for _ in 0..4 {
            let told = ask(&gw, &body).await;
            is_whole(&told, &body);
            attempts_told(&told, 1);
        }
        assert_eq!(seen(&one, since).len() + seen(&two, since).len(), 4);
        assert!(gw.metric("tollgate_node_up", &[]).await >= 1.0);
    }
}

/// A node that is silent is taken out as one that fails loudly.
#[tokio::test]
async fn a_silent_node_is_taken_out_too() {
    let (sick, good) = (node("qwen").await, node("qwen").await);
    breaks(&sick, "slow_token:60000");
    let more = "eject: { after: 2, for: 60s }, timeouts: { first_token: 200ms, total: 300ms }";
    let gw = gateway(&[&sick, &good], more).await;
    for body in both().iter().cycle().take(10) {
        is_whole(&ask(&gw, body).await, body);
    }
    assert_eq!((sick.requests().len(), good.requests().len()), (2, 10));
    assert_eq!(gw.metric("tollgate_node_up", &[]).await, 1.0);
}
