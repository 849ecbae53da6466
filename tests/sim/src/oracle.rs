//! The right answer: the paper's offline algorithm in three passes (draft everything, check
//! everything, continue everything), straight on the fake models, with none of the code that it
//! checks but the tokenizer's.

use headstart_engine::Sampling;
use headstart_engine::executor::TokenId;
use headstart_engine::executor::fake::FakeExecutor;
use headstart_text::{Detokenizer, Message, ModelText, Role, StopMatcher, encode_draft};

use crate::plan::Ask;

/// One answer, whole.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// Its tokens.
    pub ids: Vec<TokenId>,
    /// How many of them the drafter wrote.
    pub kept: usize,
    /// What it says.
    pub text: String,
    /// It ended by an end token, a stop string or a finished draft; otherwise by its limit.
    pub stopped: bool,
    /// For each token, if wanted: its log-probability and the likeliest tokens with theirs.
    pub logprobs: Vec<(f32, Vec<(TokenId, f32)>)>,
}

/// Both models and their text side.
pub struct Oracle {
    /// What the drafters run.
    pub drafter: FakeExecutor,
    /// What the bases run.
    pub base: FakeExecutor,
    /// Both models' text side.
    pub text: ModelText,
    /// Drafts travel as text.
    pub as_text: bool,
}

impl Oracle {
    /// The right answer number `choice` to `ask`.
    ///
    /// # Panics
    /// If the fixture's tokenizer or templates fail.
    #[must_use]
    pub fn answer(&self, ask: &Ask, choice: u32) -> Answer {
        let messages = [Message::new(Role::User, ask.message.clone())];
        let prompt = self.text.base_prompt(&messages).expect("the fixture's base prompt");
        let drafted = self.draft(ask, &messages);
        let mut draft = if self.as_text {
            let text: String = {
                let mut detokenizer = Detokenizer::new(self.text.tokenizer());
                let text: String = drafted.iter().map(|&id| detokenizer.push(id)).collect();
                text + &detokenizer.finish()
            };
            let encoded = encode_draft(self.text.tokenizer(), &prompt.text, &text);
            encoded.expect("text that encodes").0
        } else {
            drafted
        };
        draft.truncate(ask.max_tokens as usize);

        let mut context = prompt.ids.clone();
        let start = context.len();
        let mut scores = Vec::new();
        for &id in &draft {
            scores.push(self.base.logprob(&context, id));
            context.push(id);
        }
        let kept = kept(&scores, ask.window as usize, ask.threshold);
        context.truncate(start + kept);

        let mut stopped = draft.is_empty();
        let sampling = Sampling { seed: ask.seed.wrapping_add(choice.into()), ..ask.sampling() };
        while !stopped && context.len() - start < ask.max_tokens as usize {
            let id = self.base.sampled(&context, start, &sampling);
            stopped = self.text.stop_tokens().contains(&id);
            if !stopped {
                context.push(id);
            }
        }
        let (text, used, cut) = self.text_of(&context[start..], ask);
        context.truncate(start + used);
        let logprobs = match ask.top_logprobs {
            Some(top) => (start..context.len())
                .map(|at| self.logprobs(&context[..at], context[at], top as usize))
                .collect(),
            None => Vec::new(),
        };
        let ids = context.split_off(start);
        Answer { kept: kept.min(ids.len()), ids, text, stopped: stopped || cut, logprobs }
    }

    /// First pass: the whole draft, greedy.
    fn draft(&self, ask: &Ask, messages: &[Message]) -> Vec<TokenId> {
        let mut context = self.text.drafter_prompt(messages).expect("the fixture's template").ids;
        let start = context.len();
        while context.len() - start < ask.draft_tokens_max as usize {
            let id = self.drafter.next_token(&context);
            if self.text.stop_tokens().contains(&id) {
                break;
            }
            context.push(id);
        }
        context.split_off(start)
    }

    fn logprobs(&self, context: &[TokenId], id: TokenId, top: usize) -> (f32, Vec<(TokenId, f32)>) {
        let first = self.base.next_token(context);
        let others = (0..).filter(|&other| other != first);
        let top = std::iter::once(first).chain(others).take(top);
        let top = top.map(|other| (other, self.base.logprob(context, other))).collect();
        (self.base.logprob(context, id), top)
    }

    /// What the tokens say up to the first stop string, how many tokens that took, and whether there
    /// was one.
    fn text_of(&self, ids: &[TokenId], ask: &Ask) -> (String, usize, bool) {
        let plain = self.text.base_stop_strings().iter().map(|&stop| stop.to_owned());
        let mut stops = StopMatcher::new(ask.stop.iter().cloned().chain(plain).collect());
        let mut detokenizer = Detokenizer::new(self.text.tokenizer());
        let mut text = String::new();
        for (index, &id) in ids.iter().enumerate() {
            text.push_str(&stops.push(&detokenizer.push(id)).text);
            if stops.stopped() {
                return (text, index + 1, true);
            }
        }
        text.push_str(&stops.push(&detokenizer.finish()).text);
        text.push_str(&stops.finish());
        (text, ids.len(), stops.stopped())
    }
}

/// Second pass: how much of the draft is kept, by the letter of the rule.
fn kept(scores: &[f32], window: usize, threshold: f32) -> usize {
    let threshold: f64 = threshold.to_string().parse().expect("a decimal number");
    let reached = |end: &usize| {
        let mean = scores[end - window..*end].iter().map(|&score| f64::from(score)).sum::<f64>();
        mean / window as f64 >= threshold.ln()
    };
    (window..=scores.len()).find(reached).unwrap_or(scores.len())
}
