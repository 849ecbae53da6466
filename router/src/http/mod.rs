//! The HTTP door.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::body::Body;
use axum::extract::{Path, Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use bytes::{Bytes, BytesMut};
use futures::{StreamExt as _, stream};
use headstart_proto::{Error, ErrorCode};

use crate::admission::Caller;
use crate::ask::{Ask, PRIORITY_HEADER};
use crate::generate::{Core, Generation};
use crate::openai::request::{Delivery, Format, parse};
use crate::openai::response::{Collector, ErrorBody, model_body, models_body};
use crate::openai::stream::SseWriter;
use crate::outbox::Event;

const JSON: HeaderValue = HeaderValue::from_static("application/json");
const EVENT_STREAM: HeaderValue = HeaderValue::from_static("text/event-stream; charset=utf-8");

/// Bytes beyond the body's bound that are read for the sake of a clear answer.
const THROWN_BYTES_MAX: usize = 64 << 20;

/// What the handlers share.
#[derive(Clone)]
struct Door {
    core: Arc<Core>,
    /// Seconds since 1970.
    started: u64,
}

/// Every path of the door.
pub(crate) fn router(core: Arc<Core>) -> Router {
    let started = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |t| t.as_secs());
    Router::new()
        .route("/v1/chat/completions", post(chat))
        .route("/v1/completions", post(completion))
        .route("/v1/models", get(models))
        .route("/v1/models/{*id}", get(model))
        .route("/health", get(|| async { "ok\n" }))
        .route("/ready", get(ready))
        .route("/metrics", get(metrics))
        .fallback(not_found)
        .method_not_allowed_fallback(wrong_method)
        .with_state(Door { core, started })
}

/// An error on its way out.
struct Refusal(Error);

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        Self(error)
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let error = self.0;
        let status = StatusCode::from_u16(error.code.http_status())
            .unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let body = serde_json::to_vec(&ErrorBody::new(&error)).unwrap_or_default();
        let mut response = (status, [(header::CONTENT_TYPE, JSON)], body).into_response();
        if let Some(seconds) = error.retry_after_secs() {
            response.headers_mut().insert(header::RETRY_AFTER, seconds.into());
        }
        response
    }
}

async fn chat(State(door): State<Door>, request: Request) -> Result<Response, Refusal> {
    generate(door.core, Format::Chat, request).await
}

async fn completion(State(door): State<Door>, request: Request) -> Result<Response, Refusal> {
    generate(door.core, Format::Completion, request).await
}

async fn generate(core: Arc<Core>, format: Format, request: Request) -> Result<Response, Refusal> {
    let parsed = read(&core, format, request).await;
    let (caller, ask, delivery) =
        parsed.inspect_err(|error| core.metrics.ended(Some(error.code)))?;
    let logprobs = ask.top_logprobs.is_some();
    let generation = core.generate(ask, caller).await?;
    match delivery.stream {
        true => streamed(generation.spawned(), delivery, logprobs).await,
        false => whole(generation, delivery, logprobs).await,
    }
}

/// Who asks, for what, and how it is to be delivered.
async fn read(
    core: &Core,
    format: Format,
    request: Request,
) -> Result<(Caller, Ask, Delivery), Error> {
    let caller = caller(core, request.headers());
    let body = read_body(core, request).await?;
    let (ask, delivery) = parse(format, &body)?;
    Ok((caller?, ask, delivery))
}

fn caller(core: &Core, headers: &HeaderMap) -> Result<Caller, Error> {
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    core.caller(text("authorization"), text(PRIORITY_HEADER))
}

/// Reads the body, within its bounds of size and time.
async fn read_body(core: &Core, request: Request) -> Result<Bytes, Error> {
    let body = collect(request.into_body(), core.options.body_bytes_max);
    tokio::time::timeout(core.options.read_timeout, body).await.unwrap_or_else(|_| {
        let message = format!("the body did not arrive within {:?}", core.options.read_timeout);
        Err(Error::new(ErrorCode::DeadlineExceeded, message))
    })
}

/// Collects a body. What exceeds `bytes_max` is read and thrown away, up to a bound: most clients
/// look for an answer only when all of their body is sent.
async fn collect(body: Body, bytes_max: usize) -> Result<Bytes, Error> {
    let mut pieces = body.into_data_stream();
    let mut kept = BytesMut::new();
    let mut length = 0;
    while let Some(piece) = pieces.next().await {
        let piece = piece.map_err(|error| {
            Error::new(ErrorCode::InvalidArgument, format!("read the body: {error}"))
        })?;
        length += piece.len();
        if length <= bytes_max {
            kept.extend_from_slice(&piece);
        } else if length > bytes_max.saturating_add(THROWN_BYTES_MAX) {
            break;
        }
    }
    if length > bytes_max {
        let message = format!("the body must be at most {bytes_max} bytes");
        return Err(Error::new(ErrorCode::TooLarge, message));
    }
    Ok(kept.freeze())
}

async fn whole(
    mut generation: Generation,
    delivery: Delivery,
    logprobs: bool,
) -> Result<Response, Refusal> {
    let mut collector = Collector::new(generation.head.choices);
    while let Some(events) = generation.recv().await {
        for event in events {
            collector.push(event)?;
        }
    }
    let body = collector.body(&generation.head, delivery, logprobs)?;
    Ok(([(header::CONTENT_TYPE, JSON)], body).into_response())
}

/// Streams once there is something to stream: what fails before is an ordinary error response.
async fn streamed(
    mut generation: Generation,
    delivery: Delivery,
    logprobs: bool,
) -> Result<Response, Refusal> {
    let mut first = generation
        .recv()
        .await
        .ok_or_else(|| Error::internal("a request ended without its last event"))?;
    if let Some(Event::Failed(_)) = first.front()
        && let Some(Event::Failed(error)) = first.pop_front()
    {
        return Err(error.into());
    }
    let writer = SseWriter::new(generation.head.clone(), delivery, logprobs);
    let live = Live { generation, writer, waiting: Some(first) };
    let chunks = stream::unfold(Some(live), |live| async { live?.next().await });
    let headers = [
        (header::CONTENT_TYPE, EVENT_STREAM),
        (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
        (header::HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no")),
    ];
    Ok((headers, Body::from_stream(chunks)).into_response())
}

/// A response that is being streamed. hyper drops it when the client is gone, and the request with it.
struct Live {
    generation: Generation,
    writer: SseWriter,
    /// Events that were received and not written.
    waiting: Option<VecDeque<Event>>,
}

impl Live {
    /// The next piece of the body, never empty, and what goes on after it.
    async fn next(mut self) -> Option<(Result<Bytes, Infallible>, Option<Self>)> {
        let mut out = Vec::with_capacity(512);
        loop {
            let events = match self.waiting.take() {
                Some(events) => Some(events),
                None => self.generation.recv().await,
            };
            let Some(events) = events else {
                self.writer.end(&mut out);
                return (!out.is_empty()).then(|| (Ok(out.into()), None));
            };
            for event in &events {
                self.writer.write(event, &mut out);
            }
            if !out.is_empty() {
                return Some((Ok(out.into()), Some(self)));
            }
        }
    }
}

async fn models(
    State(door): State<Door>,
    headers: HeaderMap,
) -> Result<impl IntoResponse, Refusal> {
    caller(&door.core, &headers)?;
    Ok(([(header::CONTENT_TYPE, JSON)], models_body(&door.core.models(), door.started)))
}

async fn model(
    State(door): State<Door>,
    headers: HeaderMap,
    Path(id): Path<String>,
) -> Result<impl IntoResponse, Refusal> {
    caller(&door.core, &headers)?;
    let models = door.core.models();
    let entry = models.iter().find(|entry| entry.id == id).ok_or_else(|| {
        let shown = &id[..id.floor_char_boundary(80)];
        let message = format!("there is no model {shown:?}");
        Error::new(ErrorCode::UnknownModel, message).with_field("model")
    })?;
    Ok(([(header::CONTENT_TYPE, JSON)], model_body(entry, door.started)))
}

async fn ready(State(door): State<Door>) -> impl IntoResponse {
    match door.core.is_ready() {
        true => (StatusCode::OK, "ready\n"),
        false if door.core.draining.is_cancelled() => {
            (StatusCode::SERVICE_UNAVAILABLE, "draining\n")
        }
        false => (StatusCode::SERVICE_UNAVAILABLE, "no base or no drafter is up\n"),
    }
}

async fn metrics(State(door): State<Door>) -> impl IntoResponse {
    use headstart_service::metrics::{CONTENT_TYPE, render};
    door.core.measure_nodes();
    ([(header::CONTENT_TYPE, CONTENT_TYPE)], render())
}

async fn not_found(request: Request) -> Refusal {
    let path = request.uri().path();
    let shown = &path[..path.floor_char_boundary(80)];
    Refusal(Error::new(ErrorCode::NotFound, format!("there is nothing at {shown}")))
}

async fn wrong_method(request: Request) -> Response {
    let message = format!("{} is not allowed here", request.method());
    let refusal = Refusal(Error::new(ErrorCode::InvalidArgument, message));
    let mut response = refusal.into_response();
    *response.status_mut() = StatusCode::METHOD_NOT_ALLOWED;
    response
}
