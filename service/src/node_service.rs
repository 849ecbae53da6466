//! The `Node` service: what a node tells about itself, and its tokenizer.

use std::sync::Arc;

use bytes::Bytes;
use futures::stream::{self, BoxStream, StreamExt};
use headstart_cluster::{BaseRole, NodeRecord, Tier};
use headstart_proto::v1::{self, NodeRole, node_server::Node};
use headstart_proto::{Error, ErrorCode};
use headstart_text::ModelText;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

/// Largest piece of a text bundle in one message, in bytes.
const CHUNK_BYTES_MAX: usize = 1 << 20;

/// What changes while a node runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NodeStatus {
    /// Requests it is running.
    pub slots_used: u32,
    /// Tokens the KV pool holds.
    pub kv_tokens: u64,
    /// Tokens held in the KV pages in use.
    pub kv_tokens_used: u64,
    /// It takes no new work.
    pub draining: bool,
}

/// See the [module](self).
pub struct NodeService {
    fixed: v1::InfoResponse,
    status: Arc<dyn Fn() -> NodeStatus + Send + Sync>,
    bundle: Bytes,
    shutdown: CancellationToken,
}

impl NodeService {
    /// The service of the node behind `record`, whose model computes in `dtype`. `status` is asked
    /// with every `Info`; `shutdown` is what `Drain` cancels.
    pub fn new(
        record: &NodeRecord,
        text: &ModelText,
        dtype: &str,
        status: impl Fn() -> NodeStatus + Send + Sync + 'static,
        shutdown: CancellationToken,
    ) -> Self {
        let role = match record.tier {
            Tier::Drafter => NodeRole::Drafter,
            Tier::Base => NodeRole::Base,
        };
        let base_role = match (record.tier, record.base_role) {
            (Tier::Drafter, _) => v1::BaseRole::Unspecified,
            (Tier::Base, BaseRole::Unified) => v1::BaseRole::Unified,
            (Tier::Base, BaseRole::Score) => v1::BaseRole::Score,
            (Tier::Base, BaseRole::Decode) => v1::BaseRole::Decode,
        };
        let fixed = v1::InfoResponse {
            node_id: record.node_id.to_string(),
            role: role.into(),
            model: record.model.clone(),
            tokenizer_fingerprint: record.tokenizer_fingerprint.clone(),
            text_fingerprint: record.text_fingerprint.clone(),
            chat_template: text.chat_template().map(|it| it.source().to_owned()),
            context_length: record.context_length,
            vocab_size: u32::try_from(text.tokenizer().vocab_size()).unwrap_or(u32::MAX),
            slots: record.slots,
            dtype: dtype.to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            base_role: base_role.into(),
            kv_address: record.kv_address.clone(),
            ..v1::InfoResponse::default()
        };
        Self { fixed, status: Arc::new(status), bundle: text.to_bundle().into(), shutdown }
    }
}

#[tonic::async_trait]
impl Node for NodeService {
    type GetTokenizerStream = BoxStream<'static, Result<v1::GetTokenizerChunk, Status>>;

    async fn info(
        &self,
        _request: Request<v1::InfoRequest>,
    ) -> Result<Response<v1::InfoResponse>, Status> {
        let status = (self.status)();
        Ok(Response::new(v1::InfoResponse {
            slots_used: status.slots_used,
            kv_tokens: status.kv_tokens,
            kv_tokens_used: status.kv_tokens_used,
            draining: status.draining,
            ..self.fixed.clone()
        }))
    }

    async fn get_tokenizer(
        &self,
        request: Request<v1::GetTokenizerRequest>,
    ) -> Result<Response<Self::GetTokenizerStream>, Status> {
        let asked = request.into_inner().text_fingerprint;
        if !asked.is_empty() && asked != self.fixed.text_fingerprint {
            let asked: String = asked.chars().take(64).collect();
            let has = &self.fixed.text_fingerprint;
            let message = format!("expected text_fingerprint {has}, found {asked:?}");
            let error = Error::new(ErrorCode::NotFound, message).with_field("text_fingerprint");
            return Err(error.into());
        }
        let bundle = self.bundle.clone();
        let chunks = (0..bundle.len()).step_by(CHUNK_BYTES_MAX).map(move |start| {
            let end = bundle.len().min(start + CHUNK_BYTES_MAX);
            Ok(v1::GetTokenizerChunk { data: bundle[start..end].to_vec() })
        });
        Ok(Response::new(stream::iter(chunks).boxed()))
    }

    async fn drain(
        &self,
        _request: Request<v1::DrainRequest>,
    ) -> Result<Response<v1::DrainReply>, Status> {
        self.shutdown.cancel();
        Ok(Response::new(v1::DrainReply {}))
    }
}
