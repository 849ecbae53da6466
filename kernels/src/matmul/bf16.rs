//! BF16 products with the dot products of AVX-512, for processors without a tile unit.
//!
//! An output value is one chain of products over its inputs, pair by pair in ascending order, whatever
//! the other rows.

use super::float::FloatTiles;
use super::halves::Rounded;
use super::vnni::{SIDE, streams};
use super::{Out, PANEL};
use std::arch::x86_64::*;
use std::ops::Range;

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
    let chunk = if rows.len() > ROWS { CHUNK } else { x.pairs() };
    for (first, step, side) in streams(panels) {
        for from in (0..x.pairs()).step_by(chunk) {
            let pairs = from..(from + chunk).min(x.pairs());
            let mut row = rows.start;
            while row < rows.end {
                let at = Place { first, step, row, pairs: pairs.clone() };
                // SAFETY: the caller's promises; panels, rows and pairs exist.
                row += unsafe {
                    match (rows.end - row, side) {
                        (ROWS.., SIDE) => tile::<ROWS, SIDE>(w, x, &at, out),
                        (4.., SIDE) => tile::<4, SIDE>(w, x, &at, out),
                        (2.., SIDE) => tile::<2, SIDE>(w, x, &at, out),
                        (_, SIDE) => tile::<1, SIDE>(w, x, &at, out),
                        (ROWS.., 2) => tile::<ROWS, 2>(w, x, &at, out),
                        (4.., 2) => tile::<4, 2>(w, x, &at, out),
                        (2.., 2) => tile::<2, 2>(w, x, &at, out),
                        (_, 2) => tile::<1, 2>(w, x, &at, out),
                        (4.., _) => tile::<4, 1>(w, x, &at, out),
                        _ => tile::<1, 1>(w, x, &at, out),
                    }
                };
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

/// Multiplies `P` panels with `M` rows and returns `M`.
///
/// # Safety
/// As [`multiply`]; panels, rows and pairs exist.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn tile<const M: usize, const P: usize>(
    w: &FloatTiles,
    x: &Rounded,
    at: &Place,
    out: Out,
) -> usize {
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
            let mut q = [as_bf16(_mm512_setzero_si512()); P];
            for (q, weights) in q.iter_mut().zip(&weights) {
                let from = weights.add(k * 64);
                _mm_prefetch::<_MM_HINT_T1>(from.wrapping_add(AHEAD).cast());
                *q = as_bf16(_mm512_loadu_si512(from.cast()));
            }
            for (r, x) in inputs.iter().enumerate() {
                let x = as_bf16(_mm512_set1_epi32(x.add(k).read().cast_signed()));
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
    M
}

/// The same bits as pairs of bf16.
#[inline]
#[target_feature(enable = "avx512f")]
fn as_bf16(bits: __m512i) -> __m512bh {
    // SAFETY: both are any 512 bits.
    unsafe { std::mem::transmute::<__m512i, __m512bh>(bits) }
}
