//! Integer products: the definition, in plain Rust.
//!
//! With `isum` the exact integer sum of a group's weights and rounded activations and `xsum` the sum
//! of the rounded activations alone, an output value is, block of 256 by block, group by group:
//! ```text
//! a = 0
//! for each group:  a = fma(scale, isum, a);  a = fma(min, xsum, a) (Q4_1, Q4_K)
//! y = fma(a, activation scale, y)
//! ```
//! The scale of a group of Q4_K is the product of its two, rounded once; so is its (negative) minimum.
//!
//! The scales of Q6_K are whole numbers of a unit `d` that the block has, so its sum over all groups is
//! exact too, in 32 bits: a weight is at most 128 · 32, an input at most 2032, and there are 256. It becomes a
//! float, then it is multiplied:
//! ```text
//! y = fma(d · float(Σ scale · isum), activation scale, y)
//! ```
//! The vector kernels do just this, so all of them give the same bits.

use super::activations::{Activations, HIGH};
use super::packed::{Geometry, Kind, QuantTiles, group_values, row_scales};
use super::{Out, PANEL};
use crate::math::fma;

/// Multiplies panels `panels` of `w` with rows `rows` of `x`, with fused multiply-adds if `FMA`.
///
/// # Safety
/// `out` has the rows of `x` and the columns of `w`; nobody else writes these panels' columns of these
/// rows.
pub(super) unsafe fn plain<const FMA: bool>(
    w: &QuantTiles,
    x: &Activations,
    panels: std::ops::Range<usize>,
    rows: std::ops::Range<usize>,
    out: Out,
) {
    for panel in panels {
        // SAFETY: the caller's promises.
        unsafe { multiply::<FMA>(w, x, panel, rows.clone(), out) };
    }
}

/// Weights of one block of a panel, expanded.
struct Block {
    /// `[group][input][lane]`
    q: [[[i16; PANEL]; 32]; 16],
    s: [[f32; PANEL]; 16],
    m: [[f32; PANEL]; 8],
    /// Units of Q6_K, whose `s` are whole.
    d: [f32; PANEL],
}

fn expand(g: &Geometry, panel: &[u8], b: usize, out: &mut Block) {
    for j in 0..g.groups(b) {
        for (lane, q) in group_values(g, panel, b, j).iter().enumerate() {
            for (i, q) in q.iter().enumerate() {
                out.q[j][i][lane] = i16::from(*q);
            }
        }
    }
    for lane in 0..PANEL {
        let scales = row_scales(g, panel, b, lane);
        let dmin = if g.kind == Kind::Q4K { -scales.dmin } else { 1.0 };
        out.d[lane] = scales.d;
        for j in 0..16 {
            out.s[j][lane] = if g.kind == Kind::Q6K { scales.s[j] } else { scales.d * scales.s[j] };
        }
        for j in 0..8 {
            out.m[j][lane] = dmin * scales.m[j];
        }
    }
}

/// # Safety
/// As [`plain`].
unsafe fn multiply<const FMA: bool>(
    w: &QuantTiles,
    x: &Activations,
    panel: usize,
    rows: std::ops::Range<usize>,
    out: Out,
) {
    let g = &w.geometry;
    let mut block = Box::new(Block {
        q: [[[0; PANEL]; 32]; 16],
        s: [[0.0; PANEL]; 16],
        m: [[0.0; PANEL]; 8],
        d: [0.0; PANEL],
    });
    let mut sums = vec![[0f32; PANEL]; rows.len()];
    for b in 0..g.blocks {
        expand(g, w.panel(panel), b, &mut block);
        for (r, y) in rows.clone().zip(&mut sums) {
            block_row::<FMA>(g, &block, x, r, b, y);
        }
    }
    let lanes = PANEL.min(w.rows() - panel * PANEL);
    for (r, y) in rows.zip(&sums) {
        // SAFETY: the row and the panel's columns are in the output and this task's alone.
        unsafe {
            std::ptr::copy_nonoverlapping(y.as_ptr(), out.at(r, panel * PANEL), lanes);
        }
    }
}

fn block_row<const FMA: bool>(
    g: &Geometry,
    block: &Block,
    x: &Activations,
    row: usize,
    b: usize,
    y: &mut [f32; PANEL],
) {
    let (mut a, mut whole) = ([0f32; PANEL], [0i32; PANEL]);
    let size = g.kind.group();
    for j in 0..g.groups(b) {
        let levels = x.group(row, (b * 256 + j * size) / 32);
        let from = j * size % 32;
        let mut isum = [0i32; PANEL];
        for i in 0..size {
            let (hi, lo) = (levels[from + i] as i8, levels[32 + from + i] as i8);
            let v = i32::from(hi) * HIGH + i32::from(lo);
            for (s, q) in isum.iter_mut().zip(&block.q[j][i]) {
                *s += i32::from(*q) * v;
            }
        }
        for lane in 0..PANEL {
            if g.kind == Kind::Q6K {
                whole[lane] += block.s[j][lane] as i32 * isum[lane];
            } else {
                a[lane] = fma::<FMA>(block.s[j][lane], isum[lane] as f32, a[lane]);
            }
        }
        if g.kind.has_mins() {
            let xsum = x.sums[x.sum_at(row, b * 8 + j)];
            for (a, m) in a.iter_mut().zip(&block.m[j]) {
                *a = fma::<FMA>(*m, xsum, *a);
            }
        }
    }
    if g.kind == Kind::Q6K {
        a = std::array::from_fn(|lane| whole[lane] as f32 * block.d[lane]);
    }
    let scale = x.scale[row * g.blocks + b];
    for (y, a) in y.iter_mut().zip(a) {
        *y = fma::<FMA>(a, scale, *y);
    }
}
