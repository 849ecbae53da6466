//! `headstart-drafter`: one drafter-node.

use std::process::ExitCode;

use headstart_drafter_node::config::Config;
use headstart_drafter_node::node;
use headstart_service::node::NodeError;
use headstart_service::{config, run_main, shutdown, telemetry};

fn main() -> ExitCode {
    let config: Config = config::parse();
    telemetry::init(config.common.log_format);
    run_main(async {
        let shutdown = shutdown::on_signals()
            .map_err(|error| NodeError::Model(format!("install signal handlers: {error}")))?;
        match node::run(config, shutdown).await {
            Err(NodeError::Config(error)) => error.exit(),
            result => result,
        }
    })
}
