//! Channels to other nodes.

use std::time::Duration;

use headstart_proto::Error;
use http::Uri;
use hyper_util::rt::TokioIo;
use tonic::transport::{Channel, Endpoint};

use crate::net::Dialer;

/// How soon a peer that is paused or cut off is found: no packet says so, only silence does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeepAlive {
    /// A connection is pinged after so long without traffic.
    pub interval: Duration,
    /// It is dead after so long without an answer, and every call on it fails.
    pub timeout: Duration,
}

impl KeepAlive {
    /// Between parts of one cluster: a silent peer is found within about three seconds.
    pub const CLUSTER: Self =
        Self { interval: Duration::from_secs(1), timeout: Duration::from_secs(2) };
    /// Towards clients, who may be far away.
    pub const CLIENTS: Self =
        Self { interval: Duration::from_secs(10), timeout: Duration::from_secs(10) };
}

impl Default for KeepAlive {
    fn default() -> Self {
        Self::CLUSTER
    }
}

/// How to reach `address` (`host:port`).
fn endpoint(
    address: &str,
    connect_timeout: Duration,
    keep_alive: KeepAlive,
) -> Result<Endpoint, Error> {
    let endpoint = Endpoint::from_shared(format!("http://{address}")).map_err(|error| {
        Error::invalid("address", format!("expected host:port, found {address:?}: {error}"))
    })?;
    Ok(endpoint
        .tcp_nodelay(true)
        .connect_timeout(connect_timeout)
        .http2_keep_alive_interval(keep_alive.interval)
        .keep_alive_timeout(keep_alive.timeout)
        .keep_alive_while_idle(true))
}

/// A channel to `address` that connects with its first call and reconnects when it broke.
///
/// # Errors
/// When the address is malformed.
pub fn lazy(
    dialer: &Dialer,
    address: &str,
    connect_timeout: Duration,
    keep_alive: KeepAlive,
) -> Result<Channel, Error> {
    let endpoint = endpoint(address, connect_timeout, keep_alive)?;
    let Some(network) = dialer.network().cloned() else {
        return Ok(endpoint.connect_lazy());
    };
    let connector = tower::service_fn(move |uri: Uri| {
        let dialled = network.dial(uri.authority().map_or("", |authority| authority.as_str()));
        async move { dialled.await.map(TokioIo::new) }
    });
    Ok(endpoint.connect_with_connector_lazy(connector))
}

/// A connected channel to `address`.
///
/// # Errors
/// When the address is malformed, or nobody answers there within `timeout`.
pub async fn connect(address: &str, timeout: Duration) -> Result<Channel, Error> {
    let connecting = endpoint(address, timeout, KeepAlive::CLUSTER)?;
    let unavailable = |cause: String| Error::unavailable(format!("connect to {address}: {cause}"));
    match tokio::time::timeout(timeout, connecting.connect()).await {
        Ok(Ok(channel)) => Ok(channel),
        Ok(Err(error)) => Err(unavailable(error.to_string())),
        Err(_) => Err(unavailable(format!("no answer within {timeout:?}"))),
    }
}
