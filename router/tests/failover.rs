//! A router in front of nodes that die at every point of an answer: the client's text, tokens and
//! log-probabilities are the undisturbed ones.

mod common;

use std::sync::{Arc, Mutex};

use common::{CONTEXT, chat_body, client, ids, model_text};
use futures::StreamExt;
use futures::stream::BoxStream;
use headstart_cluster::{
    BaseRole, InMemory, LEASE_TTL, Membership, NodeRecord, Registration, Tier,
};
use headstart_proto::v1::base_server::{Base, BaseServer};
use headstart_proto::v1::drafter_server::{Drafter, DrafterServer};
use headstart_proto::v1::node_server::NodeServer;
use headstart_proto::v1::{draft_frame, serve_frame};
use headstart_proto::{Error, ErrorCode, NodeId, v1};
use headstart_router::{RouterOptions, RunningRouter, start};
use headstart_service::node_service::{NodeService, NodeStatus};
use headstart_service::server::{GrpcServer, RunningServer};
use tokio::net::TcpListener;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

/// The answer every base gives: the drafter's part, and the base's.
const DRAFT: &str = "Once upon";
const REST: &str = " a time, stop.";

/// How a node ends an attempt early.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Death {
    /// The stream ends without its last frame.
    Vanish,
    Fail(ErrorCode),
    /// The base gives the answer up in good order.
    Move,
}

/// What both tiers' nodes share with the test.
#[derive(Debug, Default)]
struct Script {
    /// Ends the first attempt at an answer after so many frames.
    base_dies: Mutex<Option<(usize, Death)>>,
    drafter_dies: Mutex<Option<(usize, Death)>>,
    /// Every attempt dies so.
    always: Mutex<bool>,
    serves: Mutex<Vec<(String, v1::ServeRequest)>>,
    drafts: Mutex<Vec<(String, v1::DraftRequest)>>,
    drafted: Notify,
}

impl Script {
    fn reset(&self) {
        *self.base_dies.lock().unwrap() = None;
        *self.drafter_dies.lock().unwrap() = None;
        self.serves.lock().unwrap().clear();
        self.drafts.lock().unwrap().clear();
    }

    fn drafts_of(&self, request_id: &str) -> usize {
        let drafts = self.drafts.lock().unwrap();
        drafts.iter().filter(|(_, draft)| draft.request_id == request_id).count()
    }

    /// Waits until the answer has had so many drafters.
    async fn until_drafts(&self, request_id: &str, count: usize) {
        loop {
            let mut drafted = std::pin::pin!(self.drafted.notified());
            drafted.as_mut().enable();
            if self.drafts_of(request_id) >= count {
                return;
            }
            drafted.await;
        }
    }
}

struct FakeBase(String, Arc<Script>);
struct FakeDrafter(String, Arc<Script>);

fn tokens(request: &v1::ServeRequest, source: v1::Source, ids: &[u32]) -> serve_frame::Event {
    let entry = |id: u32| v1::TokenLogprob { id, logprob: -(id as f32) / 100.0 };
    let logprobs = match request.top_logprobs {
        Some(_) => ids
            .iter()
            .map(|&id| v1::PositionLogprobs { token: Some(entry(id)), top: vec![entry(id)] })
            .collect(),
        None => Vec::new(),
    };
    serve_frame::Event::Tokens(v1::Tokens { source: source.into(), ids: ids.to_vec(), logprobs })
}

/// What a base says from where the attempt begins, in frames of `size` tokens.
fn frames(request: &v1::ServeRequest, size: usize) -> Vec<v1::ServeFrame> {
    let resume = request.resume.clone().unwrap_or_default();
    let (draft, rest) = (ids(DRAFT), ids(REST));
    let mut position = resume.answer_ids.len();
    assert_eq!(resume.answer_ids, [&draft[..], &rest].concat()[..position], "what is out");
    let mut events = Vec::new();
    for chunk in draft[position.min(draft.len())..].chunks(size) {
        events.push((position, tokens(request, v1::Source::Drafter, chunk)));
        position += chunk.len();
    }
    if resume.decision.is_none() {
        let kept = draft.len() as u32;
        let switched = v1::Switched { by_threshold: true, kept_tokens: kept, drafted_tokens: kept };
        events.push((position, serve_frame::Event::Switched(switched)));
    }
    for chunk in rest[position - draft.len()..].chunks(size) {
        events.push((position, tokens(request, v1::Source::Base, chunk)));
        position += chunk.len();
    }
    let finished = v1::Finished {
        reason: v1::FinishReason::Stop.into(),
        prompt_tokens: request.prompt_ids.len() as u32,
        completion_tokens: position as u32,
    };
    events.push((position, serve_frame::Event::Finished(finished)));
    let frame = |(position, event)| v1::ServeFrame {
        request_id: request.request_id.clone(),
        epoch: request.epoch,
        position: position as u32,
        event: Some(event),
    };
    events.into_iter().map(frame).collect()
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
        let Self(name, script) = self;
        let before = {
            let mut serves = script.serves.lock().unwrap();
            serves.push((name.clone(), request.clone()));
            serves.iter().filter(|(_, serve)| serve.request_id == request.request_id).count() - 1
        };
        let mut said = frames(&request, 2 + before);
        let dies = *script.base_dies.lock().unwrap();
        let dies = dies.filter(|_| before == 0 || *script.always.lock().unwrap());
        if let Some((0, Death::Fail(code))) = dies {
            return Err(Error::new(code, "scripted").into());
        }
        let mut last = None;
        if let Some((after, death)) = dies {
            said.truncate(after);
            let position = match said.last() {
                Some(frame) => match &frame.event {
                    Some(serve_frame::Event::Tokens(t)) => frame.position + t.ids.len() as u32,
                    _ => frame.position,
                },
                None => request.resume.as_ref().map_or(0, |r| r.answer_ids.len() as u32),
            };
            let moved = v1::ServeFrame {
                request_id: request.request_id.clone(),
                epoch: request.epoch,
                position,
                event: Some(serve_frame::Event::Moved(v1::Moved {
                    kv: None,
                    scores: vec![-0.25; 3],
                })),
            };
            last = match death {
                Death::Vanish => None,
                Death::Fail(code) => Some(Err(Error::new(code, "scripted").into())),
                Death::Move => Some(Ok(moved)),
            };
        }
        // A draft whose drafter dies is decided only when another one has come.
        let wanted = if script.drafter_dies.lock().unwrap().is_some() { 2 } else { 0 };
        let script = Arc::clone(script);
        let id = request.request_id;
        let stream = futures::stream::iter(said).then(move |frame| {
            let (script, id) = (Arc::clone(&script), id.clone());
            async move {
                if matches!(frame.event, Some(serve_frame::Event::Switched(_))) {
                    script.until_drafts(&id, wanted).await;
                }
                Ok(frame)
            }
        });
        Ok(Response::new(stream.chain(futures::stream::iter(last)).boxed()))
    }

    async fn prefetch(
        &self,
        _: Request<v1::PrefetchRequest>,
    ) -> Result<Response<v1::PrefetchReply>, Status> {
        Err(Status::unimplemented("scripted"))
    }

    async fn handoff(
        &self,
        _: Request<Streaming<v1::HandoffFrame>>,
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
        let request = request.into_inner();
        let Self(name, script) = self;
        let before = {
            let mut drafts = script.drafts.lock().unwrap();
            drafts.push((name.clone(), request.clone()));
            drafts.iter().filter(|(_, draft)| draft.request_id == request.request_id).count() - 1
        };
        script.drafted.notify_waiters();
        let dies = script.drafter_dies.lock().unwrap().filter(|_| before == 0);
        if let Some((0, Death::Fail(code))) = dies {
            return Err(Error::new(code, "scripted").into());
        }
        let (draft, known) = (ids(DRAFT), request.prefix_ids.len());
        assert_eq!(request.prefix_ids, draft[..known], "what is known of the draft");
        let mut said = vec![(known, draft_frame::Event::Started(v1::DraftStarted {}))];
        for (at, chunk) in (1..).zip(draft[known..].chunks(3)) {
            let written = v1::DraftWritten { ids: chunk.to_vec() };
            let position = known + (at - 1) * 3 + chunk.len();
            said.push((position, draft_frame::Event::Written(written)));
        }
        let frame = move |(position, event)| v1::DraftFrame {
            request_id: request.request_id.clone(),
            epoch: request.epoch,
            position: position as u32,
            event: Some(event),
        };
        let said = said.into_iter().map(frame).map(Ok);
        Ok(Response::new(match dies {
            Some((after, death)) => {
                let last = match death {
                    Death::Fail(code) => Some(Err(Error::new(code, "scripted").into())),
                    _ => None,
                };
                futures::stream::iter(said.take(after).chain(last)).boxed()
            }
            None => futures::stream::iter(said).chain(futures::stream::pending()).boxed(),
        }))
    }
}

/// Two bases, two drafters, one router.
struct Cluster {
    router: RunningRouter,
    script: Arc<Script>,
    _nodes: Vec<(RunningServer, Registration)>,
}

impl Cluster {
    async fn start() -> Self {
        let (script, membership, text) = (Arc::<Script>::default(), InMemory::new(), model_text());
        let mut nodes = Vec::new();
        for (tier, number) in
            [(Tier::Base, 1), (Tier::Base, 2), (Tier::Drafter, 1), (Tier::Drafter, 2)]
        {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let name = format!("{tier}-{number}");
            let record = NodeRecord {
                node_id: NodeId::new(&name).unwrap(),
                tier,
                address: listener.local_addr().unwrap().to_string(),
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
            };
            let stop = CancellationToken::new();
            let node = NodeService::new(&record, &text, "f32", NodeStatus::default, stop);
            let server = GrpcServer::new().unwrap().add(NodeServer::new(node));
            let script = Arc::clone(&script);
            let server = match tier {
                Tier::Base => server.add(BaseServer::new(FakeBase(name, script))),
                Tier::Drafter => server.add(DrafterServer::new(FakeDrafter(name, script))),
            };
            let server = server.start(listener).await;
            nodes.push((server, membership.register(record, LEASE_TTL).await.unwrap()));
        }
        let http = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let grpc = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let membership: Arc<dyn Membership> = Arc::new(membership);
        let stop = CancellationToken::new();
        let router = start(RouterOptions::default(), membership, http, grpc, stop).await.unwrap();
        Self { router, script, _nodes: nodes }
    }

    async fn chat(&self, extra: &str) -> client::Reply {
        let body = chat_body(extra);
        client::post(self.router.http_addr(), "/v1/chat/completions", body.as_bytes()).await
    }

    /// What the client gets, but for ids and times.
    async fn answer(&self, extra: &str) -> serde_json::Value {
        let reply = self.chat(extra).await;
        assert_eq!(reply.status, 200, "{}", reply.body);
        let mut body = reply.json();
        for field in ["id", "created"] {
            body[field] = serde_json::Value::Null;
        }
        body["headstart"]["request_id"] = serde_json::Value::Null;
        body
    }
}

const KINDS: [&str; 4] = [
    "",
    r#", "temperature": 0.8, "seed": 7, "n": 2"#,
    r#", "logprobs": true, "top_logprobs": 1, "temperature": 0"#,
    r#", "stop": ["on a", "me, st"]"#,
];

#[tokio::test]
async fn a_base_may_die_after_any_frame() {
    let cluster = Cluster::start().await;
    let script = &cluster.script;
    let all = frames(&v1::ServeRequest::default(), 2).len();
    for extra in KINDS {
        script.reset();
        let whole = cluster.answer(extra).await;
        for after in 0..all {
            for death in [
                Death::Vanish,
                Death::Fail(ErrorCode::Unavailable),
                Death::Fail(ErrorCode::Overloaded),
                Death::Fail(ErrorCode::Draining),
                Death::Fail(ErrorCode::Internal),
                Death::Move,
            ] {
                script.reset();
                *script.base_dies.lock().unwrap() = Some((after, death));
                let answer = cluster.answer(extra).await;
                assert_eq!(answer, whole, "{death:?} after {after} frames, {extra}");
                if !extra.is_empty() {
                    continue;
                }
                let serves = script.serves.lock().unwrap();
                let [(first, one), (second, two)] = &serves[..] else {
                    panic!("two attempts, found {}", serves.len());
                };
                assert_ne!(first, second, "another base is preferred");
                assert!(two.epoch > one.epoch);
                let drafts = script.drafts.lock().unwrap();
                let resume = two.resume.clone().unwrap_or_default();
                assert_eq!(drafts.len(), 1 + usize::from(resume.decision.is_none()));
                if let Some((_, again)) = drafts.get(1) {
                    assert_eq!(again.serve_epoch, two.epoch);
                }
                let wanted = if death == Death::Move && resume.decision.is_none() { 3 } else { 0 };
                assert_eq!(resume.scores.len(), wanted.min(resume.answer_ids.len()));
            }
        }
    }
}

#[tokio::test]
async fn a_drafter_may_die_after_any_frame_before_the_draft_is_decided() {
    let cluster = Cluster::start().await;
    let script = &cluster.script;
    for extra in KINDS {
        script.reset();
        let whole = cluster.answer(extra).await;
        for after in 0..4 {
            for death in [
                Death::Vanish,
                Death::Fail(ErrorCode::Draining),
                Death::Fail(ErrorCode::Overloaded),
                Death::Fail(ErrorCode::NoBase),
            ] {
                script.reset();
                *script.drafter_dies.lock().unwrap() = Some((after, death));
                let answer = cluster.answer(extra).await;
                assert_eq!(answer, whole, "{death:?} after {after} frames, {extra}");
                if !extra.is_empty() {
                    continue;
                }
                assert_eq!(script.serves.lock().unwrap().len(), 1, "the base's stream stays");
                let drafts = script.drafts.lock().unwrap();
                let [(first, one), (second, two)] = &drafts[..] else {
                    panic!("two drafts, found {}", drafts.len());
                };
                assert_ne!(first, second, "another drafter is preferred");
                assert!(two.epoch > one.epoch && two.serve_epoch == one.serve_epoch);
            }
        }
    }
}

#[tokio::test]
async fn an_answer_that_costs_two_bases_is_not_passed_on() {
    let cluster = Cluster::start().await;
    let whole = cluster.answer("").await;
    *cluster.script.always.lock().unwrap() = true;
    cluster.script.reset();
    *cluster.script.base_dies.lock().unwrap() = Some((0, Death::Vanish));
    let error = cluster.chat("").await.error();
    assert_eq!((error.0, error.1.as_str()), (500, "internal"));
    assert!(error.2.contains("cost 2 bases at position 0"), "{}", error.2);
    assert_eq!(cluster.script.serves.lock().unwrap().len(), 2);
    // As long as it moves on, it is not the request's doing.
    cluster.script.reset();
    *cluster.script.base_dies.lock().unwrap() = Some((1, Death::Vanish));
    assert_eq!(cluster.answer("").await, whole);
    assert!(cluster.script.serves.lock().unwrap().len() > 4);
    // Nodes that are full or leave were not lost: each is asked, and the client is told.
    cluster.script.reset();
    *cluster.script.base_dies.lock().unwrap() = Some((0, Death::Fail(ErrorCode::Overloaded)));
    assert_eq!(cluster.chat("").await.error().0, 429);
    let serves = cluster.script.serves.lock().unwrap();
    assert!(serves.iter().any(|(name, _)| name == "base-1"));
    assert!(serves.iter().any(|(name, _)| name == "base-2"));
}

#[tokio::test]
async fn a_base_that_waits_for_its_drafter_in_vain_is_given_another_one() {
    let cluster = Cluster::start().await;
    let whole = cluster.answer("").await;
    cluster.script.reset();
    *cluster.script.base_dies.lock().unwrap() = Some((1, Death::Fail(ErrorCode::NoDrafter)));
    assert_eq!(cluster.answer("").await, whole);
    let (serves, drafts) =
        (cluster.script.serves.lock().unwrap(), cluster.script.drafts.lock().unwrap());
    let names = |attempts: &[&String]| (attempts.len(), attempts.first() == attempts.last());
    let bases: Vec<&String> = serves.iter().map(|(name, _)| name).collect();
    let drafters: Vec<&String> = drafts.iter().map(|(name, _)| name).collect();
    assert_eq!(names(&bases), (2, true), "the base is the same: {bases:?}");
    assert_eq!(names(&drafters), (2, false), "the drafter is another one: {drafters:?}");
}
