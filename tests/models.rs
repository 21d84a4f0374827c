//! The list of models that a caller may use.

use std::collections::BTreeSet;

use crate::harness::{Answer, Conf, Gateway, WENDY};

async fn gateway() -> Gateway {
    let conf = Conf::new()
        .upstream("near", &["http://127.0.0.1:9"], "")
        .model("chat", &[("near", "qwen")], "aliases: [gpt-3.5-turbo]")
        .model("org/embed", &[("near", "e5")], "")
        .llm()
        .key("{ id: bob, key: bob-secret-key, tier: wide, models: [chat] }");
    Gateway::with(&conf).await
}

fn ids(answer: &Answer) -> BTreeSet<String> {
    let list = answer.json();
    assert_eq!(list["object"], "list");
    let models = list["data"].as_array().expect("data").clone();
    for model in &models {
        assert_eq!(model["object"], "model", "{model}");
        assert!(model["created"].is_u64() && model["owned_by"].is_string(), "{model}");
    }
    models.iter().map(|model| model["id"].as_str().expect("an id").to_owned()).collect()
}

#[tokio::test]
async fn the_list_is_in_openai_shape() {
    let gw = gateway().await;
    let answer = gw.get("/v1/models").key(WENDY).send().await.expect(200);
    assert_eq!(answer.header("content-type"), "application/json");
    let ids = ids(&answer);
    assert!(ids.contains("chat") && ids.contains("org/embed"), "{ids:?}");
    assert!(!ids.contains("qwen"), "names at the upstream are not told");
}

#[tokio::test]
async fn a_key_sees_only_what_it_may_use() {
    let gw = gateway().await;
    let ids = ids(&gw.get("/v1/models").key("bob-secret-key").send().await.expect(200));
    assert!(ids.contains("chat") && !ids.contains("org/embed"), "{ids:?}");
    assert_eq!(gw.get("/v1/models").send().await.refusal(), (401, "missing_api_key".into()));
    assert_eq!(gw.get("/v1/models").key("wrong").send().await.refusal(), (401, "invalid_api_key".into()));
}

#[tokio::test]
async fn one_model_is_told_by_its_id() {
    let gw = gateway().await;
    for id in ["chat", "org/embed", "org%2Fembed"] {
        let answer = gw.get(&format!("/v1/models/{id}")).key(WENDY).send().await.expect(200);
        assert_eq!(answer.json()["id"], id.replace("%2F", "/"));
        assert_eq!(answer.json()["object"], "model");
    }
    let unknown = gw.get("/v1/models/nothing").key(WENDY).send().await;
    assert_eq!(unknown.refusal(), (404, "model_not_found".into()));
    let (status, code) = gw.get("/v1/models/org/embed").key("bob-secret-key").send().await.refusal();
    assert!(
        matches!((status, code.as_str()), (403, "model_not_allowed") | (404, "model_not_found")),
        "{status} {code}"
    );
}

#[tokio::test]
async fn the_list_takes_no_other_method() {
    let gw = gateway().await;
    let answer = gw.post("/v1/models").key(WENDY).bytes("{}").send().await;
    assert_eq!(answer.refusal(), (405, "method_not_allowed".into()));
    assert!(answer.header("allow").contains("GET"));
}
