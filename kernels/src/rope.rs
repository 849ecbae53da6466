//! Rotary position embedding (Su et al., arXiv 2104.09864).

use crate::ThreadPool;
use crate::math::dispatch;

/// Which elements of a head form the rotated pairs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RopeStyle {
    /// `(i, i + n/2)`: Hugging Face's Llama, Qwen, Gemma; "NeoX" in ggml.
    HalfSplit,
    /// `(2i, 2i + 1)`: the original order, which GGUF files of Llama models use.
    Interleaved,
}

/// Cosines and sines of the positions of one batch, shared by all layers.
#[derive(Clone, Debug)]
pub struct RopeAngles {
    inv_freq: Vec<f32>,
    factor: f32,
    /// `[m][2 * half]`: cosines, then sines.
    table: Vec<f32>,
}

impl RopeAngles {
    /// For the given inverse frequencies (half as many as rotated elements a head; a head's elements
    /// beyond the rotated ones are left alone). `factor` scales cosines and sines (1 for most
    /// models).
    pub fn new(inv_freq: Vec<f32>, factor: f32) -> Self {
        RopeAngles { inv_freq, factor, table: Vec::new() }
    }

    /// Computes the angles of a batch: one absolute position a row.
    ///
    /// The angle is the single-precision product of position and inverse frequency, as in Hugging
    /// Face transformers; cosine and sine are correctly rounded from it.
    pub fn set_positions(&mut self, positions: impl IntoIterator<Item = usize>) {
        self.table.clear();
        for p in positions {
            let angles = self.inv_freq.iter().map(|f| f64::from(p as f32 * f));
            self.table.extend(angles.clone().map(|a| a.cos() as f32 * self.factor));
            self.table.extend(angles.map(|a| a.sin() as f32 * self.factor));
        }
    }

    /// Rows whose angles are set.
    pub fn rows(&self) -> usize {
        if self.inv_freq.is_empty() { 0 } else { self.table.len() / (2 * self.inv_freq.len()) }
    }
}

/// Rotates every head of `x` (`[m][heads * head_dim]`) by the angles of its row.
///
/// # Panics
/// If `x` does not hold `angles.rows()` rows of whole heads, or more is rotated than a head has.
pub fn rope(
    pool: &ThreadPool,
    x: &mut [f32],
    heads: usize,
    head_dim: usize,
    angles: &RopeAngles,
    style: RopeStyle,
) {
    let (width, half) = (heads * head_dim, angles.inv_freq.len());
    assert!(2 * half <= head_dim, "rope: {half} pairs in a head of {head_dim}");
    if half == 0 || width == 0 {
        return;
    }
    assert_eq!(x.len(), angles.rows() * width, "rope: rows of x and of the angles");
    let rows = (8 * 1024 / width).max(1);
    pool.run_chunks(x, rows * width, &|i, x| {
        for (j, row) in x.chunks_exact_mut(width).enumerate() {
            let table = &angles.table[(i * rows + j) * 2 * half..][..2 * half];
            rotate_row(row, head_dim, table, style);
        }
    });
}

#[inline(always)]
fn rotate_body<const FMA: bool>(row: &mut [f32], head_dim: usize, table: &[f32], style: RopeStyle) {
    let half = table.len() / 2;
    let (cos, sin) = table.split_at(half);
    for head in row.chunks_exact_mut(head_dim) {
        match style {
            RopeStyle::HalfSplit => {
                let (a, b) = head[..2 * half].split_at_mut(half);
                for i in 0..half {
                    let (x, y) = (a[i], b[i]);
                    a[i] = x * cos[i] - y * sin[i];
                    b[i] = y * cos[i] + x * sin[i];
                }
            }
            RopeStyle::Interleaved => {
                for i in 0..half {
                    let (x, y) = (head[2 * i], head[2 * i + 1]);
                    head[2 * i] = x * cos[i] - y * sin[i];
                    head[2 * i + 1] = y * cos[i] + x * sin[i];
                }
            }
        }
    }
}
dispatch! {
    fn rotate_row(row: &mut [f32], head_dim: usize, table: &[f32], style: RopeStyle) => rotate_body
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Rng;

    #[test]
    fn rotates_pairs_by_position() {
        let pool = ThreadPool::new(2);
        let mut rng = Rng::new(3);
        for (heads, dim, pairs) in [(1, 2, 1), (3, 64, 32), (9, 80, 20), (2, 7, 3)] {
            let inv: Vec<f32> =
                (0..pairs).map(|i| 1e4f32.powf(-(i as f32) / pairs as f32)).collect();
            let positions: Vec<usize> = (0..150).map(|i| i * 37).collect();
            let x = rng.floats(positions.len() * heads * dim, 1.0);
            let mut angles = RopeAngles::new(inv.clone(), 1.0);
            angles.set_positions(positions.iter().copied());
            for style in [RopeStyle::HalfSplit, RopeStyle::Interleaved] {
                let mut got = x.clone();
                rope(&pool, &mut got, heads, dim, &angles, style);
                for (r, p) in positions.iter().enumerate() {
                    for h in 0..heads {
                        let at = (r * heads + h) * dim;
                        for (i, f) in inv.iter().enumerate() {
                            let (a, b) = match style {
                                RopeStyle::HalfSplit => (at + i, at + i + pairs),
                                RopeStyle::Interleaved => (at + 2 * i, at + 2 * i + 1),
                            };
                            let (sin, cos) = f64::from(*p as f32 * f).sin_cos();
                            let (u, v) = (f64::from(x[a]), f64::from(x[b]));
                            assert!((f64::from(got[a]) - (u * cos - v * sin)).abs() < 1e-6);
                            assert!((f64::from(got[b]) - (v * cos + u * sin)).abs() < 1e-6);
                        }
                        assert_eq!(got[at + 2 * pairs..at + dim], x[at + 2 * pairs..at + dim]);
                    }
                }
            }
        }
    }

    #[test]
    fn a_row_is_the_same_alone() {
        let pool = ThreadPool::new(2);
        let x = Rng::new(4).floats(40 * 576, 1.0);
        let mut angles = RopeAngles::new((0..32).map(|i| 0.9f32.powi(i)).collect(), 1.0);
        angles.set_positions(0..40);
        let mut all = x.clone();
        rope(&pool, &mut all, 9, 64, &angles, RopeStyle::HalfSplit);
        for r in 0..40 {
            let mut one = x[r * 576..][..576].to_vec();
            angles.set_positions([r]);
            rope(&pool, &mut one, 9, 64, &angles, RopeStyle::HalfSplit);
            assert_eq!(one, all[r * 576..][..576]);
        }
    }
}
