//! An executor that has the next step before the last one is collected gives the answers of one that
//! does not, and the engine keeps its contract: see the checks of `FakeExecutor`.

mod common;

use std::sync::Arc;

use common::watched::Watched;
use headstart_engine::core::scheduler::SequenceId;
use headstart_engine::executor::fake::{FakeExecutor, FakeOptions};
use headstart_engine::step::Engine;
use headstart_engine::{
    DraftPolicy, EngineHandle, EngineOptions, Event, Executor, Finish, Judged, Known, Limits,
    Request, Sampling, TokenId,
};
use proptest::prelude::*;

const STOP: TokenId = 0;

fn fake(salt: u64, pages: usize, pipelines: bool) -> FakeExecutor {
    FakeExecutor::new(FakeOptions {
        limits: Limits { vocab_size: 64, context_length: 512, page_size: 4, pages },
        agreement_percent: 85,
        salt,
        stop_token: (STOP, 30),
        pipelines,
        ..FakeOptions::default()
    })
}

fn sampling(kind: u64) -> Sampling {
    match kind % 3 {
        0 => Sampling::default(),
        1 => Sampling { temperature: 0.8, seed: kind, ..Sampling::default() },
        _ => Sampling {
            temperature: 2.0,
            presence_penalty: 1.5,
            frequency_penalty: 0.7,
            seed: kind,
            ..Sampling::default()
        },
    }
}

fn request(prompt: Vec<TokenId>, max_tokens: usize, sampling: Sampling) -> Request {
    Request {
        prompt,
        max_tokens,
        sampling,
        stop_tokens: Arc::from([STOP]),
        top_logprobs: 2,
        draft: None,
        known: Known::default(),
    }
}

/// All that was told of an answer, however it was cut into events.
#[derive(Clone, Debug, Default, PartialEq)]
struct Told {
    read: Vec<Judged>,
    decided: Option<(bool, usize)>,
    wrote: Vec<Judged>,
    finish: Option<(Finish, usize)>,
}

impl Told {
    fn take(&mut self, event: Event) {
        assert_eq!(self.finish, None, "the last event was the last");
        match event {
            Event::Read { first, scores, decision } => {
                assert_eq!(first, self.read.len(), "each draft token is scored once");
                self.read.extend(scores);
                self.decided = decision.map(|d| (d.switched, d.kept));
            }
            Event::Wrote { index, judged } => {
                let kept = self.decided.map_or(0, |(_, kept)| kept);
                assert_eq!(index, kept + self.wrote.len(), "positions have no gap");
                self.wrote.push(judged);
            }
            Event::Finished { reason, answer_tokens } => {
                self.finish = Some((reason, answer_tokens))
            }
            Event::Failed { message, .. } => panic!("{message}"),
        }
    }

    /// Whether this is how `whole` begins.
    fn begins(&self, whole: &Self) -> bool {
        whole.read.starts_with(&self.read)
            && whole.wrote.starts_with(&self.wrote)
            && (self.decided.is_none() || self.decided == whole.decided)
            && (self.finish.is_none() || self == whole)
    }
}

/// A request in an engine.
struct Case {
    request: Request,
    draft: Vec<TokenId>,
    id: SequenceId,
    given: usize,
    ended: bool,
    removed: bool,
    told: Told,
}

/// An engine with its requests.
struct Run {
    engine: Engine,
    cases: Vec<Case>,
}

impl Run {
    fn new(executor: Box<dyn Executor>, step_tokens: usize) -> Self {
        Self { engine: Engine::new(executor, step_tokens), cases: Vec::new() }
    }

    fn add(&mut self, request: &Request, draft: &[TokenId]) {
        let id = self.engine.add(request.clone());
        let (request, draft, told) = (request.clone(), draft.to_vec(), Told::default());
        self.cases.push(Case { request, draft, id, given: 0, ended: false, removed: false, told });
    }

    fn take(&mut self, events: Vec<(SequenceId, Event)>) {
        for (id, event) in events {
            let case = self.cases.iter_mut().find(|case| case.id == id).expect("a known one");
            assert!(!case.removed, "nothing is told of a request that is gone");
            case.told.take(event);
        }
    }

    /// Gives so many more tokens of a draft; its end, once they are all there.
    fn give(&mut self, which: usize, amount: usize) {
        let case = &mut self.cases[which];
        if case.request.draft.is_none() || case.ended {
            return;
        }
        let end = (case.given + amount).min(case.draft.len());
        self.engine.push_draft(case.id, &case.draft[case.given..end]);
        case.given = end;
        if end == case.draft.len() && amount > 0 {
            case.ended = true;
            let events = self.engine.end_draft(case.id);
            self.take(events);
        }
    }

    fn remove(&mut self, which: usize) {
        self.cases[which].removed = true;
        self.engine.remove(self.cases[which].id);
    }

    fn step(&mut self) {
        let (events, result) = self.engine.step();
        result.expect("the contract is kept");
        self.take(events);
    }

    fn finish(&mut self) {
        (0..self.cases.len()).for_each(|which| self.give(which, 1000));
        for steps in 0.. {
            if !self.engine.has_work() {
                return;
            }
            assert!(steps < 20_000, "the engine makes no progress");
            self.step();
        }
    }
}

/// What is told of a request that has a plain engine to itself.
fn alone(request: &Request, draft: &[TokenId]) -> Told {
    let mut run = Run::new(Box::new(fake(2, 400, false)), 64);
    run.add(request, draft);
    run.finish();
    run.cases.remove(0).told
}

fn drafted(prompt: &[TokenId], length: usize) -> Vec<TokenId> {
    let drafter = fake(1, 1, false);
    let mut context = prompt.to_vec();
    for _ in 0..length {
        context.push(drafter.next_token(&context));
    }
    context.split_off(prompt.len())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]
    #[test]
    fn answers_are_those_of_one_step_at_a_time(
        shared in prop::collection::vec(3u32..64, 0..24),
        own in prop::collection::vec(
            (prop::collection::vec(3u32..64, 1..12), 0u64..30, 1usize..40, prop::option::of(0usize..30)),
            1..6,
        ),
        window in 1usize..7,
        threshold in prop_oneof![0.3f64..0.95, Just(1.0)],
        (continue_complete, continue_empty) in any::<(bool, bool)>(),
        step_tokens in 1usize..40,
        scarce: bool,
        waits: bool,
        moves in prop::collection::vec((0usize..8, 0usize..60), 0..120),
    ) {
        let policy = DraftPolicy { window, threshold, continue_complete, continue_empty, moves_on: false };
        let pages = if scarce { 22 } else { 400 };
        let mut runs = [false, true].map(|pipelines| {
            Run::new(Box::new(fake(2, pages, pipelines)), step_tokens)
        });
        for (own, kind, max_tokens, draft) in &own {
            let prompt = [&shared[..], own].concat();
            let drafted = drafted(&prompt, draft.unwrap_or(0));
            let request = Request {
                draft: draft.map(|_| policy),
                ..request(prompt, *max_tokens, sampling(*kind))
            };
            runs.iter_mut().for_each(|run| run.add(&request, &drafted));
        }
        for run in &mut runs {
            run.engine.wait_for_drafts(waits);
            for &(which, amount) in &moves {
                match (which, amount) {
                    (which, 59) if which < run.cases.len() => run.remove(which),
                    (which, amount) if which < run.cases.len() => run.give(which, amount % 6),
                    _ => run.step(),
                }
            }
            run.finish();
            for case in &run.cases {
                let expected = alone(&case.request, &case.draft);
                if case.removed {
                    prop_assert!(case.told.begins(&expected), "{:?} {expected:?}", case.told);
                } else {
                    prop_assert_eq!(&case.told, &expected);
                }
            }
            let pool = run.engine.pool();
            prop_assert_eq!(pool.free() + pool.idle(), pages, "every page is free again");
        }
        // What is extended of a prompt whose draft turns out empty, or whose request goes, is a matter
        // of timing.
        let [plain, pipelined] = runs.each_ref().map(|run| run.engine.counters());
        let settled = |case: &Case| {
            !case.removed && (case.request.draft.is_none() || !case.draft.is_empty())
        };
        prop_assert_eq!(plain.tokens_overrun, 0);
        if !scarce && runs[0].cases.iter().all(settled) {
            let [plain, pipelined] = [plain, pipelined]
                .map(|c| c.tokens_extended + c.tokens_reused - c.tokens_cut);
            prop_assert_eq!(plain, pipelined);
        }
        let stopped = |case: &&Case| case.told.finish.is_some_and(|(why, _)| why == Finish::Stop);
        if runs[1].cases.iter().all(settled) {
            let stopped = runs[1].cases.iter().filter(stopped).count();
            prop_assert!(pipelined.tokens_overrun <= stopped as u64, "{pipelined:?} {stopped}");
        }
    }
}

/// An answer that the fake ends by itself, with its length.
fn stopping(max_tokens: usize) -> (Request, usize) {
    let requests = (3..60).map(|token| request(vec![token, 5, 6], max_tokens, Sampling::default()));
    let mut told = requests.map(|request| (alone(&request, &[]), request));
    let found = told.find_map(|(told, request)| match told.finish {
        Some((Finish::Stop, tokens)) if tokens > 5 => Some((request, tokens)),
        _ => None,
    });
    found.expect("some answer stops")
}

#[test]
fn a_token_is_extended_before_the_host_knows_it() {
    let endless = (3..60)
        .map(|token| request(vec![token, 5, 6], 20, Sampling::default()))
        .find(|request| alone(request, &[]).finish == Some((Finish::Length, 20)))
        .expect("some answer does not stop");
    let (executor, seen) = Watched::new(fake(2, 400, true));
    let mut run = Run::new(executor, 64);
    run.add(&endless, &[]);
    run.finish();
    let seen = seen.lock().expect("nobody panicked");
    assert_eq!((seen.in_flight_max, seen.batches, seen.pending_rows), (2, 20, 19), "{seen:?}");
    let counters = run.engine.counters();
    assert_eq!((counters.steps, counters.tokens_extended), (20, 3 + 19));
    assert_eq!(counters.tokens_overrun, 0, "the limit is known ahead");
}

#[test]
fn an_answer_that_stops_had_one_token_too_many() {
    let (request, tokens) = stopping(40);
    let (executor, seen) = Watched::new(fake(2, 400, true));
    let mut run = Run::new(executor, 64);
    run.add(&request, &[]);
    while run.cases[0].told.finish.is_none() {
        run.step();
    }
    assert!(run.engine.has_work() && run.engine.is_in_flight(), "its last row is on its way");
    assert!(run.engine.pool().used() > 0, "and may be writing its page");
    run.finish();
    assert_eq!(run.engine.pool().used(), 0);
    let counters = run.engine.counters();
    assert_eq!((counters.tokens_extended as usize, counters.tokens_overrun), (3 + tokens, 1));
    assert_eq!(seen.lock().expect("nobody panicked").batches, tokens + 2);
}

/// Penalties count a token that is not known yet, so such a row waits; and nobody else's step goes
/// ahead of it, which would halve its speed.
#[test]
fn a_row_that_must_wait_is_not_overtaken() {
    let penalised = Sampling { frequency_penalty: 0.01, ..Sampling::default() };
    let mut requests = (3..60).flat_map(|token| {
        [Sampling::default(), penalised.clone()].map(|s| request(vec![token, 5, 6], 20, s))
    });
    let endless = |request: &Request| alone(request, &[]).finish == Some((Finish::Length, 20));
    let of = |with: bool, requests: &mut dyn Iterator<Item = Request>| {
        let mut requests = requests.filter(|request| request.sampling.has_penalties() == with);
        requests.find(endless).expect("some answer does not stop")
    };
    let (executor, seen) = Watched::new(fake(2, 400, true));
    let mut run = Run::new(executor, 64);
    run.add(&of(true, &mut requests), &[]);
    run.add(&of(false, &mut requests), &[]);
    run.finish();
    let seen = seen.lock().expect("nobody panicked");
    assert_eq!((seen.in_flight_max, seen.batches, seen.pending_rows), (1, 20, 0), "{seen:?}");
}

/// A prompt whose pages another one's row in flight will give waits for its commit.
#[test]
fn what_begins_alike_is_computed_once_although_it_is_in_flight() {
    let prompt: Vec<TokenId> = (3..45).collect();
    let (executor, seen) = Watched::new(fake(2, 400, true));
    let mut run = Run::new(executor, 64);
    (0..3).for_each(|_| run.add(&request(prompt.clone(), 1, Sampling::default()), &[]));
    run.finish();
    let counters = run.engine.counters();
    // Ten whole pages of four are shared; the last two tokens are each one's own.
    assert_eq!((counters.tokens_extended, counters.tokens_reused), (42 + 2 * 2, 2 * 40));
    assert_eq!(seen.lock().expect("nobody panicked").batches, 3);
}

/// Through the thread: what was asked is told, whatever others do, and nothing stays behind.
#[tokio::test]
async fn requests_come_and_go_while_steps_are_in_flight() {
    let options = EngineOptions { slots: 64, step_tokens: 24, ..EngineOptions::default() };
    let engine = EngineHandle::start(Box::new(fake(2, 60, true)), options);
    let mut kept = Vec::new();
    for number in 0..40u32 {
        let prompt = (0..4 + number % 9).map(|i| 3 + (number * 7 + i * 5) % 61).collect();
        let request = request(prompt, 5 + number as usize % 30, sampling(u64::from(number)));
        let mut generation = engine.submit(request.clone()).expect("a slot");
        if number % 3 == 0 {
            // Gone while it is read, or while it is written.
            if number % 2 == 0 {
                generation.next().await;
            }
            drop(generation);
        } else {
            kept.push((request, generation));
        }
    }
    for (request, mut generation) in kept {
        let mut told = Told::default();
        while let Some(event) = generation.next().await {
            told.take(event);
        }
        assert_eq!(told, alone(&request, &[]));
    }
    for _ in 0..2_000 {
        let stats = engine.stats();
        if stats.slots_used == 0 && stats.kv_tokens_used == 0 {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    panic!("something is held: {:?}", engine.stats());
}
