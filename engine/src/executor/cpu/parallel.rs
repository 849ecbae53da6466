//! Tensor parallelism over threads of this process: one executor a rank, side by side.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use super::{CpuExecutor, CpuOptions, check_size, lost, probe};
use crate::collective::{RankLost, SharedMemory};
use crate::core::sampling;
use crate::executor::{Executor, ExecutorError, Found, KvFormat, Limits, PageId, Row};
use crate::model::Model;

/// The ranks of one model. The calling thread leads: it checks the batch, is rank 0 itself, and
/// makes the answer from what all ranks found. A rank that fails fails the batch and, for good, the
/// executor.
#[derive(Debug)]
pub struct TensorParallel {
    ranks: Vec<CpuExecutor>,
    sampler: sampling::Scratch,
}

impl TensorParallel {
    /// An executor over all parts of a model, in the order of their ranks. `options.threads` are
    /// shared out, at least one to a rank.
    ///
    /// # Errors
    /// As [`CpuExecutor::new`].
    ///
    /// # Panics
    /// If the parts are not all the parts of one model, in order.
    pub fn new(parts: Vec<Arc<Model>>, options: CpuOptions) -> Result<Self, ExecutorError> {
        let ranks = parts.len();
        let in_order = |(rank, part): (usize, &Arc<Model>)| {
            (part.shard().rank, part.shard().ranks) == (rank, ranks)
        };
        assert!(ranks > 0 && parts.iter().enumerate().all(in_order), "all parts, in order");
        let (each, more) = (options.threads / ranks, options.threads % ranks);
        let ends = SharedMemory::group(ranks);
        let rank = |(rank, (part, end)): (usize, (Arc<Model>, SharedMemory))| {
            let threads = (each + usize::from(rank < more)).max(1);
            CpuExecutor::rank(part, CpuOptions { threads, ..options }, Box::new(end))
        };
        let ranks = parts.into_iter().zip(ends).enumerate().map(rank).collect::<Result<_, _>>()?;
        Ok(Self { ranks, sampler: sampling::Scratch::default() })
    }

    /// Bytes of a page, all ranks.
    fn page_bytes(&self) -> usize {
        self.ranks.iter().map(|rank| rank.kv.shape().page_bytes()).sum()
    }
}

impl Executor for TensorParallel {
    fn limits(&self) -> Limits {
        self.ranks[0].limits
    }

    fn execute(&mut self, rows: &[Row<'_>]) -> Result<Vec<Vec<Found>>, ExecutorError> {
        self.ranks[0].check(rows)?;
        let (leader, others) = self.ranks.split_at_mut(1);
        let found = std::thread::scope(|scope| {
            let others: Vec<_> =
                others.iter_mut().map(|rank| scope.spawn(|| run(rank, rows))).collect();
            let first = run(&mut leader[0], rows);
            let others = others.into_iter().map(|rank| rank.join().unwrap_or(Err(RankLost)));
            std::iter::once(first).chain(others).collect::<Result<Vec<_>, _>>()
        });
        probe::join(rows, found.map_err(lost)?, &mut self.sampler)
    }

    fn kv_format(&self) -> Option<KvFormat> {
        Some(self.ranks[0].kv_format_of(self.ranks.len()))
    }

    fn read_page(&mut self, page: PageId, out: &mut Vec<u8>) -> Result<(), ExecutorError> {
        self.ranks[0].check_page(page)?;
        out.resize(self.page_bytes(), 0);
        let mut rest = out.as_mut_slice();
        for rank in &self.ranks {
            let (part, after) = rest.split_at_mut(rank.kv.shape().page_bytes());
            rank.copy_page_out(page, part);
            rest = after;
        }
        Ok(())
    }

    fn write_page(&mut self, page: PageId, data: &[u8]) -> Result<(), ExecutorError> {
        self.ranks[0].check_page(page)?;
        check_size(data, self.page_bytes())?;
        let mut rest = data;
        for rank in &mut self.ranks {
            let (part, after) = rest.split_at(rank.kv.shape().page_bytes());
            rank.copy_page_in(page, part);
            rest = after;
        }
        Ok(())
    }
}

/// A rank's part of a step. One that panics tells the others before they wait for it.
fn run(rank: &mut CpuExecutor, rows: &[Row<'_>]) -> Result<Vec<Vec<probe::Partial>>, RankLost> {
    catch_unwind(AssertUnwindSafe(|| rank.run(rows))).unwrap_or_else(|_| {
        rank.collective.give_up();
        Err(RankLost)
    })
}
