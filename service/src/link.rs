//! A connection to a node for calls whose request is one message, as the router makes them, straight
//! on the `h2` library: a call's head and message leave in one write, and no task stands between the
//! caller and the connection. Through tonic's channel a call passes four tasks and leaves in two writes,
//! each of which wakes the node. See `docs/adr/0015-lanes.md`.

use std::fmt;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use futures::future::{BoxFuture, FutureExt, Shared};
use h2::client::{Connection, SendRequest};
use h2::{Ping, PingPong, RecvStream};
use headstart_proto::Error;
use http::uri::{Authority, Scheme};
use http::{Request, Response, Uri};
use http_body::{Body, Frame};
use http_body_util::BodyExt;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, sleep_until, timeout};
use tonic::Status;

use crate::channel::KeepAlive;
use crate::net::{Dialer, Io};

/// What may be on its way on one stream, and on all streams of a connection, in bytes: more than a
/// node says at once, so that no answer waits for its window.
const STREAM_WINDOW: u32 = 2 << 20;
const CONNECTION_WINDOW: u32 = 8 << 20;
/// Largest header list that a node may answer with, in bytes.
const HEADER_BYTES_MAX: u32 = 32 << 10;

/// The way to one node. It connects with its first call, and again with the first call after the
/// connection broke. Clones share the connection, which lives on the runtime that its first call came
/// from; it is closed when the last clone and the last call are gone.
///
/// It is a client's transport for tonic's generated clients. Every failure that is not the node's own
/// word is [`tonic::Code::Unavailable`]: the connection cannot be had, it broke, or the node reset the
/// call.
#[derive(Clone)]
pub struct Link {
    node: Arc<Node>,
}

struct Node {
    authority: Authority,
    dialer: Dialer,
    connect_timeout: Duration,
    keep_alive: KeepAlive,
    /// The connection that stands or is being opened.
    opened: Mutex<Option<Opening>>,
}

/// A connection that is being opened, and what became of it: all who wait for it hear the same.
type Opening = Shared<BoxFuture<'static, Result<SendRequest<Bytes>, Status>>>;

impl Link {
    /// A way to `address` (`host:port`) on which a connection must stand within `connect_timeout`, and
    /// is given up as `keep_alive` says.
    ///
    /// # Errors
    /// When the address is malformed.
    pub fn new(
        dialer: &Dialer,
        address: &str,
        connect_timeout: Duration,
        keep_alive: KeepAlive,
    ) -> Result<Self, Error> {
        let authority: Authority = address.parse().map_err(|error| {
            Error::invalid("address", format!("expected host:port, found {address:?}: {error}"))
        })?;
        let (dialer, opened) = (dialer.clone(), Mutex::default());
        Ok(Self { node: Arc::new(Node { authority, dialer, connect_timeout, keep_alive, opened }) })
    }

    async fn call(self, request: Request<tonic::body::Body>) -> Result<Response<Answer>, Status> {
        let (mut head, body) = request.into_parts();
        let message = body.collect().await?.to_bytes();
        head.uri = self.node.uri(head.uri)?;
        head.version = http::Version::HTTP_2;
        let mut connection = self.node.connection().await?;
        let (answer, mut stream) = connection
            .send_request(Request::from_parts(head, ()), false)
            .map_err(|error| self.node.broke(&error))?;
        stream.send_data(message, true).map_err(|error| self.node.broke(&error))?;
        let answer = answer.await.map_err(|error| self.node.broke(&error))?;
        Ok(answer.map(|stream| Answer { stream, node: self.node, ended: false }))
    }
}

impl Node {
    /// A connection that takes a call: the one that stands, or a new one.
    async fn connection(self: &Arc<Self>) -> Result<SendRequest<Bytes>, Status> {
        loop {
            let (opening, is_new) = self.opening();
            let ready = match opening.clone().await {
                Ok(connection) => connection.ready().await.map_err(|error| self.broke(&error)),
                Err(status) => Err(status),
            };
            match ready {
                Ok(connection) => return Ok(connection),
                Err(status) => {
                    self.forget(&opening);
                    // One that stood may have broken long ago; what was opened for this call did not.
                    if is_new {
                        return Err(status);
                    }
                }
            }
        }
    }

    /// The connection that stands or is being opened; and whether it is opened for this call.
    fn opening(self: &Arc<Self>) -> (Opening, bool) {
        let mut opened = self.opened.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(opening) = &*opened {
            return (opening.clone(), opening.peek().is_none());
        }
        let (authority, dialer) = (self.authority.clone(), self.dialer.clone());
        let (connect_timeout, keep_alive) = (self.connect_timeout, self.keep_alive);
        // In a task, so that it goes on when who asked for it no longer waits.
        let task = tokio::spawn(async move {
            let opening = open(&dialer, authority.as_str(), keep_alive);
            let opened = timeout(connect_timeout, opening).await;
            opened.unwrap_or_else(|_| Err(format!("no connection within {connect_timeout:?}")))
        });
        let at = self.authority.clone();
        let opening = task.map(move |ended| {
            let cause = match ended {
                Ok(Ok(connection)) => return Ok(connection),
                Ok(Err(cause)) => cause,
                Err(error) => error.to_string(),
            };
            Err(Status::unavailable(format!("connect to {at}: {cause}")))
        });
        let opening = opening.boxed().shared();
        *opened = Some(opening.clone());
        (opening, true)
    }

    /// Lets the next call open another connection than this one.
    fn forget(&self, gone: &Opening) {
        let mut opened = self.opened.lock().unwrap_or_else(PoisonError::into_inner);
        if opened.as_ref().is_some_and(|opening| opening.ptr_eq(gone)) {
            *opened = None;
        }
    }

    /// Where a call goes, as HTTP/2 wants it: the generated clients know the path alone.
    fn uri(&self, uri: Uri) -> Result<Uri, Status> {
        let mut parts = uri.into_parts();
        parts.scheme = Some(Scheme::HTTP);
        parts.authority = Some(self.authority.clone());
        Uri::from_parts(parts).map_err(|error| Status::internal(error.to_string()))
    }

    fn broke(&self, error: &h2::Error) -> Status {
        Status::unavailable(format!("the call to {} broke: {error}", self.authority))
    }
}

impl tower::Service<Request<tonic::body::Body>> for Link {
    type Response = Response<Answer>;
    type Error = Status;
    type Future = BoxFuture<'static, Result<Response<Answer>, Status>>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), Status>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<tonic::body::Body>) -> Self::Future {
        Box::pin(self.clone().call(request))
    }
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Link").field("address", &self.node.authority).finish_non_exhaustive()
    }
}

/// What a node answers. Dropping it before its end cancels the call at the node.
pub struct Answer {
    stream: RecvStream,
    node: Arc<Node>,
    /// No data comes any more; trailers may.
    ended: bool,
}

impl Body for Answer {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if !self.ended {
            match ready!(self.stream.poll_data(cx)) {
                Some(Ok(data)) => {
                    // The window of a stream that is over needs no more room.
                    let _ = self.stream.flow_control().release_capacity(data.len());
                    return Poll::Ready(Some(Ok(Frame::data(data))));
                }
                Some(Err(error)) => {
                    self.ended = true;
                    return Poll::Ready(Some(Err(self.node.broke(&error))));
                }
                None => self.ended = true,
            }
        }
        match ready!(self.stream.poll_trailers(cx)) {
            Ok(trailers) => Poll::Ready(trailers.map(|trailers| Ok(Frame::trailers(trailers)))),
            Err(error) => Poll::Ready(Some(Err(self.node.broke(&error)))),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.stream.is_end_stream()
    }
}

impl fmt::Debug for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Answer").field("from", &self.node.authority).finish_non_exhaustive()
    }
}

/// Opens a connection and leaves a task behind that drives it.
async fn open(
    dialer: &Dialer,
    address: &str,
    keep_alive: KeepAlive,
) -> Result<SendRequest<Bytes>, String> {
    let stream = dialer.dial(address).await.map_err(|error| error.to_string())?;
    let heard = Heard::now();
    let stream = Listened { stream, heard: heard.clone() };
    let (connection, mut driver) = h2::client::Builder::new()
        .enable_push(false)
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_header_list_size(HEADER_BYTES_MAX)
        .handshake::<_, Bytes>(stream)
        .await
        .map_err(|error| error.to_string())?;
    let pings = driver.ping_pong();
    tokio::spawn(async move {
        let Some(pings) = pings else { return };
        drive(driver, pings, heard, keep_alive).await;
    });
    Ok(connection)
}

/// Carries a connection until it ends, or its peer is silent for too long; then its calls break.
async fn drive(
    connection: Connection<Listened, Bytes>,
    pings: PingPong,
    heard: Heard,
    keep_alive: KeepAlive,
) {
    tokio::select! {
        biased;
        ended = connection => {
            if let Err(error) = ended {
                tracing::debug!(%error, "a connection to a node broke");
            }
        }
        () = silence(pings, heard, keep_alive) => {
            tracing::debug!(timeout = ?keep_alive.timeout, "a node is silent: its connection is given up");
        }
    }
}

/// Ends when the peer said nothing at all for so long after it was pinged. It is pinged when nothing
/// came from it for a while.
async fn silence(mut pings: PingPong, heard: Heard, keep_alive: KeepAlive) {
    loop {
        let quiet_at = heard.last() + keep_alive.interval;
        if Instant::now() < quiet_at {
            sleep_until(quiet_at).await;
            continue;
        }
        let pinged = Instant::now();
        let pong = pings.ping(Ping::opaque());
        tokio::pin!(pong);
        loop {
            let patience = heard.last().max(pinged) + keep_alive.timeout;
            match tokio::time::timeout_at(patience, pong.as_mut()).await {
                Ok(Ok(_)) => break,
                // The connection is ending, and its driver knows it better.
                Ok(Err(_)) => return std::future::pending().await,
                // It says other things.
                Err(_) if Instant::now() < heard.last() + keep_alive.timeout => {}
                Err(_) => return,
            }
        }
    }
}

/// When something was last heard from a peer.
#[derive(Clone)]
struct Heard {
    begun: Instant,
    /// Nanoseconds since then.
    last: Arc<AtomicU64>,
}

impl Heard {
    fn now() -> Self {
        Self { begun: Instant::now(), last: Arc::default() }
    }

    fn note(&self) {
        let nanos = u64::try_from(self.begun.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.last.store(nanos, Ordering::Relaxed);
    }

    fn last(&self) -> Instant {
        self.begun + Duration::from_nanos(self.last.load(Ordering::Relaxed))
    }
}

/// A connection's bytes, with the time at which some last came.
struct Listened {
    stream: Box<dyn Io>,
    heard: Heard,
}

impl AsyncRead for Listened {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        let read = Pin::new(&mut self.stream).poll_read(cx, buffer);
        if let Poll::Ready(Ok(())) = read {
            self.heard.note();
        }
        read
    }
}

impl AsyncWrite for Listened {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffers: &[std::io::IoSlice<'_>],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, buffers)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
