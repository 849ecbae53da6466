//! Membership inside one process.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::future::BoxFuture;
use headstart_proto::NodeId;
use tokio::sync::watch;

use crate::registration::{Held, Wish};
use crate::{ClusterError, Membership, NodeRecord, Registration, View};

/// A membership store for a cluster in one process, and for tests. Clones share one store.
#[derive(Clone, Debug)]
pub struct InMemory {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    view: watch::Sender<Arc<View>>,
    leases: Mutex<Leases>,
}

/// Which lease holds which node's record.
#[derive(Debug, Default)]
struct Leases {
    granted: u64,
    holders: BTreeMap<NodeId, u64>,
}

impl Default for InMemory {
    fn default() -> Self {
        Self::new()
    }
}

impl InMemory {
    /// An empty store.
    pub fn new() -> Self {
        let (view, _) = watch::channel(Arc::default());
        Self { shared: Arc::new(Shared { view, leases: Mutex::default() }) }
    }
}

impl Membership for InMemory {
    fn register(
        &self,
        record: NodeRecord,
        ttl: Duration,
    ) -> BoxFuture<'_, Result<Registration, ClusterError>> {
        Box::pin(async move {
            record.validate()?;
            let lease = self.shared.grant(&record)?;
            let (registration, held) = Registration::new(record);
            tokio::spawn(hold(Arc::clone(&self.shared), held, lease, ttl));
            Ok(registration)
        })
    }

    fn watch(&self) -> watch::Receiver<Arc<View>> {
        self.shared.view.subscribe()
    }
}

/// Keeps one record until its holder leaves or is gone.
async fn hold(shared: Arc<Shared>, mut held: Held, lease: u64, ttl: Duration) {
    let node_id = held.node_id();
    loop {
        match held.next().await {
            Wish::Update => {
                if !shared.update(lease, held.record()) {
                    return;
                }
            }
            Wish::Leave(done) => {
                shared.remove(lease, &node_id);
                let _ = done.send(());
                return;
            }
            Wish::Abandon => {
                tokio::time::sleep(ttl).await;
                shared.remove(lease, &node_id);
                return;
            }
        }
    }
}

impl Shared {
    fn grant(&self, record: &NodeRecord) -> Result<u64, ClusterError> {
        let mut leases = self.leases.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(stored) = self.view.borrow().nodes.get(&record.node_id)
            && stored.incarnation > record.incarnation
        {
            let (node_id, incarnation) = (record.node_id.clone(), stored.incarnation);
            return Err(ClusterError::Superseded { node_id, incarnation });
        }
        leases.granted += 1;
        let lease = leases.granted;
        leases.holders.insert(record.node_id.clone(), lease);
        self.put(record.clone());
        Ok(lease)
    }

    /// Returns whether the lease still holds the record.
    fn update(&self, lease: u64, record: NodeRecord) -> bool {
        let leases = self.leases.lock().unwrap_or_else(PoisonError::into_inner);
        let held = leases.holders.get(&record.node_id) == Some(&lease);
        if held {
            self.put(record);
        }
        held
    }

    fn remove(&self, lease: u64, node_id: &NodeId) {
        let mut leases = self.leases.lock().unwrap_or_else(PoisonError::into_inner);
        if leases.holders.get(node_id) == Some(&lease) {
            leases.holders.remove(node_id);
            self.view.send_modify(|view| {
                Arc::make_mut(view).nodes.remove(node_id);
            });
        }
    }

    fn put(&self, record: NodeRecord) {
        self.view.send_modify(|view| {
            Arc::make_mut(view).nodes.insert(record.node_id.clone(), record);
        });
    }
}
