//! Channels to bases, shared by all drafts.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use headstart_proto::{Error, v1};
use headstart_service::channel::{self, KeepAlive};
use headstart_service::net::Dialer;
use tonic::transport::Channel;

/// A client of one base.
pub type BaseClient = v1::base_client::BaseClient<Channel>;

/// Bases whose channels are kept at most.
const CHANNELS_MAX: usize = 1024;

/// The bases that drafts went to.
#[derive(Debug)]
pub struct Bases {
    dialer: Dialer,
    connect_timeout: Duration,
    keep_alive: KeepAlive,
    channels: Mutex<HashMap<String, Channel>>,
}

impl Bases {
    /// No channel yet; bases are reached by `dialer`. One that falls silent is found as `keep_alive`
    /// says.
    #[must_use]
    pub fn new(dialer: Dialer, connect_timeout: Duration, keep_alive: KeepAlive) -> Self {
        Self { dialer, connect_timeout, keep_alive, channels: Mutex::default() }
    }

    /// A client of the base at `address` (`host:port`). It connects with its first call.
    ///
    /// # Errors
    /// An address that is none.
    pub fn client(&self, address: &str) -> Result<BaseClient, Error> {
        let mut channels = self.channels.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = channels.get(address) {
            return Ok(BaseClient::new(known.clone()));
        }
        let channel = channel::lazy(&self.dialer, address, self.connect_timeout, self.keep_alive)
            .map_err(|error| error.with_field("base_address"))?;
        if channels.len() >= CHANNELS_MAX {
            // A cluster has far fewer bases: these are addresses of the past.
            channels.clear();
        }
        channels.insert(address.to_owned(), channel.clone());
        Ok(BaseClient::new(channel))
    }
}
