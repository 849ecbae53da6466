//! Ranks that share a device: their sums, and their parts of the vocabulary.

use super::*;
use crate::DType;
use crate::cuda::{SAME_DEVICE_RANKS_MAX, Weights};

#[test]
fn ranks_are_added_in_their_order() {
    let (device, mut rng) = (device(), Rng::new(61));
    for (ranks, len, count) in [
        (1, 5, 5),
        (2, 1, 1),
        (3, 700, 611),
        (4, 300_001, 300_000),
        (SAME_DEVICE_RANKS_MAX, 33, 32),
    ] {
        // Magnitudes so different that another order has other bits.
        let values: Vec<Vec<f32>> =
            (0..ranks).map(|r| rng.floats(len, 10f32.powi((r % 5) as i32 - 2))).collect();
        let mut buffers: Vec<Buffer<f32>> = values.iter().map(|v| upload(&device, v)).collect();
        let mut all: Vec<&mut Buffer<f32>> = buffers.iter_mut().collect();
        device.sum_ranks(&mut all, count).expect("a launch");
        let sum = |i: usize| values[1..].iter().fold(values[0][i], |sum, part| sum + part[i]);
        for (buffer, values) in buffers.iter().zip(&values) {
            let got = read(&device, buffer);
            for (i, got) in got.iter().enumerate() {
                let expected = if i < count { sum(i) } else { values[i] };
                assert_eq!(got.to_bits(), expected.to_bits(), "{ranks} ranks, {i} of {len}");
            }
        }
    }
}

/// Each rank looks its own tokens up, and their sum is what one rank finds.
#[test]
fn embeddings_of_parts_add_up_to_the_whole() {
    let (device, mut rng) = (device(), Rng::new(62));
    let (vocab, cols) = (11, 24);
    let values = rng.floats(vocab * cols, 1.0);
    let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    let mut batch = batch(&mut rng, &[0; 6], 6, 16, 1);
    batch.tokens = vec![10, 0, 3, 4, 7, 3];
    let staged = staged(&device, &batch, vocab, 6, 16);
    let parts = [0..4, 4..10, 10..11].map(|part| {
        let bytes = &bytes[part.start * cols * 4..part.end * cols * 4];
        let weights = Weights::upload(&device, DType::F32, bytes, part.len(), cols);
        let mut out = upload(&device, &[7.0; 6 * 24]);
        let weights = weights.expect("memory");
        device.embed(&weights, part.start, &staged, 3.0, &mut out).expect("a launch");
        let got = read(&device, &out);
        for (token, row) in batch.tokens.iter().zip(got.chunks_exact(cols)) {
            let here = part.contains(&(*token as usize));
            assert!(here || row.iter().all(|v| *v == 0.0), "token {token} is not in {part:?}");
        }
        out
    });
    let mut parts = parts;
    let [a, b, c] = &mut parts;
    device.sum_ranks(&mut [a, b, c], 6 * cols).expect("a launch");
    let expected: Vec<f32> = batch
        .tokens
        .iter()
        .flat_map(|t| values[*t as usize * cols..][..cols].iter().map(|v| v * 3.0))
        .collect();
    assert_eq!(read(&device, &parts[1]), expected);
}

/// Tokens are named as in the whole vocabulary, and a target is found by the rank that has it.
#[test]
fn facts_of_a_part_of_the_vocabulary() {
    let (device, mut rng) = (device(), Rng::new(63));
    let (vocab, rows) = (9001, 3);
    let mut batch = batch(&mut rng, &[0; 3], 3, 16, 1);
    (batch.probes, batch.targets) = (vec![0, 1, 2], vec![4999, u32::MAX, 9000]);
    let staged = staged(&device, &batch, vocab, 3, 16);
    for part in [0..5000, 5000..9001] {
        let x = rng.floats(rows * part.len(), 12.0);
        let buffer = upload(&device, &x);
        let mut parts = upload(&device, &vec![0.0; Device::vocab_parts(rows, part.len())]);
        let mut found = upload(&device, &vec![0.0; 4 * rows]);
        let here = part.clone();
        let done = device.vocab_stats(&buffer, here, rows, &staged, 0, &mut parts, &mut found);
        done.expect("a launch");
        let found = device.read_found(&found, rows).expect("a copy");
        for (i, (found, row)) in found.iter().zip(x.chunks_exact(part.len())).enumerate() {
            let expected = crate::vocab_stats(row);
            assert_eq!(found.argmax, expected.argmax + part.start as u32, "{part:?} row {i}");
            assert_eq!(found.max, expected.max);
            match batch.targets[i] as usize {
                target if part.contains(&target) => {
                    assert_eq!(found.target, row[target - part.start]);
                }
                _ => assert!(found.target.is_nan(), "{part:?} row {i}: {found:?}"),
            }
        }
    }
}
