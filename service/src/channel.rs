//! Channels to other nodes.

use std::time::Duration;

use headstart_proto::Error;
use tonic::transport::{Channel, Endpoint};

/// A connection is probed after so long without traffic, and dead after so long without an answer.
const PING_INTERVAL: Duration = Duration::from_secs(10);
const PING_TIMEOUT: Duration = Duration::from_secs(10);

/// How to reach `address` (`host:port`).
fn endpoint(address: &str, connect_timeout: Duration) -> Result<Endpoint, Error> {
    let endpoint = Endpoint::from_shared(format!("http://{address}")).map_err(|error| {
        Error::invalid("address", format!("expected host:port, found {address:?}: {error}"))
    })?;
    Ok(endpoint
        .tcp_nodelay(true)
        .connect_timeout(connect_timeout)
        .http2_keep_alive_interval(PING_INTERVAL)
        .keep_alive_timeout(PING_TIMEOUT)
        .keep_alive_while_idle(true))
}

/// A channel to `address` that connects with its first call and reconnects when it broke.
///
/// # Errors
/// When the address is malformed.
pub fn lazy(address: &str, connect_timeout: Duration) -> Result<Channel, Error> {
    Ok(endpoint(address, connect_timeout)?.connect_lazy())
}

/// A connected channel to `address`.
///
/// # Errors
/// When the address is malformed, or nobody answers there within `timeout`.
pub async fn connect(address: &str, timeout: Duration) -> Result<Channel, Error> {
    let connecting = endpoint(address, timeout)?;
    let unavailable = |cause: String| Error::unavailable(format!("connect to {address}: {cause}"));
    match tokio::time::timeout(timeout, connecting.connect()).await {
        Ok(Ok(channel)) => Ok(channel),
        Ok(Err(error)) => Err(unavailable(error.to_string())),
        Err(_) => Err(unavailable(format!("no answer within {timeout:?}"))),
    }
}
