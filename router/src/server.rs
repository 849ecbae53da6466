//! Starting and stopping both doors.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::serve::Listener;
use futures::StreamExt;
use futures::future::{join_all, select_all};
use futures::stream::BoxStream;
use headstart_cluster::Membership;
use headstart_proto::v1::router_server::RouterServer;
use headstart_service::net;
use headstart_service::server::{GrpcServer, MESSAGE_BYTES_MAX, RunningServer, ServeError};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use crate::generate::Core;
use crate::http;
use crate::lanes::{Door, Lanes, Part};
use crate::options::RouterOptions;
use crate::service::RouterService;

/// How long connections may take to close once every request has ended.
const CLOSE_GRACE: Duration = Duration::from_secs(1);
/// How soon the listener is asked again after it failed.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// A router that runs. Dropping it ends every request at once.
#[derive(Debug)]
pub struct RunningRouter {
    core: Arc<Core>,
    http_addr: SocketAddr,
    grpc_addr: SocketAddr,
    task: AbortOnDropHandle<Result<(), ServeError>>,
}

impl RunningRouter {
    /// Where the HTTP door listens.
    pub fn http_addr(&self) -> SocketAddr {
        self.http_addr
    }

    /// Where the gRPC door listens.
    pub fn grpc_addr(&self) -> SocketAddr {
        self.grpc_addr
    }

    /// A base and a drafter are known.
    pub fn is_ready(&self) -> bool {
        self.core.is_ready()
    }

    /// Requests that wait for their turn or run.
    pub fn in_flight(&self) -> usize {
        self.core.in_flight()
    }

    /// Places taken on nodes by the attempts at those answers.
    pub fn places(&self) -> usize {
        self.core.nodes.places()
    }

    /// Waits until the router has ended.
    ///
    /// # Errors
    /// When a door failed.
    pub async fn wait(mut self) -> Result<(), ServeError> {
        let ended = (&mut self.task).await;
        ended.unwrap_or_else(|error| Err(ServeError::Failed { cause: error.to_string() }))
    }
}

impl Drop for RunningRouter {
    fn drop(&mut self) {
        self.core.drain();
        self.core.cut.cancel();
    }
}

/// Starts a router on both listeners. `shutdown` makes it stop accepting, give live requests
/// [`RouterOptions::drain_timeout`] to finish, and end.
///
/// # Errors
/// Options out of their range, listeners that cannot be used.
pub async fn start(
    options: RouterOptions,
    membership: Arc<dyn Membership>,
    http: impl Into<net::Listener>,
    grpc: impl Into<net::Listener>,
    shutdown: CancellationToken,
) -> Result<RunningRouter, ServeError> {
    let failed = |cause: String| ServeError::Failed { cause };
    options.validate().map_err(failed)?;
    headstart_service::metrics::install();
    let (http, grpc) = (http.into(), grpc.into());
    let (http_addr, grpc_addr) = (http.local_addr(), grpc.local_addr());
    let core = Core::new(options, membership.watch());
    let service = RouterServer::new(RouterService::new(Arc::clone(&core)))
        .max_decoding_message_size(core.options.body_bytes_max.max(MESSAGE_BYTES_MAX));
    let grpc = GrpcServer::new()?.add(service).start(grpc).await;
    let task = tokio::spawn(run(Arc::clone(&core), membership, http, grpc, shutdown));
    Ok(RunningRouter { core, http_addr, grpc_addr, task: AbortOnDropHandle::new(task) })
}

/// Serves until `shutdown`, then drains. The membership is held as long: its watch ends with it.
async fn run(
    core: Arc<Core>,
    membership: Arc<dyn Membership>,
    http: net::Listener,
    mut grpc: RunningServer,
    shutdown: CancellationToken,
) -> Result<(), ServeError> {
    let _follower = AbortOnDropHandle::new(tokio::spawn(Arc::clone(&core).follow_view()));
    let stop_accepting = CancellationToken::new();
    // axum waits for it in a task of its own, also when this future is dropped.
    let _stopped = stop_accepting.clone().drop_guard();
    let options = &core.options;
    let failed = |error: std::io::Error| ServeError::Failed { cause: format!("HTTP: {error}") };
    let lanes = Lanes::start(options.http_threads as usize).map_err(failed)?;
    let Door { parts, accepting } =
        lanes.divide(http, options.connections_max as usize, options.write_timeout);
    let serve = |part: Part| {
        let listener = HttpListener::new(part.listener);
        let (door, stopped) = (http::router(Arc::clone(&core)), stop_accepting.clone());
        let serving = axum::serve(listener, door)
            .with_graceful_shutdown(async move { stopped.cancelled().await });
        AbortOnDropHandle::new(part.runtime.spawn(async move { serving.await }))
    };
    let mut serving: Vec<_> = parts.into_iter().map(serve).collect();
    let failure = tokio::select! {
        biased;
        () = shutdown.cancelled() => None,
        error = grpc.failed() => Some(error),
        (ended, ..) = select_all(&mut serving) => {
            Some(ServeError::Failed { cause: format!("HTTP: {ended:?}") })
        }
    };
    core.drain();
    if let Some(error) = failure {
        core.cut.cancel();
        return Err(error);
    }
    tracing::info!(answers = core.tasks.len(), "stopping: live requests may finish");
    grpc.set_not_serving().await;
    stop_accepting.cancel();
    drop(accepting);
    core.tasks.close();
    if tokio::time::timeout(core.options.drain_timeout, core.tasks.wait()).await.is_err() {
        tracing::warn!(requests = core.tasks.len(), "cutting requests that did not finish in time");
    }
    core.cut.cancel();
    core.tasks.wait().await;
    // What the last requests left in their connections' buffers still goes out.
    let (_, ()) = tokio::join!(tokio::time::timeout(CLOSE_GRACE, join_all(serving)), grpc.stop());
    drop(membership);
    Ok(())
}

/// A part of the HTTP door, as axum wants it.
struct HttpListener {
    address: SocketAddr,
    incoming: BoxStream<'static, std::io::Result<Box<dyn net::Io>>>,
}

impl HttpListener {
    fn new(listener: net::Listener) -> Self {
        let (address, incoming) = (listener.local_addr(), listener.into_incoming());
        Self { address, incoming }
    }
}

impl Listener for HttpListener {
    type Io = Box<dyn net::Io>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Box<dyn net::Io>, SocketAddr) {
        let connection = loop {
            match self.incoming.next().await {
                Some(Ok(connection)) => break connection,
                // An error such as too many open files passes.
                Some(Err(_)) => tokio::time::sleep(ACCEPT_RETRY).await,
                None => std::future::pending().await,
            }
        };
        (connection, self.address)
    }

    fn local_addr(&self) -> std::io::Result<SocketAddr> {
        Ok(self.address)
    }
}
