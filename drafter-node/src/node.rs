//! The drafter-node as a whole: from its configuration, or on an engine that already runs.

use headstart_cluster::{BaseRole, Membership, Tier};
use headstart_engine::EngineHandle;
use headstart_node::{Host, HostOptions, Tiered, ranks};
use headstart_proto::v1::drafter_server::DrafterServer;
use headstart_service::net::Listener;
use headstart_service::node::{NodeError, RunningNode};
use headstart_service::server::{GrpcServer, MESSAGE_BYTES_MAX};
use headstart_text::{BasePrompt, ModelText};
use tokio_util::sync::CancellationToken;

use crate::config::Config;
use crate::metrics;
use crate::service::DrafterService;

/// Runs a drafter-node from its configuration until `shutdown` has drained it.
///
/// # Errors
/// What the node cannot start or go on without.
pub async fn run(config: Config, shutdown: CancellationToken) -> Result<(), NodeError> {
    let Config { node, model, handoff_timeout, .. } = config;
    if let Some(place) = ranks::place(&model)?.filter(|place| place.host > 0) {
        return ranks::run_follower(place, node, model, shutdown).await;
    }
    // A drafter is prompted with its own chat template.
    let base_prompt = BasePrompt::default();
    headstart_node::run(tiered(), node, model, base_prompt, handoff_timeout, shutdown).await
}

/// Starts a drafter on `engine`, whose model's text side is `text`: it serves on `listener`,
/// registers with `membership`, and drains when `shutdown` is cancelled.
///
/// # Errors
/// When the node must not register.
pub async fn start(
    options: HostOptions,
    engine: EngineHandle,
    text: &ModelText,
    membership: &dyn Membership,
    listener: impl Into<Listener>,
    shutdown: CancellationToken,
) -> Result<RunningNode, NodeError> {
    headstart_node::start(tiered(), options, engine, text, membership, listener, shutdown).await
}

fn tiered() -> Tiered {
    Tiered {
        tier: Tier::Drafter,
        base_role: BaseRole::Unified,
        kv_address: String::new(),
        services: Box::new(|server: GrpcServer, host: &Host| {
            let service = DrafterServer::new(DrafterService::new(host));
            server.add(service.max_decoding_message_size(MESSAGE_BYTES_MAX))
        }),
        describe_metrics: metrics::describe,
        engine_metrics: metrics::engine,
    }
}
