//! Integer products with AVX2; see [`super::int`] for the definition.
//!
//! Eight of a panel's columns are a vector. `vpmaddubsw` adds products of bytes in pairs to 16 bits,
//! where several steps are summed before they become 32: all eight of a group if weights have four
//! bits, fewer if they have more. Weights of eight bits take their sign to the inputs first, so that
//! no pair overflows: 2 · 128 · 127.

use super::activations::{Activations, HIGH, TILE};
use super::formats::{Format, Q4_0, Q4_1, Q4K, Q6K, Q8_0, by_kind};
use super::packed::{Geometry, Kind, QuantTiles};
use super::{Out, PANEL};
use std::arch::x86_64::*;
use std::ops::Range;

/// Columns of a vector.
const LANES: usize = 8;

/// Multiplies panels `panels` of `w` with rows `rows` of `x`.
///
/// # Safety
/// `out` has the rows of `x` and the columns of `w`; nobody else writes these panels' columns of these
/// rows; the processor has AVX2, FMA and F16C.
#[target_feature(enable = "avx2,fma,f16c")]
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

/// # Safety
/// As [`multiply`].
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn all<F: Narrow>(
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
            // SAFETY: the caller's promises; panel and rows exist.
            row += unsafe {
                match most {
                    4.. => tile::<F, 4>(w, x, panel, row, out),
                    2.. => tile::<F, 2>(w, x, panel, row, out),
                    _ => tile::<F, 1>(w, x, panel, row, out),
                }
            };
        }
    }
}

/// Multiplies a panel with `M` rows and returns `M`.
///
/// # Safety
/// As [`multiply`]; the rows exist and share a tile.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn tile<F: Narrow, const M: usize>(
    w: &QuantTiles,
    x: &Activations,
    panel: usize,
    row: usize,
    out: Out,
) -> usize {
    let g = &w.geometry;
    let weights = w.panel(panel).as_ptr();
    let (levels, stride) = x.tile(row / TILE);
    let mut sums = [[0f32; PANEL]; M];
    let mut scales = Scales::zero();
    for block in 0..g.blocks {
        for half in 0..PANEL / LANES {
            // SAFETY: block, half and rows exist.
            unsafe {
                F::narrow_scales(weights, g, block, half, &mut scales);
                let inputs = Inputs {
                    levels: levels.add(block * 8 * stride + row % TILE * 64),
                    stride,
                    x,
                    row,
                    block,
                };
                let weights = weights.add(g.quants_at(block) + half * 32);
                let a = block_of::<F, M>(weights, g.groups(block), &inputs, &scales);
                for (r, a) in a.iter().enumerate() {
                    let sum = sums[r][half * LANES..].as_mut_ptr();
                    let scale =
                        _mm256_set1_ps(*x.scale.get_unchecked((row + r) * g.blocks + block));
                    _mm256_storeu_ps(sum, _mm256_fmadd_ps(*a, scale, _mm256_loadu_ps(sum)));
                }
            }
        }
    }
    let columns = PANEL.min(w.rows() - panel * PANEL);
    for (r, sum) in sums.iter().enumerate() {
        // SAFETY: the row and the panel's columns are in the output and this task's alone.
        unsafe {
            let to = out.at(row + r, panel * PANEL);
            std::ptr::copy_nonoverlapping(sum.as_ptr(), to, columns);
        }
    }
    M
}

/// Where a block's inputs are.
struct Inputs<'a> {
    /// Levels of the first row in the block's first group of 32.
    levels: *const u8,
    /// Bytes between groups of 32.
    stride: usize,
    x: &'a Activations,
    row: usize,
    block: usize,
}

/// The block's scaled sums of eight columns, for `M` rows.
///
/// # Safety
/// As [`multiply`]; the half of the block's `groups` groups begins at `weights`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn block_of<F: Narrow, const M: usize>(
    weights: *const u8,
    groups: usize,
    at: &Inputs<'_>,
    scales: &Scales,
) -> [__m256; M] {
    let mut a = [_mm256_setzero_ps(); M];
    let mut whole = [_mm256_setzero_si256(); M];
    for j in 0..groups {
        // SAFETY: group and rows exist.
        let isums = unsafe { group::<F, M>(weights.add(j * F::BYTES), j, at) };
        for r in 0..M {
            if F::WHOLE {
                let scaled = _mm256_mullo_epi32(isums[r], scales.whole[j % 16]);
                whole[r] = _mm256_add_epi32(whole[r], scaled);
                continue;
            }
            a[r] = _mm256_fmadd_ps(scales.s[j % 8], _mm256_cvtepi32_ps(isums[r]), a[r]);
            if F::MINS {
                let xsum = at.x.sums[at.x.sum_at(at.row + r, at.block * 8 + j)];
                a[r] = _mm256_fmadd_ps(scales.m[j % 8], _mm256_set1_ps(xsum), a[r]);
            }
        }
    }
    if F::WHOLE {
        for r in 0..M {
            a[r] = _mm256_mul_ps(_mm256_cvtepi32_ps(whole[r]), scales.unit);
        }
    }
    a
}

/// The sums of a group over weights and inputs, of eight columns and `M` rows.
///
/// # Safety
/// As [`multiply`]; the group's half begins at `weights`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn group<F: Narrow, const M: usize>(
    weights: *const u8,
    j: usize,
    at: &Inputs<'_>,
) -> [__m256i; M] {
    const { assert!(F::VECTORS.is_multiple_of(F::STEPS)) };
    let zero = _mm256_setzero_si256();
    let (mut sums, mut high, mut low) = ([zero; M], [zero; M], [zero; M]);
    let per32 = 8 / F::VECTORS;
    for i in 0..F::VECTORS / 2 {
        // SAFETY: group and rows exist.
        unsafe {
            let levels = at.levels.add(j / per32 * at.stride + j % per32 * 16 + i * 8);
            for (k, q) in F::narrow_pair(weights, i).into_iter().enumerate() {
                for r in 0..M {
                    let x = levels.add(r * 64 + k * 4).cast::<i32>();
                    let mut hi = _mm256_set1_epi32(x.read_unaligned());
                    let mut lo = _mm256_set1_epi32(x.add(8).read_unaligned());
                    let mut q = q;
                    if F::SIGNED {
                        (hi, lo) = (_mm256_sign_epi8(hi, q), _mm256_sign_epi8(lo, q));
                        q = _mm256_abs_epi8(q);
                    }
                    high[r] = _mm256_add_epi16(high[r], _mm256_maddubs_epi16(q, hi));
                    low[r] = _mm256_add_epi16(low[r], _mm256_maddubs_epi16(q, lo));
                    if (2 * i + k + 1).is_multiple_of(F::STEPS) {
                        let wide = _mm256_madd_epi16(high[r], _mm256_set1_epi16(HIGH as i16));
                        sums[r] = _mm256_add_epi32(sums[r], wide);
                        let wide = _mm256_madd_epi16(low[r], _mm256_set1_epi16(1));
                        sums[r] = _mm256_add_epi32(sums[r], wide);
                        (high[r], low[r]) = (zero, zero);
                    }
                }
            }
        }
    }
    for (r, sum) in sums.iter_mut().enumerate() {
        if !F::SIGNED {
            // SAFETY: row, block and group exist.
            let start = unsafe { at.x.start::<F>(at.row + r, at.block, j) };
            *sum = _mm256_add_epi32(*sum, _mm256_set1_epi32(start));
        }
    }
    sums
}

/// Scales of eight lanes of a panel in one block of 256, as in [`super::formats::Scales`].
struct Scales {
    s: [__m256; 8],
    m: [__m256; 8],
    whole: [__m256i; 16],
    unit: __m256,
}

impl Scales {
    #[target_feature(enable = "avx2")]
    fn zero() -> Self {
        let zero = _mm256_setzero_ps();
        Scales { s: [zero; 8], m: [zero; 8], whole: [_mm256_setzero_si256(); 16], unit: zero }
    }
}

/// A quantised type as this kernel sees it. All functions need AVX2, FMA and F16C.
trait Narrow: Format {
    /// Products of a level of so many steps of four inputs fit 16 bits together.
    const STEPS: usize;

    /// The scales of half `half` of the lanes in a block; groups that do not exist are left alone.
    ///
    /// # Safety
    /// A panel of the geometry, and the block is in range.
    unsafe fn narrow_scales(
        panel: *const u8,
        g: &Geometry,
        block: usize,
        half: usize,
        out: &mut Scales,
    );

    /// Half of the vectors `2 i` and `2 i + 1` of the group: without a sign, or as signed bytes if
    /// [`Format::SIGNED`]. `at` is where the half begins.
    ///
    /// # Safety
    /// The group lies there, and has these vectors.
    unsafe fn narrow_pair(at: *const u8, i: usize) -> [__m256i; 2];
}

/// # Safety
/// 32 bytes at `p`.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn load(p: *const u8) -> __m256i {
    // SAFETY: the caller's promise.
    unsafe { _mm256_loadu_si256(p.cast()) }
}

/// # Safety
/// 16 bytes at `p`.
#[inline]
#[target_feature(enable = "avx2,f16c")]
unsafe fn widened(p: *const u8) -> __m256 {
    // SAFETY: the caller's promise.
    unsafe { _mm256_cvtph_ps(_mm_loadu_si128(p.cast())) }
}

/// Two vectors from vector `i` of nibbles.
///
/// # Safety
/// Half of it lies behind `p`.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn nibbles(p: *const u8, i: usize) -> [__m256i; 2] {
    let mask = _mm256_set1_epi8(15);
    // SAFETY: the caller's promise.
    let v = unsafe { load(p.add(i * 64)) };
    [_mm256_and_si256(v, mask), _mm256_and_si256(_mm256_srli_epi16::<4>(v), mask)]
}

/// The scales of a block, `bytes` a group, the minima (if `mins`) behind the scales.
///
/// # Safety
/// As [`Narrow::narrow_scales`].
#[inline]
#[target_feature(enable = "avx2,f16c")]
unsafe fn plain_scales(
    panel: *const u8,
    g: &Geometry,
    block: usize,
    half: usize,
    mins: bool,
    out: &mut Scales,
) {
    let bytes = if mins { 64 } else { 32 };
    for j in 0..g.groups(block) {
        // SAFETY: the group exists.
        unsafe {
            let at = panel.add(g.scales_at(block) + j * bytes + half * 16);
            out.s[j] = widened(at);
            if mins {
                out.m[j] = widened(at.add(32));
            }
        }
    }
}

/// A type whose groups of 32 have a scale, and perhaps a minimum, of their own.
macro_rules! plain {
    ($name:ident, $steps:literal, $mins:literal, $pair:expr) => {
        impl Narrow for $name {
            const STEPS: usize = $steps;

            #[inline]
            #[target_feature(enable = "avx2,fma,f16c")]
            unsafe fn narrow_scales(
                panel: *const u8,
                g: &Geometry,
                block: usize,
                half: usize,
                out: &mut Scales,
            ) {
                // SAFETY: the caller's promise.
                unsafe { plain_scales(panel, g, block, half, $mins, out) }
            }

            #[inline]
            #[target_feature(enable = "avx2,fma,f16c")]
            unsafe fn narrow_pair(at: *const u8, i: usize) -> [__m256i; 2] {
                // SAFETY: the caller's promise.
                unsafe { $pair(at, i) }
            }
        }
    };
}

plain!(Q4_0, 8, false, nibbles);
plain!(Q4_1, 8, true, nibbles);
plain!(Q8_0, 1, false, |at: *const u8, i: usize| {
    [load(at.add(2 * i * 64)), load(at.add((2 * i + 1) * 64))]
});

impl Narrow for Q4K {
    const STEPS: usize = 8;

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn narrow_scales(
        panel: *const u8,
        g: &Geometry,
        block: usize,
        half: usize,
        out: &mut Scales,
    ) {
        // SAFETY: the block exists.
        let (d, dmin, w0, w1, w2) = unsafe {
            let base = panel.add(g.scales_at(block));
            let (scales, packed) = (base.add(half * 16), base.add(64 + half * 32));
            let (d, dmin) = (widened(scales), widened(scales.add(32)));
            (d, dmin, load(packed), load(packed.add(64)), load(packed.add(128)))
        };
        let dmin = _mm256_sub_ps(_mm256_setzero_ps(), dmin);
        let (six, four) = (_mm256_set1_epi8(63), _mm256_set1_epi8(15));
        let top = _mm256_set1_epi8(0x30);
        let high0 = _mm256_and_si256(_mm256_srli_epi16::<2>(w0), top);
        let high1 = _mm256_and_si256(_mm256_srli_epi16::<2>(w1), top);
        let low2 = _mm256_and_si256(w2, four);
        let next2 = _mm256_and_si256(_mm256_srli_epi16::<4>(w2), four);
        let words = [
            (_mm256_and_si256(w0, six), _mm256_and_si256(w1, six)),
            (_mm256_or_si256(low2, high0), _mm256_or_si256(next2, high1)),
        ];
        let byte = _mm256_set1_epi32(255);
        for (part, (mut s, mut m)) in words.into_iter().enumerate() {
            for at in part * 4..part * 4 + 4 {
                let (scale, min) = (_mm256_and_si256(s, byte), _mm256_and_si256(m, byte));
                out.s[at] = _mm256_mul_ps(d, _mm256_cvtepi32_ps(scale));
                out.m[at] = _mm256_mul_ps(dmin, _mm256_cvtepi32_ps(min));
                (s, m) = (_mm256_srli_epi32::<8>(s), _mm256_srli_epi32::<8>(m));
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn narrow_pair(at: *const u8, i: usize) -> [__m256i; 2] {
        // SAFETY: the caller's promise.
        unsafe { nibbles(at, i) }
    }
}

impl Narrow for Q6K {
    const STEPS: usize = 2;

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn narrow_scales(
        panel: *const u8,
        g: &Geometry,
        block: usize,
        half: usize,
        out: &mut Scales,
    ) {
        // SAFETY: the block exists.
        unsafe {
            out.unit = widened(panel.add(block * 32 + half * 16));
            for i in 0..4 {
                let mut v = load(panel.add(g.scales_at(block) + i * 64 + half * 32));
                for whole in &mut out.whole[4 * i..4 * i + 4] {
                    *whole = _mm256_srai_epi32::<24>(_mm256_slli_epi32::<24>(v));
                    v = _mm256_srli_epi32::<8>(v);
                }
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn narrow_pair(at: *const u8, i: usize) -> [__m256i; 2] {
        // SAFETY: the caller's promise.
        let bits = unsafe { load(at.add(128)) };
        // SAFETY: as above.
        let [even, odd] = unsafe { nibbles(at, i) };
        let top = _mm256_set1_epi8(0x30);
        // The pairs of bits of these inputs, moved to bits 4 and 5.
        let (first, second) = match i {
            0 => (_mm256_slli_epi16::<4>(bits), _mm256_slli_epi16::<2>(bits)),
            _ => (bits, _mm256_srli_epi16::<2>(bits)),
        };
        let (first, second) = (_mm256_and_si256(first, top), _mm256_and_si256(second, top));
        [_mm256_or_si256(even, first), _mm256_or_si256(odd, second)]
    }
}
