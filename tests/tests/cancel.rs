//! A client that hangs up, over HTTP or gRPC, at every phase of its request: nothing is held for it
//! anywhere a moment later. The whole cluster on the fake executor, whose steps wait at gates, so that
//! each phase lasts until the test is done with it. After the client is gone each engine may make a
//! few steps more, far fewer than the answer would take.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use headstart_base_node::KvOptions;
use headstart_cluster::testing::{Line, Proxy};
use headstart_cluster::{BaseRole, InMemory, Membership};
use headstart_drafter_node::DrafterOptions;
use headstart_engine::executor::fake::{FakeExecutor, FakeOptions, Gate};
use headstart_engine::{EngineHandle, EngineOptions};
use headstart_handoff::Times;
use headstart_proto::v1::router_client::RouterClient;
use headstart_proto::{NodeId, v1};
use headstart_router::{RouterOptions, RunningRouter};
use headstart_service::net::Dialer;
use headstart_service::node::{Lifetimes, RunningNode};
use headstart_text::ModelText;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::{Builder, Handle};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// Tokens of an answer: far more than the steps that are let through.
const MAX_TOKENS: u32 = 200;
/// Steps that an engine may make before it must have dropped what was cancelled.
const STEPS_LEFT: usize = 3;
/// Longer than any test: a lease that only its expiry ends is a leak here.
const LEASE: Duration = Duration::from_secs(3600);
/// Thresholds: no fake is so sure, and every window reaches the other one.
const NEVER: f32 = 1.0;
const AT_ONCE: f32 = 1e-6;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Door {
    /// HTTP, for a whole answer.
    Whole,
    /// HTTP, for a stream.
    Stream,
    Grpc,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// It waits to be admitted.
    Queued,
    /// Both nodes have it, and neither has computed anything.
    Begun,
    /// A draft is shorter than the first window.
    Drafting,
    /// The base scores what is behind it.
    Scoring,
    /// The draft is decided.
    Switched,
    /// The base writes.
    Writing,
    /// The base that will write pulls the KV of what is scored.
    Following,
    /// It has the answer, and the KV is stuck on its way.
    Moving,
    /// Its only base is lost.
    Lost,
    /// Another base begins where a lost one was.
    Resuming,
}

struct Node {
    node: RunningNode,
    engine: EngineHandle,
    gate: Arc<Gate>,
    shutdown: CancellationToken,
}

struct Cluster {
    router: RunningRouter,
    shutdown: CancellationToken,
    drafter: Node,
    bases: Vec<Node>,
    kv_lines: Vec<Proxy>,
}

async fn listen() -> (TcpListener, String) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("bound").to_string();
    (listener, address)
}

fn options(id: &str, address: String, model: &str) -> DrafterOptions {
    DrafterOptions {
        node_id: NodeId::new(id).expect("a valid id"),
        address,
        model: model.into(),
        dtype: "f32".into(),
        handoff_timeout: Duration::from_secs(60),
        lifetimes: Lifetimes::default(),
        dialer: Dialer::default(),
    }
}

/// An engine whose steps wait at the gate.
fn engine(salt: u64, slots: usize) -> (EngineHandle, Arc<Gate>) {
    let gate = Arc::new(Gate::default());
    let fake = FakeOptions { salt, gate: Some(Arc::clone(&gate)), ..FakeOptions::default() };
    let options = EngineOptions { slots, ..EngineOptions::default() };
    (EngineHandle::start(Box::new(FakeExecutor::new(fake)), options), gate)
}

impl Cluster {
    /// A drafter, bases with these roles, a router.
    async fn start(roles: &[BaseRole], slots: usize) -> Self {
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/stories260k");
        let text = ModelText::load(&fixtures).expect("the fixture is whole");
        let members = InMemory::new();
        let (listener, address) = listen().await;
        let (drafts, gate) = engine(1, slots);
        let stop = CancellationToken::new();
        let node = headstart_drafter_node::start(
            options("d1", address, "small"),
            drafts.clone(),
            &text,
            &members,
            listener,
            stop.clone(),
        );
        let node = node.await.expect("starts");
        let drafter = Node { node, engine: drafts, gate, shutdown: stop };
        let (mut bases, mut kv_lines) = (Vec::new(), Vec::new());
        for (role, index) in roles.iter().zip(1..) {
            let (listener, address) = listen().await;
            let (kv_listener, kv_address) = listen().await;
            let line = Proxy::start(kv_address).await.expect("a free port");
            let kv = KvOptions {
                role: *role,
                listener: Some(kv_listener.into()),
                address: line.address(),
                times: Times { lease: LEASE, ..Times::default() },
                ..KvOptions::default()
            };
            kv_lines.push(line);
            let (engine, gate) = engine(0, slots);
            let shutdown = CancellationToken::new();
            let node = headstart_base_node::start(
                kv,
                options(&format!("b{index}"), address, "big"),
                engine.clone(),
                &text,
                &members,
                listener,
                shutdown.clone(),
            );
            bases.push(Node { node: node.await.expect("starts"), engine, gate, shutdown });
        }
        let (http, grpc) = (listen().await.0, listen().await.0);
        let (membership, shutdown): (Arc<dyn Membership>, _) =
            (Arc::new(members), CancellationToken::new());
        let options = RouterOptions::default();
        let router = headstart_router::start(options, membership, http, grpc, shutdown.clone());
        let router = router.await.expect("starts");
        until("the router is ready", || router.is_ready()).await;
        Self { router, shutdown, drafter, bases, kv_lines }
    }

    fn engines(&self) -> impl Iterator<Item = &Node> {
        self.bases.iter().chain([&self.drafter])
    }

    /// Asks, and reads what comes until the task is aborted: then the client is gone.
    async fn ask(&self, door: Door, threshold: f32, max_tokens: u32) -> JoinHandle<()> {
        let content = "Once upon a time, there was a little girl who lived in a house.";
        if door == Door::Grpc {
            let request = v1::GenerateRequest {
                model: "big".into(),
                messages: vec![v1::Message { role: "user".into(), content: content.into() }],
                max_tokens: Some(max_tokens),
                threshold: Some(threshold),
                ..Default::default()
            };
            let address = format!("http://{}", self.router.grpc_addr());
            let mut client = RouterClient::connect(address).await.expect("connects");
            return tokio::spawn(async move {
                let mut frames = client.generate(request).await.expect("taken").into_inner();
                while frames.message().await.expect("a frame").is_some() {}
            });
        }
        let stream = door == Door::Stream;
        let body = format!(
            r#"{{"model": "big", "max_tokens": {max_tokens}, "stream": {stream},
                 "messages": [{{"role": "user", "content": "{content}"}}],
                 "headstart": {{"threshold": {threshold}}}}}"#
        );
        let head = format!(
            "POST /v1/chat/completions HTTP/1.1\r\nhost: t\r\nconnection: close\r\n\
             content-length: {}\r\n\r\n{body}",
            body.len()
        );
        let mut connection = TcpStream::connect(self.router.http_addr()).await.expect("connects");
        tokio::spawn(async move {
            connection.write_all(head.as_bytes()).await.expect("it reads");
            let mut reply = String::new();
            connection.read_to_string(&mut reply).await.expect("a reply");
            assert!(reply.starts_with("HTTP/1.1 200"), "{reply}");
        })
    }

    /// Gates that are open for a whole answer, so that every connection stands.
    async fn warm_up(&self, door: Door) -> usize {
        self.engines().for_each(|node| node.gate.set_open(true));
        self.ask(door, AT_ONCE, 8).await.await.expect("an answer");
        self.nothing_is_known().await;
        self.nothing_is_held().await;
        self.engines().for_each(|node| node.gate.set_open(false));
        Handle::current().metrics().num_alive_tasks()
    }

    /// No task anywhere knows of a request.
    async fn nothing_is_known(&self) {
        until_empty(|| {
            let counters = [
                ("places in the router", self.router.in_flight() as u64),
                ("answers in flight", metric("headstart_router_in_flight", "")),
                ("drafters' tasks", live("drafter")),
                ("bases' tasks", live("base")),
                ("entries at the rendezvous", metric("headstart_base_open_requests", "")),
                ("handoffs", metric("headstart_base_handoffs", "")),
                ("pulls", metric("headstart_base_kv_pulls_held", "")),
                ("leases", metric("headstart_base_kv_leases_held", "")),
            ];
            counters.iter().filter(|(_, count)| *count != 0).map(|it| format!("{it:?}")).collect()
        })
        .await;
    }

    /// No engine holds anything.
    async fn nothing_is_held(&self) {
        until_empty(|| {
            let held = self.engines().flat_map(|Node { node, engine, .. }| {
                let (stats, name) = (engine.stats(), node.record().node_id.clone());
                let slots = (stats.slots_used > 0).then(|| format!("{name}: slots"));
                let pages = (stats.kv_tokens_used > 0).then(|| format!("{name}: KV pages"));
                slots.into_iter().chain(pages)
            });
            held.collect()
        })
        .await;
    }

    /// Ends everything; no task may be left.
    async fn stop(self) {
        let Self { router, shutdown, drafter, bases, kv_lines } = self;
        shutdown.cancel();
        let nodes: Vec<Node> = bases.into_iter().chain([drafter]).collect();
        nodes.iter().for_each(|node| node.shutdown.cancel());
        router.wait().await.expect("it ends well");
        for Node { mut node, .. } in nodes {
            // One that was killed has ended already.
            let _ = node.ended().await;
        }
        drop(kv_lines);
        let tasks = || Handle::current().metrics().num_alive_tasks();
        until("no task is left", || tasks() == 0).await;
    }

    /// Asks, and waits until the request is in `phase`.
    async fn bring_to(&self, phase: Phase, door: Door) -> JoinHandle<()> {
        let (drafter, base) = (&self.drafter, &self.bases[0]);
        let before = Counts::now();
        let passed = || Counts::now().since(before);
        match phase {
            Phase::Queued | Phase::Begun => {
                let asked = self.ask(door, NEVER, MAX_TOKENS).await;
                until("both begin", || drafter.gate.holds_a_step() && base.gate.holds_a_step())
                    .await;
                asked
            }
            Phase::Drafting => {
                base.gate.set_open(true);
                drafter.gate.let_through(3);
                let asked = self.ask(door, NEVER, MAX_TOKENS).await;
                until("three are drafted", || passed().received == 3).await;
                asked
            }
            Phase::Scoring | Phase::Lost | Phase::Resuming => {
                self.bases.iter().for_each(|base| base.gate.set_open(true));
                drafter.gate.let_through(10);
                let asked = self.ask(door, NEVER, MAX_TOKENS).await;
                until("the first scores", || passed().drafted > 6).await;
                asked
            }
            Phase::Switched | Phase::Writing => {
                drafter.gate.let_through(6);
                let asked = self.ask(door, AT_ONCE, MAX_TOKENS).await;
                until("a window is drafted", || passed().received == 6).await;
                let written = if phase == Phase::Writing { 4 } else { 0 };
                until("it waits", || base.gate.holds_a_step()).await;
                while passed().switched == 0 || passed().written < written {
                    base.gate.let_through(1);
                    until("the next step", || base.gate.holds_a_step()).await;
                }
                asked
            }
            Phase::Following => {
                base.gate.set_open(true);
                drafter.gate.let_through(40);
                let asked = self.ask(door, NEVER, MAX_TOKENS).await;
                let writer = &self.bases[1].engine;
                until("pages have come", || writer.stats().kv_tokens_used > 0).await;
                asked
            }
            Phase::Moving => {
                self.kv_lines[0].set(Line::Silent);
                base.gate.set_open(true);
                drafter.gate.let_through(6);
                let asked = self.ask(door, AT_ONCE, MAX_TOKENS).await;
                until("the writer has it", || passed().started == 2).await;
                asked
            }
        }
    }
}

/// What was counted so far, by all nodes and the router of this process.
#[derive(Clone, Copy, Debug)]
struct Counts {
    /// Draft tokens that bases received.
    received: u64,
    /// Tokens that clients were sent, by who wrote them.
    drafted: u64,
    written: u64,
    /// Drafts that ended by a switch.
    switched: u64,
    /// Answers that bases were asked for.
    started: u64,
    /// Attempts that failed.
    failed: u64,
}

impl Counts {
    fn now() -> Self {
        Self {
            received: metric("headstart_base_draft_received_total", ""),
            drafted: metric("headstart_router_tokens_total", "drafter"),
            written: metric("headstart_router_tokens_total", "base"),
            switched: metric("headstart_base_drafts_total", "switched"),
            started: metric("headstart_base_requests_started_total", ""),
            failed: metric("headstart_router_failovers_total", "base"),
        }
    }

    fn since(self, before: Self) -> Self {
        Self {
            received: self.received - before.received,
            drafted: self.drafted - before.drafted,
            written: self.written - before.written,
            switched: self.switched - before.switched,
            started: self.started - before.started,
            failed: self.failed - before.failed,
        }
    }
}

/// A metric of this process: the sum over its label sets that have `label` in them.
fn metric(name: &str, label: &str) -> u64 {
    let text = headstart_service::metrics::render();
    let values = text.lines().filter_map(|line| {
        let rest = line.strip_prefix(name)?;
        let (labels, value) = rest.rsplit_once(' ')?;
        let is_it = labels.is_empty() || labels.starts_with('{');
        (is_it && labels.contains(label)).then(|| value.parse::<f64>().expect("a number"))
    });
    values.sum::<f64>() as u64
}

/// Requests of a tier that started and did not end.
fn live(tier: &str) -> u64 {
    let started = metric(&format!("headstart_{tier}_requests_started_total"), "");
    // Read in this order, neither is ahead of the other for good.
    started.saturating_sub(metric(&format!("headstart_{tier}_requests_total"), ""))
}

async fn until(what: &str, condition: impl Fn() -> bool) {
    until_empty(|| if condition() { Vec::new() } else { vec![what.to_owned()] }).await;
}

/// Waits until nothing is left.
async fn until_empty(left: impl Fn() -> Vec<String>) {
    for _ in 0..6_000 {
        if left().is_empty() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("left: {:?}", left());
}

async fn case(phase: Phase, door: Door) {
    use BaseRole::{Decode, Score, Unified};
    let (roles, slots): (&[_], _) = match phase {
        Phase::Queued => (&[Unified], 1),
        Phase::Following | Phase::Moving => (&[Score, Decode], 4),
        Phase::Resuming => (&[Unified, Unified], 4),
        _ => (&[Unified], 4),
    };
    let cluster = Cluster::start(roles, slots).await;
    let tasks = cluster.warm_up(door).await;
    let asked = cluster.bring_to(phase, door).await;
    if phase == Phase::Queued {
        let waits = cluster.ask(door, NEVER, MAX_TOKENS).await;
        until("one more waits", || cluster.router.in_flight() == 2).await;
        waits.abort();
        until("it has left the queue", || cluster.router.in_flight() == 1).await;
    }
    if matches!(phase, Phase::Lost | Phase::Resuming) {
        let at = cluster.bases.iter().position(|base| base.engine.stats().slots_used > 0);
        let victim = at.expect("one has the answer");
        let others = || cluster.bases.iter().enumerate().filter(|(index, _)| *index != victim);
        others().for_each(|(_, base)| base.gate.set_open(false));
        let before = Counts::now();
        cluster.bases[victim].node.kill();
        until("it is lost", || Counts::now().since(before).failed > 0).await;
        until("it goes on", || others().all(|(_, base)| base.gate.holds_a_step())).await;
    }
    cluster.engines().for_each(|node| node.gate.set_open(false));
    asked.abort();
    assert!(asked.await.is_err_and(|error| error.is_cancelled()), "it was under way");
    cluster.kv_lines.iter().for_each(|line| line.set(Line::Open));
    // First all that runs beside the engines; then the engines, which let go between two steps.
    cluster.nothing_is_known().await;
    cluster.engines().for_each(|node| node.gate.let_through(STEPS_LEFT));
    cluster.nothing_is_held().await;
    if !matches!(phase, Phase::Lost | Phase::Resuming) {
        let now = || Handle::current().metrics().num_alive_tasks();
        until("no task is left of it", || now() <= tasks).await;
    }
    cluster.engines().for_each(|node| node.gate.set_open(true));
    cluster.stop().await;
}

#[test]
fn a_client_that_hangs_up_leaves_nothing_behind() {
    use Phase::{
        Begun, Drafting, Following, Lost, Moving, Queued, Resuming, Scoring, Switched, Writing,
    };
    let phases =
        [Queued, Begun, Drafting, Scoring, Switched, Writing, Following, Moving, Lost, Resuming];
    for phase in phases {
        for door in [Door::Whole, Door::Stream, Door::Grpc] {
            println!("{phase:?} {door:?}");
            // Its own, so that its tasks can be counted.
            let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build();
            runtime.expect("a runtime").block_on(case(phase, door));
        }
    }
}
