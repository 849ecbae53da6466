//! Activations prepared for bf16 products.
//!
//! An input is split into two bf16 values, `x ≈ hi + lo`, which keeps 16 of its 24 bits: `hi` is cut
//! off, so it never overflows, `lo` is the rest, rounded.

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

#[inline(always)]
fn split_body<const FMA: bool>(x: &[f32], to: SendPtr<u8>, stride: usize) {
    for (i, x) in x.chunks(DEPTH).enumerate() {
        let mut row = [0u16; 2 * DEPTH];
        for (k, v) in x.iter().enumerate() {
            let high = v.to_bits() & 0xffff_0000;
            let rest = (v - f32::from_bits(high)).to_bits();
            row[k] = (high >> 16) as u16;
            // To the nearest, ties to even; what is not finite stays so through `rest` being NaN.
            let rounded = rest.wrapping_add(0x7fff + ((rest >> 16) & 1)) >> 16;
            let nan = rest & 0x7fff_ffff > 0x7f80_0000;
            row[DEPTH + k] = if nan { 0x7fc0 } else { rounded as u16 };
        }
        // SAFETY: the row's place in this tile, which only this task writes.
        unsafe { to.at(i * stride).cast::<[u16; 2 * DEPTH]>().write(row) };
    }
}
dispatch! { fn split_row(x: &[f32], to: SendPtr<u8>, stride: usize) => split_body }
