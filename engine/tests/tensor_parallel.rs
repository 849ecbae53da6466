//! A model cut among ranks gives what the whole model gives.

mod common;

use common::{FAMILIES, GGUFS, Runner, load_parts, tiny};
use headstart_engine::Sampling;
use headstart_engine::executor::{Found, Probe};
use headstart_engine::model::{LoadError, LoadOptions, Shard, WeightDtype, Weights};

/// What is found at every position of a text, over the whole vocabulary.
fn read(weights: &Weights, chunk_tokens: usize, sampling: &Sampling) -> Vec<Found> {
    let mut runner = Runner::parallel(weights, 4, chunk_tokens);
    let vocab = runner.executor.limits().vocab_size;
    let text: Vec<u32> = (0..40u32).map(|i| (i * 37 + 5) % vocab as u32).collect();
    let mut sequence = runner.sequence(&text, sampling);
    let everything = |position| Probe {
        position,
        target: Some((position * 11 % vocab) as u32),
        sample: true,
        top: vocab,
    };
    let probes = (0..text.len()).map(everything).collect();
    runner.extend(&mut [(&mut sequence, probes)]).remove(0)
}

#[test]
fn logits_of_two_and_four_ranks_are_those_of_one() {
    for name in FAMILIES.into_iter().chain(GGUFS) {
        let of =
            |tp| read(&load_parts(&tiny(name), WeightDtype::F32, tp), 256, &Sampling::default());
        let whole = of(1);
        for tp in [2, 3, 4] {
            for (position, (cut, whole)) in of(tp).iter().zip(&whole).enumerate() {
                let mut by_token = cut.top.clone();
                by_token.sort_by_key(|scored| scored.token);
                let mut expected = whole.top.clone();
                expected.sort_by_key(|scored| scored.token);
                assert_eq!(by_token.len(), expected.len());
                for (cut, whole) in by_token.iter().zip(&expected) {
                    let off = (cut.logprob - whole.logprob).abs();
                    assert!(off < 1e-4, "{name}, {tp} ranks, position {position}: off by {off}");
                }
                let (cut_target, target) = (cut.target.unwrap(), whole.target.unwrap());
                assert!((cut_target - target).abs() < 1e-4);
                assert!(cut.top.is_sorted_by(|a, b| a.logprob >= b.logprob));
                assert_eq!(cut.sampled, Some(cut.top[0]));
            }
        }
    }
}

/// With a gap of zero between them two tokens may change places; these draws are not that close.
#[test]
fn ranks_draw_the_tokens_that_one_draws() {
    let draws = [
        Sampling { temperature: 0.8, seed: 7, ..Sampling::default() },
        Sampling { temperature: 1.0, top_p: 0.9, top_k: 20, seed: 8, ..Sampling::default() },
        Sampling { frequency_penalty: 0.7, presence_penalty: 0.3, ..Sampling::default() },
    ];
    for sampling in draws {
        let of = |tp| -> Vec<u32> {
            let weights = load_parts(&tiny("qwen3"), WeightDtype::F32, tp);
            let found = read(&weights, 256, &sampling);
            found.iter().map(|found| found.sampled.expect("was asked for").token).collect()
        };
        assert_eq!(of(2), of(1));
        assert_eq!(of(4), of(1));
    }
}

#[test]
fn results_of_ranks_do_not_depend_on_the_chunking() {
    let weights = load_parts(&tiny("gemma2"), WeightDtype::F32, 2);
    let whole = read(&weights, 256, &Sampling::default());
    assert_eq!(read(&weights, 7, &Sampling::default()), whole);
}

/// Rows are kept as the file has them; columns that cut a block of quantised weights are expanded.
#[test]
fn a_rank_holds_its_part_alone() {
    for name in ["llama-linear-untied", "gemma2.gguf"] {
        let whole = load_parts(&tiny(name), WeightDtype::Auto, 1).weight_bytes();
        let parts = load_parts(&tiny(name), WeightDtype::Auto, 2);
        for part in parts.parts() {
            // Tiles are padded: a tiny model's halves are more than half of it.
            assert!(part.weight_bytes() < whole * 3 / 4, "{} of {whole}", part.weight_bytes());
        }
    }
}

#[test]
fn more_ranks_than_heads_are_refused() {
    let options = LoadOptions { dtype: WeightDtype::F32, threads: 1 };
    let error = Weights::load(&tiny("qwen3"), options, 5, &mut |_| {}).expect_err("four heads");
    assert!(matches!(error, LoadError::Ranks { .. }));
    let message = error.to_string();
    assert!(message.contains("expected 1 to 4 tensor-parallel ranks"), "{message}");
    assert_eq!(Shard::WHOLE, Shard { rank: 0, ranks: 1 });
}
