//! Integer products of many rows with AVX-512 VNNI; see [`super::int`] for the definition.
//!
//! A block of 256 inputs of two panels is expanded once, to bytes without a sign in the first cache;
//! then the rows meet it, a few at a time, so that whatever is loaded serves several products.
//!
//! Of a four-bit weight `q` both `q` and `16 q` are such bytes, so `16 Σ q·hi + Σ q·lo` is one sum. The
//! other types have a sum for each level.

use super::activations::{Activations, HIGH_SHIFT, TILE};
use super::formats::{Format, Q4_0, Q4_1, Q4K, Q6K, Q8_0, Scales, by_kind};
use super::packed::{Kind, QuantTiles};
use super::vnni::{accumulate, block_sum};
use super::{Out, PANEL};
use std::arch::x86_64::*;
use std::cell::RefCell;
use std::ops::Range;

/// Panels that meet the rows together.
const SIDE: usize = 2;
/// Bytes of a vector's inputs, expanded: the weights, and 16 times the weights if they are nibbles.
const STEP: usize = 128;
/// Vectors of a block of 256 inputs.
const VECTORS: usize = 64;

/// Blocks of [`SIDE`] panels, expanded.
#[repr(C, align(64))]
struct Scratch {
    bytes: [[[u8; STEP]; VECTORS]; SIDE],
    scales: [Scales; SIDE],
}

thread_local! {
    static SCRATCH: RefCell<Option<Box<Scratch>>> = const { RefCell::new(None) };
}

/// Multiplies panels `panels` of `w` with rows `rows` of `x`.
///
/// # Safety
/// `out` has the rows of `x` and the columns of `w`; nobody else writes these panels' columns of
/// these rows; the processor has AVX-512 with VNNI.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) unsafe fn multiply(
    w: &QuantTiles,
    x: &Activations,
    panels: Range<usize>,
    rows: Range<usize>,
    out: Out,
) {
    SCRATCH.with_borrow_mut(|scratch| {
        let scratch = scratch.get_or_insert_with(|| {
            // SAFETY: the processor has AVX-512.
            let scales = unsafe { [Scales::zero(); SIDE] };
            Box::new(Scratch { bytes: [[[0; STEP]; VECTORS]; SIDE], scales })
        });
        // SAFETY: the caller's promises.
        unsafe { by_kind!(w.geometry.kind, all(w, x, panels, rows, out, scratch)) }
    });
}

/// # Safety
/// As [`multiply`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn all<F: Format>(
    w: &QuantTiles,
    x: &Activations,
    panels: Range<usize>,
    rows: Range<usize>,
    out: Out,
    scratch: &mut Scratch,
) {
    let mut panel = panels.start;
    while panel < panels.end {
        let side = SIDE.min(panels.end - panel);
        for block in 0..w.geometry.blocks {
            for p in 0..side {
                // SAFETY: panel and block exist.
                unsafe { expand::<F>(w, panel + p, block, p, scratch) };
            }
            let mut ahead = Ahead::new(w, panel, side, block, panels.end, rows.len());
            let mut row = rows.start;
            while row < rows.end {
                ahead.fetch();
                let at = Place { panel, block, row };
                // Rows of one call share a tile of the activations.
                let most = (rows.end - row).min(TILE - row % TILE);
                // SAFETY: the caller's promises; panels, block and rows exist, the block is expanded
                // and the rows share a tile.
                row += unsafe {
                    match (most, side) {
                        (6.., SIDE) if F::NIBBLES => tile::<F, 6, SIDE>(w, x, at, scratch, out),
                        (4.., SIDE) => tile::<F, 4, SIDE>(w, x, at, scratch, out),
                        (2.., SIDE) => tile::<F, 2, SIDE>(w, x, at, scratch, out),
                        (_, SIDE) => tile::<F, 1, SIDE>(w, x, at, scratch, out),
                        (8.., _) => tile::<F, 8, 1>(w, x, at, scratch, out),
                        (4.., _) => tile::<F, 4, 1>(w, x, at, scratch, out),
                        _ => tile::<F, 1, 1>(w, x, at, scratch, out),
                    }
                };
            }
        }
        panel += side;
    }
}

/// Expands a block of a panel as the scratch's panel `p`.
///
/// # Safety
/// Panel and block exist; AVX-512.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn expand<F: Format>(
    w: &QuantTiles,
    panel: usize,
    block: usize,
    p: usize,
    scratch: &mut Scratch,
) {
    let (g, panel) = (&w.geometry, w.panel(panel).as_ptr());
    // SAFETY: the caller's promises.
    unsafe { F::scales(panel, g, block, &mut scratch.scales[p]) };
    let steps = scratch.bytes[p].chunks_exact_mut(F::VECTORS);
    for (j, steps) in steps.enumerate().take(g.groups(block)) {
        // SAFETY: the group exists; a step is two vectors.
        unsafe {
            let q = F::quants(panel.add(g.quants_at(block) + j * F::BYTES));
            for (q, step) in q.iter().zip(steps) {
                let to = step.as_mut_ptr();
                _mm512_store_si512(to.cast(), *q);
                if F::NIBBLES {
                    _mm512_store_si512(to.add(64).cast(), _mm512_slli_epi16::<4>(*q));
                }
            }
        }
    }
}

/// The weights that are expanded next, fetched to the second cache while those before them are used.
struct Ahead {
    /// Where they begin in each panel.
    next: [*const u8; SIDE],
    /// Panels, and cache lines of each that are left, and how many go at a time.
    side: usize,
    left: usize,
    share: usize,
}

impl Ahead {
    /// What follows block `block` of the `side` panels from `panel` on, for a job that ends at panel
    /// `end`, in shares for `rows` rows.
    fn new(
        w: &QuantTiles,
        panel: usize,
        side: usize,
        block: usize,
        end: usize,
        rows: usize,
    ) -> Self {
        let g = &w.geometry;
        let whole = |block: usize| g.quants_at(block) + g.groups(block) * g.kind.group_bytes();
        let (panel, side, bytes) = match block + 1 {
            next if next < g.blocks => (panel, side, g.scales_at(next)..whole(next)),
            // The last panels of a job are followed by nothing of it.
            _ => (panel + side, SIDE.min(end - panel - side), 0..whole(0)),
        };
        let at = |p: usize| w.panel(panel + p)[bytes.start..].as_ptr();
        let next = std::array::from_fn(|p| if p < side { at(p) } else { std::ptr::null() });
        let left = bytes.len().div_ceil(64);
        // Eight rows a tile at most.
        Ahead { next, side, left, share: left.div_ceil(rows.div_ceil(8)) }
    }

    /// Fetches a share of them.
    #[inline]
    fn fetch(&mut self) {
        let lines = self.share.min(self.left);
        self.left -= lines;
        for next in &mut self.next[..self.side] {
            for _ in 0..lines {
                // SAFETY: fetching is harmless anywhere.
                unsafe { _mm_prefetch::<_MM_HINT_T1>(next.cast()) };
                *next = next.wrapping_add(64);
            }
        }
    }
}

/// Where a tile of the output is.
#[derive(Clone, Copy)]
struct Place {
    panel: usize,
    block: usize,
    row: usize,
}

/// Adds a block of `P` expanded panels to `M` rows of the output and returns `M`.
///
/// # Safety
/// As [`multiply`]; the block is expanded, the rows exist and share a tile.
#[inline(never)]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn tile<F: Format, const M: usize, const P: usize>(
    w: &QuantTiles,
    x: &Activations,
    at: Place,
    scratch: &Scratch,
    out: Out,
) -> usize {
    let g = &w.geometry;
    let (levels, stride) = x.tile(at.row / TILE);
    let levels = levels.wrapping_add(at.block * 8 * stride + at.row % TILE * 64);
    let per32 = 8 / F::VECTORS;
    let sums = x.sums[x.sum_at(at.row, at.block * 8)..].as_ptr();
    let mut a = [[_mm512_setzero_si512(); M]; P];
    for j in 0..g.groups(at.block) {
        let levels = levels.wrapping_add(j / per32 * stride + j % per32 * 16);
        // SAFETY: block, group and rows exist.
        unsafe {
            let mut low = [[_mm512_setzero_si512(); M]; P];
            if let Some(shift) = F::SHIFT {
                let groups = g.cols / (F::VECTORS * 4);
                let sums = if F::VECTORS == 4 { &x.sums16 } else { &x.sums32 };
                for r in 0..M {
                    let i = (at.row + r) * groups + at.block * F::GROUPS + j;
                    let start = _mm512_set1_epi32(-(*sums.get_unchecked(i) << shift));
                    low.iter_mut().for_each(|low| low[r] = start);
                }
            }
            let mut high = [[_mm512_setzero_si512(); M]; P];
            for i in 0..F::VECTORS {
                let step = scratch
                    .bytes
                    .each_ref()
                    .map(|panel| panel.get_unchecked(j * F::VECTORS + i).as_ptr());
                for r in 0..M {
                    let x = levels.add(r * 64 + i * 4).cast::<i32>();
                    let hi = _mm512_set1_epi32(x.read_unaligned());
                    let lo = _mm512_set1_epi32(x.add(8).read_unaligned());
                    for p in 0..P {
                        let q = _mm512_load_si512(step[p].cast());
                        if F::NIBBLES {
                            let q16 = _mm512_load_si512(step[p].add(64).cast());
                            low[p][r] = _mm512_dpbusd_epi32(low[p][r], q16, hi);
                        } else {
                            high[p][r] = _mm512_dpbusd_epi32(high[p][r], q, hi);
                        }
                        low[p][r] = _mm512_dpbusd_epi32(low[p][r], q, lo);
                    }
                }
            }
            for p in 0..P {
                let scales = &scratch.scales[p];
                for r in 0..M {
                    let mut isum = low[p][r];
                    if !F::NIBBLES {
                        isum = _mm512_add_epi32(_mm512_slli_epi32::<HIGH_SHIFT>(high[p][r]), isum);
                    }
                    let xsum = sums.add(j * TILE + r);
                    a[p][r] = accumulate::<F>(a[p][r], isum, scales, j, xsum);
                }
            }
        }
    }
    for (p, a) in a.iter().enumerate() {
        // SAFETY: the caller's promises.
        unsafe {
            write::<F, M>(w, x, Place { panel: at.panel + p, ..at }, &scratch.scales[p], a, out)
        };
    }
    M
}

/// Adds the scaled sums `a` of a block of a panel to `M` rows of the output; the first block begins it.
///
/// # Safety
/// As [`multiply`]; panel, block and rows exist.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn write<F: Format, const M: usize>(
    w: &QuantTiles,
    x: &Activations,
    at: Place,
    scales: &Scales,
    a: &[__m512i; M],
    out: Out,
) {
    let mask = w.columns(at.panel);
    for (r, a) in a.iter().enumerate() {
        let a = block_sum::<F>(*a, scales);
        // SAFETY: the row and the unmasked columns are in the output, and this task's alone.
        unsafe {
            let scale = *x.scale.get_unchecked((at.row + r) * w.geometry.blocks + at.block);
            let to = out.at(at.row + r, at.panel * PANEL);
            let before = match at.block {
                0 => _mm512_setzero_ps(),
                _ => _mm512_maskz_loadu_ps(mask, to),
            };
            let sum = _mm512_fmadd_ps(a, _mm512_set1_ps(scale), before);
            _mm512_mask_storeu_ps(to, mask, sum);
        }
    }
}
