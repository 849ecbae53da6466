//! What of an answer may leave the node, and in which frames: plain state, no IO.
//!
//! Draft tokens come in, the engine's events come in, and frames come out in the order of the
//! answer. While nobody takes frames, tokens of the same source gather in one.

use std::collections::VecDeque;

use headstart_engine::core::switch::certain_tokens;
use headstart_engine::{Decision, Event, Finish, Judged, TokenId};

/// Who wrote a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The drafter.
    Drafter,
    /// The base.
    Base,
}

/// One frame of the answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Frame {
    /// Index in the answer of its first token, or of the next one.
    pub position: usize,
    /// What it says.
    pub body: Body,
}

/// What a [`Frame`] says.
#[derive(Clone, Debug, PartialEq)]
pub enum Body {
    /// Consecutive tokens from one source.
    Tokens {
        /// Who wrote them.
        source: Source,
        /// At least one.
        ids: Vec<TokenId>,
        /// One for each id, or none if they are not wanted.
        judged: Vec<Judged>,
    },
    /// The draft is decided.
    Decided(Decision),
    /// The answer is over.
    Finished {
        /// Why.
        reason: Finish,
        /// Tokens of the answer.
        answer_tokens: usize,
    },
    /// Another base is to go on.
    Moved {
        /// Its KV may be had from this one.
        kv: bool,
        /// `ln P` of the first draft tokens; empty once the draft is decided.
        scores: Vec<f32>,
    },
}

impl Body {
    /// Whether nothing comes after it.
    #[must_use]
    pub fn is_last(&self) -> bool {
        matches!(self, Self::Finished { .. } | Self::Moved { .. })
    }
}

/// What an answer that goes on here has already.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Begun {
    /// Its tokens that are out.
    pub answer: Vec<TokenId>,
    /// The draft's fate, once decided; until then `answer` are the draft's first tokens.
    pub decision: Option<Decision>,
    /// `ln P` of the first draft tokens, fewer than `answer` has.
    pub scores: Vec<f32>,
}

/// See the [module](self).
#[derive(Debug)]
pub struct Answer {
    window: usize,
    max_tokens: usize,
    wants_logprobs: bool,
    draft: Vec<TokenId>,
    /// Of the draft tokens that were scored here.
    judged: Vec<Judged>,
    /// The first of them.
    judged_from: usize,
    /// Of all draft tokens that were scored, wherever.
    scores: Vec<f32>,
    kept: Option<usize>,
    /// Tokens in the frames made so far, and in those of earlier attempts.
    released: usize,
    /// The last frame was made.
    over: bool,
    frames: VecDeque<Frame>,
}

impl Answer {
    /// An answer of at most `max_tokens`, whose first `window` draft tokens are certain unseen.
    /// With log-probabilities wanted, a draft token waits for its score all the same.
    #[must_use]
    pub fn new(window: usize, max_tokens: usize, wants_logprobs: bool) -> Self {
        Self {
            window,
            max_tokens,
            wants_logprobs,
            draft: Vec::new(),
            judged: Vec::new(),
            judged_from: 0,
            scores: Vec::new(),
            kept: None,
            released: 0,
            over: false,
            frames: VecDeque::new(),
        }
    }

    /// Goes on behind what is out already.
    #[must_use]
    pub fn with_begun(mut self, begun: &Begun) -> Self {
        self.released = begun.answer.len();
        self.kept = begun.decision.map(|decision| decision.kept);
        if begun.decision.is_none() {
            self.draft.clone_from(&begun.answer);
            self.scores.clone_from(&begun.scores);
            self.judged_from = begun.scores.len();
        }
        self
    }

    /// Takes draft tokens; what exceeds the answer's limit is no part of it.
    pub fn push_draft(&mut self, ids: &[TokenId]) {
        let room = self.max_tokens.saturating_sub(self.draft.len());
        self.draft.extend_from_slice(&ids[..ids.len().min(room)]);
        self.release_draft();
    }

    /// Takes an event of the engine. [`Event::Failed`] says nothing about the answer.
    pub fn take(&mut self, event: Event) {
        match event {
            Event::Read { scores, decision, .. } => {
                self.scores.extend(scores.iter().map(|judged| judged.token.logprob));
                if self.wants_logprobs {
                    self.judged.extend(scores);
                }
                self.kept = decision.map(|decision| decision.kept);
                self.release_draft();
                if let Some(decision) = decision {
                    self.push(Body::Decided(decision));
                }
            }
            Event::Wrote { judged, .. } => {
                self.push_tokens(Source::Base, &[judged.token.token], vec![judged]);
            }
            Event::Finished { reason, answer_tokens } => {
                self.push(Body::Finished { reason, answer_tokens });
            }
            Event::Failed { .. } => {}
        }
    }

    /// Ends the frames here: another base goes on behind them.
    /// `kv`: this one has the answer's KV to give.
    pub fn move_on(&mut self, kv: bool) {
        let scores = if self.kept.is_none() { self.scores.clone() } else { Vec::new() };
        self.push(Body::Moved { kv, scores });
    }

    /// Whether the last frame was made.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.over
    }

    /// Whether a frame waits.
    #[must_use]
    pub fn has_frame(&self) -> bool {
        !self.frames.is_empty()
    }

    /// The next frame.
    pub fn next_frame(&mut self) -> Option<Frame> {
        self.frames.pop_front()
    }

    fn release_draft(&mut self) {
        let scored = self.scores.len();
        let mut certain = certain_tokens(self.window, self.draft.len(), scored, self.kept);
        if cfg!(feature = "sabotage-window") {
            certain = self.draft.len();
        }
        if self.wants_logprobs {
            certain = certain.min(self.judged_from + self.judged.len());
        }
        if certain > self.released {
            let ids = self.draft[self.released..certain].to_vec();
            // What is not out yet was scored here.
            let wanted = self.released.checked_sub(self.judged_from).map(|at| at..at + ids.len());
            let judged = wanted.and_then(|wanted| self.judged.get(wanted)).unwrap_or_default();
            let judged = judged.to_vec();
            self.push_tokens(Source::Drafter, &ids, judged);
        }
    }

    fn push_tokens(&mut self, source: Source, new: &[TokenId], new_judged: Vec<Judged>) {
        let new_judged = if self.wants_logprobs { new_judged } else { Vec::new() };
        let position = self.released;
        self.released += new.len();
        if let Some(Frame { body: Body::Tokens { source: last, ids, judged }, .. }) =
            self.frames.back_mut()
            && *last == source
        {
            ids.extend_from_slice(new);
            judged.extend(new_judged);
            return;
        }
        let body = Body::Tokens { source, ids: new.to_vec(), judged: new_judged };
        self.frames.push_back(Frame { position, body });
    }

    fn push(&mut self, body: Body) {
        self.over |= body.is_last();
        self.frames.push_back(Frame { position: self.released, body });
    }
}

#[cfg(test)]
mod tests {
    use headstart_engine::Scored;

    use super::*;

    fn judged(token: TokenId) -> Judged {
        Judged { token: Scored { token, logprob: -0.5 }, top: Vec::new() }
    }

    fn read(first: usize, tokens: &[TokenId], decision: Option<Decision>) -> Event {
        Event::Read { first, scores: tokens.iter().map(|&t| judged(t)).collect(), decision }
    }

    fn wrote(index: usize, token: TokenId) -> Event {
        Event::Wrote { index, judged: judged(token) }
    }

    fn show(answer: &mut Answer) -> String {
        let mut words = Vec::new();
        while let Some(Frame { position, body }) = answer.next_frame() {
            words.push(match body {
                Body::Tokens { source: Source::Drafter, ids, .. } => format!("{position}d{ids:?}"),
                Body::Tokens { source: Source::Base, ids, .. } => format!("{position}b{ids:?}"),
                Body::Decided(Decision { switched, kept, drafted }) => {
                    format!("{position}s {switched} {kept}/{drafted}")
                }
                Body::Finished { answer_tokens, .. } => format!("{position}f {answer_tokens}"),
                Body::Moved { scores, .. } => format!("{position}m {}", scores.len()),
            });
        }
        words.join(" ")
    }

    #[test]
    fn the_first_window_leaves_unscored_and_the_rest_as_it_is_scored() {
        let mut answer = Answer::new(3, 100, false);
        answer.push_draft(&[10, 11]);
        assert_eq!(show(&mut answer), "0d[10, 11]");
        answer.push_draft(&[12, 13, 14]);
        assert_eq!(show(&mut answer), "2d[12]");
        answer.take(read(0, &[10, 11], None));
        assert_eq!(show(&mut answer), "");
        answer.take(read(2, &[12], None));
        assert_eq!(show(&mut answer), "3d[13]");
        // The score that would have made token 14 certain brings the switch.
        let decision = Decision { switched: true, kept: 4, drafted: 5 };
        answer.take(read(3, &[13], Some(decision)));
        answer.take(wrote(4, 20));
        answer.take(wrote(5, 21));
        answer.take(Event::Finished { reason: Finish::Stop, answer_tokens: 6 });
        assert_eq!(show(&mut answer), "4s true 4/5 4b[20, 21] 6f 6");
    }

    #[test]
    fn log_probabilities_hold_a_token_until_it_is_scored() {
        let mut answer = Answer::new(3, 100, true);
        answer.push_draft(&[10, 11]);
        assert_eq!(show(&mut answer), "");
        answer.take(read(0, &[10], None));
        assert_eq!(show(&mut answer), "0d[10]");
    }

    #[test]
    fn an_answer_goes_on_behind_what_is_out() {
        let begun = Begun { answer: vec![10, 11, 12, 13], decision: None, scores: vec![-0.5; 3] };
        let mut answer = Answer::new(3, 100, true).with_begun(&begun);
        answer.push_draft(&[14, 15]);
        assert_eq!(show(&mut answer), "");
        answer.take(read(3, &[13, 14], None));
        assert_eq!(show(&mut answer), "4d[14]");
        answer.move_on(true);
        assert_eq!(show(&mut answer), "5m 5");
        assert!(answer.is_over());

        let kept = Decision { switched: true, kept: 4, drafted: 4 };
        let begun = Begun { decision: Some(kept), ..begun };
        let mut answer = Answer::new(3, 100, true).with_begun(&begun);
        answer.take(wrote(4, 20));
        answer.move_on(true);
        assert_eq!(show(&mut answer), "4b[20] 5m 0");
    }

    #[test]
    fn waiting_tokens_of_one_source_gather() {
        let mut answer = Answer::new(6, 4, false);
        answer.push_draft(&[1]);
        answer.push_draft(&[2]);
        answer.push_draft(&[3, 4, 5]);
        assert_eq!(show(&mut answer), "0d[1, 2, 3, 4]");
    }
}
