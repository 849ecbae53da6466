//! Activations prepared for integer products.
//!
//! Each block of 256 inputs is rounded to 12 bits, `x ≈ d · (16·hi + lo)` with `d = max|x| / 2032`,
//! `hi` in -127..=127 and `lo` in -8..=7: two signed bytes. Against the 8 bits a block of 32 that are
//! usual, the rounding error is a tenth or less. Integer sums over both levels are exact. The factor
//! of 16 is what lets one tile product take both levels of a four-bit weight, see [`super::amx`].

use crate::ThreadPool;
use crate::buffer::Buffer;
#[cfg(target_arch = "x86_64")]
use crate::cpu::{Cpu, Isa};
use crate::math::dispatch;
use crate::pool::SendPtr;

/// Rows that are stored together: the rows of an AMX tile.
pub(super) const TILE: usize = 16;
/// `hi` counts this many.
pub(super) const HIGH: i32 = 1 << HIGH_SHIFT;
pub(super) const HIGH_SHIFT: u32 = 4;
/// The largest magnitude of a rounded input: 127 · 16.
const LIMIT: f32 = 127.0 * HIGH as f32;
/// A block below this is zero; its reciprocal would overflow.
const TINY: f32 = 1e-34;

/// `m` rows of rounded inputs.
pub(super) struct Activations {
    pub(super) m: usize,
    pub(super) cols: usize,
    /// `[tile of 16 rows][group of 32][row]{ 32 hi, 32 lo }`; the last tile has fewer rows.
    levels: Buffer,
    /// The same as `[tile of 16 rows][step of 64][hi, lo][row][input]`, if it was asked for.
    wide: Buffer,
    /// Sum of the rounded inputs of each 16: `[row][cols / 16]`.
    pub(super) sums16: Vec<i32>,
    /// Sum of the rounded inputs of each 32: `[row][cols / 32]`.
    pub(super) sums32: Vec<i32>,
    /// The same as floats (exact): `[tile of 16 rows][group of 32][row]`, see [`Self::sum_at`].
    pub(super) sums: Vec<f32>,
    /// What a rounded input stands for: `[row][blocks of 256]`, rows up to a whole tile.
    pub(super) scale: Vec<f32>,
}

impl Default for Activations {
    fn default() -> Self {
        Activations {
            m: 0,
            cols: 0,
            levels: Buffer::new(0),
            wide: Buffer::new(0),
            sums16: Vec::new(),
            sums32: Vec::new(),
            sums: Vec::new(),
            scale: Vec::new(),
        }
    }
}

impl Activations {
    /// Rounds `x` (`[m][cols]`, `cols` a multiple of 32, or of 64 if [`Self::wide_tile`] is wanted).
    pub(super) fn prepare(
        &mut self,
        pool: &ThreadPool,
        x: &[f32],
        m: usize,
        cols: usize,
        wide: bool,
    ) {
        (self.m, self.cols) = (m, cols);
        let (groups, blocks) = (cols / 32, cols.div_ceil(256));
        // The tile unit reads a last tile as if it were full.
        self.levels.reserve(m * cols * 2 + TILE * 64);
        if wide {
            self.wide.reserve(m * cols * 2 + TILE * 64);
        }
        self.sums16.resize(m * groups * 2, 0);
        self.sums32.resize(m * groups, 0);
        let whole = m.next_multiple_of(TILE);
        self.sums.resize(whole * groups, 0.0);
        self.scale.resize(whole * blocks, 0.0);
        let rows = (16 * 1024 / cols.max(1)).max(1);
        let sums16 = SendPtr(self.sums16.as_mut_ptr());
        let sums32 = SendPtr(self.sums32.as_mut_ptr());
        let sums = SendPtr(self.sums.as_mut_ptr());
        let levels = SendPtr(self.levels.as_mut_ptr());
        let wides = wide.then(|| SendPtr(self.wide.as_mut_ptr()));
        pool.run_chunks(&mut self.scale[..m * blocks], rows * blocks.max(1), &|i, scale| {
            for (j, scale) in scale.chunks_exact_mut(blocks).enumerate() {
                let row = i * rows + j;
                let (tile, lane) = (row / TILE, row % TILE);
                let stride = (m - tile * TILE).min(TILE);
                // SAFETY: every offset is inside the buffers sized above and belongs to this row,
                // which only this task handles.
                let mut out = unsafe {
                    Row {
                        scale,
                        sums16: std::slice::from_raw_parts_mut(
                            sums16.at(row * groups * 2),
                            groups * 2,
                        ),
                        sums32: std::slice::from_raw_parts_mut(sums32.at(row * groups), groups),
                        sums: SendPtr(sums.at(tile * groups * TILE + lane)),
                        levels: SendPtr(levels.at((tile * TILE * groups + lane) * 64)),
                        wide: wides
                            .as_ref()
                            .map(|wide| SendPtr(wide.at((tile * TILE * groups + lane) * 64))),
                        stride: stride * 64,
                    }
                };
                round_row(&x[row * cols..][..cols], &mut out);
            }
        });
    }

    /// Where the float sum of a row's group of 32 is. Those of the next group follow [`TILE`] on, those
    /// of the next row of the tile one on.
    pub(super) fn sum_at(&self, row: usize, group: usize) -> usize {
        (row / TILE * (self.cols / 32) + group) * TILE + row % TILE
    }

    /// Where the levels of tile `tile` begin, and the bytes between its groups. The rows of a group
    /// follow each other, 64 bytes each.
    pub(super) fn tile(&self, tile: usize) -> (*const u8, usize) {
        let at = tile * TILE * (self.cols / 32) * 64;
        let rows = (self.m - tile * TILE).min(TILE);
        (self.levels.bytes()[at..].as_ptr(), rows * 64)
    }

    /// Where the levels of tile `tile` begin in steps of 64 inputs, and the bytes of one level of a step,
    /// whose rows follow each other. Its low level comes next, and then the next step.
    pub(super) fn wide_tile(&self, tile: usize) -> (*const u8, usize) {
        let at = tile * TILE * (self.cols / 32) * 64;
        let rows = (self.m - tile * TILE).min(TILE);
        (self.wide.bytes()[at..].as_ptr(), rows * 64)
    }

    /// The levels of a row's group of 32, high then low.
    pub(super) fn group(&self, row: usize, group: usize) -> &[u8] {
        let tile = row / TILE;
        let rows = (self.m - tile * TILE).min(TILE);
        let at = tile * TILE * (self.cols / 32) * 64 + group * rows * 64 + row % TILE * 64;
        &self.levels.bytes()[at..at + 64]
    }
}

struct Row<'a> {
    scale: &'a mut [f32],
    sums16: &'a mut [i32],
    sums32: &'a mut [i32],
    /// [`TILE`] from group to group.
    sums: SendPtr<f32>,
    levels: SendPtr<u8>,
    wide: Option<SendPtr<u8>>,
    /// Bytes between the groups of `levels`, and between the levels of `wide`.
    stride: usize,
}

impl Row<'_> {
    /// Where the high levels of group `group` go in `wide`; the low ones are a stride on.
    ///
    /// # Safety
    /// The row has the group.
    #[inline(always)]
    unsafe fn wide(&self, group: usize) -> Option<*mut u8> {
        // SAFETY: inside the row's levels.
        self.wide.as_ref().map(|w| unsafe { w.at(group / 2 * 2 * self.stride + group % 2 * 32) })
    }
}

/// Rounds a row: AVX-512 where there is one, else what the compiler makes of the plain version.
fn round_row(x: &[f32], out: &mut Row<'_>) {
    #[cfg(target_arch = "x86_64")]
    if Cpu::get().isa >= Isa::Avx512 {
        // SAFETY: the processor has AVX-512; `out` is as long as `x` asks for.
        return unsafe { avx512::round_row(x, out) };
    }
    round_plain(x, out);
}

#[inline(always)]
fn round_body<const FMA: bool>(x: &[f32], out: &mut Row<'_>) {
    // Adding this rounds to the nearest integer (ties to even) and leaves it in the low bits.
    const ROUND: f32 = 12_582_912.0;
    for (b, x) in x.chunks(256).enumerate() {
        let (groups, _) = x.as_chunks::<32>();
        let mut top = [0u32; 32];
        for g in groups {
            for (t, v) in top.iter_mut().zip(g) {
                // Magnitudes order like their bits, NaN and infinity last.
                *t = (*t).max(v.to_bits() & 0x7fff_ffff);
            }
        }
        let max = f32::from_bits(top.iter().fold(0, |a, t| a.max(*t)));
        let usable = max.is_finite() && max >= TINY;
        let inverse = if usable { LIMIT / max } else { 0.0 };
        out.scale[b] = match (usable, max.is_finite()) {
            (true, _) => max / LIMIT,
            (false, true) => 0.0,
            // What is not finite spoils the whole row, as it would in floats.
            (false, false) => f32::NAN,
        };
        for (j, g) in groups.iter().enumerate() {
            let at = b * 8 + j;
            let mut q = [0i32; 32];
            for (q, v) in q.iter_mut().zip(g) {
                let v = if usable { *v } else { 0.0 };
                *q = ((v * inverse + ROUND).to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
            }
            let mut levels = [0u8; 64];
            for i in 0..32 {
                let high = (q[i] + HIGH / 2) >> HIGH_SHIFT;
                levels[i] = high as u8;
                levels[32 + i] = (q[i] - (high << HIGH_SHIFT)) as u8;
            }
            // SAFETY: the group is inside the row's levels, which only this call writes.
            unsafe {
                out.levels.at(at * out.stride).cast::<[u8; 64]>().write(levels);
                if let Some(to) = out.wide(at) {
                    to.copy_from_nonoverlapping(levels.as_ptr(), 32);
                    to.add(out.stride).copy_from_nonoverlapping(levels[32..].as_ptr(), 32);
                }
            }
            let low: i32 = q[..16].iter().sum();
            let high: i32 = q[16..].iter().sum();
            (out.sums16[2 * at], out.sums16[2 * at + 1]) = (low, high);
            out.sums32[at] = low + high;
            // SAFETY: the group's sum, which only this call writes.
            unsafe { *out.sums.at(at * TILE) = (low + high) as f32 };
        }
    }
}
dispatch! { fn round_plain(x: &[f32], out: &mut Row<'_>) => round_body }

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use super::{HIGH, HIGH_SHIFT, LIMIT, Row, TILE, TINY};
    use std::arch::x86_64::*;

    /// The same as [`super::round_body`], bit for bit.
    ///
    /// # Safety
    /// AVX-512; `out` holds the groups and blocks of `x`.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    pub(super) unsafe fn round_row(x: &[f32], out: &mut Row<'_>) {
        for (b, x) in x.chunks(256).enumerate() {
            let (halves, _) = x.as_chunks::<16>();
            let magnitude = _mm512_set1_epi32(0x7fff_ffff);
            let mut top = _mm512_setzero_si512();
            for h in halves {
                // SAFETY: sixteen floats.
                let v = unsafe { _mm512_loadu_si512(h.as_ptr().cast()) };
                top = _mm512_max_epu32(top, _mm512_and_si512(v, magnitude));
            }
            let max = f32::from_bits(_mm512_reduce_max_epu32(top));
            let usable = max.is_finite() && max >= TINY;
            out.scale[b] = match (usable, max.is_finite()) {
                (true, _) => max / LIMIT,
                (false, true) => 0.0,
                (false, false) => f32::NAN,
            };
            let inverse = _mm512_set1_ps(if usable { LIMIT / max } else { 0.0 });
            let keep = if usable { u16::MAX } else { 0 };
            for (j, pair) in halves.chunks_exact(2).enumerate() {
                let at = b * 8 + j;
                let mut sum = [0; 2];
                for (i, h) in pair.iter().enumerate() {
                    // SAFETY: sixteen floats; the group's 64 bytes are inside the row's levels,
                    // which only this call writes.
                    unsafe {
                        let v = _mm512_maskz_loadu_ps(keep, h.as_ptr());
                        let q = _mm512_cvtps_epi32(_mm512_mul_ps(v, inverse));
                        let up = _mm512_add_epi32(q, _mm512_set1_epi32(HIGH / 2));
                        let high = _mm512_srai_epi32::<HIGH_SHIFT>(up);
                        let low = _mm512_sub_epi32(q, _mm512_slli_epi32::<HIGH_SHIFT>(high));
                        let to = out.levels.at(at * out.stride + i * 16);
                        let (high, low) = (_mm512_cvtepi32_epi8(high), _mm512_cvtepi32_epi8(low));
                        _mm_storeu_si128(to.cast(), high);
                        _mm_storeu_si128(to.add(32).cast(), low);
                        if let Some(to) = out.wide(at) {
                            _mm_storeu_si128(to.add(i * 16).cast(), high);
                            _mm_storeu_si128(to.add(i * 16 + out.stride).cast(), low);
                        }
                        sum[i] = _mm512_reduce_add_epi32(q);
                    }
                }
                (out.sums16[2 * at], out.sums16[2 * at + 1]) = (sum[0], sum[1]);
                out.sums32[at] = sum[0] + sum[1];
                // SAFETY: the group's sum, which only this call writes.
                unsafe { *out.sums.at(at * TILE) = (sum[0] + sum[1]) as f32 };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Rng;

    #[test]
    fn the_plain_version_gives_the_same_bytes() {
        let mut rng = Rng::new(22);
        for scale in [1e-40, 1e-3, 1.0, 1e30, f32::INFINITY] {
            let x = rng.floats(576, scale);
            let mut bytes = [vec![0u8; 1152], vec![0u8; 1152]];
            let mut wides = bytes.clone();
            let mut facts = Vec::new();
            for (plain, (bytes, wide)) in bytes.iter_mut().zip(&mut wides).enumerate() {
                let (mut scale, mut sums) = (vec![0.0; 3], vec![0.0; 18 * TILE]);
                let (mut sums16, mut sums32) = (vec![0; 36], vec![0; 18]);
                let mut row = Row {
                    scale: &mut scale,
                    sums16: &mut sums16,
                    sums32: &mut sums32,
                    sums: SendPtr(sums.as_mut_ptr()),
                    levels: SendPtr(bytes.as_mut_ptr()),
                    wide: Some(SendPtr(wide.as_mut_ptr())),
                    stride: 64,
                };
                if plain == 1 {
                    round_plain(&x, &mut row)
                } else {
                    round_row(&x, &mut row)
                }
                let scale: Vec<u32> = scale.iter().map(|v| v.to_bits()).collect();
                facts.push((scale, sums, sums16, sums32));
            }
            assert_eq!(bytes[0], bytes[1]);
            for (wides, groups) in wides[0].as_chunks::<128>().0.iter().zip(bytes[0].chunks(128)) {
                let of =
                    |at: usize| [&groups[at..at + 32], &groups[64 + at..64 + at + 32]].concat();
                assert_eq!(wides[..], [of(0), of(32)].concat());
            }
            assert_eq!(wides[0], wides[1]);
            assert_eq!(facts[0], facts[1]);
        }
    }

    #[test]
    fn rounds_to_twelve_bits() {
        let mut rng = Rng::new(21);
        let pool = ThreadPool::new(2);
        let mut a = Activations::default();
        for (m, cols) in [(1, 32), (3, 256), (17, 576), (40, 288)] {
            let mut x = rng.floats(m * cols, 3.0);
            x[0] = -1000.0;
            a.prepare(&pool, &x, m, cols, false);
            for row in 0..m {
                for g in 0..cols / 32 {
                    let scale = a.scale[row * cols.div_ceil(256) + g / 8];
                    let levels = a.group(row, g);
                    let mut sum = [0; 2];
                    for i in 0..32 {
                        let (hi, lo) = (levels[i] as i8, levels[32 + i] as i8);
                        assert!(hi > -128 && (-8..8).contains(&lo));
                        let q = i32::from(hi) * HIGH + i32::from(lo);
                        sum[i / 16] += q;
                        let v = x[row * cols + g * 32 + i];
                        assert!((q as f32 * scale - v).abs() <= scale * 0.502, "{v} {q} {scale}");
                    }
                    let at = row * (cols / 32) + g;
                    assert_eq!(sum, [a.sums16[2 * at], a.sums16[2 * at + 1]]);
                    assert_eq!(a.sums32[at], sum[0] + sum[1]);
                    assert_eq!(a.sums[a.sum_at(row, g)], (sum[0] + sum[1]) as f32);
                }
            }
        }
    }
}
