//! What is asked of a row of logits: argmax, log-sum-exp, the most likely few.

use crate::ThreadPool;
use crate::math::{dispatch, exp, sum16};

/// Logits are reduced in chunks of this many, by position; the partial results are joined in order,
/// so the answer does not depend on the threads.
const CHUNK: usize = 4096;

/// Facts of one row of logits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct VocabStats {
    /// The most likely token, the lowest id among equals. NaN never wins; 0 for an empty row.
    pub argmax: u32,
    /// The largest logit.
    pub max: f32,
    /// `ln Σ exp(logit)`; `logit - log_sum_exp` is a token's log-probability.
    pub log_sum_exp: f32,
}

#[derive(Clone, Copy)]
struct Part {
    argmax: u32,
    max: f32,
    /// Σ exp(logit - max)
    sum: f32,
}

const EMPTY: Part = Part { argmax: 0, max: f32::NEG_INFINITY, sum: 0.0 };

/// Facts of one row of logits.
pub fn vocab_stats(logits: &[f32]) -> VocabStats {
    join(logits.chunks(CHUNK).map(chunk_stats))
}

/// Facts of every row of `logits` (`[m][vocab]`), spread over the pool; same bits as
/// [`vocab_stats`].
///
/// # Panics
/// If `logits` is no whole number of rows.
pub fn vocab_stats_rows(pool: &ThreadPool, logits: &[f32], vocab: usize) -> Vec<VocabStats> {
    assert!(vocab > 0 && logits.len().is_multiple_of(vocab), "vocab_stats_rows: whole rows");
    let per_row = vocab.div_ceil(CHUNK);
    let mut parts = vec![EMPTY; logits.len() / vocab * per_row];
    let per_task = per_row.div_ceil(2 * pool.threads());
    pool.run_chunks(&mut parts, per_task, &|i, parts| {
        for (j, part) in parts.iter_mut().enumerate() {
            let (row, chunk) = ((i * per_task + j) / per_row, (i * per_task + j) % per_row);
            let end = (chunk * CHUNK + CHUNK).min(vocab);
            *part = chunk_stats(&logits[row * vocab + chunk * CHUNK..row * vocab + end]);
        }
    });
    parts.chunks(per_row).map(|p| join(p.iter().copied())).collect()
}

fn join(parts: impl Iterator<Item = Part> + Clone) -> VocabStats {
    let best = parts.clone().fold(EMPTY, |best, p| {
        // Later chunks hold higher ids: only a greater value wins. Ids are relative to the chunk.
        if p.max > best.max { p } else { best }
    });
    let chunk = parts.clone().position(|p| p.max == best.max).unwrap_or(0);
    let sum: f32 =
        parts.map(|p| if p.max == best.max { p.sum } else { rescale(p, best.max) }).sum();
    VocabStats {
        argmax: (chunk * CHUNK) as u32 + best.argmax,
        max: best.max,
        log_sum_exp: best.max + sum.ln(),
    }
}

fn rescale(p: Part, max: f32) -> f32 {
    // A part of nothing but -inf adds nothing; its own sum is NaN-free by construction.
    p.sum * (p.max - max).exp()
}

#[inline(always)]
fn chunk_body<const FMA: bool>(logits: &[f32]) -> Part {
    let (chunks, rest) = logits.as_chunks::<16>();
    let mut top = [f32::NEG_INFINITY; 16];
    for c in chunks {
        for (t, v) in top.iter_mut().zip(c) {
            *t = if *v > *t { *v } else { *t };
        }
    }
    let max = top.iter().chain(rest).fold(f32::NEG_INFINITY, |a, v| if *v > a { *v } else { a });
    if max == f32::NEG_INFINITY {
        let nan = logits.iter().any(|v| v.is_nan());
        return Part { sum: if nan { f32::NAN } else { 0.0 }, ..EMPTY };
    }
    let mut lanes = [0f32; 16];
    for c in chunks {
        for (l, v) in lanes.iter_mut().zip(c) {
            *l += exp::<FMA>(*v - max);
        }
    }
    for (l, v) in lanes.iter_mut().zip(rest) {
        *l += exp::<FMA>(*v - max);
    }
    // Most chunks are skipped sixteen at a time until the one that holds the maximum.
    let group = chunks.iter().position(|c| c.iter().fold(false, |hit, v| hit | (*v == max)));
    let start = group.map_or(chunks.len() * 16, |g| g * 16);
    let argmax = logits[start..].iter().position(|v| *v == max).unwrap_or(0) + start;
    Part { argmax: argmax as u32, max, sum: sum16(&lanes) }
}
dispatch! { fn chunk_stats(logits: &[f32]) -> Part => chunk_body }

/// The `n` largest logits as `(token, logit)`, largest first, lowest id first among equals. NaN is
/// left out.
pub fn top_n(logits: &[f32], n: usize) -> Vec<(u32, f32)> {
    let n = n.min(logits.len());
    let mut top: Vec<(u32, f32)> = Vec::with_capacity(n + 1);
    if n == 0 {
        return top;
    }
    for (c, chunk) in logits.chunks(64).enumerate() {
        let bar = if top.len() == n { top[n - 1].1 } else { f32::NEG_INFINITY };
        let full = top.len() == n;
        if full && !chunk.iter().fold(false, |hit, v| hit | (*v > bar)) {
            continue;
        }
        for (i, &v) in chunk.iter().enumerate() {
            if v.is_nan() || (top.len() == n && v <= top[n - 1].1) {
                continue;
            }
            let at = top.partition_point(|(_, other)| *other >= v);
            top.insert(at, ((c * 64 + i) as u32, v));
            top.truncate(n);
        }
    }
    top
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Rng;

    fn reference(x: &[f32]) -> (u32, f64) {
        let mut best = 0;
        for (i, v) in x.iter().enumerate() {
            if *v > x[best] {
                best = i;
            }
        }
        let max = f64::from(x[best]);
        let sum: f64 = x.iter().map(|v| (f64::from(*v) - max).exp()).sum();
        (best as u32, max + sum.ln())
    }

    #[test]
    fn matches_the_reference() {
        let mut rng = Rng::new(5);
        let pool = ThreadPool::new(2);
        for vocab in [1, 2, 15, 16, 17, 512, 4095, 4096, 4097, 49152, 50_001] {
            for scale in [1e-3, 1.0, 30.0] {
                let mut x = rng.floats(3 * vocab, scale);
                for v in &mut x {
                    // Coarse values, so that ties are common.
                    if vocab > 100 && scale > 1.0 {
                        *v = (*v * 4.0).round() / 4.0;
                    }
                }
                let rows = vocab_stats_rows(&pool, &x, vocab);
                for (row, got) in x.chunks(vocab).zip(rows) {
                    assert_eq!(got, vocab_stats(row));
                    let (argmax, lse) = reference(row);
                    assert_eq!(got.argmax, argmax);
                    assert_eq!(got.max, row[argmax as usize]);
                    assert!((f64::from(got.log_sum_exp) - lse).abs() < 4e-6 * lse.abs().max(1.0));
                }
            }
        }
    }

    #[test]
    fn extremes() {
        let inf = f32::INFINITY;
        let s = vocab_stats(&[-inf, -inf, 3.0, -inf]);
        assert_eq!((s.argmax, s.max, s.log_sum_exp), (2, 3.0, 3.0));
        let mut far = vec![-inf; 10_000];
        far[9_000] = 1.0;
        let s = vocab_stats(&far);
        assert_eq!((s.argmax, s.log_sum_exp), (9_000, 1.0));
        let s = vocab_stats(&[1e38, 1e38, -1e38]);
        assert_eq!((s.argmax, s.log_sum_exp), (0, 1e38));
        assert!(vocab_stats(&[1.0, f32::NAN]).log_sum_exp.is_nan());
        assert_eq!(vocab_stats(&[]).argmax, 0);
    }

    #[test]
    fn top_n_is_a_stable_sort() {
        let mut rng = Rng::new(6);
        for len in [1, 5, 64, 65, 3000] {
            let x: Vec<f32> = (0..len).map(|_| (rng.float(20.0)).round()).collect();
            let mut all: Vec<(u32, f32)> =
                x.iter().enumerate().map(|(i, v)| (i as u32, *v)).collect();
            all.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
            // -0 equals 0 in the order of logits.
            all.sort_by(|a, b| b.1.partial_cmp(&a.1).unwrap().then(a.0.cmp(&b.0)));
            for n in [0, 1, 3, 20, 5000] {
                assert_eq!(top_n(&x, n), all[..n.min(len)]);
            }
        }
        assert_eq!(top_n(&[f32::NAN, 2.0], 2), [(1, 2.0)]);
        assert_eq!(top_n(&[f32::NEG_INFINITY, 2.0], 2), [(1, 2.0), (0, f32::NEG_INFINITY)]);
    }
}
