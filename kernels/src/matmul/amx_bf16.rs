//! BF16 products with AMX tiles, for any number of rows.
//!
//! An output value is summed in the tile unit, 32 inputs by 32: first the high halves of the
//! activations, then the low ones. That order is the unit's own and does not depend on the other
//! rows, so one row takes the same path as many.

use super::activations::TILE;
use super::amx_unit::TileConfig;
use super::float::FloatTiles;
use super::halves::{Halves, ROW};
use super::{Out, PANEL};
use std::arch::asm;
use std::arch::x86_64::*;
use std::ops::Range;

/// Multiplies panels `panels` of `w` (BF16) with rows `rows` of `x`.
///
/// # Safety
/// `out` has the rows of `x` and the columns of `w`; `rows` begins at a tile; nobody else writes
/// these panels' columns of these rows; the processor has AMX and AVX-512.
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn multiply(
    w: &FloatTiles,
    x: &Halves,
    panels: Range<usize>,
    rows: Range<usize>,
    out: Out,
) {
    let mut configured = 0;
    let mut panel = panels.start;
    while panel < panels.end {
        // An odd last panel stands in for its neighbour, whose results are dropped.
        let pair = [panel, (panel + 1).min(panels.end - 1)];
        for row in rows.clone().step_by(2 * TILE) {
            let count = (rows.end - row).min(2 * TILE);
            if count != configured {
                configured = count;
                let (first, second) = (count.min(TILE), count.saturating_sub(TILE));
                // A tile without rows is not a tile; it is not used then.
                let (a, b) = ((first, 64), (second.max(1), 64));
                // SAFETY: the caller's promise.
                unsafe { TileConfig::new([a, a, b, b, a, b, (16, 64), (16, 64)]).load() };
            }
            let mut sums = [[[0f32; PANEL]; TILE]; 4];
            // SAFETY: panels and rows exist, the tiles fit them.
            unsafe {
                let weights = pair.map(|p| w.bf16_panel(p).0);
                let (a, stride) = x.tile(row / TILE);
                one_tile(weights, a, stride, x.depth(), &mut sums, count, x, row);
            }
            for (i, sums) in sums.iter().enumerate() {
                let (panel, first) = (panel + i % 2, i / 2 * TILE);
                if panel >= panels.end || first >= count {
                    continue;
                }
                let lanes = PANEL.min(w.rows() - panel * PANEL);
                let mask = (u32::MAX >> (32 - lanes)) as __mmask16;
                for (r, sum) in sums.iter().enumerate().take(count - first) {
                    // SAFETY: the row and the unmasked columns are in the output, and ours alone.
                    unsafe {
                        let to = out.at(row + first + r, panel * PANEL);
                        _mm512_mask_storeu_ps(to, mask, _mm512_loadu_ps(sum.as_ptr()));
                    }
                }
            }
        }
        panel += 2;
    }
    // SAFETY: the caller's promise.
    unsafe { TileConfig::release() };
}

/// Multiplies two panels with one or two tiles of rows.
///
/// # Safety
/// The tiles are configured for `count` rows and all operands exist.
#[allow(clippy::too_many_arguments)]
#[inline(always)]
unsafe fn one_tile(
    weights: [*const u8; 2],
    a: *const u8,
    a_stride: usize,
    depth: usize,
    sums: &mut [[[f32; PANEL]; TILE]; 4],
    count: usize,
    x: &Halves,
    row: usize,
) {
    let row_bytes = ROW;
    // SAFETY: the caller's promises; prefetching is harmless anywhere.
    unsafe {
        asm!("tilezero tmm0", "tilezero tmm1", options(nostack, nomem));
        if count > TILE {
            asm!("tilezero tmm2", "tilezero tmm3", options(nostack, nomem));
            let (b, b_stride) = x.tile(row / TILE + 1);
            for k in 0..depth {
                asm!(
                    "tileloadd tmm6, [{w0} + {s}*1]",
                    "tileloadd tmm7, [{w1} + {s}*1]",
                    "tileloadd tmm4, [{a} + {r}*1]",
                    "tileloadd tmm5, [{b} + {r}*1]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "tdpbf16ps tmm2, tmm5, tmm6",
                    "tdpbf16ps tmm3, tmm5, tmm7",
                    "tileloadd tmm4, [{a} + {r}*1 + 64]",
                    "tileloadd tmm5, [{b} + {r}*1 + 64]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "tdpbf16ps tmm2, tmm5, tmm6",
                    "tdpbf16ps tmm3, tmm5, tmm7",
                    w0 = in(reg) weights[0].add(k * 1024),
                    w1 = in(reg) weights[1].add(k * 1024),
                    a = in(reg) a.add(k * a_stride),
                    b = in(reg) b.add(k * b_stride),
                    s = in(reg) 64usize,
                    r = in(reg) row_bytes,
                    options(nostack, readonly),
                );
            }
        } else {
            for k in 0..depth {
                let ahead = [weights[0], weights[1]].map(|w| w.wrapping_add((k + 3) * 1024));
                for line in 0..16 {
                    _mm_prefetch::<_MM_HINT_T0>(ahead[0].wrapping_add(line * 64).cast());
                    _mm_prefetch::<_MM_HINT_T0>(ahead[1].wrapping_add(line * 64).cast());
                }
                asm!(
                    "tileloadd tmm6, [{w0} + {s}*1]",
                    "tileloadd tmm7, [{w1} + {s}*1]",
                    "tileloadd tmm4, [{a} + {r}*1]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "tileloadd tmm4, [{a} + {r}*1 + 64]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    w0 = in(reg) weights[0].add(k * 1024),
                    w1 = in(reg) weights[1].add(k * 1024),
                    a = in(reg) a.add(k * a_stride),
                    s = in(reg) 64usize,
                    r = in(reg) row_bytes,
                    options(nostack, readonly),
                );
            }
        }
        asm!(
            "tilestored [{to} + {s}*1], tmm0",
            "tilestored [{to} + {s}*1 + 1024], tmm1",
            to = in(reg) sums.as_mut_ptr(),
            s = in(reg) 64usize,
            options(nostack),
        );
        if count > TILE {
            asm!(
                "tilestored [{to} + {s}*1 + 2048], tmm2",
                "tilestored [{to} + {s}*1 + 3072], tmm3",
                to = in(reg) sums.as_mut_ptr(),
                s = in(reg) 64usize,
                options(nostack),
            );
        }
    }
}
