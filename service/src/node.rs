//! A node's life: it listens, registers, serves, drains and leaves.

use std::fmt;
use std::time::Duration;

use headstart_cluster::{ClusterError, LEASE_TTL, Membership, NodeRecord, Registration, Tier};
use headstart_proto::{NodeId, RequestId};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::channel::KeepAlive;
use crate::config::ConfigError;
use crate::net::Listener;
use crate::server::{GrpcServer, RunningServer, ServeError};

/// How long live work may take to end when a node is asked to stop, unless it is told otherwise.
pub const DRAIN_TIMEOUT: Duration = Duration::from_secs(30);

/// How soon a node that could not register tries again.
const REGISTER_RETRY: Duration = Duration::from_secs(1);

/// How often a node looks whether its engine still runs.
const ALIVE_INTERVAL: Duration = Duration::from_millis(500);

/// A fresh node id: the tier and a random part.
pub fn random_id(tier: Tier) -> NodeId {
    let random = RequestId::generate();
    // The last group of a version 7 UUID is random.
    let tail = random.as_str().rsplit('-').next().unwrap_or_default();
    NodeId::new(&format!("{tier}-{tail}")).unwrap_or_else(|_| unreachable!("letters, '-' and hex"))
}

/// The times of a node's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lifetimes {
    /// How long the record outlives a node that dies.
    pub lease_ttl: Duration,
    /// How long live work may take to end when the node is asked to stop.
    pub drain_timeout: Duration,
    /// How soon a caller or a base that is paused or cut off is found.
    pub keep_alive: KeepAlive,
}

impl Default for Lifetimes {
    fn default() -> Self {
        Self { lease_ttl: LEASE_TTL, drain_timeout: DRAIN_TIMEOUT, keep_alive: KeepAlive::CLUSTER }
    }
}

/// A node could not start or go on.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// Its configuration is wrong.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Its server cannot listen or failed.
    #[error(transparent)]
    Serve(#[from] ServeError),
    /// It cannot register.
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    /// Its model cannot be loaded.
    #[error("{0}")]
    Model(String),
    /// Its engine stopped while it served.
    #[error("the engine has stopped: {0}")]
    Engine(String),
    /// Its ranks cannot run for their leader, or not any more.
    #[error("{0}")]
    Ranks(String),
    /// Another process with its id started later and took its place.
    #[error("a later start of node {0} has taken its place")]
    Superseded(NodeId),
}

/// Says why a node's engine is of no further use, once it is not.
pub type Failure = Box<dyn Fn() -> Option<String> + Send + Sync>;

/// What the two node kinds do not have in common.
pub struct NodeParts {
    /// What the node tells the cluster; its address is where others reach the listener.
    pub record: NodeRecord,
    /// Its services.
    pub server: GrpcServer,
    /// Cancelled when the node takes no new work; its services watch it.
    pub draining: CancellationToken,
    /// Its live work; the drain waits for it.
    pub sessions: TaskTracker,
    /// Why its engine does not run any more; a node without one leaves the cluster.
    pub failure: Failure,
    /// The times of its life.
    pub lifetimes: Lifetimes,
}

impl fmt::Debug for NodeParts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NodeParts").field("record", &self.record).finish_non_exhaustive()
    }
}

/// A node that is registered and serves.
#[derive(Debug)]
pub struct RunningNode {
    record: NodeRecord,
    sessions: TaskTracker,
    task: JoinHandle<Result<(), NodeError>>,
    joined: bool,
}

impl NodeParts {
    /// Serves on `listener` and registers, waiting for a store that is away. The node runs until
    /// `shutdown`; then it takes no new work, says so in its record, gives live work its time,
    /// deregisters and closes.
    ///
    /// # Errors
    /// When the node must not register.
    pub async fn start(
        self,
        listener: impl Into<Listener>,
        membership: &dyn Membership,
        shutdown: CancellationToken,
    ) -> Result<RunningNode, NodeError> {
        let Self { record, server, draining, sessions, failure, lifetimes } = self;
        let server = server.keep_alive(lifetimes.keep_alive).start(listener).await;
        let registration = tokio::select! {
            registered = register(membership, &record, lifetimes.lease_ttl) => registered?,
            failure = dead(&failure) => return Err(NodeError::Engine(failure)),
        };
        tracing::info!(
            node_id = %record.node_id, tier = %record.tier, address = %record.address,
            model = %record.model, slots = record.slots, "node is ready"
        );
        let work = sessions.clone();
        let life = Life { server, registration, draining, sessions, failure, lifetimes };
        let task = tokio::spawn(life.run(shutdown));
        Ok(RunningNode { record, sessions: work, task, joined: false })
    }
}

/// A store that is away is waited for, as it would be later in the node's life.
async fn register(
    membership: &dyn Membership,
    record: &NodeRecord,
    ttl: Duration,
) -> Result<Registration, ClusterError> {
    loop {
        match membership.register(record.clone(), ttl).await {
            Err(error @ ClusterError::Unreachable { .. }) => {
                tracing::warn!(node_id = %record.node_id, %error, "cannot register yet");
                tokio::time::sleep(REGISTER_RETRY).await;
            }
            outcome => return outcome,
        }
    }
}

impl RunningNode {
    /// What the node told the cluster when it started.
    pub fn record(&self) -> &NodeRecord {
        &self.record
    }

    /// Its live work: requests that run, and answers whose KV is kept for whoever goes on.
    pub fn sessions(&self) -> usize {
        self.sessions.len()
    }

    /// Waits until the node has ended: after a drain, or with the error that ended it, which is told
    /// once. Cancel safe.
    ///
    /// # Errors
    /// When its server failed.
    pub async fn ended(&mut self) -> Result<(), NodeError> {
        if self.joined {
            return Ok(());
        }
        let result = (&mut self.task).await;
        self.joined = true;
        match result {
            Ok(result) => result,
            Err(error) => Err(ServeError::Failed { cause: error.to_string() }.into()),
        }
    }

    /// Ends the node at once, as a crash does: connections break, and its record expires.
    pub fn kill(&self) {
        self.task.abort();
    }
}

impl Drop for RunningNode {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Waits until `failure` says something.
async fn dead(failure: &Failure) -> String {
    let mut tick = tokio::time::interval(ALIVE_INTERVAL);
    loop {
        if let Some(failure) = failure() {
            return failure;
        }
        tick.tick().await;
    }
}

struct Life {
    server: RunningServer,
    registration: Registration,
    draining: CancellationToken,
    sessions: TaskTracker,
    failure: Failure,
    lifetimes: Lifetimes,
}

impl Life {
    async fn run(mut self, shutdown: CancellationToken) -> Result<(), NodeError> {
        let node_id = self.registration.node_id();
        let mut superseded = false;
        tokio::select! {
            biased;
            () = shutdown.cancelled() => {}
            () = self.registration.superseded() => superseded = true,
            error = self.server.failed() => {
                self.registration.deregister().await;
                return Err(error.into());
            }
            failure = dead(&self.failure) => {
                self.registration.deregister().await;
                return Err(NodeError::Engine(failure));
            }
        }
        tracing::info!(%node_id, live = self.sessions.len(), "draining");
        self.draining.cancel();
        self.registration.update(|record| record.draining = true);
        self.server.set_not_serving().await;
        self.sessions.close();
        let drained = tokio::time::timeout(self.lifetimes.drain_timeout, self.sessions.wait());
        if drained.await.is_err() {
            tracing::warn!(%node_id, cut = self.sessions.len(), "the drain's deadline passed");
        }
        self.registration.deregister().await;
        self.server.stop().await;
        tracing::info!(%node_id, "node has left");
        if superseded { Err(NodeError::Superseded(node_id)) } else { Ok(()) }
    }
}
