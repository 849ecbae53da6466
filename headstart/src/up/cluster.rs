//! Drafters, bases and a router in one process. They talk as they would across machines: over
//! gRPC, through the membership.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures::future::select_all;
use headstart_base_node::{BaseOptions, KvOptions};
use headstart_cluster::{Etcd, InMemory, Membership, Tier};
use headstart_drafter_node::DrafterOptions;
use headstart_engine::{EngineHandle, EngineOptions, EngineStats};
use headstart_router::{RouterOptions, RunningRouter};
use headstart_service::net::Dialer;
use headstart_service::node::{Lifetimes, RunningNode, random_id};
use headstart_service::server::bind;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::args::UpOptions;
use super::load::{Loaded, load};
use crate::failure::Failure;

/// etcd may take so long to answer.
const ETCD_TIMEOUT: Duration = Duration::from_secs(5);
/// Either side of a handoff waits so long for the other.
const HANDOFF_TIMEOUT: Duration = Duration::from_secs(30);
/// From the last node's registration until the router knows both tiers.
const READY_WITHIN: Duration = Duration::from_secs(60);
/// How old the nodes' gauges may be.
const GAUGE_INTERVAL: Duration = Duration::from_millis(100);
const POLL: Duration = Duration::from_millis(10);

/// A cluster that serves. Dropped, it ends at once; [`Cluster::stop`] drains it.
pub struct Cluster {
    router: Option<JoinHandle<Result<(), String>>>,
    nodes: Vec<RunningNode>,
    gauges: JoinHandle<()>,
    shutdown: Shutdown,
    http: SocketAddr,
    grpc: SocketAddr,
    names: [String; 2],
    specs: [String; 2],
}

/// The router stops first, so that nothing new reaches nodes that drain.
struct Shutdown {
    router: CancellationToken,
    nodes: CancellationToken,
}

impl Cluster {
    /// Loads the models, starts everything, and waits until the router is ready to serve. What can
    /// be refused at once (an address in use, an etcd that does not answer) is refused first.
    ///
    /// # Errors
    /// What is missing, in one line.
    pub async fn start(options: &UpOptions) -> Result<Self, Failure> {
        let router_options = options.router().map_err(Failure::Usage)?;
        let http = bind("http", options.http).await.map_err(failed)?;
        let grpc = bind("grpc", options.grpc).await.map_err(failed)?;
        let membership = membership(options).await?;
        let (drafter, base) = load(options).await?;
        headstart_service::metrics::install();
        headstart_drafter_node::metrics::describe();
        headstart_base_node::metrics::describe();

        let shutdown =
            Shutdown { router: CancellationToken::new(), nodes: CancellationToken::new() };
        let starter = Starter { options, membership: &*membership, shutdown: &shutdown.nodes };
        let drafters = starter.engines(&drafter, options.drafters)?;
        let bases = starter.engines(&base, options.bases)?;
        let mut nodes = Vec::new();
        for engine in &drafters {
            nodes.push(starter.drafter(&drafter, engine.clone()).await?);
        }
        for engine in &bases {
            nodes.push(starter.base(&base, engine.clone()).await?);
        }
        let router =
            start_router(router_options, &membership, http, grpc, &shutdown.router).await?;
        Ok(Self {
            http: router.http_addr(),
            grpc: router.grpc_addr(),
            router: Some(tokio::spawn(async move {
                router.wait().await.map_err(|error| error.to_string())
            })),
            nodes,
            gauges: tokio::spawn(tell_gauges(drafters, bases)),
            shutdown,
            names: [drafter.name, base.name],
            specs: [options.drafter.to_string(), options.base.to_string()],
        })
    }

    /// The line that says that requests are served, and where.
    #[must_use]
    pub fn ready_line(&self) -> String {
        let [drafter, base] = &self.names;
        format!(
            "ready: http://{}/v1 and gRPC {}, model {base} begun by {drafter}",
            self.http, self.grpc
        )
    }

    /// Where HTTP is served.
    #[must_use]
    pub fn http(&self) -> SocketAddr {
        self.http
    }

    /// Where gRPC is served.
    #[must_use]
    pub fn grpc(&self) -> SocketAddr {
        self.grpc
    }

    /// The drafter's and the base's names.
    #[must_use]
    pub fn names(&self) -> &[String; 2] {
        &self.names
    }

    /// Where the drafter's and the base's models come from.
    #[must_use]
    pub fn specs(&self) -> &[String; 2] {
        &self.specs
    }

    /// Waits until a part of the cluster ends that should not.
    pub async fn failed(&mut self) -> Failure {
        let router = async {
            match &mut self.router {
                Some(router) => match router.await {
                    Ok(Ok(())) => "the router ended by itself".to_owned(),
                    Ok(Err(error)) => error,
                    Err(error) => format!("the router broke: {error}"),
                },
                None => std::future::pending().await,
            }
        };
        let node = |node| Box::pin(RunningNode::ended(node));
        let nodes = select_all(self.nodes.iter_mut().map(node));
        let message = tokio::select! {
            message = router => {
                // It is gone: there is nothing left to wait for.
                self.router = None;
                message
            }
            (ended, _, _) = nodes => match ended {
                Ok(()) => "a node ended by itself".to_owned(),
                Err(error) => error.to_string(),
            },
        };
        Failure::Failed(message)
    }

    /// Takes no new requests, finishes those that run, and ends: the router first, then the nodes.
    ///
    /// # Errors
    /// When a part failed while it drained.
    pub async fn stop(mut self) -> Result<(), Failure> {
        self.shutdown.router.cancel();
        let mut outcome = Ok(());
        if let Some(router) = self.router.take() {
            match router.await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => outcome = Err(Failure::Failed(error)),
                Err(error) => outcome = Err(Failure::Failed(error.to_string())),
            }
        }
        self.shutdown.nodes.cancel();
        for mut node in std::mem::take(&mut self.nodes) {
            if let Err(error) = node.ended().await {
                outcome = Err(failed(error));
            }
        }
        outcome
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.gauges.abort();
        if let Some(router) = &self.router {
            router.abort();
        }
    }
}

fn failed(error: impl std::fmt::Display) -> Failure {
    Failure::Failed(error.to_string())
}

async fn membership(options: &UpOptions) -> Result<Arc<dyn Membership>, Failure> {
    if options.etcd.is_empty() {
        return Ok(Arc::new(InMemory::new()));
    }
    let etcd = Etcd::connect(&options.etcd, &options.cluster, ETCD_TIMEOUT).await;
    Ok(Arc::new(etcd.map_err(failed)?))
}

async fn start_router(
    options: RouterOptions,
    membership: &Arc<dyn Membership>,
    http: TcpListener,
    grpc: TcpListener,
    shutdown: &CancellationToken,
) -> Result<RunningRouter, Failure> {
    let membership = Arc::clone(membership);
    let router = headstart_router::start(options, membership, http, grpc, shutdown.clone()).await;
    let router = router.map_err(failed)?;
    let ready = async {
        while !router.is_ready() {
            tokio::time::sleep(POLL).await;
        }
    };
    match tokio::time::timeout(READY_WITHIN, ready).await {
        Ok(()) => Ok(router),
        Err(_) => {
            let waited = READY_WITHIN.as_secs();
            Err(Failure::Failed(format!("the router did not become ready within {waited} s")))
        }
    }
}

/// What starting a node takes.
struct Starter<'a> {
    options: &'a UpOptions,
    membership: &'a dyn Membership,
    shutdown: &'a CancellationToken,
}

impl Starter<'_> {
    /// `count` engines on one copy of the weights.
    fn engines(&self, loaded: &Loaded, count: u32) -> Result<Vec<EngineHandle>, Failure> {
        let engine = EngineOptions {
            slots: self.options.slots,
            step_tokens: self.options.step_tokens,
            // All nodes share this machine: reading a prompt would only delay its draft.
            wait_for_drafts: true,
            ..EngineOptions::default()
        };
        let kv_tokens = self.options.kv_tokens(loaded.weights.config().context_length);
        let start = || {
            let executor = loaded.weights.executor(self.options.threads(), kv_tokens);
            Ok(EngineHandle::start(executor.map_err(failed)?, engine))
        };
        (0..count).map(|_| start()).collect()
    }

    fn lifetimes(&self) -> Lifetimes {
        Lifetimes { drain_timeout: self.options.router.drain_timeout, ..Lifetimes::default() }
    }

    async fn drafter(&self, loaded: &Loaded, engine: EngineHandle) -> Result<RunningNode, Failure> {
        let (listener, address) = loopback().await?;
        let options = DrafterOptions {
            node_id: random_id(Tier::Drafter),
            address,
            model: loaded.name.clone(),
            dtype: self.options.dtype.to_string(),
            handoff_timeout: HANDOFF_TIMEOUT,
            lifetimes: self.lifetimes(),
            dialer: Dialer::default(),
        };
        let (text, shutdown) = (&loaded.text, self.shutdown.clone());
        headstart_drafter_node::start(options, engine, text, self.membership, listener, shutdown)
            .await
            .map_err(failed)
    }

    async fn base(&self, loaded: &Loaded, engine: EngineHandle) -> Result<RunningNode, Failure> {
        let (listener, address) = loopback().await?;
        let options = BaseOptions {
            node_id: random_id(Tier::Base),
            address,
            model: loaded.name.clone(),
            dtype: self.options.dtype.to_string(),
            handoff_timeout: HANDOFF_TIMEOUT,
            lifetimes: self.lifetimes(),
            dialer: Dialer::default(),
        };
        let (text, shutdown) = (&loaded.text, self.shutdown.clone());
        let (kv_listener, kv_address) = loopback().await?;
        let kv = KvOptions {
            listener: Some(kv_listener.into()),
            address: kv_address,
            ..KvOptions::default()
        };
        let membership = self.membership;
        let start =
            headstart_base_node::start(kv, options, engine, text, membership, listener, shutdown);
        start.await.map_err(failed)
    }
}

async fn loopback() -> Result<(TcpListener, String), Failure> {
    let listener = bind("listen", SocketAddr::from(([127, 0, 0, 1], 0))).await.map_err(failed)?;
    let address = listener.local_addr().map_err(failed)?;
    Ok((listener, address.to_string()))
}

/// Keeps the tiers' gauges, each the sum over its nodes.
async fn tell_gauges(drafters: Vec<EngineHandle>, bases: Vec<EngineHandle>) {
    loop {
        headstart_drafter_node::metrics::engine(total(&drafters));
        headstart_base_node::metrics::engine(total(&bases));
        tokio::time::sleep(GAUGE_INTERVAL).await;
    }
}

fn total(engines: &[EngineHandle]) -> EngineStats {
    engines.iter().map(EngineHandle::stats).fold(EngineStats::default(), |sum, one| EngineStats {
        prefill_tokens_per_second: sum.prefill_tokens_per_second.max(one.prefill_tokens_per_second),
        slots: sum.slots + one.slots,
        slots_used: sum.slots_used + one.slots_used,
        kv_tokens: sum.kv_tokens + one.kv_tokens,
        kv_tokens_used: sum.kv_tokens_used + one.kv_tokens_used,
        counters: headstart_engine::step::Counters {
            steps: sum.counters.steps + one.counters.steps,
            tokens_extended: sum.counters.tokens_extended + one.counters.tokens_extended,
            tokens_reused: sum.counters.tokens_reused + one.counters.tokens_reused,
            tokens_preempted: sum.counters.tokens_preempted + one.counters.tokens_preempted,
            tokens_cut: sum.counters.tokens_cut + one.counters.tokens_cut,
            tokens_overrun: sum.counters.tokens_overrun + one.counters.tokens_overrun,
        },
    })
}
