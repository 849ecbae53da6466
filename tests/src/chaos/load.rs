//! The clients: so many streams at once, each compared with the undisturbed answer.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::sleep;

use super::Draw;
use super::client::{Door, Doors, End, Watched, watch};
use super::fleet::Fleet;
use super::report::{Report, Stream, StreamOutcome};
use super::requests::{Ask, Choice, compare};

/// A client whose router is gone goes to the next one after so long.
const RECONNECT_AFTER: Duration = Duration::from_millis(100);
/// A client that was told an error leaves the cluster alone for so long.
const BACK_OFF: Duration = Duration::from_millis(500);
/// Times a client looks for a router that takes its request.
const RECONNECTS_MAX: usize = 100;
/// Of so many streams, one is dropped by its client.
const CANCELS_ONE_OF: usize = 20;

/// A request and its undisturbed answer.
#[derive(Clone, Debug)]
pub struct Known {
    /// The request.
    pub ask: Ask,
    /// The answer.
    pub answer: Vec<Choice>,
}

/// Asks everything once over HTTP, calmly, a few at a time.
///
/// # Errors
/// The first request without an answer.
pub async fn undisturbed(
    fleet: &Fleet,
    asks: Vec<Ask>,
    at_once: usize,
) -> Result<Vec<Known>, String> {
    use futures::stream::{self, StreamExt, TryStreamExt};
    let doors = fleet.doors();
    let ask = |(index, ask): (usize, Ask)| {
        let door = doors[index % doors.len()].clone();
        async move {
            match watch(&door, Door::Http, &ask, None).await.end {
                End::Done(answer) => Ok(Known { ask, answer }),
                other => Err(format!("{} on a calm cluster: {other:?}", ask.kind)),
            }
        }
    };
    stream::iter(asks.into_iter().enumerate()).map(ask).buffered(at_once).try_collect().await
}

/// Clients that ask until they are told to stop.
#[derive(Debug)]
pub struct Load {
    stop: Arc<AtomicBool>,
    clients: JoinSet<()>,
}

impl Load {
    /// Starts `clients` that ask what is in `known`.
    #[must_use]
    pub fn start(
        fleet: &Arc<Fleet>,
        known: &Arc<Vec<Known>>,
        report: &Arc<Report>,
        clients: usize,
        seed: u64,
    ) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let mut set = JoinSet::new();
        for client in 0..clients {
            let (fleet, known) = (Arc::clone(fleet), Arc::clone(known));
            let (report, stop) = (Arc::clone(report), Arc::clone(&stop));
            let mut draw = Draw::new(seed.wrapping_add(client as u64));
            set.spawn(async move {
                while !stop.load(Ordering::Relaxed) {
                    let Some(known) = draw.of(&known) else { return };
                    let door = [Door::Http, Door::Grpc][draw.below(2)];
                    let cancel = (draw.below(CANCELS_ONE_OF) == 0)
                        .then(|| draw.below(known.ask.choices as usize * 24));
                    ask(&fleet, known, door, cancel, draw.below(16), &report).await;
                }
            });
        }
        Self { stop, clients: set }
    }

    /// Lets the clients finish what they have asked.
    pub async fn stop(mut self) {
        self.stop.store(true, Ordering::Relaxed);
        while self.clients.join_next().await.is_some() {}
    }
}

/// Asks one request to its end, over whichever router takes it.
async fn ask(
    fleet: &Fleet,
    known: &Known,
    door: Door,
    cancel: Option<usize>,
    first_router: usize,
    report: &Report,
) {
    let doors = fleet.doors();
    for attempt in 0..RECONNECTS_MAX {
        let router = &doors[(first_router + attempt) % doors.len()];
        let watched = watch(router, door, &known.ask, cancel).await;
        let outcome = judge(fleet, known, router, &watched);
        let failed = matches!(outcome, StreamOutcome::Failed { .. });
        let again = matches!(outcome, StreamOutcome::Elsewhere(_) | StreamOutcome::RouterDied);
        report.stream(&Stream { known, door, router, watched: &watched }, outcome);
        match (again, failed) {
            (true, _) => sleep(RECONNECT_AFTER).await,
            (false, true) => return sleep(BACK_OFF).await,
            (false, false) => return,
        }
    }
}

/// What became of a stream.
fn judge(fleet: &Fleet, known: &Known, router: &Doors, watched: &Watched) -> StreamOutcome {
    let began = watched.ttft.is_some();
    match &watched.end {
        End::Done(answer) => match compare(&known.answer, answer) {
            Ok(()) => StreamOutcome::Right,
            Err(flaw) => StreamOutcome::Flawed(flaw),
        },
        End::Cancelled => StreamOutcome::Cancelled,
        End::Hung => StreamOutcome::Hung,
        End::Unreachable(_) => StreamOutcome::Elsewhere("unreachable"),
        // A router that drains says so before it has begun, and the client takes the other one.
        End::Error { code, .. } if code == "draining" && !began => {
            StreamOutcome::Elsewhere("draining")
        }
        End::Error { code, message } => {
            StreamOutcome::Failed { code: code.clone(), message: message.clone() }
        }
        End::Cut(_) if fleet.was_killed(&router.router, watched.asked) => StreamOutcome::RouterDied,
        // The connection closed before a word was said on it.
        End::Cut(_)
            if watched.frames.is_empty() && fleet.was_down(&router.router, watched.asked) =>
        {
            StreamOutcome::Elsewhere("closed")
        }
        End::Cut(what) => StreamOutcome::Failed { code: "cut".into(), message: what.clone() },
    }
}
