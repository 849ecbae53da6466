//! Sums over ranks of which some are threads of this process and the others are elsewhere.
//!
//! Followers send what each of their ranks has, the leader adds everything in the order of the
//! ranks and sends the sum back. The order is that of [`SharedMemory`](crate::collective), so the
//! bits are those of one process.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use super::super::memory::Barrier;
use super::super::{Collective, RankLost};
use super::Place;
use super::link::{Kind, Link, put_floats};
use super::watch::Pulse;

/// A follower, seen from the leader.
#[derive(Debug)]
pub struct Peer {
    /// The connection to it.
    pub link: Link,
    /// Its ranks.
    pub ranks: Range<usize>,
}

/// The other processes.
#[derive(Debug)]
pub enum Others {
    /// This process leads these, in the order of their ranks.
    Followers(Vec<Peer>),
    /// This process follows.
    Leader(Link),
}

/// One rank's end.
#[derive(Debug)]
pub struct Spanning {
    rank: usize,
    group: Arc<Group>,
}

#[derive(Debug)]
struct Group {
    place: Place,
    /// What each local rank has.
    parts: Vec<RwLock<Vec<f32>>>,
    sum: RwLock<Vec<f32>>,
    barrier: Barrier,
    others: Arc<Mutex<Others>>,
    pulse: Pulse,
}

impl Spanning {
    /// The ends of this process's ranks, in order. The first of them talks to `others`, which
    /// whoever owns the ranks may use between two operations.
    #[must_use]
    pub fn group(place: Place, others: Arc<Mutex<Others>>, pulse: Pulse) -> Vec<Self> {
        let local = place.local();
        let group = Arc::new(Group {
            place,
            parts: local.clone().map(|_| RwLock::default()).collect(),
            sum: RwLock::default(),
            barrier: Barrier::new(local.len()),
            others,
            pulse,
        });
        local.map(|rank| Self { rank, group: Arc::clone(&group) }).collect()
    }
}

/// The other processes, for the one who talks to them.
pub fn talk(others: &Mutex<Others>) -> MutexGuard<'_, Others> {
    others.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Group {
    /// Makes the sum of all parts, here or at the leader.
    fn sum(&self) -> Result<(), RankLost> {
        let mut sum = self.sum.write().unwrap_or_else(PoisonError::into_inner);
        let part = |index: usize| self.parts[index].read().unwrap_or_else(PoisonError::into_inner);
        match &mut *talk(&self.others) {
            Others::Followers(peers) => {
                sum.clone_from(&part(0));
                for index in 1..self.parts.len() {
                    let part = part(index);
                    assert_eq!(part.len(), sum.len(), "ranks reduce the same values");
                    sum.iter_mut().zip(part.iter()).for_each(|(sum, value)| *sum += value);
                }
                for peer in peers.iter_mut() {
                    for _ in peer.ranks.clone() {
                        peer.link.receive_floats(Kind::Part, &mut sum, |sum, v| *sum += v)?;
                    }
                }
                for peer in peers {
                    peer.link.send(Kind::Sum, |out| put_floats(out, &sum))?;
                }
            }
            Others::Leader(link) => {
                for index in 0..self.parts.len() {
                    link.send(Kind::Part, |out| put_floats(out, &part(index)))?;
                }
                sum.resize(part(0).len(), 0.0);
                link.receive_floats(Kind::Sum, &mut sum, |sum, value| *sum = value)?;
            }
        }
        Ok(())
    }
}

impl Collective for Spanning {
    fn ranks(&self) -> usize {
        self.group.place.ranks
    }

    fn all_reduce(&self, values: &mut [f32]) -> Result<(), RankLost> {
        let (group, local) = (&self.group, self.rank - self.group.place.local().start);
        {
            let mut mine = group.parts[local].write().unwrap_or_else(PoisonError::into_inner);
            mine.clear();
            mine.extend_from_slice(values);
        }
        group.barrier.wait()?;
        if local == 0
            && let Err(lost) = group.sum()
        {
            group.barrier.lose(lost.clone());
            return Err(lost);
        }
        group.barrier.wait()?;
        values.copy_from_slice(&group.sum.read().unwrap_or_else(PoisonError::into_inner));
        Ok(())
    }

    fn give_up(&self) {
        let lost = self.group.pulse.lose(RankLost::new(self.rank, "it stopped"));
        self.group.barrier.lose(lost);
    }
}
