//! The base-node's configuration.

use std::net::SocketAddr;
use std::time::Duration;

use clap::Parser;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use headstart_cluster::BaseRole;
use headstart_handoff::Times;
use headstart_service::config::{CommonOptions, ConfigError, duration};
use headstart_service::node::NodeError;
use headstart_service::options::{BasePromptChoice, ModelOptions, NodeOptions};
use headstart_service::server::{ServeError, bind};

use crate::kv::KvOptions;

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
    /// What this base does of an answer: all of it, only read prompts and drafts, or only write on
    #[arg(long, env = "HEADSTART_ROLE", value_name = "ROLE", default_value = "unified", value_parser = role())]
    pub role: BaseRole,
    /// Where other bases fetch the KV of answers that move; port 0 takes any free port
    #[arg(
        long,
        env = "HEADSTART_KV_LISTEN",
        value_name = "ADDRESS",
        default_value = "127.0.0.1:0"
    )]
    pub kv_listen: SocketAddr,
    /// How others reach the KV listener, host:port [default: where it listens]
    #[arg(long, env = "HEADSTART_KV_ADVERTISE", value_name = "HOST:PORT")]
    pub kv_advertise: Option<String>,
    /// How long the KV of an answer that moves is kept for the base that goes on with it
    #[arg(long, env = "HEADSTART_KV_LEASE", value_name = "TIME", default_value = "10s", value_parser = duration)]
    pub kv_lease: Duration,
}

fn role() -> impl TypedValueParser<Value = BaseRole> {
    PossibleValuesParser::new(["unified", "score", "decode"])
        .map(|role| role.parse().unwrap_or_default())
}

impl Config {
    /// Listens for other bases, as the options say.
    ///
    /// # Errors
    /// When the address is in use, or nobody could reach it.
    pub async fn kv(&self) -> Result<KvOptions, NodeError> {
        let listener = bind("kv-listen", self.kv_listen).await?;
        let local = listener.local_addr();
        let local = local.map_err(|error| ServeError::Failed { cause: error.to_string() })?;
        let address = match &self.kv_advertise {
            Some(address) => address.clone(),
            None if local.ip().is_unspecified() => {
                let message =
                    format!("expected host:port because --kv-listen is {}", self.kv_listen);
                return Err(ConfigError::Invalid { field: "kv-advertise", message }.into());
            }
            None => local.to_string(),
        };
        let times = Times { lease: self.kv_lease, ..Times::default() };
        let (role, listener) = (self.role, Some(listener.into()));
        Ok(KvOptions { role, listener, address, times, ..KvOptions::default() })
    }
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
