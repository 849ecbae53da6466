//! Activations prepared for integer products.
//!
//! A step is four inputs that lie together, a group eight steps. In each group the two steps with the
//! largest inputs have 12 bits, `x ≈ d · (16·hi + lo)` with `hi` in -127..=127 and `lo` in -8..=7; the
//! other six have 8, `x ≈ d · lo` with `lo` in -127..=127. All inputs of a block of 256 share `d`, so a
//! rounding error is the same small part of what is usual in a block wherever it is, and a few large
//! inputs do not spoil the others. (LLM.int8(), arXiv 2208.07339, keeps features with outliers apart in
//! the same spirit.) Six of eight products of the high level are zero: [`super::vnni_many`] leaves them
//! out. Integer sums over both levels are exact. The factor of 16 is what lets one tile product take
//! both levels of a four-bit weight, see [`super::amx`].

#[cfg(target_arch = "x86_64")]
use super::formats::Format;
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
/// The largest magnitude of a rounded input that has both levels: 127 · 16.
const LIMIT: f32 = LOW_LIMIT * HIGH as f32;
/// The same of one that has the low level alone.
const LOW_LIMIT: f32 = 127.0;
/// Inputs of a step, and steps of a group that have both levels.
const STEP: usize = 4;
const PICKS: usize = 2;
/// Weights are stored with their sign, or plus a multiple of this.
const UNIT: i32 = 1 << UNIT_SHIFT;
pub(super) const UNIT_SHIFT: u32 = 3;
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
    /// Sums of the rounded inputs of each 32, as floats (exact): `[tile of 16 rows][group of 32][row]`, see
    /// [`Self::sum_at`].
    pub(super) sums: Vec<f32>,
    /// What else is known of each 32, in the same place.
    pub(super) notes: Vec<Note>,
    /// What a rounded input stands for: `[row][blocks of 256]`, rows up to a whole tile.
    pub(super) scale: Vec<f32>,
}

/// What is known of 32 inputs of a row.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C, align(8))]
pub(super) struct Note {
    /// The sum of the rounded inputs times -8, which a sum of weights stored plus 8 begins with.
    pub(super) start: i32,
    /// The sum of the first half: at most 8 · 2032 + 8 · 127.
    first: i16,
    /// The steps that have both levels, 0 to 7, each once.
    pub(super) picks: [u8; PICKS],
}

impl Note {
    /// [`Note::start`] of one half.
    #[inline(always)]
    #[cfg(target_arch = "x86_64")]
    pub(super) fn half(self, half: usize) -> i32 {
        let first = -UNIT * i32::from(self.first);
        if half == 0 { first } else { self.start - first }
    }
}

impl Default for Activations {
    fn default() -> Self {
        Activations {
            m: 0,
            cols: 0,
            levels: Buffer::new(0),
            wide: Buffer::new(0),
            sums: Vec::new(),
            notes: Vec::new(),
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
        let whole = m.next_multiple_of(TILE);
        self.sums.resize(whole * groups, 0.0);
        self.notes.resize(whole * groups, Note::default());
        self.scale.resize(whole * blocks, 0.0);
        let rows = (16 * 1024 / cols.max(1)).max(1);
        let sums = SendPtr(self.sums.as_mut_ptr());
        let notes = SendPtr(self.notes.as_mut_ptr());
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
                    let first = tile * groups * TILE + lane;
                    Row {
                        scale,
                        sums: SendPtr(sums.at(first)),
                        notes: SendPtr(notes.at(first)),
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

    /// What the sum of products of group `j` of block `block` begins with, so that it ends as if weights were
    /// stored with their sign.
    ///
    /// # Safety
    /// Row, block and group exist.
    #[inline(always)]
    #[cfg(target_arch = "x86_64")]
    pub(super) unsafe fn start<F: Format>(&self, row: usize, block: usize, j: usize) -> i32 {
        // SAFETY: the caller's promise.
        let note = |group| unsafe { self.notes.get_unchecked(self.sum_at(row, block * 8 + group)) };
        match F::SHIFT {
            None => 0,
            Some(shift) if F::VECTORS == 4 => note(j / 2).half(j % 2) << (shift - UNIT_SHIFT),
            Some(shift) => note(j).start << (shift - UNIT_SHIFT),
        }
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

    /// A row's input as it was rounded.
    #[cfg(test)]
    pub(super) fn value(&self, row: usize, col: usize) -> f32 {
        let levels = self.group(row, col / 32);
        let (high, low) = (levels[col % 32] as i8, levels[32 + col % 32] as i8);
        let level = i32::from(high) * HIGH + i32::from(low);
        level as f32 * self.scale[row * self.cols.div_ceil(256) + col / 256]
    }
}

struct Row<'a> {
    scale: &'a mut [f32],
    /// These are [`TILE`] from group to group.
    sums: SendPtr<f32>,
    notes: SendPtr<Note>,
    levels: SendPtr<u8>,
    wide: Option<SendPtr<u8>>,
    /// Bytes between the groups of `levels`, and between the levels of `wide`.
    stride: usize,
}

impl Row<'_> {
    /// Writes what is known of group `group`: the sums of its halves, and its picks.
    ///
    /// # Safety
    /// The row has the group, and this call alone writes it.
    #[inline(always)]
    unsafe fn note(&mut self, group: usize, sums: [i32; 2], picks: [u8; PICKS]) {
        let note = Note { start: -UNIT * (sums[0] + sums[1]), first: sums[0] as i16, picks };
        // SAFETY: the caller's promises.
        unsafe {
            *self.sums.at(group * TILE) = (sums[0] + sums[1]) as f32;
            *self.notes.at(group * TILE) = note;
        }
    }

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

/// How a block is rounded: `scale` of a level, `inverse` of it, and whether the block counts.
#[derive(Clone, Copy)]
struct Grid {
    scale: f32,
    inverse: f32,
    usable: bool,
}

/// The finest grid for a block whose largest magnitude is `max` and, outside the picked steps, `rest`.
fn grid(max: f32, rest: f32) -> Grid {
    if !max.is_finite() {
        // What is not finite spoils the whole row, as it would in floats.
        return Grid { scale: f32::NAN, inverse: 0.0, usable: false };
    }
    if max < TINY {
        return Grid { scale: 0.0, inverse: 0.0, usable: false };
    }
    let (top, limit) = if rest * HIGH as f32 > max { (rest, LOW_LIMIT) } else { (max, LIMIT) };
    Grid { scale: top / limit, inverse: limit / top, usable: true }
}

/// The two steps of a group with the largest magnitudes `tops` (as bits), the earlier ones of equals, and
/// the three largest magnitudes: theirs, and the largest outside.
#[inline(always)]
fn pick(tops: [i32; 8]) -> ([u8; PICKS], [i32; 3]) {
    let (mut picks, [mut first, mut second, mut third]) = ([0; PICKS], [-1; 3]);
    for (step, top) in tops.into_iter().enumerate() {
        picks = match (top > first, top > second) {
            (true, _) => [step as u8, picks[0]],
            (_, true) => [picks[0], step as u8],
            _ => picks,
        };
        third = third.max(second.min(top));
        second = second.max(first.min(top));
        first = first.max(top);
    }
    (picks, [first, second, third])
}

#[inline(always)]
fn round_body<const FMA: bool>(x: &[f32], out: &mut Row<'_>) {
    // Adding this rounds to the nearest integer (ties to even) and leaves it in the low bits.
    const ROUND: f32 = 12_582_912.0;
    for (b, x) in x.chunks(256).enumerate() {
        let (groups, _) = x.as_chunks::<32>();
        let (mut max, mut rest) = (0, 0);
        let mut picks = [[0; PICKS]; 8];
        for (picks, g) in picks.iter_mut().zip(groups) {
            // Magnitudes order like their bits, NaN and infinity last.
            let magnitude = |i: usize| (g[i].to_bits() & 0x7fff_ffff) as i32;
            let tops = std::array::from_fn(|step| {
                (0..STEP).fold(0, |top, i| top.max(magnitude(step * STEP + i)))
            });
            let found;
            (*picks, found) = pick(tops);
            (max, rest) = (max.max(found[0]), rest.max(found[2]));
        }
        let Grid { scale, inverse, usable } =
            grid(f32::from_bits(max as u32), f32::from_bits(rest as u32));
        out.scale[b] = scale;
        for (j, (g, picks)) in groups.iter().zip(picks).enumerate() {
            let at = b * 8 + j;
            let mut q = [0i32; 32];
            for (q, v) in q.iter_mut().zip(g) {
                let v = if usable { *v } else { 0.0 };
                *q = ((v * inverse + ROUND).to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
            }
            let mut levels = [0u8; 64];
            for i in 0..32 {
                let picked = picks.contains(&((i / STEP) as u8));
                let high = if picked { (q[i] + HIGH / 2) >> HIGH_SHIFT } else { 0 };
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
            // SAFETY: the row has the group, and only this call writes it.
            unsafe { out.note(at, [low, high], picks) };
        }
    }
}
dispatch! { fn round_plain(x: &[f32], out: &mut Row<'_>) => round_body }

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use super::{Grid, HIGH, HIGH_SHIFT, Row, grid};
    use std::arch::x86_64::*;

    /// The same as [`super::round_body`], bit for bit.
    ///
    /// # Safety
    /// AVX-512; `out` holds the groups and blocks of `x`.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    pub(super) unsafe fn round_row(x: &[f32], out: &mut Row<'_>) {
        for (b, x) in x.chunks(256).enumerate() {
            let (groups, _) = x.as_chunks::<32>();
            let (picks, max, rest) = pick(groups);
            let Grid { scale, inverse, usable } = grid(max, rest);
            out.scale[b] = scale;
            let keep = if usable { u16::MAX } else { 0 };
            for (j, g) in groups.iter().enumerate() {
                let of = |v: &[i32; 8]| _mm512_set1_epi32(v[j]);
                let (first, second) = (of(&picks[0]), of(&picks[1]));
                let at = b * 8 + j;
                let mut high = [_mm_setzero_si128(); 2];
                let mut low = high;
                for half in 0..2 {
                    // SAFETY: sixteen floats.
                    let v = unsafe { _mm512_maskz_loadu_ps(keep, g[half * 16..].as_ptr()) };
                    let q = _mm512_cvtps_epi32(_mm512_mul_ps(v, _mm512_set1_ps(inverse)));
                    let step = _mm512_add_epi32(
                        _mm512_set1_epi32(4 * half as i32),
                        _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0),
                    );
                    let picked = _mm512_cmpeq_epi32_mask(step, first)
                        | _mm512_cmpeq_epi32_mask(step, second);
                    let up = _mm512_add_epi32(q, _mm512_set1_epi32(HIGH / 2));
                    let h = _mm512_maskz_srai_epi32::<HIGH_SHIFT>(picked, up);
                    let l = _mm512_sub_epi32(q, _mm512_slli_epi32::<HIGH_SHIFT>(h));
                    (high[half], low[half]) = (_mm512_cvtepi32_epi8(h), _mm512_cvtepi32_epi8(l));
                }
                let high = _mm256_set_m128i(high[1], high[0]);
                let low = _mm256_set_m128i(low[1], low[0]);
                // SAFETY: the group's 64 bytes are inside the row's levels, which only this call
                // writes.
                unsafe {
                    let to = out.levels.at(at * out.stride);
                    _mm256_storeu_si256(to.cast(), high);
                    _mm256_storeu_si256(to.add(32).cast(), low);
                    if let Some(to) = out.wide(at) {
                        _mm256_storeu_si256(to.cast(), high);
                        _mm256_storeu_si256(to.add(out.stride).cast(), low);
                    }
                }
                // Sums of two inputs, at most 2 · (16 · 127 + 127), of four, eight and sixteen.
                let high = _mm256_maddubs_epi16(_mm256_set1_epi8(HIGH as i8), high);
                let low = _mm256_maddubs_epi16(_mm256_set1_epi8(1), low);
                let sums = _mm256_madd_epi16(_mm256_add_epi16(high, low), _mm256_set1_epi16(1));
                let sums = _mm_hadd_epi32(
                    _mm256_castsi256_si128(sums),
                    _mm256_extracti128_si256::<1>(sums),
                );
                let sums = _mm_cvtsi128_si64(_mm_hadd_epi32(sums, sums));
                let picks = [picks[0][j] as u8, picks[1][j] as u8];
                // SAFETY: the row has the group, and only this call writes it.
                unsafe { out.note(at, [sums as i32, (sums >> 32) as i32], picks) };
            }
        }
    }

    /// [`super::pick`] for all groups of a block: the picks by their rank, and the block's largest
    /// magnitudes, of all and outside the picks.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn pick(groups: &[[f32; 32]]) -> ([[i32; 8]; 2], f32, f32) {
        let even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
        let odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
        // The larger of each two that lie together.
        let halve = |a, b| {
            let (even, odd) =
                (_mm512_permutex2var_epi32(a, even, b), _mm512_permutex2var_epi32(a, odd, b));
            _mm512_max_epi32(even, odd)
        };
        let mut tops = [_mm512_setzero_si512(); 8];
        for (top, g) in tops.iter_mut().zip(groups) {
            let magnitude = _mm512_set1_epi32(0x7fff_ffff);
            let at = g.as_ptr();
            // SAFETY: two times sixteen floats.
            let (a, b) =
                unsafe { (_mm512_loadu_si512(at.cast()), _mm512_loadu_si512(at.add(16).cast())) };
            *top = halve(_mm512_and_si512(a, magnitude), _mm512_and_si512(b, magnitude));
        }
        // Two groups each, their eight steps one behind the other.
        let mut two = [_mm512_setzero_si512(); 4];
        for (two, tops) in two.iter_mut().zip(tops.as_chunks::<2>().0) {
            *two = halve(tops[0], tops[1]);
        }
        // Four steps of four groups, step by step: of the first four groups, then of the others.
        let four = |from: i32, a, b| {
            let lane = _mm512_set_epi32(27, 19, 11, 3, 26, 18, 10, 2, 25, 17, 9, 1, 24, 16, 8, 0);
            _mm512_permutex2var_epi32(a, _mm512_add_epi32(lane, _mm512_set1_epi32(from)), b)
        };
        let none = _mm256_set1_epi32(-1);
        let (mut first, mut second, mut third) = (none, none, none);
        let mut picks = [none; 2];
        for from in [0, 4] {
            let (a, b) = (four(from, two[0], two[1]), four(from, two[2], two[3]));
            // Two steps of all eight groups.
            let steps = [
                _mm512_permutex2var_epi64(a, _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0), b),
                _mm512_permutex2var_epi64(a, _mm512_set_epi64(15, 14, 7, 6, 13, 12, 5, 4), b),
            ];
            for i in 0..4 {
                let both = steps[i / 2];
                let top = match i % 2 {
                    0 => _mm512_castsi512_si256(both),
                    _ => _mm512_extracti64x4_epi64::<1>(both),
                };
                let step = _mm256_set1_epi32(from + i as i32);
                let over_first = _mm256_cmpgt_epi32_mask(top, first);
                let over_second = _mm256_cmpgt_epi32_mask(top, second);
                picks[1] = _mm256_mask_mov_epi32(picks[1], over_second, step);
                picks[1] = _mm256_mask_mov_epi32(picks[1], over_first, picks[0]);
                picks[0] = _mm256_mask_mov_epi32(picks[0], over_first, step);
                third = _mm256_max_epi32(third, _mm256_min_epi32(second, top));
                second = _mm256_max_epi32(second, _mm256_min_epi32(first, top));
                first = _mm256_max_epi32(first, top);
            }
        }
        let mut out = [[0; 8]; 2];
        for (out, picks) in out.iter_mut().zip(picks) {
            // SAFETY: eight integers.
            unsafe { _mm256_storeu_si256(out.as_mut_ptr().cast(), picks) };
        }
        let most = |v| _mm512_reduce_max_epi32(_mm512_zextsi256_si512(v));
        (out, f32::from_bits(most(first) as u32), f32::from_bits(most(third) as u32))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Rng;

    #[test]
    fn the_plain_version_gives_the_same_bytes() {
        let mut rng = Rng::new(22);
        let scales = [0.0, 1e-40, TINY, 1e-3, 1.0, 1e30, 5e37, f32::INFINITY];
        let mut all: Vec<Vec<f32>> = scales.map(|scale| rng.floats(576, scale)).to_vec();
        // Ties of picks and of what is left; a block whose two limits meet; single values that are not.
        all.push((0..576).map(|_| rng.below(3) as f32 - 1.0).collect());
        all.push((0..576).map(|i| if i % 32 < 8 { -16.0 } else { 1.0 }).collect());
        for odd in [f32::NAN, f32::INFINITY, f32::MAX, -0.0] {
            let mut x = rng.floats(576, 1.0);
            x[300] = odd;
            all.push(x);
        }
        for x in all {
            let mut bytes = [vec![0u8; 1152], vec![0u8; 1152]];
            let mut wides = bytes.clone();
            let mut facts = Vec::new();
            for (plain, (bytes, wide)) in bytes.iter_mut().zip(&mut wides).enumerate() {
                let (mut scale, mut sums) = (vec![0.0; 3], vec![0.0; 18 * TILE]);
                let mut notes = vec![Note::default(); 18 * TILE];
                let mut row = Row {
                    scale: &mut scale,
                    sums: SendPtr(sums.as_mut_ptr()),
                    notes: SendPtr(notes.as_mut_ptr()),
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
                facts.push((scale, sums, notes));
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
    fn picks_the_two_largest() {
        for (tops, picks, most) in [
            ([0; 8], [0, 1], [0; 3]),
            ([5, 0, 0, 0, 0, 0, 0, 0], [0, 1], [5, 0, 0]),
            ([0, 0, 0, 0, 0, 0, 0, 5], [7, 0], [5, 0, 0]),
            ([1, 2, 3, 4, 5, 6, 7, 8], [7, 6], [8, 7, 6]),
            ([8, 7, 6, 5, 4, 3, 2, 1], [0, 1], [8, 7, 6]),
            ([3, 9, 9, 1, 9, 2, 0, 0], [1, 2], [9, 9, 9]),
            ([1, 9, 4, 4, 3, 4, 0, 0], [1, 2], [9, 4, 4]),
        ] {
            assert_eq!(pick(tops), (picks, most), "{tops:?}");
        }
    }

    /// Two steps of a group have both levels, the others the low one; the step is the finest that holds
    /// them all.
    #[test]
    fn rounds_to_a_common_step() {
        let mut rng = Rng::new(21);
        let pool = ThreadPool::new(2);
        let mut a = Activations::default();
        for (m, cols, outlier) in [(1, 32, 3.0), (3, 256, 20.0), (17, 576, 1000.0), (40, 288, 0.0)]
        {
            let mut x = rng.floats(m * cols, 3.0);
            // Two steps of the first group may stand out at no cost, a third may not.
            (x[0], x[5]) = (-outlier, outlier / 2.0);
            if m > 1 {
                (x[cols], x[cols + 5], x[cols + 9]) = (outlier, -outlier, outlier);
            }
            a.prepare(&pool, &x, m, cols, false);
            for row in 0..m {
                for g in 0..cols / 32 {
                    let scale = a.scale[row * cols.div_ceil(256) + g / 8];
                    let levels = a.group(row, g);
                    let note = a.notes[a.sum_at(row, g)];
                    let picks = note.picks;
                    assert!(picks[0] != picks[1]);
                    let mut sum = [0; 2];
                    for i in 0..32 {
                        let (hi, lo) = (levels[i] as i8, levels[32 + i] as i8);
                        let both = picks.contains(&((i / STEP) as u8));
                        assert!(hi > -128 && lo > -128);
                        assert!(if both { (-8..8).contains(&lo) } else { hi == 0 });
                        let q = i32::from(hi) * HIGH + i32::from(lo);
                        sum[i / 16] += q;
                        let v = x[row * cols + g * 32 + i];
                        assert!((q as f32 * scale - v).abs() <= scale * 0.502, "{v} {q} {scale}");
                    }
                    let at = a.sum_at(row, g);
                    assert_eq!([note.half(0), note.half(1)], sum.map(|sum| -8 * sum));
                    assert_eq!(note.start, -8 * (sum[0] + sum[1]));
                    assert_eq!(a.sums[at], (sum[0] + sum[1]) as f32);
                }
                for (b, x) in x[row * cols..][..cols].chunks(256).enumerate() {
                    let (mut largest, mut third) = (0f32, 0f32);
                    for group in x.chunks(32) {
                        let largest_of = |s: &[f32]| s.iter().fold(0f32, |a, v| a.max(v.abs()));
                        let mut tops: Vec<f32> = group.chunks(STEP).map(largest_of).collect();
                        tops.sort_by(|a, b| b.total_cmp(a));
                        (largest, third) = (largest.max(tops[0]), third.max(tops[2]));
                    }
                    let expected = (largest / LIMIT).max(third / LOW_LIMIT);
                    let scale = a.scale[row * cols.div_ceil(256) + b];
                    assert!((scale / expected - 1.0).abs() < 1e-6, "{scale} {expected}");
                }
            }
        }
    }
}
