//! Addresses of nodes, resolved in the background: no request ever waits for DNS, and the last good answer is kept.

use std::sync::Arc;
use std::time::Duration;

use tokio::net::lookup_host;
use tokio::time::{sleep, timeout};
use tollgate_filters::upstream::Node;

use super::Runtime;
use crate::gateway::Gateway;

/// How often names are looked up again.
const EVERY: Duration = Duration::from_secs(10);
/// How long one look-up may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// Looks up all names of a runtime once.
pub(crate) async fn resolve(runtime: &Runtime) {
    let nodes = runtime.upstreams.values().flat_map(|u| &u.nodes);
    for node in nodes.filter(|n| n.host.parse::<std::net::IpAddr>().is_err()) {
        resolve_node(node).await;
    }
}

async fn resolve_node(node: &Node) {
    let answer = timeout(PATIENCE, lookup_host((&*node.host, node.port))).await;
    let mut addresses: Vec<_> = match answer {
        Ok(Ok(found)) => found.collect(),
        Ok(Err(error)) => {
            return tracing::warn!(host = &*node.host, %error, "cannot resolve a node; its last addresses are kept");
        }
        Err(_) => {
            return tracing::warn!(host = &*node.host, "resolving a node takes too long; its last addresses are kept");
        }
    };
    // IPv4 first: a node that listens on one family only is most often on that one.
    addresses.sort_by_key(|a| a.is_ipv6());
    if !addresses.is_empty() && **node.addresses.load() != addresses {
        node.addresses.store(Arc::new(addresses));
    }
}

/// Keeps the addresses of the live runtime fresh.
pub(crate) async fn keep_fresh(gateway: Arc<Gateway>) {
    loop {
        sleep(EVERY).await;
        resolve(&gateway.live.load_full()).await;
    }
}
