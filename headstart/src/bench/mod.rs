//! `headstart bench`: how fast it is, measured on the spot.

mod child;
mod client;
pub mod engine;
pub mod fidelity;
mod gpu;
pub mod handoff;
mod machine;
pub mod router;
pub mod serve;
mod stats;
mod steps;
mod table;

use clap::{Args, Subcommand};

use crate::bench::engine::EngineArgs;
use crate::bench::fidelity::FidelityArgs;
use crate::bench::handoff::HandoffArgs;
use crate::bench::router::RouterArgs;
use crate::bench::serve::ServeArgs;
use crate::failure::Failure;

/// Measure how fast it is on this machine.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  headstart bench engine --model smollm2
  headstart bench engine --model smollm2 --against llama.cpp
  headstart bench fidelity --model smollm2 --against llama.cpp
  headstart bench serve --drafter smollm2 --base qwen2.5-coder --html report.html
  headstart bench router --against vllm-router,sglang-router")]
pub struct BenchArgs {
    #[command(subcommand)]
    command: BenchCommand,
}

#[derive(Subcommand, Clone, Debug)]
enum BenchCommand {
    Engine(Box<EngineArgs>),
    Fidelity(FidelityArgs),
    Serve(Box<ServeArgs>),
    Router(RouterArgs),
    Handoff(HandoffArgs),
}

/// Runs the command.
///
/// # Errors
/// When the model cannot be had, or something that is measured fails.
pub async fn run(args: BenchArgs) -> Result<(), Failure> {
    match args.command {
        BenchCommand::Engine(args) => engine::run(*args).await,
        BenchCommand::Fidelity(args) => fidelity::run(args).await,
        BenchCommand::Serve(args) => serve::run(*args).await,
        BenchCommand::Router(args) => router::run(args).await,
        BenchCommand::Handoff(args) => handoff::run(args).await,
    }
}
