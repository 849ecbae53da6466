//! What is done to the cluster, to whom and when: a schedule drawn from a seed.

use std::collections::BTreeSet;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::task::JoinSet;
use tokio::time::{sleep, sleep_until};

use super::Draw;
use super::fleet::{Fleet, Kind, LEASE, Part};
use super::report::Report;

/// A part that was started again may take so long until it is ready, other starts included: one
/// that finds no etcd ends and is started again, as its supervisor would.
const BACK_WITHIN: Duration = Duration::from_secs(120);
/// A part that ended by itself is started again after so long.
const SUPERVISED_EVERY: Duration = Duration::from_millis(500);
/// What is away is away for longer than a lease, and than a router waits for a frame.
const AWAY: Duration = Duration::from_secs(LEASE.as_secs() + 5);
/// Of so many pauses, one is longer than a connection's ping and its answer may take.
const LONG_PAUSE_ONE_OF: usize = 4;
/// When no fault is possible, because those under way hold all that could suffer one, this is tried
/// again.
const SOON: Duration = Duration::from_millis(250);
const LONG_PAUSE: Duration = Duration::from_secs(24);

/// What can happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// SIGKILL, and started again.
    Kill,
    /// SIGSTOP for longer than lease and pings, then SIGCONT.
    Pause,
    /// SIGTERM; exit code 0 within the drain deadline; started again.
    Drain,
    /// The same, asked for by the `Drain` call.
    DrainCall,
    /// etcd killed, and started again on its data.
    EtcdStop,
    /// etcd killed, emptied and started again.
    EtcdEmpty,
    /// etcd paused: it takes connections and does not answer.
    EtcdPause,
    /// Two parts cannot reach each other.
    Partition,
    /// One part's packets do not reach another.
    HalfPartition,
    /// One part's link carries next to nothing.
    SlowLink,
}

impl Fault {
    /// Every fault, the likelier ones more than once.
    const DRAWN: [Self; 16] = [
        Self::Kill,
        Self::Kill,
        Self::Kill,
        Self::Kill,
        Self::Pause,
        Self::Pause,
        Self::Drain,
        Self::Drain,
        Self::DrainCall,
        Self::EtcdStop,
        Self::EtcdEmpty,
        Self::EtcdPause,
        Self::Partition,
        Self::Partition,
        Self::HalfPartition,
        Self::SlowLink,
    ];

    /// Its name in reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Kill => "kill -9",
            Self::Pause => "pause",
            Self::Drain => "drain",
            Self::DrainCall => "drain call",
            Self::EtcdStop => "etcd stopped",
            Self::EtcdEmpty => "etcd emptied",
            Self::EtcdPause => "etcd paused",
            Self::Partition => "partition",
            Self::HalfPartition => "one-way partition",
            Self::SlowLink => "slow link",
        }
    }

    /// Whether it can be done on this machine; else why not.
    fn possible(self, fleet: &Fleet) -> Result<(), &'static str> {
        match self {
            Self::Partition | Self::HalfPartition if !fleet.network.can_part() => {
                Err("needs root and network namespaces")
            }
            Self::SlowLink if !fleet.network.can_slow() => Err("needs root and tc's tbf"),
            _ => Ok(()),
        }
    }
}

/// The faults that strike while a run goes on.
#[derive(Debug)]
pub struct Faults {
    fleet: Arc<Fleet>,
    report: Arc<Report>,
    draw: Draw,
    /// Parts that a fault holds. Of each tier, one part at most: a second one would leave a fleet
    /// of three with one node, and what is tested is that nothing is lost, not that nothing is slow.
    held: Arc<Mutex<BTreeSet<String>>>,
    running: JoinSet<()>,
}

/// Gives the parts back when the fault is over, however it ends.
struct Hold {
    held: Arc<Mutex<BTreeSet<String>>>,
    keys: Vec<String>,
}

impl Drop for Hold {
    fn drop(&mut self) {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        for key in &self.keys {
            held.remove(key);
        }
    }
}

impl Faults {
    /// Faults drawn from `seed`.
    #[must_use]
    pub fn new(fleet: Arc<Fleet>, report: Arc<Report>, seed: u64) -> Self {
        for fault in Fault::DRAWN {
            if let Err(reason) = fault.possible(&fleet) {
                report.skipped(fault.name(), reason);
            }
        }
        let held = Arc::default();
        Self { fleet, report, draw: Draw::new(seed), held, running: JoinSet::new() }
    }

    /// Starts a fault `every` so often until `until`, and waits until all are over.
    pub async fn run(&mut self, every: Duration, until: Instant) {
        let mut next = Instant::now();
        while next < until {
            sleep_until(next.into()).await;
            next += if self.strike() { every } else { SOON.min(every) };
        }
        while self.running.join_next().await.is_some() {}
    }

    /// Starts one fault that is possible now. Returns whether there was one.
    fn strike(&mut self) -> bool {
        const ATTEMPTS: usize = 64;
        for _ in 0..ATTEMPTS {
            let Some(&fault) = self.draw.of(&Fault::DRAWN) else { return false };
            let targets = self.targets(fault);
            if fault.possible(&self.fleet).is_err() || targets.is_empty() {
                continue;
            }
            let Some(hold) = self.hold(fault, &targets) else { continue };
            let names: Vec<&str> =
                targets.iter().map(|&target| self.fleet.parts[target].name.as_str()).collect();
            let event = self.report.fault(fault.name(), &names.join(", "));
            let (fleet, report) = (Arc::clone(&self.fleet), Arc::clone(&self.report));
            let mut wait = Duration::from_millis(self.draw.below(2000) as u64);
            if fault == Fault::Pause && self.draw.below(LONG_PAUSE_ONE_OF) == 0 {
                wait += LONG_PAUSE - AWAY;
            }
            self.running.spawn(async move {
                let parts: Vec<&Part> =
                    targets.iter().map(|&target| &fleet.parts[target]).collect();
                let result = suffer(fault, &fleet, &report, &parts, wait).await;
                drop(hold);
                report.fault_over(event, result.err().map(|error| error.to_string()));
            });
            return true;
        }
        false
    }

    /// Whom it strikes, as indices of the fleet's parts.
    fn targets(&mut self, fault: Fault) -> Vec<usize> {
        let parts = self.fleet.parts.len();
        match fault {
            Fault::EtcdStop | Fault::EtcdEmpty | Fault::EtcdPause => vec![0],
            Fault::Kill | Fault::Pause | Fault::Drain | Fault::SlowLink => {
                vec![1 + self.draw.below(parts - 1)]
            }
            Fault::DrainCall => {
                let routers = self.fleet.of(Kind::Router).count();
                vec![1 + routers + self.draw.below(parts - 1 - routers)]
            }
            Fault::Partition | Fault::HalfPartition => {
                let (one, other) = (self.draw.below(parts), self.draw.below(parts));
                let kinds = [one, other].map(|index| self.fleet.parts[index].kind);
                // Only bases talk to their like.
                if one == other || (kinds[0] == kinds[1] && kinds[0] != Kind::Base) {
                    return Vec::new();
                }
                vec![one, other]
            }
        }
    }

    /// Takes the parts, or says that it is not their turn.
    fn hold(&self, fault: Fault, targets: &[usize]) -> Option<Hold> {
        let part = |&index: &usize| &self.fleet.parts[index];
        let keys: Vec<String> = match fault {
            // The parts go on; one cut at a time.
            Fault::Partition | Fault::HalfPartition | Fault::SlowLink => vec!["links".into()],
            // Of each tier one.
            _ => targets.iter().map(part).map(|part| format!("{:?}", part.kind)).collect(),
        };
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        if keys.iter().any(|key| held.contains(key)) {
            return None;
        }
        held.extend(keys.iter().cloned());
        Some(Hold { held: Arc::clone(&self.held), keys })
    }
}

/// Does `fault` to `parts` and mends it. `wait` is how long what is gone stays gone.
async fn suffer(
    fault: Fault,
    fleet: &Fleet,
    report: &Report,
    parts: &[&Part],
    wait: Duration,
) -> io::Result<()> {
    let part = parts[0];
    match fault {
        Fault::Kill => {
            part.kill().await;
            sleep(wait).await;
            restart(part, report).await
        }
        Fault::Pause | Fault::EtcdPause => {
            part.signal("STOP").await?;
            sleep(AWAY + wait).await;
            part.signal("CONT").await?;
            part.ready().await
        }
        Fault::Drain | Fault::DrainCall => {
            let drained = part.drain(fault == Fault::DrainCall).await;
            sleep(wait).await;
            restart(part, report).await?;
            drained
        }
        Fault::EtcdStop | Fault::EtcdEmpty => {
            part.kill().await;
            if fault == Fault::EtcdEmpty {
                part.wipe()?;
            }
            sleep(AWAY + wait).await;
            restart(part, report).await
        }
        Fault::Partition | Fault::HalfPartition => {
            let (one, other) = (&part.place, &parts[1].place);
            let both = fault == Fault::Partition;
            fleet.network.cut(one, other, true)?;
            if both {
                fleet.network.cut(other, one, true)?;
            }
            sleep(AWAY + wait).await;
            fleet.network.cut(one, other, false)?;
            if both { fleet.network.cut(other, one, false) } else { Ok(()) }
        }
        Fault::SlowLink => {
            fleet.network.slow(&part.place, true)?;
            sleep(AWAY + wait).await;
            fleet.network.slow(&part.place, false)
        }
    }
}

/// Starts a part, and again if it ends, until it is up.
///
/// # Errors
/// When it is not, for too long.
pub async fn restart(part: &Part, report: &Report) -> io::Result<()> {
    let deadline = Instant::now() + BACK_WITHIN;
    part.start().await?;
    loop {
        match part.ready().await {
            Ok(()) => return Ok(()),
            Err(error) if Instant::now() > deadline => return Err(error),
            Err(_) => sleep(SUPERVISED_EVERY).await,
        }
        revive(part, report).await;
    }
}

/// Starts parts that end by themselves again, as a supervisor would, for ever.
pub async fn supervise(fleet: Arc<Fleet>, report: Arc<Report>) {
    loop {
        for part in &fleet.parts {
            revive(part, &report).await;
        }
        sleep(SUPERVISED_EVERY).await;
    }
}

async fn revive(part: &Part, report: &Report) {
    match part.revive().await {
        Ok(None) => {}
        Ok(Some(how)) => report.exited(&part.name, &how),
        Err(error) => report.problem(format!("{}: {error}", part.name)),
    }
}
