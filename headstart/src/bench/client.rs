//! An HTTP client for measuring: one kept connection, and every event of a stream is looked at the
//! moment it comes.

use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, StatusCode, header};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_util::task::AbortOnDropHandle;

/// A server may take so long to accept a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// A body, or one event of a stream, is no longer than this.
const BODY_BYTES_MAX: usize = 16 << 20;
/// Of a refusal's body, so much is shown.
const SHOWN_CHARS_MAX: usize = 400;

/// Why a call gave no answer.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
pub(super) enum CallError {
    /// The server refused it: the status, and the code in the OpenAI error body.
    #[error("{status} {code}")]
    Refused {
        /// The HTTP status.
        status: u16,
        /// `error.code`, or else `error.type`; empty if the body says neither.
        code: String,
        /// The body's beginning.
        body: String,
    },
    /// An error event inside a stream.
    #[error("failed in mid-stream: {0}")]
    Failed(String),
    /// The connection failed, or what came over it was no answer.
    #[error("{0}")]
    Broken(String),
    /// It took too long.
    #[error("no answer in time")]
    TimedOut,
}

/// An OpenAI error body, as far as it is counted.
#[derive(Deserialize, Default)]
struct ErrorBody {
    #[serde(default)]
    error: ErrorFields,
}

#[derive(Deserialize, Default)]
struct ErrorFields {
    code: Option<serde_json::Value>,
    r#type: Option<String>,
}

/// The code that an OpenAI error body tells.
pub(super) fn error_code(body: &[u8]) -> String {
    let fields = serde_json::from_slice::<ErrorBody>(body).unwrap_or_default().error;
    match fields.code {
        Some(serde_json::Value::String(code)) => code,
        Some(serde_json::Value::Number(code)) => code.to_string(),
        _ => fields.r#type.unwrap_or_default(),
    }
}

/// A connection to one server, opened anew when the server has closed it.
pub(super) struct Client {
    /// `host:port`
    address: String,
    open: Option<Open>,
}

struct Open {
    sender: SendRequest<Full<Bytes>>,
    _driver: AbortOnDropHandle<()>,
}

impl Client {
    /// A client of the server at `address` (`host:port`). Nothing is opened yet.
    pub(super) fn new(address: impl Into<String>) -> Self {
        Self { address: address.into(), open: None }
    }

    /// `GET path`, the whole body.
    ///
    /// # Errors
    /// [`CallError`]; a status other than 2xx is one.
    pub(super) async fn get(&mut self, path: &str, within: Duration) -> Result<Bytes, CallError> {
        in_time(within, async { whole(self.send(Method::GET, path, Bytes::new()).await?).await })
            .await
    }

    /// `POST path` with a JSON body, the whole answer.
    ///
    /// # Errors
    /// [`CallError`]; a status other than 2xx is one.
    pub(super) async fn post(
        &mut self,
        path: &str,
        body: Bytes,
        within: Duration,
    ) -> Result<Bytes, CallError> {
        in_time(within, async { whole(self.send(Method::POST, path, body).await?).await }).await
    }

    /// `POST path` with a JSON body; `each` gets the data of every server-sent event but `[DONE]`.
    ///
    /// # Errors
    /// [`CallError`]; so is a stream that ends without `[DONE]`.
    pub(super) async fn stream(
        &mut self,
        path: &str,
        body: Bytes,
        within: Duration,
        each: &mut (dyn FnMut(&[u8]) + Send),
    ) -> Result<(), CallError> {
        in_time(within, async {
            let mut body = self.send(Method::POST, path, body).await?;
            let mut events = Events::default();
            while let Some(frame) = body.frame().await {
                if let Ok(data) = frame.map_err(broken)?.into_data() {
                    events.push(&data, each)?;
                }
            }
            match events.done {
                true => Ok(()),
                false => Err(CallError::Broken("the stream ended without [DONE]".to_owned())),
            }
        })
        .await
    }

    /// Sends a request; the body of a good answer.
    async fn send(
        &mut self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<Incoming, CallError> {
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, &self.address)
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(body))
            .map_err(broken)?;
        let response = self.sender().await?.send_request(request).await.map_err(broken)?;
        let status = response.status();
        if status.is_success() {
            return Ok(response.into_body());
        }
        let body = whole(response.into_body()).await.unwrap_or_default();
        let (status, code) = (StatusCode::as_u16(&status), error_code(&body));
        let body = String::from_utf8_lossy(&body).chars().take(SHOWN_CHARS_MAX).collect();
        Err(CallError::Refused { status, code, body })
    }

    async fn sender(&mut self) -> Result<&mut SendRequest<Full<Bytes>>, CallError> {
        let usable = match &mut self.open {
            Some(open) => open.sender.ready().await.is_ok(),
            None => false,
        };
        if !usable {
            self.open = None;
            self.open = Some(Open::new(&self.address).await?);
        }
        match &mut self.open {
            Some(open) => Ok(&mut open.sender),
            None => Err(CallError::Broken("no connection".to_owned())),
        }
    }
}

impl Open {
    async fn new(address: &str) -> Result<Self, CallError> {
        let stream = in_time(CONNECT_TIMEOUT, async {
            TcpStream::connect(address)
                .await
                .map_err(|error| CallError::Broken(format!("cannot reach {address}: {error}")))
        })
        .await?;
        stream.set_nodelay(true).map_err(broken)?;
        let (sender, driver) = http1::handshake(TokioIo::new(stream)).await.map_err(broken)?;
        // How it ended is told to whoever waits for an answer.
        let driver = tokio::spawn(async move { drop(driver.await) });
        Ok(Self { sender, _driver: AbortOnDropHandle::new(driver) })
    }
}

async fn whole(mut body: Incoming) -> Result<Bytes, CallError> {
    let mut all = Vec::new();
    while let Some(frame) = body.frame().await {
        if let Ok(data) = frame.map_err(broken)?.into_data() {
            if all.len() + data.len() > BODY_BYTES_MAX {
                return Err(CallError::Broken("a body without an end".to_owned()));
            }
            all.extend_from_slice(&data);
        }
    }
    Ok(all.into())
}

async fn in_time<T>(
    within: Duration,
    call: impl Future<Output = Result<T, CallError>>,
) -> Result<T, CallError> {
    timeout(within, call).await.unwrap_or(Err(CallError::TimedOut))
}

fn broken(error: impl std::fmt::Display) -> CallError {
    CallError::Broken(error.to_string())
}

/// Cuts a stream of server-sent events into the data of each.
#[derive(Debug, Default)]
struct Events {
    /// The beginning of an event whose end has not come.
    partial: Vec<u8>,
    done: bool,
}

impl Events {
    fn push(
        &mut self,
        bytes: &[u8],
        each: &mut (dyn FnMut(&[u8]) + Send),
    ) -> Result<(), CallError> {
        // Most often whole events come, and nothing is copied.
        let mut rest = bytes;
        while let Some(end) = find_end(&self.partial, rest) {
            let (now, later) = rest.split_at(end);
            rest = later;
            if self.partial.is_empty() {
                self.event(now, each);
            } else {
                let mut event = std::mem::take(&mut self.partial);
                event.extend_from_slice(now);
                self.event(&event, each);
            }
        }
        if self.partial.len() + rest.len() > BODY_BYTES_MAX {
            return Err(CallError::Broken("an event without an end".to_owned()));
        }
        self.partial.extend_from_slice(rest);
        Ok(())
    }

    fn event(&mut self, event: &[u8], each: &mut (dyn FnMut(&[u8]) + Send)) {
        for line in event.split(|&byte| byte == b'\n') {
            let line = line.strip_suffix(b"\r").unwrap_or(line);
            let Some(data) = line.strip_prefix(b"data:") else { continue };
            let data = data.strip_prefix(b" ").unwrap_or(data);
            match data {
                b"[DONE]" => self.done = true,
                data => each(data),
            }
        }
    }
}

/// Where in `rest` the event ends that `partial` begins: behind its empty line.
fn find_end(partial: &[u8], rest: &[u8]) -> Option<usize> {
    let mut after_newline = partial.last() == Some(&b'\n');
    for (at, &byte) in rest.iter().enumerate() {
        match byte {
            b'\n' if after_newline => return Some(at + 1),
            b'\n' => after_newline = true,
            b'\r' => {}
            _ => after_newline = false,
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut(pieces: &[&[u8]]) -> (Vec<String>, bool) {
        let (mut events, mut found) = (Events::default(), Vec::new());
        for piece in pieces {
            let mut each = |data: &[u8]| found.push(String::from_utf8_lossy(data).into_owned());
            events.push(piece, &mut each).unwrap();
        }
        (found, events.done)
    }

    #[test]
    fn events_are_the_same_however_they_are_cut() {
        let stream =
            b"data: {\"a\": 1}\n\n: a comment\n\ndata: two\r\n\r\ndata:three\n\ndata: [DONE]\n\n";
        let expected = vec!["{\"a\": 1}".to_owned(), "two".to_owned(), "three".to_owned()];
        assert_eq!(cut(&[stream]), (expected.clone(), true));
        for at in 0..stream.len() {
            let (left, right) = stream.split_at(at);
            assert_eq!(cut(&[left, right]), (expected.clone(), true), "cut at {at}");
        }
        let bytes: Vec<&[u8]> = stream.chunks(1).collect();
        assert_eq!(cut(&bytes), (expected, true));
        assert_eq!(cut(&[b"data: one"]), (vec![], false));
    }

    #[test]
    fn codes_of_errors() {
        let body = br#"{"error": {"message": "m", "type": "t", "code": "model_not_found"}}"#;
        assert_eq!(error_code(body), "model_not_found");
        assert_eq!(error_code(br#"{"error": {"type": "t", "code": null}}"#), "t");
        assert_eq!(error_code(br#"{"error": {"code": 404}}"#), "404");
        assert_eq!(error_code(b"not json"), "");
    }
}
