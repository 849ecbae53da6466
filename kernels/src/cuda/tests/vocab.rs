//! Reductions over the vocabulary and the sampler, against plain ones.

use super::*;
use crate::cuda::SampleArgs;

/// Logits with many ties.
fn logits(rng: &mut Rng, len: usize, scale: f32) -> Vec<f32> {
    rng.floats(len, scale).into_iter().map(|v| (v * 8.0).round() / 8.0).collect()
}

#[test]
fn facts_and_likeliest_tokens() {
    let (device, mut rng) = (device(), Rng::new(51));
    for (vocab, rows) in [(1, 1), (31, 3), (4096, 2), (4097, 2), (9001, 33)] {
        let mut x = logits(&mut rng, rows * vocab, 12.0);
        if vocab > 40 {
            x[vocab..vocab + 5].fill(f32::NEG_INFINITY);
        }
        let mut batch = batch(&mut rng, &vec![0; rows + 2], rows + 2, 16, 1);
        batch.probes = (0..rows as u32 + 2).collect();
        let target = |i: usize| if i % 3 == 1 { u32::MAX } else { (i * 7 % vocab) as u32 };
        batch.targets = (0..rows + 2).map(target).collect();
        let staged = staged(&device, &batch, vocab, rows + 2, 16);
        let buffer = upload(&device, &x);
        let mut parts = upload(&device, &vec![0.0; Device::vocab_parts(rows, vocab)]);
        let mut found = upload(&device, &vec![0.0; 4 * rows]);
        let all = 0..vocab;
        let done = device.vocab_stats(&buffer, all, rows, &staged, 2, &mut parts, &mut found);
        done.expect("a launch");
        let found = device.read_found(&found, rows).expect("a copy");
        let wanted: Vec<(u32, u32)> =
            (0..rows as u32).map(|r| (r, (r % 6).min(vocab as u32))).collect();
        let top = device.top_tokens(&buffer, vocab, &wanted).expect("a launch");
        for (i, (found, row)) in found.iter().zip(x.chunks_exact(vocab)).enumerate() {
            let expected = crate::vocab_stats(row);
            assert_eq!((found.argmax, found.max), (expected.argmax, expected.max));
            let near = 1e-5 * expected.log_sum_exp.abs().max(1.0);
            assert!((found.log_sum_exp - expected.log_sum_exp).abs() < near, "{found:?}");
            match target(i + 2) {
                u32::MAX => assert!(found.target.is_nan()),
                token => assert_eq!(found.target, row[token as usize]),
            }
            assert_eq!(top[i], crate::top_n(row, wanted[i].1 as usize), "{vocab} row {i}");
        }
    }
}

#[test]
fn a_row_that_is_not_finite_shows() {
    let device = device();
    let mut x = vec![0.5; 2 * 5000];
    x[4999] = f32::NAN;
    x[5000..].fill(f32::NEG_INFINITY);
    let mut batch = batch(&mut Rng::new(1), &[0; 2], 2, 16, 1);
    (batch.probes, batch.targets) = (vec![0, 1], vec![u32::MAX; 2]);
    let staged = staged(&device, &batch, 5000, 2, 16);
    let mut parts = upload(&device, &vec![0.0; Device::vocab_parts(2, 5000)]);
    let mut found = upload(&device, &[0.0; 8]);
    let buffer = upload(&device, &x);
    device.vocab_stats(&buffer, 0..5000, 2, &staged, 0, &mut parts, &mut found).expect("a launch");
    let found = device.read_found(&found, 2).expect("a copy");
    assert!(found.iter().all(|f| !f.log_sum_exp.is_finite()), "{found:?}");
}

const GREEDY: SampleArgs = SampleArgs {
    seed: 0,
    position: 0,
    temperature: 0.0,
    top_p: 1.0,
    min_p: 0.0,
    top_k: 0,
    row: 0,
    penalties: 0,
    first_penalty: 0,
    padding: 0,
};

/// The tokens that filters keep, most likely first, with their probabilities among each other.
fn kept(row: &[f32], args: &SampleArgs, penalties: &[(u32, f32)]) -> Vec<(u32, f64)> {
    let mut x = row.to_vec();
    for (token, penalty) in &penalties[args.first_penalty as usize..][..args.penalties as usize] {
        x[*token as usize] -= penalty;
    }
    let max = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut all: Vec<(u32, f32)> =
        x.iter().enumerate().map(|(i, v)| (i as u32, (v - max) / args.temperature)).collect();
    all.retain(|(_, w)| args.min_p == 0.0 || *w >= args.min_p.ln());
    all.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    if args.top_k > 0 {
        all.truncate(args.top_k as usize);
    }
    let total: f64 = all.iter().map(|(_, w)| f64::from(*w).exp()).sum();
    let mut mass = 0.0;
    let wanted = total * f64::from(args.top_p);
    let nucleus = all.iter().position(|(_, w)| {
        mass += f64::from(*w).exp();
        args.top_p < 1.0 && mass >= wanted
    });
    all.truncate(nucleus.map_or(all.len(), |i| i + 1));
    let total: f64 = all.iter().map(|(_, w)| f64::from(*w).exp()).sum();
    all.iter().map(|(t, w)| (*t, f64::from(*w).exp() / total)).collect()
}

/// Draws of every parameter set fall where the filters leave something, as often as they should.
#[test]
fn samples_follow_the_filtered_distribution() {
    let (device, mut rng) = (device(), Rng::new(52));
    let vocab = 700;
    let x = logits(&mut rng, 2 * vocab, 4.0);
    let buffer = upload(&device, &x);
    let penalties = [(3, 1.0), (690, 2.5), (crate::vocab_stats(&x[vocab..]).argmax, 3.0)];
    let warm = SampleArgs { temperature: 0.9, row: 1, penalties: 2, first_penalty: 1, ..GREEDY };
    let cases = [
        warm,
        SampleArgs { top_k: 5, ..warm },
        SampleArgs { top_p: 0.4, ..warm },
        SampleArgs { min_p: 0.2, ..warm },
        SampleArgs { top_k: 9, top_p: 0.7, min_p: 0.01, ..warm },
        SampleArgs { top_k: 1, penalties: 0, row: 0, ..warm },
    ];
    const DRAWS: usize = 400;
    for case in cases {
        let args: Vec<SampleArgs> = (0..DRAWS as u64)
            .map(|i| SampleArgs { seed: 7 + i / 50, position: i, ..case })
            .collect();
        let mut work = upload(&device, &vec![0.0; DRAWS * vocab]);
        let drawn = device.sample(&buffer, vocab, &args, &penalties, &mut work).expect("draws");
        let again = device.sample(&buffer, vocab, &args, &penalties, &mut work).expect("draws");
        assert_eq!(drawn, again);
        let row = &x[case.row as usize * vocab..][..vocab];
        let kept = kept(row, &case, &penalties);
        assert!(drawn.iter().all(|(token, logit)| row[*token as usize] == *logit));
        let drawn: Vec<u32> = drawn.into_iter().map(|(token, _)| token).collect();
        for token in &drawn {
            assert!(kept.iter().any(|(t, _)| t == token), "{case:?}: {token} was filtered");
        }
        for (token, probability) in kept.iter().take(3) {
            let expected = probability * DRAWS as f64;
            let count = drawn.iter().filter(|t| *t == token).count() as f64;
            let deviation = (expected * (1.0 - probability)).sqrt().max(0.5);
            assert!((count - expected).abs() < 5.0 * deviation, "{case:?}: {token} {count}");
        }
    }
    // Greedy, penalised: the best that is left, the lowest id on ties.
    let args = [SampleArgs { row: 1, penalties: 2, first_penalty: 1, ..GREEDY }];
    let mut work = upload(&device, &vec![0.0; vocab]);
    let drawn = device.sample(&buffer, vocab, &args, &penalties, &mut work).expect("a draw");
    let mut row = x[vocab..].to_vec();
    penalties[1..].iter().for_each(|(t, p)| row[*t as usize] -= p);
    let best = crate::vocab_stats(&row).argmax;
    assert_eq!(drawn, [(best, x[vocab + best as usize])]);
}
