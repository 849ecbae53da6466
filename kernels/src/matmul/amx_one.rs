//! [`super::amx`]'s products of a single tile of rows, past which the panels stream.
//!
//! No panel meets a second tile, so a group is expanded just before its product, into one of a few
//! places (Q8_0's groups are taken where they lie). They, the sums that the tile unit stores and the
//! rows' levels share the nearest cache. Whole blocks, expanded first, drove each other out of it: eight
//! and sixteen rows took half as long again.

use super::activations::{Activations, TILE};
use super::amx::{Scratch, Total, expand};
use super::amx_add::add;
use super::amx_unit::{LAG, RING, flush, level_at, products, start};
use super::formats::{Format, Scales};
use super::packed::{Geometry, QuantTiles};
use super::{Out, PANEL};
use std::arch::x86_64::*;
use std::ops::Range;

/// Groups between the expansion of one and its product: so long its bytes take to reach the cache.
const AHEAD: usize = 4;
/// Places for expanded groups.
const PLACES: usize = 8;
/// Bytes of a place.
const PLACE: usize = 1024;
/// Bytes between the group that is taken and the one that is fetched.
const FETCHED: usize = 2048;
/// The same for groups that are not expanded, which are taken later.
const FETCHED_SIGNED: usize = 6144;

/// Walks through the groups of some panels.
struct Groups<'a> {
    w: &'a QuantTiles,
    /// Groups to come.
    left: usize,
    panel: usize,
    block: usize,
    /// Groups to come in the block.
    in_block: usize,
    /// The next group.
    at: *const u8,
}

impl<'a> Groups<'a> {
    fn new(w: &'a QuantTiles, panels: &Range<usize>) -> Self {
        let Geometry { blocks, .. } = w.geometry;
        let left = panels.len() * (0..blocks).map(|block| w.geometry.groups(block)).sum::<usize>();
        let mut groups =
            Groups { w, left, panel: panels.start, block: 0, in_block: 0, at: std::ptr::null() };
        groups.enter();
        groups
    }

    /// Goes to the first group of the block.
    fn enter(&mut self) {
        if self.left > 0 {
            let g = &self.w.geometry;
            self.in_block = g.groups(self.block);
            self.at = self.w.panel(self.panel)[g.quants_at(self.block)..].as_ptr();
        }
    }

    /// Goes to the next block.
    #[cold]
    fn next_block(&mut self) {
        self.block += 1;
        if self.block == self.w.geometry.blocks {
            (self.block, self.panel) = (0, self.panel + 1);
        }
        self.enter();
    }

    /// The next group. Fetches one behind it.
    #[inline(always)]
    fn take<F: Format>(&mut self) -> *const u8 {
        let group = self.at;
        let fetched = if F::SIGNED { FETCHED_SIGNED } else { FETCHED };
        for line in 0..F::BYTES / 64 + 1 {
            let line = group.wrapping_add(fetched + line * 64);
            // SAFETY: fetching is harmless anywhere.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(line.cast()) };
        }
        self.at = self.at.wrapping_add(F::BYTES);
        self.left -= 1;
        self.in_block -= 1;
        if self.in_block == 0 {
            self.next_block();
        }
        group
    }

    /// Expands the next group, if one is left, to `to`; does nothing if the tile unit takes groups as
    /// they are.
    ///
    /// # Safety
    /// AVX-512; room for a group.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    unsafe fn expand_next<F: Format>(&mut self, to: *mut u8) {
        if self.left > 0 && !F::SIGNED {
            // SAFETY: a group; the caller's promise.
            unsafe { expand::<F>(self.take::<F>(), to) };
        }
    }
}

/// Multiplies `panels` of `w` with the tile of rows `rows` of `x`.
///
/// One pass over all groups, in which three things happen at once: a group is expanded, one that was is
/// multiplied, and the sums of one that was are added. Eight groups a turn, so that the tiles, the places
/// and the slots of the ring that each uses are known when this is compiled.
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
    if panels.is_empty() {
        return;
    }
    let g = w.geometry;
    let levels = products::<F>();
    let lag = LAG / levels;
    let (sums, places) = (scratch.ring.start(), scratch.bytes.as_mut_ptr());
    let slot = |i: usize| sums.wrapping_add(i % RING * 1024);
    let place = |i: usize| places.wrapping_add(i % PLACES * PLACE);
    let mut ahead = Groups::new(w, &panels);
    let (mut to_issue, mut to_add) = (ahead.left, ahead.left);
    let groups = ahead.left / panels.len();

    // The products of the next group, the `i`-th of a turn; behind the last one only sums that are on
    // their way are stored.
    let (levels_at, stride) = x.tile(rows.start / TILE);
    let mut group = 0;
    macro_rules! issue {
        ($i:expr) => {
            let more = to_issue > 0;
            let b = if F::SIGNED && more { ahead.take::<F>() } else { place($i).cast_const() };
            for level in 0..levels {
                let n = $i * levels + level;
                let a = levels_at.wrapping_add(level_at(group, level, stride));
                // SAFETY: the tiles are configured, the group is expanded, and the ring has the slot.
                unsafe {
                    match more {
                        true => start::<F>(n % 4, a, b, slot(n + RING - 2)),
                        false => flush(n % 4, slot(n + RING - 2)),
                    }
                }
            }
            if more {
                to_issue -= 1;
                group = if group + 1 == groups { 0 } else { group + 1 };
            }
        };
    }
    for i in 0..AHEAD + lag {
        if i >= AHEAD {
            issue!(i - AHEAD);
        }
        // SAFETY: the processor has AVX-512; a place has room for a group.
        unsafe { ahead.expand_next::<F>(place(i)) };
    }

    let mut at = Cursor::new(w, x, rows, panels.start);
    let mut total = Total::ZERO;
    let mut a = [_mm512_setzero_ps(); R];
    // Groups of the block, the sums of the inputs of the first one, and how many are added.
    // SAFETY: the block exists.
    let (mut in_block, mut xsums) = unsafe { at.enter::<F>() };
    let mut done = 0;
    macro_rules! group {
        ($i:literal) => {
            issue!($i + lag);
            // SAFETY: the processor has AVX-512; places have room for a group, slots of the ring are
            // aligned, and sums are kept for whole tiles of rows.
            unsafe {
                ahead.expand_next::<F>(place($i + AHEAD + lag));
                let (high, low) = (slot($i * levels), slot($i * levels + 1));
                let (scale, min) = (at.scales.s[done], at.scales.m[done % 8]);
                add::<F, R>(&mut a, scale, high, low, min, xsums.wrapping_add(done * TILE));
            }
            done += 1;
            if done == in_block {
                to_add -= done;
                // Here and not in a function: what a reference is taken of leaves the registers.
                let factors = &x.scale[rows.start * g.blocks + at.block..];
                for (r, (a, total)) in a.iter_mut().zip(&mut total.0).enumerate() {
                    // SAFETY: rows up to a whole tile have a factor a block; sixteen aligned sums.
                    unsafe {
                        let factor = _mm512_set1_ps(*factors.get_unchecked(r * g.blocks));
                        let before = _mm512_load_ps(total.as_ptr());
                        _mm512_store_ps(total.as_mut_ptr(), _mm512_fmadd_ps(*a, factor, before));
                    }
                    *a = _mm512_setzero_ps();
                }
                if at.block + 1 == g.blocks {
                    // SAFETY: the caller's promises.
                    unsafe { write(w, &mut total, at.panel, rows, out) };
                }
                if to_add == 0 {
                    return;
                }
                // SAFETY: another block follows.
                (in_block, xsums) = unsafe { at.next_block::<F>() };
                done = 0;
            }
        };
    }
    loop {
        group!(0);
        group!(1);
        group!(2);
        group!(3);
        group!(4);
        group!(5);
        group!(6);
        group!(7);
    }
}

/// Where sums are added: a block of a panel.
struct Cursor<'a> {
    w: &'a QuantTiles,
    x: &'a Activations,
    /// The first row.
    row: usize,
    panel: usize,
    block: usize,
    scales: Scales,
}

impl<'a> Cursor<'a> {
    #[target_feature(enable = "avx512f")]
    fn new(w: &'a QuantTiles, x: &'a Activations, rows: &Range<usize>, panel: usize) -> Self {
        // SAFETY: the processor has AVX-512.
        let scales = unsafe { Scales::zero() };
        Cursor { w, x, row: rows.start, panel, block: 0, scales }
    }

    /// Begins the block: how many groups it has, and where the sums of the rows' inputs in them are.
    ///
    /// # Safety
    /// It exists; AVX-512.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    unsafe fn enter<F: Format>(&mut self) -> (usize, *const f32) {
        let g = &self.w.geometry;
        // SAFETY: the caller's promise.
        unsafe { F::scales(self.w.panel(self.panel).as_ptr(), g, self.block, &mut self.scales) };
        let sums = &self.x.sums[self.x.sum_at(self.row, self.block * 8)..];
        (g.groups(self.block), sums.as_ptr())
    }

    /// Goes to the next block and begins it.
    ///
    /// # Safety
    /// There is one; AVX-512.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    unsafe fn next_block<F: Format>(&mut self) -> (usize, *const f32) {
        self.block += 1;
        if self.block == self.w.geometry.blocks {
            (self.block, self.panel) = (0, self.panel + 1);
        }
        // SAFETY: the caller's promise.
        unsafe { self.enter::<F>() }
    }
}

/// Writes a panel's sums out, and makes them zero.
///
/// # Safety
/// As [`multiply`].
#[inline(never)]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn write(w: &QuantTiles, total: &mut Total, panel: usize, rows: &Range<usize>, out: Out) {
    for (row, total) in rows.clone().zip(&total.0) {
        // SAFETY: the row and the unmasked columns are in the output, and this task's alone.
        unsafe {
            let sums = _mm512_load_ps(total.as_ptr());
            _mm512_mask_storeu_ps(out.at(row, panel * PANEL), w.columns(panel), sums);
        }
    }
    *total = Total::ZERO;
}
