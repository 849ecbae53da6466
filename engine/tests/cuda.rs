//! The CUDA executor does what the CPU executor does.
//!
//! Runs on the emulated device; with `HEADSTART_CUDA_TESTS=device` in the environment on the
//! machine's GPU.

mod common;

use std::path::Path;
use std::sync::Arc;

use common::{FAMILIES, Runner, load, sample_at, sampling, target_at, tiny, tokens, write_alone};
use headstart_engine::core::pages::PageId;
use headstart_engine::core::scheduler::SequenceId;
use headstart_engine::executor::cuda::{
    self, CudaExecutor, CudaModel, CudaOptions, Ranks, measure,
};
use headstart_engine::executor::{Executor, ExecutorError, Found, KvDtype, Pipeline, Probe, Row};
use headstart_engine::model::{ModelConfig, WeightDtype};
use headstart_engine::step::{Counters, Engine};
use headstart_engine::{DraftPolicy, Event, Known, Limits, Request, Sampling, TokenId};

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

/// An executor that is not asked whether it pipelines.
struct OneByOne(CudaExecutor);

impl Executor for OneByOne {
    fn limits(&self) -> Limits {
        self.0.limits()
    }

    fn execute(&mut self, rows: &[Row<'_>]) -> Result<Vec<Vec<Found>>, ExecutorError> {
        self.0.execute(rows)
    }
}

/// Requests of every kind, some with a draft, and what the engine tells of each.
fn served(executor: Box<dyn Executor>) -> (Vec<Vec<Event>>, Counters) {
    let mut engine = Engine::new(executor, 24);
    let policy =
        DraftPolicy { window: 3, threshold: 0.02, continue_complete: true, continue_empty: true };
    let mut told = Vec::new();
    for number in 0..9u32 {
        let id = engine.add(Request {
            prompt: tokens(number, 2 + 11 * number as usize % 50),
            // Those with penalties are not planned ahead, and nobody while they are there.
            max_tokens: if number % 4 == 3 { 2 } else { 12 + number as usize },
            sampling: sampling(u64::from(number)),
            // An eighth of the vocabulary, so that some answers stop.
            stop_tokens: if number % 4 == 1 { (0..12).collect() } else { Arc::from([]) },
            top_logprobs: number as usize % 3,
            draft: (number % 4 == 2).then_some(policy),
            known: Known::default(),
        });
        engine.push_draft(id, &tokens(100 + number, 5));
        let events = engine.end_draft(id).into_iter().map(|(_, event)| event).collect();
        told.push((id, events));
        // One that is gone while it is in work.
        if number == 4 {
            let id = engine.add(Request {
                prompt: tokens(70, 9),
                max_tokens: 30,
                sampling: Sampling::default(),
                stop_tokens: Arc::from([]),
                top_logprobs: 0,
                draft: None,
                known: Known::default(),
            });
            (0..5).for_each(|_| take(engine.step(), &mut told));
            engine.remove(id);
        }
    }
    while engine.has_work() {
        take(engine.step(), &mut told);
    }
    assert_eq!(engine.pool().used(), 0, "nothing is held");
    (told.into_iter().map(|(_, events)| whole(events)).collect(), engine.counters())
}

/// Scores that came in several events as if they had come in one: how a draft is cut into steps is a
/// matter of timing.
fn whole(events: Vec<Event>) -> Vec<Event> {
    let mut whole: Vec<Event> = Vec::new();
    for event in events {
        match (whole.last_mut(), event) {
            (
                Some(Event::Read { scores, decision, .. }),
                Event::Read { scores: more, decision: decided, .. },
            ) => {
                scores.extend(more);
                *decision = decided;
            }
            (_, event) => whole.push(event),
        }
    }
    whole
}

type Stepped = (Vec<(SequenceId, Event)>, Result<(), ExecutorError>);

fn take((events, result): Stepped, told: &mut [(SequenceId, Vec<Event>)]) {
    result.expect("the device is well");
    for (id, event) in events {
        if let Some((_, events)) = told.iter_mut().find(|(other, _)| *other == id) {
            events.push(event);
        }
    }
}

/// Steps that are submitted before the last one is collected, with tokens that the host does not know
/// yet, tell the same, bit for bit.
#[test]
fn pipelined_steps_give_the_same_answers() {
    for name in ["qwen3", "mistral-window"] {
        let model = on_cuda(&tiny(name), WeightDtype::F32);
        let executor = || {
            let options = CudaOptions { kv_tokens: 1024, ..CudaOptions::default() };
            CudaExecutor::new(model.clone(), &options).expect("options are right")
        };
        let (expected, plain) = served(Box::new(OneByOne(executor())));
        let (told, pipelined) = served(Box::new(executor()));
        for (request, (told, expected)) in told.iter().zip(&expected).enumerate() {
            assert_eq!(told, expected, "{name}, request {request}");
        }
        assert_eq!(plain.tokens_overrun, 0);
        println!("{name}: {plain:?} {pipelined:?}");
        assert!(pipelined.tokens_overrun > 0, "some row was too many: {pipelined:?}");
        assert_eq!(pipelined.tokens_extended, plain.tokens_extended, "{name}");
    }
}

/// A row whose token is not known here, recorded and not, and what is refused.
#[test]
fn a_row_follows_on_a_batch_that_is_in_flight() {
    let model = on_cuda(&tiny("qwen3"), WeightDtype::F32);
    let options = CudaOptions { kv_tokens: 512, ..CudaOptions::default() };
    let executor = || CudaExecutor::new(model.clone(), &options).expect("options are right");
    let (prompts, draws) = ([tokens(1, 20), tokens(2, 3)], [sampling(0), sampling(1)]);
    let pages = [[0, 1, 2, 3, 4].map(PageId), [9, 8, 7, 6, 5].map(PageId)];
    // The answer of each, as far as it is known; `steps` rows behind the prompt.
    let write = |ahead: bool, steps: usize| {
        let mut executor = executor();
        let mut texts = prompts.clone();
        let mut found: Vec<Vec<Vec<Found>>> = Vec::new();
        let take = |texts: &mut [Vec<TokenId>; 2], all: &[Vec<Found>]| {
            for (text, found) in texts.iter_mut().zip(all) {
                text.push(found[0].sampled.expect("was asked for").token);
            }
        };
        for step in 0..=steps {
            let pending = ahead && step > 0;
            let ends = [0, 1].map(|i| prompts[i].len() + step);
            let probes = ends.map(|end| [Probe { top: 2, ..sample_at(end - 1) }]);
            let rows = [0, 1].map(|i| Row {
                context: &texts[i],
                start: if step == 0 { 0 } else { ends[i] - 1 },
                pages: &pages[i],
                answer_start: prompts[i].len(),
                probes: &probes[i],
                sampling: &draws[i],
                pending: pending.then_some(i),
            });
            executor.submit(&rows).expect("the batch is right");
            if pending || !ahead {
                let all = executor.collect().expect("the device is well");
                take(&mut texts, &all);
                found.push(all);
            }
        }
        if ahead {
            assert!(executor.execute(&[]).is_err_and(|e| !e.fatal), "a batch is in flight");
            found.push(executor.collect().expect("the device is well"));
        }
        assert!(executor.collect().is_err_and(|e| !e.fatal), "nothing is in flight");
        (found, executor.graphs())
    };
    let (expected, _) = write(false, 7);
    let (found, graphs) = write(true, 7);
    assert_eq!(found, expected);
    assert_eq!(graphs, 1, "steps were recorded");

    let mut executor = executor();
    let probes = [sample_at(19)];
    let row = Row {
        context: &prompts[0],
        start: 0,
        pages: &pages[0],
        answer_start: 20,
        probes: &probes,
        sampling: &draws[0],
        pending: None,
    };
    let next = Row { start: 20, probes: &[], pending: Some(0), ..row };
    assert!(executor.submit(&[next]).is_err_and(|e| !e.fatal), "nothing is behind it");
    executor.submit(&[row]).expect("the batch is right");
    assert!(executor.submit(&[Row { pending: Some(1), ..next }]).is_err_and(|e| !e.fatal));
    executor.submit(&[next]).expect("the batch is right");
    assert!(executor.submit(&[row]).is_err_and(|e| !e.fatal), "two are in flight");
    assert_eq!(executor.collect().expect("the first").len(), 1);
    assert_eq!(executor.collect().expect("the second"), [Vec::new()]);
}
