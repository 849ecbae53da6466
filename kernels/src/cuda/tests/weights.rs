//! Products and look-ups against expanded weights.

use super::*;
use crate::DType;
use crate::cuda::{Tile, Weights};

const FORMATS: [DType; 6] =
    [DType::BF16, DType::Q8_0, DType::Q4_0, DType::Q4_1, DType::Q4_K, DType::Q6_K];

/// Random weights in a format, and what they are worth.
fn random(rng: &mut Rng, dtype: DType, rows: usize, cols: usize) -> (Vec<u8>, Vec<f32>) {
    let mut bytes = match dtype {
        DType::F32 | DType::BF16 => {
            crate::quantise(dtype, &rng.floats(rows * cols, 1.0)).expect("a plain type")
        }
        _ => rng.bytes(dtype.bytes_for(rows * cols).expect("whole blocks")),
    };
    // Random bits make wild scales; these are tame ones.
    let scales: &[usize] = match dtype {
        DType::Q8_0 | DType::Q4_0 => &[0],
        DType::Q4_1 | DType::Q4_K => &[0, 2],
        DType::Q6_K => &[208],
        _ => &[],
    };
    for block in bytes.chunks_exact_mut(dtype.block_bytes()) {
        for at in scales {
            let scale = half::f16::from_f32(rng.float(0.02)).to_le_bytes();
            block[*at..at + 2].copy_from_slice(&scale);
        }
    }
    let mut values = vec![0.0; rows * cols];
    crate::dequantise(dtype, &bytes, &mut values).expect("whole blocks");
    (bytes, values)
}

/// `x · wᵀ` in double precision.
fn product(x: &[f32], w: &[f32], m: usize, cols: usize) -> Vec<f32> {
    let row = |i: usize| {
        let dot = move |w: &[f32]| -> f32 {
            let x = &x[i * cols..][..cols];
            x.iter().zip(w).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>() as f32
        };
        w.chunks_exact(cols).map(dot)
    };
    (0..m).flat_map(row).collect()
}

struct Case {
    dtype: DType,
    rows: usize,
    cols: usize,
    m: usize,
    /// Weights are rounded to bf16 on their way to the tensor cores.
    rounds: bool,
}

fn check(device: &Device, rng: &mut Rng, case: &Case) {
    let Case { dtype, rows, cols, m, .. } = *case;
    let (bytes, mut values) = random(rng, dtype, rows, cols);
    if case.rounds {
        values = rounded(Precision::Bf16, &values);
    }
    let precision = if dtype == DType::F32 { Precision::F32 } else { Precision::Bf16 };
    let x = rounded(precision, &rng.floats(m * cols, 1.0));
    let weights = Weights::upload(device, dtype, &bytes, rows, cols).expect("memory");
    let input = activations(device, precision, &x);
    // The output has columns before and after, which must stay.
    let (at, stride) = (3, rows + 5);
    let mut y = upload(device, &vec![7.0; m * stride]);
    let mut tile = Tile::new(device, cols, true).expect("memory");
    device.matmul(&weights, &input, m, &mut y, stride, at, &mut tile).expect("a launch");
    let got = read(device, &y);
    let expected = product(&x, &values, m, cols);
    let what = format!("{dtype} {rows}x{cols}, {m} rows");
    for (got, expected) in got.chunks_exact(stride).zip(expected.chunks_exact(rows)) {
        assert_close(&got[at..at + rows], expected, 2e-5, &what);
        assert!(got[..at].iter().chain(&got[at + rows..]).all(|v| *v == 7.0), "{what}: around");
    }
}

#[test]
fn products_in_place_match_the_reference() {
    let (device, mut rng) = (device(), Rng::new(31));
    for dtype in FORMATS {
        let block = dtype.block_len().max(8);
        for (rows, blocks, m) in [(1, 1, 1), (5, 3, 2), (9, 2, 3), (4, 5, 4), (7, 3, 8), (6, 1, 5)]
        {
            check(&device, &mut rng, &Case { dtype, rows, cols: blocks * block, m, rounds: false });
        }
        if dtype != DType::BF16 {
            check(&device, &mut rng, &Case { dtype, rows: 6, cols: 256, m: 27, rounds: false });
        }
    }
}

#[test]
fn products_on_tensor_cores_match_the_reference() {
    let (device, mut rng) = (device(), Rng::new(32));
    for dtype in FORMATS {
        check(&device, &mut rng, &Case { dtype, rows: 11, cols: 256, m: 40, rounds: true });
    }
}

#[test]
fn f32_products_do_not_depend_on_the_batch() {
    let (device, mut rng) = (device(), Rng::new(33));
    for (rows, cols, m) in [(1, 8, 1), (33, 40, 7), (40, 72, 33), (65, 96, 3)] {
        check(&device, &mut rng, &Case { dtype: DType::F32, rows, cols, m, rounds: false });
    }
    let (bytes, _) = random(&mut rng, DType::F32, 35, 80);
    let weights = Weights::upload(&device, DType::F32, &bytes, 35, 80).expect("memory");
    let x = rng.floats(40 * 80, 1.0);
    let mut tile = Tile::new(&device, 80, false).expect("memory");
    let mut run = |x: &[f32]| {
        let (m, mut y) = (x.len() / 80, upload(&device, &vec![0.0; x.len() / 80 * 35]));
        let x = activations(&device, Precision::F32, x);
        device.matmul(&weights, &x, m, &mut y, 35, 0, &mut tile).expect("a launch");
        read(&device, &y)
    };
    let whole = run(&x);
    for row in [0, 17, 39] {
        assert_eq!(run(&x[row * 80..][..80]), whole[row * 35..][..35], "row {row}");
    }
}

/// The sums of a row have one order, whatever batch it is in, as long as weights are read in place.
#[test]
fn quantised_products_in_place_do_not_depend_on_the_batch() {
    let (device, mut rng) = (device(), Rng::new(34));
    let (bytes, _) = random(&mut rng, DType::Q4_K, 5, 512);
    let weights = Weights::upload(&device, DType::Q4_K, &bytes, 5, 512).expect("memory");
    let x = rng.floats(30 * 512, 1.0);
    let mut tile = Tile::new(&device, 512, false).expect("memory");
    let mut run = |x: &[f32]| {
        let (m, mut y) = (x.len() / 512, upload(&device, &vec![0.0; x.len() / 512 * 5]));
        let x = activations(&device, Precision::Bf16, x);
        device.matmul(&weights, &x, m, &mut y, 5, 0, &mut tile).expect("a launch");
        read(&device, &y)
    };
    let whole = run(&x);
    for (row, count) in [(0, 1), (3, 2), (11, 4), (17, 8), (29, 1)] {
        let part = run(&x[row * 512..][..count * 512]);
        assert_eq!(part, whole[row * 5..][..count * 5], "rows {row}..+{count}");
    }
}

#[test]
fn embeddings_are_rows_and_joined_matrices_are_whole() {
    let (device, mut rng) = (device(), Rng::new(35));
    for dtype in FORMATS.into_iter().chain([DType::F32]) {
        let cols = 2 * dtype.block_len().max(24);
        let (a, a_values) = random(&mut rng, dtype, 3, cols);
        let (b, b_values) = random(&mut rng, dtype, 5, cols);
        let [a, b] = [(a, 3), (b, 5)]
            .map(|(bytes, rows)| Weights::upload(&device, dtype, &bytes, rows, cols).expect("ok"));
        let joined = Weights::joined(&device, &[&a, &b]).expect("memory").expect("one format");
        assert_eq!((joined.rows(), joined.bytes()), (8, a.bytes() + b.bytes()));
        let mut batch = batch(&mut rng, &[0; 5], 5, 16, 1);
        batch.tokens = vec![7, 0, 2, 3, 7];
        let staged = staged(&device, &batch, 8, 5, 16);
        let mut out = upload(&device, &vec![0.0; 5 * cols]);
        device.embed(&joined, 0, &staged, 2.0, &mut out).expect("a launch");
        let values = [a_values, b_values].concat();
        let expected: Vec<f32> = batch
            .tokens
            .iter()
            .flat_map(|t| values[*t as usize * cols..][..cols].iter().map(|v| v * 2.0))
            .collect();
        assert_close(&read(&device, &out), &expected, 1e-6, &format!("{dtype}"));
    }
    let (bytes, _) = random(&mut rng, DType::BF16, 2, 16);
    let other = Weights::upload(&device, DType::BF16, &bytes, 2, 16).expect("memory");
    let (bytes, _) = random(&mut rng, DType::BF16, 2, 24);
    let wider = Weights::upload(&device, DType::BF16, &bytes, 2, 24).expect("memory");
    assert!(Weights::joined(&device, &[&other, &wider]).expect("no copy").is_none());
}

#[test]
fn what_kernels_cannot_read_is_refused() {
    let device = device();
    for (dtype, bytes, rows, cols) in [
        (DType::Q5_K, 176, 1, 256),
        (DType::F16, 16, 1, 8),
        (DType::BF16, 24, 1, 12),
        (DType::Q8_0, 35, 1, 32),
        (DType::Q4_K, 144, 2, 128),
        (DType::F32, 0, 0, 8),
    ] {
        let refused = Weights::upload(&device, dtype, &vec![0; bytes], rows, cols);
        assert!(refused.is_err(), "{dtype} {bytes} {rows} {cols}");
    }
}
