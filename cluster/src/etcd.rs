//! Membership in etcd.
//!
//! A node's record is a JSON value at `/headstart/<cluster>/nodes/<node_id>`, attached to a lease.
//! Everyone lists the prefix once and watches it from the revision of that list.

mod hold;
mod link;
mod look;
mod meeting;
mod watcher;

use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use tokio::sync::watch;
use tokio::task::AbortHandle;

use crate::{ClusterError, Membership, NodeRecord, Registration, View};
use hold::Holder;
use link::Link;
pub use meeting::Meeting;

/// Membership in etcd. Clones share one watch; it ends with the last of them.
#[derive(Clone, Debug)]
pub struct Etcd {
    link: Link,
    view: watch::Receiver<Arc<View>>,
    _watcher: Arc<AbortOnDrop>,
}

#[derive(Debug)]
struct AbortOnDrop(AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Etcd {
    /// Connects to `endpoints` (`host:port` or `http://host:port`), reads the view of the cluster
    /// `cluster_name` and goes on watching it.
    ///
    /// # Errors
    /// [`ClusterError::Unreachable`] when no endpoint answers within `timeout`, and
    /// [`ClusterError::Invalid`] for a malformed endpoint or cluster name.
    pub async fn connect(
        endpoints: &[String],
        cluster_name: &str,
        timeout: Duration,
    ) -> Result<Self, ClusterError> {
        let link = Link::new(endpoints, cluster_name, timeout)?;
        let first = watcher::first_list(&link).await?;
        let (sender, view) = watch::channel(Arc::new(first.view()));
        let task = tokio::spawn(watcher::run(link.clone(), first, sender));
        Ok(Self { link, view, _watcher: Arc::new(AbortOnDrop(task.abort_handle())) })
    }
}

impl Membership for Etcd {
    fn register(
        &self,
        record: NodeRecord,
        ttl: Duration,
    ) -> BoxFuture<'_, Result<Registration, ClusterError>> {
        Box::pin(async move {
            record.validate()?;
            let (registration, held) = Registration::new(record.clone());
            let holder = Holder::register(self.link.clone(), held, &record, ttl).await?;
            tokio::spawn(holder.run());
            Ok(registration)
        })
    }

    fn watch(&self) -> watch::Receiver<Arc<View>> {
        self.view.clone()
    }
}
