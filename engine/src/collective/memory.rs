//! Ranks that are threads of one process.

use std::hint::spin_loop;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError, RwLock};

use super::{Collective, RankLost};

/// Ranks that are threads of one process.
///
/// A rank that gives up, or drops its end, takes the others with it: they get [`RankLost`] instead
/// of waiting for ever.
#[derive(Debug)]
pub struct SharedMemory {
    rank: usize,
    group: Arc<Group>,
    /// Which of the two buffers the next operation uses.
    turn: AtomicUsize,
}

#[derive(Debug)]
struct Group {
    /// Two buffers a rank: a rank may write the next operation's values while another one still
    /// reads the last one's, and none can be two operations ahead.
    parts: Vec<[RwLock<Vec<f32>>; 2]>,
    barrier: Barrier,
}

impl SharedMemory {
    /// The ends of `ranks` ranks, in order.
    #[must_use]
    pub fn group(ranks: usize) -> Vec<Self> {
        let parts = (0..ranks).map(|_| Default::default()).collect();
        let group = Arc::new(Group { parts, barrier: Barrier::new(ranks) });
        (0..ranks)
            .map(|rank| Self { rank, group: Arc::clone(&group), turn: AtomicUsize::new(0) })
            .collect()
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        self.give_up();
    }
}

impl Collective for SharedMemory {
    fn ranks(&self) -> usize {
        self.group.parts.len()
    }

    fn all_reduce(&self, values: &mut [f32]) -> Result<(), RankLost> {
        let turn = self.turn.fetch_xor(1, Ordering::Relaxed);
        let part = |rank: usize| &self.group.parts[rank][turn];
        {
            let mut mine = part(self.rank).write().unwrap_or_else(PoisonError::into_inner);
            mine.clear();
            mine.extend_from_slice(values);
        }
        self.group.barrier.wait()?;
        for rank in 0..self.group.parts.len() {
            let theirs = part(rank).read().unwrap_or_else(PoisonError::into_inner);
            assert_eq!(theirs.len(), values.len(), "ranks reduce the same values");
            if rank == 0 {
                values.copy_from_slice(&theirs);
            } else {
                values.iter_mut().zip(theirs.iter()).for_each(|(sum, value)| *sum += value);
            }
        }
        Ok(())
    }

    fn give_up(&self) {
        self.group.barrier.lose(RankLost::new(self.rank, "it stopped"));
    }
}

/// How often a rank looks before it sleeps. A step has two operations a layer, and ranks arrive
/// within microseconds of each other where each has a core.
const SPINS: usize = 2_000;

/// A barrier that can be lost. What is written before it is read after it.
#[derive(Debug)]
pub(super) struct Barrier {
    ranks: usize,
    arrived: AtomicUsize,
    generation: AtomicUsize,
    lost: OnceLock<RankLost>,
    sleeping: Mutex<()>,
    moved: Condvar,
}

impl Barrier {
    pub(super) fn new(ranks: usize) -> Self {
        Self {
            ranks,
            arrived: AtomicUsize::new(0),
            generation: AtomicUsize::new(0),
            lost: OnceLock::new(),
            sleeping: Mutex::new(()),
            moved: Condvar::new(),
        }
    }

    pub(super) fn wait(&self) -> Result<(), RankLost> {
        let generation = self.generation.load(Ordering::Acquire);
        if self.arrived.fetch_add(1, Ordering::AcqRel) + 1 == self.ranks {
            self.arrived.store(0, Ordering::Relaxed);
            self.generation.store(generation.wrapping_add(1), Ordering::Release);
            self.wake();
        }
        let waits = || self.generation.load(Ordering::Acquire) == generation;
        let lost = || self.lost.get().is_some();
        for _ in 0..SPINS {
            if !waits() || lost() {
                break;
            }
            spin_loop();
        }
        if waits() && !lost() {
            let mut guard = self.sleeping.lock().unwrap_or_else(PoisonError::into_inner);
            while waits() && !lost() {
                guard = self.moved.wait(guard).unwrap_or_else(PoisonError::into_inner);
            }
        }
        self.lost.get().map_or(Ok(()), |lost| Err(lost.clone()))
    }

    /// Frees whoever waits, now and later. The first loss counts.
    pub(super) fn lose(&self, lost: RankLost) {
        let _ = self.lost.set(lost);
        self.wake();
    }

    /// The lock orders this after a sleeper's last look.
    fn wake(&self) {
        drop(self.sleeping.lock().unwrap_or_else(PoisonError::into_inner));
        self.moved.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_rank_gets_the_same_sums_again_and_again() {
        for ranks in [1, 2, 3, 4] {
            let sums = std::thread::scope(|scope| {
                let run = |end: SharedMemory| {
                    move || {
                        let mut bits = Vec::new();
                        for round in 0..500usize {
                            // Sums whose bits depend on the order of the additions.
                            let seed = (end.rank * 977 + round * 31) as f32;
                            let mut values = vec![(seed * 0.37).sin() * 1e3, (seed * 0.11).cos()];
                            end.all_reduce(&mut values).expect("nobody is lost");
                            bits.extend(values.iter().map(|v| v.to_bits()));
                        }
                        (bits, end)
                    }
                };
                let ranks = SharedMemory::group(ranks).into_iter().map(|end| scope.spawn(run(end)));
                let ranks: Vec<_> = ranks.collect();
                ranks.into_iter().map(|rank| rank.join().expect("ends")).collect::<Vec<_>>()
            });
            assert!(sums.iter().all(|(bits, _)| *bits == sums[0].0));
            let value = |rank: usize| ((rank * 977 + 499 * 31) as f32 * 0.11).cos();
            let expected = (1..ranks).fold(value(0), |sum, rank| sum + value(rank));
            assert_eq!(sums[0].0.last(), Some(&expected.to_bits()));
        }
    }

    #[test]
    fn a_lost_rank_frees_the_others() {
        let mut ends = SharedMemory::group(3);
        let dying = ends.pop().expect("three");
        let lost = Err(RankLost::new(2, "it stopped"));
        std::thread::scope(|scope| {
            let waiting: Vec<_> =
                ends.iter().map(|end| scope.spawn(|| end.all_reduce(&mut [1.0]))).collect();
            drop(dying);
            for rank in waiting {
                assert_eq!(rank.join().expect("ends"), lost);
            }
        });
        assert_eq!(ends[0].all_reduce(&mut [1.0]), lost, "lost for good");
    }
}
