//! `tollgate explain`: which route a request would take, why the others do not match, and what would become of it.

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use http::header::HeaderName;
use http::{HeaderMap, HeaderValue, Method};
use serde_json::{Value, json};
use tollgate_filters::auth::{Caller, KEY_HEADERS};
use tollgate_filters::config::World;
use tollgate_filters::limit::{Ledger, Plan};
use tollgate_filters::metrics::Metrics;
use tollgate_filters::model::Model;
use tollgate_filters::route::{Head, Mismatch, canonical_path};

use crate::cli::check::{self, Format};
use crate::runtime::{self, Callee, Checked, Lane, Lasting, Route, Runtime};

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
    let loaded = match check::load(args.config.as_ref(), world) {
        Ok(loaded) => loaded,
        Err(problems) => {
            write!(err, "{problems}")?;
            return Ok(ExitCode::FAILURE);
        }
    };
    let metrics = Metrics::new(env!("CARGO_PKG_VERSION")).map_err(io::Error::other)?;
    let lasting = Lasting { ledger: Ledger::in_memory(), keyring: None, metrics: metrics.into() };
    let checked = Checked { document: &loaded.document, hash: &loaded.hash };
    let runtime = runtime::build(&checked, None, world, &lasting).map_err(io::Error::other)?;
    match explain(args, &runtime) {
        Ok(found) => {
            match args.format {
                Format::Json => writeln!(out, "{found:#}")?,
                Format::Text => print(&found, out)?,
            }
            Ok(ExitCode::SUCCESS)
        }
        Err(why) => {
            writeln!(err, "tollgate: {why}")?;
            Ok(ExitCode::FAILURE)
        }
    }
}

fn explain(args: &ExplainArgs, runtime: &Runtime) -> Result<Value, String> {
    let (path, query) = args.path.split_once('?').unwrap_or((&args.path, ""));
    let path = canonical_path(path).map_err(|e| e.to_string())?;
    let method =
        Method::from_bytes(args.method.to_ascii_uppercase().as_bytes()).map_err(|_| "the method is malformed")?;
    let headers = headers(args)?;
    let host = args.host.to_ascii_lowercase();
    let head = Head { method: &method, path: &path, query, host: &host, headers: &headers };
    let caller = args
        .key
        .as_ref()
        .map(|_| runtime.keys.identify(&headers, query, now()).map_err(|e| e.to_string()))
        .transpose()?;
    let mut passed_over = Vec::new();
    for (matcher, route) in runtime.router.iter() {
        match matcher.check(&head) {
            Err(why) => passed_over.push(json!({ "route": &*route.name, "because": word(why) })),
            Ok(()) => return Ok(of_route(args, runtime, route, caller.as_deref(), &passed_over)),
        }
    }
    Ok(json!({ "route": null, "passed_over": passed_over }))
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

fn of_route(
    args: &ExplainArgs,
    runtime: &Runtime,
    route: &Route,
    caller: Option<&Caller>,
    passed_over: &[Value],
) -> Value {
    let asked = args.model.as_deref().and_then(|name| runtime.models.get(name)).map(|m| &**m);
    let (lane, model) = match &route.lane {
        Lane::Own => ("own", None),
        Lane::Pass(_) => ("pass", None),
        Lane::Call(Callee::Upstream(model)) => ("call", Some(&**model)),
        Lane::Call(Callee::Models(allowed)) => ("call", asked.filter(|m| allowed.allows(&m.name))),
    };
    let nodes = match &route.lane {
        Lane::Pass(pass) => {
            pass.upstream.nodes.iter().map(|n| json!({ "upstream": &*pass.upstream.name, "node": &*n.name })).collect()
        }
        Lane::Own | Lane::Call(_) => model.map(candidates).unwrap_or_default(),
    };
    let mut plan = Plan::new();
    let sets = [caller.map(|c| &c.rules), Some(&route.rules), model.map(|m| &m.rules), Some(&runtime.global)];
    sets.into_iter().flatten().for_each(|set| plan.add(set));
    let limits: Vec<Value> = plan
        .rules()
        .map(|(set, rule)| json!({ "scope": set.id().label(), "dimension": rule.dimension.name(), "limit": rule.limit, "shadow": rule.shadow }))
        .collect();
    json!({
        "route": &*route.name, "lane": lane, "dialect": route.dialect.as_str(), "filters": route.chain.names(),
        "key": caller.map(|c| json!({
            "id": &*c.id, "tier": c.tier.as_deref(), "may_use_route": c.may_use_route(&route.name),
            "may_use_model": model.filter(|m| !m.name.is_empty()).map(|m| c.may_use_model(&m.name)),
        })),
        "model": model.map(|m| &*m.name).filter(|name| !name.is_empty()),
        "model_found": args.model.as_ref().map(|_| model.is_some()),
        "limits": limits, "candidates": nodes, "passed_over": passed_over,
    })
}

fn candidates(model: &Model) -> Vec<Value> {
    let of_target = |t: &tollgate_filters::model::Target| {
        let (upstream, name) = (t.upstream.clone(), t.model.to_string());
        let policy = upstream.policy.name();
        upstream
            .nodes
            .iter()
            .map(|n| json!({ "upstream": &*upstream.name, "node": &*n.name, "weight": n.weight, "model": name, "balance": policy }))
            .collect::<Vec<_>>()
    };
    model.targets.iter().flat_map(of_target).collect()
}

fn print(found: &Value, out: &mut dyn Write) -> io::Result<()> {
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    for one in list(&found["passed_over"]) {
        writeln!(out, "passed over  {}: its {} does not match", plain(&one["route"]), plain(&one["because"]))?;
    }
    if found["route"].is_null() {
        return writeln!(out, "no route matches: 404 not_found");
    }
    for name in ["route", "lane", "dialect", "model"] {
        if !found[name].is_null() {
            writeln!(out, "{name:<12} {}", plain(&found[name]))?;
        }
    }
    if found["model_found"] == Value::Bool(false) {
        writeln!(out, "{:<12} there is no such model on this route: 404 model_not_found", "model")?;
    }
    writeln!(out, "{:<12} {}", "filters", list(&found["filters"]).iter().map(plain).collect::<Vec<_>>().join(", "))?;
    if let Some(id) = found["key"]["id"].as_str() {
        writeln!(
            out,
            "{:<12} {id}, tier {}, may use the route: {}",
            "key",
            plain(&found["key"]["tier"]),
            plain(&found["key"]["may_use_route"])
        )?;
    }
    for one in list(&found["limits"]) {
        writeln!(
            out,
            "{:<12} {} {} {}",
            "limit",
            plain(&one["scope"]),
            plain(&one["dimension"]),
            plain(&one["limit"])
        )?;
    }
    for one in list(&found["candidates"]) {
        writeln!(
            out,
            "{:<12} {} {} {}",
            "candidate",
            plain(&one["upstream"]),
            plain(&one["node"]),
            plain(&one["model"])
        )?;
    }
    Ok(())
}

fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}
