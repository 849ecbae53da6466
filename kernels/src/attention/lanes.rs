//! The two products of attention over 16 keys: plain Rust and AVX-512, which give the same bits where plain
//! Rust has fused multiply-adds.

use super::kernel::{KEYS, LANES};
use crate::math::{exp, fma, half_to_f32, sum16};
use half::f16;
use std::ops::Range;

/// An element of keys and values.
pub(super) trait Element: Copy {
    /// Its exact value.
    fn widen(self) -> f32;

    /// Sixteen values, those outside the mask zero.
    ///
    /// # Safety
    /// The masked elements lie at `p`; the processor has AVX-512 F, BW and VL.
    #[cfg(target_arch = "x86_64")]
    unsafe fn load(mask: u16, p: *const Self) -> std::arch::x86_64::__m512;
}

impl Element for f32 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn load(mask: u16, p: *const Self) -> std::arch::x86_64::__m512 {
        // SAFETY: the caller's promise.
        unsafe { std::arch::x86_64::_mm512_maskz_loadu_ps(mask, p) }
    }
}

impl Element for f16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        half_to_f32(self)
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn load(mask: u16, p: *const Self) -> std::arch::x86_64::__m512 {
        use std::arch::x86_64::{_mm256_maskz_loadu_epi16, _mm512_cvtph_ps};
        // SAFETY: the caller's promise.
        unsafe { _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, p.cast())) }
    }
}

/// How the products are computed.
///
/// `keys` is `[dim][stride]`, `values` `[16][dim]`; scores and weights of a query are
/// `[part][lane]`, the part of 16 being `part`.
pub(super) trait Lanes {
    /// Asks for the cache line in which `elements` begin, ahead of its use.
    fn fetch<E: Element>(elements: &[E]);

    /// `scores[i] = q[i] · keys` for `N` queries: a chain of products over the even and one over the
    /// odd elements, then their sum.
    fn score<const N: usize, E: Element>(
        q: &[f32],
        dim: usize,
        keys: &[E],
        stride: usize,
        part: usize,
        scores: &mut [[f32; KEYS]],
    );

    /// The same for 32 keys `[dim][32]`, of parts `2 pair` and `2 pair + 1`.
    fn score_pair<const N: usize>(
        q: &[f32],
        dim: usize,
        keys: &[f32],
        pair: usize,
        scores: &mut [[f32; KEYS]],
    );

    /// Copies sixteen elements of each of `rows` rows, `stride` apart, to rows that are `width` apart.
    fn widen<E: Element>(from: &[E], stride: usize, rows: usize, to: &mut [f32], width: usize);

    /// Turns the scores of a query's keys `seen` into weights relative to the larger one of their
    /// maximum and `before`; those of the other keys become 0. Returns that maximum and the weights'
    /// sum.
    fn weigh(scores: &mut [f32; KEYS], seen: (usize, usize), before: f32) -> (f32, f32);

    /// `acc[i] += weights[i] · values` for `N` queries over the keys `seen`, in ascending order.
    fn gather<const N: usize, E: Element>(
        acc: &mut [f32],
        dim: usize,
        weights: &[[f32; KEYS]],
        values: &[E],
        part: usize,
        seen: Range<usize>,
    );
}

/// Plain Rust.
pub(super) struct Plain<const FMA: bool>;

impl<const FMA: bool> Lanes for Plain<FMA> {
    #[inline(always)]
    fn fetch<E: Element>(_: &[E]) {}

    #[inline(always)]
    fn score<const N: usize, E: Element>(
        q: &[f32],
        dim: usize,
        keys: &[E],
        stride: usize,
        part: usize,
        scores: &mut [[f32; KEYS]],
    ) {
        let mut acc = [[[0f32; LANES]; 2]; N];
        for d in 0..dim {
            let k: &[E; LANES] = keys[d * stride..].first_chunk().expect("16 keys");
            let k = k.map(E::widen);
            for (i, acc) in acc.iter_mut().enumerate() {
                let x = q[i * dim + d];
                for (a, k) in acc[d % 2].iter_mut().zip(k) {
                    *a = fma::<FMA>(x, k, *a);
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
    fn score_pair<const N: usize>(
        q: &[f32],
        dim: usize,
        keys: &[f32],
        pair: usize,
        scores: &mut [[f32; KEYS]],
    ) {
        for half in 0..2 {
            let keys = &keys[half * LANES..];
            Self::score::<N, f32>(q, dim, keys, 2 * LANES, 2 * pair + half, scores);
        }
    }

    #[inline(always)]
    fn widen<E: Element>(from: &[E], stride: usize, rows: usize, to: &mut [f32], width: usize) {
        for row in 0..rows {
            let from = &from[row * stride..][..LANES];
            for (to, from) in to[row * width..][..LANES].iter_mut().zip(from) {
                *to = from.widen();
            }
        }
    }

    #[inline(always)]
    fn weigh(scores: &mut [f32; KEYS], (from, to): (usize, usize), before: f32) -> (f32, f32) {
        for (lane, s) in scores.iter_mut().enumerate() {
            *s = if lane >= from && lane < to { *s } else { f32::NEG_INFINITY };
        }
        let larger = |a: f32, b: f32| if a > b { a } else { b };
        let max = scores.iter().fold(before, |max, s| larger(*s, max));
        scores.iter_mut().for_each(|s| *s = exp::<FMA>(*s - max));
        let at = |part: usize, lane: usize| scores[part * LANES + lane];
        let sums = std::array::from_fn(|i| (at(0, i) + at(1, i)) + (at(2, i) + at(3, i)));
        (max, sum16(&sums))
    }

    #[inline(always)]
    fn gather<const N: usize, E: Element>(
        acc: &mut [f32],
        dim: usize,
        weights: &[[f32; KEYS]],
        values: &[E],
        part: usize,
        seen: Range<usize>,
    ) {
        for (acc, w) in acc.chunks_exact_mut(dim).zip(weights).take(N) {
            for key in seen.clone() {
                for (a, v) in acc.iter_mut().zip(&values[key * dim..]) {
                    *a = fma::<FMA>(w[part * LANES + key], v.widen(), *a);
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) use avx512::Avx512;

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use super::{Element, KEYS, LANES, Lanes, Range};
    use std::arch::x86_64::*;

    /// AVX-512; to be used only by code compiled for it on a processor that has it.
    pub(in super::super) struct Avx512;

    impl Lanes for Avx512 {
        #[inline(always)]
        fn fetch<E: Element>(elements: &[E]) {
            // SAFETY: fetching is harmless anywhere.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(elements.as_ptr().cast()) };
        }

        #[inline(always)]
        fn score<const N: usize, E: Element>(
            q: &[f32],
            dim: usize,
            keys: &[E],
            stride: usize,
            part: usize,
            scores: &mut [[f32; KEYS]],
        ) {
            assert!(q.len() >= N * dim && keys.len() >= (dim - 1) * stride + LANES);
            assert!(scores.len() >= N && part < KEYS / LANES && dim.is_multiple_of(2));
            // SAFETY: the lengths were just checked; the processor has AVX-512.
            unsafe { score::<N, E>(q.as_ptr(), dim, keys.as_ptr(), stride, part, scores) }
        }

        #[inline(always)]
        fn score_pair<const N: usize>(
            q: &[f32],
            dim: usize,
            keys: &[f32],
            pair: usize,
            scores: &mut [[f32; KEYS]],
        ) {
            assert!(q.len() >= N * dim && keys.len() >= dim * 2 * LANES);
            assert!(scores.len() >= N && pair < KEYS / LANES / 2 && dim.is_multiple_of(2));
            // SAFETY: the lengths were just checked; the processor has AVX-512.
            unsafe { score_pair::<N>(q.as_ptr(), dim, keys.as_ptr(), pair, scores) }
        }

        #[inline(always)]
        fn widen<E: Element>(from: &[E], stride: usize, rows: usize, to: &mut [f32], width: usize) {
            assert!(rows == 0 || from.len() >= (rows - 1) * stride + LANES);
            assert!(rows == 0 || to.len() >= (rows - 1) * width + LANES);
            for row in 0..rows {
                // SAFETY: the lengths were just checked; the processor has AVX-512.
                unsafe {
                    let from = E::load(u16::MAX, from.as_ptr().add(row * stride));
                    _mm512_storeu_ps(to.as_mut_ptr().add(row * width), from);
                }
            }
        }

        #[inline(always)]
        fn weigh(scores: &mut [f32; KEYS], seen: (usize, usize), before: f32) -> (f32, f32) {
            // SAFETY: the processor has AVX-512.
            unsafe { weigh(scores, seen, before) }
        }

        #[inline(always)]
        fn gather<const N: usize, E: Element>(
            acc: &mut [f32],
            dim: usize,
            weights: &[[f32; KEYS]],
            values: &[E],
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
                unsafe { columns::<N, 4, E>(acc, dim, d, 16, weights, values, part, &seen) };
                d += 64;
            }
            while d < dim {
                let width = (dim - d).min(16);
                // SAFETY: as above.
                unsafe { columns::<N, 1, E>(acc, dim, d, width, weights, values, part, &seen) };
                d += width;
            }
        }
    }

    /// # Safety
    /// `q` is `[N][dim]` with an even `dim`, `keys` is `[dim][stride]` up to 16 of the last row,
    /// there are `N` rows of scores, the part exists, and the processor has AVX-512.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn score<const N: usize, E: Element>(
        q: *const f32,
        dim: usize,
        keys: *const E,
        stride: usize,
        part: usize,
        scores: &mut [[f32; KEYS]],
    ) {
        let mut acc = [[_mm512_setzero_ps(); 2]; N];
        for d in (0..dim).step_by(2) {
            // SAFETY: `d + 1 < dim`.
            unsafe {
                let k = keys.add(d * stride);
                let (even, odd) = (E::load(u16::MAX, k), E::load(u16::MAX, k.add(stride)));
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

    /// # Safety
    /// `q` is `[N][dim]` with an even `dim`, `keys` is `[dim][32]`, there are `N` rows of scores, the pair
    /// exists, and the processor has AVX-512.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn score_pair<const N: usize>(
        q: *const f32,
        dim: usize,
        keys: *const f32,
        pair: usize,
        scores: &mut [[f32; KEYS]],
    ) {
        // The even and the odd elements of either half.
        let mut acc = [[_mm512_setzero_ps(); 4]; N];
        for d in (0..dim).step_by(2) {
            // SAFETY: `d + 1 < dim`.
            unsafe {
                let at = keys.add(d * 2 * LANES);
                let (k0, k1) = (_mm512_loadu_ps(at), _mm512_loadu_ps(at.add(LANES)));
                let (k2, k3) =
                    (_mm512_loadu_ps(at.add(2 * LANES)), _mm512_loadu_ps(at.add(3 * LANES)));
                for (i, acc) in acc.iter_mut().enumerate() {
                    let x = q.add(i * dim + d);
                    let (even, odd) = (_mm512_set1_ps(*x), _mm512_set1_ps(*x.add(1)));
                    acc[0] = _mm512_fmadd_ps(even, k0, acc[0]);
                    acc[1] = _mm512_fmadd_ps(even, k1, acc[1]);
                    acc[2] = _mm512_fmadd_ps(odd, k2, acc[2]);
                    acc[3] = _mm512_fmadd_ps(odd, k3, acc[3]);
                }
            }
        }
        for (acc, scores) in acc.iter().zip(scores) {
            let to = scores[pair * 2 * LANES..][..2 * LANES].as_mut_ptr();
            // SAFETY: 32 scores.
            unsafe {
                _mm512_storeu_ps(to, _mm512_add_ps(acc[0], acc[2]));
                _mm512_storeu_ps(to.add(LANES), _mm512_add_ps(acc[1], acc[3]));
            }
        }
    }

    /// # Safety
    /// The processor has AVX-512.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    unsafe fn weigh(
        scores: &mut [f32; KEYS],
        (from, to): (usize, usize),
        before: f32,
    ) -> (f32, f32) {
        // `from < to <= 64`.
        let mask = (u64::MAX >> (KEYS - to)) & (u64::MAX << from);
        let hidden = _mm512_set1_ps(f32::NEG_INFINITY);
        let mut s = [hidden; KEYS / LANES];
        for (i, s) in s.iter_mut().enumerate() {
            let mask = (mask >> (i * LANES)) as __mmask16;
            // SAFETY: sixteen scores.
            *s = unsafe { _mm512_mask_loadu_ps(hidden, mask, scores.as_ptr().add(i * LANES)) };
        }
        let top = _mm512_max_ps(_mm512_max_ps(s[0], s[1]), _mm512_max_ps(s[2], s[3]));
        let max = _mm512_reduce_max_ps(_mm512_max_ps(top, _mm512_set1_ps(before)));
        let wide = _mm512_set1_ps(max);
        for (i, s) in s.iter_mut().enumerate() {
            // SAFETY: the processor has AVX-512; sixteen scores.
            unsafe {
                *s = exp(_mm512_sub_ps(*s, wide));
                _mm512_storeu_ps(scores.as_mut_ptr().add(i * LANES), *s);
            }
        }
        let sum = _mm512_add_ps(_mm512_add_ps(s[0], s[1]), _mm512_add_ps(s[2], s[3]));
        (max, _mm512_reduce_add_ps(sum))
    }

    /// e^x for x ≤ 0, bit for bit as [`crate::math::exp`].
    ///
    /// # Safety
    /// The processor has AVX-512.
    #[inline]
    #[target_feature(enable = "avx512f,avx512dq")]
    unsafe fn exp(x: __m512) -> __m512 {
        let c = _mm512_set1_ps;
        let round = c(12_582_912.0);
        let n = _mm512_sub_ps(_mm512_fmadd_ps(x, c(std::f32::consts::LOG2_E), round), round);
        let r = _mm512_fnmadd_ps(n, c(0.693_359_4), x);
        let r = _mm512_fnmadd_ps(n, c(-2.121_944_4e-4), r);
        let p = _mm512_fmadd_ps(c(1.987_569_1e-4), r, c(1.398_199_9e-3));
        let p = _mm512_fmadd_ps(p, r, c(8.333_452e-3));
        let p = _mm512_fmadd_ps(p, r, c(4.166_579_6e-2));
        let p = _mm512_fmadd_ps(p, r, c(1.666_666_5e-1));
        let p = _mm512_fmadd_ps(p, r, c(0.5));
        let p = _mm512_add_ps(_mm512_fmadd_ps(p, _mm512_mul_ps(r, r), r), c(1.0));
        // What is below the normal range is 0, NaN stays.
        let small = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(x, c(-87.3));
        _mm512_mask_blend_ps(small, _mm512_scalef_ps(p, n), _mm512_setzero_ps())
    }

    /// `V` vectors of columns from `d` on; of a single one only `width` columns exist.
    ///
    /// # Safety
    /// `acc` is `[N][dim]`, `values` holds the keys `seen`, the columns and the part exist, and the
    /// processor has AVX-512.
    #[allow(clippy::too_many_arguments)]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn columns<const N: usize, const V: usize, E: Element>(
        acc: &mut [f32],
        dim: usize,
        d: usize,
        width: usize,
        weights: &[[f32; KEYS]],
        values: &[E],
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
                    *v = E::load(mask, values.add(key * dim + c * 16));
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

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::*;
    use crate::cpu::{Cpu, Isa};
    use crate::testing::Rng;

    const DIM: usize = 80;
    const QUERIES: usize = 6;

    /// Scores, weights with their maxima and sums, and gathered values.
    fn run<L: Lanes>(seed: u64) -> Vec<u32> {
        let mut rng = Rng::new(seed);
        let q = rng.floats(QUERIES * DIM, 1.0);
        let keys = rng.floats(DIM * 2 * LANES, 1.0);
        let halves: Vec<f16> = keys.iter().map(|k| f16::from_f32(*k)).collect();
        let mut scores = [[0f32; KEYS]; QUERIES];
        L::score_pair::<QUERIES>(&q, DIM, &keys, 0, &mut scores);
        L::score::<QUERIES, f16>(&q, DIM, &halves, 2 * LANES, 2, &mut scores);
        L::score::<3, f32>(&q, DIM, &keys[LANES..], 2 * LANES, 3, &mut scores);
        let mut all: Vec<f32> = scores.concat();
        for (i, scores) in scores.iter_mut().enumerate() {
            // Far below the maximum, and beyond what a float's exponent reaches.
            scores[7] -= 80.0 + i as f32 * 3.0;
            let (max, sum) = L::weigh(scores, (i, KEYS - 2 * i), [f32::NEG_INFINITY, 3.0][i % 2]);
            all.extend([max, sum]);
            all.extend(&*scores);
        }
        let mut acc = rng.floats(QUERIES * DIM, 1.0);
        let values: Vec<f16> = halves.iter().rev().copied().collect();
        L::gather::<QUERIES, f16>(&mut acc, DIM, &scores, &values, 1, 3..LANES);
        L::gather::<1, f32>(&mut acc[DIM..], DIM, &scores, &keys, 3, 0..5);
        all.extend(acc);
        all.iter().map(|v| v.to_bits()).collect()
    }

    #[test]
    fn both_give_the_same_bits() {
        if Cpu::get().isa < Isa::Avx512 {
            return;
        }
        for seed in 0..300 {
            assert!(run::<Plain<true>>(seed) == run::<Avx512>(seed), "seed {seed}");
        }
    }
    /// Where a multiple of ln 2 is half way between two, both must choose the same one.
    #[test]
    fn weights_over_the_whole_range_have_the_same_bits() {
        if Cpu::get().isa < Isa::Avx512 {
            return;
        }
        for block in 0..20_000 {
            let mut scores = [[0f32; KEYS]; 2];
            for (i, s) in scores[0].iter_mut().enumerate().skip(1) {
                *s = (block * KEYS + i) as f32 * -7e-5;
            }
            scores[1] = scores[0];
            let plain = Plain::<true>::weigh(&mut scores[0], (0, KEYS), 0.0);
            assert!(plain == Avx512::weigh(&mut scores[1], (0, KEYS), 0.0), "{block}");
            assert!(scores[0] == scores[1], "{block}");
        }
    }
}
