//! One draft: the task that owns it from the first token to the base's *stop*.
//!
//! The engine starts at once, while the handoff stream is being opened; whatever ends first (the
//! draft, the base, the router) ends the task, and dropping the generation frees its slot and pages.

use std::time::Duration;

use headstart_engine::{Event, Finish, Generation};
use headstart_node::convert::failed;
use headstart_proto::v1::{self, DraftEnd, draft_frame, handoff_frame, handoff_reply};
use headstart_proto::{Error, ErrorCode};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Status, Streaming};

use crate::bases::BaseClient;
use crate::convert::{self, Job};
use crate::metrics;
use crate::script::{Piece, Script};

/// Draft frames that wait for the base at most; tokens beyond gather in the next one.
const FRAME_QUEUE: usize = 8;

/// See the [module](self).
pub struct Draft {
    /// What is asked.
    pub job: Job,
    /// The engine's work on it; `None` if an earlier drafter wrote it whole.
    pub generation: Option<Generation>,
    /// What of the draft has gone where.
    pub script: Script,
    /// The drafter's name and tokenizer, for the base.
    pub open: v1::HandoffOpen,
    /// To the router.
    pub progress: mpsc::Sender<Result<v1::DraftFrame, Status>>,
    /// How long the base may take to accept the draft.
    pub handoff_timeout: Duration,
    /// Cancelled when the node drains: a draft that another drafter can go on with ends.
    pub draining: CancellationToken,
}

impl Draft {
    /// Runs to the draft's end.
    pub async fn run(mut self, base: BaseClient) {
        let outcome = match self.hand_off(base).await {
            Ok(Some(reason)) => {
                let ended = v1::DraftEnded { reason: reason.into() };
                self.tell(draft_frame::Event::Ended(ended)).await;
                outcome(reason)
            }
            Ok(None) => "cancelled",
            Err(error) => {
                let code = error.code.code();
                let _ = self.progress.send(Err(error.into())).await;
                code
            }
        };
        metrics::request_ended(outcome);
    }

    /// Why the draft ended; `None` if the router hung up.
    async fn hand_off(&mut self, mut base: BaseClient) -> Result<Option<DraftEnd>, Error> {
        let (frames, receiver) = mpsc::channel(FRAME_QUEUE);
        let open = handoff_frame::Event::Open(self.open.clone());
        // The queue is empty: there is room for the first frame.
        let _ = frames.try_send(self.frame(0, open));
        let (progress, draining) = (self.progress.clone(), self.draining.clone());
        let opened = tokio::select! {
            () = progress.closed() => return Ok(None),
            () = draining.cancelled(), if self.job.movable => return Err(leaving()),
            opened = tokio::time::timeout(self.handoff_timeout, async {
                let mut replies = base.handoff(ReceiverStream::new(receiver)).await?.into_inner();
                let first = replies.message().await?;
                Ok::<_, Status>((replies, first))
            }) => opened,
        };
        let (replies, first) = opened
            .map_err(|_| base_lost(format!("no answer within {:?}", self.handoff_timeout)))?
            .map_err(of_base)?;
        let drafted = match first.and_then(|reply| reply.event) {
            Some(handoff_reply::Event::Accepted(accepted)) => accepted.drafted,
            Some(handoff_reply::Event::Stop(stop)) => return Ok(Some(stop.reason())),
            None => return Err(base_lost("it closed the handoff")),
        };
        self.script.start(drafted, &self.job.prefix);
        if self.generation.is_none() {
            self.script.end(Finish::Length);
        }
        self.tell(draft_frame::Event::Started(v1::DraftStarted {})).await;
        self.stream(frames, replies).await
    }

    async fn stream(
        &mut self,
        frames: mpsc::Sender<v1::HandoffFrame>,
        mut replies: Streaming<v1::HandoffReply>,
    ) -> Result<Option<DraftEnd>, Error> {
        let (progress, draining) = (self.progress.clone(), self.draining.clone());
        let reason = loop {
            let writing = !self.script.is_ended();
            tokio::select! {
                biased;
                // Nothing goes before the base's word to stop.
                reply = replies.message() => return stop_reason(reply).map(Some),
                () = progress.closed() => return Ok(None),
                () = draining.cancelled(), if self.job.movable => return Err(leaving()),
                permit = frames.reserve(), if self.script.has_piece() => {
                    let Ok(permit) = permit else {
                        return stop_reason(replies.message().await).map(Some);
                    };
                    match self.script.next_piece()? {
                        Piece::Tokens { position, tokens } => {
                            metrics::tokens_sent(tokens.count as usize);
                            permit.send(self.frame(position, handoff_frame::Event::Tokens(tokens)));
                        }
                        Piece::End { position, finish } => {
                            let reason = convert::draft_end(finish);
                            let ended = v1::DraftEnded { reason: reason.into() };
                            permit.send(self.frame(position, handoff_frame::Event::Ended(ended)));
                            break reason;
                        }
                    }
                }
                permit = progress.reserve(), if self.script.has_news() => {
                    let Ok(permit) = permit else { return Ok(None) };
                    let written = draft_frame::Event::Written(v1::DraftWritten { ids: self.script.news() });
                    permit.send(Ok(self.word(written)));
                }
                event = happens(&mut self.generation), if writing => {
                    let mut next =
                        Some(event.ok_or_else(|| Error::unavailable("the engine has stopped"))?);
                    while let Some(event) = next {
                        self.take(event)?;
                        next = self.generation.as_mut().and_then(Generation::try_next);
                    }
                }
            }
        };
        drop(frames);
        self.wait_for_end(replies, reason).await
    }

    /// The draft is said; the base has it once it closes the stream.
    async fn wait_for_end(
        &self,
        mut replies: Streaming<v1::HandoffReply>,
        reason: DraftEnd,
    ) -> Result<Option<DraftEnd>, Error> {
        tokio::select! {
            () = self.progress.closed() => Ok(None),
            reply = replies.message() => match reply {
                Ok(None) => Ok(Some(reason)),
                reply => stop_reason(reply).map(Some),
            },
        }
    }

    fn take(&mut self, event: Event) -> Result<(), Error> {
        match event {
            Event::Wrote { judged, .. } => self.script.push(judged.token.token),
            Event::Finished { reason, .. } => self.script.end(reason),
            Event::Failed { message, fatal } => return Err(failed(&message, fatal)),
            Event::Read { .. } => {}
        }
        Ok(())
    }

    fn frame(&self, position: u32, event: handoff_frame::Event) -> v1::HandoffFrame {
        v1::HandoffFrame {
            request_id: self.job.id.to_string(),
            epoch: self.job.epoch.get(),
            position,
            event: Some(event),
        }
    }

    fn word(&self, event: draft_frame::Event) -> v1::DraftFrame {
        v1::DraftFrame {
            request_id: self.job.id.to_string(),
            epoch: self.job.epoch.get(),
            position: match event {
                draft_frame::Event::Written(_) => self.script.told(),
                _ => self.script.sent(),
            },
            event: Some(event),
        }
    }

    async fn tell(&self, event: draft_frame::Event) {
        // A router that hung up needs no word.
        let _ = self.progress.send(Ok(self.word(event))).await;
    }
}

async fn happens(generation: &mut Option<Generation>) -> Option<Event> {
    match generation {
        Some(generation) => generation.next().await,
        None => std::future::pending().await,
    }
}

/// The drafter is fine, its base is not: the router is told which of the two to replace.
fn base_lost(cause: impl std::fmt::Display) -> Error {
    Error::new(ErrorCode::NoBase, format!("the base was lost: {cause}"))
}

fn of_base(status: Status) -> Error {
    let error = Error::from_status(&status);
    match error.code {
        ErrorCode::Unavailable => base_lost(error.message),
        _ => error,
    }
}

fn leaving() -> Error {
    Error::new(ErrorCode::Draining, "the drafter is draining")
}

/// What the base said, when all it may say is *stop*.
fn stop_reason(reply: Result<Option<v1::HandoffReply>, Status>) -> Result<DraftEnd, Error> {
    match reply.map_err(of_base)?.and_then(|reply| reply.event) {
        Some(handoff_reply::Event::Stop(stop)) => Ok(stop.reason()),
        Some(handoff_reply::Event::Accepted(_)) => {
            Err(Error::new(ErrorCode::Protocol, "the base accepted the draft twice"))
        }
        None => Err(base_lost("it closed the handoff")),
    }
}

fn outcome(reason: DraftEnd) -> &'static str {
    match reason {
        DraftEnd::Eos => "eos",
        DraftEnd::Length => "length",
        DraftEnd::Switched => "switched",
        DraftEnd::Aborted | DraftEnd::Unspecified => "aborted",
    }
}
