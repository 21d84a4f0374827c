//! Tests of `include:`.

use super::*;

fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (name, text) in files {
        let path = dir.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }
    dir
}

const MAIN: &str = "include: [routes.d/*.yaml]\nupstreams: { a: { nodes: ['http://127.0.0.1:1'] } }\n\
                    routes: [{ name: one, match: { path: /one }, pass: { upstream: a } }]\n";

#[test]
fn included_files_add_their_sections_in_the_order_of_their_names() {
    let dir = folder(&[
        ("main.yaml", MAIN),
        ("routes.d/20.yaml", "routes: [{ name: three, match: { path: /three }, pass: { upstream: b } }]"),
        (
            "routes.d/10.yaml",
            "upstreams: { b: { nodes: ['http://127.0.0.1:2'] } }\nroutes: [{ name: two, match: { path: /two }, pass: { upstream: a } }]",
        ),
        ("routes.d/.20.yaml.swp", "nonsense: ["),
        ("routes.d/readme.txt", "nonsense: ["),
    ]);
    let loaded = load(&dir.path().join("main.yaml"), &Bare).unwrap_or_else(|problems| panic!("{problems}"));
    let names: Vec<_> = loaded.document.routes.iter().map(|route| route.name.as_str()).collect();
    assert_eq!(names, ["one", "two", "three"]);
    assert_eq!(loaded.document.upstreams.len(), 2);
    assert_eq!(loaded.files.len(), 3);
    assert_eq!(loaded.folders, [dir.path().join("routes.d")]);
}

#[test]
fn what_is_defined_in_two_files_is_an_error_that_names_both_places() {
    let dir = folder(&[
        ("main.yaml", MAIN),
        (
            "routes.d/a.yaml",
            "\nupstreams: { a: { nodes: ['http://127.0.0.1:2'] } }\nroutes: [{ name: one, match: { path: /x }, pass: { upstream: a } }]",
        ),
    ]);
    let problems = load(&dir.path().join("main.yaml"), &Bare).unwrap_err();
    let main = dir.path().join("main.yaml").display().to_string();
    let shown: Vec<_> = problems
        .0
        .iter()
        .map(|p| (p.file.ends_with("a.yaml"), p.line, p.column, p.message.clone(), p.hint.clone().unwrap()))
        .collect();
    assert_eq!(
        shown,
        [
            (
                true,
                2,
                14,
                "`a` is defined twice in `upstreams`".to_owned(),
                format!("it is already defined at line 2 of {main}")
            ),
            (
                true,
                3,
                18,
                "duplicate route name `one`".to_owned(),
                format!("it is already the name of the route at line 3 of {main}")
            ),
        ]
    );
}

#[test]
fn an_included_file_holds_no_section_of_the_process() {
    let dir =
        folder(&[("main.yaml", MAIN), ("routes.d/a.yaml", "server: { drain: 1s }\n"), ("routes.d/b.yaml", "- a\n")]);
    let problems = load(&dir.path().join("main.yaml"), &Bare).unwrap_err();
    let messages: Vec<_> = problems.0.iter().map(|p| p.message.as_str()).collect();
    assert_eq!(
        messages,
        ["`server` cannot stand in an included file", "an included file holds sections, like `routes:`"]
    );
}

#[test]
fn an_included_file_must_be_there_and_a_glob_may_find_none() {
    let dir = folder(&[("main.yaml", "include: [none.d/*.yaml, gone.yaml, '*/x.yaml']\n")]);
    let problems = load(&dir.path().join("main.yaml"), &Bare).unwrap_err();
    let messages: Vec<_> = problems.errors().map(|p| (p.line, p.column, p.message.as_str())).collect();
    assert_eq!(
        messages,
        [(1, 26, "gone.yaml: there is no such file"), (1, 37, "*/x.yaml: `*` and `?` are for the file name only")]
    );
}
