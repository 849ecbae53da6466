//! A client that watches its stream closely: every frame with its time, every gap, every way it
//! can end.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use futures::stream::{self, BoxStream, StreamExt};
use headstart_proto::error::ERROR_TRAILER;
use headstart_proto::v1::{self, generate_frame::Event, router_client::RouterClient};
use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tonic::Status;
use tonic::transport::Endpoint;

use super::requests::{Ask, Choice};

/// Until a connection to a router stands.
const CONNECT_WITHIN: Duration = Duration::from_secs(5);
/// A stream without a frame for so long is hung.
pub const HUNG_AFTER: Duration = Duration::from_secs(60);

/// One router's doors.
#[derive(Clone, Debug)]
pub struct Doors {
    /// The router's name.
    pub router: String,
    /// Where it serves HTTP.
    pub http: SocketAddr,
    /// Where it serves gRPC.
    pub grpc: SocketAddr,
}

/// Which door a client comes through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Door {
    /// HTTP with server-sent events.
    Http,
    /// gRPC.
    Grpc,
}

/// How a stream ended.
#[derive(Debug)]
pub enum End {
    /// With whole answers.
    Done(Vec<Choice>),
    /// With an error that says what it is.
    Error {
        /// Its code.
        code: String,
        /// Its text.
        message: String,
    },
    /// Nobody took the connection.
    Unreachable(String),
    /// The connection broke.
    Cut(String),
    /// Nothing came for [`HUNG_AFTER`].
    Hung,
    /// The client dropped it.
    Cancelled,
}

/// One stream, as its client saw it.
#[derive(Debug)]
pub struct Watched {
    /// How it ended.
    pub end: End,
    /// When it was asked for.
    pub asked: Instant,
    /// Every frame: when it came, after `asked`, and what it said.
    pub frames: Vec<(Duration, String)>,
    /// From `asked` to the first token.
    pub ttft: Option<Duration>,
    /// Longest time between two frames with tokens of one answer.
    pub gap_max: Duration,
}

enum Frame {
    Sse(Value),
    Grpc(v1::GenerateFrame),
    Over,
}

type Frames = BoxStream<'static, Result<Frame, End>>;

/// Asks, and watches until the end. `cancel_after` frames, the client goes away.
pub async fn watch(doors: &Doors, door: Door, ask: &Ask, cancel_after: Option<usize>) -> Watched {
    let mut watched = Watched {
        end: End::Hung,
        asked: Instant::now(),
        frames: Vec::new(),
        ttft: None,
        gap_max: Duration::ZERO,
    };
    let mut collecting = Collecting::new(ask.choices);
    watched.end = follow(doors, door, ask, cancel_after, &mut watched, &mut collecting).await;
    watched
}

async fn follow(
    doors: &Doors,
    door: Door,
    ask: &Ask,
    cancel_after: Option<usize>,
    watched: &mut Watched,
    collecting: &mut Collecting,
) -> End {
    let opening = async {
        match door {
            Door::Http => open_http(doors.http, ask).await,
            Door::Grpc => open_grpc(doors.grpc, ask).await,
        }
    };
    let mut frames = match timeout(HUNG_AFTER, opening).await {
        Ok(Ok(frames)) => frames,
        Ok(Err(end)) => return end,
        Err(_) => return End::Hung,
    };
    loop {
        if cancel_after.is_some_and(|after| watched.frames.len() >= after) {
            return End::Cancelled;
        }
        let frame = match timeout(HUNG_AFTER, frames.next()).await {
            Ok(Some(Ok(frame))) => frame,
            Ok(Some(Err(end))) => return end,
            Ok(None) => return End::Cut("it ended without its last frame".into()),
            Err(_) => return End::Hung,
        };
        let taken = match frame {
            Frame::Over => return collecting.over(),
            Frame::Sse(event) => {
                watched.frames.push((watched.asked.elapsed(), event.to_string()));
                collecting.sse(&event)
            }
            Frame::Grpc(frame) => {
                watched.frames.push((watched.asked.elapsed(), format!("{frame:?}")));
                collecting.grpc(frame)
            }
        };
        match taken {
            Ok(Some(choice)) => watched.progressed(collecting, choice),
            Ok(None) => {}
            Err(end) => return end,
        }
    }
}

impl Watched {
    /// Tokens of this choice came.
    fn progressed(&mut self, collecting: &mut Collecting, choice: usize) {
        let now = Instant::now();
        self.ttft.get_or_insert(now - self.asked);
        let Some(state) = collecting.choices.get_mut(choice) else { return };
        if let Some(last) = state.last {
            self.gap_max = self.gap_max.max(now - last);
        }
        state.last = Some(now);
    }
}

struct Collecting {
    choices: Vec<State>,
}

#[derive(Default)]
struct State {
    answer: Choice,
    last: Option<Instant>,
}

fn broken(what: impl Into<String>) -> End {
    End::Error { code: "malformed".into(), message: what.into() }
}

impl Collecting {
    fn new(choices: u32) -> Self {
        Self { choices: (0..choices).map(|_| State::default()).collect() }
    }

    fn over(&mut self) -> End {
        if self.choices.iter().any(|state| state.answer.reason.is_empty()) {
            return End::Cut("it ended without the end of every answer".into());
        }
        End::Done(self.choices.drain(..).map(|state| state.answer).collect())
    }

    fn state(&mut self, choice: u64) -> Result<(usize, &mut State), End> {
        let index = usize::try_from(choice).unwrap_or(usize::MAX);
        let state = self.choices.get_mut(index);
        state.map(|state| (index, state)).ok_or_else(|| broken(format!("choice {choice}")))
    }

    /// Takes an event; gives the choice whose tokens it brought.
    fn sse(&mut self, event: &Value) -> Result<Option<usize>, End> {
        if let Some(error) = event.get("error") {
            let text = |key: &str| error[key].as_str().unwrap_or_default().to_owned();
            return Err(End::Error { code: text("code"), message: text("message") });
        }
        let choice = &event["choices"][0];
        let (index, state) = self.state(choice["index"].as_u64().unwrap_or(u64::MAX))?;
        let answer = &mut state.answer;
        let ids = choice["token_ids"].as_array().map_or(&[][..], Vec::as_slice);
        let id = |id: &Value| id.as_u64().and_then(|id| u32::try_from(id).ok());
        answer.ids.extend(ids.iter().filter_map(id));
        if choice["source"] == "drafter" {
            answer.drafter_tokens += count(ids.len());
        }
        answer.text.push_str(choice["delta"]["content"].as_str().unwrap_or_default());
        for position in choice["logprobs"]["content"].as_array().into_iter().flatten() {
            let top = position["top_logprobs"].as_array().map_or(&[][..], Vec::as_slice);
            let all = std::iter::once(position).chain(top);
            answer.logprobs.extend(all.filter_map(|it| it["logprob"].as_f64()).map(|it| it as f32));
        }
        if let Some(reason) = choice["finish_reason"].as_str() {
            let summary = &event["headstart"];
            answer.reason = reason.to_owned();
            answer.switched = summary["switched"].as_bool().unwrap_or_default();
            answer.kept_tokens = count(summary["kept_tokens"].as_u64().unwrap_or_default());
        }
        Ok((!ids.is_empty()).then_some(index))
    }

    /// Takes a frame; gives the choice whose tokens it brought.
    fn grpc(&mut self, frame: v1::GenerateFrame) -> Result<Option<usize>, End> {
        let (index, state) = self.state(frame.choice.into())?;
        let answer = &mut state.answer;
        match frame.event {
            None => Err(broken("a frame without an event")),
            Some(Event::Started(_)) => Ok(None),
            Some(Event::Text(text)) => {
                // Positions are promised, so they are held to.
                if text.ids.is_empty() || frame.position == count(answer.ids.len()) {
                    answer.ids.extend(&text.ids);
                } else {
                    let (expected, found) = (answer.ids.len(), frame.position);
                    return Err(broken(format!("position {found}, expected {expected}")));
                }
                if text.source == i32::from(v1::Source::Drafter) {
                    answer.drafter_tokens += count(text.ids.len());
                }
                answer.text.push_str(&text.text);
                for position in &text.logprobs {
                    let all = position.token.iter().chain(&position.top);
                    answer.logprobs.extend(all.map(|it| it.logprob));
                }
                Ok((!text.ids.is_empty()).then_some(index))
            }
            Some(Event::Finished(finished)) => {
                answer.reason = match finished.reason() {
                    v1::FinishReason::Stop => "stop".into(),
                    v1::FinishReason::Length => "length".into(),
                    v1::FinishReason::Unspecified => return Err(broken("an end without a reason")),
                };
                let summary = finished.draft.unwrap_or_default();
                answer.switched = summary.switched;
                answer.kept_tokens = summary.kept_tokens;
                Ok(None)
            }
        }
    }
}

fn count<N: TryInto<u32>>(number: N) -> u32 {
    number.try_into().unwrap_or(u32::MAX)
}

async fn open_http(address: SocketAddr, ask: &Ask) -> Result<Frames, End> {
    let body = Bytes::from(ask.http().to_string());
    let request = hyper::Request::post("/v1/chat/completions")
        .header("host", address.to_string())
        .header("content-type", "application/json")
        .body(Full::new(body))
        .map_err(|error| broken(error.to_string()))?;
    let response = exchange(address, request).await?;
    let status = response.status();
    let body = response.into_body();
    if status != hyper::StatusCode::OK {
        let body = body.collect().await.map_err(|error| End::Cut(error.to_string()))?.to_bytes();
        let body: Value = serde_json::from_slice(&body).unwrap_or_default();
        let text = |key: &str| body["error"][key].as_str().unwrap_or_default().to_owned();
        return Err(End::Error { code: text("code"), message: text("message") });
    }
    let frames = stream::unfold((body, Vec::new()), |(mut body, mut buffer)| async move {
        let frame = next_sse(&mut body, &mut buffer).await?;
        Some((frame, (body, buffer)))
    });
    Ok(frames.boxed())
}

/// The next event of the stream; `None` at its end.
async fn next_sse(body: &mut Incoming, buffer: &mut Vec<u8>) -> Option<Result<Frame, End>> {
    loop {
        if let Some(end) = buffer.windows(2).position(|pair| pair == b"\n\n") {
            let event: Vec<u8> = buffer.drain(..end + 2).collect();
            let event = String::from_utf8_lossy(&event[..end]);
            match event.strip_prefix("data: ") {
                Some("[DONE]") => return Some(Ok(Frame::Over)),
                Some(data) => match serde_json::from_str(data) {
                    Ok(value) => return Some(Ok(Frame::Sse(value))),
                    Err(error) => return Some(Err(broken(format!("{error}: {data}")))),
                },
                None if event.starts_with(':') => continue,
                None => return Some(Err(broken(format!("not an event: {event}")))),
            }
        }
        match body.frame().await? {
            Ok(frame) => buffer.extend(frame.into_data().unwrap_or_default()),
            Err(error) => return Some(Err(End::Cut(error.to_string()))),
        }
    }
}

/// One HTTP exchange on a connection of its own.
async fn exchange(
    address: SocketAddr,
    request: hyper::Request<Full<Bytes>>,
) -> Result<hyper::Response<Incoming>, End> {
    let connecting = TcpStream::connect(address);
    let connection = match timeout(CONNECT_WITHIN, connecting).await {
        Ok(Ok(connection)) => connection,
        Ok(Err(error)) => return Err(End::Unreachable(error.to_string())),
        Err(_) => return Err(End::Unreachable("no connection in time".into())),
    };
    let cut = |error: hyper::Error| End::Cut(error.to_string());
    let io = TokioIo::new(connection);
    let (mut sender, connection) = hyper::client::conn::http1::handshake(io).await.map_err(cut)?;
    tokio::spawn(connection);
    sender.send_request(request).await.map_err(cut)
}

/// `GET path`: the status and the body.
///
/// # Errors
/// How the exchange ended instead.
pub async fn get(address: SocketAddr, path: &str) -> Result<(u16, String), End> {
    let request = hyper::Request::get(path)
        .header("host", address.to_string())
        .body(Full::default())
        .map_err(|error| broken(error.to_string()))?;
    let exchange = async {
        let response = exchange(address, request).await?;
        let status = response.status().as_u16();
        let body = response.into_body().collect().await;
        let body = body.map_err(|error| End::Cut(error.to_string()))?.to_bytes();
        Ok((status, String::from_utf8_lossy(&body).into_owned()))
    };
    timeout(CONNECT_WITHIN, exchange).await.unwrap_or(Err(End::Hung))
}

async fn open_grpc(address: SocketAddr, ask: &Ask) -> Result<Frames, End> {
    let endpoint = Endpoint::from_shared(format!("http://{address}"))
        .map_err(|error| broken(error.to_string()))?
        .connect_timeout(CONNECT_WITHIN);
    let channel =
        endpoint.connect().await.map_err(|error| End::Unreachable(format!("{error:?}")))?;
    let response = RouterClient::new(channel).generate(ask.grpc()).await;
    let frames = response.map_err(|status| ended_with(&status))?.into_inner();
    let frames = frames.map(|frame| match frame {
        Ok(frame) => Ok(Frame::Grpc(frame)),
        Err(status) => Err(ended_with(&status)),
    });
    Ok(frames.chain(stream::iter([Ok(Frame::Over)])).boxed())
}

/// A status that the router wrote carries its detail; any other one is a broken connection's.
fn ended_with(status: &Status) -> End {
    if status.metadata().get_bin(ERROR_TRAILER).is_none() {
        return End::Cut(format!("{:?}: {}", status.code(), status.message()));
    }
    let error = headstart_proto::Error::from_status(status);
    End::Error { code: error.code.code().to_owned(), message: error.message }
}
