//! What the view makes of an etcd that is away, slow, empty or late, and of nodes that are cut off.

use std::sync::Arc;
use std::time::Duration;

use futures::stream::BoxStream;
use headstart_cluster::testing::{EtcdServer, Line, Proxy};
use headstart_cluster::{Etcd, Membership, NodeRecord, Tier, View};
use headstart_proto::v1::node_server::{Node, NodeServer};
use headstart_proto::v1::{
    DrainReply, DrainRequest, GetTokenizerChunk, GetTokenizerRequest, InfoRequest, InfoResponse,
};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tonic::transport::Server;
use tonic::{Request, Response, Status};

/// The shortest lease etcd grants is two seconds.
const TTL: Duration = Duration::from_secs(1);
/// Long enough for any lease here to run out.
const OUTAGE: Duration = Duration::from_secs(4);
/// Calls to an etcd that does not answer end after this.
const CALL_TIMEOUT: Duration = Duration::from_secs(3);
/// Far beyond anything a test waits for.
const PATIENCE: Duration = Duration::from_secs(60);

fn record(id: &str, address: &str, incarnation: u64) -> NodeRecord {
    let value = serde_json::json!({
        "node_id": id, "tier": Tier::Base, "address": address, "model": "qwen",
        "tokenizer_fingerprint": "ab", "text_fingerprint": "cd", "context_length": 4096,
        "slots": 8, "incarnation": incarnation,
    });
    serde_json::from_value(value).unwrap()
}

/// A node that answers `Info` under its name until it is dropped.
struct Answering {
    address: String,
    task: JoinHandle<()>,
}

impl Answering {
    async fn start(id: &'static str) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let incoming = tonic::transport::server::TcpIncoming::from(listener);
        let serving = Server::builder().add_service(NodeServer::new(Named(id)));
        let task = tokio::spawn(async move {
            let _ = serving.serve_with_incoming(incoming).await;
        });
        Self { address, task }
    }

    fn record(&self, id: &str) -> NodeRecord {
        record(id, &self.address, 1)
    }
}

impl Drop for Answering {
    fn drop(&mut self) {
        self.task.abort();
    }
}

struct Named(&'static str);

#[tonic::async_trait]
impl Node for Named {
    type GetTokenizerStream = BoxStream<'static, Result<GetTokenizerChunk, Status>>;

    async fn info(&self, _: Request<InfoRequest>) -> Result<Response<InfoResponse>, Status> {
        Ok(Response::new(InfoResponse { node_id: self.0.into(), ..Default::default() }))
    }

    async fn get_tokenizer(
        &self,
        _: Request<GetTokenizerRequest>,
    ) -> Result<Response<Self::GetTokenizerStream>, Status> {
        Err(Status::unimplemented("not asked for"))
    }

    async fn drain(&self, _: Request<DrainRequest>) -> Result<Response<DrainReply>, Status> {
        Err(Status::unimplemented("not asked for"))
    }
}

async fn connect(endpoint: &str) -> Etcd {
    for _ in 0..20 {
        if let Ok(etcd) = Etcd::connect(&[endpoint.to_owned()], "test", CALL_TIMEOUT).await {
            return etcd;
        }
    }
    panic!("etcd never answered");
}

fn has(view: &View, id: &str) -> bool {
    view.nodes.contains_key(&id.parse().unwrap())
}

async fn until(view: &mut watch::Receiver<Arc<View>>, what: &str, ok: impl Fn(&View) -> bool) {
    let reached = tokio::time::timeout(PATIENCE, view.wait_for(|view| ok(view))).await;
    reached.unwrap_or_else(|_| panic!("never saw: {what}")).expect("the watch lives");
}

/// Whether a view without the node was ever seen.
fn ever_without(view: &watch::Receiver<Arc<View>>, id: &'static str) -> JoinHandle<()> {
    let mut view = view.clone();
    tokio::spawn(async move {
        let _ = view.wait_for(|view| !has(view, id)).await;
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_etcd_that_was_paused_takes_leases_away_and_nobody_notices() {
    let server = EtcdServer::start().await.unwrap();
    let node = Answering::start("a").await;
    let (members, watcher) = (connect(&server.endpoint()).await, connect(&server.endpoint()).await);
    let mut view = watcher.watch();
    let _registration = members.register(node.record("a"), TTL).await.unwrap();
    until(&mut view, "a", |view| has(view, "a")).await;
    let lost = ever_without(&view, "a");
    server.set_paused(true).unwrap();
    tokio::time::sleep(OUTAGE).await;
    server.set_paused(false).unwrap();
    // It is back by itself, for newcomers too; whoever knew it never lost it.
    until(&mut connect(&server.endpoint()).await.watch(), "a again", |view| has(view, "a")).await;
    assert!(has(&view.borrow(), "a") && !lost.is_finished());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_without_its_record_stays_for_as_long_as_it_answers() {
    let mut server = EtcdServer::start().await.unwrap();
    let node = Answering::start("a").await;
    let line = Proxy::start(server.endpoint()).await.unwrap();
    let (members, watcher) = (connect(&line.address()).await, connect(&server.endpoint()).await);
    let mut view = watcher.watch();
    let _a = members.register(node.record("a"), TTL).await.unwrap();
    // Nobody is at this one's address; the other one's answers to another name.
    let _silent = members.register(record("silent", "127.0.0.1:9", 1), TTL).await.unwrap();
    let _other = members.register(record("other", &node.address, 1), TTL).await.unwrap();
    until(&mut view, "all three", |view| view.nodes.len() == 3).await;
    // They are cut off from etcd, and their leases run out.
    line.set(Line::Silent);
    until(&mut view, "those who do not answer go", |view| view.nodes.len() == 1).await;
    assert!(has(&view.borrow(), "a"));
    // An etcd that lost everything says no more about it.
    let lost = ever_without(&view, "a");
    server.wipe().unwrap();
    server.resume().await.unwrap();
    until(&mut connect(&server.endpoint()).await.watch(), "an empty list", |view| {
        view.nodes.is_empty()
    })
    .await;
    assert!(has(&view.borrow(), "a") && !lost.is_finished());
    // Once it does not answer either, it is gone.
    drop(node);
    until(&mut view, "a gone", |view| view.nodes.is_empty()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_deregisters_leaves_at_once_although_it_still_answers() {
    let server = EtcdServer::start().await.unwrap();
    let node = Answering::start("a").await;
    let (members, watcher) = (connect(&server.endpoint()).await, connect(&server.endpoint()).await);
    let mut view = watcher.watch();
    let registration = members.register(node.record("a"), TTL).await.unwrap();
    until(&mut view, "a", |view| has(view, "a")).await;
    registration.deregister().await;
    until(&mut view, "a gone", |view| view.nodes.is_empty()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_was_cut_off_registers_again_unless_a_later_start_of_it_did() {
    let server = EtcdServer::start().await.unwrap();
    let line = Proxy::start(server.endpoint()).await.unwrap();
    let (members, direct) = (connect(&line.address()).await, connect(&server.endpoint()).await);
    let mut view = direct.watch();
    let _a = members.register(record("a", "127.0.0.1:9", 1), TTL).await.unwrap();
    let mut b = members.register(record("b", "127.0.0.1:9", 1), TTL).await.unwrap();
    until(&mut view, "both", |view| view.nodes.len() == 2).await;
    line.set(Line::Silent);
    until(&mut view, "both expired", |view| view.nodes.is_empty()).await;
    let _later = direct.register(record("b", "127.0.0.1:9", 2), TTL).await.unwrap();
    until(&mut view, "the later b", |view| has(view, "b")).await;
    line.set(Line::Open);
    until(&mut view, "a again", |view| has(view, "a")).await;
    let told = tokio::time::timeout(PATIENCE, b.superseded()).await;
    told.expect("the earlier b hears of it");
    let incarnations: Vec<u64> = view.borrow().nodes.values().map(|r| r.incarnation).collect();
    assert_eq!(incarnations, [1, 2], "a came back as it was, b stays the later one");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_etcd_is_only_slow() {
    let server = EtcdServer::start().await.unwrap();
    let line = Proxy::start(server.endpoint()).await.unwrap();
    line.set(Line::Slow(Duration::from_millis(150)));
    let (members, watcher) = (connect(&line.address()).await, connect(&line.address()).await);
    let mut view = watcher.watch();
    let a = members.register(record("a", "127.0.0.1:9", 1), TTL * 4).await.unwrap();
    until(&mut view, "a", |view| has(view, "a")).await;
    let lost = ever_without(&view, "a");
    // It keeps its lease, and its news arrive.
    tokio::time::sleep(OUTAGE * 2).await;
    a.update(|record| record.slots = 3);
    until(&mut view, "news", |view| view.nodes.values().any(|a| a.slots == 3)).await;
    assert!(!lost.is_finished());
    a.deregister().await;
    until(&mut view, "a gone", |view| view.nodes.is_empty()).await;
}
