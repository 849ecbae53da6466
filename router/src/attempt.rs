//! One attempt at one answer: a `Serve` stream from the base and a `Draft` stream from a drafter,
//! read together, dropped together. A draft that fails before it is decided can be replaced while
//! the base's stream lives. What a failure leads to is the owner's business; the epochs in the
//! requests say which attempt this is.

use std::pin::Pin;
use std::time::Duration;

use futures::future::BoxFuture;
use headstart_cluster::Tier;

use headstart_proto::error::ERROR_TRAILER;
use headstart_proto::v1::base_client::BaseClient;
use headstart_proto::v1::drafter_client::DrafterClient;
use headstart_proto::{Epoch, Error, ErrorCode, NodeId, RequestId, v1};
use headstart_service::server::MESSAGE_BYTES_MAX;
use tokio::time::{Instant, Sleep, sleep};
use tonic::{Response, Status, Streaming};

use crate::frames::{FrameGate, ServeEvent};
use crate::nodes::Place;
use crate::progress::Progress;
use crate::retry::Blame;

/// After a drafter lost the base, the base's own stream has so long to break.
const BASE_LOST_GRACE: Duration = Duration::from_millis(250);

/// How long an attempt may be silent.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Patience {
    /// Until the first frame.
    pub(crate) first_frame: Duration,
    /// Between frames.
    pub(crate) frame: Duration,
}

/// The drafter's part of an attempt.
#[derive(Debug)]
pub(crate) struct DraftPlan {
    /// The drafter.
    pub(crate) node_id: NodeId,
    /// The place taken on it.
    pub(crate) place: Place,
    /// What it is asked.
    pub(crate) request: v1::DraftRequest,
}

/// The base's part of an attempt.
#[derive(Debug)]
pub(crate) struct ServePlan {
    /// The answer's id on the wire.
    pub(crate) request_id: RequestId,
    /// Which attempt it is.
    pub(crate) epoch: Epoch,
    /// The base.
    pub(crate) node_id: NodeId,
    /// The place taken on it.
    pub(crate) place: Place,
    /// What it is asked.
    pub(crate) request: v1::ServeRequest,
    /// How long it may be silent.
    pub(crate) patience: Patience,
}

/// A node that an attempt cannot go on with.
#[derive(Clone, Debug)]
pub(crate) struct Lost {
    /// Whose stream is over.
    pub(crate) tier: Tier,
    /// The node that is to be avoided: that one, or the drafter that its base waited for in vain.
    pub(crate) node_id: NodeId,
    /// Why.
    pub(crate) error: Error,
    /// What that says about the node.
    pub(crate) blame: Blame,
}

/// A node's stream.
enum Frames<T> {
    Opening(BoxFuture<'static, Result<Response<Streaming<T>>, Status>>),
    Open(Box<Streaming<T>>),
}

impl<T> Frames<T> {
    /// The next frame. Cancel safe.
    async fn message(&mut self) -> Result<Option<T>, Status> {
        loop {
            match self {
                Self::Opening(opening) => {
                    *self = Self::Open(Box::new(opening.await?.into_inner()));
                }
                Self::Open(frames) => return frames.message().await,
            }
        }
    }

    /// The node has taken the request.
    fn is_open(&self) -> bool {
        matches!(self, Self::Open(_))
    }
}

/// A draft under way.
struct Draft {
    node_id: NodeId,
    place: Place,
    request_id: String,
    epoch: u64,
    draft_tokens_max: u32,
    frames: Frames<v1::DraftFrame>,
}

/// An attempt that runs. Dropping it cancels it on both nodes and gives their places back.
pub(crate) struct Attempt {
    gate: FrameGate,
    serve: Frames<v1::ServeFrame>,
    base: Place,
    base_id: NodeId,
    /// `None` once the draft is over, or while there is none.
    draft: Option<Draft>,
    /// A drafter that lost the base, while the base may still have a say.
    base_lost: Option<Lost>,
    /// A drafter was replaced because it lost the base. If the next one does too, it is the base.
    doubted: bool,
    patience: Patience,
    deadline: Pin<Box<Sleep>>,
}

impl Attempt {
    /// Starts an attempt that goes on from `progress`. Nothing is sent before [`Self::next`] is
    /// awaited.
    pub(crate) fn open(plan: ServePlan, draft: Option<DraftPlan>, progress: &Progress) -> Self {
        let ServePlan { request_id, epoch, node_id, place, request, patience } = plan;
        let logprobs = request.top_logprobs.is_some();
        let policy = request.draft.as_ref();
        let gate = FrameGate::new(request_id, epoch, request.max_tokens, policy, logprobs);
        let mut client = BaseClient::new(place.link()).max_decoding_message_size(MESSAGE_BYTES_MAX);
        let opening = async move { client.serve(request).await };
        Self {
            gate: gate.behind(progress.tokens(), progress.settled()),
            serve: Frames::Opening(Box::pin(opening)),
            base: place,
            base_id: node_id,
            draft: draft.map(Draft::open),
            base_lost: None,
            doubted: false,
            patience,
            deadline: Box::pin(sleep(patience.first_frame)),
        }
    }

    /// The base's stream alone.
    pub(crate) fn without_draft(self) -> Self {
        Self { draft: None, ..self }
    }

    /// Puts another draft in the place of one that failed.
    pub(crate) fn replace_draft(&mut self, plan: DraftPlan) {
        self.draft = Some(Draft::open(plan));
        self.base_lost = None;
        self.wait_for_frame();
    }

    /// What happens next in the answer; `progress` learns what the drafter tells of its draft.
    /// Nothing comes after [`ServeEvent::Finished`] and [`ServeEvent::Moved`].
    ///
    /// # Errors
    /// The base failed, broke the protocol or was silent for too long: the attempt is over. Or the
    /// drafter failed before the draft was decided: the draft can be replaced.
    pub(crate) async fn next(&mut self, progress: &mut Progress) -> Result<ServeEvent, Lost> {
        loop {
            tokio::select! {
                biased;
                frame = self.serve.message() => {
                    let frame = self.received(frame)?;
                    let admitted = self.gate.admit(frame);
                    let admitted = admitted.map_err(|error| self.lost_base(error, Blame::Struck));
                    if let Some(event) = admitted? {
                        self.heard(&event);
                        return Ok(event);
                    }
                }
                news = news(&mut self.draft, progress), if self.draft.is_some() => {
                    self.draft_ended(news)?;
                }
                () = self.deadline.as_mut() => return Err(self.too_late()),
            }
        }
    }

    fn heard(&mut self, event: &ServeEvent) {
        match event {
            ServeEvent::Switched(_) => {
                self.base_lost = None;
                self.wait_for_frame();
            }
            ServeEvent::Finished(_) | ServeEvent::Moved { .. } => self.base.told(None),
            ServeEvent::Tokens(_) => {}
        }
    }

    fn wait_for_frame(&mut self) {
        self.deadline.as_mut().reset(Instant::now() + self.patience.frame);
    }

    /// A frame, or why there is none.
    fn received(
        &mut self,
        frame: Result<Option<v1::ServeFrame>, Status>,
    ) -> Result<v1::ServeFrame, Lost> {
        let status = match frame {
            Ok(Some(frame)) => {
                if self.base_lost.is_none() {
                    self.wait_for_frame();
                }
                return Ok(frame);
            }
            Ok(None) => None,
            Err(status) => Some(status),
        };
        let (error, blame) = failure(status.as_ref(), self.serve.is_open());
        self.base.told(Some(error.code));
        let lost = self.lost_base(error, blame);
        let drafter =
            if lost.error.code == ErrorCode::NoDrafter { self.silent_drafter() } else { None };
        // The base is fine: it is another drafter that is needed.
        Err(Lost { node_id: drafter.unwrap_or(lost.node_id), ..lost })
    }

    /// The drafter that the base says it waits for in vain.
    fn silent_drafter(&mut self) -> Option<NodeId> {
        if let Some(draft) = &self.draft {
            draft.place.told(Some(ErrorCode::DeadlineExceeded));
            return Some(draft.node_id.clone());
        }
        // It said before that it cannot reach the base.
        self.base_lost.take().map(|lost| lost.node_id)
    }

    /// The draft's stream is over.
    fn draft_ended(&mut self, result: Result<(), Lost>) -> Result<(), Lost> {
        let draft = self.draft.take();
        let Err(lost) = result else {
            if let Some(draft) = draft {
                draft.place.told(None);
            }
            return Ok(());
        };
        if self.gate.decision().is_some() {
            return Ok(());
        }
        match lost.error.code {
            ErrorCode::NoBase if self.doubted => Err(self.lost_base(lost.error, Blame::Failed)),
            // Most often it is the base that is gone, and its stream is about to say so.
            ErrorCode::NoBase => {
                self.base_lost = Some(lost);
                self.deadline.as_mut().reset(Instant::now() + BASE_LOST_GRACE);
                Ok(())
            }
            code => {
                if let Some(draft) = draft {
                    draft.place.told(Some(code));
                }
                Err(lost)
            }
        }
    }

    fn lost_base(&self, error: Error, blame: Blame) -> Lost {
        let node_id = self.base_id.clone();
        let error = node_error(Tier::Base, &node_id, error);
        Lost { tier: Tier::Base, node_id, error, blame }
    }

    fn too_late(&mut self) -> Lost {
        if let Some(lost) = self.base_lost.take() {
            self.doubted = true;
            return lost;
        }
        let error = Error::new(ErrorCode::DeadlineExceeded, "it sent nothing for too long");
        self.base.told(Some(error.code));
        let blame = if self.serve.is_open() { Blame::Struck } else { Blame::Failed };
        self.lost_base(error, blame)
    }
}

impl Draft {
    fn open(plan: DraftPlan) -> Self {
        let DraftPlan { node_id, place, request } = plan;
        let (request_id, epoch) = (request.request_id.clone(), request.epoch);
        let draft_tokens_max = request.draft_tokens_max;
        let mut client =
            DrafterClient::new(place.link()).max_decoding_message_size(MESSAGE_BYTES_MAX);
        let frames = Frames::Opening(Box::pin(async move { client.draft(request).await }));
        Self { node_id, place, request_id, epoch, draft_tokens_max, frames }
    }

    /// Reads the stream to its end. It is well over only with its last frame. Cancel safe.
    async fn follow(&mut self, progress: &mut Progress) -> Result<(), Lost> {
        loop {
            let frame = match self.frames.message().await {
                Ok(Some(frame)) => frame,
                Ok(None) => return Err(self.broken(None)),
                Err(status) => return Err(self.broken(Some(&status))),
            };
            if frame.request_id != self.request_id || frame.epoch > self.epoch {
                let error = Error::new(ErrorCode::Protocol, "a frame of another draft");
                return Err(self.lost(error, Blame::Struck));
            }
            match frame.event {
                _ if frame.epoch < self.epoch => {}
                Some(v1::draft_frame::Event::Written(written)) => {
                    progress.wrote(frame.position, &written.ids, self.draft_tokens_max);
                }
                Some(v1::draft_frame::Event::Ended(_)) => return Ok(()),
                Some(v1::draft_frame::Event::Started(_)) | None => {}
            }
        }
    }

    fn broken(&self, status: Option<&Status>) -> Lost {
        let (error, blame) = failure(status, self.frames.is_open());
        self.lost(error, blame)
    }

    fn lost(&self, error: Error, blame: Blame) -> Lost {
        let node_id = self.node_id.clone();
        let error = node_error(Tier::Drafter, &node_id, error);
        Lost { tier: Tier::Drafter, node_id, error, blame }
    }
}

/// The draft's end.
async fn news(draft: &mut Option<Draft>, progress: &mut Progress) -> Result<(), Lost> {
    match draft {
        Some(draft) => draft.follow(progress).await,
        None => std::future::pending().await,
    }
}

/// Why a stream ended that was to go on, and what that says about the node. It was lost over the
/// request if it had taken it, and then the connection broke or the node broke down. What a node says
/// by itself (it is full, it drains) is no loss.
fn failure(status: Option<&Status>, open: bool) -> (Error, Blame) {
    let Some(status) = status else {
        let blame = if open { Blame::Struck } else { Blame::Failed };
        return (Error::unavailable("its stream ended before its last frame"), blame);
    };
    let error = Error::from_status(status);
    let typed = status.metadata().get_bin(ERROR_TRAILER).is_some();
    let blame = match (open, typed) {
        (true, false) => Blame::Struck,
        (true, true) if error.code == ErrorCode::Internal => Blame::Struck,
        (false, false) => Blame::Unreached,
        (_, true) => Blame::Failed,
    };
    (error, blame)
}

/// An error of a node, as the client is told. What only concerns the two nodes becomes "unavailable".
fn node_error(tier: Tier, node_id: &NodeId, error: Error) -> Error {
    if error.code.client_fault()
        && error.code != ErrorCode::NotFound
        && error.code != ErrorCode::Cancelled
    {
        return error;
    }
    let code = match error.code {
        ErrorCode::NotFound
        | ErrorCode::Mismatch
        | ErrorCode::StaleEpoch
        | ErrorCode::Cancelled => ErrorCode::Unavailable,
        code => code,
    };
    let hint = error.retry_after;
    let error = Error::new(code, format!("{tier} {node_id}: {}", error.message));
    match hint {
        Some(after) => error.with_retry_after(after),
        None => error,
    }
}
