//! The node as a whole: from its configuration, or on an engine that already runs.

use std::sync::Arc;
use std::time::Duration;

use headstart_cluster::{BaseRole, Membership, NodeRecord, Tier, incarnation_now};
use headstart_engine::{EngineHandle, EngineStats};
use headstart_proto::NodeId;
use headstart_proto::v1::node_server::NodeServer;
use headstart_service::channel::KeepAlive;
use headstart_service::metrics;
use headstart_service::net::{Dialer, Listener};
use headstart_service::node::{Lifetimes, NodeError, NodeParts, RunningNode};
use headstart_service::node_service::{NodeService, NodeStatus};
use headstart_service::options::{ModelOptions, NodeOptions};
use headstart_service::server::{GrpcServer, ServeError, bind};
use headstart_text::{BasePrompt, ModelText};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::load;
use crate::ranks::{self, Gathering};

/// What a node on a running engine must be told.
#[derive(Clone, Debug)]
pub struct HostOptions {
    /// The node.
    pub node_id: NodeId,
    /// How others reach the listener, `host:port`.
    pub address: String,
    /// The name clients use for the model.
    pub model: String,
    /// What `Info` says about the weights.
    pub dtype: String,
    /// How long either side of a handoff waits for the other.
    pub handoff_timeout: Duration,
    /// The times of the node's life.
    pub lifetimes: Lifetimes,
    /// How the node reaches others.
    pub dialer: Dialer,
}

/// What a tier's services run on.
#[derive(Clone)]
pub struct Host {
    /// The node.
    pub node_id: NodeId,
    /// The model's engine.
    pub engine: EngineHandle,
    /// The model's text side.
    pub text: ModelText,
    /// How long either side of a handoff waits for the other.
    pub handoff_timeout: Duration,
    /// How soon another node that is paused or cut off is found.
    pub keep_alive: KeepAlive,
    /// How the node reaches others.
    pub dialer: Dialer,
    /// Cancelled when the node takes no new work.
    pub draining: CancellationToken,
    /// Live work, which a drain waits for.
    pub sessions: TaskTracker,
}

/// Adds a tier's services to a node's server.
pub type AddServices = Box<dyn FnOnce(GrpcServer, &Host) -> GrpcServer + Send>;

/// What sets a tier apart.
pub struct Tiered {
    /// The tier.
    pub tier: Tier,
    /// What a base does; `Unified` for a drafter.
    pub base_role: BaseRole,
    /// How others reach the node's KV service, `host:port`; empty: it has none.
    pub kv_address: String,
    /// Adds the tier's services.
    pub services: AddServices,
    /// Registers the descriptions of its metrics.
    pub describe_metrics: fn(),
    /// Sets its gauges, before a scrape.
    pub engine_metrics: fn(EngineStats),
}

/// Starts a node on `engine`: it serves on `listener`, registers with `membership`, and drains when
/// `shutdown` is cancelled.
///
/// # Errors
/// When the node must not register.
pub async fn start(
    tiered: Tiered,
    options: HostOptions,
    engine: EngineHandle,
    text: &ModelText,
    membership: &dyn Membership,
    listener: impl Into<Listener>,
    shutdown: CancellationToken,
) -> Result<RunningNode, NodeError> {
    let record = record(&tiered, &options, &engine, text);
    let host = Host {
        node_id: options.node_id,
        engine,
        text: text.clone(),
        handoff_timeout: options.handoff_timeout,
        keep_alive: options.lifetimes.keep_alive,
        dialer: options.dialer,
        draining: CancellationToken::new(),
        sessions: TaskTracker::new(),
    };
    // `Drain` stops this node, not its neighbours in the same process.
    let shutdown = shutdown.child_token();
    let (status, drains) = (host.engine.clone(), host.draining.clone());
    let status = move || {
        let stats = status.stats();
        NodeStatus {
            slots_used: u32::try_from(stats.slots_used).unwrap_or(u32::MAX),
            kv_tokens: stats.kv_tokens as u64,
            kv_tokens_used: stats.kv_tokens_used as u64,
            draining: drains.is_cancelled(),
        }
    };
    let node = NodeService::new(&record, &host.text, &options.dtype, status, shutdown.clone());
    let server = (tiered.services)(GrpcServer::new()?, &host).add(NodeServer::new(node));
    let Host { engine, draining, sessions, .. } = host;
    let failure = Box::new(move || engine.failure());
    let lifetimes = options.lifetimes;
    let parts = NodeParts { record, server, draining, sessions, failure, lifetimes };
    parts.start(listener, membership, shutdown).await
}

/// Runs a node from its configuration until `shutdown` has drained it. What can be refused at once
/// (an address in use, an etcd that does not answer) is refused before the model is loaded.
///
/// # Errors
/// What the node cannot start or go on without.
pub async fn run(
    tiered: Tiered,
    node: NodeOptions,
    model: ModelOptions,
    base_prompt: BasePrompt,
    handoff_timeout: Duration,
    shutdown: CancellationToken,
) -> Result<(), NodeError> {
    let place = ranks::place(&model)?;
    let name = model.name()?;
    let listener = node.bind().await?;
    let local =
        listener.local_addr().map_err(|error| ServeError::Failed { cause: error.to_string() })?;
    let address = node.advertised(local)?;
    let scraped = match node.metrics {
        Some(address) => Some(bind("metrics", address).await?),
        None => None,
    };
    let membership = tokio::select! {
        membership = node.membership() => membership?,
        () = shutdown.cancelled() => return Ok(()),
    };
    let dtype = model.dtype.clone();
    let gathering = match place {
        Some(place) => Some(ranks::gathering(place, &node, &model).await?),
        None => None,
    };
    let announced = gathering.as_ref().and_then(Gathering::announced);
    let loading = tokio::task::spawn_blocking(move || load(&model, base_prompt, gathering));
    let (engine, text) = tokio::select! {
        loaded = loading => loaded.map_err(|error| NodeError::Model(error.to_string()))??,
        () = shutdown.cancelled() => return Ok(()),
    };
    if let Some(announced) = announced {
        announced.withdraw().await;
    }
    if let Some(listener) = scraped {
        metrics::install();
        (tiered.describe_metrics)();
        let (set, engine) = (tiered.engine_metrics, engine.clone());
        let refresh = Arc::new(move || set(engine.stats()));
        let (draining, stop) = (shutdown.clone(), CancellationToken::new());
        tokio::spawn(metrics::serve(listener, refresh, draining, stop));
    }
    let options = HostOptions {
        node_id: node.id(tiered.tier),
        address,
        model: name,
        dtype,
        handoff_timeout,
        lifetimes: node.lifetimes(),
        dialer: Dialer::default(),
    };
    let ranks = engine.clone();
    let starting = start(tiered, options, engine, &text, &*membership, listener, shutdown.clone());
    let started = tokio::select! {
        biased;
        started = starting => Some(started?),
        // It waits for etcd.
        () = shutdown.cancelled() => None,
    };
    if let Some(mut running) = started {
        running.ended().await?;
    }
    ranks.release();
    Ok(())
}

fn record(
    tiered: &Tiered,
    options: &HostOptions,
    engine: &EngineHandle,
    text: &ModelText,
) -> NodeRecord {
    let limits = engine.limits();
    let context = limits.context_length.min(limits.pages * limits.page_size);
    NodeRecord {
        node_id: options.node_id.clone(),
        tier: tiered.tier,
        address: options.address.clone(),
        model: options.model.clone(),
        tokenizer_fingerprint: text.tokenizer().fingerprint().to_string(),
        text_fingerprint: text.fingerprint().to_string(),
        context_length: u32::try_from(context).unwrap_or(u32::MAX),
        slots: u32::try_from(engine.stats().slots).unwrap_or(u32::MAX),
        kv_tokens: engine.stats().kv_tokens as u64,
        draining: false,
        incarnation: incarnation_now(),
        base_role: tiered.base_role,
        kv_address: tiered.kv_address.clone(),
    }
}
