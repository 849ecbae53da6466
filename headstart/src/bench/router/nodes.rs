//! A drafter and a base without models: the protocol's services, which answer at once, always the
//! same, one frame a token.

use std::sync::Arc;

use futures::stream::{self, BoxStream, StreamExt};
use headstart_cluster::{
    BaseRole, InMemory, LEASE_TTL, Membership, NodeRecord, Registration, Tier,
};
use headstart_proto::v1::base_server::{Base, BaseServer};
use headstart_proto::v1::drafter_server::{Drafter, DrafterServer};
use headstart_proto::v1::node_server::NodeServer;
use headstart_proto::v1::{self, draft_frame, serve_frame};
use headstart_proto::{Error, ErrorCode, NodeId};
use headstart_service::node_service::{NodeService, NodeStatus};
use headstart_service::server::{GrpcServer, RunningServer};
use headstart_text::ModelText;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

use super::MODEL;
use crate::failure::Failure;

/// What both nodes tell of themselves.
const CONTEXT_LENGTH: u32 = 1 << 16;
const SLOTS: u32 = 1 << 10;
const KV_TOKENS: u64 = 1 << 26;

/// Fake nodes that are up.
pub(super) struct FakeNodes {
    /// Where a router finds them.
    pub(super) membership: Arc<InMemory>,
    /// The base's address.
    pub(super) base: String,
    /// The drafter's address.
    pub(super) drafter: String,
    _servers: Vec<RunningServer>,
    _registrations: Vec<Registration>,
}

/// What the base says.
#[derive(Clone, Debug)]
pub(super) struct Script {
    /// The answer's tokens, as many as are asked for at most.
    pub(super) ids: Arc<[u32]>,
    /// So many of them come from the drafter.
    pub(super) drafted: u32,
}

impl FakeNodes {
    /// Starts both on loopback, with the tokenizer and templates of `text`.
    ///
    /// # Errors
    /// When loopback cannot be listened on.
    pub(super) async fn start(text: &ModelText, script: &Script) -> Result<Self, Failure> {
        let membership = InMemory::new();
        let (mut servers, mut registrations) = (Vec::new(), Vec::new());
        let mut addresses = Vec::new();
        for tier in [Tier::Base, Tier::Drafter] {
            let listener = TcpListener::bind("127.0.0.1:0").await.map_err(failed)?;
            let address = listener.local_addr().map_err(failed)?.to_string();
            let record = record(tier, &address, text)?;
            let node = NodeService::new(
                &record,
                text,
                "none",
                NodeStatus::default,
                CancellationToken::new(),
            );
            let server = GrpcServer::new().map_err(failed)?.add(NodeServer::new(node));
            let server = match tier {
                Tier::Base => server.add(BaseServer::new(FakeBase(script.clone()))),
                Tier::Drafter => server.add(DrafterServer::new(FakeDrafter)),
            };
            servers.push(server.start(listener).await);
            registrations.push(membership.register(record, LEASE_TTL).await.map_err(failed)?);
            addresses.push(address);
        }
        let (drafter, base) = (addresses.pop(), addresses.pop());
        Ok(Self {
            membership: Arc::new(membership),
            base: base.unwrap_or_default(),
            drafter: drafter.unwrap_or_default(),
            _servers: servers,
            _registrations: registrations,
        })
    }
}

fn record(tier: Tier, address: &str, text: &ModelText) -> Result<NodeRecord, Failure> {
    Ok(NodeRecord {
        node_id: NodeId::new(&format!("bench-{tier}")).map_err(failed)?,
        tier,
        address: address.to_owned(),
        model: if tier == Tier::Base { MODEL.into() } else { "bench-drafter".into() },
        tokenizer_fingerprint: text.tokenizer().fingerprint().to_string(),
        text_fingerprint: text.fingerprint().to_string(),
        context_length: CONTEXT_LENGTH,
        slots: SLOTS,
        kv_tokens: KV_TOKENS,
        draining: false,
        incarnation: 1,
        base_role: BaseRole::default(),
        kv_address: String::new(),
    })
}

fn failed(error: impl std::fmt::Display) -> Failure {
    Failure::Failed(format!("the fake nodes: {error}"))
}

struct FakeBase(Script);

impl FakeBase {
    /// Every frame of an answer: the draft, the switch, the base's tokens, the end.
    fn frames(&self, request: &v1::ServeRequest) -> Vec<Result<v1::ServeFrame, Status>> {
        let Script { ids, drafted } = &self.0;
        let count = ids.len().min(request.max_tokens as usize);
        let kept = request.draft.as_ref().map_or(0, |_| *drafted).min(request.max_tokens);
        let frame = |position: u32, event| {
            let (request_id, epoch) = (request.request_id.clone(), request.epoch);
            Ok(v1::ServeFrame { request_id, epoch, position, event: Some(event) })
        };
        let mut frames = Vec::with_capacity(count + 2);
        for (position, &id) in (0u32..).zip(&ids[..count]) {
            if position == kept && kept > 0 {
                frames.push(frame(position, switched(kept)));
            }
            let source = if position < kept { v1::Source::Drafter } else { v1::Source::Base };
            let tokens = v1::Tokens { source: source.into(), ids: vec![id], logprobs: vec![] };
            frames.push(frame(position, serve_frame::Event::Tokens(tokens)));
        }
        let completion_tokens = u32::try_from(count).unwrap_or(u32::MAX);
        let finished = v1::Finished {
            reason: v1::FinishReason::Length.into(),
            prompt_tokens: u32::try_from(request.prompt_ids.len()).unwrap_or(u32::MAX),
            completion_tokens,
        };
        frames.push(frame(completion_tokens, serve_frame::Event::Finished(finished)));
        frames
    }
}

fn switched(kept_tokens: u32) -> serve_frame::Event {
    let drafted_tokens = kept_tokens;
    serve_frame::Event::Switched(v1::Switched { by_threshold: true, kept_tokens, drafted_tokens })
}

#[tonic::async_trait]
impl Base for FakeBase {
    type ServeStream = BoxStream<'static, Result<v1::ServeFrame, Status>>;
    type HandoffStream = BoxStream<'static, Result<v1::HandoffReply, Status>>;

    async fn serve(
        &self,
        request: Request<v1::ServeRequest>,
    ) -> Result<Response<Self::ServeStream>, Status> {
        Ok(Response::new(stream::iter(self.frames(request.get_ref())).boxed()))
    }

    async fn handoff(
        &self,
        _request: Request<tonic::Streaming<v1::HandoffFrame>>,
    ) -> Result<Response<Self::HandoffStream>, Status> {
        Err(Error::new(ErrorCode::Unavailable, "this fake reads no drafts").into())
    }

    async fn prefetch(
        &self,
        _request: Request<v1::PrefetchRequest>,
    ) -> Result<Response<v1::PrefetchReply>, Status> {
        Err(Error::new(ErrorCode::Unavailable, "this fake has no KV").into())
    }
}

struct FakeDrafter;

#[tonic::async_trait]
impl Drafter for FakeDrafter {
    type DraftStream = BoxStream<'static, Result<v1::DraftFrame, Status>>;

    async fn draft(
        &self,
        request: Request<v1::DraftRequest>,
    ) -> Result<Response<Self::DraftStream>, Status> {
        let v1::DraftRequest { request_id, epoch, .. } = request.into_inner();
        let reason = v1::DraftEnd::Switched.into();
        let events = [
            draft_frame::Event::Started(v1::DraftStarted {}),
            draft_frame::Event::Ended(v1::DraftEnded { reason }),
        ];
        let frames = events.map(|event| {
            let request_id = request_id.clone();
            Ok(v1::DraftFrame { request_id, epoch, position: 0, event: Some(event) })
        });
        Ok(Response::new(stream::iter(frames).boxed()))
    }
}
