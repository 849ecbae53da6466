//! Who is in the cluster: every node keeps a record under a lease, and everyone watches the view.
//!
//! One trait, [`Membership`], and two stores behind it: [`Etcd`] for a real cluster and
//! [`InMemory`] for a cluster in one process. What changed between two views is a pure function,
//! [`diff`].

mod etcd;
mod memory;
mod record;
mod registration;
mod tracker;
mod view;

#[cfg(feature = "testing")]
pub mod testing;

use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use headstart_proto::NodeId;
use tokio::sync::watch;

pub use etcd::{Etcd, Meeting};
pub use memory::InMemory;
pub use record::{BaseRole, NodeRecord, Tier, incarnation_now};
pub use registration::Registration;
pub use view::{Change, View, diff};

/// How long a record outlives its node unless the node says otherwise.
pub const LEASE_TTL: Duration = Duration::from_secs(10);

/// Where nodes register and where everyone sees who is there.
pub trait Membership: Send + Sync + 'static {
    /// Registers `record` and keeps it alive, by itself and through outages of the store, until the
    /// registration is dropped (the record then expires after `ttl`) or deregistered.
    ///
    /// # Errors
    /// [`ClusterError`] when the record is malformed, a later start of the same node is registered,
    /// or the store does not answer.
    fn register(
        &self,
        record: NodeRecord,
        ttl: Duration,
    ) -> BoxFuture<'_, Result<Registration, ClusterError>>;

    /// The view, always the latest one that is known. It stays as it is while the store is away.
    fn watch(&self) -> watch::Receiver<Arc<View>>;
}

/// A membership call failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ClusterError {
    /// The store did not answer in time.
    #[error("etcd at {endpoints} did not answer within {timeout:?}: {cause}")]
    Unreachable {
        /// The endpoints tried, comma separated.
        endpoints: String,
        /// How long it was waited for.
        timeout: Duration,
        /// The last thing seen.
        cause: String,
    },
    /// The same node id is registered by a later start.
    #[error("node {node_id} is registered by a later start of it (incarnation {incarnation})")]
    Superseded {
        /// The node.
        node_id: NodeId,
        /// The later start's incarnation.
        incarnation: u64,
    },
    /// A field is missing or out of its range.
    #[error("{field}: expected {expected}, found {found:?}")]
    Invalid {
        /// The field.
        field: &'static str,
        /// What a valid value looks like.
        expected: &'static str,
        /// What was there (shortened).
        found: String,
    },
}

impl ClusterError {
    /// A stable name.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Unreachable { .. } => "unreachable",
            Self::Superseded { .. } => "superseded",
            Self::Invalid { .. } => "invalid",
        }
    }

    pub(crate) fn invalid(field: &'static str, expected: &'static str, found: &str) -> Self {
        let found = found.chars().take(80).collect();
        Self::Invalid { field, expected, found }
    }
}
