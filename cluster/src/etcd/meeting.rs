//! Where the processes of one node find their leader.
//!
//! The leader's address is a plain `host:port` at `/headstart/<cluster>/leaders/<node_id>`, under a
//! lease that outlives the time its followers have to join. Nobody lists or watches it.

use std::time::Duration;

use etcd_client::PutOptions;
use headstart_proto::NodeId;

use super::link::{CallError, Link};
use crate::ClusterError;
use crate::record::is_host_port;

/// The leaders' addresses in etcd.
#[derive(Clone, Debug)]
pub struct Meeting {
    link: Link,
}

impl Meeting {
    /// The leaders of cluster `cluster_name`. Connects with each call.
    ///
    /// # Errors
    /// [`ClusterError::Invalid`] for a malformed endpoint or cluster name.
    pub fn new(
        endpoints: &[String],
        cluster_name: &str,
        timeout: Duration,
    ) -> Result<Self, ClusterError> {
        Ok(Self { link: Link::new(endpoints, cluster_name, timeout)? })
    }

    /// Says for `ttl` that the processes of `node_id` find their leader at `address`.
    ///
    /// # Errors
    /// [`ClusterError::Invalid`] for a malformed address, [`ClusterError::Unreachable`] when etcd
    /// does not answer.
    pub async fn announce(
        &self,
        node_id: &NodeId,
        address: &str,
        ttl: Duration,
    ) -> Result<(), ClusterError> {
        if !is_host_port(address) {
            return Err(ClusterError::invalid("tp-leader", "host:port", address));
        }
        let (link, key) = (&self.link, self.link.leader_key(node_id));
        let ttl_secs = i64::try_from(ttl.as_secs()).unwrap_or(i64::MAX).max(1);
        let key = key.as_str();
        let put = move || async move {
            let mut client = link.open().await?;
            let lease = link.call(client.lease_grant(ttl_secs, None)).await?.id();
            let options = PutOptions::new().with_lease(lease);
            link.call(client.put(key, address, Some(options))).await.map(|_| ())
        };
        link.within_timeout(put).await
    }

    /// Takes back what [`Self::announce`] said.
    ///
    /// # Errors
    /// [`ClusterError::Unreachable`]: it goes with its lease.
    pub async fn withdraw(&self, node_id: &NodeId) -> Result<(), ClusterError> {
        let taken = async {
            let mut client = self.link.open().await?;
            self.link.call(client.delete(self.link.leader_key(node_id), None)).await
        };
        taken.await.map(|_| ()).map_err(|error: CallError| self.link.unreachable(&error))
    }

    /// Where the leader of `node_id` is; `None`: it has not said yet.
    ///
    /// # Errors
    /// [`ClusterError::Unreachable`], at once.
    pub async fn leader(&self, node_id: &NodeId) -> Result<Option<String>, ClusterError> {
        let found = async {
            let mut client = self.link.open().await?;
            self.link.call(client.get(self.link.leader_key(node_id), None)).await
        };
        let found = found.await.map_err(|error: CallError| self.link.unreachable(&error))?;
        let address = found.kvs().first().and_then(|kv| kv.value_str().ok());
        Ok(address.filter(|address| is_host_port(address)).map(str::to_owned))
    }
}
