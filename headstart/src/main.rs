//! The command line of Headstart.

use std::process::ExitCode;
use std::time::Duration;

use headstart::cli;

/// What still runs on other threads after a command (a load that was interrupted) has so long.
const LEAVE_WITHIN: Duration = Duration::from_millis(100);

/// A request takes thousands of small pieces of memory; the system's allocator was a quarter of a
/// router's time.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("error: cannot start the runtime: {error}");
            return ExitCode::FAILURE;
        }
    };
    let outcome = runtime.block_on(cli::run(std::env::args_os().collect()));
    runtime.shutdown_timeout(LEAVE_WITHIN);
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            anstream::eprintln!("error: {}", failure.message());
            failure.exit_code()
        }
    }
}
