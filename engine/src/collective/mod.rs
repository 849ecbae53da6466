//! What tensor-parallel ranks do together.

pub mod hosts;
mod memory;

use std::fmt;

pub use memory::SharedMemory;

/// Another rank died, stalled or failed: what the ranks were doing together is lost, and so is their
/// node.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("tensor-parallel rank {rank} was lost: {cause}")]
pub struct RankLost {
    /// The rank; of several that share a process, the first.
    pub rank: usize,
    /// What was seen of it.
    pub cause: String,
}

impl RankLost {
    /// Rank `rank` is lost because `cause`.
    #[must_use]
    pub fn new(rank: usize, cause: impl Into<String>) -> Self {
        Self { rank, cause: cause.into() }
    }
}

/// The ranks of one model. Every rank calls the same operations in the same order.
pub trait Collective: fmt::Debug + Send + Sync {
    /// How many ranks there are.
    fn ranks(&self) -> usize;

    /// Replaces `values` by their sums over all ranks, added in the order of the ranks, so that
    /// every rank has the same bits. All ranks give the same length.
    ///
    /// # Errors
    /// [`RankLost`].
    fn all_reduce(&self, values: &mut [f32]) -> Result<(), RankLost>;

    /// Tells the other ranks that this one goes no further.
    fn give_up(&self);
}

/// One rank that holds the whole model.
#[derive(Clone, Copy, Debug)]
pub struct Alone;

impl Collective for Alone {
    fn ranks(&self) -> usize {
        1
    }

    fn all_reduce(&self, _values: &mut [f32]) -> Result<(), RankLost> {
        Ok(())
    }

    fn give_up(&self) {}
}
