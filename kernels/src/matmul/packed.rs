//! The tiled layout of quantised weights.
//!
//! A panel holds 16 rows of `W`, row `n` in lane `n` of every 64-byte vector; a lane's four bytes
//! are four neighbouring inputs. That is at once the operand of VNNI's `vpdpbusd` (against four
//! broadcast activations; of Q8_0 once the signs are flipped) and a row of an AMX B tile. Sizes are
//! those of the file, up to padding.
//!
//! | type | layout of a block of 256 inputs (the last one of a row may be shorter) |
//! |---|---|
//! | Q8_0 | 16 f16 scales a group of 32; then its 8 vectors of signed bytes |
//! | Q4_0, Q4_1 | 16 f16 scales (and 16 minima) a group of 32; then its 4 vectors of nibbles |
//! | Q4_K | 16 d, 16 dmin, 12 scale bytes a lane as 3 vectors, 8 × 4 vectors of nibbles |
//! | Q6_K | 16 scale bytes a lane as 4 vectors, 16 × (2 vectors of low nibbles, 1 of high bit pairs); the d of all blocks, 16 each, come before the first |
//!
//! Everything lies in the order in which it is used, so that a product reads one stream.
//!
//! A vector of nibbles holds inputs `8j..8j+4` low and `8j+4..8j+8` high; a vector of bit pairs holds
//! inputs `4i..4i+4` at bits `2i`.

use super::PANEL;
use crate::buffer::{Arena, Buffer};
use crate::quant::{f16_at, q6_at, scale_min};
use crate::{DType, ThreadPool};
use std::ops::Range;

/// The types that have integer kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Q8_0,
    Q4_0,
    Q4_1,
    Q4K,
    Q6K,
}

impl Kind {
    pub(super) fn of(dtype: DType) -> Option<Kind> {
        match dtype {
            DType::Q8_0 => Some(Kind::Q8_0),
            DType::Q4_0 => Some(Kind::Q4_0),
            DType::Q4_1 => Some(Kind::Q4_1),
            DType::Q4_K => Some(Kind::Q4K),
            DType::Q6_K => Some(Kind::Q6K),
            _ => None,
        }
    }

    fn dtype(self) -> DType {
        match self {
            Kind::Q8_0 => DType::Q8_0,
            Kind::Q4_0 => DType::Q4_0,
            Kind::Q4_1 => DType::Q4_1,
            Kind::Q4K => DType::Q4_K,
            Kind::Q6K => DType::Q6_K,
        }
    }

    /// Inputs that share a scale.
    pub(super) fn group(self) -> usize {
        if self == Kind::Q6K { 16 } else { 32 }
    }

    /// What is subtracted from a stored value.
    pub(super) fn offset(self) -> i32 {
        match self {
            Kind::Q4_0 => 8,
            Kind::Q8_0 | Kind::Q4_1 | Kind::Q4K => 0,
            Kind::Q6K => 32,
        }
    }

    /// Up to so many rows the broadcast kernel beats the tile unit (measured).
    pub(super) fn few(self) -> usize {
        match self {
            Kind::Q8_0 | Kind::Q4_0 | Kind::Q4_1 | Kind::Q4K => 2,
            // A weight of two bytes takes longer to expand.
            Kind::Q6K => 5,
        }
    }

    /// Bytes of a group of a panel.
    pub(super) fn group_bytes(self) -> usize {
        match self {
            Kind::Q8_0 => 512,
            Kind::Q4_0 | Kind::Q4_1 | Kind::Q4K => 256,
            Kind::Q6K => 192,
        }
    }

    /// Bytes of the scales before the groups of a block of a panel.
    fn head_bytes(self, groups: usize) -> usize {
        match self {
            Kind::Q8_0 | Kind::Q4_0 => (groups * 32).next_multiple_of(64),
            Kind::Q4_1 => groups * 64,
            Kind::Q4K | Kind::Q6K => 256,
        }
    }

    pub(super) fn has_mins(self) -> bool {
        matches!(self, Kind::Q4_1 | Kind::Q4K)
    }
}

/// Where things are in a panel.
#[derive(Clone, Copy, Debug)]
pub(super) struct Geometry {
    pub(super) kind: Kind,
    pub(super) cols: usize,
    /// Blocks of 256 inputs, the last one perhaps shorter.
    pub(super) blocks: usize,
    /// Bytes of a panel.
    pub(super) panel_bytes: usize,
    /// Where the first block begins.
    first_block: usize,
    /// Bytes of a whole block.
    block_bytes: usize,
}

impl Geometry {
    pub(super) fn new(kind: Kind, cols: usize) -> Self {
        let blocks = cols.div_ceil(256);
        let bytes = |groups: usize| kind.head_bytes(groups) + groups * kind.group_bytes();
        let block_bytes = bytes(256 / kind.group());
        let first_block = if kind == Kind::Q6K { (blocks * 32).next_multiple_of(64) } else { 0 };
        let rest = match cols % 256 / kind.group() {
            0 => 0,
            groups => bytes(groups),
        };
        let panel_bytes = first_block + cols / 256 * block_bytes + rest;
        Geometry { kind, cols, blocks, panel_bytes, first_block, block_bytes }
    }

    /// Groups of block `block`.
    pub(super) fn groups(&self, block: usize) -> usize {
        (self.cols - block * 256).min(256) / self.kind.group()
    }

    /// Where block `block` has its scales (of Q6_K all but d).
    pub(super) fn scales_at(&self, block: usize) -> usize {
        self.first_block + block * self.block_bytes
    }

    /// Where block `block` has its first group; the others follow.
    pub(super) fn quants_at(&self, block: usize) -> usize {
        self.scales_at(block) + self.kind.head_bytes(self.groups(block))
    }

    /// Where group `group` of block `block` is.
    fn group_at(&self, block: usize, group: usize) -> usize {
        self.quants_at(block) + group * self.kind.group_bytes()
    }
}

/// Scales of one row in one block of 256, as they are stored.
pub(super) struct RowScales {
    /// Scale of each group.
    pub(super) s: [f32; 16],
    /// Minimum of each group.
    pub(super) m: [f32; 8],
    /// What scales and minima are multiplied with in turn.
    pub(super) d: f32,
    pub(super) dmin: f32,
}

/// A quantised matrix in panels.
pub(super) struct QuantTiles {
    pub(super) geometry: Geometry,
    rows: usize,
    data: Buffer,
}

impl QuantTiles {
    /// A matrix of zero bytes.
    pub(super) fn zeros(arena: Option<&Arena>, kind: Kind, rows: usize, cols: usize) -> Self {
        let geometry = Geometry::new(kind, cols);
        let data = Buffer::in_arena(arena, rows.div_ceil(PANEL) * geometry.panel_bytes);
        QuantTiles { geometry, rows, data }
    }

    /// Repacks whole rows in file order, from row `first` on, which begins a panel.
    pub(super) fn fill(&mut self, pool: &ThreadPool, first: usize, bytes: &[u8]) {
        let geometry = self.geometry;
        let (kind, dtype) = (geometry.kind, geometry.kind.dtype());
        let row_bytes = geometry.cols / dtype.block_len() * dtype.block_bytes();
        let size = geometry.panel_bytes;
        let count = bytes.len() / row_bytes.max(1);
        let panels = &mut self.data.bytes_mut()[first / PANEL * size..];
        let panels = &mut panels[..count.div_ceil(PANEL) * size];
        pool.run_chunks(panels, size.max(1), &|p, panel| {
            for lane in 0..PANEL.min(count - p * PANEL) {
                let row = &bytes[(p * PANEL + lane) * row_bytes..][..row_bytes];
                for (b, block) in row.chunks_exact(dtype.block_bytes()).enumerate() {
                    match kind {
                        Kind::Q4K => pack_q4k(&geometry, panel, lane, b, block),
                        Kind::Q6K => pack_q6k(&geometry, panel, lane, b, block),
                        _ => pack_legacy(&geometry, panel, lane, b, block),
                    }
                }
            }
        });
    }

    pub(super) fn dtype(&self) -> DType {
        self.geometry.kind.dtype()
    }

    pub(super) fn bytes(&self) -> usize {
        self.data.len()
    }

    pub(super) fn rows(&self) -> usize {
        self.rows
    }

    pub(super) fn panel(&self, panel: usize) -> &[u8] {
        self.panels(panel..panel + 1)
    }

    /// Which lanes of a panel are columns of the output: all but in the last one.
    pub(super) fn columns(&self, panel: usize) -> u16 {
        u16::MAX >> (PANEL - PANEL.min(self.rows - panel * PANEL))
    }

    pub(super) fn panels(&self, panels: Range<usize>) -> &[u8] {
        let bytes = self.geometry.panel_bytes;
        &self.data.bytes()[panels.start * bytes..panels.end * bytes]
    }

    /// Expands a row with ggml's own arithmetic.
    pub(super) fn row_f32(&self, row: usize, out: &mut [f32]) {
        let (g, lane) = (&self.geometry, row % PANEL);
        let panel = self.panel(row / PANEL);
        let size = g.kind.group();
        for (b, out) in out.chunks_mut(256).enumerate() {
            let scales = row_scales(g, panel, b, lane);
            for (j, out) in out.chunks_exact_mut(size).enumerate() {
                let q = &group_values(g, panel, b, j)[lane];
                for (o, q) in out.iter_mut().zip(q) {
                    let q = f32::from(*q);
                    *o = match g.kind {
                        Kind::Q8_0 | Kind::Q4_0 => q * scales.s[j],
                        Kind::Q4_1 => q * scales.s[j] + scales.m[j],
                        Kind::Q4K => scales.d * scales.s[j] * q - scales.dmin * scales.m[j],
                        Kind::Q6K => scales.d * scales.s[j] * q,
                    };
                }
            }
        }
    }
}

fn pack_nibbles(out: &mut [u8], lane: usize, values: &[u8]) {
    for (j, v) in values.chunks_exact(8).enumerate() {
        for t in 0..4 {
            out[j * 64 + lane * 4 + t] = (v[t] & 15) | (v[t + 4] << 4);
        }
    }
}

/// `b` counts groups here.
fn pack_legacy(g: &Geometry, panel: &mut [u8], lane: usize, b: usize, block: &[u8]) {
    let at = g.group_at(b / 8, b % 8);
    let scales = if g.kind == Kind::Q4_1 { 64 } else { 32 };
    let scale_at = g.scales_at(b / 8) + b % 8 * scales + lane * 2;
    panel[scale_at..scale_at + 2].copy_from_slice(&block[..2]);
    let mut values = [0u8; 32];
    match g.kind {
        Kind::Q8_0 => {
            for (i, q) in block[2..].chunks_exact(4).enumerate() {
                for t in 0..4 {
                    panel[at + i * 64 + lane * 4 + t] = q[t];
                }
            }
            return;
        }
        Kind::Q4_1 => panel[scale_at + 32..scale_at + 34].copy_from_slice(&block[2..4]),
        _ => {}
    }
    let q = &block[block.len() - 16..];
    for (i, q) in q.iter().enumerate() {
        values[i] = q & 15;
        values[i + 16] = q >> 4;
    }
    pack_nibbles(&mut panel[at..], lane, &values);
}

fn pack_q4k(g: &Geometry, panel: &mut [u8], lane: usize, b: usize, block: &[u8]) {
    let base = g.scales_at(b);
    panel[base + lane * 2..][..2].copy_from_slice(&block[..2]);
    panel[base + 32 + lane * 2..][..2].copy_from_slice(&block[2..4]);
    for i in 0..3 {
        panel[base + 64 + i * 64 + lane * 4..][..4].copy_from_slice(&block[4 + i * 4..][..4]);
    }
    for (pair, q) in block[16..].chunks_exact(32).enumerate() {
        let low: [u8; 32] = std::array::from_fn(|i| q[i] & 15);
        let high: [u8; 32] = std::array::from_fn(|i| q[i] >> 4);
        pack_nibbles(&mut panel[g.group_at(b, 2 * pair)..], lane, &low);
        pack_nibbles(&mut panel[g.group_at(b, 2 * pair + 1)..], lane, &high);
    }
}

fn pack_q6k(g: &Geometry, panel: &mut [u8], lane: usize, b: usize, block: &[u8]) {
    let base = g.scales_at(b);
    for i in 0..4 {
        panel[base + i * 64 + lane * 4..][..4].copy_from_slice(&block[192 + i * 4..][..4]);
    }
    panel[b * 32 + lane * 2..][..2].copy_from_slice(&block[208..210]);
    for j in 0..16 {
        let values: [u8; 16] = std::array::from_fn(|i| q6_at(block, j * 16 + i));
        let out = &mut panel[g.group_at(b, j)..];
        pack_nibbles(out, lane, &values);
        for t in 0..4 {
            let high = |i: usize| (values[4 * i + t] >> 4) << (2 * i);
            out[128 + lane * 4 + t] = high(0) | high(1) | high(2) | high(3);
        }
    }
}

/// The values of a group, offset removed: `[lane][input]`; the first 16 inputs of a Q6_K group.
pub(super) fn group_values(g: &Geometry, panel: &[u8], b: usize, j: usize) -> [[i8; 32]; PANEL] {
    let q = &panel[g.group_at(b, j)..];
    let mut out = [[0; 32]; PANEL];
    let offset = g.kind.offset();
    for (lane, out) in out.iter_mut().enumerate() {
        for (i, o) in out.iter_mut().enumerate().take(g.kind.group()) {
            let byte = |vector: usize| i32::from(q[vector * 64 + lane * 4 + i % 4]);
            let v = match g.kind {
                Kind::Q8_0 => i32::from(byte(i / 4) as i8),
                Kind::Q6K => {
                    let low = (byte(i / 8) >> (i / 4 % 2 * 4)) & 15;
                    low | (((byte(2) >> (i / 4 * 2)) & 3) << 4)
                }
                _ => (byte(i / 8) >> (i / 4 % 2 * 4)) & 15,
            };
            *o = (v - offset) as i8;
        }
    }
    out
}

/// The scales of lane `lane` in block `b`.
pub(super) fn row_scales(g: &Geometry, panel: &[u8], b: usize, lane: usize) -> RowScales {
    let mut out = RowScales { s: [0.0; 16], m: [0.0; 8], d: 1.0, dmin: 1.0 };
    let base = g.scales_at(b);
    match g.kind {
        Kind::Q8_0 | Kind::Q4_0 | Kind::Q4_1 => {
            let size = if g.kind == Kind::Q4_1 { 64 } else { 32 };
            for j in 0..g.groups(b) {
                let at = base + j * size + lane * 2;
                out.s[j] = f16_at(panel, at);
                if g.kind == Kind::Q4_1 {
                    out.m[j] = f16_at(panel, at + 32);
                }
            }
        }
        Kind::Q4K => {
            let byte = |i: usize| panel[base + 64 + i / 4 * 64 + lane * 4 + i % 4];
            let packed: [u8; 12] = std::array::from_fn(byte);
            out.d = f16_at(panel, base + lane * 2);
            out.dmin = f16_at(panel, base + 32 + lane * 2);
            for j in 0..8 {
                let (s, m) = scale_min(j, &packed);
                (out.s[j], out.m[j]) = (f32::from(s), f32::from(m));
            }
        }
        Kind::Q6K => {
            for (j, s) in out.s.iter_mut().enumerate() {
                *s = f32::from(panel[base + j / 4 * 64 + lane * 4 + j % 4] as i8);
            }
            out.d = f16_at(panel, b * 32 + lane * 2);
        }
    }
    out
}
