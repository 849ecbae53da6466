//! `headstart models`.

use std::fmt::Write;
use std::path::Path;

use clap::{Args, Subcommand};

use crate::failure::Failure;
use crate::models::cache::{self, Check};
use crate::models::catalogue::CATALOGUE;
use crate::models::packages::is_cached;
use crate::models::progress::{Show, human_bytes};
use crate::models::{Cancel, Local, Spec, fetch};

/// Models on this machine.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  headstart models list
  headstart models pull smollm2 qwen2.5-coder
  headstart models pull hf:owner/repo:model-q4_k_m.gguf

`pull` prints where the model lies, so that it can be given on:
  headstart-drafter --model \"$(headstart models pull smollm2)\"")]
pub struct ModelsArgs {
    #[command(subcommand)]
    command: ModelsCommand,
}

#[derive(Subcommand, Clone, Debug)]
enum ModelsCommand {
    /// The short names, and which of them are on this machine
    List,
    /// Fetch models, check them, and print where they lie
    Pull {
        /// A short name, or hf:owner/repo[@revision][:file]
        #[arg(required = true, value_name = "NAME")]
        names: Vec<String>,
    },
}

/// Runs the command.
///
/// # Errors
/// When there is no cache folder, or a model cannot be had.
pub async fn run(args: ModelsArgs) -> Result<(), Failure> {
    match args.command {
        ModelsCommand::List => {
            let folder = cache::folder()?;
            print!("{}", table(&folder));
            println!(
                "\nCached in {}. Fetch one with `headstart models pull NAME`.",
                folder.display()
            );
            Ok(())
        }
        ModelsCommand::Pull { names } => {
            let specs: Vec<Spec> = names.iter().map(|n| n.parse()).collect::<Result<_, _>>()?;
            for local in fetch_all(specs, Check::Sha256).await? {
                println!("{}", local.path.display());
            }
            Ok(())
        }
    }
}

/// Fetches models one after the other, off the async threads; an interrupt tidies up first.
///
/// # Errors
/// The first model that cannot be had, or the interrupt.
pub async fn fetch_all(specs: Vec<Spec>, check: Check) -> Result<Vec<Local>, Failure> {
    let cancel = Cancel::default();
    let flag = cancel.clone();
    let mut work = tokio::task::spawn_blocking(move || {
        let fetch_one = |spec: &Spec| fetch(spec, check, Show::Progress, &flag);
        specs.iter().map(fetch_one).collect::<Result<Vec<_>, _>>()
    });
    let joined = tokio::select! {
        joined = &mut work => joined,
        _ = tokio::signal::ctrl_c() => {
            cancel.cancel();
            work.await
        }
    };
    match joined {
        Ok(fetched) => Ok(fetched?),
        Err(error) => Err(Failure::Failed(format!("fetching failed: {error}"))),
    }
}

fn table(folder: &Path) -> String {
    let mut text = format!("{:<15}{:<9}{:<8}{}\n", "NAME", "SIZE", "CACHED", "WHAT");
    for entry in &CATALOGUE {
        let cached = if is_cached(entry, folder) { "yes" } else { "no" };
        let size = human_bytes(entry.size_bytes);
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{:<15}{size:<9}{cached:<8}{}", entry.name, entry.what);
        let _ = writeln!(text, "{:<32}licence: {}", "", entry.licence);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_names_every_model() {
        let folder = tempfile::tempdir().unwrap();
        let text = table(folder.path());
        for entry in &CATALOGUE {
            assert!(text.contains(entry.name) && text.contains(entry.licence), "{text}");
        }
        assert_eq!(text.matches(" no ").count(), 2, "{text}");
    }
}
