//! The tile unit: its configuration, products that are started one after the other, and the sums that
//! they leave.
//!
//! The unit, its loads, its stores and the vector unit all have about the same to do, so products are
//! started some groups before their sums are used, with four tiles of sums in turn.

use super::PANEL;
use super::activations::TILE;
use super::formats::Format;
use std::arch::asm;

/// Products between the start of one and the use of its sums: so long the tile unit takes, and its
/// stores to reach the cache.
pub(super) const LAG: usize = 6;
/// Tiles of sums that are kept.
pub(super) const RING: usize = 8;

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

/// Integer sums, as the tile unit stores them.
#[repr(C, align(64))]
pub(super) struct Ring([[[i32; PANEL]; TILE]; RING]);

/// Four tiles of sums.
pub(super) type Sums = [[[i32; PANEL]; TILE]; 4];

impl Ring {
    /// Two halves.
    pub(super) fn halves(&mut self) -> &mut [Sums; 2] {
        const { assert!(RING == 8) };
        let (halves, _) = self.0.as_chunks_mut();
        halves.try_into().expect("eight tiles")
    }

    /// The first slot; the others follow, 1 KB each.
    pub(super) fn start(&mut self) -> *mut u8 {
        self.0.as_mut_ptr().cast()
    }
}

impl Default for Ring {
    fn default() -> Self {
        Ring([[[0; PANEL]; TILE]; RING])
    }
}

/// Rows of a B tile and vectors of an expanded group.
pub(super) const fn depth<F: Format>() -> usize {
    if F::NIBBLES { 2 * F::VECTORS } else { F::VECTORS }
}

/// Products of a group.
pub(super) const fn products<F: Format>() -> usize {
    if F::NIBBLES { 1 } else { 2 }
}

/// Where level `level` of a row's group `group` is, in bytes, if groups are `stride` apart.
#[inline(always)]
pub(super) fn level_at(group: usize, level: usize, stride: usize) -> usize {
    group * stride + level * 32
}

/// `sums[i] = a · b` while `sums[i + 2]` of four go to `to`. Tiles 0 to 3 hold sums, 4 and 5 levels, 6
/// and 7 weights.
///
/// # Safety
/// The tiles are configured, the operands have their shape and `to` has room for a tile.
#[inline(always)]
pub(super) unsafe fn start<F: Format>(i: usize, a: *const u8, b: *const u8, to: *mut u8) {
    macro_rules! product {
        ($op:literal, $sums:literal, $a:literal, $b:literal, $before:literal) => {
            asm!(
                concat!("tileloadd ", $a, ", [{a} + {s}*1]"),
                concat!("tileloadd ", $b, ", [{b} + {s}*1]"),
                concat!("tilestored [{to} + {s}*1], ", $before),
                concat!("tilezero ", $sums),
                concat!($op, " ", $sums, ", ", $a, ", ", $b),
                a = in(reg) a,
                b = in(reg) b,
                to = in(reg) to,
                s = in(reg) 64usize,
                options(nostack),
            )
        };
    }
    macro_rules! turn {
        ($op:literal) => {
            match i {
                0 => product!($op, "tmm0", "tmm4", "tmm6", "tmm2"),
                1 => product!($op, "tmm1", "tmm5", "tmm7", "tmm3"),
                2 => product!($op, "tmm2", "tmm4", "tmm6", "tmm0"),
                _ => product!($op, "tmm3", "tmm5", "tmm7", "tmm1"),
            }
        };
    }
    // SAFETY: the caller's promises.
    unsafe {
        // Without an offset weights are unsigned: 16 times one may be 240.
        if F::SHIFT.is_none() { turn!("tdpbsud") } else { turn!("tdpbssd") }
    }
}

/// The store of [`start`] alone.
///
/// # Safety
/// As [`start`].
#[inline(always)]
pub(super) unsafe fn flush(i: usize, to: *mut u8) {
    macro_rules! store {
        ($before:literal) => {
            asm!(
                concat!("tilestored [{to} + {s}*1], ", $before),
                to = in(reg) to,
                s = in(reg) 64usize,
                options(nostack),
            )
        };
    }
    // SAFETY: the caller's promises.
    unsafe {
        match i {
            0 => store!("tmm2"),
            1 => store!("tmm3"),
            2 => store!("tmm0"),
            _ => store!("tmm1"),
        }
    }
}
