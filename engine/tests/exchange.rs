//! KV pages that leave one engine and enter another.

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::{fixtures, load};
use headstart_engine::core::pages::PageId;
use headstart_engine::executor::cpu::{CpuExecutor, CpuOptions};
use headstart_engine::executor::fake::{FakeExecutor, FakeOptions};
use headstart_engine::executor::{ExecutorError, Found, Row};
use headstart_engine::model::WeightDtype;
use headstart_engine::{
    DraftPolicy, EngineHandle, EngineOptions, Event, Executor, Export, Generation, Import,
    ImportError, KvFormat, Limits, Request, Sampling, TokenId,
};

fn start(executor: impl Executor + 'static) -> EngineHandle {
    EngineHandle::start(Box::new(executor), EngineOptions::default())
}

/// An engine that nobody has run yet, and what runs it up to a step, which lasts for ever.
fn asleep(executor: impl Executor + 'static) -> (EngineHandle, impl Future<Output = ()>) {
    let options = EngineOptions::default();
    EngineHandle::start_paced(Box::new(executor), options, std::future::pending::<()>)
}

fn fake(options: FakeOptions) -> EngineHandle {
    start(FakeExecutor::new(options))
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

fn policy(continue_empty: bool) -> DraftPolicy {
    DraftPolicy {
        window: 6,
        threshold: 0.8,
        continue_complete: true,
        continue_empty,
        moves_on: false,
    }
}

/// The rest of an answer, with its log-probabilities bit for bit.
async fn answer(mut generation: Generation) -> Vec<(TokenId, u32)> {
    let mut answer = Vec::new();
    while let Some(event) = generation.next().await {
        match event {
            Event::Wrote { judged, .. } => {
                answer.push((judged.token.token, judged.token.logprob.to_bits()));
            }
            Event::Read { .. } => {}
            Event::Finished { .. } => return answer,
            other => panic!("{other:?}"),
        }
    }
    panic!("the engine stopped");
}

/// The pages of a request that is over, and its answer. It waits for its draft until it is followed.
async fn exported(
    engine: &EngineHandle,
    prompt: Vec<TokenId>,
    max_tokens: usize,
) -> (Export, Vec<(TokenId, u32)>) {
    let request = Request { draft: Some(policy(true)), ..request(prompt, max_tokens) };
    let generation = engine.submit(request).expect("a slot");
    let export = generation.export().await.expect("runs");
    generation.draft().end().await.expect("runs");
    (export, answer(generation).await)
}

/// Copies all pages of `export` that are there.
async fn copy(export: &mut Export, import: &Import) -> Result<usize, ImportError> {
    let view = export.view();
    for (index, page) in view.pages.iter().enumerate() {
        let data = export.read(page.clone(), Vec::new()).await.done().await.expect("readable");
        import.write(index, page.tokens().to_vec(), data).await?.done().await?;
    }
    Ok(view.pages.len())
}

/// Runs a request to its end, so that the engine has published what came before.
async fn settle(engine: &EngineHandle) {
    answer(engine.submit(request(vec![9], 1)).expect("a slot")).await;
}

async fn until(what: &str, condition: impl Fn() -> bool) {
    for _ in 0..2_000 {
        if condition() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("never: {what}");
}

/// A page of zeros, the KV of tokens that count from `first`.
fn page(engine: &EngineHandle, first: TokenId) -> (Vec<TokenId>, Vec<u8>) {
    let format = engine.kv_format().expect("pages can come in");
    let tokens = (first..).take(format.layout.page_size).collect();
    (tokens, vec![0; format.layout.page_bytes()])
}

#[tokio::test]
async fn who_wants_a_page_copied_copies_it_while_the_engine_sleeps() {
    let (engine, runs) = asleep(FakeExecutor::new(FakeOptions::default()));
    let mut runs = std::pin::pin!(runs);
    let import = engine.import();
    let (tokens, data) = page(&engine, 0);
    let mut first = import.write(0, tokens, data).await.expect("asked");
    assert!(first.is_done());
    first.done().await.expect("written");
    assert_eq!(engine.stats().kv_tokens_used, engine.limits().page_size);

    let _generation = engine.submit(request(vec![1], 4)).expect("a slot");
    let step = tokio::time::timeout(Duration::from_millis(1), &mut runs).await;
    assert!(step.is_err(), "it has a step to run, for ever");
    let (tokens, data) = page(&engine, 50);
    let second = import.write(1, tokens, data).await.expect("asked");
    assert!(!second.is_done());
}

/// Pages cannot be written without a panic.
struct Panics(FakeExecutor);

impl Executor for Panics {
    fn limits(&self) -> Limits {
        self.0.limits()
    }

    fn execute(&mut self, rows: &[Row<'_>]) -> Result<Vec<Vec<Found>>, ExecutorError> {
        self.0.execute(rows)
    }

    fn kv_format(&self) -> Option<KvFormat> {
        self.0.kv_format()
    }

    fn write_page(&mut self, _: PageId, _: &[u8]) -> Result<(), ExecutorError> {
        panic!("this one does");
    }
}

#[tokio::test]
async fn a_copy_that_panics_ends_the_engine_and_nobody_else() {
    let (engine, runs) = asleep(Panics(FakeExecutor::new(FakeOptions::default())));
    let import = engine.import();
    let (tokens, data) = page(&engine, 0);
    let mut writing = import.write(0, tokens, data).await.expect("asked");
    assert_eq!(writing.done().await, Err(ImportError::Stopped));
    runs.await;
    assert!(engine.failure().is_some());
}

/// An answer that begins in `from` and goes on in `to` is that of one engine alone, and `to`
/// computes no more than the last token anew.
async fn moves(from: &EngineHandle, to: &EngineHandle, prompt: Vec<TokenId>) {
    let page_size = from.limits().page_size;
    assert_ne!((prompt.len() + 23) % page_size, 0, "the last page is not full");
    let whole = answer(from.submit(request(prompt.clone(), 40)).expect("a slot")).await;
    let (mut export, first) = exported(from, prompt.clone(), 24).await;
    assert_eq!(first, whole[..24]);
    let import = to.import();
    // The last token written has no KV.
    let known = prompt.len() + 23;
    assert_eq!(copy(&mut export, &import).await, Ok(known.div_ceil(page_size)));

    let mut context = prompt;
    context.extend(first.iter().map(|(token, _)| token));
    let before = to.stats().counters;
    let rest = answer(to.submit(request(context.clone(), 16)).expect("a slot")).await;
    assert_eq!(rest, whole[24..]);
    until("the counters are told", || to.stats().slots_used == 0).await;
    let after = to.stats().counters;
    assert_eq!(after.tokens_reused - before.tokens_reused, known as u64);
    assert_eq!(after.tokens_extended - before.tokens_extended, 16);
}

#[tokio::test]
async fn an_answer_goes_on_with_the_pages_of_another_engine() {
    moves(&fake(FakeOptions::default()), &fake(FakeOptions::default()), (10..60).collect()).await;
    let model = load(&fixtures().join("tiny/llama3-rope"), WeightDtype::Auto);
    let cpu = || {
        let options = CpuOptions { threads: 1, kv_tokens: 1024, ..CpuOptions::default() };
        start(CpuExecutor::new(Arc::clone(&model), options).expect("options are right"))
    };
    moves(&cpu(), &cpu(), (3..53).collect()).await;
}

#[tokio::test]
async fn pages_are_held_by_their_exports_and_imports_and_by_nobody_else() {
    let (from, to) = (fake(FakeOptions::default()), fake(FakeOptions::default()));
    let (mut export, _) = exported(&from, (10..42).collect(), 1).await;
    let import = to.import();
    assert_eq!(copy(&mut export, &import).await, Ok(2));
    for engine in [&from, &to] {
        settle(engine).await;
        assert_eq!(engine.stats().kv_tokens_used, 32);
    }
    drop((export, import));
    for engine in [&from, &to] {
        settle(engine).await;
        assert_eq!(engine.stats().kv_tokens_used, 0);
    }
}

#[tokio::test]
async fn a_page_that_is_cached_already_is_shared() {
    let (from, to) = (fake(FakeOptions::default()), fake(FakeOptions::default()));
    let prompt: Vec<TokenId> = (10..42).collect();
    let (mut export, _) = exported(&from, prompt.clone(), 1).await;
    answer(to.submit(request(prompt, 1)).expect("a slot")).await;
    let (one, two) = (to.import(), to.import());
    assert_eq!(copy(&mut export, &one).await, Ok(2));
    assert_eq!(copy(&mut export, &two).await, Ok(2));
    settle(&to).await;
    assert_eq!(to.stats().kv_tokens_used, 32);
}

#[tokio::test]
async fn pages_that_do_not_follow_or_fit_are_refused() {
    let to = fake(FakeOptions::default());
    let bytes = to.kv_format().expect("pages can leave").layout.page_bytes();
    let import = to.import();
    let write = async |index, tokens: usize, bytes| {
        let written = import.write(index, vec![3; tokens], vec![0; bytes]).await;
        written.expect("runs").done().await.map(|_| ())
    };
    assert_eq!(write(1, 16, bytes).await, Err(ImportError::Gap));
    assert_eq!(write(0, 0, bytes).await, Err(ImportError::Size));
    assert_eq!(write(0, 17, bytes).await, Err(ImportError::Size));
    assert_eq!(write(0, 16, bytes - 1).await, Err(ImportError::Failed));
    assert_eq!(write(0, 16, bytes).await, Ok(()));
    assert_eq!(write(2, 16, bytes).await, Err(ImportError::Gap));
    assert_eq!(write(1, 15, bytes).await, Ok(()));
    assert_eq!(write(2, 16, bytes).await, Err(ImportError::Gap));
}

/// What an engine reuses of a last page with the tokens 42 to 51 behind those that the request has.
async fn reused_of_a_last_page(prompt: Vec<TokenId>) -> u64 {
    let (from, to) = (fake(FakeOptions::default()), fake(FakeOptions::default()));
    let (mut export, _) = exported(&from, (10..52).collect(), 1).await;
    let import = to.import();
    assert_eq!(copy(&mut export, &import).await, Ok(3));
    let alone = answer(from.submit(request(prompt.clone(), 20)).expect("a slot")).await;
    assert_eq!(answer(to.submit(request(prompt, 20)).expect("a slot")).await, alone);
    settle(&to).await;
    to.stats().counters.tokens_reused
}

#[tokio::test]
async fn of_a_last_page_what_a_request_goes_on_with_is_reused() {
    let to = |last| (10..last).collect::<Vec<TokenId>>();
    assert_eq!(reused_of_a_last_page(to(60)).await, 42, "all of it");
    assert_eq!(reused_of_a_last_page(to(47)).await, 36, "but for the last token of the request");
    assert_eq!(
        reused_of_a_last_page([to(45), vec![7, 7, 7]].concat()).await,
        35,
        "what is the same"
    );
    assert_eq!(reused_of_a_last_page([to(42), vec![7, 7, 7]].concat()).await, 32, "nothing");
    assert_eq!(
        reused_of_a_last_page([to(20), vec![7; 40]].concat()).await,
        0,
        "other pages before"
    );
}

#[tokio::test]
async fn of_two_last_pages_the_one_that_holds_more_is_taken() {
    let (from, to) = (fake(FakeOptions::default()), fake(FakeOptions::default()));
    let prompt = |last| [(10..44).collect::<Vec<TokenId>>(), vec![last; 8]].concat();
    let (other, own) = (to.import(), to.import());
    for (import, last) in [(&other, 7), (&own, 8)] {
        let (mut export, _) = exported(&from, prompt(last), 1).await;
        assert_eq!(copy(&mut export, import).await, Ok(3));
    }
    for last in [8, 7] {
        let before = to.stats().counters.tokens_reused;
        answer(to.submit(request(prompt(last), 3)).expect("a slot")).await;
        settle(&to).await;
        assert_eq!(to.stats().counters.tokens_reused - before, 41, "all but the last token");
    }
}

#[tokio::test]
async fn an_engine_computes_nothing_for_an_answer_that_moves_on() {
    let from = fake(FakeOptions::default());
    let policy = DraftPolicy { moves_on: true, ..policy(false) };
    let reading = Request { draft: Some(policy), ..request((10..40).collect(), 60) };
    let mut generation = from.submit(reading).expect("a slot");
    let mut export = generation.export().await.expect("runs");
    generation.draft().push((400..420).collect()).await.expect("runs");
    generation.draft().end().await.expect("runs");
    let kept = loop {
        match generation.next().await {
            Some(Event::Read { decision: Some(decision), .. }) => break decision.kept,
            Some(Event::Read { .. }) => {}
            other => panic!("{other:?}"),
        }
    };
    settle(&from).await;
    let extended = from.stats().counters.tokens_extended;
    settle(&from).await;
    assert_eq!(from.stats().counters.tokens_extended, extended + 1, "the other request alone");
    assert!(generation.try_next().is_none());
    drop(generation);
    while !export.view().ended {
        assert!(export.changed().await);
    }
    let pages = export.view().pages;
    let tokens: usize = pages.iter().map(|page| page.tokens().len()).sum();
    assert!([30 + kept, 30 + kept - 1].contains(&tokens), "{tokens} tokens, {kept} kept");
}

#[tokio::test]
async fn a_last_page_serves_one_request_and_is_given_up_with_its_import() {
    let (from, to) = (fake(FakeOptions::default()), fake(FakeOptions::default()));
    let prompt: Vec<TokenId> = (10..52).collect();
    let (mut export, _) = exported(&from, prompt.clone(), 1).await;
    let import = to.import();
    assert_eq!(copy(&mut export, &import).await, Ok(3));
    settle(&to).await;
    assert_eq!(to.stats().kv_tokens_used, 48);
    for reused in [41, 32] {
        let before = to.stats().counters.tokens_reused;
        answer(to.submit(request(prompt.clone(), 3)).expect("a slot")).await;
        settle(&to).await;
        assert_eq!(to.stats().counters.tokens_reused - before, reused);
    }
    assert_eq!(to.stats().kv_tokens_used, 32, "the request gave the last page back");
    let again = to.import();
    assert_eq!(copy(&mut export, &again).await, Ok(3));
    drop((import, again));
    settle(&to).await;
    assert_eq!(to.stats().kv_tokens_used, 0);
}

#[tokio::test]
async fn imports_take_no_page_that_a_request_may_need_and_give_theirs_up() {
    let limits = Limits { vocab_size: 512, context_length: 64, page_size: 16, pages: 4 };
    let (from, to) =
        (fake(FakeOptions::default()), fake(FakeOptions { limits, ..Default::default() }));
    let (mut export, _) = exported(&from, (10..100).collect(), 1).await;
    let import = to.import();
    assert_eq!(copy(&mut export, &import).await, Err(ImportError::NoRoom));
    until("all that was free is used", || to.stats().kv_tokens_used == 64).await;
    // A request needs two pages: it gets them.
    assert_eq!(answer(to.submit(request((200..220).collect(), 4)).expect("a slot")).await.len(), 4);
    settle(&to).await;
    assert_eq!(to.stats().kv_tokens_used, 0);
}

#[tokio::test]
async fn pages_of_a_draft_are_there_before_it_is_decided() {
    let from = fake(FakeOptions::default());
    let prompt: Vec<TokenId> = (10..22).collect();
    let draft: Vec<TokenId> = (400..440).collect();
    let reading = Request { draft: Some(policy(false)), ..request(prompt.clone(), 60) };
    let mut generation = from.submit(reading).expect("a slot");
    let mut export = generation.export().await.expect("runs");
    generation.draft().push(draft[..12].to_vec()).await.expect("runs");
    while export.view().pages.is_empty() {
        assert!(export.changed().await);
    }
    let early = export.view().pages[0].clone();
    assert_eq!(early.tokens(), [&prompt[..], &draft[..4]].concat());
    generation.draft().push(draft[12..].to_vec()).await.expect("runs");
    generation.draft().end().await.expect("runs");
    let (mut kept, mut written) = (0, Vec::new());
    while let Some(event) = generation.next().await {
        match event {
            Event::Read { decision: Some(decision), .. } => kept = decision.kept,
            Event::Wrote { judged, .. } => written.push(judged.token.token),
            _ => {}
        }
    }
    let whole = [&prompt[..], &draft[..kept], &written].concat();
    assert_eq!(whole.len(), 12 + 60);
    let view = export.view();
    assert!(view.ended && view.pages[0].serial() == early.serial());
    let known = &whole[..whole.len() - 1];
    assert_eq!(view.pages.len(), known.len().div_ceil(16), "the last token has no KV");
    for (page, tokens) in view.pages.iter().zip(known.chunks(16)) {
        assert_eq!(page.tokens(), tokens);
    }
    let to = fake(FakeOptions::default());
    let import = to.import();
    assert_eq!(copy(&mut export, &import).await, Ok(view.pages.len()));
    let rest = answer(to.submit(request(whole[..70].to_vec(), 2)).expect("a slot")).await;
    assert_eq!(rest.iter().map(|(token, _)| *token).collect::<Vec<_>>(), whole[70..]);
}
