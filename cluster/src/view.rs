//! The cluster at one moment, and what changed between two moments.

use std::collections::BTreeMap;

use headstart_proto::NodeId;

use crate::{NodeRecord, Tier};

/// Every registered node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct View {
    /// The nodes by their id.
    pub nodes: BTreeMap<NodeId, NodeRecord>,
}

impl View {
    /// The nodes of one tier, draining ones included, in the order of their ids.
    pub fn tier(&self, tier: Tier) -> impl Iterator<Item = &NodeRecord> {
        self.nodes.values().filter(move |record| record.tier == tier)
    }
}

/// What happened to one node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// A node came, or came back after a restart.
    Add(NodeRecord),
    /// The same start of a node tells something new.
    Update {
        /// What it told before.
        old: NodeRecord,
        /// What it tells now.
        new: NodeRecord,
    },
    /// A node left, or was restarted and comes back with an [`Change::Add`] right after.
    Remove(NodeRecord),
}

/// What turns `old` into `new`, in the order of node ids. A node that was restarted (another
/// incarnation) is removed and added: nothing that was known of the old start holds for the new.
pub fn diff(old: &View, new: &View) -> Vec<Change> {
    let mut changes = Vec::new();
    let mut ids: Vec<&NodeId> = old.nodes.keys().chain(new.nodes.keys()).collect();
    ids.sort_unstable();
    ids.dedup();
    for id in ids {
        match (old.nodes.get(id), new.nodes.get(id)) {
            (None, Some(new)) => changes.push(Change::Add(new.clone())),
            (Some(old), None) => changes.push(Change::Remove(old.clone())),
            (Some(old), Some(new)) if old.incarnation != new.incarnation => {
                changes.push(Change::Remove(old.clone()));
                changes.push(Change::Add(new.clone()));
            }
            (Some(old), Some(new)) if old != new => {
                changes.push(Change::Update { old: old.clone(), new: new.clone() });
            }
            _ => {}
        }
    }
    changes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::tests::record;
    use proptest::prelude::*;

    fn view(records: impl IntoIterator<Item = NodeRecord>) -> View {
        View { nodes: records.into_iter().map(|r| (r.node_id.clone(), r)).collect() }
    }

    #[test]
    fn every_kind_of_change() {
        let (kept, gone, came) = (record("a"), record("b"), record("c"));
        let busy = NodeRecord { draining: true, ..record("d") };
        let again = NodeRecord { incarnation: 2, ..record("e") };
        let old = view([kept.clone(), gone.clone(), record("d"), record("e")]);
        let new = view([kept, came.clone(), busy.clone(), again.clone()]);
        let expected = vec![
            Change::Remove(gone),
            Change::Add(came),
            Change::Update { old: record("d"), new: busy },
            Change::Remove(record("e")),
            Change::Add(again),
        ];
        assert_eq!(diff(&old, &new), expected);
        assert_eq!(diff(&new, &new), vec![]);
    }

    #[test]
    fn tiers_are_told_apart() {
        let base = NodeRecord { tier: Tier::Base, ..record("b") };
        let view = view([record("a"), base]);
        let ids: Vec<_> = view.tier(Tier::Base).map(|r| r.node_id.as_str()).collect();
        assert_eq!(ids, ["b"]);
    }

    fn any_view() -> impl Strategy<Value = View> {
        let node = (0_u8..6, 1_u64..3, any::<bool>()).prop_map(|(id, incarnation, draining)| {
            NodeRecord { incarnation, draining, ..record(&format!("n{id}")) }
        });
        proptest::collection::vec(node, 0..6).prop_map(view)
    }

    proptest! {
        #[test]
        fn applying_a_diff_gives_the_new_view(old in any_view(), new in any_view()) {
            let mut nodes = old.nodes.clone();
            for change in diff(&old, &new) {
                match change {
                    Change::Add(r) => prop_assert!(nodes.insert(r.node_id.clone(), r).is_none()),
                    Change::Update { old, new } => {
                        prop_assert_eq!(nodes.insert(new.node_id.clone(), new), Some(old));
                    }
                    Change::Remove(r) => {
                        prop_assert_eq!(nodes.remove(&r.node_id), Some(r));
                    }
                }
            }
            prop_assert_eq!(View { nodes }, new);
        }
    }
}
