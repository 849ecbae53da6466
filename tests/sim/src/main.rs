//! Runs many seeds and says what they break.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use clap::Parser;
use headstart_service::telemetry::LogFormat;
use headstart_sim::client::End;
use headstart_sim::invariants;
use headstart_sim::run::{Run, run};

/// Simulates whole clusters, one a seed, with faults, and checks what must hold in them.
#[derive(Debug, Parser)]
#[command(name = "headstart-sim")]
struct Args {
    /// Worlds to run
    #[arg(long, default_value_t = 1000)]
    seeds: u64,
    /// The first one's seed
    #[arg(long, default_value_t = 0)]
    from: u64,
    /// Worlds at once; one a core unless said otherwise
    #[arg(long)]
    jobs: Option<usize>,
    /// Run this seed only, and print everything that happens in it; with `RUST_LOG` set, what the
    /// processes log as well
    #[arg(long)]
    seed: Option<u64>,
    /// Go on after this many seeds that break something
    #[arg(long, default_value_t = 10)]
    failures_max: usize,
    /// Run until a seed breaks something, and succeed only then
    #[arg(long)]
    expect_failure: bool,
}

/// Sums over all seeds.
#[derive(Debug, Default)]
struct Sums {
    worlds: u64,
    faults: BTreeMap<&'static str, u64>,
    ends: BTreeMap<String, u64>,
    events: u64,
    pages: u64,
    drafts: u64,
    broken: Vec<(u64, &'static str, String)>,
}

impl Sums {
    fn take(&mut self, run: &Run) {
        self.worlds += 1;
        self.events += run.digest.1;
        self.pages += run.seen.pages;
        self.drafts += run.seen.accepted.len() as u64;
        for fault in &run.faults {
            *self.faults.entry(fault.kind.name()).or_default() += 1;
        }
        for outcome in &run.outcomes {
            let end = match &outcome.end {
                End::Whole => "whole".to_owned(),
                End::HungUp => "hung up".to_owned(),
                End::Failed(code, message) if message.contains("is not passed on") => {
                    format!("{code} (not passed on)")
                }
                End::Failed(code, _) => code.to_string(),
                End::Broken(_) => "connection broken".to_owned(),
                End::Vanished | End::Hung => "lost".to_owned(),
            };
            *self.ends.entry(end).or_default() += 1;
        }
        for (name, why) in invariants::broken(run) {
            eprintln!("seed {} breaks {name}: {why}", run.seed);
            self.broken.push((run.seed, name, why));
        }
    }

    fn print(&self, took: Duration) {
        let requests: u64 = self.ends.values().sum();
        println!(
            "{} worlds, {requests} requests, {} events in {:.1} s ({:.1} worlds a second)",
            self.worlds,
            self.events,
            took.as_secs_f64(),
            self.worlds as f64 / took.as_secs_f64().max(1e-9)
        );
        let list = |pairs: Vec<String>| pairs.join(", ");
        println!("faults: {}", list(self.faults.iter().map(|(k, v)| format!("{k} {v}")).collect()));
        println!("requests: {}", list(self.ends.iter().map(|(k, v)| format!("{k} {v}")).collect()));
        println!("on the wire: {} drafts taken, {} KV pages sent", self.drafts, self.pages);
        if self.broken.is_empty() {
            println!("every invariant held");
            return;
        }
        for (name, _) in invariants::ALL {
            let mut seeds: Vec<u64> =
                self.broken.iter().filter(|(_, n, _)| *n == name).map(|(seed, ..)| *seed).collect();
            seeds.sort_unstable();
            if !seeds.is_empty() {
                println!("BROKEN: {name}, by seeds {seeds:?}");
            }
        }
    }
}

fn main() -> ExitCode {
    let args = Args::parse();
    let text = headstart_sim::fixture();
    if let Some(seed) = args.seed {
        if std::env::var_os("RUST_LOG").is_some() {
            headstart_service::telemetry::init(LogFormat::Text);
        }
        let run = run(seed, &text, true);
        run.lines.iter().for_each(|line| println!("{line}"));
        println!("{:#?}\n{:#?}", run.plan.bases, run.faults);
        println!("hash {:016x} of {} events", run.digest.0, run.digest.1);
        let mut sums = Sums::default();
        sums.take(&run);
        return code(sums.broken.is_empty());
    }
    let began = Instant::now();
    let (next, enough) = (AtomicU64::new(args.from), AtomicBool::new(false));
    let sums = Mutex::new(Sums::default());
    let cores = thread::available_parallelism().map_or(1, usize::from);
    thread::scope(|scope| {
        for _ in 0..args.jobs.unwrap_or(cores).max(1) {
            scope.spawn(|| {
                while !enough.load(Ordering::Relaxed) {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed - args.from >= args.seeds {
                        return;
                    }
                    let run = run(seed, &text, false);
                    let mut sums = sums.lock().expect("no thread panics with the lock");
                    sums.take(&run);
                    let limit = if args.expect_failure { 1 } else { args.failures_max };
                    enough.fetch_or(sums.broken.len() >= limit, Ordering::Relaxed);
                }
            });
        }
    });
    let sums = sums.into_inner().expect("no thread panics with the lock");
    sums.print(began.elapsed());
    code(sums.broken.is_empty() != args.expect_failure)
}

fn code(good: bool) -> ExitCode {
    if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
