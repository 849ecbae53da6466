//! A cluster of the real services on simulated machines.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::StreamExt;
use headstart_engine::executor::fake::{FakeExecutor, FakeOptions};
use headstart_engine::{EngineHandle, EngineOptions, EngineStats, Limits};
use headstart_proto::NodeId;
use headstart_router::{Encoding, RouterOptions, RunningRouter};
use headstart_service::net::Listener;
use headstart_service::node::{Lifetimes, RunningNode};
use headstart_text::ModelText;
use tokio::sync::watch;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use crate::net::{HostId, Net};
use crate::oracle::Oracle;
use crate::plan::Plan;
use crate::random::Random;
use crate::store::Store;
use crate::trace::Trace;

/// The nodes' port, and the routers' for clients.
const NODE_PORT: u16 = 7000;
const ROUTER_PORT: u16 = 50_051;
/// How soon a process that could not start is started again.
const START_RETRY: Duration = Duration::from_millis(250);
/// The longest that anything in the cluster may take.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a record outlives its node.
pub const LEASE_TTL: Duration = Duration::from_secs(3);
/// How long live work may take to end when a process is asked to stop.
pub const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);

/// What a host is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A router.
    Router,
    /// A drafter.
    Drafter,
    /// A base.
    Base,
}

/// The cluster. Clones share it.
#[derive(Clone)]
pub struct World {
    /// What was planned.
    pub plan: Arc<Plan>,
    /// Its network.
    pub net: Net,
    /// Its membership store.
    pub store: Store,
    /// What happens in it.
    pub trace: Trace,
    names: Arc<Vec<String>>,
    text: ModelText,
    machines: Arc<Mutex<Vec<Machine>>>,
}

/// A host that runs a process, or is about to.
struct Machine {
    held: watch::Sender<bool>,
    /// What brings the process up.
    starting: Option<AbortOnDropHandle<()>>,
    process: Option<Process>,
    random: Random,
}

enum Process {
    Router(RunningRouter, CancellationToken),
    Node {
        node: RunningNode,
        engine: EngineHandle,
        _runner: AbortOnDropHandle<()>,
        shutdown: CancellationToken,
    },
}

impl World {
    /// A world where nothing runs yet.
    #[must_use]
    pub fn new(plan: Plan, text: ModelText, trace: Trace) -> Self {
        let names = plan.names();
        let mut random = plan.network.clone();
        let machines = names[..names.len() - 1].iter().map(|_| Machine {
            held: watch::Sender::new(false),
            starting: None,
            process: None,
            random: random.fork(),
        });
        let machines = Arc::new(Mutex::new(machines.collect()));
        let net = Net::new(names.clone(), random, trace.clone());
        let (plan, names) = (Arc::new(plan), Arc::new(names));
        Self { plan, net, store: Store::default(), trace, names, text, machines }
    }

    fn machines(&self) -> MutexGuard<'_, Vec<Machine>> {
        self.machines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hosts that run something.
    #[must_use]
    pub fn hosts(&self) -> std::ops::Range<HostId> {
        0..self.names.len() - 1
    }

    /// The clients' host.
    #[must_use]
    pub fn client(&self) -> HostId {
        self.names.len() - 1
    }

    /// The name of a host.
    #[must_use]
    pub fn name(&self, host: HostId) -> &str {
        &self.names[host]
    }

    /// What a host is.
    #[must_use]
    pub fn kind(&self, host: HostId) -> Kind {
        let Plan { routers, drafters, .. } = *self.plan;
        match host {
            _ if host < routers => Kind::Router,
            _ if host < routers + drafters => Kind::Drafter,
            _ => Kind::Base,
        }
    }

    /// Where clients reach a router.
    #[must_use]
    pub fn router_address(&self, router: usize) -> String {
        format!("{}:{ROUTER_PORT}", self.names[router])
    }

    /// What knows the right answers.
    #[must_use]
    pub fn oracle(&self) -> Oracle {
        Oracle {
            drafter: self.executor(Kind::Drafter),
            base: self.executor(Kind::Base),
            text: self.text.clone(),
            as_text: self.plan.as_text,
        }
    }

    /// Starts a host's process; it is tried until it succeeds.
    pub fn start(&self, host: HostId) {
        let world = self.clone();
        let starting = tokio::spawn(async move {
            loop {
                match world.try_start(host).await {
                    Ok(process) => {
                        let line = format_args!("{} is up", world.names[host]);
                        world.trace.add(&[10, host as u64], line);
                        world.machines()[host].process = Some(process);
                        return;
                    }
                    Err(_) => sleep(START_RETRY).await,
                }
            }
        });
        self.machines()[host].starting = Some(AbortOnDropHandle::new(starting));
    }

    async fn try_start(&self, host: HostId) -> Result<Process, String> {
        match self.kind(host) {
            Kind::Router => self.start_router(host).await,
            tier => self.start_node(host, tier).await,
        }
    }

    async fn start_router(&self, host: HostId) -> Result<Process, String> {
        let options = RouterOptions {
            encoding: if self.plan.as_text { Encoding::Text } else { Encoding::Ids },
            connect_timeout: Duration::from_secs(1),
            read_timeout: Duration::from_secs(5),
            first_frame_timeout: Duration::from_secs(15),
            frame_timeout: Duration::from_secs(15),
            request_timeout: REQUEST_TIMEOUT,
            drain_timeout: DRAIN_TIMEOUT,
            chance_seed: Some(self.plan.salt),
            dialer: self.net.dialer(host),
            ..RouterOptions::default()
        };
        let shutdown = CancellationToken::new();
        let grpc = self.net.listen(host, ROUTER_PORT);
        let http = Listener::of(futures::stream::pending().boxed(), grpc.local_addr());
        let membership = Arc::new(self.store.of(&self.names[host]));
        let router =
            headstart_router::start(options, membership, http, grpc, shutdown.clone()).await;
        Ok(Process::Router(router.map_err(|error| error.to_string())?, shutdown))
    }

    async fn start_node(&self, host: HostId, tier: Kind) -> Result<Process, String> {
        let engine = EngineOptions {
            slots: self.plan.slots,
            step_tokens: 64,
            inbox: 256,
            ..EngineOptions::default()
        };
        let pace = self.pace(host, tier);
        let (engine, runner) =
            EngineHandle::start_paced(Box::new(self.executor(tier)), engine, pace);
        let runner = AbortOnDropHandle::new(tokio::spawn(runner));
        let name = &self.names[host];
        let options = headstart_base_node::BaseOptions {
            node_id: NodeId::new(name).map_err(|error| error.to_string())?,
            address: format!("{name}:{NODE_PORT}"),
            model: if tier == Kind::Base { "big".into() } else { "small".into() },
            dtype: "f32".into(),
            handoff_timeout: Duration::from_secs(4),
            lifetimes: Lifetimes {
                lease_ttl: LEASE_TTL,
                drain_timeout: DRAIN_TIMEOUT,
                ..Lifetimes::default()
            },
            dialer: self.net.dialer(host),
        };
        let shutdown = CancellationToken::new();
        let listener = self.net.listen(host, NODE_PORT);
        let membership = self.store.of(name);
        let (text, stop) = (&self.text, shutdown.clone());
        let handle = engine.clone();
        let node = if tier == Kind::Base {
            headstart_base_node::start(options, handle, text, &membership, listener, stop).await
        } else {
            headstart_drafter_node::start(options, handle, text, &membership, listener, stop).await
        };
        let node = node.map_err(|error| error.to_string())?;
        Ok(Process::Node { node, engine, _runner: runner, shutdown })
    }

    /// How long the steps of a host's engine take; none begins or ends while the host is held.
    fn pace(
        &self,
        host: HostId,
        tier: Kind,
    ) -> impl FnMut() -> futures::future::BoxFuture<'static, ()> + Send + use<> {
        let (drafter, base) = self.plan.step;
        let usual = if tier == Kind::Base { base } else { drafter };
        let mut machines = self.machines();
        let held = machines[host].held.subscribe();
        let mut random = machines[host].random.fork();
        move || {
            let mut held = held.clone();
            let step = usual + random.millis(0..3);
            Box::pin(async move {
                // The world is over when the sender is gone.
                let _ = held.wait_for(|held| !held).await;
                sleep(step).await;
                let _ = held.wait_for(|held| !held).await;
            })
        }
    }

    fn executor(&self, tier: Kind) -> FakeExecutor {
        let vocab_size = self.text.tokenizer().vocab_size();
        let salt = self.plan.salt ^ u64::from(tier == Kind::Base);
        FakeExecutor::new(FakeOptions {
            limits: Limits {
                vocab_size,
                context_length: 1024,
                page_size: 8,
                pages: self.plan.pages,
            },
            agreement_percent: self.plan.agreement_percent,
            salt: salt % 1_000_003,
            stop_token: (self.text.stop_tokens().first().copied().unwrap_or(2), 40),
            ..FakeOptions::default()
        })
    }

    /// Ends a host's process as `kill -9` does, or the loss of power.
    pub fn crash(&self, host: HostId, silent: bool) {
        self.net.crash(host, silent);
        let (starting, process) = {
            let mut machines = self.machines();
            (machines[host].starting.take(), machines[host].process.take())
        };
        drop(starting);
        if let Some(Process::Node { node, .. }) = &process {
            node.kill();
        }
        drop(process);
    }

    /// Starts a host again, whatever ran there.
    pub fn restart(&self, host: HostId) {
        self.crash(host, false);
        self.net.restart(host);
        self.start(host);
    }

    /// Holds a host or lets it go.
    pub fn hold(&self, host: HostId, held: bool) {
        self.net.hold(host, held);
        self.machines()[host].held.send_replace(held);
    }

    /// Asks a host's process to drain.
    pub fn drain(&self, host: HostId) {
        let machines = self.machines();
        match &machines[host].process {
            Some(Process::Router(_, shutdown) | Process::Node { shutdown, .. }) => {
                shutdown.cancel()
            }
            None => {}
        }
    }

    /// Whether a host's process has come up.
    #[must_use]
    pub fn is_up(&self, host: HostId) -> bool {
        self.machines()[host].process.is_some()
    }

    /// Whether every process is up and every router sees every node.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        let nodes = self.hosts().len() - self.plan.routers;
        let view = self.store.view();
        let registered = view.nodes.values().filter(|record| !record.draining).count();
        registered == nodes
            && self.machines().iter().all(|machine| match &machine.process {
                Some(Process::Router(router, _)) => router.is_ready(),
                Some(Process::Node { .. }) => true,
                None => false,
            })
    }

    /// What each engine does.
    #[must_use]
    pub fn engines(&self) -> Vec<(String, EngineStats)> {
        let machines = self.machines();
        let stats = machines.iter().zip(self.names.iter()).filter_map(|(machine, name)| {
            match &machine.process {
                Some(Process::Node { engine, .. }) => Some((name.clone(), engine.stats())),
                _ => None,
            }
        });
        stats.collect()
    }

    /// Answers that the routers have places taken for.
    #[must_use]
    pub fn answers(&self) -> Vec<(String, usize)> {
        let machines = self.machines();
        let answers = machines.iter().zip(self.names.iter()).filter_map(|(machine, name)| {
            match &machine.process {
                Some(Process::Router(router, _)) => Some((name.clone(), router.in_flight())),
                _ => None,
            }
        });
        answers.collect()
    }

    /// Asks everything to drain, waits until it has, and forgets it.
    pub async fn stop(&self) {
        for host in self.hosts() {
            self.drain(host);
        }
        let processes: Vec<Process> = {
            let mut machines = self.machines();
            machines.iter_mut().filter_map(|machine| machine.process.take()).collect()
        };
        for process in processes {
            match process {
                Process::Router(router, _) => drop(router.wait().await),
                Process::Node { mut node, .. } => drop(node.ended().await),
            }
        }
    }
}
