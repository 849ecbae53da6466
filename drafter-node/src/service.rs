//! The `Drafter` service: each call starts a [`Draft`].

use std::sync::Arc;
use std::time::Duration;

use headstart_engine::EngineHandle;
use headstart_node::Host;
use headstart_node::convert::refused;
use headstart_proto::v1::{self, DraftEncoding, drafter_server::Drafter};
use headstart_proto::{Error, ErrorCode, NodeId};
use headstart_text::{Detokenizer, Tokenizer};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::{Request, Response, Status};

use crate::bases::Bases;
use crate::convert::Job;
use crate::draft::Draft;
use crate::metrics;
use crate::script::Script;

/// Words that wait for the router at most; tokens beyond gather in the next one.
const PROGRESS_QUEUE: usize = 2;
/// How long a connection to a base may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// See the [module](self).
pub struct DrafterService {
    engine: EngineHandle,
    tokenizer: Tokenizer,
    stop_tokens: Arc<[u32]>,
    node_id: NodeId,
    handoff_timeout: Duration,
    bases: Bases,
    /// Cancelled when the node takes no new drafts.
    draining: CancellationToken,
    drafts: TaskTracker,
}

impl DrafterService {
    /// A service on `host`.
    #[must_use]
    pub fn new(host: &Host) -> Self {
        Self {
            engine: host.engine.clone(),
            tokenizer: host.text.tokenizer().clone(),
            stop_tokens: host.text.stop_tokens().into(),
            node_id: host.node_id.clone(),
            handoff_timeout: host.handoff_timeout,
            bases: Bases::new(host.dialer.clone(), CONNECT_TIMEOUT, host.keep_alive),
            draining: host.draining.clone(),
            drafts: host.sessions.clone(),
        }
    }

    fn start(
        &self,
        request: v1::DraftRequest,
    ) -> Result<mpsc::Receiver<Result<v1::DraftFrame, Status>>, Error> {
        if self.draining.is_cancelled() {
            return Err(Error::new(ErrorCode::Draining, "the drafter is draining"));
        }
        let job = Job::new(request, self.engine.limits())?;
        let base = self.bases.client(&job.base_address)?;
        let generation = match job.is_whole() {
            true => None,
            false => {
                Some(self.engine.submit(job.engine_request(&self.stop_tokens)).map_err(refused)?)
            }
        };
        let as_text = job.encoding == DraftEncoding::Text;
        let (progress, receiver) = mpsc::channel(PROGRESS_QUEUE);
        let script = Script::new(as_text.then(|| Detokenizer::new(&self.tokenizer)));
        let draft = Draft {
            generation,
            script,
            open: v1::HandoffOpen {
                drafter_id: self.node_id.to_string(),
                tokenizer_fingerprint: self.tokenizer.fingerprint().to_string(),
                encoding: job.encoding.into(),
                serve_epoch: job.serve_epoch.get(),
            },
            progress,
            handoff_timeout: self.handoff_timeout,
            draining: self.draining.clone(),
            job,
        };
        self.drafts.spawn(draft.run(base));
        Ok(receiver)
    }
}

#[tonic::async_trait]
impl Drafter for DrafterService {
    type DraftStream = ReceiverStream<Result<v1::DraftFrame, Status>>;

    async fn draft(
        &self,
        request: Request<v1::DraftRequest>,
    ) -> Result<Response<Self::DraftStream>, Status> {
        metrics::request_started();
        let progress = self.start(request.into_inner()).inspect_err(|error| {
            metrics::request_ended(error.code.code());
        })?;
        Ok(Response::new(ReceiverStream::new(progress)))
    }
}
