//! BF16 products with the dot products of AVX-512, for processors without a tile unit.
//!
//! An output value is one chain of products over its inputs, pair by pair in ascending order, whatever
//! the other rows.

use super::float::FloatTiles;
use super::halves::Rounded;
use super::{Out, PANEL};
use std::arch::x86_64::*;
use std::ops::Range;

/// Streams of panels that are read side by side, see [`super::vnni`].
const SIDE: usize = 4;
/// Bytes of each stream that are fetched ahead of use.
const AHEAD: usize = 1024;
/// Rows that are multiplied together.
const ROWS: usize = 6;
/// Pairs of inputs after which the next rows have their turn: what they read of the weights stays in
/// the first cache.
const CHUNK: usize = 64;

/// Multiplies panels `panels` of `w` (BF16) with rows `rows` of `x`.
///
/// # Safety
/// `out` has the rows of `x` and the columns of `w`; nobody else writes these panels' columns of these
/// rows; the processor has AVX-512 with BF16.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
pub(super) unsafe fn multiply(
    w: &FloatTiles,
    x: &Rounded,
    panels: Range<usize>,
    rows: Range<usize>,
    out: Out,
) {
    let length = panels.len() / SIDE;
    let streams = (panels.start..panels.start + length).map(|first| (first, SIDE));
    let rest = (panels.start + length * SIDE..panels.end).map(|panel| (panel, 1));
    let chunk = if rows.len() > ROWS { CHUNK } else { x.pairs() };
    for (first, side) in streams.chain(rest) {
        for from in (0..x.pairs()).step_by(chunk) {
            let pairs = from..(from + chunk).min(x.pairs());
            for row in rows.clone().step_by(ROWS) {
                let at = Place { first, step: length, row, pairs: pairs.clone() };
                // SAFETY: the caller's promises; panels, rows and pairs exist.
                unsafe {
                    match (rows.end - row, side) {
                        (6.., SIDE) => tile::<6, SIDE>(w, x, &at, out),
                        (5, SIDE) => tile::<5, SIDE>(w, x, &at, out),
                        (4, SIDE) => tile::<4, SIDE>(w, x, &at, out),
                        (3, SIDE) => tile::<3, SIDE>(w, x, &at, out),
                        (2, SIDE) => tile::<2, SIDE>(w, x, &at, out),
                        (_, SIDE) => tile::<1, SIDE>(w, x, &at, out),
                        (6.., _) => tile::<6, 1>(w, x, &at, out),
                        (5, _) => tile::<5, 1>(w, x, &at, out),
                        (4, _) => tile::<4, 1>(w, x, &at, out),
                        (3, _) => tile::<3, 1>(w, x, &at, out),
                        (2, _) => tile::<2, 1>(w, x, &at, out),
                        _ => tile::<1, 1>(w, x, &at, out),
                    }
                }
            }
        }
    }
}

/// Panels `first`, `first + step`, …, the first row, and the pairs of inputs.
struct Place {
    first: usize,
    step: usize,
    row: usize,
    pairs: Range<usize>,
}

/// Multiplies `P` panels with `M` rows.
///
/// # Safety
/// As [`multiply`]; panels, rows and pairs exist.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn tile<const M: usize, const P: usize>(w: &FloatTiles, x: &Rounded, at: &Place, out: Out) {
    let panel = |p: usize| at.first + p * at.step;
    let masks: [__mmask16; P] =
        std::array::from_fn(|p| u16::MAX >> (PANEL - PANEL.min(w.rows() - panel(p) * PANEL)));
    let weights: [_; P] = std::array::from_fn(|p| w.bf16_panel(panel(p)).0);
    let inputs: [_; M] = std::array::from_fn(|r| x.row(at.row + r));
    let mut sum = [[_mm512_setzero_ps(); M]; P];
    // SAFETY: the caller's promises; only the existing columns are read and written; fetching is
    // harmless anywhere.
    unsafe {
        if at.pairs.start > 0 {
            for (p, sum) in sum.iter_mut().enumerate() {
                for (r, sum) in sum.iter_mut().enumerate() {
                    *sum = _mm512_maskz_loadu_ps(masks[p], out.at(at.row + r, panel(p) * PANEL));
                }
            }
        }
        for k in at.pairs.clone() {
            let mut q = [pairs(_mm512_setzero_si512()); P];
            for (q, weights) in q.iter_mut().zip(&weights) {
                let from = weights.add(k * 64);
                _mm_prefetch::<_MM_HINT_T1>(from.wrapping_add(AHEAD).cast());
                *q = pairs(_mm512_loadu_si512(from.cast()));
            }
            for (r, x) in inputs.iter().enumerate() {
                let x = pairs(_mm512_set1_epi32(x.add(k).read().cast_signed()));
                for (sum, q) in sum.iter_mut().zip(&q) {
                    sum[r] = _mm512_dpbf16_ps(sum[r], *q, x);
                }
            }
        }
        for (p, sum) in sum.iter().enumerate() {
            for (r, sum) in sum.iter().enumerate() {
                _mm512_mask_storeu_ps(out.at(at.row + r, panel(p) * PANEL), masks[p], *sum);
            }
        }
    }
}

/// The same bits as pairs of bf16.
#[inline]
#[target_feature(enable = "avx512f")]
fn pairs(bits: __m512i) -> __m512bh {
    // SAFETY: both are any 512 bits.
    unsafe { std::mem::transmute::<__m512i, __m512bh>(bits) }
}
