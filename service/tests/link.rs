//! A link to a node: one write a call, one connection for all, another one when it broke.

use std::io;
use std::path::Path;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use futures::future::{BoxFuture, join_all};
use headstart_cluster::{BaseRole, NodeRecord, Tier};
use headstart_proto::v1::node_client::NodeClient;
use headstart_proto::v1::node_server::NodeServer;
use headstart_proto::v1::{InfoRequest, InfoResponse};
use headstart_service::channel::KeepAlive;
use headstart_service::link::Link;
use headstart_service::net::{Dial, Dialer, Io};
use headstart_service::node_service::{NodeService, NodeStatus};
use headstart_service::server::{GrpcServer, RunningServer};
use headstart_text::ModelText;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status};

/// Far beyond anything a test waits for.
const PATIENCE: Duration = Duration::from_secs(60);

/// Dials over TCP, counts, keeps what is written, and waits for a permit first.
#[derive(Debug)]
struct Wire {
    dialled: AtomicUsize,
    may_dial: Semaphore,
    writes: Arc<Mutex<Vec<Vec<u8>>>>,
}

impl Wire {
    fn new() -> Arc<Self> {
        let may_dial = Semaphore::new(Semaphore::MAX_PERMITS);
        Arc::new(Self { dialled: AtomicUsize::new(0), may_dial, writes: Arc::default() })
    }

    fn dialled(&self) -> usize {
        self.dialled.load(Ordering::SeqCst)
    }

    fn link(self: &Arc<Self>, address: &str, keep_alive: KeepAlive) -> Link {
        let dialer = Dialer::over(Arc::new(Dials(Arc::clone(self))));
        Link::new(&dialer, address, PATIENCE, keep_alive).unwrap()
    }
}

#[derive(Debug)]
struct Dials(Arc<Wire>);

impl Dial for Dials {
    fn dial(&self, address: &str) -> BoxFuture<'static, io::Result<Box<dyn Io>>> {
        let (wire, address) = (Arc::clone(&self.0), address.to_owned());
        Box::pin(async move {
            wire.dialled.fetch_add(1, Ordering::SeqCst);
            let permit = wire.may_dial.acquire().await.map_err(io::Error::other)?;
            permit.forget();
            let stream = TcpStream::connect(address).await?;
            Ok(Box::new(Taped { stream, writes: Arc::clone(&wire.writes) }) as Box<dyn Io>)
        })
    }
}

/// A connection that keeps each write.
struct Taped {
    stream: TcpStream,
    writes: Arc<Mutex<Vec<Vec<u8>>>>,
}

impl AsyncRead for Taped {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Taped {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, bytes);
        if let Poll::Ready(Ok(count)) = written {
            self.writes.lock().unwrap().push(bytes[..count].to_vec());
        }
        written
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

async fn serve(listener: TcpListener) -> RunningServer {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/stories260k");
    let text = ModelText::load(&path).unwrap();
    let record = NodeRecord {
        node_id: "base-1".parse().unwrap(),
        tier: Tier::Base,
        address: listener.local_addr().unwrap().to_string(),
        model: "stories".into(),
        tokenizer_fingerprint: text.tokenizer().fingerprint().to_string(),
        text_fingerprint: text.fingerprint().to_string(),
        context_length: 512,
        slots: 4,
        kv_tokens: 0,
        draining: false,
        incarnation: 1,
        base_role: BaseRole::Unified,
        kv_address: String::new(),
    };
    let stop = CancellationToken::new();
    let node = NodeService::new(&record, &text, "f32", NodeStatus::default, stop);
    GrpcServer::new().unwrap().add(NodeServer::new(node)).start(listener).await
}

/// Listens where somebody else did, once that one is gone.
async fn again(address: &str) -> TcpListener {
    let bound = async {
        loop {
            match TcpListener::bind(address).await {
                Ok(listener) => return listener,
                Err(_) => tokio::task::yield_now().await,
            }
        }
    };
    tokio::time::timeout(PATIENCE, bound).await.expect("an address that is free again")
}

async fn info(link: &Link) -> Result<InfoResponse, Status> {
    let mut node = NodeClient::new(link.clone());
    let call = node.info(InfoRequest {});
    let answer = tokio::time::timeout(PATIENCE, call).await.expect("a call ends");
    answer.map(tonic::Response::into_inner)
}

/// The types of the HTTP/2 frames in `bytes`.
fn frames(mut bytes: &[u8]) -> Vec<u8> {
    let mut kinds = Vec::new();
    bytes = bytes.strip_prefix(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").unwrap_or(bytes);
    while let [a, b, c, kind, ..] = *bytes {
        kinds.push(kind);
        bytes = &bytes[9 + u32::from_be_bytes([0, a, b, c]) as usize..];
    }
    kinds
}

#[tokio::test]
async fn a_call_leaves_in_one_write() {
    const DATA: u8 = 0;
    const HEADERS: u8 = 1;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (address, wire) = (listener.local_addr().unwrap().to_string(), Wire::new());
    let _server = serve(listener).await;
    let link = wire.link(&address, KeepAlive { interval: PATIENCE, timeout: PATIENCE });
    for _ in 0..3 {
        assert_eq!(info(&link).await.unwrap().node_id, "base-1");
    }
    let writes: Vec<Vec<u8>> = wire.writes.lock().unwrap().iter().map(|w| frames(w)).collect();
    let calls: Vec<_> = writes.iter().filter(|write| write.contains(&HEADERS)).collect();
    assert_eq!(calls.len(), 3, "{writes:?}");
    assert!(calls.iter().all(|call| call.ends_with(&[HEADERS, DATA])), "{writes:?}");
    assert_eq!(wire.dialled(), 1, "all calls share a connection");
}

#[tokio::test]
async fn all_who_wait_for_a_connection_hear_what_became_of_it() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (address, wire) = (listener.local_addr().unwrap().to_string(), Wire::new());
    drop(listener);
    let link = wire.link(&address, KeepAlive::CLUSTER);
    wire.may_dial.forget_permits(usize::MAX);
    let calls: Vec<_> = (0..8)
        .map(|_| {
            tokio::spawn({
                let link = link.clone();
                async move { info(&link).await }
            })
        })
        .collect();
    while wire.dialled() == 0 {
        tokio::task::yield_now().await;
    }
    // On this one thread, each of them waits once nothing else can run.
    tokio::task::yield_now().await;
    wire.may_dial.add_permits(1);
    for answer in join_all(calls).await {
        let status = answer.unwrap().unwrap_err();
        assert_eq!(status.code(), Code::Unavailable);
        assert!(status.message().contains(&address), "{status}");
    }
    assert_eq!(wire.dialled(), 1);
    // The next call tries again, and finds the node that came up meanwhile.
    wire.may_dial.add_permits(1);
    let _server = serve(again(&address).await).await;
    assert_eq!(info(&link).await.unwrap().node_id, "base-1");
    assert_eq!(wire.dialled(), 2);
}

#[tokio::test]
async fn a_node_that_went_and_came_back_is_reached_again() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (address, wire) = (listener.local_addr().unwrap().to_string(), Wire::new());
    let link = wire.link(&address, KeepAlive::CLUSTER);
    let mut server = serve(listener).await;
    for round in 1..4 {
        // A call that goes out before the link has heard of the loss breaks, and no other.
        if info(&link).await.is_err() {
            info(&link).await.unwrap();
        }
        assert_eq!(wire.dialled(), round);
        // In order, and then by surprise.
        match round {
            1 => server.stop().await,
            _ => drop(server),
        }
        server = serve(again(&address).await).await;
    }
}

#[tokio::test]
async fn a_silent_node_is_given_up_and_a_quiet_one_is_not() {
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = silent.local_addr().unwrap().to_string();
    let soon = Duration::from_millis(20);
    let link = Wire::new().link(&address, KeepAlive { interval: soon, timeout: soon });
    let status = info(&link).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    assert!(status.message().contains("broke"), "{status}");

    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (address, wire) = (listener.local_addr().unwrap().to_string(), Wire::new());
    let _server = serve(listener).await;
    let link = wire.link(&address, KeepAlive { interval: soon, timeout: PATIENCE });
    info(&link).await.unwrap();
    let pings = || wire.writes.lock().unwrap().iter().filter(|write| frames(write) == [6]).count();
    while pings() < 5 {
        tokio::time::sleep(soon).await;
    }
    info(&link).await.unwrap();
    assert_eq!(wire.dialled(), 1);
}

#[test]
fn an_address_that_is_none_is_named() {
    let link = Link::new(&Dialer::default(), "not an address", PATIENCE, KeepAlive::CLUSTER);
    let error = link.unwrap_err();
    assert_eq!(error.field.as_deref(), Some("address"));
    assert!(error.message.contains("expected host:port"), "{error}");
}
