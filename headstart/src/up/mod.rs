//! `headstart up`: a whole cluster in one process, over loopback.

mod args;
mod cluster;
mod load;

pub use args::{UpOptions, parse};
pub use cluster::Cluster;

use headstart_service::shutdown::on_signals;
use headstart_service::telemetry;

use crate::failure::Failure;

/// Runs the command: serves until the first SIGINT or SIGTERM, then drains.
///
/// # Errors
/// When a model cannot be had, an address is in use, or a part of the cluster fails.
pub async fn run(options: UpOptions) -> Result<(), Failure> {
    telemetry::init(options.common.log_format);
    let signals = on_signals().map_err(|error| Failure::Failed(error.to_string()))?;
    let mut cluster = tokio::select! {
        cluster = Cluster::start(&options) => cluster?,
        () = signals.cancelled() => {
            return Err(Failure::Interrupted("interrupted before the cluster was ready".to_owned()));
        }
    };
    println!("{}", cluster.ready_line());
    let failure = tokio::select! {
        () = signals.cancelled() => None,
        failure = cluster.failed() => Some(failure),
    };
    let drained = cluster.stop().await;
    failure.map_or(drained, Err)
}
