//! `chaos`: a real cluster under load while its parts are killed, paused, drained, parted and
//! slowed down. Every answer must be the undisturbed one. Exits with 0 only then.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use clap::{Parser, ValueEnum};
use headstart_cluster::{Etcd, Membership};
use headstart_tests::chaos::counters::Counters;
use headstart_tests::chaos::faults::{Faults, restart, supervise};
use headstart_tests::chaos::fleet::{Fleet, Kind, Part, Shape};
use headstart_tests::chaos::load::{Known, Load, undisturbed};
use headstart_tests::chaos::report::Report;
use headstart_tests::chaos::{network, requests};
use tokio::time::{sleep, timeout};

/// How long slots, pages and requests may take to be given back once nobody asks.
const QUIET_WITHIN: Duration = Duration::from_secs(60);
/// How long a node may take to be registered again.
const BACK_WITHIN: Duration = Duration::from_secs(60);
/// How long etcd stays away in its scenario.
const ETCD_AWAY: Duration = Duration::from_secs(60);
/// Load before and after a scenario.
const AROUND: Duration = Duration::from_secs(5);

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Scenario {
    /// Faults of every kind, drawn from the seed
    Chaos,
    /// Nothing happens
    Calm,
    /// etcd is down for a minute
    EtcdDown,
    /// etcd is killed and comes back empty
    EtcdEmpty,
    /// Every process is drained and started again, one after the other
    Rolling,
}

/// A real cluster under load, disturbed; every answer is compared with the undisturbed one
#[derive(Debug, Parser)]
struct Options {
    /// How long faults strike
    #[arg(long, default_value_t = 3.0)]
    minutes: f64,
    /// What happens
    #[arg(long, value_enum, default_value_t = Scenario::Chaos)]
    scenario: Scenario,
    /// The model of both tiers, a GGUF file or a Hugging Face folder
    #[arg(long)]
    model: PathBuf,
    /// What faults and requests are drawn from
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Seconds between two faults
    #[arg(long, default_value_t = 4.0)]
    every: f64,
    /// Streams at once
    #[arg(long, default_value_t = 6)]
    clients: usize,
    /// Distinct requests, at most
    #[arg(long, default_value_t = 1000)]
    asks: usize,
    #[arg(long, default_value_t = 2)]
    routers: usize,
    #[arg(long, default_value_t = 3)]
    drafters: usize,
    #[arg(long, default_value_t = 3)]
    bases: usize,
    /// The last two bases split their roles: one scores, one decodes
    #[arg(long)]
    split: bool,
    /// How drafts travel: auto, ids or text
    #[arg(long, default_value = "auto")]
    encoding: String,
    /// Where logs and failed streams go [default: a folder of its own in chaos-runs beside the binary]
    #[arg(long)]
    folder: Option<PathBuf>,
}

fn main() -> ExitCode {
    let options = Options::parse();
    if let Some(code) = network::enter() {
        return code;
    }
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => return failed(&error.to_string()),
    };
    runtime.block_on(async {
        tokio::select! {
            result = run(options) => match result {
                Ok(true) => ExitCode::SUCCESS,
                Ok(false) => ExitCode::FAILURE,
                Err(error) => failed(&error),
            },
            _ = tokio::signal::ctrl_c() => failed("interrupted"),
        }
    })
}

fn failed(what: &str) -> ExitCode {
    eprintln!("chaos: {what}");
    ExitCode::FAILURE
}

async fn run(options: Options) -> Result<bool, String> {
    let run = Run::start(options).await?;
    let calm = run.calm("calm", run.calm_for()).await?;
    println!("\ncalm:\n{}", calm.summary(&calm));
    let mut passed = calm.passed(false);
    if run.options.scenario != Scenario::Calm {
        passed &= run.disturbed(&calm).await?;
        // What was broken is whole again.
        let healed = run.calm("healed", AROUND).await?;
        println!("\nhealed:\n{}", healed.summary(&calm));
        passed &= healed.passed(false);
    }
    let fleet = Arc::into_inner(run.fleet).ok_or("a client outlived the run")?;
    for unclean in fleet.stop().await {
        println!("unclean exit: {unclean}");
        passed = false;
    }
    println!("{}", if passed { "PASSED" } else { "FAILED" });
    Ok(passed)
}

/// A run that has started.
struct Run {
    options: Options,
    folder: PathBuf,
    fleet: Arc<Fleet>,
    known: Arc<Vec<Known>>,
    /// How long the undisturbed answers took.
    took: Duration,
}

impl Run {
    /// Starts the cluster and asks everything once.
    async fn start(options: Options) -> Result<Self, String> {
        let program = std::env::current_exe().map_err(text)?;
        let binaries = program.parent().ok_or("the binary lies nowhere")?.to_owned();
        let folder = options.folder.clone().unwrap_or_else(|| {
            let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
            binaries.join("chaos-runs").join(since.unwrap_or_default().as_secs().to_string())
        });
        std::fs::create_dir_all(&folder).map_err(text)?;
        println!("chaos: {options:?}\nlogs: {}", folder.display());
        let shape = Shape {
            model: options.model.clone(),
            routers: options.routers,
            drafters: options.drafters,
            bases: options.bases,
            split: options.split,
            encoding: options.encoding.clone(),
            binaries,
            folder: folder.clone(),
        };
        let fleet = Arc::new(Fleet::start(&shape).await.map_err(text)?);
        let mut asks = requests::all();
        asks.truncate(options.asks);
        let started = Instant::now();
        let known = Arc::new(undisturbed(&fleet, asks, options.clients).await?);
        let took = started.elapsed();
        println!("undisturbed: {} distinct requests in {took:.0?}", known.len());
        Ok(Self { options, folder, fleet, known, took })
    }

    /// Long enough to ask everything about twice.
    fn calm_for(&self) -> Duration {
        match self.options.scenario {
            Scenario::Calm => self.minutes(),
            _ => self.took.max(AROUND),
        }
    }

    fn minutes(&self) -> Duration {
        Duration::from_secs_f64(self.options.minutes * 60.0)
    }

    fn load(&self, report: &Arc<Report>, seed: u64) -> Load {
        Load::start(&self.fleet, &self.known, report, self.options.clients, seed)
    }

    /// Load without faults.
    async fn calm(&self, name: &str, time: Duration) -> Result<Arc<Report>, String> {
        let report = Arc::new(Report::new(&self.folder, name).map_err(text)?);
        let load = self.load(&report, self.options.seed);
        sleep(time).await;
        load.stop().await;
        quiet(&self.fleet, &report).await;
        Ok(report)
    }

    /// Load with what the scenario does.
    async fn disturbed(&self, calm: &Report) -> Result<bool, String> {
        let Self { options, fleet, .. } = self;
        let report = Arc::new(Report::new(&self.folder, "faults").map_err(text)?);
        let load = self.load(&report, !options.seed);
        let counters = Arc::new(Mutex::new(Counters::default()));
        let helpers = [
            tokio::spawn(supervise(Arc::clone(fleet), Arc::clone(&report))),
            tokio::spawn(Counters::follow(Arc::clone(fleet), Arc::clone(&counters))),
        ];
        disturb(options, fleet, &report, self.minutes()).await?;
        load.stop().await;
        quiet(fleet, &report).await;
        registered(fleet, &report).await?;
        for helper in helpers {
            helper.abort();
            let _ = helper.await;
        }
        println!("\n{:?}:\n{}", options.scenario, report.summary(calm));
        println!("{}", counters.lock().map(|it| it.summary()).unwrap_or_default());
        Ok(report.passed(options.scenario == Scenario::Chaos))
    }
}

fn text(error: std::io::Error) -> String {
    error.to_string()
}

async fn disturb(
    options: &Options,
    fleet: &Arc<Fleet>,
    report: &Arc<Report>,
    minutes: Duration,
) -> Result<(), String> {
    sleep(AROUND).await;
    let etcd = fleet.etcd();
    match options.scenario {
        Scenario::Calm => {}
        Scenario::Chaos => {
            let mut faults = Faults::new(Arc::clone(fleet), Arc::clone(report), options.seed);
            let every = Duration::from_secs_f64(options.every);
            faults.run(every, Instant::now() + minutes).await;
        }
        Scenario::EtcdDown | Scenario::EtcdEmpty => {
            let event = report.fault("etcd down", &format!("for {ETCD_AWAY:?}"));
            etcd.kill().await;
            if options.scenario == Scenario::EtcdEmpty {
                etcd.wipe().map_err(text)?;
            }
            sleep(ETCD_AWAY).await;
            let back = Instant::now();
            restart(etcd, report).await.map_err(text)?;
            registered(fleet, report).await?;
            println!("every node registered {:.1?} after etcd's start", back.elapsed());
            report.fault_over(event, None);
        }
        Scenario::Rolling => {
            for part in fleet.parts.iter().filter(|part| part.kind != Kind::Etcd) {
                roll(part, fleet, report).await?;
            }
        }
    }
    sleep(AROUND).await;
    Ok(())
}

/// Drains one part, starts it again and waits until all know it.
async fn roll(part: &Part, fleet: &Fleet, report: &Report) -> Result<(), String> {
    let event = report.fault("rolled", &part.name);
    let drained = part.drain(false).await;
    restart(part, report).await.map_err(|error| error.to_string())?;
    registered(fleet, report).await?;
    report.fault_over(event, drained.err().map(|error| error.to_string()));
    Ok(())
}

/// Every process answers, and holds nothing.
async fn quiet(fleet: &Fleet, report: &Report) {
    if let Err(error) = fleet.ready().await {
        report.problem(error.to_string());
    }
    for leak in fleet.leaks(QUIET_WITHIN).await {
        report.problem(format!("leak: {leak}"));
    }
}

/// Every node is registered, and none is draining.
async fn registered(fleet: &Fleet, report: &Report) -> Result<(), String> {
    let endpoint = [fleet.etcd().address.to_string()];
    let etcd = Etcd::connect(&endpoint, "default", BACK_WITHIN).await;
    let etcd = etcd.map_err(|error| error.to_string())?;
    let mut view = etcd.watch();
    let nodes: Vec<&str> = fleet
        .parts
        .iter()
        .filter(|part| matches!(part.kind, Kind::Drafter | Kind::Base))
        .map(|part| part.name.as_str())
        .collect();
    let all = view.wait_for(|view| {
        nodes.iter().all(|&name| {
            view.nodes.values().any(|node| node.node_id.as_str() == name && !node.draining)
        })
    });
    if timeout(BACK_WITHIN, all).await.is_err() {
        report.problem(format!("not every node is registered within {BACK_WITHIN:?}"));
    }
    Ok(())
}
