//! A node whose tensor-parallel ranks are in several processes.
//!
//! Process 0 is the node; it waits for the others before it serves. The others load their part of
//! the weights and compute for it, and end with it.

use std::net::TcpListener;
use std::time::Duration;

use headstart_cluster::{ClusterError, Meeting};
use headstart_engine::collective::hosts::Place;
use headstart_engine::executor::device::PlacedRanks;
use headstart_engine::executor::hosts::{FollowError, HostTimes};
use headstart_engine::model::LoadOptions;
use headstart_proto::NodeId;
use headstart_service::config::ConfigError;
use headstart_service::node::NodeError;
use headstart_service::options::{ModelOptions, NodeOptions};
use tokio_util::sync::CancellationToken;

use crate::load::{device, dtype, told};

/// How long a leader may take to close after its drain.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(10);

/// What a leader waits with.
#[derive(Debug)]
pub struct Gathering {
    /// Its place.
    pub place: Place,
    /// How long it waits.
    pub times: HostTimes,
    /// Where the others come.
    pub listener: TcpListener,
    announced: Option<Announced>,
}

/// What etcd says of where a leader is.
#[derive(Clone, Debug)]
pub(crate) struct Announced {
    meeting: Meeting,
    node_id: NodeId,
    address: String,
    ttl: Duration,
}

impl Announced {
    async fn put(&self) -> Result<(), ClusterError> {
        self.meeting.announce(&self.node_id, &self.address, self.ttl).await
    }

    /// Takes the address back, once everyone has come.
    pub(crate) async fn withdraw(&self) {
        if let Err(error) = self.meeting.withdraw(&self.node_id).await {
            tracing::debug!(%error, "the address for tensor-parallel ranks stays until its lease ends");
        }
    }
}

fn invalid(field: &'static str, message: impl Into<String>) -> ConfigError {
    ConfigError::Invalid { field, message: message.into() }
}

/// This process's place among those of its node; `None`: it is alone.
///
/// # Errors
/// The numbers do not fit each other.
pub fn place(model: &ModelOptions) -> Result<Option<Place>, ConfigError> {
    let (ranks, hosts) = (model.tp, model.hosts.tp_hosts);
    let host = model.hosts.tp_host_rank;
    if host >= hosts {
        let message = format!("expected a number below --tp-hosts {hosts}, found {host}");
        return Err(invalid("tp-host-rank", message));
    }
    if hosts == 1 {
        return Ok(None);
    }
    if !ranks.is_multiple_of(hosts) {
        let message = format!("expected a multiple of --tp-hosts {hosts}, found {ranks}");
        return Err(invalid("tp", message));
    }
    Ok(Some(Place { ranks, hosts, host }))
}

/// Under which name a node's processes meet in etcd.
fn meeting(node: &NodeOptions) -> Result<(Meeting, NodeId), NodeError> {
    let id = node.node_id.clone().ok_or_else(|| {
        let message = "expected the node's id, under which its processes meet, or --tp-leader";
        invalid("node-id", message)
    })?;
    Ok((Meeting::new(&node.etcd, &node.cluster, node.etcd_timeout)?, id))
}

/// Lets the other processes come: listens, and says where.
///
/// # Errors
/// The address is in use, or etcd does not answer.
pub async fn gathering(
    place: Place,
    node: &NodeOptions,
    model: &ModelOptions,
) -> Result<Gathering, NodeError> {
    device(model)?;
    let hosts = &model.hosts;
    let refused = |address: &str, error: &dyn std::fmt::Display| {
        NodeError::Ranks(format!("listening for tensor-parallel ranks at {address}: {error}"))
    };
    let times = HostTimes { join_timeout: hosts.tp_join_timeout, silence_max: hosts.tp_timeout };
    if let Some(address) = &hosts.tp_leader {
        let listener = TcpListener::bind(address).map_err(|error| refused(address, &error))?;
        return Ok(Gathering { place, times, listener, announced: None });
    }
    let (meeting, node_id) = meeting(node)?;
    let ip = node.listen.ip();
    let listener = TcpListener::bind((ip, 0)).map_err(|error| refused(&ip.to_string(), &error))?;
    let local = listener.local_addr().map_err(|error| refused(&ip.to_string(), &error))?;
    let advertised = node.advertised(local)?;
    let host = advertised.rsplit_once(':').map_or(&*advertised, |(host, _)| host);
    let address = format!("{host}:{}", local.port());
    let announced = Announced { meeting, node_id, address, ttl: hosts.tp_join_timeout };
    announced.put().await?;
    let Announced { node_id, address, .. } = &announced;
    tracing::info!(%node_id, address, "tensor-parallel ranks are awaited");
    Ok(Gathering { place, times, listener, announced: Some(announced) })
}

impl Gathering {
    /// What etcd says of where this is, if it is asked.
    pub(crate) fn announced(&self) -> Option<Announced> {
        self.announced.clone()
    }

    /// Says once more where this is: loading may take longer than what was said before lasts. Needs
    /// a runtime, on a thread that may block.
    pub(crate) fn announce_again(&self) -> Result<(), ClusterError> {
        let again =
            |announced: &Announced| tokio::runtime::Handle::current().block_on(announced.put());
        self.announced.as_ref().map_or(Ok(()), again)
    }
}

/// Runs a process that follows, until its leader ends. Asked to stop it waits for the leader, which
/// may still need it, as long as a drain may take.
///
/// # Errors
/// What it cannot start or go on without.
pub async fn run_follower(
    place: Place,
    node: NodeOptions,
    model: ModelOptions,
    shutdown: CancellationToken,
) -> Result<(), NodeError> {
    device(&model)?;
    let meeting = match &model.hosts.tp_leader {
        Some(_) => None,
        None => Some(meeting(&node)?),
    };
    // The leader deregisters and closes when it has drained.
    let patience = node.drain_timeout + CLOSE_TIMEOUT;
    let mut following = tokio::task::spawn_blocking(move || following(place, &model, meeting));
    let ended = tokio::select! {
        ended = &mut following => ended,
        () = shutdown.cancelled() => match tokio::time::timeout(patience, following).await {
            Ok(ended) => ended,
            Err(_) => return Ok(()),
        },
    };
    ended.unwrap_or_else(|error| Err(NodeError::Ranks(error.to_string())))
}

fn following(
    place: Place,
    model: &ModelOptions,
    meeting: Option<(Meeting, NodeId)>,
) -> Result<(), NodeError> {
    let (threads, device) = (model.threads(), device(model)?);
    let options = LoadOptions { dtype: dtype(model)?, threads };
    let progress = &mut told(&model.model);
    let placed = PlacedRanks::load(&model.model, device, options, place, progress);
    let placed = placed.map_err(NodeError::Model)?;
    let runtime = tokio::runtime::Handle::current();
    let mut find = || match (&model.hosts.tp_leader, &meeting) {
        (Some(address), _) => Ok(address.clone()),
        (None, Some((meeting, id))) => match runtime.block_on(meeting.leader(id)) {
            Ok(Some(address)) => Ok(address),
            Ok(None) => Err(format!("node {id} has not said in etcd where it is")),
            Err(error) => Err(error.to_string()),
        },
        (None, None) => Err("nobody said where it is".to_owned()),
    };
    let mut ready = || {
        let ranks = place.local();
        tracing::info!(first = ranks.start, ranks = ranks.len(), "tensor-parallel ranks are ready");
    };
    let timeout = model.hosts.tp_join_timeout;
    let ended = placed.follow(threads, timeout, &mut find, &mut ready);
    ended.map_err(|error| match error {
        FollowError::Executor(error) => NodeError::Model(error.message),
        error => NodeError::Ranks(error.to_string()),
    })?;
    tracing::info!("the leader has ended");
    Ok(())
}
