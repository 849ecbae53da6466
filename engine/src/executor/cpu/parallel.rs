//! Tensor parallelism: one executor a rank, side by side in this process, and perhaps in others.

use std::net::TcpListener;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::remote::{PLAN_BYTES_MAX, found, found_bytes_max, plan_bytes, put_plan};
use super::{CpuExecutor, CpuOptions, lost, probe};
use crate::collective::hosts::group::{Others, talk};
use crate::collective::hosts::link::Kind;
use crate::collective::hosts::{JoinError, Place, Pulse, Spanning, Terms, gather};
use crate::collective::{Collective, RankLost, SharedMemory};
use crate::core::sampling;
use crate::executor::check::check_page_bytes;
use crate::executor::{Executor, ExecutorError, Found, KvFormat, Limits, PageId, Row};
use crate::model::Model;

/// The ranks of one model. The calling thread leads: it checks the batch, is rank 0 itself, and
/// makes the answer from what all ranks found. A rank that fails fails the batch and, for good, the
/// executor.
#[derive(Debug)]
pub struct TensorParallel {
    ranks: Vec<CpuExecutor>,
    elsewhere: Option<Elsewhere>,
    sampler: sampling::Scratch,
}

/// The ranks in other processes.
#[derive(Debug)]
struct Elsewhere {
    others: Arc<Mutex<Others>>,
    pulse: Pulse,
    place: Place,
}

impl Drop for Elsewhere {
    fn drop(&mut self) {
        self.pulse.leave();
    }
}

/// How a model's processes wait for each other.
#[derive(Clone, Copy, Debug)]
pub struct HostTimes {
    /// The time to find together.
    pub join_timeout: Duration,
    /// A process that is silent for so long is lost.
    pub silence_max: Duration,
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
        let ends = SharedMemory::group(parts.len());
        let ranks = side_by_side(parts, 0, options, ends)?;
        Ok(Self { ranks, elsewhere: None, sampler: sampling::Scratch::default() })
    }

    /// Leads the ranks of a model that other processes share: waits on `listener` for them.
    ///
    /// # Errors
    /// [`JoinError`]; as [`CpuExecutor::new`].
    ///
    /// # Panics
    /// If the parts are not those of this place, in order.
    pub fn lead(
        parts: Vec<Arc<Model>>,
        options: CpuOptions,
        place: Place,
        times: HostTimes,
        listener: &TcpListener,
    ) -> Result<Self, LeadError> {
        let CpuOptions { page_size, chunk_tokens, kv_tokens, .. } = options;
        let terms = Terms { page_size, chunk_tokens, kv_tokens, silence_max: times.silence_max };
        let model = parts[0].hash();
        let (peers, pulse) = gather(listener, place, model, terms, times.join_timeout)?;
        let others = Arc::new(Mutex::new(Others::Followers(peers)));
        let ends = Spanning::group(place, Arc::clone(&others), pulse.clone());
        let ranks = side_by_side(parts, 0, options, ends)?;
        let elsewhere = Some(Elsewhere { others, pulse, place });
        Ok(Self { ranks, elsewhere, sampler: sampling::Scratch::default() })
    }

    /// Bytes of a page of this process's ranks.
    fn page_bytes(&self) -> usize {
        self.ranks.iter().map(|rank| rank.kv.shape().page_bytes()).sum()
    }
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
}

/// The executors of neighbouring ranks, the first of them `first`.
pub(super) fn side_by_side<C: Collective + 'static>(
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

impl Elsewhere {
    /// Tells the followers what to run.
    fn send_plan(&self, rows: &[Row<'_>]) -> Result<(), ExecutorError> {
        let bytes = plan_bytes(rows);
        if bytes > PLAN_BYTES_MAX {
            let message = format!("a step's plan has {bytes} bytes, more than {PLAN_BYTES_MAX}");
            return Err(ExecutorError { message, fatal: false });
        }
        for peer in followers(&mut talk(&self.others)) {
            peer.link.send(Kind::Plan, |out| put_plan(out, rows)).map_err(lost)?;
        }
        Ok(())
    }

    /// What the followers' ranks found, in the order of the ranks.
    fn found(
        &self,
        rows: &[Row<'_>],
        vocab: usize,
    ) -> Result<Vec<Vec<Vec<probe::Partial>>>, RankLost> {
        let mut all = Vec::with_capacity(self.place.ranks);
        let bytes_max = found_bytes_max(rows, vocab);
        for peer in followers(&mut talk(&self.others)) {
            for _ in peer.ranks.clone() {
                let (_, bytes) = peer.link.receive(&[Kind::Found], bytes_max)?;
                match found(bytes, rows, vocab) {
                    Some(found) => all.push(found),
                    None => return Err(peer.link.malformed()),
                }
            }
        }
        Ok(all)
    }

    /// Appends a page of the followers' ranks to `out`.
    fn read_page(&self, page: PageId, bytes: usize, out: &mut Vec<u8>) -> Result<(), RankLost> {
        let mut left = bytes;
        for peer in followers(&mut talk(&self.others)) {
            peer.link.send(Kind::Read, |out| out.extend(page.0.to_le_bytes()))?;
            let (_, bytes) = peer.link.receive(&[Kind::Page], left)?;
            left -= bytes.len();
            out.extend_from_slice(bytes);
        }
        Ok(())
    }

    fn write_page(&self, page: PageId, format: KvFormat, data: &[u8]) -> Result<(), RankLost> {
        let mut rest = data;
        for peer in followers(&mut talk(&self.others)) {
            let rank = |rank| format.layout.layers * format.layout.layer_bytes(rank);
            let (part, after) = rest.split_at(peer.ranks.clone().map(rank).sum());
            peer.link.send(Kind::Write, |out| {
                out.extend(page.0.to_le_bytes());
                out.extend_from_slice(part);
            })?;
            rest = after;
        }
        Ok(())
    }
}

fn followers(others: &mut Others) -> &mut [crate::collective::hosts::group::Peer] {
    match others {
        Others::Followers(peers) => peers,
        Others::Leader(_) => &mut [],
    }
}

impl Executor for TensorParallel {
    fn limits(&self) -> Limits {
        self.ranks[0].limits
    }

    fn execute(&mut self, rows: &[Row<'_>]) -> Result<Vec<Vec<Found>>, ExecutorError> {
        self.limits().check(rows)?;
        if let Some(elsewhere) = &self.elsewhere {
            elsewhere.send_plan(rows)?;
        }
        let mut found = run_all(&mut self.ranks, rows).map_err(lost)?;
        if let Some(elsewhere) = &self.elsewhere {
            found.extend(elsewhere.found(rows, self.limits().vocab_size).map_err(lost)?);
        }
        probe::join(rows, found, &mut self.sampler)
    }

    fn kv_format(&self) -> Option<KvFormat> {
        let ranks = self.elsewhere.as_ref().map_or(self.ranks.len(), |e| e.place.ranks);
        Some(self.ranks[0].kv_format_of(ranks))
    }

    fn read_page(&mut self, page: PageId, out: &mut Vec<u8>) -> Result<(), ExecutorError> {
        self.limits().check_page(page)?;
        out.resize(self.page_bytes(), 0);
        copy_out(&self.ranks, page, out);
        if let (Some(elsewhere), Some(format)) = (&self.elsewhere, self.kv_format()) {
            let bytes = format.layout.page_bytes();
            elsewhere.read_page(page, bytes - out.len(), out).map_err(lost)?;
            check_page_bytes(out, bytes)?;
        }
        Ok(())
    }

    fn write_page(&mut self, page: PageId, data: &[u8]) -> Result<(), ExecutorError> {
        self.limits().check_page(page)?;
        let (format, here) = (self.kv_format(), self.page_bytes());
        check_page_bytes(data, format.map_or(here, |format| format.layout.page_bytes()))?;
        copy_in(&mut self.ranks, page, &data[..here]);
        if let (Some(elsewhere), Some(format)) = (&self.elsewhere, format) {
            elsewhere.write_page(page, format, &data[here..]).map_err(lost)?;
        }
        Ok(())
    }

    fn pulse(&self) -> Option<Pulse> {
        self.elsewhere.as_ref().map(|elsewhere| elsewhere.pulse.clone())
    }
}

/// A step on neighbouring ranks, the first of them on this thread: what each found, in order.
pub(super) fn run_all(
    ranks: &mut [CpuExecutor],
    rows: &[Row<'_>],
) -> Result<Vec<Vec<Vec<probe::Partial>>>, RankLost> {
    let Some((first, others)) = ranks.split_first_mut() else { return Ok(Vec::new()) };
    std::thread::scope(|scope| {
        let others: Vec<_> =
            others.iter_mut().map(|rank| scope.spawn(|| run(rank, rows))).collect();
        let first = run(first, rows);
        let others = others.into_iter().map(|rank| match rank.join() {
            Ok(found) => found,
            // `run` lets none through.
            Err(panicked) => std::panic::resume_unwind(panicked),
        });
        std::iter::once(first).chain(others).collect()
    })
}

/// A rank's part of a step. One that panics tells the others before they wait for it.
fn run(rank: &mut CpuExecutor, rows: &[Row<'_>]) -> Result<Vec<Vec<probe::Partial>>, RankLost> {
    catch_unwind(AssertUnwindSafe(|| rank.run(rows))).unwrap_or_else(|_| {
        rank.collective.give_up();
        Err(RankLost::new(rank.model.shard().rank, "it panicked"))
    })
}

/// Copies the ranks' parts of a page, one behind the other, into `out`.
pub(super) fn copy_out(ranks: &[CpuExecutor], page: PageId, out: &mut [u8]) {
    let mut rest = out;
    for rank in ranks {
        let (part, after) = rest.split_at_mut(rank.kv.shape().page_bytes());
        rank.copy_page_out(page, part);
        rest = after;
    }
}

/// The reverse of [`copy_out`].
pub(super) fn copy_in(ranks: &mut [CpuExecutor], page: PageId, data: &[u8]) {
    let mut rest = data;
    for rank in ranks {
        let (part, after) = rest.split_at(rank.kv.shape().page_bytes());
        rank.copy_page_in(page, part);
        rest = after;
    }
}
