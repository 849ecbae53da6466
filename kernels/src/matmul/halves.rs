//! Activations prepared for bf16 products.
//!
//! For the tile unit an input is split into two bf16 values, `x ≈ hi + lo`, which keeps 16 of its 24
//! bits: `hi` is cut off, so it never overflows, `lo` is the rest, rounded. Dot products of AVX-512 take
//! inputs rounded to bf16, 8 bits: with a second product for `lo` they would be no faster than f32 (on
//! Zen 4, where they have twice its rate).

use super::activations::TILE;
use super::float::DEPTH;
use crate::ThreadPool;
use crate::buffer::Buffer;
use crate::math::dispatch;
use crate::pool::SendPtr;

/// Bytes of a row's tile: 32 high values, 32 low ones.
pub(super) const ROW: usize = 4 * DEPTH;

/// `m` rows of split inputs: `[tile of 16 rows][32 inputs][row]{ 32 hi, 32 lo }`, padded with zeros.
pub(super) struct Halves {
    data: Buffer,
    m: usize,
    depth: usize,
}

impl Default for Halves {
    fn default() -> Self {
        Halves { data: Buffer::new(0), m: 0, depth: 0 }
    }
}

impl Halves {
    /// Splits `x` (`[m][cols]`).
    pub(super) fn prepare(&mut self, pool: &ThreadPool, x: &[f32], m: usize, cols: usize) {
        (self.m, self.depth) = (m, cols.div_ceil(DEPTH));
        self.data.reserve(m * self.depth * ROW);
        let (depth, data) = (self.depth, SendPtr(self.data.as_mut_ptr()));
        let rows = (16 * 1024 / cols.max(1)).max(1);
        pool.run(m.div_ceil(rows), &|i| {
            for row in i * rows..(i * rows + rows).min(m) {
                let (tile, lane) = (row / TILE, row % TILE);
                let stride = (m - tile * TILE).min(TILE) * ROW;
                // SAFETY: inside the buffer sized above.
                let to = SendPtr(unsafe { data.at(tile * TILE * depth * ROW + lane * ROW) });
                split_row(&x[row * cols..][..cols], to, stride);
            }
        });
    }

    /// Where tile `tile` begins, and the bytes between its 32 inputs and the next.
    pub(super) fn tile(&self, tile: usize) -> (*const u8, usize) {
        let rows = (self.m - tile * TILE).min(TILE);
        (self.data.bytes()[tile * TILE * self.depth * ROW..].as_ptr(), rows * ROW)
    }

    /// Tiles along the inputs.
    pub(super) fn depth(&self) -> usize {
        self.depth
    }
}

/// `m` rows of rounded inputs: `[row][pair]`, padded with zeros.
#[derive(Default)]
pub(super) struct Rounded {
    data: Buffer,
    pairs: usize,
}

impl Rounded {
    /// Rounds `x` (`[m][cols]`).
    pub(super) fn prepare(&mut self, pool: &ThreadPool, x: &[f32], m: usize, cols: usize) {
        self.pairs = cols.next_multiple_of(DEPTH) / 2;
        self.data.reserve(m * self.pairs * 4);
        let rows = (16 * 1024 / cols.max(1)).max(1);
        let data = &mut self.data.bytes_mut()[..m * self.pairs * 4];
        pool.run_chunks(data, rows * self.pairs * 4, &|i, to| {
            for (x, to) in
                x[i * rows * cols..].chunks(cols).zip(to.chunks_exact_mut(self.pairs * 4))
            {
                round_row(x, to);
            }
        });
    }

    /// Where row `row` begins.
    pub(super) fn row(&self, row: usize) -> *const u32 {
        self.data.bytes()[row * self.pairs * 4..].as_ptr().cast()
    }

    /// Pairs of a row.
    pub(super) fn pairs(&self) -> usize {
        self.pairs
    }
}

/// The bf16 nearest to a value, ties to even. NaN stays one; what is within half a step of the largest
/// float becomes infinite.
#[inline(always)]
fn nearest(bits: u32) -> u16 {
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    let nan = bits & 0x7fff_ffff > 0x7f80_0000;
    if nan { 0x7fc0 } else { rounded as u16 }
}

#[inline(always)]
fn round_body<const FMA: bool>(x: &[f32], to: &mut [u8]) {
    let (to, _) = to.as_chunks_mut::<2>();
    let (to, padding) = to.split_at_mut(x.len());
    for (x, to) in x.iter().zip(to) {
        *to = nearest(x.to_bits()).to_le_bytes();
    }
    padding.fill([0; 2]);
}
dispatch! { fn round_row(x: &[f32], to: &mut [u8]) => round_body }

#[inline(always)]
fn split_body<const FMA: bool>(x: &[f32], to: SendPtr<u8>, stride: usize) {
    for (i, x) in x.chunks(DEPTH).enumerate() {
        let mut row = [0u16; 2 * DEPTH];
        for (k, v) in x.iter().enumerate() {
            let high = v.to_bits() & 0xffff_0000;
            let rest = (v - f32::from_bits(high)).to_bits();
            row[k] = (high >> 16) as u16;
            // What is not finite stays so through `rest` being NaN.
            row[DEPTH + k] = nearest(rest);
        }
        // SAFETY: the row's place in this tile, which only this task writes.
        unsafe { to.at(i * stride).cast::<[u16; 2 * DEPTH]>().write(row) };
    }
}
dispatch! { fn split_row(x: &[f32], to: SendPtr<u8>, stride: usize) => split_body }

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_to_the_nearest_and_ties_to_even() {
        let ties = [0x3f80_8000, 0x3f81_8000, 0x3f80_7fff, 0x3f80_8001, 0xc000_8000, 0xc001_8000];
        let edges = [0, 0x8000_0000, 1, 0x0080_8000, f32::MAX.to_bits(), 0x7f80_0000, 0xff80_0000];
        for bits in ties.into_iter().chain(edges) {
            assert_eq!(
                nearest(bits),
                half::bf16::from_f32(f32::from_bits(bits)).to_bits(),
                "{bits:x}"
            );
        }
        for nan in [0x7f80_0001, 0x7fff_ffff, 0xffc0_0000] {
            assert!(half::bf16::from_bits(nearest(nan)).is_nan(), "{nan:x}");
        }
    }
}
