use super::*;

fn cors(json: serde_json::Value) -> Cors {
    serde_json::from_value(json).unwrap()
}

fn policy(json: serde_json::Value) -> CorsPolicy {
    cors(json).policy("routes[0].filters.cors").unwrap()
}

fn refusal(json: serde_json::Value) -> ConfigError {
    cors(json).policy("routes[0].filters.cors").unwrap_err()
}

fn get<'a>(headers: &'a Headers, name: &str) -> Option<&'a str> {
    headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.to_str().unwrap())
}

#[test]
fn a_listed_origin_gets_its_permission() {
    let policy =
        policy(serde_json::json!({ "origins": ["https://app.example", "http://localhost:3000"], "credentials": true }));
    let headers = policy.preflight(b"http://localhost:3000", b"POST", Some(b"authorization, Content-Type")).unwrap();
    assert_eq!(get(&headers, "access-control-allow-origin"), Some("http://localhost:3000"));
    assert_eq!(get(&headers, "access-control-allow-methods"), Some("GET, HEAD, POST, PUT, PATCH, DELETE"));
    assert_eq!(get(&headers, "access-control-allow-headers"), Some("authorization, content-type"));
    assert_eq!(get(&headers, "access-control-allow-credentials"), Some("true"));
    assert_eq!(get(&headers, "access-control-max-age"), Some("600"));
    assert!(get(&headers, "vary").unwrap().contains("origin"));
}

#[test]
fn an_origin_that_is_not_listed_is_never_sent_back() {
    let policy = policy(serde_json::json!({ "origins": ["https://app.example"] }));
    let strangers: &[&[u8]] = &[
        b"https://evil.example",
        b"https://app.example.evil.example",
        b"https://xapp.example",
        b"http://app.example",
        b"https://app.example:8443",
        b"https://app.example/",
        b"null",
        b"*",
        b"",
        b"\xff",
    ];
    for origin in strangers {
        assert!(policy.preflight(origin, b"GET", None).is_none(), "{origin:?}");
        let headers = policy.response(Some(origin));
        assert_eq!(headers.len(), 1, "{origin:?}");
        assert_eq!(get(&headers, "vary"), Some("origin"));
    }
}

#[test]
fn a_request_without_origin_still_varies_by_it() {
    let listed = policy(serde_json::json!({ "origins": ["https://app.example"] }));
    assert_eq!(get(&listed.response(None), "vary"), Some("origin"));
    assert_eq!(get(&listed.response(None), "access-control-allow-origin"), None);
}

#[test]
fn every_origin_gets_a_star_and_no_credentials() {
    let policy = policy(serde_json::json!({ "origins": ["*"] }));
    for headers in [
        policy.response(Some(b"https://any.example")),
        policy.response(None),
        policy.preflight(b"https://any.example", b"POST", Some(b"x-api-key")).unwrap(),
    ] {
        assert_eq!(get(&headers, "access-control-allow-origin"), Some("*"));
        assert_eq!(get(&headers, "access-control-allow-credentials"), None);
    }
    assert_eq!(get(&policy.response(None), "vary"), None);
    assert!(get(&policy.response(None), "access-control-expose-headers").unwrap().contains("x-request-id"));
}

#[test]
fn a_method_or_a_header_beyond_the_lists_is_refused() {
    let policy = policy(serde_json::json!({
        "origins": ["https://app.example"], "methods": ["POST"], "headers": ["Authorization", "content-type"], "max_age": "1h"
    }));
    let origin = b"https://app.example";
    let granted = policy.preflight(origin, b"POST", Some(b"content-type")).unwrap();
    assert_eq!(get(&granted, "access-control-allow-headers"), Some("authorization, content-type"));
    assert_eq!(get(&granted, "access-control-max-age"), Some("3600"));
    assert!(policy.preflight(origin, b"DELETE", None).is_none());
    assert!(policy.preflight(origin, b"post", None).is_none());
    assert!(policy.preflight(origin, b"POST", Some(b"content-type, x-evil")).is_none());
    assert!(policy.preflight(origin, b"POST", Some(b"bad name")).is_none());
    assert_eq!(get(&policy.refused(), "access-control-allow-origin"), None);
}

#[test]
fn asked_headers_are_sent_back_only_as_names() {
    let policy = policy(serde_json::json!({ "origins": ["*"] }));
    let granted = policy.preflight(b"https://a.example", b"GET", Some(b" X-One ,,x-two")).unwrap();
    assert_eq!(get(&granted, "access-control-allow-headers"), Some("x-one, x-two"));
    assert!(policy.preflight(b"https://a.example", b"GET", Some(b"x-one\r\nset-cookie: a=b")).is_none());
}

#[test]
fn a_wildcard_with_credentials_is_a_config_error() {
    let error = refusal(serde_json::json!({ "origins": ["*"], "credentials": true }));
    assert_eq!(error.path, "routes[0].filters.cors.credentials");
    assert!(error.hint.is_some());
}

#[test]
fn settings_that_cannot_mean_anything_are_config_errors_with_their_place() {
    let cases = [
        (serde_json::json!({}), "origins"),
        (serde_json::json!({ "origins": ["*", "https://a.example"] }), "origins"),
        (serde_json::json!({ "origins": ["app.example"] }), "origins[0]"),
        (serde_json::json!({ "origins": ["https://a.example", "https://a.example/"] }), "origins[1]"),
        (serde_json::json!({ "origins": ["https://*.example"] }), "origins[0]"),
        (serde_json::json!({ "origins": ["null"] }), "origins[0]"),
        (serde_json::json!({ "origins": ["https://a.example:x"] }), "origins[0]"),
        (serde_json::json!({ "origins": ["https://:443"] }), "origins[0]"),
        (serde_json::json!({ "origins": ["https://::1"] }), "origins[0]"),
        (serde_json::json!({ "origins": ["https://a@b.example"] }), "origins[0]"),
        (serde_json::json!({ "origins": ["*"], "methods": ["get"] }), "methods[0]"),
        (serde_json::json!({ "origins": ["*"], "headers": ["*", "a"] }), "headers[0]"),
        (serde_json::json!({ "origins": ["*"], "expose": ["a b"] }), "expose[0]"),
    ];
    for (json, field) in cases {
        assert_eq!(refusal(json.clone()).path, format!("routes[0].filters.cors.{field}"), "{json}");
    }
    assert!(serde_json::from_value::<Cors>(serde_json::json!({ "origin": ["*"] })).is_err());
}

#[test]
fn an_origin_is_compared_as_browsers_write_it() {
    let policy =
        policy(serde_json::json!({ "origins": ["HTTPS://App.Example:443", "http://[::1]:80", "tauri://localhost"] }));
    for origin in ["https://app.example", "http://[::1]", "tauri://localhost"] {
        let headers = policy.response(Some(origin.as_bytes()));
        assert_eq!(get(&headers, "access-control-allow-origin"), Some(origin));
    }
}
