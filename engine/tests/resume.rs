//! An answer that is cut anywhere and goes on in another engine is the undisturbed one: events,
//! log-probabilities and all.

use std::sync::Arc;

use headstart_engine::core::switch::certain_tokens;
use headstart_engine::executor::fake::{FakeExecutor, FakeOptions};
use headstart_engine::step::Engine;
use headstart_engine::{
    Decision, DraftPolicy, Event, Finish, Judged, Known, Limits, Request, Sampling, TokenId,
};
use proptest::prelude::*;

const STOP: TokenId = 0;

fn fake(salt: u64) -> FakeExecutor {
    FakeExecutor::new(FakeOptions {
        limits: Limits { vocab_size: 64, context_length: 256, page_size: 4, pages: 128 },
        agreement_percent: 85,
        salt,
        stop_token: (STOP, 40),
        ..FakeOptions::default()
    })
}

fn sampling(kind: u64) -> Sampling {
    match kind % 3 {
        0 => Sampling::default(),
        1 => Sampling { temperature: 0.8, seed: kind, ..Sampling::default() },
        _ => Sampling {
            temperature: 2.0,
            top_p: 0.95,
            presence_penalty: 1.5,
            frequency_penalty: 0.7,
            seed: kind,
            ..Sampling::default()
        },
    }
}

/// What is known of an answer at some moment.
#[derive(Clone, Debug, Default, PartialEq)]
struct Told {
    /// Draft tokens that were given, then the written ones.
    tokens: Vec<TokenId>,
    judged: Vec<Option<Judged>>,
    scores: Vec<f32>,
    decision: Option<Decision>,
    finish: Option<Finish>,
}

impl Told {
    /// Tokens that may be out.
    fn certain(&self, window: usize) -> usize {
        let kept = self.decision.map(|decision| decision.kept);
        match kept {
            Some(_) => self.tokens.len(),
            None => certain_tokens(window, self.tokens.len(), self.scores.len(), None),
        }
    }

    fn take(&mut self, event: Event) {
        match event {
            Event::Read { first, scores, decision } => {
                assert_eq!(first, self.scores.len(), "each draft token is scored once");
                for (index, judged) in scores.into_iter().enumerate() {
                    assert_eq!(self.tokens[first + index], judged.token.token);
                    self.scores.push(judged.token.logprob);
                    self.judged[first + index] = Some(judged);
                }
                if let Some(decision) = decision {
                    self.tokens.truncate(decision.kept);
                    self.judged.truncate(decision.kept);
                }
                self.decision = decision;
            }
            Event::Wrote { index, judged } => {
                assert_eq!(index, self.tokens.len(), "positions have no gap");
                self.tokens.push(judged.token.token);
                self.judged.push(Some(judged));
            }
            Event::Finished { reason, answer_tokens } => {
                assert_eq!(answer_tokens, self.tokens.len());
                self.finish = Some(reason);
            }
            Event::Failed { message, .. } => panic!("{message}"),
        }
    }
}

/// Runs `request` with `draft`, of which `given` tokens are known already, in pieces of `piece`
/// tokens with a few steps between them. Returns what is told after every event.
fn run(request: &Request, told: Told, draft: &[TokenId], piece: usize, steps: usize) -> Vec<Told> {
    let mut engine = Engine::new(Box::new(fake(2)), 16);
    let id = engine.add(request.clone());
    let mut history = vec![told];
    let mut take = |events: Vec<(_, Event)>, pushed: &[TokenId]| {
        let mut told = history[history.len() - 1].clone();
        let room = request.max_tokens.saturating_sub(told.tokens.len());
        if told.decision.is_none() {
            told.tokens.extend(&pushed[..pushed.len().min(room)]);
            told.judged.resize(told.tokens.len(), None);
        }
        history.push(told);
        for (_, event) in events {
            let mut told = history[history.len() - 1].clone();
            told.take(event);
            history.push(told);
        }
    };
    if request.draft.is_some() {
        for tokens in draft.chunks(piece) {
            engine.push_draft(id, tokens);
            take(Vec::new(), tokens);
            for _ in 0..steps {
                take(engine.step().0, &[]);
            }
        }
        take(engine.end_draft(id), &[]);
    }
    while engine.has_work() {
        let (events, result) = engine.step();
        result.expect("the fake never fails");
        take(events, &[]);
    }
    history
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]
    #[test]
    fn a_cut_answer_goes_on_as_if_nothing_had_happened(
        prompt in prop::collection::vec(3u32..64, 1..20),
        kind in 0u64..60,
        window in 1usize..7,
        threshold in prop_oneof![0.3f64..0.95, Just(1.0)],
        max_tokens in 1usize..40,
        (piece, steps) in (1usize..9, 0usize..3),
        (piece_after, steps_after) in (1usize..9, 0usize..3),
        scores_known in 0usize..40,
        cut in 0usize..200,
    ) {
        let policy = DraftPolicy { window, threshold, continue_complete: true, continue_empty: false, moves_on: false };
        let mut context = prompt.clone();
        let drafter = fake(1);
        let draft: Vec<TokenId> = (0..30)
            .map(|_| {
                context.push(drafter.next_token(&context));
                context[context.len() - 1]
            })
            .collect();
        let request = Request {
            prompt,
            max_tokens,
            sampling: sampling(kind),
            stop_tokens: Arc::from([STOP]),
            top_logprobs: 2,
            draft: Some(policy),
            known: Known::default(),
        };
        let history = run(&request, Told::default(), &draft, piece, steps);
        let whole = &history[history.len() - 1];
        prop_assert!(whole.finish.is_some());
        let told = &history[cut % history.len()];
        if told.finish.is_some() {
            return Ok(());
        }
        let known = told.certain(window);
        let mut begun = told.clone();
        begun.tokens.truncate(known);
        begun.judged.truncate(known);
        begun.scores.truncate(scores_known.min(known.saturating_sub(1)));
        let decided = told.decision.is_some();
        let again = Request {
            draft: (!decided).then_some(policy),
            known: Known { answer: begun.tokens.clone(), scores: begun.scores.clone() },
            ..request
        };
        if decided && known == max_tokens {
            return Ok(());
        }
        let rest = if decided { &[] } else { &draft[known..] };
        let resumed = run(&again, begun, rest, piece_after, steps_after).pop().expect("told");
        prop_assert_eq!(&resumed.tokens, &whole.tokens);
        prop_assert_eq!(resumed.finish, whole.finish);
        let fate = |told: &Told| told.decision.map(|d| (d.switched, d.kept));
        prop_assert_eq!(fate(&resumed), fate(whole));
        for (index, judged) in resumed.judged.iter().enumerate() {
            if judged.is_some() {
                prop_assert_eq!(judged, &whole.judged[index], "position {}", index);
            } else {
                prop_assert!(index < known, "position {} was judged", index);
            }
        }
    }
}
