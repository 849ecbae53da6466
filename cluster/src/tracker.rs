//! The view as a list and a stream of events build it up.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use headstart_proto::NodeId;

use crate::{NodeRecord, View};

/// Builds the view from what the store tells. Pure: time is handed in.
///
/// After an outage a node that is missing from the store is kept for a while: during the outage it
/// could not keep its lease, and it registers again by itself.
#[derive(Debug, Default)]
pub(crate) struct Tracker {
    view: View,
    lingering: BTreeMap<NodeId, Instant>,
}

impl Tracker {
    pub(crate) fn view(&self) -> &View {
        &self.view
    }

    /// Takes over a whole list. With a `grace`, nodes that are missing from it stay so long.
    pub(crate) fn list(&mut self, records: Vec<NodeRecord>, now: Instant, grace: Option<Duration>) {
        let listed: BTreeSet<NodeId> = records.iter().map(|r| r.node_id.clone()).collect();
        for record in records {
            self.put(record);
        }
        let missing: Vec<NodeId> =
            self.view.nodes.keys().filter(|id| !listed.contains(*id)).cloned().collect();
        for id in missing {
            match grace {
                Some(grace) => {
                    self.lingering.entry(id).or_insert(now + grace);
                }
                None => self.remove(&id),
            }
        }
    }

    pub(crate) fn put(&mut self, record: NodeRecord) {
        self.lingering.remove(&record.node_id);
        self.view.nodes.insert(record.node_id.clone(), record);
    }

    pub(crate) fn remove(&mut self, id: &NodeId) {
        self.lingering.remove(id);
        self.view.nodes.remove(id);
    }

    /// When the next lingering node is to be given up.
    pub(crate) fn next_expiry(&self) -> Option<Instant> {
        self.lingering.values().min().copied()
    }

    /// Gives up the lingering nodes whose time is over.
    pub(crate) fn expire(&mut self, now: Instant) {
        let over: Vec<NodeId> = self
            .lingering
            .iter()
            .filter(|(_, until)| **until <= now)
            .map(|(id, _)| id.clone())
            .collect();
        for id in over {
            self.remove(&id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::tests::record;

    const GRACE: Duration = Duration::from_secs(10);

    fn ids(tracker: &Tracker) -> Vec<&str> {
        tracker.view().nodes.keys().map(NodeId::as_str).collect()
    }

    #[test]
    fn a_list_without_grace_replaces_the_view() {
        let (mut tracker, now) = (Tracker::default(), Instant::now());
        tracker.list(vec![record("a"), record("b")], now, None);
        tracker.list(vec![record("b"), record("c")], now, None);
        assert_eq!(ids(&tracker), ["b", "c"]);
        assert_eq!(tracker.next_expiry(), None);
    }

    #[test]
    fn after_an_outage_missing_nodes_linger_and_then_go() {
        let (mut tracker, now) = (Tracker::default(), Instant::now());
        tracker.list(vec![record("a"), record("b"), record("c")], now, None);
        tracker.list(vec![], now, Some(GRACE));
        assert_eq!(ids(&tracker), ["a", "b", "c"]);
        tracker.put(record("a"));
        tracker.remove(&"b".parse().unwrap());
        tracker.expire(now + GRACE / 2);
        assert_eq!(ids(&tracker), ["a", "c"]);
        assert_eq!(tracker.next_expiry(), Some(now + GRACE));
        tracker.expire(now + GRACE);
        assert_eq!(ids(&tracker), ["a"]);
    }

    #[test]
    fn a_second_outage_does_not_prolong_the_grace() {
        let (mut tracker, now) = (Tracker::default(), Instant::now());
        tracker.list(vec![record("a")], now, None);
        tracker.list(vec![], now, Some(GRACE));
        tracker.list(vec![], now + GRACE / 2, Some(GRACE));
        assert_eq!(tracker.next_expiry(), Some(now + GRACE));
    }
}
