//! Integer products with AMX tiles, for many rows at once.
//!
//! A panel is expanded to signed bytes once; then 16 rows at a time meet it group by group. The tile
//! unit gives the exact sums of both activation levels, AVX-512 scales and adds them in the order of
//! [`super::int`].

use super::activations::{Activations, TILE};
use super::buffer::Buffer;
use super::formats::{Format, Q4_0, Q4_1, Q4K, Q6K, Q8_0, Scales};
use super::packed::{Geometry, Kind, QuantTiles};
use super::{Out, PANEL};
use std::arch::asm;
use std::arch::x86_64::*;
use std::cell::RefCell;
use std::mem::MaybeUninit;
use std::ops::Range;

/// Groups in flight: the sums of one are used while the tile unit is at the next.
const AHEAD: usize = 2;
/// Panels that are expanded together and meet the rows one after the other.
const PANELS: usize = 4;

/// `ldtilecfg`'s operand.
#[repr(C, align(64))]
pub(super) struct TileConfig {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    bytes: [u16; 16],
    rows: [u8; 16],
}

impl TileConfig {
    /// Tiles of `(rows, bytes a row)`.
    pub(super) fn new(tiles: [(usize, usize); 8]) -> Self {
        let (mut bytes, mut rows) = ([0; 16], [0; 16]);
        for (i, (r, b)) in tiles.into_iter().enumerate() {
            (rows[i], bytes[i]) = (r as u8, b as u16);
        }
        TileConfig { palette: 1, start_row: 0, reserved: [0; 14], bytes, rows }
    }

    /// Loads the configuration; the tiles are zero then.
    ///
    /// # Safety
    /// The processor has AMX and the process may use it.
    pub(super) unsafe fn load(&self) {
        // SAFETY: the operand is 64 bytes of a valid configuration.
        unsafe { asm!("ldtilecfg [{}]", in(reg) self, options(nostack, readonly)) };
    }

    /// Puts the tile unit back to sleep, so that switching threads stays cheap.
    ///
    /// # Safety
    /// The processor has AMX.
    pub(super) unsafe fn release() {
        // SAFETY: touches tile state only.
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
    }
}

/// What one thread needs for [`PANELS`] panels.
#[derive(Default)]
struct Scratch {
    /// The expanded panels, `[panel][group][vector]`.
    bytes: Buffer,
    /// `[panel][block]`
    scales: Vec<Scales>,
    /// Sums over the blocks so far, `[tile][panel]`.
    totals: Vec<Total>,
}

/// The sums of 16 rows and 16 columns.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Total([[f32; PANEL]; TILE]);

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
    // SAFETY: the caller's promises.
    unsafe {
        match w.geometry.kind {
            Kind::Q8_0 => all::<Q8_0>(w, x, panels, rows, out),
            Kind::Q4_0 => all::<Q4_0>(w, x, panels, rows, out),
            Kind::Q4_1 => all::<Q4_1>(w, x, panels, rows, out),
            Kind::Q4K => all::<Q4K>(w, x, panels, rows, out),
            Kind::Q6K => all::<Q6K>(w, x, panels, rows, out),
        }
        TileConfig::release();
    }
}

/// # Safety
/// As [`multiply`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn all<F: Format>(
    w: &QuantTiles,
    x: &Activations,
    panels: Range<usize>,
    rows: Range<usize>,
    out: Out,
) {
    let g = w.geometry;
    // A group's inputs are the bytes of a row of A and the rows of B, four each. A last tile with
    // fewer rows is read as if it had all; what it yields for the others is dropped.
    let (k, tile_rows) = (F::VECTORS * 4, rows.len().min(TILE));
    let (c, a, b) = ((tile_rows, 64), (tile_rows, k), (F::VECTORS, 64));
    let config = TileConfig::new([c, c, a, a, b, (0, 0), (0, 0), (0, 0)]);
    // SAFETY: the caller's promise.
    unsafe { config.load() };
    SCRATCH.with_borrow_mut(|scratch| {
        let zero = _mm512_setzero_ps();
        let panel_bytes = g.cols * PANEL;
        scratch.bytes.reserve(PANELS * panel_bytes);
        let empty = Scales { s: [zero; 16], m: [zero; 8], d: zero, dmin: zero };
        scratch.scales.resize(PANELS * g.blocks, empty);
        for first in panels.clone().step_by(PANELS) {
            let batch = first..(first + PANELS).min(panels.end);
            for (i, panel) in batch.clone().enumerate() {
                let scales = &mut scratch.scales[i * g.blocks..][..g.blocks];
                // SAFETY: the panel exists; the buffers have room for it.
                unsafe {
                    let to = scratch.bytes.as_mut_ptr().add(i * panel_bytes);
                    expand::<F>(w.panel(panel).as_ptr(), &g, to, scales);
                }
            }
            let tiles = rows.len().div_ceil(TILE);
            scratch.totals.clear();
            scratch.totals.resize(tiles * PANELS, Total([[0.0; PANEL]; TILE]));
            // SAFETY: the tiles are configured; the caller's promises.
            unsafe {
                match tile_rows {
                    1..=8 => blocks::<F, 8>(&g, x, scratch, batch.len(), &rows),
                    _ => blocks::<F, 16>(&g, x, scratch, batch.len(), &rows),
                }
                store(w, scratch, batch, &rows, out);
            }
        }
    });
}

/// Expands a panel to signed bytes (`[group][vector]`) and scales.
///
/// # Safety
/// `weights` is a panel of the geometry, `bytes` has room for `16 * cols`, `scales` for each block.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn expand<F: Format>(
    weights: *const u8,
    g: &Geometry,
    bytes: *mut u8,
    scales: &mut [Scales],
) {
    let offset = _mm512_set1_epi8(F::SHIFT.map_or(0, |s| (1u8 << s) as i8));
    let mut to = bytes;
    for (block, scales) in scales.iter_mut().enumerate() {
        // SAFETY: block and groups exist.
        unsafe {
            F::scales(weights, g, block, scales);
            for j in 0..g.groups(block) {
                let q = F::quants(weights, g, block, j);
                for q in q.iter().take(F::VECTORS) {
                    _mm512_storeu_si512(to.cast(), _mm512_sub_epi8(*q, offset));
                    to = to.add(64);
                }
            }
        }
    }
}

/// Sums of one group, as the tile unit stores them: high level, low level.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Sums([[[i32; PANEL]; TILE]; 2]);

/// Multiplies all blocks. Block by block, so that the panels' share stays in the nearest cache while
/// the rows pass.
///
/// # Safety
/// As [`multiply`]; the scratch holds `panels` expanded panels and the tiles are configured.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn blocks<F: Format, const R: usize>(
    g: &Geometry,
    x: &Activations,
    scratch: &mut Scratch,
    panels: usize,
    rows: &Range<usize>,
) {
    for block in 0..g.blocks {
        for (tile, row) in rows.clone().step_by(TILE).enumerate() {
            for panel in 0..panels {
                let scales = &scratch.scales[panel * g.blocks + block];
                let total = &mut scratch.totals[tile * PANELS + panel];
                // SAFETY: block, panel and rows exist.
                unsafe {
                    let at = panel * g.cols * PANEL + block * 256 * PANEL;
                    let weights = scratch.bytes.as_ptr().add(at);
                    let job = Job { g, x, block, row, count: (rows.end - row).min(R), weights };
                    tile_block::<F, R>(&job, scales, total);
                }
            }
        }
    }
}

/// One block of one panel and one tile of rows.
struct Job<'a> {
    g: &'a Geometry,
    x: &'a Activations,
    block: usize,
    row: usize,
    /// Rows that exist.
    count: usize,
    /// The block's expanded weights.
    weights: *const u8,
}

/// Adds a block to the sums of a tile.
///
/// # Safety
/// As [`multiply`]; the tiles are configured.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn tile_block<F: Format, const R: usize>(job: &Job<'_>, scales: &Scales, total: &mut Total) {
    let (g, x, block) = (job.g, job.x, job.block);
    let zero = _mm512_setzero_ps();
    let mut buffers = [const { MaybeUninit::<Sums>::uninit() }; AHEAD];
    let (levels, stride) = x.tile(job.row / TILE);
    let per32 = 8 / F::VECTORS;
    let groups = g.groups(block);
    let start = |j: usize, to: &mut MaybeUninit<Sums>| {
        // SAFETY: the group exists, so its levels and weights do.
        unsafe {
            let a = levels.add((block * 8 + j / per32) * stride + j % per32 * 16);
            sums(a, job.weights.add(j * F::VECTORS * 64), to.as_mut_ptr());
        }
    };
    start(0, &mut buffers[0]);
    let mut a = [zero; R];
    for j in 0..groups {
        if j + 1 < groups {
            start(j + 1, &mut buffers[(j + 1) % AHEAD]);
        }
        let sums: *const i32 = buffers[j % AHEAD].as_ptr().cast();
        for (r, a) in a.iter_mut().enumerate() {
            // SAFETY: the tile unit has written `R` rows of both levels, aligned.
            let (hi, lo) = unsafe {
                (
                    _mm512_load_si512(sums.add(r * PANEL).cast()),
                    _mm512_load_si512(sums.add((TILE + r) * PANEL).cast()),
                )
            };
            let isum = _mm512_add_epi32(_mm512_slli_epi32::<7>(hi), lo);
            *a = _mm512_fmadd_ps(scales.s[j], _mm512_cvtepi32_ps(isum), *a);
        }
    }
    for (r, a) in a.iter().enumerate().take(job.count) {
        let row = job.row + r;
        let mut b = zero;
        if F::MINS {
            let xsums = &x.sums[row * (g.cols / 32) + block * 8..][..groups];
            for (m, xsum) in scales.m.iter().zip(xsums) {
                b = _mm512_fmadd_ps(*m, _mm512_set1_ps(*xsum), b);
            }
        }
        let scale = _mm512_set1_ps(x.scale[row * g.blocks + block]);
        let to = total.0[r].as_mut_ptr();
        // SAFETY: sixteen aligned sums.
        unsafe {
            let t = F::join(scales, *a, b);
            _mm512_store_ps(to, _mm512_fmadd_ps(t, scale, _mm512_load_ps(to)));
        }
    }
}

/// Writes the sums of some panels out.
///
/// # Safety
/// As [`multiply`].
#[target_feature(enable = "avx512f")]
unsafe fn store(
    w: &QuantTiles,
    scratch: &Scratch,
    panels: Range<usize>,
    rows: &Range<usize>,
    out: Out,
) {
    for (i, panel) in panels.enumerate() {
        let lanes = PANEL.min(w.rows() - panel * PANEL);
        let mask = (u32::MAX >> (32 - lanes)) as __mmask16;
        for row in rows.clone() {
            let (tile, r) = ((row - rows.start) / TILE, (row - rows.start) % TILE);
            let from = scratch.totals[tile * PANELS + i].0[r].as_ptr();
            // SAFETY: the row and the unmasked columns are in the output, and this task's alone.
            unsafe {
                _mm512_mask_storeu_ps(out.at(row, panel * PANEL), mask, _mm512_load_ps(from));
            }
        }
    }
}

/// The sums of a group: levels at `a` (64 bytes a row, high then low 32 bytes on), weights at `b`.
///
/// # Safety
/// The tiles are configured and the operands have that shape.
#[inline(always)]
unsafe fn sums(a: *const u8, b: *const u8, to: *mut Sums) {
    // SAFETY: the caller's promises; `to` has room for two tiles of 16 rows.
    unsafe {
        asm!(
            "tileloadd tmm4, [{b} + {s}*1]",
            "tileloadd tmm2, [{a} + {s}*1]",
            "tileloadd tmm3, [{a} + {s}*1 + 32]",
            "tilezero tmm0",
            "tilezero tmm1",
            "tdpbssd tmm0, tmm2, tmm4",
            "tdpbssd tmm1, tmm3, tmm4",
            "tilestored [{hi} + {s}*1], tmm0",
            "tilestored [{lo} + {s}*1], tmm1",
            a = in(reg) a,
            b = in(reg) b,
            s = in(reg) 64usize,
            hi = in(reg) to,
            lo = in(reg) to.cast::<u8>().add(size_of::<Sums>() / 2),
            options(nostack),
        );
    }
}
