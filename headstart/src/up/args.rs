//! What `headstart up` can be told: flags over `HEADSTART_*` variables over a TOML file over the
//! defaults.

use clap::Parser;
use headstart_engine::EngineOptions;
use headstart_engine::executor::device::DeviceChoice;
use headstart_engine::model::WeightDtype;
use headstart_router::{RouterFlags, RouterOptions};
use headstart_service::config::{self, CommonOptions, ConfigError};
use headstart_service::options::BasePromptChoice;
use std::net::SocketAddr;

use crate::models::Spec;

/// Nodes of a tier in one process.
const NODES_MAX: u32 = 64;
/// KV tokens of a node that nobody asked for explicitly are no more than these.
const KV_TOKENS_DEFAULT_MAX: usize = 32 << 10;

/// Run a whole cluster on this machine: drafters, bases and the router.
#[derive(Parser, Clone, Debug)]
#[command(
    name = "headstart up",
    version,
    after_help = "\
Examples:
  headstart up --drafter smollm2 --base qwen2.5-coder
  headstart up --drafter smollm2 --base smollm2 --drafters 2 --bases 2 --window 4 --threshold 0.55
  headstart up --drafter hf:owner/small-instruct --base ./large.gguf --http 0.0.0.0:8080
  headstart up --config headstart.toml

A model SPEC is a path (a .gguf file, or a directory in Hugging Face layout), a short name (see
`headstart models list`), or hf:owner/repo[@revision][:file.gguf].

Every option can stand in a TOML file (`draft-tokens-max = 256`) or in the environment
(`HEADSTART_DRAFT_TOKENS_MAX=256`); a flag wins over the environment, the environment over the file.

The cluster runs until Ctrl-C; then it takes no new requests, finishes those that run, and exits."
)]
pub struct UpOptions {
    /// The model that begins answers
    #[arg(long, value_name = "SPEC", env = "HEADSTART_DRAFTER", help_heading = "Models")]
    pub drafter: Spec,
    /// The model that takes over
    #[arg(long, value_name = "SPEC", env = "HEADSTART_BASE", help_heading = "Models")]
    pub base: Spec,
    /// The name clients use for the drafter [default: from its SPEC]
    #[arg(long, value_name = "NAME", env = "HEADSTART_DRAFTER_NAME", value_parser = model_name,
        help_heading = "Models")]
    pub drafter_name: Option<String>,
    /// The name clients use for the base [default: from its SPEC]
    #[arg(long, value_name = "NAME", env = "HEADSTART_BASE_NAME", value_parser = model_name,
        help_heading = "Models")]
    pub base_name: Option<String>,
    /// How weights are kept: auto (as the file has them), f32 or bf16
    #[arg(long, value_name = "DTYPE", env = "HEADSTART_DTYPE", default_value_t = WeightDtype::Auto,
        help_heading = "Models")]
    pub dtype: WeightDtype,
    /// Where models run: auto (a GPU if there is one), cpu or cuda
    #[arg(long, value_name = "DEVICE", env = "HEADSTART_DEVICE",
        default_value_t = DeviceChoice::Auto, help_heading = "Models")]
    pub device: DeviceChoice,
    /// The prompt that a base reads
    #[arg(long, value_enum, env = "HEADSTART_BASE_PROMPT", default_value_t = BasePromptChoice::Plain,
        help_heading = "Models")]
    pub base_prompt: BasePromptChoice,

    /// Drafter-nodes; they share one copy of the weights
    #[arg(long, value_name = "N", env = "HEADSTART_DRAFTERS", default_value_t = 1,
        value_parser = nodes(), help_heading = "Nodes")]
    pub drafters: u32,
    /// Base-nodes; they share one copy of the weights
    #[arg(long, value_name = "N", env = "HEADSTART_BASES", default_value_t = 1,
        value_parser = nodes(), help_heading = "Nodes")]
    pub bases: u32,
    /// Threads that compute, for each node [default: all cores]
    #[arg(long, value_name = "N", env = "HEADSTART_THREADS", value_parser = positive,
        help_heading = "Nodes")]
    pub threads: Option<usize>,
    /// Tensor-parallel ranks of a base, each with its part of the weights and the KV cache, and a
    /// GPU or its part of the threads
    #[arg(long, value_name = "N", env = "HEADSTART_TP", value_parser = positive,
        default_value_t = 1, help_heading = "Nodes")]
    pub tp: usize,
    /// Requests that a node runs at once
    #[arg(long, value_name = "N", env = "HEADSTART_SLOTS", value_parser = positive,
        default_value_t = 16, help_heading = "Nodes")]
    pub slots: usize,
    /// Tokens that a node's KV cache holds [default: the slots' contexts, up to 32768]
    #[arg(long, value_name = "N", env = "HEADSTART_KV_TOKENS", value_parser = positive,
        help_heading = "Nodes")]
    pub kv_tokens: Option<usize>,
    /// Tokens that a node computes in one step at most
    #[arg(long, value_name = "N", env = "HEADSTART_STEP_TOKENS", value_parser = positive,
        default_value_t = EngineOptions::default().step_tokens, help_heading = "Nodes")]
    pub step_tokens: usize,

    /// Where HTTP is served
    #[arg(
        long,
        value_name = "HOST:PORT",
        env = "HEADSTART_HTTP",
        default_value = "127.0.0.1:8080",
        help_heading = "Doors"
    )]
    pub http: SocketAddr,
    /// Where gRPC is served
    #[arg(
        long,
        value_name = "HOST:PORT",
        env = "HEADSTART_GRPC",
        default_value = "127.0.0.1:50051",
        help_heading = "Doors"
    )]
    pub grpc: SocketAddr,
    /// etcd endpoints; membership is kept in memory without them
    #[arg(
        long,
        value_name = "ENDPOINTS",
        env = "HEADSTART_ETCD",
        value_delimiter = ',',
        help_heading = "Doors"
    )]
    pub etcd: Vec<String>,
    /// The cluster's name in etcd
    #[arg(
        long,
        value_name = "NAME",
        env = "HEADSTART_CLUSTER",
        default_value = "default",
        help_heading = "Doors"
    )]
    pub cluster: String,
    /// What the router does; its drain timeout is the cluster's.
    #[command(flatten)]
    pub router: RouterFlags,
    /// The options of every binary
    #[command(flatten)]
    pub common: CommonOptions,
}

impl UpOptions {
    /// The router's options, checked.
    ///
    /// # Errors
    /// A sentence that names the field.
    pub fn router(&self) -> Result<RouterOptions, String> {
        self.router.options().map_err(|error| error.to_string())
    }

    /// Tokens that a node's KV cache holds, for a model with this context.
    #[must_use]
    pub fn kv_tokens(&self, context_length: usize) -> usize {
        let wanted = context_length.saturating_mul(self.slots);
        self.kv_tokens.unwrap_or_else(|| wanted.min(KV_TOKENS_DEFAULT_MAX))
    }

    /// Threads of each node.
    #[must_use]
    pub fn threads(&self) -> usize {
        let cores = || std::thread::available_parallelism().map_or(1, usize::from);
        self.threads.unwrap_or_else(cores)
    }
}

/// Reads the options from `args` (without the program's name), the environment and the file.
///
/// # Errors
/// What is wrong, by name.
pub fn parse(args: &[std::ffi::OsString]) -> Result<UpOptions, ConfigError> {
    let name = std::ffi::OsString::from("headstart up");
    let options: UpOptions = config::parse_from(std::iter::once(&name).chain(args))?;
    Ok(options)
}

fn nodes() -> clap::builder::RangedI64ValueParser<u32> {
    clap::value_parser!(u32).range(1..=i64::from(NODES_MAX))
}

fn positive(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(number) if number > 0 => Ok(number),
        _ => Err("expected an integer of at least 1".to_owned()),
    }
}

fn model_name(text: &str) -> Result<String, String> {
    if text.is_empty() || text.contains(['@', ' ']) {
        return Err("expected a name without `@` and spaces".to_owned());
    }
    Ok(text.to_owned())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use headstart_router::{Encoding, OnNoDrafter};

    use super::*;

    fn parsed(flags: &[&str]) -> Result<UpOptions, String> {
        let models = ["--drafter", "smollm2", "--base", "./big"];
        let args: Vec<_> = models.iter().chain(flags).map(std::ffi::OsString::from).collect();
        parse(&args).map_err(|error| error.to_string())
    }

    #[test]
    fn the_defaults_are_the_routers_and_the_nodes() {
        let options = parsed(&[]).unwrap();
        assert_eq!(options.router().unwrap(), RouterOptions::default());
        assert_eq!((options.drafters, options.bases), (1, 1));
        assert_eq!(options.http.to_string(), "127.0.0.1:8080");
        assert_eq!(options.kv_tokens(512), 16 * 512);
        assert_eq!(options.kv_tokens(1 << 17), KV_TOKENS_DEFAULT_MAX);
    }

    #[test]
    fn flags_reach_the_router() {
        let flags = ["--window=4", "--threshold=0.55", "--encoding=text", "--drain-timeout=2m"];
        let options = parsed(&[&flags[..], &["--on-no-drafter=base_only"]].concat()).unwrap();
        let router = options.router().unwrap();
        assert_eq!((router.window, router.threshold), (4, 0.55));
        assert_eq!(router.encoding, Encoding::Text);
        assert_eq!(router.on_no_drafter, OnNoDrafter::BaseOnly);
        assert_eq!(router.drain_timeout, Duration::from_secs(120));
        let keys = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(&keys, "alice=a-long-and-secret-key\n").unwrap();
        let keys = format!("--api-keys={}", keys.path().display());
        let flags = [
            "--queue-requests-max=7",
            "--queue-tokens-max=9000",
            "--queue-timeout=3s",
            "--reader-bytes-max=8192",
            "--write-timeout=5s",
            "--connections-max=11",
            "--body-bytes-max=2048",
            &keys,
        ];
        let router = parsed(&flags).unwrap().router().unwrap();
        assert_eq!((router.queue_requests_max, router.queue_tokens_max), (7, 9000));
        assert_eq!(router.queue_timeout, Duration::from_secs(3));
        assert_eq!(router.write_timeout, Duration::from_secs(5));
        assert_eq!((router.reader_bytes_max, router.body_bytes_max), (8192, 2048));
        assert!(router.connections_max == 11 && router.api_keys.is_some());
    }

    #[test]
    fn a_file_may_hold_everything() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let text = "drafter = 'smollm2'\nbase = 'qwen2.5-coder'\nwindow = 3\netcd = ['a:1', 'b:2']";
        std::fs::write(&file, text).unwrap();
        let config = format!("--config={}", file.path().display());
        let options = parse(&[config.into(), "--window=5".into()]).unwrap();
        assert_eq!(options.base.to_string(), "qwen2.5-coder");
        assert_eq!((options.router.window, options.etcd.len()), (5, 2));
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (flags, field, expected) in [
            (&["--drafters=0"][..], "--drafters", "0 is not in 1..=64"),
            (&["--threads=0"], "--threads", "at least 1"),
            (&["--base-name=a@b"], "--base-name", "without `@`"),
            (&["--dtype=int3"], "--dtype", "f32"),
            (&["--http=nowhere"], "--http", "invalid"),
            (&["--encoding=runes"], "--encoding", "possible values: auto, ids, text"),
        ] {
            let message = parsed(flags).unwrap_err();
            assert!(message.contains(field) && message.contains(expected), "{flags:?}: {message}");
        }
        let message = parsed(&["--threshold=1.5"]).unwrap().router().unwrap_err();
        assert!(message.contains("threshold") && message.contains("1.5"), "{message}");
        let message = parsed(&["--api-keys=/nowhere/keys"]).unwrap().router().unwrap_err();
        assert!(message.contains("/nowhere/keys"), "{message}");
        let message = parse(&["--drafter=smollm3".into()]).unwrap_err().to_string();
        assert!(message.contains("short name (smollm2, qwen2.5-coder)"), "{message}");
        let message = parse(&[]).unwrap_err().to_string();
        assert!(message.contains("--drafter") && message.contains("--base"), "{message}");
    }
}
