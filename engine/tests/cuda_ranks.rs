//! A model cut among ranks on GPUs gives what the whole model gives.
//!
//! Runs on the emulated device, which is several; with `HEADSTART_CUDA_TESTS=device` in the
//! environment on the machine's GPUs, where ranks on two of them are skipped if there is one.

mod common;

use std::sync::Arc;

use common::{FAMILIES, GGUFS, Runner, cuda_devices, load_parts, tiny, write_alone};
use headstart_engine::core::pages::PageId;
use headstart_engine::executor::cuda::{self, CudaExecutor, CudaModel, CudaOptions, Ranks};
use headstart_engine::executor::{Executor, Found, Probe, Row};
use headstart_engine::model::WeightDtype;
use headstart_engine::{Sampling, TokenId};

fn on_cuda(name: &str, dtype: WeightDtype, ranks: Ranks) -> Arc<CudaModel> {
    common::open_cuda_libraries();
    let (mut last, mut total) = (0, 0);
    let model = cuda::load(&tiny(name), dtype, ranks, None, &mut |progress| {
        assert!(progress.bytes_loaded >= last && progress.bytes_loaded <= progress.bytes_total);
        (last, total) = (progress.bytes_loaded, progress.bytes_total);
    });
    let model = model.unwrap_or_else(|e| panic!("{name}: {e}"));
    assert!(total > 0 && last == total);
    model
}

fn executor(model: &Arc<CudaModel>) -> CudaExecutor {
    let options = CudaOptions { kv_tokens: common::KV_TOKENS, ..CudaOptions::default() };
    CudaExecutor::new(Arc::clone(model), &options).expect("options are right")
}

fn runner(model: &Arc<CudaModel>) -> Runner {
    Runner::on(Box::new(executor(model)))
}

/// What is found at every position of a text, over the whole vocabulary.
fn read(mut runner: Runner, sampling: &Sampling) -> Vec<Found> {
    let vocab = runner.executor.limits().vocab_size;
    let text: Vec<TokenId> = (0..30u32).map(|i| (i * 37 + 5) % vocab as u32).collect();
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

/// Fails unless all log-probabilities of `cut` are those of `whole` within `tolerance`.
#[track_caller]
fn assert_close(cut: &[Found], whole: &[Found], tolerance: f32, what: &str) {
    assert_eq!(cut.len(), whole.len(), "{what}");
    for (position, (cut, whole)) in cut.iter().zip(whole).enumerate() {
        let by_token = |found: &Found| {
            let mut top = found.top.clone();
            top.sort_by_key(|scored| scored.token);
            top
        };
        let (by_token, expected) = (by_token(cut), by_token(whole));
        assert_eq!(by_token.len(), expected.len(), "{what}");
        let target = (cut.target.expect("asked"), whole.target.expect("asked"));
        let all = by_token.iter().zip(&expected).map(|(cut, whole)| {
            assert_eq!(cut.token, whole.token, "{what}");
            (cut.logprob, whole.logprob)
        });
        for (cut, whole) in all.chain([target]) {
            let off = (cut - whole).abs();
            assert!(off < tolerance, "{what}, position {position}: off by {off}");
        }
        assert!(cut.top.is_sorted_by(|a, b| a.logprob >= b.logprob), "{what}");
        assert_eq!(cut.sampled, Some(cut.top[0]), "{what}");
    }
}

#[test]
fn logits_of_ranks_that_share_a_gpu_are_those_of_one() {
    let greedy = Sampling::default();
    for name in FAMILIES.into_iter().chain(GGUFS) {
        let of = |tp| {
            let model = on_cuda(name, WeightDtype::F32, Ranks::SameDevice(tp));
            read(runner(&model), &greedy)
        };
        let whole = of(1);
        // The other format is another way to read, not to compute.
        let ranks = if name.ends_with(".gguf") { &[4][..] } else { &[2, 3, 4] };
        for tp in ranks {
            assert_close(&of(*tp), &whole, 1e-4, &format!("{name}, {tp} ranks"));
        }
    }
}

/// Two ranks add up to the same bits in any order: NCCL and a kernel give the same.
#[test]
fn ranks_with_a_gpu_each_find_what_ranks_on_one_gpu_find() {
    let greedy = Sampling::default();
    for name in ["llama-linear-untied", "qwen3", "gemma2.gguf"] {
        for ranks in [1, 2] {
            let Some(places) = cuda_devices(ranks) else { continue };
            let apart = on_cuda(name, WeightDtype::F32, places);
            let together = on_cuda(name, WeightDtype::F32, Ranks::SameDevice(ranks));
            let expected = read(runner(&together), &greedy);
            assert_eq!(read(runner(&apart), &greedy), expected, "{name}, {ranks} ranks");
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
        let of = |ranks| -> Vec<TokenId> {
            let model = on_cuda("qwen3", WeightDtype::F32, ranks);
            let found = read(runner(&model), &sampling);
            found.iter().map(|found| found.sampled.expect("was asked for").token).collect()
        };
        let whole = of(Ranks::SameDevice(1));
        let same = [Ranks::SameDevice(2), Ranks::SameDevice(4)];
        for ranks in same.into_iter().chain(cuda_devices(2)) {
            assert_eq!(of(ranks), whole, "{ranks:?}");
        }
    }
}

/// Weights, activations and the cache in bf16, where each rank rounds what it finds; quantised weights
/// in place where no block is cut.
#[test]
fn ranks_in_bf16_come_close_to_one() {
    let greedy = Sampling::default();
    let of = |name, dtype, tp| {
        let model = on_cuda(name, dtype, Ranks::SameDevice(tp));
        read(runner(&model), &greedy)
    };
    for name in ["llama3-rope", "qwen2-bias", "gemma2"] {
        let whole = of(name, WeightDtype::Bf16, 1);
        for tp in [2, 4] {
            let what = format!("{name}, {tp} ranks");
            assert_close(&of(name, WeightDtype::Bf16, tp), &whole, 0.1, &what);
        }
    }
    for name in ["llama3-rope.gguf", "gemma2.gguf"] {
        let whole = of(name, WeightDtype::Auto, 1);
        assert_close(&of(name, WeightDtype::Auto, 2), &whole, 0.1, name);
    }
}

/// As on one rank: recorded on the second run, and the tokens stay the same.
#[test]
fn decode_steps_of_ranks_are_recorded() {
    let mut written = Vec::new();
    for ranks in [1, 2, 3].map(Ranks::SameDevice).into_iter().chain(cuda_devices(2)) {
        let model = on_cuda("qwen3", WeightDtype::F32, ranks);
        let (tokens, graphs) = write_alone(&mut executor(&model), 6);
        assert_eq!(graphs, [0, 1, 1, 1, 1, 1], "{ranks:?}");
        written.push((ranks, tokens));
    }
    for (ranks, tokens) in &written {
        assert_eq!(tokens, &written[0].1, "{ranks:?}");
    }
}

/// Several sequences, with and without recordings, sampled in different ways.
#[test]
fn batches_on_ranks_write_what_they_write_on_one() {
    let samplings = [
        Sampling::default(),
        Sampling { temperature: 0.9, seed: 3, ..Sampling::default() },
        Sampling { temperature: 0.7, min_p: 0.02, presence_penalty: 0.5, ..Sampling::default() },
    ];
    for name in ["mistral-window", "gemma2"] {
        let write = |ranks| -> Vec<Vec<TokenId>> {
            let mut runner = runner(&on_cuda(name, WeightDtype::F32, ranks));
            let prompt = |i: usize| (0..1 + 9 * i as u32).map(|t| 3 + t * 31 % 90).collect();
            let prompts: Vec<Vec<TokenId>> = (0..3).map(prompt).collect();
            let begun = prompts.iter().zip(&samplings);
            let mut batch: Vec<_> = begun.map(|(p, s)| runner.sequence(p, s)).collect();
            runner.generate(&mut batch, 8);
            batch.into_iter().map(|sequence| sequence.tokens).collect()
        };
        let whole = write(Ranks::SameDevice(1));
        let same = [Ranks::SameDevice(2), Ranks::SameDevice(4)];
        for ranks in same.into_iter().chain(cuda_devices(2)) {
            assert_eq!(write(ranks), whole, "{name} {ranks:?}");
        }
    }
}

#[test]
fn a_rank_uploads_its_part_alone() {
    for name in ["llama-linear-untied", "qwen2-bias", "gemma2.gguf"] {
        let bytes = |tp| -> Vec<usize> {
            let model = on_cuda(name, WeightDtype::F32, Ranks::SameDevice(tp));
            let parts: Vec<usize> = model.rank_weight_bytes().collect();
            assert_eq!((parts.len(), parts.iter().sum::<usize>()), (tp, model.weight_bytes()));
            parts
        };
        let whole = bytes(1)[0];
        // As many ranks as key-value heads: every weight is on one of them.
        let halves = bytes(2);
        // Vocabulary and MLP are cut at multiples of 32 and 16: far from the middle where they are small.
        assert_eq!(halves.iter().sum::<usize>(), whole, "{name}");
        assert!(halves.iter().all(|part| *part < whole * 13 / 20), "{name}: {halves:?} of {whole}");
        // More: those that share a key-value head have it each.
        let quarters = bytes(4);
        assert!(quarters.iter().all(|part| *part < whole * 8 / 20), "{name}: {quarters:?}");
    }
}

/// Ranks on a GPU keep the pages that as many ranks on the CPU keep: both ways, and to other ranks of
/// GPUs. (Between different numbers of ranks `headstart-handoff` puts pages in order.)
#[test]
fn a_sequence_goes_on_with_the_pages_of_other_ranks() {
    for (name, tp) in [("llama3-rope", 2), ("gemma2", 4), ("qwen3", 3)] {
        let parts = load_parts(&tiny(name), WeightDtype::F32, tp);
        let device = on_cuda(name, WeightDtype::F32, Ranks::SameDevice(tp));
        let cpu = || Runner::parallel(&parts, tp, 256).executor;
        let cuda = || runner(&device).executor;
        let format = cuda().kv_format().expect("pages can leave");
        assert_eq!(Some(format), cpu().kv_format(), "{name}");
        assert_eq!((format.layout.tp, format.layout.kv_heads), (tp, 2), "{name}");
        let text: Vec<TokenId> = (0..60u32).map(|i| 3 + i * 29 % 90).collect();
        let (there, here) = ([3, 1, 7, 0].map(PageId), [6, 2, 4, 9].map(PageId));
        for (mut from, mut to, exact) in
            [(cpu(), cuda(), false), (cuda(), cpu(), false), (cuda(), cuda(), true)]
        {
            extend(&mut *from, &text[..48], 0, &there);
            let mut page = Vec::new();
            for (from_page, to_page) in there.iter().zip(&here).take(3) {
                from.read_page(*from_page, &mut page).expect("a page");
                assert_eq!(page.len(), format.layout.page_bytes());
                to.write_page(*to_page, &page).expect("a page");
            }
            let expected = extend(&mut *from, &text, 48, &there);
            let found = extend(&mut *to, &text, 48, &here);
            let tolerance = if exact { f32::MIN_POSITIVE } else { 1e-4 };
            assert_close(&found, &expected, tolerance, name);
        }
        let mut executor = cuda();
        let page = vec![0; format.layout.page_bytes()];
        assert!(executor.write_page(PageId(0), &page[1..]).is_err_and(|e| !e.fatal));
    }
}

/// Extends `context[start..]`, whose sequence has these pages; what is found at each new token.
fn extend(
    executor: &mut dyn Executor,
    context: &[TokenId],
    start: usize,
    pages: &[PageId],
) -> Vec<Found> {
    let sampling = Sampling::default();
    let everything = |i| Probe { position: i, target: Some(7), sample: true, top: 3 };
    let probes: Vec<Probe> = (start..context.len()).map(everything).collect();
    let answer_start = context.len();
    let (probes, sampling) = (&probes[..], &sampling);
    let row = Row { context, start, pages, answer_start, probes, sampling, pending: None };
    executor.execute(&[row]).expect("the batch is right").remove(0)
}

#[test]
fn more_ranks_than_heads_are_refused() {
    common::open_cuda_libraries();
    let ranks = Ranks::SameDevice(5);
    let refused = cuda::load(&tiny("qwen3"), WeightDtype::F32, ranks, None, &mut |_| ());
    let message = refused.expect_err("four heads").to_string();
    assert!(message.contains("expected 1 to 4 tensor-parallel ranks"), "{message}");
}
