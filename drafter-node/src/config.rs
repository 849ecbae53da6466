//! The drafter-node's configuration.

use std::time::Duration;

use clap::Parser;
use headstart_service::config::{CommonOptions, duration};
use headstart_service::options::{ModelOptions, NodeOptions};

/// A Headstart drafter: runs a small aligned model and writes the beginning of every answer.
///
/// Every option can also be set by its environment variable or in the file that --config names;
/// flags win over the environment, and that over the file.
#[derive(Clone, Debug, Parser)]
#[command(name = "headstart-drafter", version)]
#[command(after_help = "\
Example:
  headstart-drafter --model SmolLM2-135M-Instruct.Q4_1.gguf --name smollm2 --etcd 127.0.0.1:2379")]
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
    /// How long a base may take to accept a draft
    #[arg(long, env = "HEADSTART_HANDOFF_TIMEOUT", value_name = "TIME", default_value = "10s", value_parser = duration)]
    pub handoff_timeout: Duration,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;
    use headstart_service::config::parse_from;

    #[test]
    fn every_option_has_its_own_environment_variable() {
        let command = Config::command();
        let arguments = command.get_arguments().filter(|arg| arg.get_long().is_some());
        let mut seen = std::collections::BTreeSet::new();
        for arg in arguments.filter(|arg| !matches!(arg.get_id().as_str(), "help" | "version")) {
            let env = arg.get_env().expect("an environment variable").to_str().unwrap();
            let long = arg.get_long().unwrap().to_uppercase().replace('-', "_");
            assert_eq!(env, format!("HEADSTART_{long}"));
            assert!(seen.insert(long));
        }
    }

    #[test]
    fn defaults_and_bad_values() {
        let config: Config = parse_from(["x", "--model", "m.gguf"]).unwrap();
        assert_eq!(config.model.name().unwrap(), "m");
        assert_eq!(config.handoff_timeout, Duration::from_secs(10));
        assert_eq!(config.model.kv_tokens(2048), 32768);
        assert!(config.node.advertised("0.0.0.0:1".parse().unwrap()).is_err());
        let bad = [
            ("--slots", "0"),
            ("--dtype", "int3"),
            ("--listen", "here"),
            ("--node-id", "a b"),
            ("--drain-timeout", "soon"),
            ("--threads", "-1"),
        ];
        for (flag, value) in bad {
            let args = ["x".to_owned(), "--model=m.gguf".into(), format!("{flag}={value}")];
            let error = parse_from::<Config>(args).unwrap_err().to_string();
            assert!(error.contains(flag) && error.contains(value), "{error}");
        }
        let error = parse_from::<Config>(["x"]).unwrap_err().to_string();
        assert!(error.contains("--model <PATH>"), "{error}");
    }
}
