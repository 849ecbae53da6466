//! Cuts products into pieces and hands each to its kernel.

use super::activations::{Activations, TILE};
use super::halves::{Halves, Rounded};
use super::packed::{Kind, QuantTiles};
use super::{Matrix, Out, PANEL, Store, int};
use crate::cpu::{Cpu, Isa};
use crate::pool::SendPtr;
use crate::{DType, ThreadPool};
use std::cell::Cell;
use std::ops::Range;

/// Rows that are multiplied together; their activations stay in the cache meanwhile.
const ROWS: usize = 256;
/// Pieces a thread gets of a job at least, so that a late thread holds nobody up.
const PIECES: usize = 4;

/// From so many rows on a block that is expanded once for all of them is worth its way through the
/// cache (measured).
const MANY: usize = 8;

/// Some panels (or units of them) of one product, for some rows.
struct Piece {
    product: usize,
    panels: Range<usize>,
    rows: Range<usize>,
}

/// Inputs in the form that kernels want, kept by the calling thread.
#[derive(Default)]
struct Prepared {
    levels: Activations,
    halves: Halves,
    rounded: Rounded,
    pieces: Vec<Piece>,
}

thread_local! {
    static PREPARED: Cell<Option<Box<Prepared>>> = const { Cell::new(None) };
}

/// Runs all products; lengths have been checked and `m > 0`.
pub(super) fn run(
    isa: Isa,
    pool: &ThreadPool,
    x: &[f32],
    m: usize,
    products: &mut [(&Matrix, &mut [f32])],
) {
    let mut own = PREPARED.take().unwrap_or_default();
    let Prepared { levels, halves, rounded, pieces } = &mut *own;
    let cols = products.first().map_or(0, |(w, _)| w.cols());
    if products.iter().any(|(w, _)| matches!(w.store, Store::Quant(_))) {
        let wide = isa >= Isa::Amx
            && m > Kind::Q6K.few()
            && products.iter().any(|(w, _)| w.dtype() == DType::Q6_K);
        levels.prepare(pool, x, m, cols, wide);
    }
    if products.iter().any(|(w, _)| w.dtype() == DType::BF16) {
        match way(isa, DType::BF16) {
            Float::Tiles => halves.prepare(pool, x, m, cols),
            Float::Dots => rounded.prepare(pool, x, m, cols),
            Float::Single => {}
        }
    }
    cut(isa, pool.threads(), m, products, pieces);
    let outs: Vec<_> = products
        .iter_mut()
        .map(|(w, y)| (&w.store, Out { ptr: SendPtr(y.as_mut_ptr()), stride: w.rows }))
        .collect();
    pool.run(pieces.len(), &|i| {
        let Piece { product, panels, rows } = &pieces[i];
        let (store, out) = outs[*product];
        // SAFETY: inputs and outputs have the lengths of the product; pieces of a product differ in
        // columns or rows; `isa` is at most the processor's.
        unsafe {
            match store {
                Store::Float(t) => match way(isa, t.dtype()) {
                    #[cfg(target_arch = "x86_64")]
                    Float::Tiles => {
                        super::amx_bf16::multiply(t, halves, panels.clone(), rows.clone(), out);
                    }
                    #[cfg(target_arch = "x86_64")]
                    Float::Dots => {
                        super::bf16::multiply(t, rounded, panels.clone(), rows.clone(), out);
                    }
                    _ => {
                        for unit in panels.clone() {
                            t.multiply(isa, unit, x, m, out);
                        }
                    }
                },
                Store::Quant(t) => quant(isa, t, levels, panels.clone(), rows.clone(), out),
            }
        }
    });
    PREPARED.set(Some(own));
}

/// # Safety
/// `out` has the rows of `x` and the columns of `w`, `rows` begins at a tile, nobody else writes this
/// piece, and the processor has `isa`.
unsafe fn quant(
    isa: Isa,
    w: &QuantTiles,
    x: &Activations,
    panels: Range<usize>,
    rows: Range<usize>,
    out: Out,
) {
    #[cfg(target_arch = "x86_64")]
    {
        if isa >= Isa::Amx && rows.len() > w.geometry.kind.few() {
            // SAFETY: the caller's promises.
            return unsafe { super::amx::multiply(w, x, panels, rows, out) };
        }
        if isa >= Isa::Vnni && rows.len() >= MANY {
            // SAFETY: the caller's promises.
            return unsafe { super::vnni_many::multiply(w, x, panels, rows, out) };
        }
        if isa >= Isa::Vnni {
            // SAFETY: the caller's promises.
            return unsafe { super::vnni::multiply(w, x, panels, rows, out) };
        }
        if isa >= Isa::Avx2 {
            // SAFETY: the caller's promises.
            return unsafe { super::avx2::multiply(w, x, panels, rows, out) };
        }
    }
    // SAFETY: the caller's promises.
    unsafe { int::plain::<false>(w, x, panels, rows, out) }
}

/// How weights that are not quantised are multiplied.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Float {
    /// In f32.
    Single,
    /// In bf16 by dot products of AVX-512.
    Dots,
    /// In bf16 by the tile unit.
    Tiles,
}

pub(super) fn way(isa: Isa, dtype: DType) -> Float {
    match dtype {
        DType::BF16 if isa >= Isa::Amx => Float::Tiles,
        DType::BF16 if isa >= Isa::Vnni && Cpu::get().avx512_bf16 => Float::Dots,
        _ => Float::Single,
    }
}

fn cut(
    isa: Isa,
    threads: usize,
    m: usize,
    products: &[(&Matrix, &mut [f32])],
    pieces: &mut Vec<Piece>,
) {
    pieces.clear();
    let steps = m.div_ceil(ROWS);
    let rows = m.div_ceil(steps).next_multiple_of(TILE);
    let panels: usize = products.iter().map(|(w, _)| w.rows.div_ceil(PANEL)).sum();
    let most = (panels * steps).div_ceil(PIECES * threads).max(1);
    for (product, (w, _)) in products.iter().enumerate() {
        match &w.store {
            Store::Float(t) if way(isa, w.dtype()) == Float::Single => {
                pieces.extend((0..t.units()).map(|u| Piece {
                    product,
                    panels: u..u + 1,
                    rows: 0..m,
                }));
            }
            _ => {
                let all = w.rows.div_ceil(PANEL);
                // Kernels take panels two by two or four by four.
                let most = most.next_multiple_of(2);
                for row in (0..m).step_by(rows) {
                    for p in (0..all).step_by(most) {
                        let panels = p..(p + most).min(all);
                        pieces.push(Piece { product, panels, rows: row..(row + rows).min(m) });
                    }
                }
            }
        }
    }
}
