//! A cluster of the real services on simulated machines.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::StreamExt;
use futures::future::BoxFuture;
use headstart_base_node::{Holdings, KvOptions};
use headstart_engine::executor::fake::{FakeExecutor, FakeOptions};
use headstart_engine::{EngineHandle, EngineOptions, Limits};
use headstart_handoff::{KvStream, KvTransport, Times};
use headstart_proto::NodeId;
use headstart_router::{Encoding, RouterOptions, RunningRouter};
use headstart_service::net::{Dialer, Listener};
use headstart_service::node::{Lifetimes, RunningNode};
use headstart_text::ModelText;
use tokio::sync::watch;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use crate::net::{HostId, KV_PORT, NODE_PORT, Net};
use crate::oracle::Oracle;
use crate::plan::{Base, Kind, Plan};
use crate::random::Random;
use crate::store::Store;
use crate::trace::Trace;
use crate::wire::Wire;

/// The routers' port for clients.
const ROUTER_PORT: u16 = 50_051;
/// How soon a process that could not start is started again.
const START_RETRY: Duration = Duration::from_millis(250);
/// The longest that anything in the cluster may take.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a record outlives its node.
pub const LEASE_TTL: Duration = Duration::from_secs(3);
/// How long live work may take to end when a process is asked to stop.
pub const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);

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
    /// What its protocols say.
    pub wire: Wire,
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
        /// What a base holds beside its engine's.
        holdings: Option<Holdings>,
        _runner: AbortOnDropHandle<()>,
        shutdown: CancellationToken,
    },
}

/// KV over the simulated network.
struct KvDialer(Dialer);

impl KvTransport for KvDialer {
    fn connect<'a>(
        &'a self,
        address: &'a str,
    ) -> BoxFuture<'a, std::io::Result<Box<dyn KvStream>>> {
        Box::pin(async {
            let stream = self.0.dial(address).await?;
            Ok(Box::new(stream) as Box<dyn KvStream>)
        })
    }
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
        let wire = Wire::default();
        let net = Net::new(names.clone(), random, trace.clone(), wire.clone());
        let (plan, names) = (Arc::new(plan), Arc::new(names));
        Self { plan, net, store: Store::default(), trace, wire, names, text, machines }
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
        self.plan.kind(host)
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
            drafter: self.executor(Kind::Drafter, None),
            base: self.executor(Kind::Base, None),
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
        let base = self.base(host);
        let (engine, runner) =
            EngineHandle::start_paced(Box::new(self.executor(tier, base)), engine, pace);
        let runner = AbortOnDropHandle::new(tokio::spawn(runner));
        let name = &self.names[host];
        let options = headstart_base_node::BaseOptions {
            node_id: NodeId::new(name).map_err(|error| error.to_string())?,
            address: format!("{name}:{NODE_PORT}"),
            model: if tier == Kind::Base { "big".into() } else { "small".into() },
            dtype: "f32".into(),
            handoff_timeout: self.plan.handoff_timeout,
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
        let started = match base {
            Some(base) => {
                let kv = KvOptions {
                    role: base.role,
                    listener: Some(self.net.listen(host, KV_PORT)),
                    address: format!("{name}:{KV_PORT}"),
                    transport: Arc::new(KvDialer(self.net.dialer(host))),
                    times: Times { lease: self.plan.kv_lease, ..Times::default() },
                };
                headstart_base_node::start_watched(
                    kv,
                    options,
                    handle,
                    text,
                    &membership,
                    listener,
                    stop,
                )
                .await
                .map(|(node, holdings)| (node, Some(holdings)))
            }
            None => {
                headstart_drafter_node::start(options, handle, text, &membership, listener, stop)
                    .await
                    .map(|node| (node, None))
            }
        };
        let (node, holdings) = started.map_err(|error| error.to_string())?;
        Ok(Process::Node { node, engine, holdings, _runner: runner, shutdown })
    }

    /// What a host is as a base.
    fn base(&self, host: HostId) -> Option<Base> {
        let Plan { routers, drafters, bases, .. } = &*self.plan;
        host.checked_sub(routers + drafters).and_then(|index| bases.get(index).copied())
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

    fn executor(&self, tier: Kind, base: Option<Base>) -> FakeExecutor {
        let (page_size, tp) = base.map_or((8, 1), |base| (base.page_size, base.tp));
        let vocab_size = self.text.tokenizer().vocab_size();
        let salt = self.plan.salt ^ u64::from(tier == Kind::Base);
        FakeExecutor::new(FakeOptions {
            limits: Limits {
                vocab_size,
                context_length: 1024,
                page_size,
                // Everybody has room for the same number of tokens.
                pages: self.plan.pages * 8 / page_size,
            },
            tp,
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

    /// What hosts hold for requests, each thing with its host.
    #[must_use]
    pub fn held(&self) -> Vec<String> {
        let machines = self.machines();
        let mut held = Vec::new();
        for (machine, name) in machines.iter().zip(self.names.iter()) {
            let counts = match &machine.process {
                Some(Process::Router(router, _)) => {
                    vec![("requests", router.in_flight()), ("places on nodes", router.places())]
                }
                Some(Process::Node { node, engine, holdings, .. }) => {
                    let stats = engine.stats();
                    let mut counts = holdings.as_ref().map_or(Vec::new(), Holdings::counts);
                    counts.push(("slots", stats.slots_used));
                    counts.push(("KV tokens", stats.kv_tokens_used));
                    counts.push(("sessions", node.sessions()));
                    counts
                }
                None => Vec::new(),
            };
            let some = counts.into_iter().filter(|(_, count)| *count > 0);
            held.extend(some.map(|(what, count)| format!("{name}: {count} {what}")));
        }
        held
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
