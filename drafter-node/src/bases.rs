//! Channels to bases, shared by all drafts.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use headstart_proto::{Error, v1};
use tonic::transport::{Channel, Endpoint};

/// A client of one base.
pub type BaseClient = v1::base_client::BaseClient<Channel>;

/// Bases whose channels are kept at most.
const CHANNELS_MAX: usize = 1024;

/// The bases that drafts went to.
#[derive(Debug)]
pub struct Bases {
    connect_timeout: Duration,
    channels: Mutex<HashMap<String, Channel>>,
}

impl Bases {
    /// No channel yet.
    #[must_use]
    pub fn new(connect_timeout: Duration) -> Self {
        Self { connect_timeout, channels: Mutex::default() }
    }

    /// A client of the base at `address` (`host:port`). It connects with its first call.
    ///
    /// # Errors
    /// An address that is none.
    pub fn client(&self, address: &str) -> Result<BaseClient, Error> {
        let mut channels = self.channels.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(channel) = channels.get(address) {
            return Ok(BaseClient::new(channel.clone()));
        }
        let endpoint = Endpoint::from_shared(format!("http://{address}"))
            .map_err(|error| Error::invalid("base_address", error.to_string()))?;
        let channel = endpoint
            .tcp_nodelay(true)
            .connect_timeout(self.connect_timeout)
            .http2_keep_alive_interval(Duration::from_secs(10))
            .keep_alive_timeout(Duration::from_secs(10))
            .connect_lazy();
        if channels.len() >= CHANNELS_MAX {
            // A cluster has far fewer bases: these are addresses of the past.
            channels.clear();
        }
        channels.insert(address.to_owned(), channel.clone());
        Ok(BaseClient::new(channel))
    }
}
