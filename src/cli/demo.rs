//! `tollgate demo`: the gateway with a built-in configuration, two simulated LLM nodes and a simulated Dify app.

use std::io::{self, Write};
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use tollgate_filters::config::Process;
use tollgate_load::dify::{DifyApp, DifyConfig};
use tollgate_load::node::{Node, NodeConfig};

use crate::{config, server};

const DEMO: &str = include_str!("../../conf/demo.yaml");

/// Serve a demonstration: simulated nodes, limits in memory, nothing else needed.
#[derive(Debug, Args)]
pub(crate) struct DemoArgs {
    /// Port of the gateway; 0 takes a free one.
    #[arg(long, default_value_t = 8080)]
    port: u16,
    /// Port of its admin interface; 0 takes a free one. Default: 9180, or a free one where `--port` is 0.
    #[arg(long)]
    admin_port: Option<u16>,
}

impl DemoArgs {
    fn admin_port(&self) -> u16 {
        self.admin_port.unwrap_or(if self.port == 0 { 0 } else { 9180 })
    }
}

/// Serves the demonstration until SIGTERM or SIGINT.
///
/// # Errors
/// A port that is taken.
pub(crate) fn run(args: &DemoArgs) -> io::Result<ExitCode> {
    server::log_to_stderr();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let (a, b) = (node("a").await?, node("b").await?);
        let app = DifyApp::start(DifyConfig { keys: vec!["app-demo".to_owned()], ..DifyConfig::default() }).await?;
        let places = [("127.0.0.1:18001", a.addr()), ("127.0.0.1:18002", b.addr()), ("127.0.0.1:18003", app.addr())];
        let text = configuration(args, &places);
        let loaded = match config::load_text("demo.yaml (built in)", &text, &Process) {
            Ok(loaded) => loaded,
            Err(problems) => {
                write!(io::stderr(), "{problems}")?;
                return Ok(ExitCode::FAILURE);
            }
        };
        let server = server::Server::start(&loaded, &Process).await?;
        let gateway = server.data_addresses().first().map(ToString::to_string).unwrap_or_default();
        welcome(&gateway, &server.admin_address().to_string(), &mut io::stdout())?;
        server.announce();
        server.run_until_signal().await?;
        Ok(ExitCode::SUCCESS)
    })
}

async fn node(name: &str) -> io::Result<Node> {
    let config = NodeConfig {
        name: name.to_owned(),
        models: vec!["sim-chat".to_owned(), "sim-embed".to_owned()],
        prefill_tokens_per_second: 8_000.0,
        decode: Duration::from_millis(15),
        decode_per_running: Duration::from_millis(1),
        max_running: 32,
        ..NodeConfig::default()
    };
    Node::start(config).await
}

fn configuration(args: &DemoArgs, places: &[(&str, std::net::SocketAddr)]) -> String {
    let ports = DEMO
        .replace("127.0.0.1:8080", &format!("127.0.0.1:{}", args.port))
        .replace("127.0.0.1:9180", &format!("127.0.0.1:{}", args.admin_port()));
    places.iter().fold(ports, |text, (placeholder, address)| text.replace(placeholder, &address.to_string()))
}

fn welcome(gateway: &str, admin: &str, out: &mut dyn Write) -> io::Result<()> {
    writeln!(
        out,
        r#"Tollgate demo: two simulated LLM nodes and a simulated Dify app behind http://{gateway}

A streamed chat completion:
curl -N http://{gateway}/v1/chat/completions -H 'Authorization: Bearer demo-key' -H 'Content-Type: application/json' -d '{{"model":"chat","stream":true,"max_tokens":40,"messages":[{{"role":"user","content":"What is a toll gate?"}}]}}'

A model whose first target always answers 503: the next one takes over (see x-tollgate-attempts and -upstream):
curl -i http://{gateway}/v1/chat/completions -H 'Authorization: Bearer demo-key' -H 'Content-Type: application/json' -d '{{"model":"shaky","max_tokens":20,"messages":[{{"role":"user","content":"Hello"}}]}}'

A Dify app, streamed:
curl -N http://{gateway}/v1/chat-messages -H 'Authorization: Bearer app-demo' -H 'Content-Type: application/json' -d '{{"inputs":{{}},"query":"Hello","response_mode":"streaming","user":"abc"}}'

What the key may still use, and the models it may ask for:
curl http://{gateway}/v1/quota -H 'Authorization: Bearer demo-key'
curl http://{gateway}/v1/models -H 'Authorization: Bearer demo-key'

Metrics and upstreams:
curl http://{admin}/metrics
curl http://{admin}/api/upstreams

Console: http://{admin}/
Keys: demo-key (tier paid), free-key (tier free: 10 requests a minute). Ctrl-C ends it.
"#
    )?;
    out.flush()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_built_in_configuration_is_valid_with_every_port_put_in() {
        let args = DemoArgs { port: 0, admin_port: None };
        let at = |port| std::net::SocketAddr::from(([127, 0, 0, 1], port));
        let text =
            configuration(&args, &[("127.0.0.1:18001", at(1)), ("127.0.0.1:18002", at(2)), ("127.0.0.1:18003", at(3))]);
        assert!(!text.contains("1800"), "a placeholder is left");
        config::load_text("demo.yaml", &text, &Process).unwrap();
    }
}
