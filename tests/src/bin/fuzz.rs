//! `fuzz`: feeds every parser that faces outside with inputs that are almost right. A panic, a
//! crash, or memory beyond the target's bound ends the run with the input in a file and exit code 1.

use std::alloc::System;
use std::io::{Seek as _, SeekFrom, Write as _};
use std::panic::catch_unwind;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use cap::Cap;
use clap::Parser;
use headstart_tests::fuzz::targets::ALL;
use headstart_tests::fuzz::{Target, mutate};

/// What a server's tasks have as stack: deep recursion shows here as it would there.
const STACK_BYTES: usize = 2 << 20;
/// The process notes where it is every so many inputs.
const NOTED_EVERY: u64 = 1024;

/// Counts memory, and refuses what exceeds a target's bound.
#[global_allocator]
static ALLOCATOR: Cap<System> = Cap::new(System, usize::MAX);

/// Feeds every parser that faces outside with inputs that are almost right
#[derive(Clone, Debug, Parser)]
struct Options {
    /// Inputs for each target
    #[arg(long, default_value_t = 10_000)]
    runs: u64,
    /// Only the targets whose name contains this
    #[arg(long, default_value = "")]
    target: String,
    /// What the inputs are drawn from
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Where inputs that fail are kept
    #[arg(long, default_value = "target/fuzz")]
    folder: PathBuf,
    /// Writes each target's right inputs, words and bound here, for a coverage-guided fuzzer, and
    /// feeds nothing
    #[arg(long)]
    corpus: Option<PathBuf>,
    /// Feeds one target in this process, from this input on, and notes each
    #[arg(long, hide = true)]
    inside: Option<u64>,
    /// Notes each input, not every thousandth
    #[arg(long, hide = true)]
    note_each: bool,
}

fn main() -> ExitCode {
    let options = Options::parse();
    if let Some(from) = options.inside {
        return inside(&options, from);
    }
    if let Some(corpus) = &options.corpus {
        return match write_corpus(corpus, &options.target) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("fuzz: {}: {error}", corpus.display());
                ExitCode::FAILURE
            }
        };
    }
    if let Err(error) = std::fs::create_dir_all(&options.folder) {
        eprintln!("fuzz: {}: {error}", options.folder.display());
        return ExitCode::FAILURE;
    }
    println!(
        "{:<20} {:>10} {:>8} {:>9} {:>9}  result",
        "target", "inputs", "time", "slowest", "memory"
    );
    let chosen = ALL.iter().filter(|target| target.name.contains(&options.target));
    let results: Vec<bool> = chosen.map(|target| outside(&options, target)).collect();
    let failed = results.iter().filter(|&&passed| !passed).count();
    println!("{} targets, {} inputs each, {failed} failed", results.len(), options.runs);
    if failed == 0 && !results.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Writes, for each target, a folder of inputs, `NAME.dict` (words as libFuzzer reads them) and
/// `NAME.bytes` (the longest input).
fn write_corpus(corpus: &Path, only: &str) -> std::io::Result<()> {
    for target in ALL.iter().filter(|target| target.name.contains(only)) {
        let folder = corpus.join(target.name);
        std::fs::create_dir_all(&folder)?;
        for (index, seed) in (target.seeds)().iter().enumerate() {
            std::fs::write(folder.join(format!("seed-{index}")), seed)?;
        }
        let mut words = String::new();
        for word in target.words {
            let quoted: String = word.bytes().map(|byte| format!("\\x{byte:02x}")).collect();
            words += &format!("\"{quoted}\"\n");
        }
        std::fs::write(corpus.join(format!("{}.dict", target.name)), words)?;
        std::fs::write(
            corpus.join(format!("{}.bytes", target.name)),
            target.bytes_max.to_string(),
        )?;
    }
    Ok(())
}

/// Runs a target in a process of its own. When that dies, the input it died of is found again.
fn outside(options: &Options, target: &Target) -> bool {
    let note = options.folder.join(format!("{}.note", target.name));
    let run = |from: u64, note_each: bool| {
        let mut command = Command::new(std::env::current_exe().unwrap_or_default());
        command.args(["--inside", &from.to_string(), "--target", target.name]);
        command.args(["--runs", &options.runs.to_string(), "--seed", &options.seed.to_string()]);
        command.arg("--folder").arg(&options.folder);
        if note_each {
            command.arg("--note-each");
        }
        command.status()
    };
    match run(0, false) {
        Ok(status) if status.success() => return true,
        // It said itself what happened.
        Ok(status) if status.code() == Some(1) => return false,
        _ => {}
    }
    let from = noted(&note);
    let ended = run(from, true);
    let index = noted(&note);
    let input = make(options, target, &(target.seeds)(), index);
    let kept = keep(options, target, index, &input);
    println!("{:<20} input {index} ended the process ({ended:?}): {kept}", target.name);
    false
}

fn noted(note: &Path) -> u64 {
    std::fs::read_to_string(note).ok().and_then(|text| text.trim().parse().ok()).unwrap_or_default()
}

fn make(options: &Options, target: &Target, seeds: &[Vec<u8>], index: u64) -> Vec<u8> {
    mutate::input(options.seed, index, seeds, target.words, target.bytes_max)
}

fn keep(options: &Options, target: &Target, index: u64, input: &[u8]) -> String {
    let path = options.folder.join(format!("{}-{}-{index}.input", target.name, options.seed));
    match std::fs::write(&path, input) {
        Ok(()) => path.display().to_string(),
        Err(error) => format!("not kept: {error}"),
    }
}

fn inside(options: &Options, from: u64) -> ExitCode {
    let Some(target) = ALL.iter().find(|target| target.name == options.target) else {
        eprintln!("fuzz: no target {}", options.target);
        return ExitCode::from(2);
    };
    let options = options.clone();
    let feeding = std::thread::Builder::new()
        .stack_size(STACK_BYTES)
        .spawn(move || feed(&options, target, from));
    let fed = feeding
        .map_err(|error| error.to_string())
        .and_then(|feeding| feeding.join().map_err(|_| "it panicked between inputs".to_owned()));
    match fed.and_then(|result| result) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("{:<20} {error}", target.name);
            ExitCode::from(1)
        }
    }
}

fn feed(options: &Options, target: &Target, from: u64) -> Result<(), String> {
    let text = |error: std::io::Error| error.to_string();
    let note = options.folder.join(format!("{}.note", target.name));
    let mut note = std::fs::File::create(note).map_err(text)?;
    let seeds = (target.seeds)();
    let started = Instant::now();
    let (mut slowest, mut most) = (Duration::ZERO, 0);
    for index in from..options.runs {
        if options.note_each || index.is_multiple_of(NOTED_EVERY) {
            note.seek(SeekFrom::Start(0)).map_err(text)?;
            writeln!(note, "{index:<20}").map_err(text)?;
        }
        let input = make(options, target, &seeds, index);
        let before = ALLOCATOR.allocated();
        let began = Instant::now();
        // Beyond the limit an allocation fails, and with it the process.
        let _ = ALLOCATOR.set_limit(before + target.memory_max);
        let result = catch_unwind(|| (target.run)(&input));
        let _ = ALLOCATOR.set_limit(usize::MAX);
        slowest = slowest.max(began.elapsed());
        most = most.max(ALLOCATOR.max_allocated().saturating_sub(before));
        if result.is_err() {
            return Err(format!(
                "input {index} panicked: {}",
                keep(options, target, index, &input)
            ));
        }
    }
    let (seconds, slowest) = (started.elapsed().as_secs_f64(), slowest.as_secs_f64() * 1e3);
    let memory = most as f64 / f64::from(1 << 20);
    let name = target.name;
    println!(
        "{name:<20} {:>10} {seconds:>6.1} s {slowest:>6.1} ms {memory:>5.1} MiB  passed",
        options.runs
    );
    Ok(())
}
