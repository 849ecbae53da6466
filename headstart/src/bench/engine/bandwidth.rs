//! How fast this machine reads memory: a sum over a buffer that no cache holds.

use std::hint::black_box;
use std::io;
use std::sync::Barrier;
use std::time::Instant;

use memmap2::MmapMut;

use crate::bench::machine;

/// The buffer is this many times the last-level cache.
const CACHES: u64 = 4;
const BUFFER_BYTES_MIN: u64 = 1 << 30;
const BUFFER_BYTES_MAX: u64 = 4 << 30;
/// A sample is the best of so many passes: a limit is what can be reached.
const PASSES: usize = 3;
/// Sums that grow side by side, so that adding never waits for itself.
const LANES: usize = 32;
const WORD_BYTES: usize = size_of::<u64>();
const STEP_BYTES: usize = LANES * WORD_BYTES;

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
    buffer: MmapMut,
    threads: usize,
}

impl Bandwidth {
    /// A buffer of `bytes`, to be read by `threads ≥ 1` threads. It lies on huge pages where the
    /// system has them, as large matrices do, so that it is memory that is measured and not the page
    /// table.
    ///
    /// # Errors
    /// When there is not so much memory.
    pub(super) fn new(bytes: u64, threads: usize) -> io::Result<Self> {
        let length = usize::try_from(bytes).unwrap_or(usize::MAX).max(STEP_BYTES);
        let mut buffer = MmapMut::map_anon(length)?;
        #[cfg(target_os = "linux")]
        // A kernel without huge pages refuses; then small ones are what matrices have too.
        let _ = buffer.advise(memmap2::Advice::HugePage);
        // Pages that nobody wrote to are all the same one.
        buffer.fill(1);
        Ok(Self { buffer, threads: threads.max(1) })
    }

    /// Bytes of the buffer.
    pub(super) fn bytes(&self) -> usize {
        self.buffer.len()
    }

    /// Bytes a second, read by all threads together.
    pub(super) fn sample(&self) -> f64 {
        let best = (0..PASSES).map(|_| self.pass().1).fold(f64::INFINITY, f64::min);
        self.bytes() as f64 / best
    }

    /// The sum of all words, and the seconds it took.
    fn pass(&self) -> (u64, f64) {
        let part = self.buffer.len().div_ceil(self.threads).next_multiple_of(STEP_BYTES);
        let parts: Vec<&[u8]> = self.buffer.chunks(part).collect();
        let start = Barrier::new(parts.len() + 1);
        std::thread::scope(|scope| {
            let read = |part| {
                start.wait();
                sum(part)
            };
            let readers: Vec<_> =
                parts.into_iter().map(|part| scope.spawn(move || read(part))).collect();
            start.wait();
            let begun = Instant::now();
            let sums = readers.into_iter().map(|reader| reader.join().unwrap_or_default());
            let total = sums.fold(0, u64::wrapping_add);
            (total, begun.elapsed().as_secs_f64())
        })
    }
}

/// The wrapping sum of the little-endian words in `bytes`; what does not fill a step at the end is
/// left out.
fn sum(bytes: &[u8]) -> u64 {
    let mut sums = [0u64; LANES];
    for step in bytes.chunks_exact(STEP_BYTES) {
        let (words, _) = step.as_chunks::<WORD_BYTES>();
        for (sum, word) in sums.iter_mut().zip(words) {
            *sum = sum.wrapping_add(u64::from_le_bytes(*word));
        }
    }
    black_box(sums).iter().fold(0, |total, sum| total.wrapping_add(*sum))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_word_is_read_once() {
        for length in [0, 32, 64, 4096] {
            let bytes: Vec<u8> = (1..=length).flat_map(u64::to_le_bytes).collect();
            assert_eq!(sum(&bytes), length * (length + 1) / 2, "{length}");
        }
        for threads in [1, 2, 3, 7] {
            let words = 320 * LANES;
            let buffer = Bandwidth::new((words * WORD_BYTES) as u64, threads).unwrap();
            let word = u64::from_le_bytes([1; WORD_BYTES]);
            assert_eq!(buffer.pass().0, word.wrapping_mul(words as u64), "{threads}");
        }
    }
}
