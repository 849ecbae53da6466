//! Gated activations and the soft cap.

use crate::ThreadPool;
use crate::math::{dispatch, gelu_tanh, silu, tanh};

const GRAIN: usize = 8 * 1024;

/// `gate = silu(gate) * up`, element by element (SwiGLU, Shazeer, arXiv 2002.05202).
///
/// # Panics
/// If the two differ in length.
pub fn silu_mul(pool: &ThreadPool, gate: &mut [f32], up: &[f32]) {
    assert_eq!(gate.len(), up.len(), "silu_mul: lengths");
    pool.run_chunks(gate, GRAIN, &|i, gate| silu_slice(gate, &up[i * GRAIN..]));
}

/// `gate = gelu_tanh(gate) * up`, element by element (GeGLU with the tanh approximation).
///
/// # Panics
/// If the two differ in length.
pub fn gelu_tanh_mul(pool: &ThreadPool, gate: &mut [f32], up: &[f32]) {
    assert_eq!(gate.len(), up.len(), "gelu_tanh_mul: lengths");
    pool.run_chunks(gate, GRAIN, &|i, gate| gelu_slice(gate, &up[i * GRAIN..]));
}

/// `x = cap * tanh(x / cap)`, element by element (Gemma 2, arXiv 2408.00118 §2).
pub fn softcap(pool: &ThreadPool, x: &mut [f32], cap: f32) {
    pool.run_chunks(x, GRAIN, &|_, x| cap_slice(x, cap));
}

/// `x *= factor`, element by element.
pub fn scale(pool: &ThreadPool, x: &mut [f32], factor: f32) {
    pool.run_chunks(x, GRAIN, &|_, x| x.iter_mut().for_each(|v| *v *= factor));
}

#[inline(always)]
fn silu_body<const FMA: bool>(gate: &mut [f32], up: &[f32]) {
    for (g, u) in gate.iter_mut().zip(up) {
        *g = silu::<FMA>(*g) * u;
    }
}
dispatch! { fn silu_slice(gate: &mut [f32], up: &[f32]) => silu_body }

#[inline(always)]
fn gelu_body<const FMA: bool>(gate: &mut [f32], up: &[f32]) {
    for (g, u) in gate.iter_mut().zip(up) {
        *g = gelu_tanh::<FMA>(*g) * u;
    }
}
dispatch! { fn gelu_slice(gate: &mut [f32], up: &[f32]) => gelu_body }

#[inline(always)]
fn cap_body<const FMA: bool>(x: &mut [f32], cap: f32) {
    for v in x {
        *v = tanh::<FMA>(*v / cap) * cap;
    }
}
dispatch! { fn cap_slice(x: &mut [f32], cap: f32) => cap_body }

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Rng;

    #[test]
    fn match_their_definitions_at_any_length() {
        let mut rng = Rng::new(2);
        let pool = ThreadPool::new(2);
        for len in [1, 15, 16, 33, 1000, 40_001] {
            let (x, up) = (rng.floats(len, 8.0), rng.floats(len, 2.0));
            let (mut a, mut b, mut c) = (x.clone(), x.clone(), x.clone());
            silu_mul(&pool, &mut a, &up);
            gelu_tanh_mul(&pool, &mut b, &up);
            softcap(&pool, &mut c, 5.0);
            for i in 0..len {
                let (v, u) = (f64::from(x[i]), f64::from(up[i]));
                let t = 0.7978845608 * (v + 0.044715 * v * v * v);
                assert!((f64::from(a[i]) - v / (1.0 + (-v).exp()) * u).abs() < 1e-5);
                assert!((f64::from(b[i]) - 0.5 * v * (1.0 + t.tanh()) * u).abs() < 1e-5);
                assert!((f64::from(c[i]) - 5.0 * (v / 5.0).tanh()).abs() < 5e-6);
                // One element alone gives the same bits.
                let mut one = [x[i]];
                if i % 97 == 0 {
                    silu_mul(&pool, &mut one, &up[i..=i]);
                    assert_eq!(one[0].to_bits(), a[i].to_bits());
                }
            }
        }
    }

    #[test]
    fn extremes_stay_defined() {
        let pool = ThreadPool::new(1);
        let mut g = [f32::MAX, f32::MIN, 1e-40, -1e-40, 0.0, -100.0, 100.0];
        silu_mul(&pool, &mut g, &[1.0; 7]);
        assert!(g.iter().all(|v| v.is_finite()), "{g:?}");
        assert_eq!((g[0], g[6]), (f32::MAX, 100.0));
    }
}
