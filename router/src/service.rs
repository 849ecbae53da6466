//! The gRPC door.

use std::collections::VecDeque;
use std::sync::Arc;

use futures::stream::{self, BoxStream, StreamExt};
use headstart_proto::v1::router_server::Router;
use headstart_proto::{Error, v1};
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status};

use crate::admission::Caller;
use crate::ask::PRIORITY_HEADER;
use crate::convert::FrameWriter;
use crate::generate::{Core, Generation};
use crate::outbox::Event;

/// The `Router` service.
pub(crate) struct RouterService {
    core: Arc<Core>,
}

impl RouterService {
    pub(crate) fn new(core: Arc<Core>) -> Self {
        Self { core }
    }

    fn caller(&self, metadata: &MetadataMap) -> Result<Caller, Error> {
        let text = |name| metadata.get(name).and_then(|value| value.to_str().ok());
        self.core.caller(text("authorization"), text(PRIORITY_HEADER))
    }
}

/// A call that is being answered. tonic drops it when the caller is gone, and the request with it.
struct Live {
    generation: Generation,
    writer: FrameWriter,
    waiting: VecDeque<Event>,
    failed: bool,
}

impl Live {
    async fn next(mut self) -> Option<(Result<v1::GenerateFrame, Status>, Self)> {
        if self.failed {
            return None;
        }
        if self.waiting.is_empty() {
            self.waiting = self.generation.recv().await?;
        }
        let frame = self.writer.write(self.waiting.pop_front()?);
        self.failed = frame.is_err();
        Some((frame.map_err(Status::from), self))
    }
}

#[tonic::async_trait]
impl Router for RouterService {
    type GenerateStream = BoxStream<'static, Result<v1::GenerateFrame, Status>>;

    async fn generate(
        &self,
        request: Request<v1::GenerateRequest>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        let caller = self.caller(request.metadata());
        let parsed = caller.and_then(|caller| Ok((request.into_inner().try_into()?, caller)));
        let (ask, caller) = parsed.inspect_err(|error: &Error| {
            self.core.metrics.ended(Some(error.code));
        })?;
        let generation = self.core.generate(ask, caller).await?.spawned();
        let (writer, first) = FrameWriter::new(&generation.head);
        let live = Live { generation, writer, waiting: VecDeque::new(), failed: false };
        let rest = stream::unfold(live, Live::next);
        Ok(Response::new(stream::iter([Ok(first)]).chain(rest).boxed()))
    }

    async fn list_models(
        &self,
        request: Request<v1::ListModelsRequest>,
    ) -> Result<Response<v1::ListModelsResponse>, Status> {
        self.caller(request.metadata())?;
        let models = self.core.models().into_iter().map(Into::into).collect();
        Ok(Response::new(v1::ListModelsResponse { models }))
    }
}
