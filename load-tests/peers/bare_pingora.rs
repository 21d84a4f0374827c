//! Pingora's stock HTTP proxy and nothing else: what a gateway built on it is measured against.

use async_trait::async_trait;
use clap::Parser;
use pingora_core::Result;
use pingora_core::server::Server;
use pingora_core::server::configuration::{Opt, ServerConf};
use pingora_core::upstreams::peer::HttpPeer;
use pingora_proxy::{ProxyHttp, Session, http_proxy_service};

// The same allocator as the gateway's, so that the difference is the gateway's own.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

#[derive(Parser)]
#[command(about = "A bare Pingora proxy, HTTP/1.1 with keep-alive, to compare with")]
struct Args {
    /// Where to listen, such as 127.0.0.1:8080.
    #[arg(long)]
    listen: String,
    /// Where to send everything, such as 127.0.0.1:8000.
    #[arg(long)]
    upstream: std::net::SocketAddr,
    /// Worker threads.
    #[arg(long, default_value_t = 1)]
    threads: usize,
}

struct Bare(std::net::SocketAddr);

#[async_trait]
impl ProxyHttp for Bare {
    type CTX = ();

    fn new_ctx(&self) {}

    async fn upstream_peer(&self, _session: &mut Session, _ctx: &mut ()) -> Result<Box<HttpPeer>> {
        Ok(Box::new(HttpPeer::new(self.0, false, String::new())))
    }
}

fn main() {
    let args = Args::parse();
    let conf = ServerConf { threads: args.threads, ..ServerConf::default() };
    let mut server = Server::new_with_opt_and_conf(Opt::default(), conf);
    server.bootstrap();
    let mut service = http_proxy_service(&server.configuration, Bare(args.upstream));
    service.add_tcp(&args.listen);
    server.add_service(service);
    server.run_forever();
}
