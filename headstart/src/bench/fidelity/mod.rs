//! `headstart bench fidelity`: how far a model's next-token distributions are from those of its own
//! weights in f32, and how far llama.cpp's are, on the same file and the same positions.

mod compare;
mod distributions;
mod theirs;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anstyle::{AnsiColor, Style};
use clap::{Args, ValueEnum};
use headstart_engine::model::WeightDtype;
use headstart_text::ModelText;
use serde::Serialize;

use self::compare::{Closeness, Tally};
use self::distributions::Distributions;
use crate::bench::engine::{at_least_one, build, check_writable, write_json};
use crate::bench::stats::figure;
use crate::bench::steps::Steps;
use crate::bench::table::{Cell, render};
use crate::failure::Failure;
use crate::models::cache::Check;
use crate::models::command::fetch_all;
use crate::models::{Cancel, Spec};

/// English: the Declaration of Independence, Carroll, Austen, Melville, Lincoln, Thoreau, all in the
/// public domain. Code: ours.
const TEXTS: [&str; 2] = [include_str!("english.txt"), include_str!("code.txt")];
/// Tokens that are read together.
const CHUNK_TOKENS: usize = 512;
/// The first position that is compared: before it there is too little to go by. llama-perplexity
/// begins in the middle, too, and leaves out the last position, whose next token is in no chunk.
const FIRST: usize = CHUNK_TOKENS / 2;
const COMPARED: usize = CHUNK_TOKENS - 1 - FIRST;
/// After an interrupt, what still runs has so long to end.
const LEAVE_WITHIN: Duration = Duration::from_secs(3);
const HEADING: Style = Style::new().bold();
const ASIDE: Style = Style::new().dimmed();
const AHEAD: Style = AnsiColor::Green.on_default().bold();
const BEHIND: Style = AnsiColor::Yellow.on_default().bold();

/// Measure what arithmetic costs: the divergence from the same weights in f32.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  headstart bench fidelity --model smollm2
  headstart bench fidelity --model smollm2 --against llama.cpp --json fidelity.json

KL divergence (natural log) of the next-token distribution from that of the file's weights expanded
to f32, averaged over the later half of every 512 tokens of English and code; and how often both find
the same token likeliest.")]
pub struct FidelityArgs {
    /// The model: a path, a short name (see `headstart models list`), or hf:owner/repo[:file.gguf]
    #[arg(long, value_name = "SPEC")]
    model: Spec,
    /// How weights are kept: auto (as the file has them), or bf16
    #[arg(long, value_name = "DTYPE", default_value_t = WeightDtype::Auto)]
    dtype: WeightDtype,
    /// Measure this engine too; built on its first use
    #[arg(long, value_enum, value_name = "ENGINE")]
    against: Option<Against>,
    /// Read this text instead of our own
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
    /// Threads that compute [default: all cores]
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    threads: Option<usize>,
    /// Write what was measured to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Another engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Against {
    /// Its own program for it, from the Python source package
    #[value(name = "llama.cpp")]
    LlamaCpp,
}

/// What was found.
#[derive(Clone, Debug, Serialize)]
struct Report {
    version: &'static str,
    model: String,
    dtype: String,
    positions: usize,
    ours: Closeness,
    #[serde(skip_serializing_if = "Option::is_none")]
    theirs: Option<Closeness>,
}

/// Runs the command.
///
/// # Errors
/// When the model cannot be had or run, llama.cpp cannot be built or run, or the text is too short.
pub async fn run(args: FidelityArgs) -> Result<(), Failure> {
    if let Some(path) = &args.json {
        check_writable(path)?;
    }
    let local = fetch_all(vec![args.model.clone()], Check::Size).await?.pop();
    let local = local.ok_or_else(|| Failure::Failed("fetching brought no model".to_owned()))?;
    let (cancel, json) = (Cancel::default(), args.json.clone());
    let flag = cancel.clone();
    let mut work =
        tokio::task::spawn_blocking(move || measure(&args, &local.path, &local.name, &flag));
    let joined = tokio::select! {
        joined = &mut work => joined,
        _ = tokio::signal::ctrl_c() => {
            cancel.cancel();
            let interrupted = || Failure::Interrupted("the benchmark was interrupted".to_owned());
            tokio::time::timeout(LEAVE_WITHIN, work).await.map_err(|_| interrupted())?
        }
    };
    let report =
        joined.map_err(|error| Failure::Failed(format!("measuring failed: {error}")))??;
    anstream::print!("{}", report.table());
    json.map_or(Ok(()), |path| write_json(&path, &report))
}

fn measure(
    args: &FidelityArgs,
    path: &Path,
    name: &str,
    cancel: &Cancel,
) -> Result<Report, Failure> {
    let llama = match args.against {
        Some(Against::LlamaCpp) => Some(build::llama(build::Flavor::Native, cancel)?),
        None => None,
    };
    let chunks = chunks(args, path)?;
    let cores = || std::thread::available_parallelism().map_or(1, usize::from);
    let threads = args.threads.unwrap_or_else(cores);
    let mut reference = Distributions::load(path, WeightDtype::F32, threads)?;
    let mut ours = Distributions::load(path, args.dtype, threads)?;
    let mut file = match &llama {
        Some(llama) => Some(theirs::LogitFile::create(&llama.words, reference.vocab(), &chunks)?),
        None => None,
    };
    let mut steps = Steps::start(&format!("comparing {name} with itself"), chunks.len() as u64);
    let mut tally = Tally::default();
    for (done, chunk) in chunks.iter().enumerate() {
        steps.at(done as u64, "");
        let (mut left, mut right) = (reference.read(chunk), ours.read(chunk));
        while let (Some(expected), Some(found)) = (left.next()?, right.next()?) {
            if cancel.is_cancelled() {
                return Err(Failure::Interrupted("the benchmark was interrupted".to_owned()));
            }
            for (expected, found) in expected.iter().zip(&found) {
                tally.push(expected, found);
                if let Some(file) = &mut file {
                    file.push(expected)?;
                }
            }
        }
    }
    drop((steps, ours, reference));
    let theirs = match (llama, file) {
        (Some(llama), Some(file)) => Some(file.measure(&llama, path, threads, cancel)?),
        _ => None,
    };
    let (model, dtype) = (name.to_owned(), args.dtype.to_string());
    let positions = chunks.len() * COMPARED;
    let ours = tally.closeness();
    Ok(Report { version: env!("CARGO_PKG_VERSION"), model, dtype, positions, ours, theirs })
}

/// The text's tokens, in whole chunks, each of which begins with BOS where the model has one.
fn chunks(args: &FidelityArgs, path: &Path) -> Result<Vec<Vec<u32>>, Failure> {
    let text = ModelText::load(path).map_err(|error| Failure::Failed(error.to_string()))?;
    let bos = text.bos().filter(|_| text.add_bos()).map(|bos| bos.id);
    let read = |file: &PathBuf| {
        std::fs::read_to_string(file)
            .map_err(|error| Failure::Usage(format!("--text: {}: {error}", file.display())))
    };
    let texts = match &args.text {
        Some(file) => vec![read(file)?],
        None => TEXTS.map(str::to_owned).to_vec(),
    };
    let mut ids = Vec::new();
    for part in &texts {
        let more = text.tokenizer().encode(part);
        ids.extend(more.map_err(|error| Failure::Failed(error.to_string()))?);
    }
    let new = CHUNK_TOKENS - usize::from(bos.is_some());
    let chunks: Vec<Vec<u32>> = ids
        .chunks_exact(new)
        .map(|ids| bos.into_iter().chain(ids.iter().copied()).collect())
        .collect();
    if chunks.is_empty() {
        return Err(Failure::Usage(format!("--text: expected at least {new} tokens")));
    }
    Ok(chunks)
}

impl Report {
    fn table(&self) -> String {
        let Self { model, dtype, positions, ours, theirs, .. } = self;
        let head = |text: &str| Cell::new(text).styled(HEADING);
        let row = |name: &str, it: &Closeness| {
            vec![
                Cell::new(name),
                Cell::new(format!("{:.6}", it.kl_mean)),
                Cell::new(format!("{:.2} %", it.same_top * 100.0)),
            ]
        };
        let mut rows = vec![vec![head(""), head("mean KL"), head("same top token")]];
        rows.push(row("headstart", ours));
        let mut verdict = String::new();
        if let Some(theirs) = theirs {
            rows.push(row("llama.cpp", theirs));
            let ratio = ours.kl_mean / theirs.kl_mean;
            let style =
                if ratio <= 0.5 && ours.same_top > theirs.same_top { AHEAD } else { BEHIND };
            verdict = format!(
                "\n{style}{} ×{style:#} {ASIDE}the divergence of llama.cpp{ASIDE:#}\n",
                figure(ratio)
            );
        }
        let table = render(&rows);
        format!(
            "{HEADING}{model}{HEADING:#} (dtype {dtype}) beside its weights in f32, {positions} \
             positions\n\n{table}{verdict}"
        )
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser, Debug)]
    struct Command {
        #[command(flatten)]
        args: FidelityArgs,
    }

    fn args(flags: &[&str]) -> FidelityArgs {
        let all = ["bench", "--model", "smollm2"].iter().chain(flags);
        Command::try_parse_from(all).unwrap().args
    }

    fn stories() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/stories260k")
    }

    #[test]
    fn a_model_is_no_way_from_itself_and_a_little_from_its_halves() {
        let measure = |dtype: &str| {
            let args = args(&["--threads=1", &format!("--dtype={dtype}"), "--text", TEXT_FILE]);
            measure(&args, &stories(), "stories", &Cancel::default()).unwrap()
        };
        let same = measure("f32");
        assert_eq!((same.ours.kl_mean, same.ours.same_top), (0.0, 1.0));
        assert!(same.positions >= COMPARED);
        let halves = measure("bf16");
        assert!(halves.ours.kl_mean > 0.0 && halves.ours.kl_mean < 0.01, "{halves:?}");
        assert!(halves.table().contains("positions"));
    }

    /// Long enough for a chunk or two of a tokenizer with a small vocabulary.
    const TEXT_FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/src/bench/fidelity/compare.rs");

    #[test]
    fn our_own_text_is_long_enough_for_any_vocabulary() {
        // Some six characters a token at most, with the largest vocabularies.
        let bytes: usize = TEXTS.iter().map(|text| text.len()).sum();
        assert!(bytes / 6 / CHUNK_TOKENS * COMPARED > 2_000, "{bytes}");
    }
}
