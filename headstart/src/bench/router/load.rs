//! What is sent, and how long it took.

use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::future::{try_join, try_join_all};
use headstart_proto::v1;
use headstart_proto::v1::base_client::BaseClient;
use headstart_proto::v1::drafter_client::DrafterClient;
use serde::Serialize;
use tokio::runtime::Builder;
use tonic::transport::{Channel, Endpoint};
use tonic::{Response, Status, Streaming};

use super::PATH;
use crate::bench::client::{CallError, Client};
use crate::bench::stats::median;
use crate::failure::Failure;

/// A call may take so long.
const CALL_TIMEOUT: Duration = Duration::from_secs(30);

/// How many streams ended, and in how many events.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(super) struct Streams {
    /// Streams that ended a second.
    pub(super) per_second: f64,
    /// Server-sent events of a stream, on average.
    pub(super) events: f64,
}

/// Streams from `address`, so many at once, for `time`; a stream's text must be `expected`.
///
/// # Errors
/// The first call that failed.
pub(super) async fn streams(
    address: &str,
    body: &Bytes,
    expected: &str,
    concurrency: usize,
    time: Duration,
) -> Result<Streams, Failure> {
    check_stream(address, body, expected).await?;
    let begun = Instant::now();
    let worker = || {
        let (address, body) = (address.to_owned(), body.clone());
        tokio::spawn(async move {
            let mut client = Client::new(address);
            let (mut ended, mut events) = (0u64, 0u64);
            while begun.elapsed() < time {
                client.stream(PATH, body.clone(), CALL_TIMEOUT, &mut |_| events += 1).await?;
                ended += 1;
            }
            Ok::<_, CallError>((ended, events))
        })
    };
    let workers: Vec<_> = (0..concurrency).map(|_| worker()).collect();
    let all = try_join_all(workers).await.map_err(|error| failed(address, &error))?;
    let seconds = begun.elapsed().as_secs_f64();
    let (mut ended, mut events) = (0, 0);
    for one in all {
        let (more, more_events) = one.map_err(|error| call_failed(address, &error))?;
        (ended, events) = (ended + more, events + more_events);
    }
    let per_second = ended as f64 / seconds;
    Ok(Streams { per_second, events: events as f64 / ended.max(1) as f64 })
}

/// One stream, read closely: what is measured must be the whole answer.
async fn check_stream(address: &str, body: &Bytes, expected: &str) -> Result<(), Failure> {
    let mut text = String::new();
    let mut each = |data: &[u8]| {
        let event: serde_json::Value = serde_json::from_slice(data).unwrap_or_default();
        text.push_str(event["choices"][0]["delta"]["content"].as_str().unwrap_or_default());
    };
    let mut client = Client::new(address);
    client
        .stream(PATH, body.clone(), CALL_TIMEOUT, &mut each)
        .await
        .map_err(|error| call_failed(address, &error))?;
    if text == expected {
        return Ok(());
    }
    Err(Failure::Failed(format!("{address} streamed {text:?} and not {expected:?}")))
}

/// Runs a client that does one thing at a time on a thread of its own, so that what is measured has no
/// hand-over between threads in it.
async fn alone<T: Send + 'static, F: Future<Output = Result<T, Failure>>>(
    client: impl FnOnce() -> F + Send + 'static,
) -> Result<T, Failure> {
    let run = move || {
        let runtime = Builder::new_current_thread().enable_all().build();
        runtime.map_err(|error| failed("the client", &error))?.block_on(client())
    };
    let ran = tokio::task::spawn_blocking(run).await;
    ran.map_err(|error| failed("the client", &error))?
}

/// The median time of one request that does not stream, one at a time, in microseconds.
///
/// # Errors
/// The first call that failed.
pub(super) async fn unary(address: &str, body: &Bytes, time: Duration) -> Result<f64, Failure> {
    let (address, body) = (address.to_owned(), body.clone());
    alone(move || async move {
        let mut client = Client::new(&address);
        let (mut samples, begun) = (Vec::new(), Instant::now());
        while begun.elapsed() < time {
            let sent = Instant::now();
            let answer = client.post(PATH, body.clone(), CALL_TIMEOUT).await;
            samples.push(sent.elapsed().as_secs_f64() * 1e6);
            answer.map_err(|error| call_failed(&address, &error))?;
        }
        Ok(median(&mut samples))
    })
    .await
}

/// What a router asks both nodes for one answer, and where they are.
#[derive(Clone, Debug)]
pub(super) struct NodeCalls {
    pub(super) base: String,
    pub(super) drafter: String,
    pub(super) serve: v1::ServeRequest,
    pub(super) draft: v1::DraftRequest,
}

impl NodeCalls {
    /// The median times, in microseconds, of both calls together, read to their ends, one pair at a
    /// time (what an answer takes without a router), and of `render` before each (what it takes
    /// between other work, not in a loop of its own).
    ///
    /// # Errors
    /// When a node cannot be reached, and the first call that failed.
    pub(super) async fn measure(
        &self,
        time: Duration,
        render: impl Fn() -> Result<(), Failure> + Send + 'static,
    ) -> Result<(f64, f64), Failure> {
        let Self { base, drafter, serve, draft } = self.clone();
        alone(move || async move {
            let mut base = BaseClient::new(channel(&base).await?);
            let mut drafter = DrafterClient::new(channel(&drafter).await?);
            let (mut calls, mut renderings, begun) = (Vec::new(), Vec::new(), Instant::now());
            while begun.elapsed() < time {
                let asked = Instant::now();
                render()?;
                let sent = Instant::now();
                let served = async { to_end(base.serve(serve.clone()).await?).await };
                let drafted = async { to_end(drafter.draft(draft.clone()).await?).await };
                let both = try_join(served, drafted).await;
                calls.push(sent.elapsed().as_secs_f64() * 1e6);
                renderings.push((sent - asked).as_secs_f64() * 1e6);
                both.map_err(|status| failed("a fake node", &status))?;
            }
            Ok((median(&mut calls), median(&mut renderings)))
        })
        .await
    }
}

async fn channel(address: &str) -> Result<Channel, Failure> {
    let endpoint = Endpoint::from_shared(format!("http://{address}"));
    let endpoint = endpoint.map_err(|error| failed(address, &error))?.tcp_nodelay(true);
    endpoint.connect().await.map_err(|error| failed(address, &error))
}

async fn to_end<T>(answer: Response<Streaming<T>>) -> Result<(), Status> {
    let mut frames = answer.into_inner();
    while frames.message().await?.is_some() {}
    Ok(())
}

fn call_failed(who: &str, error: &CallError) -> Failure {
    match error {
        CallError::Refused { body, .. } => Failure::Failed(format!("{who}: {error}: {body}")),
        _ => failed(who, error),
    }
}

fn failed(who: &str, error: &dyn std::fmt::Display) -> Failure {
    Failure::Failed(format!("{who}: {error}"))
}
