//! Integer products with AVX-512 VNNI: weights in the lanes, activations broadcast.
//!
//! With one row the memory decides. A core that walks through one panel after the other has one
//! stream of requests open and waits at every page's first lines; with four streams side by side it
//! reads a third faster. Each stream takes a quarter of a piece's panels, one behind the other, so
//! that it is as long as can be.

use super::activations::{Activations, HIGH_SHIFT, TILE};
use super::formats::{Format, Q4_0, Q4_1, Q4K, Q6K, Q8_0, Scales};
use super::packed::{Kind, QuantTiles};
use super::{Out, PANEL};
use std::arch::x86_64::*;
use std::ops::Range;

/// Bytes of each stream that are fetched ahead of use.
const AHEAD: usize = 2048;
/// Streams of panels that are read side by side.
const SIDE: usize = 4;

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
    let length = panels.len() / SIDE;
    let streams = (panels.start..panels.start + length).map(|first| (first, SIDE));
    let rest = (panels.start + length * SIDE..panels.end).map(|panel| (panel, 1));
    for (panel, side) in streams.chain(rest) {
        let at = Panels { first: panel, step: length };
        let mut row = rows.start;
        while row < rows.end {
            // Rows of one call share a tile of the activations.
            let most = (rows.end - row).min(TILE - row % TILE);
            // SAFETY: the caller's promises.
            row += unsafe {
                match (most, side) {
                    (1, SIDE) => rows_of::<F, 1, SIDE>(w, x, at, row, out),
                    (1, _) => rows_of::<F, 1, 1>(w, x, at, row, out),
                    // Unpacked nibbles are worth sharing among more rows than bytes are.
                    (4.., SIDE) if !F::SIGNED => rows_of::<F, 4, SIDE>(w, x, at, row, out),
                    (4.., _) if !F::SIGNED => rows_of::<F, 4, 1>(w, x, at, row, out),
                    (_, SIDE) => rows_of::<F, 2, SIDE>(w, x, at, row, out),
                    _ => rows_of::<F, 2, 1>(w, x, at, row, out),
                }
            };
        }
    }
}

/// Panels `first`, `first + step`, …, one of each stream.
#[derive(Clone, Copy)]
struct Panels {
    first: usize,
    step: usize,
}

/// Multiplies `P` panels with `M` rows and returns `M`.
///
/// # Safety
/// As [`multiply`]; the rows exist and share a tile.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn rows_of<F: Format, const M: usize, const P: usize>(
    w: &QuantTiles,
    x: &Activations,
    at: Panels,
    row: usize,
    out: Out,
) -> usize {
    let g = w.geometry;
    let panels: [_; P] = std::array::from_fn(|p| w.panel(at.first + p * at.step).as_ptr());
    let (tile, stride) = x.tile(row / TILE);
    // SAFETY: the processor has AVX-512.
    let mut scales = unsafe { [Scales::zero(); P] };
    let mut sum = [[_mm512_setzero_ps(); M]; P];
    for block in 0..g.blocks {
        let groups = g.groups(block);
        // SAFETY: the block exists; rows are those of the tile; prefetching is harmless anywhere.
        unsafe {
            for (panel, scales) in panels.iter().zip(&mut scales) {
                let head = panel.wrapping_add(g.scales_at(block) + AHEAD);
                for i in 0..4 {
                    _mm_prefetch::<_MM_HINT_T0>(head.wrapping_add(i * 64).cast());
                }
                F::scales(*panel, &g, block, scales);
            }
            let levels = tile.add(block * 8 * stride + row % TILE * 64);
            let place = Place { cols: g.cols, block, levels, stride, x, row };
            let quants = panels.map(|panel| panel.add(g.quants_at(block)));
            let mut a = [[_mm512_setzero_si512(); M]; P];
            if groups == F::GROUPS {
                for j in 0..F::GROUPS {
                    for p in 0..P {
                        group::<F, M>(&place, quants[p], j, &scales[p], &mut a[p]);
                    }
                }
            } else {
                for j in 0..groups {
                    for p in 0..P {
                        group::<F, M>(&place, quants[p], j, &scales[p], &mut a[p]);
                    }
                }
            }
            for r in 0..M {
                let scale = _mm512_set1_ps(*x.scale.get_unchecked((row + r) * g.blocks + block));
                for ((sum, a), scales) in sum.iter_mut().zip(&a).zip(&scales) {
                    let a = match F::WHOLE {
                        true => _mm512_mul_ps(_mm512_cvtepi32_ps(a[r]), scales.unit),
                        false => _mm512_castsi512_ps(a[r]),
                    };
                    sum[r] = _mm512_fmadd_ps(a, scale, sum[r]);
                }
            }
        }
    }
    for (p, sum) in sum.iter().enumerate() {
        let panel = at.first + p * at.step;
        let mask = w.columns(panel);
        for (r, sum) in sum.iter().enumerate() {
            // SAFETY: the row and the unmasked columns are in the output, and this task's alone.
            unsafe { _mm512_mask_storeu_ps(out.at(row + r, panel * PANEL), mask, *sum) };
        }
    }
    M
}

/// Where a block's operands are.
struct Place<'a> {
    cols: usize,
    block: usize,
    /// Levels of the first row in the block's first group of 32.
    levels: *const u8,
    /// Bytes between groups of 32.
    stride: usize,
    x: &'a Activations,
    row: usize,
}

/// Adds one group to the block's scaled sums, which are integers where scales are whole, and else floats;
/// `quants` is the panel's first group in the block.
///
/// # Safety
/// As [`multiply`]; the group exists.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn group<F: Format, const M: usize>(
    at: &Place<'_>,
    quants: *const u8,
    j: usize,
    scales: &Scales,
    a: &mut [__m512i; M],
) {
    // SAFETY: block, group and rows exist; prefetching is harmless anywhere.
    unsafe {
        let weights = quants.add(j * F::BYTES);
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
            if F::WHOLE {
                *acc = _mm512_add_epi32(*acc, _mm512_mullo_epi32(isum, scales.whole[j]));
                continue;
            }
            let (isum, before) = (_mm512_cvtepi32_ps(isum), _mm512_castsi512_ps(*acc));
            let mut sum = _mm512_fmadd_ps(scales.s[j % 8], isum, before);
            if F::MINS {
                let i = at.x.sum_at(at.row + r, at.block * 8 + j);
                let xsum = _mm512_set1_ps(*at.x.sums.get_unchecked(i));
                sum = _mm512_fmadd_ps(scales.m[j % 8], xsum, sum);
            }
            *acc = _mm512_castps_si512(sum);
        }
    }
}
