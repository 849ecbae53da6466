//! A model on the CPU executor, driven by hand.

#![allow(dead_code, unreachable_pub)] // each test file uses its own part

pub mod watched;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Once};

use headstart_engine::core::pages::PageId;
use headstart_engine::executor::cpu::{self, CpuExecutor, CpuOptions};
use headstart_engine::executor::cuda::{self, CudaExecutor, Ranks};
use headstart_engine::executor::{Executor, Found, Probe, Row};
use headstart_engine::model::{LoadOptions, Model, WeightDtype, Weights};
use headstart_engine::{Sampling, TokenId};
use headstart_kernels::cuda::{UniqueId, library};

/// Makes the emulated CUDA device the one that is there, unless `HEADSTART_CUDA_TESTS=device`.
pub fn open_cuda_libraries() {
    static LIBRARIES: Once = Once::new();
    LIBRARIES.call_once(|| {
        if std::env::var_os("HEADSTART_CUDA_TESTS").is_none_or(|v| v != "device") {
            let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/emulated-cuda");
            let built = Command::new(script).output().expect("the script runs");
            assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
            let folder = String::from_utf8(built.stdout).expect("a path");
            library::open_all_in(Path::new(folder.trim()));
        }
    });
}

/// Ranks on GPUs of their own; `None` on a machine that has fewer, or not NCCL.
pub fn cuda_devices(ranks: usize) -> Option<Ranks> {
    open_cuda_libraries();
    let real = std::env::var_os("HEADSTART_CUDA_TESTS").is_some_and(|v| v == "device");
    if real && (cuda::devices() < ranks || UniqueId::new().is_err()) {
        eprintln!("SKIPPED {ranks} ranks by NCCL: this machine has not as many GPUs, or not NCCL");
        return None;
    }
    Some(Ranks::Devices(ranks))
}

/// Where the committed models are; `HEADSTART_FIXTURES` names the folder on another machine than
/// the one that built the test.
pub fn fixtures() -> PathBuf {
    let here = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures");
    std::env::var_os("HEADSTART_FIXTURES").map_or_else(here, PathBuf::from)
}

/// A model of each family; four query heads, two key-value heads.
pub const FAMILIES: [&str; 6] =
    ["llama3-rope", "llama-linear-untied", "mistral-window", "qwen2-bias", "qwen3", "gemma2"];

/// Those that there are as GGUF files too.
pub const GGUFS: [&str; 5] = [
    "llama3-rope.gguf",
    "llama-linear-untied.gguf",
    "qwen2-bias.gguf",
    "qwen3.gguf",
    "gemma2.gguf",
];

/// Where such a model is.
pub fn tiny(name: &str) -> PathBuf {
    fixtures().join("tiny").join(name)
}

/// Reproducible tokens of the tiny vocabulary.
pub fn tokens(seed: u32, count: usize) -> Vec<TokenId> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(12345);
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        3 + (state >> 16) % 93
    };
    (0..count).map(|_| next()).collect()
}

/// Four ways to sample.
pub fn sampling(seed: u64) -> Sampling {
    match seed % 4 {
        0 => Sampling::default(),
        1 => Sampling { temperature: 0.9, seed, ..Sampling::default() },
        2 => Sampling { temperature: 1.3, top_p: 0.8, top_k: 30, seed, ..Sampling::default() },
        _ => Sampling {
            temperature: 0.7,
            min_p: 0.02,
            presence_penalty: 0.5,
            frequency_penalty: 0.3,
            seed,
            ..Sampling::default()
        },
    }
}

pub fn load(path: &Path, dtype: WeightDtype) -> Arc<Model> {
    let options = LoadOptions { dtype, threads: 2 };
    let (mut last, mut total) = (0, 0);
    let model = Model::load(path, options, &mut |progress| {
        assert!(progress.bytes_loaded >= last && progress.bytes_loaded <= progress.bytes_total);
        (last, total) = (progress.bytes_loaded, progress.bytes_total);
    });
    let model = model.unwrap_or_else(|e| panic!("{e}"));
    assert!(total > 0 && last == total);
    Arc::new(model)
}

/// All parts of a model for `tp` ranks.
pub fn load_parts(path: &Path, dtype: WeightDtype, tp: usize) -> Weights {
    let options = LoadOptions { dtype, threads: 2 };
    Weights::load(path, options, tp, &mut |_| {}).unwrap_or_else(|e| panic!("{e}"))
}

/// Positions of all sequences of a test; their pages are not given back.
pub const KV_TOKENS: usize = 16 * 1024;

/// One sequence in the making.
pub struct Sequence {
    pub tokens: Vec<TokenId>,
    pub answer_start: usize,
    pub sampling: Sampling,
    pages: Vec<PageId>,
    done: usize,
}

/// An executor and its pages.
pub struct Runner {
    pub executor: Box<dyn Executor>,
    pages_used: usize,
}

impl Runner {
    pub fn new(model: &Arc<Model>, threads: usize, chunk_tokens: usize) -> Self {
        let options = CpuOptions { threads, page_size: 16, kv_tokens: KV_TOKENS, chunk_tokens };
        let executor = CpuExecutor::new(model.clone(), options).expect("options are right");
        Self { executor: Box::new(executor), pages_used: 0 }
    }

    pub fn on(executor: Box<dyn Executor>) -> Self {
        Self { executor, pages_used: 0 }
    }

    /// One rank for each part of the weights.
    pub fn parallel(weights: &Weights, threads: usize, chunk_tokens: usize) -> Self {
        let options = CpuOptions { threads, page_size: 16, kv_tokens: KV_TOKENS, chunk_tokens };
        let executor = cpu::executor(weights, options).expect("options are right");
        Self { executor, pages_used: 0 }
    }

    pub fn sequence(&self, prompt: &[TokenId], sampling: &Sampling) -> Sequence {
        Sequence {
            tokens: prompt.to_vec(),
            answer_start: prompt.len(),
            sampling: sampling.clone(),
            pages: Vec::new(),
            done: 0,
        }
    }

    /// Extends every sequence by all the tokens it has gained since.
    pub fn extend(&mut self, batch: &mut [(&mut Sequence, Vec<Probe>)]) -> Vec<Vec<Found>> {
        let limits = self.executor.limits();
        for (sequence, _) in batch.iter_mut() {
            while sequence.pages.len() * limits.page_size < sequence.tokens.len() {
                assert!(self.pages_used < limits.pages);
                // Neighbouring positions are in pages that are far apart.
                sequence.pages.push(PageId((self.pages_used * 7 % limits.pages) as u32));
                self.pages_used += 1;
            }
        }
        let rows: Vec<Row<'_>> = batch
            .iter()
            .map(|(s, probes)| Row {
                context: &s.tokens,
                start: s.done,
                pages: &s.pages,
                answer_start: s.answer_start,
                probes,
                sampling: &s.sampling,
                pending: None,
            })
            .collect();
        let found = self.executor.execute(&rows).expect("the batch is right");
        for (sequence, _) in batch {
            sequence.done = sequence.tokens.len();
        }
        found
    }

    /// Writes `count` tokens after each sequence, all of them in one batch.
    /// Returns what was found for each token of each sequence.
    pub fn generate(&mut self, sequences: &mut [Sequence], count: usize) -> Vec<Vec<Found>> {
        let mut all = vec![Vec::new(); sequences.len()];
        for _ in 0..count {
            let mut batch: Vec<_> = sequences
                .iter_mut()
                .map(|s| {
                    let probe = sample_at(s.tokens.len() - 1);
                    (s, vec![probe])
                })
                .collect();
            let found = self.extend(&mut batch);
            for ((sequence, found), all) in sequences.iter_mut().zip(found).zip(&mut all) {
                sequence.tokens.push(found[0].sampled.expect("a sample was asked for").token);
                all.extend(found);
            }
        }
        all
    }
}

/// Has a CUDA executor write `steps` tokens, one a call, behind one; the sequence, and how many
/// recorded graphs there were after each call.
pub fn write_alone(executor: &mut CudaExecutor, steps: usize) -> (Vec<TokenId>, Vec<usize>) {
    let (sampling, pages) = (Sampling::default(), [PageId(3), PageId(5)]);
    let (mut context, mut graphs) = (vec![5], Vec::new());
    for _ in 0..steps {
        let probes = [sample_at(context.len() - 1)];
        let row = Row {
            context: &context,
            start: context.len() - 1,
            pages: &pages,
            answer_start: 1,
            probes: &probes,
            sampling: &sampling,
            pending: None,
        };
        let found = executor.execute(&[row]).expect("the batch is right");
        graphs.push(executor.graphs());
        context.push(found[0][0].sampled.expect("a sample was asked for").token);
    }
    (context, graphs)
}

pub fn sample_at(position: usize) -> Probe {
    Probe { position, target: None, sample: true, top: 0 }
}

pub fn target_at(position: usize, target: TokenId) -> Probe {
    Probe { position, target: Some(target), sample: false, top: 0 }
}
