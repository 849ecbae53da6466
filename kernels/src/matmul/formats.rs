//! Reading the tiled formats with AVX-512.

use super::packed::{Geometry, Q4K_BLOCK, Q6K_BLOCK};
use std::arch::x86_64::*;

/// Scales of the 16 lanes of a panel in one block of 256.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Scales {
    pub(super) s: [__m512; 16],
    pub(super) m: [__m512; 8],
    pub(super) d: __m512,
    pub(super) dmin: __m512,
}

/// A quantised type as the vector kernels see it. All functions need AVX-512 F and BW and a panel of
/// the geometry, with the block and group in range.
pub(super) trait Format {
    /// Groups of a whole block.
    const GROUPS: usize;
    /// Vectors of a group: four inputs each.
    const VECTORS: usize;
    /// A stored value is the weight plus `1 << SHIFT`.
    const SHIFT: Option<u32>;
    /// Whether there are minima.
    const MINS: bool;

    /// The scales of a block; groups that do not exist are left alone.
    ///
    /// # Safety
    /// See the trait.
    unsafe fn scales(panel: *const u8, g: &Geometry, block: usize, out: &mut Scales);

    /// The stored values of a group; the first [`Format::VECTORS`] count.
    ///
    /// # Safety
    /// See the trait.
    unsafe fn quants(panel: *const u8, g: &Geometry, block: usize, group: usize) -> [__m512i; 8];

    /// A block's value from its scaled sums and minima.
    ///
    /// # Safety
    /// See the trait.
    unsafe fn join(scales: &Scales, a: __m512, b: __m512) -> __m512;
}

/// # Safety
/// 32 bytes at `p`, AVX-512.
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn halves(p: *const u8) -> __m512 {
    // SAFETY: the caller's promise.
    unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
}

/// # Safety
/// 64 bytes at `p`, AVX-512.
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn load(p: *const u8) -> __m512i {
    // SAFETY: the caller's promise.
    unsafe { _mm512_loadu_si512(p.cast()) }
}

/// Eight vectors from four vectors of nibbles.
///
/// # Safety
/// 256 bytes at `p`, AVX-512.
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn nibbles(p: *const u8) -> [__m512i; 8] {
    let mask = _mm512_set1_epi8(15);
    let mut out = [_mm512_setzero_si512(); 8];
    for j in 0..4 {
        // SAFETY: the caller's promise.
        let v = unsafe { load(p.add(j * 64)) };
        out[2 * j] = _mm512_and_si512(v, mask);
        out[2 * j + 1] = _mm512_and_si512(_mm512_srli_epi16::<4>(v), mask);
    }
    out
}

pub(super) struct Q8_0;
pub(super) struct Q4_0;
pub(super) struct Q4_1;
pub(super) struct Q4K;
pub(super) struct Q6K;

impl Format for Q8_0 {
    const GROUPS: usize = 8;
    const VECTORS: usize = 8;
    const SHIFT: Option<u32> = Some(7);
    const MINS: bool = false;

    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn scales(panel: *const u8, g: &Geometry, block: usize, out: &mut Scales) {
        for j in 0..g.groups(block) {
            // SAFETY: the group exists.
            out.s[j] = unsafe { halves(panel.add(g.scales_at + (block * 8 + j) * 32)) };
        }
    }

    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn quants(panel: *const u8, _: &Geometry, block: usize, group: usize) -> [__m512i; 8] {
        let mut out = [_mm512_setzero_si512(); 8];
        for (i, o) in out.iter_mut().enumerate() {
            // SAFETY: the group exists.
            *o = unsafe { load(panel.add((block * 8 + group) * 512 + i * 64)) };
        }
        out
    }

    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn join(_: &Scales, a: __m512, _: __m512) -> __m512 {
        a
    }
}

impl Format for Q4_0 {
    const GROUPS: usize = 8;
    const VECTORS: usize = 8;
    const SHIFT: Option<u32> = Some(3);
    const MINS: bool = false;

    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn scales(panel: *const u8, g: &Geometry, block: usize, out: &mut Scales) {
        // SAFETY: the same place as in Q8_0.
        unsafe { Q8_0::scales(panel, g, block, out) }
    }

    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn quants(panel: *const u8, _: &Geometry, block: usize, group: usize) -> [__m512i; 8] {
        // SAFETY: the group exists.
        unsafe { nibbles(panel.add((block * 8 + group) * 256)) }
    }

    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn join(_: &Scales, a: __m512, _: __m512) -> __m512 {
        a
    }
}

impl Format for Q4_1 {
    const GROUPS: usize = 8;
    const VECTORS: usize = 8;
    const SHIFT: Option<u32> = None;
    const MINS: bool = true;

    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn scales(panel: *const u8, g: &Geometry, block: usize, out: &mut Scales) {
        for j in 0..g.groups(block) {
            // SAFETY: the group exists.
            unsafe {
                let at = panel.add(g.scales_at + (block * 8 + j) * 64);
                (out.s[j], out.m[j]) = (halves(at), halves(at.add(32)));
            }
        }
    }

    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn quants(panel: *const u8, _: &Geometry, block: usize, group: usize) -> [__m512i; 8] {
        // SAFETY: the group exists.
        unsafe { nibbles(panel.add((block * 8 + group) * 256)) }
    }

    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn join(_: &Scales, a: __m512, b: __m512) -> __m512 {
        _mm512_add_ps(a, b)
    }
}

impl Format for Q4K {
    const GROUPS: usize = 8;
    const VECTORS: usize = 8;
    const SHIFT: Option<u32> = None;
    const MINS: bool = true;

    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn scales(panel: *const u8, _: &Geometry, block: usize, out: &mut Scales) {
        // SAFETY: the block exists.
        let (w0, w1, w2) = unsafe {
            let base = panel.add(block * Q4K_BLOCK);
            (out.d, out.dmin) = (halves(base), halves(base.add(32)));
            (load(base.add(64)), load(base.add(128)), load(base.add(192)))
        };
        let byte = |v: u8| _mm512_set1_epi8(v as i8);
        let low6 = |v| _mm512_and_si512(v, byte(63));
        let high2 = |v| _mm512_and_si512(_mm512_srli_epi16::<2>(v), byte(0x30));
        let low4 = |v| _mm512_and_si512(v, byte(15));
        let words = [
            (low6(w0), low6(w1)),
            (
                _mm512_or_si512(low4(w2), high2(w0)),
                _mm512_or_si512(low4(_mm512_srli_epi16::<4>(w2)), high2(w1)),
            ),
        ];
        let float = |v| _mm512_cvtepi32_ps(_mm512_and_si512(v, _mm512_set1_epi32(255)));
        for (half, (s, m)) in words.into_iter().enumerate() {
            let at = half * 4;
            (out.s[at], out.m[at]) = (float(s), float(m));
            let (s1, m1) = (_mm512_srli_epi32::<8>(s), _mm512_srli_epi32::<8>(m));
            (out.s[at + 1], out.m[at + 1]) = (float(s1), float(m1));
            let (s2, m2) = (_mm512_srli_epi32::<16>(s), _mm512_srli_epi32::<16>(m));
            (out.s[at + 2], out.m[at + 2]) = (float(s2), float(m2));
            let (s3, m3) = (_mm512_srli_epi32::<24>(s), _mm512_srli_epi32::<24>(m));
            (out.s[at + 3], out.m[at + 3]) = (float(s3), float(m3));
        }
    }

    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn quants(panel: *const u8, _: &Geometry, block: usize, group: usize) -> [__m512i; 8] {
        // SAFETY: the group exists.
        unsafe { nibbles(panel.add(block * Q4K_BLOCK + 256 + group * 256)) }
    }

    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn join(scales: &Scales, a: __m512, b: __m512) -> __m512 {
        _mm512_fnmadd_ps(scales.dmin, b, _mm512_mul_ps(scales.d, a))
    }
}

impl Format for Q6K {
    const GROUPS: usize = 16;
    const VECTORS: usize = 4;
    const SHIFT: Option<u32> = Some(5);
    const MINS: bool = false;

    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn scales(panel: *const u8, g: &Geometry, block: usize, out: &mut Scales) {
        // SAFETY: the block exists.
        unsafe {
            out.d = halves(panel.add(g.scales_at + block * 32));
            for i in 0..4 {
                let v = load(panel.add(block * Q6K_BLOCK + i * 64));
                let float = |v| _mm512_cvtepi32_ps(_mm512_srai_epi32::<24>(v));
                out.s[4 * i] = float(_mm512_slli_epi32::<24>(v));
                out.s[4 * i + 1] = float(_mm512_slli_epi32::<16>(v));
                out.s[4 * i + 2] = float(_mm512_slli_epi32::<8>(v));
                out.s[4 * i + 3] = float(v);
            }
        }
    }

    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn quants(panel: *const u8, _: &Geometry, block: usize, group: usize) -> [__m512i; 8] {
        // SAFETY: the group exists.
        let (low, high, bits) = unsafe {
            let at = panel.add(block * Q6K_BLOCK + 256 + group * 192);
            (load(at), load(at.add(64)), load(at.add(128)))
        };
        let (four, two) = (_mm512_set1_epi8(15), _mm512_set1_epi8(0x30));
        // (nibble & 15) | (pair & 0x30), the pair moved to bits 4 and 5 first.
        let join = |nibble, pair| {
            _mm512_ternarylogic_epi32::<0xF8>(_mm512_and_si512(nibble, four), pair, two)
        };
        let zero = _mm512_setzero_si512();
        [
            join(low, _mm512_slli_epi16::<4>(bits)),
            join(_mm512_srli_epi16::<4>(low), _mm512_slli_epi16::<2>(bits)),
            join(high, bits),
            join(_mm512_srli_epi16::<4>(high), _mm512_srli_epi16::<2>(bits)),
            zero,
            zero,
            zero,
            zero,
        ]
    }

    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn join(scales: &Scales, a: __m512, _: __m512) -> __m512 {
        _mm512_mul_ps(scales.d, a)
    }
}
