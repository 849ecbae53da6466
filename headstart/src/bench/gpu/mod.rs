//! `headstart bench engine --device cuda --shape …`: a GPU on a model's shape with random weights,
//! beside what the GPU can do at most, measured in the same run.

mod shapes;

use std::fmt::Write as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use clap::{Args, ValueEnum};
use headstart_engine::core::pages::PageId;
use headstart_engine::executor::cuda::{CudaExecutor, CudaModel, CudaOptions, measure};
use headstart_engine::executor::{Executor, Probe, Row};
use headstart_engine::model::ModelConfig;
use headstart_engine::{Sampling, TokenId};
use serde::Serialize;

use self::shapes::Shape;
use crate::failure::Failure;

/// Positions that every sequence has before decoding is measured.
const CONTEXT: usize = 128;

/// What a GPU is measured on.
#[derive(Args, Clone, Debug)]
pub(super) struct GpuArgs {
    /// The device of --shape
    #[arg(long, value_enum, value_name = "DEVICE", default_value = "cuda", requires = "shape")]
    device: Device,
    /// Measure a GPU on a model of this shape, with random weights, instead of a model
    #[arg(long, value_enum, value_name = "SHAPE", conflicts_with = "model")]
    shape: Option<Shape>,
    /// With --shape: only so many of its layers, where memory is short
    #[arg(long, value_name = "N", requires = "shape")]
    layers: Option<usize>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Device {
    Cuda,
}

/// How much is measured.
struct Plan {
    batches: Vec<usize>,
    steps: usize,
    prefill_tokens: usize,
    memory_bytes: usize,
    matrix_size: usize,
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            batches: vec![1, 8, 64, 256],
            steps: 32,
            prefill_tokens: 2048,
            memory_bytes: 2 << 30,
            matrix_size: 8192,
        }
    }
}

/// One batch size.
#[derive(Debug, Serialize)]
struct Decode {
    batch: usize,
    step_ms: f64,
    tokens_per_second: f64,
    /// Bytes of weights and KV that a step reads, a second, beside the memory's.
    memory_share: f64,
}

/// All figures.
#[derive(Debug, Serialize)]
struct Report {
    gpu: String,
    shape: String,
    layers: usize,
    weight_bytes: usize,
    memory_bytes_per_second: f64,
    operations_per_second: f64,
    decode: Vec<Decode>,
    prefill_tokens_per_second: f64,
    /// Operations of the products, a second, beside the matrix rate.
    prefill_share: f64,
}

/// Runs the command.
///
/// # Errors
/// Without a GPU: a sentence that says what is missing. With one: when the shape does not fit it.
pub(super) async fn run(args: GpuArgs, json: Option<PathBuf>) -> Result<(), Failure> {
    // The only one whose shapes are measured so far.
    let Device::Cuda = args.device;
    let Some(shape) = args.shape else {
        return Err(Failure::Usage("--shape is missing".to_owned()));
    };
    let mut config = shape.config();
    if let Some(layers) = args.layers.filter(|n| *n > 0 && *n < config.layers) {
        config.layers = layers;
        config.windows.truncate(layers);
    }
    let work = move || measured(&shape.to_string(), config, &Plan::default());
    let report = tokio::task::spawn_blocking(work).await;
    let report = report.map_err(|error| Failure::Failed(error.to_string()))??;
    anstream::print!("{}", table(&report));
    let Some(path) = json else { return Ok(()) };
    let text = serde_json::to_string_pretty(&report).map_err(failed)?;
    std::fs::write(path, text + "\n").map_err(failed)
}

fn failed(error: impl std::fmt::Display) -> Failure {
    Failure::Failed(error.to_string())
}

fn measured(shape: &str, config: ModelConfig, plan: &Plan) -> Result<Report, Failure> {
    let model = Arc::new(CudaModel::random(0, config, None).map_err(failed)?);
    // Before the pool takes the memory.
    let memory = measure::bytes_per_second(&model, plan.memory_bytes).map_err(failed)?;
    let operations = measure::operations_per_second(&model, plan.matrix_size).map_err(failed)?;
    let sequences = plan.batches.iter().copied().max().unwrap_or(1);
    let kv_tokens = (sequences * (CONTEXT + plan.steps + 16)).max(plan.prefill_tokens + 16);
    let options = CudaOptions { kv_tokens, ..CudaOptions::default() };
    let executor = CudaExecutor::new(Arc::clone(&model), &options).map_err(failed)?;
    let mut bench = Bench { limits: executor.limits(), executor, sampling: Sampling::default() };
    let prefill = bench.prefill(plan.prefill_tokens)?;
    let config = model.config();
    let kv_bytes = bench.executor.kv_bytes() as f64
        / ((bench.limits.pages + 1) * bench.limits.page_size) as f64;
    let mut decode = Vec::new();
    for batch in &plan.batches {
        let seconds = bench.decode(*batch, plan.steps)?;
        let context = (CONTEXT + plan.steps / 2) as f64;
        let read = model.decode_bytes() as f64 + *batch as f64 * context * kv_bytes;
        decode.push(Decode {
            batch: *batch,
            step_ms: seconds * 1e3,
            tokens_per_second: *batch as f64 / seconds,
            memory_share: read / seconds / memory,
        });
    }
    // The head is asked for one position only.
    let head = config.vocab_size * config.hidden_size;
    let parameters = (model.decode_bytes() / 2).saturating_sub(head) as f64;
    let rate = plan.prefill_tokens as f64 / prefill;
    Ok(Report {
        gpu: model.device_name().to_owned(),
        shape: shape.to_owned(),
        layers: config.layers,
        weight_bytes: model.weight_bytes(),
        memory_bytes_per_second: memory,
        operations_per_second: operations,
        decode,
        prefill_tokens_per_second: rate,
        prefill_share: 2.0 * parameters * rate / operations,
    })
}

/// An executor whose sequences are measured.
struct Bench {
    executor: CudaExecutor,
    limits: headstart_engine::Limits,
    sampling: Sampling,
}

impl Bench {
    /// Seconds of one prompt, the best of three after one that does not count.
    fn prefill(&mut self, tokens: usize) -> Result<f64, Failure> {
        let (context, tables) = (self.contexts(1, tokens), self.tables(1, tokens));
        let mut best = f64::INFINITY;
        for run in 0..4 {
            let begun = Instant::now();
            self.step(&context, &tables, 0)?;
            if run > 0 {
                best = best.min(begun.elapsed().as_secs_f64());
            }
        }
        Ok(best)
    }

    /// Seconds a step of `batch` sequences, each of which has [`CONTEXT`] positions at first.
    fn decode(&mut self, batch: usize, steps: usize) -> Result<f64, Failure> {
        let mut contexts = self.contexts(batch, CONTEXT);
        let tables = self.tables(batch, CONTEXT + steps + 16);
        self.step(&contexts, &tables, 0)?;
        // The first runs plainly, the second is recorded.
        for _ in 0..3 {
            contexts.iter_mut().for_each(|context| context.push(1));
            let start = contexts[0].len() - 1;
            self.step(&contexts, &tables, start)?;
        }
        let begun = Instant::now();
        for _ in 0..steps {
            contexts.iter_mut().for_each(|context| context.push(1));
            let start = contexts[0].len() - 1;
            self.step(&contexts, &tables, start)?;
        }
        Ok(begun.elapsed().as_secs_f64() / steps as f64)
    }

    fn contexts(&self, batch: usize, tokens: usize) -> Vec<Vec<TokenId>> {
        let token = |i: usize| (i * 7919 % self.limits.vocab_size) as TokenId;
        (0..batch).map(|row| (0..tokens).map(|i| token(i + 31 * row)).collect()).collect()
    }

    fn tables(&self, batch: usize, tokens: usize) -> Vec<Vec<PageId>> {
        let each = tokens.div_ceil(self.limits.page_size);
        let page = |i: usize| PageId((i % self.limits.pages) as u32);
        (0..batch).map(|row| (row * each..(row + 1) * each).map(page).collect()).collect()
    }

    /// Extends every sequence from `start` and samples after its last token.
    fn step(
        &mut self,
        contexts: &[Vec<TokenId>],
        tables: &[Vec<PageId>],
        start: usize,
    ) -> Result<(), Failure> {
        let position = contexts.first().map_or(0, |c| c.len().saturating_sub(1));
        let probes = [Probe { position, target: None, sample: true, top: 0 }];
        let rows: Vec<Row<'_>> = contexts
            .iter()
            .zip(tables)
            .map(|(context, pages)| Row {
                context,
                start,
                pages,
                answer_start: context.len(),
                probes: &probes,
                sampling: &self.sampling,
                pending: None,
            })
            .collect();
        self.executor.execute(&rows).map(|_| ()).map_err(failed)
    }
}

fn table(report: &Report) -> String {
    let mut text = String::new();
    let gib = report.weight_bytes as f64 / f64::from(1 << 30);
    let _ = writeln!(
        text,
        "{} on {}: {} layers, {gib:.1} GiB of bf16 weights",
        report.shape, report.gpu, report.layers
    );
    let _ = writeln!(
        text,
        "measured limits: memory {:.0} GB/s, products {:.0} TFLOP/s",
        report.memory_bytes_per_second / 1e9,
        report.operations_per_second / 1e12
    );
    for d in &report.decode {
        let _ = writeln!(
            text,
            "decode, batch {:>3}: {:>8.2} ms a step, {:>8.0} tokens/s, {:>3.0} % of the memory's rate",
            d.batch,
            d.step_ms,
            d.tokens_per_second,
            d.memory_share * 100.0
        );
    }
    let _ = writeln!(
        text,
        "prefill: {:.0} tokens/s, {:.0} % of the products' rate",
        report.prefill_tokens_per_second,
        report.prefill_share * 100.0
    );
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_have_the_sizes_of_their_models() {
        // Parameters in billions, the embedding once where it is the head.
        for (shape, billions) in
            [(Shape::Llama32_3b, 3.21), (Shape::Llama31_8b, 8.03), (Shape::Llama33_70b, 70.55)]
        {
            let c = shape.config();
            let attention = c.hidden_size * (2 * c.query_size() + 2 * c.kv_size());
            let layer = attention + 3 * c.hidden_size * c.intermediate_size;
            let ends = c.vocab_size * c.hidden_size * if c.tied_embeddings { 1 } else { 2 };
            let total = (c.layers * layer + ends) as f64 / 1e9;
            assert!((total - billions).abs() < 0.02, "{shape}: {total}");
            assert_eq!(c.windows.len(), c.layers);
        }
    }

    #[test]
    fn a_report_says_what_was_measured() {
        let report = Report {
            gpu: "a GPU".to_owned(),
            shape: "a shape".to_owned(),
            layers: 2,
            weight_bytes: 3 << 30,
            memory_bytes_per_second: 2e12,
            operations_per_second: 5e14,
            decode: vec![Decode {
                batch: 8,
                step_ms: 2.0,
                tokens_per_second: 4000.0,
                memory_share: 0.9,
            }],
            prefill_tokens_per_second: 12345.0,
            prefill_share: 0.61,
        };
        let text = table(&report);
        for part in ["2000 GB/s", "500 TFLOP/s", "batch   8", "90 %", "12345", "61 %"] {
            assert!(text.contains(part), "{part}: {text}");
        }
    }
}
