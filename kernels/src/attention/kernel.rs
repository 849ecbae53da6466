//! The inner loops: a block of queries that share one KV head, over all keys in reach.

use super::kv::Elements;
use super::lanes::Element;
use super::{KvPool, SEGMENT, lanes};
#[cfg(target_arch = "x86_64")]
use crate::cpu::{Cpu, Isa};
use crate::math::{exp, tanh};
use std::cell::Cell;
use std::ops::Range;

/// Queries (rows times heads) a block holds at most.
pub(super) const QUERIES: usize = 36;
/// Keys that are scored together: a vector of lanes; pages are whole multiples of it.
pub(super) const LANES: usize = 16;
/// Keys whose weights are computed together.
pub(super) const KEYS: usize = 64;
/// Keys whose scores are computed side by side where they serve many queries.
const PAIR: usize = 2 * LANES;
/// From so many queries on keys and values are widened once for all of them.
const MANY: usize = 12;
/// Bytes that come from memory together.
const CACHE_LINE: usize = 64;

/// `rows` neighbouring positions from `first` on, `heads` neighbouring query heads each.
pub(super) struct Block<'a> {
    pub(super) kv: &'a KvPool,
    pub(super) layer: usize,
    pub(super) kv_head: usize,
    pub(super) pages: &'a [u32],
    pub(super) scale: f32,
    pub(super) softcap: Option<f32>,
    pub(super) window: usize,
    pub(super) first: usize,
    pub(super) rows: usize,
    pub(super) heads: usize,
}

/// A partial softmax of each query of a block: running maximum, sum of weights, weighted values.
#[derive(Default)]
struct Partial {
    max: Vec<f32>,
    sum: Vec<f32>,
    /// `[queries][head_dim]`
    acc: Vec<f32>,
}

/// What a block of keys adds to each query's partial softmax.
#[derive(Default)]
struct BlockSums {
    /// The running maximum with the block.
    max: Vec<f32>,
    /// The sum of the block's weights.
    sum: Vec<f32>,
    /// What earlier weights are multiplied with.
    factor: Vec<f32>,
}

/// Buffers of one block, reused by the thread.
#[derive(Default)]
pub(super) struct State {
    head_dim: usize,
    /// Scaled queries, `[queries][head_dim]`.
    q: Vec<f32>,
    scores: Vec<[f32; KEYS]>,
    /// Keys `[head_dim][PAIR]` or values `[LANES][head_dim]`, widened.
    wide: Vec<f32>,
    /// Keys `from..to` of the current block that each query sees.
    seen: Vec<(usize, usize)>,
    block: BlockSums,
    segment: Partial,
    total: Partial,
}

thread_local! {
    static SPARE: Cell<Option<Box<State>>> = const { Cell::new(None) };
}

impl State {
    pub(super) fn take() -> Box<State> {
        SPARE.take().unwrap_or_default()
    }

    pub(super) fn give_back(self: Box<Self>) {
        SPARE.set(Some(self));
    }

    /// The attention of query `i`.
    pub(super) fn result(&self, i: usize, out: &mut [f32]) {
        let inverse = 1.0 / self.total.sum[i];
        for (o, a) in out.iter_mut().zip(&self.total.acc[i * self.head_dim..]) {
            *o = a * inverse;
        }
    }
}

impl Partial {
    fn reset(&mut self, queries: usize, head_dim: usize) {
        self.max.clear();
        self.max.resize(queries, f32::NEG_INFINITY);
        self.sum.clear();
        self.sum.resize(queries, 0.0);
        self.acc.clear();
        self.acc.resize(queries * head_dim, 0.0);
    }
}

impl Block<'_> {
    /// Attends all queries; query `r * heads + h` begins at `q[r * stride + h * head_dim]`.
    pub(super) fn attend(&self, q: &[f32], stride: usize, state: &mut State) {
        let dim = self.kv.shape().head_dim;
        let queries = self.rows * self.heads;
        state.head_dim = dim;
        state.q.clear();
        for r in 0..self.rows {
            let row = &q[r * stride..][..self.heads * dim];
            state.q.extend(row.iter().map(|v| v * self.scale));
        }
        state.scores.resize(queries, [0.0; KEYS]);
        state.seen.resize(queries, (0, 0));
        state.wide.resize(dim * PAIR, 0.0);
        let BlockSums { max, sum, factor } = &mut state.block;
        [max, sum, factor].into_iter().for_each(|of_block| of_block.resize(queries, 0.0));
        state.total.reset(queries, dim);
        let end = self.first + self.rows;
        let begin = (self.first + 1).saturating_sub(self.window);
        for segment in begin / SEGMENT..end.div_ceil(SEGMENT) {
            let from = begin.max(segment * SEGMENT) / KEYS;
            let to = end.min((segment + 1) * SEGMENT).div_ceil(KEYS);
            state.segment.reset(queries, dim);
            attend_keys(self, from, to, state);
            join(state);
        }
    }

    /// Which of the 64 keys from `at` on the query at `position` sees.
    fn seen(&self, position: usize, at: usize) -> (usize, usize) {
        let from = (position + 1).saturating_sub(self.window).saturating_sub(at).min(KEYS);
        let to = (position + 1).saturating_sub(at).min(KEYS);
        (from, to.max(from))
    }
}

/// Adds the segment's partial softmax to the total.
fn join(state: &mut State) {
    let (part, total, dim) = (&state.segment, &mut state.total, state.head_dim);
    for i in 0..part.max.len() {
        if part.max[i] == f32::NEG_INFINITY && part.sum[i] == 0.0 {
            continue;
        }
        let (acc, add) = (&mut total.acc[i * dim..][..dim], &part.acc[i * dim..][..dim]);
        if total.max[i] == f32::NEG_INFINITY && total.sum[i] == 0.0 {
            (total.max[i], total.sum[i]) = (part.max[i], part.sum[i]);
            acc.copy_from_slice(add);
            continue;
        }
        let max = total.max[i].max(part.max[i]);
        let (a, b) = ((total.max[i] - max).exp(), (part.max[i] - max).exp());
        (total.max[i], total.sum[i]) = (max, total.sum[i] * a + part.sum[i] * b);
        for (t, p) in acc.iter_mut().zip(add) {
            *t = *t * a + p * b;
        }
    }
}

/// Attends the key blocks `from..to` (64 positions each) into the segment.
fn attend_keys(block: &Block<'_>, from: usize, to: usize, state: &mut State) {
    match block.kv.elements() {
        Elements::Single(data) => attend_data(block, data, from, to, state),
        Elements::Half(data) => attend_data(block, data, from, to, state),
    }
}

fn attend_data<E: Element>(
    block: &Block<'_>,
    data: &[E],
    from: usize,
    to: usize,
    state: &mut State,
) {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
        fn avx512<E: Element>(
            block: &Block<'_>,
            data: &[E],
            from: usize,
            to: usize,
            state: &mut State,
        ) {
            keys::<lanes::Avx512, true, E>(block, data, from, to, state);
        }
        #[target_feature(enable = "avx2,fma")]
        fn avx2<E: Element>(
            block: &Block<'_>,
            data: &[E],
            from: usize,
            to: usize,
            state: &mut State,
        ) {
            keys::<lanes::Plain<true>, true, E>(block, data, from, to, state);
        }
        let isa = Cpu::get().isa;
        if isa >= Isa::Avx512 {
            // SAFETY: the processor has these features.
            return unsafe { avx512(block, data, from, to, state) };
        }
        if isa >= Isa::Avx2 {
            // SAFETY: the processor has these features.
            return unsafe { avx2(block, data, from, to, state) };
        }
    }
    keys::<lanes::Plain<false>, false, E>(block, data, from, to, state);
}

#[inline(always)]
fn keys<L: lanes::Lanes, const FMA: bool, E: Element>(
    block: &Block<'_>,
    data: &[E],
    from: usize,
    to: usize,
    state: &mut State,
) {
    let shape = block.kv.shape();
    let (dim, page_size) = (shape.head_dim, shape.page_size);
    let line = CACHE_LINE / size_of::<E>();
    for b in from..to {
        let at = b * KEYS;
        let (mut first, mut last) = (KEYS, 0);
        for r in 0..block.rows {
            let seen = block.seen(block.first + r, at);
            if seen.0 < seen.1 {
                (first, last) = (first.min(seen.0), last.max(seen.1));
            }
            state.seen[r * block.heads..][..block.heads].fill(seen);
        }
        // Sixteen keys are of one page, the next sixteen may be of another.
        let parts = first / LANES..last.div_ceil(LANES);
        let place_at = |at: usize| {
            let (page, slot) = (at / page_size, at % page_size);
            let (keys, values) = block.kv.head(block.layer, block.pages[page], block.kv_head);
            (&data[keys][slot..], &data[values][slot * dim..(slot + LANES) * dim])
        };
        let place = |part: usize| place_at(at + part * LANES);
        // Pages lie anywhere, so no hardware guesses the next one.
        let next = |part: usize| {
            let at = at + KEYS + part * LANES;
            (at < block.first + block.rows).then(|| place_at(at))
        };
        let many = state.scores.len() >= MANY;
        for part in parts.clone() {
            if let Some((keys, _)) = next(part) {
                keys.chunks(line).for_each(L::fetch);
            }
            let keys = place(part).0;
            if !many {
                score_all::<L, E>(&state.q, dim, keys, page_size, part, &mut state.scores);
                continue;
            }
            let half = part % 2;
            L::widen(keys, page_size, dim, &mut state.wide[half * LANES..], PAIR);
            if half == 1 || part + 1 == parts.end {
                score_pair::<L>(&state.q, dim, &state.wide, part / 2, &mut state.scores);
            }
        }
        if let Some(cap) = block.softcap {
            for s in state.scores.as_flattened_mut() {
                *s = tanh::<FMA>(*s / cap) * cap;
            }
        }
        weigh::<L, FMA>(state, dim);
        for part in parts {
            if let Some((_, values)) = next(part) {
                values.chunks(line).for_each(L::fetch);
            }
            let values = place(part).1;
            let State { segment: Partial { acc, .. }, scores, seen, wide, .. } = &mut *state;
            if many {
                L::widen(values, LANES, dim, wide, LANES);
                gather::<L, f32>(acc, scores, seen, dim, wide, part);
            } else {
                gather::<L, E>(acc, scores, seen, dim, values, part);
            }
        }
    }
}

/// Scores all queries against 16 keys.
#[inline(always)]
fn score_all<L: lanes::Lanes, E: Element>(
    q: &[f32],
    dim: usize,
    keys: &[E],
    stride: usize,
    part: usize,
    scores: &mut [[f32; KEYS]],
) {
    let mut i = 0;
    while i + 6 <= scores.len() {
        L::score::<6, E>(&q[i * dim..], dim, keys, stride, part, &mut scores[i..]);
        i += 6;
    }
    while i + 3 <= scores.len() {
        L::score::<3, E>(&q[i * dim..], dim, keys, stride, part, &mut scores[i..]);
        i += 3;
    }
    while i < scores.len() {
        L::score::<1, E>(&q[i * dim..], dim, keys, stride, part, &mut scores[i..]);
        i += 1;
    }
}

/// Scores all queries against [`PAIR`] widened keys. A half that was not widened holds something old,
/// whose scores [`lanes::Lanes::weigh`] masks.
#[inline(always)]
fn score_pair<L: lanes::Lanes>(
    q: &[f32],
    dim: usize,
    keys: &[f32],
    pair: usize,
    scores: &mut [[f32; KEYS]],
) {
    let mut i = 0;
    while i + 6 <= scores.len() {
        L::score_pair::<6>(&q[i * dim..], dim, keys, pair, &mut scores[i..]);
        i += 6;
    }
    while i < scores.len() {
        L::score_pair::<1>(&q[i * dim..], dim, keys, pair, &mut scores[i..]);
        i += 1;
    }
}

/// Turns scores into weights relative to the running maximum and rescales what was gathered before.
#[inline(always)]
fn weigh<L: lanes::Lanes, const FMA: bool>(state: &mut State, dim: usize) {
    let (part, block) = (&mut state.segment, &mut state.block);
    for (i, s) in state.scores.iter_mut().enumerate() {
        let (seen, before) = (state.seen[i], part.max[i]);
        (block.max[i], block.sum[i]) =
            if seen.0 == seen.1 { (before, 0.0) } else { L::weigh(s, seen, before) };
    }
    // For all, also where the maximum stays: whether it does is a coin that no processor guesses.
    for ((before, max), factor) in part.max.iter_mut().zip(&block.max).zip(&mut block.factor) {
        // Exactly 0 for the first block, whose sums are 0 as well.
        let smaller = exp::<FMA>(*before - max);
        (*before, *factor) = if max > before { (*max, smaller) } else { (*before, 1.0) };
    }
    for (i, factor) in block.factor.iter().enumerate() {
        part.acc[i * dim..][..dim].iter_mut().for_each(|a| *a *= factor);
        part.sum[i] = part.sum[i] * factor + block.sum[i];
    }
}

/// Adds the weighted values of 16 keys, key by key in ascending order. A key that a query does not
/// see is never touched for it, so whatever an unused slot or a later token holds cannot matter.
#[inline(always)]
fn gather<L: lanes::Lanes, E: Element>(
    acc: &mut [f32],
    weights: &[[f32; KEYS]],
    seen: &[(usize, usize)],
    dim: usize,
    values: &[E],
    part: usize,
) {
    let cut = |key: usize| key.saturating_sub(part * LANES).min(LANES);
    let mut i = 0;
    while i < weights.len() {
        let n = match weights.len() - i {
            6.. => 6,
            3.. => 3,
            _ => 1,
        };
        let (acc, weights) = (&mut acc[i * dim..(i + n) * dim], &weights[i..i + n]);
        let seen = &seen[i..i + n];
        // Later queries see neither earlier nor fewer later keys than the ones before them. What all see
        // goes together, what is before and behind it one by one.
        let (first, last) = (seen[0], seen[n - 1]);
        let (from, to) = (cut(last.0), cut(first.1));
        let (from, to) = if from < to { (from, to) } else { (LANES, LANES) };
        if cut(first.0) < from {
            one_by_one::<L, E>(acc, weights, dim, values, part, |j| {
                cut(seen[j].0)..cut(seen[j].1).min(from)
            });
        }
        if from < to {
            match n {
                6 => L::gather::<6, E>(acc, dim, weights, values, part, from..to),
                3 => L::gather::<3, E>(acc, dim, weights, values, part, from..to),
                _ => L::gather::<1, E>(acc, dim, weights, values, part, from..to),
            }
        }
        if to < cut(last.1) {
            one_by_one::<L, E>(acc, weights, dim, values, part, |j| {
                cut(seen[j].0).max(to)..cut(seen[j].1)
            });
        }
        i += n;
    }
}

/// [`gather`] of the keys `seen` by each query alone.
#[inline(always)]
fn one_by_one<L: lanes::Lanes, E: Element>(
    acc: &mut [f32],
    weights: &[[f32; KEYS]],
    dim: usize,
    values: &[E],
    part: usize,
    seen: impl Fn(usize) -> Range<usize>,
) {
    for (j, acc) in acc.chunks_exact_mut(dim).enumerate() {
        let seen = seen(j);
        if !seen.is_empty() {
            L::gather::<1, E>(acc, dim, &weights[j..], values, part, seen);
        }
    }
}
