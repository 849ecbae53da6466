//! The engine against the algorithm's three offline passes, on the fake executor: whatever the
//! timing of the draft, the size of a step, or the scarcity of pages, the answer is the same.

use std::collections::HashSet;
use std::sync::Arc;

use headstart_engine::core::scheduler::SequenceId;
use headstart_engine::executor::fake::{FakeExecutor, FakeOptions};
use headstart_engine::executor::{ExecutorError, Found, Row};
use headstart_engine::step::Engine;
use headstart_engine::{
    DraftPolicy, Event, Executor, Finish, Known, Limits, Request, Sampling, TokenId,
};
use proptest::prelude::*;

const STOP: TokenId = 0;

fn fake(salt: u64, pages: usize) -> FakeExecutor {
    FakeExecutor::new(FakeOptions {
        limits: Limits { vocab_size: 64, context_length: 512, page_size: 4, pages },
        agreement_percent: 85,
        salt,
        stop_token: (STOP, 40),
        ..FakeOptions::default()
    })
}

fn generate(fake: &FakeExecutor, prompt: &[TokenId], max: usize) -> Vec<TokenId> {
    let mut context = prompt.to_vec();
    while context.len() < prompt.len() + max {
        let next = fake.next_token(&context);
        if next == STOP {
            break;
        }
        context.push(next);
    }
    context.split_off(prompt.len())
}

#[derive(Clone, Debug, PartialEq)]
struct Answer {
    tokens: Vec<TokenId>,
    decided: Option<(bool, usize)>,
    finish: Option<Finish>,
}

/// Draft everything, check everything, continue everything (the paper's own three passes).
fn offline(
    base: &FakeExecutor,
    prompt: &[TokenId],
    draft: &[TokenId],
    request: &Request,
) -> Answer {
    let policy = request.draft.expect("a reading request");
    let max = request.max_tokens;
    let draft = &draft[..draft.len().min(max)];
    let logprobs: Vec<f64> = (0..draft.len())
        .map(|i| f64::from(base.logprob(&[prompt, &draft[..i]].concat(), draft[i])))
        .collect();
    let w = policy.window;
    let switch = (w.max(1) - 1..draft.len())
        .find(|&i| logprobs[i + 1 - w..=i].iter().sum::<f64>() / w as f64 >= policy.threshold.ln());
    let kept = switch.map_or(draft.len(), |k| k + 1);
    let mut tokens = draft[..kept].to_vec();
    let goes_on = match switch {
        Some(_) => true,
        None if draft.is_empty() => policy.continue_empty,
        None => policy.continue_complete,
    };
    let finish = if tokens.len() == max {
        Finish::Length
    } else if goes_on {
        tokens.extend(generate(base, &[prompt, &tokens].concat(), max - kept));
        if tokens.len() == max { Finish::Length } else { Finish::Stop }
    } else {
        Finish::Stop
    };
    Answer { tokens, decided: Some((switch.is_some(), kept)), finish: Some(finish) }
}

struct Case {
    id: SequenceId,
    draft: Vec<TokenId>,
    given: usize,
    ended: bool,
    scored: usize,
    answer: Answer,
}

impl Case {
    fn take(&mut self, event: Event) {
        match event {
            Event::Read { first, scores, decision } => {
                assert!(self.answer.decided.is_none(), "nothing is read after the decision");
                assert_eq!(first, self.scored, "each draft token is scored once");
                self.scored += scores.len();
                if let Some(decision) = decision {
                    assert_eq!(decision.kept, self.scored, "what is kept was scored");
                    self.answer.tokens.extend_from_slice(&self.draft[..decision.kept]);
                    self.answer.decided = Some((decision.switched, decision.kept));
                }
            }
            Event::Wrote { index, judged } => {
                assert_eq!(index, self.answer.tokens.len(), "positions have no gap");
                self.answer.tokens.push(judged.token.token);
            }
            Event::Finished { reason, answer_tokens } => {
                assert_eq!(answer_tokens, self.answer.tokens.len());
                assert_eq!(self.answer.finish.replace(reason), None);
            }
            Event::Failed { message, .. } => panic!("{message}"),
        }
    }
}

fn request(prompt: &[TokenId], max_tokens: usize, draft: DraftPolicy) -> Request {
    Request {
        prompt: prompt.to_vec(),
        max_tokens,
        sampling: Sampling::default(),
        stop_tokens: Arc::from([STOP]),
        top_logprobs: 0,
        draft: Some(draft),
        known: Known::default(),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn any_timing_gives_the_offline_answer(
        shared in prop::collection::vec(3u32..64, 0..24),
        own in prop::collection::vec(prop::collection::vec(3u32..64, 1..12), 1..5),
        window in 1usize..7,
        threshold in prop_oneof![0.3f64..0.95, Just(1.0)],
        (continue_complete, continue_empty) in any::<(bool, bool)>(),
        max_tokens in 1usize..40,
        draft_max in 0usize..30,
        step_tokens in 1usize..40,
        scarce: bool,
        waits: bool,
        moves in prop::collection::vec((0usize..5, 0usize..6), 0..80),
    ) {
        let prompts: Vec<Vec<TokenId>> = own.iter().map(|own| [&shared[..], own].concat()).collect();
        let pages = if scarce { 20 } else { 400 };
        let (drafter, base) = (fake(1, pages), fake(2, pages));
        let policy = DraftPolicy { window, threshold, continue_complete, continue_empty, moves_on: false };
        let mut engine = Engine::new(Box::new(base.clone()), step_tokens);
        engine.wait_for_drafts(waits);
        let mut cases = Vec::new();
        let mut expected = Vec::new();
        for prompt in &prompts {
            let draft = generate(&drafter, prompt, draft_max);
            let request = request(prompt, max_tokens, policy);
            expected.push(offline(&base, prompt, &draft, &request));
            let answer = Answer { tokens: Vec::new(), decided: None, finish: None };
            cases.push(Case { id: engine.add(request), draft, given: 0, ended: false, scored: 0, answer });
        }
        prop_assert!(!waits || !engine.has_work(), "prompts wait for their drafts if they must");
        // Gives draft pieces and steps in the order of `moves`, then whatever is left.
        let rest = (0..cases.len()).flat_map(|case| [(case, 100), (case, 100), (4, 0)]);
        for (which, amount) in moves.into_iter().chain(rest) {
            let mut events = Vec::new();
            if let Some(case) = cases.get_mut(which) {
                let end = (case.given + amount).min(case.draft.len());
                engine.push_draft(case.id, &case.draft[case.given..end]);
                case.given = end;
                if end == case.draft.len() && amount > 0 && !case.ended {
                    case.ended = true;
                    events = engine.end_draft(case.id);
                }
            } else {
                let (happened, result) = engine.step();
                prop_assert!(result.is_ok());
                events = happened;
            }
            for (id, event) in events {
                cases.iter_mut().find(|c| c.id == id).expect("a known one").take(event);
            }
        }
        let mut steps = 0;
        while engine.has_work() {
            let (events, _) = engine.step();
            for (id, event) in events {
                cases.iter_mut().find(|c| c.id == id).expect("a known one").take(event);
            }
            steps += 1;
            prop_assert!(steps < 20_000, "the engine makes no progress");
        }
        for (case, expected) in cases.iter().zip(&expected) {
            prop_assert_eq!(&case.answer, expected);
        }
        prop_assert_eq!(engine.pool().free() + engine.pool().idle(), pages, "every page is free again");
    }

    /// Each prefix is extended at most once, and nothing but prompt, draft and answer ever is.
    #[test]
    fn no_position_is_computed_twice(
        prompt in prop::collection::vec(3u32..64, 1..30),
        piece in 1usize..8,
        step_tokens in 1usize..40,
        steps_between in 0usize..3,
    ) {
        let (drafter, base) = (fake(1, 400), fake(2, 400));
        let policy = DraftPolicy { window: 3, threshold: 0.8, continue_complete: true, continue_empty: false, moves_on: false };
        let mut engine = Engine::new(Box::new(Recording { inner: base, seen: HashSet::new() }), step_tokens);
        let draft = generate(&drafter, &prompt, 24);
        let id = engine.add(request(&prompt, 60, policy));
        let answer = Answer { tokens: Vec::new(), decided: None, finish: None };
        let mut case = Case { id, draft: draft.clone(), given: 0, ended: false, scored: 0, answer };
        for tokens in draft.chunks(piece) {
            engine.push_draft(id, tokens);
            for _ in 0..steps_between {
                engine.step().0.into_iter().for_each(|(_, event)| case.take(event));
            }
        }
        engine.end_draft(id).into_iter().for_each(|(_, event)| case.take(event));
        while engine.has_work() {
            engine.step().0.into_iter().for_each(|(_, event)| case.take(event));
        }
        let counters = engine.counters();
        let kept = case.answer.decided.map_or(0, |(_, kept)| kept);
        // The last token is extended only if what the base says after it is a stop token.
        let stopped = case.answer.finish == Some(Finish::Stop) && !case.answer.tokens.is_empty();
        let continued = case.answer.tokens.len() - kept;
        let last = usize::from(!stopped);
        let (extended, cut) = (counters.tokens_extended as usize, counters.tokens_cut as usize);
        prop_assert!(case.answer.finish.is_some());
        if draft.is_empty() {
            // Nothing follows, so the prompt need not be read to its end.
            prop_assert!(extended < prompt.len() && cut == 0);
            return Ok(());
        }
        prop_assert_eq!(extended, prompt.len() + kept + continued + cut - last);
        prop_assert!(cut <= draft.len() - kept);
    }
}

/// Fails when a prefix is extended a second time.
struct Recording {
    inner: FakeExecutor,
    seen: HashSet<Vec<TokenId>>,
}

impl Executor for Recording {
    fn limits(&self) -> Limits {
        self.inner.limits()
    }

    fn execute(&mut self, rows: &[Row<'_>]) -> Result<Vec<Vec<Found>>, ExecutorError> {
        for row in rows {
            for end in row.start + 1..=row.context.len() {
                assert!(self.seen.insert(row.context[..end].to_vec()), "position {end} is new");
            }
        }
        self.inner.execute(rows)
    }
}
