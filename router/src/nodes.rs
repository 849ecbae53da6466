//! The nodes this router knows: a channel to each, what runs on it, whether it was reachable.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use headstart_cluster::{NodeRecord, Tier, View};
use headstart_proto::{Error, NodeId};
use headstart_service::channel;
use tonic::transport::Channel;

use crate::route::{Candidate, Snapshot};

/// How long a node that could not be reached is asked last.
const FAILING_PERIOD: Duration = Duration::from_secs(2);

/// One start of one node.
#[derive(Debug)]
struct Node {
    address: String,
    incarnation: u64,
    channel: Channel,
    in_flight: AtomicU32,
    failed_at: Mutex<Option<Instant>>,
}

impl Node {
    fn failing(&self) -> bool {
        let failed_at = *self.failed_at.lock().unwrap_or_else(PoisonError::into_inner);
        failed_at.is_some_and(|at| at.elapsed() < FAILING_PERIOD)
    }
}

/// One answer's place on a node; dropping it gives the place back.
#[derive(Debug)]
pub(crate) struct Place {
    node: Arc<Node>,
}

impl Place {
    /// The way to the node.
    pub(crate) fn channel(&self) -> Channel {
        self.node.channel.clone()
    }

    /// The node could not be reached: it is asked last for a while.
    pub(crate) fn mark_failing(&self) {
        let mut failed_at = self.node.failed_at.lock().unwrap_or_else(PoisonError::into_inner);
        *failed_at = Some(Instant::now());
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.node.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}

/// All of them.
#[derive(Debug)]
pub(crate) struct Nodes {
    connect_timeout: Duration,
    known: Mutex<HashMap<NodeId, Arc<Node>>>,
}

impl Nodes {
    /// No nodes yet; a connection to one must stand within `connect_timeout`.
    pub(crate) fn new(connect_timeout: Duration) -> Self {
        Self { connect_timeout, known: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<NodeId, Arc<Node>>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets what is no longer in `view`. Answers that run on a forgotten node keep its channel.
    pub(crate) fn retain(&self, view: &View) {
        self.lock().retain(|id, node| {
            view.nodes.get(id).is_some_and(|record| {
                record.incarnation == node.incarnation && record.address == node.address
            })
        });
    }

    /// What routing looks at.
    pub(crate) fn snapshot<'a>(&self, view: &'a View) -> Snapshot<'a> {
        let known = self.lock();
        let candidates = |tier| {
            view.tier(tier)
                .map(|record| {
                    let node = known.get(&record.node_id);
                    let in_flight = node.map_or(0, |node| node.in_flight.load(Ordering::Relaxed));
                    Candidate { record, in_flight, failing: node.is_some_and(|n| n.failing()) }
                })
                .collect()
        };
        Snapshot { bases: candidates(Tier::Base), drafters: candidates(Tier::Drafter) }
    }

    /// Takes a place for one answer on `record`'s node.
    ///
    /// # Errors
    /// When the node's address is malformed.
    pub(crate) fn place(&self, record: &NodeRecord) -> Result<Place, Error> {
        let node = self.node(record)?;
        node.in_flight.fetch_add(1, Ordering::Relaxed);
        Ok(Place { node })
    }

    /// The channel to `record`'s node.
    ///
    /// # Errors
    /// When the node's address is malformed.
    pub(crate) fn channel(&self, record: &NodeRecord) -> Result<Channel, Error> {
        Ok(self.node(record)?.channel.clone())
    }

    fn node(&self, record: &NodeRecord) -> Result<Arc<Node>, Error> {
        let mut known = self.lock();
        if let Some(node) = known.get(&record.node_id)
            && node.address == record.address
            && node.incarnation == record.incarnation
        {
            return Ok(Arc::clone(node));
        }
        let node = Arc::new(Node {
            address: record.address.clone(),
            incarnation: record.incarnation,
            channel: channel::lazy(&record.address, self.connect_timeout)?,
            in_flight: AtomicU32::new(0),
            failed_at: Mutex::new(None),
        });
        known.insert(record.node_id.clone(), Arc::clone(&node));
        Ok(node)
    }
}
