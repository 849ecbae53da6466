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
}

/// See the [module](self).
#[derive(Debug)]
pub struct Answer {
    window: usize,
    max_tokens: usize,
    wants_logprobs: bool,
    draft: Vec<TokenId>,
    judged: Vec<Judged>,
    scored: usize,
    kept: Option<usize>,
    /// Tokens in the frames made so far.
    released: usize,
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
            scored: 0,
            kept: None,
            released: 0,
            frames: VecDeque::new(),
        }
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
                self.scored += scores.len();
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
        let mut certain = certain_tokens(self.window, self.draft.len(), self.scored, self.kept);
        if self.wants_logprobs {
            certain = certain.min(self.judged.len());
        }
        if certain > self.released {
            let ids = self.draft[self.released..certain].to_vec();
            let judged = self.judged.get(self.released..certain).unwrap_or_default().to_vec();
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
    fn waiting_tokens_of_one_source_gather() {
        let mut answer = Answer::new(6, 4, false);
        answer.push_draft(&[1]);
        answer.push_draft(&[2]);
        answer.push_draft(&[3, 4, 5]);
        assert_eq!(show(&mut answer), "0d[1, 2, 3, 4]");
    }
}
