//! RMSNorm, alone and fused with the residual addition.

use crate::ThreadPool;
use crate::math::{dispatch, fma, sum16};

/// Elements a task handles at least; less is not worth waking a thread.
const GRAIN: usize = 16 * 1024;

/// `out[r] = x[r] / sqrt(mean(x[r]²) + eps) * weight` for every row of `weight.len()` elements
/// (Zhang and Sennrich, arXiv 1910.07467).
///
/// # Panics
/// If `x` and `out` differ in length or are no whole number of rows.
pub fn rms_norm(pool: &ThreadPool, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    assert_eq!(x.len(), out.len(), "rms_norm: input and output length");
    let rows = check_rows(x.len(), weight.len());
    pool.run_chunks(out, rows * weight.len(), &|i, out| {
        let start = i * rows * weight.len();
        norm_rows(&x[start..start + out.len()], weight, eps, out);
    });
}

/// `residual += delta`, then `out = rms_norm(residual)`, row by row.
///
/// # Panics
/// If the three differ in length or are no whole number of rows.
pub fn add_rms_norm(
    pool: &ThreadPool,
    residual: &mut [f32],
    delta: &[f32],
    weight: &[f32],
    eps: f32,
    out: &mut [f32],
) {
    assert_eq!(residual.len(), delta.len(), "add_rms_norm: residual and delta length");
    add(pool, residual, delta);
    rms_norm(pool, residual, weight, eps, out);
}

/// `x += delta`, element by element.
///
/// # Panics
/// If the two differ in length.
pub fn add(pool: &ThreadPool, x: &mut [f32], delta: &[f32]) {
    assert_eq!(x.len(), delta.len(), "add: lengths");
    pool.run_chunks(x, GRAIN, &|i, x| add_slice(x, &delta[i * GRAIN..]));
}

/// `x[r] += bias` for every row of `bias.len()` elements.
///
/// # Panics
/// If `x` is no whole number of rows.
pub fn add_bias(pool: &ThreadPool, x: &mut [f32], bias: &[f32]) {
    let rows = check_rows(x.len(), bias.len());
    pool.run_chunks(x, rows * bias.len(), &|_, x| {
        x.chunks_exact_mut(bias.len()).for_each(|row| add_slice(row, bias));
    });
}

/// Rows a task takes.
fn check_rows(len: usize, row: usize) -> usize {
    assert!(row > 0 && len.is_multiple_of(row), "{len} elements are no whole rows of {row}");
    (GRAIN / row).max(1)
}

#[inline(always)]
fn add_body<const FMA: bool>(x: &mut [f32], delta: &[f32]) {
    for (x, d) in x.iter_mut().zip(delta) {
        *x += d;
    }
}
dispatch! { fn add_slice(x: &mut [f32], delta: &[f32]) => add_body }

#[inline(always)]
fn norm_body<const FMA: bool>(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let dim = weight.len();
    for (x, out) in x.chunks_exact(dim).zip(out.chunks_exact_mut(dim)) {
        let mut lanes = [0f32; 16];
        let (chunks, rest) = x.as_chunks::<16>();
        for c in chunks {
            for (l, v) in lanes.iter_mut().zip(c) {
                *l = fma::<FMA>(*v, *v, *l);
            }
        }
        for (l, v) in lanes.iter_mut().zip(rest) {
            *l = fma::<FMA>(*v, *v, *l);
        }
        let scale = 1.0 / (sum16(&lanes) / dim as f32 + eps).sqrt();
        for ((o, v), w) in out.iter_mut().zip(x).zip(weight) {
            *o = v * scale * w;
        }
    }
}
dispatch! { fn norm_rows(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) => norm_body }

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Rng;

    fn reference(x: &[f32], w: &[f32], eps: f64) -> Vec<f32> {
        let dim = w.len();
        let row = |x: &[f32]| {
            let ms = x.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / dim as f64;
            let s = 1.0 / (ms + eps).sqrt();
            x.iter().zip(w).map(move |(v, w)| (f64::from(*v) * s * f64::from(*w)) as f32).collect()
        };
        x.chunks(dim).flat_map(|c| -> Vec<f32> { row(c) }).collect()
    }

    #[test]
    fn matches_the_reference_and_ignores_neighbours() {
        let mut rng = Rng::new(1);
        let pool = ThreadPool::new(2);
        for (m, dim) in [(1, 1), (3, 17), (1, 576), (61, 576), (300, 64), (5, 1537)] {
            let x: Vec<f32> = rng.floats(m * dim, 3.0);
            let w: Vec<f32> = rng.floats(dim, 1.0);
            let mut out = vec![0.0; x.len()];
            rms_norm(&pool, &x, &w, 1e-5, &mut out);
            for (a, b) in out.iter().zip(reference(&x, &w, 1e-5)) {
                assert!((a - b).abs() <= 2e-6 * b.abs().max(1e-3), "{a} {b}");
            }
            let mut one = vec![0.0; dim];
            for r in 0..m {
                rms_norm(&pool, &x[r * dim..][..dim], &w, 1e-5, &mut one);
                assert_eq!(one, out[r * dim..][..dim]);
            }
            let (mut res, delta) = (x.clone(), rng.floats(m * dim, 1.0));
            let mut fused = vec![0.0; x.len()];
            add_rms_norm(&pool, &mut res, &delta, &w, 1e-5, &mut fused);
            let sum: Vec<f32> = x.iter().zip(&delta).map(|(a, b)| a + b).collect();
            assert_eq!(res, sum);
            rms_norm(&pool, &sum, &w, 1e-5, &mut out);
            assert_eq!(fused, out);
        }
    }

    #[test]
    fn bias_is_added_to_each_row() {
        let pool = ThreadPool::new(2);
        let mut x = vec![1.0; 3 * 20_000];
        let bias: Vec<f32> = (0..20_000).map(|i| i as f32).collect();
        add_bias(&pool, &mut x, &bias);
        assert!(x.iter().enumerate().all(|(i, v)| *v == 1.0 + (i % 20_000) as f32));
    }
}
