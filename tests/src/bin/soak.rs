//! `soak`: steady load on a real cluster, with every process's memory, slots and pages sampled once
//! a second. Prints where they began, ended and peaked, and draws them. Fails on what is still held
//! when nobody asks any more, and on a wrong answer; never on a figure of time or memory.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use clap::Parser;
use headstart_tests::chaos::fleet::{Fleet, Shape};
use headstart_tests::chaos::load::{Load, undisturbed};
use headstart_tests::chaos::plot::{Curve, page};
use headstart_tests::chaos::report::Report;
use headstart_tests::chaos::requests;
use tokio::time::sleep;

/// How long slots, pages and requests may take to be given back once nobody asks.
const QUIET_WITHIN: Duration = Duration::from_secs(30);
const SAMPLE_INTERVAL: Duration = Duration::from_secs(1);
/// Each curve keeps at most so many points; then every second one is dropped.
const POINTS_MAX: usize = 4096;

/// Steady load on a real cluster, with its memory, slots and pages sampled
#[derive(Debug, Parser)]
struct Options {
    /// How long
    #[arg(long, default_value_t = 5.0)]
    minutes: f64,
    /// The model of both tiers, a GGUF file or a Hugging Face folder
    #[arg(long)]
    model: PathBuf,
    /// Streams at once
    #[arg(long, default_value_t = 6)]
    clients: usize,
    /// Distinct requests, at most
    #[arg(long, default_value_t = 36)]
    asks: usize,
    #[arg(long, default_value_t = 1)]
    routers: usize,
    #[arg(long, default_value_t = 1)]
    drafters: usize,
    #[arg(long, default_value_t = 1)]
    bases: usize,
    /// Where logs and the plot go
    #[arg(long, default_value = "target/soak")]
    folder: PathBuf,
}

fn main() -> ExitCode {
    let options = Options::parse();
    let runtime = tokio::runtime::Runtime::new().map_err(|error| error.to_string());
    let run = runtime.and_then(|runtime| {
        runtime.block_on(async {
            tokio::select! {
                result = run(options) => result,
                _ = tokio::signal::ctrl_c() => Err("interrupted".to_owned()),
            }
        })
    });
    match run {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("soak: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn run(options: Options) -> Result<bool, String> {
    let text = |error: std::io::Error| error.to_string();
    std::fs::create_dir_all(&options.folder).map_err(text)?;
    let folder = options.folder.canonicalize().map_err(text)?;
    let program = std::env::current_exe().map_err(text)?;
    let shape = Shape {
        model: options.model.clone(),
        routers: options.routers,
        drafters: options.drafters,
        bases: options.bases,
        split: false,
        encoding: "auto".into(),
        binaries: program.parent().ok_or("the binary lies nowhere")?.to_owned(),
        folder: folder.clone(),
    };
    let fleet = Arc::new(Fleet::start(&shape).await.map_err(text)?);
    let mut asks = requests::all();
    asks.truncate(options.asks);
    let known = Arc::new(undisturbed(&fleet, asks, options.clients).await?);
    let report = Arc::new(Report::new(&folder, "soak").map_err(text)?);

    let stop = Arc::new(AtomicBool::new(false));
    let sampling = tokio::spawn(sample(Arc::clone(&fleet), Arc::clone(&stop)));
    let load = Load::start(&fleet, &known, &report, options.clients, 1);
    sleep(Duration::from_secs_f64(options.minutes * 60.0)).await;
    load.stop().await;
    stop.store(true, Ordering::Relaxed);
    let curves = sampling.await.map_err(|error| error.to_string())?;
    for leak in fleet.leaks(QUIET_WITHIN).await {
        report.problem(format!("leak: {leak}"));
    }
    println!("{}", report.summary(&report));
    println!("{:<28} {:>10} {:>10} {:>10}  per hour", "", "first", "last", "peak");
    for curve in &curves {
        println!("{}", curve.row());
    }
    let plot = folder.join("soak.html");
    std::fs::write(&plot, page("Headstart under steady load", &curves)).map_err(text)?;
    println!("plot: {}", plot.display());
    let mut passed = report.passed(false);
    let fleet = Arc::into_inner(fleet).ok_or("a client outlived the run")?;
    for unclean in fleet.stop().await {
        println!("unclean exit: {unclean}");
        passed = false;
    }
    println!("{}", if passed { "PASSED" } else { "FAILED" });
    Ok(passed)
}

/// Samples every part until `stop`.
async fn sample(fleet: Arc<Fleet>, stop: Arc<AtomicBool>) -> Vec<Curve> {
    let started = Instant::now();
    let mut curves: Vec<Curve> = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        let at = started.elapsed();
        let mut push = |name: String, unit: &'static str, value: f64| match curves
            .iter_mut()
            .find(|curve| curve.name == name)
        {
            Some(curve) => curve.push(at, value, POINTS_MAX),
            None => curves.push(Curve::new(name, unit, at, value)),
        };
        for part in &fleet.parts {
            if let Some(bytes) = part.resident_bytes().await {
                push(format!("{} resident", part.name), "MiB", bytes as f64 / f64::from(1 << 20));
            }
            for (what, value) in part.gauges().await {
                push(format!("{} {what}", part.name), "", value);
            }
        }
        sleep(SAMPLE_INTERVAL).await;
    }
    curves
}
