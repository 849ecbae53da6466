//! What the routers count about failovers, added up over their restarts.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::sleep;

use super::client::get;
use super::fleet::{Fleet, Kind};

/// A router that dies takes with it what it counted since it was last asked.
const ASKED_EVERY: Duration = Duration::from_millis(500);
/// From a node's loss to the answer's next token.
const LATENCY: &str = "headstart_router_failover_seconds_bucket";
/// By tier, phase and cause.
const FAILOVERS: &str = "headstart_router_failovers_total";

/// See the [module](self).
#[derive(Debug, Default)]
pub struct Counters {
    /// By router and series: the last value seen.
    last: BTreeMap<(String, String), f64>,
    /// By series: everything so far.
    total: BTreeMap<String, f64>,
}

impl Counters {
    /// Follows the routers for ever.
    pub async fn follow(fleet: Arc<Fleet>, counters: Arc<Mutex<Self>>) {
        loop {
            for router in fleet.of(Kind::Router) {
                if let Ok((200, text)) = get(router.address, "/metrics").await {
                    let mut counters = counters.lock().unwrap_or_else(PoisonError::into_inner);
                    counters.take(&router.name, &text);
                }
            }
            sleep(ASKED_EVERY).await;
        }
    }

    /// Takes what a router says. A counter that is smaller than before belongs to a new start.
    fn take(&mut self, router: &str, text: &str) {
        let ours = |line: &&str| line.starts_with(LATENCY) || line.starts_with(FAILOVERS);
        for line in text.lines().filter(ours) {
            let Some((series, value)) = line.rsplit_once(' ') else { continue };
            let Ok(value) = value.parse::<f64>() else { continue };
            let last = self.last.insert((router.to_owned(), series.to_owned()), value);
            let more = last.filter(|&last| last <= value).map_or(value, |last| value - last);
            *self.total.entry(series.to_owned()).or_default() += more;
        }
    }

    /// The lines of a summary.
    #[must_use]
    pub fn summary(&self) -> String {
        let mut text = String::new();
        let failovers: Vec<_> =
            self.total.iter().filter(|(name, _)| name.starts_with(FAILOVERS)).collect();
        let count = failovers.iter().fold(0.0, |sum, (_, value)| sum + **value);
        let _ = writeln!(text, "failovers, as the routers count them {count}");
        for (series, value) in failovers {
            let _ = writeln!(text, "  {}: {value}", &series[FAILOVERS.len()..]);
        }
        let _ = writeln!(
            text,
            "from a node's loss to the next token, p50/p99 within {} / {}",
            self.within(0.5),
            self.within(0.99)
        );
        text
    }

    /// The bound of the bucket that holds this share of the failovers.
    fn within(&self, share: f64) -> String {
        let bound = |series: &str| {
            let bound = series.split("le=\"").nth(1)?.split('"').next()?;
            if bound == "+Inf" { Some(f64::INFINITY) } else { bound.parse().ok() }
        };
        let mut buckets: Vec<(f64, f64)> = self
            .total
            .iter()
            .filter(|(series, _)| series.starts_with(LATENCY))
            .filter_map(|(series, &count)| Some((bound(series)?, count)))
            .collect();
        buckets.sort_by(|one, other| one.0.total_cmp(&other.0));
        let all = buckets.last().map_or(0.0, |bucket| bucket.1);
        let holds = |bucket: &&(f64, f64)| all > 0.0 && bucket.1 >= all * share;
        buckets.iter().find(holds).map_or("-".to_owned(), |bucket| format!("{} s", bucket.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_add_up_over_restarts_and_routers() {
        let mut counters = Counters::default();
        let text = |few: u32, all: u32, lost: u32| {
            format!(
                "# HELP x\nheadstart_router_failover_seconds_bucket{{le=\"0.5\"}} {few}\n\
                 headstart_router_failover_seconds_bucket{{le=\"5\"}} {all}\n\
                 headstart_router_failover_seconds_bucket{{le=\"+Inf\"}} {all}\n\
                 headstart_router_failovers_total{{tier=\"base\"}} {lost}\nother_total 7\n"
            )
        };
        counters.take("r1", &text(1, 2, 3));
        counters.take("r2", &text(0, 1, 1));
        counters.take("r1", &text(2, 3, 4));
        counters.take("r1", &text(1, 1, 2));
        let summary = counters.summary();
        assert!(summary.contains("as the routers count them 7\n"), "{summary}");
        assert!(summary.contains("within 0.5 s / 5 s"), "{summary}");
    }
}
