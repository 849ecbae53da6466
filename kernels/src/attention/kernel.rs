//! The inner loops: a block of queries that share one KV head, over all keys in reach.

use super::{KvPool, SEGMENT};
use crate::math::{dispatch, exp, fma, sum16, tanh};
use std::cell::Cell;

/// Queries (rows times heads) a block holds at most.
pub(super) const QUERIES: usize = 24;
/// Keys that are scored together; pages are whole multiples of it.
const KEYS: usize = 16;

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

/// Buffers of one block, reused by the thread.
#[derive(Default)]
pub(super) struct State {
    head_dim: usize,
    /// Scaled queries, `[queries][head_dim]`.
    q: Vec<f32>,
    scores: Vec<[f32; KEYS]>,
    /// Keys `from..to` of the current 16 that each query sees.
    seen: Vec<(usize, usize)>,
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

    /// Which of the 16 keys from `at` on the query at `position` sees.
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

/// Attends the key blocks `from..to` (16 positions each) into the segment.
#[inline(always)]
fn keys_body<const FMA: bool>(block: &Block<'_>, from: usize, to: usize, state: &mut State) {
    let shape = block.kv.shape();
    let (dim, page_size) = (shape.head_dim, shape.page_size);
    for b in from..to {
        let (page, slot) = (b * KEYS / page_size, b * KEYS % page_size);
        let (keys, values) = block.kv.head(block.layer, block.pages[page], block.kv_head);
        let values = &values[slot * dim..(slot + KEYS) * dim];
        for r in 0..block.rows {
            let seen = block.seen(block.first + r, b * KEYS);
            state.seen[r * block.heads..][..block.heads].fill(seen);
        }
        score_all::<FMA>(&state.q, dim, &keys[slot..], page_size, &mut state.scores);
        if let Some(cap) = block.softcap {
            for s in state.scores.as_flattened_mut() {
                *s = tanh::<FMA>(*s / cap) * cap;
            }
        }
        weigh::<FMA>(state, dim);
        gather::<FMA>(state, dim, values);
    }
}
dispatch! {
    fn attend_keys(block: &Block<'_>, from: usize, to: usize, state: &mut State) => keys_body
}

/// `scores[i] = q[i] · keys`, 16 keys at a time. Each score is one chain of products in the order of
/// the elements, however many queries go together.
#[inline(always)]
fn score_all<const FMA: bool>(
    q: &[f32],
    dim: usize,
    keys: &[f32],
    stride: usize,
    scores: &mut [[f32; KEYS]],
) {
    let mut i = 0;
    while i + 6 <= scores.len() {
        score::<6, FMA>(&q[i * dim..], dim, keys, stride, &mut scores[i..]);
        i += 6;
    }
    while i + 3 <= scores.len() {
        score::<3, FMA>(&q[i * dim..], dim, keys, stride, &mut scores[i..]);
        i += 3;
    }
    while i < scores.len() {
        score::<1, FMA>(&q[i * dim..], dim, keys, stride, &mut scores[i..]);
        i += 1;
    }
}

#[inline(always)]
fn score<const N: usize, const FMA: bool>(
    q: &[f32],
    dim: usize,
    keys: &[f32],
    stride: usize,
    scores: &mut [[f32; KEYS]],
) {
    let q: [&[f32]; N] = std::array::from_fn(|i| &q[i * dim..(i + 1) * dim]);
    // Two chains a query, joined at the end, hide the latency of the multiply-adds.
    let mut acc = [[[0f32; KEYS]; 2]; N];
    for d in (0..dim).step_by(2) {
        for half in 0..2 {
            let k: &[f32; KEYS] = keys[(d + half) * stride..].first_chunk().expect("16 keys");
            for i in 0..N {
                let x = q[i][d + half];
                for lane in 0..KEYS {
                    acc[i][half][lane] = fma::<FMA>(x, k[lane], acc[i][half][lane]);
                }
            }
        }
    }
    for i in 0..N {
        for lane in 0..KEYS {
            scores[i][lane] = acc[i][0][lane] + acc[i][1][lane];
        }
    }
}

/// Turns scores into weights relative to the running maximum and rescales what was gathered before.
#[inline(always)]
fn weigh<const FMA: bool>(state: &mut State, dim: usize) {
    let part = &mut state.segment;
    for (i, s) in state.scores.iter_mut().enumerate() {
        let (from, to) = state.seen[i];
        if from == to {
            continue;
        }
        for (lane, s) in s.iter_mut().enumerate() {
            *s = if lane >= from && lane < to { *s } else { f32::NEG_INFINITY };
        }
        let mut top = *s;
        for width in [8, 4, 2, 1] {
            for l in 0..width {
                top[l] = if top[l + width] > top[l] { top[l + width] } else { top[l] };
            }
        }
        let max = if top[0] > part.max[i] { top[0] } else { part.max[i] };
        for s in s.iter_mut() {
            *s = exp::<FMA>(*s - max);
        }
        if max > part.max[i] {
            // Exactly 0 for the first block, whose sums are 0 as well.
            let factor = exp::<FMA>(part.max[i] - max);
            part.sum[i] *= factor;
            part.acc[i * dim..][..dim].iter_mut().for_each(|a| *a *= factor);
            part.max[i] = max;
        }
        part.sum[i] += sum16(s);
    }
}

/// Adds the weighted values, key by key in ascending order. A key that a query does not see is never
/// touched for it, so whatever an unused slot holds cannot matter.
#[inline(always)]
fn gather<const FMA: bool>(state: &mut State, dim: usize, values: &[f32]) {
    let queries = state.scores.len();
    let acc = &mut state.segment.acc;
    let mut i = 0;
    while i < queries {
        let n = (queries - i).min(3);
        let all = state.seen[i..i + n].iter().fold((0, KEYS), |a, s| (a.0.max(s.0), a.1.min(s.1)));
        let same = state.seen[i..i + n].iter().all(|s| *s == all);
        let (acc, w) = (&mut acc[i * dim..(i + n) * dim], &state.scores[i..i + n]);
        if n == 3 && same {
            gather_rows::<3, FMA>(acc, dim, w, values, all);
        } else {
            for j in 0..n {
                let seen = state.seen[i + j];
                gather_rows::<1, FMA>(&mut acc[j * dim..][..dim], dim, &w[j..], values, seen);
            }
        }
        i += n;
    }
}

#[inline(always)]
fn gather_rows<const N: usize, const FMA: bool>(
    acc: &mut [f32],
    dim: usize,
    weights: &[[f32; KEYS]],
    values: &[f32],
    seen: (usize, usize),
) {
    let mut d = 0;
    while d + 64 <= dim {
        gather_columns::<N, 64, FMA>(acc, dim, d, weights, values, seen);
        d += 64;
    }
    while d + 16 <= dim {
        gather_columns::<N, 16, FMA>(acc, dim, d, weights, values, seen);
        d += 16;
    }
    while d + 4 <= dim {
        gather_columns::<N, 4, FMA>(acc, dim, d, weights, values, seen);
        d += 4;
    }
}

#[inline(always)]
fn gather_columns<const N: usize, const W: usize, const FMA: bool>(
    acc: &mut [f32],
    dim: usize,
    d: usize,
    weights: &[[f32; KEYS]],
    values: &[f32],
    seen: (usize, usize),
) {
    let mut sum = [[0f32; W]; N];
    for (i, s) in sum.iter_mut().enumerate() {
        *s = *acc[i * dim + d..].first_chunk().expect("columns of a head");
    }
    for key in seen.0..seen.1 {
        let v: &[f32; W] = values[key * dim + d..].first_chunk().expect("columns of a head");
        for i in 0..N {
            let w = weights[i][key];
            for c in 0..W {
                sum[i][c] = fma::<FMA>(w, v[c], sum[i][c]);
            }
        }
    }
    for (i, s) in sum.iter().enumerate() {
        acc[i * dim + d..][..W].copy_from_slice(s);
    }
}
