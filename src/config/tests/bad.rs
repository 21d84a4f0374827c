//! Bad configurations and what is said about them.

use super::*;

/// The problems of a text, one a line: `line:column message | hint`, warnings marked.
fn said(text: &str) -> String {
    let problems = match load_text("t.yaml", text, &Supplied) {
        Ok(loaded) => loaded.warnings,
        Err(problems) => problems.0,
    };
    let line = |problem: &Problem| {
        let mark = if problem.severity == Severity::Warning { "warning: " } else { "" };
        let hint = problem.hint.as_ref().map(|hint| format!(" | {hint}")).unwrap_or_default();
        format!("{}:{} {mark}{}{hint}", problem.line, problem.column, problem.message)
    };
    problems.iter().map(line).filter(|line| !line.contains("no routes: every request")).collect::<Vec<_>>().join("\n")
}

#[test]
fn print() {
    let base = "upstreams: { a: { nodes: ['http://127.0.0.1:1'] }, web: { dialect: none, nodes: ['http://127.0.0.1:2'] } }\nmodels: { m: { targets: [{ upstream: a }], aliases: [gpt] } }\ntiers: { free: { requests_per_minute: 1 } }\n";
    let cases = std::fs::read_to_string("/tmp/cases.txt").unwrap();
    for case in cases.split("\n---\n") {
        let text = case.strip_prefix("+").map(|rest| format!("{base}{rest}")).unwrap_or(case.to_owned());
        println!("{case}\n=> {}\n---", said(&text));
    }
}
