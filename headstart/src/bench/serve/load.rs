//! When requests are sent: so many at once, or at random times with a given rate.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use serde_json::json;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::prompts::Prompts;
use super::sample::{Sample, Watch};
use crate::bench::client::Client;

/// Requests in flight at once under a request rate; what comes beyond waits.
const IN_FLIGHT_MAX: usize = 4096;
const TELL_INTERVAL: Duration = Duration::from_millis(100);

/// When requests are sent.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Arrival {
    /// The next one as soon as one of so many is answered.
    Concurrency(usize),
    /// So many a second on average, with exponential gaps (a Poisson process), drawn from a seed.
    Rate(f64, u64),
}

/// When a run ends.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Until {
    /// After so many requests.
    Requests(usize),
    /// No request is sent after this time.
    Time(Duration),
}

/// What every request of a run has.
#[derive(Debug)]
pub(super) struct Asking {
    /// `host:port`
    pub(super) address: String,
    /// The model's name.
    pub(super) model: String,
    /// What is asked.
    pub(super) prompts: Prompts,
    /// The longest answer.
    pub(super) max_tokens: u32,
    /// 0 is greedy.
    pub(super) temperature: f32,
    /// A request may take so long.
    pub(super) timeout: Duration,
    /// Requests of this run that are over.
    pub(super) done: AtomicUsize,
}

impl Asking {
    fn body(&self, index: usize) -> Bytes {
        let body = json!({
            "model": self.model,
            "messages": self.prompts.messages(index),
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "seed": index,
            "stream": true,
            "stream_options": {"include_usage": true},
            "return_token_ids": true,
        });
        Bytes::from(body.to_string())
    }

    /// Sends request number `index` and watches its answer.
    async fn ask(&self, client: &mut Client, index: usize, begun: Instant) -> Sample {
        let body = self.body(index);
        let mut watch = Watch::new(begun.elapsed());
        let mut each = |data: &[u8]| watch.event(data, Instant::now());
        let outcome = client.stream("/v1/chat/completions", body, self.timeout, &mut each).await;
        self.done.fetch_add(1, Ordering::Relaxed);
        watch.finish(outcome)
    }
}

/// Runs requests numbered from `first` on, and tells how many are done. Returns what
/// became of each, and how long it took.
pub(super) async fn run(
    asking: &Arc<Asking>,
    arrival: Arrival,
    until: Until,
    first: usize,
    tell: &mut dyn FnMut(usize),
) -> (Vec<Sample>, Duration) {
    let begun = Instant::now();
    asking.done.store(0, Ordering::Relaxed);
    let mut running = match arrival {
        Arrival::Concurrency(workers) => closed(asking, workers, until, first, begun),
        Arrival::Rate(rate, seed) => {
            let mut running = JoinSet::new();
            let asking = Arc::clone(asking);
            running.spawn(open(asking, rate, seed, until, first, begun));
            running
        }
    };
    let mut samples = Vec::new();
    let mut tick = tokio::time::interval(TELL_INTERVAL);
    loop {
        tokio::select! {
            joined = running.join_next() => match joined {
                // A task that broke has no samples.
                Some(joined) => samples.extend(joined.unwrap_or_default()),
                None => break,
            },
            _ = tick.tick() => tell(asking.done.load(Ordering::Relaxed)),
        }
    }
    samples.sort_by(|a, b| a.sent.total_cmp(&b.sent));
    (samples, begun.elapsed())
}

/// `workers` clients, each of which sends its next request when the last is answered.
fn closed(
    asking: &Arc<Asking>,
    workers: usize,
    until: Until,
    first: usize,
    begun: Instant,
) -> JoinSet<Vec<Sample>> {
    let next = Arc::new(AtomicUsize::new(0));
    let mut running = JoinSet::new();
    for _ in 0..workers {
        let (asking, next) = (Arc::clone(asking), Arc::clone(&next));
        running.spawn(async move {
            let mut client = Client::new(asking.address.clone());
            let mut samples = Vec::new();
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                let over = match until {
                    Until::Requests(count) => index >= count,
                    Until::Time(time) => begun.elapsed() >= time,
                };
                if over {
                    return samples;
                }
                samples.push(asking.ask(&mut client, first + index, begun).await);
            }
        });
    }
    running
}

/// Sends requests at random times.
async fn open(
    asking: Arc<Asking>,
    rate: f64,
    seed: u64,
    until: Until,
    first: usize,
    begun: Instant,
) -> Vec<Sample> {
    let places = Arc::new(Semaphore::new(IN_FLIGHT_MAX));
    let mut running: JoinSet<Option<Sample>> = JoinSet::new();
    let (mut random, mut due) = (Random(seed), Duration::ZERO);
    for index in 0.. {
        due += Duration::from_secs_f64(random.exponential() / rate);
        let over = match until {
            Until::Requests(count) => index >= count,
            Until::Time(time) => due >= time,
        };
        if over {
            break;
        }
        tokio::time::sleep_until((begun + due).into()).await;
        let (asking, places) = (Arc::clone(&asking), Arc::clone(&places));
        running.spawn(async move {
            let _place = places.acquire_owned().await.ok()?;
            let mut client = Client::new(asking.address.clone());
            Some(asking.ask(&mut client, first + index, begun).await)
        });
    }
    let mut samples = Vec::new();
    while let Some(done) = running.join_next().await {
        samples.extend(done.ok().flatten());
    }
    samples
}

/// A generator of numbers that need not be good: splitmix64.
struct Random(u64);

impl Random {
    /// Exponential with mean 1.
    fn exponential(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        let unit = ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64;
        -(1.0 - unit).ln()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_have_the_right_mean_and_repeat() {
        let gaps = |seed| {
            let mut random = Random(seed);
            (0..20_000).map(|_| random.exponential()).collect::<Vec<f64>>()
        };
        let all = gaps(1);
        let mean = all.iter().sum::<f64>() / all.len() as f64;
        let above = all.iter().filter(|&&gap| gap > 1.0).count() as f64 / all.len() as f64;
        assert!(
            (mean - 1.0).abs() < 0.03 && (above - (-1.0f64).exp()).abs() < 0.02,
            "{mean} {above}"
        );
        assert_eq!(all, gaps(1));
        assert_ne!(all, gaps(2));
    }

    /// A server that answers nothing but errors: every request is counted, none is lost.
    #[tokio::test]
    async fn every_request_is_accounted_for() {
        let app = axum::Router::new().fallback(|| async {
            (axum::http::StatusCode::TOO_MANY_REQUESTS, r#"{"error": {"code": "overloaded"}}"#)
        });
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        tokio::spawn(async move { axum::serve(listener, app).await });
        let asking = Arc::new(Asking {
            address,
            model: "m".to_owned(),
            prompts: Prompts::own(0),
            max_tokens: 1,
            temperature: 0.0,
            timeout: Duration::from_secs(30),
            done: AtomicUsize::new(0),
        });
        for arrival in [Arrival::Concurrency(3), Arrival::Rate(1000.0, 7)] {
            let until = Until::Requests(20);
            let (samples, _) = run(&asking, arrival, until, 0, &mut |_| ()).await;
            assert_eq!(samples.len(), 20, "{arrival:?}");
            assert!(samples.iter().all(|s| s.error.as_deref() == Some("429 overloaded")));
        }
    }
}
