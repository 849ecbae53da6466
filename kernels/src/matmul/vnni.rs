//! Integer products with AVX-512 VNNI: weights in the lanes, activations broadcast.

use super::activations::{Activations, HIGH_SHIFT, TILE};
use super::formats::{Format, Q4_0, Q4_1, Q4K, Q6K, Q8_0, Scales};
use super::packed::{Kind, QuantTiles};
use super::{Out, PANEL};
use std::arch::x86_64::*;
use std::ops::Range;

/// Bytes that are fetched ahead of use.
const AHEAD: usize = 4096;

/// Multiplies panels `panels` of `w` with rows `rows` of `x`; see [`super::int`] for the definition.
///
/// # Safety
/// `out` has the rows of `x` and the columns of `w`; nobody else writes these panels' columns; the
/// processor has AVX-512 with VNNI.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) unsafe fn multiply(
    w: &QuantTiles,
    x: &Activations,
    panels: Range<usize>,
    rows: Range<usize>,
    out: Out,
) {
    // SAFETY: the caller's promises.
    unsafe {
        match w.geometry.kind {
            Kind::Q8_0 => all::<Q8_0>(w, x, panels, rows, out),
            Kind::Q4_0 => all::<Q4_0>(w, x, panels, rows, out),
            Kind::Q4_1 => all::<Q4_1>(w, x, panels, rows, out),
            Kind::Q4K => all::<Q4K>(w, x, panels, rows, out),
            Kind::Q6K => all::<Q6K>(w, x, panels, rows, out),
        }
    }
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
) {
    for panel in panels {
        let mut row = rows.start;
        while row < rows.end {
            // Rows of one call share a tile of the activations.
            let most = (rows.end - row).min(TILE - row % TILE);
            // SAFETY: the caller's promises.
            row += unsafe {
                match most {
                    1 => rows_of::<F, 1>(w, x, panel, row, out),
                    // Unpacked nibbles are worth sharing among more rows than bytes are.
                    4.. if F::VECTORS == 4 || F::SHIFT != Some(7) => {
                        rows_of::<F, 4>(w, x, panel, row, out)
                    }
                    _ => rows_of::<F, 2>(w, x, panel, row, out),
                }
            };
        }
    }
}

/// Multiplies a panel with `M` rows and returns `M`.
///
/// # Safety
/// As [`multiply`]; the rows exist and share a tile.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn rows_of<F: Format, const M: usize>(
    w: &QuantTiles,
    x: &Activations,
    panel: usize,
    row: usize,
    out: Out,
) -> usize {
    let g = w.geometry;
    let weights = w.panel(panel).as_ptr();
    let (tile, stride) = x.tile(row / TILE);
    // SAFETY: the processor has AVX-512.
    let mut scales = unsafe { Scales::zero() };
    let mut sum = [_mm512_setzero_ps(); M];
    for block in 0..g.blocks {
        // SAFETY: the block exists; rows are those of the tile.
        unsafe {
            let head = weights.wrapping_add(g.scales_at(block) + AHEAD);
            for i in 0..4 {
                _mm_prefetch::<_MM_HINT_T0>(head.wrapping_add(i * 64).cast());
            }
            F::scales(weights, &g, block, &mut scales);
            let levels = tile.add(block * 8 * stride + row % TILE * 64);
            let groups = g.groups(block);
            let weights = weights.add(g.quants_at(block));
            let at = Place { cols: g.cols, weights, block, levels, stride, x, row };
            let mut a = [_mm512_setzero_ps(); M];
            if groups == F::GROUPS {
                for j in 0..F::GROUPS {
                    group::<F, M>(&at, j, &scales, &mut a);
                }
            } else {
                for j in 0..groups {
                    group::<F, M>(&at, j, &scales, &mut a);
                }
            }
            for r in 0..M {
                let scale = _mm512_set1_ps(*x.scale.get_unchecked((row + r) * g.blocks + block));
                sum[r] = _mm512_fmadd_ps(a[r], scale, sum[r]);
            }
        }
    }
    let lanes = PANEL.min(w.rows() - panel * PANEL);
    let mask = (u32::MAX >> (32 - lanes)) as __mmask16;
    for (r, sum) in sum.iter().enumerate() {
        // SAFETY: the row and the unmasked columns are in the output, and this task's alone.
        unsafe { _mm512_mask_storeu_ps(out.at(row + r, panel * PANEL), mask, *sum) };
    }
    M
}

/// Where a block's operands are.
struct Place<'a> {
    cols: usize,
    /// The block's first group.
    weights: *const u8,
    block: usize,
    /// Levels of the first row in the block's first group of 32.
    levels: *const u8,
    /// Bytes between groups of 32.
    stride: usize,
    x: &'a Activations,
    row: usize,
}

/// Adds one group to the block's scaled sums.
///
/// # Safety
/// As [`multiply`]; the group exists.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn group<F: Format, const M: usize>(
    at: &Place<'_>,
    j: usize,
    scales: &Scales,
    a: &mut [__m512; M],
) {
    // SAFETY: block, group and rows exist; prefetching is harmless anywhere.
    unsafe {
        let weights = at.weights.add(j * F::BYTES);
        for i in 0..F::BYTES / 64 {
            _mm_prefetch::<_MM_HINT_T0>(weights.wrapping_add(AHEAD + i * 64).cast());
        }
        let q = F::quants(weights);
        let per32 = 8 / F::VECTORS;
        let levels = at.levels.add(j / per32 * at.stride + j % per32 * 16);
        for (r, acc) in a.iter_mut().enumerate() {
            let x = levels.add(r * 64).cast::<i32>();
            let (mut hi, mut lo) = (_mm512_setzero_si512(), _mm512_setzero_si512());
            if let Some(shift) = F::SHIFT {
                let groups = at.cols / (F::VECTORS * 4);
                let i = (at.row + r) * groups + at.block * F::GROUPS + j;
                let sums = if F::VECTORS == 4 { &at.x.sums16 } else { &at.x.sums32 };
                let sum = _mm512_set1_epi32(*sums.get_unchecked(i) << shift);
                lo = _mm512_sub_epi32(lo, sum);
            }
            for (i, q) in q.iter().enumerate().take(F::VECTORS) {
                hi = _mm512_dpbusd_epi32(hi, *q, _mm512_set1_epi32(x.add(i).read_unaligned()));
                lo = _mm512_dpbusd_epi32(lo, *q, _mm512_set1_epi32(x.add(8 + i).read_unaligned()));
            }
            let isum = _mm512_add_epi32(_mm512_slli_epi32::<HIGH_SHIFT>(hi), lo);
            *acc = _mm512_fmadd_ps(scales.s[j], _mm512_cvtepi32_ps(isum), *acc);
            if F::MINS {
                let i = at.x.sum_at(at.row + r, at.block * 8 + j);
                let xsum = _mm512_set1_ps(*at.x.sums.get_unchecked(i));
                *acc = _mm512_fmadd_ps(scales.m[j], xsum, *acc);
            }
        }
    }
}
