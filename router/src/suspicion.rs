//! Whether a node is believed to be well, from what its connections show. etcd says who belongs to
//! the cluster; a broken stream says sooner that a node is gone, paused or cut off.
//!
//! Pure: the time and the jitter are handed in. [`crate::nodes`] does what it says.

use std::time::Duration;

use tokio::time::Instant;

/// So many calls that fail in a row, on connections that hold, make a node suspect too.
const FAILURES_MAX: u32 = 5;
/// First and longest pause before a suspected node is probed.
const PROBE_MIN: Duration = Duration::from_millis(100);
const PROBE_MAX: Duration = Duration::from_secs(5);
/// Pauses are stretched by up to this share, so that routers do not probe in step.
const JITTER_PERMILLE: u32 = 250;

/// What is believed of one start of one node.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Health {
    /// Calls that failed since the last one that went well.
    failures: u32,
    /// Suspicions and failed probes since the last call that went well. A node that answers probes and
    /// breaks its streams all the same is thus left out for longer each time.
    setbacks: u32,
    out: Option<Out>,
}

#[derive(Clone, Copy, Debug)]
struct Out {
    since: Instant,
    probe_at: Instant,
}

impl Health {
    /// A connection was refused or broke: the node is suspected at once. Returns whether that is new.
    pub(crate) fn broke(&mut self, now: Instant, jitter_permille: u32) -> bool {
        self.failures = self.failures.saturating_add(1);
        self.suspect(now, jitter_permille)
    }

    /// A call failed though its connection holds. Returns whether the node is newly suspected.
    pub(crate) fn failed(&mut self, now: Instant, jitter_permille: u32) -> bool {
        self.failures = self.failures.saturating_add(1);
        self.failures >= FAILURES_MAX && self.suspect(now, jitter_permille)
    }

    /// A call went well. Returns whether that ended a suspicion.
    pub(crate) fn answered(&mut self) -> bool {
        std::mem::take(self).out.is_some()
    }

    /// A probe of a suspected node ended. Returns whether that ended the suspicion.
    pub(crate) fn probed(&mut self, well: bool, now: Instant, jitter_permille: u32) -> bool {
        let Some(out) = &mut self.out else { return false };
        if well {
            self.failures = 0;
            self.out = None;
            return true;
        }
        self.setbacks = self.setbacks.saturating_add(1);
        out.probe_at = now + pause(self.setbacks, jitter_permille);
        false
    }

    /// Since when the node is suspected.
    pub(crate) fn suspected_since(&self) -> Option<Instant> {
        self.out.map(|out| out.since)
    }

    /// When to probe it; `None` while it is believed to be well.
    pub(crate) fn probe_at(&self) -> Option<Instant> {
        self.out.map(|out| out.probe_at)
    }

    fn suspect(&mut self, now: Instant, jitter_permille: u32) -> bool {
        if self.out.is_some() {
            return false;
        }
        self.setbacks = self.setbacks.saturating_add(1);
        let probe_at = now + pause(self.setbacks, jitter_permille);
        self.out = Some(Out { since: now, probe_at });
        true
    }
}

/// The pause after so many setbacks: it doubles, up to a bound, and is stretched by the jitter.
fn pause(setbacks: u32, jitter_permille: u32) -> Duration {
    let doublings = setbacks.saturating_sub(1).min(16);
    let plain = PROBE_MIN.saturating_mul(1 << doublings).min(PROBE_MAX);
    plain + plain * jitter_permille.min(1000) / 1000 * JITTER_PERMILLE / 1000
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `testdata/suspicion.txt`: each line an event at a time, and what is believed after it.
    #[test]
    fn the_table_of_cases_holds() {
        let start = Instant::now();
        let mut health = Health::default();
        let mut lines = 0;
        for (index, line) in include_str!("../testdata/suspicion.txt").lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            if line == "clear" {
                health = Health::default();
                continue;
            }
            let (event, expected) = line.split_once("=>").unwrap();
            let words: Vec<&str> = event.split_whitespace().collect();
            let now = start + Duration::from_millis(words[0].parse().unwrap());
            let jitter = words.get(2).map_or(0, |word| word.parse().unwrap());
            match words[1] {
                "broke" => health.broke(now, jitter),
                "failed" => health.failed(now, jitter),
                "answered" => health.answered(),
                "probe-well" => health.probed(true, now, jitter),
                "probe-failed" => health.probed(false, now, jitter),
                other => panic!("unknown event {other}"),
            };
            let ms = |at: Instant| (at - start).as_millis();
            let found = match (health.suspected_since(), health.probe_at()) {
                (Some(since), Some(probe)) => {
                    format!("out since {} probe {}", ms(since), ms(probe))
                }
                _ => "well".to_owned(),
            };
            assert_eq!(found, expected.trim(), "line {}: {line}", index + 1);
            lines += 1;
        }
        assert!(lines > 20);
    }
}
