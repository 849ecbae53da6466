//! A node's life over real sockets: health, reflection, info, tokenizer, drain, crash.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use futures::future::BoxFuture;
use headstart_cluster::{
    BaseRole, ClusterError, InMemory, Membership, NodeRecord, Registration, Tier, View,
    incarnation_now,
};
use headstart_proto::v1::node_client::NodeClient;
use headstart_proto::v1::node_server::{Node, NodeServer};
use headstart_proto::v1::{
    DrainReply, DrainRequest, GetTokenizerChunk, GetTokenizerRequest, InfoRequest, InfoResponse,
    NodeRole,
};
use headstart_proto::{Error, ErrorCode};
use headstart_service::channel::KeepAlive;
use headstart_service::link::Link;
use headstart_service::net::Dialer;
use headstart_service::node::{Lifetimes, NodeError, NodeParts, RunningNode};
use headstart_service::node_service::{NodeService, NodeStatus};
use headstart_service::server::{GrpcServer, ServeError, bind};
use headstart_service::text_client::fetch_model_text;
use headstart_service::{channel, metrics};
use headstart_text::ModelText;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::transport::Channel;
use tonic::{Request, Response, Status};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;

/// Far beyond anything a test waits for.
const PATIENCE: Duration = Duration::from_secs(60);

fn text() -> ModelText {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/stories260k");
    ModelText::load(&path).unwrap()
}

async fn listen() -> TcpListener {
    bind("listen", "127.0.0.1:0".parse().unwrap()).await.unwrap()
}

fn link(address: &str) -> Link {
    Link::new(&Dialer::default(), address, PATIENCE, KeepAlive::CLUSTER).unwrap()
}

fn record(address: SocketAddr, text: &ModelText) -> NodeRecord {
    NodeRecord {
        node_id: "base-1".parse().unwrap(),
        tier: Tier::Base,
        address: address.to_string(),
        model: "stories".into(),
        tokenizer_fingerprint: text.tokenizer().fingerprint().to_string(),
        text_fingerprint: text.fingerprint().to_string(),
        context_length: 512,
        slots: 4,
        kv_tokens: 0,
        draining: false,
        incarnation: incarnation_now(),
        base_role: BaseRole::Unified,
        kv_address: String::new(),
    }
}

/// A store that is away for the first `away` calls.
struct Away {
    away: AtomicUsize,
    members: InMemory,
}

impl Membership for Away {
    fn register(
        &self,
        record: NodeRecord,
        ttl: Duration,
    ) -> BoxFuture<'_, Result<Registration, ClusterError>> {
        let before =
            self.away.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1));
        match before {
            Ok(_) => {
                let (endpoints, cause) = ("etcd:2379".into(), "no answer".into());
                let error = ClusterError::Unreachable { endpoints, timeout: PATIENCE, cause };
                Box::pin(async { Err(error) })
            }
            Err(_) => self.members.register(record, ttl),
        }
    }

    fn watch(&self) -> watch::Receiver<Arc<View>> {
        self.members.watch()
    }
}

struct Started {
    node: RunningNode,
    channel: Channel,
    members: InMemory,
    draining: CancellationToken,
    sessions: TaskTracker,
    shutdown: CancellationToken,
    alive: Arc<AtomicBool>,
}

async fn start(drain_timeout: Duration) -> Started {
    let members = InMemory::new();
    start_with(drain_timeout, &members, members.clone()).await
}

async fn start_with(
    drain_timeout: Duration,
    membership: &dyn Membership,
    members: InMemory,
) -> Started {
    let (listener, alive) = (listen().await, Arc::new(AtomicBool::new(true)));
    let shutdown = CancellationToken::new();
    let parts = parts(&listener, drain_timeout, &alive, &shutdown);
    let (draining, sessions) = (parts.draining.clone(), parts.sessions.clone());
    let node = parts.start(listener, membership, shutdown.clone()).await.unwrap();
    let channel = channel::connect(&node.record().address, PATIENCE).await.unwrap();
    Started { node, channel, members, draining, sessions, shutdown, alive }
}

/// A node whose engine is broken once it is not `alive`.
fn parts(
    listener: &TcpListener,
    drain_timeout: Duration,
    alive: &Arc<AtomicBool>,
    shutdown: &CancellationToken,
) -> NodeParts {
    let text = text();
    let record = record(listener.local_addr().unwrap(), &text);
    let (draining, sessions) = (CancellationToken::new(), TaskTracker::new());
    let drains = draining.clone();
    let status = move || NodeStatus {
        slots_used: 3,
        kv_tokens: 1024,
        kv_tokens_used: 100,
        draining: drains.is_cancelled(),
    };
    let service = NodeService::new(&record, &text, "f32", status, shutdown.clone());
    let living = Arc::clone(alive);
    NodeParts {
        record,
        server: GrpcServer::new().unwrap().add(NodeServer::new(service)),
        draining,
        sessions,
        failure: Box::new(move || (!living.load(Ordering::SeqCst)).then(|| "broken".to_owned())),
        lifetimes: Lifetimes {
            lease_ttl: Duration::from_millis(200),
            drain_timeout,
            ..Lifetimes::default()
        },
    }
}

async fn until(mut view: watch::Receiver<Arc<View>>, what: &str, ok: impl Fn(&View) -> bool) {
    let reached = tokio::time::timeout(PATIENCE, view.wait_for(|view| ok(view))).await;
    reached.unwrap_or_else(|_| panic!("never saw: {what}")).unwrap();
}

async fn health(channel: Channel, service: &str) -> Result<i32, Status> {
    let request = HealthCheckRequest { service: service.into() };
    Ok(HealthClient::new(channel).check(request).await?.into_inner().status)
}

#[tokio::test]
async fn a_store_that_is_away_at_the_start_is_waited_for() {
    let members = InMemory::new();
    let store = Away { away: AtomicUsize::new(2), members: members.clone() };
    let started = start_with(Duration::from_secs(5), &store, members).await;
    until(started.members.watch(), "the node", |view| view.nodes.len() == 1).await;
    assert_eq!(store.away.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn a_node_whose_engine_stopped_does_not_wait_for_the_store() {
    let store = Away { away: AtomicUsize::new(usize::MAX), members: InMemory::new() };
    let (listener, alive) = (listen().await, Arc::new(AtomicBool::new(true)));
    let shutdown = CancellationToken::new();
    let parts = parts(&listener, PATIENCE, &alive, &shutdown);
    let starting = parts.start(listener, &store, shutdown);
    alive.store(false, Ordering::SeqCst);
    let error = tokio::time::timeout(PATIENCE, starting).await.expect("ends").unwrap_err();
    assert!(matches!(&error, NodeError::Engine(why) if why == "broken"), "{error}");
}

#[tokio::test]
async fn a_node_tells_about_itself() {
    let node = start(PATIENCE).await;
    let info = NodeClient::new(node.channel.clone()).info(InfoRequest {}).await.unwrap();
    let info = info.into_inner();
    let record = node.node.record();
    assert_eq!((info.node_id.as_str(), info.role()), ("base-1", NodeRole::Base));
    assert_eq!(info.text_fingerprint, record.text_fingerprint);
    assert_eq!(info.tokenizer_fingerprint, record.tokenizer_fingerprint);
    assert_eq!((info.context_length, info.slots, info.slots_used), (512, 4, 3));
    assert_eq!((info.kv_tokens, info.kv_tokens_used, info.dtype.as_str()), (1024, 100, "f32"));
    assert_eq!(info.vocab_size as usize, text().tokenizer().vocab_size());
    assert!(!info.draining);
    for service in ["", "headstart.v1.Node"] {
        assert_eq!(health(node.channel.clone(), service).await.unwrap(), 1, "{service}");
    }
    let unknown = health(node.channel.clone(), "headstart.v1.Nothing").await.unwrap_err();
    assert_eq!(unknown.code(), tonic::Code::NotFound);
}

#[tokio::test]
async fn the_reflection_service_lists_every_service() {
    use tonic_reflection::pb::v1::ServerReflectionRequest;
    use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
    use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
    use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;
    let node = start(PATIENCE).await;
    let request = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let mut answers = ServerReflectionClient::new(node.channel.clone())
        .server_reflection_info(futures::stream::iter([request]))
        .await
        .unwrap()
        .into_inner();
    let answer = answers.message().await.unwrap().unwrap().message_response;
    let Some(MessageResponse::ListServicesResponse(list)) = answer else { panic!("{answer:?}") };
    let names: Vec<&str> = list.service.iter().map(|service| service.name.as_str()).collect();
    for name in ["headstart.v1.Node", "headstart.v1.Base", "grpc.health.v1.Health"] {
        assert!(names.contains(&name), "{names:?}");
    }
}

#[tokio::test]
async fn a_text_bundle_arrives_whole_or_not_at_all() {
    let node = start(PATIENCE).await;
    let expected = node.node.record().text_fingerprint.clone();
    let link = link(&node.node.record().address);
    let fetched = fetch_model_text(link.clone(), &expected, PATIENCE).await.unwrap();
    assert_eq!(fetched.fingerprint(), text().fingerprint());
    assert_eq!(fetched.tokenizer().to_json(), text().tokenizer().to_json());
    let other = "0".repeat(64);
    let error = fetch_model_text(link, &other, PATIENCE).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::NotFound);
    assert_eq!(error.field.as_deref(), Some("text_fingerprint"));
    assert!(error.message.contains(&expected) && error.message.contains(&other), "{error}");
}

/// A node that hands out whatever it was given, whatever was asked for.
struct Liar(Vec<Result<GetTokenizerChunk, Status>>);

#[tonic::async_trait]
impl Node for Liar {
    type GetTokenizerStream =
        futures::stream::Iter<std::vec::IntoIter<Result<GetTokenizerChunk, Status>>>;

    async fn info(&self, _: Request<InfoRequest>) -> Result<Response<InfoResponse>, Status> {
        Err(Error::internal("none").into())
    }

    async fn get_tokenizer(
        &self,
        _: Request<GetTokenizerRequest>,
    ) -> Result<Response<Self::GetTokenizerStream>, Status> {
        Ok(Response::new(futures::stream::iter(self.0.clone())))
    }

    async fn drain(&self, _: Request<DrainRequest>) -> Result<Response<DrainReply>, Status> {
        Err(Error::internal("none").into())
    }
}

#[tokio::test]
async fn a_lying_node_is_not_believed() {
    let bundle = text().to_bundle();
    let fingerprint = text().fingerprint().to_string();
    let chunk = |data: Vec<u8>| Ok(GetTokenizerChunk { data });
    let cut = bundle[..bundle.len() / 2].to_vec();
    let full: Vec<_> = (0..200).map(|_| chunk(vec![b' '; 1 << 20])).collect();
    let cases = [
        (vec![chunk(b"{}".to_vec())], fingerprint.clone(), ErrorCode::Mismatch),
        (vec![chunk(cut)], fingerprint.clone(), ErrorCode::Mismatch),
        (vec![chunk(bundle.clone())], "0".repeat(64), ErrorCode::Mismatch),
        (full, fingerprint.clone(), ErrorCode::TooLarge),
        (vec![Err(Status::aborted("x"))], fingerprint.clone(), ErrorCode::StaleEpoch),
    ];
    for (chunks, asked, expected) in cases {
        let listener = listen().await;
        let address = listener.local_addr().unwrap().to_string();
        let server = GrpcServer::new().unwrap().add(NodeServer::new(Liar(chunks)));
        let _server = server.start(listener).await;
        let error = fetch_model_text(link(&address), &asked, PATIENCE).await.unwrap_err();
        assert_eq!(error.code, expected, "{error}");
    }
}

#[tokio::test]
async fn a_drain_waits_for_live_work_and_leaves() {
    let mut node = start(PATIENCE).await;
    let (finish, finished) = tokio::sync::oneshot::channel::<()>();
    node.sessions.spawn(finished);
    node.shutdown.cancel();
    until(node.members.watch(), "draining", |view| view.nodes.values().all(|r| r.draining)).await;
    assert!(node.draining.is_cancelled());
    // It still serves what it has: nothing but new work is refused.
    let info = NodeClient::new(node.channel.clone()).info(InfoRequest {}).await.unwrap();
    assert!(info.into_inner().draining);
    assert_eq!(node.members.watch().borrow().nodes.len(), 1);
    finish.send(()).unwrap();
    node.node.ended().await.unwrap();
    assert!(node.members.watch().borrow().nodes.is_empty());
    assert!(channel::connect(&node.node.record().address, PATIENCE).await.is_err());
}

#[tokio::test]
async fn a_drain_has_a_deadline() {
    let mut node = start(Duration::from_millis(50)).await;
    node.sessions.spawn(std::future::pending::<()>());
    node.shutdown.cancel();
    node.node.ended().await.unwrap();
    assert!(node.members.watch().borrow().nodes.is_empty());
}

#[tokio::test]
async fn a_draining_node_is_not_healthy() {
    let node = start(PATIENCE).await;
    node.sessions.spawn(std::future::pending::<()>());
    node.shutdown.cancel();
    let unhealthy = async {
        while health(node.channel.clone(), "headstart.v1.Node").await.unwrap() == 1 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, unhealthy).await.expect("health follows the drain");
}

#[tokio::test]
async fn a_killed_node_breaks_its_connections_and_expires() {
    let node = start(PATIENCE).await;
    let mut client = NodeClient::new(node.channel.clone());
    client.info(InfoRequest {}).await.unwrap();
    node.node.kill();
    let broken = async {
        loop {
            if let Err(status) = client.info(InfoRequest {}).await {
                return Error::from(status);
            }
        }
    };
    let error = tokio::time::timeout(PATIENCE, broken).await.expect("the connection breaks");
    assert_eq!(error.code, ErrorCode::Unavailable, "{error}");
    until(node.members.watch(), "expired", |view| view.nodes.is_empty()).await;
}

#[tokio::test]
async fn a_node_whose_engine_stopped_leaves() {
    let mut node = start(PATIENCE).await;
    node.alive.store(false, Ordering::SeqCst);
    let error = node.node.ended().await.unwrap_err();
    assert!(matches!(&error, NodeError::Engine(why) if why == "broken"), "{error}");
    node.node.ended().await.unwrap();
    assert!(node.members.watch().borrow().nodes.is_empty());
}

#[tokio::test]
async fn a_port_in_use_is_one_clear_line() {
    let taken = listen().await;
    let address = taken.local_addr().unwrap();
    let error = bind("listen", address).await.unwrap_err();
    assert_eq!(error.to_string(), format!("--listen {address}: address already in use"));
    assert!(matches!(error, ServeError::Bind { flag: "listen", .. }));
}

#[tokio::test]
async fn nobody_there_is_unavailable() {
    let free = { listen().await.local_addr().unwrap().to_string() };
    let error = channel::connect(&free, PATIENCE).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::Unavailable);
    assert!(error.message.contains(&free), "{error}");
    assert_eq!(
        channel::lazy(&Dialer::default(), "not an address", PATIENCE, KeepAlive::CLUSTER)
            .unwrap_err()
            .code,
        ErrorCode::InvalidArgument
    );
}

#[tokio::test]
async fn metrics_and_health_over_http() {
    metrics::install();
    metrics::install();
    let listener = listen().await;
    let address = listener.local_addr().unwrap();
    let (draining, stop) = (CancellationToken::new(), CancellationToken::new());
    let refresh = Arc::new(|| {
        ::metrics::gauge!("headstart_test_slots").set(7.0);
        ::metrics::histogram!("headstart_test_seconds").record(0.002);
    });
    let serving = tokio::spawn(metrics::serve(listener, refresh, draining.clone(), stop.clone()));
    let scraped = get(address, "/metrics").await;
    assert!(scraped.starts_with("HTTP/1.1 200"), "{scraped}");
    assert!(scraped.contains("headstart_test_slots 7"), "{scraped}");
    assert!(scraped.contains("headstart_test_seconds_bucket{le=\"0.0025\"} 1"), "{scraped}");
    assert!(get(address, "/health").await.starts_with("HTTP/1.1 200"));
    draining.cancel();
    assert!(get(address, "/health").await.starts_with("HTTP/1.1 503"));
    stop.cancel();
    serving.await.unwrap().unwrap();
}

async fn get(address: SocketAddr, path: &str) -> String {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}
