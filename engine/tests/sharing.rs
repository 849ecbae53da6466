//! Nothing is computed twice: what sequences have in common is extended once. Counters say so.

use std::sync::Arc;

use headstart_engine::executor::fake::{FakeExecutor, FakeOptions};
use headstart_engine::step::Engine;
use headstart_engine::{Event, Limits, Request, Sampling, TokenId};

const PAGE: usize = 16;

fn engine(step_tokens: usize, pages: usize) -> Engine {
    let fake = FakeExecutor::new(FakeOptions {
        limits: Limits { vocab_size: 256, context_length: 4096, page_size: PAGE, pages },
        ..FakeOptions::default()
    });
    Engine::new(Box::new(fake), step_tokens)
}

fn tokens(seed: u32, count: usize) -> Vec<TokenId> {
    (0..count as u32).map(|i| (i.wrapping_mul(2_654_435_761) ^ seed) % 250 + 1).collect()
}

fn request(prompt: Vec<TokenId>, seed: u64, max_tokens: usize) -> Request {
    Request {
        prompt,
        max_tokens,
        sampling: Sampling { temperature: 1.0, seed, ..Sampling::default() },
        stop_tokens: Arc::new([]),
        top_logprobs: 0,
        draft: None,
        known: Default::default(),
    }
}

/// Runs until nothing is left to do; returns each sequence's tokens in the order of their ids.
fn run(engine: &mut Engine) -> Vec<Vec<TokenId>> {
    let mut answers = std::collections::BTreeMap::<_, Vec<TokenId>>::new();
    while engine.has_work() {
        let (events, result) = engine.step();
        result.expect("the fake never fails");
        for (id, event) in events {
            if let Event::Wrote { judged, .. } = event {
                answers.entry(id).or_default().push(judged.token.token);
            }
        }
    }
    answers.into_values().collect()
}

#[test]
fn the_answers_of_one_prompt_prefill_it_once() {
    let (prompt, written) = (tokens(1, 1000), 5);
    // In one step, in many small ones, and with too few pages for all to have their own.
    for (step_tokens, pages) in [(8192, 4096), (64, 4096), (64, 80)] {
        let mut engine = engine(step_tokens, pages);
        for seed in 0..4 {
            engine.add(request(prompt.clone(), seed, written));
        }
        let answers = run(&mut engine);
        assert_eq!(answers.len(), 4);
        // Each computes what follows the last whole page before the prompt's last token.
        let own = 1000 - 999 / PAGE * PAGE;
        let counters = engine.counters();
        assert_eq!(counters.tokens_preempted, 0);
        assert_eq!(counters.tokens_extended as usize, 1000 + 3 * own + 4 * (written - 1));
        assert_eq!(counters.tokens_reused as usize, 3 * (1000 - own));
        for (seed, answer) in answers.iter().enumerate() {
            let mut alone = self::engine(8192, 4096);
            alone.add(request(prompt.clone(), seed as u64, written));
            assert_eq!(run(&mut alone)[0], *answer, "seed {seed}");
        }
    }
}

#[test]
fn a_second_turn_prefills_what_is_new() {
    let mut engine = engine(256, 4096);
    let prompt = tokens(2, 1000);
    engine.add(request(prompt.clone(), 0, 50));
    let answer = run(&mut engine).remove(0);
    let before = engine.counters();

    let second = [prompt, answer, tokens(3, 30)].concat();
    engine.add(request(second.clone(), 0, 1));
    run(&mut engine);
    let after = engine.counters();
    // The last token written has no KV: nobody asked what follows it.
    let known = 1049 / PAGE * PAGE;
    assert_eq!((after.tokens_reused - before.tokens_reused) as usize, known);
    assert_eq!((after.tokens_extended - before.tokens_extended) as usize, second.len() - known);
}

#[test]
fn prompts_that_differ_do_not_wait_for_each_other() {
    let mut engine = engine(64, 4096);
    engine.add(request(tokens(4, 640), 0, 1));
    engine.add(request(tokens(5, 10), 0, 1));
    // The short prompt shares nothing with the long one; it is read as soon as there is room.
    let mut steps = 0;
    while engine.has_work() {
        engine.step().1.expect("the fake never fails");
        steps += 1;
    }
    assert_eq!(steps, 11, "650 tokens, 64 a step");
    assert_eq!(engine.counters().tokens_reused, 0);
}

#[test]
fn a_follower_goes_on_when_its_leader_is_gone() {
    let mut engine = engine(64, 4096);
    let prompt = tokens(6, 640);
    let leader = engine.add(request(prompt.clone(), 0, 1));
    engine.add(request(prompt, 1, 1));
    engine.step().1.expect("the fake never fails");
    assert_eq!(engine.counters().tokens_extended, 64, "the follower waits");
    engine.remove(leader);
    assert_eq!(run(&mut engine).len(), 1);
    assert_eq!(engine.counters().tokens_extended, 640, "and takes over what there is");
}
