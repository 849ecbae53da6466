//! One answer: the task that owns a request from its first drafted token to its last.
//!
//! It reads the draft, feeds the engine, and sends frames. Everything the request holds (its place
//! at the rendezvous, its engine slot, its KV pages) is given back when the task ends, however it
//! ends; the drafter is told to stop in the moment the draft is decided.

use std::time::{Duration, Instant};

use headstart_engine::{Decision, Event, Finish, Generation, SubmitError};
use headstart_proto::v1::{self, DraftEncoding, DraftEnd};
use headstart_proto::{Error, ErrorCode};
use headstart_text::{DraftEncoder, Tokenizer};
use tokio::sync::mpsc;
use tonic::Status;

use crate::answer::{Answer, Body};
use crate::convert::{self, DraftJob, Job};
use crate::metrics;
use crate::rendezvous::{DraftInput, Seat};

/// What a session runs on.
pub struct Session {
    job: Job,
    generation: Generation,
    answer: Answer,
    draft: Option<Reading>,
    frames: mpsc::Sender<Result<v1::ServeFrame, Status>>,
    handoff_timeout: Duration,
    decided: Option<Instant>,
}

/// A draft under way.
struct Reading {
    seat: Seat,
    job: DraftJob,
    tokenizer: Tokenizer,
    /// Set for a draft that comes as text.
    encoder: Option<DraftEncoder>,
    state: ReadingState,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum ReadingState {
    /// No drafter has come yet.
    Waiting,
    Open,
    /// The draft is over, or decided.
    Closed,
}

impl Session {
    /// A session for `job`, which the engine has taken as `generation`.
    ///
    /// # Errors
    /// A draft that cannot be read with `tokenizer`.
    pub fn new(
        job: Job,
        generation: Generation,
        seat: Option<Seat>,
        tokenizer: &Tokenizer,
        frames: mpsc::Sender<Result<v1::ServeFrame, Status>>,
        handoff_timeout: Duration,
    ) -> Result<Self, Error> {
        let window = job.draft.as_ref().map_or(1, |draft| draft.policy.window);
        let answer = Answer::new(window, job.max_tokens, job.top_logprobs.is_some());
        let draft = match (seat, job.draft.clone()) {
            (Some(seat), Some(draft)) => {
                let encoder = match draft.encoding {
                    DraftEncoding::Text => Some(
                        DraftEncoder::new(tokenizer, &job.prompt_text, &job.prompt)
                            .map_err(|error| Error::invalid("prompt_text", error.to_string()))?,
                    ),
                    _ => None,
                };
                let (tokenizer, state) = (tokenizer.clone(), ReadingState::Waiting);
                Some(Reading { seat, job: draft, tokenizer, encoder, state })
            }
            _ => None,
        };
        let decided = None;
        Ok(Self { job, generation, answer, draft, frames, handoff_timeout, decided })
    }

    /// Runs to the answer's end, or until the router hangs up.
    pub async fn run(mut self) {
        let outcome = match self.serve().await {
            Ok(outcome) => outcome,
            Err(error) => {
                let code = error.code.code();
                let _ = self.frames.send(Err(error.into())).await;
                code
            }
        };
        metrics::request_ended(outcome);
    }

    async fn serve(&mut self) -> Result<&'static str, Error> {
        let patience = tokio::time::sleep(self.handoff_timeout);
        tokio::pin!(patience);
        let frames = self.frames.clone();
        loop {
            let waiting = self.draft.as_ref().is_some_and(|d| d.state == ReadingState::Waiting);
            let reading = self.draft.as_ref().is_some_and(|d| d.state != ReadingState::Closed);
            tokio::select! {
                biased;
                permit = frames.reserve(), if self.answer.has_frame() => {
                    let Ok(permit) = permit else { return Ok("cancelled") };
                    let Some(frame) = self.answer.next_frame() else { continue };
                    let finished = match frame.body {
                        Body::Finished { reason, .. } => Some(reason),
                        _ => None,
                    };
                    permit.send(Ok(convert::frame(&self.job, frame)));
                    match finished {
                        Some(Finish::Stop) => return Ok("stop"),
                        Some(Finish::Length) => return Ok("length"),
                        None => {}
                    }
                }
                () = frames.closed() => return Ok("cancelled"),
                event = self.generation.next() => {
                    let mut next = Some(event.ok_or_else(|| Error::internal("the engine has stopped"))?);
                    while let Some(event) = next {
                        self.take(event)?;
                        next = self.generation.try_next();
                    }
                }
                input = receive(&mut self.draft), if reading => self.read(input).await?,
                () = &mut patience, if waiting => {
                    let message = format!("no drafter came within {:?}", self.handoff_timeout);
                    return Err(Error::new(ErrorCode::DeadlineExceeded, message));
                }
            }
        }
    }

    fn take(&mut self, event: Event) -> Result<(), Error> {
        match &event {
            Event::Failed { message } => return Err(Error::internal(message.clone())),
            Event::Read { decision: Some(decision), .. } => self.decide(*decision),
            Event::Wrote { .. } => {
                metrics::token_written();
                if let Some(decided) = self.decided.take() {
                    metrics::handoff(decided.elapsed());
                }
            }
            _ => {}
        }
        self.answer.take(event);
        Ok(())
    }

    /// Stops the drafter in the moment the draft is decided.
    fn decide(&mut self, decision: Decision) {
        metrics::draft_decided(decision);
        self.decided = Some(Instant::now());
        if let Some(draft) = &mut self.draft {
            draft.state = ReadingState::Closed;
            let reason = if decision.switched { DraftEnd::Switched } else { DraftEnd::Aborted };
            draft.seat.stop.send_replace(Some(reason));
        }
    }

    async fn read(&mut self, input: Option<DraftInput>) -> Result<(), Error> {
        let Some(draft) = &mut self.draft else {
            return Ok(());
        };
        let ids = match input {
            None => {
                let message = "the drafter was lost before the base took over";
                return Err(Error::unavailable(message));
            }
            Some(DraftInput::Open { tokenizer_fingerprint, encoding }) => {
                draft.open(&tokenizer_fingerprint, encoding)?;
                return Ok(());
            }
            Some(DraftInput::Ids(ids)) => draft.check(ids)?,
            Some(DraftInput::Text(text)) => draft.encode(&text)?,
            Some(DraftInput::Ended) => {
                draft.state = ReadingState::Closed;
                draft.finish()?
            }
        };
        let ended = draft.state == ReadingState::Closed;
        if !ids.is_empty() {
            // The first `window` tokens leave here, before the engine has seen them.
            self.answer.push_draft(&ids);
            self.generation.draft().push(ids).await.map_err(stopped)?;
        }
        if ended {
            self.generation.draft().end().await.map_err(stopped)?;
        }
        Ok(())
    }
}

impl Reading {
    fn open(&mut self, fingerprint: &str, encoding: DraftEncoding) -> Result<(), Error> {
        let own = self.tokenizer.fingerprint();
        if encoding != self.job.encoding {
            let message =
                format!("expected a draft as {:?}, found {encoding:?}", self.job.encoding);
            return Err(Error::new(ErrorCode::Mismatch, message).with_field("encoding"));
        }
        if encoding == DraftEncoding::Ids && fingerprint != own.to_string() {
            let message = format!("expected the base's own tokenizer {own}, found {fingerprint}");
            return Err(Error::new(ErrorCode::Mismatch, message).with_field("encoding"));
        }
        self.state = ReadingState::Open;
        Ok(())
    }

    fn check(&self, ids: Vec<u32>) -> Result<Vec<u32>, Error> {
        let vocab_size = self.job.vocab_size;
        if self.job.encoding != DraftEncoding::Ids {
            return Err(Error::new(ErrorCode::Protocol, "expected text, found token ids"));
        }
        match ids.iter().find(|&&id| id as usize >= vocab_size) {
            Some(id) => {
                let message = format!("expected draft ids below {vocab_size}, found {id}");
                Err(Error::new(ErrorCode::Protocol, message))
            }
            None => Ok(ids),
        }
    }

    fn encode(&mut self, text: &str) -> Result<Vec<u32>, Error> {
        let Some(encoder) = &mut self.encoder else {
            return Err(Error::new(ErrorCode::Protocol, "expected token ids, found text"));
        };
        encoder.push(text).map_err(|error| Error::internal(error.to_string()))
    }

    fn finish(&mut self) -> Result<Vec<u32>, Error> {
        match &mut self.encoder {
            Some(encoder) => encoder.finish().map_err(|error| Error::internal(error.to_string())),
            None => Ok(Vec::new()),
        }
    }
}

async fn receive(draft: &mut Option<Reading>) -> Option<DraftInput> {
    match draft {
        Some(draft) => draft.seat.input.recv().await,
        None => std::future::pending().await,
    }
}

fn stopped(error: SubmitError) -> Error {
    Error::unavailable(error.to_string())
}
