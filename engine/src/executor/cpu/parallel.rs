//! Tensor parallelism: one executor a rank, side by side in this process, and perhaps in others.

use std::net::TcpListener;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};

use super::{CpuExecutor, CpuOptions};
use crate::collective::hosts::group::Others;
use crate::collective::hosts::{Member, Place, Spanning, Terms, gather};
use crate::collective::{Collective, RankLost, SharedMemory};
use crate::core::sampling;
use crate::executor::check::check_page_bytes;
use crate::executor::hosts::leader::Elsewhere;
use crate::executor::hosts::{HostTimes, LeadError, Leading, LocalRanks, Partials};
use crate::executor::partial::{self, Partial};
use crate::executor::{Executor, ExecutorError, Found, KvFormat, Limits, PageId, Row};
use crate::model::Model;

/// The ranks of a model that this process has, all of them unless others follow or lead. The calling
/// thread is the first of them. A rank that fails fails the batch and, for good, the executor.
#[derive(Debug)]
pub struct TensorParallel {
    ranks: Vec<CpuExecutor>,
    /// Ranks of the whole model.
    of: usize,
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
        let place = Place { ranks: parts.len(), hosts: 1, host: 0 };
        let ends = SharedMemory::group(parts.len());
        Self::of(parts, place, options, ends)
    }

    /// The ranks of a place.
    pub(super) fn of<C: Collective + 'static>(
        parts: Vec<Arc<Model>>,
        place: Place,
        options: CpuOptions,
        ends: Vec<C>,
    ) -> Result<Self, ExecutorError> {
        let ranks = side_by_side(parts, place.local().start, options, ends)?;
        Ok(Self { ranks, of: place.ranks, sampler: sampling::Scratch::default() })
    }
}

/// Leads the ranks of a model that other processes share: waits on `listener` for them.
///
/// # Errors
/// [`JoinError`](crate::collective::hosts::JoinError); as [`CpuExecutor::new`].
///
/// # Panics
/// If the parts are not those of this place, in order.
pub fn lead(
    parts: Vec<Arc<Model>>,
    options: CpuOptions,
    place: Place,
    times: HostTimes,
    listener: &TcpListener,
) -> Result<Box<dyn Executor>, LeadError> {
    let CpuOptions { page_size, chunk_tokens, kv_tokens, .. } = options;
    let terms = Terms { page_size, chunk_tokens, kv_tokens, silence_max: times.silence_max };
    let member = Member { place, model: parts[0].hash(), on_gpus: false };
    let (peers, pulse) = gather(listener, &member, terms, times.join_timeout)?;
    let others = Arc::new(Mutex::new(Others::Followers(peers)));
    let ends = Spanning::group(place, Arc::clone(&others), pulse.clone());
    let ranks = TensorParallel::of(parts, place, options, ends)?;
    Ok(Box::new(Leading::new(ranks, Elsewhere::new(others, pulse, place))))
}

/// The executors of neighbouring ranks, the first of them `first`.
fn side_by_side<C: Collective + 'static>(
    parts: Vec<Arc<Model>>,
    first: usize,
    options: CpuOptions,
    ends: Vec<C>,
) -> Result<Vec<CpuExecutor>, ExecutorError> {
    let (here, all) = (parts.len(), ends.first().map_or(0, Collective::ranks));
    let in_order = |(rank, part): (usize, &Arc<Model>)| {
        (part.shard().rank, part.shard().ranks) == (first + rank, all)
    };
    assert!(here > 0 && parts.iter().enumerate().all(in_order), "all parts, in order");
    let (each, more) = (options.threads / here, options.threads % here);
    let rank = |(rank, (part, end)): (usize, (Arc<Model>, C))| {
        let threads = (each + usize::from(rank < more)).max(1);
        CpuExecutor::rank(part, CpuOptions { threads, ..options }, Box::new(end))
    };
    parts.into_iter().zip(ends).enumerate().map(rank).collect()
}

impl LocalRanks for TensorParallel {
    fn limits(&self) -> Limits {
        self.ranks[0].limits
    }

    fn format(&self) -> Option<KvFormat> {
        Some(self.ranks[0].kv_format_of(self.of))
    }

    fn check(&self, rows: &[Row<'_>]) -> Result<(), ExecutorError> {
        self.ranks[0].limits.check(rows)
    }

    fn run(&mut self, rows: &[Row<'_>]) -> Result<Partials, ExecutorError> {
        Ok(run_all(&mut self.ranks, rows)?)
    }

    fn page_bytes(&self) -> usize {
        self.ranks.iter().map(|rank| rank.kv.shape().page_bytes()).sum()
    }

    fn copy_out(&mut self, page: PageId, out: &mut [u8]) -> Result<(), ExecutorError> {
        let mut rest = out;
        for rank in &self.ranks {
            let (part, after) = rest.split_at_mut(rank.kv.shape().page_bytes());
            rank.copy_page_out(page, part);
            rest = after;
        }
        Ok(())
    }

    fn copy_in(&mut self, page: PageId, data: &[u8]) -> Result<(), ExecutorError> {
        let mut rest = data;
        for rank in &mut self.ranks {
            let (part, after) = rest.split_at(rank.kv.shape().page_bytes());
            rank.copy_page_in(page, part);
            rest = after;
        }
        Ok(())
    }
}

impl Executor for TensorParallel {
    fn limits(&self) -> Limits {
        LocalRanks::limits(self)
    }

    fn execute(&mut self, rows: &[Row<'_>]) -> Result<Vec<Vec<Found>>, ExecutorError> {
        self.check(rows)?;
        let found = self.run(rows)?;
        partial::join(rows, found, &mut self.sampler)
    }

    fn kv_format(&self) -> Option<KvFormat> {
        self.format()
    }

    fn read_page(&mut self, page: PageId, out: &mut Vec<u8>) -> Result<(), ExecutorError> {
        self.ranks[0].limits.check_page(page)?;
        out.resize(self.page_bytes(), 0);
        self.copy_out(page, out)
    }

    fn write_page(&mut self, page: PageId, data: &[u8]) -> Result<(), ExecutorError> {
        self.ranks[0].limits.check_page(page)?;
        check_page_bytes(data, self.page_bytes())?;
        self.copy_in(page, data)
    }
}

/// A step on neighbouring ranks, the first of them on this thread: what each found, in order.
fn run_all(ranks: &mut [CpuExecutor], rows: &[Row<'_>]) -> Result<Partials, RankLost> {
    let Some((first, others)) = ranks.split_first_mut() else { return Ok(Vec::new()) };
    std::thread::scope(|scope| {
        let mut started = Vec::new();
        for rank in others {
            let number = rank.model.shard().rank;
            match std::thread::Builder::new().spawn_scoped(scope, || run(rank, rows)) {
                Ok(rank) => started.push(rank),
                Err(error) => {
                    // Those that run wait for it.
                    first.collective.give_up();
                    return Err(RankLost::new(number, format!("it has no thread: {error}")));
                }
            }
        }
        let first = run(first, rows);
        let others = started.into_iter().map(|rank| match rank.join() {
            Ok(found) => found,
            // `run` lets none through.
            Err(panicked) => std::panic::resume_unwind(panicked),
        });
        std::iter::once(first).chain(others).collect()
    })
}

/// A rank's part of a step. One that panics tells the others before they wait for it.
fn run(rank: &mut CpuExecutor, rows: &[Row<'_>]) -> Result<Vec<Vec<Partial>>, RankLost> {
    catch_unwind(AssertUnwindSafe(|| rank.run(rows))).unwrap_or_else(|_| {
        rank.collective.give_up();
        Err(RankLost::new(rank.model.shard().rank, "it panicked"))
    })
}
