//! What every Headstart process does alike: layered configuration, logs, metrics, signals, gRPC
//! servers and channels, and the life of a node from its registration to its drain.

pub mod channel;
pub mod config;
pub mod link;
pub mod metrics;
pub mod net;
pub mod node;
pub mod node_service;
pub mod options;
pub mod server;
pub mod shutdown;
pub mod telemetry;
pub mod text_client;

use std::fmt::Display;
use std::process::ExitCode;

/// Runs a binary's `main` on a runtime of its own. An error goes to stderr as one line, and the
/// process exits with 1. What still blocks when `main` has ended is left behind.
pub fn run_main<E: Display>(main: impl Future<Output = Result<(), E>>) -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return exit_code(Err(format!("start the runtime: {error}"))),
    };
    let code = exit_code(runtime.block_on(main));
    runtime.shutdown_background();
    code
}

/// The exit code of a result; an error goes to stderr as one line.
pub fn exit_code<E: Display>(result: Result<(), E>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
