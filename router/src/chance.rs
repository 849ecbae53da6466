//! The router's own chance: the seeds of requests that name none, and what spreads pauses.

use std::sync::atomic::{AtomicU64, Ordering};

/// A stream of numbers, drawn by everybody in the router. Not for secrets.
#[derive(Debug)]
pub(crate) struct Chance(AtomicU64);

impl Chance {
    /// The stream of `seed`, or one that nobody chose.
    pub(crate) fn new(seed: Option<u64>) -> Self {
        let fresh = || {
            // The random parts of a fresh id.
            let (high, low) = uuid::Uuid::now_v7().as_u64_pair();
            low ^ high.rotate_left(17)
        };
        Self(AtomicU64::new(seed.unwrap_or_else(fresh)))
    }

    /// 64 bits (SplitMix64, Steele, Lea, Flood, OOPSLA 2014).
    pub(crate) fn bits(&self) -> u64 {
        const GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;
        let mut z = self.0.fetch_add(GAMMA, Ordering::Relaxed).wrapping_add(GAMMA);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// In `[0, 1)`.
    pub(crate) fn unit(&self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// 0 to 999.
    pub(crate) fn permille(&self) -> u32 {
        u32::try_from(self.bits() % 1000).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_gives_its_stream_and_no_seed_another_each_time() {
        let draw = |seed| {
            let chance = Chance::new(seed);
            [chance.bits(), chance.bits(), u64::from(chance.permille())]
        };
        assert_eq!(draw(Some(7)), draw(Some(7)));
        assert_ne!(draw(Some(7)), draw(Some(8)));
        assert_ne!(draw(None), draw(None));
        assert!(draw(None)[2] < 1000);
    }
}
