//! One seed's run: a safety phase with faults, a healing phase without, and silence.

use std::time::Duration;

use headstart_text::ModelText;
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::RecvError;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until, timeout, timeout_at};

use crate::client::{Outcome, ask};
use crate::oracle::Answer;
use crate::plan::{Aim, Fault, FaultKind, Plan, SAFETY, SUPERSEDED_WITHIN};
use crate::trace::Trace;
use crate::wire::{Handoff, News, Seen};
use crate::world::{LEASE_TTL, World};

/// How long the cluster may take to come up, and to be whole again once nothing is wrong.
const WHOLE_WITHIN: Duration = Duration::from_secs(60);
/// After that, how long the last broken connection may go unnoticed.
const SETTLE: Duration = Duration::from_secs(11);
/// Between two requests of the healing phase.
const PAUSE: Duration = Duration::from_millis(300);
/// How long everything may take to be given back once nothing is asked any more.
const QUIET_WITHIN: Duration = Duration::from_secs(30);
/// How often something is looked at that nobody tells.
const POLL: Duration = Duration::from_millis(20);

/// What came of a seed.
#[derive(Debug)]
pub struct Run {
    /// The seed.
    pub seed: u64,
    /// What was planned.
    pub plan: Plan,
    /// The requests, in the order in which they ended.
    pub outcomes: Vec<Outcome>,
    /// For each of them, its right answers.
    pub right: Vec<Vec<Answer>>,
    /// The faults as they happened: aimed at somebody, and until what they hit was up again.
    pub faults: Vec<Fault>,
    /// What was seen on the wire.
    pub seen: Seen,
    /// The cluster was whole before the faults, and again after them.
    pub whole: (bool, bool),
    /// What was not given back.
    pub leaks: Vec<String>,
    /// When the faults were over.
    pub healed_at: Duration,
    /// A hash of all that happened, and how many events that were.
    pub digest: (u64, u64),
    /// What happened, if it was asked for.
    pub lines: Vec<String>,
}

/// Runs a seed. Nothing in it depends on anything but the seed.
///
/// # Panics
/// If the system gives no runtime.
#[must_use]
pub fn run(seed: u64, text: &ModelText, verbose: bool) -> Run {
    run_plan(seed, Plan::draw(seed), text, verbose)
}

/// Runs a plan.
///
/// # Panics
/// If the system gives no runtime.
#[must_use]
pub fn run_plan(seed: u64, plan: Plan, text: &ModelText, verbose: bool) -> Run {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime of one thread");
    runtime.block_on(Box::pin(live(seed, plan, text.clone(), verbose)))
}

async fn live(seed: u64, plan: Plan, text: ModelText, verbose: bool) -> Run {
    let trace = Trace::new(verbose);
    let world = World::new(plan.clone(), text, trace.clone());
    world.hosts().for_each(|host| world.start(host));
    let whole_before = until(WHOLE_WITHIN, || world.is_whole()).await;

    let start = Instant::now();
    let mut faults = JoinSet::new();
    for fault in plan.faults.clone() {
        faults.spawn(fail(world.clone(), fault, start));
    }
    let mut asks = JoinSet::new();
    for (index, spec) in (0..).zip(plan.asks.clone()) {
        let world = world.clone();
        asks.spawn(async move {
            sleep_until(start + spec.at).await;
            request(&world, spec, start, index, false).await
        });
    }
    let mut outcomes = asks.join_all().await;
    let mut faults: Vec<Fault> = faults.join_all().await.into_iter().flatten().collect();
    faults.sort_by_key(|fault| fault.at);

    let healed_at = start.elapsed();
    let whole_after = heal(&world).await;
    for (index, spec) in (plan.asks.len() as u64..).zip(plan.healed.clone()) {
        outcomes.push(request(&world, spec, start, index, true).await);
        sleep(PAUSE).await;
    }

    let mut leaks = silence(&world).await;
    let oracle = world.oracle();
    world.stop().await;
    leaks.extend(emptiness(&world).await);
    let right = outcomes
        .iter()
        .map(|o| (0..o.ask.choices).map(|choice| oracle.answer(&o.ask, choice)).collect())
        .collect();
    Run {
        seed,
        plan,
        outcomes,
        right,
        faults,
        seen: world.wire.seen(),
        whole: (whole_before, whole_after),
        leaks,
        healed_at,
        digest: trace.digest(),
        lines: trace.lines(),
    }
}

async fn request(
    world: &World,
    spec: crate::plan::Ask,
    start: Instant,
    index: u64,
    healed: bool,
) -> Outcome {
    let address = world.router_address(spec.router);
    let dialer = world.net.dialer(world.client());
    world.trace.add(&[5, index], format_args!("request {index} to {address}: {spec:?}"));
    ask(spec, &address, &dialer, (start, &world.trace, index), healed).await
}

/// Lets a fault happen, and ends it. What became of it; `None`: what it was aimed at never came.
async fn fail(world: World, mut fault: Fault, start: Instant) -> Option<Fault> {
    // What it waits for may come at once.
    let mut news = world.wire.news();
    sleep_until(start + fault.at).await;
    let mut superseded = None;
    if let Some(aim) = fault.aim {
        let (kind, handoff) = aimed(&fault, aim, &mut news, start + SAFETY).await?;
        fault.kind = kind;
        superseded = handoff;
    }
    fault.at = start.elapsed();
    world.trace.add(&[20], format_args!("begins: {fault:?}"));
    match superseded {
        Some(handoff) => {
            happen(&world, &fault.kind, supersedes(&mut news, &handoff, fault.lasts)).await
        }
        None => happen(&world, &fault.kind, sleep(fault.lasts)).await,
    }
    fault.lasts = start.elapsed() - fault.at;
    world.trace.add(&[21], format_args!("ends: {:?}", fault.kind));
    Some(fault)
}

/// Waits for what a fault is aimed at: whom it hits then, and the handoff that it holds up.
async fn aimed(
    fault: &Fault,
    aim: Aim,
    news: &mut Receiver<News>,
    deadline: Instant,
) -> Option<(FaultKind, Option<Handoff>)> {
    // What came before is over.
    *news = news.resubscribe();
    let aimed = async {
        loop {
            match (aim, news.recv().await) {
                (
                    Aim::Transfer { after, receiver },
                    Ok(News::Transfer { sender, receiver: to }),
                ) => {
                    sleep(after).await;
                    let host = if receiver { to } else { sender };
                    return Some((fault.kind.clone().of(host, (sender, to)), None));
                }
                (Aim::Handoff, Ok(News::Opened(handoff))) => {
                    let Handoff { drafter, base, .. } = handoff;
                    let kind = fault.kind.clone().of(drafter, (drafter, base));
                    return Some((kind, Some(handoff)));
                }
                (_, Err(RecvError::Closed)) => return None,
                _ => {}
            }
        }
    };
    timeout_at(deadline, aimed).await.ok().flatten()
}

/// Waits until another draft has taken the place of this one, and then for `after`.
async fn supersedes(news: &mut Receiver<News>, old: &Handoff, after: Duration) {
    let superseded = async {
        loop {
            match news.recv().await {
                Ok(News::Accepted(new))
                    if new.request_id == old.request_id && new.epoch > old.epoch =>
                {
                    return sleep(after).await;
                }
                Err(RecvError::Closed) => return,
                _ => {}
            }
        }
    };
    let _ = timeout(SUPERSEDED_WITHIN, superseded).await;
}

/// Lets something go wrong until `over`, and until what was hit is up again.
async fn happen(world: &World, kind: &FaultKind, over: impl Future<Output = ()>) {
    match *kind {
        FaultKind::Crash { host, silent } => {
            world.crash(host, silent);
            over.await;
            world.restart(host);
            until(WHOLE_WITHIN, || world.is_up(host)).await;
        }
        FaultKind::Hold { host } => {
            world.hold(host, true);
            expire(world, host, over).await;
            world.hold(host, false);
            sleep(POLL).await;
            world.store.expire(world.name(host), false);
        }
        FaultKind::Partition { from, to, both } => {
            world.net.cut(from, to, true);
            world.net.cut(to, from, both);
            over.await;
            world.net.cut(from, to, false);
            world.net.cut(to, from, false);
        }
        FaultKind::Slow { from, to, latency } => {
            world.net.slow(from, to, latency);
            world.net.slow(to, from, latency);
            over.await;
            world.net.slow(from, to, Duration::ZERO);
            world.net.slow(to, from, Duration::ZERO);
        }
        FaultKind::Corrupt { from, to, permille } => {
            world.net.corrupt(from, to, permille);
            over.await;
            world.net.corrupt(from, to, 0);
        }
        FaultKind::Drain { host } => {
            world.drain(host);
            over.await;
            world.restart(host);
            until(WHOLE_WITHIN, || world.is_up(host)).await;
        }
        FaultKind::StoreAway => {
            world.store.away(true);
            over.await;
            world.store.away(false);
        }
        FaultKind::StoreCut { host } => {
            world.store.cut(world.name(host), true);
            expire(world, host, over).await;
            world.store.cut(world.name(host), false);
            world.store.expire(world.name(host), false);
        }
        FaultKind::StoreLate { late } => {
            world.store.late(late);
            over.await;
            world.store.late(Duration::ZERO);
        }
    }
}

/// Waits until `over`; a record that is not kept alive expires meanwhile.
async fn expire(world: &World, host: usize, over: impl Future<Output = ()>) {
    let mut over = std::pin::pin!(over);
    if timeout(LEASE_TTL, &mut over).await.is_err() {
        world.store.expire(world.name(host), true);
        over.await;
    }
}

/// Ends whatever may still be wrong, and waits until the cluster is whole and knows it.
async fn heal(world: &World) -> bool {
    world.net.mend();
    world.store.mend();
    for host in world.hosts() {
        world.hold(host, false);
        if !world.is_up(host) {
            world.restart(host);
        }
    }
    world.trace.add(&[30], format_args!("heals"));
    let whole = until(WHOLE_WITHIN, || world.is_whole()).await;
    sleep(SETTLE).await;
    whole
}

/// Waits until everything is given back; what is not.
async fn silence(world: &World) -> Vec<String> {
    until(QUIET_WITHIN, || world.held().is_empty()).await;
    world.held()
}

/// Once everything has stopped, waits until no task and no connection is left; what is.
async fn emptiness(world: &World) -> Vec<String> {
    let tasks = || tokio::runtime::Handle::current().metrics().num_alive_tasks();
    until(QUIET_WITHIN, || tasks() == 0 && world.net.connections() == 0).await;
    let mut left = Vec::new();
    if tasks() > 0 {
        left.push(format!("{} tasks", tasks()));
    }
    if world.net.connections() > 0 {
        left.push(format!("{} connections", world.net.connections()));
    }
    left
}

/// Waits until `condition` holds, and returns whether it did in time.
async fn until(within: Duration, condition: impl Fn() -> bool) -> bool {
    let deadline = Instant::now() + within;
    while !condition() {
        if Instant::now() >= deadline {
            return false;
        }
        sleep(POLL).await;
    }
    true
}
