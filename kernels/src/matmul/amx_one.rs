//! [`super::amx`]'s products of a single tile of rows, past which the panels stream.
//!
//! No panel meets a second tile, so a group is expanded just before its product, into one of a few
//! places. They, the sums that the tile unit stores and the rows' levels share the nearest cache. Whole
//! blocks, expanded first, drove each other out of it: eight and sixteen rows took half as long again.

use super::activations::{Activations, TILE};
use super::amx::{LAG, Pipeline, RING, Scratch, Total, add, expand, level_at, products};
use super::formats::{Format, Scales};
use super::packed::QuantTiles;
use super::{Out, PANEL};
use std::arch::x86_64::*;
use std::ops::Range;

/// Groups between the expansion of one and its product: so long its bytes take to reach the cache.
const AHEAD: usize = 6;
/// Places for expanded groups.
const PLACES: usize = 8;
/// Bytes of a place.
const PLACE: usize = 1024;
/// Bytes between what is expanded and what is fetched for it.
const FETCHED: usize = 2048;

/// Expands group after group of some panels.
struct Expansion<'a> {
    w: &'a QuantTiles,
    /// Groups to come.
    left: usize,
    panel: usize,
    block: usize,
    /// Groups to come in the block.
    in_block: usize,
    from: *const u8,
    to: *mut u8,
    /// Groups expanded.
    done: usize,
}

impl Expansion<'_> {
    /// Expands the next group, if one is left, and fetches one behind it.
    ///
    /// # Safety
    /// AVX-512; the panels have so many groups left.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    unsafe fn next<F: Format>(&mut self) {
        if self.left == 0 {
            return;
        }
        for line in 0..F::BYTES / 64 + 1 {
            let line = self.from.wrapping_add(FETCHED + line * 64);
            _mm_prefetch::<_MM_HINT_T0>(line.cast());
        }
        // SAFETY: a group; a place.
        unsafe { expand::<F>(self.from, self.to.add(self.done % PLACES * PLACE)) };
        self.done += 1;
        self.left -= 1;
        self.from = self.from.wrapping_add(F::BYTES);
        self.in_block -= 1;
        if self.in_block == 0 && self.left > 0 {
            self.block += 1;
            if self.block == self.w.geometry.blocks {
                (self.block, self.panel) = (0, self.panel + 1);
            }
            self.enter();
        }
    }

    /// Goes to the first group of the block.
    fn enter(&mut self) {
        let g = &self.w.geometry;
        self.in_block = g.groups(self.block);
        self.from = self.w.panel(self.panel)[g.quants_at(self.block)..].as_ptr();
    }
}

/// Gives the tile's products their operands, from what was expanded.
struct Feed {
    /// The next group of the rows, of so many, and its level.
    group: usize,
    groups: usize,
    level: usize,
    a: *const u8,
    a_stride: usize,
    expanded: *const u8,
    /// Groups done.
    done: usize,
}

impl Feed {
    #[inline(always)]
    fn next<F: Format>(&mut self) -> (*const u8, *const u8) {
        let a = self.a.wrapping_add(level_at::<F>(self.group, self.level, self.a_stride));
        let b = self.expanded.wrapping_add(self.done % PLACES * PLACE);
        self.level += 1;
        if self.level == products::<F>() {
            (self.level, self.group) = (0, self.group + 1);
            self.done += 1;
            if self.group == self.groups {
                self.group = 0;
            }
        }
        (a, b)
    }
}

/// Multiplies `panels` of `w` with the tile of rows `rows` of `x`.
///
/// # Safety
/// As [`super::amx::multiply`]; `rows` are a tile, or its beginning, and `R` is at least as many; the
/// tiles are configured for them.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) unsafe fn multiply<F: Format, const R: usize>(
    w: &QuantTiles,
    x: &Activations,
    scratch: &mut Scratch,
    panels: Range<usize>,
    rows: &Range<usize>,
    out: Out,
) {
    let g = w.geometry;
    let groups: usize = (0..g.blocks).map(|block| g.groups(block)).sum();
    let (a, a_stride) = x.tile(rows.start / TILE);
    let Scratch { bytes, ring, .. } = scratch;
    let left = panels.len() * groups;
    if left == 0 {
        return;
    }
    let mut ahead = Expansion {
        w,
        left,
        panel: panels.start,
        block: 0,
        in_block: 0,
        from: std::ptr::null(),
        to: bytes.as_mut_ptr(),
        done: 0,
    };
    ahead.enter();
    let mut pipeline = Pipeline::new(left * products::<F>(), ring);
    let sums = pipeline.ring;
    let expanded = bytes.as_ptr();
    let mut feed = Feed { group: 0, groups, level: 0, a, a_stride, expanded, done: 0 };
    // SAFETY: the panels have so many groups; a product's group is expanded before it.
    unsafe {
        for _ in 0..AHEAD {
            ahead.next::<F>();
        }
        for i in 0..LAG {
            if i % products::<F>() == 0 {
                ahead.next::<F>();
            }
            pipeline.next::<F>(|| feed.next::<F>());
        }
    }
    let factors = x.scale[rows.start * g.blocks..].as_ptr();
    // SAFETY: the processor has AVX-512.
    let mut scales = unsafe { Scales::zero() };
    let mut used = 0;
    for panel in panels {
        let mut total = Total([[0.0; PANEL]; TILE]);
        for block in 0..g.blocks {
            // SAFETY: the block exists.
            unsafe { F::scales(w.panel(panel).as_ptr(), &g, block, &mut scales) };
            let xsums = x.sums[x.sum_at(rows.start, block * 8)..].as_ptr();
            let mut a = [_mm512_setzero_ps(); R];
            for j in 0..g.groups(block) {
                // SAFETY: as before.
                unsafe {
                    ahead.next::<F>();
                    for _ in 0..products::<F>() {
                        pipeline.next::<F>(|| feed.next::<F>());
                    }
                }
                let high = sums.wrapping_add(used % RING * 1024);
                let low = sums.wrapping_add((used + 1) % RING * 1024);
                used += products::<F>();
                let min = if F::MINS { scales.m[j] } else { _mm512_setzero_ps() };
                let xsums = xsums.wrapping_add(j * TILE);
                // SAFETY: slots of the ring, aligned; sums are kept for whole tiles of rows.
                unsafe { add::<F, R>(&mut a, scales.s[j], high, low, min, xsums) };
            }
            for (r, a) in a.iter().enumerate() {
                let to = total.0[r].as_mut_ptr();
                // SAFETY: rows up to a whole tile have a factor a block; sixteen aligned sums.
                unsafe {
                    let factor = _mm512_set1_ps(*factors.add(r * g.blocks + block));
                    _mm512_store_ps(to, _mm512_fmadd_ps(*a, factor, _mm512_load_ps(to)));
                }
            }
        }
        let lanes = PANEL.min(w.rows() - panel * PANEL);
        let mask = (u32::MAX >> (32 - lanes)) as __mmask16;
        for (row, total) in rows.clone().zip(&total.0) {
            // SAFETY: the row and the unmasked columns are in the output, and this task's alone.
            unsafe {
                let sums = _mm512_load_ps(total.as_ptr());
                _mm512_mask_storeu_ps(out.at(row, panel * PANEL), mask, sums);
            }
        }
    }
}
