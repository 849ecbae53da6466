//! A worker without a model: it speaks OpenAI's protocol and answers at once, always the same.

use std::convert::Infallible;
use std::sync::Arc;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::serve::ListenerExt;
use futures::stream;
use serde::Deserialize;
use serde_json::json;
use tokio::net::TcpListener;

use super::MODEL;

/// What routers ask a worker about itself; one answer serves all of them.
const ABOUT: &str = r#"{"object":"list","data":[{"id":"bench","object":"model"}],"status":"ok",
"model_path":"bench","served_model_name":"bench","max_total_num_tokens":1000000}"#;

/// The answer, in both forms.
#[derive(Debug)]
pub(super) struct Script {
    /// One server-sent event a token, and the last two.
    events: Vec<Bytes>,
    /// The answer of a request that does not stream.
    whole: Bytes,
}

#[derive(Deserialize)]
struct Asked {
    #[serde(default)]
    stream: bool,
}

impl Script {
    /// Streams answer `streamed`, one event a token; others get `whole`.
    pub(super) fn new(streamed: &[String], whole: &[String]) -> Self {
        let head = r#"{"id":"chatcmpl-bench","object":"chat.completion.chunk","created":1,"model":"bench","choices":"#;
        let chunk = |delta: serde_json::Value, reason: Option<&str>| {
            let choice =
                json!([{"index": 0, "delta": delta, "logprobs": null, "finish_reason": reason}]);
            Bytes::from(format!("data: {head}{choice}}}\n\n"))
        };
        let mut events: Vec<Bytes> =
            streamed.iter().map(|text| chunk(json!({"content": text}), None)).collect();
        events.push(chunk(json!({}), Some("length")));
        events.push(Bytes::from_static(b"data: [DONE]\n\n"));
        let message = json!({"role": "assistant", "content": whole.concat()});
        let usage = json!({"prompt_tokens": 1, "completion_tokens": whole.len(),
            "total_tokens": whole.len() + 1});
        let body = json!({"id": "chatcmpl-bench", "object": "chat.completion", "created": 1,
            "model": MODEL, "usage": usage,
            "choices": [{"index": 0, "message": message, "finish_reason": "length"}]});
        Self { events, whole: Bytes::from(body.to_string()) }
    }
}

/// Serves `script` on `listener` for as long as the future is polled.
pub(super) async fn serve(listener: TcpListener, script: Arc<Script>) {
    let app = Router::new()
        .route("/v1/chat/completions", post(answer))
        .fallback(get(|| async { ([(header::CONTENT_TYPE, "application/json")], ABOUT) }))
        .with_state(script);
    let listener = listener.tap_io(|stream| {
        let _ = stream.set_nodelay(true);
    });
    // Ends only with an error of the listener, which whoever asks next sees.
    let _ = axum::serve(listener, app).await;
}

async fn answer(State(script): State<Arc<Script>>, body: Bytes) -> Response {
    let Ok(asked) = serde_json::from_slice::<Asked>(&body) else {
        return axum::http::StatusCode::BAD_REQUEST.into_response();
    };
    if !asked.stream {
        return ([(header::CONTENT_TYPE, "application/json")], script.whole.clone())
            .into_response();
    }
    let events = script.events.clone().into_iter().map(Ok::<_, Infallible>);
    let mut response = Response::new(Body::from_stream(stream::iter(events)));
    let kind = HeaderValue::from_static("text/event-stream");
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    response
}
