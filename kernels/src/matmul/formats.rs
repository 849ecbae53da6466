//! What the kernels know of each tiled format, and how AVX-512 reads it.

use super::packed::Geometry;
use std::arch::x86_64::*;

/// Scales of the 16 lanes of a panel in one block of 256, ready to multiply with: a group adds
/// `s · Σ q·x + m · Σ x`, or, where scales are whole, `unit · (whole · Σ q·x)`.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Scales {
    pub(super) s: [__m512; 8],
    pub(super) m: [__m512; 8],
    pub(super) whole: [__m512i; 16],
    pub(super) unit: __m512,
}

impl Scales {
    /// # Safety
    /// AVX-512.
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn zero() -> Self {
        let zero = _mm512_setzero_ps();
        Scales { s: [zero; 8], m: [zero; 8], whole: [_mm512_setzero_si512(); 16], unit: zero }
    }
}

/// A quantised type as the vector kernels see it. All functions need AVX-512 F and BW.
pub(super) trait Format {
    /// Groups of a whole block.
    const GROUPS: usize;
    /// Vectors of a group: four inputs each.
    const VECTORS: usize;
    /// Bytes of a group.
    const BYTES: usize;
    /// A value of [`Format::quants`] is the weight plus `1 << SHIFT`.
    const SHIFT: Option<u32>;
    /// Whether groups lie in memory as signed bytes, as the tile unit takes them.
    const SIGNED: bool = false;
    /// Whether there are minima.
    const MINS: bool;
    /// Whether 16 times a weight is still a byte.
    const NIBBLES: bool;
    /// Whether scales are whole numbers of a unit that a block has.
    const WHOLE: bool = false;
    /// Bytes that are fetched ahead of use where the memory decides. Reckoning Q4_K's scales takes so long
    /// that its stream would run dry (measured, as the others).
    const AHEAD: usize = 1024;

    /// The scales of a block; groups that do not exist are left alone.
    ///
    /// # Safety
    /// A panel of the geometry, and the block is in range.
    unsafe fn scales(panel: *const u8, g: &Geometry, block: usize, out: &mut Scales);

    /// Vectors `2 i` and `2 i + 1` of the group at `at`, values without a sign.
    ///
    /// # Safety
    /// A group lies there, and has these vectors.
    unsafe fn pair(at: *const u8, i: usize) -> [__m512i; 2];

    /// All vectors of the group at `at`; the first [`Format::VECTORS`] count.
    ///
    /// # Safety
    /// A group lies there.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn quants(at: *const u8) -> [__m512i; 8] {
        let mut out = [_mm512_setzero_si512(); 8];
        for (i, pair) in out.as_chunks_mut().0.iter_mut().enumerate().take(Self::VECTORS / 2) {
            // SAFETY: the caller's promise.
            *pair = unsafe { Self::pair(at, i) };
        }
        out
    }
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

/// Two vectors from vector `i` of nibbles.
///
/// # Safety
/// It lies behind `p`; AVX-512.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn nibbles(p: *const u8, i: usize) -> [__m512i; 2] {
    let mask = _mm512_set1_epi8(15);
    // SAFETY: the caller's promise.
    let v = unsafe { load(p.add(i * 64)) };
    [_mm512_and_si512(v, mask), _mm512_and_si512(_mm512_srli_epi16::<4>(v), mask)]
}

/// The scales of a block of single scales.
///
/// # Safety
/// As [`Format::scales`].
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn plain_scales(panel: *const u8, g: &Geometry, block: usize, out: &mut Scales) {
    let base = g.scales_at(block);
    for j in 0..g.groups(block) {
        // SAFETY: the group exists.
        out.s[j] = unsafe { halves(panel.add(base + j * 32)) };
    }
}

/// Calls `$work::<F>` with the type of format that `$kind` names.
macro_rules! by_kind {
    ($kind:expr, $work:ident($($argument:expr),* $(,)?)) => {
        match $kind {
            Kind::Q8_0 => $work::<Q8_0>($($argument),*),
            Kind::Q4_0 => $work::<Q4_0>($($argument),*),
            Kind::Q4_1 => $work::<Q4_1>($($argument),*),
            Kind::Q4K => $work::<Q4K>($($argument),*),
            Kind::Q6K => $work::<Q6K>($($argument),*),
        }
    };
}
pub(super) use by_kind;

pub(super) struct Q8_0;
pub(super) struct Q4_0;
pub(super) struct Q4_1;
pub(super) struct Q4K;
pub(super) struct Q6K;

impl Format for Q8_0 {
    const GROUPS: usize = 8;
    const VECTORS: usize = 8;
    const BYTES: usize = 512;
    const SHIFT: Option<u32> = Some(7);
    const SIGNED: bool = true;
    const MINS: bool = false;
    const NIBBLES: bool = false;

    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn scales(panel: *const u8, g: &Geometry, block: usize, out: &mut Scales) {
        // SAFETY: the caller's promise.
        unsafe { plain_scales(panel, g, block, out) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn pair(at: *const u8, i: usize) -> [__m512i; 2] {
        // SAFETY: the caller's promise.
        let (even, odd) = unsafe { (load(at.add(2 * i * 64)), load(at.add((2 * i + 1) * 64))) };
        let sign = _mm512_set1_epi8(i8::MIN);
        [_mm512_xor_si512(even, sign), _mm512_xor_si512(odd, sign)]
    }
}

impl Format for Q4_0 {
    const GROUPS: usize = 8;
    const VECTORS: usize = 8;
    const BYTES: usize = 256;
    const SHIFT: Option<u32> = Some(3);
    const MINS: bool = false;
    const NIBBLES: bool = true;

    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn scales(panel: *const u8, g: &Geometry, block: usize, out: &mut Scales) {
        // SAFETY: the caller's promise.
        unsafe { plain_scales(panel, g, block, out) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn pair(at: *const u8, i: usize) -> [__m512i; 2] {
        // SAFETY: the caller's promise.
        unsafe { nibbles(at, i) }
    }
}

impl Format for Q4_1 {
    const GROUPS: usize = 8;
    const VECTORS: usize = 8;
    const BYTES: usize = 256;
    const SHIFT: Option<u32> = None;
    const MINS: bool = true;
    const NIBBLES: bool = true;

    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn scales(panel: *const u8, g: &Geometry, block: usize, out: &mut Scales) {
        let base = g.scales_at(block);
        for j in 0..g.groups(block) {
            // SAFETY: the group exists.
            unsafe {
                let at = panel.add(base + j * 64);
                (out.s[j], out.m[j]) = (halves(at), halves(at.add(32)));
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn pair(at: *const u8, i: usize) -> [__m512i; 2] {
        // SAFETY: the caller's promise.
        unsafe { nibbles(at, i) }
    }
}

impl Format for Q4K {
    const GROUPS: usize = 8;
    const VECTORS: usize = 8;
    const BYTES: usize = 256;
    const SHIFT: Option<u32> = None;
    const MINS: bool = true;
    const NIBBLES: bool = true;
    const AHEAD: usize = 3072;

    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn scales(panel: *const u8, g: &Geometry, block: usize, out: &mut Scales) {
        // SAFETY: the block exists.
        let (d, dmin, w0, w1, w2) = unsafe {
            let base = panel.add(g.scales_at(block));
            let (d, dmin) = (halves(base), halves(base.add(32)));
            (d, dmin, load(base.add(64)), load(base.add(128)), load(base.add(192)))
        };
        let dmin = _mm512_sub_ps(_mm512_setzero_ps(), dmin);
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
        let times = |d, v| {
            let v = _mm512_and_si512(v, _mm512_set1_epi32(255));
            _mm512_mul_ps(d, _mm512_cvtepi32_ps(v))
        };
        for (half, (s, m)) in words.into_iter().enumerate() {
            let at = half * 4;
            (out.s[at], out.m[at]) = (times(d, s), times(dmin, m));
            let (s1, m1) = (_mm512_srli_epi32::<8>(s), _mm512_srli_epi32::<8>(m));
            (out.s[at + 1], out.m[at + 1]) = (times(d, s1), times(dmin, m1));
            let (s2, m2) = (_mm512_srli_epi32::<16>(s), _mm512_srli_epi32::<16>(m));
            (out.s[at + 2], out.m[at + 2]) = (times(d, s2), times(dmin, m2));
            let (s3, m3) = (_mm512_srli_epi32::<24>(s), _mm512_srli_epi32::<24>(m));
            (out.s[at + 3], out.m[at + 3]) = (times(d, s3), times(dmin, m3));
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn pair(at: *const u8, i: usize) -> [__m512i; 2] {
        // SAFETY: the caller's promise.
        unsafe { nibbles(at, i) }
    }
}

impl Format for Q6K {
    const GROUPS: usize = 16;
    const VECTORS: usize = 4;
    const BYTES: usize = 192;
    const SHIFT: Option<u32> = Some(5);
    const MINS: bool = false;
    const NIBBLES: bool = false;
    const WHOLE: bool = true;

    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn scales(panel: *const u8, g: &Geometry, block: usize, out: &mut Scales) {
        // SAFETY: the block exists.
        unsafe {
            out.unit = halves(panel.add(block * 32));
            for i in 0..4 {
                let v = load(panel.add(g.scales_at(block) + i * 64));
                out.whole[4 * i] = _mm512_srai_epi32::<24>(_mm512_slli_epi32::<24>(v));
                out.whole[4 * i + 1] = _mm512_srai_epi32::<24>(_mm512_slli_epi32::<16>(v));
                out.whole[4 * i + 2] = _mm512_srai_epi32::<24>(_mm512_slli_epi32::<8>(v));
                out.whole[4 * i + 3] = _mm512_srai_epi32::<24>(v);
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn pair(at: *const u8, i: usize) -> [__m512i; 2] {
        // SAFETY: the caller's promise.
        let (nibbles, bits) = unsafe { (load(at.add(i * 64)), load(at.add(128))) };
        let (four, two) = (_mm512_set1_epi8(15), _mm512_set1_epi8(0x30));
        // (nibble & 15) | (pair & 0x30), the pair moved to bits 4 and 5 first.
        let join = |nibble, pair| {
            _mm512_ternarylogic_epi32::<0xF8>(_mm512_and_si512(nibble, four), pair, two)
        };
        let high = _mm512_srli_epi16::<4>(nibbles);
        match i {
            0 => {
                let (first, second) = (_mm512_slli_epi16::<4>(bits), _mm512_slli_epi16::<2>(bits));
                [join(nibbles, first), join(high, second)]
            }
            _ => [join(nibbles, bits), join(high, _mm512_srli_epi16::<2>(bits))],
        }
    }
}
