//! `headstart bench`: how fast it is, measured on the spot.

mod child;
pub mod engine;
mod machine;
mod stats;
mod steps;
mod table;

use clap::{Args, Subcommand};

use crate::bench::engine::EngineArgs;
use crate::failure::Failure;

/// Measure how fast it is on this machine.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  headstart bench engine --model smollm2
  headstart bench engine --model smollm2 --against llama.cpp")]
pub struct BenchArgs {
    #[command(subcommand)]
    command: BenchCommand,
}

#[derive(Subcommand, Clone, Debug)]
enum BenchCommand {
    Engine(EngineArgs),
}

/// Runs the command.
///
/// # Errors
/// When the model cannot be had, or something that is measured fails.
pub async fn run(args: BenchArgs) -> Result<(), Failure> {
    match args.command {
        BenchCommand::Engine(args) => engine::run(args).await,
    }
}
