//! The base-node as a whole: from its configuration, or on an engine that already runs.

use std::time::Duration;

use headstart_cluster::{Membership, Tier};
use headstart_engine::EngineHandle;
use headstart_node::{Host, HostOptions, Tiered};
use headstart_proto::v1::base_server::BaseServer;
use headstart_service::node::{NodeError, RunningNode};
use headstart_service::server::{GrpcServer, MESSAGE_BYTES_MAX};
use headstart_text::ModelText;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::config::Config;
use crate::metrics;
use crate::service::BaseService;

/// Runs a base-node from its configuration until `shutdown` has drained it.
///
/// # Errors
/// What the node cannot start or go on without.
pub async fn run(config: Config, shutdown: CancellationToken) -> Result<(), NodeError> {
    headstart_node::run(tiered(config.handoff_timeout), config.node, config.model, shutdown).await
}

/// Starts a base on an engine that runs; either side of a handoff waits `handoff_timeout`.
///
/// # Errors
/// When the node cannot register.
pub async fn start(
    options: HostOptions,
    handoff_timeout: Duration,
    model: (EngineHandle, ModelText),
    membership: &dyn Membership,
    listener: TcpListener,
    shutdown: CancellationToken,
) -> Result<RunningNode, NodeError> {
    let tiered = tiered(handoff_timeout);
    headstart_node::start(tiered, options, model, membership, listener, shutdown).await
}

fn tiered(handoff_timeout: Duration) -> Tiered<impl FnOnce(GrpcServer, &Host) -> GrpcServer> {
    Tiered {
        tier: Tier::Base,
        services: move |server: GrpcServer, host: &Host| {
            let service = BaseService::new(host, handoff_timeout);
            server.add(BaseServer::new(service).max_decoding_message_size(MESSAGE_BYTES_MAX))
        },
        describe_metrics: metrics::describe,
        engine_metrics: metrics::engine,
    }
}
