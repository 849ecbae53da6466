//! The innermost loops of f32 products.

use super::{Out, PANEL};
use crate::cpu::Isa;
use crate::math::{fma, half_to_f32};

/// One chunk of inputs times up to four panels.
pub(super) struct Micro {
    /// The chunk's first input of row 0.
    pub(super) x: *const f32,
    /// Elements between rows of `x`.
    pub(super) x_stride: usize,
    /// The first panel: `[len][PANEL]`, of BF16 `[pair][PANEL][2]`.
    pub(super) w: *const u8,
    /// Bytes between panels.
    pub(super) panel_stride: usize,
    /// Inputs of the chunk.
    pub(super) len: usize,
    /// The output column of the first panel's first lane.
    pub(super) first: usize,
    /// Output columns, at most four panels.
    pub(super) columns: usize,
    /// Whether sums are added to the output or replace it.
    pub(super) add: bool,
    /// Where sums go.
    pub(super) out: Out,
}

/// How an element of a panel is stored.
pub(super) trait Stored {
    /// Column `k` of the panel at `w`.
    ///
    /// # Safety
    /// The panel has the column.
    unsafe fn column(w: *const u8, k: usize) -> [f32; PANEL];

    /// The same as a vector.
    ///
    /// # Safety
    /// As [`Stored::column`]; the processor has AVX-512.
    #[cfg(target_arch = "x86_64")]
    unsafe fn vector(w: *const u8, k: usize) -> std::arch::x86_64::__m512;
}

/// As it is.
pub(super) struct F32;
/// Halves.
pub(super) struct F16;
/// Pairs of BF16.
pub(super) struct Bf16;

impl Stored for F32 {
    #[inline(always)]
    unsafe fn column(w: *const u8, k: usize) -> [f32; PANEL] {
        // SAFETY: the caller's promise.
        unsafe { w.cast::<[f32; PANEL]>().add(k).read_unaligned() }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn vector(w: *const u8, k: usize) -> std::arch::x86_64::__m512 {
        // SAFETY: the caller's promise.
        unsafe { std::arch::x86_64::_mm512_loadu_ps(w.cast::<f32>().add(k * PANEL)) }
    }
}

impl Stored for F16 {
    #[inline(always)]
    unsafe fn column(w: *const u8, k: usize) -> [f32; PANEL] {
        // SAFETY: the caller's promise.
        let bits = unsafe { w.cast::<[u16; PANEL]>().add(k).read_unaligned() };
        bits.map(|bits| half_to_f32(half::f16::from_bits(bits)))
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx512f,avx2")]
    unsafe fn vector(w: *const u8, k: usize) -> std::arch::x86_64::__m512 {
        use std::arch::x86_64::{_mm256_loadu_si256, _mm512_cvtph_ps};
        // SAFETY: the caller's promise.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(w.add(k * PANEL * 2).cast())) }
    }
}

impl Stored for Bf16 {
    #[inline(always)]
    unsafe fn column(w: *const u8, k: usize) -> [f32; PANEL] {
        // SAFETY: the caller's promise.
        let pairs = unsafe { w.cast::<[u32; PANEL]>().add(k / 2).read_unaligned() };
        let shift = if k.is_multiple_of(2) { 16 } else { 0 };
        pairs.map(|pair| f32::from_bits(pair << shift & 0xffff_0000))
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn vector(w: *const u8, k: usize) -> std::arch::x86_64::__m512 {
        use std::arch::x86_64::*;
        // SAFETY: the caller's promise.
        let pairs = unsafe { _mm512_loadu_si512(w.add(k / 2 * PANEL * 4).cast()) };
        let shift = if k.is_multiple_of(2) { 16 } else { 0 };
        let high = _mm512_set1_epi32(0xffff_0000_u32.cast_signed());
        let bits = _mm512_and_si512(_mm512_sll_epi32(pairs, _mm_cvtsi32_si128(shift)), high);
        _mm512_castsi512_ps(bits)
    }
}

/// Multiplies rows `0..m`.
///
/// # Safety
/// All of `job` points to memory of the shape it says, stored as `S`, and the processor has `isa`.
pub(super) unsafe fn micro<S: Stored>(isa: Isa, job: &Micro, m: usize) {
    #[cfg(target_arch = "x86_64")]
    {
        if isa >= Isa::Avx512 {
            // SAFETY: the caller's promises.
            return unsafe { avx512::rows::<S>(job, m) };
        }
        if isa >= Isa::Avx2 {
            // SAFETY: the caller's promises.
            return unsafe { avx2_rows::<S>(job, m) };
        }
    }
    let _ = isa;
    // SAFETY: the caller's promises.
    unsafe { rows::<S, false>(job, m) }
}

/// # Safety
/// As [`micro`], with AVX2 and FMA.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn avx2_rows<S: Stored>(job: &Micro, m: usize) {
    // SAFETY: the caller's promises.
    unsafe { rows::<S, true>(job, m) }
}

/// # Safety
/// As [`micro`].
#[inline(always)]
unsafe fn rows<S: Stored, const FMA: bool>(job: &Micro, m: usize) {
    for panel in 0..job.columns.div_ceil(PANEL) {
        let mut r = 0;
        while r + 4 <= m {
            // SAFETY: the caller's promises.
            unsafe { tile::<S, 4, FMA>(job, r, panel) };
            r += 4;
        }
        while r < m {
            // SAFETY: the caller's promises.
            unsafe { tile::<S, 1, FMA>(job, r, panel) };
            r += 1;
        }
    }
}

/// # Safety
/// As [`micro`]; rows `row..row + R` and the panel exist.
#[inline(always)]
unsafe fn tile<S: Stored, const R: usize, const FMA: bool>(job: &Micro, row: usize, panel: usize) {
    let mut acc = [[0f32; PANEL]; R];
    // SAFETY: the panel exists.
    let w = unsafe { job.w.add(panel * job.panel_stride) };
    for k in 0..job.len {
        // SAFETY: `k` is inside the chunk.
        let w = unsafe { S::column(w, k) };
        for (r, acc) in acc.iter_mut().enumerate() {
            // SAFETY: the row exists and `k` is inside the chunk.
            let x = unsafe { *job.x.add((row + r) * job.x_stride + k) };
            for (a, w) in acc.iter_mut().zip(&w) {
                *a = fma::<FMA>(x, *w, *a);
            }
        }
    }
    let lanes = (job.columns - panel * PANEL).min(PANEL);
    for (r, acc) in acc.iter().enumerate() {
        for (lane, a) in acc.iter().enumerate().take(lanes) {
            // SAFETY: the column exists; it is this task's alone.
            let y = unsafe { &mut *job.out.at(row + r, job.first + panel * PANEL + lane) };
            *y = if job.add { *y + a } else { *a };
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use super::{Micro, PANEL, Stored};
    use std::arch::x86_64::*;

    /// # Safety
    /// As [`super::micro`], with AVX-512.
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn rows<S: Stored>(job: &Micro, m: usize) {
        let panels = job.columns.div_ceil(PANEL);
        // SAFETY (all four): the caller's promises; rows and panels stay below their counts.
        let mut panel = 0;
        if panels == 4 {
            // SAFETY: as above.
            unsafe { sweep::<S, 6, 4>(job, m, 0) };
            panel = 4;
        }
        while panel + 2 <= panels {
            // SAFETY: as above.
            unsafe { sweep::<S, 12, 2>(job, m, panel) };
            panel += 2;
        }
        if panel < panels {
            // SAFETY: as above.
            unsafe { sweep::<S, 12, 1>(job, m, panel) };
        }
    }

    /// # Safety
    /// As [`super::micro`], with AVX-512; panels `panel..panel + P` exist.
    #[target_feature(enable = "avx512f")]
    unsafe fn sweep<S: Stored, const R: usize, const P: usize>(
        job: &Micro,
        m: usize,
        panel: usize,
    ) {
        let mut r = 0;
        while r + R <= m {
            // SAFETY: the caller's promises.
            unsafe { tile::<S, R, P>(job, r, panel) };
            r += R;
        }
        while r + 2 <= m {
            // SAFETY: the caller's promises.
            unsafe { tile::<S, 2, P>(job, r, panel) };
            r += 2;
        }
        if r < m {
            // SAFETY: the caller's promises.
            unsafe { tile::<S, 1, P>(job, r, panel) };
        }
    }

    /// # Safety
    /// As [`super::micro`], with AVX-512; the rows and panels exist.
    #[target_feature(enable = "avx512f")]
    unsafe fn tile<S: Stored, const R: usize, const P: usize>(
        job: &Micro,
        row: usize,
        panel: usize,
    ) {
        let mut acc = [[_mm512_setzero_ps(); P]; R];
        // SAFETY: row and panel exist, `k` is inside the chunk.
        unsafe {
            let x = job.x.add(row * job.x_stride);
            let w = job.w.add(panel * job.panel_stride);
            for k in 0..job.len {
                let mut column = [_mm512_setzero_ps(); P];
                for (p, c) in column.iter_mut().enumerate() {
                    *c = S::vector(w.add(p * job.panel_stride), k);
                }
                for (r, acc) in acc.iter_mut().enumerate() {
                    let x = _mm512_set1_ps(*x.add(r * job.x_stride + k));
                    for (a, c) in acc.iter_mut().zip(&column) {
                        *a = _mm512_fmadd_ps(x, *c, *a);
                    }
                }
            }
        }
        for (r, acc) in acc.iter().enumerate() {
            for (p, a) in acc.iter().enumerate() {
                let first = (panel + p) * PANEL;
                let lanes = (job.columns - first).min(PANEL);
                let mask = (u32::MAX >> (32 - lanes)) as __mmask16;
                // SAFETY: only the existing columns are read and written.
                unsafe {
                    let y = job.out.at(row + r, job.first + first);
                    let sum = if job.add {
                        _mm512_add_ps(_mm512_maskz_loadu_ps(mask, y), *a)
                    } else {
                        *a
                    };
                    _mm512_mask_storeu_ps(y, mask, sum);
                }
            }
        }
    }
}
