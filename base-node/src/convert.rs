//! The edge between wire types and the node's own.

use std::sync::Arc;

use headstart_engine::{
    Decision, DraftPolicy, Finish, Judged, Known, Limits, Request, Sampling, Scored,
};
use headstart_node::convert::{prompt, sampling};
use headstart_proto::v1::{self, DraftEncoding, DraftEnd, OnDraftComplete, serve_frame};
use headstart_proto::{Epoch, Error, RequestId};

use crate::answer::{Begun, Body, Frame, Source};
use crate::kv::Kv;

/// Alternatives a position may report at most.
const TOP_LOGPROBS_MAX: u32 = 20;
/// The longest window, in tokens.
const WINDOW_MAX: u32 = 4096;

/// A valid [`v1::ServeRequest`].
#[derive(Clone, Debug)]
pub struct Job {
    /// The request.
    pub id: RequestId,
    /// The attempt.
    pub epoch: Epoch,
    /// At least one id of the vocabulary.
    pub prompt: Vec<u32>,
    /// What `prompt` encodes.
    pub prompt_text: String,
    /// At least 1.
    pub max_tokens: usize,
    /// Of the continuation.
    pub sampling: Sampling,
    /// Set: log-probabilities are wanted, with so many alternatives.
    pub top_logprobs: Option<usize>,
    /// Unset: nobody begins this answer.
    pub draft: Option<DraftJob>,
    /// What is out already.
    pub begun: Begun,
    /// Another base goes on once the draft is decided.
    pub move_when_decided: bool,
    /// Another base could go on.
    pub movable: bool,
}

/// A valid [`v1::DraftPolicy`].
#[derive(Clone, Debug)]
pub struct DraftJob {
    /// How the draft is read.
    pub policy: DraftPolicy,
    /// How it comes.
    pub encoding: DraftEncoding,
    /// The base's; draft ids are below it.
    pub vocab_size: usize,
}

impl Job {
    /// Checks a request against the model's limits.
    ///
    /// # Errors
    /// An error that names the field and what was expected.
    pub fn new(request: v1::ServeRequest, limits: Limits) -> Result<Self, Error> {
        let id = RequestId::new(&request.request_id)?;
        let epoch = Epoch::new(request.epoch)?;
        if request.max_tokens == 0 {
            return Err(Error::invalid("max_tokens", "expected at least 1"));
        }
        if let Some(top) = request.top_logprobs.filter(|&top| top > TOP_LOGPROBS_MAX) {
            let message = format!("expected at most {TOP_LOGPROBS_MAX}, found {top}");
            return Err(Error::invalid("top_logprobs", message));
        }
        let draft = request.draft.map(|draft| draft_job(&draft, limits)).transpose()?;
        let begun = match request.resume {
            Some(resume) => begun(resume, request.max_tokens, draft.as_ref(), limits)?,
            None => Begun::default(),
        };
        Ok(Self {
            id,
            epoch,
            prompt: prompt(request.prompt_ids, limits)?,
            prompt_text: request.prompt_text,
            max_tokens: request.max_tokens as usize,
            sampling: sampling(&request.sampling.unwrap_or_default(), 1.0)?,
            top_logprobs: request.top_logprobs.map(|top| top as usize),
            draft,
            begun,
            move_when_decided: request.move_when_decided,
            movable: request.movable,
        })
    }

    /// Whether a draft is read: somebody begins the answer, and how it ends is not decided.
    #[must_use]
    pub fn reads(&self) -> bool {
        self.draft.is_some() && self.begun.decision.is_none()
    }

    /// Why nothing is left to write, if so.
    #[must_use]
    pub fn is_whole(&self) -> Option<Finish> {
        let known = self.begun.answer.len();
        if self.reads() {
            return None;
        }
        if known >= self.max_tokens {
            return Some(Finish::Length);
        }
        let (Some(decision), Some(draft)) = (self.begun.decision, &self.draft) else {
            return None;
        };
        let goes_on = match decision.kept {
            _ if decision.switched || known > decision.kept => true,
            0 => draft.policy.continue_empty,
            _ => draft.policy.continue_complete,
        };
        (!goes_on).then_some(Finish::Stop)
    }

    /// What the engine is asked.
    #[must_use]
    pub fn engine_request(&self, stop_tokens: &Arc<[u32]>) -> Request {
        let Begun { answer, scores, .. } = self.begun.clone();
        Request {
            prompt: self.prompt.clone(),
            max_tokens: self.max_tokens,
            sampling: self.sampling.clone(),
            stop_tokens: Arc::clone(stop_tokens),
            top_logprobs: self.top_logprobs.unwrap_or(0),
            draft: self
                .draft
                .as_ref()
                .filter(|_| self.reads())
                .map(|draft| DraftPolicy { moves_on: self.move_when_decided, ..draft.policy }),
            known: Known { answer, scores },
        }
    }
}

fn begun(
    resume: v1::Resume,
    max_tokens: u32,
    draft: Option<&DraftJob>,
    limits: Limits,
) -> Result<Begun, Error> {
    let v1::Resume { answer_ids: answer, decision, mut scores, .. } = resume;
    let invalid = |field: &str, message| Err(Error::invalid(format!("resume.{field}"), message));
    if let Some(id) = answer.iter().find(|&&id| id as usize >= limits.vocab_size) {
        let message = format!("expected ids below {}, found {id}", limits.vocab_size);
        return invalid("answer_ids", message);
    }
    if answer.len() > max_tokens as usize {
        let message = format!("expected at most {max_tokens} ids, found {}", answer.len());
        return invalid("answer_ids", message);
    }
    if scores.iter().any(|score| score.is_nan()) {
        return invalid("scores", "expected log-probabilities, found NaN".into());
    }
    // The last known token is scored again: its score may switch.
    scores.truncate(answer.len().saturating_sub(1));
    let decision = match decision {
        Some(_) if draft.is_none() => {
            return invalid("decision", "expected none, since no drafter begins".into());
        }
        Some(decision) if decision.kept_tokens as usize > answer.len() => {
            let (kept, known) = (decision.kept_tokens, answer.len());
            return invalid("decision", format!("expected {kept} draft tokens, found {known}"));
        }
        decision => decision.map(|decision| Decision {
            switched: decision.by_threshold,
            kept: decision.kept_tokens as usize,
            drafted: decision.drafted_tokens as usize,
        }),
    };
    Ok(Begun { answer, decision, scores })
}

fn draft_job(draft: &v1::DraftPolicy, limits: Limits) -> Result<DraftJob, Error> {
    if !(1..=WINDOW_MAX).contains(&draft.window) {
        let message = format!("expected 1 to {WINDOW_MAX}, found {}", draft.window);
        return Err(Error::invalid("draft.window", message));
    }
    if !(draft.threshold > 0.0 && draft.threshold <= 1.0) {
        let message = format!("expected a number in (0, 1], found {}", draft.threshold);
        return Err(Error::invalid("draft.threshold", message));
    }
    let encoding = match draft.encoding() {
        DraftEncoding::Unspecified => {
            return Err(Error::invalid("draft.encoding", "expected IDS or TEXT"));
        }
        known => known,
    };
    // The threshold travels as f32; its decimal value is what was meant.
    let threshold = draft.threshold.to_string().parse().unwrap_or(f64::from(draft.threshold));
    let policy = DraftPolicy {
        window: draft.window as usize,
        threshold,
        continue_complete: draft.on_draft_complete() != OnDraftComplete::Finish,
        continue_empty: draft.continue_empty_draft,
        moves_on: false,
    };
    Ok(DraftJob { policy, encoding, vocab_size: limits.vocab_size })
}

/// What a drafter is told when its draft is decided.
#[must_use]
pub fn stop_reason(decision: Decision) -> DraftEnd {
    if decision.switched { DraftEnd::Switched } else { DraftEnd::Aborted }
}

/// The wire form of a frame.
#[must_use]
pub fn frame(job: &Job, kv: &Kv, frame: Frame) -> v1::ServeFrame {
    let event = match frame.body {
        Body::Tokens { source, ids, judged } => serve_frame::Event::Tokens(v1::Tokens {
            source: match source {
                Source::Drafter => v1::Source::Drafter.into(),
                Source::Base => v1::Source::Base.into(),
            },
            ids,
            logprobs: judged.iter().map(logprobs).collect(),
        }),
        Body::Decided(decision) => serve_frame::Event::Switched(v1::Switched {
            by_threshold: decision.switched,
            kept_tokens: decision.kept as u32,
            drafted_tokens: decision.drafted as u32,
        }),
        Body::Finished { reason, answer_tokens } => serve_frame::Event::Finished(v1::Finished {
            reason: match reason {
                Finish::Stop => v1::FinishReason::Stop.into(),
                Finish::Length => v1::FinishReason::Length.into(),
            },
            prompt_tokens: job.prompt.len() as u32,
            completion_tokens: answer_tokens as u32,
        }),
        Body::Moved { kv: has_kv, scores } => {
            let kv = has_kv.then(|| kv.source(&job.id, job.epoch));
            serve_frame::Event::Moved(v1::Moved { kv, scores })
        }
    };
    v1::ServeFrame {
        request_id: job.id.to_string(),
        epoch: job.epoch.get(),
        position: frame.position as u32,
        event: Some(event),
    }
}

fn logprobs(judged: &Judged) -> v1::PositionLogprobs {
    let wire = |scored: &Scored| v1::TokenLogprob { id: scored.token, logprob: scored.logprob };
    v1::PositionLogprobs {
        token: Some(wire(&judged.token)),
        top: judged.top.iter().map(wire).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { vocab_size: 10, context_length: 64, page_size: 4, pages: 16 };

    fn request() -> v1::ServeRequest {
        v1::ServeRequest {
            request_id: "r".into(),
            epoch: 1,
            prompt_ids: vec![1, 2],
            max_tokens: 4,
            draft: Some(v1::DraftPolicy {
                window: 6,
                threshold: 0.8,
                encoding: DraftEncoding::Ids.into(),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    #[test]
    fn bad_fields_are_named() {
        type Spoil = fn(&mut v1::ServeRequest);
        fn draft(request: &mut v1::ServeRequest) -> &mut v1::DraftPolicy {
            request.draft.as_mut().expect("set above")
        }
        fn sampling(request: &mut v1::ServeRequest) -> &mut v1::Sampling {
            request.sampling.get_or_insert_default()
        }
        fn resume(request: &mut v1::ServeRequest) -> &mut v1::Resume {
            request.resume.get_or_insert_default()
        }
        let cases: &[(&str, Spoil)] = &[
            ("request_id", |r| r.request_id = String::new()),
            ("epoch", |r| r.epoch = 0),
            ("prompt_ids", |r| r.prompt_ids.clear()),
            ("prompt_ids", |r| r.prompt_ids = vec![10]),
            ("max_tokens", |r| r.max_tokens = 0),
            ("top_logprobs", |r| r.top_logprobs = Some(21)),
            ("draft.window", |r| draft(r).window = 0),
            ("draft.window", |r| draft(r).window = u32::MAX),
            ("draft.threshold", |r| draft(r).threshold = 0.0),
            ("draft.threshold", |r| draft(r).threshold = 1.5),
            ("draft.threshold", |r| draft(r).threshold = f32::NAN),
            ("draft.encoding", |r| draft(r).encoding = 0),
            ("resume.answer_ids", |r| resume(r).answer_ids = vec![10]),
            ("resume.answer_ids", |r| resume(r).answer_ids = vec![1; 5]),
            ("resume.scores", |r| resume(r).scores = vec![f32::NAN]),
            ("resume.decision", |r| {
                resume(r).decision = Some(v1::Switched { kept_tokens: 1, ..Default::default() });
            }),
            ("resume.decision", |r| {
                resume(r).decision = Some(v1::Switched::default());
                r.draft = None;
            }),
            ("sampling.temperature", |r| sampling(r).temperature = Some(f32::NAN)),
            ("sampling.top_p", |r| sampling(r).top_p = Some(0.0)),
            ("sampling.min_p", |r| sampling(r).min_p = Some(-0.1)),
            ("sampling.presence_penalty", |r| sampling(r).presence_penalty = Some(2.5)),
        ];
        assert!(Job::new(request(), LIMITS).is_ok());
        for (field, spoil) in cases {
            let mut request = request();
            spoil(&mut request);
            let error = Job::new(request, LIMITS).expect_err(field);
            assert_eq!(error.field.as_deref(), Some(*field));
        }
    }

    #[test]
    fn what_is_whole_is_not_written_on() {
        let cases = [
            // known, by the threshold, kept, continue complete, continue empty
            (0, None, true, true, None),
            (4, None, true, true, None),
            (2, Some((true, 2)), true, true, None),
            (4, Some((true, 2)), true, true, Some(Finish::Length)),
            (2, Some((false, 2)), true, true, None),
            (2, Some((false, 2)), false, true, Some(Finish::Stop)),
            (3, Some((false, 2)), false, true, None),
            (0, Some((false, 0)), true, true, None),
            (0, Some((false, 0)), true, false, Some(Finish::Stop)),
        ];
        for (known, decision, complete, empty, expected) in cases {
            let mut request = request();
            let draft = request.draft.as_mut().expect("set above");
            draft.continue_empty_draft = empty;
            if !complete {
                draft.on_draft_complete = OnDraftComplete::Finish.into();
            }
            let decision = decision.map(|(by_threshold, kept_tokens)| v1::Switched {
                by_threshold,
                kept_tokens,
                drafted_tokens: kept_tokens,
            });
            let answer_ids = vec![1; known];
            request.resume = Some(v1::Resume { answer_ids, decision, ..Default::default() });
            let job = Job::new(request, LIMITS).expect("valid");
            assert_eq!(job.is_whole(), expected, "{known} known, {decision:?}");
        }
    }

    #[test]
    fn a_threshold_means_its_decimal_value() {
        let job = Job::new(request(), LIMITS).expect("valid");
        assert_eq!(job.draft.map(|draft| draft.policy.threshold), Some(0.8));
    }
}
