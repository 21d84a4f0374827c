//! The node's `/metrics`, under vLLM's names.

use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};

use super::NodeConfig;
use super::engine::Engine;

pub(crate) fn text(config: &NodeConfig, engine: &Engine) -> String {
    let load = engine.load();
    let counters = &engine.counters;
    let model = config.models.first().map_or("any", String::as_str).replace('\\', "\\\\").replace('"', "\\\"");
    let mut out = String::with_capacity(4096);
    let mut put = |name: &str, kind: &str, help: &str, rows: &[(&str, f64)]| {
        // Writing to a text cannot fail.
        let _ = writeln!(out, "# HELP vllm:{name} {help}\n# TYPE vllm:{name} {kind}");
        for (labels, value) in rows {
            let _ = writeln!(out, "vllm:{name}{{{labels}engine=\"0\",model_name=\"{model}\"}} {value:?}");
        }
    };
    let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed) as f64;
    put("num_requests_running", "gauge", "Requests being generated.", &[("", load.running as f64)]);
    put("num_requests_waiting", "gauge", "Requests in the queue.", &[("", load.waiting as f64)]);
    put("kv_cache_usage_perc", "gauge", "Share of KV blocks held by running requests, 0 to 1.", &[("", load.kv_usage)]);
    put("gpu_cache_usage_perc", "gauge", "The same under its older name.", &[("", load.kv_usage)]);
    put("prefix_cache_queries_total", "counter", "Prompt tokens looked up.", &[("", count(&counters.queries))]);
    put("prefix_cache_hits_total", "counter", "Prompt tokens found.", &[("", count(&counters.hits))]);
    put("prompt_tokens_total", "counter", "Prompt tokens taken.", &[("", count(&counters.prompt))]);
    put("generation_tokens_total", "counter", "Tokens generated.", &[("", count(&counters.output))]);
    let ends = [
        ("finished_reason=\"stop\",", count(&counters.stopped)),
        ("finished_reason=\"length\",", count(&counters.cut_short)),
    ];
    put("request_success_total", "counter", "Requests answered whole.", &ends);
    let cache = format!(
        "block_size=\"{}\",cache_dtype=\"auto\",enable_prefix_caching=\"True\",num_gpu_blocks=\"{}\",",
        config.block_tokens, config.kv_blocks
    );
    put("cache_config_info", "gauge", "The KV cache.", &[(&cache, 1.0)]);
    out
}
