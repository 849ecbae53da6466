//! The CUDA executor does what the CPU executor does.
//!
//! Runs on the emulated device; with `HEADSTART_CUDA_TESTS=device` in the environment on the
//! machine's GPU.

mod common;

use std::path::Path;
use std::sync::Arc;

use common::{FAMILIES, Runner, load, sampling, target_at, tiny, tokens, write_alone};
use headstart_engine::core::pages::PageId;
use headstart_engine::executor::cuda::{
    self, CudaExecutor, CudaModel, CudaOptions, Ranks, measure,
};
use headstart_engine::executor::{Executor, Found, KvDtype, Probe, Row};
use headstart_engine::model::{ModelConfig, WeightDtype};
use headstart_engine::{Sampling, TokenId};

fn on_cuda(path: &Path, dtype: WeightDtype) -> Arc<CudaModel> {
    common::open_cuda_libraries();
    let model = cuda::load(path, dtype, Ranks::SameDevice(1), None, &mut |_| ());
    model.unwrap_or_else(|e| panic!("{e}"))
}

fn runner(model: &Arc<CudaModel>) -> Runner {
    let options = CudaOptions { kv_tokens: common::KV_TOKENS, ..CudaOptions::default() };
    Runner::on(Box::new(CudaExecutor::new(model.clone(), &options).expect("options are right")))
}

/// Scores of a text, read in calls of the given lengths.
fn scores(runner: &mut Runner, text: &[TokenId], cuts: &[usize]) -> Vec<Found> {
    let mut sequence = runner.sequence(&[], &Sampling::default());
    let (mut all, mut start) = (Vec::new(), 0);
    for len in cuts.iter().copied().cycle() {
        let end = (start + len).min(text.len());
        sequence.tokens.extend_from_slice(&text[start..end]);
        let probes: Vec<Probe> = (start..end)
            .map(|i| Probe { top: 3, ..target_at(i, text.get(i + 1).copied().unwrap_or(7)) })
            .collect();
        all.extend(runner.extend(&mut [(&mut sequence, probes)]).remove(0));
        start = end;
        if start == text.len() {
            return all;
        }
    }
    all
}

/// The largest difference of log-probabilities.
fn distance(a: &[Found], b: &[Found]) -> f32 {
    assert_eq!(a.len(), b.len());
    let each = a.iter().zip(b).map(|(a, b)| {
        let target = a.target.zip(b.target).map_or(0.0, |(a, b)| (a - b).abs());
        let top = a.top.iter().zip(&b.top).map(|(a, b)| (a.logprob - b.logprob).abs());
        top.fold(target, f32::max)
    });
    each.fold(0.0, f32::max)
}

#[test]
fn every_family_scores_and_writes_as_on_the_cpu() {
    for name in FAMILIES {
        let path = tiny(name);
        let (host, device) = (load(&path, WeightDtype::F32), on_cuda(&path, WeightDtype::F32));
        let text = tokens(1, 70);
        let expected = scores(&mut Runner::new(&host, 2, 256), &text, &[70]);
        let found = scores(&mut runner(&device), &text, &[70]);
        let distance = distance(&found, &expected);
        assert!(distance < 1e-4, "{name}: {distance}");
        let prompts: Vec<Vec<TokenId>> = (0..4).map(|i| tokens(i, 1 + 9 * i as usize)).collect();
        let mut written = [Runner::new(&host, 2, 256), runner(&device)].map(|mut runner| {
            let mut batch: Vec<_> = prompts
                .iter()
                .enumerate()
                .map(|(i, prompt)| runner.sequence(prompt, &sampling(i as u64)))
                .collect();
            runner.generate(&mut batch, 12);
            batch.into_iter().map(|s| s.tokens).collect::<Vec<_>>()
        });
        let device = std::mem::take(&mut written[1]);
        assert_eq!(device, written[0], "{name}");
    }
}

/// Recorded or launched one by one, alone or in a batch, in one call or in several.
#[test]
fn in_single_precision_results_do_not_depend_on_the_batch() {
    for name in ["qwen3", "mistral-window"] {
        let model = on_cuda(&tiny(name), WeightDtype::F32);
        let text = tokens(1, 60);
        let whole = scores(&mut runner(&model), &text, &[60]);
        for cuts in [&[1][..], &[7, 1, 30]] {
            assert_eq!(scores(&mut runner(&model), &text, cuts), whole, "{name} {cuts:?}");
        }
        let prompts: Vec<Vec<TokenId>> = (0..3).map(|i| tokens(i, 1 + 9 * i as usize)).collect();
        let mut together = runner(&model);
        let mut batch: Vec<_> = prompts
            .iter()
            .enumerate()
            .map(|(i, prompt)| together.sequence(prompt, &sampling(i as u64)))
            .collect();
        let batch_found = together.generate(&mut batch, 6);
        for (i, prompt) in prompts.iter().enumerate() {
            let mut alone = runner(&model);
            let mut one = [alone.sequence(prompt, &sampling(i as u64))];
            let found = alone.generate(&mut one, 6);
            assert_eq!((&one[0].tokens, &found[0]), (&batch[i].tokens, &batch_found[i]), "{name}");
        }
    }
}

/// Weights, activations and the cache in bf16. Rounding the weights alone moves these tiny models by
/// up to 0.3 (`tiny_models.rs`).
#[test]
fn models_in_bf16_come_close_to_the_cpu() {
    for name in FAMILIES {
        let path = tiny(name);
        let (host, device) = (load(&path, WeightDtype::F32), on_cuda(&path, WeightDtype::Bf16));
        let text = tokens(2, 50);
        let expected = scores(&mut Runner::new(&host, 2, 256), &text, &[50]);
        // Fifty rows go to the tensor cores, few rows read weights in place.
        for cuts in [&[50][..], &[3, 1]] {
            let found = scores(&mut runner(&device), &text, cuts);
            let distance = distance(&found, &expected);
            assert!(distance < 0.3, "{name} {cuts:?}: {distance}");
        }
    }
}

#[test]
fn decode_steps_are_recorded_on_their_second_run() {
    let model = on_cuda(&tiny("qwen3"), WeightDtype::Bf16);
    let options = CudaOptions { kv_tokens: 512, ..CudaOptions::default() };
    let mut executor = CudaExecutor::new(model, &options).expect("options are right");
    assert_eq!(write_alone(&mut executor, 4).1, [0, 1, 1, 1]);
}

/// The tiny models' heads are too small for tensor cores; these are not. Reading at once and token by
/// token are different kernels, products included.
#[test]
fn reading_on_tensor_cores_comes_close_to_decoding() {
    let tiny = on_cuda(&tiny("qwen3"), WeightDtype::Bf16);
    let config = ModelConfig {
        heads: 4,
        kv_heads: 2,
        head_dim: 64,
        qk_norm: false,
        windows: vec![Some(9), None],
        ..tiny.config().clone()
    };
    let model = Arc::new(CudaModel::random(0, config, None).expect("a small model"));
    let text = tokens(3, 70);
    let at_once = scores(&mut runner(&model), &text, &[70]);
    let one_by_one = scores(&mut runner(&model), &text, &[1]);
    let pieces = scores(&mut runner(&model), &text, &[33, 4]);
    assert!(at_once.iter().any(|f| f.target.is_some_and(|t| t < -1.0)));
    for (other, what) in [(one_by_one, "one by one"), (pieces, "pieces")] {
        let distance = distance(&at_once, &other);
        assert!(distance < 0.1, "{what}: {distance}");
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
    let row = Row {
        context,
        start,
        pages,
        answer_start,
        probes: &probes,
        sampling: &sampling,
        pending: None,
    };
    executor.execute(&[row]).expect("the batch is right").remove(0)
}

/// Between CPU and GPU, both ways, and from one pool to another.
#[test]
fn a_sequence_goes_on_with_the_pages_of_another_device() {
    for name in ["llama3-rope", "gemma2", "qwen3"] {
        let path = tiny(name);
        let (host, device) = (load(&path, WeightDtype::F32), on_cuda(&path, WeightDtype::F32));
        let cpu = || Runner::new(&host, 2, 256).executor;
        let cuda = || runner(&device).executor;
        assert_eq!(cuda().kv_format(), cpu().kv_format(), "{name}");
        let text = tokens(4, 60);
        let (there, here) = ([3, 1, 7, 0].map(PageId), [6, 2, 4, 9].map(PageId));
        for (mut from, mut to, exact) in
            [(cpu(), cuda(), false), (cuda(), cpu(), false), (cuda(), cuda(), true)]
        {
            extend(&mut *from, &text[..48], 0, &there);
            let mut page = Vec::new();
            for (from_page, to_page) in there.iter().zip(&here).take(3) {
                from.read_page(*from_page, &mut page).expect("a page");
                to.write_page(*to_page, &page).expect("a page");
            }
            let expected = extend(&mut *from, &text, 48, &there);
            let found = extend(&mut *to, &text, 48, &here);
            let tokens = |found: &[Found]| -> Vec<_> {
                found.iter().map(|f| f.sampled.expect("was asked for").token).collect()
            };
            assert_eq!(tokens(&found), tokens(&expected), "{name}");
            let distance = distance(&found, &expected);
            assert!(distance < 1e-4 && (!exact || distance == 0.0), "{name}: {distance}");
        }
    }
    let mut executor = runner(&on_cuda(&tiny("qwen3"), WeightDtype::Bf16)).executor;
    let layout = executor.kv_format().expect("pages can leave").layout;
    assert_eq!(layout.dtype, KvDtype::Bf16);
    let pages = executor.limits().pages as u32;
    let page = vec![0; layout.page_bytes()];
    assert!(executor.write_page(PageId(0), &page[1..]).is_err_and(|e| !e.fatal));
    assert!(executor.write_page(PageId(pages), &page).is_err_and(|e| !e.fatal));
    assert!(executor.read_page(PageId(pages), &mut Vec::new()).is_err_and(|e| !e.fatal));
}

#[test]
fn limits_of_the_device_are_measured() {
    let model = on_cuda(&tiny("qwen3"), WeightDtype::Bf16);
    for rate in [
        measure::bytes_per_second(&model, 1 << 16).expect("a rate"),
        measure::operations_per_second(&model, 32).expect("a rate"),
    ] {
        assert!(rate.is_finite() && rate > 0.0, "{rate}");
    }
}

#[test]
fn a_batch_that_reaches_outside_is_refused() {
    let model = on_cuda(&tiny("qwen3"), WeightDtype::F32);
    let mut runner = runner(&model);
    let (sampling, pages) = (Sampling::default(), [PageId(0), PageId(1)]);
    let context = tokens(1, 20);
    let probes = [target_at(19, 3)];
    let good = Row {
        context: &context,
        start: 0,
        pages: &pages,
        answer_start: 0,
        probes: &probes,
        sampling: &sampling,
        pending: None,
    };
    assert!(runner.executor.execute(&[good]).is_ok());
    let outside = [PageId(0), PageId(1 << 30)];
    let bad = [
        Row { start: 20, ..good },
        Row { pages: &pages[..1], ..good },
        Row { pages: &outside, ..good },
        Row { probes: &[target_at(20, 3)], ..good },
        Row { context: &[1 << 30; 20], ..good },
    ];
    for row in bad {
        let error = runner.executor.execute(&[row]).expect_err("it reaches outside");
        assert!(!error.fatal && error.message.starts_with("row 0: "), "{error}");
    }
}
