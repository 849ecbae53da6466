//! Bases with roles behind a router, all of them real, on the fake executor, which refuses KV that is
//! not that of its tokens. Whatever moves, drains or dies: each answer is the one of a single base.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use headstart_base_node::KvOptions;
use headstart_cluster::{BaseRole, InMemory, Membership};
use headstart_drafter_node::DrafterOptions;
use headstart_engine::executor::fake::{FakeExecutor, FakeOptions};
use headstart_engine::{EngineHandle, EngineOptions, Limits};
use headstart_proto::NodeId;
use headstart_router::{RouterOptions, RunningRouter};
use headstart_service::net::Dialer;
use headstart_service::node::{Lifetimes, RunningNode};
use headstart_tests::http::Client;
use headstart_text::ModelText;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

/// Requests at once.
const REQUESTS: usize = 12;

struct Base {
    node: RunningNode,
    engine: EngineHandle,
    shutdown: CancellationToken,
}

struct Cluster {
    members: InMemory,
    text: ModelText,
    router: RunningRouter,
    _drafter: RunningNode,
}

async fn listen() -> (TcpListener, String) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("bound").to_string();
    (listener, address)
}

fn engine(options: FakeOptions) -> EngineHandle {
    let slots = 2 * REQUESTS;
    let engine_options = EngineOptions { slots, ..EngineOptions::default() };
    EngineHandle::start(Box::new(FakeExecutor::new(options)), engine_options)
}

fn options(id: &str, address: String, model: &str) -> DrafterOptions {
    DrafterOptions {
        node_id: NodeId::new(id).expect("a valid id"),
        address,
        model: model.into(),
        dtype: "f32".into(),
        handoff_timeout: Duration::from_secs(20),
        lifetimes: Lifetimes::default(),
        dialer: Dialer::default(),
    }
}

impl Cluster {
    async fn start() -> Self {
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/stories260k");
        let text = ModelText::load(&fixtures).expect("the fixture is whole");
        let members = InMemory::new();
        let (listener, address) = listen().await;
        let drafts = engine(FakeOptions { salt: 1, agreement_percent: 70, ..slow() });
        let stop = CancellationToken::new();
        let options = options("d1", address, "small");
        let started =
            headstart_drafter_node::start(options, drafts, &text, &members, listener, stop);
        let drafter = started.await.expect("starts");
        let (http, grpc) = (listen().await.0, listen().await.0);
        let membership: Arc<dyn Membership> = Arc::new(members.clone());
        let (options, stop) = (RouterOptions::default(), CancellationToken::new());
        let router = headstart_router::start(options, membership, http, grpc, stop);
        let router = router.await.expect("starts");
        Self { members, text, router, _drafter: drafter }
    }

    async fn base(&self, id: &str, role: BaseRole, fake: FakeOptions) -> Base {
        let (listener, address) = listen().await;
        let (kv_listener, kv_address) = listen().await;
        let kv = KvOptions {
            role,
            listener: Some(kv_listener.into()),
            address: kv_address,
            ..KvOptions::default()
        };
        let (engine, shutdown) = (engine(fake), CancellationToken::new());
        let node = headstart_base_node::start(
            kv,
            options(id, address, "big"),
            engine.clone(),
            &self.text,
            &self.members,
            listener,
            shutdown.clone(),
        );
        Base { node: node.await.expect("starts"), engine, shutdown }
    }

    /// The answers to all requests, asked at once.
    fn ask(&self) -> Vec<tokio::task::JoinHandle<Value>> {
        let client = Client::new(&self.router.http_addr().to_string());
        let ask = |index: usize| {
            let client = client.clone();
            let content = format!("Once upon a time, there were {index} little girls in a house.");
            let body = json!({
                "model": "big",
                "messages": [{"role": "user", "content": content}],
                "max_tokens": 100,
                "temperature": 0.8,
                "seed": index,
                "frequency_penalty": 0.2,
                "return_token_ids": true,
            });
            tokio::task::spawn_blocking(move || {
                let response = client.post("/v1/chat/completions", &body);
                assert_eq!(response.status, 200, "{}", response.body);
                response.body["choices"][0]["token_ids"].clone()
            })
        };
        (0..REQUESTS).map(ask).collect()
    }

    async fn ready(&self) {
        until("the router is ready", || self.router.is_ready()).await;
    }
}

async fn all(asked: Vec<tokio::task::JoinHandle<Value>>) -> Vec<Value> {
    let mut answers = Vec::new();
    for answer in asked {
        answers.push(answer.await.expect("an answer"));
    }
    answers
}

async fn until(what: &str, condition: impl Fn() -> bool) {
    for _ in 0..8_000 {
        if condition() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("never: {what}");
}

/// A fake whose answers take long enough to be disturbed.
fn slow() -> FakeOptions {
    FakeOptions { step_latency: Duration::from_millis(2), ..FakeOptions::default() }
}

async fn nothing_is_held(engine: &EngineHandle) {
    until("nothing is held", || {
        let stats = engine.stats();
        stats.slots_used == 0 && stats.kv_tokens_used == 0
    })
    .await;
}

/// What a single base answers.
async fn undisturbed() -> Vec<Value> {
    let cluster = Cluster::start().await;
    let base = cluster.base("u1", BaseRole::Unified, slow()).await;
    cluster.ready().await;
    let answers = all(cluster.ask()).await;
    assert_eq!(base.engine.stats().counters.tokens_preempted, 0);
    answers
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_pair_answers_as_one_and_a_drain_moves_what_it_writes() {
    let expected = undisturbed().await;
    let cluster = Cluster::start().await;
    let reader = cluster.base("s1", BaseRole::Score, slow()).await;
    let limits = Limits { vocab_size: 512, context_length: 4096, page_size: 8, pages: 4096 };
    let writer =
        cluster.base("w1", BaseRole::Decode, FakeOptions { limits, tp: 2, ..slow() }).await;
    cluster.ready().await;
    assert_eq!(all(cluster.ask()).await, expected);
    let moved = writer.engine.stats().counters;
    println!(
        "the writer took over {} tokens and computed {}",
        moved.tokens_reused, moved.tokens_extended
    );
    assert!(moved.tokens_reused > 0);
    nothing_is_held(&reader.engine).await;
    nothing_is_held(&writer.engine).await;

    let _third = cluster.base("w2", BaseRole::Decode, slow()).await;
    let asked = cluster.ask();
    until("the writer writes", || writer.engine.stats().slots_used >= 2).await;
    writer.shutdown.cancel();
    let Base { mut node, engine, .. } = writer;
    assert_eq!(all(asked).await, expected);
    node.ended().await.expect("a drained node ends well");
    nothing_is_held(&engine).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_pair_that_loses_a_half_answers_all_the_same() {
    let expected = undisturbed().await;
    for (lost, role) in [("s1", BaseRole::Score), ("w1", BaseRole::Decode)] {
        let cluster = Cluster::start().await;
        let reader = cluster.base("s1", BaseRole::Score, slow()).await;
        let writer = cluster.base("w1", BaseRole::Decode, slow()).await;
        let victim = if role == BaseRole::Score { &reader } else { &writer };
        cluster.ready().await;
        let asked = cluster.ask();
        until("it has work", || victim.engine.stats().slots_used >= 2).await;
        victim.node.kill();
        assert_eq!(all(asked).await, expected, "{lost} died");
    }
}
