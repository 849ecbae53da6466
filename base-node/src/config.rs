//! The base-node's configuration.

use std::time::Duration;

use clap::Parser;
use headstart_service::config::{CommonOptions, duration};
use headstart_service::options::{BasePromptChoice, ModelOptions, NodeOptions};

/// A Headstart base: reads drafts along, takes over from the drafter, and writes the rest.
///
/// Every option can also be set by its environment variable or in the file that --config names;
/// flags win over the environment, and that over the file.
#[derive(Clone, Debug, Parser)]
#[command(name = "headstart-base", version)]
#[command(after_help = "\
Example:
  headstart-base --model qwen2.5-coder-1.5b-instruct-q4_k_m.gguf --name qwen --etcd 127.0.0.1:2379")]
pub struct Config {
    /// How the process behaves.
    #[command(flatten)]
    pub common: CommonOptions,
    /// Where the node listens, and its cluster.
    #[command(flatten)]
    pub node: NodeOptions,
    /// What it runs.
    #[command(flatten)]
    pub model: ModelOptions,
    /// The prompt that the base reads
    #[arg(long, value_enum, env = "HEADSTART_BASE_PROMPT", default_value_t = BasePromptChoice::Plain)]
    pub base_prompt: BasePromptChoice,
    /// How long a request may wait for its drafter, or a drafter for its request
    #[arg(long, env = "HEADSTART_HANDOFF_TIMEOUT", value_name = "TIME", default_value = "10s", value_parser = duration)]
    pub handoff_timeout: Duration,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn every_option_has_its_own_environment_variable() {
        let command = Config::command();
        let options = command.get_arguments().filter(|arg| arg.get_long().is_some());
        for arg in options.filter(|arg| !matches!(arg.get_id().as_str(), "help" | "version")) {
            let long = arg.get_long().unwrap_or_default().to_uppercase().replace('-', "_");
            let expected = format!("HEADSTART_{long}");
            assert_eq!(arg.get_env().and_then(|env| env.to_str()), Some(expected.as_str()));
        }
    }
}
