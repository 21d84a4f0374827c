//! `tollgate explain`: which route a request would take, why the others do not match, and what would become of it.

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use http::header::HeaderName;
use http::{HeaderMap, HeaderValue, Method};
use tollgate_filters::auth::{Caller, KEY_HEADERS};
use tollgate_filters::config::World;
use tollgate_filters::error::GatewayError;
use tollgate_filters::limit::rule::Rule;
use tollgate_filters::limit::{Ledger, Plan, RuleSet};
use tollgate_filters::metrics::Metrics;
use tollgate_filters::model::{Model, Target};
use tollgate_filters::route::{Head, Mismatch, canonical_path};
use tollgate_filters::upstream::Upstream;

use crate::cli::check::{self, Format};
use crate::proxy::own;
use crate::runtime::{self, Callee, Checked, Lane, Lasting, Route, Runtime};

mod report;
use report::{Candidate, Found, KeyFound, LimitFound, PassedOver, Refused, Report};

/// Explain what would become of a request.
#[derive(Debug, Args)]
pub(crate) struct ExplainArgs {
    /// The configuration. Default: ./conf/tollgate.yaml, then /etc/tollgate/tollgate.yaml.
    #[arg(short, long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Path of the request, with its query if it has one.
    #[arg(long)]
    path: String,
    /// Method of the request.
    #[arg(long, default_value = "POST")]
    method: String,
    /// Host of the request.
    #[arg(long, default_value = "localhost")]
    host: String,
    /// Headers of the request, like `app-id:support`.
    #[arg(long, value_name = "K:V", num_args = 1..)]
    header: Vec<String>,
    /// The caller's key; it is not printed.
    #[arg(long)]
    key: Option<String>,
    /// The model asked for.
    #[arg(long)]
    model: Option<String>,
    /// How to print the result.
    #[arg(long, value_enum, default_value_t = Format::Text)]
    format: Format,
}

/// Explains.
///
/// # Errors
/// When the result cannot be written.
pub(crate) fn run(
    args: &ExplainArgs,
    world: &dyn World,
    out: &mut dyn Write,
    err: &mut dyn Write,
) -> io::Result<ExitCode> {
    let Some(loaded) = check::load_or_tell(args.config.as_ref(), world, err)? else { return Ok(ExitCode::FAILURE) };
    let metrics = Metrics::new(env!("CARGO_PKG_VERSION")).map_err(io::Error::other)?;
    let lasting = Lasting { ledger: Ledger::in_memory(), keyring: None, metrics: metrics.into() };
    let checked = Checked { document: &loaded.document, hash: &loaded.hash };
    let runtime = runtime::build(&checked, None, world, &lasting).map_err(io::Error::other)?;
    match explain(args, &runtime) {
        Ok(found) => {
            match args.format {
                Format::Json => writeln!(out, "{}", serde_json::to_string_pretty(&found)?)?,
                Format::Text => write!(out, "{found}")?,
            }
            Ok(ExitCode::SUCCESS)
        }
        Err(why) => {
            writeln!(err, "tollgate: {why}")?;
            Ok(ExitCode::FAILURE)
        }
    }
}

fn explain(args: &ExplainArgs, runtime: &Runtime) -> Result<Report, String> {
    let (path, query) = args.path.split_once('?').unwrap_or((&args.path, ""));
    let path = canonical_path(path).map_err(|e| e.to_string())?;
    let method =
        Method::from_bytes(args.method.to_ascii_uppercase().as_bytes()).map_err(|_| "the method is malformed")?;
    let headers = headers(args)?;
    let host = args.host.to_ascii_lowercase();
    let head = Head { method: &method, path: &path, query, host: &host, headers: &headers };
    let caller = args.key.as_ref().map(|_| runtime.keys.identify(&headers, query, now())).transpose();
    let mut passed_over = Vec::new();
    let found = if own::names(&path) && !runtime.router.names(&path) {
        Ok(if path == "/health" { &runtime.open } else { &runtime.own })
    } else {
        for (matcher, route) in runtime.router.iter() {
            let Err(why) = matcher.check(&head) else { break };
            passed_over.push(PassedOver { route: route.name.to_string(), because: word(why) });
        }
        runtime.router.find(&head)
    };
    let route = match found {
        Ok(route) => route,
        Err(error) => return Ok(Report { route: None, refusal: Some(refused(&error)), found: None, passed_over }),
    };
    let (caller, stranger) = match caller {
        Ok(caller) => (caller, None),
        Err(error) => (None, Some(error)),
    };
    let called = Called::of(args, runtime, route);
    let refusal =
        stranger.filter(|_| route.chain.auth.is_some()).or_else(|| called.refusal(args, route, caller.as_deref()));
    Ok(Report {
        route: Some(route.name.to_string()),
        refusal: refusal.as_ref().map(refused),
        found: Some(called.found(runtime, route, caller.as_deref())),
        passed_over,
    })
}

fn refused(error: &GatewayError) -> Refused {
    let face = error.face();
    Refused { status: face.status, code: face.code, message: error.to_string() }
}

fn now() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

fn headers(args: &ExplainArgs) -> Result<HeaderMap, String> {
    let mut headers = HeaderMap::new();
    for pair in &args.header {
        let (name, value) =
            pair.split_once(':').ok_or_else(|| format!("{pair:?} is not a header; write NAME:VALUE"))?;
        let name: HeaderName = name.trim().parse().map_err(|_| format!("{name:?} is not a header name"))?;
        headers.append(name, value.trim().parse().map_err(|_| "a header value has characters that are not allowed")?);
    }
    if let Some(key) = &args.key {
        let [bearer, ..] = KEY_HEADERS;
        headers.insert(bearer, HeaderValue::from_str(&format!("Bearer {key}")).map_err(|_| "the key is malformed")?);
    }
    Ok(headers)
}

const fn word(why: Mismatch) -> &'static str {
    match why {
        Mismatch::Path => "path",
        Mismatch::Host => "host",
        Mismatch::Header => "header",
        Mismatch::Query => "query",
        Mismatch::Method => "method",
    }
}

/// The model that a call would get.
struct Called<'a> {
    model: Option<&'a Model>,
    /// The upstreams in the order in which they are tried, with the model's name there.
    targets: Vec<(&'a Upstream, Option<&'a str>)>,
}

impl<'a> Called<'a> {
    fn of(args: &ExplainArgs, runtime: &'a Runtime, route: &'a Route) -> Self {
        let model = match &route.lane {
            Lane::Own => return Self { model: None, targets: Vec::new() },
            Lane::Pass(pass) => return Self { model: None, targets: vec![(&pass.upstream, None)] },
            Lane::Call(Callee::Upstream(model)) => Some(&**model),
            Lane::Call(Callee::Models(allowed)) => {
                let asked = args.model.as_deref().and_then(|name| runtime.models.get(name));
                asked.map(|model| &**model).filter(|model| allowed.allows(&model.name))
            }
        };
        let target = |target: &'a Target| (&*target.upstream, Some(&*target.model).filter(|name| !name.is_empty()));
        Self { model, targets: model.into_iter().flat_map(|model| &model.targets).map(target).collect() }
    }

    /// Name of the model; a route to one upstream has none.
    fn name(&self) -> Option<&'a str> {
        self.model.map(|model| &*model.name).filter(|name| !name.is_empty())
    }

    fn refusal(&self, args: &ExplainArgs, route: &Route, caller: Option<&Caller>) -> Option<GatewayError> {
        if route.chain.auth.is_some() && caller.is_some_and(|caller| !caller.may_use_route(&route.name)) {
            return Some(GatewayError::RouteNotAllowed);
        }
        let by_model = matches!(&route.lane, Lane::Call(Callee::Models(_)));
        if let Some(asked) = args.model.as_ref().filter(|_| by_model && self.model.is_none()) {
            return Some(GatewayError::ModelNotFound(asked.clone()));
        }
        let (caller, name) = (caller?, self.name()?);
        let forbidden = route.chain.guard.is_some() && !caller.may_use_model(name);
        forbidden.then(|| GatewayError::ModelNotAllowed(name.to_owned()))
    }

    fn found(&self, runtime: &Runtime, route: &Route, caller: Option<&Caller>) -> Found {
        let mut plan = Plan::new();
        let sets = [
            caller.map(|caller| &caller.rules),
            Some(&route.rules),
            self.model.map(|model| &model.rules),
            Some(&runtime.global),
        ];
        if route.chain.limit.is_some() {
            sets.into_iter().flatten().for_each(|set| plan.add(set));
        }
        let limit = |(set, rule): (&RuleSet, &Rule)| LimitFound {
            scope: set.id().label().into_owned(),
            dimension: rule.dimension.name(),
            limit: rule.limit,
            shadow: rule.shadow,
        };
        Found {
            lane: match &route.lane {
                Lane::Own => "own",
                Lane::Call(_) => "call",
                Lane::Pass(_) => "pass",
            },
            dialect: route.dialect.as_str(),
            filters: route.chain.names(),
            key: caller.map(|c| KeyFound { id: c.id.to_string(), tier: c.tier.as_deref().map(str::to_owned) }),
            model: self.name().map(str::to_owned),
            limits: plan.rules().map(limit).collect(),
            candidates: self.targets.iter().flat_map(|(upstream, model)| candidates(upstream, *model)).collect(),
        }
    }
}

fn candidates<'a>(upstream: &'a Upstream, model: Option<&'a str>) -> impl Iterator<Item = Candidate> + 'a {
    upstream.nodes.iter().map(move |node| Candidate {
        upstream: upstream.name.to_string(),
        node: node.name.to_string(),
        weight: node.weight,
        model: model.map(str::to_owned),
        balance: upstream.policy.name(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;
    use serde_json::{Value, json};
    use tollgate_filters::config::Process;

    const CONF: &str = r#"
tiers: { free: { requests_per_minute: 60, concurrency: { limit: 4, shadow: true } } }
keys:
  - { id: alice, key: alice-key, tier: free }
  - { id: bob, key: bob-key, models: [other], routes: [llm] }
upstreams:
  a: { nodes: ['http://10.0.0.1:8000', { url: 'http://10.0.0.2:8000', weight: 2 }] }
  b: { dialect: dify, nodes: ['http://10.0.0.3'], balance: round_robin }
models:
  chat: { targets: [{ upstream: a, model: qwen }], aliases: [gpt], limits: { tokens_per_minute: 9 } }
  other: { targets: [{ upstream: a }] }
routes:
  - { name: llm, match: { path: /v1/chat/completions, method: POST }, call: { models: "*" } }
  - { name: bot, match: { prefix: /bot, header: { app: x } }, call: { upstream: b } }
  - { name: web, match: { prefix: /bot }, pass: { upstream: b }, filters: { auth: off } }
"#;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        args: ExplainArgs,
    }

    fn ask(line: &str) -> (String, String, bool) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.yaml");
        std::fs::write(&path, CONF).unwrap();
        let words = ["explain", "-c", path.to_str().unwrap()].into_iter().chain(line.split(' '));
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let code = run(&Cli::parse_from(words).args, &Process, &mut out, &mut err).unwrap();
        (String::from_utf8(out).unwrap(), String::from_utf8(err).unwrap(), code == ExitCode::SUCCESS)
    }

    fn json(line: &str) -> Value {
        let (out, err, ok) = ask(&format!("{line} --format json"));
        assert!(ok, "{err}");
        serde_json::from_str(&out).unwrap()
    }

    #[test]
    fn a_call_is_explained_down_to_its_nodes() {
        let (out, _, ok) = ask("--path /v1/chat/completions --key alice-key --model gpt");
        assert!(ok);
        assert_eq!(
            out,
            "route        llm
lane         call
dialect      openai
filters      auth, guard, limit
key          alice, tier free
model        chat
limit        key requests_per_minute 60
limit        key concurrency 4 (shadow)
limit        model:chat tokens_per_minute 9
candidate    a 10.0.0.1:8000 as qwen, weight 1, prefix_hash
candidate    a 10.0.0.2:8000 as qwen, weight 2, prefix_hash
"
        );
    }

    #[test]
    fn routes_that_do_not_match_are_named_with_the_reason() {
        let (out, _, _) = ask("--path /bot/x");
        assert!(
            out.starts_with("passed over  llm: its path does not match\npassed over  bot: its header does not match\n")
        );
        let report = json("--path /bot/x --header app:x");
        assert_eq!((&report["route"], &report["candidates"][0]["node"]), (&json!("bot"), &json!("10.0.0.3:80")));
        assert_eq!(report["passed_over"], json!([{ "route": "llm", "because": "path" }]));
    }

    #[test]
    fn what_would_be_refused_is_told_as_the_client_would_get_it() {
        for (line, code) in [
            ("--path /nowhere", "not_found"),
            ("--path /v1/chat/completions --method GET", "method_not_allowed"),
            ("--path /v1/chat/completions --model nothing", "model_not_found"),
            ("--path /v1/chat/completions --model chat --key bob-key", "model_not_allowed"),
            ("--path /bot --header app:x --key bob-key", "route_not_allowed"),
            ("--path /bot --header app:x --key wrong-key", "invalid_api_key"),
        ] {
            assert_eq!(json(line)["refusal"]["code"], code, "{line}");
        }
        for line in ["--path /v1/chat/completions --model other --key bob-key", "--path /bot --key wrong-key"] {
            assert_eq!(json(line)["refusal"], Value::Null, "{line}");
        }
    }

    #[test]
    fn what_the_gateway_answers_itself_is_no_route_of_the_file() {
        let report = json("--path /v1/models --method GET --key alice-key");
        assert_eq!((&report["route"], &report["lane"]), (&json!("gateway"), &json!("own")));
        assert_eq!(json("--path /health --method GET")["filters"], json!([]));
    }

    #[test]
    fn a_question_that_makes_no_sense_fails() {
        let (_, err, ok) = ask("--path /x --header nonsense");
        assert!(!ok && err.contains("NAME:VALUE"), "{err}");
    }
}
