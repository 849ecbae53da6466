//! Integer products of many rows with AVX-512 VNNI; see [`super::int`] for the definition.
//!
//! A block of 256 inputs of two panels is expanded once, to bytes without a sign in the first cache;
//! then the rows meet it, a few at a time, so that whatever is loaded serves several products.
//!
//! Of the eight steps of a group a row has a high level in two ([`super::activations`]): their weights
//! are looked up, and the other six products of the high level, which are zero, are left out.

use super::activations::{Activations, HIGH_SHIFT, Note, TILE, UNIT_SHIFT};
use super::formats::{Format, Q4_0, Q4_1, Q4K, Q6K, Q8_0, Scales, by_kind};
use super::packed::{Kind, QuantTiles};
use super::vnni::{accumulate, block_sum};
use super::{Out, PANEL};
use std::arch::x86_64::*;
use std::cell::RefCell;
use std::ops::Range;
use std::sync::atomic::{Ordering, compiler_fence};

/// Panels that meet the rows together.
const SIDE: usize = 2;
/// Vectors of a block of 256 inputs.
const VECTORS: usize = 64;

/// Blocks of [`SIDE`] panels, expanded.
#[repr(C, align(64))]
struct Scratch {
    weights: [[__m512i; VECTORS]; SIDE],
    scales: [Scales; SIDE],
}

thread_local! {
    static SCRATCH: RefCell<Option<Box<Scratch>>> = const { RefCell::new(None) };
}

/// Multiplies panels `panels` of `w` with rows `rows` of `x`.
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
    SCRATCH.with_borrow_mut(|scratch| {
        let scratch = scratch.get_or_insert_with(|| {
            // SAFETY: the processor has AVX-512.
            let scales = unsafe { [Scales::zero(); SIDE] };
            Box::new(Scratch { weights: [[_mm512_setzero_si512(); VECTORS]; SIDE], scales })
        });
        // SAFETY: the caller's promises.
        unsafe { by_kind!(w.geometry.kind, all(w, x, panels, rows, out, scratch)) }
    });
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
    scratch: &mut Scratch,
) {
    let mut panel = panels.start;
    while panel < panels.end {
        let side = SIDE.min(panels.end - panel);
        for block in 0..w.geometry.blocks {
            for p in 0..side {
                // SAFETY: panel and block exist.
                unsafe { expand::<F>(w, panel + p, block, p, scratch) };
            }
            let mut ahead = Ahead::new(w, panel, side, block, panels.end, rows.len());
            let mut row = rows.start;
            while row < rows.end {
                ahead.fetch();
                let at = Place { panel, block, row };
                // Rows of one call share a tile of the activations.
                let most = (rows.end - row).min(TILE - row % TILE);
                // SAFETY: the caller's promises; panels, block and rows exist, the block is expanded
                // and the rows share a tile.
                row += unsafe {
                    match (most, side) {
                        (6.., SIDE) if !F::WHOLE => tile::<F, 6, SIDE>(w, x, at, scratch, out),
                        (4.., SIDE) => tile::<F, 4, SIDE>(w, x, at, scratch, out),
                        (2.., SIDE) => tile::<F, 2, SIDE>(w, x, at, scratch, out),
                        (_, SIDE) => tile::<F, 1, SIDE>(w, x, at, scratch, out),
                        (8.., _) => tile::<F, 8, 1>(w, x, at, scratch, out),
                        (4.., _) => tile::<F, 4, 1>(w, x, at, scratch, out),
                        _ => tile::<F, 1, 1>(w, x, at, scratch, out),
                    }
                };
            }
        }
        panel += side;
    }
}

/// Expands a block of a panel as the scratch's panel `p`.
///
/// # Safety
/// Panel and block exist; AVX-512.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn expand<F: Format>(
    w: &QuantTiles,
    panel: usize,
    block: usize,
    p: usize,
    scratch: &mut Scratch,
) {
    let (g, panel) = (&w.geometry, w.panel(panel).as_ptr());
    // SAFETY: the caller's promises.
    unsafe { F::scales(panel, g, block, &mut scratch.scales[p]) };
    let vectors = scratch.weights[p].chunks_exact_mut(F::VECTORS);
    for (j, vectors) in vectors.enumerate().take(g.groups(block)) {
        // SAFETY: the group exists.
        let q = unsafe { F::quants(panel.add(g.quants_at(block) + j * F::BYTES)) };
        vectors.copy_from_slice(&q[..F::VECTORS]);
    }
}

/// The weights that are expanded next, fetched to the second cache while those before them are used.
struct Ahead {
    /// Where they begin in each panel.
    next: [*const u8; SIDE],
    /// Panels, and cache lines of each that are left, and how many go at a time.
    side: usize,
    left: usize,
    share: usize,
}

impl Ahead {
    /// What follows block `block` of the `side` panels from `panel` on, for a job that ends at panel
    /// `end`, in shares for `rows` rows.
    fn new(
        w: &QuantTiles,
        panel: usize,
        side: usize,
        block: usize,
        end: usize,
        rows: usize,
    ) -> Self {
        let g = &w.geometry;
        let whole = |block: usize| g.quants_at(block) + g.groups(block) * g.kind.group_bytes();
        let (panel, side, bytes) = match block + 1 {
            next if next < g.blocks => (panel, side, g.scales_at(next)..whole(next)),
            // The last panels of a job are followed by nothing of it.
            _ => (panel + side, SIDE.min(end - panel - side), 0..whole(0)),
        };
        let at = |p: usize| w.panel(panel + p)[bytes.start..].as_ptr();
        let next = std::array::from_fn(|p| if p < side { at(p) } else { std::ptr::null() });
        let left = bytes.len().div_ceil(64);
        // Eight rows a tile at most.
        Ahead { next, side, left, share: left.div_ceil(rows.div_ceil(8)) }
    }

    /// Fetches a share of them.
    #[inline]
    fn fetch(&mut self) {
        let lines = self.share.min(self.left);
        self.left -= lines;
        for next in &mut self.next[..self.side] {
            for _ in 0..lines {
                // SAFETY: fetching is harmless anywhere.
                unsafe { _mm_prefetch::<_MM_HINT_T1>(next.cast()) };
                *next = next.wrapping_add(64);
            }
        }
    }
}

/// Where a tile of the output is.
#[derive(Clone, Copy)]
struct Place {
    panel: usize,
    block: usize,
    row: usize,
}

/// Adds a block of `P` expanded panels to `M` rows of the output and returns `M`.
///
/// # Safety
/// As [`multiply`]; the block is expanded, the rows exist and share a tile.
#[inline(never)]
#[expect(clippy::needless_range_loop, reason = "iterators put more on the stack, 4 % slower")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn tile<F: Format, const M: usize, const P: usize>(
    w: &QuantTiles,
    x: &Activations,
    at: Place,
    scratch: &Scratch,
    out: Out,
) -> usize {
    let g = &w.geometry;
    let (levels, stride) = x.tile(at.row / TILE);
    let levels = levels.wrapping_add(at.block * 8 * stride + at.row % TILE * 64);
    let first = x.sum_at(at.row, at.block * 8);
    let (sums, notes) = (x.sums[first..].as_ptr(), x.notes[first..].as_ptr());
    // Groups of the format in each 32 inputs.
    let parts = 8 / F::VECTORS;
    let mut a = [[_mm512_setzero_si512(); M]; P];
    for group in 0..g.groups(at.block) / parts {
        let levels = levels.wrapping_add(group * stride);
        // SAFETY: block, group and rows exist, so do the picked steps.
        unsafe {
            let mut isum = [[_mm512_setzero_si512(); M]; P];
            for r in 0..M {
                // Else the operands of all rows are loaded at once, and do not fit the registers.
                compiler_fence(Ordering::Release);
                let note = &*notes.add(group * TILE + r);
                let high = high::<F, P>(scratch, levels.add(r * 64), group, note);
                for p in 0..P {
                    let to = if F::WHOLE { &mut a[p][r] } else { &mut isum[p][r] };
                    *to = _mm512_add_epi32(*to, high[p]);
                }
            }
            for part in 0..parts {
                if F::WHOLE {
                    for r in 0..M {
                        let start = x.start::<F>(at.row + r, at.block, group * parts + part);
                        isum.iter_mut().for_each(|isum| isum[r] = _mm512_set1_epi32(start));
                    }
                }
                for step in part * F::VECTORS..(part + 1) * F::VECTORS {
                    for r in 0..M {
                        let low = broadcast(levels.add(r * 64 + 32 + step * 4));
                        for p in 0..P {
                            let q = *scratch.weights[p].get_unchecked(group * 8 + step);
                            isum[p][r] = _mm512_dpbusd_epi32(isum[p][r], q, low);
                        }
                    }
                }
                let j = group * parts + part;
                for p in 0..P {
                    for r in 0..M {
                        // Of halves there are none, and none are read.
                        let xsum = sums.wrapping_add(j * TILE + r);
                        let scales = &scratch.scales[p];
                        a[p][r] = accumulate::<F>(a[p][r], isum[p][r], scales, j, xsum);
                    }
                }
            }
        }
    }
    for (p, a) in a.iter().enumerate() {
        // SAFETY: the caller's promises.
        unsafe {
            write::<F, M>(w, x, Place { panel: at.panel + p, ..at }, &scratch.scales[p], a, out)
        };
    }
    M
}

/// What the high level of a row's group of 32 adds to its sums, whose levels are at `row`, and what they begin
/// with. Where scales are whole the sums are scaled, and the start is left out.
///
/// # Safety
/// The group is expanded and has these steps; AVX-512 with VNNI.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn high<F: Format, const P: usize>(
    scratch: &Scratch,
    row: *const u8,
    group: usize,
    note: &Note,
) -> [__m512i; P] {
    const EARLY: u32 = UNIT_SHIFT + HIGH_SHIFT;
    const { assert!(F::WHOLE || matches!(F::SHIFT, None | Some(EARLY | UNIT_SHIFT))) };
    let zero = _mm512_setzero_si512();
    let start = _mm512_set1_epi32(note.start);
    // Before the shift, which makes it as large as it must be, or after it.
    let (early, late) = match F::SHIFT {
        Some(EARLY) if !F::WHOLE => (start, zero),
        Some(UNIT_SHIFT) if !F::WHOLE => (zero, start),
        _ => (zero, zero),
    };
    let mut sums = [early; P];
    for step in note.picks {
        let step = usize::from(step);
        // SAFETY: the caller's promises.
        unsafe {
            let high = broadcast(row.add(step * 4));
            for (p, sum) in sums.iter_mut().enumerate() {
                let q = *scratch.weights[p].get_unchecked(group * 8 + step);
                if F::WHOLE {
                    let j = (group * 8 + step) / F::VECTORS;
                    let scale = *scratch.scales[p].whole.get_unchecked(j);
                    let scaled = _mm512_mullo_epi32(_mm512_dpbusd_epi32(zero, q, high), scale);
                    *sum = _mm512_add_epi32(*sum, scaled);
                } else {
                    *sum = _mm512_dpbusd_epi32(*sum, q, high);
                }
            }
        }
    }
    for sum in &mut sums {
        *sum = _mm512_add_epi32(_mm512_slli_epi32::<HIGH_SHIFT>(*sum), late);
    }
    sums
}

/// Four bytes, sixteen times.
///
/// # Safety
/// They are there; AVX-512.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn broadcast(at: *const u8) -> __m512i {
    // SAFETY: the caller's promise.
    _mm512_set1_epi32(unsafe { at.cast::<i32>().read_unaligned() })
}

/// Adds the scaled sums `a` of a block of a panel to `M` rows of the output; the first block begins it.
///
/// # Safety
/// As [`multiply`]; panel, block and rows exist.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn write<F: Format, const M: usize>(
    w: &QuantTiles,
    x: &Activations,
    at: Place,
    scales: &Scales,
    a: &[__m512i; M],
    out: Out,
) {
    let mask = w.columns(at.panel);
    for (r, a) in a.iter().enumerate() {
        let a = block_sum::<F>(*a, scales);
        // SAFETY: the row and the unmasked columns are in the output, and this task's alone.
        unsafe {
            let scale = *x.scale.get_unchecked((at.row + r) * w.geometry.blocks + at.block);
            let to = out.at(at.row + r, at.panel * PANEL);
            let before = match at.block {
                0 => _mm512_setzero_ps(),
                _ => _mm512_maskz_loadu_ps(mask, to),
            };
            let sum = _mm512_fmadd_ps(a, _mm512_set1_ps(scale), before);
            _mm512_mask_storeu_ps(to, mask, sum);
        }
    }
}
