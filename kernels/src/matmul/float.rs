//! Products in f32 arithmetic: F32 as it is, every other type expanded tile by tile, F16 and BF16 as they
//! are read where there are few rows (BF16 where the processor has no products of its own for it).
//!
//! The sum of an output value runs over its inputs in ascending order, one fused multiply-add each,
//! in chunks of [`CHUNK`] whose sums are added up in order.

use super::float_kernels::{Bf16, F16, F32, Micro, Stored, micro};
use super::{Out, PANEL};
use crate::buffer::{Arena, Buffer};
use crate::cpu::Isa;
use crate::math::dispatch;
use crate::{DType, ThreadPool, dequantise};
use std::cell::RefCell;

/// Inputs of one chunk: a multiple of every block length; four panels of it stay in the cache.
const CHUNK: usize = 512;
/// Columns of a BF16 tile.
pub(super) const DEPTH: usize = 32;
/// Panels that are multiplied together.
const UNIT: usize = 4;
/// Up to so many rows F16 and BF16 are widened as they are read, with more of them once for all.
const FEW: usize = 6;

/// Weights that are multiplied in f32.
pub(super) struct FloatTiles {
    dtype: DType,
    rows: usize,
    cols: usize,
    /// F32 and F16: `[panel][col][lane]`. BF16: `[panel][pair of cols][lane][2]`, columns padded to
    /// whole tiles. Other types: rows in file order.
    data: Buffer,
}

thread_local! {
    static SCRATCH: RefCell<Buffer> = RefCell::new(Buffer::new(0));
}

/// Bytes of a panel of a type that is packed.
fn panel_bytes(dtype: DType, cols: usize) -> usize {
    let depth = if dtype == DType::BF16 { cols.next_multiple_of(DEPTH) } else { cols };
    PANEL * depth * dtype.block_bytes()
}

impl FloatTiles {
    /// A matrix of zeros.
    pub(super) fn zeros(arena: Option<&Arena>, dtype: DType, rows: usize, cols: usize) -> Self {
        let bytes = match dtype {
            DType::F32 | DType::F16 | DType::BF16 => {
                rows.div_ceil(PANEL) * panel_bytes(dtype, cols)
            }
            _ => rows * (cols / dtype.block_len() * dtype.block_bytes()),
        };
        FloatTiles { dtype, rows, cols, data: Buffer::in_arena(arena, bytes) }
    }

    /// Packs `count` rows that `row(index, out)` yields, from row `first` on, which begins a panel.
    pub(super) fn fill_with(
        &mut self,
        pool: &ThreadPool,
        first: usize,
        count: usize,
        row: &(dyn Fn(usize, &mut [f32]) + Sync),
    ) {
        let (dtype, cols) = (self.dtype, self.cols);
        let (size, panel_bytes) = (dtype.block_bytes(), panel_bytes(dtype, cols));
        let panels = &mut self.data.bytes_mut()[first / PANEL * panel_bytes..];
        let panels = &mut panels[..count.div_ceil(PANEL) * panel_bytes];
        pool.run_chunks(panels, panel_bytes.max(1), &|p, panel| {
            let mut one = vec![0.0; cols];
            for lane in 0..PANEL.min(count - p * PANEL) {
                row(p * PANEL + lane, &mut one);
                for (k, v) in one.iter().enumerate() {
                    let at = match dtype {
                        DType::BF16 => (k / 2 * PANEL + lane) * 4 + k % 2 * 2,
                        _ => (k * PANEL + lane) * size,
                    };
                    match dtype {
                        DType::F32 => panel[at..at + 4].copy_from_slice(&v.to_le_bytes()),
                        DType::F16 => {
                            let v = half::f16::from_f32(*v).to_le_bytes();
                            panel[at..at + 2].copy_from_slice(&v);
                        }
                        _ => {
                            let v = half::bf16::from_f32(*v).to_le_bytes();
                            panel[at..at + 2].copy_from_slice(&v);
                        }
                    }
                }
            }
        });
    }

    /// Takes over whole rows in file order, from row `first` on, which begins a panel.
    pub(super) fn fill(&mut self, pool: &ThreadPool, first: usize, bytes: &[u8]) {
        let (dtype, cols) = (self.dtype, self.cols);
        if matches!(dtype, DType::F32 | DType::F16 | DType::BF16) {
            let row_bytes = cols * dtype.block_bytes();
            let row = |r: usize, out: &mut [f32]| expand(dtype, &bytes[r * row_bytes..], out);
            return self.fill_with(pool, first, bytes.len() / row_bytes.max(1), &row);
        }
        let row_bytes = cols / dtype.block_len() * dtype.block_bytes();
        self.data.bytes_mut()[first * row_bytes..][..bytes.len()].copy_from_slice(bytes);
    }

    pub(super) fn dtype(&self) -> DType {
        self.dtype
    }

    pub(super) fn bytes(&self) -> usize {
        self.data.len()
    }

    pub(super) fn rows(&self) -> usize {
        self.rows
    }

    /// A BF16 panel and its bytes.
    pub(super) fn bf16_panel(&self, panel: usize) -> (*const u8, usize) {
        let bytes = panel_bytes(DType::BF16, self.cols);
        (self.data.bytes()[panel * bytes..].as_ptr(), bytes)
    }

    pub(super) fn row_f32(&self, row: usize, out: &mut [f32]) {
        let (panel, lane) = (row / PANEL, row % PANEL);
        let half_at =
            |at: usize| u16::from_le_bytes([self.data.bytes()[at], self.data.bytes()[at + 1]]);
        match self.dtype {
            DType::F32 => {
                let panel = &self.data.floats()[panel * PANEL * self.cols..];
                for (o, v) in out.iter_mut().zip(panel[lane..].iter().step_by(PANEL)) {
                    *o = *v;
                }
            }
            DType::F16 => {
                for (k, o) in out.iter_mut().enumerate() {
                    let bits = half_at(((panel * self.cols + k) * PANEL + lane) * 2);
                    *o = half::f16::from_bits(bits).to_f32();
                }
            }
            DType::BF16 => {
                let base = panel * PANEL * self.cols.next_multiple_of(DEPTH) * 2;
                for (k, o) in out.iter_mut().enumerate() {
                    let bits = half_at(base + (k / 2 * PANEL + lane) * 4 + k % 2 * 2);
                    *o = half::bf16::from_bits(bits).to_f32();
                }
            }
            _ => self.expand_part(row, 0, out),
        }
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
        // SAFETY: the caller's promises; where nothing is expanded, panels are stored as the type says.
        unsafe {
            match self.dtype {
                DType::F32 => self.chunks::<F32>(isa, unit, x, m, out, None),
                DType::F16 if m <= FEW => self.chunks::<F16>(isa, unit, x, m, out, None),
                DType::BF16 if m <= FEW => self.chunks::<Bf16>(isa, unit, x, m, out, None),
                _ => SCRATCH.with_borrow_mut(|scratch| {
                    self.chunks::<F32>(isa, unit, x, m, out, Some(scratch));
                }),
            }
        }
    }

    /// [`Self::multiply`], chunk by chunk, of panels stored as `S` or expanded to `scratch`.
    ///
    /// # Safety
    /// As [`Self::multiply`]; panels are stored as `S` where there is no `scratch`.
    unsafe fn chunks<S: Stored>(
        &self,
        isa: Isa,
        unit: usize,
        x: &[f32],
        m: usize,
        out: Out,
        mut scratch: Option<&mut Buffer>,
    ) {
        let first = unit * UNIT * PANEL;
        let columns = (self.rows - first).min(UNIT * PANEL);
        for at in (0..self.cols).step_by(CHUNK) {
            let len = (self.cols - at).min(CHUNK);
            let (w, panel_stride) = match &mut scratch {
                Some(scratch) => self.expanded(first, columns, at, len, scratch),
                None => {
                    let bytes = panel_bytes(self.dtype, self.cols);
                    let start = first / PANEL * bytes + at * PANEL * self.dtype.block_bytes();
                    (self.data.bytes()[start..].as_ptr(), bytes)
                }
            };
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
            unsafe { micro::<S>(isa, &job, m) };
        }
    }

    /// The panels of `columns` columns from `first` on, inputs `at..at + len`, expanded, and the bytes
    /// between them.
    fn expanded(
        &self,
        first: usize,
        columns: usize,
        at: usize,
        len: usize,
        scratch: &mut Buffer,
    ) -> (*const u8, usize) {
        scratch.reserve((UNIT * PANEL + 1) * CHUNK * 4);
        let (tiles, one) = scratch.floats_mut().split_at_mut(UNIT * PANEL * CHUNK);
        for p in 0..columns.div_ceil(PANEL) {
            let tile = &mut tiles[p * CHUNK * PANEL..][..len * PANEL];
            let panel = first / PANEL + p;
            match self.dtype {
                DType::F16 => {
                    let from = (panel * self.cols + at) * PANEL * 2;
                    widen_f16(&self.data.bytes()[from..from + len * PANEL * 2], tile);
                }
                DType::BF16 => {
                    let from = (panel * self.cols.next_multiple_of(DEPTH) + at) * PANEL * 2;
                    let size = len.next_multiple_of(2) * PANEL * 2;
                    widen_bf16(&self.data.bytes()[from..from + size], tile);
                }
                _ => {
                    for lane in 0..PANEL.min(columns - p * PANEL) {
                        self.expand_part(panel * PANEL + lane, at, &mut one[..len]);
                        for (k, v) in one[..len].iter().enumerate() {
                            tile[k * PANEL + lane] = *v;
                        }
                    }
                }
            }
        }
        (tiles.as_ptr().cast(), CHUNK * PANEL * 4)
    }
}

/// Widens halves in order.
fn widen_f16(from: &[u8], to: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if crate::Cpu::get().isa >= Isa::Avx512 {
        use std::arch::x86_64::{_mm256_loadu_si256, _mm512_cvtph_ps, _mm512_storeu_ps};
        /// # Safety
        /// AVX-512.
        #[target_feature(enable = "avx512f,avx2")]
        unsafe fn widen(from: &[u8], to: &mut [f32]) {
            for (f, t) in from.chunks_exact(32).zip(to.chunks_exact_mut(16)) {
                // SAFETY: 32 bytes are read, 64 written.
                unsafe {
                    let half = _mm256_loadu_si256(f.as_ptr().cast());
                    _mm512_storeu_ps(t.as_mut_ptr(), _mm512_cvtph_ps(half));
                }
            }
        }
        // SAFETY: the processor has AVX-512.
        return unsafe { widen(from, to) };
    }
    for (f, t) in from.chunks_exact(2).zip(to) {
        *t = half::f16::from_le_bytes([f[0], f[1]]).to_f32();
    }
}

#[inline(always)]
fn widen_bf16_body<const FMA: bool>(from: &[u8], to: &mut [f32]) {
    for (f, t) in from.chunks_exact(4 * PANEL).zip(to.chunks_mut(2 * PANEL)) {
        // An odd count of columns ends with half a pair.
        let (even, odd) = t.split_at_mut(PANEL);
        for (f, t) in f.chunks_exact(4).zip(even) {
            *t = f32::from_bits(u32::from_le_bytes([0, 0, f[0], f[1]]));
        }
        for (f, t) in f.chunks_exact(4).zip(odd) {
            *t = f32::from_bits(u32::from_le_bytes([0, 0, f[2], f[3]]));
        }
    }
}
dispatch! {
    /// Widens pairs of columns.
    fn widen_bf16(from: &[u8], to: &mut [f32]) => widen_bf16_body
}

/// Expands the blocks at the front of `bytes` that fill `out`.
fn expand(dtype: DType, bytes: &[u8], out: &mut [f32]) {
    let need = dtype.bytes_for(out.len()).expect("whole blocks, checked at load");
    dequantise(dtype, &bytes[..need], out).expect("a length made to fit");
}
