//! Ranks in several processes, on one machine or many.
//!
//! Process 0 leads: the others join it ([`mod@join`]), it tells them what to run, and they send it what
//! it sums ([`group`]). Each follower has two connections to the leader. One carries the work, in
//! strict order ([`link`]). The other is a pulse ([`watch`]): a process that dies or stalls is found
//! by its silence there, however long a step takes, and then the work's connections are closed, so
//! that nobody waits for it.

pub mod group;
pub mod join;
pub mod link;
pub mod watch;

use std::fmt;
use std::ops::Range;

pub use group::Spanning;
pub use join::{JoinError, Member, Terms, gather, join};
pub use watch::Pulse;

/// A process's place among the processes of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Tensor-parallel ranks of the model, a multiple of `hosts`.
    pub ranks: usize,
    /// Processes that share them evenly.
    pub hosts: usize,
    /// This process, below `hosts`; 0 leads.
    pub host: usize,
}

impl Place {
    /// The ranks that process `host` runs.
    #[must_use]
    pub fn ranks_of(&self, host: usize) -> Range<usize> {
        let each = self.ranks / self.hosts.max(1);
        host * each..(host + 1) * each
    }

    /// The ranks that this process runs.
    #[must_use]
    pub fn local(&self) -> Range<usize> {
        self.ranks_of(self.host)
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { ranks, hosts, host } = self;
        write!(f, "host {host} of {hosts} with {ranks} ranks")
    }
}
