//! `headstart bench engine`: the engine alone, through the path that nodes run, beside the memory's
//! limit and, if wanted, beside llama.cpp on the same file.

mod bandwidth;
pub(in crate::bench) mod build;
pub(in crate::bench) mod llama;
mod ours;
mod plan;
mod report;
mod requantize;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, ValueEnum};
use headstart_engine::model::WeightDtype;
use headstart_kernels::{Peak, ThreadPool, peak};

use crate::bench::gpu::{self, GpuArgs};
use crate::bench::machine::{self, Processor};
use crate::bench::stats::{Summary, median};
use crate::bench::steps::Steps;
use crate::failure::Failure;
use crate::models::cache::Check;
use crate::models::command::fetch_all;
use crate::models::{Cancel, Local, Spec};

use self::bandwidth::Bandwidth;
use self::build::Flavor;
use self::llama::Llama;
use self::ours::Ours;
use self::plan::{Figure, Plan};
use self::report::{
    ArithmeticReport, FigureReport, MachineReport, MemoryReport, ModelReport, Other, Report,
};
use self::requantize::Quantized;

/// After an interrupt, what still runs has so long to end its programs.
const LEAVE_WITHIN: Duration = Duration::from_secs(3);

/// Each arithmetic unit is measured for so long in a round.
const PEAK_TIME: Duration = Duration::from_millis(50);

/// Measure the engine: prompts, decoding, batches, and how near memory's limit it is.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  headstart bench engine --model smollm2
  headstart bench engine --model smollm2 --against llama.cpp --threads 2 --json bench.json
  headstart bench engine --model smollm2 --requantize q8_0 --against llama.cpp,llama.cpp-no-amx
  headstart bench engine --model ./large.gguf --pp 128 --tg 32 --batches 1,16
  headstart bench engine --device cuda --shape llama-3.1-8b

pp512: tokens/s of reading a prompt of 512 tokens. tg128: tokens/s of one sequence writing 128.
batch N: tokens/s of N sequences together, each writing 48 after a prompt of 32.

Run it on a machine that is otherwise idle. What the figures mean: docs/performance.md.")]
pub struct EngineArgs {
    /// The model: a path, a short name (see `headstart models list`), or hf:owner/repo[:file.gguf]
    #[arg(long, value_name = "SPEC", required_unless_present = "shape")]
    model: Option<Spec>,
    #[command(flatten)]
    gpu: GpuArgs,
    /// Threads that compute [default: all cores]
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    threads: Option<usize>,
    /// How weights are kept: auto (as the file has them), f32 or bf16
    #[arg(long, value_name = "DTYPE", default_value_t = WeightDtype::Auto)]
    dtype: WeightDtype,
    /// Rounds; each measures every figure once
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = at_least_one)]
    repetitions: usize,
    /// Make this type of the file first, and measure that; needs llama.cpp, built on its first use
    #[arg(long, value_enum, value_name = "TYPE")]
    requantize: Option<Quantized>,
    /// Measure these engines too, in turn with ours; built on their first use
    #[arg(long, value_enum, value_name = "ENGINE,…", value_delimiter = ',')]
    against: Vec<Against>,
    /// Write everything that was measured to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Tokens of the prompt
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = tokens)]
    pp: usize,
    /// Tokens that one sequence writes alone
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = tokens)]
    tg: usize,
    /// Sequences that write together
    #[arg(long, value_name = "N,…", default_value = "1,4,8,16", value_delimiter = ',',
        value_parser = batch)]
    batches: Vec<usize>,
}

/// Another engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
enum Against {
    /// Its own benchmark programs, from the Python source package, for this processor
    #[value(name = "llama.cpp")]
    LlamaCpp,
    /// The same, but for the processor's matrix unit (AMX)
    #[value(name = "llama.cpp-no-amx")]
    LlamaCppNoAmx,
}

impl Against {
    const fn flavor(self) -> Flavor {
        match self {
            Self::LlamaCpp => Flavor::Native,
            Self::LlamaCppNoAmx => Flavor::WithoutAmx,
        }
    }

    /// As it is called on the command line and in the report.
    const fn name(self) -> &'static str {
        match self {
            Self::LlamaCpp => "llama.cpp",
            Self::LlamaCppNoAmx => "llama.cpp-no-amx",
        }
    }
}

impl EngineArgs {
    fn plan(&self) -> Plan {
        let mut batches = self.batches.clone();
        batches.sort_unstable();
        batches.dedup();
        Plan { prompt_tokens: self.pp, gen_tokens: self.tg, batches, ..Plan::default() }
    }

    /// The other engines, each once.
    fn against(&self) -> Vec<Against> {
        let mut against = self.against.clone();
        against.sort_unstable();
        against.dedup();
        against
    }

    fn threads(&self) -> usize {
        let cores = || std::thread::available_parallelism().map_or(1, usize::from);
        self.threads.unwrap_or_else(cores)
    }
}

/// Runs the command.
///
/// # Errors
/// When the model cannot be had or run, llama.cpp cannot be built or run, or the JSON file cannot be
/// written; the latter is found out before anything is measured.
pub async fn run(args: EngineArgs) -> Result<(), Failure> {
    if let Some(path) = &args.json {
        check_writable(path)?;
    }
    let Some(model) = args.model.clone() else {
        return gpu::run(args.gpu, args.json).await;
    };
    let local = fetch_all(vec![model], Check::Size).await?.pop();
    let local = local.ok_or_else(|| Failure::Failed("fetching brought no model".to_owned()))?;
    let (cancel, json) = (Cancel::default(), args.json.clone());
    let flag = cancel.clone();
    let mut work = tokio::task::spawn_blocking(move || {
        measure(&args, &local, bandwidth::buffer_bytes(), &flag)
    });
    let joined = tokio::select! {
        joined = &mut work => joined,
        _ = tokio::signal::ctrl_c() => {
            cancel.cancel();
            let interrupted = || Failure::Interrupted("the benchmark was interrupted".to_owned());
            // Loading a model does not look at the flag; it ends with the process.
            tokio::time::timeout(LEAVE_WITHIN, work).await.map_err(|_| interrupted())?
        }
    };
    let measured = joined.map_err(|error| Failure::Failed(format!("measuring failed: {error}")))?;
    let report = measured?;
    anstream::print!("{}", report.table());
    json.map_or(Ok(()), |path| write_json(&path, &report))
}

/// Both engines' samples, and the machine's.
#[derive(Default)]
struct Samples {
    ours: BTreeMap<Figure, Vec<f64>>,
    theirs: BTreeMap<(Against, Figure), Vec<f64>>,
    bandwidth: Vec<f64>,
    buffer_bytes: usize,
    resident_bytes_max: Option<u64>,
    peaks: Vec<Peak>,
}

/// Measures everything; the memory with a buffer of `buffer_bytes`.
fn measure(
    args: &EngineArgs,
    local: &Local,
    buffer_bytes: u64,
    cancel: &Cancel,
) -> Result<Report, Failure> {
    if !local.path.is_file() && (!args.against.is_empty() || args.requantize.is_some()) {
        let path = local.path.display();
        let message = format!("llama.cpp needs a GGUF file; {path} is a directory");
        return Err(Failure::Usage(message));
    }
    let made = args.requantize.map(|to| requantize::make(local, to, cancel)).transpose()?;
    let local = made.as_ref().unwrap_or(local);
    let build = |against: Against| Ok((against, build::llama(against.flavor(), cancel)?));
    let llamas = args.against().into_iter().map(build).collect::<Result<Vec<_>, Failure>>()?;
    let plan = args.plan();
    let mut ours = Ours::load(&local.path, args.dtype, args.threads(), &plan)?;
    let pool = ThreadPool::new(args.threads());
    let rounds = Rounds { args, local, plan: &plan, llamas: &llamas, buffer_bytes, pool, cancel };
    let samples = rounds.sample(&mut ours)?;
    report(args, local, &plan, &ours, samples)
}

/// What is measured again and again.
struct Rounds<'a> {
    args: &'a EngineArgs,
    local: &'a Local,
    plan: &'a Plan,
    llamas: &'a [(Against, Llama)],
    buffer_bytes: u64,
    /// Threads for what the arithmetic units do at most.
    pool: ThreadPool,
    cancel: &'a Cancel,
}

impl Rounds<'_> {
    /// Round after round: ours, the memory, theirs.
    fn sample(&self, ours: &mut Ours) -> Result<Samples, Failure> {
        let Self { args, local, plan, cancel, .. } = self;
        let mut steps = Steps::start(&format!("measuring {}", local.name), args.repetitions as u64);
        let mut samples = Samples::default();
        let mut memory = None;
        steps.at(0, "warming up");
        ours.warm_up(plan, cancel)?;
        for round in 0..args.repetitions as u64 {
            for figure in plan.figures() {
                steps.at(round, &plan.name(figure));
                let rate = ours.measure(figure, plan, cancel)?;
                samples.ours.entry(figure).or_default().push(rate);
            }
            steps.at(round, "memory");
            let memory = match &memory {
                Some(memory) => memory,
                None => {
                    // Before the buffer is there, which is no part of the engine.
                    samples.resident_bytes_max = machine::resident_bytes_max();
                    memory.insert(self.buffer()?)
                }
            };
            samples.buffer_bytes = memory.bytes();
            samples.bandwidth.push(memory.sample());
            samples.peaks.push(peak(&self.pool, PEAK_TIME));
            for (against, llama) in self.llamas {
                steps.at(round, against.name());
                for (figure, rate) in llama.measure(&local.path, args.threads(), plan, cancel)? {
                    samples.theirs.entry((*against, figure)).or_default().push(rate);
                }
            }
            steps.at(round + 1, "");
        }
        Ok(samples)
    }

    fn buffer(&self) -> Result<Bandwidth, Failure> {
        let bytes = self.buffer_bytes;
        Bandwidth::new(bytes, self.args.threads()).map_err(|error| {
            Failure::Failed(format!("cannot have {bytes} bytes to measure the memory: {error}"))
        })
    }
}

fn report(
    args: &EngineArgs,
    local: &Local,
    plan: &Plan,
    ours: &Ours,
    mut samples: Samples,
) -> Result<Report, Failure> {
    let nothing = || Failure::Failed("nothing was measured".to_owned());
    let mut figures = Vec::new();
    for figure in plan.figures() {
        let summary = samples.ours.remove(&figure).and_then(Summary::of).ok_or_else(nothing)?;
        let others = args.against().into_iter().filter_map(|against| {
            let theirs = samples.theirs.remove(&(against, figure)).and_then(Summary::of)?;
            Some(Other::new(against.name(), &summary, theirs))
        });
        let others = others.collect();
        figures.push(FigureReport { name: plan.name(figure), ours: summary, others });
    }
    let bandwidth = Summary::of(samples.bandwidth).ok_or_else(nothing)?;
    let decode = figures.iter().find(|figure| figure.name == plan.name(Figure::Decode));
    let decode = &decode.ok_or_else(nothing)?.ours;
    let decode_bytes = ours.decode_bytes as f64;
    let rounds = decode.samples.iter().zip(&bandwidth.samples);
    let mut shares: Vec<f64> = rounds.map(|(rate, memory)| rate * decode_bytes / memory).collect();
    let decode_bytes_per_second = decode.median * decode_bytes;
    let prefill = figures.iter().find(|figure| figure.name == plan.name(Figure::Prefill));
    let prefill_rate = prefill.map(|figure| figure.ours.median).ok_or_else(nothing)?;
    let arithmetic =
        ArithmeticReport::new(&samples.peaks, prefill_rate * 2.0 * ours.layer_weights as f64);
    Ok(Report {
        version: env!("CARGO_PKG_VERSION"),
        model: ModelReport {
            name: local.name.clone(),
            path: local.path.clone(),
            file_bytes: file_bytes(&local.path),
            dtype: args.dtype.to_string(),
            weight_bytes: ours.weight_bytes,
            decode_bytes: ours.decode_bytes,
        },
        machine: MachineReport { processor: Processor::this().name, threads: args.threads() },
        repetitions: args.repetitions,
        against: args.against().into_iter().map(Against::name).collect(),
        package: build::PACKAGE,
        figures,
        arithmetic: arithmetic.ok_or_else(nothing)?,
        memory: MemoryReport {
            decode_share: median(&mut shares),
            bandwidth,
            buffer_bytes: samples.buffer_bytes,
            decode_bytes_per_second,
            resident_bytes_max: samples.resident_bytes_max,
            kv_tokens: plan.kv_tokens(),
            kv_bytes: ours.kv_bytes,
        },
    })
}

/// Bytes of a model file, or of the weights in a directory.
fn file_bytes(path: &Path) -> u64 {
    let size = |path: &Path| fs::metadata(path).map_or(0, |meta| meta.len());
    let Ok(entries) = fs::read_dir(path) else {
        return size(path);
    };
    let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
    paths
        .filter(|path| path.extension().is_some_and(|e| e == "safetensors"))
        .map(|p| size(&p))
        .sum()
}

/// Creates the file if it is not there; what is in it stays.
pub(in crate::bench) fn check_writable(path: &Path) -> Result<(), Failure> {
    let opened = fs::File::options().create(true).append(true).open(path);
    let failed =
        |error| Failure::Usage(format!("--json: cannot write {}: {error}", path.display()));
    opened.map(|_| ()).map_err(failed)
}

/// Writes a report to `path`.
pub(in crate::bench) fn write_json(
    path: &Path,
    report: &impl serde::Serialize,
) -> Result<(), Failure> {
    let failed = |error: &dyn std::fmt::Display| {
        Failure::Failed(format!("cannot write {}: {error}", path.display()))
    };
    let text = serde_json::to_string_pretty(report).map_err(|error| failed(&error))?;
    fs::write(path, text + "\n").map_err(|error| failed(&error))
}

/// An integer from 1, within reason.
pub(in crate::bench) fn at_least_one(text: &str) -> Result<usize, String> {
    between(text, 1, 1 << 10)
}

fn tokens(text: &str) -> Result<usize, String> {
    between(text, 1, 1 << 16)
}

fn batch(text: &str) -> Result<usize, String> {
    between(text, 1, 1 << 8)
}

fn between(text: &str, min: usize, max: usize) -> Result<usize, String> {
    match text.parse() {
        Ok(number) if (min..=max).contains(&number) => Ok(number),
        _ => Err(format!("expected an integer from {min} to {max}")),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser, Debug)]
    struct Line {
        #[command(flatten)]
        args: EngineArgs,
    }

    fn parsed(flags: &[&str]) -> Result<EngineArgs, String> {
        let args = ["bench", "--model", "smollm2"].iter().chain(flags);
        Line::try_parse_from(args).map(|line| line.args).map_err(|error| error.to_string())
    }

    #[test]
    fn the_defaults_are_what_llama_cpps_programs_measure() {
        let args = parsed(&[]).unwrap();
        assert_eq!((args.plan(), args.repetitions), (Plan::default(), 5));
        assert_eq!((args.against(), args.dtype), (vec![], WeightDtype::Auto));
        let flags = [
            "--against=llama.cpp-no-amx,llama.cpp",
            "--batches=8,1,8",
            "--pp=128",
            "--tg=32",
            "--dtype=bf16",
        ];
        let args = parsed(&flags).unwrap();
        let both = vec![Against::LlamaCpp, Against::LlamaCppNoAmx];
        assert_eq!((args.against(), args.dtype), (both, WeightDtype::Bf16));
        let plan = args.plan();
        assert_eq!((plan.prompt_tokens, plan.gen_tokens, plan.batches), (128, 32, vec![1, 8]));
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (flag, expected) in [
            ("--repetitions=0", "from 1 to 1024"),
            ("--threads=x", "from 1 to 1024"),
            ("--batches=1,1000", "from 1 to 256"),
            ("--pp=0", "from 1 to 65536"),
            ("--dtype=int3", "bf16"),
            ("--against=candle", "llama.cpp"),
        ] {
            let message = parsed(&[flag]).unwrap_err();
            let name = flag.split('=').next().unwrap();
            assert!(message.contains(name) && message.contains(expected), "{flag}: {message}");
        }
    }

    #[test]
    fn only_a_file_can_be_given_to_llama_cpp() {
        let folder = tempfile::tempdir().unwrap();
        let args = parsed(&["--against=llama.cpp"]).unwrap();
        let local = Local { path: folder.path().to_owned(), name: "folder".to_owned() };
        let error = measure(&args, &local, 1 << 20, &Cancel::default()).unwrap_err();
        assert!(matches!(&error, Failure::Usage(message) if message.contains("GGUF")), "{error:?}");
    }

    #[test]
    fn an_unwritable_json_file_is_known_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let error = check_writable(&folder.path().join("no/such/folder.json")).unwrap_err();
        assert!(error.message().starts_with("--json: cannot write"), "{}", error.message());
        let file = folder.path().join("bench.json");
        fs::write(&file, "kept").unwrap();
        check_writable(&file).unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "kept");
    }

    /// The whole command on a tiny model, but for llama.cpp. Nothing here depends on speed.
    #[test]
    fn a_report_comes_of_a_tiny_model() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/stories260k");
        let local = Local { path, name: "stories260k".to_owned() };
        let flags = ["--pp=64", "--tg=8", "--batches=1,3", "--threads=1", "--repetitions=2"];
        let report =
            measure(&parsed(&flags).unwrap(), &local, 1 << 20, &Cancel::default()).unwrap();
        let names: Vec<&str> = report.figures.iter().map(|f| f.name.as_str()).collect();
        assert_eq!(names, ["pp64", "tg8", "batch 1", "batch 3"]);
        assert!(report.figures.iter().all(|f| f.ours.samples.len() == 2 && f.ours.min > 0.0));
        assert!(report.figures.iter().all(|f| f.others.is_empty()));
        assert_eq!(report.memory.bandwidth.samples.len(), 2);
        assert!(report.model.file_bytes > report.model.decode_bytes / 2);
        let (rates, memory) = (&report.figures[1].ours.samples, &report.memory.bandwidth.samples);
        let share = |round: usize| rates[round] * report.model.decode_bytes as f64 / memory[round];
        let mean = f64::midpoint(share(0), share(1));
        assert!((report.memory.decode_share / mean - 1.0).abs() < 1e-9);
        assert!(anstream::adapter::strip_str(&report.table()).to_string().contains("\npp64 "));
    }

    #[test]
    fn an_interrupt_ends_it() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/stories260k");
        let local = Local { path, name: "stories260k".to_owned() };
        let cancel = Cancel::default();
        cancel.cancel();
        let error =
            measure(&parsed(&["--threads=1"]).unwrap(), &local, 1 << 20, &cancel).unwrap_err();
        assert!(matches!(error, Failure::Interrupted(_)), "{error:?}");
    }
}
