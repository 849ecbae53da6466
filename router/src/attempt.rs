//! One attempt at one answer: a `Serve` stream from the base and a `Draft` stream from the drafter,
//! opened together, read together, dropped together. What a failed attempt leads to is its
//! owner's business; the epoch in the requests says which attempt this is.

use std::pin::Pin;
use std::time::Duration;

use futures::future::BoxFuture;
use headstart_proto::v1::base_client::BaseClient;
use headstart_proto::v1::drafter_client::DrafterClient;
use headstart_proto::{Epoch, Error, ErrorCode, NodeId, RequestId, v1};
use headstart_service::server::MESSAGE_BYTES_MAX;
use tokio::time::{Instant, Sleep, sleep};
use tonic::{Status, Streaming};

use crate::frames::{Decision, FrameGate, ServeEvent};
use crate::nodes::Place;

/// After a draft failed, the base has so long to say what it knows: that it took over before, or
/// why the draft failed.
const DRAFT_FAILURE_GRACE: Duration = Duration::from_millis(250);

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

/// Everything an attempt needs.
#[derive(Debug)]
pub(crate) struct AttemptPlan {
    /// The answer's id on the wire.
    pub(crate) request_id: RequestId,
    /// Which attempt it is.
    pub(crate) epoch: Epoch,
    /// The base.
    pub(crate) base_id: NodeId,
    /// The place taken on it.
    pub(crate) base: Place,
    /// What the base is asked.
    pub(crate) serve: v1::ServeRequest,
    /// The drafter's part; `None` when the base answers alone.
    pub(crate) draft: Option<DraftPlan>,
    /// How long it may be silent.
    pub(crate) patience: Patience,
}

/// The base's stream.
enum Serve {
    Opening(BoxFuture<'static, Result<Streaming<v1::ServeFrame>, Status>>),
    Open(Box<Streaming<v1::ServeFrame>>),
}

impl Serve {
    /// The next frame. Cancel safe.
    async fn message(&mut self) -> Result<Option<v1::ServeFrame>, Status> {
        loop {
            match self {
                Self::Opening(opening) => *self = Self::Open(Box::new(opening.await?)),
                Self::Open(frames) => return frames.message().await,
            }
        }
    }
}

/// An attempt that runs. Dropping it cancels it on both nodes and gives their places back.
pub(crate) struct Attempt {
    gate: FrameGate,
    serve: Serve,
    base: Place,
    base_id: NodeId,
    /// Ends when the draft does; `None` from then on.
    draft: Option<BoxFuture<'static, Result<(), Error>>>,
    /// Why the draft failed, while the base may still have a say.
    draft_error: Option<Error>,
    patience: Patience,
    deadline: Pin<Box<Sleep>>,
}

impl Attempt {
    /// Starts an attempt. Nothing is sent before [`Self::next`] is awaited.
    pub(crate) fn open(plan: AttemptPlan) -> Self {
        let AttemptPlan { request_id, epoch, base_id, base, serve, draft, patience } = plan;
        let gate = FrameGate::new(
            request_id,
            epoch,
            serve.max_tokens,
            serve.draft.as_ref(),
            serve.top_logprobs.is_some(),
        );
        let mut client =
            BaseClient::new(base.channel()).max_decoding_message_size(MESSAGE_BYTES_MAX);
        let opening = async move { client.serve(serve).await.map(tonic::Response::into_inner) };
        Self {
            gate,
            serve: Serve::Opening(Box::pin(opening)),
            base,
            base_id,
            draft: draft.map(|plan| Box::pin(follow_draft(plan)) as BoxFuture<'static, _>),
            draft_error: None,
            patience,
            deadline: Box::pin(sleep(patience.first_frame)),
        }
    }

    /// The draft's fate, once it is known.
    pub(crate) fn decision(&self) -> Option<Decision> {
        self.gate.decision()
    }

    /// What happens next in the answer. Nothing comes after [`ServeEvent::Finished`].
    ///
    /// # Errors
    /// The base failed or broke the protocol, the drafter failed before the draft was decided, or
    /// nothing came for too long.
    pub(crate) async fn next(&mut self) -> Result<ServeEvent, Error> {
        loop {
            tokio::select! {
                biased;
                frame = self.serve.message() => {
                    let frame = self.received(frame)?;
                    if let Some(event) = self.gate.admit(frame).map_err(|e| self.of_base(e))? {
                        return Ok(event);
                    }
                }
                result = over(&mut self.draft), if self.draft.is_some() => {
                    self.draft = None;
                    if let Err(error) = result && self.gate.decision().is_none() {
                        self.draft_error = Some(error);
                        self.deadline.as_mut().reset(Instant::now() + DRAFT_FAILURE_GRACE);
                    }
                }
                () = self.deadline.as_mut() => return Err(self.too_late()),
            }
        }
    }

    /// A frame, or why there is none.
    fn received(
        &mut self,
        frame: Result<Option<v1::ServeFrame>, Status>,
    ) -> Result<v1::ServeFrame, Error> {
        if matches!(
            &frame,
            Ok(Some(v1::ServeFrame { event: Some(v1::serve_frame::Event::Switched(_)), .. }))
        ) {
            self.draft_error = None;
        }
        let error = match frame {
            Ok(Some(frame)) => {
                if self.draft_error.is_none() {
                    self.deadline.as_mut().reset(Instant::now() + self.patience.frame);
                }
                return Ok(frame);
            }
            Ok(None) => Error::unavailable("its stream ended before the answer did"),
            Err(status) => Error::from_status(&status),
        };
        if error.code == ErrorCode::Unavailable {
            self.base.mark_failing();
        }
        let error = self.of_base(error);
        // A base that merely lost its drafter has less to say than the drafter.
        match self.draft_error.take() {
            Some(cause) if error.code.http_status() >= 500 => Err(cause),
            _ => Err(error),
        }
    }

    fn of_base(&self, error: Error) -> Error {
        node_error("base", &self.base_id, error)
    }

    fn too_late(&mut self) -> Error {
        self.draft_error.take().unwrap_or_else(|| {
            let message = format!("base {} sent nothing for too long", self.base_id);
            Error::new(ErrorCode::DeadlineExceeded, message)
        })
    }
}

/// The draft's end.
async fn over(draft: &mut Option<BoxFuture<'static, Result<(), Error>>>) -> Result<(), Error> {
    match draft {
        Some(draft) => draft.await,
        None => std::future::pending().await,
    }
}

/// Opens a draft and reads its stream to the end. It is well over only with its last frame.
async fn follow_draft(plan: DraftPlan) -> Result<(), Error> {
    let DraftPlan { node_id, place, request } = plan;
    let (request_id, epoch) = (request.request_id.clone(), request.epoch);
    let mut client =
        DrafterClient::new(place.channel()).max_decoding_message_size(MESSAGE_BYTES_MAX);
    let reading = async {
        let mut frames = client.draft(request).await?.into_inner();
        while let Some(frame) = frames.message().await? {
            if frame.request_id != request_id || frame.epoch > epoch {
                return Err(Error::new(ErrorCode::Protocol, "a frame of another draft"));
            }
            if frame.epoch == epoch && matches!(frame.event, Some(v1::draft_frame::Event::Ended(_)))
            {
                return Ok(());
            }
        }
        Err(Error::unavailable("its stream ended before the draft did"))
    };
    let result: Result<(), Error> = reading.await;
    result.map_err(|error| {
        if error.code == ErrorCode::Unavailable {
            place.mark_failing();
        }
        node_error("drafter", &node_id, error)
    })
}

/// An error of a node, as the client is told. What only concerns the two nodes becomes "unavailable".
fn node_error(tier: &str, node_id: &NodeId, error: Error) -> Error {
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
