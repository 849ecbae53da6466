//! What runs a model: one narrow trait, with a real and a fake implementation beside it.

mod check;
pub mod cpu;
pub mod cuda;
pub mod device;
pub mod fake;
pub mod hosts;
pub mod kv;
mod partial;
mod vocab;

use crate::collective::RankLost;
use crate::collective::hosts::Pulse;
use crate::core::pages::PageId;
use crate::core::sampling::Sampling;
pub use kv::{KvDtype, KvFormat, KvLayout, ModelHash};

/// A token id in the model's vocabulary.
pub type TokenId = u32;

/// What the engine must know of a model before it plans anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Tokens in the vocabulary; every id is below it.
    pub vocab_size: usize,
    /// Tokens a sequence can hold, prompt and answer together.
    pub context_length: usize,
    /// Tokens a KV page holds.
    pub page_size: usize,
    /// KV pages in the pool; ids are `0..pages`.
    pub pages: usize,
}

/// A result wanted at one position of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Probe {
    /// The absolute position whose distribution (over the *next* token) is looked at.
    pub position: usize,
    /// Report the log-probability of this token there.
    pub target: Option<TokenId>,
    /// Sample the next token there, with the row's [`Sampling`].
    pub sample: bool,
    /// Report so many most likely tokens there.
    pub top: usize,
}

/// New tokens of one sequence: those from `start` on are extended into its KV pages.
#[derive(Clone, Copy, Debug)]
pub struct Row<'a> {
    /// Every known token of the sequence, the new ones at the end.
    pub context: &'a [TokenId],
    /// The position of the first new token; KV for `0..start` is in the pages already.
    pub start: usize,
    /// The sequence's page table; it covers the positions up to [`Row::end`].
    pub pages: &'a [PageId],
    /// Where the answer begins in `context`: penalties count `context[answer_start..]`, and the
    /// sampler's position is `position + 1 - answer_start`.
    pub answer_start: usize,
    /// Ascending positions in `start..end()`.
    pub probes: &'a [Probe],
    /// How tokens are sampled.
    pub sampling: &'a Sampling,
    /// Set: the one new token is not known here yet and comes behind `context`. It is what the last
    /// probe of this row of the batch submitted before samples; see [`Pipeline`].
    pub pending: Option<usize>,
}

impl Row<'_> {
    /// Where its new tokens end.
    #[must_use]
    pub fn end(&self) -> usize {
        self.context.len() + usize::from(self.pending.is_some())
    }
}

/// A token with its natural-log probability under the model's raw distribution.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scored {
    /// The token.
    pub token: TokenId,
    /// `ln P(token)`; `-inf` for a probability of zero, never NaN.
    pub logprob: f32,
}

/// What one [`Probe`] found.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Found {
    /// The log-probability of the probe's target.
    pub target: Option<f32>,
    /// The sampled token.
    pub sampled: Option<Scored>,
    /// The most likely tokens, most likely first (lowest id first on ties).
    pub top: Vec<Scored>,
}

/// A model could not run a batch. The batch's sequences are lost, the executor may be used again
/// only if `fatal` is false.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct ExecutorError {
    /// What went wrong.
    pub message: String,
    /// The executor is of no further use (a lost device, a dead rank).
    pub fatal: bool,
}

impl From<RankLost> for ExecutorError {
    fn from(lost: RankLost) -> Self {
        Self { message: lost.to_string(), fatal: true }
    }
}

/// A model that extends sequences: prefill, scoring, decoding and verifying are all the same call.
///
/// The contract every implementation keeps: results of a row depend on nothing but the row's own
/// tokens and sampling, bit for bit: not on the other rows of the batch, not on how its tokens were
/// split into calls.
pub trait Executor: Send {
    /// The model's limits.
    fn limits(&self) -> Limits;

    /// Extends every row and answers its probes: one inner vector a row, one [`Found`] a probe, in
    /// order. Rows are distinct sequences and no page is written by two of them.
    ///
    /// # Errors
    /// [`ExecutorError`] when the device fails.
    fn execute(&mut self, rows: &[Row<'_>]) -> Result<Vec<Vec<Found>>, ExecutorError>;

    /// How batches are handed over without waiting for them, if it works while its host goes on.
    fn pipeline(&mut self) -> Option<&mut dyn Pipeline> {
        None
    }

    /// What its pages are to other executors. `None`: they cannot leave it.
    fn kv_format(&self) -> Option<KvFormat> {
        None
    }

    /// Whether all its ranks are there, where some of them are in other processes.
    fn pulse(&self) -> Option<Pulse> {
        None
    }

    /// Copies a page into `out`, which is resized to fit, in the layout of [`Self::kv_format`].
    ///
    /// # Errors
    /// [`ExecutorError`] when the page cannot be read.
    fn read_page(&mut self, page: PageId, out: &mut Vec<u8>) -> Result<(), ExecutorError> {
        let _ = (page, out);
        Err(ExecutorError { message: "pages cannot be read here".into(), fatal: false })
    }

    /// Overwrites a page with bytes in the layout of [`Self::kv_format`].
    ///
    /// # Errors
    /// [`ExecutorError`] when the page cannot be written, or has another size.
    fn write_page(&mut self, page: PageId, data: &[u8]) -> Result<(), ExecutorError> {
        let _ = (page, data);
        Err(ExecutorError { message: "pages cannot be written here".into(), fatal: false })
    }
}

/// Batches that a [`Pipeline`] holds at most.
pub const IN_FLIGHT_MAX: usize = 2;

/// An executor that works while its host goes on: what [`Executor::execute`] does in one call is
/// submitted and collected here.
///
/// Batches run, and are collected, in the order in which they were submitted; a page read or written
/// between two of them is so between them. At most [`IN_FLIGHT_MAX`] are in flight, which means
/// submitted and not collected. A page that a batch in flight writes belongs to its sequence: no other
/// one may be given it before the batch is collected.
///
/// A row may follow on one of the batch before, its sequence's, although nobody knows yet what that
/// one sampled: [`Row::pending`]. Its results are the same as if its token had been known.
pub trait Pipeline {
    /// Takes a batch, as [`Executor::execute`] does, and returns before it is done.
    ///
    /// # Errors
    /// [`ExecutorError`]: the batch is not in flight; those before it are.
    fn submit(&mut self, rows: &[Row<'_>]) -> Result<(), ExecutorError>;

    /// Waits for the oldest batch in flight, and tells what was found as [`Executor::execute`] does.
    ///
    /// # Errors
    /// [`ExecutorError`] when the device failed, or nothing is in flight. The batch is not in flight
    /// any more; those behind it are, unless the error is fatal.
    fn collect(&mut self) -> Result<Vec<Vec<Found>>, ExecutorError>;
}
