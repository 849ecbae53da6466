//! Answers that move from one base to another over real gRPC and the KV service, on the fake
//! executor, which refuses KV that is not that of its tokens.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use headstart_base_node::KvOptions;
use headstart_base_node::kv::Kv;
use headstart_base_node::service::BaseService;
use headstart_engine::executor::fake::{FakeExecutor, FakeOptions};
use headstart_engine::{EngineHandle, EngineOptions, Limits};
use headstart_handoff::Times;
use headstart_node::Host;
use headstart_proto::NodeId;
use headstart_proto::v1::base_client::BaseClient;
use headstart_proto::v1::base_server::BaseServer;
use headstart_proto::v1::{
    self, DraftEncoding, DraftEnd, handoff_frame, handoff_reply, serve_frame,
};
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

const MAX_TOKENS: usize = 80;

fn prompt() -> Vec<u32> {
    (10..110).collect()
}

struct Node {
    client: BaseClient<Channel>,
    engine: EngineHandle,
    text: ModelText,
    kv_address: String,
    kv: Arc<Kv>,
    draining: CancellationToken,
    sessions: TaskTracker,
}

async fn start(options: FakeOptions) -> Node {
    let engine =
        EngineHandle::start(Box::new(FakeExecutor::new(options)), EngineOptions::default());
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/stories260k");
    let text = ModelText::load(&fixtures).expect("the fixture is whole");
    let host = Host {
        node_id: NodeId::new("b1").expect("a valid id"),
        engine: engine.clone(),
        text: text.clone(),
        handoff_timeout: Duration::from_secs(20),
        draining: CancellationToken::new(),
        sessions: TaskTracker::new(),
        keep_alive: KeepAlive::CLUSTER,
        dialer: Dialer::default(),
    };
    let kv_listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let kv_address = kv_listener.local_addr().expect("bound").to_string();
    let times = Times { lease: Duration::from_secs(20), ..Times::default() };
    let kv = KvOptions {
        listener: Some(kv_listener.into()),
        address: kv_address.clone(),
        times,
        ..KvOptions::default()
    };
    let kv = Kv::new(&engine, kv);
    let service = BaseService::with_kv(&host, Arc::clone(&kv));
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("bound");
    let server = Server::builder().add_service(BaseServer::new(service));
    tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
    let client = BaseClient::connect(format!("http://{address}")).await.expect("connects");
    let Host { draining, sessions, .. } = host;
    Node { client, engine, text, kv_address, kv, draining, sessions }
}

fn request(epoch: u64) -> v1::ServeRequest {
    v1::ServeRequest {
        request_id: "r".into(),
        epoch,
        prompt_ids: prompt(),
        max_tokens: MAX_TOKENS as u32,
        sampling: Some(v1::Sampling { temperature: Some(0.0), ..Default::default() }),
        draft: Some(v1::DraftPolicy {
            window: 6,
            threshold: 0.8,
            encoding: DraftEncoding::Ids.into(),
            ..Default::default()
        }),
        movable: true,
        ..Default::default()
    }
}

/// A draft that is unlikely for 40 tokens, and the base's own from there.
fn draft() -> Vec<u32> {
    let base = FakeExecutor::new(FakeOptions::default());
    let mut draft: Vec<u32> = (400..440).collect();
    let mut context = [prompt(), draft.clone()].concat();
    for _ in 0..12 {
        draft.push(base.next_token(&context));
        context.push(draft[draft.len() - 1]);
    }
    draft
}

/// What the undisturbed answer is.
fn expected() -> Vec<u32> {
    let base = FakeExecutor::new(FakeOptions::default());
    // The six tokens from 40 on are the first likely window.
    let mut context = [prompt(), draft()[..46].to_vec()].concat();
    while context.len() < prompt().len() + MAX_TOKENS {
        context.push(base.next_token(&context));
    }
    context.split_off(prompt().len())
}

/// Gives `node` the draft's first `tokens`, for the attempt `epoch`, and stays.
async fn drafts(node: &Node, epoch: u64, tokens: usize) -> mpsc::Sender<v1::HandoffFrame> {
    let (frames, receiver) = mpsc::channel(64);
    let frame = |position, event| v1::HandoffFrame {
        request_id: "r".into(),
        epoch,
        position,
        event: Some(event),
    };
    let open = v1::HandoffOpen {
        drafter_id: "d".into(),
        tokenizer_fingerprint: node.text.tokenizer().fingerprint().to_string(),
        encoding: DraftEncoding::Ids.into(),
        serve_epoch: epoch,
    };
    frames.send(frame(0, handoff_frame::Event::Open(open))).await.expect("room");
    let mut client = node.client.clone();
    let replies = client.handoff(ReceiverStream::new(receiver)).await.expect("joins");
    let mut replies = replies.into_inner();
    let first = replies.message().await.expect("a reply").expect("a reply");
    let Some(handoff_reply::Event::Accepted(accepted)) = first.event else { panic!("accepted") };
    let draft = draft();
    let mut position = accepted.drafted;
    for ids in draft[position as usize..tokens].chunks(10) {
        let (count, ids) = (ids.len() as u32, ids.to_vec());
        let tokens = v1::DraftTokens { count, ids, text: String::new() };
        frames.send(frame(position, handoff_frame::Event::Tokens(tokens))).await.expect("room");
        position += count;
    }
    if tokens == draft.len() {
        let ended = v1::DraftEnded { reason: DraftEnd::Eos.into() };
        let _ = frames.send(frame(tokens as u32, handoff_frame::Event::Ended(ended))).await;
    }
    frames
}

/// What a stream brought.
#[derive(Debug, Default)]
struct Heard {
    ids: Vec<u32>,
    decision: Option<v1::Switched>,
    moved: Option<v1::Moved>,
}

/// Reads on, behind `heard`, until the stream's last frame or `tokens`.
async fn hear(answer: &mut Streaming<v1::ServeFrame>, mut heard: Heard, tokens: usize) -> Heard {
    while heard.ids.len() < tokens {
        let frame = answer.message().await.expect("a frame").expect("a frame");
        assert_eq!(frame.position as usize, heard.ids.len());
        match frame.event.expect("an event") {
            serve_frame::Event::Tokens(tokens) => heard.ids.extend(tokens.ids),
            serve_frame::Event::Switched(switched) => heard.decision = Some(switched),
            serve_frame::Event::Moved(moved) => {
                heard.moved = Some(moved);
                break;
            }
            serve_frame::Event::Finished(_) => break,
        }
    }
    heard
}

/// The attempt that goes on with what was heard.
fn resumed(epoch: u64, heard: &Heard) -> v1::ServeRequest {
    let moved = heard.moved.clone().unwrap_or_default();
    let resume = v1::Resume {
        answer_ids: heard.ids.clone(),
        decision: heard.decision,
        scores: moved.scores,
        kv: moved.kv,
    };
    v1::ServeRequest { resume: Some(resume), ..request(epoch) }
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

async fn nothing_is_held(nodes: &[&Node]) {
    for node in nodes {
        until("nothing is held", || {
            let stats = node.engine.stats();
            stats.slots_used == 0 && stats.kv_tokens_used == 0
        })
        .await;
    }
}

/// Reads on `score`, and says what it moved with; the KV is leased while the stream lives.
async fn score(score: &mut Node) -> (Heard, Streaming<v1::ServeFrame>) {
    let serve = v1::ServeRequest { move_when_decided: true, ..request(1) };
    let mut answer = score.client.serve(serve).await.expect("taken").into_inner();
    let all = draft().len();
    let _drafter = drafts(score, 1, all).await;
    let heard = hear(&mut answer, Heard::default(), usize::MAX).await;
    assert_eq!(heard.decision.map(|decision| decision.kept_tokens), Some(46));
    assert_eq!(heard.ids, expected()[..46]);
    (heard, answer)
}

#[tokio::test]
async fn a_reader_hands_its_answer_to_a_writer_that_followed() {
    let mut reader = start(FakeOptions::default()).await;
    // Pages of the writer are of another size, and split among two ranks.
    let limits = Limits { vocab_size: 512, context_length: 4096, page_size: 24, pages: 512 };
    for options in [FakeOptions::default(), FakeOptions { limits, tp: 2, ..Default::default() }] {
        let mut writer = start(options).await;
        let kv =
            v1::KvSource { address: reader.kv_address.clone(), request_id: "r".into(), epoch: 1 };
        let prefetch = v1::PrefetchRequest { request_id: "r".into(), epoch: 2, kv: Some(kv) };
        let mut following = writer.client.clone();
        let following = tokio::spawn(async move { following.prefetch(prefetch).await });
        until("it follows", || writer.kv.pulls() == 1).await;
        let (heard, _leased) = score(&mut reader).await;
        let moved = heard.moved.as_ref().expect("moved");
        assert_eq!(moved.kv.as_ref().map(|kv| &kv.address), Some(&reader.kv_address));
        let known = 100 + heard.ids.len();
        let mut answer = writer.client.serve(resumed(2, &heard)).await.expect("taken").into_inner();
        let heard = hear(&mut answer, heard, usize::MAX).await;
        assert_eq!(heard.ids, expected());
        following.await.expect("no panic").expect("it has the request");
        nothing_is_held(&[&reader, &writer]).await;
        // Whole pages moved, and the last one if it came before it could be computed.
        let page = writer.engine.limits().page_size;
        let counters = writer.engine.stats().counters;
        let moved = counters.tokens_reused as usize;
        assert!([(known - 1) / page * page, known - 1].contains(&moved), "{moved} of {known}");
        assert_eq!(counters.tokens_extended, (100 + MAX_TOKENS - 1 - moved) as u64);
    }
}

#[tokio::test]
async fn a_writer_that_comes_late_pulls_what_the_lease_has_kept() {
    let mut reader = start(FakeOptions::default()).await;
    let mut writer = start(FakeOptions::default()).await;
    let (heard, _leased) = score(&mut reader).await;
    let mut answer = writer.client.serve(resumed(2, &heard)).await.expect("taken").into_inner();
    let heard = hear(&mut answer, heard, usize::MAX).await;
    assert_eq!(heard.ids, expected());
    nothing_is_held(&[&reader, &writer]).await;
    assert_eq!(writer.engine.stats().counters.tokens_reused, 145);
}

#[tokio::test]
async fn without_the_reader_the_writer_computes_what_is_missing() {
    let mut reader = start(FakeOptions::default()).await;
    let mut writer = start(FakeOptions::default()).await;
    let (mut heard, _leased) = score(&mut reader).await;
    // Nobody listens there any more.
    let gone = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = gone.local_addr().expect("bound").to_string();
    drop(gone);
    if let Some(kv) = heard.moved.as_mut().and_then(|moved| moved.kv.as_mut()) {
        kv.address = address;
    }
    let mut answer = writer.client.serve(resumed(2, &heard)).await.expect("taken").into_inner();
    let heard = hear(&mut answer, heard, usize::MAX).await;
    assert_eq!(heard.ids, expected());
    assert_eq!(writer.engine.stats().counters.tokens_reused, 0);
    nothing_is_held(&[&writer]).await;
}

#[tokio::test]
async fn a_base_that_drains_moves_its_answers_before_and_after_the_decision() {
    for (drafted, tokens) in [(20, 12), (draft().len(), 60)] {
        let slow = Duration::from_millis(2);
        let mut first = start(FakeOptions { step_latency: slow, ..Default::default() }).await;
        let mut second = start(FakeOptions::default()).await;
        let mut answer = first.client.serve(request(1)).await.expect("taken").into_inner();
        let drafter = drafts(&first, 1, drafted).await;
        let heard = hear(&mut answer, Heard::default(), tokens).await;
        first.draining.cancel();
        first.sessions.close();
        let heard = hear(&mut answer, heard, usize::MAX).await;
        let moved = heard.moved.clone().expect("moved");
        assert!(moved.kv.is_some(), "it has KV to give");
        drop(drafter);
        let leased = answer;
        let mut answer = second.client.serve(resumed(2, &heard)).await.expect("taken").into_inner();
        let _drafter = match heard.decision {
            Some(_) => None,
            None => Some(drafts(&second, 2, draft().len()).await),
        };
        let heard = hear(&mut answer, heard, usize::MAX).await;
        assert_eq!(heard.ids, expected());
        assert!(second.engine.stats().counters.tokens_reused >= 96, "the prompt, at least");
        drop(leased);
        // The drain ends with its last lease, long before that would expire.
        tokio::time::timeout(Duration::from_secs(15), first.sessions.wait()).await.expect("ends");
        nothing_is_held(&[&first, &second]).await;
    }
}

#[tokio::test]
async fn a_prefetch_that_nobody_uses_is_given_up() {
    let reader = start(FakeOptions::default()).await;
    let mut writer = start(FakeOptions::default()).await;
    for (address, request_id) in
        [("nonsense", "r"), (&*reader.kv_address, ""), (&*reader.kv_address, "x")]
    {
        let (address, id) = (address.to_owned(), request_id.to_owned());
        let kv = Some(v1::KvSource { address, request_id: id, epoch: 1 });
        let prefetch = v1::PrefetchRequest { request_id: "r".into(), epoch: 2, kv };
        // A source that makes no sense is forgotten at once, one that has nothing in its time.
        let mut client = writer.client.clone();
        let call = tokio::spawn(async move { client.prefetch(prefetch).await });
        match request_id {
            "" => drop(call.await.expect("no panic").expect("only a hint")),
            _ => {
                until("it is tried", || writer.kv.pulls() == 1).await;
                // Who hangs up gives it up.
                call.abort();
                until("it is given up", || writer.kv.pulls() == 0).await;
            }
        }
    }
    let mut answer = writer
        .client
        .serve(v1::ServeRequest { draft: None, ..request(2) })
        .await
        .expect("taken")
        .into_inner();
    assert_eq!(hear(&mut answer, Heard::default(), usize::MAX).await.ids.len(), MAX_TOKENS);
}
