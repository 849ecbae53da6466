//! The innermost loops of f32 products.

use super::{Out, PANEL};
use crate::cpu::Isa;
use crate::math::fma;

/// One chunk of inputs times up to four panels.
pub(super) struct Micro {
    /// The chunk's first input of row 0.
    pub(super) x: *const f32,
    /// Elements between rows of `x`.
    pub(super) x_stride: usize,
    /// The first panel, `[len][PANEL]`.
    pub(super) w: *const f32,
    /// Elements between panels.
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

/// Multiplies rows `0..m`.
///
/// # Safety
/// All of `job` points to memory of the shape it says and the processor has `isa`.
pub(super) unsafe fn micro(isa: Isa, job: &Micro, m: usize) {
    #[cfg(target_arch = "x86_64")]
    {
        if isa >= Isa::Avx512 {
            // SAFETY: the caller's promises.
            return unsafe { avx512::rows(job, m) };
        }
        if isa >= Isa::Avx2 {
            // SAFETY: the caller's promises.
            return unsafe { avx2_rows(job, m) };
        }
    }
    let _ = isa;
    // SAFETY: the caller's promises.
    unsafe { rows::<false>(job, m) }
}

/// # Safety
/// As [`micro`], with AVX2 and FMA.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn avx2_rows(job: &Micro, m: usize) {
    // SAFETY: the caller's promises.
    unsafe { rows::<true>(job, m) }
}

/// # Safety
/// As [`micro`].
#[inline(always)]
unsafe fn rows<const FMA: bool>(job: &Micro, m: usize) {
    for panel in 0..job.columns.div_ceil(PANEL) {
        let mut r = 0;
        while r + 4 <= m {
            // SAFETY: the caller's promises.
            unsafe { tile::<4, FMA>(job, r, panel) };
            r += 4;
        }
        while r < m {
            // SAFETY: the caller's promises.
            unsafe { tile::<1, FMA>(job, r, panel) };
            r += 1;
        }
    }
}

/// # Safety
/// As [`micro`]; rows `row..row + R` and the panel exist.
#[inline(always)]
unsafe fn tile<const R: usize, const FMA: bool>(job: &Micro, row: usize, panel: usize) {
    let mut acc = [[0f32; PANEL]; R];
    // SAFETY: the panel exists.
    let w = unsafe { job.w.add(panel * job.panel_stride) };
    for k in 0..job.len {
        // SAFETY: `k` is inside the chunk.
        let w = unsafe { &*w.add(k * PANEL).cast::<[f32; PANEL]>() };
        for (r, acc) in acc.iter_mut().enumerate() {
            // SAFETY: the row exists and `k` is inside the chunk.
            let x = unsafe { *job.x.add((row + r) * job.x_stride + k) };
            for (a, w) in acc.iter_mut().zip(w) {
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
    use super::{Micro, PANEL};
    use std::arch::x86_64::*;

    /// # Safety
    /// As [`super::micro`], with AVX-512.
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn rows(job: &Micro, m: usize) {
        let panels = job.columns.div_ceil(PANEL);
        // SAFETY (all four): the caller's promises; rows and panels stay below their counts.
        let mut panel = 0;
        if panels == 4 {
            // SAFETY: as above.
            unsafe { sweep::<6, 4>(job, m, 0) };
            panel = 4;
        }
        while panel + 2 <= panels {
            // SAFETY: as above.
            unsafe { sweep::<12, 2>(job, m, panel) };
            panel += 2;
        }
        if panel < panels {
            // SAFETY: as above.
            unsafe { sweep::<12, 1>(job, m, panel) };
        }
    }

    /// # Safety
    /// As [`super::micro`], with AVX-512; panels `panel..panel + P` exist.
    #[target_feature(enable = "avx512f")]
    unsafe fn sweep<const R: usize, const P: usize>(job: &Micro, m: usize, panel: usize) {
        let mut r = 0;
        while r + R <= m {
            // SAFETY: the caller's promises.
            unsafe { tile::<R, P>(job, r, panel) };
            r += R;
        }
        while r + 2 <= m {
            // SAFETY: the caller's promises.
            unsafe { tile::<2, P>(job, r, panel) };
            r += 2;
        }
        if r < m {
            // SAFETY: the caller's promises.
            unsafe { tile::<1, P>(job, r, panel) };
        }
    }

    /// # Safety
    /// As [`super::micro`], with AVX-512; the rows and panels exist.
    #[target_feature(enable = "avx512f")]
    unsafe fn tile<const R: usize, const P: usize>(job: &Micro, row: usize, panel: usize) {
        let mut acc = [[_mm512_setzero_ps(); P]; R];
        // SAFETY: row and panel exist, `k` is inside the chunk.
        unsafe {
            let x = job.x.add(row * job.x_stride);
            let w = job.w.add(panel * job.panel_stride);
            for k in 0..job.len {
                let mut column = [_mm512_setzero_ps(); P];
                for (p, c) in column.iter_mut().enumerate() {
                    *c = _mm512_loadu_ps(w.add(p * job.panel_stride + k * PANEL));
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
