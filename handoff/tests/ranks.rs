//! A model's KV moves between engines of different tensor-parallel degrees, and the answer goes on
//! with the tokens it would have had.

use std::path::Path;
use std::sync::Arc;

use headstart_engine::executor::cpu::{CpuOptions, executor};
use headstart_engine::model::{LoadOptions, Weights};
use headstart_engine::{
    DraftPolicy, EngineHandle, EngineOptions, Event, Generation, Request, Sampling, TokenId,
};
use headstart_handoff::{InMemory, Leases, Progress, Source, Times, pull, serve};
use headstart_proto::{Epoch, RequestId};
use tokio::sync::watch;

fn engine(tp: usize) -> EngineHandle {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/tiny/llama3-rope");
    let load = LoadOptions { threads: 1, ..LoadOptions::default() };
    let weights = Weights::load(&path, load, tp, &mut |_| {}).expect("the fixture is whole");
    let options = CpuOptions { threads: tp, kv_tokens: 512, ..CpuOptions::default() };
    let executor = executor(&weights, options).expect("options are right");
    EngineHandle::start(executor, EngineOptions::default())
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

async fn answer(mut generation: Generation) -> Vec<TokenId> {
    let mut answer = Vec::new();
    while let Some(event) = generation.next().await {
        if let Event::Wrote { judged, .. } = event {
            answer.push(judged.token.token);
        }
    }
    answer
}

#[tokio::test]
async fn an_answer_goes_on_among_more_or_fewer_ranks() {
    let prompt: Vec<TokenId> = (3..73).collect();
    for (from, to) in [(1, 2), (2, 1)] {
        let (from, to) = (engine(from), engine(to));
        let (theirs, ours) = (from.kv_format().expect("leaves"), to.kv_format().expect("enters"));
        assert_eq!(theirs.model, ours.model);
        assert_ne!(theirs.layout, ours.layout);
        let whole = answer(from.submit(request(prompt.clone(), 20)).expect("a slot")).await;
        // It waits for its draft until it is followed.
        let policy = DraftPolicy {
            window: 6,
            threshold: 0.8,
            continue_complete: true,
            continue_empty: true,
            moves_on: false,
        };
        let reading = Request { draft: Some(policy), ..request(prompt.clone(), 8) };
        let generation = from.submit(reading).expect("a slot");
        let export = generation.export().await.expect("runs");
        generation.draft().end().await.expect("runs");
        assert_eq!(answer(generation).await, whole[..8]);

        let (network, leases) = (InMemory::default(), Leases::new(1));
        let id = RequestId::new("r").expect("a valid id");
        let _offer = leases.offer(&id, Epoch::FIRST, export).expect("the first");
        let mut accepted = network.listen("sender");
        let serving = async {
            let stream = accepted.recv().await.expect("a connection");
            serve(stream, &leases, theirs, Times::default(), |_| {}).await.expect("whole")
        };
        let source = Source { address: "sender".into(), request_id: id, epoch: Epoch::FIRST };
        let (import, progress) = (to.import(), watch::Sender::new(Progress::default()));
        let pulling = pull(&network, &source, ours, &import, &progress, Times::default());
        let (_, pulled) = tokio::join!(serving, pulling);
        pulled.expect("whole");

        let context = [&prompt[..], &whole[..8]].concat();
        assert_eq!(answer(to.submit(request(context, 12)).expect("a slot")).await, whole[8..]);
        while to.stats().slots_used > 0 {
            tokio::task::yield_now().await;
        }
        // The last token written has no KV.
        assert_eq!(to.stats().counters.tokens_reused, prompt.len() as u64 + 7);
    }
}
