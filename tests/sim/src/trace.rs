//! What happened in a simulation: a hash of all of it, and lines for whoever wants to read it.
//!
//! What happens at one instant has no order: hosts do not hear of each other within one, and the
//! runtime wakes some tasks in an order that it draws itself. So the events of an instant are summed,
//! and the sums are hashed in order.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::time::Instant;

/// Lines kept at most.
const LINES_MAX: usize = 200_000;

/// A running hash of everything that happened, and when in virtual time. Clones share it.
#[derive(Clone, Debug)]
pub struct Trace(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    start: Instant,
    hash: u64,
    /// The latest instant, in microseconds, and the sum of its events.
    instant: u64,
    sum: u64,
    events: u64,
    lines: Option<Vec<String>>,
}

impl Trace {
    /// A trace that begins now; `verbose` keeps its lines.
    #[must_use]
    pub fn new(verbose: bool) -> Self {
        let (start, lines) = (Instant::now(), verbose.then(Vec::new));
        Self(Arc::new(Mutex::new(State { start, hash: 0, instant: 0, sum: 0, events: 0, lines })))
    }

    /// Takes an event: the numbers that tell it from others, and its line.
    pub fn add(&self, numbers: &[u64], line: fmt::Arguments<'_>) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let micros = state.start.elapsed().as_micros();
        let time = u64::try_from(micros).unwrap_or(u64::MAX);
        if time != state.instant {
            state.hash = fold(state.hash, &[state.instant, state.sum]);
            (state.instant, state.sum) = (time, 0);
        }
        state.sum = state.sum.wrapping_add(fold(0, numbers));
        state.events += 1;
        if let Some(lines) = &mut state.lines
            && lines.len() < LINES_MAX
        {
            lines.push(format!("{:>12.6} {line}", time as f64 / 1e6));
        }
    }

    /// The hash and the number of events.
    #[must_use]
    pub fn digest(&self) -> (u64, u64) {
        let state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        (fold(state.hash, &[state.instant, state.sum]), state.events)
    }

    /// The lines, if they were kept.
    #[must_use]
    pub fn lines(&self) -> Vec<String> {
        let state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.lines.clone().unwrap_or_default()
    }
}

/// FNV-1a, eight bytes at a time, with a rotation so that high bits count.
fn fold(hash: u64, numbers: &[u64]) -> u64 {
    numbers.iter().fold(hash ^ 0xcbf2_9ce4_8422_2325, |hash, &number| {
        (hash ^ number).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(29)
    })
}
