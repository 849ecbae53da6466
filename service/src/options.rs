//! The options that both node kinds have.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use clap::builder::RangedU64ValueParser;
use headstart_cluster::{ClusterError, Etcd, Membership, Tier};
use headstart_proto::NodeId;
use headstart_text::BasePrompt;
use tokio::net::TcpListener;

use crate::channel::KeepAlive;
use crate::config::{ConfigError, duration};
use crate::node::{Lifetimes, random_id};
use crate::server::{ServeError, bind};

/// Where a node listens, and how it belongs to its cluster.
#[derive(Clone, Debug, Args)]
pub struct NodeOptions {
    /// This node's id in the cluster; it should survive restarts [default: the tier and a random part]
    #[arg(long, env = "HEADSTART_NODE_ID", value_name = "ID")]
    pub node_id: Option<NodeId>,
    /// Where the node's gRPC services listen; port 0 takes any free port
    #[arg(long, env = "HEADSTART_LISTEN", value_name = "ADDRESS", default_value = "127.0.0.1:0")]
    pub listen: SocketAddr,
    /// How others reach this node, host:port [default: where it listens]
    #[arg(long, env = "HEADSTART_ADVERTISE", value_name = "HOST:PORT")]
    pub advertise: Option<String>,
    /// etcd endpoints, separated by commas
    #[arg(
        long,
        env = "HEADSTART_ETCD",
        value_name = "ENDPOINTS",
        value_delimiter = ',',
        default_value = "127.0.0.1:2379"
    )]
    pub etcd: Vec<String>,
    /// How long etcd may take to answer
    #[arg(long, env = "HEADSTART_ETCD_TIMEOUT", value_name = "TIME", default_value = "5s", value_parser = duration)]
    pub etcd_timeout: Duration,
    /// The cluster's name: nodes and routers of the same name find each other
    #[arg(long, env = "HEADSTART_CLUSTER", value_name = "NAME", default_value = "default")]
    pub cluster: String,
    /// How long the node's record outlives it when it dies
    #[arg(long, env = "HEADSTART_LEASE_TTL", value_name = "TIME", default_value = "10s", value_parser = duration)]
    pub lease_ttl: Duration,
    /// How long live requests may take to end when the node is asked to stop
    #[arg(long, env = "HEADSTART_DRAIN_TIMEOUT", value_name = "TIME", default_value = "30s", value_parser = duration)]
    pub drain_timeout: Duration,
    /// A connection to a router or a base is pinged after so long without traffic
    #[arg(long, env = "HEADSTART_PING_INTERVAL", value_name = "TIME", default_value = "1s", value_parser = duration)]
    pub ping_interval: Duration,
    /// A connection is dead after so long without an answer to a ping
    #[arg(long, env = "HEADSTART_PING_TIMEOUT", value_name = "TIME", default_value = "2s", value_parser = duration)]
    pub ping_timeout: Duration,
    /// Where /metrics and /health are served over HTTP [default: nowhere]
    #[arg(long, env = "HEADSTART_METRICS", value_name = "ADDRESS")]
    pub metrics: Option<SocketAddr>,
}

impl NodeOptions {
    /// The node's id: the given one, or the tier and a random part.
    pub fn id(&self, tier: Tier) -> NodeId {
        self.node_id.clone().unwrap_or_else(|| random_id(tier))
    }

    /// Listens where the options say.
    ///
    /// # Errors
    /// [`ServeError::Bind`].
    pub async fn bind(&self) -> Result<TcpListener, ServeError> {
        bind("listen", self.listen).await
    }

    /// How others reach a node that listens on `local`.
    ///
    /// # Errors
    /// When it listens on every interface and no address was given.
    pub fn advertised(&self, local: SocketAddr) -> Result<String, ConfigError> {
        match &self.advertise {
            Some(address) => Ok(address.clone()),
            None if local.ip().is_unspecified() => Err(ConfigError::Invalid {
                field: "advertise",
                message: format!("expected host:port because --listen is {}", self.listen),
            }),
            None => Ok(local.to_string()),
        }
    }

    /// Connects to the cluster's etcd.
    ///
    /// # Errors
    /// [`ClusterError`] when it does not answer.
    pub async fn membership(&self) -> Result<Arc<dyn Membership>, ClusterError> {
        Ok(Arc::new(Etcd::connect(&self.etcd, &self.cluster, self.etcd_timeout).await?))
    }

    /// How long a record outlives its node, live work its node's last word, and a silent peer its
    /// connection.
    pub fn lifetimes(&self) -> Lifetimes {
        Lifetimes {
            lease_ttl: self.lease_ttl,
            drain_timeout: self.drain_timeout,
            keep_alive: KeepAlive { interval: self.ping_interval, timeout: self.ping_timeout },
        }
    }
}

/// The prompt that a base reads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum BasePromptChoice {
    /// The plain one, for a base that was never tuned to chat
    #[default]
    Plain,
    /// Its own chat template
    Chat,
}

impl From<BasePromptChoice> for BasePrompt {
    fn from(choice: BasePromptChoice) -> Self {
        match choice {
            BasePromptChoice::Plain => Self::Plain,
            BasePromptChoice::Chat => Self::Chat,
        }
    }
}

/// Which model a node runs, and with what.
#[derive(Clone, Debug, Args)]
pub struct ModelOptions {
    /// A GGUF file, or a Hugging Face model directory
    #[arg(long, env = "HEADSTART_MODEL", value_name = "PATH")]
    pub model: PathBuf,
    /// The name clients use for the model [default: the file's or directory's name]
    #[arg(long, env = "HEADSTART_NAME", value_name = "NAME")]
    pub name: Option<String>,
    /// How weights are kept: as the file has them, or expanded
    #[arg(long, env = "HEADSTART_DTYPE", value_parser = ["auto", "f32", "bf16"], default_value = "auto")]
    pub dtype: String,
    /// Where the model runs: on a GPU if there is one, on the CPU, or on a GPU and nowhere else. Of several GPUs, each of the --tp ranks has one
    #[arg(long, env = "HEADSTART_DEVICE", value_parser = ["auto", "cpu", "cuda"], default_value = "auto")]
    pub device: String,
    /// Threads that compute [default: one for each core]
    #[arg(long, env = "HEADSTART_THREADS", value_name = "N", value_parser = count(1024))]
    pub threads: Option<usize>,
    /// Tensor-parallel ranks that share the model, each with its part of the weights and the KV cache, and a GPU or its part of the threads
    #[arg(long, env = "HEADSTART_TP", value_name = "N", default_value = "1", value_parser = count(64))]
    pub tp: usize,
    /// Ranks in other processes.
    #[command(flatten)]
    pub hosts: TpHostOptions,
    /// Requests at once; one more is refused
    #[arg(long, env = "HEADSTART_SLOTS", value_name = "N", default_value = "16", value_parser = count(4096))]
    pub slots: usize,
    /// Tokens that the KV cache holds for all requests together [default: the slots' contexts, up to 32768]
    #[arg(long, env = "HEADSTART_KV_TOKENS", value_name = "N", value_parser = count(1 << 30))]
    pub kv_tokens: Option<usize>,
    /// Tokens that one engine step computes at most
    #[arg(long, env = "HEADSTART_STEP_TOKENS", value_name = "N", default_value = "512", value_parser = count(1 << 20))]
    pub step_tokens: usize,
}

/// Tensor-parallel ranks in several processes, on one machine or many. All of them are started with
/// the same model, `--tp` and `--tp-hosts`.
#[derive(Clone, Debug, Args)]
pub struct TpHostOptions {
    /// Processes that share the tensor-parallel ranks evenly, all on CPUs or all on GPUs, where each rank has one of its process's
    #[arg(long, env = "HEADSTART_TP_HOSTS", value_name = "N", default_value = "1", visible_alias = "nnodes", value_parser = count(64))]
    pub tp_hosts: usize,
    /// This process among them; 0 leads and is the node, the others only compute for it
    #[arg(long, env = "HEADSTART_TP_HOST_RANK", value_name = "R", default_value = "0", visible_alias = "node-rank", value_parser = RangedU64ValueParser::<usize>::new().range(0..64))]
    pub tp_host_rank: usize,
    /// Where process 0 listens for the others [default: a free port, told through etcd under --node-id]
    #[arg(
        long,
        env = "HEADSTART_TP_LEADER",
        value_name = "HOST:PORT",
        visible_alias = "dist-init-addr"
    )]
    pub tp_leader: Option<String>,
    /// How long the processes may take to find each other
    #[arg(long, env = "HEADSTART_TP_JOIN_TIMEOUT", value_name = "TIME", default_value = "10m", value_parser = duration)]
    pub tp_join_timeout: Duration,
    /// A process that is silent for so long is lost, and the node with it
    #[arg(long, env = "HEADSTART_TP_TIMEOUT", value_name = "TIME", default_value = "5s", value_parser = duration)]
    pub tp_timeout: Duration,
}

/// KV tokens that nobody asked for explicitly are no more than these.
const KV_TOKENS_DEFAULT_MAX: usize = 32 << 10;

impl ModelOptions {
    /// The name clients use for the model.
    ///
    /// # Errors
    /// When the path ends in no name and none was given.
    pub fn name(&self) -> Result<String, ConfigError> {
        let stem = || match self.model.is_dir() {
            true => self.model.file_name(),
            false => self.model.file_stem(),
        };
        let named = self.name.clone().or_else(|| stem()?.to_str().map(str::to_owned));
        named.filter(|name| !name.is_empty()).ok_or_else(|| ConfigError::Invalid {
            field: "name",
            message: format!("expected a name because {} has none", self.model.display()),
        })
    }

    /// Threads that compute.
    pub fn threads(&self) -> usize {
        let cores = || std::thread::available_parallelism().map_or(1, usize::from);
        self.threads.unwrap_or_else(cores)
    }

    /// Tokens that the KV cache holds, for a model with this context.
    pub fn kv_tokens(&self, context_length: usize) -> usize {
        let wanted = context_length.saturating_mul(self.slots);
        self.kv_tokens.unwrap_or_else(|| wanted.min(KV_TOKENS_DEFAULT_MAX))
    }
}

/// Parses a number from 1 to `max`.
fn count(max: u64) -> RangedU64ValueParser<usize> {
    RangedU64ValueParser::new().range(1..=max)
}
