//! The `Drafter` service over real gRPC, on the fake executor, against a base that the test plays.

use std::path::Path;
use std::time::Duration;

use headstart_drafter_node::service::DrafterService;
use headstart_engine::executor::fake::{FakeExecutor, FakeOptions};
use headstart_engine::{EngineHandle, EngineOptions};
use headstart_node::Host;
use headstart_proto::v1::base_server::{Base, BaseServer};
use headstart_proto::v1::drafter_client::DrafterClient;
use headstart_proto::v1::drafter_server::DrafterServer;
use headstart_proto::v1::{
    self, DraftEncoding, DraftEnd, draft_frame, handoff_frame, handoff_reply,
};
use headstart_proto::{Error, ErrorCode, NodeId};
use headstart_service::channel::KeepAlive;
use headstart_service::net::Dialer;
use headstart_text::ModelText;
use tokio::net::TcpListener;
use tokio::sync::{Mutex, mpsc};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::transport::{Channel, Server};
use tonic::{Request, Response, Status, Streaming};

const PROMPT: [u32; 4] = [10, 11, 12, 13];

/// A base whose every handoff is played by the test.
struct PlayedBase {
    handoffs: mpsc::Sender<Handoff>,
}

struct Handoff {
    frames: Streaming<v1::HandoffFrame>,
    replies: mpsc::Sender<Result<v1::HandoffReply, Status>>,
}

#[tonic::async_trait]
impl Base for PlayedBase {
    type ServeStream = ReceiverStream<Result<v1::ServeFrame, Status>>;
    type HandoffStream = ReceiverStream<Result<v1::HandoffReply, Status>>;

    async fn serve(
        &self,
        _: Request<v1::ServeRequest>,
    ) -> Result<Response<Self::ServeStream>, Status> {
        Err(Status::unimplemented("not played"))
    }

    async fn prefetch(
        &self,
        _request: Request<v1::PrefetchRequest>,
    ) -> Result<Response<v1::PrefetchReply>, Status> {
        Err(Status::unimplemented("this fake has no KV"))
    }

    async fn handoff(
        &self,
        request: Request<Streaming<v1::HandoffFrame>>,
    ) -> Result<Response<Self::HandoffStream>, Status> {
        let (replies, receiver) = mpsc::channel(4);
        let handoff = Handoff { frames: request.into_inner(), replies };
        self.handoffs.send(handoff).await.map_err(|_| Status::unavailable("the test is over"))?;
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}

impl Handoff {
    async fn reply(&self, event: handoff_reply::Event) {
        let reply =
            v1::HandoffReply { request_id: "r".into(), epoch: 3, position: 0, event: Some(event) };
        self.replies.send(Ok(reply)).await.expect("the drafter listens");
    }

    async fn accept(&mut self) -> v1::HandoffOpen {
        let first = self.frames.message().await.expect("a frame").expect("a frame");
        self.reply(handoff_reply::Event::Accepted(v1::HandoffAccepted { drafted: 0 })).await;
        match first.event {
            Some(handoff_frame::Event::Open(open)) => open,
            other => panic!("{other:?}"),
        }
    }

    /// Reads `wanted` tokens, or to the draft's end.
    async fn read(&mut self, wanted: usize) -> (Vec<u32>, String, Option<DraftEnd>) {
        let (mut count, mut ids, mut text) = (0, Vec::new(), String::new());
        while (count as usize) < wanted {
            let frame = self.frames.message().await.expect("a frame").expect("a frame");
            assert_eq!((frame.request_id.as_str(), frame.epoch), ("r", 3));
            assert_eq!(frame.position, count, "positions have no gap");
            match frame.event.expect("an event") {
                handoff_frame::Event::Tokens(tokens) => {
                    count += tokens.count;
                    ids.extend(tokens.ids);
                    text.push_str(&tokens.text);
                }
                handoff_frame::Event::Ended(ended) => return (ids, text, Some(ended.reason())),
                handoff_frame::Event::Open(_) => panic!("opened twice"),
            }
        }
        (ids, text, None)
    }
}

struct Node {
    client: DrafterClient<Channel>,
    engine: EngineHandle,
    drafter: FakeExecutor,
    text: ModelText,
    base_address: String,
    handoffs: Mutex<mpsc::Receiver<Handoff>>,
    draining: CancellationToken,
}

async fn start(options: FakeOptions, slots: usize) -> Node {
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/stories260k");
    let text = ModelText::load(&fixture).expect("the fixture is whole");
    let drafter = FakeExecutor::new(options);
    let options = EngineOptions { slots, ..EngineOptions::default() };
    let engine = EngineHandle::start(Box::new(drafter.clone()), options);
    let host = Host {
        node_id: NodeId::new("d1").expect("a valid id"),
        engine: engine.clone(),
        text: text.clone(),
        handoff_timeout: Duration::from_secs(20),
        keep_alive: KeepAlive::CLUSTER,
        dialer: Dialer::default(),
        draining: CancellationToken::new(),
        sessions: TaskTracker::new(),
    };
    let service = DrafterService::new(&host);
    let draining = host.draining;
    let (handoffs, receiver) = mpsc::channel(4);
    let base_address =
        serve(Server::builder().add_service(BaseServer::new(PlayedBase { handoffs }))).await;
    let address = serve(Server::builder().add_service(DrafterServer::new(service))).await;
    let client = DrafterClient::connect(format!("http://{address}")).await.expect("connects");
    Node { client, engine, drafter, text, base_address, handoffs: Mutex::new(receiver), draining }
}

async fn serve(router: tonic::transport::server::Router) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("bound").to_string();
    tokio::spawn(router.serve_with_incoming(TcpListenerStream::new(listener)));
    address
}

impl Node {
    fn request(&self, encoding: DraftEncoding) -> v1::DraftRequest {
        v1::DraftRequest {
            request_id: "r".into(),
            epoch: 3,
            prompt_ids: PROMPT.to_vec(),
            draft_tokens_max: 20,
            sampling: None,
            base_address: self.base_address.clone(),
            encoding: encoding.into(),
            serve_epoch: 3,
            ..Default::default()
        }
    }

    async fn draft(&self, request: v1::DraftRequest) -> (Streaming<v1::DraftFrame>, Handoff) {
        let mut client = self.client.clone();
        let progress = client.draft(request).await.expect("taken").into_inner();
        let handoff = self.handoffs.lock().await.recv().await.expect("a handoff");
        (progress, handoff)
    }

    fn expected(&self, count: usize) -> Vec<u32> {
        let mut context = PROMPT.to_vec();
        for _ in 0..count {
            context.push(self.drafter.next_token(&context));
        }
        context.split_off(PROMPT.len())
    }
}

async fn ended(progress: &mut Streaming<v1::DraftFrame>) -> (DraftEnd, u32) {
    let mut started = false;
    loop {
        let frame = progress.message().await.expect("a frame").expect("a frame");
        match frame.event.expect("an event") {
            draft_frame::Event::Started(_) => started = true,
            draft_frame::Event::Written(_) => {}
            draft_frame::Event::Ended(ended) => {
                assert!(started);
                return (ended.reason(), frame.position);
            }
        }
    }
}

async fn until(what: &str, condition: impl Fn() -> bool) {
    for _ in 0..4_000 {
        if condition() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("never: {what}");
}

#[tokio::test]
async fn a_draft_travels_as_ids_to_its_length() {
    let node = start(FakeOptions::default(), 4).await;
    let (mut progress, mut handoff) = node.draft(node.request(DraftEncoding::Ids)).await;
    let open = handoff.accept().await;
    assert_eq!(open.tokenizer_fingerprint, node.text.tokenizer().fingerprint().to_string());
    assert_eq!((open.drafter_id.as_str(), open.encoding()), ("d1", DraftEncoding::Ids));
    let (ids, text, end) = handoff.read(usize::MAX).await;
    assert_eq!((ids, text.as_str(), end), (node.expected(20), "", Some(DraftEnd::Length)));
    drop(handoff);
    assert_eq!(ended(&mut progress).await, (DraftEnd::Length, 20));
    until("the slot is free", || node.engine.stats().slots_used == 0).await;
}

#[tokio::test]
async fn a_draft_travels_as_text_to_its_end_of_sequence() {
    let options = FakeOptions { stop_token: (2, 6), ..FakeOptions::default() };
    let node = start(options, 4).await;
    let (mut progress, mut handoff) = node.draft(node.request(DraftEncoding::Text)).await;
    handoff.accept().await;
    let (ids, text, end) = handoff.read(usize::MAX).await;
    let mut expected = node.expected(20);
    let length = expected.iter().position(|&id| id == 2).expect("this fake stops early");
    expected.truncate(length);
    assert_eq!((ids, end), (Vec::new(), Some(DraftEnd::Eos)));
    assert_eq!(text, node.text.tokenizer().decode(&expected));
    drop(handoff);
    assert_eq!(ended(&mut progress).await, (DraftEnd::Eos, length as u32));
}

#[tokio::test]
async fn the_base_s_stop_ends_the_draft_and_frees_its_slot() {
    let slow = Duration::from_millis(1);
    let node = start(FakeOptions { step_latency: slow, ..FakeOptions::default() }, 4).await;
    let request = v1::DraftRequest { draft_tokens_max: 4_000, ..node.request(DraftEncoding::Ids) };
    let (mut progress, mut handoff) = node.draft(request).await;
    handoff.accept().await;
    let (ids, _, end) = handoff.read(8).await;
    assert_eq!((&ids[..8], end), (&node.expected(8)[..], None));
    let stop = v1::HandoffStop { reason: DraftEnd::Switched.into() };
    handoff.reply(handoff_reply::Event::Stop(stop)).await;
    let (reason, drafted) = ended(&mut progress).await;
    assert_eq!(reason, DraftEnd::Switched);
    assert!((8..4_000).contains(&drafted));
    until("the slot is free", || node.engine.stats().slots_used == 0).await;
    assert_eq!(node.engine.stats().kv_tokens_used, 0);
}

#[tokio::test]
async fn a_router_that_hangs_up_ends_the_draft_and_the_handoff() {
    let slow = Duration::from_millis(1);
    let node = start(FakeOptions { step_latency: slow, ..FakeOptions::default() }, 4).await;
    let request = v1::DraftRequest { draft_tokens_max: 4_000, ..node.request(DraftEncoding::Ids) };
    let (progress, mut handoff) = node.draft(request).await;
    handoff.accept().await;
    handoff.read(4).await;
    drop(progress);
    while let Ok(Some(frame)) = handoff.frames.message().await {
        assert!(!matches!(frame.event, Some(handoff_frame::Event::Ended(_))));
    }
    until("the slot is free", || node.engine.stats().slots_used == 0).await;
}

#[tokio::test]
async fn a_base_that_is_lost_is_told() {
    let slow = Duration::from_millis(1);
    let node = start(FakeOptions { step_latency: slow, ..FakeOptions::default() }, 4).await;
    let request = v1::DraftRequest { draft_tokens_max: 4_000, ..node.request(DraftEncoding::Ids) };
    let (mut progress, mut handoff) = node.draft(request.clone()).await;
    handoff.accept().await;
    handoff.read(4).await;
    drop(handoff);
    let status = loop {
        match progress.message().await {
            Ok(frame) => assert!(frame.is_some(), "an error, not an end"),
            Err(status) => break status,
        }
    };
    assert_eq!(Error::from_status(&status).code, ErrorCode::NoBase);

    let nowhere = v1::DraftRequest { base_address: "127.0.0.1:1".into(), ..request };
    let mut client = node.client.clone();
    let mut progress = client.draft(nowhere).await.expect("taken").into_inner();
    let status = progress.message().await.expect_err("nobody listens there");
    assert_eq!(Error::from_status(&status).code, ErrorCode::NoBase);
    until("the slots are free", || node.engine.stats().slots_used == 0).await;
}

#[tokio::test]
async fn a_full_drafter_says_so_at_once() {
    let slow = Duration::from_millis(1);
    let node = start(FakeOptions { step_latency: slow, ..FakeOptions::default() }, 1).await;
    let request = v1::DraftRequest { draft_tokens_max: 4_000, ..node.request(DraftEncoding::Ids) };
    let (_progress, _handoff) = node.draft(request.clone()).await;
    let status = node.client.clone().draft(request).await.expect_err("full");
    let error = Error::from_status(&status);
    assert_eq!(error.code, ErrorCode::Overloaded);
    assert!(error.retry_after.is_some());
}

#[tokio::test]
async fn a_draft_that_another_drafter_began_goes_on_where_the_base_is() {
    let node = start(FakeOptions::default(), 4).await;
    let whole = node.expected(20);
    // The base has three tokens, the router knows five; then the other way round.
    for (drafted, known) in [(3, 5), (5, 3), (0, 20), (20, 20)] {
        let prefix_ids = whole[..known].to_vec();
        let request = v1::DraftRequest { prefix_ids, ..node.request(DraftEncoding::Ids) };
        let (mut progress, mut handoff) = node.draft(request).await;
        let opening = handoff.frames.message().await.expect("a frame");
        assert!(opening.is_some());
        let accepted = v1::HandoffAccepted { drafted: drafted as u32 };
        handoff.reply(handoff_reply::Event::Accepted(accepted)).await;
        let (mut ids, mut end) = (Vec::new(), None);
        while end.is_none() {
            let frame = handoff.frames.message().await.expect("a frame").expect("a frame");
            assert_eq!(frame.position as usize, drafted + ids.len());
            match frame.event.expect("an event") {
                handoff_frame::Event::Tokens(tokens) => ids.extend(tokens.ids),
                handoff_frame::Event::Ended(ended) => end = Some(ended.reason()),
                handoff_frame::Event::Open(_) => panic!("opened twice"),
            }
        }
        assert_eq!((&ids[..], end), (&whole[drafted..], Some(DraftEnd::Length)));
        drop(handoff);
        let mut told = known;
        loop {
            let frame = progress.message().await.expect("a frame").expect("a frame");
            match frame.event.expect("an event") {
                draft_frame::Event::Started(_) => {}
                draft_frame::Event::Written(written) => {
                    assert_eq!(written.ids, whole[told..told + written.ids.len()]);
                    told += written.ids.len();
                    assert_eq!(frame.position as usize, told);
                }
                draft_frame::Event::Ended(_) => break,
            }
        }
    }
    until("the slots are free", || node.engine.stats().slots_used == 0).await;
}

#[tokio::test]
async fn a_draining_drafter_ends_a_draft_that_can_go_on_elsewhere() {
    let slow = Duration::from_millis(1);
    let node = start(FakeOptions { step_latency: slow, ..FakeOptions::default() }, 4).await;
    let long = v1::DraftRequest { draft_tokens_max: 4_000, ..node.request(DraftEncoding::Ids) };
    let movable = v1::DraftRequest { movable: true, request_id: "m".into(), ..long.clone() };
    let (_staying, mut kept) = node.draft(long).await;
    kept.accept().await;
    let (mut moving, _handoff) = node.draft(movable).await;
    node.draining.cancel();
    let status = loop {
        match moving.message().await {
            Ok(frame) => assert!(frame.is_some(), "an error, not an end"),
            Err(status) => break status,
        }
    };
    assert_eq!(Error::from_status(&status).code, ErrorCode::Draining);
    kept.read(8).await;
    until("the moved one's slot is free", || node.engine.stats().slots_used == 1).await;
}
