//! The configuration of a test: the parts that it is not about are filled in.

use std::fmt;

/// A configuration file in the making. Text goes in as YAML, in flow style.
#[derive(Clone)]
pub(crate) struct Conf {
    server: Vec<String>,
    tiers: Vec<String>,
    keys: Vec<String>,
    upstreams: Vec<String>,
    models: Vec<String>,
    routes: Vec<String>,
    tail: Vec<String>,
}

impl Conf {
    /// A server on free ports, tiers `free` and `wide`, keys of Alice (`free`) and Wendy (`wide`).
    pub(crate) fn new() -> Self {
        Self {
            server: vec!["drain: 3s".into()],
            tiers: vec![
                "free: { requests_per_minute: 60, requests_per_hour: 1000, tokens_per_day: 100_000 }".into(),
                "wide: { requests_per_minute: 1_000_000, requests_per_hour: 10_000_000, \
                 tokens_per_day: 1_000_000_000_000 }"
                    .into(),
            ],
            keys: vec![
                "{ id: alice, key: alice-secret-key, tier: free }".into(),
                "{ id: wendy, key: wendy-secret-key, tier: wide }".into(),
            ],
            upstreams: Vec::new(),
            models: Vec::new(),
            routes: Vec::new(),
            tail: Vec::new(),
        }
    }

    /// The usual case: model `chat` is served by these nodes under that name, by the usual call route.
    pub(crate) fn serving<U: AsRef<str>>(model: &str, nodes: &[U]) -> Self {
        Self::new().upstream("near", nodes, "").model("chat", &[("near", model)], "").llm()
    }

    /// A line of `server:`, in place of an earlier one of the same name.
    pub(crate) fn server(mut self, line: &str) -> Self {
        let name = line.split(':').next();
        self.server.retain(|earlier| earlier.split(':').next() != name);
        self.server.push(line.into());
        self
    }

    pub(crate) fn tier(mut self, line: &str) -> Self {
        self.tiers.push(line.into());
        self
    }

    pub(crate) fn key(mut self, entry: &str) -> Self {
        self.keys.push(entry.into());
        self
    }

    /// An upstream of dialect `openai` (unless `more` says another) over these nodes.
    pub(crate) fn upstream<U: AsRef<str>>(mut self, name: &str, nodes: &[U], more: &str) -> Self {
        let nodes: Vec<String> = nodes.iter().map(|url| format!("\"{}\"", url.as_ref())).collect();
        let dialect = if more.contains("dialect:") { "" } else { "dialect: openai, " };
        let comma = if more.is_empty() { "" } else { ", " };
        self.upstreams.push(format!("{name}: {{ {dialect}nodes: [{}]{comma}{more} }}", nodes.join(", ")));
        self
    }

    /// A model with its targets as (upstream, model name there).
    pub(crate) fn model(mut self, name: &str, targets: &[(&str, &str)], more: &str) -> Self {
        let targets: Vec<String> =
            targets.iter().map(|(upstream, model)| format!("{{ upstream: {upstream}, model: \"{model}\" }}")).collect();
        let comma = if more.is_empty() { "" } else { ", " };
        self.models.push(format!("{name}: {{ targets: [{}]{comma}{more} }}", targets.join(", ")));
        self
    }

    pub(crate) fn route(mut self, entry: &str) -> Self {
        self.routes.push(entry.into());
        self
    }

    /// The usual call route, named `llm`.
    pub(crate) fn llm(self) -> Self {
        self.route(
            "{ name: llm, match: { path: [/v1/chat/completions, /v1/completions, /v1/embeddings], method: [POST] }, \
             call: { models: \"*\" } }",
        )
    }

    /// Whole lines at the top level.
    pub(crate) fn also(mut self, text: &str) -> Self {
        self.tail.push(text.into());
        self
    }
}

impl fmt::Display for Conf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "server:")?;
        if !self.server.iter().any(|line| line.starts_with("listen:")) {
            writeln!(f, "  listen: [{{ bind: \"127.0.0.1:0\" }}]")?;
        }
        if !self.server.iter().any(|line| line.starts_with("admin:")) {
            writeln!(f, "  admin: {{ bind: \"127.0.0.1:0\" }}")?;
        }
        self.server.iter().try_for_each(|line| writeln!(f, "  {line}"))?;
        let sections = [
            ("tiers", "", &self.tiers),
            ("keys", "- ", &self.keys),
            ("upstreams", "", &self.upstreams),
            ("models", "", &self.models),
            ("routes", "- ", &self.routes),
        ];
        for (name, dash, lines) in sections {
            if !lines.is_empty() {
                writeln!(f, "{name}:")?;
                lines.iter().try_for_each(|line| writeln!(f, "  {dash}{line}"))?;
            }
        }
        self.tail.iter().try_for_each(|line| writeln!(f, "{line}"))
    }
}
