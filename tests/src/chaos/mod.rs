//! Chaos: a real cluster of processes under load, while parts of it are killed, paused, stopped,
//! parted from each other and slowed down. Every answer is compared with the undisturbed one.

pub mod client;
pub mod counters;
pub mod faults;
pub mod fleet;
pub mod load;
pub mod network;
pub mod plot;
pub mod report;
pub mod requests;

/// A small deterministic generator (SplitMix64): which fault strikes whom is a function of a seed.
#[derive(Clone, Debug)]
pub struct Draw(u64);

impl Draw {
    /// A generator that starts at `seed`.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `bound`, or 0 if that is 0.
    pub fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.bits() % (bound.max(1) as u64)).unwrap_or_default()
    }

    /// One of `items`; `None` of nothing.
    pub fn of<'a, T>(&mut self, items: &'a [T]) -> Option<&'a T> {
        items.get(self.below(items.len()))
    }
}
