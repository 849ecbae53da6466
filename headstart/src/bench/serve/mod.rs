//! `headstart bench serve`: a served model under load, as its clients see it.

mod counters;
mod html;
mod load;
mod local;
mod prompts;
mod report;
mod sample;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use clap::{Args, ValueEnum};
use headstart_engine::model::WeightDtype;
use headstart_service::config::duration;
use serde::Deserialize;

use self::counters::Counters;
use self::load::{Arrival, Asking, Until};
use self::local::Local;
use self::prompts::Prompts;
use self::report::{Digest, Report};
use self::sample::Sample;
use crate::bench::client::Client;
use crate::bench::engine::{at_least_one, check_writable, write_json};
use crate::bench::steps::Steps;
use crate::failure::Failure;
use crate::models::Spec;

const LIST_TIMEOUT: Duration = Duration::from_secs(10);
/// Two servers are measured in turn, so many times.
const TURNS: usize = 5;

/// Load a served model: time to first token, between tokens, switches, tokens a second.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  headstart bench serve --url 127.0.0.1:8080 --concurrency 16 --requests 200
  headstart bench serve --rate 4 --duration 60s --html report.html --json report.json
  headstart bench serve --drafter smollm2 --base qwen2.5-coder --concurrency 1 --requests 20
  headstart bench serve --drafter smollm2 --base qwen2.5-coder --against drafter-alone \\
      --concurrency 1 --requests 40 --context-words 300

With --drafter and --base a cluster is started for the run. --against drafter-alone asks the same
of the drafter's model behind a router of its own, in turn. What the figures mean:
docs/performance.md.")]
pub struct ServeArgs {
    /// A server that runs, host:port or http://host:port [default: 127.0.0.1:8080]
    #[arg(long, value_name = "URL", conflicts_with = "drafter")]
    url: Option<String>,
    /// Start a cluster with this drafter
    #[arg(long, value_name = "SPEC", requires = "base")]
    drafter: Option<Spec>,
    /// Start a cluster with this base
    #[arg(long, value_name = "SPEC", requires = "drafter")]
    base: Option<Spec>,
    /// How a cluster that is started keeps its weights: auto, f32 or bf16
    #[arg(long, value_name = "DTYPE", default_value_t = WeightDtype::Auto)]
    dtype: WeightDtype,
    /// Threads of each node of a cluster that is started [default: all cores]
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    threads: Option<usize>,
    /// Ask the same of something else, in turn
    #[arg(long, value_enum, value_name = "WHAT", requires = "drafter")]
    against: Option<Against>,
    /// The model's name [default: the first that the server lists]
    #[arg(long, value_name = "NAME")]
    model: Option<String>,
    /// Requests at once
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = at_least_one,
        conflicts_with = "rate")]
    concurrency: usize,
    /// Requests a second, at random times (a Poisson process)
    #[arg(long, value_name = "R", value_parser = above_zero)]
    rate: Option<f64>,
    /// Requests of the run
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = requests,
        conflicts_with = "duration")]
    requests: usize,
    /// How long requests are sent
    #[arg(long, value_name = "TIME", value_parser = duration)]
    duration: Option<Duration>,
    /// What is asked: a line each, or JSON lines with "prompt" or "messages" [default: our own]
    #[arg(long, value_name = "FILE")]
    prompts: Option<PathBuf>,
    /// So many words of prose before each question, other ones each time
    #[arg(long, value_name = "N", default_value_t = 0)]
    context_words: usize,
    /// The longest answer, in tokens
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = at_least_one)]
    max_tokens: usize,
    /// 0 always takes the likeliest token
    #[arg(long, value_name = "T", default_value_t = 0.0)]
    temperature: f32,
    /// A request may take so long
    #[arg(long, value_name = "TIME", value_parser = duration, default_value = "10m")]
    timeout: Duration,
    /// Seed of the random times
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Write everything that was measured to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write a report with plots to this file
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
}

/// Something else to ask.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Against {
    /// The drafter's model, with its chat template, behind a router of its own
    DrafterAlone,
}

impl ServeArgs {
    fn arrival(&self) -> Arrival {
        self.rate
            .map_or(Arrival::Concurrency(self.concurrency), |rate| Arrival::Rate(rate, self.seed))
    }

    fn until(&self) -> Until {
        self.duration.map_or(Until::Requests(self.requests), Until::Time)
    }

    fn load(&self) -> String {
        let sent = match self.rate {
            Some(rate) => format!("{rate} requests/s"),
            None => format!("{} at once", self.concurrency),
        };
        match self.context_words {
            0 => format!("{sent}, up to {} tokens", self.max_tokens),
            words => format!("{sent}, up to {} tokens after {words} words", self.max_tokens),
        }
    }

    fn prompts(&self) -> Result<Prompts, Failure> {
        match &self.prompts {
            Some(path) => Prompts::read(path, self.context_words),
            None => Ok(Prompts::own(self.context_words)),
        }
    }
}

/// Runs the command.
///
/// # Errors
/// When the server cannot be reached or a cluster cannot be started, or a report cannot be written;
/// the latter is found out before anything is measured. Requests that fail are counted.
pub async fn run(args: ServeArgs) -> Result<(), Failure> {
    for path in args.json.iter().chain(&args.html) {
        check_writable(path)?;
    }
    let report = tokio::select! {
        report = measure(&args) => report?,
        _ = tokio::signal::ctrl_c() => {
            return Err(Failure::Interrupted("the benchmark was interrupted".to_owned()));
        }
    };
    anstream::print!("{}", report.table());
    if let Some(path) = &args.html {
        std::fs::write(path, html::page(&report)).map_err(|error| {
            Failure::Failed(format!("cannot write {}: {error}", path.display()))
        })?;
    }
    args.json.map_or(Ok(()), |path| write_json(&path, &report))
}

async fn measure(args: &ServeArgs) -> Result<Report, Failure> {
    let prompts = args.prompts()?;
    let local = Local::start(args).await?;
    let address = match &local {
        Some(local) => local.address(),
        None => authority(args.url.as_deref().unwrap_or("127.0.0.1:8080"))?,
    };
    let server = Server::new(args, address, args.model.clone(), &prompts).await?;
    let alone = match local.as_ref().and_then(Local::alone) {
        Some(address) => Some(Server::new(args, address, None, &prompts).await?),
        None => None,
    };
    let before = Counters::scrape(&server.asking.address).await;
    let outcome = server.measure(args, alone.as_ref()).await;
    let after = match &before {
        Some(_) => Counters::scrape(&server.asking.address).await,
        None => None,
    };
    let counted = before.zip(after);
    let report = Report {
        version: env!("CARGO_PKG_VERSION"),
        target: local.as_ref().map_or(server.asking.address.clone(), Local::name),
        model: server.asking.model.clone(),
        load: args.load(),
        seconds: outcome.seconds,
        summary: Digest::of(&outcome.samples, outcome.seconds),
        // Its base is the drafter's model, whose counters are in the same registry: only what is
        // measured without it can be told apart.
        computed: counted
            .as_ref()
            .filter(|_| alone.is_none())
            .map(|(before, after)| before.until(after, &outcome.samples)),
        handoff: counted.as_ref().and_then(|(before, after)| before.handoff_median(after)),
        alone: alone.map(|_| Digest::of(&outcome.alone, outcome.alone_seconds)),
        samples: outcome.samples,
    };
    if let Some(local) = local {
        local.stop().await?;
    }
    Ok(report)
}

/// A server, and what it is asked.
struct Server {
    asking: Arc<Asking>,
}

/// What became of a run.
#[derive(Default)]
struct Outcome {
    samples: Vec<Sample>,
    seconds: f64,
    alone: Vec<Sample>,
    alone_seconds: f64,
}

impl Server {
    async fn new(
        args: &ServeArgs,
        address: String,
        model: Option<String>,
        prompts: &Prompts,
    ) -> Result<Self, Failure> {
        let model = match model {
            Some(model) => model,
            None => first_model(&address).await?,
        };
        let asking = Asking {
            address,
            model,
            prompts: prompts.clone(),
            max_tokens: u32::try_from(args.max_tokens).unwrap_or(u32::MAX),
            temperature: args.temperature,
            timeout: args.timeout,
            done: AtomicUsize::new(0),
        };
        Ok(Self { asking: Arc::new(asking) })
    }

    /// Runs it all; with another server, both in turn.
    async fn measure(&self, args: &ServeArgs, alone: Option<&Self>) -> Outcome {
        let (arrival, until) = (args.arrival(), args.until());
        let total = match until {
            Until::Requests(count) => count * if alone.is_some() { 2 } else { 1 },
            Until::Time(_) => 0,
        };
        let mut steps = Steps::start("requests", total as u64);
        let mut outcome = Outcome::default();
        let mut show = |done: usize| steps.set(done as u64, total as u64, "");
        let Some(alone) = alone else {
            let (samples, time) = load::run(&self.asking, arrival, until, 0, &mut show).await;
            return Outcome { samples, seconds: time.as_secs_f64(), ..outcome };
        };
        // Neither is the first to be asked anything.
        for server in [self, alone] {
            load::run(
                &server.asking,
                Arrival::Concurrency(1),
                Until::Requests(1),
                1 << 20,
                &mut |_| (),
            )
            .await;
        }
        for turn in 0..TURNS {
            let until = match until {
                Until::Requests(count) => Until::Requests(count.div_ceil(TURNS)),
                Until::Time(time) => Until::Time(time / TURNS as u32),
            };
            let first = outcome.samples.len();
            let done = first + outcome.alone.len();
            let mut show = |more| show(done + more);
            let (samples, time) = load::run(&self.asking, arrival, until, first, &mut show).await;
            let (others, other_time) =
                load::run(&alone.asking, arrival, until, first, &mut show).await;
            tracing::debug!(turn, "both were measured");
            outcome.seconds += time.as_secs_f64();
            outcome.alone_seconds += other_time.as_secs_f64();
            outcome.samples.extend(samples);
            outcome.alone.extend(others);
        }
        outcome
    }
}

/// The first model that the server at `address` lists.
async fn first_model(address: &str) -> Result<String, Failure> {
    #[derive(Deserialize)]
    struct Models {
        data: Vec<Model>,
    }
    #[derive(Deserialize)]
    struct Model {
        id: String,
    }
    let failed = |reason: String| Failure::Failed(format!("http://{address}/v1/models: {reason}"));
    let listed = Client::new(address).get("/v1/models", LIST_TIMEOUT).await;
    let listed = listed.map_err(|error| failed(error.to_string()))?;
    let models: Models =
        serde_json::from_slice(&listed).map_err(|error| failed(error.to_string()))?;
    let first = models.data.into_iter().next().map(|model| model.id);
    first.ok_or_else(|| failed("it lists no model; --model names one".to_owned()))
}

/// `host:port` of a URL. Only plain HTTP is spoken, and only to its root.
fn authority(url: &str) -> Result<String, Failure> {
    let wrong = |what: &str| Failure::Usage(format!("--url: {what}, found {url:?}"));
    if url.starts_with("https://") {
        return Err(wrong("only http:// is spoken"));
    }
    let rest = url.strip_prefix("http://").unwrap_or(url);
    let rest = rest.trim_end_matches('/').trim_end_matches("/v1");
    match rest.rsplit_once(':') {
        Some((host, port)) if !host.is_empty() && port.parse::<u16>().is_ok() => {
            Ok(rest.to_owned())
        }
        _ => Err(wrong("expected host:port")),
    }
}

fn above_zero(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(number) if number.is_finite() && number > 0.0 => Ok(number),
        _ => Err("expected a number above 0".to_owned()),
    }
}

fn requests(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(number) if (1..=1_000_000).contains(&number) => Ok(number),
        _ => Err("expected an integer from 1 to 1000000".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser, Debug)]
    struct Command {
        #[command(flatten)]
        args: ServeArgs,
    }

    fn parsed(flags: &[&str]) -> Result<ServeArgs, String> {
        let args = std::iter::once(&"bench").chain(flags);
        Command::try_parse_from(args).map(|it| it.args).map_err(|error| error.to_string())
    }

    #[test]
    fn loads_as_a_table() {
        let args = parsed(&[]).unwrap();
        assert_eq!((args.arrival(), args.until()), (Arrival::Concurrency(8), Until::Requests(64)));
        let args = parsed(&["--rate=2.5", "--duration=30s", "--seed=9"]).unwrap();
        let until = Until::Time(Duration::from_secs(30));
        assert_eq!((args.arrival(), args.until()), (Arrival::Rate(2.5, 9), until));
        for (flags, expected) in [
            (&["--rate=0"][..], "above 0"),
            (&["--rate=1", "--concurrency=2"], "cannot be used with"),
            (&["--requests=0"], "1 to 1000000"),
            (&["--drafter=smollm2"], "--base"),
            (&["--against=drafter-alone"], "--drafter"),
            (&["--url=a:1", "--drafter=smollm2", "--base=smollm2"], "cannot be used with"),
        ] {
            let message = parsed(flags).unwrap_err();
            assert!(message.contains(expected), "{flags:?}: {message}");
        }
    }

    #[test]
    fn urls_as_a_table() {
        for (url, expected) in [
            ("127.0.0.1:8080", Some("127.0.0.1:8080")),
            ("http://node:80/v1/", Some("node:80")),
            ("http://[::1]:8080", Some("[::1]:8080")),
            ("https://node:443", None),
            ("node", None),
            ("http://node:port", None),
        ] {
            assert_eq!(authority(url).ok().as_deref(), expected, "{url}");
        }
    }
}
