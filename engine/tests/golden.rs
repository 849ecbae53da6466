//! Real models from their GGUF files, in f32, against the golden files of an offline implementation.
//!
//! Skipped where a model has not been downloaded. `HEADSTART_MODELS` names the folder that has it.

mod common;

use std::path::PathBuf;
use std::sync::Arc;

use common::{Runner, fixtures, load, load_parts, target_at};
use headstart_engine::Sampling;
use headstart_engine::executor::cuda::{self, CudaExecutor, CudaOptions, Ranks};
use headstart_engine::model::{Model, WeightDtype};
use serde::Deserialize;

const SMOLLM2: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";
const QWEN_CODER: &str = "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf";
/// Decisions closer than this may be tipped by another order of additions.
const MARGIN_MIN: f32 = 0.002;

#[derive(Deserialize)]
struct Case {
    id: String,
    drafter_prompt_ids: Vec<u32>,
    draft_ids: Vec<u32>,
    base_prompt_ids: Vec<u32>,
    base_draft_ids: Vec<u32>,
    base_draft_logprobs: Vec<f32>,
    kept_ids: Vec<u32>,
    continuation_ids: Vec<u32>,
    margins: Margins,
}

#[derive(Deserialize)]
struct Margins {
    draft_logit_gap: Option<f32>,
    base_logit_gap: Option<f32>,
}

fn safe(gap: Option<f32>) -> bool {
    gap.is_none_or(|gap| gap >= MARGIN_MIN)
}

fn model(file: &str, dtype: WeightDtype) -> Option<Arc<Model>> {
    Some(load(&path(file)?, dtype))
}

/// Where the model is, if it is there.
fn path(file: &str) -> Option<PathBuf> {
    let folder = match std::env::var_os("HEADSTART_MODELS") {
        Some(folder) => PathBuf::from(folder),
        None => PathBuf::from(std::env::var_os("HOME")?).join(".cache/headstart/models"),
    };
    let path = folder.join(file);
    if !path.exists() {
        eprintln!("skipped: {} is not there", path.display());
        return None;
    }
    Some(path)
}

fn cases(golden: &str) -> Vec<Case> {
    let path = fixtures().join("golden").join(golden);
    let text = std::fs::read_to_string(path).expect("the golden file is there");
    let cases: Vec<Case> =
        text.lines().map(|line| serde_json::from_str(line).expect("a golden case")).collect();
    assert!(cases.len() >= 10);
    cases
}

#[test]
fn smollm2_drafts_scores_and_continues_as_the_golden_files_say() {
    let Some(model) = model(SMOLLM2, WeightDtype::F32) else { return };
    let mut runner = Runner::new(&model, 2, 256);
    let cases = cases("smollm2_to_smollm2.jsonl");
    let drafts = cases.iter().filter(|case| safe(case.margins.draft_logit_gap));
    write_all(&mut runner, drafts.map(|c| (c, c.drafter_prompt_ids.clone(), &c.draft_ids)));
    base(&mut runner, &cases);
}

/// Nine query and three key-value heads: neither two nor four ranks get equal parts.
#[test]
fn smollm2_scores_and_continues_the_same_on_two_and_four_ranks() {
    let Some(path) = path(SMOLLM2) else { return };
    for tp in [2, 4] {
        let weights = load_parts(&path, WeightDtype::F32, tp);
        let mut runner = Runner::parallel(&weights, 2, 256);
        base(&mut runner, &cases("smollm2_to_smollm2.jsonl"));
    }
}

/// The same, and the capital of France on Q4_1 weights, where there is a GPU.
#[test]
fn smollm2_on_a_gpu_does_as_the_golden_files_say() {
    if cuda::devices() == 0 {
        eprintln!("SKIPPED smollm2_on_a_gpu_does_as_the_golden_files_say: there is no GPU");
        return;
    }
    let Some(path) = path(SMOLLM2) else { return };
    let cases = cases("smollm2_to_smollm2.jsonl");
    let runner = |dtype| {
        let model = cuda::load(&path, dtype, Ranks::SameDevice(1), None, &mut |_| ());
        let model = model.expect("there is a GPU");
        let options = CudaOptions { kv_tokens: common::KV_TOKENS, ..CudaOptions::default() };
        Runner::on(Box::new(CudaExecutor::new(model, &options).expect("it has memory")))
    };
    let mut exact = runner(WeightDtype::F32);
    let drafts = cases.iter().filter(|case| safe(case.margins.draft_logit_gap));
    write_all(&mut exact, drafts.map(|c| (c, c.drafter_prompt_ids.clone(), &c.draft_ids)));
    base(&mut exact, &cases);
    let (mut quantised, case) = (runner(WeightDtype::Auto), &cases[0]);
    let mut one = [quantised.sequence(&case.drafter_prompt_ids, &Sampling::default())];
    quantised.generate(&mut one, case.draft_ids.len());
    assert_eq!(&one[0].tokens[case.drafter_prompt_ids.len()..], case.draft_ids);
}

/// Weights as the file has them must not change the answer: with activations of 8 bits a block of 32, and
/// no more, on Q4_1 weights the capital of France is "L'Étoile".
#[test]
fn smollm2_knows_the_capital_of_france_on_its_own_weights() {
    let Some(model) = model(SMOLLM2, WeightDtype::Auto) else { return };
    let mut runner = Runner::new(&model, 2, 256);
    let cases = cases("smollm2_to_smollm2.jsonl");
    let case = &cases[0];
    let mut sequences = [runner.sequence(&case.drafter_prompt_ids, &Sampling::default())];
    runner.generate(&mut sequences, case.draft_ids.len());
    assert_eq!(&sequences[0].tokens[case.drafter_prompt_ids.len()..], case.draft_ids);
}

#[test]
#[ignore = "1.1 GB of weights, expanded to 6.2 GB; run with --ignored"]
fn qwen_coder_scores_and_continues_as_the_golden_files_say() {
    let Some(model) = model(QWEN_CODER, WeightDtype::F32) else { return };
    let mut runner = Runner::new(&model, 2, 256);
    base(&mut runner, &cases("smollm2_to_qwen2.5-coder.jsonl"));
}

/// The base's part: scores of every draft, and what follows the kept tokens.
fn base(runner: &mut Runner, cases: &[Case]) {
    for case in cases {
        scores_the_draft(runner, case);
    }
    let answers = cases.iter().filter(|case| safe(case.margins.base_logit_gap)).map(|case| {
        (case, [&case.base_prompt_ids[..], &case.kept_ids].concat(), &case.continuation_ids)
    });
    write_all(runner, answers);
}

fn scores_the_draft(runner: &mut Runner, case: &Case) {
    let prompt = case.base_prompt_ids.len();
    let text = [&case.base_prompt_ids[..], &case.base_draft_ids].concat();
    let mut sequence = runner.sequence(&text, &Sampling::default());
    let probes = (prompt..text.len()).map(|i| target_at(i - 1, text[i])).collect();
    let found = runner.extend(&mut [(&mut sequence, probes)]).remove(0);
    assert_eq!(found.len(), case.base_draft_logprobs.len());
    for (found, expected) in found.iter().zip(&case.base_draft_logprobs) {
        let found = found.target.expect("a target was asked for");
        assert!((found - expected).abs() < 1e-3, "{}: {found} for {expected}", case.id);
    }
}

/// Writes after all prompts in one batch and compares: (case, prompt, what must follow).
fn write_all<'a>(
    runner: &mut Runner,
    all: impl Iterator<Item = (&'a Case, Vec<u32>, &'a Vec<u32>)>,
) {
    let (mut sequences, mut expected) = (Vec::new(), Vec::new());
    for (case, prompt, follows) in all {
        sequences.push(runner.sequence(&prompt, &Sampling::default()));
        expected.push((case, follows));
    }
    assert!(sequences.len() >= 10);
    let longest = expected.iter().map(|(_, follows)| follows.len()).max().unwrap_or(0);
    runner.generate(&mut sequences, longest);
    for (sequence, (case, follows)) in sequences.iter().zip(expected) {
        let written = &sequence.tokens[sequence.answer_start..][..follows.len()];
        assert_eq!(written, follows, "{}", case.id);
    }
}
