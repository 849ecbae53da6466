//! The `Base` service: `Serve` opens a session, `Handoff` brings it its draft.

use std::sync::{Arc, Weak};

use headstart_engine::EngineHandle;
use headstart_node::Host;
use headstart_node::convert::refused;
use headstart_proto::v1::{self, DraftEnd, base_server::Base, handoff_frame, handoff_reply};
use headstart_proto::{Epoch, Error, ErrorCode, RequestId};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::task::TaskTracker;
use tonic::{Request, Response, Status, Streaming};

use crate::convert::{self, Job};
use crate::gate::DraftGate;
use crate::kv::{Kv, KvOptions};
use crate::metrics::{self, HANDOFFS, Held};
use crate::rendezvous::{self, DraftInput, Link, Rendezvous};
use crate::session::{Session, Shared};

/// Frames that wait for the router at most; tokens beyond gather in the last one.
const FRAME_QUEUE: usize = 8;
/// Replies that wait for the drafter at most: there are never more than two.
const REPLY_QUEUE: usize = 2;

/// See the [module](self).
pub struct BaseService {
    engine: EngineHandle,
    stop_tokens: Arc<[u32]>,
    rendezvous: Arc<Rendezvous>,
    shared: Shared,
    sessions: TaskTracker,
}

impl BaseService {
    /// A service on `host` that hands no KV over.
    #[must_use]
    pub fn new(host: &Host) -> Self {
        Self::with_kv(host, Kv::new(&host.engine, KvOptions::default()))
    }

    /// A service on `host` that hands KV over by `kv`.
    #[must_use]
    pub fn with_kv(host: &Host, kv: Arc<Kv>) -> Self {
        let waiting = 2 * host.engine.stats().slots;
        Self {
            engine: host.engine.clone(),
            stop_tokens: host.text.stop_tokens().into(),
            rendezvous: Rendezvous::new(waiting),
            shared: Shared {
                tokenizer: host.text.tokenizer().clone(),
                handoff_timeout: host.handoff_timeout,
                draining: host.draining.clone(),
                kv,
            },
            sessions: host.sessions.clone(),
        }
    }

    /// What tells what the service holds.
    #[must_use]
    pub fn holdings(&self) -> Holdings {
        Holdings {
            rendezvous: Arc::downgrade(&self.rendezvous),
            kv: Arc::downgrade(&self.shared.kv),
        }
    }

    async fn open(
        &self,
        request: v1::ServeRequest,
    ) -> Result<mpsc::Receiver<Result<v1::ServeFrame, Status>>, Error> {
        if self.shared.draining.is_cancelled() {
            return Err(Error::new(ErrorCode::Draining, "the base is draining"));
        }
        let source = request.resume.as_ref().and_then(|resume| resume.kv.clone());
        let job = Job::new(request, self.engine.limits())?;
        let seat = match job.draft {
            Some(_) => {
                let decided = job.begun.decision.map(convert::stop_reason);
                Some(self.rendezvous.open(&job.id, job.epoch, decided)?)
            }
            None => None,
        };
        let hold = match source {
            Some(source) if job.is_whole().is_none() => {
                let known = job.prompt.len() + job.begun.answer.len();
                self.shared.kv.wait(&job.id, &source, known).await
            }
            _ => None,
        };
        let generation = match job.is_whole() {
            Some(_) => None,
            None => {
                Some(self.engine.submit(job.engine_request(&self.stop_tokens)).map_err(refused)?)
            }
        };
        let (frames, receiver) = mpsc::channel(FRAME_QUEUE);
        let session = Session::new(job, generation, seat, frames, self.shared.clone(), hold)?;
        self.sessions.spawn(session.run());
        Ok(receiver)
    }
}

/// What one base holds beside its engine's slots and pages, for whoever runs several in a process; the
/// metrics count for the process. It does not keep the base alive.
#[derive(Clone)]
pub struct Holdings {
    rendezvous: Weak<Rendezvous>,
    kv: Weak<Kv>,
}

impl Holdings {
    /// How many there are of each thing; nothing of a base that is gone.
    #[must_use]
    pub fn counts(&self) -> Vec<(&'static str, usize)> {
        let (Some(rendezvous), Some(kv)) = (self.rendezvous.upgrade(), self.kv.upgrade()) else {
            return Vec::new();
        };
        vec![
            ("places at the rendezvous", rendezvous.sessions()),
            ("waiting drafters", rendezvous.waiting()),
            ("KV leases", kv.leases()),
            ("KV readers", kv.readers()),
            ("KV pulls", kv.pulls()),
        ]
    }
}

#[tonic::async_trait]
impl Base for BaseService {
    type ServeStream = ReceiverStream<Result<v1::ServeFrame, Status>>;
    type HandoffStream = ReceiverStream<Result<v1::HandoffReply, Status>>;

    async fn serve(
        &self,
        request: Request<v1::ServeRequest>,
    ) -> Result<Response<Self::ServeStream>, Status> {
        let arriving = metrics::Arriving::new();
        match self.open(request.into_inner()).await {
            Ok(frames) => {
                arriving.taken();
                Ok(Response::new(ReceiverStream::new(frames)))
            }
            Err(error) => {
                arriving.refused(error.code.code());
                Err(error.into())
            }
        }
    }

    async fn handoff(
        &self,
        request: Request<Streaming<v1::HandoffFrame>>,
    ) -> Result<Response<Self::HandoffStream>, Status> {
        let mut frames = request.into_inner();
        let patience = self.shared.handoff_timeout;
        let opening = tokio::time::timeout(patience, frames.message()).await;
        let first = opening
            .map_err(|_| Error::new(ErrorCode::DeadlineExceeded, "the handoff was not opened"))??
            .ok_or_else(|| Error::new(ErrorCode::Protocol, "expected an opening frame"))?;
        let id = RequestId::new(&first.request_id).map_err(Error::from)?;
        let epoch = Epoch::new(first.epoch).map_err(Error::from)?;
        let Some(handoff_frame::Event::Open(open)) = first.event else {
            return Err(Error::new(ErrorCode::Protocol, "expected an opening frame").into());
        };
        let opening = rendezvous::Handoff {
            serve_epoch: Epoch::new(open.serve_epoch).map_err(Error::from)?,
            epoch,
            encoding: open.encoding(),
            tokenizer_fingerprint: open.tokenizer_fingerprint,
        };
        let mut link = self.rendezvous.join(&id, &opening, patience).await?;
        let position = match (&mut link.welcome).await {
            Ok(welcome) => Some(welcome?),
            Err(_) => None,
        };
        let (replies, receiver) = mpsc::channel(REPLY_QUEUE);
        let gate = DraftGate::new(id, epoch, position.unwrap_or(0));
        let handoff = Handoff { gate, frames, replies, _held: Held::new(HANDOFFS) };
        if position.is_some() {
            tokio::spawn(handoff.run(link));
        } else {
            handoff.stop(stopped(&mut link.stop).await).await;
        }
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn prefetch(
        &self,
        request: Request<v1::PrefetchRequest>,
    ) -> Result<Response<v1::PrefetchReply>, Status> {
        let v1::PrefetchRequest { request_id, kv, .. } = request.into_inner();
        let id = RequestId::new(&request_id).map_err(Error::from)?;
        if let Some(source) = kv.filter(|_| !self.shared.draining.is_cancelled())
            && let Some(prefetch) = self.shared.kv.prefetch(&id, &source)
        {
            // A caller that hangs up before the request has come gives it up.
            tokio::select! {
                () = prefetch.over() => {}
                () = self.shared.draining.cancelled() => {}
            }
        }
        Ok(Response::new(v1::PrefetchReply {}))
    }
}

/// One draft's way from the wire to its session.
struct Handoff {
    gate: DraftGate,
    frames: Streaming<v1::HandoffFrame>,
    replies: mpsc::Sender<Result<v1::HandoffReply, Status>>,
    _held: Held,
}

impl Handoff {
    async fn run(mut self, mut link: Link) {
        let drafted = self.gate.position();
        self.reply(handoff_reply::Event::Accepted(v1::HandoffAccepted { drafted })).await;
        loop {
            tokio::select! {
                biased;
                reason = stopped(&mut link.stop) => return self.stop(reason).await,
                () = self.replies.closed() => return,
                // A broken stream drops the link: the session sees that its drafter is lost.
                frame = self.frames.message() => match frame {
                    Ok(Some(frame)) => match self.check(frame) {
                        Ok(None) => {}
                        Ok(Some(input)) => {
                            let ended = input == DraftInput::Ended;
                            if link.input.send(input).await.is_err() {
                                return self.stop(stopped(&mut link.stop).await).await;
                            }
                            if ended {
                                return;
                            }
                        }
                        Err(error) => {
                            let _ = self.replies.send(Err(error.into())).await;
                            return;
                        }
                    },
                    Ok(None) | Err(_) => return,
                },
            }
        }
    }

    fn check(&mut self, frame: v1::HandoffFrame) -> Result<Option<DraftInput>, Error> {
        let before = self.gate.position();
        let input = self.gate.admit(frame)?;
        metrics::draft_received(self.gate.position() - before);
        Ok(input)
    }

    async fn stop(&self, reason: DraftEnd) {
        self.reply(handoff_reply::Event::Stop(v1::HandoffStop { reason: reason.into() })).await;
    }

    async fn reply(&self, event: handoff_reply::Event) {
        let reply = v1::HandoffReply {
            request_id: self.gate.id().to_string(),
            epoch: self.gate.epoch().get(),
            position: self.gate.position(),
            event: Some(event),
        };
        // A drafter that hung up needs no reply.
        let _ = self.replies.send(Ok(reply)).await;
    }
}

async fn stopped(stop: &mut watch::Receiver<Option<DraftEnd>>) -> DraftEnd {
    match stop.wait_for(Option::is_some).await {
        Ok(reason) => reason.unwrap_or(DraftEnd::Aborted),
        // The session ended without a decision.
        Err(_) => DraftEnd::Aborted,
    }
}
