//! The frames of a base's `Serve` stream, checked and turned into events. One [`FrameGate`] stands
//! at the entry of each answer: what passes has every position exactly once, in order, and no
//! word of the base before the draft is decided.

use headstart_proto::{Epoch, Error, ErrorCode, RequestId, v1};

/// Who wrote a piece of the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Source {
    /// The drafter began the answer.
    Drafter,
    /// The base goes on.
    Base,
}

impl Source {
    /// As clients see it.
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Drafter => "drafter",
            Self::Base => "base",
        }
    }
}

/// One position's log-probabilities, natural log, under the base's raw distribution.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct TokenLogprobs {
    /// The token that stands there.
    pub(crate) token: (u32, f32),
    /// The most likely tokens, best first.
    pub(crate) top: Vec<(u32, f32)>,
}

/// Consecutive tokens from one source.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct TokenRun {
    /// Who wrote them.
    pub(crate) source: Source,
    /// Index in the answer of the first one.
    pub(crate) position: u32,
    /// The tokens, in the base's vocabulary; never empty.
    pub(crate) ids: Vec<u32>,
    /// Empty, or one for each id.
    pub(crate) logprobs: Vec<TokenLogprobs>,
}

/// What became of the draft. Counts are in the base's tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Decision {
    /// A window reached the threshold; false: the draft ended first.
    pub(crate) by_threshold: bool,
    /// Draft tokens that belong to the answer.
    pub(crate) kept_tokens: u32,
    /// Draft tokens the base received.
    pub(crate) drafted_tokens: u32,
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FinishReason {
    /// An end token, a stop string, or a finished draft.
    Stop,
    /// `max_tokens` or the context.
    Length,
}

impl FinishReason {
    /// As clients see it.
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
        }
    }
}

/// What a frame that passed the gate says.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum ServeEvent {
    /// More of the answer.
    Tokens(TokenRun),
    /// The draft is decided.
    Switched(Decision),
    /// The answer is complete.
    Finished(FinishReason),
    /// The base gives the answer up: another one is to go on. The last event, too.
    Moved {
        /// Where its KV may be had.
        kv: Option<v1::KvSource>,
        /// How it scored the first draft tokens, natural log.
        scores: Vec<f32>,
    },
}

/// What is expected of the frames of one answer.
#[derive(Debug)]
pub(crate) struct FrameGate {
    request_id: RequestId,
    epoch: Epoch,
    /// The next position of the answer.
    next: u32,
    max_tokens: u32,
    /// A drafter begins this answer.
    drafted: bool,
    /// An empty draft may be continued by the base.
    empty_draft_allowed: bool,
    logprobs: bool,
    decision: Option<Decision>,
}

impl FrameGate {
    /// A gate before the first frame of an answer of at most `max_tokens` tokens.
    pub(crate) fn new(
        request_id: RequestId,
        epoch: Epoch,
        max_tokens: u32,
        draft: Option<&v1::DraftPolicy>,
        logprobs: bool,
    ) -> Self {
        Self {
            request_id,
            epoch,
            next: 0,
            max_tokens,
            drafted: draft.is_some(),
            empty_draft_allowed: draft.is_none_or(|policy| policy.continue_empty_draft),
            logprobs,
            decision: None,
        }
    }

    /// Goes on behind the first `next` tokens of the answer, which are out already; `decision` is
    /// the draft's fate, if it is known.
    pub(crate) fn behind(mut self, next: u32, decision: Option<Decision>) -> Self {
        self.next = next;
        self.decision = decision;
        self
    }

    /// The draft's fate, once it is known.
    pub(crate) fn decision(&self) -> Option<Decision> {
        self.decision
    }

    /// Takes a frame: an event, or `None` for one that is to be dropped (an older attempt's, or
    /// positions that were seen).
    ///
    /// # Errors
    /// A gap, another request's frame, a frame that the protocol does not allow here.
    pub(crate) fn admit(&mut self, frame: v1::ServeFrame) -> Result<Option<ServeEvent>, Error> {
        if frame.request_id != self.request_id.as_str() {
            return Err(broken("a frame of another request"));
        }
        if frame.epoch < self.epoch.get() {
            return Ok(None);
        }
        if frame.epoch > self.epoch.get() {
            return Err(broken(&format!("a frame of the later attempt {}", frame.epoch)));
        }
        let Some(event) = frame.event else {
            return Err(broken("a frame without an event"));
        };
        if frame.position > self.next {
            let (expected, found) = (self.next, frame.position);
            return Err(broken(&format!("a gap: expected position {expected}, found {found}")));
        }
        let seen = self.next - frame.position;
        match event {
            v1::serve_frame::Event::Tokens(tokens) => self.tokens(seen as usize, tokens),
            _ if seen > 0 => Ok(None),
            v1::serve_frame::Event::Switched(switched) => self.switched(&switched),
            v1::serve_frame::Event::Finished(finished) => finish_reason(&finished),
            v1::serve_frame::Event::Moved(v1::Moved { kv, mut scores }) => {
                // What is not sound is scored again.
                let sound = scores.iter().take_while(|score| !score.is_nan()).count();
                scores.truncate(sound.min(self.next as usize));
                Ok(Some(ServeEvent::Moved { kv, scores }))
            }
        }
    }

    fn tokens(&mut self, seen: usize, tokens: v1::Tokens) -> Result<Option<ServeEvent>, Error> {
        let v1::Tokens { source, mut ids, mut logprobs } = tokens;
        if ids.len() <= seen {
            return Ok(None);
        }
        if self.logprobs && logprobs.len() != ids.len() {
            return Err(broken("tokens without their log-probabilities"));
        }
        ids.drain(..seen);
        if self.logprobs {
            logprobs.drain(..seen);
        } else {
            logprobs.clear();
        }
        let position = self.next;
        let end = u32::try_from(ids.len()).ok().and_then(|count| position.checked_add(count));
        let Some(end) = end.filter(|&end| end <= self.max_tokens) else {
            return Err(broken(&format!("more than max_tokens ({}) tokens", self.max_tokens)));
        };
        let source = match v1::Source::try_from(source) {
            Ok(v1::Source::Drafter) => Source::Drafter,
            Ok(v1::Source::Base) => Source::Base,
            _ => return Err(broken("tokens without a source")),
        };
        self.check_source(source, position, end)?;
        let logprobs = logprobs.into_iter().map(token_logprobs).collect::<Result<_, _>>()?;
        self.next = end;
        Ok(Some(ServeEvent::Tokens(TokenRun { source, position, ids, logprobs })))
    }

    /// Whether `source` may write the positions from `start` to before `end`.
    fn check_source(&self, source: Source, start: u32, end: u32) -> Result<(), Error> {
        match (source, self.drafted, self.decision) {
            (Source::Base, false, _) | (Source::Drafter, true, None) => Ok(()),
            (Source::Drafter, true, Some(decision)) if end <= decision.kept_tokens => Ok(()),
            (Source::Base, true, Some(decision)) if start >= decision.kept_tokens => {
                if decision.kept_tokens == 0 && !self.empty_draft_allowed {
                    return Err(broken("an answer of the base that no drafter began"));
                }
                Ok(())
            }
            (Source::Base, true, None) => {
                Err(broken("a token of the base before the draft was decided"))
            }
            _ => Err(broken("a token from the wrong source")),
        }
    }

    fn switched(&mut self, switched: &v1::Switched) -> Result<Option<ServeEvent>, Error> {
        if self.decision.is_some() {
            return Ok(None);
        }
        let (kept_tokens, drafted_tokens) = (switched.kept_tokens, switched.drafted_tokens);
        if !self.drafted {
            return Err(broken("a switch in an answer without a draft"));
        }
        if kept_tokens < self.next || kept_tokens > drafted_tokens {
            let next = self.next;
            return Err(broken(&format!(
                "a switch that keeps {kept_tokens} of {drafted_tokens} draft tokens after {next} were sent"
            )));
        }
        let by_threshold = switched.by_threshold;
        let decision = Decision { by_threshold, kept_tokens, drafted_tokens };
        self.decision = Some(decision);
        Ok(Some(ServeEvent::Switched(decision)))
    }
}

fn finish_reason(finished: &v1::Finished) -> Result<Option<ServeEvent>, Error> {
    let reason = match v1::FinishReason::try_from(finished.reason) {
        Ok(v1::FinishReason::Stop) => FinishReason::Stop,
        Ok(v1::FinishReason::Length) => FinishReason::Length,
        _ => return Err(broken("an end without a reason")),
    };
    Ok(Some(ServeEvent::Finished(reason)))
}

fn token_logprobs(position: v1::PositionLogprobs) -> Result<TokenLogprobs, Error> {
    let token = position.token.ok_or_else(|| broken("a log-probability without its token"))?;
    let top = position.top.into_iter().map(|top| (top.id, top.logprob)).collect();
    Ok(TokenLogprobs { token: (token.id, token.logprob), top })
}

/// The base broke the protocol.
fn broken(what: &str) -> Error {
    Error::new(ErrorCode::Protocol, format!("the base sent {what}"))
}

#[cfg(test)]
#[path = "frames_tests.rs"]
mod tests;
