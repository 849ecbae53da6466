//! One draft: the task that owns it from the first token to the base's *stop*.
//!
//! The engine starts at once, while the handoff stream is being opened; whatever ends first (the
//! draft, the base, the router) ends the task, and dropping the generation frees its slot and pages.

use std::time::Duration;

use headstart_engine::{Event, Finish, Generation};
use headstart_proto::v1::{self, DraftEnd, draft_frame, handoff_frame, handoff_reply};
use headstart_proto::{Error, ErrorCode};
use headstart_text::Detokenizer;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use crate::bases::BaseClient;
use crate::convert::{self, Job};
use crate::metrics;

/// Draft frames that wait for the base at most; tokens beyond gather in the next one.
const FRAME_QUEUE: usize = 8;

/// See the [module](self).
pub struct Draft {
    /// What is asked.
    pub job: Job,
    /// The engine's work on it.
    pub generation: Generation,
    /// Set when the draft travels as text.
    pub detokenizer: Option<Detokenizer>,
    /// The drafter's name and tokenizer, for the base.
    pub open: v1::HandoffOpen,
    /// To the router.
    pub progress: mpsc::Sender<Result<v1::DraftFrame, Status>>,
    /// How long the base may take to accept the draft.
    pub handoff_timeout: Duration,
    /// Draft tokens sent.
    pub position: u32,
}

/// Tokens on their way to the base.
#[derive(Default)]
struct Piece {
    count: u32,
    ids: Vec<u32>,
    text: String,
    end: Option<Finish>,
}

impl Piece {
    fn has_tokens(&self) -> bool {
        self.count > 0 || !self.text.is_empty()
    }
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
        let _ = frames.try_send(self.frame(open));
        let progress = self.progress.clone();
        let opened = tokio::select! {
            () = progress.closed() => return Ok(None),
            opened = tokio::time::timeout(self.handoff_timeout, async {
                let mut replies = base.handoff(ReceiverStream::new(receiver)).await?.into_inner();
                let first = replies.message().await?;
                Ok::<_, Status>((replies, first))
            }) => opened,
        };
        let (replies, first) = opened.map_err(|_| {
            let timeout = self.handoff_timeout;
            let message = format!("the base did not accept the draft within {timeout:?}");
            Error::new(ErrorCode::DeadlineExceeded, message)
        })??;
        match first.and_then(|reply| reply.event) {
            Some(handoff_reply::Event::Accepted(_)) => {}
            Some(handoff_reply::Event::Stop(stop)) => return Ok(Some(stop.reason())),
            None => return Err(Error::unavailable("the base closed the handoff")),
        }
        self.tell(draft_frame::Event::Started(v1::DraftStarted {})).await;
        self.stream(frames, replies).await
    }

    async fn stream(
        &mut self,
        frames: mpsc::Sender<v1::HandoffFrame>,
        mut replies: Streaming<v1::HandoffReply>,
    ) -> Result<Option<DraftEnd>, Error> {
        let mut piece = Piece::default();
        let reason = loop {
            let writing = piece.end.is_none();
            tokio::select! {
                biased;
                // Nothing goes before the base's word to stop.
                reply = replies.message() => return stop_reason(reply).map(Some),
                () = self.progress.closed() => return Ok(None),
                permit = frames.reserve(), if piece.has_tokens() || !writing => {
                    let Ok(permit) = permit else {
                        return stop_reason(replies.message().await).map(Some);
                    };
                    if piece.has_tokens() {
                        permit.send(self.tokens(&mut piece));
                    } else if let Some(finish) = piece.end {
                        let reason = convert::draft_end(finish);
                        let ended = v1::DraftEnded { reason: reason.into() };
                        permit.send(self.frame(handoff_frame::Event::Ended(ended)));
                        break reason;
                    }
                }
                event = self.generation.next(), if writing => {
                    let mut next =
                        Some(event.ok_or_else(|| Error::internal("the engine has stopped"))?);
                    while let Some(event) = next {
                        self.take(event, &mut piece)?;
                        next = self.generation.try_next();
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

    fn take(&mut self, event: Event, piece: &mut Piece) -> Result<(), Error> {
        match event {
            Event::Wrote { judged, .. } => {
                let id = judged.token.token;
                piece.count += 1;
                match &mut self.detokenizer {
                    Some(detokenizer) => piece.text.push_str(&detokenizer.push(id)),
                    None => piece.ids.push(id),
                }
            }
            Event::Finished { reason, .. } => {
                piece.end = Some(reason);
                if let Some(detokenizer) = &mut self.detokenizer {
                    let rest = detokenizer.finish();
                    // What is left of a cut character belongs to a token that was sent.
                    piece.text.push_str(&rest);
                }
            }
            Event::Failed { message } => return Err(Error::internal(message)),
            Event::Read { .. } => {}
        }
        Ok(())
    }

    fn tokens(&mut self, piece: &mut Piece) -> v1::HandoffFrame {
        let Piece { count, ids, text, end } = std::mem::take(piece);
        piece.end = end;
        metrics::tokens_sent(count as usize);
        let frame = self.frame(handoff_frame::Event::Tokens(v1::DraftTokens { count, ids, text }));
        self.position = self.position.saturating_add(count);
        frame
    }

    fn frame(&self, event: handoff_frame::Event) -> v1::HandoffFrame {
        v1::HandoffFrame {
            request_id: self.job.id.to_string(),
            epoch: self.job.epoch.get(),
            position: self.position,
            event: Some(event),
        }
    }

    async fn tell(&self, event: draft_frame::Event) {
        let frame = v1::DraftFrame {
            request_id: self.job.id.to_string(),
            epoch: self.job.epoch.get(),
            position: self.position,
            event: Some(event),
        };
        // A router that hung up needs no word.
        let _ = self.progress.send(Ok(frame)).await;
    }
}

/// What the base said, when all it may say is *stop*.
fn stop_reason(reply: Result<Option<v1::HandoffReply>, Status>) -> Result<DraftEnd, Error> {
    match reply?.and_then(|reply| reply.event) {
        Some(handoff_reply::Event::Stop(stop)) => Ok(stop.reason()),
        Some(handoff_reply::Event::Accepted(_)) => {
            Err(Error::new(ErrorCode::Protocol, "the base accepted the draft twice"))
        }
        None => Err(Error::unavailable("the base closed the handoff")),
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
