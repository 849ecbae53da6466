//! A model whose ranks are in several processes, whatever device they run on.
//!
//! The leader's process is an executor like any other (`Leading`): it tells the others each step's
//! plan, runs its own ranks, and makes one answer of what all ranks found. The others do what they are
//! told until it leaves (`follower`). How ranks sum is their device's own affair.

pub(super) mod follower;
pub(super) mod leader;
mod wire;

use std::time::Duration;

use super::partial::Partial;
use super::{ExecutorError, KvFormat, Limits, PageId, Row};
use crate::collective::RankLost;
use crate::collective::hosts::JoinError;
pub(super) use leader::Leading;

/// How a model's processes wait for each other.
#[derive(Clone, Copy, Debug)]
pub struct HostTimes {
    /// The time to find together.
    pub join_timeout: Duration,
    /// A process that is silent for so long is lost.
    pub silence_max: Duration,
}

/// Why a process does not lead.
#[derive(Debug, thiserror::Error)]
pub enum LeadError {
    /// The others did not come.
    #[error(transparent)]
    Join(#[from] JoinError),
    /// Its own ranks cannot run.
    #[error(transparent)]
    Executor(#[from] ExecutorError),
    /// Another process was lost before all were ready.
    #[error(transparent)]
    Lost(#[from] RankLost),
}

/// A process that follows could not begin, or go on.
#[derive(Debug, thiserror::Error)]
pub enum FollowError {
    /// It found no leader that takes it.
    #[error(transparent)]
    Join(#[from] JoinError),
    /// Its ranks cannot run.
    #[error(transparent)]
    Executor(#[from] ExecutorError),
    /// The leader is gone.
    #[error(transparent)]
    Lost(#[from] RankLost),
}

/// What the ranks of a process find at each probe of each row: `[rank][row][probe]`.
pub(super) type Partials = Vec<Vec<Vec<Partial>>>;

/// The ranks of one process.
pub(super) trait LocalRanks: Send {
    /// The model's limits.
    fn limits(&self) -> Limits;

    /// What pages of all ranks together are to other executors.
    fn format(&self) -> Option<KvFormat>;

    /// Refuses a batch that [`Self::run`] would not run.
    ///
    /// # Errors
    /// [`ExecutorError`], not fatal.
    fn check(&self, rows: &[Row<'_>]) -> Result<(), ExecutorError>;

    /// Runs these ranks' part of a batch.
    ///
    /// # Errors
    /// [`ExecutorError`], after which the ranks are of no further use.
    fn run(&mut self, rows: &[Row<'_>]) -> Result<Partials, ExecutorError>;

    /// Bytes of a page of these ranks.
    fn page_bytes(&self) -> usize;

    /// Copies a page of these ranks, one behind the other, into as many bytes.
    ///
    /// # Errors
    /// [`ExecutorError`]
    fn copy_out(&mut self, page: PageId, out: &mut [u8]) -> Result<(), ExecutorError>;

    /// The reverse of [`Self::copy_out`].
    ///
    /// # Errors
    /// [`ExecutorError`]
    fn copy_in(&mut self, page: PageId, data: &[u8]) -> Result<(), ExecutorError>;
}
