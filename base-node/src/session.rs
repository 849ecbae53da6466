//! One answer: the task that owns a request from its first drafted token to its last.
//!
//! It reads the draft, feeds the engine, and sends frames. Everything the request holds (its place
//! at the rendezvous, its engine slot, its KV pages) is given back when the task ends, however it
//! ends; the drafter is told to stop in the moment the draft is decided. A drafter that is lost
//! before may be followed by another one.

use std::sync::Arc;
use std::time::{Duration, Instant};

use headstart_engine::{Decision, Event, Finish, Generation, SubmitError};
use headstart_node::convert::failed;
use headstart_proto::v1::{self, DraftEnd};
use headstart_proto::{Error, ErrorCode};
use headstart_text::Tokenizer;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tonic::Status;

use crate::answer::{Answer, Body};
use crate::convert::{self, Job};
use crate::kv::{Hold, Kv, Lease};
use crate::metrics;
use crate::reading::Reading;
use crate::rendezvous::{DraftInput, Line, Seat, Visitor};

/// The outcome of an answer that another base goes on with.
const MOVED: &str = "moved";

/// What the sessions of a node share.
#[derive(Clone)]
pub struct Shared {
    /// The base's.
    pub tokenizer: Tokenizer,
    /// How long a session waits for a drafter.
    pub handoff_timeout: Duration,
    /// Cancelled when the node drains: sessions that can go on elsewhere do.
    pub draining: CancellationToken,
    /// What leaves and comes in with answers that move.
    pub kv: Arc<Kv>,
}

/// See the [module](self).
pub struct Session {
    job: Job,
    /// `None` if nothing is left to write.
    generation: Option<Generation>,
    answer: Answer,
    /// Kept to the end, so that drafters that come late are told.
    seat: Option<Seat>,
    /// Set while a draft is read.
    draft: Option<Reading>,
    /// The drafter that is here.
    line: Option<Line>,
    frames: mpsc::Sender<Result<v1::ServeFrame, Status>>,
    shared: Shared,
    decided: Option<Instant>,
    /// KV from another base, until the engine has begun.
    hold: Option<Hold>,
    /// The answer's KV, for the base that goes on.
    offer: Option<Lease>,
}

impl Session {
    /// A session for `job`, which the engine has taken as `generation`.
    ///
    /// # Errors
    /// A draft that cannot be read with the base's tokenizer.
    pub fn new(
        job: Job,
        generation: Option<Generation>,
        seat: Option<Seat>,
        frames: mpsc::Sender<Result<v1::ServeFrame, Status>>,
        shared: Shared,
        hold: Option<Hold>,
    ) -> Result<Self, Error> {
        let window = job.draft.as_ref().map_or(1, |draft| draft.policy.window);
        let answer = Answer::new(window, job.max_tokens, job.top_logprobs.is_some());
        let answer = answer.with_begun(&job.begun);
        let draft = match &job.draft {
            Some(draft) if job.reads() => Some(Reading::new(&job, draft, &shared.tokenizer)?),
            _ => None,
        };
        let (line, decided, offer) = (None, None, None);
        Ok(Self {
            job,
            generation,
            answer,
            seat,
            draft,
            line,
            frames,
            shared,
            decided,
            hold,
            offer,
        })
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
        let Self { generation, seat, frames, shared, offer, .. } = self;
        // The slot is free, and what is computed no longer changes.
        drop((generation, seat));
        if let Some(offer) = offer.filter(|_| outcome == MOVED) {
            // The router holds the stream until the answer goes on elsewhere.
            shared.kv.keep(offer, frames.closed()).await;
        }
    }

    /// Lets another base go on: this one gives no more, but the answer's KV.
    async fn move_on(&mut self) {
        self.offer_kv().await;
        self.answer.move_on(self.offer.is_some());
    }

    /// Offers the answer's KV, from what is computed by now.
    async fn offer_kv(&mut self) {
        if let (None, Some(generation)) = (&self.offer, &self.generation) {
            self.offer = self.shared.kv.offer(&self.job.id, self.job.epoch, generation).await;
        }
    }

    async fn serve(&mut self) -> Result<&'static str, Error> {
        if let Some(reason) = self.job.is_whole() {
            let answer_tokens = self.job.begun.answer.len();
            self.answer.take(Event::Finished { reason, answer_tokens });
        }
        if self.job.move_when_decided {
            // Whoever goes on may follow from here.
            self.offer_kv().await;
        }
        let patience = tokio::time::sleep(self.shared.handoff_timeout);
        tokio::pin!(patience);
        let (frames, draining) = (self.frames.clone(), self.shared.draining.clone());
        loop {
            let on = !self.answer.is_over();
            let reading = on && self.draft.as_ref().is_some_and(|draft| !draft.is_complete());
            let here = self.line.is_some();
            tokio::select! {
                biased;
                permit = frames.reserve(), if self.answer.has_frame() => {
                    let Ok(permit) = permit else { return Ok("cancelled") };
                    let Some(frame) = self.answer.next_frame() else { continue };
                    let outcome = outcome(&frame.body);
                    permit.send(Ok(convert::frame(&self.job, &self.shared.kv, frame)));
                    if let Some(outcome) = outcome {
                        return Ok(outcome);
                    }
                }
                () = frames.closed() => return Ok("cancelled"),
                () = draining.cancelled(), if on && self.job.movable => self.move_on().await,
                event = happens(&mut self.generation), if on => {
                    let mut next = Some(event.ok_or_else(|| Error::unavailable("the engine has stopped"))?);
                    while let Some(event) = next {
                        self.take(event)?;
                        if self.job.move_when_decided && self.decided() {
                            // What the engine has written by now, the other base writes again.
                            self.move_on().await;
                            break;
                        }
                        next = self.generation.as_mut().and_then(Generation::try_next);
                    }
                }
                // A drafter that comes when the draft is complete is told to stop.
                visitor = arrives(&self.seat), if on && self.draft.is_some() => self.meet(visitor?),
                input = says(&mut self.line), if reading && here => {
                    self.read(input).await?;
                    if self.line.is_none() {
                        patience.as_mut().reset(tokio::time::Instant::now() + self.shared.handoff_timeout);
                    }
                }
                () = &mut patience, if reading && !here => {
                    let message = format!("no drafter came within {:?}", self.shared.handoff_timeout);
                    // The router is told which of the two to replace.
                    return Err(Error::new(ErrorCode::NoDrafter, message));
                }
            }
        }
    }

    /// Whether a draft was read here and is decided.
    fn decided(&self) -> bool {
        self.job.reads() && self.draft.is_none()
    }

    fn take(&mut self, event: Event) -> Result<(), Error> {
        self.hold = None;
        match &event {
            Event::Failed { message, fatal } => return Err(failed(message, *fatal)),
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
        self.draft = None;
        let reason = convert::stop_reason(decision);
        if let Some(seat) = &self.seat {
            seat.decide(reason);
        }
        self.dismiss(reason);
    }

    /// Lets a drafter go on with the draft; the one that was here before is told to stop.
    fn meet(&mut self, visitor: Visitor) {
        let Some(draft) = self.draft.as_mut().filter(|draft| !draft.is_complete()) else {
            return;
        };
        match draft.open(&visitor.handoff) {
            Ok(drafted) => {
                self.dismiss(DraftEnd::Aborted);
                // One that is gone already closes its line.
                let _ = visitor.welcome.send(Ok(drafted));
                self.line = Some(visitor.line);
            }
            Err(error) => {
                let _ = visitor.welcome.send(Err(error));
            }
        }
    }

    fn dismiss(&mut self, reason: DraftEnd) {
        if let Some(line) = self.line.take() {
            line.stop.send_replace(Some(reason));
        }
    }

    async fn read(&mut self, input: Option<DraftInput>) -> Result<(), Error> {
        let Some(input) = input else {
            // The drafter was lost. The router knows, and sends another.
            self.line = None;
            return Ok(());
        };
        let (Some(draft), Some(generation)) = (&mut self.draft, &self.generation) else {
            return Ok(());
        };
        let ids = draft.take(input)?;
        let complete = draft.is_complete();
        if !ids.is_empty() {
            // The first `window` tokens leave here, before the engine has seen them.
            self.answer.push_draft(&ids);
            generation.draft().push(ids).await.map_err(stopped)?;
        }
        if complete {
            generation.draft().end().await.map_err(stopped)?;
        }
        Ok(())
    }
}

/// What a frame ends the session with, if it is the last one.
fn outcome(body: &Body) -> Option<&'static str> {
    match body {
        Body::Finished { reason: Finish::Stop, .. } => Some("stop"),
        Body::Finished { reason: Finish::Length, .. } => Some("length"),
        Body::Moved { .. } => Some(MOVED),
        Body::Tokens { .. } | Body::Decided(_) => None,
    }
}

async fn happens(generation: &mut Option<Generation>) -> Option<Event> {
    match generation {
        Some(generation) => generation.next().await,
        None => std::future::pending().await,
    }
}

async fn arrives(seat: &Option<Seat>) -> Result<Visitor, Error> {
    match seat {
        Some(seat) => seat.visitor().await,
        None => std::future::pending().await,
    }
}

async fn says(line: &mut Option<Line>) -> Option<DraftInput> {
    match line {
        Some(line) => line.input.recv().await,
        None => std::future::pending().await,
    }
}

fn stopped(error: SubmitError) -> Error {
    Error::unavailable(error.to_string())
}
