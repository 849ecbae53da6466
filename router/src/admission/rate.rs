//! How fast the cluster works off what waits.

use std::time::Duration;

use tokio::time::Instant;

/// What happened longer ago than this counts for little.
const MEMORY_SECS: f64 = 10.0;
/// A rate that was watched for less time than this is not believed.
const WATCHED_MIN_SECS: f64 = 0.25;

/// Tokens that were finished per second while others waited: the cluster's capacity, not its load.
/// The average forgets exponentially, and only the time in which somebody waited passes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rate {
    tokens: f64,
    secs: f64,
    last: Instant,
}

impl Rate {
    pub(crate) fn new(now: Instant) -> Self {
        Self { tokens: 0.0, secs: 0.0, last: now }
    }

    /// Time passed until `now`, in which somebody waited or nobody.
    pub(crate) fn pass(&mut self, now: Instant, contended: bool) {
        let secs = now.saturating_duration_since(self.last).as_secs_f64();
        self.last = self.last.max(now);
        if contended {
            let kept = (-secs / MEMORY_SECS).exp();
            self.tokens *= kept;
            self.secs = self.secs * kept + secs;
        }
    }

    /// So many tokens were finished while others waited.
    #[allow(clippy::cast_precision_loss)] // an estimate
    pub(crate) fn add(&mut self, tokens: u64) {
        self.tokens += tokens as f64;
    }

    /// How long so many tokens take; `None` as long as that is not known.
    #[allow(clippy::cast_precision_loss)] // an estimate
    pub(crate) fn time_for(&self, tokens: u64) -> Option<Duration> {
        if self.secs < WATCHED_MIN_SECS || self.tokens <= 0.0 {
            return None;
        }
        let secs = tokens as f64 * self.secs / self.tokens;
        Some(Duration::try_from_secs_f64(secs).unwrap_or(Duration::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_contended_time_counts() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut rate = Rate::new(start);
        assert_eq!(rate.time_for(10), None);
        rate.pass(at(60_000), false);
        rate.pass(at(61_000), true);
        rate.add(100);
        let known = rate.time_for(50).unwrap();
        assert!((known.as_secs_f64() - 0.5).abs() < 1e-9, "{known:?}");
        rate.pass(at(3_600_000), false);
        assert_eq!(rate.time_for(50), Some(known), "an idle hour says nothing");
    }

    #[test]
    fn a_steady_rate_is_found_and_a_new_one_is_learnt() {
        let start = Instant::now();
        let mut rate = Rate::new(start);
        let mut feed = |from: u64, to: u64, tokens: u64| {
            for tenth in from * 10..to * 10 {
                rate.pass(start + Duration::from_millis(tenth * 100), true);
                rate.add(tokens);
            }
            rate.time_for(1000).unwrap().as_secs_f64()
        };
        let steady = feed(0, 60, 100);
        assert!((0.9..1.1).contains(&steady), "{steady}");
        let slower = feed(60, 120, 10);
        assert!((9.0..11.0).contains(&slower), "{slower}");
    }
}
