//! What is certain of one answer, so that it can go on elsewhere when a stream breaks: the tokens
//! that came through the gate, the draft's fate, and the drafter's own ids as far as it told them.

use headstart_proto::v1;

use crate::frames::{Decision, ServeEvent};

/// See the [module](self).
#[derive(Clone, Debug, Default)]
pub(crate) struct Progress {
    ids: Vec<u32>,
    decision: Option<Decision>,
    /// The draft's first tokens, in the drafter's tokens.
    draft: Vec<u32>,
    /// As the last base that gave the answer up had scored its draft.
    scores: Vec<f32>,
    /// Where that base's KV may be had.
    kv: Option<v1::KvSource>,
}

impl Progress {
    /// Tokens that are out.
    pub(crate) fn tokens(&self) -> u32 {
        u32::try_from(self.ids.len()).unwrap_or(u32::MAX)
    }

    /// The draft's fate, once it is known.
    pub(crate) fn decision(&self) -> Option<Decision> {
        self.decision
    }

    /// The draft's fate, once it is known and all that was kept is out: nobody needs the draft then.
    pub(crate) fn settled(&self) -> Option<Decision> {
        self.decision.filter(|decision| decision.kept_tokens <= self.tokens())
    }

    /// Takes what passed the gate.
    pub(crate) fn take(&mut self, event: &ServeEvent) {
        match event {
            ServeEvent::Tokens(run) => {
                self.ids.extend_from_slice(&run.ids);
                self.kv = None;
            }
            ServeEvent::Switched(decision) => self.decision = Some(*decision),
            ServeEvent::Moved { kv, scores } => {
                self.kv.clone_from(kv);
                self.scores.clone_from(scores);
            }
            ServeEvent::Finished(_) => {}
        }
    }

    /// Takes more of the draft; `position` is behind `ids`. What is known, or leaves a gap, is
    /// dropped, and so is what is beyond `draft_tokens_max`.
    pub(crate) fn wrote(&mut self, position: u32, ids: &[u32], draft_tokens_max: u32) {
        let Some(start) = (position as usize).checked_sub(ids.len()) else { return };
        if position <= draft_tokens_max
            && let Some(known) = self.draft.len().checked_sub(start)
        {
            self.draft.extend_from_slice(ids.get(known..).unwrap_or_default());
        }
    }

    /// What the next base is told; `None` when there is nothing to go on from.
    pub(crate) fn resume(&self) -> Option<v1::Resume> {
        let decision = self.settled().map(|decision| v1::Switched {
            by_threshold: decision.by_threshold,
            kept_tokens: decision.kept_tokens,
            drafted_tokens: decision.drafted_tokens,
        });
        if self.ids.is_empty() && decision.is_none() && self.kv.is_none() {
            return None;
        }
        let scores = if decision.is_none() { self.scores.clone() } else { Vec::new() };
        Some(v1::Resume { answer_ids: self.ids.clone(), decision, scores, kv: self.kv.clone() })
    }

    /// What the next drafter is told of the draft. Under `ids` the answer's tokens are the draft's.
    pub(crate) fn prefix(&self, encoding: v1::DraftEncoding) -> Vec<u32> {
        if encoding == v1::DraftEncoding::Ids && self.ids.len() > self.draft.len() {
            return self.ids.clone();
        }
        self.draft.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frames::{Source, TokenRun};

    fn tokens(position: u32, ids: &[u32]) -> ServeEvent {
        let (source, logprobs) = (Source::Drafter, vec![]);
        ServeEvent::Tokens(TokenRun { source, position, ids: ids.to_vec(), logprobs })
    }

    #[test]
    fn what_is_known_is_told_and_nothing_else() {
        let mut progress = Progress::default();
        assert_eq!(progress.resume(), None);
        progress.take(&tokens(0, &[5, 6]));
        progress.take(&ServeEvent::Moved { kv: None, scores: vec![-0.5] });
        let resume = progress.resume().unwrap();
        assert_eq!((resume.answer_ids, resume.scores), (vec![5, 6], vec![-0.5]));
        let decision = Decision { by_threshold: true, kept_tokens: 3, drafted_tokens: 4 };
        progress.take(&ServeEvent::Switched(decision));
        assert_eq!(progress.resume().unwrap().decision, None, "a kept token is not out yet");
        progress.take(&tokens(2, &[7]));
        let resume = progress.resume().unwrap();
        assert_eq!(resume.decision.map(|decision| decision.kept_tokens), Some(3));
        assert!(resume.scores.is_empty());
    }

    #[test]
    fn a_draft_is_known_without_gaps() {
        let mut progress = Progress::default();
        for (position, ids, known) in [
            (2, vec![1, 2], 2),
            (2, vec![1, 2], 2),
            (3, vec![2, 3], 3),
            (6, vec![5, 6], 3),
            (1, vec![8, 9], 3),
            (5, vec![4, 5], 5),
            (9, vec![6, 7, 8, 9], 5),
        ] {
            progress.wrote(position, &ids, 8);
            assert_eq!(progress.prefix(v1::DraftEncoding::Text).len(), known, "at {position}");
        }
        assert_eq!(progress.prefix(v1::DraftEncoding::Ids), [1, 2, 3, 4, 5]);
        progress.take(&tokens(0, &[1, 2, 3, 4, 5, 6]));
        assert_eq!(progress.prefix(v1::DraftEncoding::Ids), [1, 2, 3, 4, 5, 6]);
    }
}
