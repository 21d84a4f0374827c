//! Answers made once and given to everybody: a node that costs almost nothing, for measuring what stands before it.

use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use futures::stream;
use http::Response;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use serde_json::json;

use super::fault::Plan;
use crate::serve::Reply;

pub(crate) struct Canned {
    whole: Bytes,
    chunks: Vec<Bytes>,
    gap: Duration,
}

const ID: &str = "chatcmpl-00000000000000000000000000000000";

impl Canned {
    /// A plain answer of about `bytes` bytes, and a stream of `chunks` content chunks, `gap` apart.
    pub(crate) fn new(model: &str, bytes: usize, chunks: usize, gap: Duration) -> Self {
        let answer = |text: &str| {
            json!({"id": ID, "object": "chat.completion", "created": 1, "model": model, "system_fingerprint": "canned",
                "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "logprobs": null,
                    "finish_reason": "stop"}],
                "usage": {"prompt_tokens": 100, "completion_tokens": chunks, "total_tokens": 100 + chunks}})
            .to_string()
        };
        let filler = "word ".repeat(bytes);
        let text = filler.get(..bytes.saturating_sub(answer("").len())).unwrap_or_default();
        let event = |choices: serde_json::Value, usage: serde_json::Value| {
            let mut chunk = json!({"id": ID, "object": "chat.completion.chunk", "created": 1, "model": model,
                "system_fingerprint": "canned", "choices": choices});
            if let Some(chunk) = chunk.as_object_mut() {
                chunk.insert("usage".to_owned(), usage);
            }
            Bytes::from(Plan::default().event(chunk.to_string().as_bytes()))
        };
        let delta = |delta: serde_json::Value, finish: Option<&str>| {
            let choice = json!([{"index": 0, "delta": delta, "logprobs": null, "finish_reason": finish}]);
            event(choice, serde_json::Value::Null)
        };
        let mut events = vec![delta(json!({"role": "assistant", "content": ""}), None)];
        events.extend(std::iter::repeat_n(delta(json!({"content": " word"}), None), chunks));
        events.push(delta(json!({}), Some("stop")));
        let usage = json!({"prompt_tokens": 100, "completion_tokens": chunks, "total_tokens": 100 + chunks});
        events.push(event(json!([]), usage));
        events.push(Bytes::from_static(b"data: [DONE]\n\n"));
        Self { whole: Bytes::from(answer(text)), chunks: events, gap }
    }

    pub(crate) async fn answer(&self, body: Incoming) -> Response<Reply> {
        let body = body.collect().await.map(http_body_util::Collected::to_bytes).unwrap_or_default();
        let stream_asked = [&br#""stream":true"#[..], br#""stream": true"#]
            .iter()
            .any(|asked| body.windows(asked.len()).any(|window| window == *asked));
        if !stream_asked {
            let mut response = Response::new(Reply::Whole(Some(self.whole.clone()), None));
            let json = http::HeaderValue::from_static("application/json");
            response.headers_mut().insert(http::header::CONTENT_TYPE, json);
            return response;
        }
        let gap = self.gap;
        let events = stream::iter(self.chunks.clone()).then(move |chunk| async move {
            // Even without a gap each event leaves in a write of its own.
            if gap.is_zero() {
                tokio::task::yield_now().await;
            } else {
                tokio::time::sleep(gap).await;
            }
            chunk
        });
        Reply::stream("text/event-stream; charset=utf-8", events.boxed())
    }
}
