//! gRPC servers: every one has health, reflection, TCP_NODELAY and bounds.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::StreamExt;
use headstart_proto::FILE_DESCRIPTOR_SET;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tonic::body::Body;
use tonic::server::NamedService;
use tonic::service::Routes;
use tonic::transport::Server;
use tonic::transport::server::Connected;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

use crate::channel::KeepAlive;
use crate::net::{Io, Listener};

/// Largest message that a Headstart service takes, in bytes. Services set it on themselves with
/// `max_decoding_message_size`.
pub const MESSAGE_BYTES_MAX: usize = 4 << 20;

/// Calls that one connection may run at once.
const STREAMS_MAX: u32 = 4096;
/// Largest header list, in bytes.
const HEADER_BYTES_MAX: u32 = 32 << 10;
/// How long calls may take to end once the server stops.
const STOP_GRACE: Duration = Duration::from_secs(1);

/// A server could not start or go on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ServeError {
    /// The address cannot be listened on.
    #[error("--{flag} {address}: {cause}")]
    Bind {
        /// The long option that chose the address.
        flag: &'static str,
        /// The address.
        address: SocketAddr,
        /// Why not.
        cause: String,
    },
    /// The server failed.
    #[error("server failed: {cause}")]
    Failed {
        /// Why.
        cause: String,
    },
}

/// Listens on `address`, which the option `flag` chose; port 0 takes any free port.
///
/// # Errors
/// One clear line, naming the option, when the address is in use or otherwise not to be had.
pub async fn bind(flag: &'static str, address: SocketAddr) -> Result<TcpListener, ServeError> {
    TcpListener::bind(address).await.map_err(|error| {
        let cause = match error.kind() {
            io::ErrorKind::AddrInUse => "address already in use".to_owned(),
            _ => error.to_string(),
        };
        ServeError::Bind { flag, address, cause }
    })
}

/// A gRPC server that is being put together.
#[derive(Debug)]
pub struct GrpcServer {
    routes: Routes,
    health: HealthReporter,
    names: Vec<&'static str>,
    keep_alive: KeepAlive,
}

/// A gRPC server that runs.
#[derive(Debug)]
pub struct RunningServer {
    task: JoinHandle<Result<(), ServeError>>,
    health: HealthReporter,
    names: Vec<&'static str>,
    stop: CancellationToken,
    cut: CancellationToken,
}

impl GrpcServer {
    /// A server with the standard health and reflection services.
    ///
    /// # Errors
    /// When the compiled descriptors cannot be read.
    pub fn new() -> Result<Self, ServeError> {
        let reflection = || {
            tonic_reflection::server::Builder::configure()
                .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
                .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        };
        let failed = |error: tonic_reflection::server::Error| ServeError::Failed {
            cause: error.to_string(),
        };
        let (health, health_service) = tonic_health::server::health_reporter();
        let routes = Routes::new(health_service)
            .add_service(reflection().build_v1().map_err(failed)?)
            .add_service(reflection().build_v1alpha().map_err(failed)?);
        Ok(Self { routes, health, names: vec![""], keep_alive: KeepAlive::CLIENTS })
    }

    /// How soon a caller that is paused or cut off is found; its calls are then dropped.
    #[must_use]
    pub fn keep_alive(self, keep_alive: KeepAlive) -> Self {
        Self { keep_alive, ..self }
    }

    /// Adds a service; its health is told under its name.
    #[must_use]
    #[expect(clippy::should_implement_trait, reason = "servers are not numbers")]
    pub fn add<S>(mut self, service: S) -> Self
    where
        S: tower::Service<http::Request<Body>, Error = Infallible>
            + NamedService
            + Clone
            + Send
            + Sync
            + 'static,
        S::Response: axum::response::IntoResponse,
        S::Future: Send + 'static,
    {
        self.names.push(S::NAME);
        self.routes = self.routes.add_service(service);
        self
    }

    /// Serves on `listener` until the returned server is stopped or dropped.
    pub async fn start(self, listener: impl Into<Listener>) -> RunningServer {
        let Self { routes, health, names, keep_alive } = self;
        for name in &names {
            health.set_service_status(name, ServingStatus::Serving).await;
        }
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        let cut = CancellationToken::new();
        let cutter = cut.clone();
        let incoming = listener
            .into()
            .into_incoming()
            .map(move |stream| stream.map(|stream| Connection::new(stream, cutter.clone())));
        let serving = Server::builder()
            .max_concurrent_streams(STREAMS_MAX)
            .http2_max_header_list_size(HEADER_BYTES_MAX)
            .http2_keepalive_interval(Some(keep_alive.interval))
            .http2_keepalive_timeout(Some(keep_alive.timeout))
            .add_routes(routes)
            .serve_with_incoming_shutdown(incoming, async move { stopped.cancelled().await });
        let task = tokio::spawn(async move {
            serving.await.map_err(|error| ServeError::Failed { cause: error.to_string() })
        });
        RunningServer { task, health, names, stop, cut }
    }
}

impl RunningServer {
    /// Tells health checks that no new work is taken.
    pub async fn set_not_serving(&self) {
        for name in &self.names {
            self.health.set_service_status(name, ServingStatus::NotServing).await;
        }
    }

    /// Waits until the server ends by itself, which is an error. Cancel safe.
    pub async fn failed(&mut self) -> ServeError {
        match (&mut self.task).await {
            Ok(Err(error)) => error,
            Ok(Ok(())) => ServeError::Failed { cause: "it ended by itself".into() },
            Err(error) => ServeError::Failed { cause: error.to_string() },
        }
    }

    /// Stops accepting, gives calls a second to end, and cuts what is left.
    pub async fn stop(mut self) {
        self.set_not_serving().await;
        self.stop.cancel();
        let _ = tokio::time::timeout(STOP_GRACE, &mut self.task).await;
    }
}

impl Drop for RunningServer {
    fn drop(&mut self) {
        self.task.abort();
        self.cut.cancel();
    }
}

/// A client's connection, which breaks when its server is dropped: tonic runs connections in tasks
/// of their own, which would outlive it.
struct Connection {
    stream: Box<dyn Io>,
    cut: CancellationToken,
    cutting: Pin<Box<WaitForCancellationFutureOwned>>,
}

impl Connection {
    fn new(stream: Box<dyn Io>, cut: CancellationToken) -> Self {
        let cutting = Box::pin(cut.clone().cancelled_owned());
        Self { stream, cut, cutting }
    }

    fn check(&self) -> io::Result<()> {
        if self.cut.is_cancelled() { Err(io::ErrorKind::ConnectionAborted.into()) } else { Ok(()) }
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.cutting.as_mut().poll(cx).is_ready() {
            return Poll::Ready(self.check());
        }
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.check()?;
        Pin::new(&mut self.stream).poll_write(cx, buffer)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.check()?;
        Pin::new(&mut self.stream).poll_write_vectored(cx, buffers)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.check()?;
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

impl Connected for Connection {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}
