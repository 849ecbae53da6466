//! The commands.

use std::ffi::OsString;

use clap::{Parser, Subcommand};

use crate::bench::{self, BenchArgs};
use crate::chat::{self, ChatArgs};
use crate::demo::{self, DemoArgs};
use crate::failure::Failure;
use crate::models::command::{self as models, ModelsArgs};
use crate::up::{self, UpOptions};

/// Headstart: a small aligned drafter begins every answer, a large base takes over.
#[derive(Parser, Debug)]
#[command(name = "headstart", version)]
#[command(after_help = "\
Examples:
  headstart demo                                            see it work
  headstart up --drafter smollm2 --base qwen2.5-coder       a cluster on this machine
  headstart chat                                            talk to it
  headstart models list                                     models that are easy to have
  headstart bench engine --model smollm2                    how fast it is here
  headstart bench serve                                     how fast a running cluster is

Every command has its own --help with examples.")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    Demo(DemoArgs),
    Up(Box<UpOptions>),
    Chat(ChatArgs),
    Models(ModelsArgs),
    Bench(BenchArgs),
}

/// Runs the command that `args` (the program's name first) ask for. Help and wrong flags end the
/// process.
///
/// # Errors
/// Why it failed.
pub async fn run(args: Vec<OsString>) -> Result<(), Failure> {
    // `up` alone has a configuration file, which may hold what is otherwise required.
    if args.get(1).is_some_and(|command| command == "up") {
        let options = up::parse(&args[2..]).unwrap_or_else(|error| error.exit());
        return up::run(options).await;
    }
    match Cli::parse_from(args).command {
        Command::Demo(args) => demo::run(args).await,
        Command::Up(options) => up::run(*options).await,
        Command::Chat(args) => chat::run(args).await,
        Command::Models(args) => models::run(args).await,
        Command::Bench(args) => bench::run(args).await,
    }
}
