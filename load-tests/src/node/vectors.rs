//! Embeddings and reranking: numbers that depend on the text alone.

use serde::Deserialize;
use serde_json::{Value, json};
use xxhash_rust::xxh3::xxh3_64;

use super::ask::text_of;
use super::fail::Refusal;
use super::kv::tokens_of;
use super::words::Numbers;

const DIMENSIONS: usize = 64;

/// An answer that is not generated, with the tokens it cost.
pub(crate) struct Computed {
    pub(crate) body: Value,
    pub(crate) tokens: usize,
}

#[derive(Deserialize)]
pub(crate) struct Embeddings {
    pub(crate) model: String,
    input: Value,
    encoding_format: Option<String>,
    dimensions: Option<usize>,
}

impl Embeddings {
    pub(crate) fn answer(&self) -> Result<Computed, Refusal> {
        let inputs: Vec<String> = match &self.input {
            Value::String(text) => vec![text.clone()],
            // A list of token numbers is one input.
            Value::Array(parts) if parts.iter().all(Value::is_number) && !parts.is_empty() => {
                vec![self.input.to_string()]
            }
            Value::Array(parts) if !parts.is_empty() => parts.iter().map(text_of).collect(),
            _ => return Err(Refusal::invalid("`input` must be a text or a list.", Some("input"))),
        };
        let dimensions = self.dimensions.unwrap_or(DIMENSIONS);
        if !(1..=4096).contains(&dimensions) {
            return Err(Refusal::invalid("`dimensions` must be between 1 and 4096.", Some("dimensions")));
        }
        let base64 = match self.encoding_format.as_deref() {
            None | Some("float") => false,
            Some("base64") => true,
            Some(_) => {
                return Err(Refusal::invalid("`encoding_format` must be float or base64.", Some("encoding_format")));
            }
        };
        let tokens = inputs.iter().map(|text| tokens_of(text.len())).sum();
        let data: Vec<Value> = inputs
            .iter()
            .enumerate()
            .map(|(index, text)| {
                let floats = floats(text, dimensions);
                let embedding = if base64 {
                    let bytes: Vec<u8> = floats.iter().flat_map(|float| float.to_le_bytes()).collect();
                    Value::String(base64_of(&bytes))
                } else {
                    json!(floats)
                };
                json!({"object": "embedding", "index": index, "embedding": embedding})
            })
            .collect();
        let body = json!({
            "object": "list", "data": data, "model": self.model,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        });
        Ok(Computed { body, tokens })
    }
}

#[derive(Deserialize)]
pub(crate) struct Rerank {
    pub(crate) model: String,
    query: String,
    documents: Vec<Value>,
    top_n: Option<usize>,
    return_documents: Option<bool>,
}

impl Rerank {
    pub(crate) fn answer(&self, id: &str) -> Result<Computed, Refusal> {
        if self.documents.is_empty() {
            return Err(Refusal::invalid("`documents` must hold at least one document.", Some("documents")));
        }
        let texts: Vec<String> = self
            .documents
            .iter()
            .map(|document| document.get("text").map_or_else(|| text_of(document), text_of))
            .collect();
        let tokens = texts.iter().map(|text| tokens_of(text.len() + self.query.len())).sum();
        let mut scored: Vec<(usize, &String, f64)> =
            texts.iter().enumerate().map(|(index, text)| (index, text, relevance(&self.query, text))).collect();
        scored.sort_by(|a, b| b.2.total_cmp(&a.2).then(a.0.cmp(&b.0)));
        let with_text = self.return_documents.unwrap_or(true);
        let results: Vec<Value> = scored
            .into_iter()
            .take(self.top_n.filter(|n| *n > 0).unwrap_or(usize::MAX))
            .map(|(index, text, score)| match with_text {
                true => json!({"index": index, "document": {"text": text}, "relevance_score": score}),
                false => json!({"index": index, "relevance_score": score}),
            })
            .collect();
        let body = json!({"id": id, "model": self.model, "usage": {"total_tokens": tokens}, "results": results});
        Ok(Computed { body, tokens })
    }
}

/// The share of the query's words that a text holds, with a little of its own to tell equals apart.
fn relevance(query: &str, text: &str) -> f64 {
    let text_lower = text.to_lowercase();
    let words: Vec<String> = query.split_whitespace().map(str::to_lowercase).collect();
    let found = words.iter().filter(|word| text_lower.contains(word.as_str())).count();
    let share = found as f64 / words.len().max(1) as f64;
    let own = (xxh3_64(text.as_bytes()) % 1000) as f64 / 100_000.0;
    share.mul_add(0.98, own)
}

// A vector of length 1.
fn floats(text: &str, dimensions: usize) -> Vec<f32> {
    let mut numbers = Numbers::new(xxh3_64(text.as_bytes()));
    let raw: Vec<f64> = (0..dimensions).map(|_| (numbers.next() >> 11) as f64 / (1u64 << 52) as f64 - 1.0).collect();
    let length = raw.iter().map(|float| float * float).sum::<f64>().sqrt().max(f64::MIN_POSITIVE);
    raw.iter().map(|float| (float / length) as f32).collect()
}

fn base64_of(bytes: &[u8]) -> String {
    const SIGNS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for three in bytes.chunks(3) {
        let bits = three.iter().fold(0u32, |bits, byte| (bits << 8) | u32::from(*byte)) << (8 * (3 - three.len()));
        for sign in 0..4 {
            let at = (bits >> (18 - 6 * sign)) & 63;
            let known = sign <= three.len();
            text.push(if known { SIGNS.get(at as usize).map_or('=', |sign| char::from(*sign)) } else { '=' });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_that_of_the_rfc() {
        let pairs = [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foobar", "Zm9vYmFy")];
        for (plain, coded) in pairs {
            assert_eq!(base64_of(plain.as_bytes()), coded);
        }
    }

    #[test]
    fn a_vector_has_length_one_and_depends_on_the_text() {
        let a = floats("a", 64);
        let length: f32 = a.iter().map(|float| float * float).sum();
        assert!((length - 1.0).abs() < 1e-5, "{length}");
        assert_eq!(a, floats("a", 64));
        assert_ne!(a, floats("b", 64));
        assert!(a.iter().any(|float| *float < 0.0) && a.iter().any(|float| *float > 0.0));
    }

    #[test]
    fn a_document_that_holds_the_query_comes_first() {
        let rerank: Rerank = serde_json::from_value(json!({
            "model": "m", "query": "toll road", "documents": ["a river", "the Toll Road", {"text": "a road"}], "top_n": 2
        }))
        .unwrap();
        let answer = rerank.answer("rerank-1").unwrap();
        let order: Vec<u64> =
            answer.body["results"].as_array().unwrap().iter().map(|row| row["index"].as_u64().unwrap()).collect();
        assert_eq!(order, [1, 2]);
        assert_eq!(answer.body["usage"]["total_tokens"], answer.tokens);
    }
}
