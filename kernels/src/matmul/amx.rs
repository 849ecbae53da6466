//! Integer products with AMX tiles, for many rows at once.
//!
//! A block of a panel is expanded to bytes once (Q8_0 is such bytes already); then 16 rows at a time
//! meet it group by group. The tile unit gives exact sums, AVX-512 scales and adds them in the order of
//! [`super::int`]. Sixteen rows or fewer have a way of their own, [`super::amx_one`], and so has Q6_K,
//! [`super::amx_whole`].
//!
//! A group is 32 inputs of two levels, a tile row 64 bytes. Of a four-bit weight `q` both `q` and
//! `16 q` are bytes, so `16 Σ q·hi + Σ q·lo` is one product of `[hi | lo]` with `[16 q | q]`. Q8_0
//! takes one product a level.

use super::activations::{Activations, TILE};
use super::amx_add::add;
use super::amx_one as one;
use super::amx_unit::{LAG, RING, Ring, TileConfig, depth, flush, level_at, products, start};
use super::amx_whole as whole;
use super::formats::{Format, Q4_0, Q4_1, Q4K, Q8_0, Scales};
use super::packed::{Geometry, Kind, QuantTiles};
use super::{Out, PANEL};
use crate::buffer::Buffer;
use std::arch::x86_64::*;
use std::cell::RefCell;
use std::ops::Range;

/// Panels that are expanded together and meet the rows one after the other.
pub(super) const PANELS: usize = 8;
/// Scales that are kept: [`super::amx_whole`] still needs those of the block before.
pub(super) const SCALES: usize = 2 * PANELS;
/// Bytes of a block of a panel, expanded, at most.
pub(super) const BLOCK: usize = 8 * 1024;

/// What one thread needs.
pub(super) struct Scratch {
    /// Expanded blocks, [`BLOCK`] bytes a panel.
    pub(super) bytes: Buffer,
    /// Scales of these blocks.
    pub(super) scales: Vec<Scales>,
    /// Sums over the blocks so far, `[tile][panel]`.
    pub(super) totals: Vec<Total>,
    pub(super) ring: Box<Ring>,
}

/// The sums of 16 rows and 16 columns.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Total(pub(super) [[f32; PANEL]; TILE]);

impl Total {
    pub(super) const ZERO: Total = Total([[0.0; PANEL]; TILE]);
}

impl Default for Scratch {
    fn default() -> Self {
        Scratch {
            bytes: Buffer::new(PANELS * BLOCK),
            scales: Vec::new(),
            totals: Vec::new(),
            ring: Box::default(),
        }
    }
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Multiplies panels `panels` of `w` with rows `rows` of `x`.
///
/// # Safety
/// `out` has the rows of `x` and the columns of `w`; `rows` begins at a tile; nobody else writes
/// these panels' columns of these rows; the processor has AMX and AVX-512.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) unsafe fn multiply(
    w: &QuantTiles,
    x: &Activations,
    panels: Range<usize>,
    rows: Range<usize>,
    out: Out,
) {
    SCRATCH.with_borrow_mut(|scratch| {
        // What is left in them is overwritten by the first block.
        let totals = scratch.totals.len().max(rows.len().div_ceil(TILE) * PANELS);
        scratch.totals.resize(totals, Total::ZERO);
        // SAFETY: the caller's promises.
        unsafe {
            scratch.scales.resize(SCALES, Scales::zero());
            match w.geometry.kind {
                Kind::Q8_0 => all::<Q8_0>(w, x, scratch, panels, rows, out),
                Kind::Q4_0 => all::<Q4_0>(w, x, scratch, panels, rows, out),
                Kind::Q4_1 => all::<Q4_1>(w, x, scratch, panels, rows, out),
                Kind::Q4K => all::<Q4K>(w, x, scratch, panels, rows, out),
                Kind::Q6K => whole::multiply(w, x, scratch, panels, rows, out),
            }
            TileConfig::release();
        }
    });
}

/// # Safety
/// As [`multiply`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn all<F: Format>(
    w: &QuantTiles,
    x: &Activations,
    scratch: &mut Scratch,
    panels: Range<usize>,
    rows: Range<usize>,
    out: Out,
) {
    let (tile_rows, tiles) = (rows.len().min(TILE), rows.len().div_ceil(TILE));
    // A last tile with fewer rows is read as if it had all; what it yields for the others is
    // dropped.
    let a = (tile_rows, depth::<F>() * 4);
    let (b, c) = ((depth::<F>(), 64), (tile_rows, 64));
    let config = TileConfig::new([c, c, c, c, a, a, b, b]);
    // SAFETY: the caller's promise.
    unsafe { config.load() };
    if tiles == 1 {
        // SAFETY: the tiles are configured; the caller's promises.
        return unsafe {
            match tile_rows {
                1..=4 => one::multiply::<F, 4>(w, x, scratch, panels, &rows, out),
                5..=8 => one::multiply::<F, 8>(w, x, scratch, panels, &rows, out),
                _ => one::multiply::<F, 16>(w, x, scratch, panels, &rows, out),
            }
        };
    }
    for first in panels.clone().step_by(PANELS) {
        let batch = first..(first + PANELS).min(panels.end);
        // SAFETY: the tiles are configured; the caller's promises.
        unsafe {
            blocks::<F>(w, x, scratch, &batch, &rows);
            write(w, &scratch.totals, batch, &rows, out);
        }
    }
}

/// Expands the group of nibbles at `from` to bytes.
///
/// # Safety
/// A group lies there, `to` has room for its vectors and is aligned to them; AVX-512.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) unsafe fn expand<F: Format>(from: *const u8, to: *mut u8) {
    let offset = |shift: u32| _mm512_set1_epi8(F::SHIFT.map_or(0, |s| (1u32 << (s + shift)) as i8));
    // SAFETY: the caller's promises.
    unsafe {
        let q = F::quants(from);
        for (i, q) in q.iter().enumerate().take(F::VECTORS) {
            // A stored value is below 16, so nothing crosses a byte.
            let high = _mm512_sub_epi8(_mm512_slli_epi16::<4>(*q), offset(4));
            _mm512_store_si512(to.add(i * 64).cast(), high);
            let weight = _mm512_sub_epi8(*q, offset(0));
            _mm512_store_si512(to.add((F::VECTORS + i) * 64).cast(), weight);
        }
    }
}

/// Expands a block of a panel (`[group][vector]`), unless the tile unit takes it as it is, and
/// fetches what is used next.
///
/// # Safety
/// `weights` is a panel of the geometry with that block, `to` has room for [`BLOCK`] bytes; AVX-512.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn expand_block<F: Format>(
    weights: *const u8,
    g: &Geometry,
    block: usize,
    next: *const u8,
    to: *mut u8,
) {
    let lines = F::BYTES / 64 + 1;
    for j in 0..g.groups(block) {
        for i in 0..lines {
            let line = next.wrapping_add((j * lines + i) * 64);
            _mm_prefetch::<_MM_HINT_T0>(line.cast());
        }
        if F::SIGNED {
            continue;
        }
        // SAFETY: the group exists.
        unsafe {
            let from = weights.add(g.quants_at(block) + j * F::BYTES);
            expand::<F>(from, to.add(j * depth::<F>() * 64));
        }
    }
}

/// Multiplies all blocks of some panels. Block by block, so that the panels' share stays in the
/// nearest caches while the rows pass.
///
/// # Safety
/// As [`multiply`]; the tiles are configured.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn blocks<F: Format>(
    w: &QuantTiles,
    x: &Activations,
    scratch: &mut Scratch,
    panels: &Range<usize>,
    rows: &Range<usize>,
) {
    let g = w.geometry;
    for block in 0..g.blocks {
        for (i, panel) in panels.clone().enumerate() {
            let weights = w.panel(panel).as_ptr();
            let next = match block + 1 < g.blocks {
                true => weights.wrapping_add(g.scales_at(block + 1)),
                false => weights.wrapping_add(panels.len() * g.panel_bytes),
            };
            // SAFETY: panel and block exist; the buffer has room for each panel's block.
            unsafe {
                F::scales(weights, &g, block, &mut scratch.scales[i]);
                let to = scratch.bytes.as_mut_ptr().add(i * BLOCK);
                expand_block::<F>(weights, &g, block, next, to);
            }
        }
        let units = rows.len().div_ceil(TILE) * panels.len();
        let job = Block {
            x,
            block,
            groups: g.groups(block),
            blocks: g.blocks,
            rows: rows.clone(),
            panels: panels.len(),
            bytes: match F::SIGNED {
                true => w.panels(panels.clone())[g.quants_at(block)..].as_ptr(),
                false => scratch.bytes.as_ptr(),
            },
            stride: if F::SIGNED { g.panel_bytes } else { BLOCK },
        };
        let (scales, totals, ring) = (&scratch.scales, &mut scratch.totals, &mut scratch.ring);
        // SAFETY: the caller's promises.
        unsafe { tiles::<F>(&job, units, scales, totals, ring) };
    }
}

/// One block of some panels and all rows.
struct Block<'a> {
    x: &'a Activations,
    block: usize,
    groups: usize,
    /// Blocks of a row.
    blocks: usize,
    rows: Range<usize>,
    panels: usize,
    /// The panels' bytes for the tile unit, and how far they are apart.
    bytes: *const u8,
    stride: usize,
}

impl Block<'_> {
    #[inline]
    fn operands(&self, at: Walk) -> Operands {
        let (levels, stride) = self.x.tile(self.rows.start / TILE + at.tile);
        let levels = levels.wrapping_add(self.block * 8 * stride);
        Operands { levels, stride, weights: self.bytes.wrapping_add(at.panel * self.stride) }
    }

    /// Sums of the inputs of a tile of rows in the block's groups.
    #[inline]
    fn sums(&self, tile: usize) -> *const f32 {
        self.x.sums[self.x.sum_at(self.rows.start + tile * TILE, self.block * 8)..].as_ptr()
    }

    /// Adds the block's sums `a` of a tile of rows to `total`.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn add_up(&self, tile: usize, a: &[__m512; TILE], total: &mut Total) {
        let row = self.rows.start + tile * TILE;
        let factors = &self.x.scale[row * self.blocks..][..TILE * self.blocks];
        for (r, (a, total)) in a.iter().zip(&mut total.0).enumerate() {
            let factor = _mm512_set1_ps(factors[r * self.blocks + self.block]);
            // SAFETY: sixteen aligned sums.
            unsafe {
                let before = match self.block {
                    0 => _mm512_setzero_ps(),
                    _ => _mm512_load_ps(total.as_ptr()),
                };
                _mm512_store_ps(total.as_mut_ptr(), _mm512_fmadd_ps(*a, factor, before));
            }
        }
    }
}

/// Tiles of rows and panels in the order in which they meet: two panels at a time meet all rows, so
/// that both stay in the nearest cache and a tile is fetched once for the two.
#[derive(Clone, Copy)]
struct Walk {
    tiles: usize,
    panels: usize,
    tile: usize,
    panel: usize,
}

impl Walk {
    fn step(&mut self) {
        let first = self.panel & !1;
        let end = (first + 2).min(self.panels);
        if self.panel + 1 < end {
            self.panel += 1;
        } else if self.tile + 1 < self.tiles {
            (self.tile, self.panel) = (self.tile + 1, first);
        } else {
            (self.tile, self.panel) = (0, end);
        }
    }
}

/// A tile of rows and a panel that meet: where their levels and weights in the block are.
#[derive(Clone, Copy)]
struct Operands {
    levels: *const u8,
    /// Bytes between groups of levels.
    stride: usize,
    weights: *const u8,
}

/// Adds a block to the sums of all rows and panels. Eight groups a turn, so that the tiles and the slots
/// of the ring that each uses are known when this is compiled.
///
/// # Safety
/// As [`multiply`]; the tiles are configured, and the panels' bytes are there.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn tiles<F: Format>(
    block: &Block<'_>,
    units: usize,
    scales: &[Scales],
    totals: &mut [Total],
    ring: &mut Ring,
) {
    let (groups, levels) = (block.groups, products::<F>());
    let lag = LAG / levels;
    let sums = ring.start();
    let slot = |i: usize| sums.wrapping_add(i % RING * 1024);
    let tiles = block.rows.len().div_ceil(TILE);
    let mut walk = Walk { tiles, panels: block.panels, tile: 0, panel: 0 };
    let (mut to_issue, mut to_add) = (units * groups, units);

    // The products of the next group, the `i`-th of a turn; behind the last one only sums that are on
    // their way are stored.
    let mut ahead = walk;
    let mut at = block.operands(ahead);
    let mut group = 0;
    macro_rules! issue {
        ($i:expr) => {
            let more = to_issue > 0;
            for level in 0..levels {
                let n = $i * levels + level;
                let a = at.levels.wrapping_add(level_at(group, level, at.stride));
                let b = at.weights.wrapping_add(group * depth::<F>() * 64);
                // SAFETY: the tiles are configured, the operands exist, and the ring has the slot.
                unsafe {
                    match more {
                        true => start::<F>(n % 4, a, b, slot(n + RING - 2)),
                        false => flush(n % 4, slot(n + RING - 2)),
                    }
                }
            }
            if more {
                to_issue -= 1;
                group += 1;
                if group == groups {
                    ahead.step();
                    (group, at) = (0, block.operands(ahead));
                }
            }
        };
    }
    for i in 0..lag {
        issue!(i);
    }

    let mut a = [_mm512_setzero_ps(); TILE];
    let mut xsums = block.sums(walk.tile);
    let mut scale = &scales[walk.panel];
    let mut done = 0;
    macro_rules! group {
        ($i:literal) => {
            issue!($i + lag);
            let (high, low) = (slot($i * levels), slot($i * levels + 1));
            let (s, min) = (scale.s[done], scale.m[done % 8]);
            // SAFETY: slots of the ring, aligned; sums are kept for whole tiles of rows.
            unsafe { add::<F, TILE>(&mut a, s, high, low, min, xsums.wrapping_add(done * TILE)) };
            done += 1;
            if done == groups {
                block.add_up(walk.tile, &a, &mut totals[walk.tile * block.panels + walk.panel]);
                to_add -= 1;
                if to_add == 0 {
                    return;
                }
                walk.step();
                (xsums, scale) = (block.sums(walk.tile), &scales[walk.panel]);
                (a, done) = ([_mm512_setzero_ps(); TILE], 0);
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

/// Writes the sums of some panels out, `[tile][panel]`.
///
/// # Safety
/// As [`multiply`].
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn write(
    w: &QuantTiles,
    totals: &[Total],
    panels: Range<usize>,
    rows: &Range<usize>,
    out: Out,
) {
    // Row by row: neighbouring rows of the output are pages apart.
    for row in rows.clone() {
        let (tile, r) = ((row - rows.start) / TILE, (row - rows.start) % TILE);
        let totals = &totals[tile * panels.len()..][..panels.len()];
        for (panel, total) in panels.clone().zip(totals) {
            // SAFETY: the row and the unmasked columns are in the output, and this task's alone.
            unsafe {
                let sums = _mm512_load_ps(total.0[r].as_ptr());
                _mm512_mask_storeu_ps(out.at(row, panel * PANEL), w.columns(panel), sums);
            }
        }
    }
}
