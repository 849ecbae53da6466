//! How fast this machine reads memory: a sum over a buffer that no cache holds.

use std::hint::black_box;
use std::sync::Barrier;
use std::time::Instant;

use crate::bench::machine;

/// The buffer is this many times the last-level cache.
const CACHES: u64 = 4;
const BUFFER_BYTES_MIN: u64 = 1 << 30;
const BUFFER_BYTES_MAX: u64 = 4 << 30;
/// A sample is the best of so many passes: a limit is what can be reached.
const PASSES: usize = 3;
/// Sums that grow side by side, so that adding never waits for itself.
const LANES: usize = 32;
/// Places that a thread reads at once, which keeps more of the memory's lines in flight.
const STREAMS: usize = 4;

/// Bytes of a buffer that no cache of this machine holds: four times the last-level cache, between 1
/// and 4 GiB, and at most half of the memory that is there.
pub(super) fn buffer_bytes() -> u64 {
    let cache = machine::last_level_cache_bytes().unwrap_or(0);
    let wanted = cache.saturating_mul(CACHES).clamp(BUFFER_BYTES_MIN, BUFFER_BYTES_MAX);
    machine::available_bytes().map_or(wanted, |bytes| wanted.min(bytes / 2))
}

/// A buffer to read from.
#[derive(Debug)]
pub(super) struct Bandwidth {
    words: Vec<u64>,
    threads: usize,
}

impl Bandwidth {
    /// A buffer of `bytes`, to be read by `threads ≥ 1` threads.
    pub(super) fn new(bytes: u64, threads: usize) -> Self {
        let words = usize::try_from(bytes / 8).unwrap_or(0).max(LANES);
        // Not zeros: those would be one page of the kernel's, mapped everywhere.
        Self { words: vec![1; words], threads: threads.max(1) }
    }

    /// Bytes of the buffer.
    pub(super) fn bytes(&self) -> usize {
        self.words.len() * 8
    }

    /// Bytes a second, read by all threads together.
    pub(super) fn sample(&self) -> f64 {
        let best = (0..PASSES).map(|_| self.pass().1).fold(f64::INFINITY, f64::min);
        self.bytes() as f64 / best
    }

    /// The sum of all words, and the seconds it took.
    fn pass(&self) -> (u64, f64) {
        let part = self.words.len().div_ceil(self.threads);
        let parts: Vec<&[u64]> = self.words.chunks(part).collect();
        let start = Barrier::new(parts.len() + 1);
        std::thread::scope(|scope| {
            let read = |words| {
                start.wait();
                sum(words)
            };
            let readers: Vec<_> =
                parts.into_iter().map(|words| scope.spawn(move || read(words))).collect();
            start.wait();
            let begun = Instant::now();
            let sums = readers.into_iter().map(|reader| reader.join().unwrap_or_default());
            let total = sums.fold(0, u64::wrapping_add);
            (total, begun.elapsed().as_secs_f64())
        })
    }
}

/// The wrapping sum of `words`, read at [`STREAMS`] places at once.
fn sum(words: &[u64]) -> u64 {
    let stream = (words.len() / STREAMS / LANES * LANES).max(1);
    let (streams, rest) = words.split_at((stream * STREAMS).min(words.len()));
    let mut sums = [0u64; LANES];
    let mut readers: Vec<_> = streams.chunks(stream).map(|s| s.chunks_exact(LANES)).collect();
    let mut more = true;
    while more {
        more = false;
        for reader in &mut readers {
            if let Some(lanes) = reader.next() {
                more = true;
                for (sum, word) in sums.iter_mut().zip(lanes) {
                    *sum = sum.wrapping_add(*word);
                }
            }
        }
    }
    let tails = readers.iter().flat_map(|reader| reader.remainder()).chain(rest);
    black_box(sums).iter().chain(tails).fold(0, |total, word| total.wrapping_add(*word))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_word_is_read_once() {
        for length in [1, 31, 32, 33, 127, 128, 129, 1000, 4096] {
            let words: Vec<u64> = (1..=length).collect();
            assert_eq!(sum(&words), length * (length + 1) / 2, "{length}");
        }
        for threads in [1, 2, 3, 7] {
            let buffer = Bandwidth::new(8 * 12_345, threads);
            assert_eq!(buffer.pass().0, 12_345, "{threads}");
        }
    }
}
