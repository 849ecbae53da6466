//! A node's hold on its record.

use std::time::Duration;

use headstart_proto::NodeId;
use tokio::sync::{oneshot, watch};

use crate::NodeRecord;

/// Longest wait for a store to confirm that a node left.
const DEREGISTER_TIMEOUT: Duration = Duration::from_secs(5);

/// A registered record. It is kept alive as long as this lives; dropping it without
/// [`Registration::deregister`] lets the record expire with its lease, as a crash does.
#[derive(Debug)]
pub struct Registration {
    record: watch::Sender<NodeRecord>,
    leave: oneshot::Sender<oneshot::Sender<()>>,
}

/// The store's side of a [`Registration`].
#[derive(Debug)]
pub(crate) struct Held {
    pub(crate) record: watch::Receiver<NodeRecord>,
    pub(crate) leave: oneshot::Receiver<oneshot::Sender<()>>,
}

/// What the holder wants next.
#[derive(Debug)]
pub(crate) enum Wish {
    /// Store the record as it is now.
    Update,
    /// Remove the record now and say so.
    Leave(oneshot::Sender<()>),
    /// The holder is gone: let the lease run out.
    Abandon,
}

impl Registration {
    pub(crate) fn new(record: NodeRecord) -> (Self, Held) {
        let (record_tx, record_rx) = watch::channel(record);
        let (leave_tx, leave_rx) = oneshot::channel();
        (Self { record: record_tx, leave: leave_tx }, Held { record: record_rx, leave: leave_rx })
    }

    /// The registered node.
    pub fn node_id(&self) -> NodeId {
        self.record.borrow().node_id.clone()
    }

    /// Changes the record; the store follows as soon as it can. The node id and the incarnation
    /// stay as they were registered.
    pub fn update(&self, change: impl FnOnce(&mut NodeRecord)) {
        self.record.send_modify(|record| {
            let (node_id, incarnation) = (record.node_id.clone(), record.incarnation);
            change(record);
            record.node_id = node_id;
            record.incarnation = incarnation;
        });
    }

    /// Waits until a later start of the same node has taken the record: this one is not in the cluster
    /// any more. Cancel safe.
    pub async fn superseded(&mut self) {
        self.leave.closed().await;
    }

    /// Removes the record at once. Returns when the store has confirmed it, or after five seconds:
    /// the lease then does the rest.
    pub async fn deregister(self) {
        let (done_tx, done_rx) = oneshot::channel();
        if self.leave.send(done_tx).is_ok() {
            let _ = tokio::time::timeout(DEREGISTER_TIMEOUT, done_rx).await;
        }
    }
}

impl Held {
    pub(crate) fn node_id(&self) -> NodeId {
        self.record.borrow().node_id.clone()
    }

    /// The record as it should be stored now; what it says is then no longer news.
    pub(crate) fn record(&mut self) -> NodeRecord {
        self.record.borrow_and_update().clone()
    }

    /// Waits for the holder's next wish. Cancel safe.
    pub(crate) async fn next(&mut self) -> Wish {
        tokio::select! {
            biased;
            leave = &mut self.leave => match leave {
                Ok(done) => Wish::Leave(done),
                Err(_) => Wish::Abandon,
            },
            Ok(()) = self.record.changed() => Wish::Update,
        }
    }
}
