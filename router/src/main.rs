//! `headstart-router`: the front door of a cluster.

use std::process::ExitCode;
use std::sync::Arc;

use headstart_cluster::Etcd;
use headstart_router::RouterConfig;
use headstart_service::server::bind;
use headstart_service::{config, run_main, shutdown, telemetry};

/// A request takes thousands of small pieces of memory; the system's allocator was a quarter of the
/// time.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let config: RouterConfig = config::parse();
    let options = config.options().unwrap_or_else(|error| error.exit());
    telemetry::init(config.common.log_format);
    run_main(async move {
        let fail = |error: &dyn std::fmt::Display| error.to_string();
        let shutdown = shutdown::on_signals().map_err(|error| fail(&error))?;
        let http = bind("http", config.http).await.map_err(|error| fail(&error))?;
        let grpc = bind("grpc", config.grpc).await.map_err(|error| fail(&error))?;
        let etcd = tokio::select! {
            etcd = Etcd::connect(&config.etcd, &config.cluster, config.etcd_timeout) => etcd,
            () = shutdown.cancelled() => return Ok(()),
        };
        let etcd = etcd.map_err(|error| fail(&error))?;
        let router = headstart_router::start(options, Arc::new(etcd), http, grpc, shutdown)
            .await
            .map_err(|error| fail(&error))?;
        tracing::info!(http = %router.http_addr(), grpc = %router.grpc_addr(), "ready to serve");
        router.wait().await.map_err(|error| fail(&error))
    })
}
