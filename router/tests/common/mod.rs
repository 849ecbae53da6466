//! A router in front of scripted nodes.
#![allow(dead_code, unreachable_pub)] // each test binary uses its part

pub mod client;

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::StreamExt;
use futures::stream::BoxStream;
use headstart_cluster::testing::Proxy;
use headstart_cluster::{
    BaseRole, InMemory, LEASE_TTL, Membership, NodeRecord, Registration, Tier,
};
use headstart_proto::v1::base_server::{Base, BaseServer};
use headstart_proto::v1::drafter_server::{Drafter, DrafterServer};
use headstart_proto::v1::node_server::NodeServer;
use headstart_proto::{Error, ErrorCode, NodeId, v1};
use headstart_router::{RouterOptions, RunningRouter, start};
use headstart_service::node_service::{NodeService, NodeStatus};
use headstart_service::server::{GrpcServer, RunningServer};
use headstart_text::ModelText;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

pub const CONTEXT: u32 = 512;

/// The ids of `text`, one a byte: the byte-fallback tokens of the fixture's tokenizer.
pub fn ids(text: &str) -> Vec<u32> {
    text.bytes().map(|byte| u32::from(byte) + 3).collect()
}

pub fn model_text() -> ModelText {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/stories260k");
    ModelText::load(&root).unwrap()
}

/// What a scripted base does next.
#[derive(Clone, Debug)]
pub enum Step {
    /// The next tokens, from the drafter.
    Draft(&'static str),
    /// The next tokens, from the base.
    Write(&'static str),
    /// Drafter's tokens at a position of the script's choice, in an attempt of its choice.
    DraftAt { epoch: u64, position: u32, text: &'static str },
    /// The draft is decided: by the threshold or not, kept, drafted.
    Switch(bool, u32, u32),
    /// The end, by a stop.
    Stop,
    /// The end, by the limit.
    Length,
    /// Nothing, for as long as the stream lives.
    Hang,
    /// Nothing until the test opens the gate.
    Gate,
    /// The stream ends without its last frame.
    Vanish,
    /// The call fails.
    Fail(ErrorCode),
}

/// How a scripted drafter ends.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum DraftEnding {
    Eos,
    Hang,
    Fail(ErrorCode),
    /// After the gate was opened.
    GateThenFail(ErrorCode),
    Vanish,
}

/// What both nodes share with the test.
#[derive(Debug)]
pub struct Script {
    pub steps: Mutex<Vec<Step>>,
    pub draft: Mutex<DraftEnding>,
    pub serves: Mutex<Vec<v1::ServeRequest>>,
    pub drafts: Mutex<Vec<v1::DraftRequest>>,
    pub live_serves: Arc<AtomicUsize>,
    pub live_drafts: Arc<AtomicUsize>,
    pub gate: CancellationToken,
}

impl Script {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            steps: Mutex::default(),
            draft: Mutex::new(DraftEnding::Eos),
            serves: Mutex::default(),
            drafts: Mutex::default(),
            live_serves: Arc::default(),
            live_drafts: Arc::default(),
            gate: CancellationToken::new(),
        })
    }

    pub fn set(&self, steps: &[Step]) {
        *self.steps.lock().unwrap() = steps.to_vec();
    }

    pub fn set_draft(&self, ending: DraftEnding) {
        *self.draft.lock().unwrap() = ending;
    }

    pub fn live(&self) -> (usize, usize) {
        (self.live_serves.load(Ordering::SeqCst), self.live_drafts.load(Ordering::SeqCst))
    }

    /// Waits until so many `Serve` calls have come in all.
    pub async fn until_served(&self, count: usize) {
        for _ in 0..3000 {
            if self.serves.lock().unwrap().len() >= count {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("never {count} calls");
    }

    /// Waits until so many `Serve` and `Draft` streams live.
    pub async fn until_live(&self, expected: (usize, usize)) {
        for _ in 0..3000 {
            if self.live() == expected {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("expected {expected:?} live streams, found {:?}", self.live());
    }
}

/// Counts one live stream.
struct Live(Arc<AtomicUsize>);

impl Live {
    fn new(count: &Arc<AtomicUsize>) -> Self {
        count.fetch_add(1, Ordering::SeqCst);
        Self(Arc::clone(count))
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

struct FakeBase(Arc<Script>);
struct FakeDrafter(Arc<Script>);

/// Where a scripted stream is.
struct Playing {
    request: v1::ServeRequest,
    steps: std::vec::IntoIter<Step>,
    position: u32,
    gate: CancellationToken,
    _live: Live,
}

impl Playing {
    fn frame(&self, epoch: u64, position: u32, event: v1::serve_frame::Event) -> v1::ServeFrame {
        let request_id = self.request.request_id.clone();
        v1::ServeFrame { request_id, epoch, position, event: Some(event) }
    }

    fn tokens(&self, epoch: u64, at: u32, source: v1::Source, text: &str) -> v1::ServeFrame {
        let ids = ids(text);
        let logprobs = self.request.top_logprobs.map_or_else(Vec::new, |top| {
            let entry = |id, logprob| v1::TokenLogprob { id, logprob };
            ids.iter()
                .map(|&id| v1::PositionLogprobs {
                    token: Some(entry(id, -0.5)),
                    top: (0..top).map(|rank| entry(id + rank, -0.5 - rank as f32)).collect(),
                })
                .collect()
        });
        let tokens = v1::Tokens { source: source.into(), ids, logprobs };
        self.frame(epoch, at, v1::serve_frame::Event::Tokens(tokens))
    }

    fn finished(&self, reason: v1::FinishReason) -> v1::ServeFrame {
        let finished = v1::Finished {
            reason: reason.into(),
            prompt_tokens: u32::try_from(self.request.prompt_ids.len()).unwrap(),
            completion_tokens: self.position,
        };
        self.frame(self.request.epoch, self.position, v1::serve_frame::Event::Finished(finished))
    }

    async fn next(mut self) -> Option<(Result<v1::ServeFrame, Status>, Self)> {
        let epoch = self.request.epoch;
        loop {
            let step = self.steps.next()?;
            let frame = match step {
                Step::Draft(text) | Step::Write(text) => {
                    let base = matches!(step, Step::Write(_));
                    let source = if base { v1::Source::Base } else { v1::Source::Drafter };
                    let frame = self.tokens(epoch, self.position, source, text);
                    self.position += u32::try_from(text.len()).unwrap();
                    frame
                }
                Step::DraftAt { epoch, position, text } => {
                    self.tokens(epoch, position, v1::Source::Drafter, text)
                }
                Step::Switch(by_threshold, kept_tokens, drafted_tokens) => {
                    let switched = v1::Switched { by_threshold, kept_tokens, drafted_tokens };
                    let event = v1::serve_frame::Event::Switched(switched);
                    self.frame(epoch, self.position, event)
                }
                Step::Stop => self.finished(v1::FinishReason::Stop),
                Step::Length => self.finished(v1::FinishReason::Length),
                Step::Hang => std::future::pending().await,
                Step::Gate => {
                    self.gate.cancelled().await;
                    continue;
                }
                Step::Vanish => return None,
                Step::Fail(code) => {
                    let error =
                        Error::new(code, "scripted").with_retry_after(Duration::from_secs(7));
                    return Some((Err(error.into()), self));
                }
            };
            return Some((Ok(frame), self));
        }
    }
}

#[tonic::async_trait]
impl Base for FakeBase {
    type ServeStream = BoxStream<'static, Result<v1::ServeFrame, Status>>;
    type HandoffStream = BoxStream<'static, Result<v1::HandoffReply, Status>>;

    async fn serve(
        &self,
        request: Request<v1::ServeRequest>,
    ) -> Result<Response<Self::ServeStream>, Status> {
        let request = request.into_inner();
        self.0.serves.lock().unwrap().push(request.clone());
        let steps = self.0.steps.lock().unwrap().clone();
        if let [Step::Fail(code)] = steps[..] {
            let error = Error::new(code, "scripted").with_retry_after(Duration::from_secs(7));
            return Err(error.into());
        }
        let playing = Playing {
            request,
            steps: steps.into_iter(),
            position: 0,
            gate: self.0.gate.clone(),
            _live: Live::new(&self.0.live_serves),
        };
        Ok(Response::new(futures::stream::unfold(playing, Playing::next).boxed()))
    }

    async fn prefetch(
        &self,
        _request: Request<v1::PrefetchRequest>,
    ) -> Result<Response<v1::PrefetchReply>, Status> {
        Err(Status::unimplemented("this fake has no KV"))
    }

    async fn handoff(
        &self,
        _: Request<tonic::Streaming<v1::HandoffFrame>>,
    ) -> Result<Response<Self::HandoffStream>, Status> {
        Err(Status::unimplemented("scripted"))
    }
}

#[tonic::async_trait]
impl Drafter for FakeDrafter {
    type DraftStream = BoxStream<'static, Result<v1::DraftFrame, Status>>;

    async fn draft(
        &self,
        request: Request<v1::DraftRequest>,
    ) -> Result<Response<Self::DraftStream>, Status> {
        use v1::draft_frame::Event;
        let request = request.into_inner();
        self.0.drafts.lock().unwrap().push(request.clone());
        let ending = *self.0.draft.lock().unwrap();
        let live = Live::new(&self.0.live_drafts);
        let gate = self.0.gate.clone();
        let (request_id, epoch) = (request.request_id, request.epoch);
        let frame = move |event| {
            let request_id = request_id.clone();
            Ok(v1::DraftFrame { request_id, epoch, position: 0, event: Some(event) })
        };
        let first = futures::stream::iter([frame(Event::Started(v1::DraftStarted {}))]);
        let last = futures::stream::once(async move {
            let _live = live;
            let fail = |code| Some(Err(Error::new(code, "scripted draft").into()));
            match ending {
                DraftEnding::Eos => {
                    let reason = v1::DraftEnd::Eos.into();
                    Some(frame(Event::Ended(v1::DraftEnded { reason })))
                }
                DraftEnding::Hang => std::future::pending().await,
                DraftEnding::Fail(code) => fail(code),
                DraftEnding::GateThenFail(code) => {
                    gate.cancelled().await;
                    fail(code)
                }
                DraftEnding::Vanish => None,
            }
        });
        let last = last.filter_map(std::future::ready);
        Ok(Response::new(first.chain(last).boxed()))
    }
}

/// A router over the nodes of `membership`.
pub async fn router(
    options: RouterOptions,
    membership: &InMemory,
    shutdown: &CancellationToken,
) -> RunningRouter {
    let http = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let grpc = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let membership: Arc<dyn Membership> = Arc::new(membership.clone());
    // As `headstart-router` does, over HTTP on threads of its own.
    let options = RouterOptions { http_threads: 2, ..options };
    start(options, membership, http, grpc, shutdown.clone()).await.unwrap()
}

/// One base `big`, one drafter `small`, one router.
pub struct Cluster {
    pub router: Option<RunningRouter>,
    pub script: Arc<Script>,
    pub shutdown: CancellationToken,
    pub drafter: Option<Registration>,
    pub base: Option<Registration>,
    pub membership: InMemory,
    /// The lines to the base and the drafter, where there are some.
    pub lines: Vec<Proxy>,
    _servers: Vec<RunningServer>,
}

impl Cluster {
    pub async fn start() -> Self {
        Self::with(RouterOptions::default()).await
    }

    pub async fn with(options: RouterOptions) -> Self {
        Self::build(options, false).await
    }

    /// With a line to each node that can be made to fail.
    pub async fn with_lines(options: RouterOptions) -> Self {
        Self::build(options, true).await
    }

    async fn build(options: RouterOptions, proxied: bool) -> Self {
        let keep_alive = options.keep_alive;
        let mut lines = Vec::new();
        let script = Script::new();
        let membership = InMemory::new();
        let text = model_text();
        let mut servers = Vec::new();
        let mut registrations = Vec::new();
        for tier in [Tier::Base, Tier::Drafter] {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let mut address = listener.local_addr().unwrap().to_string();
            if proxied {
                lines.push(Proxy::start(address).await.unwrap());
                address = lines[lines.len() - 1].address();
            }
            let record = record(tier, &address, &text);
            let node = NodeService::new(
                &record,
                &text,
                "f32",
                NodeStatus::default,
                CancellationToken::new(),
            );
            let server = GrpcServer::new().unwrap().keep_alive(keep_alive);
            let server = server.add(NodeServer::new(node));
            let server = match tier {
                Tier::Base => server.add(BaseServer::new(FakeBase(Arc::clone(&script)))),
                Tier::Drafter => server.add(DrafterServer::new(FakeDrafter(Arc::clone(&script)))),
            };
            servers.push(server.start(listener).await);
            registrations.push(membership.register(record, LEASE_TTL).await.unwrap());
        }
        let drafter = registrations.pop();
        let base = registrations.pop();
        let shutdown = CancellationToken::new();
        let router = Some(router(options, &membership, &shutdown).await);
        let _servers = servers;
        Self { router, script, shutdown, drafter, base, membership, lines, _servers }
    }

    pub fn http(&self) -> std::net::SocketAddr {
        self.router.as_ref().unwrap().http_addr()
    }

    /// Posts a body to `/v1/chat/completions`.
    pub async fn chat(&self, extra: &str) -> client::Reply {
        client::post(self.http(), "/v1/chat/completions", chat_body(extra).as_bytes()).await
    }

    /// The drafter leaves.
    pub async fn lose_drafter(&mut self) {
        self.drafter.take().unwrap().deregister().await;
    }
}

fn record(tier: Tier, address: &str, text: &ModelText) -> NodeRecord {
    NodeRecord {
        node_id: NodeId::new(&format!("{tier}-1")).unwrap(),
        tier,
        address: address.into(),
        model: if tier == Tier::Base { "big".into() } else { "small".into() },
        tokenizer_fingerprint: text.tokenizer().fingerprint().to_string(),
        text_fingerprint: text.fingerprint().to_string(),
        context_length: CONTEXT,
        slots: 4,
        kv_tokens: 0,
        draining: false,
        incarnation: 1,
        base_role: BaseRole::Unified,
        kv_address: String::new(),
    }
}

/// A sound chat request to `big` with `extra` fields.
pub fn chat_body(extra: &str) -> String {
    format!(r#"{{"model": "big", "messages": [{{"role": "user", "content": "hi"}}]{extra}}}"#)
}
