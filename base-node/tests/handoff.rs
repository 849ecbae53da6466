//! The `Base` service over real gRPC, on the fake executor: what leaves it, when, and what it does
//! when either side goes away.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use headstart_base_node::service::BaseService;
use headstart_engine::executor::fake::{FakeExecutor, FakeOptions, Gate};
use headstart_engine::{EngineHandle, EngineOptions};
use headstart_node::Host;
use headstart_proto::v1::base_client::BaseClient;
use headstart_proto::v1::base_server::BaseServer;
use headstart_proto::v1::{
    self, DraftEncoding, DraftEnd, handoff_frame, handoff_reply, serve_frame,
};
use headstart_proto::{Error, ErrorCode, NodeId};
use headstart_service::channel::KeepAlive;
use headstart_service::net::Dialer;
use headstart_text::ModelText;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::Streaming;
use tonic::transport::{Channel, Server};

const PROMPT: [u32; 4] = [10, 11, 12, 13];

struct Node {
    client: BaseClient<Channel>,
    engine: EngineHandle,
    base: FakeExecutor,
    text: ModelText,
    draining: CancellationToken,
}

fn text() -> ModelText {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/stories260k");
    ModelText::load(&fixtures).expect("the fixture is whole")
}

async fn start(options: FakeOptions, slots: usize, handoff_timeout: Duration) -> Node {
    let base = FakeExecutor::new(options);
    let engine = EngineHandle::start(
        Box::new(base.clone()),
        EngineOptions { slots, ..EngineOptions::default() },
    );
    let text = text();
    let host = Host {
        node_id: NodeId::new("b1").expect("a valid id"),
        engine: engine.clone(),
        text: text.clone(),
        handoff_timeout,
        keep_alive: KeepAlive::CLUSTER,
        dialer: Dialer::default(),
        draining: CancellationToken::new(),
        sessions: TaskTracker::new(),
    };
    let service = BaseService::new(&host);
    let draining = host.draining;
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("bound");
    let server = Server::builder().add_service(BaseServer::new(service));
    tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
    let client = BaseClient::connect(format!("http://{address}")).await.expect("connects");
    Node { client, engine, base, text, draining }
}

async fn start_plain() -> Node {
    start(FakeOptions::default(), 4, Duration::from_secs(20)).await
}

fn serve_request(encoding: DraftEncoding) -> v1::ServeRequest {
    v1::ServeRequest {
        request_id: "r".into(),
        epoch: 2,
        prompt_ids: PROMPT.to_vec(),
        max_tokens: 40,
        sampling: Some(v1::Sampling { temperature: Some(0.0), ..Default::default() }),
        draft: Some(v1::DraftPolicy {
            window: 6,
            threshold: 0.8,
            encoding: encoding.into(),
            ..Default::default()
        }),
        ..Default::default()
    }
}

struct Drafter {
    frames: mpsc::Sender<v1::HandoffFrame>,
    replies: Streaming<v1::HandoffReply>,
    position: u32,
    epoch: u64,
}

impl Drafter {
    async fn open(node: &Node, encoding: DraftEncoding) -> Self {
        Self::join(node, encoding, 2, 2).await
    }

    async fn join(node: &Node, encoding: DraftEncoding, serve_epoch: u64, epoch: u64) -> Self {
        Self::try_join(node, encoding, serve_epoch, epoch).await.expect("joins")
    }

    /// A drafter whose draft is `epoch`, for the attempt `serve_epoch`.
    async fn try_join(
        node: &Node,
        encoding: DraftEncoding,
        serve_epoch: u64,
        epoch: u64,
    ) -> Result<Self, Error> {
        let (frames, receiver) = mpsc::channel(64);
        let open = v1::HandoffOpen {
            drafter_id: "d".into(),
            tokenizer_fingerprint: node.text.tokenizer().fingerprint().to_string(),
            encoding: encoding.into(),
            serve_epoch,
        };
        let event = handoff_frame::Event::Open(open);
        frames.send(frame(epoch, 0, event)).await.expect("room");
        let mut client = node.client.clone();
        let replies = client.handoff(ReceiverStream::new(receiver)).await;
        let mut replies = replies.map_err(|status| Error::from_status(&status))?.into_inner();
        let first = replies.message().await.expect("a reply").expect("a reply");
        let position = match first.event {
            Some(handoff_reply::Event::Accepted(accepted)) => accepted.drafted,
            other => panic!("{other:?}"),
        };
        Ok(Self { frames, replies, position, epoch })
    }

    /// What a drafter is told that comes too late; `None` if its request is over.
    async fn stopped_at_once(node: &Node, serve_epoch: u64, epoch: u64) -> Option<DraftEnd> {
        let (frames, receiver) = mpsc::channel(4);
        let open = v1::HandoffOpen { serve_epoch, ..Default::default() };
        let event = handoff_frame::Event::Open(open);
        frames.send(frame(epoch, 0, event)).await.expect("room");
        let mut client = node.client.clone();
        let replies = client.handoff(ReceiverStream::new(receiver));
        let replies = tokio::time::timeout(Duration::from_millis(200), replies).await.ok()?;
        let reply = replies.ok()?.into_inner().message().await.ok()??;
        match reply.event {
            Some(handoff_reply::Event::Stop(stop)) => Some(stop.reason()),
            other => panic!("{other:?}"),
        }
    }

    async fn say(&mut self, ids: &[u32], text: &str) {
        let count = if ids.is_empty() { 1 } else { ids.len() as u32 };
        let tokens = v1::DraftTokens { count, ids: ids.to_vec(), text: text.into() };
        let event = handoff_frame::Event::Tokens(tokens);
        let _ = self.frames.send(frame(self.epoch, self.position, event)).await;
        self.position += count;
    }

    async fn end(&self) {
        let ended = v1::DraftEnded { reason: DraftEnd::Eos.into() };
        let event = handoff_frame::Event::Ended(ended);
        let _ = self.frames.send(frame(self.epoch, self.position, event)).await;
    }

    async fn stop_reason(&mut self) -> DraftEnd {
        let reply = self.replies.message().await.expect("a reply").expect("a reply");
        match reply.event {
            Some(handoff_reply::Event::Stop(stop)) => stop.reason(),
            other => panic!("{other:?}"),
        }
    }
}

fn frame(epoch: u64, position: u32, event: handoff_frame::Event) -> v1::HandoffFrame {
    v1::HandoffFrame { request_id: "r".into(), epoch, position, event: Some(event) }
}

#[derive(Debug, Default, PartialEq)]
struct Heard {
    drafter: Vec<u32>,
    base: Vec<u32>,
    switched: Option<(bool, u32)>,
    moved: Option<Vec<f32>>,
}

async fn next_tokens(answer: &mut Streaming<v1::ServeFrame>, wanted: usize) -> Vec<u32> {
    more_tokens(answer, 0, wanted).await
}

/// The next `wanted` tokens, behind the first `known` ones.
async fn more_tokens(
    answer: &mut Streaming<v1::ServeFrame>,
    known: usize,
    wanted: usize,
) -> Vec<u32> {
    let mut ids = Vec::new();
    while ids.len() < wanted {
        let frame = answer.message().await.expect("a frame").expect("a frame");
        assert_eq!(frame.position as usize, known + ids.len());
        match frame.event {
            Some(serve_frame::Event::Tokens(tokens)) => ids.extend(tokens.ids),
            other => panic!("{other:?}"),
        }
    }
    ids
}

async fn hear(answer: &mut Streaming<v1::ServeFrame>) -> Result<Heard, Error> {
    hear_from(answer, 2, 0).await
}

/// The rest of an answer, behind its first `known` tokens, to the end or to a move.
async fn hear_from(
    answer: &mut Streaming<v1::ServeFrame>,
    epoch: u64,
    known: usize,
) -> Result<Heard, Error> {
    let mut heard = Heard::default();
    while let Some(frame) = answer.message().await.map_err(|status| Error::from_status(&status))? {
        assert_eq!((frame.request_id.as_str(), frame.epoch), ("r", epoch));
        assert_eq!(frame.position as usize, known + heard.drafter.len() + heard.base.len());
        match frame.event.expect("an event") {
            serve_frame::Event::Tokens(tokens) => match tokens.source() {
                v1::Source::Drafter => heard.drafter.extend(tokens.ids),
                _ => heard.base.extend(tokens.ids),
            },
            serve_frame::Event::Switched(s) => {
                heard.switched = Some((s.by_threshold, s.kept_tokens));
            }
            serve_frame::Event::Finished(finished) => {
                let total = known + heard.drafter.len() + heard.base.len();
                assert_eq!(finished.completion_tokens as usize, total);
                return Ok(heard);
            }
            serve_frame::Event::Moved(moved) => {
                heard.moved = Some(moved.scores);
                return Ok(heard);
            }
        }
    }
    panic!("the stream ended without a last frame: {heard:?}");
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
async fn the_first_window_leaves_before_the_base_has_scored_anything() {
    let gate = Arc::new(Gate::default());
    let options = FakeOptions { gate: Some(Arc::clone(&gate)), ..FakeOptions::default() };
    let mut node = start(options, 4, Duration::from_secs(20)).await;
    let request = serve_request(DraftEncoding::Ids);
    let mut answer = node.client.serve(request).await.expect("taken").into_inner();
    let mut drafter = Drafter::open(&node, DraftEncoding::Ids).await;
    drafter.say(&[20, 21, 22], "").await;
    assert_eq!(next_tokens(&mut answer, 3).await, [20, 21, 22]);
    drafter.say(&[23, 24, 25, 26, 27], "").await;
    // No step of the engine has ended: the six tokens of the window are out all the same, and the
    // seventh is not.
    let frame = answer.message().await.expect("a frame").expect("a frame");
    let Some(serve_frame::Event::Tokens(tokens)) = frame.event else { panic!("tokens") };
    assert_eq!((frame.position, tokens.ids), (3, vec![23, 24, 25]));
    assert_eq!(node.engine.stats().counters.steps, 0);
    let more = tokio::time::timeout(Duration::from_millis(100), answer.message()).await;
    assert!(more.is_err(), "nothing more is certain");
    gate.set_open(true);
}

#[tokio::test]
async fn a_likely_draft_is_taken_over_and_the_drafter_stops() {
    let mut node = start_plain().await;
    let mut context = PROMPT.to_vec();
    let mut draft = vec![500, 501];
    context.extend(&draft);
    for _ in 0..12 {
        draft.push(node.base.next_token(&context));
        context.push(draft[draft.len() - 1]);
    }
    let request = serve_request(DraftEncoding::Ids);
    let mut answer = node.client.serve(request).await.expect("taken").into_inner();
    let mut drafter = Drafter::open(&node, DraftEncoding::Ids).await;
    for ids in draft.chunks(3) {
        drafter.say(ids, "").await;
    }
    let heard = hear(&mut answer).await.expect("an answer");
    // Tokens 2 to 7 are the base's own: the window that ends at 7 is the first to reach 0.8.
    assert_eq!(heard.switched, Some((true, 8)));
    assert_eq!(heard.drafter, draft[..8]);
    let mut context = [&PROMPT[..], &draft[..8]].concat();
    for &id in &heard.base {
        assert_eq!(id, node.base.next_token(&context));
        context.push(id);
    }
    assert_eq!(context.len(), PROMPT.len() + 40);
    assert_eq!(drafter.stop_reason().await, DraftEnd::Switched);
    until("everything is given back", || node.engine.stats().slots_used == 0).await;
    assert_eq!(node.engine.stats().kv_tokens_used, 0);
}

#[tokio::test]
async fn a_complete_draft_is_continued_and_an_empty_one_ends_the_answer() {
    let mut node = start_plain().await;
    let request = serve_request(DraftEncoding::Ids);
    let mut answer = node.client.serve(request.clone()).await.expect("taken").into_inner();
    let mut drafter = Drafter::open(&node, DraftEncoding::Ids).await;
    drafter.say(&[500, 501, 502], "").await;
    drafter.end().await;
    let heard = hear(&mut answer).await.expect("an answer");
    assert_eq!(heard.switched, Some((false, 3)));
    assert_eq!((heard.drafter, heard.base.len()), (vec![500, 501, 502], 37));

    let mut answer = node.client.serve(request).await.expect("taken").into_inner();
    let drafter = Drafter::open(&node, DraftEncoding::Ids).await;
    drafter.end().await;
    let heard = hear(&mut answer).await.expect("an answer");
    assert_eq!(heard, Heard { switched: Some((false, 0)), ..Heard::default() });
}

#[tokio::test]
async fn a_text_draft_becomes_the_base_s_own_tokens() {
    let mut node = start_plain().await;
    let tokenizer = node.text.tokenizer();
    let (prompt, draft) = ("Once upon a time", "  there was a little girl named Lily.  ");
    let encode = |text: &str| tokenizer.encode(text).expect("encodes");
    let prompt_ids = encode(prompt);
    let whole = encode(&format!("{prompt}{}", draft.trim()));
    let request = v1::ServeRequest {
        prompt_text: prompt.into(),
        prompt_ids: prompt_ids.clone(),
        ..serve_request(DraftEncoding::Text)
    };
    if !whole.starts_with(&prompt_ids) {
        return;
    }
    let mut answer = node.client.serve(request).await.expect("taken").into_inner();
    let mut drafter = Drafter::open(&node, DraftEncoding::Text).await;
    for piece in draft.as_bytes().chunks(3) {
        drafter.say(&[], std::str::from_utf8(piece).expect("ASCII")).await;
    }
    drafter.end().await;
    let heard = hear(&mut answer).await.expect("an answer");
    let kept = heard.switched.expect("decided").1 as usize;
    assert_eq!(heard.drafter, whole[prompt_ids.len()..][..kept]);
}

#[tokio::test]
async fn a_router_that_hangs_up_gets_everything_back() {
    let mut node = start_plain().await;
    let request = serve_request(DraftEncoding::Ids);
    let mut answer = node.client.serve(request).await.expect("taken").into_inner();
    let mut drafter = Drafter::open(&node, DraftEncoding::Ids).await;
    drafter.say(&[20, 21], "").await;
    assert_eq!(next_tokens(&mut answer, 2).await, [20, 21]);
    assert_eq!(node.engine.stats().slots_used, 1);
    drop(answer);
    assert_eq!(drafter.stop_reason().await, DraftEnd::Aborted);
    until("the slot is free", || node.engine.stats().slots_used == 0).await;
    assert_eq!(node.engine.stats().kv_tokens_used, 0);
}

#[tokio::test]
async fn a_drafter_lost_before_the_switch_is_followed_by_another() {
    let mut node = start_plain().await;
    let request = serve_request(DraftEncoding::Ids);
    let mut answer = node.client.serve(request).await.expect("taken").into_inner();
    let mut drafter = Drafter::open(&node, DraftEncoding::Ids).await;
    drafter.say(&[20, 21], "").await;
    assert_eq!(next_tokens(&mut answer, 2).await, [20, 21]);
    drop(drafter);
    let mut second = Drafter::join(&node, DraftEncoding::Ids, 2, 5).await;
    assert_eq!(second.position, 2, "it learns what the base has");
    // A third one takes the second one's place before that is lost.
    second.say(&[22], "").await;
    assert_eq!(more_tokens(&mut answer, 2, 1).await, [22]);
    let mut third = Drafter::join(&node, DraftEncoding::Ids, 2, 6).await;
    assert_eq!(third.position, 3);
    assert_eq!(second.stop_reason().await, DraftEnd::Aborted);
    second.say(&[99], "").await;
    third.say(&[23], "").await;
    third.end().await;
    let heard = hear_from(&mut answer, 2, 3).await.expect("an answer");
    assert_eq!((heard.drafter, heard.switched), (vec![23], Some((false, 4))));
    assert_eq!(heard.base.len(), 36);
    // The session may be over, or still there: either way nobody drafts on.
    let late = Drafter::try_join(&node, DraftEncoding::Ids, 2, 4).await;
    assert!(late.is_err());
    until("everything is given back", || node.engine.stats().slots_used == 0).await;
}

#[tokio::test]
async fn a_session_without_a_drafter_does_not_wait_for_ever() {
    let mut node = start(FakeOptions::default(), 4, Duration::from_millis(200)).await;
    let request = serve_request(DraftEncoding::Ids);
    let mut answer = node.client.serve(request).await.expect("taken").into_inner();
    let mut drafter = Drafter::open(&node, DraftEncoding::Ids).await;
    drafter.say(&[20, 21], "").await;
    assert_eq!(next_tokens(&mut answer, 2).await, [20, 21]);
    drop(drafter);
    let error = hear_from(&mut answer, 2, 2).await.expect_err("no answer");
    assert_eq!(error.code, ErrorCode::NoDrafter);
}

#[tokio::test]
async fn frames_out_of_order_break_the_handoff_and_seen_ones_are_dropped() {
    let mut node = start_plain().await;
    let request = serve_request(DraftEncoding::Ids);
    let mut answer = node.client.serve(request).await.expect("taken").into_inner();
    let mut drafter = Drafter::open(&node, DraftEncoding::Ids).await;
    drafter.say(&[20, 21], "").await;
    drafter.position = 0;
    drafter.say(&[20, 21], "").await;
    drafter.say(&[22], "").await;
    assert_eq!(next_tokens(&mut answer, 3).await, [20, 21, 22]);
    drafter.position = 5;
    drafter.say(&[23], "").await;
    let status = drafter.replies.message().await.expect_err("broken");
    assert_eq!(Error::from_status(&status).code, ErrorCode::Protocol);
    assert!(hear(&mut answer).await.is_err());
}

#[tokio::test]
async fn nobody_waits_for_ever() {
    let mut node = start(FakeOptions::default(), 4, Duration::from_millis(50)).await;
    let request = serve_request(DraftEncoding::Ids);
    let mut answer = node.client.serve(request).await.expect("taken").into_inner();
    let error = hear(&mut answer).await.expect_err("no drafter came");
    assert_eq!(error.code, ErrorCode::NoDrafter, "it is the drafter that is to be replaced");
}

#[tokio::test]
async fn a_full_base_says_so_at_once() {
    let mut node = start(FakeOptions::default(), 1, Duration::from_secs(20)).await;
    let request = serve_request(DraftEncoding::Ids);
    let _answer = node.client.serve(request.clone()).await.expect("taken");
    let other = v1::ServeRequest { request_id: "other".into(), ..request };
    let status = node.client.serve(other).await.expect_err("full");
    let error = Error::from_status(&status);
    assert_eq!(error.code, ErrorCode::Overloaded);
    assert!(error.retry_after.is_some());
}

/// A draft that the base takes over at its eighth token.
fn likely_draft(node: &Node) -> Vec<u32> {
    let mut draft = vec![500, 501];
    for _ in 0..12 {
        draft.push(node.base.next_token(&[&PROMPT[..], &draft].concat()));
    }
    draft
}

#[tokio::test]
async fn an_answer_that_was_begun_elsewhere_goes_on() {
    let mut node = start_plain().await;
    let draft = likely_draft(&node);
    let request = serve_request(DraftEncoding::Ids);
    let mut answer = node.client.serve(request.clone()).await.expect("taken").into_inner();
    let mut drafter = Drafter::open(&node, DraftEncoding::Ids).await;
    drafter.say(&draft, "").await;
    let whole = hear(&mut answer).await.expect("an answer");
    let ids = [&whole.drafter[..], &whole.base].concat();
    let switched = v1::Switched { by_threshold: true, kept_tokens: 8, drafted_tokens: 14 };
    for known in [0, 1, 6, 7, 8, 9, 20, 39, 40] {
        let decision = (known >= 8).then_some(switched);
        let resume =
            v1::Resume { answer_ids: ids[..known].to_vec(), decision, ..Default::default() };
        let request = v1::ServeRequest { epoch: 4, resume: Some(resume), ..request.clone() };
        let mut answer = node.client.serve(request).await.expect("taken").into_inner();
        let mut drafter = None;
        if decision.is_none() {
            let drafter = drafter.insert(Drafter::join(&node, DraftEncoding::Ids, 4, 4).await);
            assert_eq!(drafter.position, 0, "the draft comes again");
            for ids in draft.chunks(3) {
                drafter.say(ids, "").await;
            }
        } else if known < 40 {
            let late = Drafter::stopped_at_once(&node, 4, 7).await;
            assert!(matches!(late, None | Some(DraftEnd::Switched)));
        }
        let heard = hear_from(&mut answer, 4, known).await.expect("an answer");
        assert_eq!([&ids[..known], &heard.drafter, &heard.base].concat(), ids, "{known} known");
        assert_eq!(heard.switched, decision.is_none().then_some((true, 8)));
    }
    // Another draft than the one that is out.
    let resume = v1::Resume { answer_ids: vec![7, 8], ..Default::default() };
    let request = v1::ServeRequest { epoch: 4, resume: Some(resume), ..request };
    let mut answer = node.client.serve(request).await.expect("taken").into_inner();
    let mut drafter = Drafter::join(&node, DraftEncoding::Ids, 4, 4).await;
    drafter.say(&[7, 9], "").await;
    let error = hear_from(&mut answer, 4, 2).await.expect_err("another draft");
    assert_eq!(error.code, ErrorCode::Protocol);
    until("everything is given back", || node.engine.stats().slots_used == 0).await;
}

#[tokio::test]
async fn an_answer_moves_when_it_is_asked_to_or_the_node_drains() {
    let mut node = start_plain().await;
    let draft = likely_draft(&node);
    let request = v1::ServeRequest { move_when_decided: true, ..serve_request(DraftEncoding::Ids) };
    let mut answer = node.client.serve(request).await.expect("taken").into_inner();
    let mut drafter = Drafter::open(&node, DraftEncoding::Ids).await;
    drafter.say(&draft, "").await;
    let heard = hear(&mut answer).await.expect("frames");
    assert_eq!((heard.switched, heard.moved), (Some((true, 8)), Some(vec![])));
    assert_eq!(heard.drafter, draft[..8]);
    assert_eq!(drafter.stop_reason().await, DraftEnd::Switched);

    let stays = v1::ServeRequest { request_id: "s".into(), ..serve_request(DraftEncoding::Ids) };
    let _staying = node.client.serve(stays).await.expect("taken").into_inner();
    let request = v1::ServeRequest { movable: true, ..serve_request(DraftEncoding::Ids) };
    let mut answer = node.client.serve(request).await.expect("taken").into_inner();
    let mut drafter = Drafter::open(&node, DraftEncoding::Ids).await;
    drafter.say(&[20, 21, 22, 23, 24, 25, 26], "").await;
    assert_eq!(next_tokens(&mut answer, 7).await.len(), 7);
    node.draining.cancel();
    let heard = hear_from(&mut answer, 2, 7).await.expect("frames");
    let scores = heard.moved.expect("it moved");
    assert!(heard.base.is_empty() && (6..=7).contains(&scores.len()), "{scores:?}");
    assert_eq!(drafter.stop_reason().await, DraftEnd::Aborted);
    until("one stays", || node.engine.stats().slots_used == 1).await;
}
