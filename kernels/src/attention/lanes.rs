//! The two products of attention over 16 keys: plain Rust and AVX-512, same order of sums.

use super::kernel::{KEYS, LANES};
use crate::math::fma;
use std::ops::Range;

/// How the products are computed.
///
/// `keys` is `[dim][stride]`, `values` `[16][dim]`; scores and weights of a query are
/// `[part][lane]`, the part of 16 being `part`.
pub(super) trait Lanes {
    /// `scores[i] = q[i] · keys` for `N` queries: a chain of products over the even and one over the
    /// odd elements, then their sum.
    fn score<const N: usize>(
        q: &[f32],
        dim: usize,
        keys: &[f32],
        stride: usize,
        part: usize,
        scores: &mut [[f32; KEYS]],
    );

    /// `acc[i] += weights[i] · values` for `N` queries over the keys `seen`, in ascending order.
    fn gather<const N: usize>(
        acc: &mut [f32],
        dim: usize,
        weights: &[[f32; KEYS]],
        values: &[f32],
        part: usize,
        seen: Range<usize>,
    );
}

/// Plain Rust.
pub(super) struct Plain<const FMA: bool>;

impl<const FMA: bool> Lanes for Plain<FMA> {
    #[inline(always)]
    fn score<const N: usize>(
        q: &[f32],
        dim: usize,
        keys: &[f32],
        stride: usize,
        part: usize,
        scores: &mut [[f32; KEYS]],
    ) {
        let mut acc = [[[0f32; LANES]; 2]; N];
        for d in 0..dim {
            let k: &[f32; LANES] = keys[d * stride..].first_chunk().expect("16 keys");
            for (i, acc) in acc.iter_mut().enumerate() {
                let x = q[i * dim + d];
                for (a, k) in acc[d % 2].iter_mut().zip(k) {
                    *a = fma::<FMA>(x, *k, *a);
                }
            }
        }
        for (acc, scores) in acc.iter().zip(scores) {
            for lane in 0..LANES {
                scores[part * LANES + lane] = acc[0][lane] + acc[1][lane];
            }
        }
    }

    #[inline(always)]
    fn gather<const N: usize>(
        acc: &mut [f32],
        dim: usize,
        weights: &[[f32; KEYS]],
        values: &[f32],
        part: usize,
        seen: Range<usize>,
    ) {
        for (acc, w) in acc.chunks_exact_mut(dim).zip(weights).take(N) {
            for key in seen.clone() {
                for (a, v) in acc.iter_mut().zip(&values[key * dim..]) {
                    *a = fma::<FMA>(w[part * LANES + key], *v, *a);
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) use avx512::Avx512;

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use super::{KEYS, LANES, Lanes, Range};
    use std::arch::x86_64::*;

    /// AVX-512; to be used only by code compiled for it on a processor that has it.
    pub(in super::super) struct Avx512;

    impl Lanes for Avx512 {
        #[inline(always)]
        fn score<const N: usize>(
            q: &[f32],
            dim: usize,
            keys: &[f32],
            stride: usize,
            part: usize,
            scores: &mut [[f32; KEYS]],
        ) {
            assert!(q.len() >= N * dim && keys.len() >= (dim - 1) * stride + LANES);
            assert!(scores.len() >= N && part < KEYS / LANES && dim.is_multiple_of(2));
            // SAFETY: the lengths were just checked; the processor has AVX-512.
            unsafe { score::<N>(q.as_ptr(), dim, keys.as_ptr(), stride, part, scores) }
        }

        #[inline(always)]
        fn gather<const N: usize>(
            acc: &mut [f32],
            dim: usize,
            weights: &[[f32; KEYS]],
            values: &[f32],
            part: usize,
            seen: Range<usize>,
        ) {
            assert!(acc.len() >= N * dim && weights.len() >= N && part < KEYS / LANES);
            assert!(seen.end <= LANES && values.len() >= seen.end * dim);
            let mut d = 0;
            // SAFETY (all): the lengths were just checked, `d` and the width stay below `dim`; the
            // processor has AVX-512.
            while d + 64 <= dim {
                // SAFETY: as above.
                unsafe { columns::<N, 4>(acc, dim, d, 16, weights, values, part, &seen) };
                d += 64;
            }
            while d < dim {
                let width = (dim - d).min(16);
                // SAFETY: as above.
                unsafe { columns::<N, 1>(acc, dim, d, width, weights, values, part, &seen) };
                d += width;
            }
        }
    }

    /// # Safety
    /// `q` is `[N][dim]` with an even `dim`, `keys` is `[dim][stride]` up to 16 of the last row,
    /// there are `N` rows of scores, the part exists, and the processor has AVX-512.
    #[target_feature(enable = "avx512f")]
    unsafe fn score<const N: usize>(
        q: *const f32,
        dim: usize,
        keys: *const f32,
        stride: usize,
        part: usize,
        scores: &mut [[f32; KEYS]],
    ) {
        let mut acc = [[_mm512_setzero_ps(); 2]; N];
        for d in (0..dim).step_by(2) {
            // SAFETY: `d + 1 < dim`.
            unsafe {
                let k = keys.add(d * stride);
                let (even, odd) = (_mm512_loadu_ps(k), _mm512_loadu_ps(k.add(stride)));
                for (i, acc) in acc.iter_mut().enumerate() {
                    let x = q.add(i * dim + d);
                    acc[0] = _mm512_fmadd_ps(_mm512_set1_ps(*x), even, acc[0]);
                    acc[1] = _mm512_fmadd_ps(_mm512_set1_ps(*x.add(1)), odd, acc[1]);
                }
            }
        }
        for (acc, scores) in acc.iter().zip(scores) {
            let to = scores[part * LANES..][..LANES].as_mut_ptr();
            // SAFETY: sixteen scores.
            unsafe { _mm512_storeu_ps(to, _mm512_add_ps(acc[0], acc[1])) };
        }
    }

    /// `V` vectors of columns from `d` on; of a single one only `width` columns exist.
    ///
    /// # Safety
    /// `acc` is `[N][dim]`, `values` holds the keys `seen`, the columns and the part exist, and the
    /// processor has AVX-512.
    #[allow(clippy::too_many_arguments)]
    #[target_feature(enable = "avx512f")]
    unsafe fn columns<const N: usize, const V: usize>(
        acc: &mut [f32],
        dim: usize,
        d: usize,
        width: usize,
        weights: &[[f32; KEYS]],
        values: &[f32],
        part: usize,
        seen: &Range<usize>,
    ) {
        let mask = (u32::MAX >> (32 - width)) as __mmask16;
        let mut sum = [[_mm512_setzero_ps(); V]; N];
        // SAFETY: the caller's promises.
        unsafe {
            let acc = acc.as_mut_ptr().add(d);
            let values = values.as_ptr().add(d);
            for (i, sum) in sum.iter_mut().enumerate() {
                for (c, s) in sum.iter_mut().enumerate() {
                    *s = _mm512_maskz_loadu_ps(mask, acc.add(i * dim + c * 16));
                }
            }
            for key in seen.clone() {
                let mut v = [_mm512_setzero_ps(); V];
                for (c, v) in v.iter_mut().enumerate() {
                    *v = _mm512_maskz_loadu_ps(mask, values.add(key * dim + c * 16));
                }
                for (i, sum) in sum.iter_mut().enumerate() {
                    let w = weights.get_unchecked(i).get_unchecked(part * LANES + key);
                    let w = _mm512_set1_ps(*w);
                    for (s, v) in sum.iter_mut().zip(&v) {
                        *s = _mm512_fmadd_ps(w, *v, *s);
                    }
                }
            }
            for (i, sum) in sum.iter().enumerate() {
                for (c, s) in sum.iter().enumerate() {
                    _mm512_mask_storeu_ps(acc.add(i * dim + c * 16), mask, *s);
                }
            }
        }
    }
}
