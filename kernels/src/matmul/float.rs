//! Products in f32 arithmetic: F32 as it is, every other type expanded tile by tile.
//!
//! The sum of an output value runs over its inputs in ascending order, one fused multiply-add each,
//! in chunks of [`CHUNK`] whose sums are added up in order.

use super::buffer::Buffer;
use super::float_kernels::{Micro, micro};
use super::{Out, PANEL};
use crate::cpu::Isa;
use crate::{DType, ThreadPool, dequantise};
use std::cell::RefCell;

/// Inputs of one chunk: a multiple of every block length; four panels of it stay in the cache.
const CHUNK: usize = 512;
/// Panels that are multiplied together.
const UNIT: usize = 4;

/// Weights that are multiplied in f32.
pub(super) struct FloatTiles {
    dtype: DType,
    rows: usize,
    cols: usize,
    /// F32: `[panel][col][lane]`. Other types: rows in file order.
    data: Buffer,
}

thread_local! {
    static SCRATCH: RefCell<Buffer> = RefCell::new(Buffer::new(0));
}

impl FloatTiles {
    /// Packs rows that `row(index, out)` yields as `dtype` (F32 or BF16).
    pub(super) fn pack(
        pool: &ThreadPool,
        dtype: DType,
        rows: usize,
        cols: usize,
        row: &(dyn Fn(usize, &mut [f32]) + Sync),
    ) -> Self {
        if dtype != DType::F32 {
            let mut data = Buffer::new(rows * cols * 2);
            pool.run_chunks(data.bytes_mut(), (cols * 2).max(1), &|r, out| {
                let mut wide = vec![0.0; cols];
                row(r, &mut wide);
                for (o, v) in out.chunks_exact_mut(2).zip(&wide) {
                    o.copy_from_slice(&half::bf16::from_f32(*v).to_le_bytes());
                }
            });
            return FloatTiles { dtype, rows, cols, data };
        }
        let panel_len = PANEL * cols;
        let mut data = Buffer::new(rows.div_ceil(PANEL) * panel_len * 4);
        pool.run_chunks(data.floats_mut(), panel_len.max(1), &|p, panel| {
            let mut one = vec![0.0; cols];
            for lane in 0..PANEL.min(rows - p * PANEL) {
                row(p * PANEL + lane, &mut one);
                for (k, v) in one.iter().enumerate() {
                    panel[k * PANEL + lane] = *v;
                }
            }
        });
        FloatTiles { dtype, rows, cols, data }
    }

    /// Takes over `bytes` in file order; their length has been checked.
    pub(super) fn from_bytes(
        pool: &ThreadPool,
        dtype: DType,
        bytes: &[u8],
        rows: usize,
        cols: usize,
    ) -> Self {
        if dtype == DType::F32 {
            let row = |r: usize, out: &mut [f32]| expand(dtype, &bytes[r * cols * 4..], out);
            return Self::pack(pool, dtype, rows, cols, &row);
        }
        let mut data = Buffer::new(bytes.len());
        data.bytes_mut().copy_from_slice(bytes);
        FloatTiles { dtype, rows, cols, data }
    }

    pub(super) fn dtype(&self) -> DType {
        self.dtype
    }

    pub(super) fn bytes(&self) -> usize {
        self.data.len()
    }

    pub(super) fn row_f32(&self, row: usize, out: &mut [f32]) {
        if self.dtype == DType::F32 {
            let panel = &self.data.floats()[row / PANEL * PANEL * self.cols..];
            for (o, v) in out.iter_mut().zip(panel[row % PANEL..].iter().step_by(PANEL)) {
                *o = *v;
            }
            return;
        }
        self.expand_part(row, 0, out);
    }

    /// Expands `out.len()` elements of a row from column `from` (a multiple of the block).
    fn expand_part(&self, row: usize, from: usize, out: &mut [f32]) {
        let (len, bytes) = (self.dtype.block_len(), self.dtype.block_bytes());
        let start = (row * self.cols + from) / len * bytes;
        expand(self.dtype, &self.data.bytes()[start..], out);
    }

    /// Pieces of work: groups of [`UNIT`] panels.
    pub(super) fn units(&self) -> usize {
        self.rows.div_ceil(PANEL * UNIT)
    }

    /// Computes the columns of unit `unit` for all `m` rows.
    ///
    /// # Safety
    /// `x` is `[m][cols]`, `out` has `m` rows of `rows` columns, nobody else writes the unit's
    /// columns, and the processor has `isa`.
    pub(super) unsafe fn multiply(&self, isa: Isa, unit: usize, x: &[f32], m: usize, out: Out) {
        SCRATCH.with_borrow_mut(|scratch| {
            let first = unit * UNIT * PANEL;
            let columns = (self.rows - first).min(UNIT * PANEL);
            let mut at = 0;
            loop {
                let len = (self.cols - at).min(CHUNK);
                let (w, panel_stride) = self.chunk(first, columns, at, len, scratch);
                let job = Micro {
                    x: x[at..].as_ptr(),
                    x_stride: self.cols,
                    w,
                    panel_stride,
                    len,
                    first,
                    columns,
                    add: at > 0,
                    out,
                };
                // SAFETY: the caller's promises; `w` holds the unit's panels for this chunk.
                unsafe { micro(isa, &job, m) };
                at += len;
                if at >= self.cols {
                    return;
                }
            }
        });
    }

    /// The panels of `columns` columns from `first` on, inputs `at..at + len`, and their distance.
    fn chunk(
        &self,
        first: usize,
        columns: usize,
        at: usize,
        len: usize,
        scratch: &mut Buffer,
    ) -> (*const f32, usize) {
        if self.dtype == DType::F32 {
            let start = first * self.cols + at * PANEL;
            return (self.data.floats()[start..].as_ptr(), self.cols * PANEL);
        }
        scratch.reserve((UNIT * PANEL + 1) * CHUNK * 4);
        let (tiles, one) = scratch.floats_mut().split_at_mut(UNIT * PANEL * CHUNK);
        for c in 0..columns {
            let (panel, lane) = (c / PANEL, c % PANEL);
            self.expand_part(first + c, at, &mut one[..len]);
            for (k, v) in one[..len].iter().enumerate() {
                tiles[(panel * CHUNK + k) * PANEL + lane] = *v;
            }
        }
        (tiles.as_ptr(), CHUNK * PANEL)
    }
}

/// Expands the blocks at the front of `bytes` that fill `out`.
fn expand(dtype: DType, bytes: &[u8], out: &mut [f32]) {
    let need = dtype.bytes_for(out.len()).expect("whole blocks, checked at load");
    dequantise(dtype, &bytes[..need], out).expect("a length made to fit");
}
