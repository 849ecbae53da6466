use super::*;
use crate::dequantise;
use crate::testing::Rng;

const ALL: [DType; 11] = [
    DType::F32,
    DType::F16,
    DType::BF16,
    DType::Q8_0,
    DType::Q4_0,
    DType::Q4_1,
    DType::Q5_0,
    DType::Q5_1,
    DType::Q4_K,
    DType::Q5_K,
    DType::Q6_K,
];

/// Random blocks whose f16 scales are small and finite.
fn random_bytes(rng: &mut Rng, dtype: DType, elements: usize) -> Vec<u8> {
    let mut bytes = rng.bytes(dtype.bytes_for(elements).unwrap());
    let scales: &[usize] = match dtype {
        DType::F32 => {
            return (0..elements).flat_map(|_| rng.float(1.0).to_le_bytes()).collect();
        }
        DType::F16 => {
            let f = |r: &mut Rng| half::f16::from_f32(r.float(1.0)).to_le_bytes();
            return (0..elements).flat_map(|_| f(rng)).collect();
        }
        DType::BF16 => {
            let f = |r: &mut Rng| half::bf16::from_f32(r.float(1.0)).to_le_bytes();
            return (0..elements).flat_map(|_| f(rng)).collect();
        }
        DType::Q8_0 | DType::Q4_0 | DType::Q5_0 => &[0],
        DType::Q4_1 | DType::Q5_1 | DType::Q4_K | DType::Q5_K => &[0, 2],
        DType::Q6_K => &[208],
    };
    for block in bytes.chunks_exact_mut(dtype.block_bytes()) {
        for at in scales {
            let s = half::f16::from_f32(rng.float(0.1));
            block[*at..at + 2].copy_from_slice(&s.to_le_bytes());
        }
    }
    bytes
}

fn isas() -> Vec<Isa> {
    let all = [Isa::Portable, Isa::Avx2, Isa::Avx512, Isa::Vnni, Isa::Amx];
    all.into_iter().filter(|i| *i <= Cpu::get().isa).collect()
}

/// The largest [`error`] that a product may have beside that of [`seen`].
const BOUND: f64 = 3e-5;

/// The inputs that a product multiplies with, rows of `k`: rounded as its weights want it.
fn seen(isa: Isa, dtype: DType, x: &[f32], k: usize) -> Vec<f32> {
    if Kind::of(dtype).is_some() {
        let mut levels = activations::Activations::default();
        levels.prepare(&ThreadPool::new(1), x, x.len() / k, k, false);
        return (0..x.len()).map(|i| levels.value(i / k, i % k)).collect();
    }
    match plan::way(isa, dtype) {
        plan::Float::Dots => x.iter().map(|v| half::bf16::from_f32(*v).to_f32()).collect(),
        _ => x.to_vec(),
    }
}

/// Steps of four inputs of which some stand out, by up to a hundred times.
fn uneven(rng: &mut Rng, len: usize) -> Vec<f32> {
    let mut x = rng.floats(len, 1.0);
    for step in x.chunks_mut(4) {
        let times = 100f32.powf(rng.float(1.0).abs().powi(3));
        step.iter_mut().for_each(|v| *v *= times);
    }
    x
}

fn product(isa: Isa, pool: &ThreadPool, w: &Matrix, x: &[f32], m: usize) -> Vec<f32> {
    let mut y = vec![f32::NAN; m * w.rows()];
    run_group(isa, pool, x, m, &mut [(w, &mut y)]);
    y
}

/// The product as [`int`] defines it, fused.
fn definition(pool: &ThreadPool, w: &Matrix, x: &[f32], m: usize) -> Vec<f32> {
    let Store::Quant(tiles) = &w.store else { panic!("{w:?}") };
    let mut levels = activations::Activations::default();
    levels.prepare(pool, x, m, w.cols, false);
    let mut y = vec![f32::NAN; m * w.rows];
    let out = Out { ptr: SendPtr(y.as_mut_ptr()), stride: w.rows };
    // SAFETY: the output has the rows of `x` and the columns of `w`, and nobody else has it.
    unsafe { int::plain::<true>(tiles, &levels, 0..w.rows.div_ceil(PANEL), 0..m, out) };
    y
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|v| v.to_bits()).collect()
}

/// The largest difference to the f64 product, relative to the sum of magnitudes.
fn error(wide: &[f32], x: &[f32], y: &[f32], k: usize) -> f64 {
    let n = wide.len() / k;
    let mut worst = 0f64;
    for (x, y) in x.chunks(k).zip(y.chunks(n)) {
        for (w, y) in wide.chunks(k).zip(y) {
            let terms = || w.iter().zip(x).map(|(a, b)| f64::from(*a) * f64::from(*b));
            let size: f64 = terms().map(f64::abs).sum();
            worst = worst.max((f64::from(*y) - terms().sum::<f64>()).abs() / (size + 1e-30));
        }
    }
    worst
}

/// The last ones are cut, for two threads, into pieces of twelve panels and one of seven: streams, a
/// pair and a single one.
fn shapes(dtype: DType) -> Vec<(usize, usize)> {
    match dtype.block_len() {
        1 => vec![(1, 1), (3, 7), (17, 33), (64, 64), (100, 515), (70, 1100), (31, 96), (1451, 40)],
        32 => vec![
            (1, 32),
            (5, 64),
            (17, 96),
            (192, 576),
            (33, 288),
            (50, 1056),
            (600, 96),
            (1451, 32),
        ],
        _ => vec![(1, 256), (19, 512), (64, 1536), (40, 768), (1400, 512), (1451, 256)],
    }
}

#[test]
fn every_type_and_instruction_set_is_faithful() {
    let mut rng = Rng::new(11);
    let pool = ThreadPool::new(2);
    for dtype in ALL {
        for (n, k) in shapes(dtype) {
            let bytes = random_bytes(&mut rng, dtype, n * k);
            let mut wide = vec![0.0; n * k];
            dequantise(dtype, &bytes, &mut wide).unwrap();
            let w = Matrix::from_bytes(dtype, &bytes, n, k).unwrap();
            assert_eq!((w.rows(), w.cols(), w.dtype()), (n, k, dtype));
            let mut row = vec![0.0; k];
            for r in 0..n {
                w.row_f32(r, &mut row);
                assert_eq!(bits(&row), bits(&wide[r * k..][..k]), "{dtype} row {r}");
            }
            for m in [1, 2, 5, 19] {
                let x = rng.floats(m * k, 2.0);
                for isa in isas() {
                    let y = product(isa, &pool, &w, &x, m);
                    let worst = error(&wide, &seen(isa, dtype, &x, k), &y, k);
                    assert!(worst < BOUND, "{dtype} {isa:?} {n}x{k} m={m}: {worst}");
                }
            }
        }
    }
}

#[test]
fn integer_kernels_agree_to_the_bit() {
    let mut rng = Rng::new(17);
    let pool = ThreadPool::new(2);
    for dtype in [DType::Q8_0, DType::Q4_0, DType::Q4_1, DType::Q4_K, DType::Q6_K] {
        for (n, k) in shapes(dtype) {
            let w = Matrix::from_bytes(dtype, &random_bytes(&mut rng, dtype, n * k), n, k).unwrap();
            for m in [1, 3, 4, 5, 8, 16, 23] {
                let x = uneven(&mut rng, m * k);
                // Without fused multiply-adds plain Rust rounds differently.
                let fused = isas().into_iter().filter(|i| *i > Isa::Portable);
                let want = bits(&definition(&pool, &w, &x, m));
                for isa in fused {
                    assert!(
                        bits(&product(isa, &pool, &w, &x, m)) == want,
                        "{dtype} {isa:?} {n}x{k} m={m}"
                    );
                }
            }
        }
    }
}

#[test]
fn a_row_is_the_same_in_any_batch() {
    let mut rng = Rng::new(12);
    let (one, two) = (ThreadPool::new(1), ThreadPool::new(3));
    for dtype in ALL {
        let (n, k) = (83, 768 + if dtype.block_len() == 1 { 5 } else { 0 });
        let w = Matrix::from_bytes(dtype, &random_bytes(&mut rng, dtype, n * k), n, k).unwrap();
        for isa in isas() {
            let top = if isa == Isa::Portable { 20 } else { 300 };
            let x = uneven(&mut rng, top * k);
            let alone: Vec<f32> = x.chunks(k).flat_map(|x| product(isa, &one, &w, x, 1)).collect();
            for m in [2, 3, 4, 5, 6, 7, 8, 15, 16, 17, 31, 33, 64, 100, 129, 300] {
                if m > top {
                    continue;
                }
                let from = rng.below(top - m + 1);
                let y = product(isa, &two, &w, &x[from * k..(from + m) * k], m);
                let want = &alone[from * n..(from + m) * n];
                assert!(bits(&y) == bits(want), "{dtype} {isa:?} m={m}");
            }
        }
    }
}

/// The largest sums of 16 and 32 bits that there can be.
#[test]
fn the_largest_weights_and_inputs_do_not_overflow() {
    let pool = ThreadPool::new(2);
    let (n, k) = (40, 512);
    for dtype in [DType::Q8_0, DType::Q4_0, DType::Q4_1, DType::Q4_K, DType::Q6_K] {
        // All bits set are the largest weight that is stored without a sign, none the smallest.
        for byte in [0u8, 0xff, 0x7f, 0x80] {
            let mut block = vec![byte; dtype.block_bytes()];
            let one = half::f16::ONE.to_le_bytes();
            match dtype {
                DType::Q6_K => {
                    block[192..208].fill(i8::MIN as u8);
                    block[208..].copy_from_slice(&one);
                }
                DType::Q4_1 | DType::Q4_K => block[..4].copy_from_slice(&[one, one].concat()),
                _ => block[..2].copy_from_slice(&one),
            }
            let bytes = block.repeat(n * k / dtype.block_len());
            let w = Matrix::from_bytes(dtype, &bytes, n, k).unwrap();
            let mut wide = vec![0.0; n * k];
            dequantise(dtype, &bytes, &mut wide).unwrap();
            // All alike; two steps of each group with the high level's largest, in both halves or one.
            let inputs = |i: usize, large: [usize; 2]| match large.contains(&(i % 32 / 4)) {
                true => 16.0,
                false => 1.0,
            };
            for (m, sign, large) in
                [(1, 1.0, [8, 8]), (7, -1.0, [0, 7]), (16, 1.0, [2, 3]), (33, -1.0, [8, 8])]
            {
                let x: Vec<f32> = (0..m * k).map(|i| sign * inputs(i, large)).collect();
                let want = definition(&pool, &w, &x, m);
                assert!(error(&wide, &x, &want, k) < 1e-6, "{dtype} {byte:x} m={m}");
                for isa in isas() {
                    let y = product(isa, &pool, &w, &x, m);
                    assert!(error(&wide, &x, &y, k) < 1e-6, "{dtype} {byte:x} {isa:?} m={m}");
                    assert!(isa == Isa::Portable || bits(&y) == bits(&want), "{dtype} {isa:?}");
                }
            }
        }
    }
}

#[test]
fn extreme_inputs_stay_defined() {
    let mut rng = Rng::new(13);
    let pool = ThreadPool::new(2);
    for dtype in ALL {
        let (n, k) = (20, 512);
        let bytes = random_bytes(&mut rng, dtype, n * k);
        let mut wide = vec![0.0; n * k];
        dequantise(dtype, &bytes, &mut wide).unwrap();
        let w = Matrix::from_bytes(dtype, &bytes, n, k).unwrap();
        for isa in isas() {
            for (m, scale) in
                [3, 9].into_iter().flat_map(|m| [0.0, 1e-44, 1e-39, 1e-30, 1e30].map(|s| (m, s)))
            {
                let x = rng.floats(m * k, scale);
                let y = product(isa, &pool, &w, &x, m);
                let tiny = f64::from(scale) < 1e-29;
                for (i, v) in y.iter().enumerate() {
                    assert!(v.is_finite() && (!tiny || v.abs() < 1e-25), "{dtype} {isa:?} {i} {v}");
                }
                if scale == 1e30 {
                    let worst = error(&wide, &seen(isa, dtype, &x, k), &y, k);
                    assert!(worst < BOUND, "{dtype} {isa:?} {worst}");
                }
            }
            // One outlier costs the others of its block half a step of 1/2032 of it, nobody else.
            let mut x = rng.floats(k, 1e-3);
            x[300] = 100.0;
            for (w, y) in wide.chunks(k).zip(product(isa, &pool, &w, &x, 1)) {
                let exact: f64 = w.iter().zip(&x).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                let block: f64 = w[256..].iter().map(|v| f64::from(v.abs())).sum();
                let bound = block * 100.0 * 2.5e-4 + exact.abs() * 1e-5;
                assert!((f64::from(y) - exact).abs() < bound, "{dtype} {isa:?}");
            }
            // What is not finite spoils its own row only.
            for m in [3, 9] {
                let mut x = rng.floats(m * k, 1.0);
                x[k + 7] = f32::NAN;
                x[2 * k + 40] = f32::INFINITY;
                let y = product(isa, &pool, &w, &x, m);
                let spoilt = n..3 * n;
                for (i, v) in y.iter().enumerate() {
                    assert!(v.is_finite() || spoilt.contains(&i), "{dtype} {isa:?} m={m}");
                }
                assert!(y[n..2 * n].iter().all(|v| v.is_nan()), "{dtype} {isa:?} m={m}");
                assert!(y[2 * n..3 * n].iter().filter(|v| !v.is_finite()).count() > n / 2);
            }
        }
    }
}

#[test]
fn f32_storage_and_bf16_storage() {
    let mut rng = Rng::new(14);
    let pool = ThreadPool::new(2);
    let (n, k) = (37, 130);
    let data = rng.floats(n * k, 1.0);
    let rounded: Vec<f32> = data.iter().map(|v| half::bf16::from_f32(*v).to_f32()).collect();
    for (dtype, want) in [(DType::F32, &data), (DType::BF16, &rounded)] {
        let w = Matrix::from_f32(&pool, &data, n, k, dtype);
        let mut row = vec![0.0; k];
        for r in 0..n {
            w.row_f32(r, &mut row);
            assert_eq!(row, want[r * k..][..k]);
        }
        let x = rng.floats(4 * k, 1.0);
        let isa = Cpu::get().isa;
        let y = product(isa, &pool, &w, &x, 4);
        let bound = if dtype == DType::F32 { 2e-6 } else { 1.2e-5 };
        assert!(error(want, &seen(isa, dtype, &x, k), &y, k) < bound, "{dtype}");
    }
}

#[test]
fn a_group_equals_its_members() {
    let mut rng = Rng::new(15);
    let pool = ThreadPool::new(2);
    let k = 512;
    let types = [DType::Q4_K, DType::Q6_K, DType::F32, DType::Q4_K, DType::BF16, DType::Q8_0];
    let make = |(i, d): (usize, &DType)| {
        let n = 16 + 13 * i;
        Matrix::from_bytes(*d, &random_bytes(&mut rng, *d, n * k), n, k).unwrap()
    };
    let all: Vec<Matrix> = types.iter().enumerate().map(make).collect();
    for m in [1, 3, 40] {
        let x = Rng::new(16).floats(m * k, 1.0);
        let mut outs: Vec<Vec<f32>> = all.iter().map(|w| vec![0.0; m * w.rows()]).collect();
        let mut products: Vec<_> = all.iter().zip(outs.iter_mut().map(|o| &mut o[..])).collect();
        matmul_group(&pool, &x, m, &mut products);
        for (w, y) in all.iter().zip(&outs) {
            let mut alone = vec![0.0; m * w.rows()];
            w.matmul(&pool, &x, m, &mut alone);
            assert_eq!(bits(&alone), bits(y));
        }
    }
}

#[test]
fn wrong_lengths_are_refused() {
    assert!(Matrix::from_bytes(DType::Q4_0, &[0; 18], 1, 33).is_err());
    assert!(Matrix::from_bytes(DType::Q4_0, &[0; 17], 1, 32).is_err());
    assert!(Matrix::from_bytes(DType::Q4_K, &[0; 144], usize::MAX, 256).is_err());
    assert!(Matrix::from_bytes(DType::F32, &[0; 8], 2, 1).is_ok());
}

#[test]
fn sums_of_nothing_are_zero() {
    let pool = ThreadPool::new(2);
    for dtype in ALL {
        let w = Matrix::from_bytes(dtype, &[], 20, 0).unwrap();
        for m in [0, 1, 16, 40] {
            for isa in isas() {
                assert_eq!(product(isa, &pool, &w, &[], m), vec![0.0; m * 20], "{dtype} {isa:?}");
            }
        }
    }
}
