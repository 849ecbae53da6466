//! The base-node as a whole: from its configuration, or on an engine that already runs.

use std::sync::{Arc, OnceLock};

use headstart_cluster::{Membership, Tier};
use headstart_engine::EngineHandle;
use headstart_node::{Host, HostOptions, Tiered, ranks};
use headstart_proto::v1::base_server::BaseServer;
use headstart_service::net::Listener;
use headstart_service::node::{NodeError, RunningNode};
use headstart_service::server::{GrpcServer, MESSAGE_BYTES_MAX};
use headstart_text::ModelText;
use tokio_util::sync::CancellationToken;

use crate::config::Config;
use crate::kv::{Kv, KvOptions};
use crate::metrics;
use crate::service::{BaseService, Holdings};

/// Runs a base-node from its configuration until `shutdown` has drained it.
///
/// # Errors
/// What the node cannot start or go on without.
pub async fn run(config: Config, shutdown: CancellationToken) -> Result<(), NodeError> {
    if let Some(place) = ranks::place(&config.model)?.filter(|place| place.host > 0) {
        return ranks::run_follower(place, config.node, config.model, shutdown).await;
    }
    let kv = config.kv().await?;
    let Config { node, model, base_prompt, handoff_timeout, .. } = config;
    let base_prompt = base_prompt.into();
    headstart_node::run(tiered(kv), node, model, base_prompt, handoff_timeout, shutdown).await
}

/// Starts a base on `engine`, whose model's text side is `text`: it serves on `listener`,
/// registers with `membership`, hands KV over as `kv` says, and drains when `shutdown` is cancelled.
///
/// # Errors
/// When the node must not register.
pub async fn start(
    kv: KvOptions,
    options: HostOptions,
    engine: EngineHandle,
    text: &ModelText,
    membership: &dyn Membership,
    listener: impl Into<Listener>,
    shutdown: CancellationToken,
) -> Result<RunningNode, NodeError> {
    let started = start_watched(kv, options, engine, text, membership, listener, shutdown);
    Ok(started.await?.0)
}

/// As [`start`]; what the base holds can be looked at.
///
/// # Errors
/// When the node must not register.
pub async fn start_watched(
    kv: KvOptions,
    options: HostOptions,
    engine: EngineHandle,
    text: &ModelText,
    membership: &dyn Membership,
    listener: impl Into<Listener>,
    shutdown: CancellationToken,
) -> Result<(RunningNode, Holdings), NodeError> {
    let (tiered, holdings) = watched(kv);
    let node = headstart_node::start(tiered, options, engine, text, membership, listener, shutdown)
        .await?;
    let holdings = holdings.get().cloned();
    Ok((node, holdings.unwrap_or_else(|| unreachable!("a node that runs has its services"))))
}

fn tiered(kv: KvOptions) -> Tiered {
    watched(kv).0
}

/// The base's own parts, and what it will hold once they are put together.
fn watched(kv: KvOptions) -> (Tiered, Arc<OnceLock<Holdings>>) {
    let holdings = Arc::new(OnceLock::new());
    let told = Arc::clone(&holdings);
    let (base_role, kv_address) = (kv.role, kv.address.clone());
    let tiered = Tiered {
        tier: Tier::Base,
        base_role,
        kv_address,
        services: Box::new(move |server: GrpcServer, host: &Host| {
            let kv = Kv::new(&host.engine, kv);
            let service = BaseService::with_kv(host, kv);
            let _ = told.set(service.holdings());
            let service = BaseServer::new(service);
            server.add(service.max_decoding_message_size(MESSAGE_BYTES_MAX))
        }),
        describe_metrics: metrics::describe,
        engine_metrics: metrics::engine,
    };
    (tiered, holdings)
}
