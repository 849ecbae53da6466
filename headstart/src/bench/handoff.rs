//! `headstart bench handoff`: KV from one engine to another over loopback, as base-nodes hand it
//! over. How fast it comes, beside a plain TCP copy of the same bytes; and how much later the first
//! token comes than where the answer stays.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Args;
use headstart_base_node::KvOptions;
use headstart_base_node::kv::Kv;
use headstart_engine::executor::cpu::{CpuExecutor, CpuOptions};
use headstart_engine::model::{LoadOptions, Model, WeightDtype};
use headstart_engine::{
    DraftPolicy, EngineHandle, EngineOptions, Event, Export, Generation, Known, Request, Sampling,
};
use headstart_handoff::{Leases, Progress, Source, Tcp, Times, pull, serve};
use headstart_proto::{Epoch, RequestId};
use serde::Serialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use crate::bench::stats::{Summary, figure};
use crate::bench::steps::Steps;
use crate::failure::Failure;
use crate::models::Spec;
use crate::models::cache::Check;
use crate::models::command::fetch_all;

/// Tokens of a KV page.
const PAGE: usize = 16;
/// Draft tokens behind the prefix, so that half a page is left over.
const DRAFT: usize = PAGE + PAGE / 2;
/// Copies of a prefix, and plain ones in turn with them, a round.
const COPIES: usize = 5;
/// Tokens that are written after the switch: one, and some to know a decode step by.
const WRITTEN: usize = 9;
/// Nothing here takes so long.
const PATIENCE: Duration = Duration::from_secs(60);

/// Measure the handoff of KV between two engines on this machine.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Example:
  headstart bench handoff --model smollm2

ratio: bytes/s of KV pages into the other engine's prefix cache, beside a plain TCP copy of as many
bytes right after it; the middle of all such pairs. exposed: from the switch to the first token
written by the other engine, less what it takes where the answer stays, in decode steps.")]
pub struct HandoffArgs {
    /// The model: a path, a short name (see `headstart models list`), or hf:owner/repo[:file.gguf]
    #[arg(long, value_name = "SPEC", default_value = "smollm2")]
    model: Spec,
    /// Threads that compute, in each engine [default: half of the cores, two engines share them]
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Tokens of the prefix that moves
    #[arg(long, value_name = "N", default_value_t = 2000)]
    prefix: usize,
    /// Rounds; each measures a switch that moves, one that stays, and five copies of either kind
    #[arg(long, value_name = "N", default_value_t = 7)]
    repetitions: usize,
    /// Write everything that was measured to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

#[derive(Debug, Serialize)]
struct Report {
    model: String,
    prefix_tokens: usize,
    prefix_bytes: u64,
    /// Bytes a second.
    handoff: Summary,
    /// Bytes a second.
    plain_tcp: Summary,
    /// Of each handoff to the plain copy after it.
    throughput_ratio: Summary,
    /// From the switch to the first token, in seconds, where the answer moves.
    moved: Summary,
    /// The same where it stays.
    stayed: Summary,
    /// In seconds.
    decode_step: Summary,
    /// In decode steps.
    exposed_steps: f64,
}

/// Runs the command.
///
/// # Errors
/// When the model cannot be had or run, or the JSON file cannot be written.
pub async fn run(args: HandoffArgs) -> Result<(), Failure> {
    let local = fetch_all(vec![args.model.clone()], Check::Size).await?.pop();
    let local = local.ok_or_else(|| Failure::Failed("fetching brought no model".to_owned()))?;
    let half = || std::thread::available_parallelism().map_or(1, |cores| cores.get().div_ceil(2));
    let threads = args.threads.unwrap_or_else(half);
    let load = LoadOptions { dtype: WeightDtype::Auto, threads };
    let model = Model::load(&local.path, load, &mut |_| {}).map_err(failed)?;
    let bench = Bench::new(&Arc::new(model), threads, &args).await?;
    let report = bench.measure(&local.name, &args).await?;
    print(&report);
    let Some(path) = &args.json else { return Ok(()) };
    let text = serde_json::to_string_pretty(&report).map_err(failed)?;
    fs::write(path, text + "\n")
        .map_err(|error| Failure::Failed(format!("cannot write {}: {error}", path.display())))
}

fn failed(error: impl std::fmt::Display) -> Failure {
    Failure::Failed(error.to_string())
}

fn print(report: &Report) {
    let gigabytes = |summary: &Summary| figure(summary.median / 1e9);
    let milliseconds = |summary: &Summary| figure(summary.median * 1e3);
    anstream::println!(
        "{} tokens of {}, {} MB\nhandoff   {} GB/s, plain TCP {} GB/s, ratio {}",
        report.prefix_tokens,
        report.model,
        figure(report.prefix_bytes as f64 / 1e6),
        gigabytes(&report.handoff),
        gigabytes(&report.plain_tcp),
        figure(report.throughput_ratio.median)
    );
    anstream::println!(
        "exposed   {} decode steps: first token after {} ms moved, {} ms stayed, a step {} ms",
        figure(report.exposed_steps),
        milliseconds(&report.moved),
        milliseconds(&report.stayed),
        milliseconds(&report.decode_step)
    );
}

/// A prefix that was copied, both ways.
struct Copy {
    bytes: u64,
    /// Bytes a second to the other engine.
    handoff: f64,
    /// Bytes a second over plain TCP.
    plain: f64,
}

struct Bench {
    from: EngineHandle,
    to: EngineHandle,
    /// Has room for one prefix and no more, so that each one copied to it is new.
    small: EngineHandle,
    from_kv: Arc<Kv>,
    to_kv: Arc<Kv>,
    /// State of the generator of prompts.
    vocab_size: usize,
}

impl Bench {
    async fn new(model: &Arc<Model>, threads: usize, args: &HandoffArgs) -> Result<Self, Failure> {
        let tokens = args.prefix + DRAFT + WRITTEN + PAGE;
        let context = model.config().context_length;
        if tokens > context {
            let message =
                format!("--prefix: the model holds {context} tokens, needed are {tokens}");
            return Err(Failure::Usage(message));
        }
        let engine = |kv_tokens| {
            let options = CpuOptions { threads, kv_tokens, ..CpuOptions::default() };
            let executor = CpuExecutor::new(Arc::clone(model), options).map_err(failed)?;
            Ok::<_, Failure>(EngineHandle::start(Box::new(executor), EngineOptions::default()))
        };
        // A second prefix takes the pages of the first, which are warm.
        let (from, to) = (engine(2 * tokens)?, engine(2 * tokens)?);
        let small = engine(args.prefix.next_multiple_of(PAGE))?;
        let listener = TcpListener::bind("127.0.0.1:0").await.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?.to_string();
        let options =
            KvOptions { listener: Some(listener.into()), address, ..KvOptions::default() };
        let (from_kv, to_kv) = (Kv::new(&from, options), Kv::new(&to, KvOptions::default()));
        Ok(Self { vocab_size: model.config().vocab_size, from, to, small, from_kv, to_kv })
    }

    async fn measure(&self, model: &str, args: &HandoffArgs) -> Result<Report, Failure> {
        let rounds = args.repetitions as u64;
        let mut progress = Steps::start(&format!("measuring {model}"), 2 * rounds);
        let copies = self.copies(args, &mut progress).await?;
        let (mut moved, mut stayed, mut steps) = (Vec::new(), Vec::new(), Vec::new());
        for round in 0..=rounds {
            progress.at(rounds + round.saturating_sub(1), "switch");
            let here = self.stays(&self.prompt(2 * round + 2, args.prefix)).await?;
            let there = self.moves(&self.prompt(2 * round + 3, args.prefix)).await?;
            if round > 0 {
                stayed.push(here.first);
                moved.push(there.first);
                steps.push(there.step);
            }
        }
        let summary = |samples| {
            Summary::of(samples).ok_or_else(|| Failure::Failed("nothing was measured".to_owned()))
        };
        let of_copies = |value: fn(&Copy) -> f64| summary(copies.iter().map(value).collect());
        let (moved, stayed, decode_step) = (summary(moved)?, summary(stayed)?, summary(steps)?);
        Ok(Report {
            model: model.to_owned(),
            prefix_tokens: args.prefix,
            prefix_bytes: copies.first().map_or(0, |copy| copy.bytes),
            handoff: of_copies(|copy| copy.handoff)?,
            plain_tcp: of_copies(|copy| copy.plain)?,
            throughput_ratio: of_copies(|copy| copy.handoff / copy.plain)?,
            exposed_steps: (moved.median - stayed.median) / decode_step.median,
            moved,
            stayed,
            decode_step,
        })
    }

    /// Tokens that no other round has.
    fn prompt(&self, round: u64, tokens: usize) -> Vec<u32> {
        let mut state = round.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state % self.vocab_size as u64) as u32
        };
        (0..tokens).map(|_| next()).collect()
    }

    /// Prefixes to the other engine, each with a copy over plain TCP behind it.
    async fn copies(&self, args: &HandoffArgs, progress: &mut Steps) -> Result<Vec<Copy>, Failure> {
        // The sender keeps both; at the receiver one drives the other out.
        let exports = [self.export(0, args).await?, self.export(1, args).await?];
        let mut copies = Vec::new();
        for n in 0..COPIES * (args.repetitions + 1) {
            progress.at((n / COPIES).saturating_sub(1) as u64, "throughput");
            let (bytes, handoff) = self.copy(exports[n % 2].clone()).await?;
            let plain = plain_copy(bytes, args.prefix / PAGE).await?;
            copies.push(Copy { bytes, handoff, plain });
        }
        // The first round fills the receiver's pool, and counts for nothing.
        Ok(copies.split_off(COPIES))
    }

    /// The pages of a prompt that was read.
    async fn export(&self, round: u64, args: &HandoffArgs) -> Result<Export, Failure> {
        let prompt = self.prompt(round, args.prefix);
        let generation = self.from.submit(request(&prompt, 1, None)).map_err(failed)?;
        let export = generation.export().await.map_err(failed)?;
        until_over(generation).await?;
        Ok(export)
    }

    /// How many bytes went over, and how many of them a second.
    async fn copy(&self, export: Export) -> Result<(u64, f64), Failure> {
        let format = self.from.kv_format().ok_or_else(|| failed("the KV cannot leave"))?;
        let leases = Leases::new(1);
        let (id, epoch) = name()?;
        let _offer = leases.offer(&id, epoch, export);
        let listener = TcpListener::bind("127.0.0.1:0").await.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?.to_string();
        let serving = tokio::spawn(async move {
            let (stream, _) = listener.accept().await.map_err(failed)?;
            stream.set_nodelay(true).map_err(failed)?;
            serve(stream, &leases, format, Times::default(), |_| {}).await.map_err(failed)
        });
        let import = self.small.import();
        let progress = watch::Sender::new(Progress::default());
        let source = Source { address, request_id: id, epoch };
        let started = Instant::now();
        pull(&Tcp, &source, format, &import, &progress, Times::default()).await.map_err(failed)?;
        let seconds = started.elapsed().as_secs_f64();
        serving.await.map_err(failed)??;
        let bytes = progress.borrow().bytes;
        Ok((bytes, bytes as f64 / seconds))
    }

    /// The switch where the answer stays.
    async fn stays(&self, prompt: &[u32]) -> Result<Switch, Failure> {
        let mut generation = self.begin(prompt, false).await?;
        read(&mut generation).await?;
        let decided = decide(&generation).await?;
        write_on(generation, decided).await
    }

    /// The switch where another engine goes on, which followed the reading.
    async fn moves(&self, prompt: &[u32]) -> Result<Switch, Failure> {
        let (id, epoch) = name()?;
        let source = self.from_kv.source(&id, epoch);
        let prefetch = self.to_kv.prefetch(&id, &source);
        let mut generation = self.begin(prompt, true).await?;
        let offer = self.from_kv.offer(&id, epoch, &generation).await;
        let offer = offer.ok_or_else(|| failed("the KV cannot leave"))?;
        read(&mut generation).await?;
        // Let the receiver catch up, as it does while a drafter drafts.
        settle(&self.to).await;
        let decided = decide(&generation).await?;
        while !matches!(generation.next().await, Some(Event::Read { decision: Some(_), .. })) {}
        drop(generation);
        let leaving = tokio::spawn({
            let kv = Arc::clone(&self.from_kv);
            async move { kv.keep(offer, std::future::pending()).await }
        });
        let known = prompt.len() + DRAFT;
        let hold = self.to_kv.wait(&id, &source, known).await;
        drop(prefetch);
        let answer = draft(prompt);
        let request = Request {
            known: Known { answer, scores: Vec::new() },
            ..request(prompt, DRAFT + WRITTEN, None)
        };
        let generation = self.to.submit(request).map_err(failed)?;
        let switch = write_on(generation, decided).await;
        drop(hold);
        leaving.await.map_err(failed)?;
        switch
    }

    /// Begins to read the prompt and all of the draft; another engine writes on if it `moves_on`.
    async fn begin(&self, prompt: &[u32], moves_on: bool) -> Result<Generation, Failure> {
        let policy = DraftPolicy {
            window: DRAFT + 1,
            threshold: 1.0,
            continue_complete: true,
            continue_empty: false,
            moves_on,
        };
        let request = request(prompt, DRAFT + WRITTEN, Some(policy));
        let generation = self.from.submit(request).map_err(failed)?;
        generation.draft().push(draft(prompt)).await.map_err(failed)?;
        Ok(generation)
    }
}

/// Reads up to the draft's last score.
async fn read(generation: &mut Generation) -> Result<(), Failure> {
    let mut scored = 0;
    while scored < DRAFT {
        match next(generation).await? {
            Event::Read { scores, .. } => scored += scores.len(),
            other => return Err(failed(format!("expected scores, found {other:?}"))),
        }
    }
    Ok(())
}

/// The draft behind a prompt: what it says does not matter.
fn draft(prompt: &[u32]) -> Vec<u32> {
    prompt[..DRAFT].iter().rev().copied().collect()
}

fn request(prompt: &[u32], max_tokens: usize, draft: Option<DraftPolicy>) -> Request {
    Request {
        prompt: prompt.to_vec(),
        max_tokens,
        sampling: Sampling::default(),
        stop_tokens: Arc::from([]),
        top_logprobs: 0,
        draft,
        known: Known::default(),
    }
}

fn name() -> Result<(RequestId, Epoch), Failure> {
    Ok((RequestId::generate(), Epoch::FIRST))
}

/// Ends the draft, which decides it.
async fn decide(generation: &Generation) -> Result<Instant, Failure> {
    let decided = Instant::now();
    generation.draft().end().await.map_err(failed)?;
    Ok(decided)
}

/// In seconds: from the switch to the first token, and a decode step.
struct Switch {
    first: f64,
    step: f64,
}

async fn write_on(mut generation: Generation, decided: Instant) -> Result<Switch, Failure> {
    let mut written = Vec::new();
    while written.len() < WRITTEN {
        if let Event::Wrote { .. } = next(&mut generation).await? {
            written.push(decided.elapsed().as_secs_f64());
        }
    }
    let step = (written[WRITTEN - 1] - written[0]) / (WRITTEN - 1) as f64;
    Ok(Switch { first: written[0], step })
}

async fn next(generation: &mut Generation) -> Result<Event, Failure> {
    let event = tokio::time::timeout(PATIENCE, generation.next()).await.map_err(failed)?;
    match event {
        Some(Event::Failed { message, .. }) => Err(Failure::Failed(message)),
        Some(event) => Ok(event),
        None => Err(failed("the engine has stopped")),
    }
}

async fn until_over(mut generation: Generation) -> Result<(), Failure> {
    while !matches!(next(&mut generation).await?, Event::Finished { .. }) {}
    Ok(())
}

/// Waits until the engine's pages in use have not changed for a while.
async fn settle(engine: &EngineHandle) {
    let mut before = usize::MAX;
    loop {
        tokio::time::sleep(Duration::from_millis(100)).await;
        let now = engine.stats().kv_tokens_used;
        if now == before {
            return;
        }
        before = now;
    }
}

/// Bytes a second of a plain copy of `bytes` over loopback, in `pieces`.
async fn plain_copy(bytes: u64, pieces: usize) -> Result<f64, Failure> {
    let bytes = usize::try_from(bytes).map_err(failed)?;
    let source = vec![1u8; bytes];
    // Written once, so that its memory is there.
    let mut target = vec![2u8; bytes];
    let piece = bytes.div_ceil(pieces.max(1));
    let listener = TcpListener::bind("127.0.0.1:0").await.map_err(failed)?;
    let address = listener.local_addr().map_err(failed)?;
    let sending = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        for piece in source.chunks(piece) {
            stream.write_all(piece).await?;
        }
        // The other side has all of it before this one leaves.
        stream.read_u8().await?;
        Ok::<_, std::io::Error>(())
    });
    let mut stream = TcpStream::connect(address).await.map_err(failed)?;
    let started = Instant::now();
    for piece in target.chunks_mut(piece) {
        stream.read_exact(piece).await.map_err(failed)?;
    }
    let seconds = started.elapsed().as_secs_f64();
    stream.write_u8(0).await.map_err(failed)?;
    sending.await.map_err(failed)?.map_err(failed)?;
    Ok(bytes as f64 / seconds)
}
