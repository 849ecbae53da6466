//! Paged attention against plain attention in double precision.

use super::*;
use crate::cuda::{Attention, KvCache, KvDims, SPLIT, Sequence};

struct Case {
    dims: KvDims,
    heads: usize,
    /// (first new position, new tokens) of each sequence.
    sequences: Vec<(usize, usize)>,
}

fn case(
    (heads, kv_heads, head_dim): (usize, usize, usize),
    page_size: usize,
    sequences: &[(usize, usize)],
) -> Case {
    let stride = stride(page_size, sequences);
    let pages = stride * sequences.len() + 1;
    let dims = KvDims { layers: 2, kv_heads, head_dim, page_size, pages };
    Case { dims, heads, sequences: sequences.to_vec() }
}

fn stride(page_size: usize, sequences: &[(usize, usize)]) -> usize {
    let longest = sequences.iter().map(|(start, n)| start + n).max().unwrap_or(1);
    longest.div_ceil(page_size)
}

/// A case's data: queries, the pool's values, and a batch with the sequences as tables.
struct Data {
    q: Vec<f32>,
    kv: Vec<f32>,
    batch: Batch,
}

impl Case {
    fn data(&self, rng: &mut Rng, precision: Precision) -> Data {
        let KvDims { head_dim, page_size, pages, .. } = self.dims;
        let stride = stride(page_size, &self.sequences);
        let rows: usize = self.sequences.iter().map(|(_, n)| n).sum();
        let q = rounded(precision, &rng.floats(rows * self.heads * head_dim, 2.0));
        let kv = rounded(precision, &rng.floats(pages * self.dims.page_len(), 2.0));
        let starts: Vec<u32> = vec![0; self.sequences.len()];
        let tables = batch(rng, &starts, pages, page_size, stride).tables;
        let each = || self.sequences.iter().enumerate();
        let positions = each().flat_map(|(_, (s, n))| (*s..s + n).map(|p| p as u32)).collect();
        let row_tables = each().flat_map(|(t, (_, n))| vec![t as u32; *n]).collect();
        let batch = Batch {
            tokens: vec![0; rows],
            positions,
            row_tables,
            tables,
            table_stride: stride,
            ..Batch::default()
        };
        Data { q, kv, batch }
    }

    /// Attention of every row, `[rows][heads * head_dim]`.
    fn reference(&self, data: &Data, how: &Attention) -> Vec<f32> {
        let KvDims { kv_heads, head_dim, page_size, .. } = self.dims;
        let mut out = Vec::new();
        for (row, position) in data.batch.positions.iter().enumerate() {
            let table =
                &data.batch.tables[data.batch.row_tables[row] as usize * data.batch.table_stride..];
            let last = *position as usize;
            let first = how.window.map_or(0, |w| (last + 1).saturating_sub(w));
            for head in 0..self.heads {
                let kv_head = head / (self.heads / kv_heads);
                let at = |p: usize, values: usize| {
                    let page = table[p / page_size] as usize;
                    let at =
                        super::pages::place(self.dims, page, 1, values, kv_head, p % page_size);
                    &data.kv[at..at + head_dim]
                };
                let q = &data.q[(row * self.heads + head) * head_dim..][..head_dim];
                let score = |p: usize| {
                    let dot = q.iter().zip(at(p, 0)).map(|(a, b)| f64::from(*a) * f64::from(*b));
                    let x = dot.sum::<f64>() * f64::from(how.scale);
                    how.softcap.map_or(x, |c| f64::from(c) * (x / f64::from(c)).tanh())
                };
                let scores: Vec<f64> = (first..=last).map(score).collect();
                let max = scores.iter().copied().fold(f64::MIN, f64::max);
                let total: f64 = scores.iter().map(|s| (s - max).exp()).sum();
                let mut sums = vec![0.0; head_dim];
                for (p, score) in (first..=last).zip(&scores) {
                    let weight = (score - max).exp() / total;
                    sums.iter_mut().zip(at(p, 1)).for_each(|(s, v)| *s += weight * f64::from(*v));
                }
                out.extend(sums.iter().map(|s| *s as f32));
            }
        }
        out
    }

    fn run(&self, device: &Device, data: &Data, how: &Attention, precision: Precision) -> Vec<f32> {
        let kv = super::pages::filled(device, self.dims, precision, &data.kv);
        self.attend(device, data, how, precision, &kv, 3)
    }

    /// `at_once`: rows whose parts there is room for.
    fn attend(
        &self,
        device: &Device,
        data: &Data,
        how: &Attention,
        precision: Precision,
        kv: &KvCache,
        at_once: usize,
    ) -> Vec<f32> {
        let KvDims { head_dim, page_size, pages, .. } = self.dims;
        let staged = staged(device, &data.batch, 1, pages, page_size);
        let splits = (data.batch.table_stride * page_size).div_ceil(SPLIT);
        let parts = at_once * self.heads * splits * (head_dim + 2);
        let mut parts = device.alloc(parts, "test data").expect("memory");
        let q = activations(device, precision, &data.q);
        let mut out = empty(device, precision, data.q.len());
        device.attend(how, &q, kv, 1, &staged, &mut parts, &mut out).expect("a launch");
        read_activations(device, &out)
    }

    fn how(&self, softcap: Option<f32>, window: Option<usize>) -> Attention {
        Attention { heads: self.heads, scale: 0.3, softcap, window }
    }
}

const OPTIONS: [(Option<f32>, Option<usize>); 4] =
    [(None, None), (Some(5.0), None), (None, Some(19)), (Some(9.0), Some(150))];

#[test]
fn single_rows_match_the_reference() {
    let (device, mut rng) = (device(), Rng::new(41));
    let cases = [
        case((1, 1, 4), 16, &[(0, 1)]),
        case((6, 2, 64), 16, &[(3, 1), (290, 2), (127, 1), (128, 1), (0, 2)]),
        case((20, 2, 12), 32, &[(140, 3), (15, 1)]),
        case((9, 1, 128), 16, &[(33, 1), (255, 1)]),
        case((2, 2, 256), 48, &[(130, 1)]),
        case((4, 4, 20), 16, &[(7, 2)]),
    ];
    for precision in [Precision::F32, Precision::Bf16] {
        for (index, case) in cases.iter().enumerate() {
            let mut data = case.data(&mut rng, precision);
            data.batch.singles = (0..data.batch.rows() as u32).rev().collect();
            for (softcap, window) in OPTIONS {
                let how = case.how(softcap, window);
                let got = case.run(&device, &data, &how, precision);
                let what = format!("{precision:?} case {index} {softcap:?} {window:?}");
                let near = tolerance(precision).max(1e-5);
                assert_close(&got, &case.reference(&data, &how), near, &what);
            }
        }
    }
}

/// Which splits a grid has, which rows are beside it, and how many fit at once: none of it matters.
#[test]
fn a_single_row_is_the_same_in_any_batch() {
    let (device, mut rng) = (device(), Rng::new(42));
    let case = case((6, 2, 64), 16, &[(200, 3), (40, 1)]);
    let mut data = case.data(&mut rng, Precision::Bf16);
    let how = case.how(None, None);
    let kv = super::pages::filled(&device, case.dims, Precision::Bf16, &data.kv);
    let width = case.heads * 64;
    data.batch.singles = vec![0, 1, 2, 3];
    let whole = case.attend(&device, &data, &how, Precision::Bf16, &kv, 4);
    // Longer tables have more splits, whose blocks find nothing to do.
    let old = data.batch.table_stride;
    let wider = |t: &[u32]| [t, &[0; 30]].concat();
    data.batch.tables = data.batch.tables.chunks_exact(old).flat_map(wider).collect();
    data.batch.table_stride = old + 30;
    for row in [3, 1] {
        data.batch.singles = vec![row];
        let alone = case.attend(&device, &data, &how, Precision::Bf16, &kv, 1);
        let row = row as usize * width..(row as usize + 1) * width;
        assert_eq!(alone[row.clone()], whole[row]);
    }
}

#[test]
fn sequences_on_tensor_cores_match_the_reference() {
    let (device, mut rng) = (device(), Rng::new(43));
    let cases = [
        case((1, 1, 64), 16, &[(0, 1)]),
        case((6, 2, 64), 16, &[(3, 70), (290, 2), (0, 33)]),
        case((4, 4, 96), 32, &[(64, 64), (1, 3)]),
        case((9, 1, 128), 16, &[(33, 20), (120, 9)]),
        case((4, 2, 256), 16, &[(30, 40)]),
    ];
    for (index, case) in cases.iter().enumerate() {
        let mut data = case.data(&mut rng, Precision::Bf16);
        let mut row = 0;
        for (table, (start, rows)) in case.sequences.iter().enumerate() {
            let [rows, start, table] = [*rows, *start, table].map(|n| n as u32);
            data.batch.sequences.push(Sequence { row, rows, start, table });
            row += rows;
        }
        for (softcap, window) in OPTIONS {
            let how = case.how(softcap, window);
            let got = case.run(&device, &data, &how, Precision::Bf16);
            // Weights of keys are rounded to bf16 as well.
            let what = format!("case {index} {softcap:?} {window:?}");
            assert_close(&got, &case.reference(&data, &how), 1.0 / 64.0, &what);
        }
    }
}
