//! Norms, rotation, gates against the CPU kernels.

use super::*;
use crate::cuda::{Gate, KvCache, KvDims, Rope, Rows};
use crate::{RopeAngles, RopeStyle, ThreadPool};

const PRECISIONS: [Precision; 2] = [Precision::F32, Precision::Bf16];

#[test]
fn norms_add_what_there_is_to_add() {
    let (device, pool, mut rng) = (device(), ThreadPool::new(1), Rng::new(21));
    for precision in PRECISIONS {
        for (rows, width) in [(1, 1), (3, 17), (2, 576), (5, 1537)] {
            let x = rng.floats(rows * width, 3.0);
            let delta = rng.floats(rows * width, 1.0);
            let weight = rng.floats(width, 1.0);
            let (mut expected, mut sum) = (vec![0.0; x.len()], x.clone());
            crate::add_rms_norm(&pool, &mut sum, &delta, &weight, 1e-5, &mut expected);
            let mut residual = upload(&device, &x);
            let (delta, weights) = (upload(&device, &delta), upload(&device, &weight));
            let mut out = empty(&device, precision, rows * width);
            let first = Rows::First(rows);
            device
                .add_rms_norm(&mut residual, Some(&delta), &weights, 1e-5, first, &mut out)
                .expect("a launch");
            let what = format!("{precision:?} {rows} {width}");
            assert_eq!(read(&device, &residual), sum, "{what}");
            assert_close(&read_activations(&device, &out), &expected, tolerance(precision), &what);
            // Without a delta, of chosen rows.
            let chosen: Vec<u32> = (0..rows as u32).rev().collect();
            let mut batch = batch(&mut rng, &vec![0; rows], rows, 16, 1);
            batch.probes = chosen.clone();
            batch.targets = vec![u32::MAX; rows];
            let staged = staged(&device, &batch, 1, rows, 16);
            let some = Rows::Probes(&staged, rows / 2, rows - rows / 2);
            device
                .add_rms_norm(&mut residual, None, &weights, 1e-5, some, &mut out)
                .expect("a launch");
            let got = read_activations(&device, &out);
            for (i, row) in chosen[rows / 2..].iter().enumerate() {
                let expected = &expected[*row as usize * width..][..width];
                assert_close(&got[i * width..][..width], expected, tolerance(precision), &what);
            }
        }
    }
}

#[test]
fn gates_biases_and_caps() {
    let (device, pool, mut rng) = (device(), ThreadPool::new(1), Rng::new(22));
    for precision in PRECISIONS {
        for (rows, width) in [(1, 1), (3, 37), (2, 300)] {
            let x = rng.floats(rows * 2 * width, 6.0);
            let bias = rng.floats(2 * width, 1.0);
            for (gate, biased) in [(Gate::Silu, false), (Gate::GeluTanh, true)] {
                let value =
                    |r: usize, i: usize| x[r * 2 * width + i] + if biased { bias[i] } else { 0.0 };
                let side = |shift: usize| -> Vec<f32> {
                    let row = |r| (0..width).map(move |i| value(r, shift + i));
                    (0..rows).flat_map(row).collect()
                };
                let (mut expected, up) = (side(0), side(width));
                match gate {
                    Gate::Silu => crate::silu_mul(&pool, &mut expected, &up),
                    Gate::GeluTanh => crate::gelu_tanh_mul(&pool, &mut expected, &up),
                }
                let bias = biased.then(|| upload(&device, &bias));
                let mut out = empty(&device, precision, rows * width);
                let input = upload(&device, &x);
                device.gate(gate, &input, bias.as_ref(), rows, width, &mut out).expect("a launch");
                let got = read_activations(&device, &out);
                assert_close(&got, &expected, tolerance(precision), &format!("{gate:?}"));
            }
        }
    }
    let x = rng.floats(701, 90.0);
    let mut capped = upload(&device, &x);
    device.softcap(&mut capped, 30.0, 700).expect("a launch");
    let mut expected = x.clone();
    crate::softcap(&pool, &mut expected[..700], 30.0);
    assert_close(&read(&device, &capped), &expected, 1e-5, "softcap");
}

/// Rotation and KV write against the CPU's norm, rotation and plain placement.
#[test]
fn rope_writes_keys_and_values_to_their_slots() {
    let (device, pool, mut rng) = (device(), ThreadPool::new(1), Rng::new(23));
    let cases = [(2, 1, 8, 16, false), (6, 2, 64, 16, true), (4, 4, 20, 32, true)];
    for precision in PRECISIONS {
        for (heads, kv_heads, head_dim, page_size, extras) in cases {
            let dims = KvDims { layers: 3, kv_heads, head_dim, page_size, pages: 9 };
            let positions = [0, 17, 5, page_size as u32 * 2 - 1];
            let batch = batch(&mut rng, &positions, 9, page_size, 2);
            let staged = staged(&device, &batch, 1, 9, page_size);
            let width = (heads + 2 * kv_heads) * head_dim;
            let qkv = rng.floats(4 * width, 2.0);
            let bias = rng.floats(width, 1.0);
            let norms = [rng.floats(head_dim, 1.0), rng.floats(head_dim, 1.0)];
            let frequencies: Vec<f32> = (0..head_dim / 2).map(|i| 0.8f32.powi(i as i32)).collect();

            let mut expected = qkv.clone();
            if extras {
                crate::add_bias(&pool, &mut expected, &bias);
                for (i, row) in expected.chunks_exact_mut(head_dim).enumerate() {
                    let head = i % (heads + 2 * kv_heads);
                    let input = row.to_vec();
                    if head < heads + kv_heads {
                        let weight = &norms[usize::from(head >= heads)];
                        crate::rms_norm(&pool, &input, weight, 1e-6, row);
                    }
                }
            }
            let mut angles = RopeAngles::new(frequencies.clone(), 1.0);
            for (row, position) in expected.chunks_exact_mut(width).zip(positions) {
                angles.set_positions([position as usize]);
                let rotated = &mut row[..(heads + kv_heads) * head_dim];
                let count = heads + kv_heads;
                crate::rope(&pool, rotated, count, head_dim, &angles, RopeStyle::HalfSplit);
            }

            let mut kv = KvCache::new(&device, dims, precision).expect("a pool");
            let mut table = upload(&device, &vec![0.0; 4 * head_dim]);
            device
                .rope_table(&staged, &upload(&device, &frequencies), &mut table)
                .expect("a launch");
            let bias = extras.then(|| upload(&device, &bias));
            let norms = norms.map(|n| upload(&device, &n));
            let rope = Rope {
                heads,
                bias: bias.as_ref(),
                norms: extras.then_some((&norms[0], &norms[1])),
                eps: 1e-6,
            };
            let mut q = empty(&device, precision, 4 * heads * head_dim);
            let input = upload(&device, &qkv);
            device
                .rope_write(&input, &rope, &table, &staged, 1, &mut kv, &mut q)
                .expect("a launch");
            let (got_q, got_kv) = (read_activations(&device, &q), super::pages::all(&device, &kv));
            for (row, expected) in expected.chunks_exact(width).enumerate() {
                let what = format!("{precision:?} {heads} {kv_heads} {head_dim} row {row}");
                let near = tolerance(precision).max(4e-6);
                let (queries, rest) = expected.split_at(heads * head_dim);
                assert_close(&got_q[row * queries.len()..][..queries.len()], queries, near, &what);
                let position = positions[row] as usize;
                let page = batch.tables[row * 2 + position / page_size];
                for (i, head) in rest.chunks_exact(head_dim).enumerate() {
                    let at = super::pages::place(
                        dims,
                        page as usize,
                        1,
                        i / kv_heads,
                        i % kv_heads,
                        position % page_size,
                    );
                    assert_close(&got_kv[at..at + head_dim], head, near, &what);
                }
            }
        }
    }
}
