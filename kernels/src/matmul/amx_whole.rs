//! Products with AMX tiles of weights whose scales are whole numbers: Q6_K.
//!
//! A group of 16 fills a quarter of a tile, and sums that must be scaled for each would keep the vector
//! unit busy for longer than the tile unit. But `scale · q` is a whole number of 13 bits and a sign: two
//! bytes. So a block of 256 inputs is expanded to such bytes, and its sums stay in the tile unit until it
//! ends: exact, as [`super::int`] wants them. Inputs have two levels too, so a step of 64 inputs is four
//! products of tiles.
//!
//! A block of a panel is expanded once and meets 16 rows at a time. While the tile unit multiplies, the
//! vector unit scales the sums of the product before the last one, and expands the next block where there
//! is a single tile of rows.

use super::activations::{Activations, HIGH_SHIFT, TILE};
use super::amx::{BLOCK, PANELS, SCALES, Scratch, Total, write};
use super::amx_unit::{Sums, TileConfig};
use super::formats::{Format, Q6K, Scales};
use super::packed::QuantTiles;
use super::{Out, PANEL};
use std::arch::asm;
use std::arch::x86_64::*;
use std::ops::Range;

/// Steps of a block, of 64 inputs each.
const STEPS: usize = 4;
/// Groups of a step.
const GROUPS: usize = Q6K::GROUPS / STEPS;
/// Bytes of the high levels of a step's weights; so many low ones follow.
const LEVEL: usize = 64 * PANEL;
/// A weight is `high << WEIGHT_SHIFT | low`.
const WEIGHT_SHIFT: u32 = 7;
/// Bytes of weights that are fetched ahead of use.
const AHEAD: usize = 2048;
/// Products from one to that during which its sums are scaled: during the next they are stored.
const LAG: usize = 2;

/// Multiplies panels `panels` of `w` with rows `rows` of `x`.
///
/// # Safety
/// As [`super::amx::multiply`], of Q6_K; `scratch` has room for it.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) unsafe fn multiply(
    w: &QuantTiles,
    x: &Activations,
    scratch: &mut Scratch,
    panels: Range<usize>,
    rows: Range<usize>,
    out: Out,
) {
    const { assert!(STEPS * 2 * LEVEL <= BLOCK) };
    let (tile_rows, tiles) = (rows.len().min(TILE), rows.len().div_ceil(TILE));
    // A last tile with fewer rows is read as if it had all; what it yields for the others is
    // dropped. Tiles 0 to 3 hold sums, 4 and 5 levels of inputs, 6 and 7 levels of weights.
    let (x_tile, w_tile) = ((tile_rows, 64), (16, 64));
    let sums = x_tile;
    let config = TileConfig::new([sums, sums, sums, sums, x_tile, x_tile, w_tile, w_tile]);
    // SAFETY: the caller's promises; the tiles are configured first.
    unsafe {
        config.load();
        match (tiles, tile_rows) {
            (1, 1..=8) => one_tile::<8>(w, x, scratch, panels, &rows, out),
            (1, _) => one_tile::<16>(w, x, scratch, panels, &rows, out),
            _ => {
                for first in panels.clone().step_by(PANELS) {
                    let batch = first..(first + PANELS).min(panels.end);
                    blocks(w, x, scratch, &batch, &rows);
                    write(w, &scratch.totals, batch, &rows, out);
                }
            }
        }
    }
}

/// Where the weights of a block of a panel are.
#[derive(Clone, Copy)]
struct Source {
    panel: *const u8,
    groups: *const u8,
    block: usize,
}

impl Source {
    fn new(w: &QuantTiles, panel: usize, block: usize) -> Self {
        let bytes = w.panel(panel);
        Source {
            panel: bytes.as_ptr(),
            groups: bytes[w.geometry.quants_at(block)..].as_ptr(),
            block,
        }
    }

    /// Expands the groups of step `step` to their place at `to`, where the block's steps begin.
    ///
    /// # Safety
    /// Room for a block at `to`, aligned to vectors; AVX-512.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    unsafe fn expand(&self, step: usize, scales: &Scales, to: *mut u8) {
        let bytes = _mm512_set1_epi16(255);
        let low = _mm512_set1_epi8(i8::MAX >> (7 - WEIGHT_SHIFT));
        for group in GROUPS * step..GROUPS * (step + 1) {
            let scale = scales.whole[group];
            // Both halves of a lane; a stored value is the weight plus 32.
            let half = _mm512_and_si512(scale, _mm512_set1_epi32(0xffff));
            let scale = _mm512_or_si512(_mm512_slli_epi32::<16>(scale), half);
            let offset = _mm512_slli_epi16::<{ Q6K::SHIFT.expect("an offset") }>(scale);
            // SAFETY: the group exists; room for its vectors; prefetching is harmless anywhere.
            unsafe {
                let from = self.groups.add(group * Q6K::BYTES);
                for line in 0..Q6K::BYTES / 64 + 1 {
                    _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(AHEAD + line * 64).cast());
                }
                for (i, q) in Q6K::quants(from).iter().enumerate().take(Q6K::VECTORS) {
                    // Weights of even and of odd inputs, 16 bits each.
                    let weight = |q| _mm512_sub_epi16(_mm512_mullo_epi16(q, scale), offset);
                    let even = weight(_mm512_and_si512(*q, bytes));
                    let odd = weight(_mm512_srli_epi16::<8>(*q));
                    // Bytes of `a` where the mask has ones, of `b` elsewhere.
                    let join = |a, b| _mm512_ternarylogic_epi32::<0xCA>(bytes, a, b);
                    let high = join(
                        _mm512_srai_epi16::<WEIGHT_SHIFT>(even),
                        _mm512_slli_epi16::<{ 8 - WEIGHT_SHIFT }>(odd),
                    );
                    let low = _mm512_and_si512(join(even, _mm512_slli_epi16::<8>(odd)), low);
                    let to = to.add(step * 2 * LEVEL + (group % GROUPS * Q6K::VECTORS + i) * 64);
                    _mm512_store_si512(to.cast(), high);
                    _mm512_store_si512(to.add(LEVEL).cast(), low);
                }
            }
        }
    }
}

/// The sums of a tile of rows and a block of a panel, which are to be scaled.
#[derive(Clone, Copy)]
struct Product {
    unit: *const __m512,
    /// What the inputs of the first row count in; those of the others are a row of blocks apart.
    factors: *const f32,
    /// Whether nothing has been added before.
    first: bool,
    total: *mut Total,
}

impl Product {
    /// Scales some rows and adds them up.
    ///
    /// # Safety
    /// AVX-512; the rows have factors, `stride` apart; `sums` are this product's.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn scale(&self, sums: &Sums, stride: usize, rows: Range<usize>) {
        for row in rows {
            // SAFETY: a row of a tile; aligned sums.
            unsafe {
                // `hi · high`, `hi · low`, `lo · high`, `lo · low`, of the levels of inputs and weights.
                let [hh, hl, lh, ll] = sums
                    .each_ref()
                    .map(|sums| _mm512_load_si512(sums.get_unchecked(row).as_ptr().cast()));
                let high = _mm512_add_epi32(_mm512_slli_epi32::<HIGH_SHIFT>(hh), lh);
                let low = _mm512_add_epi32(_mm512_slli_epi32::<HIGH_SHIFT>(hl), ll);
                let sum = _mm512_add_epi32(_mm512_slli_epi32::<WEIGHT_SHIFT>(high), low);
                let sum = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), *self.unit);
                let factor = _mm512_set1_ps(*self.factors.add(row * stride));
                let to = self.total.cast::<f32>().add(row * PANEL);
                let before = if self.first { _mm512_setzero_ps() } else { _mm512_load_ps(to) };
                _mm512_store_ps(to, _mm512_fmadd_ps(sum, factor, before));
            }
        }
    }
}

/// Products on their way: the tile unit is [`LAG`] ahead of the vector unit.
struct Pipeline<'a> {
    sums: &'a mut [Sums; LAG],
    /// From the factor of one row to that of the next.
    stride: usize,
    /// The one before and the one before that.
    products: [Product; LAG],
    /// Which of them is due, and where its sums are.
    due: usize,
}

impl<'a> Pipeline<'a> {
    /// Begins with products of nothing, in units of `nothing`, which go to `nowhere`.
    fn new(
        sums: &'a mut [Sums; LAG],
        x: &Activations,
        stride: usize,
        nothing: &__m512,
        nowhere: &mut Total,
    ) -> Self {
        let factors = x.scale.as_ptr();
        let nothing = Product { unit: nothing, factors, first: true, total: nowhere };
        Pipeline { sums, stride, products: [nothing; LAG], due: 0 }
    }

    /// Multiplies a tile of rows at `x`, `level` bytes from level to level, with the block at `weights`;
    /// `beside` does something else after each step. Meanwhile the product that is due is scaled, its
    /// first `R` rows.
    ///
    /// # Safety
    /// AVX-512; the tiles are configured; all operands exist.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    unsafe fn multiply<const R: usize>(
        &mut self,
        product: Product,
        (x, level): (*const u8, usize),
        weights: *const u8,
        mut beside: impl FnMut(usize),
    ) {
        let [first, second] = &mut *self.sums;
        let (sums, to) = if self.due == 0 { (first, second) } else { (second, first) };
        let due = &self.products[self.due];
        // SAFETY: the caller's promises.
        unsafe {
            for step in 0..STEPS {
                let (x, w) = (x.add(step * 2 * level), weights.add(step * 2 * LEVEL));
                if step == 0 {
                    begin(x, level, w, to)
                } else {
                    add(x, level, w)
                }
                beside(step);
                due.scale(sums, self.stride, R / STEPS * step..R / STEPS * (step + 1));
            }
        }
        self.products[self.due] = product;
        self.due = 1 - self.due;
    }

    /// Scales the products that are on their way; `beside` does something else after each.
    ///
    /// # Safety
    /// AVX-512; the tiles are configured.
    #[target_feature(enable = "avx512f")]
    unsafe fn drain<const R: usize>(&mut self, mut beside: impl FnMut()) {
        let last = 1 - self.due;
        // SAFETY: the caller's promise.
        unsafe {
            flush(&mut self.sums[last]);
            for due in [self.due, last] {
                self.products[due].scale(&self.sums[due], self.stride, 0..R);
                beside();
            }
        }
    }
}

/// Adds a step to the sums of the tile unit: inputs at `x`, whose low levels are `level` bytes on, with
/// weights at `w`.
///
/// # Safety
/// The tiles are configured, the operands have their shape.
#[inline(always)]
unsafe fn add(x: *const u8, level: usize, w: *const u8) {
    // SAFETY: the caller's promises.
    unsafe {
        asm!(
            "tileloadd tmm4, [{x} + {s}*1]",
            "tileloadd tmm6, [{w} + {s}*1]",
            "tdpbssd tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{w} + {s}*1 + 1024]",
            "tdpbssd tmm1, tmm4, tmm7",
            "tileloadd tmm5, [{low} + {s}*1]",
            "tdpbssd tmm2, tmm5, tmm6",
            "tdpbssd tmm3, tmm5, tmm7",
            x = in(reg) x,
            low = in(reg) x.wrapping_add(level),
            w = in(reg) w,
            s = in(reg) 64usize,
            options(nostack, readonly),
        );
    }
}

/// [`add`] that begins new sums, while those before go to `to`. Each is stored just before it begins
/// anew: the unit takes its instructions in turn, and a store waits for its sums.
///
/// # Safety
/// As [`add`].
#[inline(always)]
unsafe fn begin(x: *const u8, level: usize, w: *const u8, to: &mut Sums) {
    // SAFETY: the caller's promises; room for four tiles.
    unsafe {
        asm!(
            "tileloadd tmm4, [{x} + {s}*1]",
            "tileloadd tmm6, [{w} + {s}*1]",
            "tilestored [{to} + {s}*1], tmm0",
            "tilezero tmm0",
            "tdpbssd tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{w} + {s}*1 + 1024]",
            "tilestored [{to} + {s}*1 + 1024], tmm1",
            "tilezero tmm1",
            "tdpbssd tmm1, tmm4, tmm7",
            "tileloadd tmm5, [{low} + {s}*1]",
            "tilestored [{to} + {s}*1 + 2048], tmm2",
            "tilezero tmm2",
            "tdpbssd tmm2, tmm5, tmm6",
            "tilestored [{to} + {s}*1 + 3072], tmm3",
            "tilezero tmm3",
            "tdpbssd tmm3, tmm5, tmm7",
            x = in(reg) x,
            low = in(reg) x.wrapping_add(level),
            w = in(reg) w,
            to = in(reg) to,
            s = in(reg) 64usize,
            options(nostack),
        );
    }
}

/// Stores the last sums.
///
/// # Safety
/// The tiles are configured.
#[inline(always)]
unsafe fn flush(to: &mut Sums) {
    // SAFETY: room for four tiles.
    unsafe {
        asm!(
            "tilestored [{to} + {s}*1], tmm0",
            "tilestored [{to} + {s}*1 + 1024], tmm1",
            "tilestored [{to} + {s}*1 + 2048], tmm2",
            "tilestored [{to} + {s}*1 + 3072], tmm3",
            to = in(reg) to,
            s = in(reg) 64usize,
            options(nostack),
        );
    }
}

/// Multiplies all blocks of some panels. Block by block, so that the panels' share stays in the
/// nearest caches while the rows pass.
///
/// # Safety
/// As [`multiply`]; the tiles are configured; at least two tiles of rows.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn blocks(
    w: &QuantTiles,
    x: &Activations,
    scratch: &mut Scratch,
    panels: &Range<usize>,
    rows: &Range<usize>,
) {
    let g = w.geometry;
    let (tiles, width) = (rows.len().div_ceil(TILE), panels.len());
    let Scratch { bytes, scales, totals, ring } = scratch;
    // Products on their way point into these.
    let (bytes, scales, totals) = (bytes.as_mut_ptr(), scales.as_mut_ptr(), totals.as_mut_ptr());
    let (nothing, mut nowhere) = (_mm512_setzero_ps(), Total::ZERO);
    let mut pipeline = Pipeline::new(ring.halves(), x, g.blocks, &nothing, &mut nowhere);
    for block in 0..g.blocks {
        // Two panels or tiles are at least as many products as those on their way, whose scales are
        // the other half.
        let scales = scales.wrapping_add(block % 2 * PANELS);
        for (i, panel) in panels.clone().enumerate() {
            let source = Source::new(w, panel, block);
            // SAFETY: panel and block exist; there is room for each panel's block and scales.
            unsafe {
                let scales = &mut *scales.add(i);
                Q6K::scales(source.panel, &g, block, scales);
                for step in 0..STEPS {
                    source.expand(step, scales, bytes.add(i * BLOCK));
                }
            }
        }
        // Two panels at a time meet all rows, so that both stay in the nearest cache and a tile is
        // fetched once for the two.
        for pair in (0..width).step_by(2) {
            for tile in 0..tiles {
                let row = rows.start + tile * TILE;
                let (levels, level) = x.wide_tile(row / TILE);
                let levels = levels.wrapping_add(block * STEPS * 2 * level);
                let factors = x.scale[row * g.blocks + block..].as_ptr();
                for panel in pair..(pair + 2).min(width) {
                    // SAFETY: the block has been expanded; rows and levels are in `x`; every tile and
                    // panel has a total.
                    unsafe {
                        let product = Product {
                            unit: &raw const (*scales.add(panel)).unit,
                            factors,
                            first: block == 0,
                            total: totals.add(tile * width + panel),
                        };
                        let weights = bytes.add(panel * BLOCK);
                        pipeline.multiply::<TILE>(product, (levels, level), weights, |_| ());
                    }
                }
            }
        }
    }
    // SAFETY: the processor has AVX-512; the tiles are configured.
    unsafe { pipeline.drain::<TILE>(|| ()) };
}

/// Multiplies some panels with one tile of rows, or its first `R`. While one block is multiplied, the
/// next is expanded.
///
/// # Safety
/// As [`multiply`]; the tiles are configured; there are at most `R` rows.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn one_tile<const R: usize>(
    w: &QuantTiles,
    x: &Activations,
    scratch: &mut Scratch,
    panels: Range<usize>,
    rows: &Range<usize>,
    out: Out,
) {
    let g = w.geometry;
    let Scratch { bytes, scales, totals, ring } = scratch;
    // Products on their way point into these.
    let (bytes, scales, total) = (bytes.as_mut_ptr(), scales.as_mut_ptr(), totals.as_mut_ptr());
    let place = |i: usize| bytes.wrapping_add(i % 2 * BLOCK);
    let (levels, level) = x.wide_tile(rows.start / TILE);
    let (nothing, mut nowhere) = (_mm512_setzero_ps(), Total::ZERO);
    let mut pipeline = Pipeline::new(ring.halves(), x, g.blocks, &nothing, &mut nowhere);
    let mut sources = panels
        .clone()
        .flat_map(|panel| (0..g.blocks).map(move |block| Source::new(w, panel, block)));
    let Some(mut source) = sources.next() else { return };
    // SAFETY: the first block exists; room for a block.
    unsafe {
        Q6K::scales(source.panel, &g, source.block, &mut *scales);
        for step in 0..STEPS {
            source.expand(step, &*scales, place(0));
        }
    }
    // Products until the panel `complete` is.
    let (mut left, mut complete) = (g.blocks + LAG, panels.start);
    let mut end_of_product = || {
        left -= 1;
        if left == 0 {
            // SAFETY: the caller's promises; `total` is one panel's.
            unsafe { write(w, std::slice::from_ref(&*total), complete..complete + 1, rows, out) };
            (left, complete) = (g.blocks, complete + 1);
        }
    };
    let mut now = 0;
    loop {
        let (next, after) = (sources.next(), (now + 1) % SCALES);
        let factors = x.scale[rows.start * g.blocks + source.block..].as_ptr();
        let levels = levels.wrapping_add(source.block * STEPS * 2 * level);
        // SAFETY: both blocks exist, and one has been expanded; rows and levels are in `x`; room for the
        // other block and its scales.
        unsafe {
            if let Some(next) = next {
                Q6K::scales(next.panel, &g, next.block, &mut *scales.add(after));
            }
            let unit = &raw const (*scales.add(now)).unit;
            let product = Product { unit, factors, first: source.block == 0, total };
            pipeline.multiply::<R>(product, (levels, level), place(now), |step| {
                if let Some(next) = next {
                    next.expand(step, &*scales.add(after), place(after));
                }
            });
        }
        end_of_product();
        let Some(next) = next else { break };
        (source, now) = (next, after);
    }
    // SAFETY: the processor has AVX-512; the tiles are configured.
    unsafe { pipeline.drain::<R>(end_of_product) };
}
