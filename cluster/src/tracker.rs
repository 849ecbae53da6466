//! The view as a list and a stream of events build it up.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use headstart_proto::NodeId;

use crate::{NodeRecord, View};

/// Builds the view from what the store tells. Pure: time is handed in.
///
/// That a record is gone from the store does not say that its node is: during an outage of the store
/// no node can keep its lease, and a store that comes back empty, or late, knows nobody. Such a node
/// lingers in the view. From some moment on it is due to be looked at: it stays if it answers, and
/// is given up if it does not. Only a node that had said that it drains leaves without a look.
#[derive(Debug, Default)]
pub(crate) struct Tracker {
    view: View,
    /// When each lingering node is due.
    lingering: BTreeMap<NodeId, Instant>,
}

impl Tracker {
    pub(crate) fn view(&self) -> &View {
        &self.view
    }

    /// Takes over a whole list. Nodes that are missing from it are due after `grace`.
    pub(crate) fn list(&mut self, records: Vec<NodeRecord>, now: Instant, grace: Duration) {
        let listed: BTreeSet<NodeId> = records.iter().map(|r| r.node_id.clone()).collect();
        for record in records {
            self.put(record);
        }
        let missing: Vec<NodeId> =
            self.view.nodes.keys().filter(|id| !listed.contains(*id)).cloned().collect();
        for id in missing {
            self.vanished(&id, now + grace);
        }
    }

    pub(crate) fn put(&mut self, record: NodeRecord) {
        self.lingering.remove(&record.node_id);
        self.view.nodes.insert(record.node_id.clone(), record);
    }

    /// A record is gone from the store: its node is due at `due`, unless it drained or is due sooner.
    pub(crate) fn vanished(&mut self, id: &NodeId, due: Instant) {
        match self.view.nodes.get(id) {
            Some(record) if !record.draining => {
                self.lingering.entry(id.clone()).or_insert(due);
            }
            _ => self.remove(id),
        }
    }

    pub(crate) fn remove(&mut self, id: &NodeId) {
        self.lingering.remove(id);
        self.view.nodes.remove(id);
    }

    /// When the next lingering node is due.
    pub(crate) fn next_due(&self) -> Option<Instant> {
        self.lingering.values().min().copied()
    }

    /// The nodes that are due now. They are due again at `again`, should nobody look until then.
    pub(crate) fn due(&mut self, now: Instant, again: Instant) -> Vec<NodeRecord> {
        let due = self.lingering.iter_mut().filter(|(_, at)| **at <= now);
        let ids: Vec<NodeId> = due
            .map(|(id, at)| {
                *at = again;
                id.clone()
            })
            .collect();
        ids.iter().filter_map(|id| self.view.nodes.get(id).cloned()).collect()
    }

    /// Somebody looked at a node that was due. One that did not answer is given up, unless it has
    /// come back to the store meanwhile.
    pub(crate) fn looked(&mut self, record: &NodeRecord, answered: bool) {
        let id = &record.node_id;
        if !answered && self.lingering.contains_key(id) && self.view.nodes.get(id) == Some(record) {
            self.remove(id);
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

    fn due(tracker: &mut Tracker, now: Instant) -> Vec<String> {
        tracker.due(now, now + GRACE).iter().map(|record| record.node_id.to_string()).collect()
    }

    #[test]
    fn whoever_is_missing_lingers_until_it_was_looked_at() {
        let (mut tracker, now) = (Tracker::default(), Instant::now());
        tracker.list(vec![record("a"), record("b"), record("c")], now, GRACE);
        assert_eq!(tracker.next_due(), None);
        tracker.list(vec![], now, GRACE);
        assert_eq!(ids(&tracker), ["a", "b", "c"]);
        tracker.put(record("a"));
        assert_eq!(tracker.next_due(), Some(now + GRACE));
        assert!(due(&mut tracker, now + GRACE / 2).is_empty());
        assert_eq!(due(&mut tracker, now + GRACE), ["b", "c"]);
        assert!(due(&mut tracker, now + GRACE).is_empty(), "somebody looks already");
        tracker.looked(&record("b"), true);
        tracker.looked(&record("c"), false);
        assert_eq!(ids(&tracker), ["a", "b"]);
        assert_eq!(due(&mut tracker, now + GRACE * 2), ["b"], "and again, as long as it takes");
    }

    #[test]
    fn a_record_that_vanishes_is_due_at_once_unless_its_node_drained() {
        let (mut tracker, now) = (Tracker::default(), Instant::now());
        let drained = NodeRecord { draining: true, ..record("b") };
        tracker.list(vec![record("a"), drained], now, GRACE);
        tracker.vanished(&"a".parse().unwrap(), now);
        tracker.vanished(&"b".parse().unwrap(), now);
        tracker.vanished(&"unknown".parse().unwrap(), now);
        assert_eq!(ids(&tracker), ["a"]);
        assert_eq!(due(&mut tracker, now), ["a"]);
    }

    #[test]
    fn whoever_came_back_is_not_given_up_for_an_old_silence() {
        let (mut tracker, now) = (Tracker::default(), Instant::now());
        tracker.list(vec![record("a")], now, GRACE);
        tracker.vanished(&"a".parse().unwrap(), now);
        assert_eq!(due(&mut tracker, now), ["a"]);
        let again = NodeRecord { incarnation: 2, ..record("a") };
        tracker.put(again.clone());
        tracker.looked(&record("a"), false);
        assert_eq!(ids(&tracker), ["a"]);
        tracker.vanished(&"a".parse().unwrap(), now);
        tracker.looked(&record("a"), false);
        assert_eq!(ids(&tracker), ["a"], "it was the start before that was silent");
        tracker.looked(&again, false);
        assert!(ids(&tracker).is_empty());
    }

    #[test]
    fn a_second_outage_does_not_put_off_the_look() {
        let (mut tracker, now) = (Tracker::default(), Instant::now());
        tracker.list(vec![record("a")], now, GRACE);
        tracker.list(vec![], now, GRACE);
        tracker.list(vec![], now + GRACE / 2, GRACE);
        assert_eq!(tracker.next_due(), Some(now + GRACE));
    }
}
