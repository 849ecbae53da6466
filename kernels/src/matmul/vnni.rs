//! Integer products with AVX-512 VNNI: weights in the lanes, activations broadcast.
//!
//! With one row the memory decides. A core that walks through one panel after the other has one
//! stream of requests open and waits at every page's first lines; with four streams side by side it
//! reads a third faster. Each stream takes a quarter of a piece's panels, one behind the other, so
//! that it is as long as can be; what is left goes as a pair and a single one. Lines are fetched to the
//! second cache: with the first, further ahead, Zen 4 reads at three quarters of its memory's rate.
//!
//! From [`super::plan`]'s `MANY` rows on the processor's rate decides: [`super::vnni_many`].

use super::activations::{Activations, HIGH_SHIFT, TILE};
use super::formats::{Format, Q4_0, Q4_1, Q4K, Q6K, Q8_0, Scales, by_kind};
use super::packed::{Kind, QuantTiles};
use super::{Out, PANEL};
use std::arch::x86_64::*;
use std::ops::Range;

/// Streams of panels that are read side by side.
pub(super) const SIDE: usize = 4;

/// Multiplies panels `panels` of `w` with rows `rows` of `x`; see [`super::int`] for the definition.
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
    // SAFETY: the caller's promises.
    unsafe { by_kind!(w.geometry.kind, all(w, x, panels, rows, out)) }
}

/// Cuts panels into what is read side by side: the first panel, the distance to the next, and how many.
/// First [`SIDE`] streams as long as can be, then a pair of what is left, then a single one.
pub(super) fn streams(panels: Range<usize>) -> impl Iterator<Item = (usize, usize, usize)> {
    let length = panels.len() / SIDE;
    let rest = panels.start + length * SIDE;
    let pair = (panels.end - rest >= 2).then_some((rest, 1, 2));
    let single = (panels.len() % 2 == 1).then(|| (panels.end - 1, 1, 1));
    (panels.start..panels.start + length)
        .map(move |first| (first, length, SIDE))
        .chain(pair)
        .chain(single)
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
    // SAFETY: the processor has AVX-512.
    let mut scales = unsafe { [Scales::zero(); SIDE] };
    for (first, step, side) in streams(panels) {
        let mut row = rows.start;
        while row < rows.end {
            // Rows of one call share a tile of the activations.
            let most = (rows.end - row).min(TILE - row % TILE);
            let at = Place { first, step, row };
            // SAFETY: the caller's promises; panels and rows exist.
            row += unsafe {
                match (most, side) {
                    (1, SIDE) => rows_of::<F, 1, SIDE>(w, x, at, out, &mut scales),
                    (1, 2) => rows_of::<F, 1, 2>(w, x, at, out, &mut scales),
                    (1, _) => rows_of::<F, 1, 1>(w, x, at, out, &mut scales),
                    // With more panels the sums of four rows do not fit the registers.
                    (4.., SIDE) => {
                        rows_of::<F, 4, 2>(w, x, at, out, &mut scales);
                        let at = Place { first: first + 2 * step, ..at };
                        rows_of::<F, 4, 2>(w, x, at, out, &mut scales)
                    }
                    (4.., 2) => rows_of::<F, 4, 2>(w, x, at, out, &mut scales),
                    (4.., _) => rows_of::<F, 4, 1>(w, x, at, out, &mut scales),
                    (_, SIDE) => rows_of::<F, 2, SIDE>(w, x, at, out, &mut scales),
                    (_, 2) => rows_of::<F, 2, 2>(w, x, at, out, &mut scales),
                    _ => rows_of::<F, 2, 1>(w, x, at, out, &mut scales),
                }
            };
        }
    }
}

/// Panels `first`, `first + step`, …, one of each stream, and the first row.
#[derive(Clone, Copy)]
struct Place {
    first: usize,
    step: usize,
    row: usize,
}

/// Multiplies `P` panels with `M` rows and returns `M`.
///
/// # Safety
/// As [`multiply`]; the rows exist and share a tile.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn rows_of<F: Format, const M: usize, const P: usize>(
    w: &QuantTiles,
    x: &Activations,
    at: Place,
    out: Out,
    scales: &mut [Scales; SIDE],
) -> usize {
    let row = at.row;
    let scales = scales.first_chunk_mut::<P>().expect("as many streams at most");
    let g = w.geometry;
    let panels: [_; P] = std::array::from_fn(|p| w.panel(at.first + p * at.step).as_ptr());
    let (tile, stride) = x.tile(row / TILE);
    let mut sum = [[_mm512_setzero_ps(); M]; P];
    for block in 0..g.blocks {
        let groups = g.groups(block);
        // SAFETY: the block exists; rows are those of the tile; prefetching is harmless anywhere.
        unsafe {
            for (panel, scales) in panels.iter().zip(&mut *scales) {
                let head = panel.wrapping_add(g.scales_at(block) + F::AHEAD);
                for i in 0..4 {
                    _mm_prefetch::<_MM_HINT_T1>(head.wrapping_add(i * 64).cast());
                }
                F::scales(*panel, &g, block, scales);
            }
            let levels = tile.add(block * 8 * stride + row % TILE * 64);
            let inputs = Inputs { block, levels, stride, x, row };
            let quants = panels.map(|panel| panel.add(g.quants_at(block)));
            let mut a = [[_mm512_setzero_si512(); M]; P];
            for j in 0..groups {
                group::<F, M, P>(&inputs, &quants, j, scales, &mut a);
            }
            for r in 0..M {
                let scale = _mm512_set1_ps(*x.scale.get_unchecked((row + r) * g.blocks + block));
                for ((sum, a), scales) in sum.iter_mut().zip(&a).zip(&*scales) {
                    let a = block_sum::<F>(a[r], scales);
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

/// Where a block's inputs are.
struct Inputs<'a> {
    block: usize,
    /// Levels of the first row in the block's first group of 32.
    levels: *const u8,
    /// Bytes between groups of 32.
    stride: usize,
    x: &'a Activations,
    row: usize,
}

/// Adds one group to the block's scaled sums, which are integers where scales are whole, and else floats;
/// `quants` are the panels' first groups in the block.
///
/// # Safety
/// As [`multiply`]; the group exists.
#[inline(always)]
unsafe fn group<F: Format, const M: usize, const P: usize>(
    at: &Inputs<'_>,
    quants: &[*const u8; P],
    j: usize,
    scales: &[Scales; P],
    a: &mut [[__m512i; M]; P],
) {
    // SAFETY: block, group and rows exist; prefetching is harmless anywhere.
    unsafe {
        let mut low = [[_mm512_setzero_si512(); M]; P];
        let mut high = low;
        if F::SHIFT.is_some() {
            for r in 0..M {
                let start = _mm512_set1_epi32(at.x.start::<F>(at.row + r, at.block, j));
                low.iter_mut().for_each(|low| low[r] = start);
            }
        }
        for quants in quants {
            for i in 0..F::BYTES / 64 {
                let ahead = quants.wrapping_add(j * F::BYTES + F::AHEAD + i * 64);
                _mm_prefetch::<_MM_HINT_T1>(ahead.cast());
            }
        }
        let per32 = 8 / F::VECTORS;
        let levels = at.levels.add(j / per32 * at.stride + j % per32 * 16);
        for i in 0..F::VECTORS / 2 {
            let mut pairs = [[_mm512_setzero_si512(); 2]; P];
            for (pair, panel) in pairs.iter_mut().zip(quants) {
                *pair = F::pair(panel.add(j * F::BYTES), i);
            }
            for r in 0..M {
                let x = levels.add(r * 64 + i * 8).cast::<i32>();
                let high0 = _mm512_set1_epi32(x.read_unaligned());
                let high1 = _mm512_set1_epi32(x.add(1).read_unaligned());
                let low0 = _mm512_set1_epi32(x.add(8).read_unaligned());
                let low1 = _mm512_set1_epi32(x.add(9).read_unaligned());
                for (p, [q0, q1]) in pairs.iter().enumerate() {
                    high[p][r] = _mm512_dpbusd_epi32(high[p][r], *q0, high0);
                    high[p][r] = _mm512_dpbusd_epi32(high[p][r], *q1, high1);
                    low[p][r] = _mm512_dpbusd_epi32(low[p][r], *q0, low0);
                    low[p][r] = _mm512_dpbusd_epi32(low[p][r], *q1, low1);
                }
            }
        }
        for (p, (a, scales)) in a.iter_mut().zip(scales).enumerate() {
            for (r, acc) in a.iter_mut().enumerate() {
                let high = _mm512_slli_epi32::<HIGH_SHIFT>(high[p][r]);
                let isum = _mm512_add_epi32(high, low[p][r]);
                let xsum = at.x.sum_at(at.row + r, at.block * 8 + j);
                *acc =
                    accumulate::<F>(*acc, isum, scales, j, at.x.sums.as_ptr().wrapping_add(xsum));
            }
        }
    }
}

/// What a block has gathered, `a`, and the scaled sum `isum` of its group `j`, whose sum of inputs alone is
/// at `xsum`: whole numbers where scales are whole, and else floats.
///
/// # Safety
/// The group has a sum of inputs, unless scales are whole; AVX-512.
#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
pub(super) unsafe fn accumulate<F: Format>(
    a: __m512i,
    isum: __m512i,
    scales: &Scales,
    j: usize,
    xsum: *const f32,
) -> __m512i {
    if F::WHOLE {
        return _mm512_add_epi32(a, _mm512_mullo_epi32(isum, scales.whole[j % 16]));
    }
    let (isum, a) = (_mm512_cvtepi32_ps(isum), _mm512_castsi512_ps(a));
    let mut sum = _mm512_fmadd_ps(scales.s[j % 8], isum, a);
    if F::MINS {
        // SAFETY: the caller's promise.
        sum = _mm512_fmadd_ps(scales.m[j % 8], _mm512_set1_ps(unsafe { *xsum }), sum);
    }
    _mm512_castps_si512(sum)
}

/// What a block has gathered, as floats.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn block_sum<F: Format>(a: __m512i, scales: &Scales) -> __m512 {
    if F::WHOLE {
        return _mm512_mul_ps(_mm512_cvtepi32_ps(a), scales.unit);
    }
    _mm512_castsi512_ps(a)
}
