//! More than the cluster can do. Real drafters, bases and a router, with engines that only pretend to
//! compute; clients that ask at a fixed rate whether or not they are answered (open loop).
//!
//! `make test` runs the short version, which checks what is answered. `make overload` measures: the
//! goodput at four times the capacity beside the best in the same run, how soon a refusal comes, and
//! whether memory stays flat.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use headstart_base_node::{BaseOptions, KvOptions};
use headstart_cluster::{InMemory, Membership, Tier};
use headstart_drafter_node::DrafterOptions;
use headstart_engine::executor::Limits;
use headstart_engine::executor::fake::{FakeExecutor, FakeOptions};
use headstart_engine::{EngineHandle, EngineOptions};
use headstart_router::{RouterOptions, RunningRouter};
use headstart_service::net::Dialer;
use headstart_service::node::{Lifetimes, RunningNode, random_id};
use headstart_text::ModelText;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;

const SLOTS: usize = 8;
const ANSWER_TOKENS: u32 = 32;
const STEP: Duration = Duration::from_millis(2);
/// Far beyond anything an answer takes here.
const PATIENCE: Duration = Duration::from_secs(120);

/// Two drafters, two bases, a router.
struct Fleet {
    router: RunningRouter,
    engines: Vec<EngineHandle>,
    _nodes: Vec<RunningNode>,
}

impl Fleet {
    async fn start(options: RouterOptions) -> Self {
        let text =
            ModelText::load(&Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/stories260k"))
                .expect("the fixture is whole");
        let membership = InMemory::new();
        let (mut engines, mut nodes) = (Vec::new(), Vec::new());
        for tier in [Tier::Drafter, Tier::Drafter, Tier::Base, Tier::Base] {
            let engine = engine(&text);
            nodes.push(node(tier, &engine, &text, &membership).await);
            engines.push(engine);
        }
        let (http, grpc) = (listener().await, listener().await);
        let membership: Arc<dyn Membership> = Arc::new(membership);
        let shutdown = CancellationToken::new();
        let router = headstart_router::start(options, membership, http, grpc, shutdown)
            .await
            .expect("a router");
        while !router.is_ready() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        Self { router, engines, _nodes: nodes }
    }

    /// Waits until no node holds anything.
    async fn until_idle(&self) {
        let busy = || self.engines.iter().any(|engine| engine.stats().slots_used > 0);
        let idle = async {
            while busy() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(PATIENCE, idle).await.expect("every slot is given back");
    }
}

fn engine(text: &ModelText) -> EngineHandle {
    let limits = Limits {
        vocab_size: text.tokenizer().vocab_size(),
        context_length: 512,
        page_size: 16,
        pages: SLOTS * 512 / 16,
    };
    let fake = FakeOptions {
        limits,
        agreement_percent: 90,
        first_token: 300,
        step_latency: STEP,
        ..FakeOptions::default()
    };
    let options = EngineOptions { slots: SLOTS, ..EngineOptions::default() };
    EngineHandle::start(Box::new(FakeExecutor::new(fake)), options)
}

async fn listener() -> TcpListener {
    TcpListener::bind("127.0.0.1:0").await.expect("a free port")
}

async fn node(
    tier: Tier,
    engine: &EngineHandle,
    text: &ModelText,
    membership: &InMemory,
) -> RunningNode {
    let listener = listener().await;
    let address = listener.local_addr().expect("bound").to_string();
    let (node_id, handoff_timeout) = (random_id(tier), Duration::from_secs(30));
    let (model, dtype) = (tier.to_string(), "f32".to_owned());
    let (lifetimes, dialer) = (Lifetimes::default(), Dialer::default());
    let (engine, stop) = (engine.clone(), CancellationToken::new());
    let started = match tier {
        Tier::Drafter => {
            let options = DrafterOptions {
                node_id,
                address,
                model,
                dtype,
                handoff_timeout,
                lifetimes,
                dialer,
            };
            headstart_drafter_node::start(options, engine, text, membership, listener, stop).await
        }
        Tier::Base => {
            let options =
                BaseOptions { node_id, address, model, dtype, handoff_timeout, lifetimes, dialer };
            {
                let kv = KvOptions::default();
                headstart_base_node::start(kv, options, engine, text, membership, listener, stop)
                    .await
            }
        }
    };
    started.expect("a node")
}

/// What became of one request.
#[derive(Clone, Copy, Debug)]
struct Outcome {
    served: bool,
    took: Duration,
}

/// Asks once: a whole answer, or a refusal that says when to come back.
async fn ask(http: SocketAddr, batch: bool) -> Outcome {
    let priority = if batch { "batch" } else { "interactive" };
    let body = format!(
        r#"{{"model": "base", "max_tokens": {ANSWER_TOKENS}, "seed": 1, "messages": [{{"role": "user", "content": "Once upon a time"}}], "headstart": {{"priority": "{priority}"}}}}"#
    );
    let head = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: t\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    let begun = Instant::now();
    let mut stream = TcpStream::connect(http).await.expect("the door is open");
    stream.write_all((head + &body).as_bytes()).await.expect("it reads");
    let mut reply = String::new();
    let reading = tokio::time::timeout(PATIENCE, stream.read_to_string(&mut reply)).await;
    reading.expect("no request hangs").expect("a whole reply");
    let took = begun.elapsed();
    let tokens = format!("\"completion_tokens\":{ANSWER_TOKENS}");
    let served = reply.starts_with("HTTP/1.1 200") && reply.contains(&tokens);
    let refused =
        reply.starts_with("HTTP/1.1 429") && reply.to_lowercase().contains("retry-after: ");
    assert!(served || refused, "{reply}");
    Outcome { served, took }
}

/// What a phase of load came to.
#[derive(Debug)]
struct Phase {
    name: String,
    asked: usize,
    served: Vec<Duration>,
    refused: Vec<Duration>,
    /// Answers a second.
    goodput: f64,
    rss_mib: f64,
}

impl Phase {
    fn new(name: String, outcomes: &[Outcome], lasted: Duration) -> Self {
        let of = |served: bool| {
            let mut times: Vec<Duration> =
                outcomes.iter().filter(|it| it.served == served).map(|it| it.took).collect();
            times.sort_unstable();
            times
        };
        let (served, refused) = (of(true), of(false));
        let goodput = served.len() as f64 / lasted.as_secs_f64();
        Self { name, asked: outcomes.len(), served, refused, goodput, rss_mib: rss_mib() }
    }

    fn print(&self) {
        let at = |times: &[Duration], percent: usize| {
            let index = (times.len() * percent / 100).min(times.len().saturating_sub(1));
            times.get(index).map_or(0.0, |time| time.as_secs_f64() * 1e3)
        };
        println!(
            "{:<22} {:>6} asked {:>6} served {:>7.1}/s  p50 {:>7.1} ms p99 {:>7.1} ms | {:>6} refused p50 {:>5.1} ms p99 {:>5.1} ms | rss {:>6.1} MiB",
            self.name,
            self.asked,
            self.served.len(),
            self.goodput,
            at(&self.served, 50),
            at(&self.served, 99),
            self.refused.len(),
            at(&self.refused, 50),
            at(&self.refused, 99),
            self.rss_mib,
        );
    }
}

/// Resident memory of this process, clients included.
fn rss_mib() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.and_then(|line| line.split_whitespace().next()?.parse::<f64>().ok()).unwrap_or(0.0)
        / 1024.0
}

/// `clients` who ask again as soon as they were answered.
async fn closed_loop(http: SocketAddr, clients: usize, lasts: Duration) -> Phase {
    let begun = Instant::now();
    let tasks: Vec<_> = (0..clients)
        .map(|_| {
            tokio::spawn(async move {
                let mut outcomes = Vec::new();
                while begun.elapsed() < lasts {
                    outcomes.push(ask(http, false).await);
                }
                outcomes
            })
        })
        .collect();
    let mut outcomes = Vec::new();
    for task in tasks {
        outcomes.extend(task.await.expect("no client failed"));
    }
    Phase::new(format!("{clients} clients"), &outcomes, begun.elapsed())
}

/// Requests at a fixed rate, whether or not they are answered. Goodput counts what was answered
/// until the last one was.
async fn open_loop(http: SocketAddr, per_second: f64, lasts: Duration, name: &str) -> Phase {
    let begun = Instant::now();
    let total = (per_second * lasts.as_secs_f64()) as usize;
    let mut tasks = Vec::with_capacity(total);
    for index in 0..total {
        let at = begun + Duration::from_secs_f64(index as f64 / per_second);
        tokio::time::sleep_until(at.into()).await;
        // Every fourth is batch.
        tasks.push(tokio::spawn(ask(http, index % 4 == 3)));
    }
    let mut outcomes = Vec::with_capacity(total);
    for task in tasks {
        outcomes.push(task.await.expect("no request failed"));
    }
    Phase::new(name.to_owned(), &outcomes, begun.elapsed())
}

fn options() -> RouterOptions {
    RouterOptions { queue_requests_max: 32, ..RouterOptions::default() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_request_is_answered_or_refused_and_every_slot_comes_back() {
    let fleet = Fleet::start(options()).await;
    let http = fleet.router.http_addr();
    // All at once: sixteen run, thirty-two wait, and the rest is refused.
    let tasks: Vec<_> = (0..200).map(|index| tokio::spawn(ask(http, index % 4 == 3))).collect();
    let mut served = 0;
    for task in tasks {
        served += usize::from(task.await.expect("no request failed").served);
    }
    assert!((1..=200).contains(&served), "{served}");
    fleet.until_idle().await;
    assert!(ask(http, true).await.served, "and it goes on");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "measures; run it with make overload"]
async fn goodput_holds_at_four_times_the_capacity() {
    let seconds = std::env::var("OVERLOAD_SECONDS").ok().and_then(|text| text.parse().ok());
    let lasts = Duration::from_secs(seconds.unwrap_or(10));
    let fleet = Fleet::start(options()).await;
    let http = fleet.router.http_addr();
    closed_loop(http, 4, Duration::from_secs(1)).await;
    let mut phases = Vec::new();
    for clients in [2 * SLOTS, 3 * SLOTS] {
        phases.push(closed_loop(http, clients, lasts).await);
    }
    let capacity = phases.iter().map(|phase| phase.goodput).fold(0.0, f64::max);
    for times in [1.0, 2.0, 4.0, 4.0] {
        let name = format!("open loop, {times} x");
        phases.push(open_loop(http, capacity * times, lasts, &name).await);
    }
    for phase in &phases {
        phase.print();
    }
    let best = phases.iter().map(|phase| phase.goodput).fold(0.0, f64::max);
    let last = phases.last().expect("phases");
    println!("goodput at 4 x the capacity: {:.1} % of the best", 100.0 * last.goodput / best);
    fleet.until_idle().await;
}
