//! Pages from one engine to another, and everything that goes wrong on the way. The fake executor
//! refuses KV that is not that of its tokens, so an answer that comes is a proof.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures::future::BoxFuture;
use headstart_engine::executor::fake::{FakeExecutor, FakeOptions, Gate};
use headstart_engine::{
    DraftPolicy, EngineHandle, EngineOptions, Event, Export, Generation, Import, KvFormat, Limits,
    ModelHash, Request, Sampling, TokenId,
};
use headstart_handoff::sender::ServeError;
use headstart_handoff::{
    InMemory, KvStream, KvTransport, Leases, Offer, Progress, PullError, RefusalCode, Source, Tcp,
    Times, pull, serve,
};
use headstart_proto::{Epoch, RequestId};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};

const PATIENT: Times = Times {
    handshake: Duration::from_secs(20),
    stall: Duration::from_secs(20),
    alive: Duration::from_millis(50),
    lease: Duration::from_secs(20),
};
/// Six pages of sixteen, and four tokens.
const PROMPT: usize = 100;

fn engine(options: FakeOptions) -> EngineHandle {
    EngineHandle::start(Box::new(FakeExecutor::new(options)), EngineOptions::default())
}

fn pages_of(page_size: usize, tp: usize) -> FakeOptions {
    let limits = Limits { vocab_size: 512, context_length: 4096, page_size, pages: 512 };
    FakeOptions { limits, tp, ..FakeOptions::default() }
}

fn request(prompt: Vec<TokenId>, max_tokens: usize) -> Request {
    Request {
        prompt,
        max_tokens,
        sampling: Sampling::default(),
        stop_tokens: Arc::from([]),
        top_logprobs: 0,
        draft: None,
        known: Default::default(),
    }
}

fn prompt() -> Vec<TokenId> {
    (10..10 + PROMPT as TokenId).collect()
}

/// A request that waits for its draft.
fn drafted(prompt: Vec<TokenId>, max_tokens: usize) -> Request {
    let draft = DraftPolicy {
        window: 6,
        threshold: 0.8,
        continue_complete: true,
        continue_empty: true,
        moves_on: false,
    };
    Request { draft: Some(draft), ..request(prompt, max_tokens) }
}

/// The pages of [`prompt`], whose request is over. It waits for its draft until it is followed.
async fn exported(engine: &EngineHandle) -> Export {
    let request = drafted(prompt(), 1);
    let generation = engine.submit(request).expect("a slot");
    let export = generation.export().await.expect("runs");
    generation.draft().end().await.expect("runs");
    answer(generation).await;
    export
}

async fn answer(mut generation: Generation) -> Vec<TokenId> {
    let mut answer = Vec::new();
    while let Some(event) = generation.next().await {
        match event {
            Event::Wrote { judged, .. } => answer.push(judged.token.token),
            Event::Read { .. } => {}
            Event::Finished { .. } => return answer,
            other => panic!("{other:?}"),
        }
    }
    panic!("the engine stopped");
}

fn id() -> RequestId {
    RequestId::new("r").expect("a valid id")
}

fn epoch() -> Epoch {
    Epoch::new(1).expect("a valid epoch")
}

fn source() -> Source {
    Source { address: "sender".into(), request_id: id(), epoch: epoch() }
}

/// An engine that offers the pages of [`prompt`] over a network.
struct Sender {
    engine: EngineHandle,
    leases: Leases,
    offer: Offer,
    /// The pages that each connection sent, and how it ended.
    ended: mpsc::Receiver<(usize, Result<(), ServeError>)>,
}

async fn sender(network: &InMemory, options: FakeOptions, times: Times) -> Sender {
    let engine = engine(options);
    let export = exported(&engine).await;
    let leases = Leases::new(4);
    let offer = leases.offer(&id(), epoch(), export).expect("the first");
    let ended = listen(network, &engine, &leases, times);
    Sender { engine, leases, offer, ended }
}

fn listen(
    network: &InMemory,
    engine: &EngineHandle,
    leases: &Leases,
    times: Times,
) -> mpsc::Receiver<(usize, Result<(), ServeError>)> {
    let mut accepted = network.listen("sender");
    let (outcomes, ended) = mpsc::channel(8);
    let (leases, format) = (leases.clone(), engine.kv_format().expect("pages can leave"));
    tokio::spawn(async move {
        while let Some(stream) = accepted.recv().await {
            let pages = AtomicUsize::new(0);
            let count = |_| _ = pages.fetch_add(1, Ordering::Relaxed);
            let served = serve(stream, &leases, format, times, count).await;
            let _ = outcomes.send((pages.into_inner(), served)).await;
        }
    });
    ended
}

/// An engine that pulls.
struct Receiver {
    engine: EngineHandle,
    import: Import,
    progress: watch::Sender<Progress>,
}

fn receiver(options: FakeOptions) -> Receiver {
    let engine = engine(options);
    let import = engine.import();
    Receiver { engine, import, progress: watch::Sender::new(Progress::default()) }
}

impl Receiver {
    async fn pull(&self, transport: &dyn KvTransport, times: Times) -> Result<(), PullError> {
        let format = self.engine.kv_format().expect("pages can come in");
        pull(transport, &source(), format, &self.import, &self.progress, times).await
    }

    /// Tokens that a request for [`prompt`] finds; its answer is that of an engine alone.
    async fn reused(&self) -> usize {
        let before = self.engine.stats().counters.tokens_reused;
        let generation = self.engine.submit(request(prompt(), 8)).expect("a slot");
        let alone = engine(FakeOptions::default());
        let expected = alone.submit(request(prompt(), 8)).expect("a slot");
        assert_eq!(answer(generation).await, answer(expected).await);
        // Another request makes the engine publish its counters.
        answer(self.engine.submit(request(vec![9], 1)).expect("a slot")).await;
        (self.engine.stats().counters.tokens_reused - before) as usize
    }
}

#[tokio::test]
async fn pages_arrive_and_are_given_up_by_the_sender() {
    let network = InMemory::default();
    let mut sender = sender(&network, FakeOptions::default(), PATIENT).await;
    let receiver = receiver(FakeOptions::default());
    let kept = tokio::spawn(sender.offer.until_pulled(PATIENT.lease));
    receiver.pull(&network, PATIENT).await.expect("whole");
    let (pages, ended) = sender.ended.recv().await.expect("a connection");
    ended.expect("whole");
    assert_eq!(pages, 7);
    assert!(kept.await.expect("no panic"));
    assert!(sender.leases.is_empty());
    let progress = *receiver.progress.borrow();
    assert!(progress.over && progress.bytes > 0);
    assert_eq!(progress.tokens, PROMPT);
    assert_eq!(receiver.reused().await, PROMPT - 1, "the last token is extended for its result");
    drop(sender.engine);
}

#[tokio::test]
async fn tcp_carries_them_as_memory_does() {
    let engine = engine(FakeOptions::default());
    let export = exported(&engine).await;
    let leases = Leases::new(4);
    let _offer = leases.offer(&id(), epoch(), export).expect("the first");
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("bound").to_string();
    let format = engine.kv_format().expect("pages can leave");
    let serving = async {
        let (stream, _) = listener.accept().await.expect("a connection");
        let bytes = AtomicUsize::new(0);
        let count = |page| _ = bytes.fetch_add(page, Ordering::Relaxed);
        serve(stream, &leases, format, PATIENT, count).await.expect("whole");
        bytes.into_inner()
    };
    let receiver = receiver(FakeOptions::default());
    let source = Source { address, ..source() };
    let pulling = pull(&Tcp, &source, format, &receiver.import, &receiver.progress, PATIENT);
    let (sent, pulled) = tokio::join!(serving, pulling);
    pulled.expect("whole");
    assert_eq!(sent, 7 * format.layout.page_bytes());
    assert_eq!(receiver.reused().await, PROMPT - 1);
}

#[tokio::test]
async fn other_page_sizes_and_ranks_are_relaid() {
    for (from, to) in
        [((16, 1), (16, 2)), ((16, 2), (16, 1)), ((16, 4), (32, 1)), ((24, 1), (10, 4))]
    {
        let network = InMemory::default();
        let _sender = sender(&network, pages_of(from.0, from.1), PATIENT).await;
        let receiver = receiver(pages_of(to.0, to.1));
        receiver.pull(&network, PATIENT).await.expect("whole");
        assert_eq!(receiver.progress.borrow().tokens, PROMPT, "{from:?} to {to:?}");
        // A page that is full is found as a whole, so not by a request that ends with it.
        let full = PROMPT.is_multiple_of(to.0);
        let found = if full { PROMPT - to.0 } else { PROMPT - 1 };
        assert_eq!(receiver.reused().await, found, "{from:?} to {to:?}");
    }
}

#[tokio::test]
async fn a_receiver_follows_a_draft_that_is_still_read() {
    let network = InMemory::default();
    let from = engine(FakeOptions::default());
    let prompt: Vec<TokenId> = (10..30).collect();
    let draft: Vec<TokenId> = (400..460).collect();
    let leases = Leases::new(4);
    let mut ended = listen(&network, &from, &leases, PATIENT);
    let receiver = receiver(FakeOptions::default());
    let mut seen = receiver.progress.subscribe();
    let pulling = receiver.pull(&network, PATIENT);
    let reading = async {
        // The receiver is there before the request is.
        let generation = from.submit(drafted(prompt.clone(), 80)).expect("a slot");
        let export = generation.export().await.expect("runs");
        let offer = leases.offer(&id(), epoch(), export).expect("the first");
        for (part, tokens) in draft.chunks(20).zip([32, 48, 64]) {
            generation.draft().push(part.to_vec()).await.expect("runs");
            let arrived = seen.wait_for(|progress| progress.tokens >= tokens).await;
            assert!(!arrived.expect("pulls").over, "the draft is not decided");
        }
        drop(generation);
        offer.until_pulled(PATIENT.lease).await
    };
    let (pulled, kept) = tokio::join!(pulling, reading);
    pulled.expect("whole");
    assert!(kept);
    // The last draft token waits for its result.
    let (pages, ended) = ended.recv().await.expect("a connection");
    ended.expect("whole");
    assert_eq!(pages, 5);
    let context = [&prompt[..], &draft[..]].concat();
    let generation = receiver.engine.submit(request(context.clone(), 8)).expect("a slot");
    let alone = engine(FakeOptions::default()).submit(request(context, 8)).expect("a slot");
    assert_eq!(answer(generation).await, answer(alone).await);
    answer(receiver.engine.submit(request(vec![9], 1)).expect("a slot")).await;
    assert_eq!(receiver.engine.stats().counters.tokens_reused, 79);
}

/// What happens to the bytes from the sender.
#[derive(Clone, Copy)]
enum Fault {
    /// This one is changed.
    Flip(usize),
    /// The stream breaks behind so many.
    Cut(usize),
    /// Nothing comes behind so many.
    Stall(usize),
}

struct Faulty {
    network: InMemory,
    fault: Fault,
}

impl KvTransport for Faulty {
    fn connect<'a>(&'a self, address: &'a str) -> BoxFuture<'a, io::Result<Box<dyn KvStream>>> {
        Box::pin(async move {
            let stream = self.network.connect(address).await?;
            let (mut from_sender, mut to_sender) = tokio::io::split(stream);
            let (near, far) = tokio::io::duplex(1 << 10);
            let (mut from_receiver, mut to_receiver) = tokio::io::split(far);
            tokio::spawn(async move {
                let _ = tokio::io::copy(&mut from_receiver, &mut to_sender).await;
            });
            let fault = self.fault;
            tokio::spawn(async move {
                let (mut at, mut bytes) = (0, vec![0; 512]);
                while let Ok(count @ 1..) = from_sender.read(&mut bytes).await {
                    let here = at..at + count;
                    let mut good = count;
                    match fault {
                        Fault::Flip(place) if here.contains(&place) => bytes[place - at] ^= 0x10,
                        Fault::Cut(place) | Fault::Stall(place) if here.contains(&place) => {
                            good = place - at;
                        }
                        _ => {}
                    }
                    if to_receiver.write_all(&bytes[..good]).await.is_err() {
                        return;
                    }
                    match fault {
                        Fault::Cut(_) if good < count => {
                            let _ = to_receiver.shutdown().await;
                            return;
                        }
                        Fault::Stall(_) if good < count => std::future::pending().await,
                        _ => {}
                    }
                    at += count;
                }
            });
            Ok(Box::new(near) as Box<dyn KvStream>)
        })
    }
}

/// Bytes of the handshake's answer, and of a page's frame.
fn sizes(format: &KvFormat) -> (usize, usize) {
    let layout = format.layout;
    (5 + 1 + 32 + 21, 5 + 8 + 4 * layout.page_size + layout.page_bytes())
}

#[tokio::test]
async fn what_is_whole_stays_when_the_rest_is_broken() {
    let format = engine(FakeOptions::default()).kv_format().expect("pages can leave");
    let (head, page) = sizes(&format);
    type Wrong = fn(&PullError) -> bool;
    let cases: [(Fault, usize, Wrong); 7] = [
        (Fault::Flip(head + 2 * page + 100), 32, |e| e.code() == "corrupt"),
        // A token, a checksum, a position, a length.
        (Fault::Flip(head + 3 * page + 14), 48, |e| e.code() == "corrupt"),
        (Fault::Flip(head + page + 9), 16, |e| e.code() == "corrupt"),
        (Fault::Flip(head + page + 5), 16, |e| e.code() == "corrupt"),
        (Fault::Flip(head + page + 2), 16, |e| e.code() == "malformed"),
        (Fault::Cut(head + 4 * page + page / 2), 64, |e| e.code() == "broken"),
        (Fault::Stall(head + 5 * page + page / 2), 80, |e| e.code() == "stalled"),
    ];
    for (index, (fault, tokens, wrong)) in cases.into_iter().enumerate() {
        let network = InMemory::default();
        let sender = sender(&network, FakeOptions::default(), PATIENT).await;
        let receiver = receiver(FakeOptions::default());
        let times = match fault {
            Fault::Stall(_) => Times { stall: Duration::from_millis(200), ..PATIENT },
            _ => PATIENT,
        };
        let faulty = Faulty { network, fault };
        let error = receiver.pull(&faulty, times).await.expect_err("broken");
        assert!(wrong(&error), "case {index}: {error}");
        assert!(receiver.progress.borrow().over);
        assert_eq!(receiver.progress.borrow().tokens, tokens, "case {index}");
        assert_eq!(receiver.reused().await, tokens, "case {index}");
        assert_eq!(sender.leases.len(), 1, "another one may read");
    }
}

#[tokio::test]
async fn what_does_not_fit_is_refused_by_name() {
    let network = InMemory::default();
    let times = Times { handshake: Duration::from_secs(1), ..PATIENT };
    let sender = sender(&network, FakeOptions::default(), times).await;
    let receiver = receiver(FakeOptions::default());
    let own = receiver.engine.kv_format().expect("pages can come in");
    let code = async |source: Source, format: KvFormat| {
        let pulled = pull(&network, &source, format, &receiver.import, &receiver.progress, times);
        match pulled.await {
            Err(PullError::Refused(refusal)) => refusal.code,
            other => panic!("{other:?}"),
        }
    };
    let other_model = KvFormat { model: ModelHash([7; 32]), ..own };
    assert_eq!(code(source(), other_model).await, RefusalCode::Mismatch);
    let mut other_shape = own;
    other_shape.layout.layers += 1;
    assert_eq!(code(source(), other_shape).await, RefusalCode::Mismatch);
    let later = Source { epoch: epoch().next(), ..source() };
    drop(sender);
    assert_eq!(code(later, own).await, RefusalCode::NotFound);
    assert_eq!(receiver.reused().await, 0);
    let nobody = Source { address: "nobody".into(), ..source() };
    let pulled = pull(&network, &nobody, own, &receiver.import, &receiver.progress, times).await;
    assert!(matches!(pulled, Err(PullError::Connect(_))));
}

#[tokio::test]
async fn a_lease_that_ends_ends_its_readers_stream() {
    let network = InMemory::default();
    let gate = Arc::new(Gate::default());
    gate.set_open(true);
    let from = engine(FakeOptions { gate: Some(Arc::clone(&gate)), ..FakeOptions::default() });
    let generation = from.submit(drafted(prompt(), 80)).expect("a slot");
    let export = generation.export().await.expect("runs");
    let leases = Leases::new(4);
    let mut ended = listen(&network, &from, &leases, PATIENT);
    let offer = leases.offer(&id(), epoch(), export).expect("the first");
    let receiver = receiver(FakeOptions::default());
    let mut seen = receiver.progress.subscribe();
    let ending = async {
        // The prompt's last token waits for the draft.
        seen.wait_for(|progress| progress.tokens == 96).await.expect("pulls");
        drop(offer);
    };
    let (pulled, ()) = tokio::join!(receiver.pull(&network, PATIENT), ending);
    assert_eq!(pulled.expect_err("ended").code(), "expired");
    let (_, served) = ended.recv().await.expect("a connection");
    assert!(
        matches!(served, Err(ServeError::Refused(refusal)) if refusal.code == RefusalCode::Expired)
    );
    assert_eq!(receiver.reused().await, 96);
    drop(generation);
}

#[tokio::test]
async fn a_receiver_that_dies_costs_the_sender_nothing() {
    let network = InMemory::default();
    let from = engine(FakeOptions::default());
    let leases = Leases::new(4);
    let mut ended = listen(&network, &from, &leases, PATIENT);
    let generation = from.submit(drafted(prompt(), 8)).expect("a slot");
    let export = generation.export().await.expect("runs");
    let _offer = leases.offer(&id(), epoch(), export).expect("the first");
    let receiver = receiver(FakeOptions::default());
    let mut seen = receiver.progress.subscribe();
    {
        // More may come as long as the draft is not decided.
        let pulling = receiver.pull(&network, PATIENT);
        tokio::select! {
            pulled = pulling => panic!("{pulled:?}"),
            _ = seen.wait_for(|progress| progress.bytes > 0) => {}
        }
    }
    let (pages, served) = ended.recv().await.expect("a connection");
    assert!(matches!(served, Err(ServeError::Wire(_))), "{served:?}");
    assert!(pages > 0, "what was sent counts, however it ends");
    // Another one reads it all.
    drop(generation);
    receiver.pull(&network, PATIENT).await.expect("whole");
    assert_eq!(receiver.reused().await, PROMPT - 1);
}

#[tokio::test]
async fn a_receiver_without_room_keeps_what_it_has() {
    let network = InMemory::default();
    let _sender = sender(&network, FakeOptions::default(), PATIENT).await;
    let limits = Limits { vocab_size: 512, context_length: 64, page_size: 16, pages: 4 };
    let receiver = receiver(FakeOptions { limits, ..FakeOptions::default() });
    let error = receiver.pull(&network, PATIENT).await.expect_err("no room");
    assert_eq!(error.code(), "no_room");
    assert_eq!(receiver.progress.borrow().tokens, 64);
}
