//! `headstart bench router`: the router alone, over nodes that answer at once, beside other routers
//! over a worker that answers at once.

mod load;
mod nodes;
mod peers;
mod report;
mod stub;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use clap::Args;
use headstart_cluster::Membership;
use headstart_proto::v1;
use headstart_router::{RouterOptions, RunningRouter};
use headstart_text::{Message, ModelText, Role};
use serde_json::json;
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio_util::sync::CancellationToken;

use self::load::NodeCalls;
use self::nodes::FakeNodes;
use self::peers::{Peer, Peers, RunningPeer};
use self::report::{Report, Round, Side};
use crate::bench::engine::{at_least_one, check_writable, write_json};
use crate::bench::stats::median;
use crate::bench::steps::Steps;
use crate::failure::Failure;
use crate::models::cache::Check;
use crate::models::command::fetch_all;
use crate::models::{Cancel, Spec};

/// The model's name in every request.
const MODEL: &str = "bench";
const PATH: &str = "/v1/chat/completions";
const QUESTION: &str = "What is the capital of France, and what is it known for?";
/// What the fakes answer, over and over.
const ANSWER: &str = " The capital of France is Paris, a city on the Seine that is known for its \
    museums, its bridges, its bread and the tower that an engineer built for a world's fair.";
/// Tokens of an answer that does not stream.
const UNARY_TOKENS: usize = 16;
/// Tokens that the fake drafter is said to have written.
const DRAFTED: u32 = 6;
/// The router must know both nodes within this time.
const READY_WITHIN: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(5);
/// Of the time of a round's streams, the unary requests of a side take this part, and again as much
/// without its router.
const UNARY_PART: f64 = 0.25;

/// Measure the router alone: requests a second, and the time that it adds.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  headstart bench router
  headstart bench router --against vllm-router,sglang-router --json router.json

The real router over loopback, in front of a drafter and a base that answer at once, one frame a
token. Others run over a stub OpenAI worker that answers at once, one event a token. Each has
threads of its own; the load has others. docs/performance.md says what the figures mean.")]
pub struct RouterArgs {
    /// Whose tokenizer and templates the nodes have
    #[arg(long, value_name = "SPEC", default_value = "smollm2")]
    model: Spec,
    /// Measure these routers too, in turn with ours; installed on their first use
    #[arg(long, value_enum, value_name = "ROUTER,…", value_delimiter = ',')]
    against: Vec<Peer>,
    /// Streams at once
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = at_least_one)]
    concurrency: usize,
    /// Tokens of a stream
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = at_least_one)]
    tokens: usize,
    /// Rounds; each measures every router once
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = at_least_one)]
    repetitions: usize,
    /// How long a router's streams run in a round, in milliseconds
    #[arg(long, value_name = "MS", default_value_t = 2000)]
    round_ms: u64,
    /// Threads of our router that carry HTTP requests; 0: its runtime does [default: as
    /// headstart-router has]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(..=256))]
    http_threads: Option<u32>,
    /// Write everything that was measured to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Runs the command.
///
/// # Errors
/// When the model's text or another router cannot be had, or a call fails.
pub async fn run(args: RouterArgs) -> Result<(), Failure> {
    if let Some(path) = &args.json {
        check_writable(path)?;
    }
    let local = fetch_all(vec![args.model.clone()], Check::Size).await?.pop();
    let local = local.ok_or_else(|| Failure::Failed("fetching brought no model".to_owned()))?;
    let text = ModelText::load(&local.path).map_err(failed)?;
    let cancel = Cancel::default();
    let report = tokio::select! {
        report = measure(&args, &text, &cancel) => report?,
        _ = tokio::signal::ctrl_c() => {
            cancel.cancel();
            return Err(Failure::Interrupted("the benchmark was interrupted".to_owned()));
        }
    };
    anstream::print!("{}", report.table());
    args.json.map_or(Ok(()), |path| write_json(&path, &report))
}

/// Everything that runs beside the load.
struct Field {
    router: Apart<RunningRouter>,
    nodes: Apart<FakeNodes>,
    stub: Apart<String>,
    peers: Vec<(Peer, RunningPeer)>,
    calls: NodeCalls,
    work: Work,
}

/// What is asked, and what must be answered.
struct Work {
    streamed: Bytes,
    unary: Bytes,
    expected: String,
}

/// Something that runs on threads of its own, as it would in a process of its own.
struct Apart<T> {
    value: T,
    runtime: Option<Runtime>,
}

impl<T: Send + 'static> Apart<T> {
    async fn start(
        start: impl Future<Output = Result<T, Failure>> + Send + 'static,
    ) -> Result<Self, Failure> {
        let runtime = Runtime::new().map_err(failed)?;
        let started = runtime.spawn(start).await;
        match started.map_err(failed).and_then(|started| started) {
            Ok(value) => Ok(Self { value, runtime: Some(runtime) }),
            Err(error) => {
                runtime.shutdown_background();
                Err(error)
            }
        }
    }
}

impl<T> Drop for Apart<T> {
    fn drop(&mut self) {
        // A runtime that is dropped waits for its threads, which async code must not.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

async fn measure(args: &RouterArgs, text: &ModelText, cancel: &Cancel) -> Result<Report, Failure> {
    let mut against = args.against.clone();
    against.sort_unstable();
    against.dedup();
    let field = Field::start(args, &against, text, cancel).await?;
    let mut steps = Steps::start("measuring routers", args.repetitions as u64);
    let time = Duration::from_millis(args.round_ms);
    field.round(args, text, time / 4, &mut |_, _| ()).await?;
    let mut renderings = Vec::new();
    let mut sides: Vec<Side> = field.names().into_iter().map(Side::new).collect();
    for round in 0..args.repetitions as u64 {
        steps.at(round, "");
        let mut tell = |at: usize, round| sides[at].push(round);
        renderings.push(field.round(args, text, time, &mut tell).await?);
    }
    drop(steps);
    Ok(Report {
        version: env!("CARGO_PKG_VERSION"),
        concurrency: args.concurrency,
        tokens: args.tokens,
        repetitions: args.repetitions,
        rendering_us: median(&mut renderings),
        sides: sides.into_iter().map(Side::summed).collect::<Option<_>>().unwrap_or_default(),
    })
}

impl Field {
    async fn start(
        args: &RouterArgs,
        against: &[Peer],
        text: &ModelText,
        cancel: &Cancel,
    ) -> Result<Self, Failure> {
        let ids = text.tokenizer().encode(ANSWER).map_err(failed)?;
        let ids: Vec<u32> = ids.into_iter().cycle().take(args.tokens.max(UNARY_TOKENS)).collect();
        let texts: Vec<String> = ids.iter().map(|&id| text.tokenizer().decode(&[id])).collect();
        let work = Work {
            streamed: request(true, args.tokens),
            unary: request(false, UNARY_TOKENS),
            expected: texts[..args.tokens].concat(),
        };
        let script = nodes::Script { ids: ids.into(), drafted: DRAFTED };
        let nodes = {
            let (text, script) = (text.clone(), script.clone());
            Apart::start(async move { FakeNodes::start(&text, &script).await }).await?
        };
        let membership: Arc<dyn Membership> = nodes.value.membership.clone();
        let router =
            Apart::start(start_router(membership, args.concurrency, args.http_threads)).await?;
        let calls = calls(&nodes.value, text)?;
        let answer = stub::Script::new(&texts[..args.tokens], &texts[..UNARY_TOKENS]);
        let stub = Apart::start(async move {
            let listener = TcpListener::bind("127.0.0.1:0").await.map_err(failed)?;
            let address = listener.local_addr().map_err(failed)?.to_string();
            tokio::spawn(stub::serve(listener, Arc::new(answer)));
            Ok(address)
        })
        .await?;
        let mut peers = Vec::new();
        if !against.is_empty() {
            let (wanted, flag) = (against.to_vec(), cancel.clone());
            let install = move || Peers::install(&wanted, &flag);
            let installed = tokio::task::spawn_blocking(install).await.map_err(failed)??;
            for &peer in against {
                peers.push((peer, installed.start(peer, &stub.value, &work.unary).await?));
            }
        }
        Ok(Self { router, nodes, stub, peers, calls, work })
    }

    /// The sides, in the order in which they are measured.
    fn names(&self) -> Vec<String> {
        let peers = self.peers.iter().map(|(peer, _)| peer.package().to_owned());
        std::iter::once("headstart".to_owned()).chain(peers).collect()
    }

    /// Measures every side once, and tells each one's figures. Returns the median time of rendering
    /// and tokenising, in microseconds.
    async fn round(
        &self,
        args: &RouterArgs,
        text: &ModelText,
        time: Duration,
        tell: &mut dyn FnMut(usize, Round),
    ) -> Result<f64, Failure> {
        let Work { streamed, unary, expected } = &self.work;
        let unary_time = time.mul_f64(UNARY_PART);
        let ours = self.router.value.http_addr().to_string();
        let streams = load::streams(&ours, streamed, expected, args.concurrency, time).await?;
        let text = text.clone();
        let (direct_us, rendering_us) =
            self.calls.measure(unary_time, move || render(&text)).await?;
        let through_us = load::unary(&ours, unary, unary_time).await?;
        tell(0, Round { streams, direct_us, through_us });
        for (at, (_, peer)) in self.peers.iter().enumerate() {
            let address = &peer.address;
            let streams =
                load::streams(address, streamed, expected, args.concurrency, time).await?;
            let direct_us = load::unary(&self.stub.value, unary, unary_time).await?;
            let through_us = load::unary(address, unary, unary_time).await?;
            tell(at + 1, Round { streams, direct_us, through_us });
        }
        // The nodes must outlive what was asked of them.
        debug_assert!(!self.nodes.value.base.is_empty());
        Ok(rendering_us)
    }
}

async fn start_router(
    membership: Arc<dyn Membership>,
    concurrency: usize,
    http_threads: Option<u32>,
) -> Result<RunningRouter, Failure> {
    let http = TcpListener::bind("127.0.0.1:0").await.map_err(failed)?;
    let grpc = TcpListener::bind("127.0.0.1:0").await.map_err(failed)?;
    let in_flight_max = u32::try_from(concurrency).unwrap_or(u32::MAX);
    let defaults = RouterOptions::default();
    let in_flight_max = defaults.in_flight_max.max(in_flight_max);
    let http_threads = http_threads.unwrap_or_else(RouterOptions::http_threads_of_cores);
    let options = RouterOptions { in_flight_max, http_threads, ..defaults };
    headstart_service::metrics::install();
    let shutdown = CancellationToken::new();
    let router = headstart_router::start(options, membership, http, grpc, shutdown);
    let router = router.await.map_err(failed)?;
    let begun = Instant::now();
    while !router.is_ready() {
        if begun.elapsed() > READY_WITHIN {
            return Err(Failure::Failed("the router did not become ready".to_owned()));
        }
        tokio::time::sleep(POLL).await;
    }
    Ok(router)
}

fn request(stream: bool, tokens: usize) -> Bytes {
    let body = json!({"model": MODEL, "stream": stream, "max_tokens": tokens,
        "messages": [{"role": "user", "content": QUESTION}]});
    Bytes::from(body.to_string())
}

fn messages() -> [Message; 1] {
    [Message::new(Role::User, QUESTION)]
}

/// The calls that the router makes for a unary request, ready to be made without it.
fn calls(nodes: &FakeNodes, text: &ModelText) -> Result<NodeCalls, Failure> {
    let base = text.base_prompt(&messages()).map_err(failed)?;
    let drafter = text.drafter_prompt(&messages()).map_err(failed)?;
    let encoding = v1::DraftEncoding::Ids.into();
    let serve = v1::ServeRequest {
        request_id: "direct".to_owned(),
        epoch: 1,
        prompt_ids: base.ids,
        prompt_text: base.text,
        max_tokens: u32::try_from(UNARY_TOKENS).unwrap_or(u32::MAX),
        draft: Some(v1::DraftPolicy {
            window: DRAFTED,
            threshold: 0.8,
            encoding,
            ..v1::DraftPolicy::default()
        }),
        ..v1::ServeRequest::default()
    };
    let draft = v1::DraftRequest {
        request_id: "direct".to_owned(),
        epoch: 1,
        prompt_ids: drafter.ids,
        draft_tokens_max: 512,
        base_address: nodes.base.clone(),
        encoding,
        ..v1::DraftRequest::default()
    };
    Ok(NodeCalls { base: nodes.base.clone(), drafter: nodes.drafter.clone(), serve, draft })
}

/// Renders and tokenises both prompts, as the router does for every request.
fn render(text: &ModelText) -> Result<(), Failure> {
    let messages = messages();
    let base = text.base_prompt(&messages).map_err(failed)?;
    let drafter = text.drafter_prompt(&messages).map_err(failed)?;
    std::hint::black_box((base, drafter));
    Ok(())
}

fn failed(error: impl std::fmt::Display) -> Failure {
    Failure::Failed(error.to_string())
}
