//! What a run saw: counted while it goes on, printed at its end, and kept in a folder.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::client::{Door, Doors, Watched};
use super::load::Known;
use super::requests::Flaw;

/// Errors that are never an answer to a fault: defects, and complaints about good requests.
const DEFECTS: [&str; 12] = [
    "",
    "cut",
    "malformed",
    "internal",
    "protocol",
    "invalid_argument",
    "unsupported",
    "context_length_exceeded",
    "context_too_long",
    "model_not_found",
    "unknown_model",
    "unknown_drafter",
];

/// What became of one stream.
#[derive(Debug)]
pub enum StreamOutcome {
    /// The undisturbed answer.
    Right,
    /// Another one.
    Flawed(Flaw),
    /// No progress.
    Hung,
    /// An error.
    Failed {
        /// Its code; `cut` for a connection that broke though its router lived.
        code: String,
        /// Its text.
        message: String,
    },
    /// Its router was killed; the client asks again.
    RouterDied,
    /// Its router takes nothing; the client asks another one.
    Elsewhere(&'static str),
    /// The client went away.
    Cancelled,
}

/// A stream that ended.
#[derive(Debug)]
pub struct Stream<'a> {
    /// What was asked, and the undisturbed answer.
    pub known: &'a Known,
    /// Through which door.
    pub door: Door,
    /// At which router.
    pub router: &'a Doors,
    /// What its client saw.
    pub watched: &'a Watched,
}

#[derive(Debug, Default)]
struct Seen {
    right: [u64; 2],
    flawed: BTreeMap<&'static str, u64>,
    hung: u64,
    failed: BTreeMap<String, (u64, String)>,
    router_died: u64,
    elsewhere: BTreeMap<&'static str, u64>,
    cancelled: u64,
    by_kind: BTreeMap<&'static str, u64>,
    tokens: u64,
    /// Largest gap, and time to the first token, of every right stream.
    gaps: Vec<Duration>,
    ttfts: Vec<Duration>,
    faults: BTreeMap<&'static str, u64>,
    last_fault: Option<Instant>,
    fault_gap_max: Duration,
    skipped: BTreeMap<&'static str, &'static str>,
    /// Starts that found no etcd.
    exits: u64,
    problems: Vec<String>,
    kept: u64,
}

/// See the [module](self).
#[derive(Debug)]
pub struct Report {
    folder: PathBuf,
    name: String,
    started: Instant,
    events: Mutex<File>,
    seen: Mutex<Seen>,
}

impl Report {
    /// A report into `folder`, under a name of its own: the events go to `<name>.events.log`.
    ///
    /// # Errors
    /// When the folder cannot be written.
    pub fn new(folder: &Path, name: &str) -> io::Result<Self> {
        let path = folder.join(format!("{name}.events.log"));
        let events = OpenOptions::new().create(true).append(true).open(path)?;
        Ok(Self {
            folder: folder.to_owned(),
            name: name.to_owned(),
            started: Instant::now(),
            events: Mutex::new(events),
            seen: Mutex::default(),
        })
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes a line to the events.
    pub fn event(&self, line: &str) {
        let at = self.started.elapsed().as_secs_f64();
        let mut events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = writeln!(events, "{at:9.3} {line}");
    }

    /// A fault begins.
    pub fn fault(&self, name: &'static str, target: &str) -> String {
        let mut seen = self.seen();
        *seen.faults.entry(name).or_default() += 1;
        let now = Instant::now();
        if let Some(last) = seen.last_fault.replace(now) {
            seen.fault_gap_max = seen.fault_gap_max.max(now - last);
        }
        drop(seen);
        let event = format!("{name}: {target}");
        self.event(&event);
        event
    }

    /// A fault is mended, or something went wrong about it.
    pub fn fault_over(&self, event: String, error: Option<String>) {
        match error {
            None => self.event(&format!("over: {event}")),
            Some(error) => self.problem(format!("{event}: {error}")),
        }
    }

    /// A process ended by itself, and was started again. One that finds no etcd when it starts may.
    pub fn exited(&self, name: &str, how: &str) {
        self.event(&format!("{name} ended by itself: {how}"));
        if how.contains("etcd at ") {
            self.seen().exits += 1;
        } else {
            self.problem(format!("{name} ended by itself: {how}"));
        }
    }

    /// A fault that cannot be done here.
    pub fn skipped(&self, name: &'static str, reason: &'static str) {
        self.seen().skipped.insert(name, reason);
    }

    /// Something that must not be.
    pub fn problem(&self, what: String) {
        self.event(&format!("PROBLEM: {what}"));
        self.seen().problems.push(what);
    }

    /// A stream ended.
    pub fn stream(&self, stream: &Stream<'_>, outcome: StreamOutcome) {
        let Stream { known: Known { ask, answer }, door, router, watched } = stream;
        let mut seen = self.seen();
        let mut keep = None;
        match &outcome {
            StreamOutcome::Right => {
                seen.right[usize::from(*door == Door::Grpc)] += 1;
                *seen.by_kind.entry(ask.kind).or_default() += 1;
                seen.tokens += answer.iter().map(|choice| choice.ids.len() as u64).sum::<u64>();
                seen.gaps.push(watched.gap_max);
                seen.ttfts.extend(watched.ttft);
            }
            StreamOutcome::Flawed(flaw) => {
                let (class, what) = flaw.parts();
                *seen.flawed.entry(class).or_default() += 1;
                keep = Some(format!("{class}: {what}"));
            }
            StreamOutcome::Hung => {
                seen.hung += 1;
                keep = Some("hung".to_owned());
            }
            StreamOutcome::Failed { code, message } => {
                let entry = seen.failed.entry(code.clone()).or_default();
                entry.0 += 1;
                entry.1.clone_from(message);
                keep = Some(format!("{code}: {message}"));
            }
            StreamOutcome::RouterDied => seen.router_died += 1,
            StreamOutcome::Elsewhere(why) => *seen.elsewhere.entry(why).or_default() += 1,
            StreamOutcome::Cancelled => seen.cancelled += 1,
        }
        let Some(why) = keep else { return };
        seen.kept += 1;
        let number = seen.kept;
        drop(seen);
        self.event(&format!("STREAM {number} over {}: {why}", router.router));
        if let Err(error) = self.keep(number, stream, &why) {
            self.event(&format!("stream {number} could not be kept: {error}"));
        }
    }

    /// Keeps everything about a stream that did not end well.
    fn keep(&self, number: u64, stream: &Stream<'_>, why: &str) -> io::Result<()> {
        let Stream { known: Known { ask, answer }, door, router, watched } = stream;
        let asked = watched.asked.saturating_duration_since(self.started);
        let mut text = format!(
            "{why}\n\nasked at {:.3} s, {door:?} over {}\n{}\n\nexpected {answer:#?}\n\nframes:\n",
            asked.as_secs_f64(),
            router.router,
            ask.http(),
        );
        for (at, frame) in &watched.frames {
            let _ = writeln!(text, "{:9.3} {frame}", (asked + *at).as_secs_f64());
        }
        std::fs::write(self.folder.join(format!("{}.stream-{number}.txt", self.name)), text)
    }

    /// Streams that came to an end, whatever it was.
    #[must_use]
    pub fn streams(&self) -> u64 {
        let seen = self.seen();
        seen.right.iter().sum::<u64>()
            + seen.flawed.values().sum::<u64>()
            + seen.hung
            + seen.failed.values().map(|(count, _)| count).sum::<u64>()
    }

    /// Whether nothing happened that must not. `errors_allowed`: typed errors are no failure.
    #[must_use]
    pub fn passed(&self, errors_allowed: bool) -> bool {
        let seen = self.seen();
        let errors =
            seen.failed.keys().all(|code| errors_allowed && !DEFECTS.contains(&code.as_str()));
        seen.flawed.is_empty() && seen.hung == 0 && seen.problems.is_empty() && errors
    }

    /// The summary, beside a calm run's.
    #[must_use]
    pub fn summary(&self, calm: &Self) -> String {
        let calm = calm.seen().percentiles();
        let seen = self.seen();
        let mut text = String::new();
        let flawed = |class| seen.flawed.get(class).copied().unwrap_or_default();
        let [http, grpc] = seen.right;
        let _ = writeln!(
            text,
            "streams with the undisturbed answer {} ({http} HTTP, {grpc} gRPC), {} tokens",
            http + grpc,
            seen.tokens
        );
        for (kind, count) in &seen.by_kind {
            let _ = writeln!(text, "  {kind}: {count}");
        }
        let _ = writeln!(text, "wrong answers                       {}", flawed("wrong"));
        let _ = writeln!(text, "duplicated tokens, streams          {}", flawed("duplicated"));
        let _ = writeln!(text, "missing tokens, streams             {}", flawed("missing"));
        let _ = writeln!(text, "hung streams                        {}", seen.hung);
        let errors: u64 = seen.failed.values().map(|(count, _)| count).sum();
        let _ = writeln!(text, "streams that ended with an error    {errors}");
        for (code, (count, message)) in &seen.failed {
            let _ = writeln!(text, "  {code}: {count}, such as {message:?}");
        }
        let _ = writeln!(
            text,
            "cut by their own router's death     {} (asked again)",
            seen.router_died
        );
        for (why, count) in &seen.elsewhere {
            let _ = writeln!(text, "router {why}, asked the other one: {count}");
        }
        let _ = writeln!(text, "dropped by their client             {}", seen.cancelled);
        let faults: u64 = seen.faults.values().sum();
        let gap = seen.fault_gap_max.as_secs_f64();
        let _ = writeln!(text, "faults {faults}, at most {gap:.1} s apart");
        for (name, count) in &seen.faults {
            let _ = writeln!(text, "  {name}: {count}");
        }
        for (name, reason) in &seen.skipped {
            let _ = writeln!(text, "  {name}: not here, {reason}");
        }
        let _ = writeln!(text, "starts that found no etcd, tried again {}", seen.exits);
        let here = seen.percentiles();
        // What a client waits when something breaks: its router, paused or killed, included.
        let hit = seen.gaps.iter().filter(|&&gap| gap > calm.gap_max);
        let mut added: Vec<Duration> = hit.map(|&gap| gap - calm.gap_median).collect();
        let _ = writeln!(
            text,
            "added latency of streams with a gap that no calm one has, p50/p99 {}",
            quantiles(&mut added)
        );
        let _ = writeln!(
            text,
            "largest gap of a stream, p50/p99    {} (calm: {})",
            here.gaps, calm.gaps
        );
        let _ = writeln!(
            text,
            "time to first token, p50/p99        {} (calm: {})",
            here.ttfts, calm.ttfts
        );
        let _ = writeln!(text, "problems (leaks, unclean exits)     {}", seen.problems.len());
        for problem in &seen.problems {
            let _ = writeln!(text, "  {problem}");
        }
        text
    }
}

struct Percentiles {
    gaps: String,
    gap_median: Duration,
    gap_max: Duration,
    ttfts: String,
}

impl Seen {
    fn percentiles(&self) -> Percentiles {
        let mut sorted = self.gaps.clone();
        let gaps = quantiles(&mut sorted);
        let at = |index: usize| sorted.get(index).copied().unwrap_or_default();
        let (gap_median, gap_max) = (at(sorted.len() / 2), at(sorted.len().saturating_sub(1)));
        Percentiles { gaps, gap_median, gap_max, ttfts: quantiles(&mut self.ttfts.clone()) }
    }
}

/// Median and 99th percentile, in words. Sorts `times`.
fn quantiles(times: &mut [Duration]) -> String {
    times.sort_unstable();
    let at = |share: f64| {
        let index = ((times.len() as f64 * share) as usize).min(times.len().saturating_sub(1));
        times
            .get(index)
            .map_or("-".to_owned(), |time| format!("{:.0} ms", time.as_secs_f64() * 1e3))
    };
    format!("{} / {} of {}", at(0.5), at(0.99), times.len())
}
